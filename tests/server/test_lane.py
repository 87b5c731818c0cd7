"""The fast lane answers as the general path does (L1), and leaves to it what is not plain (L2)."""

from __future__ import annotations

import asyncio
import math
import random
import socket
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from struct import pack, unpack_from
from typing import Any, NamedTuple, Self

import pytest

from nbdimg.config import ExportConfig, ServerConfig
from nbdimg.errors import ProtocolError
from nbdimg.export.export import Export
from nbdimg.export.lane import Lane, Run
from nbdimg.export.registry import Registry
from nbdimg.formats.raw import RawDriver
from nbdimg.image import turns
from nbdimg.image.image import HeadGuard, Image
from nbdimg.limits import ARENA_SIZE, PIECE_SIZE, Limits
from nbdimg.server import rounds
from nbdimg.server.outbox import Outbox
from nbdimg.server.shared import Shared
from nbdimg.server.transmission import Transmission
from nbdimg.storage.file import Buffer
from nbdimg.storage.memory import MemoryFile
from nbdimg.uri import NbdUri
from nbdimg.wire.constants import TransmissionFlag
from nbdimg.wire.handshake import Session
from tests.server.tls_live import LiveServer, files
from tests.support.faultfile import HeldFile
from tests.support.rawclient import connect_negotiated
from tests.support.rawprotocol import Command

SIZE = 1 << 20
DIALECTS = {"simple": (False, False), "structured": (True, False), "extended": (True, True)}


class Shell:
    """A connection without its loop: what the transmission phase asks for is done or ignored."""

    def __init__(self, sock: socket.socket, shared: Shared) -> None:
        self.outbox = Outbox(sock, shared, self._on_room, lambda error: None)
        self.transmission: Transmission | None = None

    def _on_room(self) -> None:
        if self.transmission is not None:
            self.transmission.on_room()

    def pause(self) -> None: ...

    def unpause(self) -> None: ...

    def finish_input(self) -> None: ...

    def close_if_done(self) -> None: ...

    def protocol_error(self, error: ProtocolError) -> None:
        raise error


class Outcome(NamedTuple):
    replies: bytes
    content: bytes


def request(extended: bool, command: int, flags: int, cookie: int, offset: int, length: int, payload: bytes) -> bytes:
    if extended:
        flags |= (1 << 5) if command == 1 else 0
        return pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length) + payload
    return pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length) + payload


def random_stream(seed: int, extended: bool) -> list[bytes]:
    """Plain requests for the most part, with flags, unknown commands, ends and edges between them."""
    source = random.Random(seed)
    stream = []
    for cookie in range(60):
        command = source.choice([0, 0, 0, 1, 1, 1, 2 + 1, 5, 6 + 3, 8])
        length = source.choice([0, 1, 511, 512, 4096, 4096, 65536])
        offset = source.choice([0, 512, source.randrange(SIZE), SIZE - length, SIZE - length + 1])
        flags = source.choice([0, 0, 0, 0, 0, 1 << 2, 1 << 9])
        payload = source.randbytes(length) if command == 1 else b""
        stream.append(request(extended, command, flags, cookie, offset, length, payload))
    return stream


def run_stream(stream: list[bytes], dialect: str, *, writable: bool, guarded: bool) -> Outcome:
    """Every reply to `stream`, received in turns of a few requests, and the image afterwards."""

    async def main() -> Outcome:
        file = MemoryFile(random.Random(1).randbytes(SIZE), writable=writable)
        guard = HeadGuard(512, lambda head: "no" if head.startswith(b"\xff") else None) if guarded else None
        replies = await converse(stream, dialect, Image(RawDriver(file), writable=writable, guard=guard))
        return Outcome(replies, bytes(file.content))

    return asyncio.run(main())


class Conversation:
    """One client's transmission phase over a socket pair, without a server's loop around it."""

    def __init__(self, dialect: str, image: Image, limits: Limits | None = None) -> None:
        self.export = Export("e", image, payload_max=1 << 26)
        registry = Registry()
        registry.add(self.export)
        self.shared = Shared(asyncio.get_running_loop(), registry, limits or Limits())
        structured, extended = DIALECTS[dialect]
        flags = self.export.info.flags | (TransmissionFlag.SEND_DF if structured else TransmissionFlag(0))
        session = Session(self.export.info, flags, structured, extended, False, {})
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._theirs.setblocking(False)
        self._shell = Shell(self._ours, self.shared)
        self.transmission = Transmission(self._shell, self.shared, session, self.export, b"")
        self._shell.transmission = self.transmission

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._ours.close()
        self._theirs.close()

    def ask(self, requests: bytes) -> bytes:
        """They arrive; returns what is answered at once."""
        while requests:
            view = self.transmission.buffers()[0]
            count = min(len(view), len(requests))
            view[:count] = requests[:count]
            self.shared.spinner.touch()
            self.transmission.received(count)
            requests = requests[count:]
        return drain(self._theirs)

    def hang_up(self) -> None:
        """The client is gone, as a server learns when it sends."""
        self._shell.outbox.discard()
        self.transmission.on_broken()

    async def rest(self) -> bytes:
        """What is answered until nothing is in flight any more."""
        replies = bytearray()
        while self.shared.tasks or self.transmission.in_flight or self._shell.outbox.pending_bytes:
            await asyncio.sleep(0)
            replies += drain(self._theirs)
        return bytes(replies) + drain(self._theirs)


async def converse(stream: list[bytes], dialect: str, image: Image, *, turn: int = 7) -> bytes:
    """Every reply to `stream`, of which `turn` requests come at a time. The order does not hang on the clock: no
    operation leaves the turn to others because it has taken long, and the connection does not either.
    """
    replies = bytearray()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "FIRST_S", math.inf)
        patch.setattr(rounds, "ROUND_S", math.inf)
        with Conversation(dialect, image) as conversation:
            for at in range(0, len(stream), turn):
                replies += conversation.ask(b"".join(stream[at : at + turn]))
                replies += await conversation.rest()
    return bytes(replies)


def noting_run(answered: list[int]) -> Callable[..., Run]:
    """`Lane.run` that appends how many requests each run answered."""
    run = Lane.run

    def noting(self: Lane, *arguments: Any, may_map: bool) -> Run:
        result = run(self, *arguments, may_map=may_map)
        answered.append(result.answered)
        return result

    return noting


def drain(sock: socket.socket) -> bytes:
    taken = bytearray()
    while True:
        try:
            taken += sock.recv(1 << 20)
        except BlockingIOError:
            return bytes(taken)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("writable", "guarded"), [(True, False), (True, True), (False, False)])
def test_lane_gives_the_replies_and_the_image_of_the_general_path(
    monkeypatch: pytest.MonkeyPatch, dialect: str, writable: bool, guarded: bool
) -> None:
    answered: list[int] = []
    noting = noting_run(answered)
    for seed in range(12):
        stream = random_stream(seed, DIALECTS[dialect][1])
        monkeypatch.setattr(Lane, "run", noting)
        fast = run_stream(stream, dialect, writable=writable, guarded=guarded)
        monkeypatch.setattr(Lane, "run", lambda self, receiver, fill, count_max, may_map: Run(fill, 0))
        assert fast == run_stream(stream, dialect, writable=writable, guarded=guarded), f"seed {seed}"
    assert sum(answered) > 12 * 5


def test_comparison_notices_a_lane_that_answers_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = random_stream(0, False)
    right = run_stream(stream, "structured", writable=True, guarded=False)
    monkeypatch.setattr(MemoryFile, "try_pread", lambda self, offset, view: True)
    assert run_stream(stream, "structured", writable=True, guarded=False) != right


class PartlyHeldFile(HeldFile):
    """Only the calls that begin in the first half have to wait."""

    def try_pread(self, offset: int, view: memoryview) -> bool:
        self.is_inline = offset >= SIZE // 2
        return super().try_pread(offset, view)

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        self.is_inline = offset >= SIZE // 2
        return super().try_pwrite(offset, data)


@pytest.mark.parametrize(
    ("command", "answered"), [(0, {0: 1, 1: 0}), (1, {0: 0, 1: 0})], ids=["a read waits", "a write waits"]
)
def test_lane_takes_reads_beside_a_slow_read_and_nothing_beside_a_slow_change(
    monkeypatch: pytest.MonkeyPatch, command: int, answered: dict[int, int]
) -> None:
    """`answered`: how many requests of each command the lane takes meanwhile; all get their answer at once."""
    runs: list[int] = []
    monkeypatch.setattr(Lane, "run", noting_run(runs))
    data = bytes(512)

    async def main() -> None:
        file = PartlyHeldFile(bytes(SIZE))
        with Conversation("simple", Image(RawDriver(file), writable=True)) as conversation:
            assert conversation.ask(request(False, command, 0, 1, 0, 512, data * command)) == b""
            for beside, count in answered.items():
                runs.clear()
                replies = conversation.ask(request(False, beside, 0, 2, SIZE // 2, 512, data * beside))
                assert replies == pack(">IIQ", 0x67446698, 0, 2) + data * (not beside)
                assert sum(runs) == count
            await asyncio.sleep(0)
            while file.held:
                file.release(0)
                await asyncio.sleep(0)
            assert len(await conversation.rest()) == 16 + 512 * (not command)

    asyncio.run(main())


def test_request_behind_a_full_socket_that_the_send_of_the_turn_empties_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So it may be under TLS, where ciphertext that waits leaves together with the bytes of a turn."""
    send_turn = Outbox.send_turn

    def emptying(self: Outbox) -> None:
        send_turn(self)
        self.pending_bytes = 0

    async def main() -> None:
        with Conversation("simple", Image(RawDriver(MemoryFile(bytes(SIZE))), writable=True)) as conversation:
            monkeypatch.setattr(Outbox, "send_turn", emptying)
            conversation._shell.outbox.pending_bytes = Limits().output_bytes
            fua = 1
            replies = conversation.ask(b"".join(request(False, 0, fua, each, 0, 512, b"") for each in range(3)))
            for _ in range(3):
                await asyncio.sleep(0)
                replies += await conversation.rest()
                replies += drain(conversation._theirs)
            assert len(replies) == 3 * (16 + 512)

    asyncio.run(main())


class CutFile(MemoryFile):
    """Its data ends in the middle of a sector, until something is written."""

    stop = 1000

    def try_data_extent(self, offset: int) -> tuple[bool, int]:
        return (True, self.stop) if offset < self.stop else (False, SIZE)

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        self.stop = SIZE
        return super().try_pwrite(offset, data)


@pytest.mark.parametrize("dialect", ["structured", "extended"])
def test_sector_in_which_stored_data_ends_is_read_at_one_moment(dialect: str) -> None:
    """As where the backing file of an overlay ends: the READ is a stream, and here a WRITE comes between its pieces."""
    extended = DIALECTS[dialect][1]

    async def main() -> bytes:
        image = Image(RawDriver(CutFile(b"a" * 1000 + bytes(SIZE - 1000))), writable=True)
        with Conversation(dialect, image) as conversation:
            conversation.transmission._limits = Limits(turn_bytes=1)
            replies = conversation.ask(request(extended, 0, 0, 1, 0, 4096, b""))
            await asyncio.sleep(0)
            replies += conversation.ask(request(extended, 1, 0, 2, 512, 512, b"b" * 512))
            return replies + await conversation.rest()

    replies = asyncio.run(main())
    assert b"a" * 1000 in replies
    assert b"b" not in replies, "half of the sector is older than the WRITE, half is newer"


def test_read_behind_a_write_that_allocates_sees_it(tmp_path: Path) -> None:
    """All three are handled in one run: what the first READ has looked up is true no more."""
    (golden,) = files(tmp_path, ["golden"])
    export = ExportConfig(str(golden), "golden", "raw", overlay="per-client", overlay_directory=str(tmp_path))
    uri = NbdUri.parse(f"nbd+unix:///?socket={tmp_path / 's'}")
    with LiveServer(ServerConfig((export,), (uri,))) as server, connect_negotiated(server.address, "golden") as client:
        for offset in range(0, 1 << 20, 1 << 17):
            read, again = client.reads(2, 4096, offset)
            write = client.new_request(Command.WRITE, offset, 4096, payload=b"w" * 4096)
            client.send_requests([read, write, again])
            found = {reply.cookie: reply for reply in client.read_replies(3)}
            assert found[again.cookie].data == b"w" * 4096


@pytest.mark.parametrize("last", ["read", "write", "flush", "error"])
def test_request_behind_reads_that_fill_the_arena_is_answered(last: str) -> None:
    """Its own reply just fits, or does not and goes out after theirs."""
    content = random.Random(2).randbytes(SIZE)
    command, offset, length, payload, number, data = {
        "read": (0, 0, 512, b"", 0, content[:512]),
        "write": (1, 0, 512, b"w" * 512, 0, b""),
        "flush": (3, 0, 0, b"", 0, b""),
        "error": (0, 1, SIZE, b"", 22, b""),
    }[last]

    async def main() -> None:
        for left in (0, 1, 15, 16, 17, 16 + 511, 16 + 512, 256 * 16 - 1, 256 * 16):
            sizes = [PIECE_SIZE - 16] * (ARENA_SIZE // PIECE_SIZE - 1) + [PIECE_SIZE - 16 - left]
            stream = [request(False, 0, 0, cookie, cookie, size, b"") for cookie, size in enumerate(sizes)]
            stream.append(request(False, command, 0, 9, offset, length, payload))
            expected = [
                pack(">IIQ", 0x67446698, 0, cookie) + content[cookie : cookie + size]
                for cookie, size in enumerate(sizes)
            ]
            expected.append(pack(">IIQ", 0x67446698, number, 9) + data)
            image = Image(RawDriver(MemoryFile(content)), writable=True)
            assert await converse(stream, "simple", image, turn=len(stream)) == b"".join(expected), left

    asyncio.run(main())


class PatchyFile(MemoryFile):
    """Every other run of its bytes is a hole; of what is asked for at once, some has to be waited for."""

    def __init__(self, source: random.Random) -> None:
        super().__init__(bytes(SIZE))
        self._source = source
        self._ends = sorted({SIZE, *(source.randrange(1, SIZE // 512) * 512 for _ in range(source.choice([2, 9, 60])))})
        for start, stop in list(pairwise([0, *self._ends]))[::2]:
            self.content[start:stop] = source.randbytes(stop - start)

    def try_data_extent(self, offset: int) -> tuple[bool, int]:
        index = bisect_right(self._ends, offset)
        return index % 2 == 0, self._ends[index]

    def try_pread(self, offset: int, view: memoryview) -> bool:
        return self._source.random() < 0.7 and super().try_pread(offset, view)

    async def pread(self, offset: int, view: memoryview) -> None:
        super().try_pread(offset, view)


def chunks_of(replies: bytes, extended: bool) -> Iterator[tuple[int, int, int, bytes]]:
    """(flags, type, cookie, payload) of each chunk. Spec: proto.md "Structured reply chunk message"."""
    while replies:
        if extended:
            magic, flags, kind, cookie, _, length = unpack_from(">IHHQQQ", replies)
        else:
            magic, flags, kind, cookie, length = unpack_from(">IHHQI", replies)
        assert magic == (0x6E8A278C if extended else 0x668E33EF)
        start = 32 if extended else 20
        yield flags, kind, cookie, replies[start : start + length]
        replies = replies[start + length :]


@pytest.mark.parametrize("dialect", ["structured", "extended"])
def test_chunks_of_reads_over_holes_and_slow_data_cover_each_byte_once(dialect: str) -> None:
    """Many at once, short ones and streams; a chunk marked DONE is the last of its reply."""
    extended = DIALECTS[dialect][1]
    for seed in range(12):
        source = random.Random(seed)
        file = PatchyFile(source)
        asked = {}
        for cookie in range(12):
            length = source.choice([0, 1, 512, 4096, 100_000, PIECE_SIZE, PIECE_SIZE + 1, 700_000])
            offset = source.randrange(SIZE - length + 1)
            asked[cookie] = (source.choice([offset, offset & ~511]), length)
        stream = [request(extended, 0, 0, cookie, *where, b"") for cookie, where in asked.items()]
        replies = asyncio.run(converse(stream, dialect, Image(RawDriver(file), writable=True), turn=4))
        found = {cookie: bytearray(length) for cookie, (_, length) in asked.items()}
        seen = dict.fromkeys(asked, 0)
        done = set()
        for flags, kind, cookie, payload in chunks_of(replies, extended):
            assert cookie not in done
            if flags & 1:
                done.add(cookie)
            if kind == 0:
                assert (flags, payload) == (1, b"")
                continue
            offset, data = unpack_from(">Q", payload)[0] - asked[cookie][0], payload[8:]
            assert kind in (1, 2)
            if kind == 2:
                data = bytes(unpack_from(">I", data)[0])
            assert data
            assert offset == seen[cookie], "in order, and without a gap"
            found[cookie][offset : offset + len(data)] = data
            seen[cookie] += len(data)
            assert flags & 1 or (asked[cookie][0] + seen[cookie]) % 512 == 0, "T3"
        assert done == set(asked)
        for cookie, (offset, length) in asked.items():
            assert seen[cookie] == length
            assert found[cookie] == file.content[offset : offset + length], (seed, cookie)
