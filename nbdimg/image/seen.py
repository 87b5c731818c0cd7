"""What was found behind an image's unallocated clusters, remembered: each level of a chain costs a look-up else."""

from __future__ import annotations

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

    def group(self, offset: int) -> tuple[int, int]:
        """Where the group of `offset` begins and ends."""
        size = AROUND * self.unit
        first = align_down(offset, size)
        return first, first + size

    def remember(self, found: Extent, offset: int) -> None:
        """Keep what was found for `offset`, as far as the group goes."""
        first, last = self.group(offset)
        start, stop = max(found.offset, first), min(found.stop, last)
        if len(self.extents) >= CLUSTERS_MAX:
            self.extents.clear()
        file_offset = found.file_offset + start - found.offset
        kept = Extent(found.kind, start, stop - start, found.file, file_offset, found.writable, found.depth)
        self.extents.update(dict.fromkeys(range(start // self.unit, (stop - 1) // self.unit + 1), kept))

    def forget(self, offset: int, stop: int) -> None:
        """The image's own mapping has changed there. An extent may be that of a whole group, which goes with it."""
        if not self.extents:
            return
        first, last = align_down(offset // self.unit, AROUND), align_up(-(-stop // self.unit), AROUND)
        if last - first > len(self.extents):
            self.extents.clear()
        for cluster in range(first, last if self.extents else first):
            self.extents.pop(cluster, None)
