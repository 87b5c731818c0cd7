"""Clients that stop half-way are cut at the deadline, and clients that only rest are not.

Most tests scale the limits down to a second (`--handshake-timeout 1` and its kin); one waits for the real ten. Every
wait is a poll on the socket, so a cut is seen when it happens, and its time is checked from both sides.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.server.live import assert_alive, pattern, pattern_image
from tests.support.rawclient import Client, connect_negotiated
from tests.support.rawprotocol import KIB, MIB, Command, Option, info_data, option_bytes
from tests.support.rss import wait_until
from tests.support.server import NbdimgServer

TIMEOUT_S = 1.0
EARLY_S = 0.3  # a cut this much before the deadline is wrong
LATE_S = 0.7  # and so is one this much after it: half a second as in 10.5 s for 10 s, and a busy machine
STALL_TIMEOUT_S = 2.0
REAL_TIMEOUT_S = 10.0
REAL_LATEST_S = 10.5
DRIP_S = 0.1


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 MiB, all of it data."""
    path = tmp_path_factory.mktemp("deadlines") / "disk.raw"
    path.write_bytes(pattern(0, MIB) * 16)
    return path


@pytest.fixture(scope="module")
def server(image: Path) -> Iterator[NbdimgServer]:
    timeouts = [f"--handshake-timeout={TIMEOUT_S:g}", f"--request-timeout={TIMEOUT_S:g}"]
    options = ["--format=raw", *timeouts, f"--stall-timeout={STALL_TIMEOUT_S:g}"]
    with NbdimgServer(f"disk={image}", options=options) as running:
        yield running


def drip(client: Client, data: bytes, interval_s: float, limit_s: float) -> float | None:
    """Send one byte per interval, discarding replies; seconds until the server closed, None if it did not in time."""
    start = time.monotonic()
    for byte in data:
        if time.monotonic() - start > limit_s:
            return None
        try:
            client.sock.send(bytes([byte]))
        except (BrokenPipeError, ConnectionResetError):
            return time.monotonic() - start
        if client.wait_closed(interval_s) is not None:
            return time.monotonic() - start
    left_s = start + limit_s - time.monotonic()
    return None if client.wait_closed(max(left_s, 0)) is None else time.monotonic() - start


def assert_cut_at_deadline(seconds: float | None, timeout_s: float = TIMEOUT_S) -> None:
    assert seconds is not None, "not cut"
    assert timeout_s - EARLY_S <= seconds <= timeout_s + LATE_S


def test_handshake_silent_since_connect_is_cut(server: NbdimgServer) -> None:
    with Client(server.socket_path) as client:
        assert_cut_at_deadline(client.wait_closed(5))
    assert_alive(server, server.socket_path)


def test_handshake_silent_after_client_flags_is_cut(server: NbdimgServer) -> None:
    with Client(server.socket_path) as client:
        client.greet()
        assert_cut_at_deadline(client.wait_closed(5))


def test_handshake_silent_after_half_an_option_is_cut(server: NbdimgServer) -> None:
    with Client(server.socket_path) as client:
        client.greet()
        client.send(option_bytes(Option.GO, info_data("disk"))[:-3])
        assert_cut_at_deadline(client.wait_closed(5))


def test_handshake_of_one_byte_at_a_time_is_cut(server: NbdimgServer) -> None:
    data = b"\0\0\0\3" + option_bytes(Option.LIST) + option_bytes(Option.GO, info_data("disk"))
    with Client(server.socket_path) as client:
        assert_cut_at_deadline(drip(client, data, DRIP_S, 5))


def test_handshake_that_haggles_without_end_is_cut(server: NbdimgServer) -> None:
    """The deadline is absolute: complete options do not extend it."""
    with Client(server.socket_path) as client:
        client.greet()
        start = time.monotonic()
        while time.monotonic() - start < 5:
            try:
                client.sock.send(option_bytes(Option.LIST))
            except (BrokenPipeError, ConnectionResetError):
                break
            if client.wait_closed(DRIP_S) is not None:
                break
        assert_cut_at_deadline(time.monotonic() - start)


def test_request_header_half_sent_is_cut(server: NbdimgServer) -> None:
    with connect_negotiated(server.socket_path, "disk") as client:
        client.send(client.reads(1, 512)[0].serialize()[:10])
        assert_cut_at_deadline(client.wait_closed(5))
    assert_alive(server, server.socket_path)


def test_request_header_of_one_byte_at_a_time_is_cut(server: NbdimgServer) -> None:
    with connect_negotiated(server.socket_path, "disk") as client:
        assert_cut_at_deadline(drip(client, client.reads(1, 512)[0].serialize(), DRIP_S, 5))


def test_request_header_half_sent_behind_a_whole_request_is_cut(server: NbdimgServer) -> None:
    """The clock runs from the first byte of the unfinished header, whatever came before."""
    with connect_negotiated(server.socket_path, "disk") as client:
        assert client.read(0, 512).data == pattern(0, 512)
        first, second = client.reads(2, 512)
        client.send(client.announce(first) + second.serialize()[:27])
        assert client.read_reply().data == pattern(0, 512)
        assert_cut_at_deadline(client.wait_closed(5))


def test_requests_that_each_end_in_the_bytes_of_the_next_are_not_cut(server: NbdimgServer) -> None:
    """Twice the timeout without a moment in which no request is unfinished, and few bytes: each one is in time."""
    with connect_negotiated(server.socket_path, "disk") as client:
        requests = client.reads(8, 512)
        data = b"".join(map(client.announce, requests))
        size = len(data) // len(requests)
        client.send(data[: size // 2])
        for number in range(len(requests) - 1):
            assert client.wait_closed(TIMEOUT_S / 4) is None, f"cut after {number} requests"
            client.send(data[size // 2 + size * number : size // 2 + size * (number + 1)])
            assert client.read_reply().error == 0


def test_write_payload_that_stops_is_cut_and_changes_no_sector(server: NbdimgServer) -> None:
    """16 KiB and then nothing: below 64 KiB/s from the first second on."""
    with connect_negotiated(server.socket_path, "disk") as client:
        request = client.new_request(Command.WRITE, 0, MIB, payload=bytes(16 * KIB))
        client.send_requests([request])
        assert_cut_at_deadline(client.wait_closed(5))
    with connect_negotiated(server.socket_path, "disk") as client:
        assert client.read(0, MIB).data == pattern(0, MIB), "half a write reached the image"


def test_write_payload_at_a_fair_rate_outlives_the_request_timeout(server: NbdimgServer) -> None:
    """1 MiB at 512 KiB/s takes twice the timeout; the demand after it is an average of 64 KiB/s."""
    payload = pattern(0, MIB)
    with connect_negotiated(server.socket_path, "disk") as client:
        data = client.announce(client.new_request(Command.WRITE, 4 * MIB, MIB, payload=payload))
        step = 64 * KIB
        for start in range(0, len(data), step):
            client.send(data[start : start + step])
            assert client.wait_closed(step / (512 * KIB)) is None, f"cut after {start + step} bytes"
        with connect_negotiated(server.socket_path, "disk") as other:
            assert other.read(4 * MIB, MIB).data == payload


def test_reader_that_takes_nothing_is_cut(server: NbdimgServer) -> None:
    with connect_negotiated(server.socket_path, "disk") as client:
        client.send_requests(client.reads(16, MIB))
        start = time.monotonic()
        assert wait_until(client.is_closed_without_reading, 3 * STALL_TIMEOUT_S), "not cut"
        assert_cut_at_deadline(time.monotonic() - start, STALL_TIMEOUT_S)
    assert_alive(server, server.socket_path)


@pytest.mark.parametrize("step", [512 * KIB, 64 * KIB])
@pytest.mark.parametrize("structured", [True, False], ids=["in-pieces", "whole"])
def test_reader_that_is_slow_but_takes_something_is_not_cut(server: NbdimgServer, structured: bool, step: int) -> None:
    """So much every tenth of a second, for twice the stall timeout, and then the rest, byte for byte. Of replies that
    are read whole some wait all the time. At the smaller step the kernel does not call the socket writable within the
    timeout.
    """
    expected = pattern(0, MIB)
    with Client(server.socket_path) as client:
        client.greet()
        client.negotiate("disk", structured=structured)
        requests = client.reads(48, MIB)
        client.send_requests(requests)
        for _ in range(42):
            client.receive_ahead(step)
            time.sleep(0.1)
        replies = client.read_replies(len(requests))
    assert all(reply.data == expected for reply in replies)


def test_idle_client_with_nothing_outstanding_is_not_cut(server: NbdimgServer) -> None:
    """The control: three timeouts of rest, before the first request and after one."""
    with (
        connect_negotiated(server.socket_path, "disk") as never_asked,
        connect_negotiated(server.socket_path, "disk") as asked,
    ):
        assert asked.read(0, 512).data == pattern(0, 512)
        assert never_asked.wait_closed(3 * TIMEOUT_S) is None
        assert asked.wait_closed(0.01) is None
        assert never_asked.read(0, 512).data == asked.read(0, 512).data == pattern(0, 512)


@contextmanager
def stopped(server: NbdimgServer) -> Iterator[None]:
    server.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, server.pid, os.WSTOPPED | os.WNOWAIT)
    yield
    server.process.send_signal(signal.SIGCONT)


def test_server_that_was_stopped_longer_than_a_deadline_cuts_nobody(server: NbdimgServer) -> None:
    content = pattern(0, MIB)
    with Client(server.socket_path) as newcomer, connect_negotiated(server.socket_path, "disk") as writer:
        newcomer.greet()
        request = writer.announce(writer.new_request(Command.WRITE, 0, MIB, payload=content))
        writer.send(request[: MIB // 2])
        with stopped(server):
            time.sleep(2 * TIMEOUT_S)
        newcomer.negotiate("disk")
        writer.send(request[MIB // 2 :])
        assert writer.read_reply().error == 0
        assert newcomer.read(0, MIB).data == content


def test_longer_timeout_moves_the_cut(tmp_path: Path) -> None:
    """The control: with a minute to spare nothing is cut, so the cuts above come from the deadline."""
    image = pattern_image(tmp_path / "disk.raw", MIB)
    options = ["--format=raw", "--handshake-timeout=60", "--request-timeout=60"]
    with (
        NbdimgServer(f"disk={image}", options=options) as patient,
        Client(patient.socket_path) as silent,
        connect_negotiated(patient.socket_path, "disk") as half,
    ):
        half.send(half.reads(1, 512)[0].serialize()[:10])
        assert silent.wait_closed(2 * TIMEOUT_S) is None
        assert half.wait_closed(0.01) is None


def test_default_deadline_ends_silent_clients_by_ten_and_a_half_seconds(tmp_path: Path) -> None:
    disk = pattern_image(tmp_path / "disk.raw", MIB)
    with NbdimgServer(f"disk={disk}", options=["--format=raw"]) as default:
        start = time.monotonic()
        silent = [Client(default.socket_path) for _ in range(20)]
        slow = Client(default.socket_path)
        assert slow.wait_closed(0.1) is None
        cut = drip(slow, b"\0\0\0\3" + option_bytes(Option.LIST), 1.0, REAL_LATEST_S)
        assert cut is not None, "1 byte/s was not cut"
        for client in silent:
            assert client.wait_closed(max(0.01, start + REAL_LATEST_S - time.monotonic())) is not None
        seconds = time.monotonic() - start
        assert REAL_TIMEOUT_S - 1 <= seconds <= REAL_LATEST_S
        for client in [*silent, slow]:
            client.close()
        assert_alive(default, default.socket_path)
