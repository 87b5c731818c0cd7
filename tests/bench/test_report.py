"""Ratios, medians, verdicts and exit statuses, on literal figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import report
from bench.__main__ import main
from bench.report import Verdict
from bench.results import CpuCost, FunctionCost, Measurement, NeighbourSample, Profile, Run, Sample, SyscallCost

CELL = "4k-randread-16"
SUBJECT = [90_000.0, 120_000.0, 100_000.0]
URING = [50_000.0, 40_000.0, 44_000.0]
NBDKIT = [60_000.0, 30_000.0, 50_000.0]


def measured(iops: float, p99_us: float = 200.0) -> Measurement:
    return Measurement(iops=iops, bytes_per_s=iops * 4096, p50_us=100.0, p99_us=p99_us, max_us=900.0, request_count=10)


def samples(server: str, rates: list[float], cell: str = CELL) -> list[Sample]:
    return [Sample(cell, server, index, measured(rate)) for index, rate in enumerate(rates)]


def run_of(*parts: list[Sample]) -> Run:
    return Run(
        command="python -m bench",
        date="2026-01-02 03:04 UTC",
        subject="nbdimg",
        rounds=3,
        seconds=3.0,
        image_size=512 * 1024 * 1024,
        facts={"cores": "2"},
        servers={"nbdimg": "1.0", "qemu-nbd io_uring": "7.2", "nbdkit file": "1.32"},
        missing={},
        samples=[sample for part in parts for sample in part],
    )


def full_run() -> Run:
    return run_of(samples("nbdimg", SUBJECT), samples("qemu-nbd io_uring", URING), samples("nbdkit file", NBDKIT))


def beside(kind: str, p99_us: float, iops: float = 9_000.0, is_slow_disk: bool = True) -> NeighbourSample:
    return NeighbourSample(
        kind,
        "nbdimg",
        0,
        alone=measured(10_000.0),
        beside=measured(iops, p99_us),
        neighbour=measured(400.0, 100_000.0),
        disk_bytes=1 << 20,
        is_slow_disk=is_slow_disk,
    )


def test_summary_three_rounds_divides_median_by_best_peers_median() -> None:
    summary = report.summarize(full_run().samples, CELL, "nbdimg")
    assert summary.medians == {"nbdimg": 100_000.0, "qemu-nbd io_uring": 44_000.0, "nbdkit file": 50_000.0}
    assert summary.best_peer == "nbdkit file"
    assert summary.ratio == 2.0
    assert (summary.ratio_low, summary.ratio_high) == (1.5, 4.0)
    assert summary.verdict(1.5) is Verdict.PASS
    assert summary.verdict(2.0) is Verdict.PASS
    assert summary.verdict(2.01) is Verdict.FAIL


def test_summary_even_number_of_rounds_takes_mean_of_middle_two() -> None:
    run = run_of(samples("nbdimg", [10.0, 40.0, 20.0, 30.0]), samples("nbdkit file", [10.0, 10.0, 10.0, 10.0]))
    assert report.summarize(run.samples, CELL, "nbdimg").ratio == 2.5


def test_summary_slower_than_peer_is_marked_as_failure_in_both_outputs() -> None:
    run = run_of(samples("nbdimg", [40_000.0]), samples("nbdkit file", [50_000.0]))
    summary = report.summarize(run.samples, CELL, "nbdimg")
    assert summary.ratio == 0.8
    assert summary.verdict(1.0) is Verdict.FAIL
    assert report.throughput_table(run, 1.0).rows[0][-5:] == ["nbdkit file", "0.80", "0.80", "0.80", "FAIL"]
    assert "| 0.80 | 0.80 | 0.80 | FAIL |" in report.markdown(run, 1.0)
    assert report.problems(run, 1.0) == ["4k-randread-16: 0.80x nbdkit file, goal 1x"]


def test_summary_ignores_samples_of_other_cells() -> None:
    run = run_of(full_run().samples, samples("nbdkit file", [1e9, 1e9, 1e9], cell="1m-read-8"))
    assert report.summarize(run.samples, CELL, "nbdimg").ratio == 2.0


@pytest.mark.parametrize("server", ["nbdimg", "qemu-nbd io_uring"])
def test_summary_one_failed_round_is_not_judged_and_is_reported(server: str) -> None:
    run = full_run()
    run.samples = [
        replace(sample, measurement=None, error="I/O error 5")
        if (sample.server, sample.round_index) == (server, 1)
        else sample
        for sample in run.samples
    ]
    assert report.summarize(run.samples, CELL, "nbdimg").verdict(1.0) is Verdict.UNJUDGED
    assert report.problems(run, 1.0) == [f"4k-randread-16: not judged (failed: {server})"]
    assert report.failures(run) == [f"{server}, 4k-randread-16, round 2: I/O error 5"]
    assert f"* {server}, 4k-randread-16, round 2: I/O error 5" in report.markdown(run, 1.0)


@pytest.mark.parametrize(
    "part", [samples("nbdimg", SUBJECT), samples("nbdkit file", NBDKIT)], ids=["no peer", "no subject"]
)
def test_summary_without_subject_or_peer_is_not_judged(part: list[Sample]) -> None:
    run = run_of(part)
    assert report.summarize(run.samples, CELL, "nbdimg").ratio is None
    assert report.problems(run, 1.0) == ["4k-randread-16: not judged (no nbdimg or no peer)"]


def test_report_missing_server_is_named_with_its_reason() -> None:
    run = full_run()
    run.missing = {"qemu-nbd threads": "qemu-nbd is not installed"}
    table = report.throughput_table(run, 1.5)
    assert table.rows[0][table.columns.index("qemu-nbd threads")] == "missing"
    assert "* qemu-nbd threads: qemu-nbd is not installed" in report.markdown(run, 1.5)


def test_throughput_large_blocks_are_shown_in_megabytes() -> None:
    run = run_of(samples("nbdimg", [2000.0], cell="1m-read-8"), samples("nbdkit file", [1000.0], cell="1m-read-8"))
    assert report.throughput_table(run, 1.5).rows[0][1:5] == ["MB/s", "2097", "-", "1049"]


@pytest.mark.parametrize(("p99_us", "verdict"), [(10_000.0, Verdict.PASS), (10_000.1, Verdict.FAIL)])
def test_fairness_p99_limit_is_ten_milliseconds(p99_us: float, verdict: Verdict) -> None:
    run = full_run()
    run.fairness = [beside("read 4 MiB x 16", p99_us)]
    summary = report.summarize_neighbour(run.fairness, "read 4 MiB x 16", "nbdimg")
    assert report.fairness_verdict(summary) is verdict
    assert bool(report.problems(run, 1.5)) is (verdict is Verdict.FAIL)


@pytest.mark.parametrize(
    ("p99_us", "iops", "is_slow_disk", "verdict"),
    [
        (400.0, 9_000.0, True, Verdict.PASS),
        (400.0, 5_000.0, True, Verdict.FAIL),
        (50_000.0, 9_000.0, True, Verdict.FAIL),
        (50_000.0, 200.0, False, Verdict.UNJUDGED),
    ],
    ids=["kept", "rate lost", "waits for misses", "fast disk"],
)
def test_cold_reader_that_waits_for_the_misses_fails(
    p99_us: float, iops: float, is_slow_disk: bool, verdict: Verdict
) -> None:
    run = full_run()
    run.cold = [beside("cold 4 KiB x 16", p99_us, iops, is_slow_disk)]
    summary = report.summarize_neighbour(run.cold, "cold 4 KiB x 16", "nbdimg")
    assert report.cold_verdict(summary) is verdict
    assert bool(report.problems(run, 1.5)) is (verdict is Verdict.FAIL)


def test_neighbour_rounds_give_median_p99_and_worst_maximum() -> None:
    rounds = [beside("k", p99_us) for p99_us in (300.0, 100.0, 200.0)]
    worst = replace(rounds[0], beside=replace(measured(9_000.0, 300.0), max_us=5_000.0))
    summary = report.summarize_neighbour([worst, *rounds[1:]], "k", "nbdimg")
    assert summary is not None
    assert (summary.beside.p99_us, summary.beside.max_us) == (200.0, 5_000.0)


def test_neighbour_failed_round_gives_no_summary_and_a_problem() -> None:
    run = full_run()
    run.cold = [beside("k", 100.0), NeighbourSample("k", "nbdimg", 1, None, None, None, error="gone")]
    assert report.summarize_neighbour(run.cold, "k", "nbdimg") is None
    assert report.problems(run, 1.5) == ["k: not judged"]
    assert report.failures(run) == ["nbdimg, k, round 2: gone"]


def test_check_of_nothing_measured_is_a_problem() -> None:
    assert report.problems(run_of(), 1.0) == ["nothing was measured that has a goal"]


def test_run_json_round_trip_keeps_everything() -> None:
    run = full_run()
    run.samples.append(Sample(CELL, "nbdimg", 3, None, "broken"))
    run.cold = [beside("cold", 1.0)]
    run.fairness = [NeighbourSample("read", "nbdimg", 0, None, None, None, error="gone")]
    run.profile = Profile(
        [CpuCost("nbdimg", 1.0, 2.0, 3.0, 0.5)],
        [SyscallCost("recvfrom", 0.1, 0.2)],
        [FunctionCost("f", 1, 2, 0.3)],
        ["n"],
    )
    assert Run.from_json(run.to_json()) == run


@pytest.mark.parametrize(("ratio", "status"), [("2.0", 0), ("2.01", 1)])
def test_check_of_recorded_run_exits_1_when_a_cell_is_below(tmp_path: Path, ratio: str, status: int) -> None:
    recorded = tmp_path / "results.json"
    recorded.write_text(full_run().to_json())
    assert main(["--from", str(recorded), "--check", ratio]) == status


def test_recorded_run_with_output_is_written_again(tmp_path: Path) -> None:
    recorded = tmp_path / "results.json"
    recorded.write_text(full_run().to_json())
    assert main(["--from", str(recorded), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "results.json").read_text() == recorded.read_text()
    assert "| 2.00 | 1.50 | 4.00 | pass |" in (tmp_path / "again" / "RESULTS.md").read_text()


def test_recorded_run_that_is_not_ours_exits_2(tmp_path: Path) -> None:
    recorded = tmp_path / "results.json"
    recorded.write_text("{}")
    assert main(["--from", str(recorded)]) == 2
