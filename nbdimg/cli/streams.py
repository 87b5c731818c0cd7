"""The three standard streams, also where the process was started without."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper


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
