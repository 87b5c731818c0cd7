"""Worker threads: results, errors, cancellation, limits, and one wake-up of the loop for many results."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from nbdimg.storage.workers import STUCK_S, THREADS_MAX, Series, Workers, computers, workers

WAIT_S = 30.0


def test_run_delivers_results_and_arguments() -> None:
    async def main() -> list[int]:
        pool = Workers()
        return await asyncio.gather(*(pool.run(pow, n, 2) for n in range(200)))

    assert asyncio.run(main()) == [n * n for n in range(200)]


def test_run_delivers_exceptions_and_the_worker_lives_on() -> None:
    def fail() -> None:
        raise OSError(5, "Input/output error")

    async def main() -> int:
        pool = Workers(threads_max=1)
        with pytest.raises(OSError, match="Input/output error"):
            await pool.run(fail)
        return await pool.run(len, b"abc")

    assert asyncio.run(main()) == 3


def test_run_uses_at_most_so_many_threads_and_others_wait() -> None:
    async def main() -> None:
        pool = Workers(threads_max=3)
        release = threading.Event()
        running = threading.Semaphore(0)
        peak = 0
        now = 0
        lock = threading.Lock()

        def job() -> None:
            nonlocal peak, now
            with lock:
                now += 1
                peak = max(peak, now)
            running.release()
            release.wait(10)
            with lock:
                now -= 1

        futures = [pool.run(job) for _ in range(10)]
        for _ in range(3):
            assert await asyncio.to_thread(running.acquire, timeout=10)
        assert not running.acquire(blocking=False)
        release.set()
        await asyncio.gather(*futures)
        assert peak == 3

    asyncio.run(main())


@pytest.mark.parametrize("allowed_count", [0, 1, 2])
def test_run_where_few_threads_are_allowed_does_all_with_those_that_there_are(
    allowed_count: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a container with a limit of processes: no job fails, none waits for a thread that never started."""
    started: list[threading.Thread] = []
    real_start = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if len(started) == allowed_count:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real_start(thread)

    def fail() -> None:
        raise OSError(5, "Input/output error")

    async def main() -> None:
        pool = Workers(threads_max=4)
        monkeypatch.setattr(threading.Thread, "start", start)
        for _ in range(3):
            jobs = [pool.run(pow, n, 2) for n in range(20)]
            assert await asyncio.wait_for(asyncio.gather(*jobs), 10) == [n * n for n in range(20)]
        with pytest.raises(OSError, match="Input/output error"):
            await pool.run(fail)
        pool.close()

    asyncio.run(main())
    assert len(started) == allowed_count
    assert [each.message for each in caplog.records] == [
        f"no more threads are allowed: {allowed_count} do the work of 4"
    ]


@pytest.mark.parametrize(("stuck_max", "done_count"), [(0, 0), (1, 0), (8, 20)])
def test_jobs_pass_those_that_are_stuck(stuck_max: int, done_count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two threads both are stuck, and another three jobs too; the rest is done by threads that replace them."""
    stuck_s = 0.05
    monkeypatch.setattr("nbdimg.storage.workers.STUCK_S", stuck_s)

    async def main() -> int:
        pool = Workers(threads_max=2, stuck_max=stuck_max)
        release = threading.Event()
        stuck = [pool.run(release.wait, WAIT_S) for _ in range(5)]
        rest = [pool.run(pow, n, 2) for n in range(20)]
        await asyncio.wait(rest, timeout=WAIT_S if done_count else 6 * stuck_s)
        count = sum(each.done() for each in rest)
        release.set()
        await asyncio.gather(*stuck, *rest)
        pool.close()
        return count

    assert asyncio.run(main()) == done_count


def test_jobs_behind_one_that_hangs_are_done_when_threads_are_allowed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    left = 1
    start = threading.Thread.start

    def scarce(thread: threading.Thread) -> None:
        nonlocal left
        if not left:
            raise RuntimeError("can't start new thread")
        left -= 1
        start(thread)

    async def main() -> list[int]:
        nonlocal left
        pool = Workers(threads_max=4)
        release = threading.Event()
        monkeypatch.setattr(threading.Thread, "start", scarce)
        stuck = pool.run(release.wait, WAIT_S)
        futures = [pool.run(pow, number, 2) for number in range(20)]
        await asyncio.sleep(STUCK_S * 1.5)
        assert not any(future.done() for future in futures)
        left = 3
        found = await asyncio.wait_for(asyncio.gather(*futures), WAIT_S)
        release.set()
        await stuck
        pool.close()
        return found

    assert asyncio.run(main()) == [number**2 for number in range(20)]


def test_run_next_does_the_jobs_of_a_series_one_at_a_time_in_order_on_one_thread() -> None:
    async def main() -> tuple[list[int], set[int]]:
        pool = Workers(threads_max=4)
        series = Series(1)
        lock = threading.Lock()
        done: list[int] = []
        threads: set[int] = set()

        def job(number: int) -> int:
            assert lock.acquire(blocking=False), "another job of the series runs"
            time.sleep(0.002)
            done.append(number)
            threads.add(threading.get_ident())
            lock.release()
            return number

        results = await asyncio.gather(*(pool.run_next(series, job, number) for number in range(20)))
        assert results == done
        assert await pool.run_next(series, job, 20) == 20
        pool.close()
        return done, threads

    done, threads = asyncio.run(main())
    assert done == list(range(21))
    assert len(threads) == 1


def test_series_has_as_many_jobs_running_as_it_may_and_no_more() -> None:
    async def main() -> int:
        pool = Workers(threads_max=8)
        series, meeting, lock = Series(3), threading.Barrier(3), threading.Lock()
        now = peak = 0

        def job() -> None:
            nonlocal now, peak
            with lock:
                now += 1
                peak = max(peak, now)
            meeting.wait(WAIT_S)
            with lock:
                now -= 1

        await asyncio.wait_for(asyncio.gather(*(pool.run_next(series, job) for _ in range(30))), WAIT_S)
        pool.close()
        return peak

    assert asyncio.run(main()) == 3


def test_run_next_goes_on_behind_a_job_that_fails_and_delivers_each_result_as_it_comes() -> None:
    def fail() -> None:
        raise OSError(5, "Input/output error")

    async def main() -> None:
        pool = Workers(threads_max=1)
        series, release = Series(1), threading.Event()
        failing = pool.run_next(series, fail)
        following = pool.run_next(series, len, b"abc")
        held = pool.run_next(series, release.wait, WAIT_S)
        with pytest.raises(OSError, match="Input/output error"):
            await asyncio.wait_for(failing, WAIT_S)
        assert await asyncio.wait_for(following, WAIT_S) == 3
        assert not held.done()
        release.set()
        assert await asyncio.wait_for(held, WAIT_S)
        pool.close()

    asyncio.run(main())


def test_series_that_hangs_keeps_one_thread_and_stops_nobody_else() -> None:
    async def main() -> int:
        pool = Workers(threads_max=2, stuck_max=0)
        hanging, release = Series(1), threading.Event()
        stuck = [pool.run_next(hanging, release.wait, WAIT_S) for _ in range(20)]
        other = Series(1)
        await asyncio.wait_for(asyncio.gather(*(pool.run_next(other, pow, 2, 3) for _ in range(20))), WAIT_S)
        await asyncio.wait_for(pool.run(pow, 2, 3), WAIT_S)
        count = len(pool._threads)
        release.set()
        await asyncio.gather(*stuck)
        pool.close()
        return count

    assert asyncio.run(main()) == 2


@pytest.mark.parametrize(("series_s", "order"), [(0.0, "x12aybzc"), (WAIT_S, "abcxyz12")])
def test_jobs_that_wait_for_a_thread_come_in_between_those_of_a_series_when_its_time_is_over(
    series_s: float, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdimg.storage.workers.SERIES_S", series_s)

    async def main() -> str:
        pool = Workers(threads_max=1)
        one, other, release = Series(1), Series(1), threading.Event()
        done: list[str] = []
        jobs: list[asyncio.Future[Any]] = [pool.run_next(one, release.wait, WAIT_S)]
        jobs += [pool.run_next(one, done.append, each) for each in "abc"]
        jobs += [pool.run_next(other, done.append, each) for each in "xyz"]
        jobs += [pool.run(done.append, each) for each in "12"]
        release.set()
        await asyncio.wait_for(asyncio.gather(*jobs), WAIT_S)
        pool.close()
        return "".join(done)

    assert asyncio.run(main()) == order


def test_run_next_with_no_thread_allowed_does_the_series_on_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> list[int]:
        pool = Workers()
        series = Series(1)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        return await asyncio.wait_for(asyncio.gather(*(pool.run_next(series, pow, n, 2) for n in range(5))), WAIT_S)

    assert asyncio.run(main()) == [0, 1, 4, 9, 16]


def test_run_on_an_idle_pool_starts_one_thread_only() -> None:
    async def main() -> int:
        pool = Workers()
        before = threading.active_count()
        for _ in range(20):
            await pool.run(int)
        return threading.active_count() - before

    assert asyncio.run(main()) == 1


def test_run_cancelled_future_is_ignored_when_its_result_comes() -> None:
    async def main() -> int:
        pool = Workers(threads_max=1)
        gate = threading.Event()
        first = pool.run(gate.wait, 10)
        second = pool.run(int, 7)
        first.cancel()
        gate.set()
        return await second

    assert asyncio.run(main()) == 7


def test_results_that_are_ready_together_wake_the_loop_once() -> None:
    async def main() -> int:
        loop = asyncio.get_running_loop()
        pool = Workers(threads_max=1)
        wakeups = 0
        real = loop.call_soon_threadsafe

        def counted(callback: object, *args: object) -> object:
            nonlocal wakeups
            wakeups += 1
            return real(callback, *args)  # type: ignore[arg-type]

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign, assignment]
        started, release, finished = threading.Event(), threading.Event(), threading.Event()

        def first() -> None:
            started.set()
            release.wait(10)

        futures: list[asyncio.Future[Any]] = [pool.run(first)]
        futures += [pool.run(int) for _ in range(50)]
        futures.append(pool.run(finished.set))
        assert started.wait(10)
        release.set()
        assert finished.wait(10)
        await asyncio.gather(*futures)
        return wakeups

    assert asyncio.run(main()) <= 2


def test_close_ends_the_threads_after_the_jobs_given() -> None:
    async def main() -> None:
        pool = Workers(threads_max=2)
        done: list[int] = []
        for n in range(20):
            pool.run(done.append, n)
        pool.close()
        assert sorted(done) == list(range(20))

    before = threading.active_count()
    asyncio.run(main())
    assert threading.active_count() == before


@pytest.mark.parametrize("pool", [workers, computers])
def test_workers_is_one_for_a_loop_and_another_for_the_next(pool: Callable[[], Workers]) -> None:
    async def main() -> Workers:
        assert pool() is pool()
        await pool().run(int)
        return pool()

    assert asyncio.run(main()) is not asyncio.run(main())


def test_blocking_calls_do_not_wait_behind_calls_that_compute_and_those_are_as_many_as_processors() -> None:
    async def main() -> None:
        begun, may_end = threading.Semaphore(0), threading.Event()

        def compute() -> None:
            begun.release()
            may_end.wait()

        processor_count = len(os.sched_getaffinity(0))
        computing = [computers().run(compute) for _ in range(processor_count + THREADS_MAX)]
        assert await workers().run(lambda: "done") == "done"
        for _ in range(processor_count):
            assert await workers().run(lambda: begun.acquire(timeout=10))
        assert not await workers().run(lambda: begun.acquire(timeout=0.05))
        may_end.set()
        await asyncio.gather(*computing)

    asyncio.run(main())


def test_workers_of_a_closed_loop_are_ended_when_the_next_loop_asks() -> None:
    async def main() -> None:
        await asyncio.gather(*(pool().run(int) for _ in range(8) for pool in (workers, computers)))

    asyncio.run(main())
    asyncio.run(main())
    count = threading.active_count()
    for _ in range(5):
        asyncio.run(main())
    assert threading.active_count() <= count + 16
