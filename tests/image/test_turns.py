"""Long work on resident tables leaves the loop its turns."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from nbdimg.image import turns
from nbdimg.image.image import Image
from nbdimg.image.turns import Turns
from nbdimg.storage.memory import MemoryFile
from tests.support.fakedriver import TABLE_SIZE, FakeDriver

TABLES = 40
SIZE = TABLES * TABLE_SIZE


@pytest.fixture
def _no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece of work is as long as a turn may be."""
    monkeypatch.setattr(turns, "FIRST_S", 0.0)
    monkeypatch.setattr(turns, "TURN_S", 0.0)


def resident_image() -> Image:
    driver = FakeDriver(MemoryFile(bytes(SIZE)), [n * 512 for n in range(SIZE // 512)], can_unmap=True)
    driver.resident = set(range(TABLES))
    return Image(driver, writable=True)


async def turns_during(work: Awaitable[object]) -> int:
    """How often the loop came by while it was under way."""
    count = 0

    async def beside() -> None:
        nonlocal count
        while True:
            await asyncio.sleep(0)
            count += 1

    task = asyncio.create_task(beside())
    await work
    task.cancel()
    return count


WORK: dict[str, Callable[[Image], Awaitable[object]]] = {
    "trim": lambda image: image.trim(0, SIZE),
    "zero": lambda image: image.zero(0, SIZE, may_unmap=True, is_fast_only=False),
    "map": lambda image: image.map(0, SIZE, 1024),
    "read": lambda image: image.read(0, memoryview(bytearray(SIZE))),
}


@pytest.mark.usefixtures("_no_time")
@pytest.mark.parametrize("kind", WORK)
def test_long_work_that_waits_for_nothing_leaves_the_loop_its_turns(kind: str) -> None:
    assert asyncio.run(turns_during(WORK[kind](resident_image()))) >= TABLES - 1


def test_short_work_goes_through_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "FIRST_S", 3600.0)
    assert asyncio.run(turns_during(WORK["trim"](resident_image()))) <= 1


@pytest.mark.usefixtures("_no_time")
def test_of_many_long_operations_one_goes_on_in_each_turn_and_none_is_left_behind() -> None:
    async def main() -> tuple[str, int]:
        shared, done = Turns(), []

        async def operation(name: str) -> None:
            pace = shared.pace()
            for _ in range(3):
                await pace.step()
                done.append(name)

        turn_count = await turns_during(asyncio.gather(*(operation(name) for name in "abc")))
        return "".join(done), turn_count

    done, turn_count = asyncio.run(main())
    assert done == "abc" * 3
    assert turn_count >= len(done)
