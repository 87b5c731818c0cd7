"""Many who wait for one thing, and go on some in each round of the loop.

Eight thousand flushes of a crowd end with one barrier, and as many requests may wait for one long change. What each
does next takes tens of microseconds; at once, nobody else would be served for a good part of a second.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable

from nbdimg.storage.perloop import PerLoop

WAKES_PER_ROUND = 64
"""They take some 1 to 2 ms."""


class Wakes:
    """Of one loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._left = WAKES_PER_ROUND
        self._is_scheduled = False

    def wake(self, futures: Iterable[asyncio.Future[None]]) -> None:
        """Give them their result, in this order and that of the calls; they may be cancelled meanwhile."""
        self._waiting.extend(futures)
        self._wake_some()

    def _wake_some(self) -> None:
        while self._waiting and self._left:
            future = self._waiting.popleft()
            if not future.done():
                self._left -= 1
                future.set_result(None)
        if not self._is_scheduled and self._left < WAKES_PER_ROUND:
            self._is_scheduled = True
            self._loop.call_soon(self._begin_round)

    def _begin_round(self) -> None:
        self._is_scheduled = False
        self._left = WAKES_PER_ROUND
        self._wake_some()


_wakes = PerLoop(lambda: Wakes(asyncio.get_running_loop()))


def wakes() -> Wakes:
    """The running loop's."""
    return _wakes.get()
