"""Where blocks live: the block allocation table and the sector bitmaps, looked up and changed in memory by 4 KiB pages.

    (B1) A block's space is its own: what is mapped lies outside all structures and inside the file, and what is new
         behind all that blocks reach, which a writable open finds out (reach.py).
    (B2) Space that a block gave up is used again only after the log entry that says so is durable, and reads as zeroes.
    (B3) In a file with a parent, a block that is not present shows the parent; zero, unmapped and undefined do not.
    (B4) Nothing changes before the journal's session has begun: until then whoever wants to is told to load that, and
         what changes nothing does not begin one.

The table's layout: geometry.py.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass

from nbdimg.errors import CorruptImage
from nbdimg.formats.vhdx.geometry import BITMAP_SIZE, State
from nbdimg.formats.vhdx.journal import Journal
from nbdimg.formats.vhdx.parts import Parts
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
from nbdimg.storage.file import BlockFile, read
from nbdimg.units import MiB

PAGES_MAX = 64 * MiB // PAGE_SIZE
"""Resident pages of one image; with 32 MiB blocks a page maps 16 GiB, with 1 MiB blocks 512 MiB."""

RUN_BLOCKS_MAX = 1024
"""Blocks that one answer looks at: what is in memory of a large disk is millions, and the loop waits meanwhile."""

_PAGE_BITS = (PAGE_SIZE // 8).bit_length() - 1
_PAGE_MASK = (1 << _PAGE_BITS) - 1
"""Of an entry's index: which page, and where in it."""
_SECTOR_PAGE_BITS = (8 * PAGE_SIZE).bit_length() - 1
_SECTOR_PAGE_MASK = (1 << _SECTOR_PAGE_BITS) - 1
"""The same for a sector of a chunk and its bitmap."""
assert (1 << _PAGE_BITS, 1 << _SECTOR_PAGE_BITS) == (512, 32768)

_DATA = ExtentKind.DATA
_ZERO = ExtentKind.ZERO
_BACKING = ExtentKind.BACKING

_FULL = int(State.FULLY_PRESENT)
_PARTIAL = int(State.PARTIALLY_PRESENT)
_UNMAPPED = int(State.UNMAPPED)
"""Plain numbers: members of an enumeration cost a look-up and a slow comparison on the request path."""
_RESERVED_STATES = frozenset({4, 5})
_BITMAP_EXPECTED = "a sector bitmap for a partially present block"
_FLAGS_MASK = ENTRY_STATE_MASK | ENTRY_RESERVED_MASK


@dataclass(slots=True)
class Token:
    """Of an allocation in block `block`: sectors `first` to before `stop` of it, at file offset `offset`; `is_new`: the
    space is taken for it. `state` is what the block becomes.
    """

    block: int
    page: Slice
    offset: int
    is_new: bool
    state: int
    first: int
    stop: int
    bitmap_pages: list[Slice]


class Bat:
    """Args: file: where everything lies. parts: what else lies there. journal: None when nothing is written."""

    def __init__(self, file: BlockFile, parts: Parts, space: Space, journal: Journal | None) -> None:
        self._file = file
        self._offset = parts.regions.bat_offset
        self._structures = parts.structures()
        self._data_start = max(stop for _, stop, _ in self._structures)
        """From here on lies no structure: what has its place there needs no closer look."""
        self._space = space
        self._journal = journal
        self._is_writable = journal is not None
        geometry = self._geometry = parts.geometry
        self._last = FILE_OFFSET_MAX if self._is_writable else min(FILE_OFFSET_MAX, file.size - geometry.block_size)
        """Up to here a block needs no closer look; what a writable file holds was looked at when it was opened."""
        self.size = geometry.size
        self._has_parent = geometry.has_parent
        self._block_size = geometry.block_size
        self._block_mask = geometry.block_size - 1
        self._block_bits = geometry.block_size.bit_length() - 1
        self._ratio_bits = geometry.chunk_ratio.bit_length() - 1
        self._sector_bits = geometry.sector_size.bit_length() - 1
        self._block_sectors = geometry.block_size // geometry.sector_size
        self.pages = TableCache(file, PAGES_MAX, self._fetch_page, array.tobytes)
        self._slices = self.pages.slices
        self.bitmaps = TableCache(file, PAGES_MAX, self._fetch_bitmap, array.tobytes)
        """Pages of sector bitmaps, by their number in the file."""
        self._elsewhere = Extent(_BACKING, 0, 0, file, 0, False)

    # Loading

    async def _fetch_page(self, key: int) -> None:
        offset = self._offset + key * PAGE_SIZE
        self.pages.add(key, offset, array("Q", await read(self._file, offset, PAGE_SIZE)))

    async def _fetch_bitmap(self, key: int) -> None:
        offset = key * PAGE_SIZE
        self.bitmaps.add(key, offset, array("B", await read(self._file, offset, PAGE_SIZE)))

    def _page(self, index: int) -> Slice | Miss:
        """The page that holds an entry."""
        found = self._slices.get(index >> _PAGE_BITS)
        if found is None:
            return Miss(self.pages, index >> _PAGE_BITS)
        found.use_count += 1
        return found

    def _entry(self, page: Slice, index: int) -> tuple[int, int]:
        """(state, file offset) of a payload block. Raises: CorruptImage: it is malformed."""
        entry = page.entries[index & _PAGE_MASK]
        state, offset = entry & ENTRY_STATE_MASK, entry & ENTRY_OFFSET_MASK
        if entry & ENTRY_RESERVED_MASK or state in _RESERVED_STATES:
            raise self._malformed(index, entry, "state 0 to 3, 6 or 7 and the reserved bits 0")
        if state == _PARTIAL and not self._has_parent:
            state = _FULL
        if state >= _FULL:
            self._check_place(index, entry, self._block_size)
        return state, offset

    def _check_place(self, index: int, entry: int, length: int) -> None:
        """Raises: CorruptImage: what the entry is of cannot lie where it says (B1)."""
        offset = entry & ENTRY_OFFSET_MASK
        if self._data_start <= offset <= self._last:
            return
        if not MiB <= offset <= FILE_OFFSET_MAX:
            raise self._malformed(index, entry, "an offset of 1 MiB to 256 TiB where data is present")
        at = self._offset + 8 * index
        for start, stop, name in self._structures:
            if offset < stop and start < offset + length:
                raise CorruptImage(
                    self._file.path,
                    f"a block lies at offset {offset}, expected it outside the structure at {start} to {stop}, {name} "
                    f"(BAT entry {index}, offset {at})",
                    at,
                )
        end, size = offset + self._geometry.needed(index), self._file.size
        if end > size and not self._is_writable:
            raise self._malformed(index, entry, f"an end inside the file's {size} bytes, not at {end}")

    def _malformed(self, index: int, entry: int, expected: str) -> CorruptImage:
        at = self._offset + 8 * index
        return CorruptImage(
            self._file.path, f"BAT entry {index} is {entry:#018x}, expected {expected} (offset {at})", at
        )

    # Look-up

    def map(self, offset: int, stop: int) -> Extent | Miss:
        block = offset >> self._block_bits
        index = block + (block >> self._ratio_bits)
        page = self._slices.get(index >> _PAGE_BITS)
        if page is None:
            return Miss(self.pages, index >> _PAGE_BITS)
        page.use_count += 1
        state, kind, host = _FULL, _DATA, page.entries[index & _PAGE_MASK] - _FULL
        if host & _FLAGS_MASK or not self._data_start <= host <= self._last:
            state, host = self._entry(page, index)
            if state == _PARTIAL:
                return self._map_sectors(block, host, offset, stop)
            kind = self._kind(state)
        start = block << self._block_bits
        end = start + self._block_size
        if end < stop:
            end = self._run_stop(block, state, host, stop)
        if end > self.size:
            end = self.size
        if kind is _DATA:
            return Extent(_DATA, start, end - start, self._file, host, self._is_writable)
        return Extent(kind, start, end - start, self._file, 0, False, 1 if kind is _ZERO and state else 0)

    def locate(self, offset: int, stop: int) -> int:
        """See `FormatDriver.locate`."""
        block = offset >> self._block_bits
        index = block + (block >> self._ratio_bits)
        page = self._slices.get(index >> _PAGE_BITS)
        if page is None or stop - 1 >> self._block_bits != block:
            return -1
        page.use_count += 1
        host = page.entries[index & _PAGE_MASK] - _FULL
        if host & _FLAGS_MASK or not self._data_start <= host <= self._last:
            return -1
        return host + (offset & self._block_mask)

    def _run_stop(self, block: int, state: int, host: int, stop: int) -> int:
        """Where the run ends that goes on from a block in `state`, with the block that holds `stop` or is the
        RUN_BLOCKS_MAX-th at the latest. What is malformed ends it, and what is not present ends what is zero: they
        read alike, and only one of them is something that this file says.
        """
        last = min(-(-min(stop, self.size) >> self._block_bits), block + RUN_BLOCKS_MAX)
        ratio = 1 << self._ratio_bits
        following = block + 1
        while following < last:
            index = following + (following >> self._ratio_bits)
            page = self._page(index)
            if isinstance(page, Miss):
                break
            slot, in_chunk = index & _PAGE_MASK, ratio - (following & (ratio - 1))
            entries = page.entries[slot : slot + min(last - following, in_chunk)]
            if state >= _FULL:
                count = self._count_in_a_row(entries, host + (following - block) * self._block_size)
            else:
                count = _count_absent(entries, bool(state))
            following += count
            if count < len(entries):
                break
        return following << self._block_bits

    def _count_in_a_row(self, entries: array[int], host: int) -> int:
        """How many from the first on are of data that lies in a row from file offset `host` on; there is at least one
        entry.
        """
        first = host | _FULL
        if entries[0] != first or not self._data_start <= host <= self._last:
            return 0
        if len(entries) == 1:
            return 1
        size = self._block_size
        entries = entries[: (self._last - host) // size + 1]
        wanted = range(first, first + len(entries) * size, size)
        if entries[-1] == wanted[-1] and entries == array("Q", wanted):
            return len(entries)
        return next((place for place, entry in enumerate(entries) if entry != wanted[place]), len(entries))

    def _kind(self, state: int) -> ExtentKind:
        """What a guest sees of a block that has no sectors of its own (B3)."""
        if state >= _FULL:
            return _DATA
        return _BACKING if state == 0 and self._has_parent else _ZERO

    def _bitmap_offset(self, chunk: int) -> int | Miss:
        """Where a chunk's sector bitmap lies; 0: it has none."""
        index = self._geometry.bitmap_index(chunk)
        page = self._page(index)
        if isinstance(page, Miss):
            return page
        entry = page.entries[index & _PAGE_MASK]
        if entry & ENTRY_STATE_MASK < _FULL:
            return 0
        self._check_place(index, entry, BITMAP_SIZE)
        return entry & ENTRY_OFFSET_MASK

    def _map_sectors(self, block: int, host: int, offset: int, stop: int) -> Extent | Miss:
        """A run of sectors that are all in this file, or all in the parent; it ends with the block or a bitmap page."""
        chunk, position = divmod(block, 1 << self._ratio_bits)
        bitmap_offset = self._bitmap_offset(chunk)
        if isinstance(bitmap_offset, Miss):
            return bitmap_offset
        if not bitmap_offset:
            index = self._geometry.payload_index(block)
            raise self._malformed(index, host | _PARTIAL, _BITMAP_EXPECTED)
        start = block << self._block_bits
        end = min(stop, start + self._block_size)
        first = (offset - start) >> self._sector_bits
        wanted = -(-(end - start) >> self._sector_bits) - first
        sector = position * self._block_sectors + first
        key = bitmap_offset // PAGE_SIZE + (sector >> _SECTOR_PAGE_BITS)
        page = self.bitmaps.slices.get(key)
        if page is None:
            return Miss(self.bitmaps, key)
        page.use_count += 1
        bit = sector & _SECTOR_PAGE_MASK
        is_present, count = bit_run(page.entries, bit, min(max(1, wanted), _SECTOR_PAGE_MASK + 1 - bit))
        run_start = start + (first << self._sector_bits)
        length = min(count << self._sector_bits, self.size - run_start)
        if not is_present:
            return Extent(_BACKING, run_start, length, self._file, 0, False, 0)
        return Extent(_DATA, run_start, length, self._file, host + run_start - start, self._is_writable)

    # Change

    def _not_begun(self) -> Miss | None:
        """What a first change lacks (B4)."""
        journal = self._journal
        assert journal is not None
        return None if journal.has_begun else Miss(journal, 0)

    def place(self, offset: int, stop: int) -> Extent | Miss:
        journal = self._journal
        if journal is None:
            return self._elsewhere
        if not journal.has_begun:
            return Miss(journal, 0)
        extent = self.map(offset, stop)
        if isinstance(extent, Miss):
            return extent
        return extent if extent.writable else self._elsewhere

    def reserve(self, offset: int, stop: int) -> Allocation | Miss:
        """Room in one block; in one that is partially present, also over sectors that it has already."""
        not_begun = self._not_begun()
        if not_begun is not None:
            return not_begun
        block = offset >> self._block_bits
        index = block + (block >> self._ratio_bits)
        page = self._page(index)
        if isinstance(page, Miss):
            return page
        state, host = self._entry(page, index)
        start = block << self._block_bits
        end = min(start + self._block_size, self.size)
        shows_parent = state == _PARTIAL or self._kind(state) is _BACKING
        is_partial = shows_parent and not (offset <= start and stop >= end)
        bitmap_pages: list[Slice] = []
        if is_partial:
            found = self._own_bitmap(block)
            if isinstance(found, Miss):
                return found
            bitmap_pages = found
        is_new = state != _PARTIAL
        if is_new:
            taken = self._space.take(self._block_size)
            if isinstance(taken, Miss):
                return taken
            host = taken
        elif host + self._block_size > self._space.grown:
            return Miss(self._space, host + self._block_size)
        first, last = 0, self._block_sectors
        if is_partial:
            first = (offset - start) >> self._sector_bits
        if is_partial or stop >= self.size:
            last = -(-(min(stop, end) - start) >> self._sector_bits)
        for each in (page, *bitmap_pages):
            each.pin_count += 1
        edge = _BACKING if shows_parent else _ZERO
        return Allocation(
            start + (first << self._sector_bits),
            (last - first) << self._sector_bits,
            self._file,
            host + (first << self._sector_bits),
            edge,
            edge,
            is_new,
            Token(block, page, host, is_new, _PARTIAL if is_partial else _FULL, first, last, bitmap_pages),
            is_new,
        )

    def _own_bitmap(self, block: int) -> list[Slice] | Miss:
        """The pages with a block's bits in the sector bitmap of its chunk, which is made if there is none."""
        chunk, position = divmod(block, 1 << self._ratio_bits)
        bitmap_offset = self._bitmap_offset(chunk)
        if isinstance(bitmap_offset, Miss):
            return bitmap_offset
        if not bitmap_offset:
            index = self._geometry.bitmap_index(chunk)
            page = self._page(index)
            if isinstance(page, Miss):
                return page
            lacking = self._check_no_partial(chunk)
            if lacking is not None:
                return lacking
            taken = self._space.take(BITMAP_SIZE)
            if isinstance(taken, Miss):
                return taken
            page.entries[index & _PAGE_MASK] = taken | _FULL
            self.pages.changed(page)
            for key in range(taken // PAGE_SIZE, (taken + BITMAP_SIZE) // PAGE_SIZE):
                self.bitmaps.add(key, key * PAGE_SIZE, array("B", bytes(PAGE_SIZE)))
            bitmap_offset = taken
        first = bitmap_offset // PAGE_SIZE + (position * self._block_sectors >> _SECTOR_PAGE_BITS)
        last = bitmap_offset // PAGE_SIZE + ((position + 1) * self._block_sectors - 1 >> _SECTOR_PAGE_BITS)
        missing = next((key for key in range(first, last + 1) if key not in self.bitmaps.slices), None)
        if missing is not None:
            return Miss(self.bitmaps, missing)
        return [self.bitmaps.slices[key] for key in range(first, last + 1)]

    def _check_no_partial(self, chunk: int) -> Miss | None:
        """Of a chunk that is about to get its first sector bitmap: to a block that has lost its own, a new one would
        give the parent's sectors. Raises: CorruptImage: there is such a block.
        """
        start, stop = self._geometry.payload_index(chunk << self._ratio_bits), self._geometry.bitmap_index(chunk)
        stop = min(stop, self._geometry.payload_index(self._geometry.block_count))
        for key in range(start >> _PAGE_BITS, (stop - 1 >> _PAGE_BITS) + 1):
            page = self._slices.get(key)
            if page is None:
                return Miss(self.pages, key)
            first = max(start - (key << _PAGE_BITS), 0)
            states = page.entries[first : stop - (key << _PAGE_BITS)].tobytes()[::8]
            slot = first + states.find(_PARTIAL)
            if slot >= first:
                index = (key << _PAGE_BITS) + slot
                raise self._malformed(index, page.entries[slot], _BITMAP_EXPECTED)
        return None

    def commit(self, allocation: Allocation) -> None:
        token = allocation.token
        assert isinstance(token, Token)
        self._unpin(token)
        page, slot = token.page, self._geometry.payload_index(token.block) & _PAGE_MASK
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
        base = (token.block & ((1 << self._ratio_bits) - 1)) * self._block_sectors
        first, stop = base + token.first, base + token.stop
        for number, page in enumerate(token.bitmap_pages, base >> _SECTOR_PAGE_BITS):
            start, end = number << _SECTOR_PAGE_BITS, (number + 1) << _SECTOR_PAGE_BITS
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
            self._space.free(token.offset, self._block_size)

    def unmap(self, offset: int, stop: int, to: Unmap) -> int | Miss:
        """Whole blocks change state; parts of one, and fixed files, stay to be emptied in place."""
        block = offset >> self._block_bits
        start = block << self._block_bits
        end = min(start + self._block_size, self.size)
        index = block + (block >> self._ratio_bits)
        page = self._page(index)
        if isinstance(page, Miss):
            return page
        state, host = self._entry(page, index)
        kind = self._kind(state)
        if kind is _ZERO:
            return min(stop, self._run_stop(block, state, host, stop))
        is_in_place = self._geometry.is_fixed or to is Unmap.KEEP or offset > start or stop < end
        if is_in_place and kind is _BACKING:
            return offset
        not_begun = self._not_begun()
        if not_begun is not None:
            return not_begun
        if is_in_place:
            return offset
        if kind is _DATA:
            if host + self._block_size > self._space.grown:
                return Miss(self._space, host + self._block_size)
            self._space.free(host, self._block_size)
        page.entries[index & _PAGE_MASK] = State.ZERO if to is Unmap.ZERO else State.UNMAPPED
        self.pages.changed(page)
        return end


def _count_absent(entries: array[int], has_state: bool) -> int:
    """How many from the first on are without data, and with a state or without one as asked; there is at least one."""
    if entries != array("Q", entries[:1]) * len(entries):
        absent = ((entry & _FLAGS_MASK) <= _UNMAPPED and bool(entry & _FLAGS_MASK) == has_state for entry in entries)
        return next((place for place, goes_on in enumerate(absent) if not goes_on), len(entries))
    flags = entries[0] & _FLAGS_MASK
    return len(entries) if flags <= _UNMAPPED and bool(flags) == has_state else 0


def bit_run(bits: array[int], first: int, count_max: int) -> tuple[bool, int]:
    """(whether bit `first` is set, how many bits from there on are equal to it, at most `count_max`). LSB first:
    bits 0b0000_1110, (1, 8) gives (True, 3).
    """
    value = bits[first >> 3] >> (first & 7) & 1
    position, stop = first, first + count_max
    while position < stop and bits[position >> 3] >> (position & 7) & 1 == value:
        position += 1
        if position & 7 == 0:
            whole = bits[position >> 3 : stop >> 3].tobytes()
            position += 8 * (len(whole) - len(whole.lstrip(b"\xff" if value else b"\0")))
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
