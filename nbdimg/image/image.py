"""An open image: guest bytes moved over whatever its driver maps.

Ask, load, ask again is written once, in `_extent`. The `try_` methods are the fast path: plain calls that either do
the whole thing now or change nothing and say no; both paths use the same look-up.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from nbdimg.errors import RequestError
from nbdimg.image.driver import Extent, ExtentKind, FormatDriver, Miss
from nbdimg.image.flush import FlushGate
from nbdimg.storage import ordering
from nbdimg.storage.file import Buffer
from nbdimg.units import MiB

ZERO_WRITE_SIZE = 1 * MiB
"""Bytes in one write where zeroes must be written out."""

_ZEROES = memoryview(bytes(ZERO_WRITE_SIZE))
_DATA = ExtentKind.DATA


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of what was read: `length` bytes at guest `offset`, stored or (`is_hole`) zeroes."""

    offset: int
    length: int
    is_hole: bool


@dataclass(frozen=True, slots=True)
class HeadGuard:
    """Refuses writes to an image's first `size` bytes that would turn it into something else.

    `reason` gets the bytes as they would become, and returns why not, or None.
    """

    size: int
    reason: Callable[[bytes], str | None]


class Image:
    """Guest offsets are below `size`; the caller has checked ranges, and orders overlapping requests."""

    def __init__(self, driver: FormatDriver, *, writable: bool, guard: HeadGuard | None = None) -> None:
        self.driver = driver
        self.path = driver.file.path
        self.is_writable = writable
        self._guard = guard
        self.guarded_size = guard.size if guard else 0
        self.gate = FlushGate(self.path, self._barrier)

    @property
    def size(self) -> int:
        return self.driver.size

    async def _extent(self, look_up: Callable[[int], Extent | Miss], offset: int) -> Extent:
        while isinstance(extent := look_up(offset), Miss):
            await self.driver.load(extent)
        return extent

    def resident(self, offset: int) -> Extent | None:
        """The extent of stored data around guest `offset`, if it is known without waiting."""
        extent = self.driver.map(offset)
        return None if isinstance(extent, Miss) or extent.kind is not _DATA else extent

    def writable(self, offset: int) -> Extent | None:
        """The extent around guest `offset` in which a write goes in place, if it is known without waiting and the
        image takes writes there. Whoever writes into it tells `gate.changed`.
        """
        if offset < self.guarded_size or self.gate.failure is not None:
            return None
        extent = self.driver.place(offset)
        return None if isinstance(extent, Miss) or not extent.writable else extent

    def try_read(self, offset: int, stop: int, view: memoryview) -> int:
        """Read from guest `offset` towards `stop` without waiting, as far as one extent and `view` go.

        Returns n > 0: n bytes of data are in `view`; n < 0: the next -n bytes read as zeroes, `view` is untouched;
        0: it would wait.
        """
        extent = self.driver.map(offset)
        if isinstance(extent, Miss):
            return 0
        skip = offset - extent.offset
        length = extent.length - skip
        if length > stop - offset:
            length = stop - offset
        if extent.kind is not _DATA:
            return -length
        if length < len(view):
            view = view[:length]
        return len(view) if extent.file.try_pread(extent.file_offset + skip, view) else 0

    def try_write(self, offset: int, data: memoryview) -> bool:
        """Write in place without waiting. False: nothing is known to be written, use `write`.

        Raises: ImageFailed: an earlier flush failed. OSError: the write did.
        """
        self.gate.check()
        extent = self.writable(offset)
        if extent is None or offset + len(data) > extent.stop:
            return False
        if not extent.file.try_pwrite(extent.file_offset + offset - extent.offset, data):
            return False
        self.gate.changed()
        return True

    async def read(self, offset: int, view: memoryview) -> list[Segment]:
        """Read into `view` from guest `offset`. The segments cover the range in order, without gap or overlap; what
        belongs to holes is left as it was in `view`.
        """
        segments = []
        start, stop = offset, offset + len(view)
        while offset < stop:
            extent = await self._extent(self.driver.map, offset)
            count = min(extent.stop, stop) - offset
            is_hole = extent.kind is not _DATA
            if not is_hole:
                piece = view[offset - start : offset - start + count]
                await extent.file.pread(extent.file_offset + offset - extent.offset, piece)
            segments.append(Segment(offset, count, is_hole))
            offset += count
        return segments

    async def write(self, offset: int, data: Buffer) -> None:
        """Write `data` at guest `offset`. On OSError any part of the range may have changed."""
        view = memoryview(data)
        self.gate.check()
        if offset < self.guarded_size:
            await self._check_head(offset, view[: self.guarded_size - offset])
        try:
            while view:
                extent = await self._extent(self.driver.place, offset)
                assert extent.writable
                piece = view[: extent.stop - offset]
                await extent.file.pwrite(extent.file_offset + offset - extent.offset, piece)
                offset += len(piece)
                view = view[len(piece) :]
        finally:
            self.gate.changed()

    async def _check_head(self, offset: int, piece: Buffer) -> None:
        """Raises: RequestError: EPERM, the guard's reason against `piece` at `offset`."""
        assert self._guard is not None
        head = bytearray(min(self._guard.size, self.size))
        await self.read(0, memoryview(head))
        head[offset : offset + len(piece)] = piece
        reason = self._guard.reason(bytes(head))
        if reason is not None:
            raise RequestError(errno.EPERM, reason, offset)

    async def trim(self, offset: int, length: int) -> None:
        """Give the range's space back where that can be done; else the range stays as it is: trim is advice."""

        async def punch(extent: Extent, start: int, count: int) -> None:
            if extent.kind is _DATA:
                await extent.file.punch(start, count)

        await self._change_in_place(offset, length, punch)

    async def zero(self, offset: int, length: int, *, may_unmap: bool, is_fast_only: bool) -> None:
        """Make the range read as zeroes, with its space kept unless `may_unmap`.

        Raises: RequestError: ENOTSUP with `is_fast_only`, when it would take a write of zeroes.
        """

        async def zero(extent: Extent, start: int, count: int) -> None:
            file = extent.file
            if may_unmap and (extent.kind is not _DATA or await file.punch(start, count)):
                return
            if await file.zero(start, count):
                return
            if is_fast_only:
                raise RequestError(errno.EOPNOTSUPP, "zeroes would have to be written out here", offset)
            for position in range(start, start + count, ZERO_WRITE_SIZE):
                await file.pwrite(position, _ZEROES[: start + count - position])

        await self._change_in_place(offset, length, zero)

    async def _change_in_place(
        self, offset: int, length: int, change: Callable[[Extent, int, int], Awaitable[None]]
    ) -> None:
        """Call `change(extent, file offset, length)` for each piece of the range."""
        self.gate.check()
        stop = offset + length
        if offset < self.guarded_size:
            await self._check_head(offset, bytes(min(stop, self.guarded_size) - offset))
        while offset < stop:
            extent = await self._extent(self.driver.map, offset)
            assert extent.writable
            count = min(extent.stop, stop) - offset
            try:
                await change(extent, extent.file_offset + offset - extent.offset, count)
            finally:
                self.driver.unmapped(offset, count)
                self.gate.changed()
            offset += count

    async def map(self, offset: int, length: int, extents_max: int) -> list[Extent]:
        """The extents of a range in order, clipped to it; fewer than cover it when `extents_max` is reached."""
        extents: list[Extent] = []
        stop = offset + length
        while offset < stop and len(extents) < extents_max:
            extent = await self._extent(self.driver.map, offset)
            skip = offset - extent.offset
            count = min(extent.stop, stop) - offset
            clipped = Extent(
                extent.kind, offset, count, extent.file, extent.file_offset + skip, extent.writable, extent.depth
            )
            extents.append(clipped)
            offset += count
        return extents

    async def prefetch(self, offset: int, length: int) -> None:
        """Ask for the range to be in memory soon."""
        for extent in await self.map(offset, length, extents_max=64):
            if extent.kind is _DATA:
                await extent.file.prefetch(extent.file_offset, extent.length)

    async def flush(self) -> None:
        """Everything written before the call is durable on return. Raises: ImageFailed."""
        await self.gate.flush()

    async def _barrier(self) -> None:
        await ordering.run(self.driver.flush_plan())

    async def close(self) -> None:
        """Flush what is dirty and close the files. Raises: ImageFailed: a flush failed; the files are closed."""
        try:
            if self.is_writable:
                await self.flush()
        finally:
            await self.driver.file.close()
