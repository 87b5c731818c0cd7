"""Dirty bitmaps against QEMU: the same writes give the same bitmap, each reads what the other stored, a killed server
leaves in_use and all else intact.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from nbdimg.cli.healthcheck import SOCKET_VARIABLE
from nbdimg.cli.main import run
from tests.support.peers import require_program
from tests.support.qcow2edit import qemu_img
from tests.support.rawclient import connect_negotiated
from tests.support.rss import wait_until
from tests.support.server import NbdimgServer, PeerServer

CONTEXT = "qemu:dirty-bitmap:"
MIB = 1 << 20

KINDS = {
    "defaults": ("8M", ""),
    "lazy refcounts": ("8M", "lazy_refcounts=on"),
    "clusters of 512": ("2M", "cluster_size=512"),
    "clusters of 2M": ("8M", "cluster_size=2M"),
    "extended L2": ("8M", "extended_l2=on"),
    "refcounts of 1": ("8M", "refcount_bits=1"),
    "odd size": ("5242368", ""),
    "data file": ("8M", "data_file=data.raw"),
    "backing": ("8M", "backing_file=base.raw,backing_fmt=raw"),
}


def make(path: Path, kind: str, *names: str) -> Path:
    size, options = KINDS[kind]
    path.parent.mkdir(exist_ok=True)
    (path.parent / "base.raw").write_bytes(b"\x77" * (4 * MIB))
    options = options.replace("data_file=", f"data_file={path.parent}/")  # QEMU resolves it in its own directory
    extra = ("-o", options) if options else ()
    qemu_img("create", "-q", "-f", "qcow2", *extra, path, size)
    for name in names:
        qemu_img("bitmap", "--add", path, name)
    return path


def qemu_nbd(image: Path, name: str, *options: str) -> PeerServer:
    program = require_program("qemu-nbd")
    return PeerServer(
        lambda path: [program, "-t", "-f", "qcow2", "--discard=unmap", "-k", path, "-B", name, *options, str(image)]
    )


Server = NbdimgServer | PeerServer


def uri_of(server: Server) -> str:
    return f"nbd+unix:///?socket={server.socket_path}"


def io(server: Server, *commands: str) -> None:
    arguments = [each for command in commands for each in ("-c", command)]
    command = [require_program("qemu-io"), "-f", "raw", "-d", "unmap", *arguments, uri_of(server)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def dirty(server: Server, name: str) -> list[tuple[int, int, int]]:
    """(offset, length, flags), neighbours merged, as a client sees it."""
    command = [require_program("nbdinfo"), "--json", f"--map={CONTEXT}{name}", uri_of(server)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    merged: list[tuple[int, int, int]] = []
    for each in json.loads(done.stdout):
        offset, length, flags = each["offset"], each["length"], each["type"]
        if merged and merged[-1][2] == flags:
            offset, before, _ = merged.pop()
            length += before
        merged.append((offset, length, flags))
    return merged


def bitmaps(image: Path) -> list[dict[str, Any]]:
    found = json.loads(qemu_img("info", "--output=json", "-U", image).stdout)
    listed: list[dict[str, Any]] = found["format-specific"]["data"].get("bitmaps", [])
    return listed


def writes(seed: int, size: int) -> list[str]:
    """Writes, zeroes and trims of whole 4 KiB."""
    choose = random.Random(seed)
    commands = []
    for number in range(12):
        offset = choose.randrange(0, size // 4096 - 40) * 4096
        length = choose.choice((4096, 8192, 65536, 131072))
        kind = choose.choice(("write -q -P 5", "write -q -z", "write -q -z -u", "write -q -P 9"))
        commands.append(f"{kind} {offset} {length}")
        if number == 6:
            commands.append("flush")
    return commands


@pytest.mark.parametrize("kind", KINDS)
def test_bitmap_after_the_same_writes_is_the_same_as_qemus(tmp_path: Path, kind: str) -> None:
    seed = 7
    ours = make(tmp_path / "ours" / "disk.qcow2", kind, "b0")
    theirs = make(tmp_path / "theirs" / "disk.qcow2", kind, "b0")
    size = json.loads(qemu_img("info", "--output=json", ours).stdout)["virtual-size"]
    commands = writes(seed, size)
    with NbdimgServer(ours) as server:
        assert dirty(server, "b0") == [(0, size, 0)]
        io(server, *commands)
        live = dirty(server, "b0")
    with qemu_nbd(theirs, "b0") as server:
        io(server, *commands)
        expected = dirty(server, "b0")
    assert live == expected, f"seed {seed}"
    assert len(live) > 3
    qemu_img("check", ours)
    assert bitmaps(ours) == bitmaps(theirs)
    with qemu_nbd(ours, "b0", "-r") as server:
        assert dirty(server, "b0") == expected
    with NbdimgServer(theirs, options=["--read-only"]) as server:
        assert dirty(server, "b0") == expected
    qemu_img("compare", ours, theirs)


def test_bitmap_trims_of_whole_clusters_are_dirty_as_in_qemu(tmp_path: Path) -> None:
    ours = make(tmp_path / "ours" / "disk.qcow2", "defaults", "b0")
    theirs = make(tmp_path / "theirs" / "disk.qcow2", "defaults", "b0")
    commands = ["write -q -P 3 0 4M", "discard -q 1M 1M", "discard -q 6M 128k"]
    with NbdimgServer(ours) as server:
        io(server, *commands)
        live = dirty(server, "b0")
    with qemu_nbd(theirs, "b0") as server:
        io(server, *commands)
        assert (
            live
            == dirty(server, "b0")
            == [
                (0, 4 * MIB, 1),
                (4 * MIB, 2 * MIB, 0),
                (6 * MIB, 128 << 10, 1),
                (6 * MIB + (128 << 10), 2 * MIB - (128 << 10), 0),
            ]
        )


def test_bitmap_sessions_of_both_in_turn_accumulate(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2", "defaults", "b0")
    with NbdimgServer(image) as server:
        io(server, "write -q 0 64k")
    with qemu_nbd(image, "b0") as server:
        io(server, "write -q 128k 64k")
    with NbdimgServer(image) as server:
        io(server, "write -q 256k 1")
        assert [each[:2] for each in dirty(server, "b0") if each[2]] == [(0, 65536), (131072, 65536), (262144, 65536)]
    qemu_img("check", image)


@pytest.fixture
def admin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An option for a server, which `nbdimg ctl` then asks."""
    monkeypatch.setenv(SOCKET_VARIABLE, str(tmp_path / "admin"))
    return f"--admin-socket={tmp_path / 'admin'}"


def ctl_bitmap(*arguments: str) -> None:
    assert run(["ctl", "bitmap", arguments[0], "disk", *arguments[1:]]) == 0


def ctl_snapshot(verb: str, name: str) -> None:
    assert run(["ctl", "snapshot", verb, "disk", name]) == 0


class Writer(threading.Thread):
    """Writes here and there, without a pause and without a flush, until `finish`."""

    def __init__(self, server: NbdimgServer, size: int, seed: int) -> None:
        super().__init__(daemon=True)
        self._server, self._size, self._choose = server, size, random.Random(seed)
        self._is_over = threading.Event()
        self.count = 0

    def run(self) -> None:
        with connect_negotiated(self._server.socket_path, "disk") as client:
            while not self._is_over.is_set():
                offset = self._choose.randrange(self._size // 512 - 16) * 512
                data = bytes([self._choose.randrange(256)]) * (512 * self._choose.randint(1, 16))
                assert client.write(offset, data).error == 0
                self.count += 1

    def wait_progress(self) -> None:
        count = self.count
        assert wait_until(lambda: self.count > count + 20, 30)

    def finish(self) -> None:
        self._is_over.set()
        self.join(30)


def test_backup_of_a_running_machine_as_the_documentation_says(tmp_path: Path, admin: str) -> None:
    """The parts that are dirty, copied over the last backup, make what the whole snapshot is; a writer never stops."""
    seed, size = 11, 8 * MIB
    image = make(tmp_path / "disk.qcow2", "defaults")
    backup = bytearray(size)
    with NbdimgServer(image, options=[admin]) as server:
        io(server, "write -q -P 9 1M 64k")
        ctl_bitmap("add", "day0", "--granularity", "4096")
        backup[MIB : MIB + 65536] = b"\x09" * 65536
        writer = Writer(server, size, seed)
        writer.start()
        for day in range(1, 3):
            old, new = f"day{day - 1}", f"day{day}"
            writer.wait_progress()
            ctl_bitmap("add", new, "-g", "4096", "--disable", old)
            writer.wait_progress()
            ctl_snapshot("create", new)
            raw = tmp_path / "raw"
            snapshot = f"nbd+unix:///disk@{new}?socket={server.socket_path}"
            qemu_img("convert", "-f", "raw", "-O", "raw", snapshot, raw)
            now = raw.read_bytes()
            for name in (old, new):
                for offset, length, flags in dirty(server, name):
                    if flags:
                        backup[offset : offset + length] = now[offset : offset + length]
            assert backup == now, f"seed {seed}: {new}"
            ctl_snapshot("delete", new)
            ctl_bitmap("remove", old)
        writer.finish()
    assert [each["name"] for each in bitmaps(image)] == ["day2"]
    qemu_img("check", image)


def test_backup_by_one_bitmap_that_is_cleared_is_the_disk(tmp_path: Path, admin: str) -> None:
    """Nobody writes while it is copied."""
    image = make(tmp_path / "disk.qcow2", "defaults")
    backup = bytearray(8 * MIB)
    with NbdimgServer(image, options=[admin]) as server:
        ctl_bitmap("add", "b0")
        for round_number in range(3):
            io(server, *writes(round_number, len(backup)))
            raw = tmp_path / "raw"
            qemu_img("convert", "-f", "raw", "-O", "raw", uri_of(server), raw)
            now = raw.read_bytes()
            parts = [(offset, length) for offset, length, flags in dirty(server, "b0") if flags]
            assert 0 < sum(length for _, length in parts) < len(backup)
            for offset, length in parts:
                backup[offset : offset + length] = now[offset : offset + length]
            assert backup == now
            ctl_bitmap("clear", "b0")
            assert dirty(server, "b0") == [(0, len(backup), 0)]
    with qemu_nbd(image, "b0", "-r") as server:
        assert dirty(server, "b0") == [(0, len(backup), 0)]


@pytest.mark.parametrize("kind", ["defaults", "lazy refcounts", "data file"])
def test_bitmaps_changed_live_survive_a_kill_where_they_do_not_follow(tmp_path: Path, admin: str, kind: str) -> None:
    image = make(tmp_path / "disk.qcow2", kind)
    with NbdimgServer(image, options=[admin]) as server:
        io(server, "write -q -P 1 0 64k")
        ctl_bitmap("add", "b0", "b1")
        io(server, "write -q -P 2 1M 64k")
        ctl_bitmap("disable", "b0")
        ctl_bitmap("add", "b2")
        flags = {each["name"]: each["flags"] for each in bitmaps(image)}
        assert flags == {"b0": [], "b1": ["in-use", "auto"], "b2": ["auto"]}
        io(server, "write -q -P 3 1536k 64k", "flush")
        server.kill()
    flags = {each["name"]: each["flags"] for each in bitmaps(image)}
    assert flags == {"b0": [], "b1": ["in-use", "auto"], "b2": ["in-use", "auto"]}
    if kind != "lazy refcounts":  # those are repaired at the next opening
        qemu_img("check", image)
    with NbdimgServer(image, options=[admin]) as server:
        assert [each for each in dirty(server, "b0") if each[2]] == [(MIB, 65536, 1)]
        io(server, "read -q -P 3 1536k 64k")
        ctl_bitmap("remove", "b1", "b2")
        ctl_bitmap("enable", "b0")
        io(server, "write -q -P 4 512k 64k")
    with qemu_nbd(image, "b0", "-r") as server:
        assert [each for each in dirty(server, "b0") if each[2]] == [(MIB // 2, 65536, 1), (MIB, 65536, 1)]
    qemu_img("check", image)


def test_bitmap_all_dirty_is_stored_without_data_clusters_and_read_by_qemu(tmp_path: Path) -> None:
    """The bits of 256 GiB at 512 bytes are 64 MiB, a thousand clusters."""
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", image, "256G")
    qemu_img("bitmap", "--add", "-g", "512", image, "b0")
    with NbdimgServer(image) as server:
        io(server, *(f"write -q -z -u {gib}G 1G" for gib in range(16)), "write -q 200G 512")
    assert image.stat().st_blocks * 512 < 16 * MIB
    with qemu_nbd(image, "b0", "-r") as server:
        assert dirty(server, "b0") == [
            (0, 16 << 30, 1),
            (16 << 30, 184 << 30, 0),
            (200 << 30, 512, 1),
            ((200 << 30) + 512, (56 << 30) - 512, 0),
        ]


@pytest.mark.parametrize("kind", ["defaults", "lazy refcounts", "data file"])
def test_bitmap_of_a_killed_server_is_in_use_and_the_disk_intact(tmp_path: Path, kind: str) -> None:
    image = make(tmp_path / "disk.qcow2", kind, "b0")
    qemu_img("bitmap", "--add", "--disable", image, "frozen")
    with NbdimgServer(image) as server:
        io(server, "write -q -P 17 1M 128k", "flush")
        server.kill()
    assert {each["name"]: each["flags"] for each in bitmaps(image)} == {"b0": ["in-use", "auto"], "frozen": []}
    if kind != "lazy refcounts":  # those are repaired at the next opening
        qemu_img("check", image, ok=(0, 3))
    with NbdimgServer(image) as server:
        io(server, "read -q -P 17 1M 128k")
        assert dirty(server, "frozen")[0][2] == 0
        listed = subprocess.run(
            [require_program("nbdinfo"), "--json", uri_of(server)],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        assert json.loads(listed.stdout)["exports"][0]["contexts"] == [
            "base:allocation",
            "qemu:allocation-depth",
            CONTEXT + "frozen",
        ]
    qemu_img("bitmap", "--remove", image, "b0")
    qemu_img("check", image, ok=(0, 3))


def test_control_qemu_nbd_killed_leaves_in_use_too(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2", "defaults", "b0")
    with qemu_nbd(image, "b0") as server:
        io(server, "write -q -P 17 1M 128k", "flush")
        server.kill()
    assert [each["flags"] for each in bitmaps(image)] == [["in-use", "auto"]]


def test_bitmap_of_a_server_killed_before_the_first_write_is_kept(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2", "defaults", "b0")
    with NbdimgServer(image) as server:
        io(server, "read -q 0 64k", "flush")
        server.kill()
    assert [each["flags"] for each in bitmaps(image)] == [["auto"]]


def test_bitmap_disabled_stays_as_it_is(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2", "defaults", "b0")
    with NbdimgServer(image) as server:
        io(server, "write -q 0 64k")
    qemu_img("bitmap", "--disable", image, "b0")
    before = image.read_bytes()
    with NbdimgServer(image) as server:
        io(server, "write -q 1M 64k")
        assert dirty(server, "b0") == [(0, 65536, 1), (65536, 8 * MIB - 65536, 0)]
        assert bitmaps(image)[0]["flags"] == []
    assert image.read_bytes() != before
    qemu_img("check", image)


def test_bitmap_whose_autoclear_bit_was_cleared_is_not_served(tmp_path: Path) -> None:
    """Somebody who knows no bitmaps has written to the image."""
    image = make(tmp_path / "disk.qcow2", "defaults", "b0")
    with image.open("r+b") as file:
        file.seek(88)
        file.write(bytes(8))
    with NbdimgServer(image) as server:
        io(server, "write -q 0 64k")
        listed = subprocess.run(
            [require_program("nbdinfo"), "--json", uri_of(server)],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        assert CONTEXT + "b0" not in json.loads(listed.stdout)["exports"][0]["contexts"]
    assert bitmaps(image) == []
    qemu_img("check", image, ok=(3,))


def test_bitmap_granularities_and_block_sizes_of_many_kinds_agree_with_qemu(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2", "defaults")
    sizes = (512, 1 << 20)
    for size in sizes:
        qemu_img("bitmap", "--add", "-g", str(size), image, f"g{size}")
    copy = Path(shutil.copy(image, tmp_path / "copy.qcow2"))
    commands = ["write -q 1024 512", "write -q 70000 1", "write -q 3M 300k", "write -q 8388096 512"]
    with NbdimgServer(image) as server:
        io(server, *commands)
    for size in sizes:
        with qemu_nbd(copy, f"g{size}") as server:
            if size == sizes[0]:
                io(server, *commands)
            expected = dirty(server, f"g{size}")
        with NbdimgServer(image, options=["--read-only"]) as server:
            assert dirty(server, f"g{size}") == expected


@pytest.mark.parametrize(("size", "added"), [("16M", [(8 * MIB, 8 * MIB, 1)]), ("4M", [])])
def test_bitmap_of_a_resized_image_is_what_qemu_makes_of_it_and_dirty_where_the_disk_is_new(
    tmp_path: Path, size: str, added: list[tuple[int, int, int]]
) -> None:
    image = make(tmp_path / "disk.qcow2", "defaults", "b0")
    with NbdimgServer(image) as server:
        io(server, "write -q 1M 64k", "write -q 7M 64k")
    copy = Path(shutil.copy(image, tmp_path / "copy.qcow2"))
    command = [sys.executable, "-m", "nbdimg", "resize", "--shrink", str(image), size]
    subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)
    qemu_img("resize", "-q", "--shrink", "-f", "qcow2", copy, size)
    qemu_img("check", image)
    with qemu_nbd(copy, "b0", "-r") as server:
        by_qemu = dirty(server, "b0")
    if added:
        assert by_qemu.pop() == (7 * MIB + 65536, 9 * MIB - 65536, 0)
        by_qemu.append((7 * MIB + 65536, MIB - 65536, 0))
    with qemu_nbd(image, "b0", "-r") as server:
        assert dirty(server, "b0") == by_qemu + added
