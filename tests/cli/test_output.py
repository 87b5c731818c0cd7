"""What every verb prints with: tables keep their cells, and where nothing can be printed the status is still true."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from nbdimg.cli import output
from tests.support.rawclient import connect_negotiated
from tests.support.rss import wait_until

COLUMNS = ("NAME", "SIZE", "FORMAT", "MODE")
ROW = ("vm1", "1048576", "qcow2", "rw")

pytestmark = pytest.mark.usefixtures("directory")


def environment(*, is_unbuffered: bool) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUNBUFFERED": "1" * is_unbuffered}


def nbdimg(*arguments: str, is_unbuffered: bool = False, **streams: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nbdimg", *arguments]
    return subprocess.run(command, env=environment(is_unbuffered=is_unbuffered), text=True, timeout=60, **streams)


def test_output_that_finds_no_space_is_one_line() -> None:
    Path("a.raw").write_bytes(bytes(512))
    with open("/dev/full", "w") as full:
        ended = nbdimg("info", "a.raw", stdout=full, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (1, "nbdimg: <stdout>: No space left on device\n")


@pytest.mark.parametrize("is_unbuffered", [False, True])
@pytest.mark.parametrize("verb", ["healthcheck", "info"])
def test_help_that_finds_no_space_is_one_line(verb: str, is_unbuffered: bool) -> None:
    with open("/dev/full", "w") as full:
        ended = nbdimg(verb, "--help", is_unbuffered=is_unbuffered, stdout=full, stderr=subprocess.PIPE)
    (line,) = ended.stderr.splitlines()
    assert (ended.returncode, line[-23:]) == (1, "No space left on device")


def test_output_that_nobody_reads_is_no_complaint() -> None:
    Path("a.raw").write_bytes(bytes(512))
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = nbdimg("info", "a.raw", stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.parametrize("is_unbuffered", [False, True])
@pytest.mark.parametrize("reason", ["No space left on device", "Broken pipe"])
def test_server_whose_uris_cannot_be_printed_serves_all_the_same(reason: str, is_unbuffered: bool) -> None:
    Path("a.raw").write_bytes(bytes(512))
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full, open("log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "nbdimg", "serve", "--listen=nbd+unix:///?socket=s", "a.raw"],
            env=environment(is_unbuffered=is_unbuffered),
            stdout=full if "space" in reason else writer,
            stderr=log,
        )
    os.close(writer)
    try:
        assert wait_until(lambda: "were not printed" in Path("log").read_text(), 30)
        with connect_negotiated("s", "a") as client:
            assert client.read(0, 512).data == bytes(512)
    finally:
        server.terminate()
    assert server.wait(60) == 0
    assert f"the URIs of exports were not printed: {reason}" in Path("log").read_text()


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("info", "absent"), 3),
        (("check", "a.raw"), 63),
        (("config", "check", "absent"), 2),
        (("healthcheck", "ill"), 2),
        (("healthcheck", "--socket=absent"), 1),
    ],
)
def test_complaint_that_finds_no_space_leaves_the_status(arguments: tuple[str, ...], status: int) -> None:
    Path("a.raw").write_bytes(bytes(512))
    with open("/dev/full", "w") as full:
        assert nbdimg(*arguments, stdout=subprocess.DEVNULL, stderr=full).returncode == status


STEERING = "\x1b[2J\u202ered"


@pytest.mark.parametrize(
    "arguments",
    [
        ("info", STEERING),
        ("check", STEERING),
        ("serve", "--config", STEERING),
        ("config", "check", STEERING),
        ("ctl", "status", f"--socket={STEERING}"),
    ],
)
def test_complaint_about_a_name_that_would_steer_the_terminal_escapes_it(arguments: tuple[str, ...]) -> None:
    ended = nbdimg(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert r"\x1b[2J\u202ered" in ended.stderr
    assert [line for line in ended.stderr.splitlines() if not line.isprintable()] == []


@pytest.mark.parametrize("width", ["0", "1", "20", "80"])
def test_table_on_a_terminal_of_any_width_keeps_every_cell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: str
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output.print_table(COLUMNS, [ROW], right=["SIZE"])
    printed = capsys.readouterr().out
    assert [cell for cell in (*COLUMNS, *ROW) if cell not in printed] == []


def test_bar_that_is_interrupted_while_it_starts_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the cursor stays hidden, and what is printed afterwards is kept by the bar."""
    stopped: list[Progress] = []

    def start(bar: Progress) -> None:
        raise SystemExit

    monkeypatch.setattr(Progress, "start", start)
    monkeypatch.setattr(Progress, "stop", lambda bar: stopped.append(bar))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    def work() -> None:
        with output.progress(quiet_s=0.0) as report:
            assert report is not None
            report(0, 1)

    with pytest.raises(SystemExit):
        work()
    assert len(stopped) == 1


def test_bar_is_not_shown_for_what_takes_no_longer_than_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    shown: list[str] = []
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(output, "_made", lambda unit: (lambda done, total: None, lambda: shown.append(unit), bool))
    for quiet_s, expected in ((60.0, []), (0.0, ["tables"])):
        with output.progress("tables", quiet_s=quiet_s) as report:
            assert report is not None
            report(1, 2)
        assert shown == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1023, "1023 bytes"),
        (1024, "1 KiB (1024 bytes)"),
        (1023 << 10, "1023 KiB (1047552 bytes)"),
        (3 << 29, "1.5 GiB (1610612736 bytes)"),
        (1 << 62, "4 EiB (4611686018427387904 bytes)"),
        (1 << 63, "8 EiB (9223372036854775808 bytes)"),
    ],
)
def test_size_is_shown_in_its_unit_and_in_bytes(size: int, expected: str) -> None:
    assert output.sized(size) == expected
