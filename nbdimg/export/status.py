"""From mapped extents to the (length, flags) pairs of BLOCK_STATUS.

Spec: proto.md "NBD_REPLY_TYPE_BLOCK_STATUS", "base:allocation"; QEMU docs/interop/nbd.txt for qemu:allocation-depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nbdimg.image.driver import Extent, ExtentKind
from nbdimg.units import align_up
from nbdimg.wire.constants import ALLOCATION_DEPTH, BASE_ALLOCATION, Allocation

_HOLE_AND_ZERO = int(Allocation.HOLE | Allocation.ZERO)

Pairs = list[tuple[int, int]]


def _allocation(extent: Extent) -> int:
    return 0 if extent.kind is ExtentKind.DATA else _HOLE_AND_ZERO


def _depth(extent: Extent) -> int:
    return extent.depth


STATUS_FLAGS: dict[str, Callable[[Extent], int]] = {BASE_ALLOCATION: _allocation, ALLOCATION_DEPTH: _depth}
"""How each context reads an extent; a context of the namespace qemu:dirty-bitmap: has extents of its own."""


def status_pairs(extents: Sequence[Extent], flags_of: Callable[[Extent], int], alignment: int) -> Pairs:
    """The pairs for extents that follow one another, equal neighbours merged.

    Lengths are multiples of `alignment` but for the last. A unit that several extents share gets the smallest of
    their values, which promises least: data before zero, zero before hole; the nearest depth.
    """
    if not extents:
        return []
    start = extents[0].offset
    pairs: Pairs = []
    position = start
    for extent in extents:
        flags = flags_of(extent)
        if position > extent.offset:
            before = pairs[-1][1]
            shared = min(before, flags)
            if shared != before:
                _take_back(pairs, alignment)
                _append(pairs, alignment, shared)
        stop = start + align_up(extent.stop - start, alignment)
        if extent is extents[-1]:
            stop = extent.stop
        if stop > position:
            _append(pairs, stop - position, flags)
            position = stop
    return pairs


def _append(pairs: Pairs, length: int, flags: int) -> None:
    if pairs and pairs[-1][1] == flags:
        length += pairs.pop()[0]
    pairs.append((length, flags))


def _take_back(pairs: Pairs, length: int) -> None:
    """Shorten the last pair."""
    before, flags = pairs.pop()
    if before > length:
        pairs.append((before - length, flags))
