"""Requests that cannot be served now, for want of a buffer or for too many, or not at all: each has its answer."""

from __future__ import annotations

import asyncio
import errno
import math
import random
from collections.abc import Callable
from struct import unpack_from

import pytest

from nbdimg.errors import CorruptImage
from nbdimg.formats.raw import RawDriver
from nbdimg.image.image import Image
from nbdimg.limits import PIECE_SIZE, Limits
from nbdimg.storage.file import Buffer
from nbdimg.storage.memory import MemoryFile
from tests.server.test_lane import DIALECTS, SIZE, Conversation, chunks_of, request
from tests.support.faultfile import FaultFile

CONTENT = random.Random(3).randbytes(SIZE)
LENGTHS = [4096, PIECE_SIZE, PIECE_SIZE + 1, 700_000]

pytestmark = pytest.mark.timeout(30)


def answers(replies: bytes, dialect: str) -> dict[int, tuple[int, bytes]]:
    """(error number, data) by cookie; READs alone bring data, and these are as long as their cookie says."""
    found: dict[int, tuple[int, bytes]] = {}
    if dialect != "simple":
        for _, kind, cookie, payload in chunks_of(replies, DIALECTS[dialect][1]):
            number, data = found.get(cookie, (0, b""))
            if kind == 1:
                data += payload[8:]
            elif kind:
                (number,) = unpack_from(">I", payload)
            found[cookie] = number, data
        return found
    while replies:
        magic, number, cookie = unpack_from(">IIQ", replies)
        assert magic == 0x67446698
        length = 0 if number else cookie
        found[cookie] = number, replies[16 : 16 + length]
        replies = replies[16 + length :]
    return found


class Starved:
    """A conversation over a slow file, with one buffer for all clients, and that one lent to another."""

    def __init__(self, dialect: str) -> None:
        self.file = FaultFile(MemoryFile(CONTENT), slow_only=True)
        image = Image(RawDriver(self.file), writable=True)
        self.talk = Conversation(dialect, image, Limits(total_bytes=512))
        self.pool = self.talk.shared.pool
        self._lent = self.talk.shared.take(512, "another")

    def relieve(self) -> None:
        assert self._lent is not None
        self.talk.shared.give(self._lent)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def read(dialect: str, length: int) -> bytes:
    """Its cookie is its length."""
    return request(DIALECTS[dialect][1], 0, 0, length, SIZE - 700_000, length, b"")


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_reads_are_answered_when_there_is_room(dialect: str, length: int) -> None:
    async def main() -> None:
        starved = Starved(dialect)
        with starved.talk as talk:
            replies = talk.ask(read(dialect, length) + read(dialect, 512))
            await settle()
            assert "pread" not in starved.file.calls
            starved.relieve()
            replies += await talk.rest()
            await settle()
            replies += await talk.rest()
        start = SIZE - 700_000
        assert answers(replies, dialect) == {each: (0, CONTENT[start : start + each]) for each in (length, 512)}
        assert starved.pool.lent_bytes == 0

    asyncio.run(main())


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_reads_that_fail_give_their_buffers_back(dialect: str, length: int) -> None:
    async def main() -> None:
        starved = Starved(dialect)
        starved.relieve()
        starved.file.fail("pread", errno.EIO)
        with starved.talk as talk:
            for _ in range(2):
                replies = talk.ask(read(dialect, length)) + await talk.rest()
                assert answers(replies, dialect) == {length: (errno.EIO, b"")}
                assert starved.pool.lent_bytes == 0

    asyncio.run(main())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_payload_is_taken_when_there_is_room(dialect: str) -> None:
    """Behind its header, which has come with a part of it."""
    data = random.Random(4).randbytes(600_000)

    async def main() -> None:
        starved = Starved(dialect)
        write = request(DIALECTS[dialect][1], 1, 0, 0, 512, len(data), data) + read(dialect, 512)
        with starved.talk as talk:
            assert talk.ask(write[:100_000]) == b""
            await settle()
            assert talk.transmission.is_paused
            starved.relieve()
            await settle()
            assert not talk.transmission.is_paused
            replies = talk.ask(write[100_000:]) + await talk.rest()
            await settle()
            replies += await talk.rest()
            expected = CONTENT[:512] + data + CONTENT[512 + len(data) :]
            start = SIZE - 700_000
            assert answers(replies, dialect) == {0: (0, b""), 512: (0, expected[start : start + 512])}
            assert await content(starved) == expected
        assert starved.pool.lent_bytes == 0

    asyncio.run(main())


async def content(starved: Starved) -> bytes:
    found = bytearray(SIZE)
    await starved.file.pread(0, memoryview(found))
    return bytes(found)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_requests_beyond_those_in_flight_are_handled_when_others_are_done(dialect: str) -> None:
    async def main() -> None:
        file = FaultFile(MemoryFile(CONTENT), slow_only=True)
        lengths = [512 * number for number in range(1, 21)]
        with Conversation(dialect, Image(RawDriver(file), writable=True), Limits(requests_in_flight=3)) as talk:
            replies = talk.ask(b"".join(read(dialect, length) for length in lengths))
            assert 0 < talk.transmission.in_flight <= 3
            for _ in range(10):
                replies += await talk.rest()
                await settle()
            start = SIZE - 700_000
            assert answers(replies, dialect) == {each: (0, CONTENT[start : start + each]) for each in lengths}

    asyncio.run(main())


class HoleFile(MemoryFile):
    def try_data_extent(self, offset: int) -> tuple[bool, int]:
        return False, SIZE


def test_streams_that_the_socket_takes_at_once_let_others_be_handled() -> None:
    async def main() -> None:
        image = Image(RawDriver(HoleFile(bytes(SIZE))), writable=True)
        with Conversation("structured", image, Limits(requests_in_flight=1)) as talk:
            replies = talk.ask(b"".join(read("structured", 700_000 - number) for number in range(5)))
            for _ in range(10):
                await settle()
                replies += await talk.rest()
            assert {cookie for _, _, cookie, _ in chunks_of(replies, False)} == {*range(699_996, 700_001)}

    asyncio.run(main())


def test_error_that_nobody_foresaw_leaves_nothing_in_the_arena_of_all_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        with Conversation("structured", Image(RawDriver(MemoryFile(CONTENT)), writable=True)) as talk:
            counts = iter((-4096,))
            monkeypatch.setattr(talk.export, "try_read", lambda offset, *_: next(counts) + offset % 512)
            talk.ask(read("structured", 700_000))
            talk.shared.rounds.left_s = math.inf
            with pytest.raises(StopIteration):
                talk.transmission._pump()
            assert talk._shell.outbox.fill == 0

    asyncio.run(main())


class FailingFile(MemoryFile):
    """What is tried at once fails."""

    def __init__(self, error: Exception) -> None:
        super().__init__(CONTENT)
        self._error = error

    def try_pread(self, offset: int, view: memoryview) -> bool:
        raise self._error

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        raise self._error


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), CorruptImage("disk", "broken")], ids=["file", "image"])
def test_requests_that_fail_at_once_have_an_answer_each(dialect: str, error: Exception) -> None:
    """Plain ones, those with a flag, and a stream."""
    extended = DIALECTS[dialect][1]
    stream = [
        request(extended, command, flags, 512 + 8 * command + flags, 0, 512, bytes(512) * command)
        for command in (0, 1)
        for flags in (0, 1)
    ]
    if dialect != "simple":
        stream.append(read(dialect, 700_000))

    async def main() -> None:
        with Conversation(dialect, Image(RawDriver(FailingFile(error)), writable=True)) as talk:
            replies = talk.ask(b"".join(stream))
            for _ in range(3):
                await settle()
                replies += await talk.rest()
            cookies = [512, 513, 520, 521, *([700_000] if dialect != "simple" else [])]
            assert answers(replies, dialect) == dict.fromkeys(cookies, (errno.EIO, b""))

    asyncio.run(main())


WAITING: dict[str, Callable[[str], bytes]] = {
    "short read": lambda dialect: read(dialect, 4096),
    "long read": lambda dialect: read(dialect, 700_000),
    "payload": lambda dialect: request(DIALECTS[dialect][1], 1, 0, 0, 0, 600_000, bytes(100_000)),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind", WAITING)
@pytest.mark.parametrize("is_relieved", [False, True])
def test_client_that_has_gone_takes_no_buffer_and_holds_none(dialect: str, kind: str, is_relieved: bool) -> None:
    async def main() -> None:
        starved = Starved(dialect)
        with starved.talk as talk:
            assert talk.ask(WAITING[kind](dialect)) == b""
            if is_relieved:
                starved.relieve()
                await settle()
            talk.hang_up()
            if not is_relieved:
                starved.relieve()
            await settle()
        assert starved.pool.lent_bytes == 0
        assert starved.talk.shared.take(SIZE, "another") is not None, "nobody is in line"

    asyncio.run(main())
