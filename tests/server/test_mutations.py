"""Thousands of broken sessions against one live server, which must neither die nor stop serving.

Valid sessions are recorded from the client's side of real conversations; each case mutates one of them: flipped bits,
cut, doubled, dropped, reordered and mixed messages, boundary values in the length fields. Others are garbage. Cases
go out in batches of concurrent connections, most half-closed (the server has to come to an end by itself), some
reset. After each batch the same process must serve a fresh client within a second.

A case is a function of (seed, index) and the recordings: NBDIMG_TEST_SEED=N repeats a run.
"""

from __future__ import annotations

import os
import random
import select
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.server.live import Address, assert_alive, pattern_image
from tests.support.rawclient import Client
from tests.support.rawprotocol import (
    EXTENDED_REQUEST_MAGIC,
    MIB,
    OPTION_MAGIC,
    REQUEST_MAGIC,
    Command,
    CommandFlag,
    ConnectionClosed,
    Option,
    Rep,
    info_data,
    meta_data,
)
from tests.support.rss import descriptor_count, memory, settled_memory, wait_until
from tests.support.server import NbdimgServer, PeerServer, ServerProcess

SEED = int(os.environ.get("NBDIMG_TEST_SEED", "1"))
MUTATION_COUNT = 2500
GARBAGE_COUNT = 600
BATCH_SIZE = 25  # below any cap on clients that have not negotiated
END_LIMIT_S = 5.0  # for the server to end a half-closed connection
GROWTH_MAX = 16 * MIB
TOTAL_LIMIT_S = 60.0
CONTROL_COUNT = 1000

Session = tuple[bytes, ...]

BOUNDARIES = {
    2: (0, 1, 2, 7, 8, 0x7FFF, 0x8000, 0xFFFF),
    4: (
        0,
        1,
        3,
        4,
        4095,
        4096,
        4097,
        65536,
        65537,
        1 << 20,
        1 << 25,
        1 << 26,
        (1 << 26) + 1,
        0x7FFFFFFF,
        1 << 31,
        0xFFFFFFFF,
    ),
    8: (
        0,
        1,
        511,
        512,
        (1 << 20) - 1,
        1 << 20,
        1 << 26,
        (1 << 32) - 1,
        1 << 32,
        1 << 63,
        (1 << 64) - 512,
        (1 << 64) - 1,
    ),
}


# Recording


class Recorder(Client):
    """A client that keeps what it sends, one entry a message."""

    def __init__(self, address: Address) -> None:
        self.messages: list[bytes] = []
        super().__init__(address)

    def send(self, data: bytes) -> None:
        self.messages.append(data)
        super().send(data)


def record_reads_and_writes(client: Client) -> None:
    client.negotiate("disk", structured=False)
    assert client.write(4096, bytes(1000)).error == 0
    assert client.read(4096, 4096).error == 0
    assert client.request(Command.FLUSH).error == 0
    assert client.write(0, b"x" * 512, CommandFlag.FUA).error == 0
    client.disconnect()


def record_structured(client: Client) -> None:
    assert client.option(Option.LIST)[-1].type == Rep.ACK
    assert client.option(Option.LIST_META_CONTEXT, meta_data("disk", []))[-1].type in (Rep.ACK, Rep.ERR_INVALID)
    client.negotiate("disk", contexts=["base:allocation"])
    assert client.request(Command.BLOCK_STATUS, 0, MIB).error == 0
    assert client.read(0, 65536, CommandFlag.DF).error == 0
    assert client.read(0, MIB).error == 0
    assert client.request(Command.WRITE_ZEROES, 8192, 8192, CommandFlag.NO_HOLE).error == 0
    assert client.request(Command.TRIM, 65536, 65536).error == 0
    assert client.request(Command.CACHE, 0, 65536).error == 0
    client.disconnect()


def record_extended(client: Client) -> None:
    client.negotiate("disk", extended=True, contexts=["base:allocation"])
    assert client.write(12288, bytes(512)).error == 0
    assert client.request(Command.BLOCK_STATUS, 0, MIB, CommandFlag.REQ_ONE).error == 0
    assert client.read(8192, 65536).error == 0
    assert client.request(Command.WRITE_ZEROES, 0, 65536).error == 0
    client.disconnect()


def record_export_name(client: Client) -> None:
    client.export_name("disk")
    assert client.read(0, 4096).error == 0
    assert client.write(512, bytes(512)).error == 0
    client.disconnect()


def record_haggling(client: Client) -> None:
    assert client.option(0x7777, b"what?")[-1].type == Rep.ERR_UNSUP
    assert client.option(Option.INFO, info_data("disk", [1, 2, 3]))[-1].type == Rep.ACK
    assert client.option(Option.GO, info_data("elsewhere"))[-1].is_error
    assert client.option(Option.STARTTLS)[-1].is_error
    assert client.option(Option.ABORT)[-1].type == Rep.ACK


SCRIPTS = (record_reads_and_writes, record_structured, record_extended, record_export_name, record_haggling)


def record(address: Address) -> list[Session]:
    """What valid clients send, from the client flags on; every answer has been checked."""
    sessions = []
    for script in SCRIPTS:
        with Recorder(address) as client:
            client.greet()
            script(client)
            assert client.wait_closed(END_LIMIT_S) is not None
            sessions.append(tuple(client.messages))
    return sessions


# Mutating


def length_fields(message: bytes) -> list[tuple[int, int]]:
    """(offset, size) of the fields worth a boundary value: lengths, counts, offsets, flags, type."""
    magic_8, magic_4 = int.from_bytes(message[:8], "big"), int.from_bytes(message[:4], "big")
    if magic_8 == OPTION_MAGIC:
        inner = [(16, 4)] if len(message) >= 20 else []
        tail = [(len(message) - 2, 2), (len(message) - 4, 4)] if len(message) >= 22 else []
        return [(8, 4), (12, 4), (12, 4), *inner, *inner, *tail]
    if magic_4 == REQUEST_MAGIC:
        return [(4, 2), (6, 2), (16, 8), (24, 4), (24, 4)]
    if magic_4 == EXTENDED_REQUEST_MAGIC:
        return [(4, 2), (6, 2), (16, 8), (24, 8), (24, 8)]
    return [(0, 4)]


def flip_bits(generator: random.Random, messages: list[bytes], _: Sequence[Session]) -> None:
    index = generator.randrange(len(messages))
    data = bytearray(messages[index])
    for _flip in range(generator.choice([1, 1, 1, 2, 8])):
        # Most messages are a short header before a long payload: aim at the header half of the time.
        end = len(data) if generator.random() < 0.5 else min(len(data), 32)
        data[generator.randrange(end)] ^= 1 << generator.randrange(8)
    messages[index] = bytes(data)


def set_boundary(generator: random.Random, messages: list[bytes], _: Sequence[Session]) -> None:
    index = generator.randrange(len(messages))
    data = bytearray(messages[index])
    offset, size = generator.choice(length_fields(messages[index]))
    value = generator.choice(BOUNDARIES[size])
    if generator.random() < 0.3:
        value = (int.from_bytes(data[offset : offset + size], "big") + generator.choice([-1, 1, 8])) % (1 << 8 * size)
    data[offset : offset + size] = value.to_bytes(size, "big")
    messages[index] = bytes(data)


def cut_message(generator: random.Random, messages: list[bytes], _: Sequence[Session]) -> None:
    index = generator.randrange(len(messages))
    messages[index] = messages[index][: generator.randrange(len(messages[index]) + 1)]


def cut_session(generator: random.Random, messages: list[bytes], _: Sequence[Session]) -> None:
    del messages[generator.randrange(1, len(messages) + 1) :]
    cut_message(generator, messages, _)


def double(generator: random.Random, messages: list[bytes], _: Sequence[Session]) -> None:
    index = generator.randrange(len(messages))
    messages[index:index] = [messages[index]] * generator.choice([1, 1, 2, 50])


def drop(generator: random.Random, messages: list[bytes], _: Sequence[Session]) -> None:
    if len(messages) > 1:
        del messages[generator.randrange(len(messages))]


def reorder(generator: random.Random, messages: list[bytes], _: Sequence[Session]) -> None:
    """Usually the client flags stay in front, or nothing else of the session would be reached."""
    tail = messages[1:]
    generator.shuffle(tail)
    messages[1:] = tail


def insert_noise(generator: random.Random, messages: list[bytes], _: Sequence[Session]) -> None:
    messages.insert(generator.randrange(len(messages) + 1), generator.randbytes(generator.choice([1, 4, 16, 28, 300])))


def mix_sessions(generator: random.Random, messages: list[bytes], sessions: Sequence[Session]) -> None:
    other = generator.choice(sessions)
    start = generator.randrange(len(other))
    position = generator.randrange(1, len(messages) + 1)
    messages[position:position] = other[start : start + 3]


MUTATIONS = (
    flip_bits, flip_bits, set_boundary, set_boundary, set_boundary,
    cut_message, cut_session, double, drop, reorder, insert_noise, mix_sessions,
)  # fmt: skip


def mutated(sessions: Sequence[Session], seed: str) -> bytes:
    generator = random.Random(seed)
    messages = list(generator.choice(sessions))
    for _ in range(generator.choice([1, 1, 1, 2, 3])):
        messages = [message for message in messages if message] or [b"\0"]
        generator.choice(MUTATIONS)(generator, messages, sessions)
    return b"".join(messages)


def garbage(seed: str) -> bytes:
    """Noise, in the handshake or behind a valid beginning: client flags, or the whole way into transmission."""
    generator = random.Random(seed)
    noise = generator.randbytes(generator.choice([1, 16, 100, 5000]))
    export_name = struct.pack(">QII", OPTION_MAGIC, Option.EXPORT_NAME, 4) + b"disk"
    beginnings = (b"", b"\0\0\0\3", b"\0\0\0\3" + struct.pack(">Q", OPTION_MAGIC), b"\0\0\0\3" + export_name,
                  b"\0\0\0\3" + export_name + struct.pack(">I", REQUEST_MAGIC))  # fmt: skip
    return generator.choice(beginnings) + noise


# Sending


def send_batch(address: Address, cases: Sequence[tuple[str, bytes]]) -> None:
    """All cases at once. Raises: AssertionError naming the half-closed ones that the server did not end in time."""
    with ExitStack() as stack:
        waiting: dict[int, tuple[Client, str]] = {}
        for name, data in cases:
            client = stack.enter_context(Client(address, timeout_s=END_LIMIT_S))
            try:
                client.send_while_taken(data, idle_s=0.05)
                if random.Random(name).random() < 0.2:
                    client.reset()
                    continue
                client.half_close()
            except (ConnectionClosed, OSError):
                continue
            waiting[client.sock.fileno()] = (client, name)
        lingering = wait_for_ends(waiting)
    assert not lingering, f"half-closed and still open after {END_LIMIT_S} s: {lingering}"


def wait_for_ends(waiting: dict[int, tuple[Client, str]]) -> list[str]:
    """Reads and discards until each connection ends; the names of those that do not."""
    deadline = time.monotonic() + END_LIMIT_S
    poll = select.poll()
    for descriptor in waiting:
        poll.register(descriptor, select.POLLIN)
    while waiting and (left_s := deadline - time.monotonic()) > 0:
        for descriptor, _ in poll.poll(left_s * 1000):
            try:
                has_ended = not waiting[descriptor][0].sock.recv(1 << 20)
            except (ConnectionResetError, BrokenPipeError):
                has_ended = True
            if has_ended:
                poll.unregister(descriptor)
                del waiting[descriptor]
    return [name for _, name in waiting.values()]


def assault(server: ServerProcess, address: Address, cases: Sequence[tuple[str, bytes]]) -> None:
    """Sends the cases in batches. Raises: AssertionError naming the batch after which the server was not well."""
    for start in range(0, len(cases), BATCH_SIZE):
        batch = cases[start : start + BATCH_SIZE]
        try:
            send_batch(address, batch)
            assert_alive(server, address)
        except (AssertionError, OSError) as failure:
            raise AssertionError(f"in or after the batch {batch[0][0]} ... {batch[-1][0]}: {failure}") from failure


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NbdimgServer]:
    image = pattern_image(tmp_path_factory.mktemp("mutations") / "disk.raw", MIB)
    with NbdimgServer(f"disk={image}", options=["--format=raw", "--connections-max=100"]) as running:
        yield running


@pytest.fixture(scope="module")
def sessions(server: NbdimgServer) -> list[Session]:
    return record(server.socket_path)


def test_case_is_a_function_of_its_seed(sessions: list[Session]) -> None:
    names = [f"mutation {SEED}:{index}" for index in range(200)]
    assert [mutated(sessions, name) for name in names] == [mutated(sessions, name) for name in names]
    assert len({mutated(sessions, name) for name in names}) > 190
    valid = {b"".join(session) for session in sessions}
    assert sum(mutated(sessions, name) in valid for name in names) < 10


def test_server_survives_mutated_sessions_and_garbage(server: NbdimgServer, sessions: list[Session]) -> None:
    names = [f"mutation {SEED}:{index}" for index in range(MUTATION_COUNT)]
    cases = [(name, mutated(sessions, name)) for name in names]
    cases += [(name, garbage(name)) for name in (f"garbage {SEED}:{index}" for index in range(GARBAGE_COUNT))]
    assault(server, server.socket_path, cases[: 4 * BATCH_SIZE])
    descriptors, before = descriptor_count(server.pid), settled_memory(server.pid)
    start = time.monotonic()
    assault(server, server.socket_path, cases[4 * BATCH_SIZE :])
    seconds = time.monotonic() - start
    print(f"seed {SEED}: {len(cases)} cases, {len(cases) / seconds:.0f}/s, {seconds:.1f} s")
    assert wait_until(lambda: descriptor_count(server.pid) <= descriptors, END_LIMIT_S), "descriptors leak"
    assert memory(server.pid) - before <= GROWTH_MAX
    assert seconds <= TOTAL_LIMIT_S


@pytest.mark.parametrize("mode", ["exit", "hang"])
def test_assault_notices_a_server_that_breaks(sessions: list[Session], mode: str) -> None:
    """The control: a server that exits, or serves nobody any more, on one unknown command number."""
    program = str(Path(__file__).with_name("fragile_server.py"))
    names = [f"control {SEED}:{index}" for index in range(CONTROL_COUNT)]
    with PeerServer(lambda path: [sys.executable, program, path, mode]) as fragile:
        with pytest.raises(AssertionError, match="in or after the batch"):
            assault(fragile, fragile.socket_path, [(name, mutated(sessions, name)) for name in names])
        if mode == "exit":
            assert wait_until(lambda: not fragile.is_running(), END_LIMIT_S)
        else:
            assert fragile.is_running()
