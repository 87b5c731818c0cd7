"""Which host clusters are in use: refcount table, refcount blocks, the allocator, and the quarantine of freed clusters.

    refcount table  ──▶  refcount block  ──▶  refcount of a cluster
    64 KiB clusters, 16 bits: a block counts 32768 clusters, 2 GiB; a cluster of the table names 8192 blocks, 16 TiB

A cluster's life:

    free ──allocate──▶ used ──free──▶ freed ──capture──▶ leaving ──reclaim──▶ free
           count 1                    count as it was: on disk something may still refer to it

    (R1) In memory a count is raised at once and lowered only by `reclaim`: after the plan that holds what removed the
         reference is durable (Q4, Q5). So whatever is captured is never below the references on disk (Q1).
    (R2) A cluster is punched before its count drops to 0: nobody can have it meanwhile.
    (R3) Clusters from `end` on have never been in the file; they read as zeroes.
    (R4) What is allocated is no metadata, whatever the counts in the file say.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain

from nbdimg.errors import CorruptImage, UnsupportedFeature
from nbdimg.formats import quarantine
from nbdimg.formats.qcow2 import structs as s
from nbdimg.formats.qcow2.header import Header
from nbdimg.formats.qcow2.packed import RefcountCodec, decode_offsets, encode_offsets
from nbdimg.image.driver import Miss
from nbdimg.image.tables import Slice, TableCache
from nbdimg.storage.file import BlockFile, fetch
from nbdimg.storage.ordering import Write, hindered
from nbdimg.units import align_up, div_ceil

SLICES_MAX = 4096
"""Resident slices of refcount blocks, 16 MiB: with 64 KiB clusters and 16 bits they count 512 GiB. Of counts narrower
than a byte, which take one each in memory, there are fewer: with 64 KiB clusters and 1 bit they count 1 TiB.
"""

TABLE_PIECE = s.SECTOR_SIZE
"""The refcount table is written in pieces of this."""


@dataclass(slots=True)
class Run:
    """`count` clusters from number `cluster` on, with refcount 1. `is_fresh`: they read as zeroes (R3)."""

    cluster: int
    count: int
    is_fresh: bool


@dataclass(frozen=True, slots=True)
class Freed:
    """One reference less to each of `count` clusters from `cluster` on. `punch`: give their space back too."""

    cluster: int
    count: int
    punch: bool


class Refcounts:
    """Args: table: the refcount table, host offsets of blocks. metadata: cluster numbers of all tables, kept up."""

    def __init__(self, file: BlockFile, header: Header, table: array[int], metadata: set[int]) -> None:
        self._file = file
        self._header = header
        self._bits = header.cluster_bits
        self._codec = RefcountCodec(header.refcount_order)
        self.table = table
        self.metadata = metadata
        self._slice_size = min(header.cluster_size, s.SLICE_SIZE)
        self._slice_entries = self._slice_size * 8 // header.refcount_bits
        self._block_entries = header.refcount_entries
        self._block_slices = header.cluster_size // self._slice_size
        self._count_max = (1 << header.refcount_bits) - 1
        slices_max = max(SLICES_MAX * min(header.refcount_bits, 8) // 8, 4 * self._block_slices)
        self.cache = TableCache(file, slices_max, self._fetch, self._codec.encode)
        self.end = div_ceil(file.size, header.cluster_size)
        """The cluster behind the last one that was ever used (R3)."""
        self.clusters_max = s.HOST_OFFSET_MAX >> header.cluster_bits
        """Clusters up to which `allocate` goes; an operator may allow less than the format does."""
        self._hint = 0
        self._freed: list[Freed] = []
        self._freed_count = 0
        """Clusters in it whose space comes back. What a write elsewhere gave up is shared, so its space stays, or
        compressed; and a cluster is so written once."""
        self._leaving: list[Freed] = []
        self._dirty_pieces: set[int] = set()
        self._writing_pieces: set[int] = set()
        self._has_moved = self._is_moving = False

    def forget(self) -> None:
        """See `TableCache.forget`."""
        self.cache.forget()
        self.table = array("Q")
        self.metadata.clear()

    # Look-up

    async def _fetch(self, key: int) -> None:
        """Load the whole block of a slice: the search for free clusters wants its neighbours next. Nothing is added
        when a plan became durable meanwhile: a neighbour may have been loaded, changed, written and evicted.
        """
        block = key // self._block_slices
        offset = self.table[block]
        self._check_block(block, offset)
        content = bytearray(self._header.cluster_size)
        written_count = self.cache.written_count
        await self._file.pread(offset, memoryview(content))
        if self.table[block] != offset or self.cache.written_count != written_count:
            return
        for index in range(self._block_slices):
            start = index * self._slice_size
            entries = self._codec.decode(content[start : start + self._slice_size])
            self.cache.add(block * self._block_slices + index, offset + start, entries)

    def _check_block(self, block: int, offset: int) -> None:
        cluster_size = self._header.cluster_size
        if offset % cluster_size or not cluster_size <= offset < s.HOST_OFFSET_MAX or offset >= self._file.size:
            at = self._header.refcount_table_offset + 8 * block
            raise CorruptImage(
                self._file.path,
                f"refcount table entry {block} is {offset:#x}, expected a multiple of {cluster_size}, not 0, "
                f"inside the file (offset {at})",
                at,
            )

    def _slice(self, cluster: int) -> Slice | Miss | None:
        """The slice that counts a cluster; None: no block does, so its count is 0."""
        key = cluster // self._slice_entries
        found = self.cache.slices.get(key)
        if found is not None:
            found.use_count += 1
            return found
        block = cluster // self._block_entries
        if block >= len(self.table) or not self.table[block]:
            return None
        return Miss(self.cache, key)

    # Allocation

    def allocate(self, count_max: int) -> Run | Miss:
        """One to `count_max` contiguous clusters, first fit.

        Raises: CorruptImage (R4). OSError: ENOSPC, `clusters_max` would be exceeded.
        """
        while True:
            cluster = self._hint
            found = self.cache.slices.get(cluster // self._slice_entries) or self._slice(cluster)
            if isinstance(found, Miss):
                return found
            if found is None:
                self._add_block(cluster // self._block_entries)
                continue
            entries = found.entries
            try:
                index = entries.index(0, cluster % self._slice_entries)
            except ValueError:
                self._hint = (cluster // self._slice_entries + 1) * self._slice_entries
                continue
            cluster += index - cluster % self._slice_entries
            count, limit = 1, min(count_max, len(entries) - index)
            if cluster < self.end:
                limit = min(limit, self.end - cluster)
            while count < limit and not entries[index + count]:
                count += 1
            if cluster + count > self.clusters_max:
                raise OSError(errno.ENOSPC, f"the file may not grow beyond {self.clusters_max << self._bits} bytes")
            return self._take(found, cluster, count)

    def _take(self, found: Slice, cluster: int, count: int) -> Run:
        self._check_free(cluster, count)
        entries = found.entries
        index = cluster % self._slice_entries
        stop = cluster + count
        while cluster < stop:
            entries[index] = 1
            index += 1
            cluster += 1
        self.cache.changed(found)
        self._hint = stop
        is_fresh = stop - count >= self.end
        if stop > self.end:
            self.end = stop
        return Run(stop - count, count, is_fresh)

    def _check_free(self, cluster: int, count: int) -> None:
        for each in range(cluster, cluster + count):
            if each in self.metadata:
                raise CorruptImage(
                    self._file.path,
                    f"cluster {each} holds metadata and has refcount 0, expected 1 (offset {each << self._bits})",
                    each << self._bits,
                )
        if cluster + count > s.HOST_OFFSET_MAX >> self._bits:
            raise UnsupportedFeature(self._file.path, f"the file would grow beyond {s.HOST_OFFSET_MAX} bytes")

    def allocate_contiguous(self, count: int) -> Run | Miss:
        """Exactly `count` contiguous clusters, for a table: near the hint if they are free there, else at the end."""
        if count == 1:
            return self.allocate(1)
        run = self.allocate(count)
        if isinstance(run, Miss) or run.count == count:
            return run
        self.give_back(run)
        return self._append(count)

    def give_back(self, run: Run) -> None:
        """Take back clusters that were allocated and to which nothing ever referred."""
        for cluster in range(run.cluster, run.cluster + run.count):
            found = self._slice(cluster)
            if isinstance(found, Slice):
                found.entries[cluster % self._slice_entries] = 0
                self.cache.changed(found)
                self._now_free(cluster)
            else:
                self.free(cluster)

    def _append(self, count: int) -> Run:
        """`count` clusters behind everything, where no block counts yet; the blocks that do lie behind them."""
        block_count = 1
        while div_ceil(count + block_count, self._block_entries) > block_count:
            block_count += 1
        while True:
            used = max((block + 1 for block, offset in enumerate(self.table) if offset), default=0)
            first_block = max(used, div_ceil(self.end, self._block_entries))
            if first_block + block_count <= len(self.table):
                break
            # A table that grows goes where this would have gone.
            self._cover(first_block + block_count - 1)
        base = first_block * self._block_entries
        self._check_free(base, count + block_count)
        for index in range(block_count):
            self._install_block(first_block + index, base + count + index)
        for cluster in range(base, base + count + block_count):
            found = self._slice(cluster)
            assert isinstance(found, Slice)
            found.entries[cluster % self._slice_entries] = 1
        self.end = base + count + block_count
        return Run(base, count, is_fresh=True)

    def _add_block(self, block: int) -> None:
        """A block for clusters that none counts: it lies in the first of them and counts itself."""
        self._cover(block)
        if self.table[block]:
            return
        cluster = block * self._block_entries
        self._check_free(cluster, 1)
        self._install_block(block, cluster)
        found = self._slice(cluster)
        assert isinstance(found, Slice)
        found.entries[0] = 1
        self.end = max(self.end, cluster + 1)

    def _install_block(self, block: int, cluster: int) -> None:
        offset = cluster << self._bits
        self.table[block] = offset
        self._dirty_pieces.add(block * 8 // TABLE_PIECE)
        self.metadata.add(cluster)
        for index in range(self._block_slices):
            entries = self._codec.zeroes(self._slice_entries)
            added = self.cache.add(block * self._block_slices + index, offset + index * self._slice_size, entries)
            self.cache.changed(added)

    def _cover(self, block: int) -> None:
        """Make the table reach `block`, in a new place if it must grow (Q6: the header names it last)."""
        if block < len(self.table):
            return
        clusters = self._table_clusters_for(block)
        cluster_size = self._header.cluster_size
        old_offset, old_clusters = self._header.refcount_table_offset, self._header.refcount_table_clusters
        self.table.extend(array("Q", bytes(clusters * cluster_size - 8 * len(self.table))))
        self._has_moved = True
        run = self._append(clusters)
        self._header.refcount_table_offset = run.cluster << self._bits
        self._header.refcount_table_clusters = clusters
        self.metadata.update(range(run.cluster, run.cluster + clusters))
        self.free(old_offset >> self._bits, old_clusters)

    def _table_clusters_for(self, block: int) -> int:
        """Clusters of a new table that reaches `block` and what it takes to hold the table itself, with room to spare.

        Raises: UnsupportedFeature: it would be larger than allowed.
        """
        cluster_size = self._header.cluster_size
        used = max((index + 1 for index, offset in enumerate(self.table) if offset), default=0)
        first = max(used, div_ceil(self.end, self._block_entries))
        entries = max(block + 1, first) * 3 // 2 + 1
        while True:
            clusters = div_ceil(entries * 8, cluster_size)
            last = first + div_ceil(clusters, self._block_entries) + 1
            if last <= entries:
                break
            entries = last
        if clusters * cluster_size > s.REFCOUNT_TABLE_BYTES_MAX:
            raise UnsupportedFeature(
                self._file.path,
                f"the refcount table would need {clusters * cluster_size} bytes, allowed are "
                f"{s.REFCOUNT_TABLE_BYTES_MAX}: the file cannot grow further",
            )
        return clusters

    # References beyond one, and fewer

    def counts_from(self, cluster: int) -> tuple[int, array[int]] | Miss:
        """A cluster number at or before `cluster`, and the refcounts from there on, `cluster`'s among them; they are
        true until something is awaited.
        """
        found = self._slice(cluster)
        if isinstance(found, Miss):
            return found
        if found is None:
            return cluster, self._codec.zeroes(1)
        return cluster - cluster % self._slice_entries, found.entries

    def raise_counts(self, cluster: int, count: int) -> int | Miss:
        """One reference more to each of at most `count` clusters in use; returns how many, as far as one slice goes.

        Raises: UnsupportedFeature: the refcount width holds no more. CorruptImage: a cluster is not in use. Then none
            of this slice's counts has changed.
        """
        found = self._slice(cluster)
        if isinstance(found, Miss):
            return found
        if found is None:
            raise self._underflow(cluster)
        index = cluster % self._slice_entries
        part = found.entries[index : index + count]
        lowest, highest = min(part), max(part)
        if not lowest:
            raise self._underflow(cluster + part.index(0))
        if highest >= self._count_max:
            raise UnsupportedFeature(
                self._file.path,
                f"cluster {cluster + part.index(highest)} has {highest} references, "
                f"{self._header.refcount_bits}-bit refcounts allow {self._count_max}",
            )
        if lowest == highest:
            raised = array(part.typecode, [lowest + 1]) * len(part)
        else:
            raised = array(part.typecode, [each + 1 for each in part])
        found.entries[index : index + len(part)] = raised
        self.cache.changed(found)
        return len(part)

    def free(self, cluster: int, count: int = 1, *, punch: bool = False) -> None:
        """One reference less to each, once what has removed it is durable."""
        self._freed_count += count if punch else 0
        if (
            self._freed
            and self._freed[-1].punch == punch
            and self._freed[-1].cluster + self._freed[-1].count == cluster
        ):
            last = self._freed.pop()
            cluster, count = last.cluster, last.count + count
        self._freed.append(Freed(cluster, count, punch))

    def is_shared(self, cluster: int) -> bool | Miss:
        """Whether there is more than one reference to a cluster."""
        found = self._slice(cluster)
        if isinstance(found, Miss):
            return found
        return found is not None and found.entries[cluster % self._slice_entries] > 1

    def free_beside_metadata(self, cluster: int, *, punch: bool) -> None:
        """As `free` for a guest's reference to a cluster of metadata, of which one at least remains: where that is not
        sure it is a leak.
        """
        found = self._slice(cluster)
        if isinstance(found, Slice):
            freed = chain(self._freed, self._leaving)
            leaving = sum(each.cluster <= cluster < each.cluster + each.count for each in freed)
            if found.entries[cluster % self._slice_entries] - leaving > 1:
                self.free(cluster, punch=punch)

    async def reclaim(self) -> None:
        """The captured plan is durable: what it freed may go. Space that cannot be punched is free all the same.

        Raises: Hindrance: counts cannot be read; the rest waits for the next time. CorruptImage: a count was 0 while
        something referred to its cluster.
        """
        while self._leaving:
            batch = self._leaving[-1]
            stop = batch.cluster + batch.count
            position = batch.cluster
            while position < stop:
                end = min(stop, (position // self._slice_entries + 1) * self._slice_entries)
                await self._lower(position, end, batch.punch)
                position = end
                self._leaving[-1] = Freed(position, stop - position, batch.punch)
            self._leaving.pop()

    async def _lower(self, start: int, stop: int, punch: bool) -> None:
        """One reference less to each cluster of one slice."""
        while isinstance(found := self._slice(start), Miss):
            await hindered(found.load())
        if found is None:
            raise self._underflow(start)
        first, last = start % self._slice_entries, (stop - 1) % self._slice_entries + 1
        base = start - first
        entries = found.entries
        found.pin_count += 1
        try:
            if punch:
                for run_start, run_stop in _runs_of_one(entries, first, last):
                    length = (run_stop - run_start) << self._bits
                    with suppress(OSError):
                        await self._file.punch((base + run_start) << self._bits, length)
        finally:
            found.pin_count -= 1
        for index in range(first, last):
            if not entries[index]:
                raise self._underflow(base + index)
            entries[index] -= 1
            if not entries[index]:
                self._now_free(base + index)
        self.cache.changed(found)

    def _now_free(self, cluster: int) -> None:
        self._hint = min(self._hint, cluster)
        self.metadata.discard(cluster)

    def _underflow(self, cluster: int) -> CorruptImage:
        return CorruptImage(
            self._file.path,
            f"cluster {cluster} was referred to and has refcount 0, expected 1 (offset {cluster << self._bits})",
            cluster << self._bits,
        )

    # Order on disk

    @property
    def is_strained(self) -> bool:
        """Whether too much waits for a flush: counts to be written, or clusters to be free again."""
        waiting_bytes = self._freed_count << self._bits
        return self.cache.is_strained or quarantine.is_full(waiting_bytes, len(self._freed), self.end << self._bits)

    @property
    def is_dirty(self) -> bool:
        """Whether the next plan has something of ours."""
        return self.cache.is_dirty or bool(self._dirty_pieces or self._has_moved or self._freed or self._leaving)

    @property
    def has_moved(self) -> bool:
        """Whether the table has a new place that the header on disk need not name yet. Its old one is not to be given
        back before: `reclaim` may follow a plan of ours alone.
        """
        return self._has_moved or self._is_moving

    def capture(self) -> list[list[Write]]:
        """What makes the counts durable, in groups with a barrier between each two; `written` comes next.

        The table follows the blocks that it names. One that has moved is written anew, and then the header names it; if
        that plan fails the header may do so already, and the table still follows the blocks. What has been freed so far
        leaves with this plan.
        """
        self.capture_freed()
        blocks = self.cache.capture()
        self._writing_pieces |= self._dirty_pieces
        self._is_moving |= self._has_moved
        self._dirty_pieces, self._has_moved = set(), False
        offset = self._header.refcount_table_offset
        if self._is_moving:
            fields = s.REFCOUNT_FIELDS.pack(offset, self._header.refcount_table_clusters)
            whole = Write(self._file, offset, encode_offsets(self.table))
            return [blocks, [whole], [Write(self._file, s.REFCOUNT_FIELDS_OFFSET, fields)]]
        return [blocks, self._piece_writes(offset)]

    def capture_freed(self) -> None:
        """What has been freed so far leaves with the plan that is being made."""
        self._leaving.extend(self._freed)
        self._freed, self._freed_count = [], 0

    def _piece_writes(self, offset: int) -> list[Write]:
        per_piece = TABLE_PIECE // 8
        writes = []
        for piece in sorted(self._writing_pieces):
            entries = self.table[piece * per_piece : (piece + 1) * per_piece]
            writes.append(Write(self._file, offset + piece * TABLE_PIECE, encode_offsets(entries)))
        return writes

    def written(self) -> None:
        """What `capture` gave is durable."""
        self.cache.written()
        self._writing_pieces.clear()
        self._is_moving = False


def _runs_of_one(entries: array[int], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Runs of indices, from `first` to before `last`, whose count is 1."""
    start = first
    for index in range(first, last + 1):
        if index == last or entries[index] != 1:
            if index > start:
                yield start, index
            start = index + 1


async def load_table(file: BlockFile, header: Header) -> array[int]:
    """The refcount table, host offsets of blocks."""
    content = bytearray(header.refcount_table_clusters * header.cluster_size)
    offset = header.refcount_table_offset
    if offset + len(content) > align_up(file.size, header.cluster_size):
        raise CorruptImage(
            file.path,
            f"the refcount table ends at {offset + len(content)}, expected inside the file's {file.size} bytes "
            f"(header offset 48)",
            s.REFCOUNT_FIELDS_OFFSET,
        )
    await fetch(file, offset, memoryview(content))
    return decode_offsets(content)
