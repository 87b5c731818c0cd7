"""Which clusters a guest is likely to read next: those behind the ones that it has read one after another.

A run is begun twice as long as the last, and as soon as the guest enters the one before it: so the reader finds its
clusters done, and one that stops after two has cost little.
"""

from __future__ import annotations

from typing import NamedTuple

READERS_MAX = 256
"""Sequential readers that are followed at once: a fleet that boots from one image."""


class Run(NamedTuple):
    """The guest's clusters from `first` on."""

    first: int
    length: int


_NOTHING = Run(0, 0)


class ReadAhead:
    """Args: run_max: clusters, the longest run."""

    def __init__(self, run_max: int) -> None:
        self._run_max = run_max
        self._readers: dict[int, Run] = {}
        """By the cluster that comes next: the run begun last."""
        self._last = -1

    def read(self, cluster: int) -> Run:
        """The guest reads `cluster`. Returns what to begin now, mostly a run of length 0."""
        if cluster == self._last:
            return _NOTHING
        self._last = cluster
        begun = _NOTHING
        run = self._readers.pop(cluster, None)
        if run is None:
            if cluster + 1 in self._readers:
                return _NOTHING
            run = Run(cluster + 1, 1)
            if len(self._readers) >= READERS_MAX:
                del self._readers[next(iter(self._readers))]
        elif cluster >= run.first:
            run = begun = Run(run.first + run.length, min(2 * run.length, self._run_max))
        self._readers[cluster + 1] = run
        return begun
