"""Replay of the log: into memory beneath a read-only image, or into the file.

    (R1) A read-only open changes nothing in the file; what the log says lies over it.
    (R2) In the file: a new FileWriteGuid, the changes, a barrier, the size, a barrier, and only then the header that
         says that the log is empty. A crash at any moment leaves a log that is replayed again, to the same end.
    (R3) DataWriteGuid stays: a guest sees the same as before, and the children of this file still fit.

Changes are collected in order, the later over the earlier, and applied when all are known; more than fits into memory
is applied to a file in several rounds, and refused for a read-only image.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from uuid import uuid4

from nbdimg.errors import UnsupportedFeature
from nbdimg.formats.vhdx import structs as s
from nbdimg.formats.vhdx.header import Header, Headers, next_header, write_header
from nbdimg.formats.vhdx.log import Change, Page, Sequence, load_active, read_changes
from nbdimg.storage.file import BlockFile, Buffer, extent_at, zero
from nbdimg.units import MiB, align_up

_PAGE = s.PAGE_SIZE
_WRITE_SIZE = 1 * MiB


class Layer:
    """4 KiB pages and ranges of zeroes that lie over a file; where both are, the page is the later one."""

    def __init__(self) -> None:
        self._pages: dict[int, bytes] = {}
        self._offsets: list[int] = []
        """Of the pages, sorted."""
        self._starts: list[int] = []
        self._stops: list[int] = []
        """Of the ranges of zeroes, sorted; they neither overlap nor touch."""

    @property
    def is_full(self) -> bool:
        return len(self._offsets) >= s.REPLAY_PAGES_MAX or len(self._starts) >= s.REPLAY_RANGES_MAX

    @property
    def stop(self) -> int:
        """Where the last change ends."""
        return max(self._offsets[-1] + _PAGE if self._offsets else 0, self._stops[-1] if self._stops else 0)

    def add(self, change: Change) -> None:
        if isinstance(change, Page):
            if change.offset not in self._pages:
                insort(self._offsets, change.offset)
            self._pages[change.offset] = change.data
        elif change.length:
            self._add_zeroes(change.offset, change.offset + change.length)

    def _add_zeroes(self, start: int, stop: int) -> None:
        first, last = bisect_left(self._offsets, start), bisect_left(self._offsets, stop)
        for offset in self._offsets[first:last]:
            del self._pages[offset]
        del self._offsets[first:last]
        first, last = bisect_left(self._stops, start), bisect_right(self._starts, stop)
        if first < last:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def zeroes(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of the ranges."""
        return zip(self._starts, self._stops, strict=True)

    def runs(self) -> Iterator[tuple[int, bytes]]:
        """The pages, neighbours joined up to 1 MiB: (offset, content)."""
        start, pieces = 0, list[bytes]()
        for offset in self._offsets:
            if pieces and (offset != start + len(pieces) * _PAGE or len(pieces) * _PAGE >= _WRITE_SIZE):
                yield start, b"".join(pieces)
                pieces = []
            if not pieces:
                start = offset
            pieces.append(self._pages[offset])
        if pieces:
            yield start, b"".join(pieces)

    def patch(self, offset: int, view: memoryview) -> None:
        """Put what lies over the file from `offset` on into `view`."""
        stop = offset + len(view)
        for index in range(bisect_right(self._stops, offset), bisect_left(self._starts, stop)):
            start, end = max(self._starts[index], offset), min(self._stops[index], stop)
            view[start - offset : end - offset] = bytes(end - start)
        for index in range(bisect_right(self._offsets, offset - _PAGE), bisect_left(self._offsets, stop)):
            page = self._offsets[index]
            start, end = max(page, offset), min(page + _PAGE, stop)
            view[start - offset : end - offset] = self._pages[page][start - page : end - page]

    def extent(self, offset: int) -> tuple[bool | None, int | None]:
        """Whether the byte at `offset` is of a page, of zeroes (False) or of the file (None), and where that ends."""
        index = bisect_right(self._offsets, offset)
        if index and offset < self._offsets[index - 1] + _PAGE:
            return True, self._offsets[index - 1] + _PAGE
        ends = self._offsets[index : index + 1]
        index = bisect_right(self._starts, offset)
        is_zero = bool(index and offset < self._stops[index - 1])
        ends += [self._stops[index - 1]] if is_zero else self._starts[index : index + 1]
        return False if is_zero else None, min(ends) if ends else None


class ReplayedFile:
    """A file as it will be when its log has been replayed: read-only, with what the log changes in memory.

    Closing it closes the file below.
    """

    is_writable = False
    pages = None

    def __init__(self, file: BlockFile, layer: Layer, size: int) -> None:
        self.path = file.path
        self._file = file
        self._layer = layer
        self._size = size

    @property
    def size(self) -> int:
        return self._size

    def try_pread(self, offset: int, view: memoryview) -> bool:
        if not self._file.try_pread(offset, view):
            return False
        self._layer.patch(offset, view)
        return True

    async def pread(self, offset: int, view: memoryview) -> None:
        await self._file.pread(offset, view)
        self._layer.patch(offset, view)

    def try_data_extent(self, offset: int) -> tuple[bool, int] | None:
        is_data, stop = self._own_extent(offset)
        if is_data is not None:
            return is_data, stop
        found = self._file.try_data_extent(offset)
        return found and (found[0], min(found[1], stop))

    async def data_extent(self, offset: int) -> tuple[bool, int]:
        is_data, stop = self._own_extent(offset)
        if is_data is not None:
            return is_data, stop
        is_data, end = await self._file.data_extent(offset)
        return is_data, min(end, stop)

    def _own_extent(self, offset: int) -> tuple[bool | None, int]:
        """What is known without the file below. None: that one decides, as far as this goes."""
        is_data, stop = self._layer.extent(offset)
        stop = self._size if stop is None else min(stop, self._size)
        return (False if is_data is None and offset >= self._file.size else is_data), stop

    async def prefetch(self, offset: int, length: int) -> None:
        await self._file.prefetch(offset, length)

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        return False

    async def pwrite(self, offset: int, data: Buffer) -> None:
        raise self._read_only()

    async def punch(self, offset: int, length: int) -> bool:
        raise self._read_only()

    async def zero(self, offset: int, length: int) -> bool:
        raise self._read_only()

    async def truncate(self, size: int) -> None:
        raise self._read_only()

    async def fdatasync(self) -> None:
        """Nothing was written."""

    async def close(self) -> None:
        await self._file.close()

    def _read_only(self) -> OSError:
        return OSError(errno.EROFS, os.strerror(errno.EROFS), self.path)


async def open_replayed(file: BlockFile, header: Header, *, ignore_log: bool = False) -> BlockFile:
    """The file for a read-only image: itself when there is nothing to replay. The file is left as it is.

    Raises: as `load_active`; UnsupportedFeature: the log changes more than fits into memory.
    """
    active = await load_active(file, header, ignore_log=ignore_log)
    if active is None:
        return file
    layer = Layer()
    async for changes in read_changes(file, header, active):
        for change in changes:
            layer.add(change)
        if layer.is_full:
            raise UnsupportedFeature(
                file.path,
                f"the log at {header.log_offset} must be replayed in memory and changes {s.REPLAY_PAGES_MAX} pages of "
                f"{_PAGE} bytes or {s.REPLAY_RANGES_MAX} ranges of zeroes, allowed are less: open the image writable",
                header.log_offset,
            )
    return ReplayedFile(file, layer, max(file.size, _needed(active), layer.stop))


def _needed(active: Sequence) -> int:
    """The smallest size that the file may have afterwards. Every size of a VHDX file is a multiple of 1 MiB."""
    return align_up(active.head.last_offset, s.ALIGNMENT)


async def replay_to_file(file: BlockFile, headers: Headers, *, ignore_log: bool = False) -> Headers:
    """Replay the log into a writable file; returns the headers as they are then, with a log that is empty.

    Nothing is done when the log is not in use. Afterwards region tables and metadata may be others than before.

    Raises: as `load_active`. OSError: the log is as it was, and may be replayed again.
    """
    assert file.is_writable
    header = headers.current
    if not header.has_log:
        return headers
    active = await load_active(file, header, ignore_log=ignore_log)
    headers = await write_header(file, headers, next_header(header, file_write_guid=uuid4()))
    if active is not None:
        await _apply_all(file, header, active)
    for _ in range(2):
        headers = await write_header(file, headers, next_header(headers.current, log_guid=s.NO_GUID))
    return headers


async def _apply_all(file: BlockFile, header: Header, active: Sequence) -> None:
    layer, needed = Layer(), _needed(active)
    async for changes in read_changes(file, header, active):
        for change in changes:
            layer.add(change)
        if layer.is_full:
            needed = max(needed, layer.stop)
            await _apply(file, layer)
            layer = Layer()
    needed = max(needed, layer.stop)
    await _apply(file, layer)
    await file.fdatasync()
    if file.size < needed:
        await file.truncate(needed)
        await file.fdatasync()


async def _apply(file: BlockFile, layer: Layer) -> None:
    """Zeroes only where the file may have other bytes: behind its end it is zero when it grows, and a hole is already,
    which the barrier that follows makes durable. In one hole there may be thousands of ranges.
    """
    hole_stop = 0
    for start, stop in layer.zeroes():
        stop = min(stop, file.size)
        if start >= stop:
            break
        if hole_stop < stop:
            is_data, end = await extent_at(file, start)
            hole_stop = 0 if is_data else end
        if hole_stop < stop:
            await zero(file, start, stop)
    for offset, content in layer.runs():
        await file.pwrite(offset, content)
