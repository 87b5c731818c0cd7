"""A disk that is full fails the write that does not fit, and nothing else."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.samples import run_ok
from tests.support.peers import require_program
from tests.support.rawclient import connect_negotiated
from tests.support.rawprotocol import KIB, MIB, Command, NbdError
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
