"""VHDX keeps the contract of every format, in each of its forms; images are packed without the code that is tested."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.formats.contract import DriverContract
from tests.formats.vhdx.craft import M
from tests.support.reading import bytes_of
from tests.support.vhdximages import Builder, dynamic, fixed, judge, run


class VhdxContract(DriverContract):
    format = "vhdx"
    cluster_size = M
    sector_size = 512

    @property
    def size(self) -> int:
        """Whole sectors."""
        return 9 * M + M // 3 // self.sector_size * self.sector_size

    def ranges(self) -> list[tuple[int, int]]:
        """The contract's, but for those that only differ in how many whole blocks they hold."""
        found = [each for each in super().ranges() if each[1] <= M + 2]
        return [*found, (M - 1, 3 * M + 2), (0, self.size)]


class QemuReads(VhdxContract):
    @pytest.fixture(autouse=True)
    def checked(self, path: Path, request: pytest.FixtureRequest) -> object:
        """Whatever a test has done, qemu-img finds nothing wrong, and reads the bytes that nbdimg reads."""
        yield
        if "cut_short" in request.node.name:
            return

        async def main() -> bytes:
            image = await self._open(path, writable=False)
            guest = await bytes_of(image, 0, self.size)
            await image.close()
            return guest

        judge(path, asyncio.run(main()))


class TestDynamic(QemuReads):
    def make(self, path: Path, guest: bytes) -> None:
        path.write_bytes(dynamic(guest))


class TestMadeByQemu(QemuReads):
    def make(self, path: Path, guest: bytes) -> None:
        raw = path.with_suffix(".raw")
        raw.write_bytes(guest)
        options = "block_size=1M,block_state_zero=off"
        run("qemu-img", "convert", "-f", "raw", "-O", "vhdx", "-o", options, raw, path)
        raw.unlink()


class TestFixed(QemuReads):
    def make(self, path: Path, guest: bytes) -> None:
        path.write_bytes(fixed(guest))

    def test_map_covers_the_image_with_no_gap_and_no_overlap(self, path: Path) -> None:
        """All of it is data."""

        async def main() -> None:
            image = await self._open(path)
            extents = await image.map(0, self.size, 1000)
            assert [(extent.kind.value, extent.offset, extent.length) for extent in extents] == [("data", 0, self.size)]
            await image.close()

        asyncio.run(main())


class TestLargeSectors(VhdxContract):
    sector_size = 4096

    def make(self, path: Path, guest: bytes) -> None:
        path.write_bytes(dynamic(guest, sector_size=4096))


class ChildContract(VhdxContract):
    parent_size: int

    def make(self, path: Path, guest: bytes) -> None:
        """Blocks 0 and 1 are in both and the child's count, 4 is the parent's, 7 is mixed, the last is the child's."""
        below = bytearray(guest[: self.parent_size].ljust(self.parent_size, b"\x99"))
        below[: 2 * M] = b"\x44" * (2 * M)
        below[9 * M :] = b"\x55" * len(below[9 * M :])
        sectors = ((0, 3), (7, 8), (100, 2048)) if self.sector_size == 512 else ((0, 3), (7, 8), (100, 256))
        for first, stop in sectors:
            start = 7 * M + first * self.sector_size
            length = (stop - first) * self.sector_size
            below[start : min(start + length, len(below))] = b"\x77" * max(0, min(length, len(below) - start))
        (path.parent / "parent.vhdx").write_bytes(dynamic(bytes(below), sector_size=self.sector_size))
        child = Builder(len(guest), sector_size=self.sector_size, parent=".\\parent.vhdx")
        child.add_full(0, guest[:M])
        child.add_full(9, guest[9 * M :])
        child.add_partial(1, guest[M : 2 * M], ((0, M // self.sector_size),))
        mixed = bytearray(b"\xee" * M)
        for first, stop in sectors:
            start, end = first * self.sector_size, stop * self.sector_size
            mixed[start:end] = guest[7 * M + start : 7 * M + end]
        child.add_partial(7, bytes(mixed), sectors)
        if self.parent_size < 5 * M:
            child.add_full(4, guest[4 * M : 5 * M])
            child.add_full(7, guest[7 * M : 8 * M])
        path.write_bytes(child.content)

    @pytest.fixture(autouse=True)
    def unchanged(self, path: Path) -> object:
        parent = path.parent / "parent.vhdx"
        before = parent.read_bytes()
        yield
        assert parent.read_bytes() == before, "the parent was written"


class TestChildOfLongerParent(ChildContract):
    parent_size = 11 * M + 512


class TestChildOfShorterParent(ChildContract):
    parent_size = 3 * M + 512


class TestChildWithLargeSectors(ChildContract):
    sector_size = 4096
    parent_size = 12 * M
