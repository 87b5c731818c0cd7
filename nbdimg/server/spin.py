"""Fewer wake-ups at low queue depth.

A client with one request in flight answers within tens of microseconds; putting the loop to sleep and waking it costs
more than the request. So for a short window after a request the loop polls instead of sleeping: a callback that
schedules itself makes every poll return at once, and all connections stay served. Between two polls the processor is
offered to others: the kernel may have woken the client on this very one, where it would wait for the next clock tick.

The window adapts, as the kernel's halt polling does: requests that come within it keep it open, silence that outlasts
it halves it down to none, a short sleep opens it again. With one processor it would take the time from the client: off.
"""

from __future__ import annotations

import asyncio
import os
from time import perf_counter

WINDOW_MAX_S = 200e-6
"""The longest poll behind a request; a wake-up costs 20 to 100 µs."""

WINDOW_MIN_S = 12e-6
"""Below this a window catches nothing."""


class Spinner:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._is_enabled = len(os.sched_getaffinity(0)) > 1
        self._window_s = WINDOW_MAX_S
        self.touched_s = 0.0
        """When requests last came."""
        self._is_spinning = False

    def touch(self) -> None:
        """Requests have just arrived."""
        now = perf_counter()
        if self._window_s < WINDOW_MAX_S and now - self.touched_s < WINDOW_MAX_S:
            self._window_s = WINDOW_MAX_S
        self.touched_s = now
        if self._is_enabled and not self._is_spinning and self._window_s >= WINDOW_MIN_S:
            self._is_spinning = True
            self._loop.call_soon(self._spin)

    def _spin(self) -> None:
        if perf_counter() - self.touched_s < self._window_s:
            os.sched_yield()
            self._loop.call_soon(self._spin)
            return
        self._is_spinning = False
        self._window_s /= 2
