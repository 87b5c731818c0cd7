"""`nbdimg info`: says what `qemu-img info` says, opens and locks nothing, and survives hostile images."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdimg.cli.main import run
from tests.cli.conftest import Command
from tests.support.peers import require_program
from tests.support.qcow2edit import Edit, qemu_img
from tests.support.qcow2images import KINDS

IMAGE = 3

pytestmark = pytest.mark.usefixtures("directory")


@pytest.fixture
def told(command: Command) -> Any:
    """Runs `nbdimg info --json` and gives the images."""

    def info(*arguments: str) -> list[dict[str, Any]]:
        found = json.loads(command.said("info", "--json", *arguments))
        assert sorted(found) == ["images", "version"]
        assert found["version"] == 1
        images: list[dict[str, Any]] = found["images"]
        return images

    return info


def qemu_info(path: str, *options: str) -> Any:
    return json.loads(qemu_img("info", "--output=json", *options, path).stdout)


def assert_agrees(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    data = theirs.get("format-specific", {}).get("data", {})
    assert ours["format"] == theirs["format"]
    assert ours["size"] == theirs["virtual-size"]
    assert ours["size_on_disk"] == theirs["actual-size"]
    if ours["format"] == "raw":
        return
    assert ours["compat"] == {"0.10": 2, "1.1": 3}[data["compat"]]
    assert ours["cluster_size"] == theirs["cluster-size"]
    assert ours["refcount_bits"] == data["refcount-bits"]
    assert ours["extended_l2"] == data.get("extended-l2", False)
    assert ours["compression_type"] == data["compression-type"]
    assert ours["lazy_refcounts"] == data.get("lazy-refcounts", False)
    assert ours["dirty"] == theirs["dirty-flag"]
    assert ours["corrupt"] == data.get("corrupt", False)
    assert ours["backing"] == theirs.get("backing-filename")
    assert ours["backing_format"] == theirs.get("backing-filename-format")
    assert ours["data_file"] == data.get("data-file")
    assert ours["data_file_raw"] == data.get("data-file-raw", False)
    assert [(each["id"], each["name"], each["seconds"], each["nanoseconds"]) for each in ours["snapshots"]] == [
        (each["id"], each["name"], each["date-sec"], each["date-nsec"]) for each in theirs.get("snapshots", [])
    ]
    assert [
        (each["name"], each["granularity"], each["enabled"], not each["consistent"]) for each in ours["bitmaps"]
    ] == [
        (each["name"], each["granularity"], "auto" in each["flags"], "in-use" in each["flags"])
        for each in data.get("bitmaps", [])
    ]
    assert_same_encryption(ours["encryption"], data.get("encrypt"))


def assert_same_encryption(ours: dict[str, Any] | None, theirs: dict[str, Any] | None) -> None:
    if ours is None or theirs is None:
        assert ours is theirs is None
        return
    assert ours["format"] == theirs["format"]
    assert ours["uuid"] == theirs["uuid"]
    assert ours["hash"] == theirs["hash-alg"]
    assert f"{ours['cipher']}-{ours['key_bits'] // 2}" == (
        f"{theirs['cipher-alg'].partition('-')[0]}-{theirs['cipher-mode']}-{theirs['ivgen-alg']}-"
        f"{theirs['cipher-alg'].partition('-')[2]}"
    )
    assert [(each["active"], each["iterations"]) for each in ours["slots"]] == [
        (each["active"], each.get("iters")) for each in theirs["slots"]
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_info_agrees_with_qemu(told: Any, kind: str) -> None:
    path = Path("a.qcow2").resolve()
    KINDS[kind](path)
    (ours,) = told("a.qcow2")
    assert_agrees(ours, qemu_info("a.qcow2"))


def test_info_tells_the_size_that_a_snapshot_has_and_not_what_the_image_has_now(told: Any) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "a.qcow2", "1M")
    qemu_img("snapshot", "-c", "before", "a.qcow2")
    qemu_img("resize", "-q", "a.qcow2", "2M")
    (found,) = told("a.qcow2")
    assert (found["size"], [each["size"] for each in found["snapshots"]]) == (2 << 20, [1 << 20])


def test_info_of_a_name_that_the_locale_cannot_print_escapes_it(directory: Path) -> None:
    Path("é.img").write_bytes(bytes(512))
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(__file__).parents[2])}
    argv = [sys.executable, "-m", "nbdimg", "info", "é.img"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("image:         \\xe9.img\n")


def test_info_of_raw_agrees_with_qemu(told: Any) -> None:
    Path("a.img").write_bytes(b"x" * 8192)
    (ours,) = told("a.img")
    assert_agrees(ours, qemu_info("a.img", "-f", "raw"))
    assert sorted(ours) == ["file_size", "format", "path", "size", "size_on_disk"]


def overlays() -> None:
    Path("sub").mkdir()
    qemu_img("create", "-q", "-f", "raw", "base", "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "../base", "-F", "raw", "sub/mid")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "sub/mid", "-F", "qcow2", "top", "2M")


def test_info_of_a_chain_agrees_with_qemu(told: Any) -> None:
    overlays()
    ours = told("--backing-chain", "top")
    theirs = qemu_info("top", "--backing-chain")
    assert len(ours) == len(theirs) == 3
    for one, other in zip(ours, theirs, strict=True):
        assert_agrees(one, other)


def test_info_json_is_this(told: Any) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "a.qcow2", "1M")
    status = os.stat("a.qcow2")
    assert told("a.qcow2") == [
        {
            "path": "a.qcow2",
            "format": "qcow2",
            "size": 1048576,
            "size_on_disk": status.st_blocks * 512,
            "file_size": status.st_size,
            "compat": 3,
            "cluster_size": 65536,
            "refcount_bits": 16,
            "extended_l2": False,
            "compression_type": "zlib",
            "lazy_refcounts": False,
            "dirty": False,
            "corrupt": False,
            "backing": None,
            "backing_format": None,
            "data_file": None,
            "data_file_raw": False,
            "encryption": None,
            "unknown_features": [],
            "snapshots": [],
            "bitmaps": [],
            "stale_bitmaps": False,
        }
    ]


def test_info_for_people_is_lines(capfd: pytest.CaptureFixture[str]) -> None:
    overlays()
    assert run(["info", "top"]) == 0
    out = capfd.readouterr().out
    assert "virtual size:  2 MiB (2097152 bytes)\n" in out
    assert "backing file:  sub/mid (format: qcow2)\n" in out


@pytest.mark.parametrize("kind", ["version 2", "extended", "lazy", "zstd", "snapshots", "bitmaps", "data file", "luks"])
def test_info_for_people_prints_every_kind(capfd: pytest.CaptureFixture[str], kind: str) -> None:
    KINDS[kind](Path("a.qcow2").resolve())
    assert run(["info", "a.qcow2"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert all(re.fullmatch(r"[a-zA-Z2 ]+: +\S.*", line) for line in out.splitlines()), out


def test_info_opens_no_reference(told: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """The backing file is a FIFO that would not even open, and there is no data file."""
    os.mkfifo("fifo")
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "fifo", "-F", "raw", "a.qcow2", "1M")
    assert told("a.qcow2")[0]["backing"] == "fifo"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "data_file=gone", "b.qcow2", "1M")
    os.unlink("gone")
    assert told("b.qcow2")[0]["data_file"] == "gone"
    assert run(["info", "--backing-chain", "a.qcow2"]) == IMAGE
    assert "allowed is a regular file beneath" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "format", "pattern"),
    [
        ("/etc/passwd", "raw", "a.qcow2: backing file '/etc/passwd' leads outside, .*"),
        ("json:{}", "raw", r"a.qcow2: backing file 'json:\{\}' has the protocol 'json' .*"),
        ("a.qcow2", "qcow2", "a.qcow2: backing file 'a.qcow2' is a file that this chain holds already, .*"),
        ("base", "vmdk", "a.qcow2: the format of backing file 'base' is 'vmdk', known are raw, qcow2.*"),
    ],
)
def test_info_of_a_chain_that_leads_elsewhere_is_refused(
    capfd: pytest.CaptureFixture[str], name: str, format: str, pattern: str
) -> None:
    Path("base").write_bytes(bytes(512))
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "a.qcow2", "1M")
    qemu_img("rebase", "-q", "-u", "-b", name, "-F", format, "a.qcow2")
    assert run(["info", "--backing-chain", "a.qcow2"]) == IMAGE
    (line,) = capfd.readouterr().err.splitlines()
    assert re.fullmatch(f"nbdimg: {pattern}", line), line


def test_info_of_an_image_that_somebody_writes_to_works(told: Any) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "a.qcow2", "1M")
    command = [require_program("qemu-io"), "-f", "qcow2", "a.qcow2"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.read(8) == b"qemu-io>"
        before = Path("a.qcow2").read_bytes()
        assert told("a.qcow2")[0]["size"] == 1 << 20
        assert Path("a.qcow2").read_bytes() == before
        qemu_img("info", "a.qcow2", ok=(1,))  # the control: QEMU's own is refused
        holder.stdin.write(b"quit\n")
        holder.stdin.flush()
        assert holder.wait(20) == 0


def test_info_names_features_that_are_unknown(told: Any) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "a.qcow2", "1M")
    edit = Edit(Path("a.qcow2"))
    table = edit.extension(0x6803F857)
    edit.write(table, b"\1\7" + b"warp drive".ljust(46, b"\0"))
    edit.put(80, 1 << 7 | 1)
    edit.put(88, 1 << 40)
    (found,) = told("a.qcow2")
    assert found["unknown_features"] == ["compatible bit 7 ('warp drive')", "autoclear bit 40"]
    assert found["lazy_refcounts"]


def test_info_says_that_bitmaps_are_stale(told: Any) -> None:
    KINDS["bitmaps"](Path("a.qcow2").resolve())
    Edit(Path("a.qcow2")).put(88, 0)
    (found,) = told("a.qcow2")
    assert (found["bitmaps"], found["stale_bitmaps"]) == ([], True)


def _snapshot(edit: Edit) -> None:
    edit.put(edit.snapshots + 36, 1 << 20, 4)


def _luks(edit: Edit) -> None:
    edit.put(edit.extension(0x0537BE77) + 8, 1 << 40)


def _bitmap(edit: Edit) -> None:
    edit.put(edit.extension(0x23852875), 1 << 20, 4)


@pytest.mark.parametrize(
    ("kind", "damage", "pattern"),
    [
        ("version 3", lambda edit: edit.put(20, 25, 4), "cluster_bits is 25, expected 9 to 21 .*"),
        ("version 3", lambda edit: edit.put(72, 1 << 50), "incompatible features are not known here: bit 50 .*"),
        ("version 3", lambda edit: edit.put(4, 9, 4), "version is 9, expected 2 or 3 .*"),
        ("version 3", lambda edit: os.truncate(edit.path, 60), "the file has 60 bytes, a qcow2 header takes 72"),
        ("snapshots", _snapshot, "snapshot 0: extra_data_size is 1048576, expected at most 1024 .*"),
        ("snapshots", lambda edit: edit.put(60, 60000, 4), "snapshot .*"),
        ("bitmaps", _bitmap, "nb_bitmaps is 1048576, expected 1 to 65535 .*"),
        ("luks", _luks, "LUKS header length is .*"),
    ],
)
def test_info_of_a_hostile_image_is_one_sentence(
    capfd: pytest.CaptureFixture[str], kind: str, damage: Callable[[Edit], None], pattern: str
) -> None:
    KINDS[kind](Path("a.qcow2").resolve())
    damage(Edit(Path("a.qcow2")))
    assert run(["info", "a.qcow2"]) == IMAGE
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert re.fullmatch(f"nbdimg: a.qcow2: {pattern}", line), line


def test_info_prints_no_control_characters(capfd: pytest.CaptureFixture[str]) -> None:
    KINDS["snapshots"](Path("a.qcow2").resolve())
    edit = Edit(Path("a.qcow2"))
    content = edit.path.read_bytes()
    edit.write(content.index(b"three"), b"\x1b[2Jx")
    assert run(["info", "a.qcow2"]) == 0
    out = capfd.readouterr().out
    assert "\x1b" not in out
    assert r"\x1b[2Jx" in out


@pytest.mark.parametrize("verbs", [(), ("info",), ("serve",), ("ctl",), ("ctl", "snapshot", "create")])
def test_help_shows_no_type_for_a_switch(command: Command, verbs: tuple[str, ...]) -> None:
    assert "bool" not in command.said(*verbs, "--help").lower()


@pytest.mark.parametrize("verb", ["serve", "connect-help"])
def test_help_shows_defaults_in_one_way(command: Command, verb: str) -> None:
    said = command.said(verb, "--help")
    assert "(default: " in said
    assert "[default: (" not in said
