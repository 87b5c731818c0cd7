"""Text at a terminal, JSON elsewhere, and what the configuration says before either."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import select
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from nbdimg.server.log import JsonFormatter, LimitedLog, TextFormatter
from tests.support.configured import ConfiguredServer, export
from tests.support.rawclient import Client
from tests.support.rss import wait_until
from tests.support.server import NbdimgServer

LINE_LIMIT_S = 30

STRAY = """
import threading, warnings
from nbdimg.server.log import start_logging
class Fragile:
    def __del__(self):
        raise ValueError("destroyed")
start_logging("json", is_verbose=False)
warnings.warn("of two\\nlines")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
Fragile()
"""
"""What Python itself says on standard error."""

FLOOD = """
import logging, sys
from nbdimg.cli.streams import take_no_wait_at_stderr
from nbdimg.server.log import start_logging
take_no_wait_at_stderr()
start_logging("json", is_verbose=False)
for number in range(2000):
    logging.getLogger("nbdimg").info("line %d, and %s", number, "x" * int(sys.argv[1]))
print("done", flush=True)
sys.stdin.readline()
logging.getLogger("nbdimg").info("the last")
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    return path


def visit(server: NbdimgServer | ConfiguredServer) -> None:
    """Attach, read, leave, and wait for the line about it."""
    with Client(server.socket_path) as client:
        client.greet()
        client.negotiate("disk")
        assert client.read(0, 4096).error == 0
        client.disconnect()
    assert wait_until(lambda: "detached from" in server.stderr(), LINE_LIMIT_S), server.stderr()


def parsed(stderr: str) -> list[dict[str, Any]]:
    """Raises: ValueError: a line is no JSON."""
    return [json.loads(line) for line in stderr.splitlines()]


@pytest.mark.parametrize("format", ["auto", "json"])
def test_log_that_is_no_terminal_is_one_object_a_line(image: Path, format: str) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    with NbdimgServer(image, env={"NBDIMG_LOG_FORMAT": format}) as server:
        visit(server)
        lines = parsed(server.stderr())
    for line in lines:
        assert {"ts", "level", "message"} <= set(line)
        assert line["ts"].endswith("Z")
        assert before <= datetime.fromisoformat(line["ts"]) <= datetime.now(UTC) + timedelta(seconds=1)
    attach, detach = [line for line in lines if "event" in line]
    assert (attach["level"], attach["event"], attach["export"]) == ("INFO", "attach", "disk")
    assert (detach["event"], detach["read_bytes"], detach["written_bytes"]) == ("detach", 4096, 0)
    assert detach["peer"] == f"unix pid {os.getpid()}"


def test_option_goes_before_the_environment_and_that_before_the_file(tmp_path: Path, image: Path) -> None:
    text = 'log_format = "json"\n' + export("disk", image)
    with ConfiguredServer(tmp_path, text, env={"NBDIMG_LOG_FORMAT": "text"}) as server:
        visit(server)
        assert f"nbdimg: INFO: unix pid {os.getpid()}: attached to 'disk', read-write" in server.stderr().splitlines()
    options = ["--log-format=json"]
    with ConfiguredServer(tmp_path, text, options=options, env={"NBDIMG_LOG_FORMAT": "text"}) as server:
        visit(server)
        assert [line["event"] for line in parsed(server.stderr()) if "event" in line] == ["attach", "detach"]


def test_terminal_gets_text(tmp_path: Path, image: Path) -> None:
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-m", "nbdimg", "serve", f"--listen=nbd+unix:///?socket={tmp_path}/s", str(image)]
    process = subprocess.Popen([*argv, "--sandbox=off"], stdin=theirs, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"nbd+unix:///disk?socket=")
        with Client(f"{tmp_path}/s") as client:
            client.greet()
            client.negotiate("disk")
        shown, deadline = b"", time.monotonic() + LINE_LIMIT_S
        while b"detached from" not in shown and time.monotonic() < deadline:
            if select.select([ours], [], [], 0.5)[0]:
                shown += os.read(ours, 65536)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=LINE_LIMIT_S)
        os.close(ours)
    assert f"nbdimg: INFO: unix pid {os.getpid()}: attached to 'disk', read-write" in shown.decode()


def test_traceback_and_line_breaks_stay_within_the_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("nbdimg", logging.DEBUG, "f", 1, "it %s", ("broke\n",), sys.exc_info())
    line = JsonFormatter().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert found["message"] == "it broke\n"
    assert found["traceback"].endswith("ValueError: two\nlines")


def test_text_is_one_line_and_steers_no_terminal() -> None:
    arguments = ("ä\nnbdimg: ERROR: \x1b[31m\udcff",)
    record = logging.LogRecord("nbdimg", logging.INFO, "f", 1, "%s is here", arguments, None)
    assert TextFormatter().format(record) == r"nbdimg: INFO: ä\nnbdimg: ERROR: \x1b[31m\udcff is here"


def test_what_python_itself_complains_of_is_one_object_a_line_too() -> None:
    done = subprocess.run([sys.executable, "-c", STRAY], capture_output=True, text=True, timeout=60, check=True)
    warning, thread, destructor = parsed(done.stderr)
    assert (warning["level"], "UserWarning: of two\nlines" in warning["message"]) == ("WARNING", True)
    assert (thread["level"], thread["message"]) == (
        "ERROR",
        "internal error: in a thread: ZeroDivisionError('division by zero')",
    )
    assert destructor["message"] == "internal error: in a destructor: ValueError('destroyed')"


def test_log_that_nobody_reads_stops_nobody_and_tells_later_what_was_left_out() -> None:
    command = [sys.executable, "-c", FLOOD, "100"]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        is_done = bool(select.select([process.stdout], [], [], LINE_LIMIT_S)[0])
        if not is_done:
            process.kill()
        assert is_done
        written = os.read(process.stderr.fileno(), 1 << 20)
        process.stdin.write(b"\n")
        lines = parsed((written + process.stderr.read()).decode())
    *kept, notice, last = [line["message"] for line in lines]
    assert kept[-1].startswith(f"line {len(kept) - 1}, ")
    assert notice == f"{2000 - len(kept)} lines were left out, nobody took what was written"
    assert last == "the last"


def test_line_of_a_connection_without_fields_is_json_too() -> None:
    lines, log = io.StringIO(), logging.Logger("own")
    handler = logging.StreamHandler(lines)
    handler.setFormatter(JsonFormatter())
    log.addHandler(handler)
    LimitedLog(log).say(logging.INFO, "words alone")
    found = json.loads(lines.getvalue())
    assert (found["message"], found.keys()) == ("words alone", {"ts", "level", "message"})


@pytest.mark.parametrize(("kind", "length"), [("terminal", 100), ("pipe", 6000)])
def test_log_that_has_room_for_a_part_of_a_line_stops_nobody(kind: str, length: int) -> None:
    mine, its = pty.openpty() if kind == "terminal" else os.pipe()
    command = [sys.executable, "-c", FLOOD, str(length)]
    try:
        with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=its, bufsize=0) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            is_done = bool(select.select([process.stdout], [], [], LINE_LIMIT_S)[0])
            if not is_done:
                process.kill()
            assert is_done
            written = b""
            while select.select([mine], [], [], 0)[0]:
                written += os.read(mine, 1 << 20)
            process.stdin.write(b"\n")
            while not written.endswith(b'"the last"}' + (b"\r\n" if kind == "terminal" else b"\n")):
                assert select.select([mine], [], [], LINE_LIMIT_S)[0]
                written += os.read(mine, 1 << 20)
    finally:
        os.close(mine)
        os.close(its)
    *kept, notice, _ = [line["message"] for line in parsed(written.decode())]
    assert notice == f"{2000 - len(kept)} lines were left out, nobody took what was written"


def test_control_text_is_no_json(image: Path) -> None:
    with NbdimgServer(image, env={"NBDIMG_LOG_FORMAT": "text"}) as server:
        visit(server)
        with pytest.raises(ValueError, match="Expecting value"):
            parsed(server.stderr())
