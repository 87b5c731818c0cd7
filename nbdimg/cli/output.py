"""What the verbs print: JSON with a version, names that cannot hurt a terminal, progress where somebody looks.

Results go to standard output, progress to standard error and only if that is a terminal.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from nbdimg.errors import printable
from nbdimg.units import KiB, counted

JSON_VERSION = 1
"""Of the output of --json; it grows when a field goes or changes its meaning."""

QUIET_S = 1.0
"""What takes no longer shows no progress."""

ProgressReport = Callable[[int, int], None]
"""Called with how much is done and how much there is in all."""


def print_json(**fields: object) -> None:
    """One JSON object; the bytes of names that are not UTF-8 come as lone surrogates, as Python reads them."""
    print(json.dumps({"version": JSON_VERSION, **fields}))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Cells under their columns' names, those of `right` flush right on a terminal; plain columns elsewhere, and where
    the terminal has no room for the names: there cells would be lost.
    """
    width = shutil.get_terminal_size().columns
    if not sys.stdout.isatty() or width < len("  ".join(columns)):
        widths = [max(len(row[index]) for row in (columns, *rows)) for index in range(len(columns))]
        for row in (columns, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(width=width).print(table)


def shown(text: str) -> str:
    """A name for people: what would not print, or would steer the terminal, is escaped."""
    text = os.fsencode(text).decode("utf-8", "backslashreplace") if _is_encodable(text) else text
    return printable(text)


def _is_encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def dated(seconds: float) -> str:
    """Seconds since 1970 UTC as RFC 3339: `2026-11-22T08:00:00Z`."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def sized(size: int) -> str:
    """`1.5 MiB (1572864 bytes)`, or `512 bytes`."""
    if size < KiB:
        return counted(size, "byte")
    value, units = size / KiB, iter(("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))
    unit = next(units)
    while value >= KiB:
        value /= KiB
        unit = next(units)
    return f"{value:.3g} {unit} ({size} bytes)" if value < 1000 else f"{value:.0f} {unit} ({size} bytes)"


class _Bar:
    """Made when it is first due: rich is slow to import."""

    def __init__(self, unit: str, quiet_s: float) -> None:
        self._unit = unit
        self._due = time.monotonic() + quiet_s
        self._update: ProgressReport | None = None
        self.stop: Callable[[], None] = lambda: None

    def report(self, done: int, total: int) -> None:
        if self._update is None:
            if time.monotonic() < self._due:
                return
            update, start, self.stop = _made(self._unit)
            start()
            self._update = update
        self._update(done, total)


def _made(unit: str) -> tuple[ProgressReport, Callable[[], None], Callable[[], None]]:
    """How a bar is told of progress, started, and stopped, also where its start was interrupted."""
    from rich import progress as rich
    from rich.console import Console

    amount: tuple[rich.ProgressColumn, ...]
    if unit == "bytes":
        amount = (rich.DownloadColumn(binary_units=True), rich.TransferSpeedColumn())
    else:
        amount = (rich.MofNCompleteColumn(), rich.TextColumn("{task.fields[rate]}"))
    columns = (rich.BarColumn(), *amount, rich.TimeRemainingColumn())
    bar = rich.Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("", rate="")

    def update(done: int, total: int) -> None:
        speed = bar.tasks[task].speed
        bar.update(task, completed=done, total=total, rate="" if speed is None else f"{speed:.0f} {unit}/s")

    return update, bar.start, bar.stop


@contextmanager
def progress(unit: str = "bytes", *, quiet_s: float = QUIET_S) -> Iterator[ProgressReport | None]:
    """What to tell of progress, with its rate and the time left; None when nobody looks.

    Args: unit: what is counted; "bytes" are shown as sizes.
    """
    if not sys.stderr.isatty():
        yield None
        return
    bar = _Bar(unit, quiet_s)
    try:
        yield bar.report
    finally:
        bar.stop()
