"""What was done to files, and what a guest was told, in one order.

A `Trace` belongs to one run: every file and every guest request of the run takes its times from the trace's clock, so
that any two events can be compared. Times are counts of events.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from nbdimg.storage.file import Buffer

SECTOR = 512
"""Bytes that a disk writes whole or not at all."""

ZEROES = bytes(SECTOR)
NEVER = 1 << 62
TURNS_MAX = 4
"""Turns of the loop that a waiting call of a RecordingFile takes at most."""


class Kind(Enum):
    DATA = "data"
    """Bytes at an offset: a write, or a punch or zero as the zeroes that it leaves."""
    SIZE = "size"
    """A truncate, down or up."""
    EXTEND = "extend"
    """What a write past the end of the file does to its size: pending beside the bytes, kept or lost alone."""


Piece = tuple[int, int, bytes]
"""Sector index in the file, offset within the sector, bytes; all of the sector unless the operation begins or ends in
it."""


@dataclass(slots=True, eq=False)
class Operation:
    """One change of a file. `file` indexes `Trace.files`; `size` is in bytes, for SIZE and EXTEND."""

    file: int
    kind: Kind
    started: int
    offset: int = 0
    data: bytes = b""
    size: int = 0
    ended: int = NEVER
    is_failed: bool = False
    _pieces: list[Piece] | None = None

    @property
    def pieces(self) -> list[Piece]:
        """The operation cut at sectors: what a torn write consists of."""
        if self._pieces is None:
            self._pieces = list(self._cut())
        return self._pieces

    def _cut(self) -> Iterator[Piece]:
        position = 0
        while position < len(self.data):
            index, skip = divmod(self.offset + position, SECTOR)
            count = min(SECTOR - skip, len(self.data) - position)
            yield index, skip, self.data[position : position + count]
            position += count

    def races(self, other: Operation) -> bool:
        """Whether both were in flight at one time on the same bytes."""
        return (
            self.file == other.file
            and self.kind is other.kind is Kind.DATA
            and self.started < other.ended
            and other.started < self.ended
            and self.offset < other.offset + len(other.data)
            and other.offset < self.offset + len(self.data)
        )

    def __str__(self) -> str:
        what = f"{self.offset}+{len(self.data)}" if self.kind is Kind.DATA else f"{self.size}"
        return f"@{self.started} {self.kind.value} {what} (file {self.file})"


@dataclass(slots=True, eq=False)
class Sync:
    """A barrier of one file; it covers nothing until it has ended well."""

    file: int
    started: int
    ended: int = NEVER
    is_failed: bool = False


@dataclass(slots=True, eq=False)
class Change:
    """A guest request that changes sectors from `first` on.

    `values`: what it puts there, a sector each. A change that is not `is_definite` may also leave any of its sectors as
    they were: a trim, or the tail that a shrinking disk loses. `is_durable`: durable when acked (FUA). `size`: the
    disk's size in bytes from then on, for a resize.
    """

    first: int
    values: list[bytes]
    submitted: int
    is_definite: bool = True
    is_durable: bool = False
    size: int | None = None
    acked: int = NEVER
    is_failed: bool = False


@dataclass(slots=True, eq=False)
class Flush:
    submitted: int
    acked: int = NEVER
    is_failed: bool = False


@dataclass(slots=True, eq=False)
class Step:
    """Something that a scenario did which is no guest I/O: `name` is the scenario's own word for its checker."""

    name: str
    submitted: int
    acked: int = NEVER


@dataclass
class Trace:
    """`guest`: the disk's bytes at the start, whole sectors; a crash never brings back anything older.

    `rng` decides how long a waiting call takes; without it, none waits.
    """

    guest: bytes = b""
    rng: random.Random | None = None
    now: int = 0
    files: list[RecordingFile] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    syncs: list[Sync] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    flushes: list[Flush] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def tick(self) -> int:
        self.now += 1
        return self.now

    def until_now(self) -> Trace:
        """A copy to which nothing is added."""
        return Trace(self.guest, None, self.now, list(self.files), list(self.operations), list(self.syncs))

    def races(self) -> Iterator[tuple[Operation, Operation]]:
        """Pairs of operations that were in flight together on the same bytes: the outcome is nobody's choice."""
        running: list[Operation] = []
        for operation in self.operations:
            running = [other for other in running if other.ended > operation.started]
            yield from ((other, operation) for other in running if other.races(operation))
            running.append(operation)


class RecordingFile:
    """A file in memory that writes down all that happens to it. A BlockFile.

    Waiting calls take effect as they return, after up to TURNS_MAX turns of the loop. `inline_share` of the `try_`
    calls are done at once, the others say no; 0 switches them off. Barriers whose number is in `failing_syncs` (the
    first is 0) raise EIO. Waiting writes whose number is in `failing_writes` raise ENOSPC: the writer sees none of the
    bytes, a crash may show any of them.
    """

    pages = None

    def __init__(self, trace: Trace, content: Buffer, path: str = "recorded", *, inline_share: float = 0.5) -> None:
        self.path = path
        self.is_writable = True
        self.initial = bytes(content)
        self.content = bytearray(content)
        self.inline_share = inline_share
        self.failing_syncs: frozenset[int] = frozenset()
        self.failing_writes: frozenset[int] = frozenset()
        self._trace = trace
        self._index = len(trace.files)
        self._sync_count = 0
        self._write_count = 0
        trace.files.append(self)

    @property
    def size(self) -> int:
        return len(self.content)

    async def _wait(self) -> None:
        rng = self._trace.rng
        if rng is not None:
            for _ in range(rng.randint(1, TURNS_MAX)):
                await asyncio.sleep(0)

    def _is_inline(self) -> bool:
        rng = self._trace.rng
        return self.inline_share > 0 and (rng is None or rng.random() < self.inline_share)

    def _start(self, offset: int, data: bytes) -> list[Operation]:
        trace = self._trace
        now = trace.tick()
        operations = [Operation(self._index, Kind.DATA, now, offset, data)]
        if offset + len(data) > self.size:
            operations.append(Operation(self._index, Kind.EXTEND, now, size=offset + len(data)))
        trace.operations.extend(operations)
        return operations

    def _end(self, operations: list[Operation], *, is_failed: bool = False) -> None:
        now = self._trace.tick()
        for operation in operations:
            operation.ended = now
            operation.is_failed = is_failed

    def _put(self, offset: int, data: bytes) -> None:
        if offset > self.size:
            self.content.extend(bytes(offset - self.size))
        self.content[offset : offset + len(data)] = data

    def _get(self, offset: int, view: memoryview) -> None:
        count = max(0, min(len(view), self.size - offset))
        view[:count] = memoryview(self.content)[offset : offset + count]
        view[count:] = bytes(len(view) - count)

    def try_pread(self, offset: int, view: memoryview) -> bool:
        if not self._is_inline():
            return False
        self._get(offset, view)
        return True

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        if not self._is_inline():
            return False
        operations = self._start(offset, bytes(data))
        self._put(offset, operations[0].data)
        self._end(operations)
        return True

    async def pread(self, offset: int, view: memoryview) -> None:
        await self._wait()
        self._get(offset, view)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        operations = self._start(offset, bytes(data))
        is_failed = self._write_count in self.failing_writes
        self._write_count += 1
        await self._wait()
        if not is_failed:
            self._put(offset, operations[0].data)
        self._end(operations, is_failed=is_failed)
        if is_failed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def fdatasync(self) -> None:
        trace = self._trace
        sync = Sync(self._index, trace.tick(), is_failed=self._sync_count in self.failing_syncs)
        self._sync_count += 1
        trace.syncs.append(sync)
        await self._wait()
        sync.ended = trace.tick()
        if sync.is_failed:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def punch(self, offset: int, length: int) -> bool:
        return await self.zero(offset, length)

    async def zero(self, offset: int, length: int) -> bool:
        count = max(0, min(length, self.size - offset))
        operations = self._start(offset, bytes(count)) if count else []
        await self._wait()
        if operations:
            self._put(offset, operations[0].data)
        self._end(operations)
        return True

    async def truncate(self, size: int) -> None:
        operation = Operation(self._index, Kind.SIZE, self._trace.tick(), size=size)
        self._trace.operations.append(operation)
        await self._wait()
        del self.content[size:]
        self.content.extend(bytes(size - self.size))
        self._end([operation])

    async def prefetch(self, offset: int, length: int) -> None:
        pass

    def try_data_extent(self, offset: int) -> tuple[bool, int]:
        return True, self.size

    async def data_extent(self, offset: int) -> tuple[bool, int]:
        return self.try_data_extent(offset)

    async def close(self) -> None:
        pass
