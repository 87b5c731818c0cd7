"""Handshakes take turns: however many clients ask for one at once, those that have theirs behind them are served.

A step of a handshake costs up to a few milliseconds (the server's signature in TLS, a list of many exports), and a
flood of connections would have the loop do one for each of them before it comes back to anybody else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from time import perf_counter

TURN_S = 0.001
"""Seconds of a turn of the loop for handshakes: what a neighbour waits, beside the step that goes beyond it."""


class Reception:
    """Of one loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_scheduled = False

    def line_up(self, step: Callable[[], None]) -> None:
        """Call `step`, which raises nothing, behind those that are waiting."""
        self._waiting.append(step)
        self._schedule()

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._receive)

    def _receive(self) -> None:
        self._is_scheduled = False
        until = perf_counter() + TURN_S
        while self._waiting:
            self._waiting.popleft()()
            if perf_counter() >= until:
                break
        if self._waiting:
            self._schedule()
