"""How often each cluster of the file is referred to: the counting behind check and repair.

`add` and `add_region` count clusters; `count_l1` walks an L1 table and notes its L2 tables; `count_l2_tables` walks
each of those once, however many L1 entries of the image and its snapshots share it, and counts what it maps as often.
Entries are judged as QEMU's check does, so that both say the same; what a driver must refuse on top of that is a
corruption here too:

    bit 0 of an L2 entry in version 2, or with extended entries      QEMU: accepted by the check, refused by reads
    COPIED in an L2 entry that is nothing else                       QEMU: takes it as unallocated; the specification
                                                                     allows it with an external data file alone
    an external data file's host offset is not the guest offset      QEMU: accepted by the check, refused by reads
    a table, or L2 table, lies in something else                     QEMU: sound once the refcounts are as many

A table at an impossible place is not followed. `has_broken_references` then says that a cluster without references
may still be somebody's.
"""

from __future__ import annotations

import asyncio
import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from operator import ne

from nbdimg.errors import UnsupportedFeature
from nbdimg.formats.findings import CheckReport
from nbdimg.formats.qcow2 import structs as s
from nbdimg.formats.qcow2.counts import is_zero
from nbdimg.formats.qcow2.header import Header
from nbdimg.formats.qcow2.paced import PIECE_SIZE, PacedReader
from nbdimg.formats.qcow2.packed import RefcountCodec, decode_offsets
from nbdimg.formats.zeroed import zeroed
from nbdimg.storage.file import BlockFile
from nbdimg.units import GiB, align_down, div_ceil

MEMORY_MAX = 1 * GiB
"""For two arrays of refcounts: 16 TiB of 64 KiB clusters with 16-bit refcounts, 4 bytes a cluster. Where a sparse file
has none they take no room, but time.
"""

METADATA_MAX = 8 * GiB
"""Metadata read in one check; tables that map 64 TiB in 64 KiB clusters. A sparse file can claim far more."""

L2_TABLES_MAX = 1 << 21
"""Distinct L2 tables, about 100 bytes of memory each: 1 PiB of 64 KiB clusters, 64 GiB of 512-byte clusters."""

BEYOND_MAX = 4096
"""Remembered clusters behind the end of the file that something refers to: a rebuild must not put its blocks there."""

_TABLES_AT_ONCE = 4096
"""L2 tables whose counts are looked at before the loop gets its turn."""

_ALL_BITS = (1 << 64) - 1
_ACTIVE = (1, 1)
_SNAPSHOT = (0, 1)

_L2 = "L2 table"

Progress = Callable[[int, int], None]
"""Called with L2 tables done and L2 tables in all."""


@dataclass(slots=True)
class _Piece:
    """Part of an L2 table, from entry `first_index` on; `offset` in the file, `uses` as in `References.l2_tables`.

    `next_offset`: where the next data cluster lies if it is contiguous with the last one; 0 at first.
    """

    cluster: int
    offset: int
    first_index: int
    entry_size: int
    uses: tuple[int, int]
    next_offset: int

    def entry_at(self, index: int) -> int:
        return self.offset + index * self.entry_size


def _lanes(mask: int, count: int) -> int:
    """The mask in each of `count` 64-bit lanes of one number."""
    return _number(array("Q", [mask]) * count)


def _number(entries: array[int]) -> int:
    return int.from_bytes(entries.tobytes(), sys.byteorder)


class References:
    """Args: is_fixing: entries that repair will zero are noted in `zeroable` and not counted."""

    def __init__(self, file: BlockFile, header: Header, report: CheckReport, *, is_fixing: bool) -> None:
        self.report = report
        self._file = file
        self._reader = PacedReader(file)
        self._header = header
        self._bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._file_size = file.size
        self._is_fixing = is_fixing
        self.cluster_count = div_ceil(self._file_size, self._cluster_size)
        typecode = RefcountCodec(header.refcount_order).typecode
        self.count_max = (1 << header.refcount_bits) - 1
        self.counts = zeroed(typecode, self.cluster_count + 1)
        """References by cluster. The last one is for data that ends within a cluster behind the file's end."""
        self.stored = zeroed(typecode, self.cluster_count + 1)
        """The refcounts that the image holds."""
        self.tables = zeroed("B", self.cluster_count + 1)
        """By cluster, 1 where a counted table lies, 2 where several do; L2 tables and refcount structures are none."""
        self.l2_tables: dict[int, tuple[int, int]] = {}
        """Cluster of an L2 table -> how many L1 entries refer to it: (of the active L1 table, of all)."""
        self.shared_l2_tables: set[int] = set()
        """Clusters of those that something else may refer to as well: a count that is full may hide that."""
        self._l1_indexes: dict[int, int] = {}
        """Cluster of an L2 table -> the first index of the active L1 table that has it, with an external data file."""
        self.zeroable: list[tuple[int, int]] = []
        """(cluster of the L2 table, index) of entries that hold no data: misaligned, or COPIED without an offset."""
        self.beyond: set[int] = set()
        self.has_broken_references = False
        self.bytes_read = 0
        self._ones = array(typecode, [1]) * (PIECE_SIZE // 8)
        zero_bit = s.ZERO if header.version >= 3 and not header.has_subclusters else 0
        self._plain = s.COPIED | align_down(s.OFFSET_MASK, self._cluster_size) | zero_bit
        self._reserved = s.L2_RESERVED | (s.ZERO & ~zero_bit)
        piece_entries = min(PIECE_SIZE, self._cluster_size) // header.l2_entry_size
        self._odd_lanes = _lanes(~(self._plain & ~s.ZERO) & _ALL_BITS, piece_entries)
        self._one_lanes = _lanes(1, piece_entries)
        self._step_lanes = _number(array("Q", range(0, piece_entries << self._bits, self._cluster_size)))
        self._copied_lanes = _lanes(s.COPIED, piece_entries)
        self._cluster_lanes = _lanes(s.OFFSET_MASK >> self._bits, piece_entries)

    # Reading, and clusters

    async def read(self, offset: int, length: int) -> bytearray:
        """Raises: UnsupportedFeature: more metadata than METADATA_MAX."""
        self.bytes_read += length
        if self.bytes_read > METADATA_MAX:
            raise self._too_much_metadata(self.bytes_read)
        return await self._reader.read(offset, length)

    def _too_much_metadata(self, length: int) -> UnsupportedFeature:
        return UnsupportedFeature(
            self._file.path,
            f"the image refers to {length} bytes of metadata or more, a check reads at most {METADATA_MAX}",
        )

    def corruption(self, structure: str, offset: int | None, message: str, times: int = 1) -> None:
        self.report.add("corruption", structure, offset, message, times)

    def broken(self, structure: str, offset: int | None, message: str, times: int = 1) -> None:
        """A corruption that hides what was referred to."""
        self.has_broken_references = True
        self.corruption(structure, offset, message, times)

    def add(self, structure: str, cluster: int, times: int = 1) -> bool:
        """Count references to a cluster. False: the refcount's width does not hold them all."""
        count = self.counts[cluster] + times
        if count <= self.count_max:
            self.counts[cluster] = count
            return True
        self.counts[cluster] = self.count_max
        self.broken(
            structure,
            cluster << self._bits,
            f"cluster {cluster} has {count} references, "
            f"{self._header.refcount_bits}-bit refcounts allow {self.count_max}",
            count - self.count_max,
        )
        return False

    def is_inside(self, offset: int, length: int) -> bool:
        """The last cluster may lack its end, as far as nothing was written there."""
        return offset + length - self._file_size < self._cluster_size

    def add_region(self, structure: str, offset: int, length: int, times: int = 1) -> range | None:
        """Count references to the clusters of a byte range; they are returned. None: it is not inside the file."""
        if not self.is_inside(offset, length):
            self._beyond(structure, offset, length, times)
            return None
        clusters = range(offset >> self._bits, ((offset + length - 1) >> self._bits) + 1)
        for cluster in clusters:
            self.add(structure, cluster, times)
        return clusters

    def add_table(self, structure: str, offset: int, length: int) -> range | None:
        """`add_region` for metadata. What ends behind the file's last cluster is not inside, however short it is.

        Where two tables share a cluster the place of one is wrong, and what the real one refers to is hidden.
        """
        if offset + length > self.cluster_count << self._bits:
            self._beyond(structure, offset, length, 1)
            return None
        clusters = self.add_region(structure, offset, length)
        for cluster in clusters or ():
            if self.tables[cluster]:
                self.broken(structure, offset, f"the range of {length} bytes at {offset:#x} lies in another table")
                break
        for cluster in clusters or ():
            self.tables[cluster] = min(2, self.tables[cluster] + 1)
        return clusters

    def _beyond(self, structure: str, offset: int, length: int, times: int) -> None:
        for cluster in range(offset >> self._bits, ((offset + length - 1) >> self._bits) + 1):
            if len(self.beyond) >= BEYOND_MAX:
                break
            self.beyond.add(cluster)
        self.broken(
            structure,
            offset,
            f"the range of {length} bytes at {offset:#x} is not inside the file's {self._file_size} bytes",
            times,
        )

    # L1 tables

    async def count_l1(self, structure: str, offset: int, entry_count: int, *, is_active: bool) -> None:
        """Count an L1 table and its L2 tables. Raises: UnsupportedFeature: L2_TABLES_MAX."""
        length = entry_count * 8
        if not length:
            return
        self.add_table(structure, offset, length)
        for start in range(0, length, PIECE_SIZE):
            if offset + start >= self._file_size:
                return
            piece = await self.read(offset + start, min(PIECE_SIZE, length - start))
            if piece.count(0) == len(piece):
                continue
            for index, entry in enumerate(decode_offsets(piece), start // 8):
                if entry:
                    self._count_l1_entry(structure, offset + 8 * index, index, entry, is_active)

    def _count_l1_entry(self, structure: str, at: int, index: int, entry: int, is_active: bool) -> None:
        if entry & s.L1_RESERVED:
            self.corruption(structure, at, f"entry {index} is {entry:#018x}, expected its reserved bits to be 0")
        offset = entry & s.OFFSET_MASK
        cluster = offset >> self._bits
        if not offset or offset % self._cluster_size:
            self.broken(
                structure, at, f"entry {index} is {entry:#018x}, expected a non-zero multiple of {self._cluster_size}"
            )
            return
        if cluster >= self.cluster_count:
            self._beyond(_L2, offset, self._cluster_size, 1)
            return
        active, total = self.l2_tables.get(cluster, (0, 0))
        first_use = _ACTIVE if is_active else _SNAPSHOT
        self.l2_tables[cluster] = (active + is_active, total + 1) if total else first_use
        if len(self.l2_tables) > L2_TABLES_MAX:
            raise UnsupportedFeature(
                self._file.path, f"there are more than {L2_TABLES_MAX} L2 tables, the most that a check holds"
            )
        self.add(_L2, cluster)
        if is_active:
            if self._header.has_data_file:
                self._l1_indexes.setdefault(cluster, index)
            self._check_copied(structure, at, index, entry, self.stored[cluster], 1)

    def _check_copied(self, structure: str, at: int, index: int, entry: int, refcount: int, times: int) -> None:
        if (refcount == 1) != (entry >= s.COPIED):
            expected = "set" if refcount == 1 else "clear"
            message = f"entry {index} is {entry:#018x}, expected COPIED to be {expected} with refcount {refcount}"
            self.corruption(structure, at, message, times)

    # L2 tables

    async def count_l2_tables(self, progress: Progress | None) -> None:
        """Raises: UnsupportedFeature: METADATA_MAX, before the first table is read."""
        total = len(self.l2_tables)
        length = self.bytes_read + total * self._cluster_size
        if length > METADATA_MAX:
            raise self._too_much_metadata(length)
        piece_size = min(PIECE_SIZE, self._cluster_size)
        zeroes = bytes(piece_size)
        entry_size = self._header.l2_entry_size
        for number, (cluster, uses) in enumerate(self.l2_tables.items()):
            next_offset = 0
            for start in range(0, self._cluster_size, piece_size):
                offset = (cluster << self._bits) + start
                content = await self.read(offset, piece_size)
                if content != zeroes:
                    piece = _Piece(cluster, offset, start // entry_size, entry_size, uses, next_offset)
                    next_offset = self._count_piece(piece, decode_offsets(content))
            if progress is not None:
                progress(number + 1, total)
        await self._check_l2_tables()

    async def _check_l2_tables(self) -> None:
        """What is an L2 table and something else has a wrong reference. If that is the one of the L1 entry, what the
        real L2 table maps is hidden. An entry that names its own table is wrong itself: nothing else says it is data.
        """
        exact_max = self.count_max - self.has_broken_references
        for number, (cluster, (_, times)) in enumerate(self.l2_tables.items()):
            if number % _TABLES_AT_ONCE == 0:
                await asyncio.sleep(0)
            others = self.counts[cluster] - times
            if others > 0:
                others -= times * await self._own_references(cluster)
            if others > 0:
                message = f"cluster {cluster} is an L2 table and has {others} other references, expected none"
                self.broken(_L2, cluster << self._bits, message)
            if others > 0 or self.counts[cluster] > exact_max:
                self.shared_l2_tables.add(cluster)

    async def _own_references(self, cluster: int) -> int:
        """How many entries of an L2 table have been counted that name the table itself."""
        if self._header.has_data_file:
            return 0
        found, step = 0, self._header.l2_entry_size // 8
        mask = s.COMPRESSED | align_down(s.OFFSET_MASK, self._cluster_size)
        start = cluster << self._bits
        for offset in range(start, start + self._cluster_size, PIECE_SIZE):
            entries = decode_offsets(await self.read(offset, min(PIECE_SIZE, self._cluster_size)))[::step]
            found += sum(entry & mask == start for entry in entries)
        return found

    def _count_piece(self, piece: _Piece, words: array[int]) -> int:
        """Count what a piece of an L2 table maps. Returns where the next cluster would lie were it contiguous."""
        entries = words
        bitmaps: array[int] | None = None
        if self._header.has_subclusters:
            entries, bitmaps = words[::2], words[1::2]
        if self._header.has_data_file:
            self._check_bitmaps(piece, entries, bitmaps)
            return self._count_data_file(piece, entries)
        if self._count_run(piece, entries, bitmaps):
            return (entries[-1] & s.OFFSET_MASK) + self._cluster_size
        self._check_bitmaps(piece, entries, bitmaps)
        next_offset = self._count_plain(piece, entries)
        return self._count_entries(piece, entries, bitmaps) if next_offset is None else next_offset

    def _count_run(self, piece: _Piece, entries: array[int], bitmaps: array[int] | None) -> bool:
        """The fast path: every entry is plain, and the clusters are contiguous and counted here for the first time."""
        first, last = entries[0], entries[-1]
        length = len(entries)
        step = self._cluster_size
        if first & ~self._plain or first & s.ZERO or not first & s.OFFSET_MASK or last != first + (length - 1) * step:
            return False
        start = (first & s.OFFSET_MASK) >> self._bits
        stop = start + length
        active, total = piece.uses
        if stop > self.cluster_count or total > self.count_max:
            return False
        if _number(entries) != first * self._one_lanes + self._step_lanes:
            return False
        if bitmaps is not None and bitmaps.count(s.ALL_ALLOCATED) != length:
            return False
        ones = self._ones if length == len(self._ones) else self._ones[:length]
        if active:
            stored = array(ones.typecode, self.stored[start:stop].tobytes())
            if (stored != ones) if first >= s.COPIED else (1 in stored):
                return False
        if not is_zero(self.counts[start:stop]):
            return False
        self.counts[start:stop] = ones if total == 1 else array(ones.typecode, [total]) * length
        self.report.allocated_clusters += active * length
        if piece.next_offset and piece.next_offset != first & s.OFFSET_MASK:
            self.report.fragmented_clusters += active
        return True

    def _count_plain(self, piece: _Piece, entries: array[int]) -> int | None:
        """The middle path: what is not 0 is plain, inside the file, and COPIED all alike and rightly.

        The entries are looked at as one number, 64 bits each: all at once they lose their flags and become clusters.
        Returns: as `_count_piece`; None: nothing is counted yet, for it is not so.
        """
        value = _number(entries)
        if value & self._odd_lanes:
            return None
        numbers = array("Q", (value >> self._bits & self._cluster_lanes).to_bytes(8 * len(entries), sys.byteorder))
        clusters = list(filter(None, numbers))
        if not clusters or len(clusters) + entries.count(0) != len(entries) or max(clusters) >= self.cluster_count:
            return None
        active, total = piece.uses
        counts = self.counts
        if max(map(counts.__getitem__, clusters)) + total * len(clusters) > self.count_max:
            return None
        if active:
            copied_count = (value & self._copied_lanes).bit_count()
            refcounts = set(map(self.stored.__getitem__, clusters))
            is_copied = refcounts == {1} and copied_count == len(clusters)
            if not is_copied and (copied_count or 1 in refcounts):
                return None
        for cluster in clusters:
            counts[cluster] += total
        gaps = sum(map(ne, clusters[1:], map((1).__add__, clusters)))
        if piece.next_offset and piece.next_offset != clusters[0] << self._bits:
            gaps += 1
        self.report.allocated_clusters += active * len(clusters)
        self.report.fragmented_clusters += active * gaps
        return (clusters[-1] + 1) << self._bits

    def _count_entries(self, piece: _Piece, entries: array[int], bitmaps: array[int] | None) -> int:
        counts, stored, bits, limit = self.counts, self.stored, self._bits, self.cluster_count
        cluster_size, count_max = self._cluster_size, self.count_max
        offset_mask, copied = s.OFFSET_MASK, s.COPIED
        odd = ~self._plain & _ALL_BITS
        active, total = piece.uses
        next_offset = piece.next_offset
        allocated = fragmented = 0
        for index, entry in enumerate(entries):
            if not entry:
                continue
            if entry & odd:
                entry = self._count_odd(piece, index, entry, bitmaps)
            offset = entry & offset_mask
            if not offset:
                if entry == copied:
                    self._count_without_offset(piece, index)
                continue
            allocated += 1
            if offset != next_offset and next_offset:
                fragmented += 1
            next_offset = offset + cluster_size
            cluster = offset >> bits
            if cluster >= limit:
                self._beyond("data cluster", offset, cluster_size, total)
                continue
            count = counts[cluster] + total
            if count > count_max:
                self.add("data cluster", cluster, total)
            else:
                counts[cluster] = count
            if active and (stored[cluster] == 1) != (entry >= copied):
                self._check_copied(
                    _L2, piece.entry_at(index), piece.first_index + index, entry, stored[cluster], active
                )
        self.report.allocated_clusters += active * allocated
        self.report.fragmented_clusters += active * fragmented
        return next_offset

    def _count_odd(self, piece: _Piece, index: int, entry: int, bitmaps: array[int] | None) -> int:
        """A compressed entry, a misaligned one, or one with reserved bits. Returns what is left to count, or 0."""
        active, total = piece.uses
        at = piece.entry_at(index)
        if entry & s.COMPRESSED:
            self._count_compressed(entry, at, piece.uses)
            return 0
        if entry & self._reserved:
            self.corruption(
                _L2,
                at,
                f"entry {piece.first_index + index} is {entry:#018x}, expected its reserved bits to be 0",
                total,
            )
        offset = entry & s.OFFSET_MASK
        if offset % self._cluster_size == 0:
            return entry
        has_data = bool(bitmaps[index] & s.ALL_ALLOCATED) if bitmaps is not None else not entry & s.ZERO
        message = (
            f"entry {piece.first_index + index} is {entry:#018x}, "
            f"expected an offset that is a multiple of {self._cluster_size}"
        )
        if has_data:
            self.broken(_L2, at, message, total)
        else:
            self.corruption(_L2, at, message, total)
            if self._is_fixing:
                self.zeroable.append((piece.cluster, piece.first_index + index))
                return 0
        self.report.allocated_clusters += active
        if self.add_region("data cluster", offset, self._cluster_size, total) and active:
            self._check_copied(_L2, at, piece.first_index + index, entry, self.stored[offset >> self._bits], active)
        return 0

    def _count_without_offset(self, piece: _Piece, index: int) -> None:
        number = piece.first_index + index
        message = f"entry {number} is {s.COPIED:#018x}, expected COPIED to be clear without an offset"
        self.corruption(_L2, piece.entry_at(index), message, piece.uses[1])
        if self._is_fixing:
            self.zeroable.append((piece.cluster, number))

    def _count_compressed(self, entry: int, at: int, uses: tuple[int, int]) -> None:
        active, total = uses
        if entry >= s.COPIED:
            self.corruption(_L2, at, f"the compressed entry is {entry:#018x}, expected COPIED to be clear", total)
        offset_bits = 62 - (self._bits - 8)
        offset = entry & ((1 << offset_bits) - 1)
        sectors = ((entry & ~(s.COPIED | s.COMPRESSED)) >> offset_bits) + 1
        length = sectors * s.SECTOR_SIZE - offset % s.SECTOR_SIZE
        self.report.allocated_clusters += active
        self.report.compressed_clusters += active
        self.report.fragmented_clusters += active
        self.add_region("compressed cluster", offset, length, total)

    def _check_bitmaps(self, piece: _Piece, entries: array[int], bitmaps: array[int] | None) -> None:
        """The subcluster bitmaps of extended entries. A compressed entry that has one is not counted."""
        for index, bitmap in enumerate(bitmaps or ()):
            if not bitmap:
                continue
            entry = entries[index]
            allowed = "no subcluster both allocated and zero"
            if entry & s.COMPRESSED:
                entries[index] = 0
                allowed = "0 for a compressed cluster"
            elif entry & s.OFFSET_MASK or (self._header.has_data_file and entry >= s.COPIED):
                if not bitmap >> 32 & bitmap:
                    continue
            elif bitmap & s.ALL_ALLOCATED:
                allowed = "no subcluster allocated in an unallocated cluster"
            else:
                continue
            self.corruption(
                _L2,
                piece.entry_at(index) + 8,
                f"the subcluster bitmap of entry {piece.first_index + index} is {bitmap:#018x}, expected {allowed}",
                piece.uses[1],
            )

    def _count_data_file(self, piece: _Piece, entries: array[int]) -> int:
        """An external data file is not refcounted: guest offset 5 * cluster_size lies at just that offset, COPIED."""
        active, total = piece.uses
        first = self._l1_indexes.get(piece.cluster, 0) * self._header.l2_entries + piece.first_index
        next_offset = piece.next_offset
        for index, entry in enumerate(entries):
            at, number = piece.entry_at(index), piece.first_index + index
            offset = entry & s.OFFSET_MASK
            if entry & s.COMPRESSED:
                self.corruption(_L2, at, f"entry {number} is compressed, allowed without an external data file", total)
                continue
            if entry & self._reserved:
                self.corruption(_L2, at, f"entry {number} is {entry:#018x}, expected its reserved bits to be 0", total)
            is_zero = entry & s.ZERO and not self._header.has_subclusters
            if not offset and (is_zero or entry < s.COPIED):
                continue
            if offset != (first + index) << self._bits:
                guest_offset = (first + index) << self._bits
                message = f"entry {number} has host offset {offset}, expected the guest offset {guest_offset}"
                self.corruption(_L2, at, message, total)
            self._check_copied(_L2, at, number, entry, 1, active)
            self.report.allocated_clusters += active
            if next_offset and offset != next_offset:
                self.report.fragmented_clusters += active
            next_offset = offset + self._cluster_size
        return next_offset
