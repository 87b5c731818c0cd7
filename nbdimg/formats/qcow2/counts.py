"""Walks over the refcounts of all clusters of a file, of which there may be hundreds of millions, most of them 0.

They go by in chunks that are compared as bytes, and the loop gets its turn between them. `Counts` are as
`zeroed` makes them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

Counts = memoryview

CHUNK = 32768
"""Counts compared at once: 64 KiB of 16 bits each."""

PIECE = 4096
"""Counts that are looked at one by one before the loop gets its turn."""


async def differing(left: Counts, right: Counts, stop: int) -> AsyncIterator[tuple[int, list[int], list[int]]]:
    """(index of the first, counts of both) of pieces below `stop` that are not the same, in order."""
    for start in range(0, stop, CHUNK):
        end = min(start + CHUNK, stop)
        if left[start:end].tobytes() != right[start:end].tobytes():
            for first in range(start, end, PIECE):
                part = slice(first, min(first + PIECE, end))
                if left[part].tobytes() != right[part].tobytes():
                    yield first, left[part].tolist(), right[part].tolist()
                    await asyncio.sleep(0)
        await asyncio.sleep(0)


async def used_blocks(counts: Counts, per_block: int) -> set[int]:
    """The blocks of so many counts that hold one that is not 0."""
    used: set[int] = set()
    size = min(per_block, CHUNK)
    pace = 0
    for start in range(0, len(counts), size):
        if not is_zero(counts[start : start + size]):
            used.add(start // per_block)
        pace += size
        if pace >= CHUNK:
            pace = 0
            await asyncio.sleep(0)
    return used


async def last_used(left: Counts, right: Counts, stop: int) -> int:
    """The last index below `stop` at which either is not 0; 0 if there is none."""
    while stop > 0:
        start = max(0, stop - CHUNK)
        if not (is_zero(left[start:stop]) and is_zero(right[start:stop])):
            return next(index for index in range(stop - 1, start - 1, -1) if left[index] or right[index])
        stop = start
        await asyncio.sleep(0)
    return 0


_ZEROES = bytes(8 * CHUNK)


def is_zero(counts: Counts) -> bool:
    """Of at most CHUNK."""
    return counts.tobytes() == _ZEROES[: counts.nbytes]
