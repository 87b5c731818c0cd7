"""How long things took, counted in buckets: plain numbers, cheap enough for the request path."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

BOUNDS_S = (100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 100e-3, 250e-3, 1.0)
"""From what the page cache answers to what a client notices; fixed, so that servers can be added up."""

SUM = len(BOUNDS_S) + 1
"""The cell that holds the sum."""


class Histogram:
    """`cells[i]` is how often something took at most `BOUNDS_S[i]` and longer than the bound before; the one behind
    them counts what took longer than all bounds, and the last is the sum in seconds. The request path adds to them
    itself.
    """

    __slots__ = ("cells",)

    def __init__(self) -> None:
        self.cells: list[float] = [0] * SUM + [0.0]

    def add(self, seconds: float) -> None:
        self.cells[bisect_left(BOUNDS_S, seconds)] += 1
        self.cells[SUM] += seconds

    @property
    def counts(self) -> Sequence[int]:
        return [int(cell) for cell in self.cells[:SUM]]

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def sum_s(self) -> float:
        return self.cells[SUM]
