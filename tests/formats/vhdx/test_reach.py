"""Files that end before their blocks do: what is new goes behind them, and what was lost never reads as zeroes."""

from __future__ import annotations

import asyncio

import pytest

from nbdimg.errors import CorruptImage
from nbdimg.formats import resize_image
from nbdimg.formats.vhdx.check import check
from nbdimg.image.image import Image
from nbdimg.storage.memory import MemoryFile
from tests.formats.vhdx.craft import M
from tests.formats.vhdx.test_bat import DATA, PARENT, kind_of, opened, parent_of
from tests.support.reading import bytes_of
from tests.support.vhdximages import DATA_OFFSET, FULL, NOT_PRESENT, PARTIAL, UNDEFINED, UNMAPPED, ZERO, Builder

LAST = b"\x44" * M
NEW = b"\x55" * (4 * M)
SHORT = 9 * M
"""A disk of blocks of 4 MiB, of which the last has 1 MiB."""


def short(state: int = FULL) -> bytes:
    """The last block is stored as far as the guest's part and no further; the disk is zero before it."""
    builder = Builder(SHORT, 4 * M, parent=".\\parent.vhdx" if state == PARTIAL else None)
    if state == PARTIAL:
        builder.add_partial(2, LAST, ((0, M // 512),))
    else:
        builder.add_full(2, LAST)
    return bytes(builder.content[: -3 * M])


def content_of(image: Image) -> bytearray:
    file = image.driver.file
    assert isinstance(file, MemoryFile)
    return file.content


async def findings(content: bytes | bytearray) -> int:
    report = await check(MemoryFile(content, "disk.vhdx", writable=False))
    assert report.check_errors == 0
    return report.corruptions


# A short last block


@pytest.mark.parametrize("writable", [False, True])
def test_short_last_block_that_is_stored_as_far_as_the_disk_is_sound(writable: bool) -> None:
    async def main() -> None:
        assert await findings(short()) == 0
        image = await opened(short(), writable=writable)
        assert await bytes_of(image, 0, SHORT) == bytes(8 * M) + LAST
        await image.close()
        assert content_of(image) == short()

    asyncio.run(main())


def test_new_block_lies_behind_the_whole_of_a_short_last_one() -> None:
    """B1: or the trim of the one empties the other."""

    async def main() -> None:
        image = await opened(short(), writable=True)
        await image.write(0, NEW)
        await image.flush()
        (extent,) = await image.map(0, M, 1)
        assert extent.file_offset == DATA_OFFSET + 4 * M
        await image.trim(8 * M, M)
        await image.flush()
        assert await bytes_of(image, 0, SHORT) == NEW + bytes(5 * M)
        await image.close()
        assert await findings(content_of(image)) == 0

    asyncio.run(main())


def test_growth_of_the_disk_zeroes_no_block_behind_a_short_last_one() -> None:
    async def main() -> None:
        image = await opened(short(), writable=True)
        await image.write(0, NEW)
        await resize_image(image, 12 * M)
        assert await bytes_of(image, 0, 12 * M) == NEW + bytes(4 * M) + LAST + bytes(3 * M)
        await image.close()
        assert await findings(content_of(image)) == 0

    asyncio.run(main())


@pytest.mark.parametrize("state", [FULL, PARTIAL])
def test_short_last_block_is_trimmed_and_written_and_its_space_used_again(state: int) -> None:
    """The file grows to the block's end before the space is another's."""

    async def main() -> None:
        parent = parent_of(PARENT)
        image = await opened(short(state), parent, writable=True)
        before = await bytes_of(image, 0, 8 * M)
        (old,) = await image.map(8 * M, M, 1)
        await image.trim(8 * M, M)
        await image.flush()
        await image.write(4 * M, NEW)
        (extent,) = await image.map(4 * M, M, 1)
        assert extent.file_offset == old.file_offset
        await image.write(8 * M + 512, b"x" * 512)
        expected = before[: 4 * M] + NEW + bytes(512) + b"x" * 512 + bytes(M - 1024)
        assert await bytes_of(image, 0, SHORT) == expected
        await image.close()
        assert await findings(content_of(image)) == 0
        assert await bytes_of(await opened(content_of(image), parent), 0, SHORT) == expected

    asyncio.run(main())


def test_sectors_are_added_to_a_short_last_block() -> None:
    builder = Builder(SHORT, 4 * M, parent=".\\parent.vhdx")
    builder.add_partial(2, LAST, ((0, 1),))

    async def main() -> None:
        image = await opened(builder.content[: -3 * M], parent_of(bytes(SHORT)), writable=True)
        await image.write(8 * M + 512, b"x" * 512)
        await image.close()
        again = await opened(content_of(image), parent_of(bytes(SHORT)))
        assert await bytes_of(again, 8 * M, M) == LAST[:512] + b"x" * 512 + bytes(M - 1024)

    asyncio.run(main())


@pytest.mark.parametrize("offset", [40 * M, 200 << 40])
def test_replay_does_not_let_the_file_grow_to_where_only_an_entry_points(offset: int) -> None:
    """What is not there needs no room: a file of 200 TiB would be refused by most file systems."""
    builder = Builder(8 * M)
    builder.add_full(0, DATA)
    builder.set_block(1, offset | UNMAPPED)

    async def main() -> None:
        image = await opened(builder.content, writable=True)
        await image.trim(0, M)
        await image.flush()
        again = await opened(content_of(image), writable=True)
        assert again.driver.file.size == len(builder.content)
        assert await bytes_of(again, 0, 8 * M) == bytes(8 * M)

    asyncio.run(main())


# What was truncated


@pytest.mark.parametrize("length", [1, 512, M])
@pytest.mark.parametrize("kind", ["dynamic", "fixed", "child"])
def test_truncated_block_is_an_error_to_read_and_forbids_to_write(kind: str, length: int) -> None:
    """Once the file had grown again, nothing would tell what was lost from zeroes."""
    builder = kind_of(kind)
    for block in range(3):
        builder.add_full(block, DATA)
    content = bytes(builder.content[:-length])

    async def main() -> None:
        assert await findings(content) == 1
        image = await opened(content, parent_of(PARENT))
        (extent,) = await image.map(0, 8 * M, 1)
        assert (extent.offset, extent.length) == (0, 2 * M)
        assert await bytes_of(image, 0, 2 * M) == DATA * 2
        for offset in (2 * M, 3 * M - 512):
            with pytest.raises(CorruptImage, match=r"BAT entry 2 is 0x0{10}600006, expected .* inside the file's"):
                await bytes_of(image, offset, 512)
        await bytes_of(image, 3 * M, 5 * M)
        with pytest.raises(
            CorruptImage, match=r"entry 2 is 0x0{10}600006, which ends at 7340032, .* only be opened read-only"
        ):
            await opened(content, parent_of(PARENT), writable=True)

    asyncio.run(main())


def test_truncated_short_last_block_is_lost_as_well() -> None:
    async def main() -> None:
        assert await findings(short()[:-512]) == 1
        with pytest.raises(CorruptImage, match=r"BAT entry 2 .* ends at 5242880, expected inside the file's 5242368"):
            await opened(short()[:-512], writable=True)
        image = await opened(short()[:-512])
        with pytest.raises(CorruptImage, match="BAT entry 2"):
            await bytes_of(image, 8 * M, 512)

    asyncio.run(main())


def test_truncated_sector_bitmap_does_not_show_the_parent() -> None:
    builder = kind_of("child")
    offset = builder.append(DATA, M)
    builder.set_block(1, offset | PARTIAL)
    bitmap = builder.append(b"\xff" * 4096, M)
    builder.set_entry(4096, bitmap | FULL)
    content = bytes(builder.content[: -M + 4096])

    async def main() -> None:
        assert await findings(content) == 1
        image = await opened(content, parent_of(PARENT))
        with pytest.raises(CorruptImage, match="BAT entry 4096 is 0x0000000000500006"):
            await bytes_of(image, M, 512)
        assert await bytes_of(image, 0, M) == PARENT[:M]
        with pytest.raises(CorruptImage, match=r"BAT entry 4096 .* \(offset 3178496\)"):
            await opened(content, parent_of(PARENT), writable=True)

    asyncio.run(main())


@pytest.mark.parametrize("index", [32767, 32768, 36872, 36873, 40000])
def test_entry_of_any_piece_of_the_table_is_seen(index: int) -> None:
    """Pieces have 32768 entries; 4096 blocks of 1 MiB are a chunk, so 36872 is the bitmap's of the ninth."""
    builder = Builder(40 * 1024 * M, parent=".\\parent.vhdx")
    builder.set_entry(index, (4 * M) | FULL)

    async def main() -> None:
        with pytest.raises(CorruptImage, match=f"BAT entry {index} .* ends at 5242880"):
            await opened(builder.content, parent_of(PARENT), writable=True)
        await opened(builder.content + bytes(M), parent_of(PARENT), writable=True)

    asyncio.run(main())


@pytest.mark.parametrize(("kind", "index"), [("child", 8), ("child", 4095), ("dynamic", 4096)])
def test_entry_of_no_block_of_the_disk_is_passed_over(kind: str, index: int) -> None:
    """Behind the last block, or of a sector bitmap where there can be none."""
    builder = Builder(4097 * M) if kind == "dynamic" else kind_of(kind)
    builder.set_entry(index, (40 * M) | FULL)

    async def main() -> None:
        assert await findings(builder.content) == 0
        image = await opened(builder.content, parent_of(PARENT), writable=True)
        await image.write(0, DATA)
        (extent,) = await image.map(0, M, 1)
        assert extent.file_offset == DATA_OFFSET
        await image.close()

    asyncio.run(main())


@pytest.mark.parametrize("state", [NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED])
def test_new_block_lies_behind_what_a_block_without_data_points_to(state: int) -> None:
    builder = Builder(8 * M)
    builder.set_block(1, (10 * M) | state)

    async def main() -> None:
        image = await opened(builder.content, writable=True)
        await image.write(0, DATA)
        (extent,) = await image.map(0, M, 1)
        assert extent.file_offset == 11 * M
        await image.close()
        assert await bytes_of(await opened(content_of(image)), 0, 8 * M) == DATA + bytes(7 * M)

    asyncio.run(main())
