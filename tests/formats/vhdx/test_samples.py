"""The samples of tests/data/vhdx give what its README says, and are left as they are by a read-only opening."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import os
import struct
from pathlib import Path

import pytest

from nbdimg.formats import open_image
from nbdimg.image.image import Image
from tests.formats.vhdx.craft import K, M
from tests.interop.samples import file_extents
from tests.support.reading import bytes_of

DATA = Path(__file__).parents[2] / "data" / "vhdx"
PIECE = 8 * M

SUMS = {
    "swap": (10 << 30, "60dd30b4c74361427d1089510cabb36e2eeda0cc4747f467ea43173acd358c49"),
    "vhdx-log-replay": (1 << 30, "3ba3b309425b7ff5e8e0199edceed95226250f880c53b24e8eae93865f3fad5e"),
    "parent": (64 * M, "3f233a42e3530cc09cdaad19376c1ced0a69981382f04b2c953d2fef2fd2c49e"),
    "child": (64 * M, "535dd27baa982a7d90bcb60a40e4af95b93c511186bc72e92ae3d65ca1c4569e"),
    "k4": (0, "3b8673f06e00cd0a8a1ba71db7a68b27f7e55576df09a21d76830c081fc90489"),
}
"""Size of the disk, where the README says it, and its SHA-256."""


def unpack(name: str, directory: Path) -> Path:
    """Sparse where it is empty."""
    path = directory / f"{name}.vhdx"
    with gzip.open(DATA / f"{name}.vhdx.gz") as packed, path.open("wb") as file:
        while piece := packed.read(M):
            if any(piece):
                file.write(piece)
            else:
                file.seek(len(piece), os.SEEK_CUR)
        file.truncate(file.tell())
    return path


def digest(path: Path) -> str:
    """Holes are not read: of a large file that would take most of the time."""
    found = hashlib.sha256()
    zeroes = bytes(PIECE)
    with path.open("rb") as file:
        for offset, length, is_data in file_extents(path):
            for start in range(offset, offset + length, PIECE):
                count = min(PIECE, offset + length - start)
                found.update(os.pread(file.fileno(), count, start) if is_data else zeroes[:count])
    return found.hexdigest()


async def disk_digest(image: Image) -> str:
    """Over all of it; holes are not looked at piece by piece."""
    found = hashlib.sha256()
    zeroes = bytes(PIECE)
    offset = 0
    while offset < image.size:
        (extent,) = await image.map(offset, image.size - offset, 1)
        if extent.kind.value == "zero":
            for start in range(0, extent.length, PIECE):
                found.update(zeroes[: extent.length - start])
            offset = extent.stop
        else:
            length = min(PIECE, extent.length)
            found.update(await bytes_of(image, offset, length))
            offset += length
    return found.hexdigest()


@pytest.mark.parametrize("name", SUMS)
def test_sample_reads_as_its_sum_says_and_is_left_alone(tmp_path: Path, name: str) -> None:
    path = unpack(name, tmp_path)
    if name == "child":
        unpack("parent", tmp_path)
    before = digest(path)
    size, expected = SUMS[name]

    async def main() -> None:
        image = await open_image(path, writable=False)
        assert size in (0, image.size)
        assert await disk_digest(image) == expected
        await image.close()

    asyncio.run(main())
    assert digest(path) == before


@pytest.mark.parametrize("name", ["vhdx-log-replay", "d2"])
def test_sample_with_a_log_in_use_reads_the_same_once_it_is_replayed_in_the_file(tmp_path: Path, name: str) -> None:
    path = unpack(name, tmp_path)

    async def main(*, writable: bool) -> str:
        image = await open_image(path, writable=writable)
        try:
            return await disk_digest(image)
        finally:
            await image.close()

    before = asyncio.run(main(writable=False))
    assert asyncio.run(main(writable=True)) == before
    assert asyncio.run(main(writable=False)) == before


def test_block_whose_entry_is_in_the_log_alone_is_found(tmp_path: Path) -> None:
    path = unpack("d2", tmp_path)

    async def main() -> bytes:
        image = await open_image(path, writable=False)
        try:
            return await bytes_of(image, 0, 128 * K)
        finally:
            await image.close()

    assert asyncio.run(main()) == b"\xa5" * (64 * K) + bytes(64 * K)


def bat_of(path: Path) -> tuple[int, ...]:
    """The first 2048 entries; the region is found by its GUID's first bytes in the first region table."""
    content = path.read_bytes()
    at = content.index(bytes.fromhex("66 77 C2 2D"), 192 * K)
    (offset,) = struct.unpack_from("<Q", content, at + 16)
    return struct.unpack_from("<2048Q", content, offset)


@pytest.mark.parametrize(
    ("name", "changed"),
    [("w0", {0}), ("w2", {1, 2}), ("w5", {1}), ("w9", set(range(1536)))],
)
def test_replay_of_a_crafted_log_changes_these_entries_alone(tmp_path: Path, name: str, changed: set[int]) -> None:
    path = unpack(name, tmp_path)
    before = bat_of(path)

    async def main() -> None:
        image = await open_image(path)
        await image.close()

    asyncio.run(main())
    after = bat_of(path)
    assert {index for index in range(2048) if before[index] != after[index]} <= changed
    match name:
        case "w0":
            assert after[0] & ~0xFFFFF == 8 * M
        case "w2":
            assert before[1] != after[1]
            assert before[2] != after[2]
        case "w5":
            assert before[1] != after[1]
        case _:
            assert after[:1024] == (0,) * 1024
            assert after[1024] & ~0xFFFFF == 16 * M
