"""Extended L2 entries: 16 bytes for a cluster, of which each of 32 subclusters is allocated, zero, or neither.

    first word   as a standard entry, without its ZERO flag
    second word  bits 0..31 allocated, bits 32..63 reads as zeroes; never both; bit i is subcluster i

A write then copies at most the edges of subclusters: with 128 KiB clusters an aligned 4 KiB write copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nbdimg.formats.qcow2 import structs as s
from nbdimg.formats.qcow2.inflate import inflated_offset
from nbdimg.formats.qcow2.mapping import Mapping, Token
from nbdimg.formats.qcow2.structs import ALL_ALLOCATED, COMPRESSED, COPIED, OFFSET_MASK, SUBCLUSTERS
from nbdimg.image.driver import Allocation, Extent, ExtentKind, Miss, Unmap
from nbdimg.image.tables import Slice

_DATA = ExtentKind.DATA
_ZERO = ExtentKind.ZERO
_BACKING = ExtentKind.BACKING


@dataclass(slots=True)
class SubclusterToken(Token):
    """The first cluster from subcluster `first` on, the last up to subcluster `last`; `run` is None in the cluster that
    the entry names.
    """

    first: int
    last: int


def _run_length(mask: int, first: int) -> int:
    """How many bits of `mask` are set from bit `first` on without a gap: (0b0111_0, 1) gives 3."""
    rest = ~(mask >> first)
    return (rest & -rest).bit_length() - 1


def _mask(first: int, last: int) -> int:
    """Bits `first` to `last`: (1, 3) gives 0b1110."""
    return (1 << last + 1) - (1 << first)


class SubclusterMapping(Mapping):
    entry_words = 2

    @property
    def _subcluster_bits(self) -> int:
        return self._bits - 5

    def _entry(self, slice_: Slice, index: int) -> tuple[int, int, int]:
        """(first word, allocated, zero). Raises: CorruptImage: it is malformed."""
        entry, bitmap = slice_.entries[2 * index], slice_.entries[2 * index + 1]
        allocated, zero = bitmap & ALL_ALLOCATED, bitmap >> SUBCLUSTERS
        if entry & COMPRESSED:
            if entry & COPIED or bitmap or self._store.is_external:
                raise self._malformed(slice_, index, "no compressed cluster with COPIED, subclusters or external data")
        elif entry & (s.L2_RESERVED | s.ZERO) or entry & OFFSET_MASK & (self._cluster_size - 1):
            raise self._malformed(slice_, index, f"a multiple of {self._cluster_size}, and the reserved bits 0")
        elif allocated & zero:
            raise self._malformed(slice_, index, f"no subcluster both allocated and zero, not {bitmap:#018x}")
        elif allocated and not entry & OFFSET_MASK and not self._store.is_external:
            raise self._malformed(slice_, index, "a host offset where subclusters are allocated")
        elif allocated and self._is_external:
            self._check_external(slice_, index)
        return entry, allocated, zero

    def _masks(self, slice_: Slice, index: int, subcluster: int) -> tuple[ExtentKind, int, int]:
        """(kind of a subcluster, all subclusters of that kind, host offset of the cluster)."""
        entry, allocated, zero = self._entry(slice_, index)
        host = entry & self._aligned
        if entry & COMPRESSED:
            return ExtentKind.COMPRESSED, ALL_ALLOCATED, entry & ~COMPRESSED
        if allocated >> subcluster & 1:
            return _DATA, allocated, host
        if zero >> subcluster & 1:
            return _ZERO, zero, host
        return _BACKING, ALL_ALLOCATED & ~(allocated | zero), host

    def locate(self, offset: int, stop: int) -> int:
        """See `FormatDriver.locate`: of clusters that are allocated whole."""
        cluster = offset >> self._bits
        slice_ = self._slices.get(cluster >> self._slice_bits)
        if slice_ is None or stop - 1 >> self._bits != cluster:
            return -1
        slice_.use_count += 1
        index = 2 * (cluster & self._slice_mask)
        entry, bitmap = slice_.entries[index : index + 2]
        host = entry & self._aligned
        if not host or entry & self._odd or bitmap != ALL_ALLOCATED or self._is_external:
            return -1
        return host | offset & self._cluster_mask

    def map(self, offset: int, stop: int) -> Extent | Miss:
        cluster = offset >> self._bits
        slice_ = self._slices.get(cluster >> self._slice_bits)
        if slice_ is None:
            return self._map_unloaded(cluster, stop)
        slice_.use_count += 1
        index = cluster & (self._slice_clusters - 1)
        subcluster = offset >> self._subcluster_bits & (SUBCLUSTERS - 1)
        kind, mask, host = self._masks(slice_, index, subcluster)
        start = cluster << self._bits
        if kind is ExtentKind.COMPRESSED:
            end = min(start + self._cluster_size, self.size)
            return Extent(kind, start, end - start, self._store.inflated, inflated_offset(host, start), False)
        start += subcluster << self._subcluster_bits
        host_start = host + (subcluster << self._subcluster_bits)
        is_own = slice_.entries[2 * index] >= self._own_min
        run = _run_length(mask, subcluster)
        end = start + (run << self._subcluster_bits)
        reaches_end = subcluster + run == SUBCLUSTERS
        while reaches_end and end < stop and index + 1 < self._slice_clusters:
            index += 1
            host += self._cluster_size
            next_kind, mask, next_host = self._masks(slice_, index, 0)
            if next_kind is not kind or (
                kind is _DATA and (next_host != host or (slice_.entries[2 * index] >= self._own_min) != is_own)
            ):
                break
            run = _run_length(mask, 0)
            end += run << self._subcluster_bits
            reaches_end = run == SUBCLUSTERS
        end = min(end, self.size)
        if kind is _DATA:
            return Extent(kind, start, end - start, self._store.file, host_start, is_own and self._counts is not None)
        if kind is _ZERO:
            return Extent(kind, start, end - start, self._store.file, 0, False)
        return self._unallocated(start, end)

    def place(self, offset: int, stop: int) -> Extent | Miss:
        return self._checked(self.map(offset, stop))

    def reserve(self, offset: int, stop: int) -> Allocation | Miss:
        cluster = offset >> self._bits
        slice_ = self._writable_slice(cluster)
        if isinstance(slice_, Miss):
            return slice_
        index = cluster & (self._slice_clusters - 1)
        entry = self._entry(slice_, index)[0]
        first = offset >> self._subcluster_bits & (SUBCLUSTERS - 1)
        if entry >= self._own_min:
            found = self._within(slice_, index, cluster, first, stop)
        else:
            answer = self._anew(slice_, index, cluster, first, stop)
            if isinstance(answer, Miss):
                return answer
            found = answer
        if found.run is None and not self._store.is_external:
            self._check_host(found.host, cluster)
        slice_.pin_count += 1
        start = (cluster << self._bits) + (found.first << self._subcluster_bits)
        end = (cluster + found.count - 1 << self._bits) + (found.last + 1 << self._subcluster_bits)
        return Allocation(
            start,
            end - start,
            self._store.file,
            found.host + (found.first << self._subcluster_bits),
            self._seen(self._edge_kind(slice_, index, found.first)),
            self._seen(self._edge_kind(slice_, index + found.count - 1, found.last)),
            found.run is not None and found.run.is_fresh and self._store.is_plain,
            found,
        )

    def _edge_kind(self, slice_: Slice, index: int, subcluster: int) -> ExtentKind:
        """What stands where a head or tail goes: one subcluster, or all of a cluster that is given up."""
        entry = self._entry(slice_, index)[0]
        if entry & OFFSET_MASK and entry < COPIED:
            return _DATA
        return self._masks(slice_, index, subcluster)[0]

    def _within(self, slice_: Slice, index: int, cluster: int, first: int, stop: int) -> SubclusterToken:
        """More subclusters of a cluster that the image has for itself."""
        entry, allocated, _ = self._entry(slice_, index)
        wanted = min(SUBCLUSTERS, (stop - (cluster << self._bits) - 1 >> self._subcluster_bits) + 1)
        free = _run_length(ALL_ALLOCATED & ~allocated, first)
        last = min(first + free, wanted) - 1
        host = cluster << self._bits if self._store.is_external else entry & self._aligned
        return SubclusterToken(slice_, index, 1, host, None, first, last)

    def _anew(self, slice_: Slice, index: int, cluster: int, first: int, stop: int) -> SubclusterToken | Miss:
        """New clusters; one that is given up for them is copied whole."""
        assert self._counts is not None
        needed = ((stop - 1) >> self._bits) - cluster + 1
        wanted = 1
        while wanted < needed and index + wanted < self._slice_clusters:
            if slice_.entries[2 * (index + wanted)] >= COPIED:
                break
            wanted += 1
        for each in range(index, index + wanted):
            unknown = self._check_old(slice_, each)
            if unknown is not None:
                return unknown
        run = self._counts.allocate(wanted)
        if isinstance(run, Miss):
            return run
        last = SUBCLUSTERS - 1
        last_cluster = cluster + run.count - 1
        if run.count == needed and not slice_.entries[2 * (index + run.count - 1)]:
            last = (stop - 1 - (last_cluster << self._bits)) >> self._subcluster_bits
        if slice_.entries[2 * index]:
            first = 0
        return SubclusterToken(slice_, index, run.count, run.cluster << self._bits, run, first, last)

    def commit(self, allocation: Allocation) -> None:
        token = allocation.token
        assert isinstance(token, SubclusterToken)
        slice_, entries = token.slice_, token.slice_.entries
        for number in range(token.count):
            word = 2 * (token.index + number)
            first = token.first if number == 0 else 0
            last = token.last if number == token.count - 1 else SUBCLUSTERS - 1
            mask = _mask(first, last)
            old, bitmap = entries[word], entries[word + 1]
            entries[word] = token.host + (number << self._bits) | COPIED
            entries[word + 1] = (bitmap | mask) & ~(mask << SUBCLUSTERS)
            if token.run is not None:
                self._free(old, punch=False)
        slice_.pin_count -= 1
        self.cache.changed(slice_)

    def _check_entry(self, slice_: Slice, index: int) -> None:
        self._entry(slice_, index)

    def _covered(self, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        position = offset
        while position < end:
            cluster = position >> self._bits
            cluster_end = (cluster + 1) << self._bits
            first = position >> self._subcluster_bits & (SUBCLUSTERS - 1)
            last = min(end, cluster_end) - 1 >> self._subcluster_bits & (SUBCLUSTERS - 1)
            yield cluster & (self._slice_clusters - 1), _mask(first, last), position
            position = cluster_end

    def _needs_place(self, slice_: Slice, index: int, mask: int) -> bool:
        entry, allocated, _ = self._entry(slice_, index)
        if entry & COMPRESSED:
            return mask != ALL_ALLOCATED
        return self._store.is_external and bool(allocated & mask)

    def _is_changed_by(self, slice_: Slice, index: int, mask: int, to: Unmap) -> bool:
        entry, allocated, zero = self._entry(slice_, index)
        if entry & COMPRESSED or allocated & mask:
            return True
        if entry & OFFSET_MASK and to is not Unmap.KEEP and mask == ALL_ALLOCATED:
            return True
        return self._store.has_backing and bool(mask & ~zero)

    def _unmap_entry(self, slice_: Slice, index: int, mask: int, to: Unmap) -> None:
        word = 2 * index
        old, bitmap = slice_.entries[word], slice_.entries[word + 1]
        allocated, zero = bitmap & ALL_ALLOCATED & ~mask, bitmap >> SUBCLUSTERS | mask
        keeps = allocated or (to is Unmap.KEEP and old >= COPIED)
        if not keeps and not self._store.is_external:
            slice_.entries[word] = 0
            self._free(old, punch=True)
        if not slice_.entries[word] and zero == ALL_ALLOCATED and not self._store.has_backing and to is not Unmap.KEEP:
            zero = 0
        slice_.entries[word + 1] = allocated | zero << SUBCLUSTERS
