"""Space in the file: taken from the end, which grows ahead of need, or from what blocks gave up in this session.

    used ──free──▶ freed ──capture──▶ leaving ──reclaim: punched──▶ free ──take──▶ used

Space that earlier sessions left unused is not looked for: that would take remembering the whole BAT; `compact` does.
"""

from __future__ import annotations

import asyncio
import errno
import os
from contextlib import suppress

from nbdimg.formats import quarantine
from nbdimg.formats.vhdx.structs import FILE_OFFSET_MAX
from nbdimg.image.driver import Miss
from nbdimg.storage.file import BlockFile
from nbdimg.units import MiB, align_up

GROWTH = 64 * MiB
"""How far ahead of need the file is extended. It is sparse there, and an orderly end cuts it off again."""


class Space:
    """Offsets and lengths are multiples of 1 MiB. Args: start: behind the last structure, and where blocks reach."""

    def __init__(self, file: BlockFile, start: int) -> None:
        self._file = file
        self.grown = file.size
        """The file's size."""
        self.end = align_up(max(self.grown, start), MiB)
        """Behind the last structure or block that is in use."""
        self._growth = GROWTH
        self._free: list[tuple[int, int]] = []
        self._freed: list[tuple[int, int]] = []
        self._freed_bytes = 0
        self._leaving: list[tuple[int, int]] = []
        self._growing = asyncio.Lock()

    def take(self, length: int) -> int | Miss:
        """The offset of space that reads as zeroes."""
        for index, (start, stop) in enumerate(self._free):
            if stop - start >= length:
                self._free[index : index + 1] = [(start + length, stop)] if stop - start > length else []
                return start
        if self.end + length > self.grown:
            return Miss(self, self.end + length)
        start, self.end = self.end, self.end + length
        return start

    def shorten(self) -> int:
        """Give up what is free at the end; returns where the file may end."""
        self._free.sort()
        while self._free and self._free[-1][1] == self.end:
            self.end = self._free.pop()[0]
        return self.end

    async def load(self, key: int) -> None:
        """Extend the file to hold `key` bytes and some more. Raises: OSError."""
        if key > FILE_OFFSET_MAX:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), self._file.path)
        async with self._growing:
            if key > self.grown:
                size = align_up(key, self._growth)
                await self._file.truncate(size)
                self.grown = size

    def free(self, offset: int, length: int) -> None:
        """The space will be free once what gave it up is durable. What follows the last that came is one with it: each
        is a call, for which the flush waits.
        """
        start = self._freed.pop()[0] if self._freed and self._freed[-1][1] == offset else offset
        self._freed.append((start, offset + length))
        self._freed_bytes += length

    @property
    def is_strained(self) -> bool:
        """Whether too much waits for a flush to be free again."""
        return quarantine.is_full(self._freed_bytes, len(self._freed), self.end)

    def capture(self) -> None:
        """What has been freed so far leaves with the plan that is being made."""
        self._leaving += self._freed
        self._freed, self._freed_bytes = [], 0

    async def reclaim(self) -> None:
        """The captured plan is durable. What cannot be made to read as zeroes stays unused."""
        while self._leaving:
            start, stop = self._leaving.pop()
            with suppress(OSError):
                if await self._file.punch(start, stop - start) or await self._file.zero(start, stop - start):
                    self._free.append((start, stop))
