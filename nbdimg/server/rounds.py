"""Connections take turns: however many have requests at once, a round of the loop ends soon, and others are served.

A round is from one poll of the loop to the next, and all that it does a client waits for whose request came meanwhile.
So a turn is bounded, and what turns of one round may take together, too; those that come then wait in line. One whose
turn has ended before its requests did goes on in line as well. What has just come goes ahead of those, one for one: a
client that asks for little need not wait until a crowd that asks for much has had a turn each.

What a turn leaves to tasks runs in later rounds, and is bounded by what the turns could start.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Protocol

ROUND_S = 0.001
"""Seconds of turns in one round."""

RENEWED_BELOW_S = ROUND_S / 2
"""A round of which less is left is renewed, for one more poll of the loop; with more left the loop may sleep."""

TURN_MIN_S = 0.000_25
"""Seconds of a turn, where a crowd would leave less to each: parting and coming back costs some 10 µs."""

CROWDED_REQUESTS = 32
"""Requests of a turn between two looks at the clock, where others wait: the quickest take 3 µs."""


class Loop(Protocol):
    """What is needed of asyncio's."""

    def call_soon(self, callback: Callable[[], object], /) -> object: ...


class Rounds:
    """Of one loop."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._arrivals: deque[Callable[[], None]] = deque()
        self._rest: deque[Callable[[], None]] = deque()
        self._is_scheduled = False
        self._took_arrival = False
        self.is_crowded = False
        """Whether others wait in line."""
        self.left_s = ROUND_S
        """Seconds that a turn which begins now may take; where nothing is left it waits in line. Whoever had one takes
        off what it took, and calls `renew` below RENEWED_BELOW_S.
        """

    def line_up(self, turn: Callable[[], None], *, has_come: bool = False) -> None:
        """Call `turn` when it has its turn. `has_come`: it is for bytes that have just come, not for what was left."""
        (self._arrivals if has_come else self._rest).append(turn)
        self.is_crowded = True
        self.renew()

    def renew(self) -> None:
        """Give turns their time again when the next round begins."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._give_turns)

    def _give_turns(self) -> None:
        """Once in a round: it has all its time again, for those in line first. Who lines up meanwhile has a turn in the
        next one, behind what the loop finds then.
        """
        self._is_scheduled = False
        now_s = perf_counter()
        end_s = now_s + ROUND_S
        try:
            for _ in range(len(self._arrivals) + len(self._rest)):
                turn = self._next()
                self.left_s = max((end_s - now_s) / (1 + len(self._arrivals) + len(self._rest)), TURN_MIN_S)
                turn()
                now_s = perf_counter()
                if now_s >= end_s:
                    break
        finally:
            self.left_s = end_s - now_s
            if self.is_crowded or self.left_s <= 0:
                self.renew()

    def _next(self) -> Callable[[], None]:
        self._took_arrival = bool(self._arrivals) and not (self._took_arrival and self._rest)
        turn = (self._arrivals if self._took_arrival else self._rest).popleft()
        self.is_crowded = bool(self._arrivals or self._rest)
        return turn
