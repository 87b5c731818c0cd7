"""What L1 tables of an image lead to, walked and checked: the disk's tree and those of its snapshots."""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Callable
from itertools import chain

from nbdimg.errors import CorruptImage
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.formats.qcow2.l1 import check_tables_differ
from nbdimg.formats.qcow2.paced import PIECE_SIZE, PacedReader
from nbdimg.formats.qcow2.packed import compressed_clusters, decode_offsets
from nbdimg.formats.qcow2.refcount import Refcounts
from nbdimg.formats.qcow2.snapshots import Snapshot, l1_clusters, stored_table_size
from nbdimg.formats.qcow2.structs import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from nbdimg.storage.ordering import hindered
from nbdimg.units import div_ceil


class Trees:
    """Of one image. `on_table` is called behind each L2 table that has been read.

    Tables are read as the file has them: what is dirty in memory must have been written.
    """

    def __init__(
        self, driver: Qcow2Driver, counts: Refcounts, snapshots: list[Snapshot], on_table: Callable[[], None]
    ) -> None:
        header = driver.header
        self._driver = driver
        self._file = driver.file
        self._counts = counts
        self._snapshots = snapshots
        self._on_table = on_table
        self._reader = PacedReader(driver.file)
        self._bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        has_zero_flag = header.version >= 3 and not header.has_subclusters
        self.aligned = OFFSET_MASK & ~(self._cluster_size - 1)
        """The bits of an entry that a host offset has."""
        self.odd = ~(self.aligned | COPIED | (ZERO if has_zero_flag else 0))
        """The bits of an L2 entry that no plain one has."""
        self.words = header.l2_entry_size // 8
        """Words of an L2 entry."""
        self._fixed = self._fixed_clusters()

    def _fixed_clusters(self) -> set[int]:
        """Clusters that hold the header and tables, but for L2 tables: no L2 table or data lies in them."""
        header = self._driver.header
        l1 = self._driver.mapping.l1
        clusters = {offset >> self._bits for offset in self._counts.table if offset}
        clusters.update(chain.from_iterable(l1_clusters(self._file.path, header, self._snapshots, self._counts.end)))
        regions = [
            (0, self._cluster_size),
            (header.refcount_table_offset, header.refcount_table_clusters << self._bits),
            (l1.offset, 8 * len(l1.entries)),
            (header.snapshot_table_offset, stored_table_size(self._snapshots)),
        ]
        for offset, length in regions:
            clusters.update(host_clusters(offset, length, self._bits))
        return clusters

    async def check(self, l1: array[int]) -> None:
        """Raises: CorruptImage: as `check_l1`, or it cannot be walked to its end."""
        self.check_l1(l1)
        async for _ in self.runs(l1):
            pass

    def check_l1(self, l1: array[int]) -> None:
        """Raises: CorruptImage: an entry cannot be followed, or as `check_tables_differ`."""
        for index, entry in enumerate(l1):
            if entry:
                self._l2_cluster(index, entry)
        check_tables_differ(self._file.path, l1)

    async def pieces(self, l1: array[int]) -> AsyncIterator[tuple[int, int, array[int]]]:
        """(cluster of the L2 table, offset in the table, words from there on) for all of each table of `l1`."""
        size = min(PIECE_SIZE, self._cluster_size)
        for index, entry in enumerate(l1):
            if not entry:
                continue
            cluster = self._l2_cluster(index, entry)
            for start in range(0, self._cluster_size, size):
                content = await hindered(self._reader.read((cluster << self._bits) + start, size))
                yield cluster, start, decode_offsets(content)
            self._on_table()

    async def runs(self, l1: array[int]) -> AsyncIterator[tuple[int, int]]:
        """(first cluster, count) of all that a tree refers to, once for each reference; always in the same order, and
        a table after what it maps.
        """
        async for cluster, start, words in self.pieces(l1):
            for each in self._data_runs(cluster, start, words):
                yield each
            if start + 8 * len(words) == self._cluster_size:
                yield cluster, 1

    def _l2_cluster(self, index: int, entry: int) -> int:
        """Raises: CorruptImage."""
        cluster = (entry & OFFSET_MASK) >> self._bits
        if (
            entry & ~(self.aligned | COPIED)
            or not cluster
            or cluster in self._fixed
            or cluster << self._bits >= self._file.size
        ):
            raise CorruptImage(
                self._file.path,
                f"L1 entry {index} is {entry:#018x}, expected the offset of an L2 table, a multiple of "
                f"{self._cluster_size} inside the file",
                entry & OFFSET_MASK,
            )
        return cluster

    def _data_runs(self, table: int, start: int, words: array[int]) -> list[tuple[int, int]]:
        """The references of a piece of an L2 table, neighbours as one. Raises: CorruptImage."""
        runs: list[tuple[int, int]] = []
        first = stop = 0
        odd, bits = self.odd, self._bits
        for index, entry in enumerate(words[:: self.words]):
            if not entry:
                continue
            if entry & odd:
                if entry & (COMPRESSED | COPIED) != COMPRESSED:
                    raise self._malformed(table, start, index, entry)
                low, high = compressed_clusters(entry, bits)
                runs.append((low, high - low + 1))
                continue
            cluster = (entry & OFFSET_MASK) >> bits
            if cluster == stop and stop:
                stop += 1
            elif cluster:
                runs.append((first, stop - first))
                first, stop = cluster, cluster + 1
        runs.append((first, stop - first))
        runs = [each for each in runs if each[1]]
        for low, count in runs:
            if not self._fixed.isdisjoint(range(low, low + count)):
                raise CorruptImage(
                    self._file.path,
                    f"the L2 table at offset {table << bits} maps host clusters {low} to {low + count - 1}, expected "
                    f"none that holds metadata",
                    table << bits,
                )
        return runs

    def _malformed(self, table: int, start: int, index: int, entry: int) -> CorruptImage:
        at = (table << self._bits) + start + 8 * index * self.words
        return CorruptImage(
            self._file.path,
            f"an L2 entry is {entry:#018x}, expected a multiple of {self._cluster_size} below 2^56, and the reserved "
            f"bits 0 (offset {at})",
            at,
        )


def host_clusters(offset: int, length: int, bits: int) -> range:
    """The host clusters of 2^`bits` bytes that so many bytes at `offset` begin and end in."""
    first = offset >> bits
    return range(first, first + div_ceil(length, 1 << bits))
