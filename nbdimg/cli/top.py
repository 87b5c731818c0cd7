"""`nbdimg top`: what each export does now, the busiest first.

A line is the difference between two answers to GET /v1/stats, divided by the server's own clock between them. Counters
never fall; an export that was opened anew since begins again at zero, and its first line is left out.
"""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from nbdimg.cli.answers import STATS
from nbdimg.cli.ctl import SocketPath, TokenFile, Url, server_api
from nbdimg.cli.healthcheck import DEFAULT_SOCKET
from nbdimg.cli.interrupt import raise_at_interrupt
from nbdimg.cli.options import AsJson
from nbdimg.cli.output import print_json, print_table, shown

if TYPE_CHECKING:
    from nbdimg.cli.http import Api

COLUMNS = ("EXPORT", "R/s", "W/s", "OTHER/s", "R MB/s", "W MB/s", "R ms", "W ms", "IN FLIGHT", "CLIENTS", "ERR/s")
COUNTERS = ("reads", "read_bytes", "read_seconds", "writes", "write_bytes", "write_seconds", "others", "errors")

INTERVAL_MIN_S, INTERVAL_MAX_S = 0.1, 86400.0
KEYS_MAX = 64

DUMB_TERMINALS = ("dumb", "unknown")
"""Values of TERM with which nothing can be drawn over: they get one table below the other."""


class Row(NamedTuple):
    """One export during an interval: requests, bytes and errors a second; latencies in seconds, None: no request."""

    name: str
    reads: float
    writes: float
    others: float
    read_bytes: float
    write_bytes: float
    read_latency: float | None
    write_latency: float | None
    in_flight: int
    connections: int
    errors: float

    @property
    def load(self) -> tuple[float, float]:
        """What the busiest has the most of: requests, then bytes."""
        return self.reads + self.writes + self.others, self.read_bytes + self.write_bytes


def top(
    interval: Annotated[
        float, typer.Option(metavar="S", min=INTERVAL_MIN_S, max=INTERVAL_MAX_S, help="Seconds between two looks.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look for one interval, print, and end.")] = False,
    socket: SocketPath = DEFAULT_SOCKET,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> int:
    """Watch what each export does, the busiest first. q or Ctrl-C ends it.

    With --json a line of JSON each interval; rates are for a second, sizes in bytes, latencies in seconds.
    """
    api = server_api(socket, url, token_file)
    before = api.get("/v1/stats", STATS)
    raise_at_interrupt()
    try:
        if once or as_json or not sys.stdout.isatty() or os.environ.get("TERM") in DUMB_TERMINALS:
            _print_lines(api, before, interval, once=once, as_json=as_json)
        else:
            _watch(api, before, interval)
    except KeyboardInterrupt:
        pass
    return 0


def rows(before: dict[str, Any], after: dict[str, Any]) -> list[Row]:
    """Exports that are in both answers of /v1/stats, the busiest first."""
    seconds = after["time"] - before["time"]
    old = {each["name"]: each for each in before["exports"]}
    pairs = [(old[each["name"]], each) for each in after["exports"] if each["name"] in old]
    found = [_row(*pair, seconds) for pair in pairs if all(pair[1][key] >= pair[0][key] for key in COUNTERS)]
    return sorted(found, key=lambda row: (tuple(-each for each in row.load), row.name))


def _row(old: dict[str, Any], new: dict[str, Any], seconds: float) -> Row:
    delta = {key: new[key] - old[key] for key in COUNTERS}
    rate = {key: value / seconds if seconds > 0 else 0.0 for key, value in delta.items()}
    return Row(
        name=new["name"],
        reads=rate["reads"],
        writes=rate["writes"],
        others=rate["others"],
        read_bytes=rate["read_bytes"],
        write_bytes=rate["write_bytes"],
        read_latency=delta["read_seconds"] / delta["reads"] if delta["reads"] else None,
        write_latency=delta["write_seconds"] / delta["writes"] if delta["writes"] else None,
        in_flight=new["in_flight"],
        connections=new["connections"],
        errors=rate["errors"],
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        shown(row.name),
        *(f"{each:.0f}" for each in (row.reads, row.writes, row.others)),
        *(f"{each / 1e6:.1f}" for each in (row.read_bytes, row.write_bytes)),
        *("-" if each is None else f"{each * 1e3:.2f}" for each in (row.read_latency, row.write_latency)),
        str(row.in_flight),
        str(row.connections),
        f"{row.errors:.0f}",
    )


def _print_lines(api: Api, before: dict[str, Any], interval: float, *, once: bool, as_json: bool) -> None:
    while True:
        time.sleep(interval)
        after = api.get("/v1/stats", STATS)
        found = rows(before, after)
        if as_json:
            print_json(exports=[row._asdict() for row in found])
        else:
            print_table(COLUMNS, [_cells(row) for row in found], right=COLUMNS[1:])
        sys.stdout.flush()
        if once:
            return
        before = after


def _watch(api: Api, before: dict[str, Any], interval: float) -> None:
    """The whole terminal, until q or Ctrl-C."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with _single_keys(), Live(_table([], console.height), console=console, screen=True, auto_refresh=False) as live:
        while not _is_quit_within(interval):
            after = api.get("/v1/stats", STATS)
            live.update(_table(rows(before, after), console.height), refresh=True)
            before = after


def _table(found: list[Row], height: int) -> Any:
    """A table of rich's, with as many lines as the terminal has, and how many exports are not among them."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, expand=True)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == COLUMNS[0] else "right")
    room = max(height - 2, 1)
    for row in found[:room]:
        table.add_row(*map(Text, _cells(row)))
    if len(found) > room:
        table.add_row(Text(f"… {len(found) - room} more", style="dim"))
    return table


@contextmanager
def _single_keys() -> Iterator[None]:
    """Have each key read at once and not shown."""
    if not sys.stdin.isatty():
        yield
        return
    descriptor = sys.stdin.fileno()
    saved = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, saved)


def _is_quit_within(seconds: float) -> bool:
    """Wait so long for the key q."""
    if not sys.stdin.isatty():
        time.sleep(seconds)
        return False
    keys = FileIO(sys.stdin.fileno(), closefd=False)
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([keys], [], [], left)[0] and b"q" in (keys.read(KEYS_MAX) or b"q").lower():
            return True
    return False
