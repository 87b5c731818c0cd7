"""Raw: guest offset and file offset are the same.

Holes are found with SEEK_DATA and SEEK_HOLE. Runs of data are remembered, so that a read of a written image costs no
look-up; holes are not, for another write may fill them at any time. A remembered run can only be stale by having been
punched since, and then it reads as zeroes all the same; `unmapped` forgets it, so that BLOCK_STATUS tells the truth.
"""

from __future__ import annotations

from bisect import bisect_right

from nbdimg.image.driver import Extent, ExtentKind, Miss
from nbdimg.storage.file import BlockFile
from nbdimg.storage.ordering import Plan

RUNS_MAX = 4096
"""Remembered runs of data, about 0.5 MiB; beyond it all are forgotten, and found again as they are needed."""


class RawDriver:
    name = "raw"
    cluster_size = 1

    def __init__(self, file: BlockFile) -> None:
        self.file = file
        self.size = file.size
        self._starts: list[int] = []
        self._runs: list[Extent] = []
        self._whole = self._extent(ExtentKind.DATA, 0, self.size)
        self._recent = self._extent(ExtentKind.ZERO, 0, 0)

    def _extent(self, kind: ExtentKind, start: int, stop: int) -> Extent:
        return Extent(kind, start, stop - start, self.file, start, self.file.is_writable)

    def map(self, offset: int) -> Extent | Miss:
        recent = self._recent
        if recent.offset <= offset < recent.offset + recent.length:
            return recent
        index = bisect_right(self._starts, offset) - 1
        if index >= 0 and offset < self._runs[index].stop:
            self._recent = self._runs[index]
            return self._recent
        is_data, stop = self.file.data_extent(offset)
        stop = min(stop, self.size) if stop > offset else self.size
        if not is_data:
            return self._extent(ExtentKind.ZERO, offset, stop)
        self._recent = self._remember(offset, stop)
        return self._recent

    def _remember(self, start: int, stop: int) -> Extent:
        """Add a run, merged with those that it touches."""
        first = bisect_right(self._starts, start)
        if first and self._runs[first - 1].stop >= start:
            first -= 1
            start = self._runs[first].offset
        last = bisect_right(self._starts, stop)
        if last > first:
            stop = max(stop, self._runs[last - 1].stop)
        if len(self._runs) >= RUNS_MAX:
            self._forget_all()
            first = last = 0
        run = self._extent(ExtentKind.DATA, start, stop)
        self._starts[first:last] = [start]
        self._runs[first:last] = [run]
        return run

    def _forget_all(self) -> None:
        self._starts.clear()
        self._runs.clear()
        self._recent = self._extent(ExtentKind.ZERO, 0, 0)

    def place(self, offset: int) -> Extent | Miss:
        return self._whole

    async def load(self, miss: Miss) -> None:
        raise AssertionError("a raw image has no tables to miss")

    def unmapped(self, offset: int, length: int) -> None:
        stop = offset + length
        self._recent = self._extent(ExtentKind.ZERO, 0, 0)
        first = bisect_right(self._starts, offset)
        if first and self._runs[first - 1].stop > offset:
            first -= 1
        last = bisect_right(self._starts, stop - 1)
        kept = []
        if first < last:
            if self._runs[first].offset < offset:
                kept.append(self._extent(ExtentKind.DATA, self._runs[first].offset, offset))
            if self._runs[last - 1].stop > stop:
                kept.append(self._extent(ExtentKind.DATA, stop, self._runs[last - 1].stop))
        self._runs[first:last] = kept
        self._starts[first:last] = [run.offset for run in kept]

    def flush_plan(self) -> Plan:
        return Plan(self.file, ((),))


def create(path: str, size: int) -> None:
    """Make a sparse raw image of `size` bytes. Raises: OSError: the file exists or cannot be made."""
    with open(path, "xb") as file:
        file.truncate(size)
