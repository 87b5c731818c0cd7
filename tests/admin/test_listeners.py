"""The HTTP listeners: files and permissions, limits, hostile clients, and what a server without them saves."""

from __future__ import annotations

import gzip
import os
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from aiohttp.compression_utils import ZLibDecompressor

from nbdimg.admin import app, backend, listeners, requests
from nbdimg.config import AdminConfig, ServerConfig
from nbdimg.errors import ConfigError, ListenError
from nbdimg.server.systemd import Inherited
from nbdimg.uri import NbdUri
from tests.admin.fake import FakeServer
from tests.support.activation import hand_over, listening
from tests.support.configured import ConfiguredServer, export
from tests.support.httpclient import Answer, ask, connected, exchanged, http_address, received
from tests.support.rawprotocol import MIB
from tests.support.rss import wait_until
from tests.support.server import NbdimgServer

WAIT_S = 30.0


@pytest.fixture
def address(tmp_path: Path) -> str:
    return str(tmp_path / "a")


@pytest.fixture
def server(address: str) -> Iterator[FakeServer]:
    with FakeServer(ServerConfig((), admin=AdminConfig(address))) as running:
        running.attach()
        yield running
        assert "Traceback" not in running.log


# Files


def test_socket_is_its_owners_alone_and_gone_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(4096))
    old = os.umask(0)
    try:
        server = ConfiguredServer(tmp_path, '[admin]\nsocket = "a"\n' + export("disk", "disk.img"))
    finally:
        os.umask(old)
    with server:
        found = (tmp_path / "a").stat()
        assert stat.S_ISSOCK(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert found.st_uid == os.geteuid()
        server.terminate()
        assert server.wait() == 0
        assert not (tmp_path / "a").exists()


def test_socket_of_a_server_that_died_is_replaced(tmp_path: Path, address: str) -> None:
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(address)
    with FakeServer(ServerConfig((), admin=AdminConfig(address))):
        assert ask(address, "GET", "/livez").status == 200


def test_socket_in_use_is_a_listen_error_and_the_other_server_keeps_it(server: FakeServer, address: str) -> None:
    with (
        pytest.raises(ListenError, match=f"cannot listen on {address}: Address already in use"),
        FakeServer(ServerConfig((), admin=AdminConfig(address))),
    ):
        pass
    assert ask(address, "GET", "/livez").status == 200


def test_socket_that_another_took_over_is_left_to_it(tmp_path: Path, address: str) -> None:
    with FakeServer(ServerConfig((), admin=AdminConfig(address))):
        os.rename(address, tmp_path / "moved")
        Path(address).write_text("another's")
    assert Path(address).read_text() == "another's"


def test_serve_options_open_the_socket_and_metrics_and_sighup_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(4096))
    options = [f"--admin-socket={tmp_path}/a", "--metrics-listen=127.0.0.1:0", "--format=raw"]
    with NbdimgServer(tmp_path / "disk.img", options=options) as server:
        (metrics,) = http_address(server.stderr())
        assert wait_until(lambda: ask(metrics, "GET", "/readyz").status == 200, WAIT_S)
        answer = ask(f"{tmp_path}/a", "POST", "/v1/reload", {})
        assert (answer.status, answer.detail.partition(",")[0]) == (409, "the server was started without --config")


def test_serve_with_metrics_alone_tells_them(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(4096))
    with NbdimgServer(tmp_path / "disk.img", options=["--metrics-listen=127.0.0.1:0", "--format=raw"]) as server:
        (metrics,) = http_address(server.stderr())
        assert wait_until(lambda: ask(metrics, "GET", "/readyz").status == 200, WAIT_S)
        assert ask(metrics, "GET", "/v1/status").status == 404


def test_serve_image_that_cannot_be_opened_leaves_no_socket(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exited with 3"):
        NbdimgServer(tmp_path / "missing.img", options=[f"--admin-socket={tmp_path}/a"])
    assert not (tmp_path / "a").exists()


# Handed over


def test_inherited_sockets_named_admin_and_metrics_are_used_and_kept(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(4096))
    with ExitStack() as stack:
        sockets = [stack.enter_context(listening(str(tmp_path / name))) for name in ("n", "a")]
        sockets.append(stack.enter_context(listening(("127.0.0.1", 0))))
        metrics = sockets[2].getsockname()
        process = stack.enter_context(
            hand_over(sockets, "nbd:admin:metrics", "serve", "--format=raw", str(tmp_path / "disk.img"))
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"nbd+unix:///disk?socket={tmp_path}/n\n"
            assert ask(metrics, "GET", "/livez").status == 200
            assert wait_until(lambda: ask(str(tmp_path / "a"), "GET", "/v1/exports").status == 200, WAIT_S)
            assert ask(metrics, "GET", "/v1/exports").status == 404
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=WAIT_S)
        assert process.returncode == 0
        assert (tmp_path / "a").exists()


def test_inherited_admin_socket_at_tcp_is_refused_as_it_would_have_no_token() -> None:
    with listening(("127.0.0.1", 0)) as sock:
        inherited = Inherited(sock, NbdUri(host="127.0.0.1", port=sock.getsockname()[1]), "admin")
        with pytest.raises(ConfigError, match="expected a Unix socket"), FakeServer(ServerConfig(()), [inherited]):
            pass


# Limits


def test_connection_beyond_the_limit_is_closed_and_served_when_another_leaves(
    server: FakeServer, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listeners, "CONNECTIONS_MAX", 3)
    with ExitStack() as stack:
        held = [stack.enter_context(connected(address)) for _ in range(3)]
        for sock in held:
            sock.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
        with pytest.raises((AssertionError, ConnectionError)):
            ask(address, "GET", "/livez")
        held[0].close()
        assert wait_until(lambda: _answers(address), WAIT_S)


def _answers(address: str) -> bool:
    try:
        return ask(address, "GET", "/livez").status == 200
    except (AssertionError, ConnectionError):
        return False


@pytest.mark.parametrize("sent", [b"", b"GET /livez HT", b"GET /livez HTTP/1.1\r\nHost: x\r\n"])
def test_client_that_never_ends_its_header_is_closed(
    address: str, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listeners, "IDLE_TIMEOUT_S", 0.2)
    with FakeServer(ServerConfig((), admin=AdminConfig(address))), connected(address) as sock:
        sock.sendall(sent)
        assert sock.recv(4096) == b""


def test_client_that_never_ends_its_body_gets_408(
    server: FakeServer, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "BODY_TIMEOUT_S", 0.2)
    with connected(address) as sock:
        sock.sendall(
            b"POST /v1/exports/a/resize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        answer = received(sock)
        assert (answer.status, answer.detail) == (408, "the body did not come within 0.2 s")
    assert server.control.calls == []


def test_packed_body_is_refused_and_nobody_unpacks_it(server: FakeServer, address: str) -> None:
    packed = gzip.compress(b'{"size": 4096}')
    answer = ask(address, "POST", "/v1/exports/a/resize", packed, {"Content-Encoding": "gzip"})
    assert (answer.status, answer.detail) == (415, "the body has a content encoding, expected none")
    assert server.control.calls == []


def test_packed_body_that_nothing_reads_takes_no_time_of_others(
    server: FakeServer, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked: list[int] = []
    decompressor = ZLibDecompressor.decompress_sync

    def noted(self: ZLibDecompressor, data: bytes, max_length: int = 0) -> bytes:
        unpacked.append(len(data))
        return decompressor(self, data, max_length)

    monkeypatch.setattr(ZLibDecompressor, "decompress_sync", noted)
    assert ask(address, "POST", "/livez", gzip.compress(bytes(MIB)), {"Content-Encoding": "gzip"}).status == 405
    assert unpacked == []


def test_client_that_never_reads_is_cut(server: FakeServer, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "SEND_TIMEOUT_S", 0.2)

    async def long_exposition(_: object) -> tuple[bytes, str]:
        return b"#" * (8 << 20), "text/plain"

    monkeypatch.setattr(backend, "exposition", long_exposition)
    with connected(address) as sock:
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert wait_until(lambda: "ESTABLISHED" not in _state(sock), WAIT_S)
    monkeypatch.setattr(app, "SEND_TIMEOUT_S", WAIT_S)
    assert ask(address, "GET", "/metrics").headers["content-length"] == str(8 << 20)


def _state(sock: socket.socket) -> str:
    """ "ESTABLISHED" while the server has not closed its end of a Unix connection."""
    sock.setblocking(False)
    try:
        sock.send(b"\r\n")
    except BlockingIOError:
        pass
    except (BrokenPipeError, ConnectionResetError):
        return "CLOSED"
    return "ESTABLISHED"


@pytest.mark.parametrize(
    "raw",
    [
        b"\0" * 100 + b"\r\n\r\n",
        b"NBDMAGIC\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /livez HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX: \x01\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"y" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X%d: y\r\n" % number for number in range(5000)) + b"\r\n",
        b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v1/exports/%ff%fe HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"POST /v1/exports/a/resize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/exports/a/resize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Encoding: gzip\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nExpect: much\r\nConnection: close\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(100),
    ],
)
def test_malformed_request_is_refused_without_harm_and_without_a_traceback(
    server: FakeServer, address: str, raw: bytes
) -> None:
    try:
        answer: Answer | None = exchanged(address, raw)
    except ConnectionError:
        answer = None
    if answer is not None:
        assert 400 <= answer.status < 500, answer
        assert answer.detail
        assert (answer.headers["server"], answer.headers["cache-control"]) == ("nbdimg", "no-store")
        assert b'File "' not in answer.body
    assert [line for line in server.lines if "admin API is at" not in line and "POST" not in line] == []
    assert ask(address, "GET", "/livez").status == 200


# What it costs


@pytest.mark.parametrize("is_asked", [False, True])
def test_http_library_is_loaded_only_when_http_is_asked_for(tmp_path: Path, is_asked: bool) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(4096))
    options = ["--format=raw", *([f"--admin-socket={tmp_path}/a"] if is_asked else [])]
    with NbdimgServer(tmp_path / "disk.img", options=options) as server:
        loaded = Path(f"/proc/{server.pid}/maps").read_text()
        assert ("/aiohttp/" in loaded) == is_asked
        assert f"/{Path(sys.executable).resolve().name}" in loaded
