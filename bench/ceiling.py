"""`python -m bench.ceiling`, run from the project's root: how much of what is possible here each server reaches.

A bare server (`bare.c`, made by this machine's C compiler) stands beside nbdimg and its peers in the cells of the
throughput table: one thread that checks nothing, keeps nothing and knows two commands, once polling behind a request as
nbdimg does and once sleeping. The better one's ratio over the best peer is about the highest that any server on one
thread could have, with this client on this machine; nbdimg's over it is how much of that is there.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from bench import report, throughput
from bench.cells import CEILING_CELLS, select_cells
from bench.report import CellSummary, Table
from bench.results import Run
from bench.servers import SERVERS, ServerSpec
from bench.session import IMAGE_SIZE, ROUNDS, SECONDS, end_on_signals, positive, progress, recorded

SOURCE = Path(__file__).with_name("bare.c")
COMPILER = "cc"
POLLS_US = {"bare polling": 200, "bare sleeping": 0}
"""The bare servers, and how long each polls behind a request: nbdimg's window is at most as long."""
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def bare_servers(directory: Path) -> tuple[ServerSpec, ...]:
    """The bare servers, compiled into `directory`; their version is the compiler's.

    Raises: ValueError when there is no compiler, or it fails.
    """
    if shutil.which(COMPILER) is None:
        raise ValueError(f"there is no C compiler ({COMPILER}) for the bare server: install gcc and libc6-dev")
    program = str(directory / SOURCE.stem)
    done = subprocess.run([COMPILER, "-O2", "-o", program, str(SOURCE)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{COMPILER} does not compile {SOURCE.name}: {done.stderr.strip()}")

    def argv(poll_us: int) -> Callable[[str, Path], list[str]]:
        return lambda path, image: [program, path, str(image), str(poll_us)]

    return tuple(ServerSpec(name, (COMPILER, "--version"), argv(poll_us)) for name, poll_us in POLLS_US.items())


def ceiling_table(run: Run) -> Table:
    """The better bare server over the best peer, and nbdimg over both."""
    table = Table(
        "What is possible, page cache warm",
        f"Median of {run.rounds} interleaved rounds of {run.seconds:g} s; MB/s are 10^6 bytes. Ceiling: the better "
        "bare server over the peer with the best median; below 1, several threads do what one cannot. Reached: "
        f"{run.subject} over that bare server. Ratio: {run.subject} over that peer. In brackets the lowest and the "
        "highest round of the same two servers. Most of a 4 KiB write is the kernel's, "
        "which looks at each block of the page cache's folio that it hits, up to 2 MiB: the same for all servers.",
        ["cell", "unit", *run.servers, *run.missing, "best peer", "ceiling", "reached", "ratio"],
    )
    peers = {*run.peers} - {*POLLS_US}
    for cell in report.measured_cells(run):
        medians = report.summarize(run.samples, cell.name, run.subject)
        bare = max(POLLS_US, key=lambda name: medians.medians.get(name, 0.0))
        possible, reached, ratio = (
            report.summarize([each for each in run.samples if each.server in {over, *under}], cell.name, over)
            for over, under in ((bare, peers), (run.subject, {bare}), (run.subject, peers))
        )
        table.rows.append(
            [
                cell.title,
                cell.unit,
                *(report.rate_text(cell, medians, server) for server in run.servers),
                *("missing" for _ in run.missing),
                ratio.best_peer or "-",
                *(_with_rounds(each) for each in (possible, reached, ratio)),
            ]
        )
    return table


def _with_rounds(summary: CellSummary) -> str:
    ratio, low, high = (report.ratio_text(each) for each in (summary.ratio, summary.ratio_low, summary.ratio_high))
    return ratio if summary.ratio is None else f"{ratio} ({low}–{high})"


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m bench.ceiling", description=(__doc__ or "").partition("\n")[0])
    add = options.add_argument
    add("--rounds", type=positive(int), default=ROUNDS, metavar="N", help=f"interleaved rounds (default {ROUNDS})")
    add("--seconds", type=positive(float), default=SECONDS, metavar="S", help=f"of each fio run (default {SECONDS:g})")
    names = ", ".join(cell.name for cell in CEILING_CELLS)
    add("--cells", nargs="+", default=[], metavar="PATTERN", help=f"of {names}")
    add("--output", type=Path, metavar="DIR", help="write ceiling.md and ceiling.json there")
    return options


def measure(options: argparse.Namespace, command: str, errors: Console) -> Run:
    """Compile the bare servers and measure them between the others.

    Raises: ValueError for a selection that matches nothing, and when fio or a compiler is missing.
    """
    cells = select_cells(options.cells, CEILING_CELLS)
    with tempfile.TemporaryDirectory(prefix="nbdimg-bench-") as directory:
        specs = (*bare_servers(Path(directory)), *SERVERS)
        rounds, seconds = options.rounds, options.seconds
        with (
            recorded(command, specs, rounds, seconds, IMAGE_SIZE, None) as (run, servers, image),
            progress(len(servers) * len(cells) * rounds, errors) as step,
        ):
            run.samples = throughput.measure(cells, servers, image, rounds, seconds, step)
    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 when a measurement failed, 2 for wrong usage, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(words)
    errors = Console(stderr=True)
    try:
        run = measure(options, shlex.join(["python", "-m", "bench.ceiling", *words]), errors)
    except (OSError, ValueError) as error:
        errors.print(f"bench: {error}", style="red", markup=False)
        return EXIT_USAGE
    except KeyboardInterrupt:
        errors.print("bench: interrupted, nothing was written", style="red")
        return EXIT_INTERRUPTED
    table = ceiling_table(run)
    report.print_report(run, [table], Console())
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "ceiling.json").write_text(run.to_json())
        (options.output / "ceiling.md").write_text(report.page("What is possible here", run, [table]))
    return EXIT_FAILED if report.failures(run) else 0


if __name__ == "__main__":
    end_on_signals()
    sys.exit(main())
