"""Ctrl-C: the process ends there and then, whatever it is doing.

An exception or a cancelled task would begin to undo what workers still write. To the image the end is a crash, and
every verb's order of writing is made for that. Verbs that would lose something by a crash, or leave half a file, hear
of the signal where they can end in order.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from typing import NoReturn

EXIT_INTERRUPTED = 128 + signal.SIGINT

_CLEARED = b"\r\x1b[2K\x1b[?25h"
"""On a terminal: the line of a progress bar is emptied, and the cursor seen again."""


class Interrupted(Exception):
    """Somebody has pressed Ctrl-C, and the work has ended in order."""

    def __init__(self) -> None:
        super().__init__("interrupted")


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
    """What to tell of progress in place of `report`: it raises Interrupted after a first SIGINT. Until progress is told
    the work goes on, to its end if need be; a second SIGINT ends the process.
    """
    is_asked = False

    def on_signal(number: int, frame: object) -> None:
        nonlocal is_asked
        is_asked = True
        signal.signal(signal.SIGINT, _end)

    def tell(done: int, total: int) -> None:
        if is_asked:
            raise Interrupted
        if report is not None:
            report(done, total)

    ends_at_once = signal.getsignal(signal.SIGINT) is _end
    if ends_at_once:
        signal.signal(signal.SIGINT, on_signal)
    try:
        yield tell
    finally:
        if ends_at_once:
            signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: object) -> NoReturn:
    try:
        stderr = FileIO(2, "w", closefd=False)  # not sys.stderr, which may be in use
        stderr.write((_CLEARED if stderr.isatty() else b"") + b"nbdimg: interrupted\n")
    finally:
        os._exit(EXIT_INTERRUPTED)
