"""Worker threads for calls that may block or take long, with one wake-up of the loop for all that finished meanwhile.

`asyncio`'s executor wakes the loop once per call; under a queue of cold reads that is the larger part of the cost.
Calls that compute have threads of their own, one for each processor: more would only take it from each other, and a
read of the disk need not wait behind them.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

THREADS_MAX = 16
"""Calls in the kernel at once: what a disk queue and the small hand-over cost make worthwhile on few cores."""

_Outcome = tuple["asyncio.Future[Any]", Any, BaseException | None]
_Job = tuple["asyncio.Future[Any]", Callable[..., Any], tuple[Any, ...]]


class Workers:
    """Threads of one event loop; started as they are needed, they end with the process or at `close`."""

    def __init__(self, threads_max: int = THREADS_MAX) -> None:
        self._loop = asyncio.get_running_loop()
        self._threads_max = threads_max
        self._threads: list[threading.Thread] = []
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._active_count = 0
        self._finished: deque[_Outcome] = deque()
        self._is_notified = False

    def run(self, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Call `function(*args)` on a worker; its result or exception arrives in the future."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._active_count += 1
        if self._active_count > len(self._threads) and len(self._threads) < self._threads_max:
            thread = threading.Thread(target=self._work, name=f"nbdimg-io-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._jobs.put((future, function, args))
        return future

    def close(self) -> None:
        """End the threads once the jobs that were given are done."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._finished.append(_outcome(*job))
            del job
            if not self._is_notified:
                self._is_notified = True
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_notified = False
        finished = self._finished
        while finished:
            future, result, error = finished.popleft()
            self._active_count -= 1
            if future.cancelled():
                continue
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)


def _outcome(future: asyncio.Future[Any], function: Callable[..., Any], args: tuple[Any, ...]) -> _Outcome:
    """In a function of its own, so that an idle thread holds no buffer of its last job."""
    try:
        return future, function(*args), None
    except BaseException as error:
        return future, None, error


class _Pools(NamedTuple):
    blocking: Workers
    computing: Workers


_pools: dict[asyncio.AbstractEventLoop, _Pools] = {}


def workers() -> Workers:
    """The running loop's workers for calls that may block."""
    return _running_pools().blocking


def computers() -> Workers:
    """The running loop's workers for calls that compute, and release the interpreter's lock meanwhile."""
    return _running_pools().computing


def _running_pools() -> _Pools:
    loop = asyncio.get_running_loop()
    found = _pools.get(loop)
    if found is None:
        for old in [old for old in _pools if old.is_closed()]:
            for pool in _pools.pop(old):
                pool.close()
        found = _pools[loop] = _Pools(Workers(), Workers(len(os.sched_getaffinity(0))))
    return found
