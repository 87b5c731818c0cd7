"""Order on disk as data: a plan is stages of writes with a barrier behind each.

Planning is pure and lives in the formats; running is the same for all. A plan holds bytes, not tables: what changes
while it runs is for the next plan.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

from nbdimg.histogram import Histogram
from nbdimg.storage.file import BlockFile

T = TypeVar("T")

OUT_OF_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of a write that say nothing about what was written before: it may be tried again when there is space, or when
the file may be longer.
"""


class UnwrittenError(OSError):
    """A write of a plan failed before its barrier: nothing that the kernel had accepted is in doubt, and the same
    plan, or a later one that holds its writes, may be run again.
    """


class Hindrance(OSError):
    """What a change needs first cannot be read, or no more space be taken: nothing that was written is in doubt."""


async def hindered(work: Awaitable[T]) -> T:
    """Of what reads alone. Raises: Hindrance. ImageError."""
    try:
        return await work
    except OSError as error:
        raise Hindrance(error.errno, error.strerror) from None


def leaves_no_doubt(error: BaseException) -> bool:
    """Whether all that was written before this error is as good as before it."""
    is_full = isinstance(error, UnwrittenError) and error.errno in OUT_OF_SPACE
    return is_full or isinstance(error, Hindrance)


@contextmanager
def space_may_wait() -> Iterator[None]:
    """Around what a later plan, or a later call, does as well when there is space. Raises: OSError: leaves a doubt."""
    try:
        yield
    except OSError as error:
        if not leaves_no_doubt(error):
            raise


@dataclass(frozen=True, slots=True)
class Write:
    """`data` goes to `offset` bytes into `file`."""

    file: BlockFile
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Stage:
    """`writes` in any order among themselves, then a barrier on each of `files`; without writes it is a barrier alone,
    which makes the data written before it durable. `done` is told when the stage is over, its barriers too.
    """

    writes: tuple[Write, ...]
    files: tuple[BlockFile, ...]
    done: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """All of a stage is durable before the next begins."""

    stages: tuple[Stage, ...]


def merged(writes: Iterable[Write]) -> tuple[Write, ...]:
    """The same writes with neighbours joined, each file's in order of offset. No two of them overlap."""
    joined: list[Write] = []
    pieces: list[bytes] = []
    end = 0
    for write in sorted(writes, key=lambda each: (each.file.path, each.offset)):
        if pieces and joined[-1].file is write.file and end == write.offset:
            pieces.append(write.data)
        else:
            _close(joined, pieces)
            joined.append(write)
            pieces = [write.data]
        end = write.offset + len(write.data)
    _close(joined, pieces)
    return tuple(joined)


def _close(joined: list[Write], pieces: list[bytes]) -> None:
    if len(pieces) > 1:
        joined[-1] = Write(joined[-1].file, joined[-1].offset, b"".join(pieces))


async def run(plan: Plan, times: Histogram | None = None) -> None:
    """Carry out a plan; on an error no write is under way any more, and from that stage on nothing is durable.

    Args: times: is told how long each file's barrier took.

    Raises: UnwrittenError: a write failed. OSError: a barrier failed, and what was written may be lost.
    """
    for stage in plan.stages:
        if stage.writes:
            writes = (write.file.pwrite(write.offset, write.data) for write in stage.writes)
            for outcome in await asyncio.gather(*writes, return_exceptions=True):
                if isinstance(outcome, OSError):
                    raise UnwrittenError(outcome.errno, outcome.strerror) from None
                if isinstance(outcome, BaseException):
                    raise outcome
        for file in stage.files:
            started_s = perf_counter()
            await file.fdatasync()
            if times is not None:
                times.add(perf_counter() - started_s)
        if stage.done is not None:
            stage.done()


async def write_durably(file: BlockFile, offset: int, data: bytes) -> None:
    """One write, with a barrier behind it. Raises: as `run`."""
    await run(Plan((Stage((Write(file, offset, data),), (file,)),)))
