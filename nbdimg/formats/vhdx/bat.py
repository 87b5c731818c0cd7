"""Where blocks live: the block allocation table and the sector bitmaps, looked up and changed in memory by 4 KiB pages.

    BAT        64-bit entries, one for each payload block, and after each chunk of them one for its sector bitmap
    entry      bits 0..2 state     3..19 reserved     20..63 offset in the file in MiB, so that `entry & ~0xFFFFF` is it
    chunk      chunk ratio = 2^23 x logical sector / block size blocks; its bitmap has a bit for each sector, 1 MiB

With 32 MiB blocks and 512-byte sectors the ratio is 128: block 300 has entry 302, the bitmap of its chunk 2 entry 386.
Spec: [MS-VHDX] 2.5 "BAT", 2.6 "Sector Bitmap".

    (B1) A block's space is its own: what is written in place lies inside the file and outside all structures.
    (B2) Space that a block gave up is used again only after the log entry that says so is durable, and reads as zeroes.
    (B3) In a file with a parent, a block that is not present shows the parent; zero, unmapped and undefined do not.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from nbdimg.errors import CorruptImage
from nbdimg.formats.vhdx.space import Space
from nbdimg.formats.vhdx.structs import (
    ENTRY_OFFSET_MASK,
    ENTRY_RESERVED_MASK,
    ENTRY_STATE_MASK,
    FILE_OFFSET_MAX,
    PAGE_SIZE,
)
from nbdimg.image.driver import Allocation, Extent, ExtentKind, Miss, Unmap
from nbdimg.image.tables import Slice, TableCache
from nbdimg.storage.file import BlockFile
from nbdimg.units import MiB, div_ceil

PAGES_MAX = 64 * MiB // PAGE_SIZE
"""Resident pages of one image; with 32 MiB blocks a page maps 16 GiB, with 1 MiB blocks 512 MiB."""

PAGE_ENTRIES = PAGE_SIZE // 8
CHUNK_SECTORS = 1 << 23
BITMAP_SIZE = 1 * MiB

_DATA = ExtentKind.DATA
_ZERO = ExtentKind.ZERO
_BACKING = ExtentKind.BACKING


class State(IntEnum):
    """Of a payload block. Spec: [MS-VHDX] 2.5.1.1; 4 and 5 are reserved."""

    NOT_PRESENT = 0
    UNDEFINED = 1
    ZERO = 2
    UNMAPPED = 3
    FULLY_PRESENT = 6
    PARTIALLY_PRESENT = 7


_RESERVED_STATES = frozenset({4, 5})


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


@dataclass(slots=True)
class Token:
    """Of an allocation in block `block`: sectors `first` to before `stop` of it, at file offset `offset`; `is_new`: the
    space is taken for it. `state` is what the block becomes.
    """

    block: int
    page: Slice
    offset: int
    is_new: bool
    state: State
    first: int
    stop: int
    bitmap_pages: list[Slice]


class Bat:
    """Args: file: where everything lies. offset: of the table. space: None when nothing is written."""

    def __init__(self, file: BlockFile, offset: int, geometry: Geometry, space: Space | None) -> None:
        self._file = file
        self._offset = offset
        self._geometry = geometry
        self._space = space
        self._block_size = geometry.block_size
        self._block_bits = geometry.block_size.bit_length() - 1
        self._ratio = geometry.chunk_ratio
        self._sector_bits = geometry.sector_size.bit_length() - 1
        self._block_sectors = geometry.block_size // geometry.sector_size
        self.size = geometry.size
        self.pages = TableCache(file, PAGES_MAX, self._fetch_page, _encode_entries)
        self._slices = self.pages.slices
        self.bitmaps = TableCache(file, PAGES_MAX, self._fetch_bitmap, _encode_bytes)
        """Pages of sector bitmaps, by their number in the file."""
        self._elsewhere = Extent(_BACKING, 0, 0, file, 0, False)

    # Loading

    async def _fetch_page(self, key: int) -> None:
        content = bytearray(PAGE_SIZE)
        offset = self._offset + key * PAGE_SIZE
        await self._file.pread(offset, memoryview(content))
        self.pages.add(key, offset, array("Q", bytes(content)))

    async def _fetch_bitmap(self, key: int) -> None:
        content = bytearray(PAGE_SIZE)
        await self._file.pread(key * PAGE_SIZE, memoryview(content))
        self.bitmaps.add(key, key * PAGE_SIZE, array("B", bytes(content)))

    def _page(self, index: int) -> Slice | Miss:
        """The page that holds an entry."""
        found = self._slices.get(index // PAGE_ENTRIES)
        if found is None:
            return Miss(self.pages, index // PAGE_ENTRIES)
        found.is_used = True
        return found

    def _entry(self, page: Slice, index: int) -> tuple[int, int]:
        """(state, file offset) of a payload block. Raises: CorruptImage: it is malformed."""
        entry = page.entries[index % PAGE_ENTRIES]
        state, offset = entry & ENTRY_STATE_MASK, entry & ENTRY_OFFSET_MASK
        if entry & ENTRY_RESERVED_MASK or state in _RESERVED_STATES:
            raise self._malformed(index, entry, "state 0 to 3, 6 or 7 and the reserved bits 0")
        if state == State.PARTIALLY_PRESENT and not self._geometry.has_parent:
            state = State.FULLY_PRESENT
        if state >= State.FULLY_PRESENT and not MiB <= offset <= FILE_OFFSET_MAX:
            raise self._malformed(index, entry, "an offset of 1 MiB to 256 TiB where data is present")
        return state, offset

    def _malformed(self, index: int, entry: int, expected: str) -> CorruptImage:
        at = self._offset + 8 * index
        return CorruptImage(
            self._file.path, f"BAT entry {index} is {entry:#018x}, expected {expected} (offset {at})", at
        )

    # Look-up

    def map(self, offset: int, stop: int) -> Extent | Miss:
        block = offset >> self._block_bits
        index = block + block // self._ratio
        page = self._slices.get(index // PAGE_ENTRIES)
        if page is None:
            return Miss(self.pages, index // PAGE_ENTRIES)
        page.is_used = True
        state, host = self._entry(page, index)
        start = block << self._block_bits
        if state == State.PARTIALLY_PRESENT:
            return self._map_sectors(block, host, offset, stop)
        kind = self._kind(state)
        end = start + self._block_size
        expected = host
        while end < stop and end < self.size:
            block += 1
            expected += self._block_size
            following = self._page(block + block // self._ratio)
            if isinstance(following, Miss):
                break
            next_state, next_host = self._entry(following, block + block // self._ratio)
            is_next = self._kind(next_state) is kind and next_state != State.PARTIALLY_PRESENT
            if not is_next or (kind is _DATA and next_host != expected):
                break
            end += self._block_size
        end = min(end, self.size)
        if kind is _DATA:
            return Extent(kind, start, end - start, self._file, host, self._space is not None)
        return Extent(kind, start, end - start, self._file, 0, False, 1 if kind is _ZERO and state else 0)

    def _kind(self, state: int) -> ExtentKind:
        """What a guest sees of a block that has no sectors of its own (B3)."""
        if state >= State.FULLY_PRESENT:
            return _DATA
        return _BACKING if state == State.NOT_PRESENT and self._geometry.has_parent else _ZERO

    def _bitmap_offset(self, chunk: int) -> int | Miss:
        """Where a chunk's sector bitmap lies; 0: it has none."""
        index = self._geometry.bitmap_index(chunk)
        page = self._page(index)
        if isinstance(page, Miss):
            return page
        entry = page.entries[index % PAGE_ENTRIES]
        if entry & ENTRY_STATE_MASK < State.FULLY_PRESENT:
            return 0
        offset = entry & ENTRY_OFFSET_MASK
        if not MiB <= offset <= FILE_OFFSET_MAX:
            raise self._malformed(index, entry, "an offset of 1 MiB to 256 TiB where a sector bitmap is present")
        return offset

    def _bitmap_page(self, bitmap_offset: int, sector: int) -> Slice | Miss:
        """The page with the bit of a sector of its chunk."""
        key = bitmap_offset // PAGE_SIZE + (sector >> 15)
        found = self.bitmaps.slices.get(key)
        if found is None:
            return Miss(self.bitmaps, key)
        found.is_used = True
        return found

    def _map_sectors(self, block: int, host: int, offset: int, stop: int) -> Extent | Miss:
        """A run of sectors that are all in this file, or all in the parent; it ends with the block or a bitmap page."""
        chunk, position = divmod(block, self._ratio)
        bitmap_offset = self._bitmap_offset(chunk)
        if isinstance(bitmap_offset, Miss):
            return bitmap_offset
        if not bitmap_offset:
            index = self._geometry.payload_index(block)
            entry = host | State.PARTIALLY_PRESENT
            raise self._malformed(index, entry, "a sector bitmap for a partially present block")
        start = block << self._block_bits
        first = (offset - start) >> self._sector_bits
        base = position * self._block_sectors
        page = self._bitmap_page(bitmap_offset, base + first)
        if isinstance(page, Miss):
            return page
        bit = (base + first) & 0x7FFF
        wanted = (
            min(-(-(min(stop, start + self._block_size) - start) >> self._sector_bits), self._block_sectors) - first
        )
        is_present, count = bit_run(page.entries, bit, min(max(1, wanted), 0x8000 - bit))
        run_start = start + (first << self._sector_bits)
        length = min(count << self._sector_bits, self.size - run_start)
        if not is_present:
            return Extent(_BACKING, run_start, length, self._file, 0, False, 0)
        return Extent(_DATA, run_start, length, self._file, host + run_start - start, self._space is not None)

    # Change

    def place(self, offset: int, stop: int) -> Extent | Miss:
        extent = self.map(offset, stop)
        if isinstance(extent, Miss):
            return extent
        if not extent.writable:
            return self._elsewhere
        assert self._space is not None
        self._space.check_target(extent.file_offset, extent.length)
        return extent

    def reserve(self, offset: int, stop: int) -> Allocation | Miss:
        """Room in one block."""
        assert self._space is not None
        block = offset >> self._block_bits
        index = self._geometry.payload_index(block)
        page = self._page(index)
        if isinstance(page, Miss):
            return page
        state, host = self._entry(page, index)
        start = block << self._block_bits
        end = start + self._block_size
        is_partial = state == State.PARTIALLY_PRESENT or self._kind(state) is _BACKING
        if is_partial and offset <= start and stop >= min(end, self.size):
            is_partial = False
        bitmap_pages: list[Slice] = []
        if is_partial:
            found = self._own_bitmap(block)
            if isinstance(found, Miss):
                return found
            bitmap_pages = found
        is_new = state != State.PARTIALLY_PRESENT
        is_zeroed = False
        if is_new:
            taken = self._space.take(self._block_size)
            if isinstance(taken, Miss):
                return taken
            host, is_zeroed = taken, True
        else:
            self._space.check_target(host, self._block_size)
        first, last = 0, self._block_sectors
        if is_partial:
            first = (offset - start) >> self._sector_bits
            last = -(-(min(stop, end) - start) >> self._sector_bits)
        elif stop >= self.size:
            last = -(-(min(self.size, end) - start) >> self._sector_bits)
        for each in (page, *bitmap_pages):
            each.pin_count += 1
        edge = _BACKING if is_partial or self._kind(state) is _BACKING else _ZERO
        return Allocation(
            start + (first << self._sector_bits),
            (last - first) << self._sector_bits,
            self._file,
            host + (first << self._sector_bits),
            edge,
            edge,
            is_zeroed,
            Token(
                block,
                page,
                host,
                is_new,
                State.PARTIALLY_PRESENT if is_partial else State.FULLY_PRESENT,
                first,
                last,
                bitmap_pages,
            ),
        )

    def _own_bitmap(self, block: int) -> list[Slice] | Miss:
        """The pages with a block's bits in the sector bitmap of its chunk, which is made if there is none."""
        assert self._space is not None
        chunk, position = divmod(block, self._ratio)
        bitmap_offset = self._bitmap_offset(chunk)
        if isinstance(bitmap_offset, Miss):
            return bitmap_offset
        if not bitmap_offset:
            index = self._geometry.bitmap_index(chunk)
            page = self._page(index)
            if isinstance(page, Miss):
                return page
            taken = self._space.take(BITMAP_SIZE)
            if isinstance(taken, Miss):
                return taken
            page.entries[index % PAGE_ENTRIES] = taken | State.FULLY_PRESENT
            self.pages.changed(page)
            for key in range(taken // PAGE_SIZE, (taken + BITMAP_SIZE) // PAGE_SIZE):
                self.bitmaps.add(key, key * PAGE_SIZE, array("B", bytes(PAGE_SIZE)))
            bitmap_offset = taken
        self._space.check_target(bitmap_offset, BITMAP_SIZE)
        first = bitmap_offset // PAGE_SIZE + (position * self._block_sectors >> 15)
        last = bitmap_offset // PAGE_SIZE + ((position + 1) * self._block_sectors - 1 >> 15)
        missing = next((key for key in range(first, last + 1) if key not in self.bitmaps.slices), None)
        if missing is not None:
            return Miss(self.bitmaps, missing)
        return [self.bitmaps.slices[key] for key in range(first, last + 1)]

    def commit(self, allocation: Allocation) -> None:
        token = allocation.token
        assert isinstance(token, Token)
        self._unpin(token)
        page, slot = token.page, self._geometry.payload_index(token.block) % PAGE_ENTRIES
        if token.bitmap_pages:
            self._set_sectors(token)
        entry = token.offset | token.state
        if page.entries[slot] != entry:
            page.entries[slot] = entry
            self.pages.changed(page)

    def _unpin(self, token: Token) -> None:
        for each in (token.page, *token.bitmap_pages):
            each.pin_count -= 1

    def _set_sectors(self, token: Token) -> None:
        """Mark the allocation's sectors as present; the rest of a block that was not here before is not."""
        base = token.block % self._ratio * self._block_sectors
        first, stop = base + token.first, base + token.stop
        first_page = base >> 15
        for number, page in enumerate(token.bitmap_pages, first_page):
            start, end = number << 15, (number + 1) << 15
            if token.is_new:
                fill_bits(page.entries, max(base, start) - start, min(base + self._block_sectors, end) - start, False)
            if first < end and start < stop:
                fill_bits(page.entries, max(first, start) - start, min(stop, end) - start, True)
            self.bitmaps.changed(page)

    def release(self, allocation: Allocation) -> None:
        token = allocation.token
        assert isinstance(token, Token)
        self._unpin(token)
        if token.is_new:
            assert self._space is not None
            self._space.free(token.offset, self._block_size)

    def unmap(self, offset: int, stop: int, to: Unmap) -> int | Miss:
        """Whole blocks change state; parts of one, and fixed files, stay to be emptied in place."""
        block = offset >> self._block_bits
        start = block << self._block_bits
        end = min(start + self._block_size, self.size)
        index = self._geometry.payload_index(block)
        page = self._page(index)
        if isinstance(page, Miss):
            return page
        state, host = self._entry(page, index)
        if self._kind(state) is _ZERO:
            return min(stop, end)
        if self._geometry.is_fixed or to is Unmap.KEEP or offset > start or stop < end:
            return offset
        assert self._space is not None
        if state >= State.FULLY_PRESENT:
            self._space.check_target(host, self._block_size)
            self._space.free(host, self._block_size)
        page.entries[index % PAGE_ENTRIES] = State.ZERO if to is Unmap.ZERO else State.UNMAPPED
        self.pages.changed(page)
        return end


def bit_run(bits: array[int], first: int, count_max: int) -> tuple[bool, int]:
    """(whether bit `first` is set, how many bits from there on are equal to it, at most `count_max`). LSB first:
    bits 0b0000_1110, (1, 8) gives (True, 3).
    """
    value = bits[first >> 3] >> (first & 7) & 1
    full = 0xFF if value else 0
    position, stop = first, first + count_max
    while position < stop:
        if position & 7 == 0 and stop - position >= 8 and bits[position >> 3] == full:
            position += 8
        elif bits[position >> 3] >> (position & 7) & 1 == value:
            position += 1
        else:
            break
    return bool(value), position - first


def fill_bits(bits: array[int], first: int, stop: int, value: bool) -> None:
    """Set or clear the bits from `first` to before `stop`."""
    first_whole, last_whole = (first + 7) >> 3, stop >> 3
    if first_whole > last_whole:
        first_whole = last_whole = (stop + 7) >> 3
    for position in (*range(first, min(first_whole << 3, stop)), *range(max(last_whole << 3, first), stop)):
        if value:
            bits[position >> 3] |= 1 << (position & 7)
        else:
            bits[position >> 3] &= ~(1 << (position & 7))
    if last_whole > first_whole:
        filler: Callable[[int], bytes] = (b"\xff" if value else b"\0").__mul__
        bits[first_whole:last_whole] = array("B", filler(last_whole - first_whole))


def _encode_entries(entries: array[int]) -> bytes:
    return entries.tobytes()


def _encode_bytes(entries: array[int]) -> bytes:
    return entries.tobytes()
