"""The three standard streams, also where the process was started without, and where what is printed finds no space.

Imports next to nothing, for the health check.
"""

from __future__ import annotations

import os
import stat
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import NoReturn, TextIO

from nbdimg.errors import printable

EXIT_FAILED, EXIT_USAGE = 1, 2


def open_standard_streams() -> None:
    """Where one of the three was closed, the first file to be opened would take its place, and be written to.

    What the locale's encoding does not have is printed escaped.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free is this one
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def take_no_wait_at_stderr() -> None:
    """Have a write to a terminal or a pipe end where there is no room for more, for this process alone. Not where they
    may not be opened anew: a pipe of another user.
    """
    if os.isatty(2) or stat.S_ISFIFO(os.fstat(2).st_mode):
        with suppress(OSError):
            again = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            os.dup2(again, 2)
            os.close(again)


def complain(message: str) -> None:
    """What went wrong, in one line that steers no terminal; where nobody can be told, the exit status is left."""
    with suppress(OSError):
        print(f"nbdimg: {printable(' '.join(message.split()))}", file=sys.stderr)


def exit_with(status: int) -> NoReturn:
    """End the program; with EXIT_FAILED where its output has not arrived and nothing else was wrong."""
    is_printed = flushed(sys.stdout)
    flushed(sys.stderr)
    sys.exit(status if is_printed else status or EXIT_FAILED)


def flushed(stream: TextIO) -> bool:
    """Whether all of the output has arrived. If not that is said, and the rest dropped."""
    error = flush(stream)
    if error is not None and not isinstance(error, BrokenPipeError):
        complain(f"{stream.name}: {error.strerror}")
    return error is None


def flush(stream: TextIO) -> OSError | None:
    """Returns why not all of the output could be written; the rest is dropped then: Python would change the status for
    it.
    """
    try:
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None
