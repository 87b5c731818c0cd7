"""`nbdimg check`: the exit statuses of `qemu-img check`, repairs, what is printed, progress."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nbdimg.cli import check as verb
from nbdimg.cli import output
from nbdimg.cli.main import run
from nbdimg.formats.findings import CheckReport
from tests.support.peers import require_program
from tests.support.qcow2edit import Edit, qemu_check, qemu_img, qemu_io

CLEAN, INCOMPLETE, CORRUPT, LEAKS, UNSUPPORTED = 0, 1, 2, 3, 63
USAGE = 2


@pytest.fixture(autouse=True)
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Edit:
    monkeypatch.chdir(tmp_path)
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "a.qcow2", "4M")
    qemu_io("a.qcow2", "write -q -P 1 0 64k")
    return Edit(Path("a.qcow2"))


def leak(edit: Edit) -> None:
    edit.put(edit.entry(3), 0)


def corrupt(edit: Edit) -> None:
    edit.put(edit.refcount(edit.get(edit.entry(3)) & 0xFFFF_FFFF), 0, 2)


def checked(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = run(["check", *arguments])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(
    ("damages", "expected"), [((), CLEAN), ((leak,), LEAKS), ((corrupt,), CORRUPT), ((leak, corrupt), CORRUPT)]
)
def test_check_exit_status_is_that_of_qemu(
    capfd: pytest.CaptureFixture[str], image: Edit, damages: tuple[Any, ...], expected: int
) -> None:
    if damages == (leak, corrupt):
        corrupt(image)
        image.put(image.entry(5), 0)
    else:
        for damage in damages:
            damage(image)
    before = image.path.read_bytes()
    status, out, err = checked(capfd, "a.qcow2")
    assert (status, err) == (expected, "")
    assert status == qemu_check(image.path).exit_status
    last = out.splitlines()[-2]
    assert last.startswith("a.qcow2: ")
    assert ("no errors found" in last) == (expected == CLEAN)
    assert image.path.read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "repair", "expected", "said"),
    [
        (leak, "leaks", CLEAN, "1 leak repaired"),
        (leak, "all", CLEAN, "1 leak repaired"),
        (corrupt, "leaks", CORRUPT, "2 corruptions"),
        (corrupt, "all", CLEAN, "2 corruptions repaired"),
    ],
)
def test_check_repairs_what_it_is_asked_to(
    capfd: pytest.CaptureFixture[str], image: Edit, damage: Any, repair: str, expected: int, said: str
) -> None:
    damage(image)
    status, out, _ = checked(capfd, "a.qcow2", "--repair", repair)
    assert status == expected
    assert said in out
    assert qemu_check(image.path).exit_status == expected


def test_check_json_is_this(capfd: pytest.CaptureFixture[str], image: Edit) -> None:
    leak(image)
    cluster = qemu_check(image.path)
    status, out, _ = checked(capfd, "a.qcow2", "--json")
    assert status == LEAKS
    found = json.loads(out)
    (finding,) = found.pop("findings")
    assert (finding["kind"], sorted(finding)) == ("leak", ["kind", "message", "offset", "structure"])
    assert found == {
        "version": 1,
        "path": "a.qcow2",
        "format": "qcow2",
        "exit_status": 3,
        "leaks": 1,
        "corruptions": 0,
        "check_errors": 0,
        "leaks_fixed": 0,
        "corruptions_fixed": 0,
        "allocated_clusters": 15,
        "total_clusters": 1024,
        "compressed_clusters": 0,
        "fragmented_clusters": cluster.fragmented_clusters,
        "image_end_offset": cluster.image_end_offset,
        "findings_omitted": 0,
    }


def test_check_of_raw_says_that_there_is_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    Path("a.img").write_bytes(bytes(512))
    assert checked(capfd, "a.img") == (
        UNSUPPORTED,
        "",
        "nbdimg: a.img: a raw image has no metadata, so there is nothing to check\n",
    )
    status, out, _ = checked(capfd, "a.img", "--json")
    assert status == UNSUPPORTED
    assert json.loads(out) == {"version": 1, "path": "a.img", "format": "raw", "exit_status": UNSUPPORTED}


@pytest.mark.parametrize(
    ("arguments", "status", "pattern"),
    [
        (["absent"], INCOMPLETE, "absent: No such file or directory"),
        (["hostile"], INCOMPLETE, "hostile: cluster_bits is 25, expected 9 to 21 .*"),
        (["a.qcow2", "--repair", "some"], USAGE, "--repair is 'some', expected leaks or all"),
        (["a.qcow2", "--format", "vmdk"], USAGE, "unknown format 'vmdk', .*"),
    ],
)
def test_check_what_cannot_be_is_refused_in_one_line(
    capfd: pytest.CaptureFixture[str], arguments: list[str], status: int, pattern: str
) -> None:
    content = bytearray(Path("a.qcow2").read_bytes())
    content[23] = 25
    Path("hostile").write_bytes(content)
    found, out, err = checked(capfd, *arguments)
    assert (found, out) == (status, "")
    (line,) = err.splitlines()
    assert re.fullmatch(f"nbdimg: {pattern}", line), line


@pytest.mark.parametrize(
    ("mode", "arguments", "expected"),
    [
        ("-r", [], CLEAN),
        ("-n", [], INCOMPLETE),
        ("-r", ["--repair", "leaks"], INCOMPLETE),
        ("-n", ["--repair", "all"], INCOMPLETE),
    ],
)
def test_check_image_that_qemu_has_open(
    capfd: pytest.CaptureFixture[str], image: Edit, mode: str, arguments: list[str], expected: int
) -> None:
    command = [require_program("qemu-io"), "-f", "qcow2", mode, "a.qcow2"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.read(8) == b"qemu-io>"
        before = image.path.read_bytes()
        status, _, err = checked(capfd, "a.qcow2", *arguments)
        assert status == expected
        assert ("cannot be locked" in err) == (expected != CLEAN)
        assert image.path.read_bytes() == before
        holder.stdin.write(b"quit\n")
        holder.stdin.flush()
        assert holder.wait(20) == 0


def test_check_finding_with_control_characters_is_printed_without(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = CheckReport()
    report.add("corruption", "snapshot table", None, "name is \x1b[31mred")
    verb._print("a\nb", report)
    out = capfd.readouterr().out
    assert "\x1b" not in out
    assert r"a\nb: 1 corruption" in out


# Progress


def test_progress_is_nothing_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with output.progress() as report:
        assert report is None


def test_progress_on_a_terminal_begins_after_a_second_and_shows_rate_and_time() -> None:
    """In a process of its own, so that its clock can be set."""
    script = (
        "import time, sys; from nbdimg.cli import output\n"
        "now = [0.0]; time.monotonic = lambda: now[0]\n"
        "with output.progress('tables') as report:\n"
        "    report(1, 100); early = 'rich' in sys.modules; now[0] = 1.5\n"
        "    report(50, 100); late = 'rich' in sys.modules\n"
        "print(early, late)\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True) as running:
        os.close(theirs)
        assert running.stdout is not None
        said = running.stdout.read()
        assert running.wait(20) == 0
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert said == "False True\n"
    assert " 50/100" in shown
