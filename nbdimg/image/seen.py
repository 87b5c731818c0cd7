"""What was found behind an image's unallocated clusters, remembered: each level of a chain costs a look-up else."""

from __future__ import annotations

from dataclasses import replace

from nbdimg.image.driver import Extent
from nbdimg.units import align_down, align_up

CLUSTERS_MAX = 32768
"""Clusters whose place is remembered, in about 4 MiB."""

AROUND = 16
"""Clusters that are looked up together, an aligned group: contiguous ones cost little more than one."""


class SeenThrough:
    """Extents of backing images by cluster of the image above. What is behind never changes, so only a change of that
    image's own mapping ends what is remembered.

    Args: unit: the image's cluster size.
    """

    def __init__(self, unit: int) -> None:
        self.unit = unit
        self.extents: dict[int, Extent] = {}
        """Whoever takes one sees whether it holds the bytes in question: it may be of only a part of its cluster."""

    def around(self, offset: int) -> int:
        """Where the group of `offset` ends."""
        return align_down(offset, AROUND * self.unit) + AROUND * self.unit

    def remember(self, found: Extent, offset: int) -> None:
        """Keep what was found for `offset`, as far as the group goes."""
        stop = min(found.stop, self.around(offset))
        start = max(found.offset, stop - AROUND * self.unit, align_down(offset, AROUND * self.unit))
        if len(self.extents) >= CLUSTERS_MAX:
            self.extents.clear()
        kept = replace(found, offset=start, length=stop - start, file_offset=found.file_offset + start - found.offset)
        for cluster in range(start // self.unit, (stop - 1) // self.unit + 1):
            self.extents[cluster] = kept

    def forget(self, offset: int, stop: int) -> None:
        """The image's own mapping has changed there. An extent may be that of a whole group, which goes with it."""
        if not self.extents:
            return
        first, last = align_down(offset // self.unit, AROUND), align_up(-(-stop // self.unit), AROUND)
        if last - first > len(self.extents):
            self.extents.clear()
        for cluster in range(first, last if self.extents else first):
            self.extents.pop(cluster, None)
