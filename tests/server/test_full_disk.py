"""A disk that is full fails the write that does not fit, and nothing else."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from nbdimg.config import ExportConfig, ServerConfig
from nbdimg.server import overlays
from nbdimg.uri import NbdUri
from tests.interop.samples import run_ok
from tests.server.tls_live import LiveServer
from tests.support.peers import require_program
from tests.support.rawclient import Client, connect_negotiated
from tests.support.rawprotocol import KIB, MIB, Command, NbdError
from tests.support.rss import wait_until
from tests.support.server import NbdimgServer

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="root mounts the disk")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    yield place
    run_ok("umount", place)


@pytest.mark.parametrize("kind", ["qcow2", "vhdx"])
def test_write_that_does_not_fit_leaves_room_for_those_that_do(disk: Path, kind: str) -> None:
    image = disk / f"disk.{kind}"
    qemu_img = require_program("qemu-img")
    options = ["-o", "log_size=1M,block_size=1M"] if kind == "vhdx" else []
    run_ok(qemu_img, "create", "-q", "-f", kind, *options, image, "64M")
    with NbdimgServer(image) as server, connect_negotiated(server.socket_path, "disk") as client:
        assert client.write(0, os.urandom(4 * MIB)).error == NbdError.ENOSPC
        kept = os.urandom(64 * KIB)
        assert client.write(8 * MIB, kept).error == 0
        assert client.request(Command.FLUSH).error == 0
        assert client.read(8 * MIB, len(kept)).data == kept
        client.disconnect()
        server.terminate()
        assert server.wait() == 0, server.stderr()
    raw = disk.parent / "raw"
    run_ok(qemu_img, "convert", "-O", "raw", image, raw)
    assert raw.read_bytes()[8 * MIB : 8 * MIB + len(kept)] == kept


KEPT = os.urandom(64 * KIB)
PATIENCE_S = 30


def serving_kept(disk: Path) -> LiveServer:
    """A golden image whose overlays are kept on the disk."""
    golden = disk.parent / "golden.raw"
    golden.write_bytes(bytes(8 * MIB))
    export = ExportConfig(str(golden), "base", overlay="kept", overlay_directory=str(disk))
    return LiveServer(ServerConfig((export,), listeners=(NbdUri(socket=str(disk.parent / "s")),)))


def connected(server: LiveServer) -> Client:
    return connect_negotiated(server.address, "base@vm1")


def fill(disk: Path) -> Path:
    """A file that takes all the space that there is."""
    path = disk / "filler"
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4 * KIB)):
            pass
    return path


def written_and_left(server: LiveServer, disk: Path) -> Path:
    """A client has written what cannot be flushed, and left; returns what fills the disk."""
    with connected(server) as client:
        assert client.write(MIB, KEPT).error == 0
        filler = fill(disk)
        assert client.request(Command.FLUSH).error == NbdError.ENOSPC
        client.disconnect()
    assert server.has_logged("base@vm1.qcow2: No space left on device: it stays open until it can be flushed")
    return filler


def check_kept(disk: Path) -> None:
    path = disk / "base@vm1.qcow2"
    run_ok(require_program("qemu-img"), "check", "-q", path)
    raw = disk.parent / "kept.raw"
    run_ok(require_program("qemu-img"), "convert", "-O", "raw", path, raw)
    assert raw.read_bytes()[MIB : MIB + len(KEPT)] == KEPT


def test_kept_overlay_that_finds_no_space_for_its_last_flush_is_there_for_the_next_client(disk: Path) -> None:
    with serving_kept(disk) as server:
        filler = written_and_left(server, disk)
        with connected(server) as client:
            assert client.read(MIB, len(KEPT)).data == KEPT
            filler.unlink()
            assert client.request(Command.FLUSH).error == 0
            client.disconnect()
    check_kept(disk)


def test_kept_overlay_that_finds_no_space_for_its_last_flush_is_closed_when_there_is(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlays, "RETRY_S", 0.01)
    with serving_kept(disk) as server:
        written_and_left(server, disk).unlink()
        base = server.service.exports["base"][0]
        assert wait_until(lambda: base.with_overlays == [base], PATIENCE_S)
        check_kept(disk)


def test_kept_overlay_that_finds_no_space_for_its_last_flush_is_flushed_when_the_server_ends(disk: Path) -> None:
    with serving_kept(disk) as server:
        written_and_left(server, disk).unlink()
    check_kept(disk)


def test_kept_overlay_that_never_finds_space_does_not_keep_the_server_from_ending(disk: Path) -> None:
    with serving_kept(disk) as server:
        written_and_left(server, disk)
    assert server.lines[-1].endswith("base@vm1.qcow2: No space left on device")
