"""A qcow2 image with a model of its guest's bytes and of those of its snapshots, changed by us and by QEMU in turn."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

from nbdimg.formats import open_image
from nbdimg.formats.gate import DenyGate
from nbdimg.formats.options import OpenOptions
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.formats.qcow2.open import open_driver
from nbdimg.formats.qcow2.snapshot_changes import apply_snapshot, create_snapshot, delete_snapshot
from nbdimg.formats.qcow2.snapshots import Snapshot
from nbdimg.image.image import Image
from nbdimg.storage.file import BlockFile
from nbdimg.storage.posix import PosixFile
from nbdimg.units import KiB, MiB
from tests.support.qcow2edit import qemu_check, qemu_img, qemu_io

SIZE = 1 * MiB + 3 * KiB
NOW_NS = 1_700_000_000_123_456_789


class Disk:
    """An image, the bytes that its guest must see, and those of each snapshot."""

    def __init__(self, path: Path, active: bytes) -> None:
        self.path = path
        self.active = bytearray(active)
        self.snapshots: dict[str, bytes] = {}

    @classmethod
    def made(cls, path: Path, options: str, size: int = SIZE) -> Disk:
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(size))
        return cls(path, bytes(size))

    @classmethod
    def compressed(cls, path: Path, kind: str) -> Disk:
        content = b"".join(bytes([index % 251]) * 700 + bytes(range(256)) for index in range(900)).ljust(SIZE, b"\0")
        raw = path.with_suffix(".src")
        raw.write_bytes(content)
        options = f"cluster_size=4k,compression_type={kind}"
        qemu_img("convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
        return cls(path, content)

    @classmethod
    def backed(cls, path: Path) -> Disk:
        base = path.with_suffix(".base")
        content = random.Random("base").randbytes(SIZE // 2).ljust(SIZE, b"\0")
        base.write_bytes(content[: SIZE // 2])
        options = f"cluster_size=4k,backing_file={base.name},backing_fmt=raw"
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(SIZE))
        return cls(path, content)

    # What changes it

    async def guest(self, image: Image, rng: random.Random, count: int) -> None:
        """`count` requests of ours to the open image."""
        for _ in range(count):
            offset = rng.randrange(len(self.active))
            length = min(rng.choice((1, 512, 5000, 70_000)), len(self.active) - offset)
            choice = rng.random()
            if choice < 0.6:
                data = rng.randbytes(length)
                await image.write(offset, memoryview(data))
                self.active[offset : offset + length] = data
            else:
                await image.zero(offset, length, may_unmap=choice < 0.9, is_fast_only=False)
                self.active[offset : offset + length] = bytes(length)

    def write_ours(self, seed: object, count: int = 8) -> None:
        async def write() -> None:
            image = await open_image(self.path, format="qcow2")
            try:
                await self.guest(image, random.Random(f"{seed}"), count)
            finally:
                await image.close()

        asyncio.run(write())

    def write_qemu(self, pattern: int, offset: int, length: int) -> None:
        qemu_io(self.path, f"write -q -P {pattern} {offset} {length}")
        self.active[offset : offset + length] = bytes([pattern]) * length

    def resize(self, size: int) -> None:
        qemu_img("resize", "-q", "--shrink", "-f", "qcow2", self.path, str(size))
        self.active = bytearray(self.active[:size].ljust(size, b"\0"))

    def create(self, name: str) -> Snapshot:
        made = change(self.path, lambda driver: create_snapshot(driver, name, now_ns=NOW_NS))
        self.snapshots[name] = bytes(self.active)
        return made

    def apply(self, name: str) -> None:
        change(self.path, lambda driver: apply_snapshot(driver, name))
        self.active = bytearray(self.snapshots[name])

    def delete(self, name: str) -> None:
        change(self.path, lambda driver: delete_snapshot(driver, name))
        del self.snapshots[name]

    def create_qemu(self, name: str) -> None:
        qemu_img("snapshot", "-c", name, self.path)
        self.snapshots[name] = bytes(self.active)

    def apply_qemu(self, name: str) -> None:
        qemu_img("snapshot", "-a", name, self.path)
        self.active = bytearray(self.snapshots[name])

    def delete_qemu(self, name: str) -> None:
        qemu_img("snapshot", "-d", name, self.path)
        del self.snapshots[name]

    # What QEMU sees

    def verify(self) -> None:
        assert listed(self.path) == list(self.snapshots)
        found = qemu_check(self.path)
        assert (found.exit_status, found.leaks, found.corruptions) == (0, 0, 0), found
        assert self.read() == self.active
        for name, content in self.snapshots.items():
            length = min(len(content), len(self.active))
            assert self.read("-l", f"snapshot.name={name}")[:length] == content[:length], name

    def read(self, *arguments: str) -> bytes:
        """Through qemu-img, which gives a snapshot the disk's present size."""
        raw = self.path.with_suffix(".raw")
        qemu_img("convert", "-q", "-f", "qcow2", "-O", "raw", *arguments, self.path, raw)
        return raw.read_bytes()


def listed(path: Path) -> list[str]:
    """Names, as qemu-img gives them."""
    said = json.loads(qemu_img("info", "--output=json", path).stdout)
    return [each["name"] for each in said.get("snapshots", [])]


async def opened(file: BlockFile) -> Qcow2Driver:
    return await open_driver(file, OpenOptions(DenyGate(), writable=True))


def change(path: Path, action: Callable[[Qcow2Driver], Awaitable[Snapshot]]) -> Snapshot:
    """As the command does it: the top driver alone."""

    async def run() -> Snapshot:
        file = PosixFile(path, writable=True)
        try:
            driver = await opened(file)
            done = await action(driver)
            await driver.close()
            return done
        finally:
            await file.close()

    return asyncio.run(run())


def driver_of(image: Image) -> Qcow2Driver:
    assert isinstance(image.driver, Qcow2Driver)
    return image.driver
