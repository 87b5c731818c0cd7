"""How far into the file its blocks and sector bitmaps reach, which a session must know before it adds to the file.

A last block that is short may be stored only as far as the guest's part, and its space is a whole block all the same.
Other blocks that the file does not hold to their end were lost when it was truncated; a file that has grown again would
have zeroes there, and nothing would tell them from data.
"""

from __future__ import annotations

import asyncio
from array import array

from nbdimg.errors import CorruptImage
from nbdimg.formats.vhdx import structs as s
from nbdimg.formats.vhdx.geometry import BITMAP_SIZE, State
from nbdimg.formats.vhdx.offline import PIECE_SIZE, bat_pieces
from nbdimg.formats.vhdx.parts import Parts
from nbdimg.storage.file import BlockFile
from nbdimg.units import MiB

_ZEROES = array("Q", [State.ZERO]) * (PIECE_SIZE // 8)
"""What QEMU fills a new table with, but for the entries of bitmaps."""


async def reach(file: BlockFile, parts: Parts) -> int:
    """Where the last block or sector bitmap ends, in bytes; at least the file's size. Space that a block without data
    points to counts, as another program may come back to it.

    Raises: CorruptImage: one that is present does not end inside the file. OSError.
    """
    geometry = parts.geometry
    stride = geometry.chunk_ratio + 1
    blocks_stop = geometry.payload_index(geometry.block_count - 1) + 1
    stop = file.size
    async for first, entries in bat_pieces(file, parts.regions.bat_offset, 0, geometry.entry_count):
        slots = range(len(entries))[-(first + 1) % stride :: stride]
        bitmaps = entries[slots.start : slots.stop : stride]
        for slot in slots:
            entries[slot] = State.ZERO
        blocks = entries[: max(0, blocks_stop - first)]
        stop = max(stop, _stop(file, parts, range(first, first + len(blocks)), blocks, geometry.block_size))
        if geometry.has_parent:
            indexes = range(first + slots.start, first + slots.stop, stride)
            stop = max(stop, _stop(file, parts, indexes, bitmaps, BITMAP_SIZE))
        await asyncio.sleep(0)
    return stop


def _stop(file: BlockFile, parts: Parts, indexes: range, entries: array[int], length: int) -> int:
    """Where the last of these ends that have `length` bytes each; 0: inside the file."""
    if entries == _ZEROES[: len(entries)]:
        return 0
    highest = max(entries, default=0) & s.ENTRY_OFFSET_MASK
    if not highest or highest + length <= file.size:
        return 0
    stop = 0
    for index, entry in zip(indexes, entries, strict=True):
        offset = entry & s.ENTRY_OFFSET_MASK
        if MiB <= offset <= s.FILE_OFFSET_MAX and offset + length > file.size:
            _check_end(file, parts, index, entry)
            stop = max(stop, offset + length)
    return stop


def _check_end(file: BlockFile, parts: Parts, index: int, entry: int) -> None:
    end = (entry & s.ENTRY_OFFSET_MASK) + parts.geometry.needed(index)
    if entry & s.ENTRY_STATE_MASK < State.FULLY_PRESENT or end <= file.size:
        return
    at = parts.regions.bat_offset + 8 * index
    raise CorruptImage(
        file.path,
        f"BAT entry {index} is {entry:#018x}, which ends at {end}, expected inside the file's {file.size} bytes: "
        f"it was truncated, and can only be opened read-only (offset {at})",
        at,
    )
