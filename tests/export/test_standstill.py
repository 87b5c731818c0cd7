"""An export at a standstill: what is in flight ends before it, what comes meanwhile waits, and finds another size."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from nbdimg.errors import RequestError
from nbdimg.export.export import Export
from nbdimg.formats.raw import resize
from nbdimg.wire.constants import Command, CommandFlag
from nbdimg.wire.messages import Request
from tests.export.test_export import (
    CONTEXTS,
    SIZE,
    held_export,
    memory_export,
    plain,
    release_all,
    settle,
    start,
    write,
)
from tests.support.faultfile import HeldFile

FUA = int(CommandFlag.FUA)


class Standstill:
    """One that begins when it can and lasts until `end`."""

    def __init__(self, export: Export, change: Callable[[], Awaitable[object]] | None = None) -> None:
        self.has_begun = False
        self._end = asyncio.Event()
        self._export = export
        self._change = change
        self.task = asyncio.create_task(self._stand())

    async def _stand(self) -> None:
        async with self._export.standstill():
            self.has_begun = True
            await self._end.wait()
            if self._change is not None:
                await self._change()

    def end(self) -> None:
        self._end.set()


async def finish(file: HeldFile, task: asyncio.Task[Any]) -> None:
    await release_all(file, task)
    await task


IN_FLIGHT: dict[str, Callable[[Export], Awaitable[Any] | None]] = {
    "read": lambda export: export.read(1024, memoryview(bytearray(512))),
    "write": lambda export: export.submit(write(1024, b"w" * 512)),
    "write with FUA": lambda export: export.submit(write(1024, b"w" * 512, FUA)),
    "trim": lambda export: export.submit(plain(Command.TRIM, 1024, 512)),
    "zeroes": lambda export: export.submit(plain(Command.WRITE_ZEROES, 1024, 512)),
    "flush": lambda export: export.submit(plain(Command.FLUSH)),
}


@pytest.mark.parametrize("kind", [kind for kind in IN_FLIGHT if kind != "write with FUA"])
def test_standstill_waits_for_what_is_in_flight(kind: str) -> None:
    async def main() -> None:
        export, file = held_export()
        work = start(IN_FLIGHT[kind](export))
        await settle()
        assert file.held, "the request does not wait for its file"
        still = Standstill(export)
        await settle()
        assert not still.has_begun
        await finish(file, work)
        await settle()
        assert still.has_begun
        still.end()
        await still.task

    asyncio.run(main())


@pytest.mark.timeout(30)
def test_standstill_waits_for_a_flush_that_is_not_the_first_without_holding_up_the_loop() -> None:
    async def main() -> None:
        export, file = held_export()
        await finish(file, start(IN_FLIGHT["flush"](export)))
        export.image.gate.changed()
        flush = start(IN_FLIGHT["flush"](export))
        await settle()
        still = Standstill(export)
        await settle()
        assert not still.has_begun
        await finish(file, flush)
        await settle()
        assert still.has_begun
        still.end()
        await still.task

    asyncio.run(main())


@pytest.mark.parametrize("kind", [*IN_FLIGHT, "block status", "cache"])
def test_what_comes_during_a_standstill_waits_for_its_end(kind: str) -> None:
    more: dict[str, Callable[[Export], Awaitable[Any] | None]] = {
        "block status": lambda export: export.submit(plain(Command.BLOCK_STATUS), CONTEXTS),
        "cache": lambda export: export.submit(plain(Command.CACHE)),
    }

    async def main() -> None:
        export, file = held_export()
        still = Standstill(export)
        await settle()
        assert still.has_begun
        work = start((IN_FLIGHT | more)[kind](export))
        await settle()
        assert not file.held
        assert not work.done()
        still.end()
        await still.task
        await finish(file, work)

    asyncio.run(main())


def test_write_that_would_be_done_at_once_waits_during_a_standstill() -> None:
    async def main() -> None:
        export, file = memory_export()
        still = Standstill(export)
        await settle()
        work = start(export.submit(write(0, b"late")))
        assert export.try_read(0, 4, memoryview(bytearray(4))) == 0
        await settle()
        assert "try_pwrite" not in file.calls
        still.end()
        await still.task
        await work
        found = bytearray(4)
        assert export.try_read(0, 4, memoryview(found)) == 4
        assert found == b"late"

    asyncio.run(main())


def test_flush_behind_a_write_in_the_queue_waits_for_the_end_of_a_standstill() -> None:
    """The write is older than the standstill, its flush would begin within it."""

    async def main() -> None:
        export, file = held_export()
        work = start(export.submit(write(0, b"w" * 512, FUA)))
        await settle()
        still = Standstill(export)
        for _ in range(2):
            await settle()
            file.release(0)
        await settle()
        assert still.has_begun
        assert not file.held
        assert not work.done()
        still.end()
        await still.task
        await finish(file, work)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("request_", "number"),
    [
        (write(SIZE - 512, b"w" * 512), errno.ENOSPC),
        (plain(Command.WRITE_ZEROES, SIZE - 512), errno.ENOSPC),
        (plain(Command.TRIM, SIZE - 512), errno.EINVAL),
        (plain(Command.CACHE, SIZE - 512), errno.EINVAL),
        (plain(Command.BLOCK_STATUS, SIZE - 512), errno.EINVAL),
    ],
)
def test_request_that_waited_while_the_disk_became_smaller_is_refused(request_: Request, number: int) -> None:
    async def main() -> None:
        export, _ = memory_export()
        still = Standstill(export, lambda: resize(export.image, SIZE // 2))
        await settle()
        work = start(export.submit(request_, CONTEXTS))
        reading = start(export.read(SIZE - 512, memoryview(bytearray(512))))
        still.end()
        await still.task
        assert export.info.size == SIZE // 2
        with pytest.raises(RequestError) as refused:
            await work
        assert refused.value.errno == number
        with pytest.raises(RequestError) as refused:
            await reading
        assert refused.value.errno == errno.EINVAL
        with pytest.raises(RequestError):
            export.try_read(SIZE - 512, SIZE, memoryview(bytearray(512)))
        assert export.inflight.count == 0

    asyncio.run(main())


def test_standstill_that_fails_lets_requests_go_on() -> None:
    async def main() -> None:
        export, file = memory_export()
        file.fail("truncate", errno.EIO)
        still = Standstill(export, lambda: resize(export.image, 512))
        await settle()
        work = start(export.submit(write(0, b"late")))
        still.end()
        with pytest.raises(OSError, match="Input/output error"):
            await still.task
        await work
        assert export.info.size == SIZE

    asyncio.run(main())
