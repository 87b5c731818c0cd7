"""A format whose tables are never resident at first, over pieces of one file."""

from __future__ import annotations

from collections.abc import Sequence

from nbdimg.image.driver import Extent, ExtentKind, Miss
from nbdimg.storage.file import BlockFile
from nbdimg.storage.ordering import Plan

TABLE_SIZE = 4096
"""Guest bytes that one table maps."""


class FakeDriver:
    """Guest byte g of cluster c lies at `places[c]` + g % cluster_size of the file; None: the cluster reads as zeroes
    and has no place to write to.

    `resident` names the tables in memory: `map` names the others in a Miss until `load`.
    """

    name = "fake"

    def __init__(self, file: BlockFile, places: Sequence[int | None], cluster_size: int = 512) -> None:
        self.file = file
        self.cluster_size = cluster_size
        self.size = len(places) * cluster_size
        self.places = list(places)
        self.resident: set[int] = set()
        self.loads: list[int] = []
        self.unmaps: list[tuple[int, int]] = []

    def map(self, offset: int) -> Extent | Miss:
        table = offset // TABLE_SIZE
        if table not in self.resident:
            return Miss(self.file, table, TABLE_SIZE)
        index = offset // self.cluster_size
        place = self.places[index]
        kind = ExtentKind.ZERO if place is None else ExtentKind.DATA
        start = index * self.cluster_size
        return Extent(kind, start, self.cluster_size, self.file, place or 0, place is not None)

    def place(self, offset: int) -> Extent | Miss:
        return self.map(offset)

    async def load(self, miss: Miss) -> None:
        self.loads.append(miss.offset)
        self.resident.add(miss.offset)

    def unmapped(self, offset: int, length: int) -> None:
        self.unmaps.append((offset, length))

    def flush_plan(self) -> Plan:
        return Plan(self.file, ((),))
