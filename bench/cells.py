"""The workloads of the throughput table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table: what each connection asks for. `mode` is fio's `--rw`; `depth` counts per connection."""

    name: str
    title: str
    mode: str
    block_size: int
    depth: int
    connections: int = 1

    @property
    def is_write(self) -> bool:
        return self.mode in ("write", "randwrite")

    @property
    def unit(self) -> str:
        """What the table shows: requests for small blocks, bytes where the copy dominates."""
        return "IOPS" if self.block_size < 64 * KIB else "MB/s"


CELLS = (
    Cell("4k-randread-1", "4 KiB random read, depth 1", "randread", 4 * KIB, 1),
    Cell("4k-randread-16", "4 KiB random read, depth 16", "randread", 4 * KIB, 16),
    Cell("4k-randread-64", "4 KiB random read, depth 64", "randread", 4 * KIB, 64),
    Cell("4k-randread-4x32", "4 KiB random read, 4 connections x 32", "randread", 4 * KIB, 32, connections=4),
    Cell("4k-randwrite-16", "4 KiB random write, depth 16", "randwrite", 4 * KIB, 16),
    Cell("64k-randread-16", "64 KiB random read, depth 16", "randread", 64 * KIB, 16),
    Cell("1m-read-8", "1 MiB read, depth 8", "read", MIB, 8),
    Cell("1m-write-8", "1 MiB write, depth 8", "write", MIB, 8),
)
CEILING_CELLS = (
    *CELLS,
    Cell("4k-randwrite-1", "4 KiB random write, depth 1", "randwrite", 4 * KIB, 1),
)
"""Those of `bench.ceiling`: a lone write too, of which most is a wake-up and the kernel."""


def select_cells(patterns: Sequence[str], cells: Sequence[Cell] = CELLS) -> tuple[Cell, ...]:
    """Of `cells` those whose name matches any of the shell patterns, in table order; all of them for no pattern.

    Raises: ValueError for a pattern that matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(cell.name, pattern) for cell in cells):
            raise ValueError(f"no cell matches {pattern!r}; cells: {', '.join(cell.name for cell in cells)}")
    return tuple(cell for cell in cells if not patterns or any(fnmatchcase(cell.name, pattern) for pattern in patterns))
