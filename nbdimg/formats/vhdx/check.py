"""Check of an image: headers, log, region tables, metadata, and every entry of the BAT against all that has a place.

Corruptions are what a reader would stumble over or what breaks the format. A leak is space that nothing refers to,
counted in MiB; some MiB between the regions and the first block are how writers lay out a file, and no leak. Nor is a
hole in the file, which takes no room, unless it is at the end; and what a block device has behind the image is no
leak at all, for no device can be cut. A log that is to be replayed is neither: everything is
looked at as it will be then.

    QEMU   looks for FULLY_PRESENT entries behind the file's end and for regions that overlap, nothing else

A sector bitmap's content cannot be wrong: any bit may be set. Spec: [MS-VHDX] 2.2 to 2.6.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from mmap import mmap

from nbdimg.errors import CorruptImage, ImageError, UnsupportedFeature
from nbdimg.formats.findings import CheckReport
from nbdimg.formats.vhdx import structs as s
from nbdimg.formats.vhdx.geometry import BITMAP_SIZE, State
from nbdimg.formats.vhdx.header import Headers, load_headers
from nbdimg.formats.vhdx.log import load_active
from nbdimg.formats.vhdx.offline import bat_pieces
from nbdimg.formats.vhdx.parts import Parts, load_parts
from nbdimg.formats.vhdx.replay import open_replayed
from nbdimg.formats.zeroed import zeroed_bytes
from nbdimg.storage.file import BlockFile, extent_at
from nbdimg.units import MiB, align_up, counted, div_ceil

Progress = Callable[[int, int], None]
"""(entries done, entries in all)."""

LAYOUT_SLACK = 5 * MiB
"""Unused space behind a structure up to which it is layout: QEMU leaves 4 MiB."""

_TURN_ENTRIES = 4096
"""Entries that are looked at before the loop gets its turn: a resize checks an image that is served."""
_PIECE_ENTRIES = 512
"""Entries that are looked at as one if they can be."""
_ZEROES = array("Q", [State.ZERO]) * _PIECE_ENTRIES
_RUN_MIN = 8
"""Entries for which it is worth a look whether their blocks lie in a row."""


@dataclass(slots=True)
class VhdxReport(CheckReport):
    """`log` says whether it is clean. Clusters are blocks."""

    log: str = ""
    device_rest: int = 0
    """Bytes that a block device has behind all that is in use: nothing to give back."""


async def check(file: BlockFile, *, is_device: bool = False, progress: Progress | None = None) -> VhdxReport:
    """Look at everything and change nothing. What cannot be checked is a finding of kind "error". Raises: OSError.

    Args: is_device: whether it is a block device, whose end stays where it is.
    """
    survey = Survey(file, is_device=is_device)
    await survey.run(progress)
    return survey.report


async def log_state(file: BlockFile, headers: Headers) -> tuple[str, CorruptImage | UnsupportedFeature | None]:
    """What there is to replay, in words, and what forbids it. Raises: OSError."""
    try:
        active = await load_active(file, headers.current)
    except (CorruptImage, UnsupportedFeature) as error:
        return "broken", error
    if active is None:
        return "clean", None
    count = sum(entry.descriptor_count for entry in active.entries)
    if not count:
        return "in use, nothing to replay", None
    return f"to be replayed: {counted(count, 'change')} in {counted(len(active.entries), 'entry', 'entries')}", None


class Survey:
    """One check, with all that a repair and a compaction want to know.

    `parts` is None when they cannot be read. `used` has a byte for each MiB of the file, 1 if something is there.
    """

    def __init__(self, file: BlockFile, *, is_device: bool = False) -> None:
        self._file = file
        self._is_device = is_device
        self.report = VhdxReport()
        self.parts: Parts | None = None
        self.used = zeroed_bytes(0)
        self.has_sound_bat = True
        """Whether no entry of the BAT is a corruption."""
        self.leaks: list[tuple[int, int]] = []
        """(start, stop) in MiB of unused space that takes room or is at the file's end, in order."""
        self.stray_entries: list[int] = []
        """File offsets of the BAT's entries that a file without a parent has of sector bitmaps."""
        self._awaited: tuple[int, int] | None = None
        """The entry of a bitmap that must be present, and the block for which."""
        self._follows = 0

    async def run(self, progress: Progress | None = None) -> None:
        """Raises: OSError."""
        try:
            await self._load()
            await self._check_bat(progress)
            await self._find_unused()
        except ImageError as error:
            self.report.add("error", "image", error.offset, str(error))

    def _corruption(self, structure: str, offset: int, message: str) -> None:
        self.report.add("corruption", structure, offset, message)

    # All but the BAT

    async def _load(self) -> None:
        headers = await load_headers(self._file)
        if headers.other is None:
            slot = 1 - headers.slot
            message = "signature 'head' or checksum is wrong, expected a second valid header"
            self._corruption(f"header {slot + 1}", s.HEADER_OFFSETS[slot], message)
        self.report.log, broken = await log_state(self._file, headers)
        if broken is not None:
            self._corruption("log", headers.current.log_offset, str(broken))
        self._file = await open_replayed(self._file, headers.current, ignore_log=broken is not None)
        self.parts = parts = await load_parts(self._file, headers)
        for slot in parts.regions.damaged_slots:
            message = "it differs from the other copy, or its signature or checksum is wrong, expected the same twice"
            self._corruption(f"region table {slot + 1}", s.REGION_TABLE_OFFSETS[slot], message)
        if self._file.size > s.FILE_OFFSET_MAX:
            raise UnsupportedFeature(
                self._file.path, f"the file has {self._file.size} bytes, expected at most {s.FILE_OFFSET_MAX}"
            )
        self.used = zeroed_bytes(div_ceil(self._file.size, MiB))
        for start, stop, name in parts.structures():
            if stop > align_up(self._file.size, MiB):
                message = f"it ends at {stop}, expected inside the file's {self._file.size} bytes"
                self._corruption(name.removeprefix("the "), start, message)
            self._mark(start, stop)

    def _mark(self, start: int, stop: int) -> None:
        first, last = start // MiB, min(stop // MiB, len(self.used))
        if first < last:
            self.used[first:last] = b"\1" * (last - first)

    @property
    def knows_unused(self) -> bool:
        """Whether what is not `used` belongs to nobody: all of the BAT was read and is sound, and no log changes it."""
        return (
            self.parts is not None
            and self.has_sound_bat
            and not self.report.check_errors
            and self.report.log == "clean"
        )

    # The BAT

    async def _check_bat(self, progress: Progress | None) -> None:
        assert self.parts is not None
        geometry, regions = self.parts.geometry, self.parts.regions
        self.report.total_clusters = geometry.block_count
        count = geometry.entry_count
        self.parts.check_bat_length(self._file.path)
        async for first, entries in bat_pieces(self._file, regions.bat_offset, 0, count):
            for start in range(0, len(entries), _TURN_ENTRIES):
                self._check_piece(first + start, entries[start : start + _TURN_ENTRIES])
                await asyncio.sleep(0)
            if progress is not None:
                progress(first + len(entries), count)
        self._settle(count)

    def _check_piece(self, first: int, entries: array[int]) -> None:
        """In runs that no sector bitmap's entry interrupts."""
        assert self.parts is not None
        stride = self.parts.geometry.chunk_ratio + 1
        position = 0
        while position < len(entries):
            index = first + position
            left = stride - 1 - index % stride
            if left == 0:
                self._check_bitmap(index, entries[position])
                position += 1
                continue
            run = entries[position : position + min(left, _PIECE_ENTRIES)]
            position += len(run)
            if run[0] == State.ZERO and run == _ZEROES[: len(run)]:
                continue
            block = index - index // stride
            if block + len(run) > self.parts.geometry.block_count or not self._take_run(run):
                self._check_blocks(index, block, run)

    def _check_blocks(self, index: int, block: int, entries: array[int]) -> None:
        for position, entry in enumerate(entries):
            if entry not in (State.NOT_PRESENT, State.ZERO):
                self._check_block(index + position, block + position, entry)

    def _take_run(self, entries: array[int]) -> bool:
        """Whether these are blocks in a row, as in a fixed file, and nothing else is there; they are counted then."""
        assert self.parts is not None
        block_size = self.parts.geometry.block_size
        offset = entries[0] & s.ENTRY_OFFSET_MASK
        if entries[0] & ~s.ENTRY_OFFSET_MASK != State.FULLY_PRESENT or len(entries) < _RUN_MIN:
            return False
        stop = offset + len(entries) * block_size
        if offset < MiB or stop > self._file.size or self.used.find(b"\1", offset // MiB, stop // MiB) >= 0:
            return False
        if entries != array("Q", range(entries[0], entries[0] + len(entries) * block_size, block_size)):
            return False
        self._mark(offset, stop)
        self.report.allocated_clusters += len(entries)
        self.report.fragmented_clusters += self._follows not in (0, offset)
        self._follows = stop
        return True

    def _entry(self, index: int, entry: int, message: str) -> None:
        assert self.parts is not None
        self.has_sound_bat = False
        at = self.parts.regions.bat_offset + 8 * index
        self._corruption("BAT", at, f"entry {index} is {entry:#018x}, {message}")

    def _check_block(self, index: int, block: int, entry: int) -> None:
        assert self.parts is not None
        geometry = self.parts.geometry
        if block >= geometry.block_count:
            return None
        state, offset = entry & s.ENTRY_STATE_MASK, entry & s.ENTRY_OFFSET_MASK
        if entry & s.ENTRY_RESERVED_MASK:
            self._entry(index, entry, "expected the reserved bits 3 to 19 to be 0")
        if state in (4, 5):
            return self._entry(index, entry, f"which is the reserved state {state}, expected 0 to 3, 6 or 7")
        if state in (State.NOT_PRESENT, State.ZERO):
            if offset:
                self._entry(index, entry, f"expected no offset in state {state}")
            return None
        if state == State.PARTIALLY_PRESENT:
            if not geometry.has_parent:
                self._entry(index, entry, "which is partially present, expected only in a file with a parent")
            else:
                self._await_bitmap(block)
        if state >= State.FULLY_PRESENT:
            self.report.allocated_clusters += 1
            self.report.fragmented_clusters += self._follows not in (0, offset)
            self._follows = offset + geometry.block_size
        elif not offset:
            return None
        return self._take(index, entry, offset, geometry.needed(index), geometry.block_size)

    def _take(self, index: int, entry: int, offset: int, needed: int, length: int) -> None:
        """A place in the file: it must be inside, and nothing else may be there."""
        assert self.parts is not None
        if offset < MiB:
            return self._entry(index, entry, "expected an offset of at least 1 MiB where data is present")
        if offset + needed > self._file.size:
            message = f"which ends at {offset + needed}, expected inside the file's {self._file.size} bytes"
            return self._entry(index, entry, message)
        stop = offset + length
        if self.used.find(b"\1", offset // MiB, stop // MiB) >= 0:
            names = (name for begin, end, name in self.parts.structures() if begin < stop and offset < end)
            other = next(names, "another block or sector bitmap")
            self._entry(index, entry, f"which takes {offset} to {stop}, where {other} is, expected a place of its own")
        self._mark(offset, stop)
        return None

    def _await_bitmap(self, block: int) -> None:
        assert self.parts is not None
        geometry = self.parts.geometry
        index = geometry.bitmap_index(block // geometry.chunk_ratio)
        if self._awaited is None or self._awaited[0] != index:
            self._settle(index)
            self._awaited = index, block

    def _settle(self, index: int) -> None:
        """All entries before `index` were seen, or are zero: a bitmap that was awaited there is missing."""
        if self._awaited is not None and self._awaited[0] < index:
            awaited, block = self._awaited
            self._entry(awaited, 0, f"expected a sector bitmap, as block {block} is partially present")
            self._awaited = None

    def _check_bitmap(self, index: int, entry: int) -> None:
        assert self.parts is not None
        self._settle(index)
        state, offset = entry & s.ENTRY_STATE_MASK, entry & s.ENTRY_OFFSET_MASK
        if not self.parts.geometry.has_parent:
            if entry:
                at = self.parts.regions.bat_offset + 8 * index
                message = f"entry {index} is {entry:#018x}, expected 0: without a parent there are no sector bitmaps"
                self.report.add("leak", "BAT", at, message)
                self.stray_entries.append(at)
            return
        if state != State.FULLY_PRESENT:
            if entry:
                self._entry(index, entry, "expected state 0 or 6 of a sector bitmap")
            return
        if self._awaited is not None and self._awaited[0] == index:
            self._awaited = None
        if entry & s.ENTRY_RESERVED_MASK:
            self._entry(index, entry, "expected the reserved bits 3 to 19 to be 0")
        self._take(index, entry, offset, BITMAP_SIZE, BITMAP_SIZE)

    # Space

    async def _find_unused(self) -> None:
        assert self.parts is not None
        self.report.image_end_offset = (self.used.rfind(b"\1") + 1) * MiB
        slack = {stop // MiB for _, stop, _ in self.parts.structures()}
        for start, stop in unused(self.used):
            length = (stop - start) * MiB
            if self._is_device and stop == len(self.used):
                self.report.device_rest = length
                continue
            if start in slack and length < LAYOUT_SLACK:
                continue
            if stop < len(self.used) and await self._is_hole(start * MiB, stop * MiB):
                continue
            self.leaks.append((start, stop))
            message = f"{length} bytes belong to nothing, expected a block, a sector bitmap or the file's end"
            self.report.add("leak", "unused space", start * MiB, message, stop - start)

    async def _is_hole(self, start: int, stop: int) -> bool:
        is_data, end = await extent_at(self._file, start)
        return not is_data and end >= stop


def unused(used: mmap | bytes) -> list[tuple[int, int]]:
    """(start, stop) of the runs of zeroes: b"\\1\\0\\0\\1" gives [(1, 3)]."""
    runs: list[tuple[int, int]] = []
    start = used.find(b"\0")
    while start >= 0:
        stop = used.find(b"\1", start)
        stop = len(used) if stop < 0 else stop
        runs.append((start, stop))
        start = used.find(b"\0", stop)
    return runs
