"""Requests in flight are answered when the client says good-bye, half-closes, or the server has to stop."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from nbdimg.cli.running import _StopSignals
from nbdimg.config import ServerConfig
from nbdimg.export.registry import Registry
from nbdimg.server.server import Server
from nbdimg.server.service import Service
from nbdimg.server.systemd import Notifier
from nbdimg.uri import NbdUri
from tests.server.live import assert_alive, pattern, unsent_bytes
from tests.support.rawclient import Client, connect_negotiated, try_connect
from tests.support.rawprotocol import KIB, MIB, Command, ConnectionClosed, Reply, Request
from tests.support.rss import wait_until
from tests.support.server import NbdimgServer

REQUEST_COUNT = 40
READ_LENGTH = 480 * KIB
"""40 of them fill any socket buffer and stay below the 32 MiB that one connection may have in flight; the last of the
pieces in which each is sent is not a whole one.
"""
STOP_LIMIT_S = 5.0
STUCK_LIMIT_S = 15.0


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(pattern(0, MIB) * 32)
    return path


@pytest.fixture
def server(image: Path) -> Iterator[NbdimgServer]:
    with NbdimgServer(f"disk={image}", options=["--format=raw"]) as running:
        yield running


def in_flight(client: Client) -> list[Request]:
    """Sends 36 reads and 4 writes whose replies cannot all fit the socket; returns when the server has taken them."""
    requests = client.reads(REQUEST_COUNT - 4, READ_LENGTH)
    requests += [
        client.new_request(Command.WRITE, 16 * MIB + index * KIB, KIB, payload=bytes(KIB)) for index in range(4)
    ]
    client.send_requests(requests)
    return requests


def replies_until_end(client: Client) -> list[Reply]:
    """Every complete reply until the server closes the connection."""
    replies: list[Reply] = []
    while True:
        try:
            replies.append(client.read_reply())
        except ConnectionClosed:
            return replies


def assert_all_answered(requests: list[Request], replies: list[Reply]) -> None:
    assert sorted(reply.cookie for reply in replies) == sorted(request.cookie for request in requests)
    reads = {request.cookie for request in requests if request.command == Command.READ}
    for reply in replies:
        assert reply.error == 0
        assert reply.data == (pattern(0, READ_LENGTH) if reply.cookie in reads else b"")


@pytest.mark.parametrize("form", ["simple", "structured", "extended"])
@pytest.mark.parametrize("say_goodbye", [Client.disconnect, Client.half_close], ids=["disc", "half-close"])
def test_goodbye_with_40_requests_in_flight_gets_40_replies(
    server: NbdimgServer, form: str, say_goodbye: Callable[[Client], None]
) -> None:
    with Client(server.socket_path) as client:
        client.greet()
        client.negotiate("disk", structured=form != "simple", extended=form == "extended")
        requests = in_flight(client)
        say_goodbye(client)
        assert_all_answered(requests, replies_until_end(client))
    assert_alive(server, server.socket_path)


def test_half_close_inside_a_request_answers_those_before_it(server: NbdimgServer) -> None:
    with connect_negotiated(server.socket_path, "disk") as client:
        requests = in_flight(client)
        client.send(client.reads(1, 512)[0].serialize()[:20])
        client.half_close()
        assert_all_answered(requests, replies_until_end(client))
    assert_alive(server, server.socket_path)


def test_requests_behind_disc_are_not_executed(server: NbdimgServer) -> None:
    with connect_negotiated(server.socket_path, "disk") as client:
        late = client.new_request(Command.WRITE, 0, KIB, payload=bytes(KIB))
        client.send(client.new_request(Command.DISC).serialize() + client.announce(late))
        assert replies_until_end(client) == []
    with connect_negotiated(server.socket_path, "disk") as client:
        assert client.read(0, KIB).data == pattern(0, KIB)


def stop_with_requests_in_flight(
    server: NbdimgServer, how: signal.Signals, rest_s: float = 0.0
) -> tuple[list[Request], list[Reply], Request]:
    """Signals the server while 40 replies wait for their reader.

    The client rests for `rest_s` before it begins to read. Returns the 40 requests, all replies, and one request that
    was sent after the server stopped listening.
    """
    with connect_negotiated(server.socket_path, "disk") as client:
        requests = in_flight(client)
        assert wait_until(lambda: unsent_bytes(client) == 0, 5), "the server does not take 40 requests"
        server.process.send_signal(how)
        assert wait_until(lambda: refuses(server.socket_path), STOP_LIMIT_S), "still listens after the signal"
        late = client.new_request(Command.READ, 0, 4096)
        with suppress(ConnectionClosed):
            client.send_requests([late])
        time.sleep(rest_s)
        return requests, replies_until_end(client), late


def refuses(socket_path: str) -> bool:
    client = try_connect(socket_path)
    if client is None:
        return True
    client.close()
    return False


@pytest.mark.parametrize("rest_s", [0.0, 1.0], ids=["read-at-once", "read-after-1-s"])
def test_sigterm_with_40_requests_in_flight_answers_them_and_leaves_later_ones_unanswered(
    server: NbdimgServer, rest_s: float
) -> None:
    """A slow reader is served as well, as long as the drain deadline of 5 s allows.

    A later request gets no error: clients that reconnect would hand it to their guests, and not ask again.
    """
    requests, replies, _ = stop_with_requests_in_flight(server, signal.SIGTERM, rest_s)
    assert_all_answered(requests, replies)
    assert server.wait(STOP_LIMIT_S) == 0
    assert "Traceback" not in server.stderr()


def read_replies_without_errors(client: Client, count: int | None) -> None:
    """So many times, or without end, 16 requests sent together."""
    for _ in itertools.count() if count is None else range(count):
        client.send_requests(client.reads(16, 64 * KIB))
        assert {reply.error for reply in client.read_replies(16)} == {0}


def test_sigterm_under_load_ends_with_the_end_of_the_stream_and_no_error(image: Path) -> None:
    """Over TCP, where closing over what the client has sent meanwhile would reset the connection."""
    with NbdimgServer(f"disk={image}", options=["--format=raw"], listen=["nbd://127.0.0.1:0"]) as server:
        with connect_negotiated(("127.0.0.1", NbdUri.parse(server.uri).port), "disk") as client:
            read_replies_without_errors(client, 100)
            server.terminate()
            with pytest.raises(ConnectionClosed) as ended:
                read_replies_without_errors(client, None)
        assert ended.value.args[0].startswith("end of stream")
        assert server.wait(STOP_LIMIT_S) == 0


def test_sigkill_loses_replies_and_the_harness_sees_it(server: NbdimgServer) -> None:
    requests, replies, _ = stop_with_requests_in_flight(server, signal.SIGKILL)
    assert len(replies) < len(requests)
    assert server.wait(STOP_LIMIT_S) == -signal.SIGKILL


def test_sigterm_keeps_writes_that_were_answered(server: NbdimgServer, image: Path) -> None:
    with connect_negotiated(server.socket_path, "disk") as client:
        for index in range(64):
            assert client.write(index * 4096, bytes([index]) * 4096).error == 0
        server.terminate()
        assert server.wait(STOP_LIMIT_S) == 0
    assert image.read_bytes()[: 64 * 4096] == b"".join(bytes([index]) * 4096 for index in range(64))


def test_sigterm_with_idle_and_haggling_clients_exits_0(server: NbdimgServer) -> None:
    with connect_negotiated(server.socket_path, "disk") as idle, Client(server.socket_path) as haggling:
        haggling.greet()
        with Client(server.socket_path) as silent:
            server.terminate()
            assert server.wait(STOP_LIMIT_S) == 0
            for client in (idle, haggling, silent):
                assert client.wait_closed(1) is not None
    assert "Traceback" not in server.stderr()


def test_sigterm_with_a_client_that_never_reads_exits_within_the_drain_deadline(server: NbdimgServer) -> None:
    with connect_negotiated(server.socket_path, "disk") as client:
        in_flight(client)
        server.terminate()
        start = time.monotonic()
        assert server.wait(STUCK_LIMIT_S) == 0
        print(f"exit after {time.monotonic() - start:.1f} s")


def test_sigterm_with_half_a_write_exits_0_and_changes_no_sector(server: NbdimgServer, image: Path) -> None:
    with connect_negotiated(server.socket_path, "disk") as client:
        client.send_requests([client.new_request(Command.WRITE, 0, MIB, payload=bytes(MIB // 2))])
        assert wait_until(lambda: unsent_bytes(client) == 0, 5)
        server.terminate()
        assert server.wait(STUCK_LIMIT_S) == 0
    assert image.read_bytes()[:MIB] == pattern(0, MIB)


def test_drain_that_fails_is_not_kept_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients were cut whose requests were in flight: the process must not end as if all had gone well."""

    async def broken(self: Service) -> None:
        raise RuntimeError("a fault")

    async def scenario() -> None:
        registry = Registry()
        service = Service(Server(registry), registry, ServerConfig(()))
        stop = _StopSignals(signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        try:
            await stop.wait_and_drain(service, Notifier({}))
        finally:
            await service.server.close()

    monkeypatch.setattr(Service, "drain", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        asyncio.run(scenario())
