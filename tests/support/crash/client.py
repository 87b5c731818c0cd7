"""The guest's side: requests to an open image, each written down in the trace as it is submitted and answered."""

from __future__ import annotations

import random
import struct
from collections.abc import Awaitable, Callable
from typing import Protocol

from nbdimg.errors import NbdimgError
from nbdimg.export.export import Export, Status, Work
from nbdimg.image.image import Image
from nbdimg.wire.constants import Command, CommandFlag
from nbdimg.wire.messages import Request
from tests.support.crash.trace import SECTOR, Change, Flush, Step, Trace

PATTERN = struct.Struct("<4sIQ")
"""Every 16 bytes of a written sector: a mark, the sector's index, a serial number that no other write has."""

assert SECTOR % PATTERN.size == 0


class Target(Protocol):
    """An open image as a guest sees it."""

    @property
    def size(self) -> int: ...

    def submit(self, request: Request) -> Work[Status | None] | None: ...

    async def read(self, offset: int, length: int) -> bytes: ...

    async def close(self) -> None: ...


class ExportTarget:
    """An image behind an Export: the fast path first, and the real order among overlapping requests."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.export = Export("crash", image, payload_max=1 << 25)

    @property
    def size(self) -> int:
        return self.image.size

    def submit(self, request: Request) -> Work[Status | None] | None:
        return self.export.submit(request)

    async def read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        view = memoryview(data)
        for segment in await self.export.read(offset, view):
            if segment.is_hole:
                start = segment.offset - offset
                view[start : start + segment.length] = bytes(segment.length)
        return bytes(data)

    async def close(self) -> None:
        await self.export.close()


def written(index: int, serial: int) -> bytes:
    """The bytes of sector `index` in write number `serial`: found anywhere, they say where they belong."""
    return PATTERN.pack(b"DATA", index, serial) * (SECTOR // PATTERN.size)


class Client:
    """Requests on whole sectors. Any number may run at once; on overlapping ranges they take effect in the order of
    submission, which the target must keep.

    A request that fails raises, unless `may_fail`: then it answers False, and its change may be there in any part.
    `serial`: writes are numbered from the next one on; of another client that wrote to the same image, far away.
    """

    def __init__(self, trace: Trace, target: Target, *, may_fail: bool = False, serial: int = 0) -> None:
        self.trace = trace
        self.target = target
        self.may_fail = may_fail
        self.size = len(trace.guest)
        self.failure_count = 0
        self._serial = serial

    def pattern(self, offset: int, length: int) -> bytes:
        """New bytes for a write there, unlike all others."""
        self._serial += 1
        first = offset // SECTOR
        return b"".join(written(index, self._serial) for index in range(first, first + length // SECTOR))

    async def write(self, offset: int, data: bytes, *, is_durable: bool = False) -> bool:
        request = self._request(Command.WRITE, offset, len(data), is_durable, data)
        return await self.change(offset, data, lambda: self._run(request), is_durable=is_durable)

    async def zero(self, offset: int, length: int, *, is_durable: bool = False, may_unmap: bool = True) -> bool:
        request = self._request(Command.WRITE_ZEROES, offset, length, is_durable)
        request.flags |= 0 if may_unmap else int(CommandFlag.NO_HOLE)
        return await self.change(offset, bytes(length), lambda: self._run(request), is_durable=is_durable)

    async def trim(self, offset: int, length: int, *, is_durable: bool = False) -> bool:
        request = self._request(Command.TRIM, offset, length, is_durable)
        return await self.change(
            offset, bytes(length), lambda: self._run(request), is_durable=is_durable, is_definite=False
        )

    def _request(
        self, command: Command, offset: int, length: int, is_durable: bool, data: bytes | None = None
    ) -> Request:
        flags = int(CommandFlag.FUA) if is_durable else 0
        payload = None if data is None else memoryview(data)
        request = Request(int(command), flags, 0, offset, length, payload)
        request.owns_payload = data is not None
        return request

    async def _run(self, request: Request) -> None:
        work = self.target.submit(request)
        if work is not None:
            await work

    async def change(
        self,
        offset: int,
        data: bytes,
        action: Callable[[], Awaitable[object]],
        *,
        is_durable: bool = False,
        is_definite: bool = True,
        size: int | None = None,
    ) -> bool:
        """Whatever `action` does, it makes the guest's bytes from `offset` on `data`: a request, or a snapshot that
        is gone back to. With `size` the disk has that many bytes then.
        """
        assert offset % SECTOR == len(data) % SECTOR == 0
        values = [data[start : start + SECTOR] for start in range(0, len(data), SECTOR)]
        change = Change(offset // SECTOR, values, self.trace.tick(), is_definite, is_durable, size)
        self.trace.changes.append(change)
        change.is_failed = not await self._attempt(action)
        change.acked = self.trace.tick()
        return not change.is_failed

    async def _attempt(self, action: Callable[[], Awaitable[object]]) -> bool:
        try:
            await action()
        except (OSError, NbdimgError):
            self.failure_count += 1
            if not self.may_fail:
                raise
            return False
        return True

    async def flush(self) -> bool:
        request = Request(int(Command.FLUSH), 0, 0, 0, 0)
        flush = Flush(self.trace.tick())
        self.trace.flushes.append(flush)
        flush.is_failed = not await self._attempt(lambda: self._run(request))
        flush.acked = self.trace.tick()
        return not flush.is_failed

    async def resize(self, size: int, action: Callable[[], Awaitable[object]]) -> bool:
        """`action` makes the disk `size` bytes, durably. What shrinking cuts off may be lost from the start on; what
        growing adds is zeroes.
        """
        old, self.size = self.size, min(size, self.size)
        start, stop = min(size, old), max(size, old)
        is_done = await self.change(
            start, bytes(stop - start), action, is_durable=True, is_definite=size >= old, size=size
        )
        self.size = size if is_done else self.size
        return is_done

    async def step(self, name: str, action: Callable[[], Awaitable[object]]) -> bool:
        """Something that leaves the guest's bytes alone. The checker is told its name: begun, and done."""
        step = Step(name, self.trace.tick())
        self.trace.steps.append(step)
        is_done = await self._attempt(action)
        if is_done:
            step.acked = self.trace.tick()
        return is_done


async def requests(client: Client, rng: random.Random, count: int, *, length_max: int, flushes: float = 0.12) -> None:
    """`count` random requests, one after the other: half of them writes, the rest zeroes, trims and flushes.

    `length_max`: bytes in one request at most, but for one in sixteen which takes four times as much. `flushes`: the
    share of flushes. Run several to have requests in flight together.
    """
    for _ in range(count):
        if rng.random() < flushes:
            await client.flush()
            continue
        sectors = client.size // SECTOR
        most = max(1, length_max * (4 if rng.random() < 1 / 16 else 1) // SECTOR)
        first = rng.randrange(sectors)
        length = min(rng.randint(1, most), sectors - first) * SECTOR
        offset, is_durable, choice = first * SECTOR, rng.random() < 1 / 16, rng.random()
        if choice < 0.6:
            await client.write(offset, client.pattern(offset, length), is_durable=is_durable)
        elif choice < 0.8:
            await client.zero(offset, length, is_durable=is_durable, may_unmap=rng.random() < 0.7)
        else:
            await client.trim(offset, length, is_durable=is_durable)
