"""The flush gate: group commit, and a failure that stays.

At most one barrier runs and at most one waits behind it; a flush joins the waiting one. So a flush is always covered
by a barrier that began after it was asked for, and a hundred clients that flush at once cost two.

    (F1) A flush returns only after a barrier that started later than every change completed before the call.
    (F2) A barrier that failed poisons the gate: the kernel may have marked the lost pages clean, and a second fsync
         would succeed over lost data. Every later `flush` and `check` raises until the image is opened anew.
         A plan that ran out of space before its barrier is different: nothing is in doubt, that flush alone fails,
         and the next one tries again.
    (F3) A clean image flushes for nothing. At open it counts as dirty: an earlier server's writes may still be in
         the page cache, and a client that came back relies on its flush to cover them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import perf_counter

from nbdimg.errors import ImageFailed
from nbdimg.histogram import Histogram
from nbdimg.image.wakes import wakes
from nbdimg.storage.ordering import OUT_OF_SPACE, UnwrittenError


class FlushGate:
    """Args: path: for messages. barrier: makes all completed changes durable, or raises OSError."""

    def __init__(self, path: str, barrier: Callable[[], Awaitable[None]]) -> None:
        self._path = path
        self._barrier = barrier
        self._change_count = 1
        self._durable_count = 0
        self._running: asyncio.Task[None] | None = None
        self._waiting: asyncio.Task[None] | None = None
        self._crowd: list[asyncio.Future[None]] = []
        """Who waits for `_waiting` to end."""
        self.failure: str | None = None
        self._is_closed = False
        self.times = Histogram()
        """Of barriers, also those that failed."""

    def check(self) -> None:
        """Raises: ImageFailed: a barrier has failed (F2)."""
        if self.failure is not None:
            raise ImageFailed(self._path, self.failure)
        if self._is_closed and not self.is_clean:
            raise ImageFailed(self._path, "it was closed before it was flushed")

    @property
    def is_clean(self) -> bool:
        """Whether a flush would have nothing to do; True says that none has failed."""
        return self._durable_count == self._change_count and self.failure is None

    def changed(self) -> None:
        """A change is complete and not yet durable."""
        self._change_count += 1

    def close(self) -> None:
        """The files are closed: a flush that comes too late has nothing to write to. No failure of the image's."""
        self._is_closed = True

    async def flush(self) -> None:
        """Everything that `changed` told of before this call is durable on return.

        Raises: ImageFailed: this barrier, or an earlier one, failed. OSError: there is no space for metadata.
        """
        self.check()
        if self.is_clean:
            return
        loop = asyncio.get_running_loop()
        if self._waiting is None:
            crowd = self._crowd = []
            self._waiting = loop.create_task(self._commit(self._running))
            self._waiting.add_done_callback(lambda _: wakes().wake(crowd))
        commit = self._waiting
        is_over = loop.create_future()
        self._crowd.append(is_over)
        await is_over
        commit.result()

    async def _commit(self, previous: asyncio.Task[None] | None) -> None:
        if previous is not None:
            await asyncio.wait((previous,))
        self._running, self._waiting = self._waiting, None
        self.check()
        covered = self._change_count
        started_s = perf_counter()
        try:
            await self._barrier()
        except OSError as error:
            if isinstance(error, UnwrittenError) and error.errno in OUT_OF_SPACE:
                raise
            reason = error.strerror or str(error)
            self.failure = f"a flush failed ({reason}): what was written since the last one may be lost; open it anew"
            raise ImageFailed(self._path, self.failure) from None
        finally:
            self.times.add(perf_counter() - started_s)
        self._durable_count = covered
