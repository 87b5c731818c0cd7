"""Files that misbehave on command.

`FaultFile` wraps any BlockFile: it counts calls, and raises or delays where it is told to. `HeldFile` completes its
waiting calls only when the test says so, in the order the test says.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from nbdimg.storage.file import BlockFile, Buffer
from nbdimg.storage.memory import MemoryFile


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def fail_at_each_call(run: Callable[[int], Coroutine[Any, Any, bool]]) -> int:
    """Await `run(0)`, `run(1)` and so on, each on a loop of its own, until one says that its `fail_at` was not reached.
    Returns how many were.
    """
    index = 0
    while asyncio.run(run(index)):
        index += 1
    return index


class FaultFile:
    """Passes everything on to `inner`.

    fail(method, number): every call of this method raises OSError(number) until `heal`.
    fail_at(k, number): the k-th call of any kind, counted from 0 from now on, raises; `is_reached`: it has.
    slow_only: `try_` methods say no, so that everything waits.
    delay: awaited before every waiting call that succeeds or fails.
    """

    pages = None

    def __init__(self, inner: BlockFile, *, slow_only: bool = False) -> None:
        self.inner = inner
        self.slow_only = slow_only
        self.delay: Callable[[str], Awaitable[None]] | None = None
        self.unsupported: set[str] = set()
        self.calls: list[str] = []
        self._failing: dict[str, int] = {}
        self.is_reached = False
        self._fail_at: tuple[int, int] | None = None

    def fail(self, method: str, number: int) -> None:
        self._failing[method] = number

    def fail_at(self, index: int, number: int) -> None:
        self.is_reached = False
        self._fail_at = (len(self.calls) + index, number)

    def heal(self) -> None:
        self._failing.clear()
        self._fail_at = None

    def _enter(self, method: str) -> None:
        index = len(self.calls)
        self.calls.append(method)
        if self._fail_at is not None and index == self._fail_at[0]:
            self.is_reached = True
            raise os_error(self._fail_at[1])
        if method in self._failing:
            raise os_error(self._failing[method])

    async def _wait(self, method: str) -> None:
        if self.delay is not None:
            await self.delay(method)

    @property
    def path(self) -> str:
        return self.inner.path

    @path.setter
    def path(self, path: str) -> None:
        self.inner.path = path

    @property
    def is_writable(self) -> bool:
        return self.inner.is_writable

    @is_writable.setter
    def is_writable(self, is_writable: bool) -> None:
        self.inner.is_writable = is_writable

    @property
    def size(self) -> int:
        return self.inner.size

    def try_pread(self, offset: int, view: memoryview) -> bool:
        if self.slow_only:
            return False
        self._enter("try_pread")
        return self.inner.try_pread(offset, view)

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        if self.slow_only:
            return False
        self._enter("try_pwrite")
        return self.inner.try_pwrite(offset, data)

    async def pread(self, offset: int, view: memoryview) -> None:
        await self._wait("pread")
        self._enter("pread")
        await self.inner.pread(offset, view)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        await self._wait("pwrite")
        self._enter("pwrite")
        await self.inner.pwrite(offset, data)

    async def fdatasync(self) -> None:
        await self._wait("fdatasync")
        self._enter("fdatasync")
        await self.inner.fdatasync()

    async def punch(self, offset: int, length: int) -> bool:
        await self._wait("punch")
        self._enter("punch")
        return "punch" not in self.unsupported and await self.inner.punch(offset, length)

    async def zero(self, offset: int, length: int) -> bool:
        await self._wait("zero")
        self._enter("zero")
        return "zero" not in self.unsupported and await self.inner.zero(offset, length)

    async def truncate(self, size: int) -> None:
        await self._wait("truncate")
        self._enter("truncate")
        await self.inner.truncate(size)

    async def prefetch(self, offset: int, length: int) -> None:
        await self._wait("prefetch")
        self._enter("prefetch")
        await self.inner.prefetch(offset, length)

    def try_data_extent(self, offset: int) -> tuple[bool, int] | None:
        if self.slow_only:
            return None
        self._enter("try_data_extent")
        return self.inner.try_data_extent(offset)

    async def data_extent(self, offset: int) -> tuple[bool, int]:
        await self._wait("data_extent")
        self._enter("data_extent")
        return await self.inner.data_extent(offset)

    async def close(self) -> None:
        await self.inner.close()


class HeldFile(MemoryFile):
    """A file in memory whose waiting calls take effect, and return, when the test releases them.

    `held` lists the calls that wait, oldest first, as (name, future). A call's effect happens in two steps, so that a
    reader of an unordered range could see one half of a write: each half waits for a release of its own.
    """

    def __init__(self, content: Buffer) -> None:
        super().__init__(content)
        self.held: list[tuple[str, asyncio.Future[None]]] = []
        self.is_inline = False

    async def _hold(self, name: str) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.held.append((name, future))
        await future

    def release(self, index: int) -> None:
        """Let the call at `index` of `held` go on."""
        self.held.pop(index)[1].set_result(None)

    def try_pread(self, offset: int, view: memoryview) -> bool:
        return self.is_inline and super().try_pread(offset, view)

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        return self.is_inline and super().try_pwrite(offset, data)

    async def pread(self, offset: int, view: memoryview) -> None:
        await self._hold("pread")
        half = len(view) // 2
        super().try_pread(offset, view[:half])
        await self._hold("pread")
        super().try_pread(offset + half, view[half:])

    async def pwrite(self, offset: int, data: Buffer) -> None:
        view = memoryview(data)
        half = len(view) // 2
        await self._hold("pwrite")
        super().try_pwrite(offset, view[:half])
        await self._hold("pwrite")
        super().try_pwrite(offset + half, view[half:])

    async def zero(self, offset: int, length: int) -> bool:
        half = length // 2
        await self._hold("zero")
        await super().zero(offset, half)
        await self._hold("zero")
        return await super().zero(offset + half, length - half)

    async def punch(self, offset: int, length: int) -> bool:
        return await self.zero(offset, length)

    async def fdatasync(self) -> None:
        await self._hold("fdatasync")


class TornFile(FaultFile):
    """The call that `fail_at` chooses writes the first half before it fails, when `tears` is set."""

    tears = False

    def _is_next(self) -> bool:
        return self.tears and self._fail_at is not None and len(self.calls) == self._fail_at[0]

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        if self._is_next() and not self.slow_only:
            self.inner.try_pwrite(offset, memoryview(data)[: len(data) // 2])
        return super().try_pwrite(offset, data)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        if self._is_next():
            await self.inner.pwrite(offset, memoryview(data)[: len(data) // 2])
        await super().pwrite(offset, data)
