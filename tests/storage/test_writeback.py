"""When the device is told of what was written, before a flush."""

from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path

import pytest

from nbdimg.storage import system
from nbdimg.storage.posix import PosixFile
from nbdimg.storage.writeback import RUN_SIZE, UNFLUSHED_MAX, WriteBack
from nbdimg.units import KiB, MiB

MIBS = memoryview(bytes(1 * MiB))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(offset, length) of each call."""
    calls: list[tuple[int, int]] = []

    def begin(descriptor: int, offset: int, length: int) -> bool:
        calls.append((offset, length))
        return True

    monkeypatch.setattr(system, "begin_write_back", begin)
    return calls


async def settled(write_back: WriteBack) -> None:
    await write_back.close()
    await asyncio.sleep(0)


async def written(write_back: WriteBack, ranges: list[tuple[int, int]]) -> None:
    for offset, length in ranges:
        write_back.wrote(offset, length)
        await settled(write_back)


def mebibytes(start: int, count: int) -> list[tuple[int, int]]:
    return [((start + index) * MiB, 1 * MiB) for index in range(count)]


def test_who_never_flushes_has_nothing_begun(told: list[tuple[int, int]]) -> None:
    asyncio.run(written(WriteBack(0), mebibytes(0, 600)))
    assert told == []


def test_runs_behind_a_flush_are_told_of_once_each(told: list[tuple[int, int]]) -> None:
    async def main() -> None:
        write_back = WriteBack(0)
        write_back.flushed()
        await written(write_back, mebibytes(0, 10))
        await written(write_back, mebibytes(100, 5))

    asyncio.run(main())
    assert told == [(0, RUN_SIZE), (RUN_SIZE, RUN_SIZE), (100 * MiB, RUN_SIZE)]


def test_scattered_writes_are_left_to_the_kernel(told: list[tuple[int, int]]) -> None:
    offsets = random.Random(1).sample(range(0, 1 << 30, 4 * KiB), 5000)

    async def main() -> None:
        write_back = WriteBack(0)
        write_back.flushed()
        await written(write_back, [(offset, 4 * KiB) for offset in offsets])

    asyncio.run(main())
    assert told == []


def test_without_another_flush_it_ends(told: list[tuple[int, int]]) -> None:
    async def main() -> None:
        write_back = WriteBack(0)
        write_back.flushed()
        await written(write_back, mebibytes(0, 2 * UNFLUSHED_MAX // MiB))
        assert sum(length for _, length in told) == UNFLUSHED_MAX
        write_back.flushed()
        await written(write_back, mebibytes(10_000, 4))

    asyncio.run(main())
    assert told[-1] == (10_000 * MiB, RUN_SIZE)


def test_what_was_flushed_is_not_told_of(told: list[tuple[int, int]]) -> None:
    async def main() -> None:
        write_back = WriteBack(0)
        await written(write_back, mebibytes(0, 1000))
        write_back.flushed()
        await written(write_back, mebibytes(1000, 8))

    asyncio.run(main())
    assert told == [(1000 * MiB, RUN_SIZE), (1000 * MiB + RUN_SIZE, RUN_SIZE)]


def test_one_call_at_a_time_takes_all_that_came_meanwhile_and_closing_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held, calls = threading.Event(), []

    def begin(descriptor: int, offset: int, length: int) -> bool:
        calls.append((offset, length))
        return held.wait(10)

    monkeypatch.setattr(system, "begin_write_back", begin)

    async def main() -> None:
        write_back = WriteBack(0)
        write_back.flushed()
        for offset, length in mebibytes(0, 20):
            write_back.wrote(offset, length)
        closing = asyncio.create_task(write_back.close())
        await asyncio.sleep(0.01)
        assert not closing.done()
        held.set()
        await closing
        await written(write_back, mebibytes(20, 1))

    asyncio.run(main())
    assert calls == [(0, RUN_SIZE), (RUN_SIZE, 21 * MiB - RUN_SIZE)]


def test_where_it_cannot_be_done_it_is_not_tried_again_before_a_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def begin(descriptor: int, offset: int, length: int) -> bool:
        calls.append(offset)
        return False

    monkeypatch.setattr(system, "begin_write_back", begin)

    async def main() -> None:
        write_back = WriteBack(0)
        write_back.flushed()
        await written(write_back, mebibytes(0, 40))

    asyncio.run(main())
    assert calls == [0]


@pytest.mark.parametrize("is_inline", [True, False])
def test_a_file_tells_of_its_writes_and_syncs(tmp_path: Path, told: list[tuple[int, int]], is_inline: bool) -> None:
    path = tmp_path / "file"
    path.touch()

    async def main() -> None:
        file = PosixFile(path, writable=True)
        await file.fdatasync()
        for offset, _ in mebibytes(0, 5):
            if not is_inline or not file.try_pwrite(offset, MIBS):
                await file.pwrite(offset, MIBS)
        await file.close()

    asyncio.run(main())
    assert told == [(0, RUN_SIZE)]


def test_the_call_itself(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        file.write(MIBS)
        file.flush()
        assert system.begin_write_back(file.fileno(), 0, 1 * MiB)
    assert not system.begin_write_back(-1, 0, 1 * MiB)
