"""The flush gate: group commit (F1), the failure that stays (F2), flushes that cost nothing (F3)."""

from __future__ import annotations

import asyncio
import errno
import os
from itertools import pairwise

import pytest

from nbdimg.errors import ImageFailed
from nbdimg.image.flush import FlushGate
from nbdimg.image.wakes import WAKES_PER_ROUND
from nbdimg.storage.ordering import UnwrittenError


class Barrier:
    """A barrier that runs until the test lets it end, and counts."""

    def __init__(self) -> None:
        self.started = 0
        self.ended = 0
        self.failure: Exception | None = None
        self._release: asyncio.Future[None] | None = None

    async def __call__(self) -> None:
        assert self._release is None, "two barriers run at once"
        self.started += 1
        self._release = asyncio.get_running_loop().create_future()
        await self._release
        self._release = None
        if self.failure is not None:
            raise self.failure
        self.ended += 1

    def finish(self) -> None:
        assert self._release is not None, "no barrier runs"
        self._release.set_result(None)

    def fail(self, number: int) -> None:
        self.failure = OSError(number, os.strerror(number))
        self.finish()


def made() -> tuple[Barrier, FlushGate]:
    barrier = Barrier()
    return barrier, FlushGate("disk.img", barrier)


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_flush_at_open_costs_a_barrier_and_then_none() -> None:
    """F3: an earlier server's writes may still be in the page cache."""

    async def main() -> None:
        barrier, gate = made()
        assert not gate.is_clean
        first = asyncio.create_task(gate.flush())
        await settle()
        assert not first.done()
        barrier.finish()
        await first
        assert gate.is_clean
        await gate.flush()
        await gate.flush()
        assert barrier.started == 1
        gate.changed()
        assert not gate.is_clean

    asyncio.run(main())


def test_flushes_that_arrive_together_share_one_barrier() -> None:
    async def main() -> None:
        barrier, gate = made()
        flushes = [asyncio.create_task(gate.flush()) for _ in range(100)]
        await settle()
        barrier.finish()
        await asyncio.gather(*flushes)
        assert barrier.started == 1

    asyncio.run(main())


def test_hundred_flushes_during_a_running_barrier_cost_one_more() -> None:
    async def main() -> None:
        barrier, gate = made()
        first = asyncio.create_task(gate.flush())
        await settle()
        assert barrier.started == 1
        later = []
        for _ in range(99):
            gate.changed()
            later.append(asyncio.create_task(gate.flush()))
            await asyncio.sleep(0)
        barrier.finish()
        await settle()
        assert first.done()
        assert not any(flush.done() for flush in later)
        barrier.finish()
        await asyncio.gather(first, *later)
        assert barrier.started == barrier.ended == 2
        assert gate.is_clean

    asyncio.run(main())


def test_thousand_flushes_that_end_together_go_on_some_in_each_round() -> None:
    async def main() -> None:
        barrier, gate = made()
        flushes = [asyncio.create_task(gate.flush()) for _ in range(1000)]
        await settle()
        barrier.finish()
        counts = [0]
        for _ in range(100):
            await asyncio.sleep(0)
            counts.append(sum(each.done() for each in flushes))
        assert counts[-1] == 1000
        assert max(after - before for before, after in pairwise(counts)) <= WAKES_PER_ROUND
        assert barrier.started == 1

    asyncio.run(main())


def test_flush_is_not_covered_by_a_barrier_that_began_before_the_change() -> None:
    """F1: a change during a barrier needs the next one."""

    async def main() -> None:
        barrier, gate = made()
        first = asyncio.create_task(gate.flush())
        await settle()
        gate.changed()
        barrier.finish()
        await first
        assert not gate.is_clean
        second = asyncio.create_task(gate.flush())
        await settle()
        assert not second.done()
        barrier.finish()
        await second
        assert barrier.started == 2

    asyncio.run(main())


def test_flush_asked_for_during_a_barrier_waits_for_the_next_even_without_a_change() -> None:
    """F1: the running barrier began before the call."""

    async def main() -> None:
        barrier, gate = made()
        flushes = [asyncio.create_task(gate.flush())]
        await settle()
        flushes.append(asyncio.create_task(gate.flush()))
        await settle()
        barrier.finish()
        await settle()
        assert not flushes[1].done()
        barrier.finish()
        await asyncio.gather(*flushes)

    asyncio.run(main())


def test_failed_barrier_fails_all_waiters_and_everything_later() -> None:
    """F2, with the sentence that the client reads."""

    async def main() -> None:
        barrier, gate = made()
        gate.check()
        running = [asyncio.create_task(gate.flush()) for _ in range(3)]
        await settle()
        waiting = [asyncio.create_task(gate.flush()) for _ in range(3)]
        await settle()
        barrier.fail(errno.EIO)
        for outcome in await asyncio.gather(*running, *waiting, return_exceptions=True):
            assert isinstance(outcome, ImageFailed)
            assert "a flush failed (Input/output error)" in str(outcome)
        assert barrier.started == 1
        barrier.failure = None
        assert not gate.is_clean
        gate.changed()
        for _ in range(3):
            with pytest.raises(ImageFailed):
                await gate.flush()
            with pytest.raises(ImageFailed):
                gate.check()
        assert barrier.started == 1

    asyncio.run(main())


def test_failed_barrier_on_an_image_clean_before_poisons_it_too() -> None:
    async def main() -> None:
        barrier, gate = made()
        first = asyncio.create_task(gate.flush())
        await settle()
        barrier.finish()
        await first
        gate.changed()
        second = asyncio.create_task(gate.flush())
        await settle()
        barrier.fail(errno.ENOSPC)
        with pytest.raises(ImageFailed, match="No space left on device"):
            await second
        assert not gate.is_clean

    asyncio.run(main())


def test_failed_barrier_with_nothing_new_to_cover_poisons_the_gate() -> None:
    """The first barrier has made everything durable; the one queued behind it fails all the same."""

    async def main() -> None:
        barrier, gate = made()
        first = asyncio.create_task(gate.flush())
        await settle()
        second = asyncio.create_task(gate.flush())
        await settle()
        barrier.finish()
        await first
        await settle()
        barrier.fail(errno.EIO)
        with pytest.raises(ImageFailed):
            await second
        assert not gate.is_clean

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "is_poison"),
    [
        (UnwrittenError(errno.ENOSPC, "No space left on device"), False),
        (UnwrittenError(errno.EDQUOT, "Disk quota exceeded"), False),
        (UnwrittenError(errno.EFBIG, "File too large"), False),
        (UnwrittenError(errno.EIO, "Input/output error"), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
    ],
    ids=["write, no space", "write, quota", "write, file too large", "write, other error", "barrier, no space"],
)
def test_plan_that_found_no_space_for_a_write_alone_is_tried_again(error: OSError, is_poison: bool) -> None:
    """F2."""

    async def main() -> None:
        barrier, gate = made()
        barrier.failure = error
        first = asyncio.create_task(gate.flush())
        await settle()
        barrier.finish()
        with pytest.raises(ImageFailed if is_poison else UnwrittenError):
            await first
        assert not gate.is_clean
        assert (gate.failure is not None) == is_poison
        if not is_poison:
            barrier.failure = None
            again = asyncio.create_task(gate.flush())
            await settle()
            barrier.finish()
            await again
            assert gate.is_clean

    asyncio.run(main())


def test_close_fails_flushes_that_come_too_late_and_keeps_an_earlier_reason() -> None:
    async def main() -> None:
        barrier, gate = made()
        gate.close()
        with pytest.raises(ImageFailed, match="it was closed before it was flushed"):
            await gate.flush()
        assert gate.failure is None, "an image that is read and closed has not failed"
        gate.failure = "the first reason"
        gate.close()
        assert gate.failure == "the first reason"
        assert barrier.started == 0

    asyncio.run(main())


def test_close_behind_the_last_flush_leaves_nothing_to_fail() -> None:
    async def main() -> None:
        barrier, gate = made()
        first = asyncio.create_task(gate.flush())
        await settle()
        barrier.finish()
        await first
        gate.close()
        await gate.flush()
        assert gate.failure is None

    asyncio.run(main())


def test_flush_that_is_cancelled_leaves_the_barrier_to_the_others() -> None:
    async def main() -> None:
        barrier, gate = made()
        first, second = (asyncio.create_task(gate.flush()) for _ in range(2))
        await settle()
        first.cancel()
        await settle()
        barrier.finish()
        await second
        assert first.cancelled()
        assert gate.is_clean

    asyncio.run(main())


def test_unexpected_exception_in_a_barrier_leaves_the_gate_dirty() -> None:
    async def main() -> None:
        barrier, gate = made()
        flush = asyncio.create_task(gate.flush())
        await settle()
        barrier.failure = ZeroDivisionError()
        barrier.finish()
        with pytest.raises(ZeroDivisionError):
            await flush
        assert not gate.is_clean

    asyncio.run(main())
