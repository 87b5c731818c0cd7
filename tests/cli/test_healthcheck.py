"""`nbdimg healthcheck`: what it says of servers that are well, ill, silent or none, and what it costs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdimg.cli import healthcheck
from nbdimg.cli.healthcheck import SOCKET_VARIABLE, main
from nbdimg.cli.main import run
from nbdimg.config import AdminConfig, ServerConfig, TcpAddress
from tests.admin.fake import FakeServer, state
from tests.support.httpclient import http_address

HEALTHY, UNHEALTHY, USAGE = 0, 1, 2

IMPORTS = """
import sys
sys.argv = ["nbdimg", "healthcheck", *sys.argv[1:]]
import runpy
try:
    runpy.run_module("nbdimg", run_name="__main__", alter_sys=True)
finally:
    print(*sorted(name for name in sys.modules if "." not in name or name.startswith("nbdimg")))
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    config = ServerConfig((), admin=AdminConfig(str(tmp_path / "a")), metrics_address=TcpAddress("127.0.0.1", 0))
    with FakeServer(config) as running:
        yield running


@contextmanager
def answering(path: Path, answer: Callable[[socket.socket], None]) -> Iterator[None]:
    """Somebody at a Unix socket who takes one connection, and is no server of ours."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as sock:
                answer(sock)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("kind", [[], ["live"], ["ready"], ["startup"]])
def test_healthcheck_of_a_server_that_is_well_is_0_and_silent(
    server: FakeServer, tmp_path: Path, kind: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    server.attach()
    (metrics,) = http_address(server.log)
    url = f"http://{metrics[0]}:{metrics[1]}"
    for where in (["--socket", f"{tmp_path}/a"], [f"--socket={tmp_path}/a"], ["--url", url], [f"--url={url}/"]):
        assert main([*where, *kind]) == HEALTHY
        assert main([*kind, *where]) == HEALTHY
        assert run(["healthcheck", *where, *kind]) == HEALTHY
    assert capsys.readouterr() == ("", "")


def test_healthcheck_asks_at_the_socket_of_the_environment(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SOCKET_VARIABLE, f"{tmp_path}/a")
    assert main([]) == HEALTHY
    monkeypatch.setenv(SOCKET_VARIABLE, f"{tmp_path}/b")
    assert main([]) == UNHEALTHY


def test_healthcheck_takes_an_empty_variable_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(healthcheck, "DEFAULT_SOCKET", f"{tmp_path}/default")
    monkeypatch.setenv(SOCKET_VARIABLE, "")
    assert main([]) == UNHEALTHY
    assert capsys.readouterr().err == f"nbdimg: no answer from {tmp_path}/default: No such file or directory\n"


def test_healthcheck_tells_what_is_wrong(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = f"--socket={tmp_path}/a"
    assert [main([where, kind]) for kind in ("live", "startup", "ready")] == [HEALTHY, UNHEALTHY, UNHEALTHY]
    assert capsys.readouterr().err.splitlines() == [
        "nbdimg: /startupz answers 503: starting",
        "nbdimg: /readyz answers 503: starting",
    ]
    server.attach()
    server.control.states.append(state("c", failure="it failed"))
    assert main([where, "ready"]) == UNHEALTHY
    assert capsys.readouterr().err == "nbdimg: /readyz answers 503: 1 of 3 exports failed\n"


def test_healthcheck_without_a_server_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--socket={tmp_path}/nope"]) == UNHEALTHY
    assert capsys.readouterr().err == f"nbdimg: no answer from {tmp_path}/nope: No such file or directory\n"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        assert main([f"--url=http://127.0.0.1:{port}"]) == UNHEALTHY
    assert capsys.readouterr().err == f"nbdimg: no answer from 127.0.0.1:{port}: Connection refused\n"


@pytest.mark.parametrize("raw", [b"", b"NBDMAGIC", b"HTTP/1.1\r\n\r\n", b"HTTP/1.1 x y\r\n\r\n", b"\xff" * 100])
def test_healthcheck_of_what_is_not_http_is_1(tmp_path: Path, raw: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(sock: socket.socket) -> None:
        sock.recv(4096)
        sock.sendall(raw)

    with answering(tmp_path / "s", answer):
        assert main([f"--socket={tmp_path}/s"]) == UNHEALTHY
    assert capsys.readouterr().err == f"nbdimg: no answer from {tmp_path}/s: what answers there is not HTTP\n"


def test_healthcheck_of_a_server_that_hangs_is_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(healthcheck, "TIMEOUT_S", 0.2)

    def answer(sock: socket.socket) -> None:
        while sock.recv(4096):
            pass

    with answering(tmp_path / "s", answer):
        assert main([f"--socket={tmp_path}/s"]) == UNHEALTHY
    assert "timed out" in capsys.readouterr().err


def test_healthcheck_of_a_server_that_drips_is_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(healthcheck, "TIMEOUT_S", 0.2)
    is_over = threading.Event()

    def answer(sock: socket.socket) -> None:
        for each in b"HTTP/1.0 200 OK\r\n\r\n":
            if is_over.wait(0.05):
                return
            sock.send(bytes([each]))

    with answering(tmp_path / "s", answer):
        assert main([f"--socket={tmp_path}/s"]) == UNHEALTHY
        is_over.set()
    assert "timed out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["alive"], "'alive' is not allowed, expected live, ready, startup, --socket or --url"),
        (["ready", "live"], "ready live is not allowed, expected one of them"),
        (["--sockt=x"], "'--sockt=x' is not allowed, expected live,"),
        (["--socket"], "--socket needs a value"),
        (["--url="], "--url needs a value"),
        (["--url=127.0.0.1:9809"], "'127.0.0.1:9809' is not allowed, expected http://HOST:PORT"),
        (["--url=https://h:1"], "'https://h:1' is not allowed"),
        (["--url=http://u:p@h:1"], "'http://…@h:1' is not allowed"),
        (["--url=http://h:x"], "'http://h:x' is not allowed"),
        (["--url=http://h:65536"], "'http://h:65536' is not allowed"),
        (["--url=http://h:1/metrics"], "'http://h:1/metrics' is not allowed"),
        (["--url=http://h\r\nX:1"], "'http://h\\r\\nX:1' is not allowed"),
    ],
)
def test_healthcheck_wrong_arguments_are_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == USAGE
    captured = capsys.readouterr()
    assert captured.err.startswith(f"nbdimg: {said}")
    assert captured.err.endswith("; see nbdimg healthcheck --help\n")


def test_healthcheck_help_names_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == run(["healthcheck", "--help"]) == HEALTHY
    text = capsys.readouterr().out
    assert all(each in text for each in ("--socket", "--url", "live", "ready", "startup", SOCKET_VARIABLE))


def test_healthcheck_as_a_process_loads_none_of_the_server(server: FakeServer, tmp_path: Path) -> None:
    """What makes it slow is what it would import; seconds are not asserted."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, f"--socket={tmp_path}/a"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (HEALTHY, "")
    loaded = set(done.stdout.split())
    own = {"nbdimg", "nbdimg.errors", *(f"nbdimg.cli{name}" for name in ("", ".interrupt", ".streams", ".healthcheck"))}
    assert {each for each in loaded if each.startswith("nbdimg")} == own
    assert loaded.isdisjoint({"asyncio", "ssl", "http", "email", "argparse", "typer", "json", "logging", "aiohttp"})


def test_control_other_commands_do_load_it() -> None:
    code = IMPORTS.replace('"healthcheck", *sys.argv[1:]', '"--version"')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert {"asyncio", "typer", "nbdimg.server.service"} <= set(done.stdout.split())


def test_public_names_are_there_when_they_are_asked_for() -> None:
    code = "import sys, nbdimg; assert 'nbdimg.server' not in sys.modules; [getattr(nbdimg, n) for n in nbdimg.__all__]"
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True, env=dict(os.environ))
