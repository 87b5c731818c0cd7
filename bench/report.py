"""Medians, ratios and verdicts of a run, and its tables on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from statistics import median

from rich.console import Console
from rich.table import Table as RichTable

from bench.cells import CEILING_CELLS, MIB, Cell
from bench.results import Measurement, NeighbourSample, Profile, Run, Sample

FAIRNESS_P99_MAX_US = 10_000.0
"""The goal: 4 KiB p99 beside 4 MiB x 16 on another connection."""
STALL_RATE_SHARE = 0.5
STALL_LATENCY_SHARE = 0.5


class Verdict(Enum):
    PASS = "pass"
    FAIL = "FAIL"
    UNJUDGED = "not judged"


@dataclass(frozen=True, slots=True)
class CellSummary:
    """One cell over all rounds.

    `medians` has every server with a result, in requests per second. `best_peer` has the highest median among the
    peers; `ratio` is the subject's median over that one, `ratio_low` and `ratio_high` the extremes of the same two
    servers' ratio within one round. `failed` names the servers that failed in some round.
    """

    cell: str
    medians: dict[str, float]
    best_peer: str | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    failed: tuple[str, ...]

    def verdict(self, least_ratio: float) -> Verdict:
        """A cell in which any server failed is not judged: the better of the peers is then unknown."""
        if self.ratio is None or self.failed:
            return Verdict.UNJUDGED
        return Verdict.PASS if self.ratio >= least_ratio else Verdict.FAIL


def summarize(samples: Sequence[Sample], cell: str, subject: str) -> CellSummary:
    """The summary of one cell's samples; those of other cells are ignored."""
    rates: dict[str, dict[int, float]] = {}
    failed = []
    for sample in samples:
        if sample.cell != cell:
            continue
        if sample.measurement is None:
            failed.append(sample.server)
        else:
            rates.setdefault(sample.server, {})[sample.round_index] = sample.measurement.iops
    medians = {server: median(by_round.values()) for server, by_round in rates.items()}
    peers = {server: value for server, value in medians.items() if server != subject}
    best = max(peers, key=lambda server: peers[server]) if peers else None
    ratio = low = high = None
    if best is not None and subject in medians:
        ratio = medians[subject] / medians[best]
        pairs = [rates[subject][index] / rates[best][index] for index in rates[subject].keys() & rates[best].keys()]
        if pairs:
            low, high = min(pairs), max(pairs)
    return CellSummary(cell, medians, best, ratio, low, high, tuple(dict.fromkeys(failed)))


@dataclass(frozen=True, slots=True)
class NeighbourSummary:
    """A reader beside a neighbour over all rounds: medians of each figure, except `max_us`, the worst of the rounds."""

    kind: str
    server: str
    alone: Measurement
    beside: Measurement
    neighbour: Measurement
    disk_bytes: float
    is_slow_disk: bool


def summarize_neighbour(samples: Sequence[NeighbourSample], kind: str, server: str) -> NeighbourSummary | None:
    """None when any round failed or there was none."""
    mine = [sample for sample in samples if (sample.kind, sample.server) == (kind, server)]
    alone = [sample.alone for sample in mine if sample.alone is not None]
    beside = [sample.beside for sample in mine if sample.beside is not None]
    neighbour = [sample.neighbour for sample in mine if sample.neighbour is not None]
    if not mine or any(sample.error is not None for sample in mine):
        return None
    return NeighbourSummary(
        kind,
        server,
        _combine(alone),
        _combine(beside),
        _combine(neighbour),
        median(sample.disk_bytes for sample in mine),
        all(sample.is_slow_disk for sample in mine),
    )


def _combine(rounds: Sequence[Measurement]) -> Measurement:
    return Measurement(
        iops=median(item.iops for item in rounds),
        bytes_per_s=median(item.bytes_per_s for item in rounds),
        p50_us=median(item.p50_us for item in rounds),
        p99_us=median(item.p99_us for item in rounds),
        max_us=max(item.max_us for item in rounds),
        request_count=sum(item.request_count for item in rounds),
    )


def cold_verdict(summary: NeighbourSummary | None) -> Verdict:
    """Whether the warm reader was kept from its work while another connection waited for a slow disk.

    It stalls when it loses half of its rate, or when its p99 reaches half of the neighbour's: it then waits for the
    neighbour's misses. Judged only where the misses were slow and did reach the disk, since otherwise the reader's loss
    is mostly that of its share of the processors.
    """
    if summary is None or not summary.is_slow_disk or not summary.disk_bytes:
        return Verdict.UNJUDGED
    keeps_rate = summary.beside.iops > STALL_RATE_SHARE * summary.alone.iops
    keeps_latency = summary.beside.p99_us < STALL_LATENCY_SHARE * summary.neighbour.p99_us
    return Verdict.PASS if keeps_rate and keeps_latency else Verdict.FAIL


def fairness_verdict(summary: NeighbourSummary | None) -> Verdict:
    if summary is None:
        return Verdict.UNJUDGED
    return Verdict.PASS if summary.beside.p99_us <= FAIRNESS_P99_MAX_US else Verdict.FAIL


def problems(run: Run, least_ratio: float) -> list[str]:
    """Every goal that the subject misses, or that could not be judged, in words; empty when all are reached."""
    found = []
    if not (run.samples or run.cold or run.fairness):
        found.append("nothing was measured that has a goal")
    for cell in measured_cells(run):
        summary = summarize(run.samples, cell.name, run.subject)
        verdict = summary.verdict(least_ratio)
        if verdict is Verdict.FAIL:
            found.append(f"{cell.name}: {summary.ratio:.2f}x {summary.best_peer}, goal {least_ratio:g}x")
        elif verdict is Verdict.UNJUDGED:
            reason = f"failed: {', '.join(summary.failed)}" if summary.failed else f"no {run.subject} or no peer"
            found.append(f"{cell.name}: not judged ({reason})")
    for kind in _kinds(run.fairness):
        fair = summarize_neighbour(run.fairness, kind, run.subject)
        if fair is None:
            found.append(f"fairness, {kind}: not judged")
        elif fairness_verdict(fair) is Verdict.FAIL:
            found.append(f"fairness, {kind}: p99 {fair.beside.p99_us / 1000:.1f} ms, goal at most 10 ms")
    for kind in _kinds(run.cold):
        cold = summarize_neighbour(run.cold, kind, run.subject)
        if cold is None:
            found.append(f"{kind}: not judged")
        elif cold_verdict(cold) is Verdict.FAIL:
            found.append(f"{kind}: another connection's misses stall the warm reader")
    return found


def failures(run: Run) -> list[str]:
    """Every measurement that failed, in words."""
    found = [
        f"{sample.server}, {sample.cell}, round {sample.round_index + 1}: {sample.error}"
        for sample in run.samples
        if sample.error is not None
    ]
    found += [
        f"{sample.server}, {sample.kind}, round {sample.round_index + 1}: {sample.error}"
        for sample in (*run.cold, *run.fairness)
        if sample.error is not None
    ]
    return found + (run.profile.notes if run.profile is not None else [])


@dataclass(frozen=True, slots=True)
class Table:
    """A table that prints on the terminal and in Markdown alike; the first column is text, the others figures."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [
            f"## {self.title}",
            "",
            self.note,
            "",
            f"| {' | '.join(self.columns)} |",
            f"|{'|'.join(['---', *['---:'] * (len(self.columns) - 1)])}|",
            *(f"| {' | '.join(row)} |" for row in self.rows),
        ]
        return "\n".join(lines) + "\n"

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left", caption=self.note, caption_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left")
        for row in self.rows:
            style = "red" if Verdict.FAIL.value in row else None
            table.add_row(*row, style=style)
        return table


def tables(run: Run, least_ratio: float) -> Iterator[Table]:
    """Every table for which the run has figures."""
    if run.samples:
        yield throughput_table(run, least_ratio)
        yield latency_table(run)
    if run.cold:
        yield _cold_table(run)
    if run.fairness:
        yield _fairness_table(run)
    if run.profile is not None:
        yield from _profile_tables(run.profile)


def throughput_table(run: Run, least_ratio: float) -> Table:
    table = Table(
        "Throughput, page cache warm",
        f"Median of {run.rounds} interleaved rounds of {run.seconds:g} s; MB/s are 10^6 bytes. Ratio: {run.subject} "
        "over the peer with the best median; low and high: the same two servers round by round. "
        f"Goal: {least_ratio:g}x.",
        ["cell", "unit", *run.servers, *run.missing, "best peer", "ratio", "low", "high", "verdict"],
    )
    for cell in measured_cells(run):
        summary = summarize(run.samples, cell.name, run.subject)
        table.rows.append(
            [
                cell.title,
                cell.unit,
                *(rate_text(cell, summary, server) for server in run.servers),
                *("missing" for _ in run.missing),
                summary.best_peer or "-",
                *(ratio_text(value) for value in (summary.ratio, summary.ratio_low, summary.ratio_high)),
                summary.verdict(least_ratio).value,
            ]
        )
    return table


def latency_table(run: Run) -> Table:
    table = Table(
        "Latency of the same runs",
        "p50 / p99 in microseconds, each the median of the rounds.",
        ["cell", *run.servers],
    )
    for cell in measured_cells(run):
        row = [cell.title]
        for server in run.servers:
            rounds = [
                sample.measurement
                for sample in run.samples
                if (sample.cell, sample.server) == (cell.name, server) and sample.measurement is not None
            ]
            row.append(_p50_p99(_combine(rounds)) if rounds else "-")
        table.rows.append(row)
    return table


def _cold_table(run: Run) -> Table:
    table = Table(
        "Cold cache: page-cache misses on one connection, hits on another",
        "A 4 KiB depth-1 reader of warm pages, alone and beside random reads of pages that were dropped from the "
        "cache. Times in microseconds, p50 / p99 / max. Where the kernel allows it the server's disk reads are limited "
        "to a few hundred a second, so that a miss is slow and costs no processor; only then there is a verdict: FAIL "
        "when the warm reader loses half of its rate or its p99 reaches half of the neighbour's.",
        ["neighbour", "server", "alone", "beside", "rate kept", "neighbour's", "from disk", "slow disk", "verdict"],
    )
    for kind, server, summary in _neighbour_rows(run.cold, run):
        verdict = cold_verdict(summary).value
        if summary is None:
            table.rows.append([kind, server, *["-"] * 6, verdict])
            continue
        table.rows.append(
            [
                kind,
                server,
                _spread(summary.alone),
                _spread(summary.beside),
                f"{summary.beside.iops / summary.alone.iops:.0%}",
                _spread(summary.neighbour),
                f"{summary.disk_bytes / MIB:.1f} MiB",
                "yes" if summary.is_slow_disk else "no",
                verdict,
            ]
        )
    return table


def _fairness_table(run: Run) -> Table:
    table = Table(
        "Fairness: 4 KiB reads beside 4 MiB x 16 on another connection",
        "A 4 KiB depth-1 reader, page cache warm. Times in microseconds, p50 / p99 / max. Goal: p99 at most 10 ms.",
        ["neighbour", "server", "alone", "beside", "neighbour's MB/s", "verdict"],
    )
    for kind, server, summary in _neighbour_rows(run.fairness, run):
        verdict = fairness_verdict(summary).value
        if summary is None:
            table.rows.append([kind, server, "-", "-", "-", verdict])
            continue
        rate = f"{summary.neighbour.bytes_per_s / 1e6:.0f}"
        table.rows.append([kind, server, _spread(summary.alone), _spread(summary.beside), rate, verdict])
    return table


def _profile_tables(profile: Profile) -> Iterator[Table]:
    load = "4 KiB random read, depth 16, page cache warm."
    if profile.cpu:
        yield Table(
            "Where a request's time goes: processor time",
            f"{load} From the kernel's accounting of the server's processes, nothing attached.",
            ["server", "IOPS", "user us/request", "system us/request", "cores busy"],
            [
                [
                    cost.server,
                    _thousands(cost.iops),
                    f"{cost.user_us:.2f}",
                    f"{cost.system_us:.2f}",
                    f"{cost.busy_cores:.2f}",
                ]
                for cost in profile.cpu
            ],
        )
    if profile.syscalls:
        yield Table(
            "Where a request's time goes: system calls",
            f"{load} nbdimg under `strace -c -f`: the counts are exact, the shares are of the traced time.",
            ["call", "per request", "share of time"],
            [[cost.name, f"{cost.per_request:.3f}", f"{cost.time_share:.1%}"] for cost in profile.syscalls[:15]],
        )
    if profile.functions:
        yield Table(
            "Where a request's time goes: Python functions",
            f"{load} nbdimg's main thread under cProfile, whose own cost is in every call: compare the shares. "
            "Compiled code that reports no calls, uvloop's above all, counts to its caller.",
            ["function", "calls/request", "own us/request", "share"],
            [
                [
                    f"`{cost.name}`".replace("|", "\\|"),
                    f"{cost.calls_per_request:.2f}",
                    f"{cost.self_us_per_request:.2f}",
                    f"{cost.self_share:.1%}",
                ]
                for cost in profile.functions
            ],
        )


def markdown(run: Run, least_ratio: float) -> str:
    """The whole of RESULTS.md."""
    return page("Benchmark results", run, tables(run, least_ratio))


def page(title: str, run: Run, tables: Iterable[Table]) -> str:
    """A whole report: where and how it was made, who is missing, what failed, and the tables."""
    lines = [
        f"# {title}",
        "",
        f"Made by `{run.command}` on {run.date}. Every figure was measured in that one run, on this machine:",
        "",
        "| fact | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in run.facts.items()),
        *(f"| {name} | {version} |" for name, version in run.servers.items()),
        f"| image | raw, fully written, {run.image_size // MIB} MiB, the same file for all servers |",
        "",
        *(_section("Missing", [f"{name}: {reason}" for name, reason in run.missing.items()])),
        *(_section("Failed", failures(run))),
    ]
    return "\n".join(lines) + "\n" + "\n".join(table.markdown() for table in tables)


def print_report(run: Run, tables: Iterable[Table], console: Console) -> None:
    for table in tables:
        console.print(table.rich())
        console.print()
    for name, reason in run.missing.items():
        console.print(f"missing: {name}: {reason}", style="yellow", markup=False)
    for failure in failures(run):
        console.print(f"failed: {failure}", style="red", markup=False)


def _section(title: str, items: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *(f"* {item}" for item in items), ""] if items else []


def measured_cells(run: Run) -> list[Cell]:
    """The cells of which there are samples, in table order."""
    names = {sample.cell for sample in run.samples}
    return [cell for cell in CEILING_CELLS if cell.name in names]


def _kinds(samples: Sequence[NeighbourSample]) -> list[str]:
    return list(dict.fromkeys(sample.kind for sample in samples))


def _neighbour_rows(samples: Sequence[NeighbourSample], run: Run) -> Iterator[tuple[str, str, NeighbourSummary | None]]:
    for kind in _kinds(samples):
        for server in run.servers:
            yield kind, server, summarize_neighbour(samples, kind, server)


def rate_text(cell: Cell, summary: CellSummary, server: str) -> str:
    """The median in the cell's unit; `failed` beside it, or alone, when a round failed."""
    value = summary.medians.get(server)
    if value is None:
        return "failed" if server in summary.failed else "-"
    text = _thousands(value) if cell.unit == "IOPS" else f"{value * cell.block_size / 1e6:.0f}"
    return f"{text} (failed)" if server in summary.failed else text


def _thousands(value: float) -> str:
    return f"{value / 1000:.1f}k"


def ratio_text(value: float | None) -> str:
    """With two digits, or a dash where there is none."""
    return "-" if value is None else f"{value:.2f}"


def _p50_p99(measurement: Measurement) -> str:
    return f"{measurement.p50_us:.0f} / {measurement.p99_us:.0f}"


def _spread(measurement: Measurement) -> str:
    return f"{_p50_p99(measurement)} / {measurement.max_us:.0f}"
