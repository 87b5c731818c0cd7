"""qcow2 keeps the contract of every format, in each of its forms; images are made by qemu-img."""

from __future__ import annotations

import asyncio
import struct
import subprocess
from pathlib import Path

import pytest

from nbdimg.errors import ImageError
from nbdimg.formats import open_image
from nbdimg.image.driver import ExtentKind
from tests.formats.contract import DriverContract


def qemu(*arguments: str | Path) -> str:
    done = subprocess.run([str(each) for each in arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Qcow2Contract(DriverContract):
    format = "qcow2"
    options: str

    @property
    def size(self) -> int:
        """QEMU's sizes are whole sectors."""
        return 9 * self.cluster_size + max(512, self.cluster_size // 3 // 512 * 512)

    def convert(self, path: Path, guest: bytes, *arguments: str) -> None:
        raw = path.with_suffix(".raw")
        raw.write_bytes(guest)
        qemu("qemu-img", "convert", "-S", "512", "-f", "raw", "-O", "qcow2", "-o", self.options, *arguments, raw, path)
        raw.unlink()

    def make(self, path: Path, guest: bytes) -> None:
        self.convert(path, guest)

    @pytest.fixture(autouse=True)
    def checked(self, path: Path, request: pytest.FixtureRequest) -> object:
        """Whatever a test has done, `qemu-img check` finds nothing afterwards."""
        yield
        if "cut_short" not in request.node.name:
            qemu("qemu-img", "check", "-q", path)


class TestVersion3(Qcow2Contract):
    cluster_size = 64 << 10
    options = "cluster_size=64k"


class TestSmallestClusters(Qcow2Contract):
    cluster_size = 512
    options = "cluster_size=512,refcount_bits=64"


class TestVersion2(Qcow2Contract):
    cluster_size = 4096
    options = "compat=0.10,cluster_size=4k"


class TestSubclusters(Qcow2Contract):
    cluster_size = 16 << 10
    options = "cluster_size=16k,extended_l2=on"


class TestLazyRefcounts(Qcow2Contract):
    cluster_size = 4096
    options = "cluster_size=4k,lazy_refcounts=on,refcount_bits=1"


class TestCompressed(Qcow2Contract):
    cluster_size = 64 << 10
    options = "cluster_size=64k"
    stored = ExtentKind.COMPRESSED
    locates = False

    def guest(self) -> bytes:
        """Compressible, and no cluster like another."""
        size = self.cluster_size
        parts = [
            bytes([n + 1]) * 200 + bytes([n]) * (size - 200) if n in (1, 2, 4, 7, 9) else bytes(size) for n in range(10)
        ]
        return b"".join(parts)[: self.size]

    def make(self, path: Path, guest: bytes) -> None:
        self.convert(path, guest, "-c")


class TestCompressedZstd(TestCompressed):
    cluster_size = 4096
    options = "cluster_size=4k,compression_type=zstd"


class TestDataFile(Qcow2Contract):
    cluster_size = 16 << 10

    def make(self, path: Path, guest: bytes) -> None:
        self.options = f"cluster_size=16k,data_file={path.with_suffix('.data')}"
        self.convert(path, guest)


class TestRawDataFile(Qcow2Contract):
    cluster_size = 16 << 10

    def make(self, path: Path, guest: bytes) -> None:
        self.options = f"cluster_size=16k,data_file={path.with_suffix('.data')},data_file_raw=on"
        raw = path.with_suffix(".raw")
        raw.write_bytes(guest)
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", self.options, path, str(len(guest)))
        qemu("qemu-io", "-f", "qcow2", "-c", f"write -q -s {raw} 0 {len(guest)}", path)
        for n in (2, 3, 5, 6, 8):
            qemu("qemu-io", "-f", "qcow2", "-c", f"write -q -z {n * self.cluster_size} {self.cluster_size}", path)


class OverlayContract(Qcow2Contract):
    """The backing file holds the beginning of the guest's bytes, the overlay the rest."""

    cluster_size = 4096
    options = "cluster_size=4k"
    backing_size: int
    backing_format = "raw"

    def make(self, path: Path, guest: bytes) -> None:
        raw, base = path.with_suffix(".raw"), path.with_suffix(".base")
        content = guest[: self.backing_size].ljust(self.backing_size, b"\xcc")
        raw.write_bytes(content)
        holes = ("-o", self.options) if self.backing_format == "qcow2" else ()
        qemu("qemu-img", "convert", "-f", "raw", "-O", self.backing_format, *holes, raw, base)
        more = ("-b", base.name, "-F", self.backing_format)
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", self.options, *more, path, str(len(guest)))
        rest = len(guest) - self.backing_size
        if rest > 0:
            raw.write_bytes(guest[self.backing_size :])
            qemu("qemu-io", "-f", "qcow2", "-c", f"write -q -s {raw} {self.backing_size} {rest}", path)


class TestOverlayOfShorterRaw(OverlayContract):
    backing_size = 3 * 4096 + 1024


class TestOverlayOfLongerRaw(OverlayContract):
    """Nothing lies in the overlay."""

    backing_size = 20 * 4096
    locates = False


class TestOverlayOfLongerQcow2(TestOverlayOfLongerRaw):
    backing_format = "qcow2"


class TestVersion2Overlay(OverlayContract):
    backing_size = 5 * 4096 + 512
    options = "compat=0.10,cluster_size=4k"


class TestSubclusterOverlay(OverlayContract):
    cluster_size = 16 << 10
    backing_size = 5 * (16 << 10) + 1536
    options = "cluster_size=16k,extended_l2=on"


def structures(content: bytes) -> list[int]:
    """Where the header, its extensions, and each table of a small image begin. Spec: qcow2.rst "Header"."""
    bits, l1_size, l1 = struct.unpack_from(">I", content, 20)[0], *struct.unpack_from(">IQ", content, 36)
    table, clusters = struct.unpack_from(">QI", content, 48)
    blocks = struct.unpack_from(">4Q", content, table)
    l2 = [entry & 0x00FF_FFFF_FFFF_FE00 for entry in struct.unpack_from(f">{l1_size}Q", content, l1)]
    return sorted({0, 4, 24, 72, 100, 104, 112, 1 << bits, l1, table, table + (clusters << bits), *blocks, *l2})


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize(
    "options", ["cluster_size=512", "compat=0.10,cluster_size=4k", "cluster_size=16k,extended_l2=on"]
)
def test_file_cut_short_at_every_structure_is_refused_or_read(tmp_path: Path, options: str, writable: bool) -> None:
    path = tmp_path / "disk.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "40k")
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 40k", path)
    whole = path.read_bytes()
    refused = 0

    async def main() -> None:
        image = await open_image(path, format="qcow2", writable=writable)
        try:
            view = memoryview(bytearray(40 << 10))
            await image.read(0, view)
            sevens = bytes(view).count(7)
            assert sevens + bytes(view).count(0) == len(view), "neither data nor zeroes"
        finally:
            await image.driver.abandon()

    for start in structures(whole):
        for length in (start, start + 1, start + 13):
            path.write_bytes(whole[:length])
            try:
                asyncio.run(main())
            except ImageError as error:
                refused += str(error).startswith(str(path))
            if not writable:
                assert path.read_bytes() == whole[:length]
    assert refused > 5
