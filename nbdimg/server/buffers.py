"""Memory for payloads: counted, limited, and reused.

Large buffers are anonymous maps, which the kernel gives page by page and takes back whole; making one costs a page
fault for every 4 KiB, so the few that a busy client needs are kept.
"""

from __future__ import annotations

import mmap

from nbdimg.limits import PIECE_SIZE
from nbdimg.units import KiB, MiB

KEPT_BYTES_MAX = 8 * MiB
"""Free buffers kept for reuse."""

MAPPED_FROM = 128 * KiB
"""Buffers from this size on are maps."""

SMALL_SHARE = 4
"""One in so many bytes of the limit is for buffers of up to PIECE_SIZE alone: a few clients whose long payloads are
slow to come do not keep all others from theirs."""


class BufferPool:
    """Buffers in powers of two. `limit` bounds the bytes lent out; a request that alone is larger is lent alone."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.lent_bytes = 0
        self._was_used = False
        self._kept_bytes = 0
        self._kept: dict[int, list[memoryview]] = {}

    def has_room(self, length: int) -> bool:
        limit = self.limit if length <= PIECE_SIZE else self.limit - self.limit // SMALL_SHARE
        return self.lent_bytes == 0 or self.lent_bytes + length <= limit

    def take(self, length: int) -> memoryview:
        """A buffer of `length` bytes with any content; `give` must follow."""
        self.lent_bytes += length
        self._was_used = True
        size = 1 << (length - 1).bit_length() if length else 1
        kept = self._kept.get(size)
        if kept:
            self._kept_bytes -= size
            return kept.pop()[:length]
        if size >= MAPPED_FROM:
            return memoryview(mmap.mmap(-1, size))[:length]
        return memoryview(bytearray(size))[:length]

    def give(self, view: memoryview) -> None:
        """Take back what `take` lent; the caller has dropped every other view of it."""
        self.lent_bytes -= len(view)
        whole = memoryview(view.obj)
        size = len(whole)
        if self._kept_bytes + size <= KEPT_BYTES_MAX:
            self._kept_bytes += size
            self._kept.setdefault(size, []).append(whole)

    def tidy(self) -> None:
        """Give kept buffers back to the system if none was taken since the last call."""
        if not self._was_used:
            self._kept.clear()
            self._kept_bytes = 0
        self._was_used = False
