"""Writing to the device begun early, for who flushes.

A flush waits until all that was written since the last one is on the device; meanwhile nothing had been done for it.
So where much is written in sequence, the device is told of it as it comes. Only a file that is flushed again and again
gains by that: another's bytes may be written over, or deleted, before the kernel would have touched the device.
"""

from __future__ import annotations

import asyncio

from nbdimg.storage import system
from nbdimg.storage.workers import workers
from nbdimg.units import MiB

RUN_SIZE = 4 * MiB
"""Bytes in sequence that are worth a call."""

UNFLUSHED_MAX = 256 * MiB
"""Bytes in sequence after which the next flush is not counted on any more."""


class WriteBack:
    """Of one descriptor, which must stay open until `close` is done. Nothing here fails: what the device says against
    the bytes, the flush that vouches for them gets to hear.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._start = self._stop = 0
        """The run that nobody was told of yet."""
        self._left = 0
        """Bytes that may still be told of before a flush must come."""
        self._telling: asyncio.Future[bool] | None = None

    def wrote(self, offset: int, length: int) -> None:
        """So many bytes went into the page cache."""
        if offset != self._stop:
            self._start = offset
        self._stop = offset + length
        if self._left > 0 and self._stop - self._start >= RUN_SIZE and self._telling is None:
            self._tell(self._start, self._stop - self._start)

    def _tell(self, offset: int, length: int) -> None:
        self._start += length
        self._left -= length
        self._telling = workers().run(system.begin_write_back, self._descriptor, offset, length)
        self._telling.add_done_callback(self._told)

    def _told(self, telling: asyncio.Future[bool]) -> None:
        self._telling = None
        if telling.cancelled() or telling.exception() is not None or not telling.result():
            self._left = 0

    def flushed(self) -> None:
        """All that was written is on the device."""
        self._start = self._stop
        self._left = UNFLUSHED_MAX

    async def close(self) -> None:
        """Wait for a call that is under way."""
        if self._telling is not None:
            await asyncio.wait([self._telling])
