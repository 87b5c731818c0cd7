"""Where blocks are: the table's geometry, its states in the three kinds of file, and the bits of sector bitmaps."""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdimg.errors import CorruptImage
from nbdimg.formats import open_file
from nbdimg.formats.options import OpenOptions
from nbdimg.formats.vhdx.bat import RUN_BLOCKS_MAX, bit_run, fill_bits
from nbdimg.formats.vhdx.driver import VhdxDriver
from nbdimg.formats.vhdx.geometry import Geometry
from nbdimg.image.driver import Extent, ExtentKind, Miss, Unmap
from nbdimg.image.gate import Reference
from nbdimg.image.image import Image
from nbdimg.storage.memory import MemoryFile
from nbdimg.storage.posix import PosixFile
from tests.formats.vhdx import craft
from tests.formats.vhdx.craft import K, M
from tests.support.reading import bytes_of
from tests.support.vhdximages import (
    BAT_OFFSET,
    FULL,
    IS_FIXED,
    NOT_PRESENT,
    PARTIAL,
    UNDEFINED,
    UNMAPPED,
    ZERO,
    Builder,
)

TiB = 1 << 40
DATA = b"\x22" * M
PARENT = b"\x11" * (8 * M)


def geometry(size: int, block_size: int, sector_size: int = 512, *, has_parent: bool = False) -> Geometry:
    return Geometry(size, block_size, sector_size, has_parent, is_fixed=False)


# Geometry: literal values, worked out from [MS-VHDX] 2.5


@pytest.mark.parametrize(
    ("sector_size", "block_size", "ratio"),
    [
        (512, M, 4096),
        (512, 2 * M, 2048),
        (512, 8 * M, 512),
        (512, 32 * M, 128),
        (512, 256 * M, 16),
        (4096, M, 32768),
        (4096, 32 * M, 1024),
        (4096, 256 * M, 128),
    ],
)
def test_chunk_ratio_of_block_and_sector_size(sector_size: int, block_size: int, ratio: int) -> None:
    assert geometry(TiB, block_size, sector_size).chunk_ratio == ratio


@pytest.mark.parametrize(
    ("size", "block_size", "sector_size", "entries", "entries_with_parent"),
    [
        (512, M, 512, 1, 4097),
        (M, M, 512, 1, 4097),
        (M + 512, M, 512, 2, 4097),
        (4096 * M, M, 512, 4096, 4097),
        (4097 * M, M, 512, 4098, 8194),
        (4096 * M, 32 * M, 512, 128, 129),
        (4097 * M, 32 * M, 512, 130, 258),
        (TiB, 32 * M, 512, 32768 + 255, 256 * 129),
        (TiB, 32 * M, 4096, 32768 + 31, 32 * 1025),
        (64 * TiB, M, 512, (1 << 26) + 16383, 16384 * 4097),
        (64 * TiB, 256 * M, 4096, 262144 + 2047, 2048 * 129),
    ],
)
def test_entry_count_of_a_disk(
    size: int, block_size: int, sector_size: int, entries: int, entries_with_parent: int
) -> None:
    assert geometry(size, block_size, sector_size).entry_count == entries
    assert geometry(size, block_size, sector_size, has_parent=True).entry_count == entries_with_parent


def test_indexes_of_blocks_and_bitmaps_are_interleaved() -> None:
    found = geometry(TiB, 32 * M)
    assert [found.payload_index(block) for block in (0, 127, 128, 255, 256, 300)] == [0, 127, 129, 256, 258, 302]
    assert [found.bitmap_index(chunk) for chunk in (0, 1, 2)] == [128, 257, 386]


def test_last_block_may_be_short() -> None:
    assert [geometry(size, 2 * M).block_count for size in (512, 2 * M, 2 * M + 512, 5 * M)] == [1, 1, 2, 3]


# Bits


@given(st.binary(min_size=1, max_size=12), st.data())
def test_bit_run_agrees_with_a_list_of_bits(content: bytes, data: st.DataObject) -> None:
    bits = [content[index >> 3] >> (index & 7) & 1 for index in range(8 * len(content))]
    first = data.draw(st.integers(0, len(bits) - 1))
    count_max = data.draw(st.integers(1, len(bits) - first))
    run = 0
    while run < count_max and bits[first + run] == bits[first]:
        run += 1
    assert bit_run(array("B", content), first, count_max) == (bool(bits[first]), run)


@given(st.binary(min_size=1, max_size=12), st.booleans(), st.data())
def test_fill_bits_changes_its_bits_alone(content: bytes, value: bool, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, 8 * len(content)))
    stop = data.draw(st.integers(first, 8 * len(content)))
    filled = array("B", content)
    fill_bits(filled, first, stop, value)
    for index in range(8 * len(content)):
        expected = value if first <= index < stop else bool(content[index >> 3] >> (index & 7) & 1)
        assert bool(filled[index >> 3] >> (index & 7) & 1) is expected, index


def test_bits_are_counted_from_the_lowest_of_each_byte() -> None:
    assert bit_run(array("B", b"\x0e\x00"), 1, 8) == (True, 3)
    assert bit_run(array("B", b"\x00\x80"), 0, 16) == (False, 15)
    bits = array("B", bytes(3))
    fill_bits(bits, 6, 17, True)
    assert bits.tobytes() == b"\xc0\xff\x01"


# States


class OneGate:
    def __init__(self, content: bytes) -> None:
        self._content = content

    async def open(self, reference: Reference) -> MemoryFile:
        return MemoryFile(self._content, "parent.vhdx", writable=False)


def parent_of(guest: bytes, sector_size: int = 512) -> bytes:
    builder = Builder(len(guest), sector_size=sector_size)
    builder.add_guest(guest)
    return bytes(builder.content)


async def opened(content: bytes | bytearray, parent: bytes = b"", *, writable: bool = False) -> Image:
    file = MemoryFile(content, "disk.vhdx", writable=writable)
    return await open_file(file, "vhdx", OpenOptions(OneGate(parent), writable=writable))


def driver_content(image: Image) -> bytes:
    file = image.driver.file
    assert isinstance(file, MemoryFile)
    return bytes(file.content)


def kind_of(kind: str) -> Builder:
    match kind:
        case "fixed":
            return Builder(8 * M, flags=IS_FIXED)
        case "child":
            return Builder(8 * M, parent=".\\parent.vhdx")
        case _:
            return Builder(8 * M)


@pytest.mark.parametrize(
    ("state", "has_offset", "kind", "expected"),
    [
        (state, has_offset, kind, expected)
        for kind in ("dynamic", "fixed", "child")
        for state, has_offset, expected in (
            (NOT_PRESENT, False, "parent" if kind == "child" else "zeroes"),
            (NOT_PRESENT, True, "parent" if kind == "child" else "zeroes"),
            (UNDEFINED, False, "zeroes"),
            (UNDEFINED, True, "zeroes"),
            (ZERO, False, "zeroes"),
            (ZERO, True, "zeroes"),
            (UNMAPPED, False, "zeroes"),
            (UNMAPPED, True, "zeroes"),
            (FULL, True, "data"),
            (PARTIAL, True, "mixed" if kind == "child" else "data"),
        )
    ],
)
def test_block_reads_as_its_state_says(state: int, has_offset: bool, kind: str, expected: str) -> None:
    builder = kind_of(kind)
    if kind == "child" and state == PARTIAL:
        builder.add_partial(2, DATA, ((1, 3), (2047, 2048)))
    else:
        offset = builder.append(DATA, M)
        builder.set_block(2, (offset if has_offset else 0) | state)
    below = PARENT[2 * M : 3 * M]
    wanted = {
        "parent": below,
        "zeroes": bytes(M),
        "data": DATA,
        "mixed": below[:512] + DATA[:1024] + below[: M - 2048] + DATA[:512],
    }[expected]

    async def main() -> None:
        image = await opened(builder.content, parent_of(PARENT))
        assert await bytes_of(image, 2 * M, M) == wanted
        beside = PARENT[:M] if kind == "child" else bytes(M)
        assert await bytes_of(image, M, M) == beside
        assert await bytes_of(image, 3 * M, M) == beside

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["dynamic", "child"])
@pytest.mark.parametrize("reserved", [4, 5, 8 | FULL, 0x80000 | FULL, 8])
def test_reserved_states_and_bits_are_refused_with_a_sentence(kind: str, reserved: int) -> None:
    builder = kind_of(kind)
    entry = builder.append(DATA, M) | reserved
    builder.set_block(5, entry)

    async def main() -> None:
        image = await opened(builder.content, parent_of(PARENT))
        assert len(await bytes_of(image, 4 * M, M)) == M
        with pytest.raises(CorruptImage) as caught:
            await bytes_of(image, 5 * M + 512, 512)
        at = BAT_OFFSET + 8 * 5
        assert str(caught.value) == (
            f"disk.vhdx: BAT entry 5 is {entry:#018x}, expected state 0 to 3, 6 or 7 and the reserved bits 0 "
            f"(offset {at})"
        )

    asyncio.run(main())


@pytest.mark.parametrize("offset", [0, (1 << 48) + M, 1 << 63, (1 << 64) - M])
def test_data_outside_of_what_a_file_has_is_refused(tmp_path: Path, offset: int) -> None:
    """In a file of the system's: an offset from 2^63 on is none that a call would take."""
    builder = Builder(8 * M)
    builder.set_block(1, offset | FULL)
    path = tmp_path / "disk.vhdx"
    path.write_bytes(builder.content)

    async def main() -> None:
        file = PosixFile(path, writable=True)
        image = await open_file(file, "vhdx", OpenOptions(OneGate(b""), writable=True))
        with pytest.raises(
            CorruptImage, match=r"BAT entry 1 is 0x[0-9a-f]{16}, expected an offset of 1 MiB to 256 TiB"
        ):
            await bytes_of(image, M, 512)
        with pytest.raises(CorruptImage, match="BAT entry 1"):
            await image.write(M, b"x")
        await image.close()

    asyncio.run(main())
    assert path.read_bytes()[4 * M :] == builder.content[4 * M :]


@pytest.mark.parametrize(
    ("target", "name"),
    [(M, "the log"), (2 * M, "the metadata region"), (3 * M, "the BAT region"), (5 * M, "region ")],
)
@pytest.mark.parametrize("block_size", [M, 2 * M])
def test_block_inside_a_structure_is_not_read(target: int, name: str, block_size: int) -> None:
    """B1. A region behind the blocks counts too, and a block that only ends in one."""
    builder = Builder(8 * M, block_size)
    outside = builder.append(DATA, 2 * M)
    builder.append(b"", 2 * M)
    regions = (
        craft.region(craft.BAT, 3 * M),
        craft.region(craft.METADATA, 2 * M),
        craft.region(craft.UNKNOWN, 4 * M + block_size, flags=0),
    )
    for at in (192 * K, 256 * K):
        builder.content[at : at + 64 * K] = craft.region_table(*regions)
    builder.set_block(0, target | FULL)
    builder.set_block(1, outside | FULL)

    async def main() -> None:
        image = await opened(builder.content)
        assert (await bytes_of(image, block_size, M)) == DATA
        with pytest.raises(CorruptImage) as caught:
            await bytes_of(image, 512, 512)
        message = str(caught.value)
        assert message.startswith(f"disk.vhdx: a block lies at offset {target}, expected it outside the structure at ")
        assert f", {name}" in message
        assert message.endswith(f"(BAT entry 0, offset {BAT_OFFSET})")

    asyncio.run(main())


def test_sector_bitmap_inside_a_structure_is_not_read() -> None:
    builder = kind_of("child")
    builder.add_partial(1, DATA, ((0, 4),))
    builder.set_entry(4096, M | FULL)

    async def main() -> None:
        image = await opened(builder.content, parent_of(PARENT))
        with pytest.raises(CorruptImage, match="a block lies at offset 1048576, expected it outside the structure at"):
            await bytes_of(image, M, 512)

    asyncio.run(main())


@pytest.mark.parametrize("malformed", [4, 8 | FULL, 8 | ZERO, M | FULL])
@pytest.mark.parametrize("before", [FULL, NOT_PRESENT])
def test_malformed_entry_spoils_no_block_beside_it(malformed: int, before: int) -> None:
    """A look-up that goes on to the end of the disk ends in front of it."""
    builder = Builder(8 * M)
    for block in range(2):
        builder.set_block(block, builder.append(DATA, M) | FULL if before == FULL else NOT_PRESENT)
    builder.set_block(2, malformed)

    async def main() -> None:
        image = await opened(builder.content)
        (extent,) = await image.map(0, 8 * M, 1)
        assert (extent.offset, extent.length) == (0, 2 * M)
        with pytest.raises(CorruptImage):
            await image.map(0, 8 * M, 2)

    asyncio.run(main())


@pytest.mark.parametrize("offset", range(6))
def test_depth_of_a_block_is_the_same_from_wherever_it_is_asked(offset: int) -> None:
    """Blocks that are not present read as zeroes like those that are zero, and no file has anything there."""
    builder = Builder(6 * M)
    for block, state in enumerate((NOT_PRESENT, ZERO, UNMAPPED, NOT_PRESENT, NOT_PRESENT, UNDEFINED)):
        builder.set_block(block, state)

    async def main() -> list[int]:
        image = await opened(builder.content)
        extents = await image.map(offset * M, (6 - offset) * M, 6)
        assert {each.kind for each in extents} == {ExtentKind.ZERO}
        return [each.depth for each in extents for _ in range(each.length // M)]

    assert asyncio.run(main()) == [0, 1, 1, 0, 0, 1][offset:]


@pytest.mark.parametrize("change", ["map", "trim"])
def test_answer_looks_at_a_bounded_number_of_blocks(change: str) -> None:
    """However many of the table's pages are in memory."""

    async def main() -> int:
        image = await opened(Builder(4 * RUN_BLOCKS_MAX * M).content, writable=True)
        driver = image.driver
        assert isinstance(driver, VhdxDriver)
        for key in range(4 * RUN_BLOCKS_MAX // 512 + 1):
            await driver.bat.pages.load(key)
        answer = driver.map(0, driver.size) if change == "map" else driver.unmap(0, driver.size, Unmap.TRIM)
        assert not isinstance(answer, Miss)
        return (answer.stop if isinstance(answer, Extent) else answer) // M

    assert asyncio.run(main()) == RUN_BLOCKS_MAX


def place_of(block: int, block_size: int) -> tuple[int, int]:
    """The page of a block's entry, and where it is in it."""
    return divmod(block + block * block_size // (512 << 23), 512)


def run_stop(driver: VhdxDriver, first: int, blocks: int) -> int:
    """The block behind the run that begins with block `first`, one entry looked at after another."""
    block_size = driver.cluster_size

    def entry_of(block: int) -> int:
        page, slot = place_of(block, block_size)
        return driver.bat.pages.slices[page].entries[slot]

    start = entry_of(first)
    for block in range(first + 1, min(blocks, first + RUN_BLOCKS_MAX)):
        entry, state = entry_of(block), entry_of(block) & 0xFFFFF
        if start & 7 >= FULL:
            goes_on = entry == start + (block - first) * block_size
        else:
            goes_on = state <= UNMAPPED and bool(state) == bool(start & 7)
        if not goes_on:
            return block
    return min(blocks, first + RUN_BLOCKS_MAX)


@pytest.mark.parametrize("block_size", [M, 256 * M])
@pytest.mark.parametrize("seed", range(2))
def test_run_ends_where_it_ends_looked_at_entry_by_entry(seed: int, block_size: int) -> None:
    """Runs of each kind, of lengths about those of pages and chunks, some with one entry that is not like the rest."""
    blocks, chance = 12_000, random.Random(seed)
    lengths = (1, 2, 15, 16, 17, 511, 512, 513, 1100)

    async def main() -> None:
        image = await opened(Builder(blocks * block_size, block_size=block_size).content, writable=True)
        driver = image.driver
        assert isinstance(driver, VhdxDriver)
        for key in range(place_of(blocks, block_size)[0] + 1):
            await driver.bat.pages.load(key)
        block, places = 0, []
        while block < blocks:
            places.append(block)
            kind = chance.choice((NOT_PRESENT, ZERO, UNMAPPED, UNDEFINED, FULL))
            host = chance.randrange(64, 128) * M
            count = min(chance.choice(lengths), blocks - block)
            odd = chance.randrange(2 * count)
            for number in range(count):
                entry = kind | (host + number * block_size if kind == FULL else 0)
                if number == odd:
                    entry = chance.choice((ZERO, NOT_PRESENT, 8 * M, 8 * M | FULL, entry | M, entry | 8))
                page, slot = place_of(block, block_size)
                driver.bat.pages.slices[page].entries[slot] = entry
                block += 1
        for block in (*places, *(place + 1 for place in places), *(chance.randrange(blocks) for _ in range(200))):
            for stop in (driver.size, min((block + chance.choice(lengths)) * block_size, driver.size)):
                with suppress(CorruptImage):
                    extent = driver.map(min(block, blocks - 1) * block_size, stop)
                    assert isinstance(extent, Extent)
                    expected = min(run_stop(driver, extent.offset // block_size, blocks), -(-stop // block_size))
                    assert extent.stop == max(expected, extent.offset // block_size + 1) * block_size

    asyncio.run(main())


def test_long_runs_are_looked_at_by_pages() -> None:
    """128000 blocks, 32 times, their table in memory: what takes a second entry by entry."""
    blocks = 128_000

    async def main() -> float:
        image = await opened(Builder(blocks * M).content, writable=False)
        driver = image.driver
        assert isinstance(driver, VhdxDriver)
        for key in range(place_of(blocks, M)[0] + 1):
            driver.bat.pages.add(key, key * 4096, array("Q", bytes(4096)))
        started = time.process_time()
        for _ in range(32):
            extents = await image.map(0, image.size, blocks)
            assert extents[-1].stop == image.size
        return time.process_time() - started

    assert asyncio.run(main()) < 0.4


def test_partially_present_block_without_a_bitmap_is_refused() -> None:
    builder = kind_of("child")
    offset = builder.append(DATA, M)
    builder.set_block(1, offset | PARTIAL)

    async def main() -> None:
        image = await opened(builder.content, parent_of(PARENT))
        expected = f"BAT entry 1 is {offset | PARTIAL:#018x}, expected a sector bitmap for a partially present block"
        with pytest.raises(CorruptImage, match=expected):
            await bytes_of(image, M, 512)

    asyncio.run(main())


@pytest.mark.parametrize("lost", [0, 2, 700])
def test_write_makes_no_new_bitmap_for_a_block_that_has_lost_its_own(lost: int) -> None:
    """Or what cannot be read would from then on be the parent's."""
    builder = Builder(1024 * M, parent=".\\parent.vhdx")
    builder.add_partial(lost, DATA, ((0, 8),))
    builder.set_entry(builder.ratio, 0)

    async def main() -> None:
        image = await opened(builder.content, parent_of(PARENT), writable=True)
        for _ in range(2):
            with pytest.raises(CorruptImage, match=rf"BAT entry {lost} is .* expected a sector bitmap"):
                await image.write(M, b"x" * 512)
            with pytest.raises(CorruptImage, match=rf"BAT entry {lost} is .* expected a sector bitmap"):
                await bytes_of(image, lost * M, 512)
        assert await bytes_of(image, M, 512) == PARENT[:512]
        await image.zero(lost * M, M, may_unmap=True, is_fast_only=False)
        await image.write(M, b"x" * 512)
        await image.close()
        again = await opened(driver_content(image), parent_of(PARENT))
        assert await bytes_of(again, M, 1024) == b"x" * 512 + PARENT[:512]
        assert await bytes_of(again, lost * M, M) == bytes(M)

    asyncio.run(main())


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_bit_of_a_sector_lies_where_the_specification_says(sector_size: int) -> None:
    """Block 3, sector 9: bit 3 x sectors of a block + 9 of its chunk's bitmap."""
    sectors = M // sector_size
    builder = Builder(8 * M, sector_size=sector_size, parent=".\\parent.vhdx")
    bitmap = builder.append(b"", M)
    builder.set_entry(builder.ratio, bitmap | FULL)
    block = builder.append(DATA, M)
    builder.set_block(3, block | PARTIAL)
    bit = 3 * sectors + 9
    assert (builder.ratio, bit) == ((4096, 6153) if sector_size == 512 else (32768, 777))
    builder.content[bitmap + bit // 8] = 1 << bit % 8

    async def main() -> None:
        image = await opened(builder.content, parent_of(PARENT, sector_size))
        content = await bytes_of(image, 3 * M, M)
        assert content.count(b"\x22" * sector_size) == 1
        assert content.index(0x22) == 9 * sector_size
        extents = await image.map(3 * M, M, 10)
        assert [(each.kind, each.length, each.depth) for each in extents] == [
            (ExtentKind.DATA, 9 * sector_size, 2),
            (ExtentKind.DATA, sector_size, 1),
            (ExtentKind.DATA, M - 10 * sector_size, 2),
        ]

    asyncio.run(main())


def test_block_behind_a_bitmap_entry_is_found(tmp_path: Path) -> None:
    """256 MiB blocks: block 16 is the second chunk's first, with entry 17; the file is sparse."""
    builder = Builder(17 * 256 * M, 256 * M, parent=".\\parent.vhdx")
    assert builder.ratio == 16
    bitmap = builder.append(b"", M)
    builder.set_entry(33, bitmap | FULL)
    builder.content[bitmap] = 0b10
    builder.set_entry(17, len(builder.content) | PARTIAL)
    builder.set_entry(16, (1 << 40) | 5)
    path = tmp_path / "child.vhdx"
    with path.open("wb") as file:
        file.write(builder.content)
        file.write(b"\x22" * 4096)
        file.truncate(len(builder.content) + 256 * M)

    async def main() -> None:
        file = PosixFile(path, writable=False)
        image = await open_file(file, "vhdx", OpenOptions(OneGate(parent_of(PARENT))))
        assert await bytes_of(image, 16 * 256 * M, 2048) == bytes(512) + b"\x22" * 512 + bytes(1024)
        await image.close()

    asyncio.run(main())


# What must not be written to


CHANGES: dict[str, Callable[[Image, int], Awaitable[None]]] = {
    "write": lambda image, offset: image.write(offset, b"x" * 512),
    "trim": lambda image, offset: image.trim(M, M),
    "zero": lambda image, offset: image.zero(M, M, may_unmap=True, is_fast_only=False),
}


@pytest.mark.parametrize("target", [M, 2 * M, 3 * M])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("state", [FULL, PARTIAL])
def test_block_inside_a_structure_is_not_written_trimmed_or_zeroed(target: int, change: str, state: int) -> None:
    """B1."""
    builder = kind_of("child" if state == PARTIAL else "dynamic")
    if state == PARTIAL:
        builder.add_partial(1, DATA, ((0, 4),))
    builder.set_block(1, target | state)

    async def main() -> None:
        image = await opened(builder.content, parent_of(PARENT), writable=True)
        for offset in (M, M + 4096):
            with pytest.raises(
                CorruptImage, match=f"a block lies at offset {target}.*, expected it outside the struct"
            ):
                await CHANGES[change](image, offset)
        await image.close()
        file = image.driver.file
        assert isinstance(file, MemoryFile)
        for start in (M, 2 * M, 3 * M):
            same = slice(start + (4096 if start == M else 0), start + M)
            assert file.content[same] == builder.content[same]

    asyncio.run(main())


@pytest.mark.parametrize("target", [M, 2 * M, 3 * M])
def test_sector_bitmap_inside_a_structure_is_not_written(target: int) -> None:
    builder = kind_of("child")
    builder.set_entry(4096, target | FULL)

    async def main() -> None:
        image = await opened(builder.content, parent_of(PARENT), writable=True)
        with pytest.raises(CorruptImage, match=f"a block lies at offset {target}, expected it"):
            await image.write(0, b"x" * 512)
        await image.close()

    asyncio.run(main())


@pytest.mark.parametrize("state", [NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED])
@pytest.mark.parametrize("kind", ["dynamic", "child"])
def test_what_a_block_without_data_points_to_is_left_alone(state: int, kind: str) -> None:
    """It may be garbage, or another block's by now: only a check of all entries could tell."""
    builder = kind_of(kind)
    victim = builder.add_full(0, DATA)
    for block, target in ((1, victim), (2, 2 * M)):
        builder.set_block(block, target | state)

    async def main() -> None:
        image = await opened(builder.content, parent_of(PARENT), writable=True)
        for _ in range(3):
            await image.write(M, b"x" * (2 * M))
            await image.flush()
            await image.trim(3 * M, 5 * M)
            await image.flush()
        await image.close()
        file = image.driver.file
        assert isinstance(file, MemoryFile)
        assert file.content[2 * M : 3 * M] == builder.content[2 * M : 3 * M]
        again = await opened(file.content, parent_of(PARENT))
        assert await bytes_of(again, 0, 4 * M) == DATA + b"x" * (2 * M) + bytes(M)

    asyncio.run(main())


def test_refused_trim_leaves_the_block_as_it_was() -> None:
    builder = Builder(4 * M)
    builder.set_block(0, (2 * M) | FULL)

    async def main() -> None:
        image = await opened(builder.content, writable=True)
        with pytest.raises(CorruptImage):
            await image.trim(0, M)
        await image.flush()
        await image.close()
        file = image.driver.file
        assert isinstance(file, MemoryFile)
        assert file.content[192 * K :] == builder.content[192 * K :]

    asyncio.run(main())


@pytest.mark.parametrize(("size", "cut"), [(2 * M, M), (M + 512, 512)], ids=["whole block", "short last block"])
def test_block_that_the_file_just_holds_is_read_only_to_its_end(size: int, cut: int) -> None:
    builder = Builder(size)
    builder.add_full(1, b"\1" * M)
    stop = len(builder.content) - M + cut

    async def read(content: bytes) -> bytes:
        file = MemoryFile(content, writable=False)
        image = await open_file(file, "vhdx", OpenOptions(OneGate(b""), writable=False))
        return await bytes_of(image, M, 512)

    assert asyncio.run(read(bytes(builder.content[:stop]))) == b"\1" * 512
    with pytest.raises(CorruptImage, match="an end inside the file's"):
        asyncio.run(read(bytes(builder.content[: stop - 1])))
