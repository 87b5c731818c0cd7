"""An open image: guest bytes moved over whatever its driver maps, and through its backing images.

Ask, load, ask again is written once, in `_answer`. The `try_` methods are the fast path: plain calls that either do
the whole thing now or change nothing that a guest can see and say no; both paths use the same look-up.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from nbdimg.errors import GuardedWrite, ImageError, RequestError
from nbdimg.histogram import Histogram
from nbdimg.image.bitmap import DirtyBitmap
from nbdimg.image.driver import (
    Allocation,
    BitmapStore,
    Extent,
    ExtentKind,
    FormatDriver,
    HasBitmaps,
    HasTables,
    Miss,
    Unmap,
)
from nbdimg.image.flush import FlushGate
from nbdimg.image.seen import SeenThrough
from nbdimg.image.tables import TableCache
from nbdimg.image.turns import Turns
from nbdimg.storage import ordering
from nbdimg.storage.file import ZERO_WRITE_SIZE, BlockFile, Buffer
from nbdimg.storage.mapped import Pages
from nbdimg.units import KiB, MiB, align_down, align_up

T = TypeVar("T")

INLINE_FILL_MAX = 128 * KiB
"""Bytes of head and tail that the fast path puts around a write that allocates: it copies them on the loop's thread."""

TRY_WRITE_MAX = 1 * MiB
"""Bytes of a write that the fast path takes, in however many pieces; how long a piece may be, its file says."""

SPAN_EXTENTS_MAX = 1024
"""Extents of a write that are looked at to see whether all are in place; one of more takes whole clusters."""

_ZEROES = memoryview(bytes(ZERO_WRITE_SIZE))
_ZERO = ExtentKind.ZERO
_BACKING = ExtentKind.BACKING


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of what was read: `length` bytes at guest `offset`, stored or (`is_hole`) zeroes."""

    offset: int
    length: int
    is_hole: bool


class Resident(NamedTuple):
    """Stored bytes that are in memory, for one system call in this turn of the loop, and for nobody to touch."""

    view: memoryview
    pages: Pages
    file_offset: int

    def fetch(self, skip: int, into: memoryview) -> None:
        """Read from `skip` on in place of that; it may wait. Raises: OSError."""
        self.pages.fetch(self.file_offset + skip, into)


@dataclass(frozen=True, slots=True)
class HeadGuard:
    """Refuses writes to an image's first `size` bytes that would turn it into something else.

    `reason` gets the bytes as they would become, and returns why not, or None.
    """

    size: int
    reason: Callable[[bytes], str | None]


class Image:
    """Guest offsets are below `size`; the caller has checked ranges, and orders overlapping requests.

    `backing` is closed with the image, unless it `shares_backing` with others. Then it does not remember places in it
    either: that memory would be spent once for each of them.
    """

    def __init__(
        self,
        driver: FormatDriver,
        *,
        writable: bool,
        guard: HeadGuard | None = None,
        backing: Image | None = None,
        shares_backing: bool = False,
    ) -> None:
        self.driver = driver
        self.path = driver.file.path
        self.is_writable = writable
        self.backing = backing
        self._shares_backing = shares_backing
        self._seen_through = None if backing is None or shares_backing else SeenThrough(driver.cluster_size)
        self._guard = guard
        self.guarded_size = guard.size if guard else 0
        self.gate = FlushGate(self.path, self._barrier)
        self.sync_times = Histogram()
        """Of the single files' barriers that a flush consists of."""
        self._bitmaps: BitmapStore | None = None
        self._recording: BitmapStore | None = None
        """What must know of every change; None: nothing does, and then it costs nothing."""
        self.bitmaps_changed()
        self._marking = asyncio.Lock()
        self.turns = Turns()

    def count_with(self, other: Image) -> None:
        """Have flushes counted as if they were of `other`."""
        self.gate.times = other.gate.times
        self.sync_times = other.sync_times

    @property
    def size(self) -> int:
        return self.driver.size

    @property
    def failure(self) -> str | None:
        """Why writes or flushes fail until it is opened anew; None: nothing is wrong."""
        return self.gate.failure or self.driver.failure

    def overhauled(self) -> None:
        """A change of the driver's tables at large has ended. If the driver failed in it, nobody knows what
        is mapped where: every later write and flush fails, those in place too.
        """
        self.gate.failure = self.failure

    def resized(self) -> None:
        """The driver's size has changed."""
        if self._seen_through is not None:
            self._seen_through.extents.clear()

    # Dirty bitmaps

    def bitmaps_changed(self) -> None:
        """The driver has other bitmaps than before, or others of them record."""
        bitmaps = self.driver.bitmaps if isinstance(self.driver, HasBitmaps) else None
        self._bitmaps = bitmaps
        self._recording = bitmaps if bitmaps and self.is_writable and bitmaps.recording else None

    @property
    def bitmap_names(self) -> Sequence[str]:
        """The dirty bitmaps that can be asked for."""
        return self._bitmaps.names if self._bitmaps is not None else ()

    async def bitmap(self, name: str) -> DirtyBitmap:
        """One of `bitmap_names`; it follows changes if it is enabled.

        Raises: RequestError: EINVAL, it has been removed since. OSError, ImageError.
        """
        assert self._bitmaps is not None
        return await self._bitmaps.get(name)

    def _try_record(self, recording: BitmapStore, offset: int, stop: int) -> bool:
        """The range is about to change. False: the bitmaps are not marked yet, which waits."""
        if not recording.is_marked:
            return False
        for bitmap in recording.recording:
            bitmap.set_range(offset, stop)
        return True

    async def record(self, offset: int, stop: int) -> None:
        """Bytes of the range are about to change; `write`, `trim` and `zero` say so themselves.

        Raises: OSError: they must not be changed.
        """
        recording = self._recording
        if recording is None or offset >= stop:
            return
        if not recording.is_marked:
            async with self._marking:
                if not recording.is_marked:
                    await self._mark(recording)
        self._try_record(recording, offset, stop)

    async def _mark(self, recording: BitmapStore) -> None:
        """A barrier that fails here leaves the same doubt as one of a flush: what an earlier server wrote may be lost.

        Raises: OSError.
        """
        try:
            await recording.mark()
        except ordering.UnwrittenError:
            raise
        except OSError as error:
            reason = error.strerror or str(error)
            self.gate.failure = f"its bitmaps could not be marked in use ({reason}); open it anew"
            raise

    # Look-up

    def tables(self) -> Iterator[tuple[str, TableCache]]:
        """The tables in memory, of this image and of those behind it, each with its kind."""
        if isinstance(self.driver, HasTables):
            yield from self.driver.tables.items()
        if self.backing is not None:
            yield from self.backing.tables()

    def look_up(self, offset: int, stop: int) -> Extent | Miss:
        """As the driver's `map`, through the chain: never of kind BACKING.

        What is remembered is looked for in the whole group of clusters; where another of them is not in memory, or is
        malformed, in these bytes alone.
        """
        seen = self._seen_through
        if seen is None:
            return self._find(offset, stop)
        known = seen.extents.get(offset // seen.unit)
        if known is not None and known.offset <= offset and stop <= known.stop:
            return known
        extent = self.driver.map(offset, stop)
        if isinstance(extent, Miss) or extent.kind is not _BACKING:
            return extent
        first, last = seen.group(offset)
        last = max(stop, min(last, self.size))
        for start in (first, offset):
            with suppress(ImageError):
                found = self._find(start, last)
                if isinstance(found, Extent) and offset < found.stop:
                    seen.remember(found, offset)
                    return found
        return self._look_through(extent, offset, min(stop, extent.stop))

    def _find(self, offset: int, stop: int) -> Extent | Miss:
        """`look_up` without what this image remembers."""
        extent = self.driver.map(offset, stop)
        if isinstance(extent, Miss) or extent.kind is not _BACKING:
            return extent
        return self._look_through(extent, offset, min(stop, extent.stop))

    def _remapped(self, offset: int, stop: int) -> None:
        """This image's own mapping has changed there."""
        if self._seen_through is not None:
            self._seen_through.forget(offset, stop)

    def _look_through(self, extent: Extent, offset: int, stop: int) -> Extent | Miss:
        """What `extent` leaves to the backing image, at `offset`; beyond that image's end there are zeroes."""
        backing = self.backing
        if backing is None or offset >= backing.size:
            start = max(extent.offset, backing.size if backing else 0)
            return Extent(_ZERO, start, extent.stop - start, extent.file, 0, False, 0)
        ask = backing.look_up if self._seen_through is None else backing._find
        found = ask(offset, min(stop, backing.size))
        if isinstance(found, Miss):
            return found
        start, end = max(found.offset, extent.offset), min(found.stop, extent.stop)
        file_offset = found.file_offset + start - found.offset
        return Extent(found.kind, start, end - start, found.file, file_offset, False, found.depth and found.depth + 1)

    async def _answer(self, ask: Callable[[int, int], T | Miss], offset: int, stop: int) -> T:
        while isinstance(answer := ask(offset, stop), Miss):
            await answer.load()
        return answer

    def change_span(self, offset: int, stop: int) -> tuple[int, int]:
        """The range that a write of these bytes must have for itself: whole clusters where the mapping may change or
        is not in memory, else the bytes.
        """
        position, end = offset, min(stop, self.size)
        for _ in range(SPAN_EXTENTS_MAX):
            extent = self.driver.place(position, end)
            if isinstance(extent, Miss) or not extent.writable:
                break
            position = extent.stop
            if position >= end:
                return offset, stop
        return self.cluster_span(offset, stop)

    def cluster_span(self, offset: int, stop: int) -> tuple[int, int]:
        """The range rounded out to whole clusters."""
        unit = self.driver.cluster_size
        return align_down(offset, unit), align_up(stop, unit)

    # The fast path

    def resident(self, offset: int, stop: int) -> Extent | None:
        """The extent of stored data around guest `offset`, if it is known without waiting. Its data need not be in
        memory: `try_resident` is for what is.
        """
        extent = self.look_up(offset, stop)
        return None if isinstance(extent, Miss) or extent.kind is _ZERO else extent

    def writable(self, offset: int, stop: int) -> Extent | None:
        """The extent around guest `offset` in which a write goes in place, if it is known without waiting and the
        image takes writes there. Whoever writes into it tells `gate.changed`. None while bitmaps record changes.
        """
        if offset < self.guarded_size or self.gate.failure is not None or self._recording is not None:
            return None
        extent = self.driver.place(offset, stop)
        return None if isinstance(extent, Miss) or not extent.writable else extent

    def try_read(self, offset: int, stop: int, view: memoryview) -> int:
        """Read from guest `offset` towards `stop` without waiting, as far as one extent and `view` go.

        Returns n > 0: n bytes of data are in `view`; n < 0: the next -n bytes read as zeroes, `view` is untouched;
        0: it would wait.
        """
        extent = self.look_up(offset, stop)
        if isinstance(extent, Miss):
            return 0
        skip = offset - extent.offset
        length = extent.length - skip
        if length > stop - offset:
            length = stop - offset
        if extent.kind is _ZERO:
            return -length
        if length < len(view):
            view = view[:length]
        return len(view) if extent.file.try_pread(extent.file_offset + skip, view) else 0

    def try_resident(self, offset: int, stop: int) -> Resident | None:
        """The range from guest `offset` towards `stop` as it lies in memory, as far as one extent goes.

        None: it has to be read, or is a hole.
        """
        extent = self.resident(offset, stop)
        if extent is None or extent.file.pages is None:
            return None
        pages, skip = extent.file.pages, offset - extent.offset
        view = pages.resident(extent.file_offset + skip, min(extent.length - skip, stop - offset))
        return None if view is None else Resident(view, pages, extent.file_offset + skip)

    def try_write(self, offset: int, data: memoryview) -> bool:
        """Write without waiting. False: not all of it is known to be written, use `write`.

        Raises: ImageFailed: an earlier flush failed. OSError: the write did.
        """
        self.gate.check()
        if offset < self.guarded_size or len(data) > TRY_WRITE_MAX:
            return False
        stop = offset + len(data)
        if self._recording is not None and not self._try_record(self._recording, offset, stop):
            return False
        driver = self.driver
        try:
            while offset < stop:
                extent = driver.place(offset, stop)
                if isinstance(extent, Miss):
                    return False
                if extent.writable:
                    count = min(extent.stop, stop) - offset
                    if not extent.file.try_pwrite(extent.file_offset + offset - extent.offset, data[:count]):
                        return False
                else:
                    count = self._try_allocate(offset, stop, data)
                    if count == 0:
                        return False
                offset += count
                data = data[count:]
        finally:
            self.gate.changed()
        return True

    def _try_allocate(self, offset: int, stop: int, data: memoryview) -> int:
        """Write the beginning of `data` into new space; returns how many bytes, 0 when it would wait."""
        driver = self.driver
        if driver.is_strained or not self.is_writable:
            return 0
        allocation = driver.reserve(offset, stop)
        if isinstance(allocation, Miss):
            return 0
        skip = offset - allocation.offset
        end = allocation.offset + allocation.length
        count = min(end, stop) - offset
        payload: memoryview | bytearray = data[:count]
        file_offset = allocation.file_offset + skip
        done = False
        try:
            needs_head = skip and not (allocation.is_zeroed and allocation.head is _ZERO)
            needs_tail = offset + count < end and not (allocation.is_zeroed and allocation.tail is _ZERO)
            if needs_head or needs_tail:
                filled = self._try_fill(allocation, offset, data[:count])
                if filled is None:
                    return 0
                payload, file_offset = filled, allocation.file_offset
            done = allocation.file.try_pwrite(file_offset, payload)
        finally:
            if done:
                driver.commit(allocation)
                self._remapped(offset, offset + count)
            else:
                driver.release(allocation)
        return count if done else 0

    def _try_fill(self, allocation: Allocation, offset: int, payload: memoryview) -> bytearray | None:
        """The allocation's whole content, if it is in memory and small."""
        if allocation.length > INLINE_FILL_MAX:
            return None
        content = bytearray(allocation.length)
        view = memoryview(content)
        skip = offset - allocation.offset
        after = skip + len(payload)
        view[skip:after] = payload
        for start, stop in ((0, skip), (after, min(allocation.length, self.size - allocation.offset))):
            while start < stop:
                position = allocation.offset + start
                count = self.try_read(position, allocation.offset + stop, view[start:stop])
                if count == 0:
                    return None
                start += abs(count)
        return content

    # The slow path

    async def read(self, offset: int, view: memoryview) -> list[Segment]:
        """Read into `view` from guest `offset`. The segments cover the range in order, without gap or overlap; what
        belongs to holes is left as it was in `view`.
        """
        segments: list[Segment] = []
        reads: list[tuple[BlockFile, int, memoryview]] = []
        start, stop = offset, offset + len(view)
        pace = self.turns.pace()
        while offset < stop:
            await pace.step()
            extent = await self._answer(self.look_up, offset, stop)
            count = min(extent.stop, stop) - offset
            is_hole = extent.kind is _ZERO
            if not is_hole:
                piece = view[offset - start : offset - start + count]
                file_offset = extent.file_offset + offset - extent.offset
                if len(piece) == len(view) or not extent.file.try_pread(file_offset, piece):
                    reads.append((extent.file, file_offset, piece))
            segments.append(Segment(offset, count, is_hole))
            offset += count
        await _all([file.pread(file_offset, piece) for file, file_offset, piece in reads])
        return segments

    async def write(self, offset: int, data: Buffer) -> None:
        """Write `data` at guest `offset`. On OSError any part of the range may have changed."""
        view = memoryview(data)
        self.gate.check()
        if offset < self.guarded_size:
            await self._check_head(offset, view[: self.guarded_size - offset])
        stop = offset + len(view)
        await self.record(offset, stop)
        try:
            while offset < stop:
                extent = await self._answer(self.driver.place, offset, stop)
                if extent.writable:
                    piece = view[: extent.stop - offset]
                    await extent.file.pwrite(extent.file_offset + offset - extent.offset, piece)
                    count = len(piece)
                else:
                    count = await self._allocate(offset, stop, view)
                offset += count
                view = view[count:]
        finally:
            self.gate.changed()

    async def _allocate(self, offset: int, stop: int, view: memoryview) -> int:
        """Write the beginning of `view` into new space; returns how many bytes."""
        if not self.is_writable:
            raise RequestError(errno.EPERM, "the image is read-only", offset)
        await self._relieve()
        allocation = await self._answer(self.driver.reserve, offset, stop)
        end = allocation.offset + allocation.length
        count = min(end, stop) - offset
        try:
            await self._fill(allocation, offset, view[:count])
        except BaseException:
            if allocation.is_new:
                with suppress(OSError):  # on a full disk, metadata needs what has been written of it
                    await allocation.file.punch(allocation.file_offset, allocation.length)
            self.driver.release(allocation)
            raise
        self.driver.commit(allocation)
        self._remapped(offset, offset + count)
        return count

    async def _relieve(self) -> None:
        """Flush where too much waits for a flush."""
        if self.driver.is_strained:
            self.gate.changed()
            await self.gate.flush()

    async def _fill(self, allocation: Allocation, offset: int, payload: memoryview) -> None:
        """Write an allocation's data, with its head and tail in the same write where they are needed."""
        start, after = offset, offset + len(payload)
        end = allocation.offset + allocation.length
        if not (allocation.is_zeroed and allocation.head is _ZERO):
            start = allocation.offset
        if allocation.is_zeroed and allocation.tail is _ZERO:
            end = after
        if (start, end) == (offset, after):
            await allocation.file.pwrite(allocation.file_offset + offset - allocation.offset, payload)
            return
        content = bytearray(end - start)
        view = memoryview(content)
        view[offset - start : after - start] = payload
        if start < offset:
            await self.read(start, view[: offset - start])
        known = min(end, self.size)
        if after < known:
            await self.read(after, view[after - start : known - start])
        await allocation.file.pwrite(allocation.file_offset + start - allocation.offset, content)

    async def _check_head(self, offset: int, piece: Buffer) -> None:
        """Raises: GuardedWrite: EPERM, the guard's reason against `piece` at `offset`."""
        assert self._guard is not None
        head = bytearray(min(self._guard.size, self.size))
        await self.read(0, memoryview(head))
        head[offset : offset + len(piece)] = piece
        reason = self._guard.reason(bytes(head))
        if reason is not None:
            raise GuardedWrite(errno.EPERM, reason, offset)

    async def trim(self, offset: int, length: int) -> None:
        """Give the range's space back where that can be done; else the range stays as it is: trim is advice.

        What a file calls a hole may have space all the same, reserved and never written.
        """

        async def punch(extent: Extent, start: int, count: int) -> None:
            await extent.file.punch(start, count)

        unit = self.driver.unmap_size
        stop = offset + length
        start = align_up(offset, unit)
        stop = stop if stop == self.size else align_down(stop, unit)
        self.gate.check()
        await self.record(start, stop)
        await self._unmap(start, max(start, stop), Unmap.TRIM, punch)

    async def zero(self, offset: int, length: int, *, may_unmap: bool, is_fast_only: bool) -> None:
        """Make the range read as zeroes, with its space kept unless `may_unmap`.

        Raises: RequestError: ENOTSUP with `is_fast_only`, when it would take a write of zeroes.
        """

        async def zero(extent: Extent, start: int, count: int) -> None:
            file = extent.file
            if may_unmap and (await file.punch(start, count) or extent.kind is _ZERO):
                return
            if await file.zero(start, count):
                return
            if is_fast_only:
                raise RequestError(errno.EOPNOTSUPP, "zeroes would have to be written out here", offset)
            for position, zeroes in _zeroes(start, start + count):
                await file.pwrite(position, zeroes)

        unit = self.driver.unmap_size
        stop = offset + length
        start = min(align_up(offset, unit), stop)
        whole_stop = stop if stop == self.size else max(start, align_down(stop, unit))
        self.gate.check()
        edges = [
            edge
            for edge in ((offset, start), (whole_stop, stop))
            if edge[0] < edge[1] and not await self._is_zero(*edge)
        ]
        if edges and is_fast_only:
            raise RequestError(errno.EOPNOTSUPP, "zeroes would have to be written out here", edges[0][0])
        await self.record(offset, stop)
        for edge in edges:
            await self._write_zeroes(*edge)
        await self._unmap(start, whole_stop, Unmap.ZERO if may_unmap else Unmap.KEEP, zero)

    async def _write_zeroes(self, offset: int, stop: int) -> None:
        for position, zeroes in _zeroes(offset, stop):
            await self.write(position, zeroes)

    async def _is_zero(self, offset: int, stop: int) -> bool:
        while offset < stop:
            extent = await self._answer(self.look_up, offset, stop)
            if extent.kind is not _ZERO:
                return False
            offset = extent.stop
        return True

    async def _unmap(
        self, offset: int, stop: int, to: Unmap, change: Callable[[Extent, int, int], Awaitable[None]]
    ) -> None:
        """Change the mapping of whole units; where that cannot be done, `change(extent, file offset, length)`."""
        if offset < self.guarded_size and offset < stop:
            await self._check_head(offset, bytes(min(stop, self.guarded_size) - offset))
        pace = self.turns.pace()
        while offset < stop:
            await pace.step()
            await self._relieve()
            reached = await self._answer(lambda start, end: self.driver.unmap(start, end, to), offset, stop)
            if reached > offset:
                self._remapped(offset, reached)
                self.gate.changed()
                offset = reached
                continue
            offset = await self._change_in_place(offset, stop, to, change)

    async def _change_in_place(
        self, offset: int, stop: int, to: Unmap, change: Callable[[Extent, int, int], Awaitable[None]]
    ) -> int:
        """One extent of the range; returns where it ends. What is not in place is left alone, or zeroes are written."""
        unit = self.driver.cluster_size
        if unit > 1:
            stop = min(stop, align_up(offset + 1, unit))
        extent = await self._answer(self.driver.map, offset, stop)
        count = min(extent.stop, stop) - offset
        try:
            if extent.writable:
                await change(extent, extent.file_offset + offset - extent.offset, count)
            elif to is not Unmap.TRIM and not await self._is_zero(offset, offset + count):
                await self._write_zeroes(offset, offset + count)
        finally:
            self.driver.unmapped(offset, count)
            self.gate.changed()
        return offset + count

    async def map(self, offset: int, length: int, extents_max: int) -> list[Extent]:
        """The extents of a range in order, clipped to it; fewer than cover it when `extents_max` is reached."""
        extents: list[Extent] = []
        stop = offset + length
        pace = self.turns.pace()
        while offset < stop and len(extents) < extents_max:
            await pace.step()
            extent = await self._answer(self.look_up, offset, stop)
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
            if extent.kind is not _ZERO:
                await extent.file.prefetch(extent.file_offset, extent.length)

    async def flush(self) -> None:
        """Everything written before the call is durable on return. Raises: ImageFailed."""
        await self.gate.flush()

    async def _barrier(self) -> None:
        """Of a read-only image too, whose driver plans nothing: see F3."""
        if not self.is_writable:
            await self.driver.file.fdatasync()
            return
        await ordering.run(self.driver.flush_plan(), self.sync_times)
        with suppress(OSError):
            await self.driver.flushed()

    async def close(self) -> None:
        """Flush what is dirty and close the files. Raises: ImageFailed: a flush failed; the files are closed."""
        try:
            if self.is_writable:
                await self.flush()
                await self.driver.close()
        finally:
            await self.discard()

    async def discard(self) -> None:
        """Close the files and write nothing: what is not flushed is not wanted."""
        self.gate.close()
        await self.driver.abandon()
        if self._seen_through is not None:
            self._seen_through.extents.clear()
        if self.backing is not None and not self._shares_backing:
            await self.backing.close()


def _zeroes(start: int, stop: int) -> Iterator[tuple[int, memoryview]]:
    """The writes that fill the range with zeroes."""
    for position in range(start, stop, ZERO_WRITE_SIZE):
        yield position, _ZEROES[: stop - position]


async def _all(reads: list[Awaitable[None]]) -> None:
    """Wait for all, then raise the first error: a buffer is not given back while somebody still fills it."""
    if len(reads) == 1:
        await reads[0]
    elif reads:
        for outcome in await asyncio.gather(*reads, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
