"""Ctrl-C: the process ends there and then, whatever it is doing.

An exception or a cancelled task would begin to undo what workers still write. To the image the end is a crash, and
every verb's order of writing is made for that. Verbs that would lose something by a crash, or leave half a file, hear
of the signal where they can end in order, and of SIGTERM and a closed terminal (SIGHUP) as well.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from types import FrameType
from typing import NoReturn

EXIT_INTERRUPTED = 128 + signal.SIGINT

_CLEARED = b"\r\x1b[2K\x1b[?25h"
"""On a terminal: the line of a progress bar is emptied, and the cursor seen again."""


class Interrupted(Exception):
    """A signal has asked for the end, and the work has ended in order. `status`: to exit with."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted")
        self.status = 128 + number


def end_at_interrupt() -> None:
    """From now on SIGINT ends the process with one line and its status, unless whoever started it has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_at_interrupt() -> None:
    """From now on SIGINT raises KeyboardInterrupt, for who ends in order by that; one that is ignored stays so."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def interrupted_between(report: Callable[[int, int], None] | None) -> Iterator[Callable[[int, int], None]]:
    """What to tell of progress in place of `report`: it raises Interrupted after a first SIGINT, SIGTERM or SIGHUP that
    is not ignored. Until progress is told the work goes on, to its end if need be; a second SIGINT or SIGTERM ends the
    process, whichever came first. SIGHUP does not: a terminal that is closed sends several.
    """
    asked: int | None = None

    def on_signal(number: int, frame: object) -> None:
        nonlocal asked
        asked = asked or number
        if number != signal.SIGHUP:
            for each in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(each) is on_signal:
                    signal.signal(each, _end)

    def tell(done: int, total: int) -> None:
        if asked is not None:
            raise Interrupted(asked)
        if report is not None:
            report(done, total)

    with ends_heard(on_signal):
        yield tell


@contextmanager
def ends_heard(on_signal: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within it SIGINT, SIGTERM and SIGHUP call `on_signal`, but for those that are ignored (nohup)."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: object) -> NoReturn:
    try:
        stderr = FileIO(2, "w", closefd=False)  # not sys.stderr, which may be in use
        stderr.write((_CLEARED if stderr.isatty() else b"") + b"nbdimg: interrupted\n")
    finally:
        os._exit(128 + number)
