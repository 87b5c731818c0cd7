"""What every format driver promises, as tests that a format inherits.

A format subclasses `DriverContract`, says how to make an image of known guest bytes, and gets these tests. Drivers that
write to one more place than their guest's own need no other hook.
"""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from pathlib import Path

import pytest

from nbdimg.errors import ImageError, RequestError
from nbdimg.formats import open_image
from nbdimg.image.driver import Extent, ExtentKind, FormatDriver, Miss
from nbdimg.image.image import Image
from nbdimg.storage.file import read
from nbdimg.storage.posix import PosixFile
from tests.support.reading import bytes_of

SEED = 20240607


class DriverContract(ABC):
    """`size` is chosen so that the last cluster is partial, and holds several clusters of data and several holes."""

    format: str
    cluster_size: int
    """What the contract steps over: the format's cluster, or for one without clusters any size."""

    stored: ExtentKind = ExtentKind.DATA
    """What `make` stores guest data as."""

    locates: bool = True
    """Whether `locate` knows some of what `make` stores."""

    @abstractmethod
    def make(self, path: Path, guest: bytes) -> None:
        """Write an image with these guest bytes; runs of zeroes longer than a cluster are to be unallocated."""

    @property
    def size(self) -> int:
        return 9 * self.cluster_size + self.cluster_size // 3 + 5

    def guest(self) -> bytes:
        """Clusters 0, 1, 4, 7 and the partial one at the end hold random data, the others zeroes."""
        generator = random.Random(SEED)
        size = self.cluster_size
        parts = [generator.randbytes(size) if n in (0, 1, 4, 7, 9) else bytes(size) for n in range(10)]
        return b"".join(parts)[: self.size]

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / f"disk.{self.format}"
        self.make(path, self.guest())
        return path

    async def _open(self, path: Path, *, writable: bool = True) -> Image:
        return await open_image(path, format=self.format, writable=writable)

    async def _map(self, driver: FormatDriver, offset: int) -> Extent:
        """Ask, load, ask again; a driver that misses for ever is caught."""
        for _ in range(16):
            extent = driver.map(offset, driver.size)
            if not isinstance(extent, Miss):
                return extent
            await extent.load()
        raise AssertionError(f"{driver.name} still misses what was loaded, at {offset}")

    def offsets(self) -> list[int]:
        """Edges of the first two, a middle, and the last cluster; the end."""
        size = self.cluster_size
        edges = [0, size, 4 * size, 9 * size, self.size]
        return sorted({edge + step for edge in edges for step in (-1, 0, 1) if 0 <= edge + step < self.size})

    def ranges(self) -> list[tuple[int, int]]:
        """(offset, length) that start and end at, before and behind edges: mid-cluster into the next, over several."""
        stops = [*self.offsets(), self.size]
        return [(start, stop - start) for start in self.offsets() for stop in stops if stop > start]

    def test_driver_names_its_size_cluster_and_file(self, path: Path) -> None:
        async def main() -> None:
            image = await self._open(path)
            assert image.driver.name == self.format
            assert image.driver.size == image.size == self.size
            assert image.driver.cluster_size >= 1
            assert image.driver.file.size >= 0
            await image.close()

        asyncio.run(main())

    def test_read_of_every_edge_range_gives_the_guests_bytes(self, path: Path) -> None:
        guest = self.guest()

        async def main() -> None:
            image = await self._open(path)
            for offset, length in self.ranges():
                found = await bytes_of(image, offset, length)
                assert found == guest[offset : offset + length], f"{length} bytes at {offset}"
            await image.close()

        asyncio.run(main())

    def test_flush_of_a_read_only_image_writes_nothing(self, path: Path) -> None:
        """A client may flush what it cannot write: every export says that it takes flushes."""
        before = path.read_bytes()

        async def main() -> None:
            image = await self._open(path, writable=False)
            await image.flush()
            await image.flush()
            await image.close()

        asyncio.run(main())
        assert path.read_bytes() == before

    def test_map_covers_the_image_with_no_gap_and_no_overlap(self, path: Path) -> None:
        guest = self.guest()

        async def main() -> None:
            image = await self._open(path)
            extents = await image.map(0, self.size, extents_max=1000)
            position = 0
            for extent in extents:
                assert extent.offset == position
                assert extent.length > 0
                if extent.kind is ExtentKind.ZERO:
                    assert not any(guest[position : extent.stop])
                else:
                    assert extent.depth >= 1
                position = extent.stop
            assert position == self.size
            assert {extent.kind for extent in extents} == {self.stored, ExtentKind.ZERO}
            await image.close()

        asyncio.run(main())

    def test_map_at_every_edge_holds_the_offset_and_stays_inside(self, path: Path) -> None:
        async def main() -> None:
            image = await self._open(path)
            for offset in self.offsets():
                extent = await self._map(image.driver, offset)
                assert extent.offset <= offset < extent.stop <= self.size
                if extent.kind is ExtentKind.DATA:
                    assert extent.file_offset >= 0
            await image.close()

        asyncio.run(main())

    def test_map_asked_again_gives_the_same_answer(self, path: Path) -> None:
        async def main() -> None:
            image = await self._open(path)
            for offset in self.offsets():
                first = await self._map(image.driver, offset)
                second = await self._map(image.driver, offset)
                start, stop = max(first.offset, second.offset), min(first.stop, second.stop)
                assert start <= offset < stop
                assert first.kind is second.kind
                assert first.file_offset - first.offset == second.file_offset - second.offset
            await image.close()

        asyncio.run(main())

    def test_locate_finds_the_guests_bytes_and_nothing_that_is_not_in_memory(self, path: Path) -> None:
        guest = self.guest()

        async def main() -> None:
            image = await self._open(path)
            driver = image.driver
            assert driver.locate(0, 1) == -1, "no table is in memory yet"
            is_located = False
            for offset, length in self.ranges():
                await self._map(driver, offset)
                at = driver.locate(offset, offset + length)
                if at >= 0:
                    is_located = True
                    assert await read(driver.guest_file, at, length) == guest[offset : offset + length], offset
            assert is_located == self.locates
            await image.close()

        asyncio.run(main())

    def test_zero_length_requests_do_nothing(self, path: Path) -> None:
        async def main() -> None:
            image = await self._open(path)
            for offset in self.offsets():
                assert await image.read(offset, memoryview(bytearray())) == []
                assert await image.map(offset, 0, 10) == []
                await image.write(offset, b"")
                await image.trim(offset, 0)
                await image.zero(offset, 0, may_unmap=True, is_fast_only=False)
            assert await bytes_of(image, 0, self.size) == self.guest()
            await image.close()

        asyncio.run(main())

    def test_write_of_every_edge_range_changes_it_alone(self, path: Path) -> None:
        guest = bytearray(self.guest())
        generator = random.Random(SEED + 1)

        async def main() -> None:
            image = await self._open(path)
            for offset, length in self.ranges():
                data = generator.randbytes(length)
                await image.write(offset, data)
                guest[offset : offset + length] = data
                start, stop = max(0, offset - 3), min(self.size, offset + length + 3)
                assert await bytes_of(image, start, stop - start) == guest[start:stop]
            assert await bytes_of(image, 0, self.size) == guest
            await image.close()
            again = await self._open(path, writable=False)
            assert await bytes_of(again, 0, self.size) == guest
            await again.close()

        asyncio.run(main())

    @pytest.mark.parametrize("may_unmap", [True, False])
    def test_zero_of_every_edge_range_reads_as_zeroes(self, path: Path, may_unmap: bool) -> None:
        guest = bytearray(self.guest())

        async def main() -> None:
            image = await self._open(path)
            for offset, length in self.ranges():
                await image.write(offset, b"\x5a" * length)
                await image.zero(offset, length, may_unmap=may_unmap, is_fast_only=False)
                guest[offset : offset + length] = bytes(length)
                start, stop = max(0, offset - 3), min(self.size, offset + length + 3)
                assert await bytes_of(image, start, stop - start) == guest[start:stop]
            await image.close()

        asyncio.run(main())

    def test_write_beyond_the_last_cluster_edge_keeps_what_lies_before(self, path: Path) -> None:
        """The last cluster is partial: what is written there ends at the image's end."""
        guest = self.guest()

        async def main() -> None:
            image = await self._open(path)
            await image.write(self.size - 1, b"\x77")
            assert await bytes_of(image, 0, self.size) == guest[:-1] + b"\x77"
            extents = await image.map(self.size - 1, 1, 10)
            assert [(extent.offset, extent.length) for extent in extents] == [(self.size - 1, 1)]
            await image.close()

        asyncio.run(main())

    def test_trim_leaves_each_byte_old_or_zero_and_others_alone(self, path: Path) -> None:
        guest = self.guest()

        async def main() -> None:
            image = await self._open(path)
            offset, length = self.cluster_size // 2, 4 * self.cluster_size
            await image.trim(offset, length)
            found = await bytes_of(image, 0, self.size)
            assert found[:offset] == guest[:offset]
            assert found[offset + length :] == guest[offset + length :]
            for old, new in zip(guest[offset : offset + length], found[offset : offset + length], strict=True):
                assert new in (old, 0)
            await image.close()

        asyncio.run(main())

    def test_random_changes_agree_with_a_byte_model_and_survive_reopening(self, path: Path) -> None:
        """The seed is in the assertion's message."""
        model = bytearray(self.guest())
        generator = random.Random(SEED + 2)

        async def main() -> None:
            image = await self._open(path)
            for step in range(200):
                offset = generator.randrange(self.size)
                length = min(generator.choice([1, 7, 512, self.cluster_size]), self.size - offset)
                if generator.random() < 0.5:
                    data = generator.randbytes(length)
                    view = memoryview(data)
                    if not image.try_write(offset, view):
                        await image.write(offset, view)
                else:
                    data = bytes(length)
                    may_unmap = generator.random() < 0.5
                    await image.zero(offset, length, may_unmap=may_unmap, is_fast_only=False)
                model[offset : offset + length] = data
                if step % 20 == 0:
                    await image.flush()
                assert await bytes_of(image, offset, length) == data, f"step {step}, seed {SEED + 2}"
            assert await bytes_of(image, 0, self.size) == model
            await image.close()
            again = await self._open(path)
            assert await bytes_of(again, 0, self.size) == model
            await again.close()

        asyncio.run(main())

    def test_file_cut_short_reads_or_fails_as_io_or_corruption_does(self, path: Path) -> None:
        """After opening, the host cuts the file: reads give zeroes or fail as I/O does, nothing crashes."""

        async def main() -> None:
            image = await self._open(path)
            full = PosixFile(path, writable=True)
            for length in (full.size - 1, full.size // 2, self.cluster_size, 1, 0):
                await full.truncate(length)
                for offset in self.offsets():
                    try:
                        found = await bytes_of(image, offset, 1)
                    except (OSError, ImageError):
                        continue
                    assert len(found) == 1
            await full.close()
            await image.driver.abandon()

        asyncio.run(main())

    def test_read_only_image_maps_nothing_writable(self, path: Path) -> None:
        async def main() -> None:
            image = await self._open(path, writable=False)
            for extent in await image.map(0, self.size, extents_max=1000):
                assert not extent.writable
            for offset in self.offsets():
                place = image.driver.place(offset, self.size)
                assert isinstance(place, Miss) or not place.writable
            assert not image.try_write(0, memoryview(b"x"))
            with pytest.raises(RequestError, match="read-only"):
                await image.write(0, b"x")
            await image.close()

        asyncio.run(main())
