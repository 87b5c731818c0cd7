"""`python -m bench`, run from the project's root: measure, print the tables, write them.

A run of less than everything (`--quick`, `--only`, `--cells`, `--servers`) is printed, and written only where
`--output` says, so that it does not replace the recorded results.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench import cold, fairness, profile, report, throughput
from bench.cells import CELLS, MIB, Cell, select_cells
from bench.results import Run
from bench.servers import SERVERS, ServerSpec, select_servers
from bench.session import IMAGE_SIZE, ROUNDS, SECONDS, end_on_signals, positive, progress, recorded

PARTS = ("throughput", "cold", "fairness", "profile")
GOAL_RATIO = 1.5
RESULTS_NAME = "results.json"
REPORT_NAME = "RESULTS.md"
EXIT_BELOW = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
IMAGE_SIZE_MIN = 128 * MIB
"""Half of it must hold the 4 MiB x 16 neighbour of the fairness row, without requests that overlap."""


def parse_size(text: str) -> int:
    """`512M` or `1G` in bytes, a multiple of 1 MiB. Raises: ValueError."""
    unit = {"M": MIB, "G": 1024 * MIB}.get(text[-1:].upper())
    if unit is None or int(text[:-1]) * unit < IMAGE_SIZE_MIN:
        raise ValueError(f"{text!r} is not a size of at least {IMAGE_SIZE_MIN // MIB}M such as 512M or 1G")
    return int(text[:-1]) * unit


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m bench", description="Speed of nbdimg beside qemu-nbd and nbdkit.")
    add = options.add_argument
    add("--rounds", type=positive(int), metavar="N", help="interleaved rounds (default 3)")
    add("--seconds", type=positive(float), metavar="S", help="measured time of each fio run (default 3)")
    add("--size", type=parse_size, metavar="SIZE", help="size of the image, such as 512M (default)")
    add("--cells", nargs="+", default=[], metavar="PATTERN", help=f"of {', '.join(cell.name for cell in CELLS)}")
    add("--servers", nargs="+", default=[], metavar="WORD", help=f"of {', '.join(spec.name for spec in SERVERS)}")
    add("--only", nargs="+", choices=PARTS, default=[], metavar="PART", help=f"of {', '.join(PARTS)}; default all")
    add("--profile", action="store_true", help="the same as --only profile")
    add("--quick", action="store_true", help="1 round of 1 s on 128M: proves that everything runs, measures little")
    add("--directory", type=Path, metavar="DIR", help="where the image is made (default: a temporary directory)")
    add("--output", type=Path, metavar="DIR", help=f"where {REPORT_NAME} and {RESULTS_NAME} go (default: bench)")
    add("--from", type=Path, dest="recorded", metavar="FILE", help="measure nothing, report a recorded results.json")
    add("--check", type=positive(float), metavar="RATIO", help="exit 1 when a cell is below RATIO or a goal is missed")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 when `--check` finds a problem, 2 for wrong usage, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(words)
    least_ratio = options.check or GOAL_RATIO
    errors = Console(stderr=True)
    try:
        if options.recorded is not None:
            run = Run.from_json(options.recorded.read_text())
        else:
            run = measure(options, shlex.join(["python", "-m", "bench", *words]), errors)
    except (OSError, ValueError, KeyError, TypeError) as error:
        errors.print(f"bench: {error}", style="red", markup=False)
        return EXIT_USAGE
    except KeyboardInterrupt:
        errors.print("bench: interrupted, nothing was written", style="red")
        return EXIT_INTERRUPTED
    report.print_report(run, report.tables(run, least_ratio), Console())
    directory = output_directory(options)
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / RESULTS_NAME).write_text(run.to_json())
        (directory / REPORT_NAME).write_text(report.markdown(run, least_ratio))
    if options.check is None:
        return 0
    problems = report.problems(run, least_ratio)
    for problem in problems:
        errors.print(f"check: {problem}", style="red", markup=False)
    return EXIT_BELOW if problems else 0


def output_directory(options: argparse.Namespace) -> Path | None:
    """Where to write, or None for a run that is partial or recorded and was given no `--output`."""
    output: Path | None = options.output
    is_partial = options.quick or options.only or options.profile or options.cells or options.servers
    if output is None and not is_partial and options.recorded is None:
        return Path(__file__).parent
    return output


def measure(options: argparse.Namespace, command: str, errors: Console) -> Run:
    """Make the image, find out which servers run here, and measure the chosen parts.

    Raises: ValueError for a selection that matches nothing and when fio is missing.
    """
    rounds = options.rounds or (1 if options.quick else ROUNDS)
    seconds = options.seconds or (1.0 if options.quick else SECONDS)
    size = options.size or (IMAGE_SIZE_MIN if options.quick else IMAGE_SIZE)
    parts = ["profile"] if options.profile else options.only or list(PARTS)
    cells, specs = select_cells(options.cells), select_servers(options.servers)
    with recorded(command, specs, rounds, seconds, size, options.directory) as (run, servers, image):
        if servers:
            _measure_parts(run, parts, cells, servers, image, errors)
    return run


def _measure_parts(
    run: Run, parts: Sequence[str], cells: Sequence[Cell], servers: Sequence[ServerSpec], image: Path, errors: Console
) -> None:
    each_round = len(servers) * run.rounds
    totals = {
        "throughput": each_round * len(cells),
        "cold": each_round * len(cold.kinds()),
        "fairness": each_round * len(fairness.kinds()),
        "profile": profile.step_count(servers),
    }
    subject = next((spec for spec in servers if spec.name == run.subject), None)
    with progress(sum(totals[part] for part in parts), errors) as step:
        if "throughput" in parts:
            run.samples = throughput.measure(cells, servers, image, run.rounds, run.seconds, step)
        if "cold" in parts:
            run.cold = cold.measure(servers, image, run.rounds, run.seconds, step)
        if "fairness" in parts:
            run.fairness = fairness.measure(servers, image, run.rounds, run.seconds, step)
        if "profile" in parts:
            run.profile = profile.measure(subject, servers, image, run.seconds, step)


if __name__ == "__main__":
    end_on_signals()
    sys.exit(main())
