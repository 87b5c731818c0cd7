"""How often the loop came round while something else worked."""

from __future__ import annotations

import asyncio
from types import TracebackType


class Turns:
    """Counts the turns that a neighbour gets while the block of an `async with` runs."""

    count = 0

    async def __aenter__(self) -> Turns:
        self._neighbour = asyncio.create_task(self._take())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._neighbour.cancel()

    async def _take(self) -> None:
        while True:
            self.count += 1
            await asyncio.sleep(0)
