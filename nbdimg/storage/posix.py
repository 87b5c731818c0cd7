"""Files and block devices of this machine.

What may run on the loop's own thread is decided here and nowhere else:

    read    tried inline with RWF_NOWAIT, which gives what the page cache holds and never waits for a device. Of file
            systems without it (EOPNOTSUPP) those in memory are read inline. The others may have to ask a server, which
            may not answer, for anything: workers. Their files' size is known from what was done to them.
    write   up to INLINE_WRITE_MAX bytes into the page cache, unless a page that is written in part would have to be
            read first, or the last inline write was slow (the kernel throttles writers): then workers, for a while.
            Where reads are never inline, workers as well.
    rest    fdatasync, fallocate, truncate, readahead: workers. So is close, at which a network file system writes what
            it has, and others free the space of a file that has no name any more.

What changes a file is done by few workers at a time.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any, TypeVar

from nbdimg.storage import system
from nbdimg.storage.file import Buffer
from nbdimg.storage.mapped import Pages
from nbdimg.storage.workers import Series, workers
from nbdimg.storage.writeback import WriteBack
from nbdimg.units import KiB

T = TypeVar("T")

INLINE_WRITE_MAX = 512 * KiB
"""Bytes; a copy of this size into the page cache takes about 0.1 ms, which is what a neighbour waits. While a worker
copies a longer one, the next is received."""

SLOW_WRITE_S = 0.020
"""An inline write that takes longer was throttled by the kernel."""

SLOW_WRITE_PAUSES = 10
"""For so many times as long as it took, writes then go to workers: a throttled writer holds the loop up for at most a
tenth of the time, and one that was merely preempted loses little.
"""

CHANGES_MAX = 3
"""Workers that change one file at a time: the kernel lets one do so, and where the loop is busy the others wait for the
interpreter's lock meanwhile, some milliseconds for each call. More of them would wait for each other.
"""

_PAGE_MASK = system.PAGE_SIZE - 1


class PosixFile:
    """One open descriptor. Not locked: see `locks.lock_image`.

    With `descriptor` the file is open already: the object takes it over, and `path` is only what messages call it.
    `identity` is (st_dev, st_ino): two files with the same one are the same file, whatever their names.

    Raises: OSError: from the constructor, when the path cannot be opened or is neither a file nor a block device; a
        descriptor that was handed in is closed then.
    """

    def __init__(self, path: str | os.PathLike[str], *, writable: bool, descriptor: int | None = None) -> None:
        self.path = os.fspath(path)
        self.is_writable = writable
        if descriptor is None:
            flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
            descriptor = os.open(self.path, flags)
        self.descriptor = descriptor
        try:
            status = os.fstat(self.descriptor)
            self.is_block_device = stat.S_ISBLK(status.st_mode)
            if not (self.is_block_device or stat.S_ISREG(status.st_mode)):
                raise OSError(errno.EINVAL, "neither a regular file nor a block device", self.path)
            self.identity = (status.st_dev, status.st_ino)
            self._has_nowait = self._writes_inline = True
            self._in_memory = False
            """Asked for where reads know no RWF_NOWAIT."""
            self._known_size: int | None = None
            """In bytes, where the system may have to ask others for it, and for where data is."""
            if not system.reads_without_waiting(descriptor):
                self._lose_nowait()
        except OSError:
            os.close(self.descriptor)
            raise
        self._inline_writes_from = 0.0
        may_map = self._has_nowait and system.knows_residence(descriptor)
        self.pages = Pages(descriptor) if may_map else None
        self._write_back = WriteBack(self.descriptor)
        self._changes = Series(CHANGES_MAX)

    def _lose_nowait(self) -> None:
        self._has_nowait = False
        self._writes_inline = self._in_memory = system.is_memory_file_system(self.identity[0])
        if not (self._in_memory or self.is_block_device):
            self._known_size = self._measure()

    @property
    def size(self) -> int:
        return self._measure() if self._known_size is None else self._known_size

    def _measure(self) -> int:
        return os.lseek(self.descriptor, 0, os.SEEK_END)

    def try_pread(self, offset: int, view: memoryview) -> bool:
        try:
            if self._has_nowait:
                return os.preadv(self.descriptor, (view,), offset, os.RWF_NOWAIT) == len(view)
            return self._in_memory and os.preadv(self.descriptor, (view,), offset) == len(view)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP or not self._has_nowait:
                raise
            self._lose_nowait()
            return self.try_pread(offset, view)

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        length = len(data)
        if length > INLINE_WRITE_MAX or not self._writes_inline:
            return False
        if (offset | length) & _PAGE_MASK and not self._has_edges(offset, offset + length):
            return False
        started = perf_counter()
        if started < self._inline_writes_from:
            return False
        written = os.pwrite(self.descriptor, data, offset)
        took = perf_counter() - started
        if took > SLOW_WRITE_S:
            self._inline_writes_from = started + took * SLOW_WRITE_PAUSES
        self._write_back.wrote(offset, length)
        return written == length

    def _has_edges(self, start: int, stop: int) -> bool:
        """Whether the pages that the range covers only in part are in memory: else they would have to be read."""
        if start & _PAGE_MASK and not self._is_resident(start & ~_PAGE_MASK):
            return False
        return not stop & _PAGE_MASK or self._is_resident(stop & ~_PAGE_MASK)

    def _is_resident(self, page_offset: int) -> bool:
        probe = memoryview(bytearray(1))
        return self.try_pread(page_offset, probe) or page_offset >= self.size

    async def pread(self, offset: int, view: memoryview) -> None:
        await workers().run(self._pread, offset, view)

    def _pread(self, offset: int, view: memoryview) -> None:
        system.pread(self.descriptor, offset, view)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        try:
            await self._change(self._pwrite, offset, memoryview(data))
        except OSError:
            if self._known_size is not None:
                self._known_size = max(self._known_size, await workers().run(self._measure))
            raise
        if self._known_size is not None:
            self._known_size = max(self._known_size, offset + len(data))
        self._write_back.wrote(offset, len(data))

    def _pwrite(self, offset: int, view: memoryview) -> None:
        position = 0
        while position < len(view):
            count = os.pwrite(self.descriptor, view[position:], offset + position)
            if count == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            position += count

    async def fdatasync(self) -> None:
        await workers().run(os.fdatasync, self.descriptor)
        self._write_back.flushed()

    async def punch(self, offset: int, length: int) -> bool:
        return await self._change(system.fallocate, self.descriptor, system.PUNCH, offset, length)

    async def zero(self, offset: int, length: int) -> bool:
        return await self._change(system.fallocate, self.descriptor, system.ZERO, offset, length)

    async def truncate(self, size: int) -> None:
        await self._change(os.ftruncate, self.descriptor, size)
        if self._known_size is not None:
            self._known_size = size

    def _change(self, function: Callable[..., T], *args: Any) -> Awaitable[T]:
        """On a worker. The kernel changes a file under its inode's lock, one call at a time; devices have none."""
        if self.is_block_device:
            return workers().run(function, *args)
        return workers().run_next(self._changes, function, *args)

    async def prefetch(self, offset: int, length: int) -> None:
        await workers().run(os.posix_fadvise, self.descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def try_data_extent(self, offset: int) -> tuple[bool, int] | None:
        return self._data_extent(offset) if self._known_size is None else None

    async def data_extent(self, offset: int) -> tuple[bool, int]:
        return await workers().run(self._data_extent, offset)

    def _data_extent(self, offset: int) -> tuple[bool, int]:
        size = self.size
        if self.is_block_device:
            return True, size
        try:
            data_start = os.lseek(self.descriptor, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return False, size
            if error.errno == errno.EINVAL:
                return True, size
            raise
        if data_start > offset:
            return False, data_start
        return True, os.lseek(self.descriptor, offset, os.SEEK_HOLE)

    async def close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            if self.pages is not None:
                await self.pages.close()
            await self._write_back.close()
            await workers().run(os.close, descriptor)
