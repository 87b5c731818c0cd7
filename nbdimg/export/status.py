"""From mapped extents to the (length, flags) pairs of BLOCK_STATUS.

Spec: proto.md "NBD_REPLY_TYPE_BLOCK_STATUS", "base:allocation"; QEMU docs/interop/nbd.txt for qemu:allocation-depth and
qemu:dirty-bitmap:NAME.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nbdimg.image.bitmap import DirtyBitmap
from nbdimg.image.driver import Extent, ExtentKind
from nbdimg.units import align_down, align_up
from nbdimg.wire.constants import ALLOCATION_DEPTH, BASE_ALLOCATION, Allocation

_HOLE_AND_ZERO = int(Allocation.HOLE | Allocation.ZERO)

_DIRTY = 1
"""Bit 0 of qemu:dirty-bitmap: these bytes have changed since the bitmap was made."""

Pairs = list[tuple[int, int]]


def _allocation(extent: Extent) -> int:
    return _HOLE_AND_ZERO if extent.kind is ExtentKind.ZERO else 0


def _depth(extent: Extent) -> int:
    return extent.depth


STATUS_FLAGS: dict[str, Callable[[Extent], int]] = {BASE_ALLOCATION: _allocation, ALLOCATION_DEPTH: _depth}
"""How each context reads an extent; a context of the namespace qemu:dirty-bitmap: has extents of its own."""


def status_pairs(
    extents: Sequence[Extent], value_of: Callable[[Extent], int], alignment: int, *, is_cut: bool = False
) -> Pairs:
    """The pairs for extents that follow one another, equal neighbours merged.

    Lengths are multiples of `alignment` but for the last; with `is_cut`, where a client has to go on from there, that
    one too. A unit that several extents share gets the smallest of their values, which promises least: data before
    zero, zero before hole; the nearest depth.
    """
    if not extents:
        return []
    start = position = extents[0].offset
    end = extents[-1].stop
    if is_cut:
        end = start + (align_down(end - start, alignment) or end - start)
    pairs: Pairs = []
    for extent in extents:
        value = value_of(extent)
        if position > extent.offset and value < pairs[-1][1]:
            shared = position - start - align_down(position - start - 1, alignment)
            _shorten(pairs, shared)
            _append(pairs, shared, value)
        stop = min(start + align_up(extent.stop - start, alignment), end)
        if stop > position:
            _append(pairs, stop - position, value)
            position = stop
    return pairs


def dirty_pairs(bitmap: DirtyBitmap, start: int, end: int, alignment: int, pairs_max: int) -> Pairs:
    """The pairs of a dirty bitmap for the guest bytes from `start` to before `end`, at most `pairs_max` from the front.

    Lengths are multiples of `alignment` but for the last of the range; a unit that is dirty in part is dirty. No more
    dirty runs are looked at than pairs may come out, for many may fall into one unit.
    """
    pairs: Pairs = []
    position = start
    for number, (dirty_start, dirty_stop) in enumerate(bitmap.dirty_runs(start, end)):
        first = start + align_down(dirty_start - start, alignment)
        if first > position and len(pairs) < pairs_max:
            _append(pairs, first - position, 0)
            position = first
        if pairs_max in (len(pairs), number):
            return pairs
        stop = min(start + align_up(dirty_stop - start, alignment), end)
        if stop > position:
            _append(pairs, stop - position, _DIRTY)
            position = stop
    if position < end and len(pairs) < pairs_max:
        _append(pairs, end - position, 0)
    return pairs


def _append(pairs: Pairs, length: int, value: int) -> None:
    if pairs and pairs[-1][1] == value:
        length += pairs.pop()[0]
    pairs.append((length, value))


def _shorten(pairs: Pairs, length: int) -> None:
    """Take `length` bytes back from the last pair."""
    before, value = pairs.pop()
    if before > length:
        pairs.append((before - length, value))
