"""`nbdimg bitmap`: what QEMU says of the image afterwards, what is printed, exit statuses, and who is kept out."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nbdimg.cli.main import run
from nbdimg.cli.output import JSON_VERSION
from tests.cli.conftest import Command
from tests.support.peers import require_program
from tests.support.qcow2edit import qemu_img, qemu_io
from tests.support.server import NbdimgServer, PeerServer

USAGE, IMAGE = 2, 3


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    qemu_img("create", "-q", "-f", "qcow2", "disk.qcow2", "64M")
    return tmp_path


@pytest.fixture
def said(command: Command) -> Any:
    return partial(command.said, "bitmap")


@pytest.fixture
def refused(command: Command) -> Any:
    return partial(command.refused, "bitmap")


def by_qemu(path: str = "disk.qcow2") -> dict[str, tuple[int, list[str]]]:
    """By name what QEMU says of each bitmap; the image is sound."""
    qemu_img("check", path)
    found = json.loads(qemu_img("info", "--output=json", path).stdout)["format-specific"]["data"]
    return {each["name"]: (each["granularity"], each["flags"]) for each in found.get("bitmaps", [])}


# What QEMU says afterwards


def test_add_and_remove_of_several_bitmaps_are_seen_by_qemu(said: Any) -> None:
    said("add", "disk.qcow2", "b0")
    assert by_qemu() == {"b0": (65536, ["auto"])}
    said("add", "disk.qcow2", "fine", "--granularity", "4K", "--disabled")
    said("add", "disk.qcow2", "Größe", "-g", "1M")
    assert by_qemu() == {"b0": (65536, ["auto"]), "fine": (4096, []), "Größe": (1 << 20, ["auto"])}
    said("remove", "disk.qcow2", "b0")
    assert by_qemu() == {"fine": (4096, []), "Größe": (1 << 20, ["auto"])}
    said("remove", "disk.qcow2", "fine")
    said("remove", "disk.qcow2", "Größe")
    assert by_qemu() == {}


@pytest.mark.parametrize(("cluster_size", "granularity"), [(512, 4096), (16384, 16384), (2 << 20, 65536)])
def test_add_default_granularity_is_qemus(said: Any, cluster_size: int, granularity: int) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_size}", "other.qcow2", "64M")
    said("add", "other.qcow2", "ours")
    qemu_img("bitmap", "--add", "other.qcow2", "theirs")
    found = by_qemu("other.qcow2")
    assert found["ours"] == found["theirs"] == (granularity, ["auto"])


def test_disable_and_enable_are_seen_by_qemu(said: Any) -> None:
    qemu_img("bitmap", "--add", "disk.qcow2", "b0")
    said("disable", "disk.qcow2", "b0")
    assert by_qemu() == {"b0": (65536, [])}
    said("enable", "disk.qcow2", "b0")
    assert by_qemu() == {"b0": (65536, ["auto"])}


def dirty(name: str) -> list[int]:
    """The offsets at which QEMU's export of a bitmap says that something dirty begins."""
    program = require_program("qemu-nbd")
    with PeerServer(lambda path: [program, "-r", "-t", "-f", "qcow2", "-k", path, "-B", name, "disk.qcow2"]) as server:
        where = f"driver=nbd,server.type=unix,server.path={server.socket_path}"
        options = f"{where},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
        answer = qemu_img("map", "--output=json", "--image-opts", options).stdout
    return [each["start"] for each in json.loads(answer) if not each["data"]]


def test_clear_and_merge_change_the_bits_that_qemu_reads(said: Any) -> None:
    for name, offset in (("b0", "1M"), ("b1", "3M")):
        qemu_img("bitmap", "--add", "disk.qcow2", name)
        qemu_io("disk.qcow2", f"write -q {offset} 64k")
        qemu_img("bitmap", "--disable", "disk.qcow2", name)
    said("add", "disk.qcow2", "coarse", "-g", "2M")
    said("merge", "disk.qcow2", "coarse", "b0", "b1")
    assert dirty("b0") == [1 << 20]
    assert dirty("b1") == [3 << 20]
    assert dirty("coarse") == [0]  # 1M and 3M lie in the first two granules
    said("merge", "disk.qcow2", "b1", "b0")
    assert dirty("b1") == [1 << 20, 3 << 20]
    said("clear", "disk.qcow2", "b1")
    assert dirty("b1") == []
    assert set(by_qemu()) == {"b0", "b1", "coarse"}


def test_inconsistent_bitmap_is_listed_and_can_only_be_removed(said: Any, refused: Any) -> None:
    said("add", "disk.qcow2", "b0")
    with NbdimgServer("disk.qcow2") as server:
        done = subprocess.run([require_program("qemu-io"), "-f", "raw", "-c", "write -q 0 64k", server.uri], timeout=60)
        assert done.returncode == 0
        refused(["list", "disk.qcow2"], IMAGE, ".*another process or export has it open")
        server.kill()
    assert by_qemu()["b0"] == (65536, ["in-use", "auto"])
    assert re.search(r"^b0 +65536 +inconsistent$", said("list", "disk.qcow2"), re.MULTILINE)
    for verb in ("clear", "enable", "disable"):
        refused([verb, "disk.qcow2", "b0"], USAGE, "disk.qcow2: bitmap 'b0' is inconsistent,.* can only be removed")
    said("remove", "disk.qcow2", "b0")
    assert by_qemu() == {}


# What is printed


def test_list_is_a_plain_table_when_nobody_looks(said: Any) -> None:
    assert said("list", "disk.qcow2") == ""
    said("add", "disk.qcow2", "b0")
    said("add", "disk.qcow2", "longer name", "--disabled", "-g", "512")
    assert said("list", "disk.qcow2") == (
        "NAME         GRANULARITY  STATE\nb0           65536        enabled\nlonger name  512          disabled\n"
    )


def test_every_verb_prints_json_with_a_version(said: Any) -> None:
    one = {"name": "b0", "granularity": 65536, "enabled": True, "consistent": True}
    verbs: list[tuple[list[str], list[dict[str, Any]]]] = [
        (["add", "disk.qcow2", "b0"], [one]),
        (["list", "disk.qcow2"], [one]),
        (["clear", "disk.qcow2", "b0"], [one]),
        (["disable", "disk.qcow2", "b0"], [one | {"enabled": False}]),
        (["enable", "disk.qcow2", "b0"], [one]),
        (["merge", "disk.qcow2", "b0", "b0"], [one]),
        (["remove", "disk.qcow2", "b0"], []),
    ]
    for arguments, bitmaps in verbs:
        answer = json.loads(said(*arguments, "--json"))
        assert answer == {"version": JSON_VERSION, "path": "disk.qcow2", "bitmaps": bitmaps}


def test_change_says_what_it_did_in_one_line(said: Any) -> None:
    assert said("add", "disk.qcow2", "b0") == "disk.qcow2: added 'b0'\n"
    assert said("add", "disk.qcow2", "\x1b[31m") == "disk.qcow2: added '\\x1b[31m'\n"
    assert said("merge", "disk.qcow2", "b0", "\x1b[31m") == "disk.qcow2: merged '\\x1b[31m' into 'b0'\n"
    assert "\x1b" not in said("list", "disk.qcow2")


def test_list_on_a_terminal_escapes_names(directory: Path) -> None:
    run(["bitmap", "add", "disk.qcow2", "\x1b[31mred"])
    leader, follower = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "-m", "nbdimg", "bitmap", "list", "disk.qcow2"]
    done = subprocess.run(command, stdout=follower, env=environment, timeout=60)
    os.close(follower)
    printed = os.read(leader, 65536).decode()
    os.close(leader)
    assert done.returncode == 0
    assert "\\x1b[31mred" in printed
    assert "\x1b[31m" not in printed


def test_list_on_a_narrow_terminal_cuts_nothing_off(directory: Path) -> None:
    run(["bitmap", "add", "disk.qcow2", "a-name-of-many-letters"])
    leader, follower = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm", "COLUMNS": "24"}
    command = [sys.executable, "-m", "nbdimg", "bitmap", "list", "disk.qcow2"]
    subprocess.run(command, stdout=follower, env=environment, timeout=60, check=True)
    os.close(follower)
    printed = os.read(leader, 65536).decode()
    os.close(leader)
    assert "…" not in printed
    assert "a-name-of-many-letters" in "".join(line.split()[0] for line in printed.splitlines() if line.strip())


# Refusals


def test_refusals_are_one_line_and_change_nothing(refused: Any) -> None:
    Path("raw").write_bytes(bytes(1 << 20))
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", "old.qcow2", "1M")
    qemu_img("create", "-q", "-f", "qcow2", "empty.qcow2", "0")
    refused(["add", "missing", "b0"], IMAGE, "missing: No such file or directory")
    refused(["add", "raw", "b0"], IMAGE, "raw: raw images have no dirty bitmaps, qcow2 images do")
    refused(["add", "old.qcow2", "b0"], IMAGE, "old.qcow2: images of version 2 cannot store bitmaps, version 3 can")
    refused(["add", "empty.qcow2", "b0"], IMAGE, "empty.qcow2: a disk of size 0 has no bitmaps")
    refused(["add", "disk.qcow2", "b0", "-g", "1000"], USAGE, "granularity is 1000, expected a power of two from .*")
    refused(["add", "disk.qcow2", "b0", "-g", "x"], USAGE, "--granularity: 'x' is not a size: .*")
    refused(["add", "disk.qcow2", ""], USAGE, "bitmap name '': expected 1 to 1023 bytes .*")
    refused(["remove", "disk.qcow2", "b0"], USAGE, "disk.qcow2: there is no bitmap 'b0', known are none")
    refused(["merge", "disk.qcow2", "b0"], USAGE, "Missing argument 'SOURCE...'; see nbdimg bitmap merge --help")


def test_image_that_is_served_cannot_be_changed(refused: Any) -> None:
    with NbdimgServer("disk.qcow2", options=["--read-only"]):
        refused(["add", "disk.qcow2", "b0"], IMAGE, "disk.qcow2: cannot be locked for writing: .*")


def test_bitmaps_of_an_overlay_are_changed_without_its_backing_file(said: Any) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", "top.qcow2")
    os.rename("disk.qcow2", "away.qcow2")
    said("add", "top.qcow2", "b0")
    assert re.search(r"^b0 ", said("list", "top.qcow2"), re.MULTILINE)
    os.rename("away.qcow2", "disk.qcow2")
    assert by_qemu("top.qcow2") == {"b0": (65536, ["auto"])}
    assert json.loads(qemu_img("info", "--output=json", "top.qcow2").stdout)["backing-filename"] == "disk.qcow2"
