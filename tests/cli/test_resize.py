"""`nbdimg resize`: sizes as people write them, what is printed, refusals and exit statuses. Images: formats/qcow2."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nbdimg.formats.vhdx import resize as vhdx_resize
from nbdimg.units import KiB, MiB
from tests.cli.conftest import Command
from tests.support.peers import require_program
from tests.support.qcow2edit import make_luks, qemu_img
from tests.support.vhdximages import dynamic

USAGE, IMAGE = 2, 3

pytestmark = pytest.mark.usefixtures("directory")


@pytest.fixture
def said(command: Command) -> Any:
    return partial(command.said, "resize")


@pytest.fixture
def refused(command: Command) -> Any:
    return partial(command.refused, "resize")


def size(path: str) -> int:
    found: int = json.loads(qemu_img("info", "--output=json", path).stdout)["virtual-size"]
    return found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["3M"], 3 * MiB),
        (["+1M"], 2 * MiB),
        (["-512K", "--shrink"], 512 * KiB),
        (["--shrink", "-512K"], 512 * KiB),
        (["1000000", "--shrink"], 1000448),
        (["+1"], MiB + 512),
        (["1M"], MiB),
        (["0", "--shrink"], 0),
    ],
)
def test_resize_qcow2_gets_whole_sectors(said: Any, arguments: list[str], expected: int) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "a.qcow2", "1M")
    line = said("a.qcow2", *arguments)
    before = "as before" if expected == MiB else r"before 1 MiB \(1048576 bytes\)"
    amount = "0 bytes" if expected == 0 else rf".* \({expected} bytes\)"
    assert re.fullmatch(rf"a\.qcow2: qcow2 image of {amount}, {before}\n", line), line
    assert size("a.qcow2") == expected
    qemu_img("check", "-q", "a.qcow2")


def test_resize_over_a_backing_file_elsewhere_takes_leave(said: Any, refused: Any) -> None:
    Path("there").mkdir()
    Path("here").mkdir()
    qemu_img("create", "-q", "-f", "raw", "there/base", "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "../there/base", "-F", "raw", "here/a.qcow2")
    refused(["here/a.qcow2", "3M"], IMAGE, "here/a.qcow2: backing file .* leads outside, allowed is .*")
    said("here/a.qcow2", "3M", "--allow-references", "there")
    assert size("here/a.qcow2") == 3 * MiB


@pytest.mark.parametrize("change", [["5000"], ["+4"], ["-96", "--shrink"]])
def test_resize_raw_gets_the_very_bytes_and_keeps_what_stays(said: Any, change: list[str]) -> None:
    Path("a.img").write_bytes(b"x" * 4996)
    said("a.img", *change)
    expected = 4900 if change[0] == "-96" else 5000
    assert Path("a.img").read_bytes() == (b"x" * 4996)[:expected].ljust(expected, b"\0")


def test_resize_json_is_one_object(said: Any) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "a.qcow2", "1M")
    assert json.loads(said("a.qcow2", "2M", "--json")) == {
        "version": 1,
        "path": "a.qcow2",
        "format": "qcow2",
        "size": 2 * MiB,
        "old_size": MiB,
    }


def test_resize_encrypted_takes_a_key_file_where_zeroes_must_be_written(said: Any, refused: Any) -> None:
    make_luks("a.qcow2", 100 * KiB, "write -q -P 1 0 100k", options="cluster_size=64k")
    refused(["a.qcow2", "1M"], USAGE, "a.qcow2: it is encrypted, and no key file was given for it \\(--key-file\\)")
    Path("key").write_text("key\n")
    said("a.qcow2", "1M", "--key-file", "key")
    said("a.qcow2", "2M")


def test_resize_over_an_encrypted_backing_file_takes_a_key_file_where_that_must_be_read(
    said: Any, refused: Any
) -> None:
    make_luks("base", MiB, "write -q -P 1 0 1M", options="cluster_size=64k")
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "base", "-F", "qcow2", "a.qcow2", "256k")
    said("a.qcow2", "1M")
    said("a.qcow2", "128k", "--shrink")
    refused(
        ["a.qcow2", "100k", "--shrink"],
        USAGE,
        ".*base: it is encrypted, and no key file was given for it \\(--key-file\\)",
    )
    assert size("a.qcow2") == 128 * KiB
    Path("key").write_text("key\n")
    said("a.qcow2", "100k", "--shrink", "--key-file", "key")
    refused(["a.qcow2", "1M"], USAGE, ".*base: it is encrypted, and no key file was given for it \\(--key-file\\)")
    assert size("a.qcow2") == 100 * KiB
    said("a.qcow2", "1M", "--key-file", "key")
    assert size("a.qcow2") == MiB


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (["key"], "--backing-key-file: 'key' is not allowed, expected IMAGE=FILE, no part of it empty"),
        (["=key"], "--backing-key-file: '=key' is not allowed, .*"),
        (["a.qcow2="], "--backing-key-file: 'a.qcow2=' is not allowed, .*"),
        (["a.qcow2=key", "a.qcow2=key"], "--backing-key-file: 'a.qcow2' is given twice"),
        (["a=b=none"], "key file none: No such file or directory"),
        (["a=b=key"], "a.qcow2: a key is given for a=b, which is no encrypted image of its chain, there is none"),
    ],
)
def test_resize_key_file_of_an_image_that_cannot_be_is_refused(refused: Any, options: list[str], pattern: str) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "a.qcow2", "1M")
    Path("key").write_text("key\n")
    refused(["a.qcow2", "2M", *(f"--backing-key-file={each}" for each in options)], USAGE, pattern)


@pytest.mark.parametrize(
    ("arguments", "status", "pattern"),
    [
        (["a.qcow2", "512K"], USAGE, "a.qcow2: the size would go from 1048576 to 524288 bytes .* takes --shrink"),
        (
            ["a.qcow2", "-2M", "--shrink"],
            USAGE,
            "a.qcow2: the image has 1048576 bytes, of which 2097152 cannot be taken away",
        ),
        (["a.qcow2", "8E"], USAGE, r"a.qcow2: size is \d+, expected 0 to \d+ with clusters of 65536"),
        (["a.qcow2", "big"], USAGE, "'big' is not a size: .*"),
        (["a.qcow2", "+-1"], USAGE, "'-1' is not a size: .*"),
        (["a.qcow2", "--shrnk", "1M"], USAGE, ".*unexpected extra argument.*"),
        (["a.qcow2", "2M", "--format", "vmdk"], USAGE, "unknown format 'vmdk', .*"),
        (["a.img", "8E"], USAGE, "a.img: it cannot have .* bytes: .*"),
        (["overlay", "2M"], IMAGE, "overlay: backing file '/etc/passwd' leads outside, .*"),
        (["absent", "2M"], 3, "absent: No such file or directory"),
    ],
)
def test_resize_what_cannot_be_is_refused_in_one_line(
    refused: Any, arguments: list[str], status: int, pattern: str
) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "a.qcow2", "1M")
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", "overlay", "1M")
    Path("a.img").write_bytes(b"x")
    refused(arguments, status, pattern)


def test_resize_that_fails_tells_what_failed_first(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.vhdx").write_bytes(dynamic(bytes(MiB)))

    async def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.vhdx")

    monkeypatch.setattr(vhdx_resize, "load_headers", fail)
    refused(["a.vhdx", "2M"], 1, "a.vhdx: No space left on device")


@pytest.mark.parametrize("mode", ["-r", "-n"], ids=["reader", "writer"])
def test_resize_image_that_qemu_has_open_is_refused(refused: Any, mode: str) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "a.qcow2", "1M")
    command = [require_program("qemu-io"), "-f", "qcow2", mode, "a.qcow2"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.read(8) == b"qemu-io>"
        refused(["a.qcow2", "2M"], IMAGE, "a.qcow2: cannot be locked for writing: .*")
        holder.stdin.write(b"quit\n")
        holder.stdin.flush()
        assert holder.wait(20) == 0
