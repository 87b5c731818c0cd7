"""Compaction of an image that nobody uses: less space, the same disk.

    1  drop    blocks that hold nothing but zeroes become ZERO, in 1 and 3 what is left of old blocks is let go
    2  move    from the file's end downwards, each block, sector bitmap and the BAT into the lowest hole that holds it
    3  cut     the log is declared empty, the end cut off, remaining holes are punched

A move is: copy, barrier, log entry with the new BAT entry, or region tables, barrier, in place, barrier. What is copied
to belongs to nothing by what is durable, and space that was left is behind everything that is still moved: it is never
copied to, and is given up in 3. So a crash at any moment leaves what is moved whole in one of the two places, and the
BAT, or the region tables, say in which.

DataWriteGuid stays: a guest sees the same, and children of this image still fit. A block that was only partly written
in a file with a parent is moved as it is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from mmap import mmap

from nbdimg.errors import CorruptImage, UnsupportedFeature
from nbdimg.formats.vhdx import structs as s
from nbdimg.formats.vhdx.check import Survey, unused
from nbdimg.formats.vhdx.geometry import BITMAP_SIZE, State
from nbdimg.formats.vhdx.header import load_headers
from nbdimg.formats.vhdx.offline import Session, bat_pieces, region_pages, touch, try_cut
from nbdimg.formats.vhdx.parts import Parts
from nbdimg.formats.vhdx.replay import replay_to_file
from nbdimg.formats.zeroed import zeroed
from nbdimg.storage.file import BlockFile, extent_at, read
from nbdimg.units import MiB

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)."""

_BAT = 0xFFFF_FFFF
"""Stands for the BAT among owners: above the index of any entry."""

BATCH_SIZE = 64 * MiB
"""Bytes that are moved for one log entry: three barriers are little beside it."""
_PIECE_SIZE = 1 * MiB


@dataclass(slots=True)
class Compacted:
    """Sizes of the file in bytes; how many blocks were dropped, and how many blocks and bitmaps were moved."""

    old_size: int
    size: int = 0
    dropped_count: int = 0
    moved_count: int = 0


async def compact(file: BlockFile, *, progress: Progress | None = None) -> Compacted:
    """Compact the image in a file that is open for writing and locked; durable on return.

    Raises: UnsupportedFeature: it is a fixed image, or has no log. CorruptImage: a check finds it corrupt, and nothing
    was changed. OSError: it is as sound as before, and the work can be taken up again.
    """
    await replay_to_file(file, await load_headers(file))
    survey = Survey(file)
    await survey.run()
    report = survey.report
    if survey.parts is None or report.corruptions or report.check_errors:
        finding = next(each for each in report.findings if each.kind != "leak")
        raise CorruptImage(
            file.path,
            f"its metadata is not sound, repair it first: {finding.structure}: {finding.message}",
            finding.offset,
        )
    if survey.parts.geometry.is_fixed:
        raise UnsupportedFeature(
            file.path, "it is a fixed image, whose blocks stay; expected a dynamic or differencing"
        )
    return await _Compaction(file, survey.parts, survey.used, progress).run()


class _Compaction:
    def __init__(self, file: BlockFile, parts: Parts, used: mmap, progress: Progress | None) -> None:
        self._file = file
        self._parts = parts
        self._used = used
        """A byte for each MiB of the file."""
        self._owners = zeroed("I", used.rfind(b"\1") + 1)
        """By the MiB at which a block, a bitmap or the BAT begins: its BAT entry's index + 1, or _BAT. Nothing begins
        behind what is in use, and a file may be terabytes longer.
        """
        self._owners[parts.regions.bat_offset // MiB] = _BAT
        self._progress = progress
        self._session: Session | None = None
        self._total = 2 * file.size
        self._result = Compacted(file.size)

    async def run(self) -> Compacted:
        await self._drop()
        await self._move()
        if self._session is not None:
            await self._session.end()
        await self._cut()
        return self._result

    def _report(self, done: int) -> None:
        if self._progress is not None:
            self._progress(min(done, self._total), self._total)

    def _at(self, index: int) -> int:
        return self._parts.regions.bat_offset + 8 * index

    def _free(self, offset: int, length: int) -> None:
        first, stop = offset // MiB, min((offset + length) // MiB, len(self._used))
        self._used[first:stop] = bytes(max(0, stop - first))

    async def _put(self, words: dict[int, int]) -> None:
        """BAT entries by file offset; the session begins with the first. `words` is empty then."""
        if words:
            await (await self._begun()).put(words)
            words.clear()

    async def _begun(self) -> Session:
        if self._session is None:
            session = Session(self._file, self._parts.headers)
            await session.begin()
            self._session = session
        return self._session

    # Drop

    async def _drop(self) -> None:
        count = self._parts.geometry.entry_count
        words: dict[int, int] = {}
        async for first, entries in bat_pieces(self._file, self._parts.regions.bat_offset, 0, count):
            freed: list[tuple[int, int]] = []
            for index, entry in enumerate(entries, first):
                if entry not in (State.NOT_PRESENT, State.ZERO):
                    await self._look_at(index, entry, words, freed)
            await self._put(words)
            for offset, length in freed:
                self._free(offset, length)
            self._report(self._total // 2 * (first + len(entries)) // count)

    async def _look_at(self, index: int, entry: int, words: dict[int, int], freed: list[tuple[int, int]]) -> None:
        """Take note of who lies where; what can be let go is put into `words` and `freed`."""
        geometry = self._parts.geometry
        stride = geometry.chunk_ratio + 1
        state, offset = entry & s.ENTRY_STATE_MASK, entry & s.ENTRY_OFFSET_MASK
        block = index - index // stride
        if index % stride == stride - 1:
            if not geometry.has_parent:
                words[self._at(index)] = State.NOT_PRESENT
            else:
                self._owners[offset // MiB] = index + 1
        elif block >= geometry.block_count:
            words[self._at(index)] = State.NOT_PRESENT
        elif state < State.FULLY_PRESENT:
            if offset:
                words[self._at(index)] = state
                freed.append((offset, geometry.block_size))
        elif state == State.FULLY_PRESENT and await self._is_zero(offset, self._length(block)):
            words[self._at(index)] = State.ZERO
            freed.append((offset, geometry.block_size))
            self._result.dropped_count += 1
        else:
            self._owners[offset // MiB] = index + 1

    def _length(self, block: int) -> int:
        """Bytes of a block that are the guest's."""
        geometry = self._parts.geometry
        return min(geometry.block_size, geometry.size - block * geometry.block_size)

    async def _is_zero(self, offset: int, length: int) -> bool:
        async for _, piece in self._data(offset, length):
            if piece.count(0) != len(piece):
                return False
        return True

    async def _data(self, offset: int, length: int) -> AsyncIterator[tuple[int, bytes]]:
        """(file offset, bytes) of what is no hole."""
        stop = min(offset + length, self._file.size)
        while offset < stop:
            is_data, end = await extent_at(self._file, offset)
            end = min(end, stop) if end > offset else stop
            while is_data and offset < end:
                count = min(_PIECE_SIZE, end - offset)
                yield offset, await read(self._file, offset, count)
                offset += count
            offset = end

    # Move

    async def _move(self) -> None:
        stride = self._parts.geometry.chunk_ratio + 1
        words: dict[int, int] = {}
        lowest: dict[int, int | None] = {}
        """By size in MiB, where to look for a hole; None: there is none."""
        moved = 0
        for unit in range(len(self._owners) - 1, -1, -1):
            owner = self._owners[unit]
            if not owner:
                continue
            index = owner - 1
            if owner == _BAT:
                size = self._parts.regions.bat_length
            elif index % stride == stride - 1:
                size = BITMAP_SIZE
            else:
                size = self._parts.geometry.block_size
            hole = self._hole(size // MiB, unit, lowest)
            if hole is None:
                continue
            if owner == _BAT:
                await self._put(words)
            await self._copy(unit * MiB, hole * MiB, size)
            self._free(unit * MiB, size)
            self._used[hole : hole + size // MiB] = b"\1" * (size // MiB)
            if owner == _BAT:
                await self._move_bat(hole * MiB)
                continue
            words[self._at(index)] = hole * MiB | await self._state(index)
            self._result.moved_count += 1
            moved += size
            if moved >= BATCH_SIZE:
                await self._put(words)
                moved = 0
                self._report(self._total // 2 + (len(self._owners) - unit) * MiB)
        await self._put(words)

    async def _move_bat(self, offset: int) -> None:
        """The copy at `offset` is the BAT from now on."""
        session = await self._begun()
        regions = self._parts.regions
        regions = regions.with_bat(replace(regions.bat, offset=offset))
        await session.change(await region_pages(self._file, regions.entries))
        self._parts = replace(self._parts, regions=regions)

    def _hole(self, size: int, below: int, lowest: dict[int, int | None]) -> int | None:
        """The lowest hole of `size` MiB, if it ends at or before `below`. Holes only get fewer down there."""
        start = lowest.get(size, 1)
        hole = -1 if start is None else self._used.find(bytes(size), start)
        if hole < 0 or hole + size > below:
            lowest[size] = None
            return None
        lowest[size] = hole + size
        return hole

    async def _state(self, index: int) -> int:
        return int.from_bytes(await read(self._file, self._at(index), 8), "little") & s.ENTRY_STATE_MASK

    async def _copy(self, source: int, target: int, length: int) -> None:
        """The target belongs to nothing: holes stay holes where that can be done."""
        if await self._file.punch(target, length):
            async for offset, piece in self._data(source, length):
                if piece.count(0) != len(piece):
                    await self._file.pwrite(target + offset - source, piece)
            return
        for start in range(0, length, _PIECE_SIZE):
            count = min(_PIECE_SIZE, length - start)
            await self._file.pwrite(target + start, await read(self._file, source + start, count))

    # Cut

    async def _cut(self) -> None:
        """Nothing refers to what is given up here, and no log speaks of a larger file."""
        end = (self._used.rfind(b"\1") + 1) * MiB
        if self._session is None and end < self._file.size:
            await touch(self._file)
        if end < self._file.size:
            await try_cut(self._file, end)
        for start, stop in unused(self._used[: end // MiB]):
            await self._file.punch(start * MiB, (stop - start) * MiB)
        await self._file.fdatasync()
        self._result.size = self._file.size
        self._report(self._total)
