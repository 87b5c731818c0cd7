"""Health in every state of a server, and what becomes of other requests meanwhile."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from nbdimg.admin import backend
from nbdimg.config import AdminConfig, ServerConfig, TcpAddress
from nbdimg.errors import (
    ConfigError,
    CorruptImage,
    ImageFailed,
    ImageLocked,
    NotThere,
    RequestError,
    UnsupportedFeature,
)
from tests.admin.fake import FakeServer, state
from tests.support.configured import ConfiguredServer, export
from tests.support.httpclient import Answer, ask, connected, http_address, received
from tests.support.rawclient import connect_negotiated
from tests.support.rawprotocol import MIB, Command
from tests.support.rss import wait_until

WAIT_S = 30.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    with FakeServer(ServerConfig((), admin=AdminConfig(str(tmp_path / "a")))) as running:
        yield running


@pytest.fixture
def address(tmp_path: Path) -> str:
    return str(tmp_path / "a")


def health(address: str) -> dict[str, int]:
    return {path: ask(address, "GET", f"/{path}").status for path in ("livez", "startupz", "readyz")}


def test_starting_is_alive_and_neither_started_nor_ready(server: FakeServer, address: str) -> None:
    assert health(address) == {"livez": 200, "startupz": 503, "readyz": 503}
    assert ask(address, "GET", "/readyz").body == b"starting\n"
    assert ask(address, "GET", "/v1/status").json()["state"] == "starting"
    for method, path in (
        ("GET", "/v1/exports"),
        ("GET", "/v1/stats"),
        ("GET", "/metrics"),
        ("DELETE", "/v1/exports/a"),
    ):
        answer = ask(address, method, path)
        assert (answer.status, answer.detail) == (503, "the server is starting: images are being opened")


def test_serving_is_all_of_it(server: FakeServer, address: str) -> None:
    server.attach()
    assert health(address) == {"livez": 200, "startupz": 200, "readyz": 200}
    assert ask(address, "GET", "/readyz?verbose").body == b"[+]a ok\n[+]b ok\nok\n"


def test_failed_export_is_not_ready_and_verbose_names_it(server: FakeServer, address: str) -> None:
    server.attach()
    server.control.states[1] = state("b", failure="an earlier flush failed: Input/output error")
    assert health(address) == {"livez": 200, "startupz": 200, "readyz": 503}
    assert ask(address, "GET", "/readyz").body == b"1 of 2 exports failed\n"
    verbose = ask(address, "GET", "/readyz?verbose=1").body.decode().splitlines()
    assert verbose == ["[+]a ok", "[-]b an earlier flush failed: Input/output error", "1 of 2 exports failed"]
    assert ask(address, "GET", "/v1/status").json()["failed_exports"] == ["b"]


def test_export_that_a_reload_could_not_open_again_is_not_ready(server: FakeServer, address: str) -> None:
    server.attach()
    server.control.unserved = {"c": "/c.img: No such file or directory"}
    assert health(address) == {"livez": 200, "startupz": 200, "readyz": 503}
    assert ask(address, "GET", "/readyz?verbose").body.decode().splitlines() == [
        "[+]a ok",
        "[+]b ok",
        "[-]c /c.img: No such file or directory",
        "1 of 3 exports failed",
    ]
    assert ask(address, "GET", "/v1/status").json()["failed_exports"] == ["c"]


def test_failed_export_that_was_removed_does_not_count(server: FakeServer, address: str) -> None:
    server.attach()
    server.control.states[1] = state("b", failure="it failed", is_hidden=True)
    assert health(address)["readyz"] == 200


def test_stopping_is_alive_and_not_ready_and_takes_no_change(server: FakeServer, address: str) -> None:
    server.attach()
    server.registry.is_shutting_down = True
    assert health(address) == {"livez": 200, "startupz": 200, "readyz": 503}
    assert ask(address, "GET", "/readyz").body == b"stopping\n"
    answer = ask(address, "DELETE", "/v1/exports/a")
    assert (answer.status, answer.detail) == (503, "the server stops")


def test_drain_of_a_real_server_is_seen_until_its_end(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(MIB))
    text = f'listen = ["nbd+unix:///?socket={tmp_path}/s"]\n'
    text += '[admin]\nsocket = "a"\n[metrics]\nlisten = "127.0.0.1:0"\n[limits]\ndrain_timeout = 60\n'
    with ConfiguredServer(tmp_path, text + export("disk", "disk.img")) as server:
        (metrics,) = http_address(server.stderr())
        for address in (str(tmp_path / "a"), metrics):
            assert ask(address, "GET", "/readyz?verbose").body == b"[+]disk ok\nok\n"
        with connect_negotiated(server.socket_path, "disk") as client:
            request = client.new_request(Command.WRITE, 0, MIB, payload=bytes(MIB))
            client.send(client.announce(request)[: MIB // 2])
            server.terminate()
            assert wait_until(lambda: ask(metrics, "GET", "/readyz").body == b"stopping\n", WAIT_S)
            assert health(str(tmp_path / "a")) == {"livez": 200, "startupz": 200, "readyz": 503}
            assert ask(str(tmp_path / "a"), "POST", "/v1/reload", {}).status == 503
        assert server.wait() == 0
        assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("error", "status", "detail"),
    [
        (ConfigError("it is smaller"), 409, "it is smaller"),
        (NotThere("it is gone"), 404, "it is gone"),
        (ImageLocked("/i", "is locked"), 409, "/i: is locked"),
        (UnsupportedFeature("/i", "has none"), 422, "/i: has none"),
        (CorruptImage("/i", "L1 is bad", 7), 422, "/i: L1 is bad"),
        (ImageFailed("/i", "open it anew"), 500, "/i: open it anew"),
        (OSError(errno.ENOSPC, "No space left on device"), 507, "No space left on device"),
        (OSError(errno.EFBIG, "File too large"), 507, "File too large"),
        (OSError(errno.EIO, "Input/output error", "/i"), 500, "/i: Input/output error"),
        (RequestError(errno.EINVAL, "no"), 500, "internal error; the server's log says more"),
        (ZeroDivisionError("secret"), 500, "internal error; the server's log says more"),
    ],
)
def test_operation_that_fails_is_a_problem_of_the_fitting_kind(
    server: FakeServer, address: str, error: Exception, status: int, detail: str
) -> None:
    server.attach()
    server.control.error = error
    answer: Answer = ask(address, "POST", "/v1/exports/a/resize", {"size": 5})
    assert (answer.status, answer.detail) == (status, detail)
    assert server.control.calls == [("a", 5)]
    assert ("internal error in the admin API" in server.log) == ("internal" in detail)


def test_metrics_that_many_ask_for_at_once_are_written_once(
    server: FakeServer, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = asyncio.Event()
    written: list[bytes] = []

    async def slowly(_: object) -> tuple[bytes, str]:
        written.append(b"page %d" % len(written))
        page = written[-1]
        await may_go_on.wait()
        return page, "text/plain"

    monkeypatch.setattr(backend, "exposition", slowly)
    server.attach()
    with ExitStack() as stack:
        asking = [stack.enter_context(connected(address)) for _ in range(5)]
        for sock in asking:
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert wait_until(lambda: bool(written), WAIT_S)
        assert ask(address, "GET", "/livez").status == 200
        server.now(may_go_on.set)
        assert [received(sock).body for sock in asking] == [b"page 0"] * 5
    assert ask(address, "GET", "/metrics").body == b"page 1"


def test_metrics_listener_has_health_and_nothing_that_changes() -> None:
    with FakeServer(ServerConfig((), metrics_address=TcpAddress("127.0.0.1", 0))) as server:
        server.attach()
        (address,) = http_address(server.log)
        assert ask(address, "GET", "/livez").status == 200
        for path in ("/v1/exports", "/v1/status", "/v1/openapi.json"):
            assert ask(address, "GET", path).status == 404
        assert ask(address, "DELETE", "/v1/exports/a").status == 404
