"""A raw image under three clients, crashed everywhere."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools

import pytest

from tests.crash.__main__ import main
from tests.crash.scenarios import RAW
from tests.support.crash import LOST, record, run_now
from tests.support.crash.trace import Kind

SEED = 20240607
STATES = 2000


def test_raw_keeps_what_was_flushed_in_every_crash_state() -> None:
    report = run_now(RAW, seed=SEED, states=STATES)
    assert report.states == STATES
    assert report.distinct > STATES // 2
    assert report.torn > STATES // 10
    assert report.pending_max > 8
    assert not report.violation_count, f"{report}"


def test_raw_without_barriers_loses_flushed_sectors() -> None:
    report = run_now(RAW, seed=SEED, states=STATES // 2, without_barriers=True)
    assert report.violations[LOST] > 100, f"{report}"


def test_raw_run_has_requests_in_flight_together_and_never_changes_the_files_size() -> None:
    trace = asyncio.run(record(RAW, SEED))
    pairs = list(itertools.pairwise(trace.operations))
    assert sum(second.started < first.ended for first, second in pairs) > 10
    assert sum(second.started > first.ended for first, second in pairs) > 10
    assert {operation.kind for operation in trace.operations} == {Kind.DATA}


@pytest.mark.parametrize("number", range(3))
def test_raw_after_a_failed_barrier_keeps_what_earlier_flushes_covered(number: int) -> None:
    faulty = dataclasses.replace(RAW, failing_syncs=frozenset((number,)))
    report = run_now(faulty, seed=SEED, states=300)
    assert not report.violation_count, f"{report}"


def test_raw_with_failed_writes_keeps_what_was_flushed() -> None:
    faulty = dataclasses.replace(RAW, failing_writes=frozenset((2, 3, 7)))
    report = run_now(faulty, seed=SEED, states=300)
    assert not report.violation_count, f"{report}"


def test_campaign_prints_its_table_and_fails_with_its_control(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--format", "raw", "--states", "100", "--seed", f"{SEED}"]) == 0
    assert "| raw |" in capsys.readouterr().out
    assert main(["--format", "raw", "--states", "400", "--seed", f"{SEED}", "--without-barriers"]) == 1
    assert "flushed sector lost" in capsys.readouterr().out
