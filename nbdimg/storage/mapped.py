"""A file's pages in memory, mapped, so that a system call sends them without a copy of their own.

Nothing here touches a mapped byte: for one that is not in memory this thread would wait, and one behind the file's end,
or that the device does not give, would end the process with SIGBUS. A system call waits as well, or fails with EFAULT.
So bytes are handed out when the kernel has said that they are in memory, for one call that follows in the same turn of
the loop. Should they have left it by then, which takes a lack of memory in just these microseconds, or be on their way
to a disk whose queue is full, that call waits for the disk, and for a while the file's are not handed out (`was_sent`).
Should they be gone, `fetch` says what a read says.

Files are mapped in windows, of which there are WINDOWS_MAX for all files of a loop. Those that were not used of late
are given back by `tidy`, never in the midst of a turn. Each costs the kernel 8 bytes for a page of it that was used.
What is mapped counts as resident memory of the process; it is the page cache's all the same.
"""

from __future__ import annotations

import asyncio
import resource
from time import perf_counter

from nbdimg.storage import system
from nbdimg.storage.perloop import PerLoop
from nbdimg.storage.system import PAGE_SIZE, Residence
from nbdimg.units import MiB

WINDOW_SIZE = 128 * MiB
"""Bytes of a file in one map: 256 KiB of page tables at most."""

WINDOWS_MAX = 128
"""16 GiB in all, for 32 MiB of page tables. While all of them are in use, the rest is read and not mapped; all is where
the process's address space is limited, which they would use up."""

RESIDENT_MAX = 1 * MiB
"""Bytes that are handed out at a time."""

SLOW_S = 0.020
"""A call that takes longer has waited for the disk."""

SLOW_PAUSES = 10
"""For so many times as long as it took, the file's bytes are not handed out: at most a tenth of the time is lost."""


class _Window:
    """Of one file, from `index * WINDOW_SIZE` on. Raises: OSError: from the constructor, when it cannot be mapped."""

    __slots__ = ("address", "index", "pages", "residence", "view", "was_used")

    def __init__(self, pages: Pages, index: int, residence: Residence) -> None:
        self.pages = pages
        self.index = index
        self.residence = residence
        self.address = system.map_pages(pages.descriptor, index * WINDOW_SIZE, WINDOW_SIZE)
        self.view = system.memory_at(self.address, WINDOW_SIZE)
        self.was_used = True


class _Maps:
    """All windows of one loop."""

    def __init__(self) -> None:
        self.windows: dict[_Window, None] = {}
        is_free = resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
        self._windows_max = WINDOWS_MAX if is_free else 0
        self._residence = Residence(RESIDENT_MAX // PAGE_SIZE + 1)

    def add(self, pages: Pages, index: int) -> _Window | None:
        """A new window, if there may be one more. Raises: OSError: it cannot be mapped."""
        if len(self.windows) >= self._windows_max:
            return None
        window = _Window(pages, index, self._residence)
        self.windows[window] = None
        return window

    def drop(self, window: _Window) -> None:
        del self.windows[window]
        del window.pages.windows[window.index]
        system.unmap_pages(window.address, WINDOW_SIZE)

    def drop_all(self) -> None:
        for window in list(self.windows):
            self.drop(window)


_maps = PerLoop(_Maps, _Maps.drop_all)


class Pages:
    """Those of one open file."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.windows: dict[int, _Window] = {}
        self._is_refused = False
        """This file, or this process, gets no map."""
        self._rests_until = 0.0

    def resident(self, offset: int, length: int) -> memoryview | None:
        """The range, if all of it is in memory and in one window; None: it has to be read.

        For a system call of this turn alone.
        """
        index, start = divmod(offset, WINDOW_SIZE)
        stop = start + length
        if length > RESIDENT_MAX or stop > WINDOW_SIZE or (self._rests_until and self._rests()):
            return None
        window = self.windows.get(index) or self._map(index)
        if window is None:
            return None
        window.was_used = True
        return window.view[start:stop] if window.residence.is_whole(window.address, start, stop) else None

    def was_sent(self, took_s: float) -> None:
        """The call that what was handed out is for took so long."""
        if took_s > SLOW_S:
            self._rests_until = perf_counter() + took_s * SLOW_PAUSES

    def _rests(self) -> bool:
        if perf_counter() >= self._rests_until:
            self._rests_until = 0.0
        return bool(self._rests_until)

    def _map(self, index: int) -> _Window | None:
        if self._is_refused:
            return None
        try:
            window = _maps.get().add(self, index)
        except OSError:
            self._is_refused = True
            return None
        if window is not None:
            self.windows[index] = window
        return window

    def fetch(self, offset: int, into: memoryview) -> None:
        """Read what was resident, as `BlockFile.pread`; it may wait. Raises: OSError."""
        system.pread(self.descriptor, offset, into)

    async def close(self) -> None:
        """Nothing of it is mapped any more. Comes before the descriptor is closed: a map would keep its locks."""
        self._is_refused = True
        while self.windows:
            _maps.get().drop(next(iter(self.windows.values())))
            await asyncio.sleep(0)


def tidy() -> None:
    """Give back the oldest window that was not used since the last call: one, for that may take some milliseconds, in
    which everybody waits. Between two turns of the running loop.
    """
    maps = _maps.get()
    unused = [window for window in maps.windows if not window.was_used]
    for window in maps.windows:
        window.was_used = False
    if unused:
        maps.drop(unused[0])
