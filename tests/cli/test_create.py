"""`nbdimg create`: the options, what is printed, exit statuses, and nothing left of what is ended early."""

from __future__ import annotations

import json
import os
import pty
import resource
import select
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nbdimg.cli.output import JSON_VERSION
from nbdimg.formats.qcow2 import luks
from nbdimg.units import GiB, KiB, MiB
from tests.cli.conftest import Command
from tests.support.peers import require_program

FAILED, USAGE, IMAGE = 1, 2, 3

pytestmark = pytest.mark.usefixtures("directory")


@pytest.fixture
def said(command: Command) -> Any:
    return partial(command.said, "create")


@pytest.fixture
def refused(command: Command) -> Any:
    return partial(command.refused, "create")


def info(path: str, *arguments: str) -> dict[str, Any]:
    command = [require_program("qemu-img"), "info", "--output=json", *arguments, path]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=20).stdout)
    return found


def process(*arguments: str, **keywords: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm"}
    command = [sys.executable, "-m", "nbdimg", "create", *arguments]
    return subprocess.Popen(command, text=True, env=environment, **keywords)


# What is made


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"compat": "1.1", "refcount-bits": 16, "compression-type": "zlib", "extended-l2": False}),
        *((["--compat", text], {"compat": "0.10"}) for text in ("2", "0.10", "v2")),
        *((["--compat", text], {"compat": "1.1"}) for text in ("3", "1.1", "v3")),
        (["--refcount-bits", "1"], {"refcount-bits": 1}),
        (["--extended-l2"], {"extended-l2": True}),
        (["--compression-type", "zstd"], {"compression-type": "zstd"}),
        (["--lazy-refcounts"], {"lazy-refcounts": True}),
        (["--data-file", "d"], {"data-file": "d", "data-file-raw": False}),
        (["--data-file", "d", "--data-file-raw"], {"data-file": "d", "data-file-raw": True}),
    ],
)
def test_create_option_reaches_the_image(said: Any, arguments: list[str], expected: dict[str, Any]) -> None:
    said("a.qcow2", "1M", *arguments)
    found = info("a.qcow2")
    about = found["format-specific"]["data"]
    assert {key: about[key] for key in expected} == expected
    assert (found["virtual-size"], found["cluster-size"]) == (MiB, 64 * KiB)


def test_create_cluster_size_takes_a_suffix(said: Any) -> None:
    said("a.qcow2", "1M", "--cluster-size", "2M")
    assert info("a.qcow2")["cluster-size"] == 2 * MiB


@pytest.mark.parametrize(
    ("mode", "is_reserved"), [("off", False), ("metadata", False), ("falloc", True), ("full", True)]
)
def test_create_preallocation_takes_its_space(said: Any, mode: str, is_reserved: bool) -> None:
    said("a.qcow2", "1M", "--preallocation", mode)
    assert (os.stat("a.qcow2").st_blocks * 512 >= MiB) == is_reserved


@pytest.mark.parametrize(
    ("arguments", "format"),
    [
        (["a.qcow2"], "qcow2"),
        (["a.QCOW2"], "qcow2"),
        (["a.raw"], "raw"),
        (["a.img"], "raw"),
        (["a.img", "--format", "qcow2"], "qcow2"),
        (["a", "--format", "raw"], "raw"),
    ],
)
def test_create_format_is_the_suffix_or_the_option(said: Any, arguments: list[str], format: str) -> None:
    said(*arguments, "1M")
    assert info(arguments[0])["format"] == format
    assert info(arguments[0])["virtual-size"] == MiB


def test_create_overlay_stores_the_name_as_given_and_takes_the_size_of_its_backing_file(said: Any) -> None:
    os.mkdir("sub")
    Path("base.raw").write_bytes(bytes(3 * MiB))
    line = said("sub/a.qcow2", "--backing", "../base.raw", "--backing-format", "raw")
    assert line == f"sub/a.qcow2: qcow2 image of {3 * MiB} bytes, backed by ../base.raw (raw)\n"
    found = info("sub/a.qcow2")
    assert found["virtual-size"] == 3 * MiB
    assert (found["backing-filename"], found["backing-filename-format"]) == ("../base.raw", "raw")


def test_create_overlay_of_an_encrypted_image_takes_its_size_without_a_key(
    said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(luks, "iterations_for", lambda *_: luks.ITERATIONS_MIN)
    Path("key").write_text("key")
    said("base.qcow2", "5M", "--encrypt-key-file", "key")
    line = said("a.qcow2", "--backing", "base.qcow2", "--backing-format", "qcow2")
    assert line == f"a.qcow2: qcow2 image of {5 * MiB} bytes, backed by base.qcow2 (qcow2)\n"


def test_create_overlay_with_a_size_does_not_open_its_backing_file(said: Any) -> None:
    said("a.qcow2", "1M", "--backing", "absent.vmdk", "--backing-format", "vmdk")
    assert info("a.qcow2")["backing-filename"] == "absent.vmdk"


def test_create_takes_the_short_options_of_qemu_img(said: Any, command: Command) -> None:
    said("base", "1M", "-f", "raw")
    said("-f", "qcow2", "-b", "base", "-F", "raw", "disk")
    assert (info("disk")["backing-filename"], info("disk")["backing-filename-format"]) == ("base", "raw")
    assert "qcow2" in command.said("info", "-f", "qcow2", "disk")


@pytest.mark.parametrize("passphrase", [b"secret", b"secret\n", "\N{GREEK SMALL LETTER PI}".encode()])
def test_create_encrypted_opens_with_the_key_files_content_but_for_a_final_newline(
    said: Any, monkeypatch: pytest.MonkeyPatch, passphrase: bytes
) -> None:
    monkeypatch.setattr(luks, "iterations_for", lambda *arguments: 1000)
    Path("key").write_bytes(passphrase)
    assert said("a.qcow2", "1M", "--encrypt-key-file", "key") == f"a.qcow2: encrypted qcow2 image of {MiB} bytes\n"
    Path("key").write_bytes(passphrase.removesuffix(b"\n"))
    secret = ["--object", "secret,id=key,file=key", "-c", "read -P 0 0 1M", "--image-opts"]
    command = [require_program("qemu-io"), *secret, "driver=qcow2,encrypt.key-secret=key,file.filename=a.qcow2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    Path("key").write_bytes(b"wrong")
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert "Invalid password" in done.stderr


# What is printed


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["a.qcow2", "1M"], "a.qcow2: qcow2 image of 1048576 bytes"),
        (["a.qcow2", "1000"], "a.qcow2: qcow2 image of 1024 bytes (rounded up from 1000 to whole sectors)"),
        (["a.qcow2", "512", "--data-file", "d"], "a.qcow2: qcow2 image of 512 bytes, its data in d"),
        (["a.raw", "1000"], "a.raw: raw image of 1000 bytes"),
    ],
)
def test_create_says_in_one_line_what_it_made(said: Any, arguments: list[str], line: str) -> None:
    assert said(*arguments) == f"{line}\n"


def test_create_json_is_one_versioned_object(said: Any) -> None:
    assert JSON_VERSION == 1
    found = json.loads(said("a.qcow2", "1000", "--json", "--data-file", "d", "--preallocation", "metadata"))
    assert found == {
        "version": 1,
        "path": "a.qcow2",
        "format": "qcow2",
        "size": 1024,
        "file_size": os.stat("a.qcow2").st_size,
        "compat": 3,
        "cluster_size": 65536,
        "refcount_bits": 16,
        "extended_l2": False,
        "compression_type": "zlib",
        "lazy_refcounts": False,
        "backing": None,
        "backing_format": None,
        "data_file": "d",
        "data_file_raw": False,
        "preallocation": "metadata",
        "encrypted": False,
    }


def test_create_json_of_a_raw_image_has_the_common_fields(said: Any) -> None:
    assert json.loads(said("a.raw", "1K", "--json")) == {"version": 1, "path": "a.raw", "format": "raw", "size": 1024}


@pytest.mark.parametrize("arguments", [[], ["--json"]], ids=["sentence", "json"])
def test_create_path_that_is_not_utf_8_is_printed_all_the_same(said: Any, arguments: list[str]) -> None:
    assert said(os.fsdecode(b"\xff.qcow2"), "1M", *arguments)
    assert os.listdir(b".") == [b"\xff.qcow2"]


def read_terminal(descriptor: int) -> str:
    """Everything until the other side is closed."""
    output = b""
    while True:
        assert select.select([descriptor], [], [], 20)[0], output
        try:
            piece = os.read(descriptor, 65536)
        except OSError:
            return output.decode()
        if not piece:
            return output.decode()
        output += piece


def test_create_on_a_terminal_shows_progress_and_then_the_line() -> None:
    ours, theirs = pty.openpty()
    with process("a.qcow2", "40M", "--preallocation", "full", stdout=theirs, stderr=theirs) as running:
        os.close(theirs)
        output = read_terminal(ours)
        assert running.wait(20) == 0
    os.close(ours)
    assert "MiB" in output
    assert "\x1b[" in output
    assert output.endswith(f"a.qcow2: qcow2 image of {40 * MiB} bytes\r\n")


# Refused


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["a.qcow2"], "a.qcow2: SIZE is missing, only a backing file can stand in for it"),
        (
            ["a", "1M"],
            r"a: the suffix does not say the format, expected \.qcow2, \.vhdx, .* or the option --format",
        ),
        (["a", "1M", "--format", "vdi"], "unknown format 'vdi', expected raw or qcow2 or vhdx"),
        (["a.qcow2", "big"], "'big' is not a size: .*"),
        (["a.qcow2", "1M", "--compat", "4"], "--compat is '4', expected 2, .*"),
        (["a.qcow2", "1M", "--cluster-size", "1000"], "cluster size is 1000, expected a power of two .*"),
        (["a.qcow2", "1M", "--refcount-bits", "3"], "refcount bits are 3, expected .*"),
        (["a.qcow2", "1M", "--compression-type", "lz4"], "compression type is 'lz4', expected zlib or zstd"),
        (["a.qcow2", "1M", "--preallocation", "some"], "preallocation is 'some', expected one of .*"),
        (["a.qcow2", "--backing", "b"], "the backing file's format is not given, .* guessed: --backing-format"),
        (["a.qcow2", "--backing", "b", "--backing-format", "vmdk"], "the backing format is 'vmdk', .*: give SIZE"),
        (["a.qcow2", "--backing", "nbd://h/x", "--backing-format", "raw"], ".* is not a path, give SIZE"),
        (["a.raw", "8E"], "a.raw: it cannot have 9223372036854775808 bytes: .*"),
        (["a.raw", "7E"], "a.raw: it cannot have 8070450532247928832 bytes: .*"),
        (["a.raw", "1M", "--compat", "2"], "a raw image has no --compat; did you mean .*"),
        (["a.raw", "1M", "--cluster-size", "64K"], "a raw image has no --cluster-size; did you mean .*"),
        (["a.qcow2", "3P"], "size is .*, expected 0 to .*"),
        (["a.qcow2", "1M", "--encrypt-key-file", "/dev/null"], "key file /dev/null is empty, .*"),
        (["a.qcow2", "1M", "--encrypt-key-file", "/dev/zero"], "key file /dev/zero has more than .*"),
    ],
)
def test_create_what_cannot_be_made_is_refused_in_one_line(refused: Any, arguments: list[str], pattern: str) -> None:
    refused(arguments, USAGE, pattern)
    assert not Path(arguments[0]).exists()


@pytest.mark.parametrize("name", ["a.qcow2", "a.raw"])
def test_create_file_that_exists_is_kept(refused: Any, name: str) -> None:
    Path(name).write_bytes(b"precious")
    refused([name, "1M"], FAILED, f"{name}: .*exists.*")
    assert Path(name).read_bytes() == b"precious"


@pytest.mark.parametrize(
    "options", [["a.qcow2", "--backing", "absent", "--backing-format", "raw"], ["a.vhdx", "--parent", "absent"]]
)
def test_create_over_a_missing_file_is_refused_as_any_image_that_is_missing(refused: Any, options: list[str]) -> None:
    refused(options, IMAGE, "absent: No such file or directory")


@pytest.mark.parametrize("name", ["a.qcow2", "here/a.qcow2"])
def test_create_with_itself_as_backing_file_is_refused(refused: Any, name: str) -> None:
    os.symlink(".", "here")
    arguments = ["here/a.qcow2", "1M", "--backing", name, "--backing-format", "qcow2"]
    refused(arguments, USAGE, "here/a.qcow2: the backing file is the image itself")


def test_create_with_its_data_file_as_backing_file_is_refused(refused: Any) -> None:
    """Nobody could open it: a chain holds each file once."""
    os.symlink(".", "here")
    arguments = ["a.qcow2", "1M", "--backing", "d", "--backing-format", "raw", "--data-file", "here/d"]
    refused(arguments, USAGE, "a.qcow2: the backing file is the data file as well")
    assert not Path("d").exists()


def test_create_in_a_missing_directory_is_refused(refused: Any) -> None:
    refused(["absent/a.qcow2", "1M"], FAILED, "absent/a.qcow2: No such file or directory")


def test_create_with_a_data_file_in_a_missing_directory_is_refused(refused: Any) -> None:
    refused(["a.qcow2", "1M", "--data-file", "absent/d"], FAILED, "absent/d: No such file or directory")


# Ended early


def test_create_beyond_the_file_size_limit_says_so_and_leaves_nothing() -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MiB, MiB))

    running = process("a.qcow2", "4M", "--preallocation", "full", stderr=subprocess.PIPE, preexec_fn=limit)
    assert running.communicate(timeout=20)[1] == "nbdimg: a.qcow2: File too large\n"
    assert running.returncode == FAILED
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("numbers", "status"),
    [
        ([signal.SIGTERM], 143),
        ([signal.SIGINT], 130),
        ([signal.SIGHUP], 129),
        ([signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT], 130),
    ],
)
def test_create_that_is_stopped_leaves_nothing(numbers: list[signal.Signals], status: int) -> None:
    arguments = ["a.qcow2", f"{16 * GiB}", "--preallocation", "full", "--data-file", "d"]
    with process(*arguments, stderr=subprocess.PIPE) as running:
        limit = time.monotonic() + 20
        while not os.path.exists("a.qcow2") or not os.path.exists("d") or not os.stat("d").st_blocks:
            assert running.poll() is None
            assert time.monotonic() < limit
            select.select([], [], [], 0.01)
        for number in numbers:
            running.send_signal(number)
        said = running.communicate(timeout=20)[1]
        assert (running.returncode, said) == (status, "nbdimg: a.qcow2: interrupted, nothing of it was left\n")
    assert os.listdir() == []
