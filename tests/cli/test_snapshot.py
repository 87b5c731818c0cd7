"""`nbdimg snapshot`: what is printed, exit statuses, locks, and what it leaves for QEMU."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from nbdimg.cli import snapshot as snapshot_module
from nbdimg.cli.main import run
from nbdimg.cli.output import JSON_VERSION
from nbdimg.storage.locks import lock_image
from tests.cli.conftest import Command
from tests.support.qcow2edit import make_luks, qemu_check, qemu_img, qemu_io

USAGE, IMAGE = 2, 3
SIZE = 1 << 20

Say = Callable[..., str]


@pytest.fixture(autouse=True)
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`disk.qcow2` in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, str(SIZE))
    qemu_io(path, "write -q -P 1 0 100k")
    return path


@pytest.fixture
def said(command: Command) -> Say:
    return partial(command.said, "snapshot")


def refused(capfd: pytest.CaptureFixture[str], status: int, pattern: str, *arguments: str) -> None:
    """It ends with this status and one line, and changes no byte."""
    before = Path("disk.qcow2").read_bytes()
    assert run(["snapshot", *arguments]) == status
    captured = capfd.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert re.fullmatch(f"nbdimg: {pattern}", line), line
    assert Path("disk.qcow2").read_bytes() == before


def test_snapshot_created_applied_and_deleted_is_what_qemu_finds(image: Path, said: Say) -> None:
    assert said("create", "disk.qcow2", "before") == "disk.qcow2: made snapshot 1 (before)\n"
    assert " before " in qemu_img("snapshot", "-l", image).stdout
    qemu_io(image, "write -q -P 2 0 200k")
    assert said("apply", "disk.qcow2", "before") == "disk.qcow2: applied snapshot 1 (before)\n"
    qemu_io(image, "read -q -P 1 0 100k", "read -q -P 0 100k 100k")
    assert said("delete", "disk.qcow2", "1") == "disk.qcow2: deleted snapshot 1 (before)\n"
    assert qemu_img("snapshot", "-l", image).stdout == ""
    found = qemu_check(image)
    assert (found.exit_status, found.leaks) == (0, 0)


def test_list_prints_plain_columns_where_there_is_no_terminal(said: Say) -> None:
    assert said("list", "disk.qcow2") == ""
    qemu_img("snapshot", "-c", "a name", "disk.qcow2")
    qemu_img("snapshot", "-c", "bell\a", "disk.qcow2")
    header, first, second = said("list", "disk.qcow2").splitlines()
    assert header.split() == ["ID", "NAME", "SIZE", "VM", "STATE", "DATE"]
    assert re.fullmatch(r"1   a name   +1048576  0 +\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first)
    assert second.startswith(r"2   bell\x07  1048576")


def test_list_as_json_says_what_qemu_says(said: Say) -> None:
    qemu_img("snapshot", "-c", "first", "disk.qcow2")
    said("create", "disk.qcow2", "second")
    listed = json.loads(said("list", "disk.qcow2", "--json"))
    assert (listed["version"], listed["path"]) == (JSON_VERSION, "disk.qcow2")
    theirs = json.loads(qemu_img("info", "--output=json", "disk.qcow2").stdout)["snapshots"]
    assert [(each["id"], each["name"]) for each in listed["snapshots"]] == [
        (each["id"], each["name"]) for each in theirs
    ]
    assert {each["size"] for each in listed["snapshots"]} == {SIZE}
    assert [each["vm_state_size"] for each in listed["snapshots"]] == [0, 0]
    assert listed["snapshots"][1]["icount"] is None


@pytest.mark.parametrize("verb", ["create", "apply", "delete"])
def test_change_as_json_describes_the_snapshot(said: Say, verb: str) -> None:
    if verb != "create":
        said("create", "disk.qcow2", "one")
    report = json.loads(said(verb, "disk.qcow2", "one", "--json"))
    assert report["version"] == JSON_VERSION
    assert (report["snapshot"]["id"], report["snapshot"]["name"]) == ("1", "one")


def test_list_opens_no_other_file_and_changes_nothing(image: Path, said: Say) -> None:
    options = "backing_file=disk.qcow2,backing_fmt=qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, "top.qcow2", str(SIZE))
    qemu_img("snapshot", "-c", "one", "top.qcow2")
    image.unlink()
    os.chmod("top.qcow2", 0o400)
    before = Path("top.qcow2").read_bytes()
    assert " one " in said("list", "top.qcow2")
    assert Path("top.qcow2").read_bytes() == before


def test_changes_open_no_backing_file(image: Path, said: Say) -> None:
    options = "backing_file=disk.qcow2,backing_fmt=qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, "top.qcow2", str(SIZE))
    image.rename("elsewhere")
    said("create", "top.qcow2", "one")
    said("apply", "top.qcow2", "one")
    said("delete", "top.qcow2", "one")
    Path("elsewhere").rename(image)
    assert qemu_check(Path("top.qcow2")).exit_status == 0


def test_encrypted_image_needs_no_key(said: Say) -> None:
    *options, image = make_luks("secret.qcow2", SIZE, "write -q -P 1 0 100k")
    said("create", "secret.qcow2", "one")
    qemu_io(image, "write -q -P 2 50k 100k", options=options)
    said("create", "secret.qcow2", "two")
    assert " two " in said("list", "secret.qcow2")
    said("apply", "secret.qcow2", "one")
    qemu_io(image, "read -q -P 1 0 100k", "read -q -P 0 100k 900k", options=options)
    said("apply", "secret.qcow2", "two")
    said("delete", "secret.qcow2", "one")
    qemu_io(image, "read -q -P 1 0 50k", "read -q -P 2 50k 100k", "write -q -P 3 0 1M", options=options)
    assert qemu_check(Path("secret.qcow2")).exit_status == 0


@pytest.mark.parametrize("verb", ["apply", "delete"])
def test_snapshot_that_is_not_there_is_refused(capfd: pytest.CaptureFixture[str], verb: str) -> None:
    refused(capfd, USAGE, r"disk.qcow2: there is no snapshot 'none', known are none", verb, "disk.qcow2", "none")


def test_name_that_is_taken_is_refused(said: Say, capfd: pytest.CaptureFixture[str]) -> None:
    said("create", "disk.qcow2", "one")
    pattern = r"disk.qcow2: the name 'one' is taken by snapshot '1' \('one'\), expected a new one"
    refused(capfd, USAGE, pattern, "create", "disk.qcow2", "one")


def test_file_of_another_format_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    Path("plain").write_bytes(bytes(4096))
    for verb in (["list", "plain"], ["create", "plain", "one"]):
        refused(capfd, IMAGE, "plain: raw images have no snapshots, qcow2 images do", *verb)


def test_image_with_a_data_file_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", "data_file=data", "outside.qcow2", "1M")
    pattern = r"outside.qcow2: an image with an external data file cannot have internal snapshots"
    refused(capfd, IMAGE, pattern, "create", "outside.qcow2", "one")


def test_image_that_another_program_has_open_is_refused(image: Path, capfd: pytest.CaptureFixture[str]) -> None:
    descriptor = os.open(image, os.O_RDWR)
    try:
        lock_image(descriptor, str(image), writable=True)
        for arguments in (["list", "disk.qcow2"], ["create", "disk.qcow2", "one"]):
            refused(capfd, IMAGE, r"disk.qcow2: cannot be locked for \w+: another process .*", *arguments)
    finally:
        os.close(descriptor)


def test_missing_image_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    refused(capfd, 3, "none.qcow2: No such file or directory", "list", "none.qcow2")


def on_terminal(*arguments: str, quiet_s: float = 1.0) -> str:
    """What `nbdimg snapshot` prints on a terminal of 100 columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm"}
    code = (
        "import sys, nbdimg.cli.snapshot as s; from nbdimg.cli.main import run; "
        f"s.QUIET_S = {quiet_s}; sys.exit(run(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "snapshot", *arguments]
    process = subprocess.Popen(command, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    output = b""
    try:
        while piece := os.read(leader, 65536):
            output += piece
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(leader)
    assert process.wait(timeout=20) == 0
    return output.decode()


def test_list_on_a_terminal_is_a_table(said: Say) -> None:
    assert "no snapshots" in on_terminal("list", "disk.qcow2")
    said("create", "disk.qcow2", "[bold]")
    assert "[bold]" in on_terminal("list", "disk.qcow2")


def test_change_on_a_terminal_shows_progress_once_it_takes_long() -> None:
    assert "tables/s" in on_terminal("create", "disk.qcow2", "slow", quiet_s=0)
    assert "tables/s" not in on_terminal("create", "disk.qcow2", "quick", quiet_s=60)


def test_change_elsewhere_shows_no_progress(said: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_module, "QUIET_S", 0.0)
    assert said("create", "disk.qcow2", "one") == "disk.qcow2: made snapshot 1 (one)\n"


def test_rich_is_not_imported_where_there_is_no_terminal() -> None:
    code = (
        "import sys; from nbdimg.cli.main import run; run(['snapshot', 'list', 'disk.qcow2']); "
        "sys.exit('rich.table' in sys.modules or 'rich.progress' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=20).returncode == 0
