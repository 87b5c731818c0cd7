"""READs that are sent from the page cache: the bytes that a read would have given, whatever comes in between."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from struct import unpack_from

import pytest

from nbdimg.export.lane import MAPPED_FROM
from nbdimg.formats.raw import RawDriver
from nbdimg.image.image import Image
from nbdimg.server.outbox import Outbox
from nbdimg.storage import mapped
from nbdimg.storage.memory import MemoryFile
from nbdimg.storage.posix import PosixFile
from nbdimg.storage.system import Residence
from tests.server.test_lane import DIALECTS, Conversation, converse, request

SIZE = 4 << 20
CONTENT = random.Random(1).randbytes(SIZE)
READ, WRITE, TRIM, FUA = 0, 1, 4, 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def mapped_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each send took from the page cache."""
    counts: list[int] = []
    send = Outbox._send_mapped

    def counting(self: Outbox, view: memoryview) -> int:
        counts.append(sum(len(resident.view) for _, resident in self.mapped))
        return send(self, view)

    monkeypatch.setattr(Outbox, "_send_mapped", counting)
    return counts


def answers(stream: list[bytes], dialect: str, path: Path) -> bytes:
    async def main() -> bytes:
        file = PosixFile(path, writable=True)
        try:
            return await converse(stream, dialect, Image(RawDriver(file), writable=True))
        finally:
            await file.close()

    return asyncio.run(main())


def read_data(replies: bytes, requests: dict[int, tuple[int, int]]) -> dict[int, bytes]:
    """Structured replies to READs of (offset, length): what each cookie was given."""
    data = {cookie: bytearray(length) for cookie, (_, length) in requests.items()}
    at = 0
    while at < len(replies):
        magic, _, kind, cookie, length = unpack_from(">IHHQI", replies, at)
        assert (magic, kind) == (0x668E33EF, 1)
        (offset,) = unpack_from(">Q", replies, at + 20)
        start = offset - requests[cookie][0]
        data[cookie][start : start + length - 8] = replies[at + 28 : at + 20 + length]
        at += 20 + length
    return {cookie: bytes(content) for cookie, content in data.items()}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_replies_are_those_of_a_file_that_is_read(path: Path, dialect: str, mapped_bytes: list[int]) -> None:
    """Writes between them too, plain ones and such as take the general path: each finds its place in the order."""
    source, extended = random.Random(2), DIALECTS[dialect][1]
    stream = []
    for cookie in range(80):
        length = source.choice([512, 4096, MAPPED_FROM - 1, MAPPED_FROM, MAPPED_FROM + 777, 3 * MAPPED_FROM])
        offset = source.randrange(SIZE // 4)
        command, flags = source.choice([(READ, 0), (READ, 0), (READ, 0), (WRITE, 0), (WRITE, FUA)])
        length = min(length, 20000) if command == WRITE else length
        payload = source.randbytes(length) if command == WRITE else b""
        stream.append(request(extended, command, flags, cookie, offset, length, payload))

    async def expected() -> bytes:
        file = MemoryFile(CONTENT, writable=True)
        return await converse(stream, dialect, Image(RawDriver(file), writable=True))

    assert answers(stream, dialect, path) == asyncio.run(expected())
    assert sum(mapped_bytes) > 20 * MAPPED_FROM


def test_a_write_while_a_change_is_in_flight_comes_behind_a_read(path: Path, mapped_bytes: list[int]) -> None:
    """A TRIM closes the lane, and the WRITE behind it takes the general path."""
    length = MAPPED_FROM
    stream = [
        request(False, READ, 0, 1, 0, length, b""),
        request(False, TRIM, 0, 2, SIZE - 4096, 4096, b""),
        request(False, WRITE, 0, 3, 0, 4096, bytes(4096)),
    ]
    assert answers(stream, "simple", path)[16 : 16 + length] == CONTENT[:length]
    assert sum(mapped_bytes) == length


def test_a_file_of_which_a_send_has_waited_is_read(
    path: Path, mapped_bytes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "SLOW_S", 0)
    monkeypatch.setattr(mapped, "SLOW_PAUSES", 1e9)
    reads = dict.fromkeys((1, 2), (0, SIZE))
    stream = [request(False, READ, 0, cookie, *where, b"") for cookie, where in reads.items()]
    assert read_data(answers(stream, "structured", path), reads) == dict.fromkeys(reads, CONTENT)
    assert len(mapped_bytes) == 1


def test_a_long_read_is_sent_in_pieces(path: Path, mapped_bytes: list[int]) -> None:
    reads = {1: (0, SIZE), 2: (777, 2 << 20), 3: (SIZE - (300 << 10), 300 << 10)}
    stream = [request(False, READ, 0, cookie, *where, b"") for cookie, where in reads.items()]
    replies = answers(stream, "structured", path)
    expected = {cookie: CONTENT[offset : offset + length] for cookie, (offset, length) in reads.items()}
    assert read_data(replies, reads) == expected
    assert sum(mapped_bytes) > SIZE


@pytest.mark.parametrize("kind", ["in the lane", "a stream"])
def test_a_file_cut_between_question_and_send_reads_as_zeroes(
    path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does when it is read: no signal ends the server, and the reply is whole."""
    length, cut = (MAPPED_FROM, 4096) if kind == "in the lane" else (SIZE // 2, SIZE // 4 + 512)
    is_whole = Residence.is_whole

    def cutting(self: Residence, address: int, start: int, stop: int) -> bool:
        answer = is_whole(self, address, start, stop)
        os.truncate(path, cut)
        return answer or start >= cut

    monkeypatch.setattr(Residence, "is_whole", cutting)
    replies = answers([request(False, READ, 0, 1, 0, length, b"")], "structured", path)
    assert read_data(replies, {1: (0, length)}) == {1: CONTENT[:cut] + bytes(length - cut)}


def test_a_client_that_is_slow_gets_what_was_there(path: Path) -> None:
    """What a full socket did not take is copied, before anybody changes it."""

    async def main() -> tuple[bytes, bytes]:
        file = PosixFile(path, writable=True)
        with Conversation("structured", Image(RawDriver(file), writable=True)) as conversation:
            shell = conversation._shell
            count = (1 << 20) // MAPPED_FROM - 1
            reads = [request(False, READ, 0, cookie, cookie * MAPPED_FROM, MAPPED_FROM, b"") for cookie in range(count)]
            view = conversation.transmission.buffers()[0]
            stream = b"".join(reads)
            view[: len(stream)] = stream
            conversation.shared.spinner.touch()
            conversation.transmission.received(len(stream))
            assert shell.outbox.pending_bytes
            assert file.try_pwrite(0, bytes(512 << 10))
            assert file.try_pwrite(512 << 10, bytes(512 << 10))
            replies = await conversation.rest()
        await file.close()
        return replies, b"".join(CONTENT[cookie * MAPPED_FROM :][:MAPPED_FROM] for cookie in range(count))

    replies, expected = asyncio.run(main())
    count = len(expected) // MAPPED_FROM
    data = read_data(replies, {cookie: (cookie * MAPPED_FROM, MAPPED_FROM) for cookie in range(count)})
    assert b"".join(data.values()) == expected
