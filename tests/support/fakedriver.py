"""A format whose tables are never resident at first, over pieces of one file."""

from __future__ import annotations

from collections.abc import Sequence

from nbdimg.image.driver import Allocation, Extent, ExtentKind, Miss, Unmap
from nbdimg.storage.file import BlockFile
from nbdimg.storage.ordering import Plan, Stage
from nbdimg.units import align_up, div_ceil

TABLE_SIZE = 4096
"""Guest bytes that one table maps."""


class FakeDriver:
    """Guest byte g of cluster c lies at `places[c]` + g % cluster_size of the file; None: the cluster has no place yet
    and reads as zeroes, or as the backing image with `has_backing`. The size is that of the places but for `cut` bytes.

    `resident` names the tables in memory: `map` names the others in a Miss until `load`. A write to a cluster without
    a place, or to one of `shared`, gets new space behind the end of the file, of which `zeroed` says whether it is
    known to read as zeroes. `can_unmap` is whether mapping can take places away. `events` are the calls that change
    something, in order.
    """

    name = "fake"
    failure: str | None = None

    def __init__(
        self,
        file: BlockFile,
        places: Sequence[int | None],
        cluster_size: int = 512,
        *,
        cut: int = 0,
        has_backing: bool = False,
        zeroed: bool = True,
        can_unmap: bool = False,
    ) -> None:
        self.file = self.guest_file = file
        self.cluster_size = cluster_size
        self.unmap_size = cluster_size if can_unmap else 1
        self.sector_size = 1
        self.size = len(places) * cluster_size - cut
        self.places = list(places)
        self.shared: set[int] = set()
        self.has_backing = has_backing
        self.zeroed = zeroed
        self.is_strained = False
        self.resident: set[int] = set()
        self.loads: list[int] = []
        self.unmaps: list[tuple[int, int]] = []
        self.events: list[str] = []
        self._end = align_up(file.size, cluster_size)

    def _missing(self, offset: int) -> Miss | None:
        table = offset // TABLE_SIZE
        return None if table in self.resident else Miss(self, table)

    def _kind(self, index: int) -> ExtentKind:
        if self.places[index] is not None:
            return ExtentKind.DATA
        return ExtentKind.BACKING if self.has_backing else ExtentKind.ZERO

    def map(self, offset: int, stop: int) -> Extent | Miss:
        missing = self._missing(offset)
        if missing is not None:
            return missing
        index = offset // self.cluster_size
        place = self.places[index]
        start = index * self.cluster_size
        length = min(self.cluster_size, self.size - start)
        is_writable = place is not None and index not in self.shared
        return Extent(self._kind(index), start, length, self.file, place or 0, is_writable)

    def locate(self, offset: int, stop: int) -> int:
        place = self.places[offset // self.cluster_size]
        if place is None or self._missing(offset) or stop > align_up(offset + 1, self.cluster_size):
            return -1
        return place + offset % self.cluster_size

    def place(self, offset: int, stop: int) -> Extent | Miss:
        return self.map(offset, stop)

    async def load(self, key: int) -> None:
        self.loads.append(key)
        self.resident.add(key)

    def reserve(self, offset: int, stop: int) -> Allocation | Miss:
        missing = self._missing(offset)
        if missing is not None:
            return missing
        first = offset // self.cluster_size
        last = first
        while (last + 1) * self.cluster_size < stop and self.places[last + 1] is None:
            last += 1
        place, length = self._end, (last + 1 - first) * self.cluster_size
        self._end += length
        self.events.append(f"reserve {first}-{last}")
        return Allocation(
            first * self.cluster_size,
            length,
            self.file,
            place,
            self._kind(first),
            self._kind(last),
            self.zeroed,
            (first, last),
        )

    def commit(self, allocation: Allocation) -> None:
        first = allocation.offset // self.cluster_size
        for number in range(allocation.length // self.cluster_size):
            self.places[first + number] = allocation.file_offset + number * self.cluster_size
            self.shared.discard(first + number)
        self.events.append("commit")

    def release(self, allocation: Allocation) -> None:
        self.events.append("release")

    def unmap(self, offset: int, stop: int, to: Unmap) -> int | Miss:
        if self.unmap_size == 1:
            return offset
        missing = self._missing(offset)
        if missing is not None:
            return missing
        assert offset % self.cluster_size == 0
        assert stop % self.cluster_size == 0 or stop == self.size
        end = min(stop, (offset // TABLE_SIZE + 1) * TABLE_SIZE)
        for index in range(offset // self.cluster_size, div_ceil(end, self.cluster_size)):
            self.places[index] = None
        self.events.append(f"unmap {offset}-{end} {to.value}")
        return end

    def unmapped(self, offset: int, length: int) -> None:
        self.unmaps.append((offset, length))

    def flush_plan(self) -> Plan:
        self.events.append("flush")
        return Plan((Stage((), (self.file,)),))

    async def flushed(self) -> None:
        self.is_strained = False

    async def close(self) -> None:
        self.events.append("close")

    async def abandon(self) -> None:
        await self.file.close()
