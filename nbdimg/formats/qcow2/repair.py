"""Repair of an image: refcounts become what the references say, COPIED flags what the refcounts say.

    1  raise refcounts, or build all refcount structures anew                   barrier
    2  zero L2 entries that hold no data, clear wrong COPIED flags              barrier
    3  lower refcounts                                                          barrier
    4  set missing COPIED flags                                                 barrier
    5  check again; if nothing is left, clear counts behind the end of the file barrier
    6  if no corruption is left, clear the dirty and the corrupt bit            barrier

At each point a refcount is no lower than it was or than its references (Q1), a flag says "write in place" only with
refcount 1, and nothing but the image itself says how far the repair came: after a crash it is run again from the start.

The refcount structures are built anew where they cannot be written in place: when the table or a block lies outside the
file, is misaligned or overlaps something, or when no block counts a cluster that is in use. The new ones lie behind all
that is used and count themselves; the header's 12 bytes that name them are written last (Q6):

    | everything in use | block | block | ... | table |

What cannot be followed (`References.has_broken_references`) may have been the only reference to a cluster: then nothing
is lowered. A table in whose cluster something else lies is not written: that may be the guest's.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from itertools import compress
from operator import ne

from nbdimg.errors import UnsupportedFeature
from nbdimg.formats.findings import CheckReport
from nbdimg.formats.qcow2 import structs as s
from nbdimg.formats.qcow2.check import Survey
from nbdimg.formats.qcow2.counts import Counts, differing, last_used, used_blocks
from nbdimg.formats.qcow2.header import KNOWN_AUTOCLEAR, Header
from nbdimg.formats.qcow2.paced import PIECE_SIZE
from nbdimg.formats.qcow2.packed import decode_offsets, encode_offsets
from nbdimg.formats.qcow2.references import BEYOND_MAX, Progress
from nbdimg.formats.qcow2.structs import Incompatible
from nbdimg.storage.file import BlockFile
from nbdimg.units import div_ceil

_REPAIRED = Incompatible.DIRTY | Incompatible.CORRUPT
_U64_SIZE = 8
_BLOCKS_AT_ONCE = 512
"""Refcount blocks that are passed over before the loop gets its turn."""
_LEAKS = 3
"""`CheckReport.exit_status`: leaks and nothing else, as when what hid references has gone with the old structures."""


async def repair(file: BlockFile, header: Header, *, leaks_only: bool, progress: Progress | None = None) -> CheckReport:
    """Repair what can be; `header` is kept current. An image that cannot be checked whole is not touched.

    Returns: a check of what remains, with what was fixed in `leaks_fixed` and `corruptions_fixed`.
    Args: leaks_only: lower refcounts, and set the COPIED flags that are missing.
    Raises: OSError; UnsupportedFeature: the refcount table would become too large, or METADATA_MAX.
    """
    survey = Survey(file, header, is_fixing=not leaks_only)
    await survey.run(progress)
    before = survey.report
    if before.check_errors:
        return before
    if not before.is_clean:
        await _clear_unknown_autoclear(file, header)
        if leaks_only:
            await _Repair(survey).leaks()
        else:
            await _Repair(survey).all()
        survey = await _surveyed(file, header, progress)
        if survey.report.exit_status == _LEAKS and not leaks_only:
            await _Repair(survey).leaks()
            survey = await _surveyed(file, header, progress)
    after = survey.report
    after.leaks_fixed = max(0, before.leaks - after.leaks)
    after.corruptions_fixed = max(0, before.corruptions - after.corruptions)
    if after.is_clean:
        after.leaks_fixed += await _Repair(survey).clear_behind()
    if header.incompatible & _REPAIRED and not after.corruptions and not after.check_errors:
        await _clear_bits(file, header)
    return after


async def _surveyed(file: BlockFile, header: Header, progress: Progress | None) -> Survey:
    survey = Survey(file, header)
    await survey.run(progress)
    return survey


async def _clear_unknown_autoclear(file: BlockFile, header: Header) -> None:
    """What a writer does not know it must declare stale before it writes."""
    features = header.autoclear & KNOWN_AUTOCLEAR
    if features != header.autoclear:
        await file.pwrite(s.AUTOCLEAR_OFFSET, features.to_bytes(_U64_SIZE, "big"))
        await file.fdatasync()
        header.autoclear = features


async def _clear_bits(file: BlockFile, header: Header) -> None:
    await file.fdatasync()
    features = header.incompatible & ~_REPAIRED
    await file.pwrite(s.INCOMPATIBLE_OFFSET, features.to_bytes(_U64_SIZE, "big"))
    await file.fdatasync()
    header.incompatible = features


class _Repair:
    """One run over a survey. `_stored` follows what is written; a count that is full may be too low, and stays."""

    def __init__(self, survey: Survey) -> None:
        self._file = survey.file
        self._header = survey.header
        self._survey = survey
        self._references = survey.references
        self._bits = survey.header.cluster_bits
        self._cluster_size = survey.header.cluster_size
        self._piece_size = min(PIECE_SIZE, survey.header.cluster_size)
        self._stored = self._references.stored

    async def all(self) -> None:
        if self._survey.needs_rebuild:
            if self._survey.is_table_disputed or not await self._rebuild():
                return
        else:
            await self._store(max)
        tables = self._writable_l2_tables()
        await self._fix_entries(tables, is_setting=False)
        if self._is_countable:
            await self._store(min)
        await self._fix_entries(tables, is_setting=True)

    async def leaks(self) -> None:
        """Lower refcounts and set flags, which may be all that is missing: a run before may have been cut between."""
        if self._is_countable:
            await self._store(min)
            await self._fix_entries(self._writable_l2_tables(), is_setting=True)

    @property
    def _is_countable(self) -> bool:
        """Whether the references are all that there are, and the refcounts can be written in place."""
        return not (self._references.has_broken_references or self._survey.needs_rebuild)

    # Refcounts in place

    async def _store(self, pick: Callable[[int, int], int]) -> None:
        """Write the pieces of blocks whose counts change. Each count stands for itself: a torn piece is half done."""
        per_piece = self._piece_size * 8 // self._header.refcount_bits
        changed: set[int] = set()
        counts = self._references.counts
        async for first, found, expected in differing(self._stored, counts, len(counts)):
            clusters = compress(range(first, first + len(found)), map(ne, found, map(pick, found, expected)))
            changed.update(cluster // per_piece for cluster in clusters)
        for piece in sorted(changed):
            await self._store_piece(slice(piece * per_piece, (piece + 1) * per_piece), pick)
        await self._file.fdatasync()

    async def _store_piece(self, part: slice, pick: Callable[[int, int], int]) -> None:
        """The counts of these clusters, in one block."""
        codec, stored, counts = self._survey.codec, self._stored[part], self._references.counts[part]
        index, position = divmod(part.start, self._header.refcount_entries)
        block = self._survey.blocks.get(index)
        if block is None:
            return
        offset = block + position * self._header.refcount_bits // 8
        entries = codec.decode(await self._read(offset, self._piece_size))
        async for first, found, expected in differing(stored, counts, len(stored)):
            stored[first : first + len(found)] = array(codec.typecode, map(pick, found, expected))
        entries[: len(stored)] = array(codec.typecode, stored.tobytes())
        await self._file.pwrite(offset, codec.encode(entries))

    async def _read(self, offset: int, length: int) -> bytearray:
        content = bytearray(length)
        await self._file.pread(offset, memoryview(content))
        return content

    async def clear_behind(self) -> int:
        """Clear the counts of clusters behind the file's end, which no check looks at: once the file had grown they
        would be leaks. Returns how many there were. An entry that cannot be followed may mean one of them, so nothing
        else may be left to repair.
        """
        counts, per_block = self._references.counts, self._header.refcount_entries
        end = len(counts) if counts[-1] else len(counts) - 1
        per_piece = self._piece_size * 8 // self._header.refcount_bits
        cleared = 0
        for number, (index, block) in enumerate(self._survey.blocks.items()):
            if number % _BLOCKS_AT_ONCE == 0:
                await asyncio.sleep(0)
            kept = max(0, end - index * per_block)
            for piece in range(kept // per_piece, per_block // per_piece):
                cleared += await self._clear_piece(block + piece * self._piece_size, kept - piece * per_piece)
        if cleared:
            await self._file.fdatasync()
        return cleared

    async def _clear_piece(self, offset: int, kept: int) -> int:
        """Set the counts of a piece to 0 but for the first `kept`, if there are any; returns how many were not."""
        codec = self._survey.codec
        entries = codec.decode(await self._references.read(offset, self._piece_size))
        behind = entries[max(0, kept) :]
        count = len(behind) - behind.count(0)
        if count:
            await _clear_unknown_autoclear(self._file, self._header)
            entries[max(0, kept) :] = codec.zeroes(len(behind))
            await self._file.pwrite(offset, codec.encode(entries))
        return count

    # Refcounts anew

    async def _rebuild(self) -> bool:
        """False: not done, as the file would grow over what something refers to already."""
        references = self._references
        wanted = references.counts
        start = await last_used(wanted, wanted, len(wanted)) + 1
        if references.has_broken_references:
            start = max(start, references.cluster_count)
        for cluster in self._survey.refcount_clusters:
            if not (references.has_broken_references and references.counts[cluster] == references.count_max):
                wanted[cluster] -= 1
        if references.has_broken_references:
            async for first, found, expected in differing(self._stored, wanted, len(wanted)):
                wanted[first : first + len(found)] = array(self._survey.codec.typecode, map(max, found, expected))
        layout = self._layout(await used_blocks(wanted, self._header.refcount_entries), start)
        if len(references.beyond) >= BEYOND_MAX or any(
            references.cluster_count <= cluster < layout.stop for cluster in references.beyond
        ):
            return False
        await self._write_structures(layout, wanted)
        self._stored = wanted
        self._survey.needs_rebuild = False
        return True

    async def _write_structures(self, layout: _Layout, wanted: Counts) -> None:
        header, codec, per_block = self._header, self._survey.codec, self._header.refcount_entries
        table = array("Q", bytes(layout.table_clusters * self._cluster_size))
        for position, index in enumerate(layout.blocks):
            first = index * per_block
            entries = codec.zeroes(per_block)
            part = array(codec.typecode, wanted[first : first + per_block].tobytes())
            entries[: len(part)] = part
            for cluster in range(max(first, layout.start), min(first + per_block, layout.stop)):
                entries[cluster - first] = 1
            table[index] = (layout.start + position) << self._bits
            await self._file.pwrite(table[index], codec.encode(entries))
        table_offset = (layout.start + len(layout.blocks)) << self._bits
        await self._file.pwrite(table_offset, encode_offsets(table))
        await self._file.fdatasync()
        fields = s.REFCOUNT_FIELDS.pack(table_offset, layout.table_clusters)
        await self._file.pwrite(s.REFCOUNT_FIELDS_OFFSET, fields)
        await self._file.fdatasync()
        header.refcount_table_offset, header.refcount_table_clusters = table_offset, layout.table_clusters
        self._survey.blocks = {index: table[index] for index in layout.blocks}

    def _layout(self, used: set[int], start: int) -> _Layout:
        """Blocks and table together count themselves: they grow until they do. Args: used: blocks that are needed.

        64 KiB clusters, 16 bits: a file of 32767 clusters needs one block for them and, as the block itself is number
        32767 and the table 32768, a second one.

        Raises: UnsupportedFeature: REFCOUNT_TABLE_BYTES_MAX.
        """
        per_block = self._header.refcount_entries
        blocks, table_clusters = used, 1
        while True:
            stop = start + len(blocks) + table_clusters
            wanted = used | set(range(start // per_block, div_ceil(stop, per_block)))
            needed = div_ceil((max(wanted) + 1) * _U64_SIZE, self._cluster_size)
            if needed * self._cluster_size > s.REFCOUNT_TABLE_BYTES_MAX:
                raise UnsupportedFeature(
                    self._file.path,
                    f"the refcount table would take {needed * self._cluster_size} bytes, "
                    f"allowed are {s.REFCOUNT_TABLE_BYTES_MAX}",
                )
            if wanted == blocks and needed <= table_clusters:
                return _Layout(start, sorted(blocks), table_clusters)
            blocks, table_clusters = wanted, max(needed, table_clusters)

    # Entries

    def _writable_l2_tables(self) -> list[int]:
        """Clusters of the L2 tables that are nothing else as well: writing there would do damage."""
        references = self._references
        return [
            cluster
            for cluster in references.l2_tables
            if not references.tables[cluster] and cluster not in references.shared_l2_tables
        ]

    def _is_l1_writable(self) -> bool:
        first = self._header.l1_offset >> self._bits
        last = (self._header.l1_offset + self._header.l1_size * _U64_SIZE - 1) >> self._bits
        is_alone = bytes(self._references.tables[first : last + 1]) == b"\1" * (last + 1 - first)
        return is_alone and not any(cluster in self._references.l2_tables for cluster in range(first, last + 1))

    async def _fix_entries(self, tables: list[int], *, is_setting: bool) -> None:
        """Set the COPIED flags that are missing, or clear those that are wrong and zero what is to be zeroed."""
        zeroable: dict[int, list[int]] = {}
        if not is_setting:
            for cluster, index in self._references.zeroable:
                zeroable.setdefault(cluster, []).append(index)
        if self._header.l1_size and self._is_l1_writable():
            length = self._header.l1_size * _U64_SIZE
            await self._fix_table(self._header.l1_offset, length, [], is_setting, is_l1=True)
        for cluster in tables:
            if self._references.l2_tables[cluster][0] or cluster in zeroable:
                indexes = zeroable.get(cluster, [])
                await self._fix_table(cluster << self._bits, self._cluster_size, indexes, is_setting, is_l1=False)
        await self._file.fdatasync()

    async def _fix_table(self, offset: int, length: int, zeroable: list[int], is_setting: bool, *, is_l1: bool) -> None:
        """Each entry lies within a sector and stands for itself: its flag is right or as it was after a crash."""
        words_per_entry = 1 if is_l1 else self._header.l2_entry_size // _U64_SIZE
        is_active = is_l1 or bool(self._references.l2_tables[offset >> self._bits][0])
        for start in range(0, length, PIECE_SIZE):
            content = await self._read(offset + start, min(PIECE_SIZE, length - start))
            if content.count(0) == len(content):
                continue
            words = decode_offsets(content)
            changed: list[int] = []
            for index in zeroable:
                word = index * words_per_entry - start // _U64_SIZE
                if 0 <= word < len(words):
                    is_cleared = self._header.has_subclusters or not words[word] & s.OFFSET_MASK
                    words[word] = 0 if is_cleared else s.ZERO
                    changed.append(word)
            if is_active:
                changed.extend(self._fix_flags(words, words_per_entry, is_setting, is_l1))
            if changed:
                first, stop = min(changed), max(changed) + 1
                data = encode_offsets(words[first:stop])
                await self._file.pwrite(offset + start + first * _U64_SIZE, data)

    def _fix_flags(self, words: array[int], step: int, is_setting: bool, is_l1: bool) -> list[int]:
        """Change the flags of one kind in `words`; their indexes are returned. None is set beside a refcount that is
        too low: what is shared would be written in place.
        """
        stored, counts, bits = self._stored, self._references.counts, self._bits
        has_data_file = self._header.has_data_file and not is_l1
        zero_bit = 0 if is_l1 or self._header.has_subclusters else s.ZERO
        changed: list[int] = []
        for index in range(0, len(words), step):
            entry = words[index]
            if not entry or (entry >= s.COPIED) == is_setting:
                continue
            offset = entry & s.OFFSET_MASK
            cluster = offset >> bits
            if entry & s.COMPRESSED and not is_l1:
                is_exclusive = False
            elif not offset and (entry & zero_bit or not has_data_file):
                continue
            elif has_data_file:
                is_exclusive = True
            elif cluster >= self._references.cluster_count:
                continue
            else:
                is_exclusive = stored[cluster] == 1 and not (is_setting and counts[cluster] > 1)
            if is_exclusive == is_setting:
                words[index] ^= s.COPIED
                changed.append(index)
        return changed


@dataclass(frozen=True, slots=True)
class _Layout:
    """New refcount structures from cluster `start` on: a block for each index in `blocks`, then the table."""

    start: int
    blocks: list[int]
    table_clusters: int

    @property
    def stop(self) -> int:
        return self.start + len(self.blocks) + self.table_clusters
