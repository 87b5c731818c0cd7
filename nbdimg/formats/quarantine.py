"""How much freed space may wait for the flush that lets it be used again.

A client need not flush. What it frees and writes again would take new space each time, and a small disk fill the file
system of all; so beyond this a flush is made for it.
"""

from __future__ import annotations

from nbdimg.units import MiB

WAITING_MIN = 256 * MiB
"""Bytes that may wait whatever the file's size: a flush for each cluster would cost more than the space is worth."""

FILE_SHARE = 16
"""One in so many of the file's bytes may wait: to trim all of a file takes as many flushes, however large it is."""

RUNS_MAX = 16384
"""Runs that may wait: a few MiB of memory."""


def is_full(waiting_bytes: int, run_count: int, file_bytes: int) -> bool:
    """Whether a flush should be made before more is freed or allocated."""
    return waiting_bytes > max(WAITING_MIN, file_bytes // FILE_SHARE) or run_count > RUNS_MAX
