"""Long work on what is in memory, cut so that the loop's other work has its turn between the pieces.

A TRIM of 8 TiB is a million changes of resident tables, none of which waits for anything. Each operation goes on at
once for FIRST_S, which nearly all end within; then one of an image's operations goes on in each turn of the loop, for
TURN_S: a hundred of them hold up others no longer than one does.
"""

from __future__ import annotations

import asyncio
from time import perf_counter

FIRST_S = 0.000_1
"""Seconds; a connection may have 128 operations that begin in one turn."""

TURN_S = 0.001
"""Seconds, which is what a neighbour waits."""


class Turns:
    """Those of one image."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    def pace(self) -> Pace:
        """Of an operation that begins."""
        return Pace(self._lock)


class Pace:
    """Made by `Turns.pace`."""

    __slots__ = ("_lock", "_until")

    def __init__(self, lock: asyncio.Lock) -> None:
        self._lock = lock
        self._until = perf_counter() + FIRST_S

    async def step(self) -> None:
        """Between two pieces of work, where the operation's state is consistent."""
        if perf_counter() < self._until:
            return
        async with self._lock:
            await asyncio.sleep(0)
        self._until = perf_counter() + TURN_S
