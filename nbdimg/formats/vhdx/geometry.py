"""How a disk is cut into blocks, and where in the block allocation table each of them has its entry.

    BAT        64-bit entries, one for each payload block, and after each chunk of them one for its sector bitmap
    entry      bits 0..2 state     3..19 reserved     20..63 offset in the file in MiB, so that `entry & ~0xFFFFF` is it
    chunk      chunk ratio = 2^23 x logical sector / block size blocks; its bitmap has a bit for each sector, 1 MiB

With 32 MiB blocks and 512-byte sectors the ratio is 128: block 300 has entry 302, the bitmap of its chunk 2 entry 386.
Spec: [MS-VHDX] 2.5 "BAT", 2.6 "Sector Bitmap".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from nbdimg.units import MiB, div_ceil

CHUNK_SECTORS = 1 << 23
BITMAP_SIZE = 1 * MiB


class State(IntEnum):
    """Of a payload block. Spec: [MS-VHDX] 2.5.1.1; 4 and 5 are reserved."""

    NOT_PRESENT = 0
    UNDEFINED = 1
    ZERO = 2
    UNMAPPED = 3
    FULLY_PRESENT = 6
    PARTIALLY_PRESENT = 7


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes in bytes. `has_parent`: a differencing file. `is_fixed`: blocks stay allocated."""

    size: int
    block_size: int
    sector_size: int
    has_parent: bool
    is_fixed: bool

    @property
    def chunk_ratio(self) -> int:
        return CHUNK_SECTORS * self.sector_size // self.block_size

    @property
    def block_count(self) -> int:
        return div_ceil(self.size, self.block_size)

    @property
    def entry_count(self) -> int:
        """Entries that the table must hold: 1 TiB of 32 MiB blocks takes 32768 + 255, with a parent 256 x 129."""
        if self.has_parent:
            return div_ceil(self.block_count, self.chunk_ratio) * (self.chunk_ratio + 1)
        return self.block_count + (self.block_count - 1) // self.chunk_ratio if self.block_count else 0

    def payload_index(self, block: int) -> int:
        """The entry of a payload block: (300) with a ratio of 128 gives 302."""
        return block + block // self.chunk_ratio

    def bitmap_index(self, chunk: int) -> int:
        """The entry of a chunk's sector bitmap: (2) with a ratio of 128 gives 386."""
        return (chunk + 1) * self.chunk_ratio + chunk

    def needed(self, index: int) -> int:
        """Bytes that must be in the file of what the entry is of: a short last block may end with the disk."""
        chunk, position = divmod(index, self.chunk_ratio + 1)
        if position == self.chunk_ratio:
            return BITMAP_SIZE
        return min(self.block_size, self.size - (index - chunk) * self.block_size)
