"""QEMU's tools as clients: qemu-img moves and describes whole images, qemu-io single requests; and QEMU's image locks.

Expected bytes come from the seeded samples, never from nbdimg.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import pytest

from tests.interop.samples import (
    KIB,
    MIB,
    SPARSE_SIZE,
    allocated_bytes,
    file_extents,
    first_difference,
    flip_byte,
    run,
    run_ok,
    write_full,
    write_sparse,
)
from tests.support.peers import require_program
from tests.support.rawclient import connect_negotiated
from tests.support.rawprotocol import Command, CommandFlag
from tests.support.server import NbdimgServer, PeerServer

EXIT_IMAGE_REFUSED = 3
PROMPT = "qemu-io> "
QCOW2_MAGIC = b"QFI\xfb"


def qemu_io(target: str | Path, *commands: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run qemu-io commands on a raw image or URI. A mismatch in `read -P` makes its exit status 1."""
    program = require_program("qemu-io")
    return run(program, "-f", "raw", *options, *(word for c in commands for word in ("-c", c)), str(target))


def qemu_io_ok(target: str | Path, *commands: str, options: tuple[str, ...] = ()) -> str:
    completed = qemu_io(target, *commands, options=options)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout + completed.stderr


def qemu_map(target: str | Path) -> list[tuple[int, int, bool, bool]]:
    """(start, length, reads as zero, is data) of `qemu-img map`, equal neighbours merged."""
    merged: list[tuple[int, int, bool, bool]] = []
    for entry in json.loads(run_ok(require_program("qemu-img"), "map", "-f", "raw", "--output=json", str(target))):
        start, length, kind = entry["start"], entry["length"], (entry["zero"], entry["data"])
        if merged and merged[-1][2:] == kind and sum(merged[-1][:2]) == start:
            start, length = merged[-1][0], merged.pop()[1] + length
        merged.append((start, length, *kind))
    return merged


# qemu-img


@pytest.mark.parametrize("options", [[], ["-W", "-m", "16"]], ids=["in-order", "out-of-order"])
def test_qemu_img_convert_from_export_copies_bytes_and_holes(tmp_path: Path, options: list[str]) -> None:
    qemu_img, image, copy = require_program("qemu-img"), tmp_path / "disk.img", tmp_path / "copy.img"
    expected = write_sparse(image)
    with NbdimgServer(image, options=["--read-only"]) as server:
        run_ok(qemu_img, "convert", *options, "-f", "raw", "-O", "raw", server.uri, copy)
    assert first_difference(copy, expected) is None
    assert allocated_bytes(copy) <= allocated_bytes(image)


@pytest.mark.parametrize("options", [[], ["-W", "-m", "16"]], ids=["in-order", "out-of-order"])
def test_qemu_img_convert_to_export_replaces_every_byte(tmp_path: Path, options: list[str]) -> None:
    qemu_img, source, image = require_program("qemu-img"), tmp_path / "source.img", tmp_path / "disk.img"
    expected = write_sparse(source)
    write_full(image, SPARSE_SIZE)
    with NbdimgServer(image) as server:
        run_ok(qemu_img, "convert", "-n", *options, "-f", "raw", "-O", "raw", source, server.uri)
    assert first_difference(image, expected) is None
    run_ok(qemu_img, "compare", "-f", "raw", "-F", "raw", source, image)


def test_qemu_img_convert_of_qcow2_to_empty_export_stays_sparse(tmp_path: Path) -> None:
    qemu_img, source, qcow2, image = require_program("qemu-img"), *(tmp_path / n for n in ("s.img", "s.qcow2", "d.img"))
    expected = write_sparse(source)
    run_ok(qemu_img, "convert", "-f", "raw", "-O", "qcow2", source, qcow2)
    write_sparse(image, data=())
    with NbdimgServer(image) as server:
        run_ok(qemu_img, "convert", "-n", "-f", "qcow2", "-O", "raw", qcow2, server.uri)
    assert first_difference(image, expected) is None
    assert allocated_bytes(image) < SPARSE_SIZE // 4


def test_qemu_img_compare_of_export_with_its_copy_is_identical(tmp_path: Path) -> None:
    qemu_img, image, copy = require_program("qemu-img"), tmp_path / "disk.img", tmp_path / "copy.img"
    copy.write_bytes(write_sparse(image))
    with NbdimgServer(image, options=["--read-only"]) as server:
        run_ok(qemu_img, "compare", "-f", "raw", "-F", "raw", server.uri, copy)


def test_qemu_img_compare_of_export_with_one_flipped_byte_differs(tmp_path: Path) -> None:
    """The control of every comparison by qemu-img in this file."""
    qemu_img, image, copy = require_program("qemu-img"), tmp_path / "disk.img", tmp_path / "copy.img"
    copy.write_bytes(write_sparse(image))
    flip_byte(copy, 3 * MIB + 101)
    with NbdimgServer(image, options=["--read-only"]) as server:
        completed = run(qemu_img, "compare", "-f", "raw", "-F", "raw", server.uri, copy)
    assert completed.returncode == 1
    assert "Content mismatch at offset" in completed.stdout


def test_qemu_img_map_of_export_agrees_with_holes_of_the_file(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    write_sparse(image)
    holes = [(offset, length, not is_data, is_data) for offset, length, is_data in file_extents(image)]
    assert len(holes) == 7
    with NbdimgServer(image, options=["--read-only"]) as server:
        assert qemu_map(server.uri) == holes
        assert qemu_map(image) == holes


def test_qemu_img_map_of_export_follows_writes_and_discards(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    write_sparse(image)
    with NbdimgServer(image) as server:
        qemu_io_ok(server.uri, "write -P 0x5a 8M 64k", "discard 0 64k", "flush")
        found = qemu_map(server.uri)
        holes = [(offset, length, not is_data, is_data) for offset, length, is_data in file_extents(image)]
    assert found == holes
    assert (8 * MIB, 64 * KIB, False, True) in found
    assert found[0] == (0, MIB, True, False)


def test_qemu_img_info_of_uri_reports_size_of_the_image(tmp_path: Path) -> None:
    qemu_img, image = require_program("qemu-img"), tmp_path / "disk.img"
    write_sparse(image)
    with NbdimgServer(image, options=["--read-only"]) as server:
        info = json.loads(run_ok(qemu_img, "info", "--output=json", server.uri))
    assert (info["format"], info["virtual-size"]) == ("raw", SPARSE_SIZE)


def test_qemu_img_reads_image_whose_size_is_not_a_multiple_of_512(tmp_path: Path) -> None:
    qemu_img, image, copy = require_program("qemu-img"), tmp_path / "disk.img", tmp_path / "copy.img"
    expected = write_full(image, MIB + 100)
    with NbdimgServer(image, options=["--read-only"]) as server:
        run_ok(qemu_img, "convert", "-f", "raw", "-O", "raw", server.uri, copy)
    # QEMU's block layer counts 512-byte sectors: its copy ends with zeroes up to the next one.
    assert first_difference(copy, expected + bytes(512 - 100)) is None


def test_qemu_img_with_unknown_export_name_fails_and_the_server_goes_on(tmp_path: Path) -> None:
    qemu_img, image = require_program("qemu-img"), tmp_path / "disk.img"
    write_sparse(image)
    with NbdimgServer(image, options=["--read-only"]) as server:
        completed = run(qemu_img, "info", server.uri.replace("/disk?", "/absent?"))
        assert completed.returncode == 1
        assert "absent" in completed.stderr
        run_ok(qemu_img, "info", server.uri)


# qemu-io


def test_qemu_io_read_of_other_pattern_fails(tmp_path: Path) -> None:
    """The control of every `read -P` in this file."""
    image = tmp_path / "disk.img"
    write_sparse(image, data=())
    with NbdimgServer(image) as server:
        completed = qemu_io(server.uri, "write -P 0x11 4k 4k", "read -P 0x12 4k 4k")
    assert completed.returncode == 1
    assert "Pattern verification failed" in completed.stdout


def test_qemu_io_patterns_read_back_and_reach_the_file(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    expected = bytearray(write_sparse(image))
    commands = []
    for pattern, offset, length in (
        (0x11, 0, 512),
        (0x22, 512, 4096),
        (0x33, 5 * MIB, MIB),
        (0x44, 5 * MIB + KIB, KIB),
    ):
        expected[offset : offset + length] = bytes([pattern]) * length
        commands += [f"write -P {pattern} {offset} {length}", f"read -P {pattern} {offset} {length}"]
    with NbdimgServer(image) as server:
        qemu_io_ok(server.uri, *commands, "flush")
    assert first_difference(image, expected) is None


def test_qemu_io_unaligned_writes_keep_the_bytes_around_them(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    expected = bytearray(write_full(image, MIB))
    commands = []
    for pattern, offset, length in ((0x77, 513, 777), (0x88, 4095, 2), (0x99, 65535, 65538), (0xAA, MIB - 1, 1)):
        expected[offset : offset + length] = bytes([pattern]) * length
        commands += [f"write -P {pattern} {offset} {length}", f"read -P {pattern} {offset} {length}"]
    with NbdimgServer(image) as server:
        qemu_io_ok(server.uri, *commands)
    assert first_difference(image, expected) is None


def test_qemu_io_discard_frees_space_and_keeps_the_bytes_around_it(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    expected = bytearray(write_full(image, 4 * MIB))
    before = allocated_bytes(image)
    expected[MIB : 3 * MIB] = bytes(2 * MIB)
    with NbdimgServer(image) as server:
        qemu_io_ok(server.uri, "discard 1M 2M", "read -P 0 1M 2M", "flush")
    assert first_difference(image, expected) is None
    assert allocated_bytes(image) <= before - 2 * MIB + 64 * KIB


def test_qemu_io_write_zeroes_keeps_space_allocated(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    expected = bytearray(write_full(image, 4 * MIB))
    before = allocated_bytes(image)
    expected[MIB + 100 : 3 * MIB + 200] = bytes(2 * MIB + 100)
    with NbdimgServer(image) as server:
        qemu_io_ok(server.uri, f"write -z {MIB + 100} {2 * MIB + 100}", f"read -P 0 {MIB + 100} {2 * MIB + 100}")
    assert first_difference(image, expected) is None
    assert allocated_bytes(image) >= before


def test_qemu_io_write_zeroes_allocates_a_hole(tmp_path: Path) -> None:
    """Spec: proto.md "NBD_CMD_FLAG_NO_HOLE": qemu-io sends it without -u, so a later write cannot run out of space."""
    image = tmp_path / "disk.img"
    write_sparse(image, size=4 * MIB, data=())
    with NbdimgServer(image) as server:
        qemu_io_ok(server.uri, "write -z 1M 2M", "read -P 0 0 4M")
    assert allocated_bytes(image) >= 2 * MIB


def test_qemu_io_write_zeroes_with_unmap_frees_space(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    expected = bytearray(write_full(image, 4 * MIB))
    before = allocated_bytes(image)
    expected[MIB + 100 : 3 * MIB + 200] = bytes(2 * MIB + 100)
    with NbdimgServer(image) as server:
        qemu_io_ok(server.uri, f"write -z -u {MIB + 100} {2 * MIB + 100}", f"read -P 0 {MIB + 100} {2 * MIB + 100}")
    assert first_difference(image, expected) is None
    assert allocated_bytes(image) <= before - 2 * MIB + 64 * KIB


def test_qemu_io_fua_write_sends_the_flag_and_is_accepted(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    expected = bytearray(write_sparse(image))
    expected[0:4096] = b"\x66" * 4096
    expected[8192:12288] = bytes(4096)
    with NbdimgServer(image) as server:
        output = qemu_io_ok(
            server.uri,
            "write -f -P 0x66 0 4k",
            "write -f -z 8k 4k",
            "read -P 0x66 0 4k",
            options=("-T", "nbd_send_request"),
        )
    sent = re.findall(r"\.flags = 0x([0-9a-f]+), \.type = \d+ \((write|write zeroes)\)", output)
    assert [(name, int(flags, 16) & 1) for flags, name in sent] == [("write", 1), ("write zeroes", 1)]
    assert first_difference(image, expected) is None


def test_qemu_io_beyond_the_end_fails_and_the_server_goes_on(tmp_path: Path) -> None:
    """QEMU's own block layer refuses most of these from the size that the server reported."""
    image = tmp_path / "disk.img"
    expected = write_full(image, MIB)
    with NbdimgServer(image) as server:
        for command in ("read 1M 512", "write 1M 512", "read 1048000 1k", "write -z 1048000 1k"):
            assert qemu_io(server.uri, command).returncode == 1, command
        qemu_io_ok(server.uri, "read 1048064 512")
    assert first_difference(image, expected) is None


def test_qemu_io_write_to_read_only_export_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    expected = write_sparse(image)
    with NbdimgServer(image, options=["--read-only"]) as server:
        assert qemu_io(server.uri, "write -P 1 0 512").returncode == 1
        qemu_io_ok(server.uri, "read 0 512", options=("-r",))
    assert first_difference(image, expected) is None


def test_qemu_io_asynchronous_requests_complete_in_any_order(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    expected = bytearray(write_sparse(image, data=()))
    commands = []
    for index in range(64):
        offset = index * 128 * KIB
        expected[offset : offset + 96 * KIB] = bytes([index + 1]) * (96 * KIB)
        commands.append(f"aio_write -q -P {index + 1} {offset} 96k")
    with NbdimgServer(image) as server:
        qemu_io_ok(server.uri, *commands, "aio_flush")
    assert first_difference(image, expected) is None


def test_qemu_img_that_makes_a_qcow2_on_a_probed_raw_image_is_refused_and_the_log_says_why(tmp_path: Path) -> None:
    qemu_img, image = require_program("qemu-img"), tmp_path / "disk.img"
    write_sparse(image)
    with NbdimgServer(image) as server:
        assert run(qemu_img, "create", "-f", "qcow2", server.uri, "1M").returncode == 1
        assert "make this probed raw image look like qcow2; serve it with an explicit format" in server.stderr()
    assert image.read_bytes()[:4] != QCOW2_MAGIC
    with NbdimgServer(image, options=["--format=raw"]) as server:
        run_ok(qemu_img, "create", "-f", "qcow2", server.uri, "1M")
        run_ok(qemu_img, "check", "-f", "qcow2", server.uri)


class QemuIo:
    """A qemu-io that stays open, with `reconnect-delay`."""

    def __init__(self, server: NbdimgServer) -> None:
        options = f"driver=nbd,server.type=unix,server.path={server.socket_path},export=disk,reconnect-delay=60"
        argv = [require_program("qemu-io"), "--image-opts", options]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate("quit\n", timeout=60)

    def ask(self, command: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = ""
        while not answer.endswith(PROMPT):
            found = self._process.stdout.read(1)
            assert found, f"it has ended: {answer}"
            answer += found
        return answer.removesuffix(PROMPT)


def test_qemu_takes_a_larger_size_when_it_has_reconnected(tmp_path: Path) -> None:
    """As docs/operations.md says it; `truncate` is what the command block_resize does."""
    image, admin = tmp_path / "disk.img", tmp_path / "admin"
    expected = write_sparse(image)
    ctl = (sys.executable, "-m", "nbdimg", "ctl")
    at = f"--socket={admin}"
    with NbdimgServer(image, options=[f"--admin-socket={admin}"]) as server, QemuIo(server) as qemu:
        run_ok(*ctl, "resize", at, "disk", str(SPARSE_SIZE + MIB))
        assert "Cannot grow NBD nodes" in qemu.ask(f"truncate {SPARSE_SIZE + MIB}")
        (client,) = json.loads(run_ok(*ctl, "clients", at, "--json"))["clients"]
        run_ok(*ctl, "disconnect", at, str(client["id"]))
        assert qemu.ask("read -q 0 512") == ""
        assert qemu.ask(f"truncate {SPARSE_SIZE + MIB}") == ""
        assert qemu.ask("length") == f"{SPARSE_SIZE // MIB + 1} MiB\n"
        assert qemu.ask(f"write -q -P 5 {SPARSE_SIZE} 1M") == ""
    assert first_difference(image, expected + b"\x05" * MIB) is None


# Image locks: bytes 100 to 104 of the file say what a user does, 200 to 204 what it does not let others do.


def assert_refused(image: Path, *options: str) -> None:
    """`nbdimg serve IMAGE` must exit 3 and say why in one line that names the image."""
    with pytest.raises(RuntimeError) as caught, NbdimgServer(image, options=list(options)):
        pass
    status, _, stderr = str(caught.value).removeprefix("server exited with ").partition(": ")
    assert int(status) == EXIT_IMAGE_REFUSED, str(caught.value)
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1, stderr
    assert image.name in lines[0]
    assert "lock" in lines[0] or "in use" in lines[0]


@contextmanager
def qemu_nbd(image: Path, *options: str) -> Iterator[str]:
    """A qemu-nbd that has opened and locked the image; gives its URI."""
    program = require_program("qemu-nbd")
    with PeerServer(
        lambda path: [program, "-f", "raw", "-t", "-e", "0", "-x", "disk", "-k", path, *options, str(image)]
    ) as server:
        uri = f"nbd+unix:///disk?socket={server.socket_path}"
        # Its socket exists before it has opened the image; the first answer comes after.
        run_ok(require_program("qemu-img"), "info", uri)
        yield uri


@contextmanager
def nbdimg_read_only(image: Path) -> Iterator[str]:
    with NbdimgServer(image, options=["--read-only"]) as server:
        yield server.uri


def test_qemu_io_refuses_to_write_an_image_that_is_served(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    write_sparse(image)
    qemu_io_ok(image, "read 0 512")
    with NbdimgServer(image):
        completed = qemu_io(image, "read 0 512")
        assert completed.returncode == 1
        assert 'Failed to get "write" lock' in completed.stderr
    qemu_io_ok(image, "read 0 512")


def test_qemu_nbd_refuses_an_image_that_is_served(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    write_sparse(image)
    with NbdimgServer(image):
        completed = run(require_program("qemu-nbd"), "-f", "raw", "-k", tmp_path / "socket", image, timeout_s=20)
    assert completed.returncode == 1
    assert 'Failed to get "write" lock' in completed.stderr


def test_image_lock_ends_with_a_killed_server(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    write_sparse(image)
    with NbdimgServer(image) as server:
        assert qemu_io(image, "read 0 512").returncode == 1
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        qemu_io_ok(image, "read 0 512")


def test_serve_of_image_that_qemu_nbd_serves_writable_exits_3_with_one_line(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    write_sparse(image)
    with qemu_nbd(image):
        assert_refused(image)
    with NbdimgServer(image):
        pass


def test_serve_of_image_that_another_nbdimg_serves_exits_3_with_one_line(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    write_sparse(image)
    with NbdimgServer(image):
        assert_refused(image)


@pytest.mark.parametrize("first", ["nbdimg", "qemu-nbd"])
def test_two_read_only_servers_of_one_image_coexist(tmp_path: Path, first: str) -> None:
    image = tmp_path / "disk.img"
    write_sparse(image)
    servers = [nbdimg_read_only(image), qemu_nbd(image, "-r")]
    if first == "qemu-nbd":
        servers.reverse()
    with servers[0] as one, servers[1] as two:
        for target in (one, two, image):
            qemu_io_ok(target, "read 0 64k", options=("-r",))


@pytest.mark.parametrize("flags", [0, CommandFlag.NO_HOLE])
def test_zeroes_of_part_of_a_long_cluster_are_whole(tmp_path: Path, flags: int) -> None:
    image = tmp_path / "disk.qcow2"
    run_ok(require_program("qemu-img"), "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", image, "4M")
    run_ok(require_program("qemu-io"), "-f", "qcow2", "-c", "write -P 7 0 4M", image)
    with NbdimgServer(image) as server, connect_negotiated(server.socket_path, "disk") as client:
        assert client.request(Command.WRITE_ZEROES, 256 << 10, 1500 << 10, flags).error == 0
        client.disconnect()
        server.terminate()
        assert server.wait() == 0
    expected = b"\7" * (256 << 10) + bytes(1500 << 10) + b"\7" * ((4 << 20) - (1756 << 10))
    raw = tmp_path / "raw"
    run_ok(require_program("qemu-img"), "convert", "-O", "raw", image, raw)
    assert raw.read_bytes() == expected
