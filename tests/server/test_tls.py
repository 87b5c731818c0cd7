"""TLS as a transport: data both ways, odd records, memory, deadlines, endings, new files under connected clients."""

from __future__ import annotations

import _ssl
import asyncio
import contextlib
import ctypes
import gc
import os
import random
import select
import socket
import ssl
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from cryptography.hazmat.primitives import serialization

from nbdimg.config import ExportConfig, ServerConfig, TlsConfig
from nbdimg.errors import ConfigError, TlsError
from nbdimg.export.registry import Registry
from nbdimg.limits import Limits
from nbdimg.server import credentials
from nbdimg.server import tls as tls_module
from nbdimg.server.credentials import Credentials
from nbdimg.server.outbox import Outbox, TlsOutbox
from nbdimg.server.shared import Shared
from nbdimg.server.tls import Records, Tls, TlsSocket
from nbdimg.storage.file import Buffer
from nbdimg.uri import NbdUri
from tests.server.tls_live import LiveServer, asked_for_tls, client_context, tls_client
from tests.support.certificates import LOOPBACK_NAMES, Authority, Identity
from tests.support.rawclient import Client
from tests.support.rawprotocol import KIB, MIB, Command, Option, Rep, info_data, option_bytes
from tests.support.rss import PeakMemory, descriptor_count, settled_memory, wait_until
from tests.support.server import NbdimgServer

SIZE = 32 * MIB
TCP = NbdUri(host="127.0.0.1", port=0)
IDLE_COUNT = 200
IDLE_LIMIT = 40 * KIB
IDLE_LIMIT_BY_DEFAULT = 48 * KIB if ssl.OPENSSL_VERSION_INFO >= (3, 5) else IDLE_LIMIT
"""What OpenSSL 3.5 agrees on by itself, X25519MLKEM768, costs 8 KiB more than X25519."""
HOG_LIMIT = 40 * MIB
SEED = 20240917


class Site:
    """One authority, server and client, and an image of random bytes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority(directory / "ca")
        self.server = self.authority.issue("server", common_name="localhost", names=LOOPBACK_NAMES)
        self.client = self.authority.issue("client", common_name="alice")
        self.content = random.Random(SEED).randbytes(SIZE)
        self.image = directory / "disk.raw"
        self.image.write_bytes(self.content)
        self.context = client_context(self.authority, self.client)
        self.tls = TlsConfig(self.server.certificate_path, self.server.key_path, self.authority.path)

    def config(self, path: Path, **limits: float) -> ServerConfig:
        exports = (ExportConfig(str(path), "disk", "raw"),)
        return ServerConfig(exports, (TCP,), tls=self.tls, limits=Limits(**limits))  # type: ignore[arg-type]

    def options(self) -> list[str]:
        return [
            "--format=raw",
            f"--tls-certificate={self.server.certificate_path}",
            f"--tls-key={self.server.key_path}",
            f"--tls-client-ca={self.authority.path}",
        ]

    def connect(self, server: LiveServer, dialect: str = "structured") -> Client:
        client = tls_client(server.address, self.context)
        client.negotiate("disk", structured=dialect != "simple", extended=dialect == "extended")
        return client


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def copy(site: Site, tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(site.content)
    return path


@pytest.fixture
def server(site: Site, copy: Path) -> Iterator[LiveServer]:
    with LiveServer(site.config(copy)) as running:
        yield running


# Data


@pytest.mark.parametrize("dialect", ["simple", "structured", "extended"])
def test_reads_and_writes_of_all_sizes_carry_the_right_bytes(
    site: Site, server: LiveServer, copy: Path, dialect: str
) -> None:
    source = random.Random(SEED)
    expected = bytearray(site.content)
    with site.connect(server, dialect) as client:
        assert client.read(0, SIZE).data == expected
        for length in (1, 511, 4096, 16 * KIB - 20, 16 * KIB, 16 * KIB + 1, 256 * KIB, 300_001, 8 * MIB):
            offset = source.randrange(SIZE - length)
            data = source.randbytes(length)
            assert client.write(offset, data).error == 0, f"seed {SEED}"
            expected[offset : offset + length] = data
            start = max(0, offset - 5)
            assert client.read(start, length + 5).data == expected[start : start + length + 5], f"seed {SEED}"
        assert client.request(Command.FLUSH).error == 0
    assert copy.read_bytes() == expected


def test_pipelined_small_requests_are_all_answered(site: Site, server: LiveServer) -> None:
    with site.connect(server, "simple") as client:
        requests = client.reads(2000, 4096, stride=4096)
        client.send_requests(requests)
        for request in requests:
            reply = client.read_reply()
            assert reply.error == 0
            assert reply.data == site.content[request.offset : request.offset + 4096]


def test_request_cut_into_records_of_one_byte_is_understood(site: Site, server: LiveServer) -> None:
    with site.connect(server) as client:
        request = client.announce(client.new_request(Command.WRITE, 4096, 600, payload=b"w" * 600))
        for at in range(len(request)):
            client.send(request[at : at + 1])
        assert client.read_reply().error == 0
        assert client.read(4000, 800).data == site.content[4000:4096] + b"w" * 600 + site.content[4696:4800]


def test_options_and_requests_in_one_piece_with_the_end_of_the_handshake(site: Site, server: LiveServer) -> None:
    """The client's Finished, its options and its first requests arrive in one receive."""
    with asked_for_tls(server.address) as client:
        end = connected_end(site, client)
        session, incoming, outgoing = end.session, end.incoming, end.outgoing
        session.write(option_bytes(Option.STRUCTURED_REPLY))
        session.write(option_bytes(Option.GO, info_data("disk", [])))
        session.write(client.new_request(Command.READ, 0, 4096).serialize(False))
        client.sock.sendall(outgoing.read())
        received = b""
        while site.content[:4096] not in received:
            try:
                received += session.read(64 * KIB)
            except ssl.SSLWantReadError:
                piece = client.sock.recv(64 * KIB)
                assert piece, received[:200]
                incoming.write(piece)


@pytest.mark.parametrize("seed", range(20))
def test_a_stream_is_cut_between_records_however_it_comes(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.choice((0, 1, 17, 300, 16 * KIB + 256)) for _ in range(50)]
    stream = memoryview(b"".join(b"\x17\x03\x03" + length.to_bytes(2) + rng.randbytes(length) for length in lengths))
    ends = {sum(lengths[: count + 1]) + 5 * (count + 1) for count in range(len(lengths))}
    records, at, pieces = Records(), 0, []
    while at < len(stream):
        stop = min(at + rng.choice((1, 2, 4, 100, 20_000)), len(stream))
        while at < stop:
            end = records.cut(stream, at, stop)
            assert end in ends or end == stop
            pieces.append(range(at + 1, end + 1))
            at = end
    assert all(len(piece) <= 16 * KIB or len(ends.intersection(piece)) <= 1 for piece in pieces)
    assert len(pieces) < len(stream)
    assert records.whole_count == len(lengths)


def test_a_record_that_claims_too_much_ends_where_the_longest_does() -> None:
    stream = memoryview(b"\x17\x03\x03\xff\xff" + bytes(65535))
    assert Records().cut(stream, 0, len(stream)) == 5 + 16 * KIB + 2048


def test_quiet_socket_means_that_nothing_is_left_inside(site: Site) -> None:
    """E1, with as little room as is allowed and input that ends anywhere within a record."""
    source = random.Random(SEED)
    with both_ends(site) as (near, layer, far, session):
        for _ in range(200):
            sent = source.randbytes(source.randrange(1, 150_000))
            outgoing = b"".join(encrypted(session, sent[at : at + 16 * KIB]) for at in range(0, len(sent), 16 * KIB))
            received = b""
            while outgoing or layer.has_more or select.select([near], [], [], 0)[0]:
                count = source.randrange(1, 40_000)
                far.sendall(outgoing[:count])
                outgoing = outgoing[count:]
                room = bytearray(source.choice([32 * KIB, 33_000, 50_000]))
                with contextlib.suppress(BlockingIOError):
                    taken = layer.recvmsg_into([memoryview(room)[:100], memoryview(room)[100:]])[0]
                    received += room[:taken]
            assert received == sent, f"seed {SEED}"


def test_receive_takes_as_many_tiny_records_as_are_a_turn_and_keeps_the_rest(site: Site) -> None:
    with both_ends(site) as (near, layer, far, end):
        data = random.Random(SEED).randbytes(3000)
        far.sendall(b"".join(encrypted(end, bytes([each])) for each in data))
        received = b""
        while layer.has_more or select.select([near], [], [], 0)[0]:
            with contextlib.suppress(BlockingIOError):
                piece = layer.recv(64 * KIB)
                assert len(piece) < 600
                received += piece
        assert received == data


def test_requests_in_tiny_records_are_all_answered_without_another_word(site: Site, server: LiveServer) -> None:
    with asked_for_tls(server.address) as client:
        client.sock.settimeout(5)
        end = connected_end(site, client)
        client.sock.sendall(encrypted(end, option_bytes(Option.GO, info_data("disk", []))))
        answer = b""
        while len(answer) < 52:
            end.incoming.write(client.sock.recv(64 * KIB))
            answer += end.session.read(64 * KIB)
        requests = b"".join(each.serialize(False) for each in client.reads(200, 4096, stride=4096))
        client.sock.sendall(b"".join(encrypted(end, bytes([each])) for each in requests))
        received = b""
        while len(received) < 200 * (16 + 4096):
            end.incoming.write(client.sock.recv(64 * KIB))
            with contextlib.suppress(ssl.SSLWantReadError):
                while True:
                    received += end.session.read(64 * KIB)
        for number in range(200):
            at = number * (16 + 4096) + 16
            assert received[at : at + 4096] == site.content[number * 4096 : (number + 1) * 4096]


def test_ciphertext_that_waits_counts_as_pending_and_leaves(site: Site) -> None:
    """The last bytes were taken by TLS, not by the socket: the connection must neither close nor forget them."""
    sent = random.Random(SEED).randbytes(200 * KIB)

    async def main() -> bytes:
        with both_ends(site) as (near, layer, far, end):
            near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * KIB)
            all_left = asyncio.Event()
            shared = Shared(asyncio.get_running_loop(), Registry(), Limits())
            outbox = TlsOutbox(layer, shared, all_left.set, lambda error: None)
            outbox.put(sent)
            outbox.send_turn()
            assert layer.backlog_size
            assert outbox.pending_bytes == layer.backlog_size
            assert outbox.stalled_since_s is not None
            received = b""
            far.setblocking(False)
            while len(received) < len(sent):
                await asyncio.sleep(0)
                with contextlib.suppress(BlockingIOError):
                    end.incoming.write(far.recv(64 * KIB))
                with contextlib.suppress(ssl.SSLWantReadError):
                    received += end.session.read(len(sent))
            await asyncio.wait_for(all_left.wait(), 5)
            assert outbox.pending_bytes == 0
            outbox.discard()
            return received

    assert asyncio.run(asyncio.wait_for(main(), 20)) == sent


class FickleSocket:
    """Takes what it likes of what is sent, and often nothing."""

    def __init__(self, source: random.Random) -> None:
        self.taken = bytearray()
        self._source = source

    def send(self, data: Buffer) -> int:
        if self._source.random() < 0.4:
            raise BlockingIOError
        count = self._source.choice([1, 1000, 1 << 20])
        self.taken += memoryview(data)[:count]
        return min(count, len(memoryview(data)))

    def sendmsg(self, parts: Sequence[Buffer]) -> int:
        return self.send(b"".join(parts))


def test_socket_that_takes_what_it_likes_gets_each_byte_of_ciphertext_once(site: Site) -> None:
    source = random.Random(SEED)
    with both_ends(site) as (_, layer, _, end):
        fickle, sent_before, sent = FickleSocket(source), layer.sent_bytes, b""
        layer._sock = fickle  # type: ignore[assignment]
        for _ in range(300):
            data = source.randbytes(source.choice([1, 100, 16 * KIB, 16 * KIB + 1, 300_000]))
            with contextlib.suppress(BlockingIOError):
                sent += data[: layer.sendmsg([data[:5], data[5:]])]
            assert layer.backlog_size <= 16 * (16 * KIB + 256), "E2"
            assert layer.sent_bytes - sent_before == len(fickle.taken)
        while not layer.flush():
            pass
        end.incoming.write(fickle.taken)
        received = b""
        while end.incoming.pending:
            received += end.session.read(64 * KIB)
        assert received == sent


@pytest.mark.parametrize("is_tls", [False, True])
def test_reply_that_leaves_at_once_leaves_no_deadline_behind(site: Site, is_tls: bool) -> None:
    """Its client would be cut for taking no reply, when it rests."""

    async def main() -> None:
        near, far = socket.socketpair()
        with near, far:
            near.setblocking(False)
            shared, all_left = Shared(asyncio.get_running_loop(), Registry(), Limits()), asyncio.Event()
            outbox: Outbox
            if is_tls:
                layer = Tls(site.tls).wrap(near)
                far_end(site, far, layer)
                outbox = TlsOutbox(layer, shared, all_left.set, lambda error: None)
            else:
                outbox = Outbox(near, shared, all_left.set, lambda error: None)
            outbox.queue([b"a reply of another turn"])
            await asyncio.wait_for(all_left.wait(), 5)
            assert (outbox.pending_bytes, outbox.stalled_since_s) == (0, None)

    asyncio.run(main())


def test_what_was_queued_for_a_socket_that_is_closed_meanwhile_is_not_sent(site: Site) -> None:
    errors: list[object] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: errors.append(context))
        with both_ends(site) as (near, layer, _, _):
            near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * KIB)
            shared = Shared(loop, Registry(), Limits())
            outbox = TlsOutbox(layer, shared, lambda: errors.append("room"), errors.append)
            outbox.queue([b"queued"])
            outbox.put(bytes(200 * KIB))
            outbox.send_turn()
            outbox.discard()
            near.close()
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    asyncio.run(main())
    assert errors == []


class FarEnd:
    """A TLS client whose ciphertext the test carries itself."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.session = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")


def connected_end(site: Site, client: Client) -> FarEnd:
    """A client's TLS over its socket; what it says last of the handshake still waits in `outgoing`."""
    end = FarEnd(site.context)
    while True:
        try:
            end.session.do_handshake()
            return end
        except ssl.SSLWantReadError:
            client.sock.sendall(end.outgoing.read())
            end.incoming.write(client.sock.recv(64 * KIB))


def encrypted(end: FarEnd, data: bytes) -> bytes:
    end.session.write(data)
    return end.outgoing.read()


def far_end(site: Site, sock: socket.socket, layer: TlsSocket) -> FarEnd:
    """A client at `sock` whose handshake with `layer` is complete."""
    end = FarEnd(site.context)
    is_known = False
    while not is_known:
        with contextlib.suppress(ssl.SSLWantReadError):
            end.session.do_handshake()
        sock.sendall(end.outgoing.read())
        is_known = layer.advance() is not None
        if not layer.flush():
            raise AssertionError("a handshake fits a socket")
        if select.select([sock], [], [], 0)[0]:
            end.incoming.write(sock.recv(64 * KIB))
    return end


@contextlib.contextmanager
def both_ends(site: Site) -> Iterator[tuple[socket.socket, TlsSocket, socket.socket, FarEnd]]:
    """A server's socket and TLS over it, a client's and its end; the handshake is complete."""
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        layer = Tls(site.tls).wrap(near)
        yield near, layer, far, far_end(site, far, layer)


def key_updates(end: FarEnd, count: int) -> bytes:
    """What a client sends that changes its key so often and asks for a new one of the server's each time.

    Python's `ssl` has no call for it; its object is a PyObject's header, a reference, and OpenSSL's pointer.
    """
    library = ctypes.CDLL(_ssl.__file__)
    if not hasattr(library, "SSL_key_update"):
        pytest.skip("this Python keeps OpenSSL's functions to itself")
    pointer = ctypes.c_void_p.from_address(id(end.session._sslobj) + 3 * ctypes.sizeof(ctypes.c_void_p))  # type: ignore[attr-defined]
    for _ in range(count):
        assert library.SSL_key_update(pointer, 1) == 1
        assert library.SSL_do_handshake(pointer) == 1
    return end.outgoing.read()


def test_key_updates_now_and_then_change_nothing(site: Site) -> None:
    with both_ends(site) as (_, layer, far, end):
        for _ in range(100):
            far.sendall(key_updates(end, 1) + encrypted(end, b"data") + key_updates(end, 1))
            assert layer.recv(64 * KIB) == b"data"
            assert layer.send(b"answer") == 6
            end.incoming.write(far.recv(64 * KIB))
            assert end.session.read(100) == b"answer"


@pytest.mark.parametrize("data", [b"", b"with data"])
def test_flood_of_key_updates_ends_before_it_costs_a_turn(site: Site, data: bytes) -> None:
    with both_ends(site) as (_, layer, far, end):
        for _ in range(20):
            far.sendall(key_updates(end, 100) + (encrypted(end, data * 10) if data else b""))
        with pytest.raises(TlsError, match="records without data"):
            layer.recv(256 * KIB)
        layer.flush()
        assert len(far.recv(64 * KIB)) < 5 * KIB, "the whole flood was answered"


def test_answers_to_key_updates_that_nobody_takes_do_not_pile_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_module, "BACKLOG_MAX", 16 * KIB)
    with both_ends(site) as (near, layer, far, end):
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * KIB)

        def update_for_ever() -> None:
            while True:
                far.sendall(key_updates(end, 10))
                with contextlib.suppress(BlockingIOError):
                    layer.recv(64 * KIB)
                assert layer.backlog_size < 2 * 16 * KIB

        with pytest.raises(ConnectionAbortedError, match="asked for and not taken"):
            update_for_ever()


# Endings


@pytest.mark.parametrize("count", [1, 300], ids=["one", "more-than-in-flight"])
def test_close_notify_in_one_piece_with_requests_is_an_end(site: Site, server: LiveServer, count: int) -> None:
    """No descriptor tells of it: it has left the socket together with the requests."""
    with asked_for_tls(server.address) as client:
        client.sock.settimeout(5)
        end = connected_end(site, client)
        end.session.write(option_bytes(Option.GO, info_data("disk", [])))
        client.sock.sendall(end.outgoing.read())
        answer = b""
        while len(answer) < 52:
            end.incoming.write(client.sock.recv(64 * KIB))
            answer += end.session.read(64 * KIB)
        requests = [each.serialize(False) for each in client.reads(count, 64 * KIB, stride=512)]
        end.session.write(b"".join(requests))
        with contextlib.suppress(ssl.SSLWantReadError):
            end.session.unwrap()
        client.sock.sendall(end.outgoing.read())
        received = 0
        while piece := client.sock.recv(64 * KIB):
            received += len(piece)
        assert received > count * 64 * KIB


def test_close_notify_in_one_piece_with_an_option_is_an_end(site: Site, server: LiveServer) -> None:
    with asked_for_tls(server.address) as client:
        client.sock.settimeout(5)
        end = connected_end(site, client)
        end.session.write(option_bytes(Option.LIST))
        with contextlib.suppress(ssl.SSLWantReadError):
            end.session.unwrap()
        client.sock.sendall(end.outgoing.read())
        while client.sock.recv(64 * KIB):
            pass


def test_disc_behind_many_reads_is_answered_whole_and_ends_with_close_notify(site: Site, server: LiveServer) -> None:
    client = asked_for_tls(server.address)
    with client:
        client.sock = site.context.wrap_socket(client.sock, server_hostname="localhost", suppress_ragged_eofs=False)
        client.negotiate("disk")
        client.send_requests(client.reads(40, MIB // 2, stride=MIB // 2))
        client.disconnect()
        for _ in range(40):
            assert client.read_reply().error == 0
        assert client.sock.recv(1) == b""


def test_end_without_close_notify_is_taken_as_an_end(site: Site, server: LiveServer, copy: Path) -> None:
    with site.connect(server) as client:
        assert client.write(0, b"n" * 512).error == 0
        half = client.new_request(Command.WRITE, 4096, 4096, payload=b"h" * 4096).serialize(False)[:2000]
        client.send(half)
        client.half_close()
        assert client.wait_closed(5) is not None
    assert copy.read_bytes()[: 16 * KIB] == b"n" * 512 + site.content[512 : 16 * KIB]
    assert not [line for line in server.lines if "TLS" in line], server.lines


def test_client_that_takes_no_reply_is_cut_at_the_stall_deadline(site: Site, copy: Path) -> None:
    with (
        LiveServer(site.config(copy, stall_timeout_s=0.5)) as server,
        site.connect(server) as client,
    ):
        client.send_requests(client.reads(8, SIZE))
        assert server.has_logged("took no reply for 0.5 s")


def test_slow_reader_is_not_cut(site: Site, copy: Path) -> None:
    with (
        LiveServer(site.config(copy, stall_timeout_s=1)) as server,
        site.connect(server, "simple") as client,
    ):
        client.send_requests(client.reads(1, SIZE))
        received = 0
        while received < SIZE + 16:
            received += len(client.sock.recv(16 * KIB))
            if received % (4 * MIB) < 16 * KIB:
                select.select([], [], [], 0.15)
        assert not [line for line in server.lines if "took no reply" in line]


# Memory


@pytest.mark.parametrize(("group", "limit"), [("X25519", IDLE_LIMIT), (None, IDLE_LIMIT_BY_DEFAULT)])
def test_idle_tls_connection_costs_little(site: Site, group: str | None, limit: int) -> None:
    if group is not None:
        site.context.set_ecdh_curve(group)
    options = [*site.options(), f"--connections-max={IDLE_COUNT + 20}", "--handshake-timeout=60"]
    with NbdimgServer(f"disk={site.image}", options=options, listen=["nbds://127.0.0.1:0"]) as running:
        address = ("127.0.0.1", NbdUri.parse(running.uri).port)
        with ExitStack() as warm_up:
            for _ in range(20):
                warm_up.enter_context(tls_client(address, site.context)).negotiate("disk")
        before, descriptors = settled_memory(running.pid), descriptor_count(running.pid)
        with ExitStack() as connections:
            for _ in range(IDLE_COUNT):
                connections.enter_context(tls_client(address, site.context)).negotiate("disk")
            each = (settled_memory(running.pid) - before) / IDLE_COUNT
            print(f"{each / KIB:.1f} KiB per idle TLS connection")
            assert descriptor_count(running.pid) - descriptors == IDLE_COUNT
            assert each <= limit
        assert wait_until(lambda: descriptor_count(running.pid) <= descriptors, 5), "descriptors leak"


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_client_that_never_reads_is_held_to_40_mib(site: Site, structured: bool) -> None:
    with NbdimgServer(f"disk={site.image}", options=site.options(), listen=["nbds://127.0.0.1:0"]) as running:
        address = ("127.0.0.1", NbdUri.parse(running.uri).port)
        with PeakMemory(running.pid) as peak, tls_client(address, site.context) as hog:
            hog.negotiate("disk", structured=structured)
            hog.send_requests(hog.reads(64, SIZE))
            settled_memory(running.pid)
            with tls_client(address, site.context) as honest:
                honest.negotiate("disk")
                assert honest.read(4096, 4096).data == site.content[4096:8192]
        print(f"{peak.growth / MIB:.1f} MiB")
        assert peak.growth <= HOG_LIMIT


# New files


def peer_serial(client: Client) -> int:
    assert isinstance(client.sock, ssl.SSLSocket)
    certificate = client.sock.getpeercert()
    assert certificate is not None
    return int(str(certificate["serialNumber"]), 16)


def replaced(identity: Identity, by: Identity) -> None:
    """`by` in the files of `identity`."""
    os.replace(by.certificate_path, identity.certificate_path)
    os.replace(by.key_path, identity.key_path)


def test_reload_serves_the_new_certificate_and_leaves_who_is_connected_alone(site: Site, copy: Path) -> None:
    own = site.authority.issue("server", common_name="reload", names=LOOPBACK_NAMES)
    new = site.authority.issue("server", common_name="renewed", names=LOOPBACK_NAMES)
    tls = replace(site.tls, certificate_path=own.certificate_path, key_path=own.key_path)
    with LiveServer(replace(site.config(copy), tls=tls)) as server, site.connect(server) as before:
        replaced(own, new)
        with site.connect(server) as between:
            assert peer_serial(between) == own.certificate.serial_number
        server.now(server.service.reload_tls)
        with site.connect(server) as after:
            assert peer_serial(after) == new.certificate.serial_number
        assert before.read(0, SIZE).data == site.content
        assert peer_serial(before) == own.certificate.serial_number
        assert (server.service.reload_count, server.service.refused_reload_count) == (1, 0)


def test_reload_of_files_that_do_not_fit_keeps_the_old_ones(site: Site, copy: Path) -> None:
    own = site.authority.issue("server", common_name="keeps", names=LOOPBACK_NAMES)
    new = site.authority.issue("server", common_name="misfit", names=LOOPBACK_NAMES)
    tls = replace(site.tls, certificate_path=own.certificate_path, key_path=own.key_path)
    with LiveServer(replace(site.config(copy), tls=tls)) as server:
        os.replace(new.certificate_path, own.certificate_path)
        server.now(server.service.reload_tls)
        assert server.has_logged("the TLS files were not reloaded")
        assert (server.service.reload_count, server.service.refused_reload_count) == (0, 1)
        with site.connect(server) as client:
            assert peer_serial(client) == own.certificate.serial_number


def test_reload_brings_a_revocation(site: Site, copy: Path) -> None:
    revoked = site.authority.issue("client", common_name="later")
    tls = replace(site.tls, crl_path=site.authority.revoke())
    context = client_context(site.authority, revoked)
    with LiveServer(replace(site.config(copy), tls=tls)) as server, tls_client(server.address, context) as before:
        before.negotiate("disk")
        site.authority.revoke(revoked)
        server.now(server.service.reload_tls)
        with contextlib.suppress(OSError), tls_client(server.address, context) as after:
            after.sock.recv(1)
        assert server.has_logged("certificate revoked")
        assert before.read(0, 4096).data == site.content[:4096]


# Files that are refused


def test_files_that_do_not_go_together_are_refused(site: Site, tmp_path: Path) -> None:
    other = site.authority.issue("server", common_name="other")
    empty = tmp_path / "empty.pem"
    empty.touch(0o600)
    encrypted = tmp_path / "encrypted.pem"
    key = serialization.load_pem_private_key(Path(other.key_path).read_bytes(), None)
    encrypted.touch(0o600)
    encrypted.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    fifo = tmp_path / "fifo.pem"
    os.mkfifo(fifo, 0o600)
    for changes, message in (
        *(
            ({name: str(fifo)}, "expected a regular file")
            for name in ("certificate_path", "key_path", "client_ca_path")
        ),
        ({"certificate_path": "/nowhere"}, "TLS certificate file /nowhere: No such file"),
        ({"key_path": "/nowhere"}, "TLS key file /nowhere: No such file"),
        ({"key_path": other.key_path}, "key values mismatch; expected PEM files that belong together"),
        ({"key_path": str(empty)}, "expected PEM files that belong together"),
        ({"key_path": str(encrypted)}, "the TLS key is encrypted"),
        ({"client_ca_path": str(empty)}, "TLS client CA file"),
        ({"crl_path": site.authority.path}, "revocation list file .*: nothing of the kind"),
        ({"client_ca_path": site.authority.revoke()}, "TLS client CA file .*: nothing of the kind"),
    ):
        with pytest.raises(ConfigError, match=message):
            Credentials(replace(site.tls, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(("mode", "is_refused"), [(0o600, False), (0o640, False), (0o644, True), (0o604, True)])
def test_key_that_everybody_may_read_is_refused(site: Site, mode: int, is_refused: bool) -> None:
    own = site.authority.issue("server", common_name=f"mode{mode:o}")
    os.chmod(own.key_path, mode)
    config = TlsConfig(own.certificate_path, own.key_path)
    if is_refused:
        with pytest.raises(ConfigError, match="can be read by everybody"):
            Credentials(config)
    else:
        Credentials(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "TLS needs a certificate file or a file of pre-shared keys"),
        ({"psk_path": "p", "key_path": "k"}, "needs a certificate file beside it"),
        ({"certificate_path": "c", "crl_path": "r"}, "needs the client CA file"),
        ({"certificate_path": "c", "mode": "on"}, "expected off, required or selective"),
        ({"certificate_path": "c", "min_version": "1.1"}, "expected 1.2 or 1.3"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TlsConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("uri", "mode", "message"),
    [
        ("nbds://127.0.0.1:0", None, "needs TLS: give a certificate"),
        ("nbd://0.0.0.0:0", None, "is reachable from other machines"),
        ("nbd://0.0.0.0:0", "off", "is reachable from other machines"),
        ("nbd://0.0.0.0:0", "selective", "is reachable from other machines"),
    ],
)
def test_listener_that_would_give_data_out_in_clear_is_refused(
    site: Site, uri: str, mode: str | None, message: str
) -> None:
    """Also where only one of its exports may be reached without TLS."""
    tls = None if mode is None else replace(site.tls, mode=mode)  # type: ignore[arg-type]
    plain = ExportConfig(str(site.image), "disk", "raw", is_read_only=True, is_tls_only=False)
    exports = (plain, replace(plain, name="secret", is_tls_only=True))
    config = ServerConfig(exports, (NbdUri.parse(uri),), tls=tls)
    with pytest.raises(ConfigError, match=message):
        LiveServer(config).__enter__()


@pytest.mark.parametrize(
    ("uri", "mode", "is_tls_only"),
    [
        ("nbd://0.0.0.0:0", "required", False),
        ("nbd://0.0.0.0:0", "selective", True),
        ("nbds://0.0.0.0:0", "selective", False),
        ("nbds://0.0.0.0:0", "off", False),
    ],
)
def test_listener_that_gives_no_data_out_in_clear_is_opened(
    site: Site, uri: str, mode: Literal["off", "required", "selective"], is_tls_only: bool
) -> None:
    export = ExportConfig(str(site.image), "disk", "raw", is_read_only=True, is_tls_only=is_tls_only)
    config = ServerConfig((export,), (NbdUri.parse(uri),), tls=replace(site.tls, mode=mode))
    with LiveServer(config) as server:
        assert not [line for line in server.lines if "in plain text" in line]


# Pre-shared keys

KEY = "0123456789abcdef0123456789abcdef"
HAS_PSK = getattr(ssl, "HAS_PSK", False)


def key_file(directory: Path, text: str) -> str:
    path = directory / "keys.psk"
    path.touch(0o600)
    path.write_text(text)
    return str(path)


@pytest.mark.skipif(HAS_PSK, reason="this Python has pre-shared keys")
def test_pre_shared_keys_are_refused_in_one_sentence_where_python_has_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs Python 3"):
        Tls(TlsConfig(psk_path=key_file(tmp_path, f"alice:{KEY}\n")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no key is in it"),
        ("alice\n", "line 1: expected NAME:HEX"),
        (f":{KEY}\n", "line 1: expected NAME:HEX"),
        ("alice:00ff\n", "with 16 bytes or more"),
        (f"# keys\nalice:{KEY}\nalice:{KEY}\n", "line 3: 'alice' has a key already"),
        (f"alice:{KEY}xx\n", "line 1: expected NAME:HEX"),
    ],
)
def test_key_file_that_is_malformed_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Tls(TlsConfig(psk_path=key_file(tmp_path, text)))


def test_credentials_with_keys_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context holds its callback where the garbage collector does not see it, as this list does."""
    held: list[object] = []
    monkeypatch.setattr(credentials, "_set_key_callback", lambda context, callback: held.append(callback))
    made = Credentials(TlsConfig(psk_path=key_file(tmp_path, f"alice:{KEY}\n")))
    gone = weakref.ref(made.context)
    del made
    gc.collect()
    assert held
    assert gone() is None


def key_session(credentials: Credentials, name: str, key: str, suite: str) -> frozenset[str] | None:
    """What `openssl s_client` with a key proves to `credentials`; None: the handshake fails. No certificate counts."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        argv = ["openssl", "s_client", "-connect", f"127.0.0.1:{listener.getsockname()[1]}", "-tls1_3"]
        argv += ["-psk_identity", name, "-psk", key, "-ciphersuites", suite]
        client = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        listener.settimeout(10)
        sock, _ = listener.accept()
    try:
        sock.settimeout(10)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        session = credentials.context.wrap_bio(incoming, outgoing, server_side=True)
        proposed: frozenset[str] = frozenset()
        while session.version() is None:
            incoming.write(sock.recv(64 * KIB))
            try:
                proposed = credentials.advance(session, proposed)
            except ssl.SSLError:
                return None
            sock.sendall(outgoing.read())
        return credentials.identities(session, proposed)
    finally:
        sock.close()
        client.communicate()


@pytest.mark.skipif(not HAS_PSK, reason="pre-shared keys came with Python 3.13")
def test_key_proves_a_name_and_proposing_a_name_proves_nothing(site: Site, tmp_path: Path) -> None:
    """A suite whose hash is not the key's makes OpenSSL pass over the key, and the certificate serves. What one client
    has proposed is forgotten with it.
    """
    keys = key_file(tmp_path, f"alice:{KEY}\ncarol:{KEY[::-1]}\n")
    credentials = Credentials(TlsConfig(site.server.certificate_path, site.server.key_path, psk_path=keys))
    fits, does_not_fit = "TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384"
    assert key_session(credentials, "alice", KEY, fits) == frozenset({"psk:alice"})
    assert key_session(credentials, "alice", KEY[::-1], fits) is None
    assert key_session(credentials, "bob", KEY, fits) == frozenset()
    assert key_session(credentials, "alice", KEY[::-1], does_not_fit) == frozenset()
    assert key_session(credentials, "carol", KEY[::-1], fits) == frozenset({"psk:carol"})


@pytest.mark.skipif(not HAS_PSK, reason="pre-shared keys came with Python 3.13")
def test_server_with_keys_alone_serves_who_has_one(site: Site, copy: Path, tmp_path: Path) -> None:
    context = client_context(None)
    context.set_psk_client_callback(lambda hint: ("alice", bytes.fromhex(KEY)))  # type: ignore[attr-defined,unused-ignore]
    tls = TlsConfig(psk_path=key_file(tmp_path, f"alice:{KEY}\n"))
    with LiveServer(replace(site.config(copy), tls=tls)) as server:
        with tls_client(server.address, context) as client:
            client.negotiate("disk")
            assert client.read(0, 4096).data == site.content[:4096]
        with pytest.raises(ssl.SSLError):
            tls_client(server.address, client_context(None)).option(Option.LIST)


def test_command_line_takes_tls_options_and_prints_nbds(site: Site) -> None:
    options = [*site.options(), "--tls-mode=selective", "--tls-min-version=1.2"]
    with NbdimgServer(f"disk={site.image}", options=options, listen=["nbd://127.0.0.1:0"]) as running:
        assert running.uri.startswith("nbds://")
        address = ("127.0.0.1", NbdUri.parse(running.uri).port)
        with Client(address) as client:
            client.greet()
            assert client.option(Option.GO, info_data("disk"))[-1].type == Rep.ERR_TLS_REQD
    argv = [sys.executable, "-m", "nbdimg", "serve", "--tls-key=x", str(site.image)]
    failed = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert failed.returncode != 0
    assert "TLS needs a certificate file" in failed.stderr
