"""Reading a short file whole, without waiting for ever."""

from __future__ import annotations

import errno
import os
import select
from time import monotonic


def read_short(path: str | os.PathLike[str], size_max: int, patience_s: float) -> bytes:
    """All that a file or a pipe holds, up to one byte more than `size_max`, within `patience_s`. Blocks.

    Raises: OSError: TimeoutError: it is a FIFO, and nobody has written to it and closed it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        poll, until_s, content = select.poll(), monotonic() + patience_s, b""
        poll.register(descriptor, select.POLLIN)
        while len(content) <= size_max:
            if not poll.poll(max(0.0, until_s - monotonic()) * 1000):
                raise TimeoutError(errno.ETIMEDOUT, "it is a FIFO, and its writer does not come to an end")
            piece = os.read(descriptor, size_max + 1 - len(content))
            if not piece:
                break
            content += piece
        return content
    finally:
        os.close(descriptor)
