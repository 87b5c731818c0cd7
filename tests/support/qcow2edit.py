"""Fields of a qcow2 image read and changed by the format's literal offsets, and images made by qemu's own tools.

Nothing of the code under test is used here. Refcounts are those of 16 bits, L2 entries those of 8 bytes, unless said.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.lukstime import hurried
from tests.support.peers import require_program

COPIED = 1 << 63
COMPRESSED = 1 << 62
SECRET = "secret,id=s,data=key"
"""Of encrypted images."""
OFFSET = 0x00FF_FFFF_FFFF_FE00


LUKS_ATTEMPTS = 20
"""Where it is not `hurried`, `qemu-img create` of a LUKS image ends with "Unable to get accurate CPU usage" now and
then on a shared machine, and five times in a row once.
"""


def qemu_img(*arguments: str | Path, ok: Sequence[int] = (0,)) -> subprocess.CompletedProcess[str]:
    """Run it; any exit status outside `ok` fails the test."""
    command = [require_program("qemu-img"), *map(str, arguments)]
    for _ in range(LUKS_ATTEMPTS):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **hurried()})
        if "accurate CPU usage" not in done.stderr:
            break
    assert done.returncode in ok, f"{command}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def qemu_io(image: str | Path, *commands: str, options: Sequence[str] = ()) -> None:
    """Run commands of qemu-io one after the other on an image."""
    arguments = [each for command in commands for each in ("-c", command)]
    command = [require_program("qemu-io"), *options, *arguments, str(image)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def with_secret(path: str | Path) -> tuple[str, ...]:
    """How qemu's tools are told of an encrypted image; the image itself comes last."""
    return ("--object", SECRET, "--image-opts", f"driver=qcow2,file.filename={path},encrypt.key-secret=s")


def make_luks(path: str | Path, size: int, *writes: str, options: str = "cluster_size=16k") -> tuple[str, ...]:
    """An image encrypted with SECRET, and commands of qemu-io on it. Returns `with_secret` of it."""
    luks = f"encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,{options}"
    qemu_img("create", "-q", "--object", SECRET, "-f", "qcow2", "-o", luks, path, str(size))
    named = with_secret(path)
    qemu_io(named[-1], *writes, options=named[:-1])
    return named


@dataclass(frozen=True, slots=True)
class QemuReport:
    """What `qemu-img check` says; all numbers are 0 when it could not open the image."""

    exit_status: int
    leaks: int = 0
    corruptions: int = 0
    allocated_clusters: int = 0
    total_clusters: int = 0
    compressed_clusters: int = 0
    fragmented_clusters: int = 0
    image_end_offset: int = 0


def qemu_check(path: Path) -> QemuReport:
    image: tuple[str | Path, ...] = ("-f", "qcow2", path)
    with path.open("rb") as file:
        if file.read(36)[32:] == b"\0\0\0\2":
            image = with_secret(path)
    done = qemu_img("check", "--output=json", *image, ok=(0, 1, 2, 3))
    if not done.stdout.strip():
        return QemuReport(done.returncode)
    said = json.loads(done.stdout)
    return QemuReport(
        done.returncode,
        said.get("leaks", 0),
        said.get("corruptions", 0),
        said.get("allocated-clusters", 0),
        said.get("total-clusters", 0),
        said.get("compressed-clusters", 0),
        said.get("fragmented-clusters", 0),
        said.get("image-end-offset", 0),
    )


class Edit:
    """An image file open for pokes: every call reads or writes the file at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, offset: int, length: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def write(self, offset: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def get(self, offset: int, width: int = 8) -> int:
        return int.from_bytes(self.read(offset, width), "big")

    def put(self, offset: int, value: int, width: int = 8) -> None:
        self.write(offset, value.to_bytes(width, "big"))

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def cluster_size(self) -> int:
        return 1 << self.get(20, 4)

    @property
    def l1(self) -> int:
        return self.get(40)

    @property
    def refcount_table(self) -> int:
        return self.get(48)

    @property
    def snapshots(self) -> int:
        return self.get(64)

    def l2(self, index: int = 0) -> int:
        return self.get(self.l1 + 8 * index) & OFFSET

    def entry(self, index: int) -> int:
        """Where an entry of the first L2 table is."""
        return self.l2() + 8 * index

    def block(self, index: int = 0) -> int:
        return self.get(self.refcount_table + 8 * index) & OFFSET

    def refcount(self, host_offset: int) -> int:
        """Where the refcount of a cluster is, in the first block."""
        return self.block() + 2 * (host_offset // self.cluster_size)

    def extension(self, kind: int) -> int:
        """Where the data of a version 3 header extension begins."""
        offset = self.get(100, 4)
        while True:
            found, length = struct.unpack(">II", self.read(offset, 8))
            if found == kind:
                return offset + 8
            assert found, f"{self.path} has no header extension {kind:#x}"
            offset += 8 + (length + 7) // 8 * 8
