"""The VHDX writer, crashed everywhere; and faults put into it, all of which must be found."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from nbdimg.formats.vhdx import journal
from nbdimg.formats.vhdx.driver import VhdxDriver
from nbdimg.formats.vhdx.journal import Journal
from nbdimg.formats.vhdx.space import Space
from nbdimg.storage.ordering import Plan, Stage, Write
from tests.crash.vhdx import SCENARIOS, Judge
from tests.support.crash import CLOSED, LOST, Report, Trace, record, run_now

SEED = 20250119
STATES = 420
"""For each scenario: with twelve of them 5,040."""

BY_NAME = {each.name.removeprefix("vhdx, "): each for each in SCENARIOS}


@pytest.mark.parametrize("name", BY_NAME)
def test_vhdx_survives_every_crash(name: str) -> None:
    scenario = BY_NAME[name]
    judge = scenario.check
    assert isinstance(judge, Judge)
    asked = judge.asked
    report = run_now(scenario, seed=SEED, states=STATES, nested_cap=0)
    assert not report.violation_count, f"{report}"
    assert report.states == STATES
    assert report.recoveries > STATES // 2
    assert judge.asked > asked or name in ("child", "several entries for a flush", "resize, child in use")


def test_campaign_has_five_thousand_states() -> None:
    assert len(SCENARIOS) * STATES >= 5000


@pytest.mark.parametrize("name", ["child in use", "space handed on", "log wraps"])
def test_replay_survives_every_crash_of_its_own(name: str) -> None:
    report = run_now(BY_NAME[name], seed=SEED, states=30, nested_cap=3)
    assert not report.violation_count, f"{report}"
    assert report.nested > 100


# What the scenarios are named for


def log_writes(trace: Trace) -> list[tuple[int, int]]:
    """(position in the ring, length) of what was written to the log."""
    start, stop = 1 << 20, 2 << 20
    found = [(each.offset - start, len(each.data)) for each in trace.operations if start <= each.offset < stop]
    return [each for each in found if each[1]]


def test_log_wraps_in_the_middle_of_entries() -> None:
    writes = log_writes(asyncio.run(record(BY_NAME["log wraps"], SEED)))
    assert ((1 << 20) - 4096, 4096) in writes
    assert writes.count((0, 4096)) > 1


def test_flush_of_a_child_takes_several_entries() -> None:
    trace = asyncio.run(record(BY_NAME["several entries for a flush"], SEED))
    lengths = [length for _, length in log_writes(trace)]
    assert lengths[0] == 4096
    assert set(lengths[1:]) == {8192}
    assert len(trace.syncs) > 2 * len(trace.flushes)


def test_sessions_end_and_begin() -> None:
    trace = asyncio.run(record(BY_NAME["sessions"], SEED))
    lengths = [length for _, length in log_writes(trace)]
    assert lengths.count(4096) == 3


# Faults of the storage


@pytest.mark.parametrize("number", [1, 4, 7])
def test_vhdx_after_a_failed_barrier_keeps_what_earlier_flushes_covered(number: int) -> None:
    faulty = dataclasses.replace(BY_NAME["child in use"], failing_syncs=frozenset((number,)))
    report = run_now(faulty, seed=SEED, states=40, nested_cap=0)
    assert not report.violation_count, f"{report}"


@pytest.mark.parametrize("numbers", [(0,), (1,), (5, 9), (12, 13, 20), tuple(range(16, 200, 5))])
@pytest.mark.parametrize("name", ["several entries for a flush", "space handed on", "child in use"])
def test_vhdx_out_of_space_keeps_what_was_flushed(name: str, numbers: tuple[int, ...]) -> None:
    faulty = dataclasses.replace(BY_NAME[name], failing_writes=frozenset(numbers))
    report = run_now(faulty, seed=SEED, states=40, nested_cap=0)
    assert not report.violation_count, f"{report}"


# Controls


def faulty(name: str, *, states: int = 120, **options: bool) -> Report:
    return run_now(BY_NAME[name], seed=SEED, states=states, nested_cap=0, **options)


def test_vhdx_without_barriers_fails() -> None:
    counts = {
        name: faulty(name, without_barriers=True).violation_count for name in ("space handed on", "child", "sessions")
    }
    assert min(counts.values()) > 20, counts


def test_pages_in_place_before_the_log_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """V1."""
    real = Journal.stages

    def stages(self: Journal, pages: list[Write], flushed_offset: int, last_offset: int) -> list[Stage]:
        found = real(self, pages, flushed_offset, last_offset)
        for index in range(0, len(found), 2):
            found[index], found[index + 1] = found[index + 1], found[index]
        return found

    monkeypatch.setattr(Journal, "stages", stages)
    report = faulty("child", states=250)
    assert report.violations[CLOSED] > 0, f"{report}"


def test_log_declared_empty_before_all_is_in_place_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """V2."""
    real = Journal.end

    async def end(self: Journal) -> None:
        file = self._file

        class WithoutFirstBarrier:
            count = 0

            def __getattr__(self, name: str) -> object:
                return getattr(file, name)

            async def fdatasync(self) -> None:
                self.count += 1
                if self.count > 1:
                    await file.fdatasync()

        self._file = WithoutFirstBarrier()  # type: ignore[assignment]
        await real(self)
        self._file = file

    monkeypatch.setattr(Journal, "end", end)
    report = faulty("sessions", states=300)
    assert report.violations[LOST] > 0, f"{report}"


def test_header_that_names_a_log_before_it_has_an_entry_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first entry is only a promise then."""
    monkeypatch.setattr(journal, "run", lambda plan: asyncio.sleep(0))
    report = faulty("dynamic")
    assert report.violations[CLOSED] > 0, f"{report}"


def test_block_in_the_log_before_its_data_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """V5."""
    real = VhdxDriver.flush_plan
    monkeypatch.setattr(VhdxDriver, "flush_plan", lambda self: Plan(real(self).stages[1:] or real(self).stages))
    report = faulty("child", states=250)
    assert report.violation_count > 0, f"{report}"


def test_space_used_again_at_once_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """B2."""
    monkeypatch.setattr(Space, "free", lambda self, offset, length: self._free.append((offset, offset + length)))
    report = faulty("space handed on")
    assert report.violation_count > 10, f"{report}"


def test_blocks_in_an_entry_before_their_bitmaps_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Journal.stages

    def stages(self: Journal, pages: list[Write], flushed_offset: int, last_offset: int) -> list[Stage]:
        ascending = sorted(pages, key=lambda write: write.offset)
        return real(self, ascending, flushed_offset, last_offset)

    monkeypatch.setattr(Journal, "stages", stages)
    report = faulty("several entries for a flush", states=250)
    assert report.violations[CLOSED] > 0, f"{report}"
