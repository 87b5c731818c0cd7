"""What clients leave behind that vanish at the worst moment: nothing."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from nbdimg.config import ExportConfig, ServerConfig
from nbdimg.export.lane import WRITE_BURST
from nbdimg.export.registry import Registry
from nbdimg.limits import Limits
from nbdimg.server.outbox import Outbox
from nbdimg.server.shared import Shared
from nbdimg.uri import NbdUri
from tests.server.tls_live import LiveServer, files
from tests.support.rawclient import Client, connect_negotiated
from tests.support.rawprotocol import (
    KIB,
    MIB,
    Command,
    CommandFlag,
    Info,
    Option,
    info_data,
    option_bytes,
)
from tests.support.rss import wait_until

GONE_S = 10.0
PAYLOAD_SIZE = 8 * MIB
LIMITS = Limits(total_bytes=32 * MIB)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    (path,) = files(tmp_path, ["disk"], 16 * MIB)
    (golden,) = files(tmp_path, ["golden"])
    exports = (
        ExportConfig(str(path), "disk", "raw"),
        ExportConfig(str(golden), "golden", "raw", overlay="per-client", overlay_directory=str(tmp_path)),
    )
    uri = NbdUri.parse(f"nbd+unix:///?socket={tmp_path / 's'}")
    with LiveServer(ServerConfig(exports, (uri,), limits=LIMITS)) as server:
        yield server


def all_gone(server: LiveServer) -> bool:
    return wait_until(lambda: not server.service.server.connections, GONE_S)


def test_half_a_write_gives_its_buffer_back(server: LiveServer) -> None:
    for _ in range(2 * LIMITS.total_bytes // PAYLOAD_SIZE):
        with connect_negotiated(server.address, "disk") as client:
            header = client.announce(client.new_request(Command.WRITE, 0, PAYLOAD_SIZE))
            client.send(header + bytes(100 * KIB))
            assert wait_until(lambda: server.service.server.lent_bytes >= PAYLOAD_SIZE, GONE_S)
        assert wait_until(lambda: not server.service.server.lent_bytes, GONE_S)
    with connect_negotiated(server.address, "disk") as client:
        assert client.write(0, b"x" * PAYLOAD_SIZE).error == 0


def test_disc_with_a_payload_gives_its_buffer_back(server: LiveServer) -> None:
    with Client(server.address) as client:
        client.greet()
        client.negotiate("disk", extended=True)
        client.send_requests([client.new_request(Command.DISC, 0, MIB, CommandFlag.PAYLOAD_LEN, bytes(MIB))])
        assert all_gone(server)
    assert server.service.server.lent_bytes == 0


def test_client_that_left_behind_go_is_attached_to_nothing(server: LiveServer) -> None:
    for _ in range(50):
        with Client(server.address) as client:
            client.greet()
            client.send(option_bytes(Option.GO, info_data("disk", [Info.BLOCK_SIZE])))
    assert all_gone(server)
    (export,) = (each for each in server.service.registry if each.name == "disk")
    assert export.meter.connection_count == 0


def test_flushes_of_a_client_that_left_do_not_reach_a_closed_overlay(server: LiveServer) -> None:
    for _ in range(5):
        with connect_negotiated(server.address, "golden") as client:
            zeroes = [client.new_request(Command.WRITE_ZEROES, at * 512, 512, CommandFlag.FUA) for at in range(20)]
            client.send_requests(zeroes)
    assert all_gone(server)
    assert not [line for line in server.lines if "failed" in line]


def test_replies_that_wait_for_their_turn_when_the_socket_closes_are_dropped() -> None:
    """Nothing is left to be told of them: neither an error in the log nor room for more."""

    async def scenario() -> list[dict[str, Any]]:
        loop, failures = asyncio.get_running_loop(), list[dict[str, Any]]()
        loop.set_exception_handler(lambda loop, context: failures.append(context))
        ours, theirs = socket.socketpair()
        outbox = Outbox(ours, Shared(loop, Registry(), Limits()), lambda: failures.append({}), lambda error: None)
        with theirs, ours:
            outbox.queue([b"a reply of another turn"])
            outbox.put(b"a reply of this turn")
            outbox.send_turn()
            outbox.discard()
        await asyncio.sleep(0.01)
        return failures

    assert asyncio.run(scenario()) == []


def test_clients_with_slow_payloads_leave_room_for_small_ones(server: LiveServer) -> None:
    hogs = []
    for _ in range(LIMITS.total_bytes // PAYLOAD_SIZE):
        hog = connect_negotiated(server.address, "disk")
        hogs.append(hog)
        hog.send(hog.announce(hog.new_request(Command.WRITE, 0, PAYLOAD_SIZE)) + bytes(64))
    with connect_negotiated(server.address, "disk", timeout_s=GONE_S) as client:
        assert client.write(0, b"y" * 256 * KIB).error == 0
    for hog in hogs:
        hog.close()


def test_client_that_is_cut_off_in_the_line_for_long_payloads_lets_the_next_one_go_on(server: LiveServer) -> None:
    with ExitStack() as stack:
        hog, first = (stack.enter_context(connect_negotiated(server.address, "disk")) for _ in range(2))
        for client in (hog, first):
            client.send(client.announce(client.new_request(Command.WRITE, 0, 2 * PAYLOAD_SIZE)) + bytes(64))
            assert wait_until(lambda: server.service.server.lent_bytes == 2 * PAYLOAD_SIZE, GONE_S)
        assert wait_until(lambda: len(server.service.server._shared.pool._line) == 1, GONE_S)
        second = stack.enter_context(connect_negotiated(server.address, "disk", timeout_s=GONE_S))
        write = second.announce(second.new_request(Command.WRITE, 0, 4 * MIB, payload=bytes(4 * MIB)))
        second.send(write[:64])
        assert wait_until(lambda: len(server.service.server._shared.pool._line) == 2, GONE_S)
        server.now(server.service.server.connections[1].close)
        second.send(write[64:])
        assert second.read_reply().error == 0


@pytest.mark.parametrize("command", [Command.READ, Command.WRITE])
def test_client_that_is_gone_before_its_long_payload_is_looked_at_does_not_line_up(
    server: LiveServer, command: Command
) -> None:
    """The replies of WRITE_BURST writes are sent, in vain, before what is behind them is looked at."""
    with ExitStack() as stack:
        hog, leaver = (stack.enter_context(connect_negotiated(server.address, "disk")) for _ in range(2))
        hog.send(hog.announce(hog.new_request(Command.WRITE, 0, 2 * PAYLOAD_SIZE)) + bytes(64))
        assert wait_until(lambda: server.service.server.lent_bytes == 2 * PAYLOAD_SIZE, GONE_S)
        writes = [leaver.new_request(Command.WRITE, 0, 512, payload=bytes(512)) for _ in range(WRITE_BURST)]
        long = leaver.new_request(command, 0, 2 * PAYLOAD_SIZE, CommandFlag.DF if command == Command.READ else 0)
        sent = b"".join(map(leaver.announce, writes)) + leaver.announce(long)

        def send_and_leave() -> None:
            leaver.send(sent)
            leaver.close()

        server.now(send_and_leave)
        assert wait_until(lambda: server.service.server.connection_count == 1, GONE_S)
        hog.close()
        assert all_gone(server)
        client = stack.enter_context(connect_negotiated(server.address, "disk", timeout_s=GONE_S))
        assert client.write(0, b"z" * PAYLOAD_SIZE).error == 0
