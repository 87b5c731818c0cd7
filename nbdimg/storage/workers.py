"""Worker threads for calls that may block or take long, with one wake-up of the loop for all that finished meanwhile.

`asyncio`'s executor wakes the loop once per call; under a queue of cold reads that is the larger part of the cost.
Calls that compute have threads of their own, one for each processor: more would only take it from each other, and a
read of the disk need not wait behind them.

Storage that hangs, a network file system without its server, keeps every thread that calls it. Those do not count while
others wait: there are as many threads more, so that images elsewhere are still read, written and flushed.

A process may be allowed fewer threads than these (a container's limit, `ulimit -u`): then those that there are do the
work, and where there is none the loop does it itself, which holds everybody up and fails nobody. While jobs wait for a
thread, one more is tried now and then.

Calls that the kernel does one after another anyway, the writes of one file, are given as a `Series`: few threads do
them without a pause between two. Many threads would wait for each other, and be woken for each. Where other jobs
wait for a thread they come in between now and then, or as many series as there are threads would keep them from all
others.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from time import monotonic
from typing import Any, NamedTuple, TypeVar

from nbdimg.storage.perloop import PerLoop

T = TypeVar("T")

THREADS_MAX = 16
"""Calls in the kernel at once: what a disk queue and the small hand-over cost make worthwhile on few cores."""

STUCK_S = 0.5
"""A call that takes so long does not count among them while others wait."""

SERIES_S = 0.02
"""After so long a series lets others have its thread. Were it after each job, all reads that wait, thousands perhaps,
would go ahead of each write.
"""

STUCK_MAX = 256
"""Threads that may be replaced; requests of one connection are in flight in no larger number."""

logger = logging.getLogger("nbdimg")

_Outcome = tuple["asyncio.Future[Any]", Any, BaseException | None]


class Series:
    """Jobs of which at most `running_max` run at a time, taken in the order in which they were given. Where more than
    one may run, one that was taken may begin behind the next.
    """

    __slots__ = ("_lock", "_running_count", "_running_max", "_waiting")

    def __init__(self, running_max: int) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[_Job] = deque()
        self._running_max = running_max
        self._running_count = 0

    def admit(self, job: _Job) -> bool:
        """Whether `job` is to be begun; else it will follow."""
        with self._lock:
            if self._running_count == self._running_max:
                self._waiting.append(job)
                return False
            self._running_count += 1
            return True

    def following(self) -> _Job | None:
        """What to do behind a job that is done."""
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._running_count -= 1
            return None


class _Job(NamedTuple):
    future: asyncio.Future[Any]
    function: Callable[..., Any]
    args: tuple[Any, ...]
    series: Series | None


class Workers:
    """Threads of one event loop; started as they are needed, they end with the process or at `close`.

    Args: threads_max: that work at once. stuck_max: of threads that are stuck, how many are replaced.
    """

    def __init__(self, threads_max: int = THREADS_MAX, stuck_max: int = STUCK_MAX) -> None:
        self._loop = asyncio.get_running_loop()
        self._threads_max = threads_max
        self._stuck_max = stuck_max
        self._threads: list[threading.Thread] = []
        self._begun_s: list[float | None] = []
        """When each thread began with what it does; None: it waits."""
        self._relief: asyncio.TimerHandle | None = None
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._active_count = 0
        """Jobs that have a thread or wait for one; not those that follow in a series."""
        self._finished: deque[tuple[_Outcome, bool]] = deque()
        """With whether another of the series took its place among the active ones."""
        self._is_notified = False
        self._has_told_limit = False

    def run(self, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Call `function(*args)` on a worker; its result or exception arrives in the future."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._begin(_Job(future, function, args, None))
        return future

    def run_next(self, series: Series, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """As `run`, behind what was given to `series` before."""
        future: asyncio.Future[T] = self._loop.create_future()
        job = _Job(future, function, args, series)
        if series.admit(job):
            self._begin(job)
        return future

    def _begin(self, job: _Job) -> None:
        self._active_count += 1
        if self._active_count > len(self._threads):
            is_started = len(self._threads) < self._threads_max and self._try_start_thread()
            if not is_started and self._relief is None:
                self._relief = self._loop.call_later(STUCK_S, self._relieve)
        if self._threads:
            self._jobs.put(job)
        else:
            self._do(job)
            self._loop.call_soon(self._deliver)

    def _try_start_thread(self) -> bool:
        """False: the system, or the limit of a container or a service, has not one more. `_relieve` tries again."""
        number = len(self._threads)
        thread = threading.Thread(target=self._work, args=(number,), name=f"nbdimg-io-{number}", daemon=True)
        self._begun_s.append(None)
        try:
            thread.start()
        except RuntimeError:
            self._begun_s.pop()
            if not self._has_told_limit:
                self._has_told_limit = True
                logger.warning("no more threads are allowed: %d do the work of %d", number, self._threads_max)
            return False
        self._threads.append(thread)
        return True

    def _relieve(self) -> None:
        """Replace threads that are stuck, and start those that could not be, as far as jobs wait for one."""
        self._relief = None
        waiting_count = self._active_count - len(self._threads)
        if waiting_count <= 0:
            return
        begun_before_s = monotonic() - STUCK_S
        stuck_count = sum(begun_s is not None and begun_s <= begun_before_s for begun_s in self._begun_s)
        missing_count = self._threads_max + min(stuck_count, self._stuck_max) - len(self._threads)
        for _ in range(min(missing_count, waiting_count)):
            if not self._try_start_thread():
                break
        self._relief = self._loop.call_later(STUCK_S, self._relieve)

    def close(self) -> None:
        """End the threads once the jobs that were given are done; what follows in a series may be left out."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._begun_s.clear()
        if self._relief is not None:
            self._relief.cancel()

    def _work(self, number: int) -> None:
        begun_s = self._begun_s
        while (job := self._jobs.get()) is not None:
            now_s = monotonic()
            until_s = now_s + SERIES_S
            while job is not None:
                begun_s[number] = now_s
                job = self._do(job)
                if not self._is_notified:
                    self._is_notified = True
                    self._loop.call_soon_threadsafe(self._deliver)
                now_s = monotonic()
                if job is not None and now_s >= until_s and not self._jobs.empty():
                    self._jobs.put(job)
                    job = None
            begun_s[number] = None

    def _do(self, job: _Job) -> _Job | None:
        """Returns what follows in the job's series."""
        outcome = _outcome(job)
        following = None if job.series is None else job.series.following()
        self._finished.append((outcome, following is not None))
        return following

    def _deliver(self) -> None:
        self._is_notified = False
        finished = self._finished
        while finished:
            (future, result, error), goes_on = finished.popleft()
            self._active_count -= not goes_on
            if future.cancelled():
                continue
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)


def _outcome(job: _Job) -> _Outcome:
    """In a function of its own: an error holds the frame that caught it, and that frame must not hold the error."""
    try:
        return job.future, job.function(*job.args), None
    except BaseException as error:
        return job.future, None, error


class _Pools(NamedTuple):
    blocking: Workers
    computing: Workers


def _close(pools: _Pools) -> None:
    for pool in pools:
        pool.close()


_pools = PerLoop(lambda: _Pools(Workers(), Workers(len(os.sched_getaffinity(0)), stuck_max=0)), _close)


def workers() -> Workers:
    """The running loop's workers for calls that may block."""
    return _pools.get().blocking


def computers() -> Workers:
    """The running loop's workers for calls that compute, and release the interpreter's lock meanwhile."""
    return _pools.get().computing
