"""Plans: what reaches the file before which barrier."""

from __future__ import annotations

import asyncio
import errno
from functools import partial

import pytest

from nbdimg.storage.file import Buffer
from nbdimg.storage.memory import MemoryFile
from nbdimg.storage.ordering import Plan, Stage, UnwrittenError, Write, merged, run


class RecordingFile(MemoryFile):
    """Notes the start and end of every write and barrier; each takes turns of the loop, later writes fewer."""

    def __init__(self, fail_at: int | None = None, fail_sync: int | None = None) -> None:
        super().__init__(bytes(4096))
        self.events: list[str] = []
        self._fail_at = fail_at
        self._fail_sync = fail_sync
        self._sync_count = 0
        self._turns = 256

    async def pwrite(self, offset: int, data: Buffer) -> None:
        self.events.append(f"begin {offset}")
        self._turns //= 4
        for _ in range(self._turns):
            await asyncio.sleep(0)
        if offset == self._fail_at:
            raise OSError(errno.EIO, "Input/output error")
        await super().pwrite(offset, data)
        self.events.append(f"end {offset}")

    async def fdatasync(self) -> None:
        self.events.append("sync")
        await asyncio.sleep(0)
        self._sync_count += 1
        if self._sync_count == self._fail_sync:
            raise OSError(errno.EIO, "Input/output error")
        self.events.append("synced")


def plan(file: MemoryFile, *offsets: tuple[int, ...]) -> Plan:
    """One write of one byte for each offset, a stage for each tuple."""
    stages = (Stage(tuple(Write(file, at, bytes([at % 251])) for at in stage), (file,)) for stage in offsets)
    return Plan(tuple(stages))


def test_run_puts_a_barrier_behind_each_stage() -> None:
    file = RecordingFile()
    asyncio.run(run(plan(file, (1, 2, 3), (10,), (20, 21))))
    barriers = [index for index, event in enumerate(file.events) if event == "synced"]
    assert len(barriers) == 3
    for stage, offsets in enumerate([(1, 2, 3), (10,), (20, 21)]):
        for offset in offsets:
            assert file.events.index(f"end {offset}") < barriers[stage]
            if stage:
                assert file.events.index(f"begin {offset}") > barriers[stage - 1]
    assert file.content[20] == 20


def test_run_writes_of_one_stage_are_under_way_together() -> None:
    file = RecordingFile()
    asyncio.run(run(plan(file, (1, 2, 3))))
    assert file.events[:3] == ["begin 1", "begin 2", "begin 3"]


def test_run_empty_stage_is_a_barrier_alone() -> None:
    file = RecordingFile()
    asyncio.run(run(plan(file, ())))
    assert file.events == ["sync", "synced"]


def test_run_plan_without_stages_does_nothing() -> None:
    file = RecordingFile()
    asyncio.run(run(plan(file)))
    assert file.events == []


def test_run_failed_write_stops_the_barrier_and_later_stages() -> None:
    file = RecordingFile(fail_at=2)
    with pytest.raises(UnwrittenError, match="Input/output error"):
        asyncio.run(run(plan(file, (1,), (2, 3), (10,))))
    assert file.events.count("synced") == 1
    assert "begin 10" not in file.events


def test_run_failed_barrier_stops_later_stages() -> None:
    file = RecordingFile(fail_sync=1)
    with pytest.raises(OSError, match="Input/output error") as caught:
        asyncio.run(run(plan(file, (1,), (2,))))
    assert not isinstance(caught.value, UnwrittenError), "what a failed barrier leaves is in doubt"
    assert "begin 2" not in file.events


def test_run_after_a_failed_write_nothing_of_its_stage_is_still_under_way() -> None:
    """Who learns of the failure may close the file: no write may come after."""
    file = RecordingFile(fail_at=3)

    async def main() -> list[str]:
        with pytest.raises(OSError, match="Input/output error"):
            await run(plan(file, (1, 2, 3)))
        at_failure = list(file.events)
        for _ in range(100):
            await asyncio.sleep(0)
        assert file.events == at_failure
        return at_failure

    assert "end 1" in asyncio.run(main())


def test_run_stage_of_two_files_puts_a_barrier_on_each() -> None:
    data, tables = RecordingFile(), RecordingFile()
    stages = (Stage((Write(tables, 5, b"t"),), (data, tables)), Stage((Write(data, 6, b"d"),), (data,)))
    asyncio.run(run(Plan(stages)))
    assert tables.events == ["begin 5", "end 5", "sync", "synced"]
    assert data.events == ["sync", "synced", "begin 6", "end 6", "sync", "synced"]


def test_run_failed_write_keeps_its_errno() -> None:
    class FullFile(RecordingFile):
        async def pwrite(self, offset: int, data: Buffer) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UnwrittenError) as caught:
        asyncio.run(run(plan(FullFile(), (1,))))
    assert caught.value.errno == errno.ENOSPC


def test_merged_joins_neighbours_of_one_file_and_sorts() -> None:
    one, other = MemoryFile(path="a"), MemoryFile(path="b")
    writes = [
        Write(one, 4, b"ef"),
        Write(other, 6, b"X"),
        Write(one, 0, b"ab"),
        Write(one, 2, b"cd"),
        Write(one, 7, b"z"),
    ]
    assert merged(writes) == (Write(one, 0, b"abcdef"), Write(one, 7, b"z"), Write(other, 6, b"X"))


def test_merged_keeps_files_apart_that_have_one_path() -> None:
    one, other = MemoryFile(path="a"), MemoryFile(path="a")
    assert merged([Write(one, 0, b"ab"), Write(other, 2, b"cd")]) == (Write(one, 0, b"ab"), Write(other, 2, b"cd"))


def test_merged_joins_neighbours_that_come_last() -> None:
    file = MemoryFile()
    writes = [Write(file, 9, b"x"), Write(file, 0, b"ab"), Write(file, 10, b"yz")]
    assert merged(writes) == (Write(file, 0, b"ab"), Write(file, 9, b"xyz"))


def test_run_tells_of_a_stage_only_behind_its_barrier() -> None:
    file = RecordingFile(fail_sync=2)
    stages = (Stage((Write(file, at, b"x"),), (file,), partial(file.events.append, f"done {at}")) for at in (1, 2))
    with pytest.raises(OSError, match="Input/output error"):
        asyncio.run(run(Plan(tuple(stages))))
    assert file.events == ["begin 1", "end 1", "sync", "synced", "done 1", "begin 2", "end 2", "sync"]


def test_merged_of_nothing_is_nothing() -> None:
    assert merged([]) == ()
