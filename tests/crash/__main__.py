"""A crash campaign: `python -m tests.crash --format qcow2 --states 20000 --seed 1`.

Prints a row for each scenario, the violations with their seeds, and ends with 1 if there are any. A violation comes
again with `--scenario` and its seed. With `--without-barriers` every fdatasync counts for nothing: the control, which
must end with 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from tests.crash.scenarios import FORMATS
from tests.support.crash import HEADER, Report, Scenario, run_now
from tests.support.crash.scenario import STATES_OF_ONE


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.crash")
    parser.add_argument("--format", action="append", choices=sorted(FORMATS), help="default: all; may be repeated")
    parser.add_argument("--scenario", default="", help="only those with this in their names")
    parser.add_argument("--states", type=int, default=5000, help="for each format, shared by its scenarios")
    parser.add_argument("--seed", type=int, default=1, help="of the first trace; the next has one more")
    parser.add_argument("--seconds", type=float, help="stop each scenario after this time")
    parser.add_argument("--cap", type=int, default=64, help="states of one crash point (default %(default)s)")
    parser.add_argument(
        "--of-one", type=int, default=STATES_OF_ONE, help="states of one trace, about (default %(default)s)"
    )
    parser.add_argument("--without-barriers", action="store_true", help="the control")
    return parser


def _shares(options: argparse.Namespace) -> Iterator[tuple[Scenario, int]]:
    """Scenarios with the number of states for each."""
    for name in options.format or FORMATS:
        chosen = [each for each in FORMATS[name] if options.scenario in each.name]
        yield from ((each, -(-options.states // len(chosen))) for each in chosen)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    reports: list[Report] = []
    print(HEADER)
    for scenario, states in _shares(options):
        report = run_now(
            scenario,
            seed=options.seed,
            states=states,
            states_of_one=options.of_one,
            timeout_s=options.seconds,
            cap=options.cap,
            without_barriers=options.without_barriers,
        )
        reports.append(report)
        print(report.row(), flush=True)
    violation_count = sum(report.violation_count for report in reports)
    print(f"\n{sum(report.states for report in reports):,} states, {violation_count:,} violations")
    for report in reports:
        for text in report.described():
            print(f"{report.name}: {text}")
    return 1 if violation_count else 0


if __name__ == "__main__":
    sys.exit(main())
