"""The harness finds what it is there to find: toy formats with one fault each, and findings planted in sound ones."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import gc
import os
import random
import weakref
from collections.abc import Sequence

import pytest

from nbdimg.export.export import Status, Work
from nbdimg.wire.constants import Command
from nbdimg.wire.messages import Request
from tests.crash.scenarios import RAW
from tests.crash.workloads import three_clients
from tests.support.crash import (
    ALIEN,
    CLOSED,
    CORRUPT,
    LOST,
    RACE,
    SECTOR,
    SIZE,
    STUCK,
    Built,
    Client,
    CrashState,
    Explorer,
    RecordingFile,
    Report,
    Scenario,
    Target,
    Trace,
    Verifier,
    record,
    requests,
    run_now,
    written,
)
from tests.support.crash.explore import Observation
from tests.support.crash.toys import (
    DISK_SIZE,
    TABLE_SIZE,
    TOY_SIZE,
    Fault,
    Toy,
    check_toy,
    open_journal,
    open_toy,
    original,
)

SEED = 1


def toy(fault: Fault) -> Scenario:
    async def open_it(files: Sequence[RecordingFile]) -> Target:
        return await open_toy(files[0], fault)

    def build(rng: random.Random) -> Built:
        return Built([bytes(TABLE_SIZE)], original(TOY_SIZE))

    return Scenario(f"toy {fault.name}", build, open_it, three_clients, check_toy)


def journal(fault: Fault) -> Scenario:
    async def open_it(files: Sequence[RecordingFile]) -> Target:
        return await open_journal(files[0], fault)

    def build(rng: random.Random) -> Built:
        disk = original(DISK_SIZE)
        return Built([bytes(SECTOR + DISK_SIZE) + disk], disk)

    return Scenario(f"journal {fault.name}", build, open_it, three_clients)


def explored(scenario: Scenario, trace: Trace, *, cap: int = 8, going_on_every: int = 0) -> Report:
    report = Report(scenario.name)
    explorer = Explorer(Verifier(scenario, SEED, going_on_every=going_on_every), report, cap=cap)
    asyncio.run(explorer.explore(trace, SEED))
    return report


def test_sound_copy_on_write_survives_every_crash() -> None:
    report = run_now(toy(Fault.NONE), seed=SEED, states=1000)
    assert report.states >= 1000
    assert report.torn > 100
    assert not report.violation_count, f"{report}"


@pytest.mark.parametrize(
    ("fault", "kinds"),
    [(Fault.NO_ORDER, {CORRUPT, LOST, ALIEN}), (Fault.EARLY_REUSE, {ALIEN}), (Fault.NO_FLUSH, {LOST, STUCK})],
    ids=["no_order", "early_reuse", "no_flush"],
)
def test_copy_on_write_with_a_fault_is_found(fault: Fault, kinds: set[str]) -> None:
    report = run_now(toy(fault), seed=SEED, states=600)
    assert kinds <= set(report.violations), f"{report}"


def test_sound_copy_on_write_without_barriers_is_found_out_in_number() -> None:
    report = run_now(toy(Fault.NONE), seed=SEED, states=1000, without_barriers=True)
    assert report.violations[LOST] > 100, f"{report}"
    assert report.violations[CORRUPT] > 10, f"{report}"


def test_sound_recovery_survives_a_crash_of_its_own() -> None:
    report = run_now(journal(Fault.NONE), seed=SEED, states=400)
    assert report.nested > 100
    assert not report.violation_count, f"{report}"


def test_recovery_that_is_lost_when_it_crashes_is_found_by_the_nested_states_alone() -> None:
    scenario = journal(Fault.EAGER_CLEAR)
    assert run_now(scenario, seed=SEED, states=400).violations[LOST] > 10
    assert not run_now(scenario, seed=SEED, states=400, nested_cap=0).violation_count


def test_explorer_lets_the_files_of_a_recovery_go() -> None:
    scenario = journal(Fault.NONE)
    verify = Verifier(scenario, SEED, going_on_every=0)
    files: list[weakref.ref[RecordingFile]] = []

    async def watched(state: CrashState) -> Observation:
        seen = await verify(state)
        assert seen.recovery is not None
        files.extend(weakref.ref(file) for file in seen.recovery.files)
        return seen

    explorer = Explorer(watched, Report(scenario.name), nested_cap=0, states_max=50)
    asyncio.run(explorer.explore(asyncio.run(record(scenario, SEED)), SEED))
    gc.collect()
    assert len(files) > 20
    assert not any(file() for file in files)


async def complain(state: CrashState) -> list[str]:
    return ["always"]


def test_checker_that_always_complains_makes_every_state_corrupt() -> None:
    trace = asyncio.run(record(RAW, SEED))
    report = explored(dataclasses.replace(RAW, check=complain), trace)
    assert report.violations[CORRUPT] == report.distinct > 100


class Planted:
    """A target that reads sector `index` as `data`, and is otherwise `inner`."""

    def __init__(self, inner: Target, index: int, data: bytes, size: int) -> None:
        self._inner = inner
        self._index = index
        self._data = data
        self.size = size

    def submit(self, request: Request) -> Work[Status | None] | None:
        return self._inner.submit(request)

    async def read(self, offset: int, length: int) -> bytes:
        content = await self._inner.read(offset, length)
        start = self._index * SECTOR - offset
        return content[:start] + self._data + content[start + SECTOR :]

    async def close(self) -> None:
        await self._inner.close()


def planted(index: int, data: bytes, cut: int = 0) -> Report:
    """A sound raw run, whose states then read wrong at one sector, or are too short."""
    trace = asyncio.run(record(RAW, SEED))

    async def open_it(files: Sequence[RecordingFile]) -> Target:
        inner = await RAW.open(files)
        return Planted(inner, index, data, inner.size - cut)

    return explored(dataclasses.replace(RAW, open=open_it), trace, cap=4)


def test_sector_of_another_place_is_alien() -> None:
    report = planted(5, written(6, 0))
    assert report.violations[ALIEN] == report.states > 100


def test_sector_half_old_and_half_new_is_alien() -> None:
    report = planted(9, (written(9, 0)[:256] + written(9, 1)[256:]))
    assert report.violations[ALIEN] == report.states > 100


def test_disk_of_another_size_is_found() -> None:
    report = planted(9, written(9, 0), cut=SECTOR)
    assert report.violations[SIZE] == report.states > 100


def test_image_that_does_not_open_is_found_whatever_it_raises() -> None:
    trace = asyncio.run(record(RAW, SEED))

    async def open_it(files: Sequence[RecordingFile]) -> Target:
        raise ZeroDivisionError

    report = explored(dataclasses.replace(RAW, open=open_it), trace, cap=4)
    assert report.violations[CLOSED] == report.distinct > 100


class Reckless(Toy):
    """Takes an error of its barrier for a thing that passes."""

    async def _flush(self) -> None:
        try:
            await super()._flush()
        except OSError:
            await self._file.fdatasync()


def test_flush_tried_again_after_an_error_is_found() -> None:
    async def open_it(files: Sequence[RecordingFile]) -> Target:
        return Reckless(files[0], [0] * 128, Fault.NONE)

    faulty = dataclasses.replace(toy(Fault.NONE), failing_syncs=frozenset((2,)))
    trace = asyncio.run(record(dataclasses.replace(faulty, open=open_it), SEED))
    assert explored(faulty, trace).violations[LOST] > 10


def test_operations_in_flight_on_the_same_bytes_are_found() -> None:
    async def workload(client: Client, rng: random.Random) -> None:
        file = client.trace.files[0]
        await asyncio.gather(file.pwrite(0, b"a" * 1024), file.pwrite(512, b"b" * 1024))

    trace = asyncio.run(record(dataclasses.replace(RAW, workload=workload), SEED))
    assert explored(RAW, trace).violations[RACE] == 1


def test_image_that_the_workload_leaves_is_closed_not_the_one_it_began_with() -> None:
    async def workload(client: Client, rng: random.Random) -> None:
        await client.target.close()
        client.target = await open_toy(client.trace.files[0], Fault.NONE)
        await client.write(0, client.pattern(0, SECTOR))

    trace = asyncio.run(record(dataclasses.replace(toy(Fault.NONE), workload=workload), SEED))
    assert any(trace.files[0].content[:TABLE_SIZE])


def test_change_of_a_file_that_is_not_recorded_is_refused() -> None:
    async def workload(client: Client, rng: random.Random) -> None:
        client.trace.files[0].content[0] ^= 1

    with pytest.raises(AssertionError):
        asyncio.run(record(dataclasses.replace(RAW, workload=workload), SEED))


def test_image_that_takes_no_more_writes_is_found() -> None:
    trace = asyncio.run(record(RAW, SEED))

    class Full(Planted):
        def submit(self, request: Request) -> Work[Status | None] | None:
            if request.command == Command.WRITE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().submit(request)

    async def open_it(files: Sequence[RecordingFile]) -> Target:
        inner = await RAW.open(files)
        return Full(inner, 0, bytes(files[0].content[:SECTOR]), inner.size)

    report = explored(dataclasses.replace(RAW, open=open_it), trace, cap=4, going_on_every=10)
    assert report.violations[STUCK] == report.distinct // 10 > 10


def test_resize_and_step_between_requests_reach_model_and_checker() -> None:
    """A raw disk grown by hand: the size is old or new until it is durable, and the checker knows of the step."""
    begun, done = set[int](), set[int]()

    async def workload(client: Client, rng: random.Random) -> None:
        file, size = client.trace.files[0], client.size

        async def grow() -> None:
            await file.truncate(size + 4096)
            await file.fdatasync()

        await requests(client, rng, 3, length_max=4096)
        await client.resize(size + 4096, grow)
        await client.step("note", file.fdatasync)

    async def check(state: CrashState) -> list[str]:
        begun.add(len(state.expected.steps_begun))
        done.add(len(state.expected.steps_done))
        return [] if len(state.files[0]) in state.expected.sizes else ["size"]

    scenario = dataclasses.replace(RAW, workload=workload, check=check)
    trace = asyncio.run(record(scenario, SEED))
    report = explored(scenario, trace, cap=100)
    assert not report.violation_count, f"{report}"
    assert begun == done == {0, 1}


def test_seed_gives_the_same_trace_and_report_again() -> None:
    first, second = (run_now(RAW, seed=7, states=300) for _ in range(2))
    assert dataclasses.replace(first, elapsed_s=0) == dataclasses.replace(second, elapsed_s=0)
    other = run_now(RAW, seed=8, states=300)
    assert other.operation_count != first.operation_count or other.torn != first.torn
