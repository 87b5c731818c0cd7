"""Another size for the disk of an image that is open and idle.

    1  behind what the old size uses: BAT entries are cleared, a fixed file's new blocks made, the BAT copied when its
       region must be larger, and what a short last block held behind the disk's end is zeroed       barrier
    2  one log entry: Virtual Disk Size, and both region tables when the BAT moves                   barrier
    3  the same in place                                                                             barrier

Before 2 is durable nothing that was changed belongs to the disk, after it all of it does: a crash leaves the old size
or the new one. What a smaller disk lost is let go afterwards, through the log; a crash before that leaves blocks behind
the end, which every reader ignores, which a later growth clears, and whose space `compact` gives back. In the end what
belongs to nothing any more is given back, as a repair of leaks does it.

Size and children: DataWriteGuid changes between 1 and 2, so children of this image no longer fit. A growth that
finds no space for 1 leaves them as they were.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import replace

from nbdimg.errors import ConfigError, CorruptImage, UnsupportedFeature
from nbdimg.formats.gate import DenyGate
from nbdimg.formats.options import OpenOptions
from nbdimg.formats.vhdx import structs as s
from nbdimg.formats.vhdx.check import Survey
from nbdimg.formats.vhdx.create import RESERVE_SIZE
from nbdimg.formats.vhdx.driver import VhdxDriver
from nbdimg.formats.vhdx.geometry import Geometry, State
from nbdimg.formats.vhdx.header import load_headers
from nbdimg.formats.vhdx.offline import Session, bat_pieces, region_pages
from nbdimg.formats.vhdx.open import load_driver
from nbdimg.formats.vhdx.parts import Parts, load_parts
from nbdimg.formats.vhdx.region import RegionEntry
from nbdimg.formats.vhdx.repair import give_back
from nbdimg.formats.vhdx.replay import replay_to_file
from nbdimg.image.image import Image
from nbdimg.storage.file import BlockFile, read, zero
from nbdimg.storage.ordering import hindered, leaves_no_doubt, space_may_wait
from nbdimg.units import MiB, align_down, align_up, div_ceil

Progress = Callable[[int, int], None]
"""(bytes of the BAT done, bytes in all)."""


async def resize(image: Image, size: int, *, progress: Progress | None = None) -> None:
    """Give the disk `size` bytes; durable on return. Nothing may be in flight. What is new reads as zeroes.

    Raises: ConfigError: the size cannot be. UnsupportedFeature: a parent that is larger would show through, or there is
    no log. CorruptImage: the image has what cannot be resized. OSError: where that leaves no doubt about what the disk
    has the size is the old one and the image goes on; else it fails. Where the log has the new size, it is no error.
    """
    former = image.driver
    assert isinstance(former, VhdxDriver)
    file = former.file
    _check_size(image, former, size)
    if size == former.size:
        return
    await image.flush()
    refusal: OSError | None = None
    try:
        await former.close()
        parts = await load_parts(file, await replay_to_file(file, await load_headers(file)))
        session = Session(file, parts.headers)
        try:
            await _Resize(file, parts, size, session, progress).run()
            await _give_back(file)
        except OSError as error:
            if not leaves_no_doubt(error):
                raise
            refusal = error
            await replay_to_file(file, await load_headers(file))
            with space_may_wait():
                await _give_back(file)
        driver, _ = await load_driver(file, OpenOptions(DenyGate(), writable=True))
    except BaseException:
        image.gate.failure = "a resize was not finished: open it anew"
        raise
    for kind, cache in driver.tables.items():
        cache.succeed(former.tables[kind])
    image.driver = driver
    image.resized()
    if refusal is not None and driver.size != size:
        raise refusal


def _check_size(image: Image, driver: VhdxDriver, size: int) -> None:
    if size % driver.sector_size or not 0 < size <= s.VIRTUAL_SIZE_MAX:
        raise ConfigError(
            f"{image.path}: the size is {size} bytes, expected a multiple of the logical sector size "
            f"{driver.sector_size}, at most {s.VIRTUAL_SIZE_MAX} (64 TiB)"
        )
    if image.backing is not None and size > driver.size < image.backing.size:
        raise UnsupportedFeature(
            image.path,
            f"the disk has {driver.size} bytes and that of its parent {image.backing.size}: what is new would show the "
            "parent, expected a parent that is not larger",
        )


async def _give_back(file: BlockFile) -> None:
    """Space that is nobody's now. Raises: Hindrance: some is still taken. OSError."""
    survey = Survey(file)
    await survey.run()
    await give_back(file, survey)


class _Resize:
    def __init__(self, file: BlockFile, parts: Parts, size: int, session: Session, progress: Progress | None) -> None:
        self._file = file
        self._parts = parts
        self._old = parts.geometry
        self._new = replace(parts.geometry, size=size)
        self._session = session
        self._progress = progress
        self._bat = parts.regions.bat

    async def run(self) -> None:
        await self._session.begin()
        is_larger = self._new.size > self._old.size
        bat = await hindered(self._prepare()) if is_larger else self._bat
        await self._session.change_data()
        await self._session.change(await self._pages(bat))
        if not is_larger:
            await self._forget()
        await self._session.end()

    async def _prepare(self) -> RegionEntry:
        """What nothing refers to yet. Returns where the BAT will be."""
        await self._zero_short_block()
        bat = await self._room_for_bat()
        await self._clear_slots(bat)
        if self._new.is_fixed:
            await self._add_fixed_blocks(bat)
        return bat

    async def _zero_short_block(self) -> None:
        """What the last block holds behind the old end of the disk: the guest is about to see it."""
        used = self._old.size % self._old.block_size
        if not used:
            return
        block = self._old.block_count - 1
        place = self._bat.offset + 8 * self._old.payload_index(block)
        entry = int.from_bytes(await read(self._file, place, 8), "little")
        offset = (entry & s.ENTRY_OFFSET_MASK) + used
        if entry & s.ENTRY_STATE_MASK < State.FULLY_PRESENT:
            return
        stop = offset + self._old.block_size - used
        for start, end, name in self._parts.structures():
            if offset < end and start < stop:
                raise CorruptImage(
                    self._file.path, f"BAT entry of block {block} lies where {name} is (offset {place})", place
                )
        if self._file.size < stop:
            await self._file.truncate(align_up(stop, MiB))
        await zero(self._file, offset, stop)

    # The BAT

    async def _room_for_bat(self) -> RegionEntry:
        """The region as it will be: the same if it is large enough, else a copy at the file's end."""
        old, needed = self._bat, 8 * self._new.entry_count
        if needed <= old.length:
            return old
        bat = RegionEntry(old.guid, align_up(self._file.size, MiB), align_up(needed, MiB), old.is_required)
        await self._file.truncate(bat.offset + bat.length)
        total = 8 * self._old.entry_count
        async for first, entries in bat_pieces(self._file, old.offset, 0, self._old.entry_count):
            await self._file.pwrite(bat.offset + 8 * first, entries.tobytes())
            if self._progress is not None:
                self._progress(8 * (first + len(entries)), total)
        return bat

    async def _clear_slots(self, bat: RegionEntry) -> None:
        """Entries that the new size adds: whatever is in them was never part of the table."""
        async for first, entries in bat_pieces(self._file, bat.offset, *self._added(self._old, self._new)):
            cleared = self._without(first, entries, self._old)
            if cleared != entries:
                await self._file.pwrite(bat.offset + 8 * first, cleared.tobytes())

    def _added(self, small: Geometry, large: Geometry) -> tuple[int, int]:
        """(first, stop) of the entries that may be of blocks which only the larger disk has."""
        return small.payload_index(small.block_count), large.entry_count

    def _without(self, first: int, entries: array[int], geometry: Geometry) -> array[int]:
        """The entries, with those cleared that a disk of this geometry does not have."""
        stride, count = geometry.chunk_ratio + 1, geometry.block_count
        chunks = div_ceil(count, geometry.chunk_ratio)
        kept = array("Q", entries)
        for position, entry in enumerate(entries):
            index = first + position
            if not entry:
                continue
            if index % stride == stride - 1:
                is_kept = geometry.has_parent and index // stride < chunks
            else:
                is_kept = index - index // stride < count
            if not is_kept:
                kept[position] = State.NOT_PRESENT
        return kept

    async def _add_fixed_blocks(self, bat: RegionEntry) -> None:
        """All new blocks in a row at the file's end. Written in place: no size has them yet."""
        geometry = self._new
        offset = align_up(self._file.size, MiB)
        first, stop = self._old.block_count, geometry.block_count
        await self._reserve(offset, offset + (stop - first) * geometry.block_size)
        while first < stop:
            count = min(stop, align_down(first, geometry.chunk_ratio) + geometry.chunk_ratio) - first
            end = offset + count * geometry.block_size
            state = State.FULLY_PRESENT
            entries = array("Q", range(offset | state, end | state, geometry.block_size))
            await self._file.pwrite(bat.offset + 8 * geometry.payload_index(first), entries.tobytes())
            first, offset = first + count, end

    async def _reserve(self, start: int, stop: int) -> None:
        """Space that reads as zeroes, allocated where the file system can do that."""
        await self._file.truncate(stop)
        for offset in range(start, stop, RESERVE_SIZE):
            if not await self._file.zero(offset, min(RESERVE_SIZE, stop - offset)):
                return

    # What belongs together

    async def _pages(self, bat: RegionEntry) -> dict[int, bytes]:
        """The pages that make the new size and the BAT's new place true."""
        pages: dict[int, bytearray] = {}
        tables: dict[int, bytes] = {}
        size_offset = self._parts.metadata.offset_of(s.VIRTUAL_DISK_SIZE)
        await self._patch(pages, size_offset, self._new.size.to_bytes(8, "little"))
        if bat is not self._bat:
            tables = await region_pages(self._file, self._parts.regions.with_bat(bat).entries)
        return {offset: bytes(page) for offset, page in pages.items()} | tables

    async def _patch(self, pages: dict[int, bytearray], offset: int, data: bytes) -> None:
        """Bytes that may lie across the end of a page."""
        for position, byte in enumerate(data, offset):
            start = align_down(position, s.PAGE_SIZE)
            if start not in pages:
                pages[start] = bytearray(await read(self._file, start, s.PAGE_SIZE))
            pages[start][position - start] = byte

    async def _forget(self) -> None:
        """Let go what is behind the end of the smaller disk."""
        first, stop = self._added(self._new, self._old)
        async for start, entries in bat_pieces(self._file, self._bat.offset, first, stop):
            kept = self._without(start, entries, self._new)
            changed = (index for index in range(len(entries)) if kept[index] != entries[index])
            words = {self._bat.offset + 8 * (start + index): 0 for index in changed}
            if words:
                await self._session.put(words)
            if self._progress is not None:
                self._progress(8 * (start + len(entries) - first), 8 * (stop - first))
