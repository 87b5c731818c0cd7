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

SHORT_SHARE = 4
"""One in so many bytes of the limit is for buffers of up to PIECE_SIZE alone: a few clients whose long payloads are
slow to come do not keep all others from theirs."""


class BufferPool:
    """Buffers in powers of two. `limit` bounds the bytes lent out.

    Long ones, of more than PIECE_SIZE, are lent in the order in which they were first asked for, and while somebody
    waits for one, short ones have no more than their share: many short ones would else leave no room for a long one,
    ever. What alone is longer than the limit is lent when no other long one is.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.lent_bytes = 0
        self._short_bytes = 0
        """Of those, the ones in short buffers."""
        self._line: dict[object, None] = {}
        """Who waits for a long buffer, in order."""
        self._was_used = False
        self._kept_bytes = 0
        self._kept: dict[int, list[memoryview]] = {}

    def take(self, length: int, asker: object) -> memoryview | None:
        """A buffer of `length` bytes with any content, for which `give` must follow; or None for now.

        An asker who is refused a long one is in line until it takes it, or `leave`s; it asks for one at a time.
        """
        if length <= PIECE_SIZE:
            if not self._has_short_room(length):
                return None
            self._short_bytes += length
        else:
            self._line.setdefault(asker)
            if next(iter(self._line)) is not asker or not self._has_long_room(length):
                return None
            del self._line[asker]
        self.lent_bytes += length
        self._was_used = True
        return self._made(length)

    def _has_short_room(self, length: int) -> bool:
        if not self._short_bytes or self._short_bytes + length <= self.limit // SHORT_SHARE:
            return True
        return not self._line and self.lent_bytes + length <= self.limit

    def _has_long_room(self, length: int) -> bool:
        share = self.limit // SHORT_SHARE
        long_bytes = self.lent_bytes - self._short_bytes
        if long_bytes and long_bytes + length > self.limit - share:
            return False
        return self._short_bytes <= share or self.lent_bytes + length <= self.limit

    def leave(self, asker: object) -> bool:
        """Wait no longer for a long buffer. Returns whether it did."""
        was_waiting = asker in self._line
        self._line.pop(asker, None)
        return was_waiting

    def _made(self, length: int) -> memoryview:
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
        if len(view) <= PIECE_SIZE:
            self._short_bytes -= len(view)
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
