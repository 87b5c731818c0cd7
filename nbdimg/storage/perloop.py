"""What there is one of for each event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class PerLoop(Generic[T]):
    """Args: make: makes the running loop's. forget: is given that of a loop that has been closed."""

    def __init__(self, make: Callable[[], T], forget: Callable[[T], None] = lambda _: None) -> None:
        self._make = make
        self._forget = forget
        self._made: dict[asyncio.AbstractEventLoop, T] = {}

    def get(self) -> T:
        """The running loop's, made when it is first asked for."""
        loop = asyncio.get_running_loop()
        found = self._made.get(loop)
        if found is None:
            for old in [old for old in self._made if old.is_closed()]:
                self._forget(self._made.pop(old))
            found = self._made[loop] = self._make()
        return found
