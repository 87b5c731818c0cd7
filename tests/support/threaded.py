"""A server in a thread of this process, and what it logs."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from nbdimg.server.loop import run_loop

T = TypeVar("T")
R = TypeVar("R")
WAIT_S = 30.0


class ThreadedServer(logging.Handler, Generic[T]):
    """Enters `serving` on a loop of its own and leaves it at the end; `entered` is what that gave.

    `lines` is what was logged meanwhile.
    """

    entered: T

    def __init__(self, serving: AbstractAsyncContextManager[T]) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        self._serving = serving
        self._logger = logging.getLogger("nbdimg")
        self._ready: Future[tuple[T, asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            run_loop(self._main())
        except BaseException as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error)

    async def _main(self) -> None:
        async with self._serving as entered:
            stop = asyncio.Event()
            self._ready.set_result((entered, asyncio.get_running_loop(), stop))
            await stop.wait()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> Self:
        self._logger.addHandler(self)
        self._thread.start()
        try:
            self.entered, self._loop, self._stop = self._ready.result(WAIT_S)
        except BaseException:
            self._logger.removeHandler(self)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(WAIT_S)
        self._logger.removeHandler(self)
        assert not self._thread.is_alive(), "the server does not stop"

    def start(self, work: Coroutine[Any, Any, R]) -> Future[R]:
        """Run it on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def ask(self, work: Coroutine[Any, Any, R]) -> R:
        """What it returns or raises."""
        return self.start(work).result(WAIT_S)

    def now(self, function: Callable[..., R], *arguments: object) -> R:
        """What it returns in the server's own thread."""

        async def called() -> R:
            return function(*arguments)

        return self.ask(called())
