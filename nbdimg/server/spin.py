"""Fewer wake-ups at low queue depth.

A client with one request in flight answers within tens of microseconds; putting the loop to sleep and waking it may
cost more than the request. So for a short window after a request the loop polls instead of sleeping: a callback that
schedules itself makes every poll return at once, and all connections stay served. Between two polls the processor is
offered to others: the kernel may have woken the client on this very one, where it would wait for the next clock tick.

The window adapts, as the kernel's halt polling does: requests that come within it keep it open, silence that outlasts
it halves it down to none, a short sleep opens it again. With one processor it would take the time from the client: off.

Whether polling is the faster way at all depends on the machine: where a wake-up is cheap it is not, and where others
compute, or a quota is used up, a loop that polled waits for them, and one that slept is woken ahead of them. So now and
then the other way is tried for some requests, and the way in which they follow each other sooner is taken.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from time import perf_counter
from typing import Protocol

WINDOW_MAX_S = 200e-6
"""The longest poll behind a request; a wake-up costs 20 to 100 µs."""

WINDOW_MIN_S = 12e-6
"""Below this a window catches nothing."""

ROUND_COUNT = 256
"""Requests over which one way is judged."""

GAP_MAX_S = 0.05
"""A client that lets so long pass has paused by itself."""

TRIAL_INTERVAL_MIN_S, TRIAL_INTERVAL_MAX_S = 0.1, 3.2
"""How often the other way is tried; less and less often while it is not the better one."""

BETTER = 0.95
"""The share of the usual way's time in which the other one must do as much."""


class Loop(Protocol):
    """What a spinner needs of asyncio's."""

    def call_soon(self, callback: Callable[[], object], /) -> object: ...


class Spinner:
    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._is_enabled = len(os.sched_getaffinity(0)) > 1
        self._window_s = WINDOW_MAX_S
        self.touched_s = 0.0
        """When requests last came."""
        self._is_spinning = False
        self._polls = self._is_enabled
        self._is_trial = False
        """Whether the way that was not the better one so far has its turn."""
        self._usual_s = 0.0
        """For each request of the usual way's last round."""
        self._next_trial_s = 0.0
        self._interval_s = TRIAL_INTERVAL_MIN_S
        self._round_since_s = 0.0
        self._round_since_count = 0
        self.handled_count = 0
        """Requests that have come; whoever handles them adds to it."""

    def touch(self) -> None:
        """Requests have just arrived."""
        now = perf_counter()
        gap_s = now - self.touched_s
        self.touched_s = now
        if gap_s < WINDOW_MAX_S:
            self._window_s = WINDOW_MAX_S
        if self._is_enabled:
            count = self.handled_count - self._round_since_count
            round_s = now - self._round_since_s
            if gap_s >= GAP_MAX_S:
                self._begin_round(now)
            elif count >= ROUND_COUNT or (self._is_trial and round_s > ROUND_COUNT * self._usual_s):
                self._judge(now, round_s / max(count, 1))
                self._begin_round(now)
        if self._polls and not self._is_spinning and self._window_s >= WINDOW_MIN_S:
            self._is_spinning = True
            self._loop.call_soon(self._spin)

    def _begin_round(self, now: float) -> None:
        self._round_since_s = now
        self._round_since_count = self.handled_count

    def _judge(self, now: float, request_s: float) -> None:
        if not self._is_trial:
            self._usual_s = request_s
            if now >= self._next_trial_s:
                self._is_trial = True
                self._polls = not self._polls
            return
        self._is_trial = False
        if request_s < BETTER * self._usual_s:
            self._interval_s = TRIAL_INTERVAL_MIN_S
        else:
            self._polls = not self._polls
            self._interval_s = min(2 * self._interval_s, TRIAL_INTERVAL_MAX_S)
        self._next_trial_s = now + self._interval_s

    def _spin(self) -> None:
        if self._polls and perf_counter() - self.touched_s < self._window_s:
            os.sched_yield()
            self._loop.call_soon(self._spin)
            return
        self._is_spinning = False
        self._window_s /= 2
