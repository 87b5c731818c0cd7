"""`nbdimg top`: rates from two looks at counters, the busiest first, for people and for programs."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from typing import Any

import pytest

from nbdimg.cli.main import run
from nbdimg.cli.top import COLUMNS, rows
from tests.admin.served import Served
from tests.support.rawclient import connect_negotiated
from tests.support.rawprotocol import KIB

WAIT_S = 60.0
KEYS = ("reads", "read_bytes", "writes", "write_bytes", "others", "errors", "connections", "in_flight")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("top")) as server:
        yield server


def counters(name: str, *numbers: int, read_seconds: float = 0.0, write_seconds: float = 0.0) -> dict[str, Any]:
    found: dict[str, Any] = dict(zip(KEYS, (*numbers, *[0] * len(KEYS)), strict=False))
    return {"name": name, **found, "read_seconds": read_seconds, "write_seconds": write_seconds, "other_seconds": 0.0}


def stats(time_s: float, *exports: dict[str, Any]) -> dict[str, Any]:
    return {"time": time_s, "exports": list(exports)}


def test_rows_are_differences_by_the_servers_clock() -> None:
    before = stats(100.0, counters("a", 10, 1000, 5, 500, 1, 0, read_seconds=1.0))
    after = stats(102.0, counters("a", 30, 5000, 5, 500, 5, 2, 3, 4, read_seconds=1.5))
    (row,) = rows(before, after)
    assert (row.name, row.reads, row.writes, row.others, row.errors) == ("a", 10, 0, 2, 1)
    assert (row.read_bytes, row.write_bytes) == (2000, 0)
    assert (row.read_latency, row.write_latency) == (0.025, None)
    assert (row.connections, row.in_flight) == (3, 4)


def test_rows_have_the_busiest_first_then_by_bytes_then_by_name() -> None:
    names = ["d", "a", "b", "c"]
    before = stats(0.0, *(counters(name) for name in [*names, "e"]))
    after = stats(1.0, counters("d", 1, 10), counters("a", 1, 10), counters("b", 1, 99), counters("c", 2, 1))
    after["exports"].append(counters("e", 0, 0, 0, 0, 3))
    assert [row.name for row in rows(before, after)] == ["e", "c", "b", "a", "d"]


def test_rows_leave_out_what_came_went_or_began_anew() -> None:
    before = stats(0.0, counters("anew", 50), counters("gone", 1), counters("stays", 1))
    after = stats(1.0, counters("anew", 3), counters("came", 9), counters("stays", 1))
    assert [row.name for row in rows(before, after)] == ["stays"]


def test_rows_of_two_looks_at_one_moment_divide_nothing_by_zero() -> None:
    (row,) = rows(stats(1.0, counters("a")), stats(1.0, counters("a", 5)))
    assert row.reads == 0


@pytest.mark.parametrize("interval", ["inf", "1e10", "0", "nan"])
def test_interval_that_is_no_time_to_wait_is_refused(capsys: pytest.CaptureFixture[str], interval: str) -> None:
    assert run(["top", f"--interval={interval}", "--socket=/nope"]) == 2
    assert "Invalid value for '--interval'" in capsys.readouterr().err


def test_once_prints_a_table_with_a_line_for_each_export(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["top", "--once", "--interval=0.1", f"--socket={served.admin}"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == " ".join(COLUMNS).split()
    assert {line.split()[0] for line in lines} == {"disk", "vm"}


def test_json_shows_the_load_that_a_client_makes(served: Served) -> None:
    """The client goes on until the command has looked twice, however long that takes."""
    argv = [sys.executable, "-m", "nbdimg", "top", "--once", "--json", "--interval=0.5", f"--socket={served.admin}"]
    with (
        connect_negotiated(served.socket_path, "vm") as client,
        subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process,
    ):
        deadline = time.monotonic() + WAIT_S
        while process.poll() is None and time.monotonic() < deadline:
            client.read(0, 4 * KIB)
        out, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0
    answer = json.loads(out)
    busy, idle = answer["exports"]
    assert answer["version"] == 1
    assert (busy["name"], idle["name"], busy["connections"]) == ("vm", "disk", 1)
    assert busy["reads"] > 0
    assert busy["read_bytes"] == pytest.approx(busy["reads"] * 4 * KIB)
    assert 0 < busy["read_latency"] < WAIT_S
    assert (idle["reads"], idle["read_latency"]) == (0, None)


@pytest.mark.parametrize("end", ["q", "Ctrl-C", "SIGINT"])
def test_live_view_fills_the_terminal_and_ends_with_0(served: Served, end: str) -> None:
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    argv = [sys.executable, "-m", "nbdimg", "top", "--interval=0.1", f"--socket={served.admin}"]
    process = subprocess.Popen(
        argv,
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm"},
        preexec_fn=_take_terminal,
    )
    try:
        seen = _read_until(primary, b"disk", b"vm")
        assert b"CLIENTS" in seen
        if end == "SIGINT":
            process.send_signal(signal.SIGINT)
        else:
            os.write(primary, b"q" if end == "q" else b"\x03")
        seen += _read_until(primary, b"\x1b[?1049l")
        assert process.wait(WAIT_S) == 0
        assert b"Traceback" not in seen
        assert termios.tcgetattr(secondary)[3] & termios.ICANON
    finally:
        process.kill()
        process.wait()
        os.close(primary)
        os.close(secondary)


def test_live_view_has_no_more_lines_than_the_terminal_and_says_what_is_missing(served: Served) -> None:
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 3, 120, 0, 0))
    argv = [sys.executable, "-m", "nbdimg", "top", "--interval=0.1", f"--socket={served.admin}"]
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(argv, stdin=secondary, stdout=secondary, stderr=secondary, env=environment) as process:
        try:
            seen = _read_until(primary, "… 1 more".encode())
            assert (b"disk" in seen) != (b"vm" in seen)
        finally:
            process.kill()
            os.close(primary)
            os.close(secondary)


def test_dumb_terminal_gets_one_table_below_the_other(served: Served) -> None:
    """Nothing was shown: what draws on a terminal leaves such a one alone."""
    primary, secondary = pty.openpty()
    argv = [sys.executable, "-m", "nbdimg", "top", "--interval=0.1", f"--socket={served.admin}"]
    environment = {**os.environ, "TERM": "dumb"}
    with subprocess.Popen(argv, stdin=secondary, stdout=secondary, stderr=secondary, env=environment) as process:
        try:
            for _ in range(2):
                seen = _read_until(primary, b"CLIENTS", b"disk", b"vm")
                assert b"\x1b" not in seen
        finally:
            process.kill()
            os.close(primary)
            os.close(secondary)


def _take_terminal() -> None:
    """Make descriptor 0 the controlling terminal, so that Ctrl-C is a signal."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _read_until(descriptor: int, *marks: bytes) -> bytes:
    seen = b""
    deadline = time.monotonic() + WAIT_S
    while not all(mark in seen for mark in marks):
        assert time.monotonic() < deadline, seen
        if select.select([descriptor], [], [], 1)[0]:
            seen += os.read(descriptor, 65536)
    return seen


def test_server_that_goes_away_ends_it_with_1_and_one_line(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    with Served(tmp_path_factory.mktemp("gone")) as server:
        argv = [sys.executable, "-m", "nbdimg", "top", "--json", "--interval=0.1", f"--socket={server.admin}"]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["exports"]
            server.kill()
            _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    (line,) = err.splitlines()
    assert line.startswith("nbdimg: cannot reach the server at ")


def test_control_no_server_is_noticed(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert run(["top", "--once", f"--socket={tmp_path_factory.mktemp('none')}/s"]) == 1
