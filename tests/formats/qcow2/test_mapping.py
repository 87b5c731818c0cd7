"""What each kind of entry maps to, at literal values, and what changes write into the tables."""

from __future__ import annotations

import asyncio
import struct
import subprocess
from array import array
from pathlib import Path

import pytest

from nbdimg.formats import open_file
from nbdimg.formats.options import OpenOptions
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.formats.qcow2.mapping import L1_WALK_MAX
from nbdimg.image.driver import Extent, Miss, Unmap
from nbdimg.image.image import Image
from tests.support.qcow2mutants import AnyGate, BoundedFile
from tests.support.reading import bytes_of

CLUSTER = 4096
L2 = 0x4000
COPIED = 1 << 63
COMPRESSED = 1 << 62
SIZE = 64 << 10


def base(directory: Path, options: str, *more: str, end: str = "64k") -> bytes:
    """An image whose first data cluster is written, so that its L2 table is there."""
    path = directory / "image"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *more, str(path), end]
    subprocess.run(create, cwd=directory, check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q 0 4k", str(path)], cwd=directory, check=True)
    return path.read_bytes()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return base(tmp_path_factory.mktemp("plain"), "cluster_size=4k")


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = tmp_path_factory.mktemp("overlay")
    (directory / "base").write_bytes(bytes(SIZE))
    return base(directory, "cluster_size=4k", "-b", "base", "-F", "raw")


@pytest.fixture(scope="module")
def subclusters(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return base(tmp_path_factory.mktemp("subclusters"), "cluster_size=16k,extended_l2=on")


def with_entries(content: bytes, *entries: int, at: int = L2) -> bytes:
    packed = struct.pack(f">{len(entries)}Q", *entries)
    return content[:at] + packed + content[at + len(packed) :]


async def opened(content: bytes, *, writable: bool = True) -> tuple[Image, Qcow2Driver, BoundedFile]:
    file = BoundedFile(content, writable=writable)
    image = await open_file(file, "qcow2", OpenOptions(AnyGate(b"B" * SIZE), writable=writable))
    assert isinstance(image.driver, Qcow2Driver)
    return image, image.driver, file


async def mapped(driver: Qcow2Driver, offset: int, stop: int) -> Extent:
    while isinstance(answer := driver.map(offset, stop), Miss):
        await answer.load()
    return answer


Row = tuple[str, int, int, int, bool]
"""(kind, offset, length, file offset, writable)."""


def rows(content: bytes, count: int, *, writable: bool = True, step: int = CLUSTER) -> list[Row]:
    async def main() -> list[Row]:
        _, driver, _ = await opened(content, writable=writable)
        found, offset = [], 0
        while offset < count * step:
            extent = await mapped(driver, offset, count * step)
            assert extent.offset == offset
            found.append((extent.kind.value, extent.offset, extent.length, extent.file_offset, extent.writable))
            offset = extent.stop
        return found

    return asyncio.run(main())


def test_entries_of_each_kind_map_to_what_they_say(plain: bytes) -> None:
    content = with_entries(
        plain, COPIED | 0x9000, COPIED | 0xA000, 0xB000, 0xC000, COPIED | 0xD000, 0, 0, 1, 0xE001, COMPRESSED | 0xF123
    )
    assert rows(content, 10) == [
        ("data", 0, 8192, 0x9000, True),
        ("data", 8192, 8192, 0xB000, False),
        ("data", 16384, 4096, 0xD000, True),
        ("zero", 20480, 8192, 0, False),
        ("zero", 28672, 8192, 0, False),
        ("compressed", 36864, 4096, 0xF123 << 64 | 36864, False),
    ]


def test_unallocated_entries_of_an_overlay_are_the_backings_and_zero_entries_are_not(overlay: bytes) -> None:
    content = with_entries(overlay, 0, 0, 1, COPIED | 0x9001, 0)
    assert rows(content, 5) == [
        ("backing", 0, 8192, 0, False),
        ("zero", 8192, 8192, 0, False),
        ("backing", 16384, 4096, 0, False),
    ]


def test_read_only_image_maps_nothing_writable(plain: bytes) -> None:
    content = with_entries(plain, COPIED | 0x9000, COPIED | 0xA000)
    assert rows(content, 2, writable=False) == [("data", 0, 8192, 0x9000, False)]


def test_map_looks_no_further_than_it_is_asked_to(plain: bytes) -> None:
    content = with_entries(plain, *(COPIED | 0x9000 + n * CLUSTER for n in range(8)))

    async def main() -> list[int]:
        _, driver, _ = await opened(content)
        return [(await mapped(driver, 5000, stop)).stop for stop in (5001, 8192, 8193, 20000)]

    assert asyncio.run(main()) == [8192, 8192, 12288, 20480]


@pytest.mark.parametrize("change", ["map", "unmap"])
def test_answer_looks_at_a_bounded_number_of_empty_l1_entries(plain: bytes, change: str) -> None:
    async def main() -> int:
        _, driver, _ = await opened(plain)
        mapping, table_size = driver.mapping, CLUSTER // 8 * CLUSTER
        mapping.l1.entries = array("Q", bytes(8 * 3 * L1_WALK_MAX))
        mapping.size = driver.size = 3 * L1_WALK_MAX * table_size
        if change == "map":
            return (await mapped(driver, 0, driver.size)).stop // table_size
        stop = driver.unmap(0, driver.size, Unmap.TRIM)
        assert isinstance(stop, int)
        return stop // table_size

    assert asyncio.run(main()) == L1_WALK_MAX


def test_extended_entries_map_subcluster_by_subcluster(subclusters: bytes) -> None:
    """Of 16 KiB, 32 subclusters of 512 bytes: 0 and 1 data, 2 zero, 3 unallocated, 4 to 31 data and on."""
    first = 0xFFFF_FFF3 | 0x4 << 32
    content = with_entries(
        subclusters,
        COPIED | 0x14000,
        first,
        COPIED | 0x18000,
        0x1,
        0,
        0xFFFF_FFFF << 32,
        COMPRESSED | 0x1C123,
        0,
        at=0x10000,
    )
    assert rows(content, 4, step=16384) == [
        ("data", 0, 1024, 0x14000, True),
        ("zero", 1024, 512, 0, False),
        ("zero", 1536, 512, 0, False),
        ("data", 2048, 14336 + 512, 0x14800, True),
        ("zero", 16896, 15872, 0, False),
        ("zero", 32768, 16384, 0, False),
        ("compressed", 49152, 16384, 0x1C123 << 64 | 49152, False),
    ]


async def changed(image: Image, driver: Qcow2Driver, offset: int, stop: int, to: Unmap) -> int:
    while isinstance(answer := driver.unmap(offset, stop, to), Miss):
        await answer.load()
    image.gate.changed()
    return answer


BEFORE = (COPIED | 0x9000, COPIED | 0x9001, 1, 0, 0x9000)


@pytest.mark.parametrize(
    ("kind", "to", "after"),
    [
        ("plain", Unmap.TRIM, (0, 0, 1, 0, 0)),
        ("plain", Unmap.ZERO, (0, 0, 1, 0, 0)),
        ("plain", Unmap.KEEP, (COPIED | 0x9001, COPIED | 0x9001, 1, 0, 1)),
        ("overlay", Unmap.TRIM, (1, 1, 1, 1, 1)),
        ("overlay", Unmap.ZERO, (1, 1, 1, 1, 1)),
        ("overlay", Unmap.KEEP, (COPIED | 0x9001, COPIED | 0x9001, 1, 1, 1)),
    ],
)
def test_unmap_leaves_entries_that_read_as_zeroes(
    plain: bytes, overlay: bytes, kind: str, to: Unmap, after: tuple[int, ...]
) -> None:
    """Each kind of entry by itself; cluster 9 is counted often enough to lose a reference."""
    source = plain if kind == "plain" else overlay
    refcounts = 0x2000 + 2 * 9
    for before, expected in zip(BEFORE, after, strict=True):
        content = with_entries(source, before).ljust(0xA000, b"\xee")
        content = content[:refcounts] + b"\0\1" + content[refcounts + 2 :]

        async def main(content: bytes = content) -> bytes:
            image, driver, file = await opened(content)
            assert await changed(image, driver, 0, CLUSTER, to) == CLUSTER
            view = memoryview(bytearray(b"\xaa" * CLUSTER))
            (segment,) = await image.read(0, view)
            assert segment.is_hole
            await image.close()
            return bytes(file.content)

        done = asyncio.run(main())
        assert struct.unpack_from(">Q", done, L2) == (expected,), f"{before:#x} became {done[L2 : L2 + 8].hex()}"


@pytest.mark.parametrize("how", ["write", "fast write", "zero", "keep", "trim"])
def test_what_was_seen_behind_a_cluster_is_not_seen_once_it_has_changed(overlay: bytes, how: str) -> None:
    start, stop = 4 * CLUSTER, 7 * CLUSTER
    middle = start + CLUSTER

    async def main() -> None:
        image, _, _ = await opened(overlay)
        await image.write(8 * CLUSTER, b"B" * CLUSTER)
        assert await bytes_of(image, start, stop - start) == b"B" * 3 * CLUSTER
        if how == "write":
            await image.write(middle, b"x" * CLUSTER)
        elif how == "fast write":
            assert image.try_write(middle, memoryview(b"x" * CLUSTER))
        elif how == "trim":
            await image.trim(middle, CLUSTER)
        else:
            await image.zero(middle, CLUSTER, may_unmap=how == "zero", is_fast_only=False)
        changed = b"x" if "write" in how else b"\0"
        assert await bytes_of(image, start, stop - start) == b"B" * CLUSTER + changed * CLUSTER + b"B" * CLUSTER

    asyncio.run(main())


def test_overwritten_zero_cluster_with_a_place_is_written_there(plain: bytes) -> None:
    refcounts = 0x2000 + 2 * 9
    content = with_entries(plain, COPIED | 0x9001).ljust(0xA000, b"\xee")
    content = content[:refcounts] + b"\0\1" + content[refcounts + 2 :]

    async def main() -> None:
        image, _, file = await opened(content)
        await image.write(100, b"new")
        await image.close()
        assert struct.unpack_from(">Q", file.content, L2) == (COPIED | 0x9000,)
        assert file.content[0x9000:0xA000] == bytes(100) + b"new" + bytes(CLUSTER - 103)

    asyncio.run(main())


def test_cluster_without_copied_is_copied_and_loses_one_reference(plain: bytes) -> None:
    refcounts = 0x2000 + 2 * 9
    content = with_entries(plain, 0x9000).ljust(0xA000, b"\xee")
    content = content[:refcounts] + b"\0\2" + content[refcounts + 2 :]

    async def main() -> None:
        image, _, file = await opened(content)
        await image.write(100, b"new")
        await image.close()
        (entry,) = struct.unpack_from(">Q", file.content, L2)
        host = entry & ~COPIED
        assert entry & COPIED
        assert host != 0x9000
        assert file.content[host : host + CLUSTER] == b"\xee" * 100 + b"new" + b"\xee" * (CLUSTER - 103)
        assert file.content[0x9000:0xA000] == b"\xee" * CLUSTER
        assert file.content[refcounts : refcounts + 2] == b"\0\1"

    asyncio.run(main())


def test_l2_table_without_copied_is_copied_whole_before_it_changes(plain: bytes) -> None:
    """M1: a snapshot may still use it."""
    content = bytearray(with_entries(plain, COPIED | 0x5000))
    content[0x3000:0x3008] = struct.pack(">Q", L2)
    content[0x2000 + 2 * 4 : 0x2000 + 2 * 5] = b"\0\2"

    async def main() -> None:
        image, _, file = await opened(bytes(content))
        await image.write(CLUSTER, b"x" * CLUSTER)
        await image.close()
        (l1,) = struct.unpack_from(">Q", file.content, 0x3000)
        assert l1 & COPIED
        assert l1 & ~COPIED != L2
        assert file.content[L2 : L2 + CLUSTER] == content[L2 : L2 + CLUSTER], "the shared table was written"
        assert struct.unpack_from(">Q", file.content, l1 & ~COPIED) == (COPIED | 0x5000,)
        assert file.content[0x2008:0x200A] == b"\0\1"

    asyncio.run(main())
