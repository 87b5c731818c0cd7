"""Where guest clusters live: L1 and L2 tables, looked up and changed in memory.

L2 tables are resident in slices, by the guest clusters that they map, whatever host cluster holds the table: a look-up
goes straight from the guest offset to the slice. An L1 entry is asked only when a slice is missing.

    (M1) A slice is changed only while its table belongs to the active image alone: COPIED in its L1 entry. Else the
         table is copied first, whole.
    (M2) An L1 entry changes together with its table's slices; on disk it follows them (Q3).
    (M3) A cluster that an entry no longer names goes to the quarantine, never straight to the free ones (Q4, Q5). What
         it has in common with metadata, as a damaged and repaired image may, keeps its last count.
    (M4) What is written in place is COPIED, inside the file, and no metadata. An external data file is the image's
         alone, whatever the flag says.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from nbdimg.errors import CorruptImage
from nbdimg.formats.qcow2 import structs as s
from nbdimg.formats.qcow2.header import Header
from nbdimg.formats.qcow2.inflate import InflatedFile, inflated_offset
from nbdimg.formats.qcow2.l1 import L1Table
from nbdimg.formats.qcow2.packed import compressed_clusters, decode_offsets, encode_offsets
from nbdimg.formats.qcow2.refcount import Refcounts, Run
from nbdimg.formats.qcow2.structs import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from nbdimg.image.driver import Allocation, Extent, ExtentKind, Miss, Unmap
from nbdimg.image.tables import Slice, TableCache
from nbdimg.storage.file import BlockFile
from nbdimg.units import MiB, div_ceil

L2_BYTES_MAX = 64 * MiB
"""Resident L2 slices of one image: with 64 KiB clusters they map 512 GiB, with 2 MiB clusters 16 TiB."""

L1_WALK_MAX = 4096
"""Empty L1 entries that one answer looks at: the largest table has four million, and the loop waits meanwhile."""

_DATA = ExtentKind.DATA


@dataclass(slots=True)
class Token:
    """Of an allocation: `count` clusters from entry `index` of `slice_`, in `run` (None: where they were)."""

    slice_: Slice
    index: int
    count: int
    host: int
    run: Run | None


@dataclass(frozen=True, slots=True)
class Store:
    """Where guest data lies. `file`: plain bytes at host offsets; `inflated`: compressed clusters by descriptor.

    `is_external`: a file of its own, host offset = guest offset, not counted. `is_plain`: zero bytes in it read as
    zeroes (not so when they are encrypted). `has_backing`: what is not allocated may be elsewhere.
    """

    file: BlockFile
    inflated: InflatedFile
    is_external: bool
    is_plain: bool
    has_backing: bool


def _is_compressed(entry: int) -> bool:
    return entry & (COPIED | COMPRESSED) == COMPRESSED


class Mapping:
    """Standard L2 entries: one of 8 bytes for a cluster.

    Args: refcounts: None for an image that is not written.
    """

    entry_words = 1

    def __init__(
        self, file: BlockFile, header: Header, l1: L1Table, store: Store, refcounts: Refcounts | None, size: int
    ) -> None:
        self._file = file
        self._header = header
        self.l1 = l1
        self._store = store
        self._is_external = store.is_external
        self._own_min = 0 if store.is_external else COPIED
        """The least entry of data that is the image's alone (M4)."""
        self._counts = refcounts
        self.size = size
        self._bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._cluster_mask = header.cluster_size - 1
        slice_size = min(header.cluster_size, s.SLICE_SIZE)
        self._slice_size = slice_size
        self._slice_clusters = slice_size // header.l2_entry_size
        self._slice_bits = self._slice_clusters.bit_length() - 1
        self._slice_mask = self._slice_clusters - 1
        self._table_slices = header.cluster_size // slice_size
        self._table_bits = self._table_slices.bit_length() - 1
        self._aligned = OFFSET_MASK & ~(header.cluster_size - 1)
        self._odd = ~(self._aligned | COPIED)
        slices_max = max(L2_BYTES_MAX // slice_size, 4 * self._table_slices)
        self.cache = TableCache(file, slices_max, self._fetch, encode_offsets)
        self._slices = self.cache.slices
        self._hole = self._seen(ExtentKind.BACKING)
        self._elsewhere = Extent(ExtentKind.BACKING, 0, 0, file, 0, False)
        store.inflated.run_from = self._compressed_from

    def switch(self, l1: L1Table, size: int) -> None:
        """Map by this table from now on, with nothing resident. No request is in flight and nothing is dirty."""
        assert not self.is_dirty
        self.l1 = l1
        self.size = size
        for key in list(self.cache.slices):
            self.cache.drop(key)

    async def close(self) -> None:
        """Nothing is looked up any more, or being read ahead. See `TableCache.forget`."""
        await self._store.inflated.close()
        self.cache.forget()
        self.l1.entries = array("Q")

    @property
    def guest_file(self) -> BlockFile:
        """Where the guest's data lies, but for compressed clusters."""
        return self._store.file

    # Loading

    def _l1_entry(self, l1_index: int) -> int:
        """0 for one that names no table, whatever its flag says. Raises: CorruptImage: it is malformed."""
        entry = self.l1.entries[l1_index]
        if not entry:
            return 0
        offset = entry & OFFSET_MASK
        is_inside = offset < self._file.size or self._is_new(offset)
        if entry & s.L1_RESERVED or offset & (self._cluster_size - 1) or not is_inside:
            at = self.l1.offset + 8 * l1_index
            raise CorruptImage(
                self._file.path,
                f"L1 entry {l1_index} is {entry:#018x}, expected a multiple of {self._cluster_size} inside the file, "
                f"and the reserved bits 0 (offset {at})",
                at,
            )
        return entry if offset else 0

    def _is_new(self, offset: int) -> bool:
        """Whether the cluster was allocated since the file was opened, and may not have been written yet."""
        return self._counts is not None and offset >> self._bits < self._counts.end

    async def _fetch(self, key: int) -> None:
        entry = self._l1_entry(key >> self._table_bits)
        offset = entry & OFFSET_MASK
        if not offset:
            return
        offset += (key & (self._table_slices - 1)) * self._slice_size
        content = bytearray(self._slice_size)
        await self._file.pread(offset, memoryview(content))
        if self.l1.entries[key >> self._table_bits] == entry:
            self.cache.add(key, offset, decode_offsets(content))

    @property
    def is_dirty(self) -> bool:
        return self.cache.is_dirty or self.l1.is_dirty

    # Look-up

    def map(self, offset: int, stop: int) -> Extent | Miss:
        cluster = offset >> self._bits
        slice_ = self._slices.get(cluster >> self._slice_bits)
        if slice_ is None:
            return self._map_unloaded(cluster, stop)
        slice_.use_count += 1
        entries = slice_.entries
        index = cluster & (self._slice_clusters - 1)
        entry = entries[index]
        host = entry & self._aligned
        start = cluster << self._bits
        if not host or entry & self._odd or (self._is_external and host != start):
            return self._map_odd(slice_, index, cluster, stop)
        size = self._cluster_size
        end = start + size
        expected = entry + size
        index += 1
        while end < stop and index < len(entries) and entries[index] == expected:
            end += size
            expected += size
            index += 1
        if end > self.size:
            end = self.size
        is_own = entry >= self._own_min and self._counts is not None
        return Extent(_DATA, start, end - start, self._store.file, host, is_own)

    def locate(self, offset: int, stop: int) -> int:
        """See `FormatDriver.locate`."""
        cluster = offset >> self._bits
        slice_ = self._slices.get(cluster >> self._slice_bits)
        if slice_ is None or stop - 1 >> self._bits != cluster:
            return -1
        slice_.use_count += 1
        entry = slice_.entries[cluster & self._slice_mask]
        host = entry & self._aligned
        if not host or entry & self._odd or (self._is_external and host != cluster << self._bits):
            return -1
        return host | offset & self._cluster_mask

    def _map_unloaded(self, cluster: int, stop: int) -> Extent | Miss:
        key = cluster >> self._slice_bits
        first = key >> self._table_bits
        if self._l1_entry(first):
            return Miss(self.cache, key)
        table_bits = self._bits + self._slice_bits + self._table_bits
        last = self._empty_stop(first, min(stop, self.size))
        return self._unallocated(first << table_bits, min(last << table_bits, self.size))

    def _empty_stop(self, first: int, stop: int) -> int:
        """The index behind `first`, an L1 entry that names no table, and those that follow it and are 0, up to the
        guest byte `stop` and L1_WALK_MAX.
        """
        table_bits = self._bits + self._slice_bits + self._table_bits
        entries = self.l1.entries
        last = first + 1
        end = min(first + L1_WALK_MAX, div_ceil(stop, 1 << table_bits))
        while last < end and not entries[last]:
            last += 1
        return last

    def _unallocated(self, start: int, end: int) -> Extent:
        kind = ExtentKind.BACKING if self._store.has_backing else ExtentKind.ZERO
        return Extent(kind, start, end - start, self._store.file, 0, False, 0)

    def _map_odd(self, slice_: Slice, index: int, cluster: int, stop: int) -> Extent:
        """Anything but plain data: unallocated, zero, compressed, malformed, or cluster 0 of an external file."""
        entries = slice_.entries
        kind = self._kind(slice_, index)
        start = cluster << self._bits
        if kind is ExtentKind.COMPRESSED:
            end = min(start + self._cluster_size, self.size)
            descriptor = entries[index] & ~(COPIED | COMPRESSED)
            return Extent(kind, start, end - start, self._store.inflated, inflated_offset(descriptor, start), False)
        if kind is _DATA:
            end = min(start + self._cluster_size, self.size)
            return Extent(kind, start, end - start, self._store.file, 0, self._counts is not None)
        count = 1
        while (
            start + (count << self._bits) < stop
            and index + count < len(entries)
            and self._kind(slice_, index + count) is kind
        ):
            count += 1
        end = min(start + (count << self._bits), self.size)
        if kind is ExtentKind.ZERO:
            return Extent(kind, start, end - start, self._store.file, 0, False)
        return self._unallocated(start, end)

    def _compressed_from(self, cluster: int, count: int) -> list[int]:
        """The descriptors of `count` clusters from `cluster` on, up to the first one that is not compressed or whose
        entry is not resident.
        """
        slice_ = self._slices.get(cluster >> self._slice_bits)
        if slice_ is None:
            return []
        words = self.entry_words
        first = (cluster & (self._slice_clusters - 1)) * words
        entries = slice_.entries[first : first + count * words : words]
        return [entry & ~COMPRESSED for entry in takewhile(_is_compressed, entries)]

    def _kind(self, slice_: Slice, index: int) -> ExtentKind:
        """What an entry says; BACKING stands for unallocated. Raises: CorruptImage: it is malformed."""
        entry = slice_.entries[index]
        if entry == 0:
            return ExtentKind.BACKING
        if entry & COMPRESSED:
            if entry & COPIED or self._store.is_external:
                raise self._malformed(slice_, index, "no compressed cluster with COPIED or an external data file")
            return ExtentKind.COMPRESSED
        offset = entry & OFFSET_MASK
        if entry & s.L2_RESERVED or offset & (self._cluster_size - 1):
            raise self._malformed(
                slice_, index, f"a multiple of {self._cluster_size} below 2^56, and the reserved bits 0"
            )
        if entry & ZERO:
            if self._header.version < 3:
                raise self._malformed(slice_, index, "no zero flag in version 2")
            return ExtentKind.ZERO
        if not offset and not self._store.is_external:
            raise self._malformed(slice_, index, "a host offset behind the header")
        if self._is_external:
            self._check_external(slice_, index)
        return _DATA

    def _check_external(self, slice_: Slice, index: int) -> None:
        """Raises: CorruptImage: data in an external file is not at its guest offset. Spec: "External Data File"."""
        guest = (slice_.key << self._slice_bits) + index << self._bits
        if slice_.entries[index * self.entry_words] & OFFSET_MASK != guest:
            raise self._malformed(slice_, index, f"the guest offset {guest:#x} in an external data file")

    def _malformed(self, slice_: Slice, index: int, expected: str) -> CorruptImage:
        at = slice_.offset + index * self._header.l2_entry_size
        entry = slice_.entries[index * self.entry_words]
        cluster = (slice_.key << self._slice_bits) + index
        return CorruptImage(
            self._file.path,
            f"the L2 entry of guest offset {cluster << self._bits} is {entry:#018x}, expected {expected} (offset {at})",
            at,
        )

    def place(self, offset: int, stop: int) -> Extent | Miss:
        """As `map` where a write goes in place; elsewhere only `writable` counts."""
        cluster = offset >> self._bits
        slice_ = self._slices.get(cluster >> self._slice_bits)
        if slice_ is None:
            if self._l1_entry(cluster >> self._slice_bits + self._table_bits):
                return Miss(self.cache, cluster >> self._slice_bits)
            return self._elsewhere
        entry = slice_.entries[cluster & (self._slice_clusters - 1)]
        if entry < self._own_min or entry & self._odd:
            return self._elsewhere
        return self._checked(self.map(offset, stop))

    def _checked(self, extent: Extent | Miss) -> Extent | Miss:
        if isinstance(extent, Extent) and extent.writable and not self._store.is_external:
            self._check_target(extent)
        return extent

    def _check_target(self, extent: Extent) -> None:
        """Raises: CorruptImage (M4)."""
        assert self._counts is not None
        first = extent.file_offset >> self._bits
        last = first + (extent.length - 1 >> self._bits)
        metadata = self._counts.metadata
        for cluster in range(first, last + 1):
            if cluster in metadata or cluster >= self._counts.end:
                raise CorruptImage(
                    self._file.path,
                    f"guest offset {extent.offset} is mapped to host cluster {cluster}, expected one inside the file "
                    f"that holds no metadata (offset {cluster << self._bits})",
                    cluster << self._bits,
                )

    # Change

    def _writable_slice(self, cluster: int) -> Slice | Miss:
        """The slice that maps a cluster, in a table of our own (M1)."""
        key = cluster >> self._slice_bits
        l1_index = key >> self._table_bits
        if self.l1.entries[l1_index] >= COPIED and key in self._slices:
            return self._slices[key]
        entry = self._l1_entry(l1_index)
        if entry >= COPIED:
            return Miss(self.cache, key)
        assert self._counts is not None
        first_key = l1_index << self._table_bits
        keys = range(first_key, first_key + self._table_slices)
        if entry:
            missing = next((each for each in keys if each not in self._slices), None)
            if missing is not None:
                return Miss(self.cache, missing)
        run = self._counts.allocate(1)
        if isinstance(run, Miss):
            return run
        self._counts.metadata.add(run.cluster)
        offset = run.cluster << self._bits
        for index, each in enumerate(keys):
            if entry:
                self._slices[each].offset = offset + index * self._slice_size
                changed = self._slices[each]
            else:
                zeroes = array("Q", bytes(self._slice_size))
                changed = self.cache.add(each, offset + index * self._slice_size, zeroes)
            self.cache.changed(changed)
        self.l1.set(l1_index, offset | COPIED)
        if entry:
            self._counts.free(entry >> self._bits & (OFFSET_MASK >> self._bits))
        return self._slices[key]

    def _keeps_place(self, entry: int) -> bool:
        """Whether a zero cluster has space of its own that a write can use."""
        return entry & (ZERO | COPIED | COMPRESSED) == ZERO | COPIED and bool(entry & OFFSET_MASK)

    def reserve(self, offset: int, stop: int) -> Allocation | Miss:
        cluster = offset >> self._bits
        slice_ = self._writable_slice(cluster)
        if isinstance(slice_, Miss):
            return slice_
        index = cluster & (self._slice_clusters - 1)
        entries = slice_.entries
        head = tail = self._seen(self._kind(slice_, index)) if entries[index] else self._hole
        limit = min(len(entries), index + ((stop - 1) >> self._bits) - cluster + 1)
        is_zeroed = False
        if self._store.is_external:
            run, count, host = None, 1, cluster << self._bits
            while index + count < limit and self._wants_new(slice_, index + count):
                count += 1
        elif self._keeps_place(entries[index]):
            run, count, host = None, 1, entries[index] & self._aligned
            self._check_host(host, cluster)
        else:
            wanted = 1
            while index + wanted < limit and self._wants_new(slice_, index + wanted):
                wanted += 1
            for each in range(index, index + wanted):
                unknown = self._check_old(slice_, each)
                if unknown is not None:
                    return unknown
            assert self._counts is not None
            found = self._counts.allocate(wanted)
            if isinstance(found, Miss):
                return found
            run, count, host = found, found.count, found.cluster << self._bits
            is_zeroed = found.is_fresh and self._store.is_plain
        if count > 1:
            tail = self._seen(self._kind(slice_, index + count - 1))
        slice_.pin_count += 1
        return Allocation(
            cluster << self._bits,
            count << self._bits,
            self._store.file,
            host,
            head,
            tail,
            is_zeroed,
            Token(slice_, index, count, host, run),
        )

    def _seen(self, kind: ExtentKind) -> ExtentKind:
        """What a guest sees of an entry of this kind."""
        return ExtentKind.ZERO if kind is ExtentKind.BACKING and not self._store.has_backing else kind

    def _check_old(self, slice_: Slice, index: int) -> Miss | None:
        """What an entry names may be given up (M3). Raises: CorruptImage: metadata lies there, and no count says that
        the guest's cluster is there too, as after a repair.
        """
        assert self._counts is not None
        entry = slice_.entries[index * self.entry_words]
        if not entry & OFFSET_MASK:
            return None
        for cluster in self._named(entry):
            if cluster in self._counts.metadata:
                answer = self._counts.is_shared(cluster)
                if isinstance(answer, Miss):
                    return answer
                if not answer:
                    raise self._malformed(slice_, index, "clusters that hold no metadata")
        return None

    def _named(self, entry: int) -> range:
        """The counted clusters that an entry refers to."""
        if entry & COMPRESSED:
            first, last = compressed_clusters(entry, self._bits)
            return range(first, last + 1)
        cluster = (entry & self._aligned) >> self._bits
        return range(cluster, cluster + (1 if cluster and not self._store.is_external else 0))

    def _check_host(self, host: int, cluster: int) -> None:
        self._check_target(Extent(_DATA, cluster << self._bits, 1, self._store.file, host, True))

    def _wants_new(self, slice_: Slice, index: int) -> bool:
        """Whether a write of this cluster goes to new space."""
        entry = slice_.entries[index]
        if entry == 0:
            return True
        if self._keeps_place(entry):
            return False
        return self._kind(slice_, index) is not _DATA or entry < self._own_min

    def commit(self, allocation: Allocation) -> None:
        token = allocation.token
        assert isinstance(token, Token)
        slice_, entries = token.slice_, token.slice_.entries
        entry = token.host | COPIED
        for index in range(token.index, token.index + token.count):
            old = entries[index]
            entries[index] = entry
            entry += self._cluster_size
            if old and token.run is not None:
                self._free(old, punch=False)
        slice_.pin_count -= 1
        self.cache.changed(slice_)

    def release(self, allocation: Allocation) -> None:
        assert isinstance(allocation.token, Token)
        self._give_back(allocation.token.slice_, allocation.token.run)

    def _give_back(self, slice_: Slice, run: Run | None) -> None:
        slice_.pin_count -= 1
        if run is not None:
            assert self._counts is not None
            self._counts.give_back(run)

    def _free(self, entry: int, *, punch: bool) -> None:
        """What an entry named is not referred to by it any more (M3)."""
        assert self._counts is not None
        named = self._named(entry)
        if self._counts.metadata.isdisjoint(named):
            if named:
                self._counts.free(named.start, len(named), punch=punch)
            return
        for cluster in named:
            if cluster in self._counts.metadata:
                self._counts.free_beside_metadata(cluster, punch=punch)
            else:
                self._counts.free(cluster, punch=punch)

    def unmap(self, offset: int, stop: int, to: Unmap) -> int | Miss:
        """Whole units of one slice; `offset` is aligned to them, `stop` too or the end of the image."""
        has_backing = self._store.has_backing
        if self._header.version < 3 and (has_backing or to is Unmap.KEEP):
            return offset
        key = offset >> self._bits >> self._slice_bits
        if not self._l1_entry(key >> self._table_bits):
            if not has_backing:
                table_bits = self._bits + self._slice_bits + self._table_bits
                return min(stop, self._empty_stop(offset >> table_bits, stop) << table_bits)
            slice_ = None
        else:
            slice_ = self._slices.get(key)
            if slice_ is None:
                return Miss(self.cache, key)
        end = min(stop, (key + 1) << self._slice_bits << self._bits)
        changes = []
        for index, mask, unit_start in self._covered(offset, end):
            if slice_ is not None and self._needs_place(slice_, index, mask):
                end = unit_start
                break
            if slice_ is None or self._is_changed_by(slice_, index, mask, to):
                if slice_ is not None:
                    unknown = self._check_old(slice_, index)
                    if unknown is not None:
                        return unknown
                changes.append((index, mask))
        if changes:
            writable = self._writable_slice(offset >> self._bits)
            if isinstance(writable, Miss):
                return writable
            for index, mask in changes:
                self._unmap_entry(writable, index, mask, to)
            self.cache.changed(writable)
        return end

    def drop(self, offset: int) -> int | Miss:
        """Forget what is mapped from `offset` on, a cluster's beginning behind the end of the disk, as far as one L2
        table goes; returns where that is. Nothing remains there, not even that it reads as zeroes.
        """
        table_bits = self._bits + self._slice_bits + self._table_bits
        end = len(self.l1.entries) << table_bits
        while offset < end and not self.l1.entries[offset >> table_bits] & OFFSET_MASK:
            offset = ((offset >> table_bits) + 1) << table_bits
        if offset >= end:
            return offset
        stop = ((offset >> table_bits) + 1) << table_bits
        keys = range(offset >> self._bits >> self._slice_bits, stop >> self._bits >> self._slice_bits)
        entry = self._l1_entry(offset >> table_bits)
        missing = next((each for each in keys if each not in self._slices), None)
        if missing is not None:
            return Miss(self.cache, missing)
        if not offset & (1 << table_bits) - 1:
            self._drop_table(offset >> table_bits, entry, keys)
            return stop
        missed = self._drop_entries(offset, keys)
        return stop if missed is None else missed

    def _drop_table(self, l1_index: int, entry: int, keys: range) -> None:
        assert self._counts is not None
        slices = [self._slices[key] for key in keys]
        for slice_ in slices:
            for index in range(self._slice_clusters):
                self._check_entry(slice_, index)
        for slice_ in slices:
            for old in slice_.entries[:: self.entry_words]:
                if old:
                    self._free(old, punch=True)
            self.cache.drop(slice_.key)
        self._counts.free((entry & OFFSET_MASK) >> self._bits, punch=True)
        self.l1.set(l1_index, 0)

    def _drop_entries(self, offset: int, keys: range) -> Miss | None:
        """From `offset` on, in a table that maps something before it too."""
        first = offset >> self._bits & (self._slice_clusters - 1)
        if not any(any(self._slices[key].entries[first * self.entry_words * (key == keys[0]) :]) for key in keys):
            return None
        for key in keys:
            writable = self._writable_slice(key << self._slice_bits)
            if isinstance(writable, Miss):
                return writable
            for index in range(first if key == keys[0] else 0, self._slice_clusters):
                self._check_entry(writable, index)
                word = index * self.entry_words
                old = writable.entries[word]
                writable.entries[word : word + self.entry_words] = array("Q", bytes(8 * self.entry_words))
                if old:
                    self._free(old, punch=True)
            self.cache.changed(writable)
        return None

    def _check_entry(self, slice_: Slice, index: int) -> None:
        """Raises: CorruptImage: it is malformed."""
        self._kind(slice_, index)

    def _covered(self, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(entry's index, mask of the subclusters that the range covers, where that begins) for each cluster."""
        first = offset >> self._bits
        for cluster in range(first, first + div_ceil(end - offset, self._cluster_size)):
            yield cluster & (self._slice_clusters - 1), s.ALL_ALLOCATED, cluster << self._bits

    def _needs_place(self, slice_: Slice, index: int, mask: int) -> bool:
        """Whether the mapping must stay: an external file's cluster is emptied in place."""
        return self._store.is_external and self._kind(slice_, index) is _DATA

    def _is_changed_by(self, slice_: Slice, index: int, mask: int, to: Unmap) -> bool:
        kind = self._kind(slice_, index)
        if kind is ExtentKind.BACKING:
            return self._store.has_backing
        if kind is ExtentKind.ZERO:
            return to is not Unmap.KEEP and bool(slice_.entries[index] & OFFSET_MASK)
        return True

    def _unmap_entry(self, slice_: Slice, index: int, mask: int, to: Unmap) -> None:
        old = slice_.entries[index]
        if to is Unmap.KEEP and old >= COPIED and old & OFFSET_MASK:
            slice_.entries[index] = old | ZERO
            return
        slice_.entries[index] = ZERO if self._store.has_backing or to is Unmap.KEEP else 0
        if old:
            self._free(old, punch=True)
