"""The metadata region."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import replace
from uuid import UUID

import pytest

from nbdimg.errors import CorruptImage, ImageError, UnsupportedFeature
from nbdimg.formats.vhdx import structs as s
from nbdimg.formats.vhdx.header import load_headers
from nbdimg.formats.vhdx.locator import parent_locator
from nbdimg.formats.vhdx.metadata import Item, Metadata, build_metadata, load_metadata, read_item
from nbdimg.formats.vhdx.region import Regions, load_regions
from nbdimg.storage.memory import MemoryFile
from tests.formats.vhdx import craft
from tests.formats.vhdx.craft import K, M, item, metadata, metadata_table

LINKAGE = UUID(int=7)
LOCATOR = craft.locator(("parent_linkage", f"{{{LINKAGE}}}"), ("relative_path", "p.vhdx"))
PARENT = (craft.PARENT_LOCATOR, 4, LOCATOR)
REQUIRED, USER, DISK = 4, 1, 2


async def open_content(content: bytes | bytearray) -> tuple[MemoryFile, Regions, Metadata]:
    file = MemoryFile(content, "x.vhdx")
    regions = await load_regions(file, (await load_headers(file)).current)
    return file, regions, await load_metadata(file, regions)


def load(meta: bytes | None = None) -> Metadata:
    return asyncio.run(open_content(craft.image(meta=meta)))[2]


def test_metadata_is_read() -> None:
    found = load()
    assert (found.block_size, found.virtual_size, found.disk_id) == (M, 64 * M, craft.DISK_ID)
    assert (found.logical_sector_size, found.physical_sector_size) == (512, 4096)
    assert (found.leaves_blocks_allocated, found.has_parent, found.locator) == (False, False, None)
    assert found.offset_of(s.VIRTUAL_DISK_SIZE) == 2 * M + 64 * K + 8
    assert found.item(s.PARENT_LOCATOR) is None
    assert found.item(s.FILE_PARAMETERS) == Item(s.FILE_PARAMETERS, 64 * K, 8, is_required=True)


def test_metadata_of_a_fixed_image() -> None:
    assert load(metadata(flags=1)).leaves_blocks_allocated


def test_metadata_of_a_child_ignores_leave_blocks_allocated() -> None:
    found = load(metadata(flags=3, more=[PARENT]))
    assert found.has_parent
    assert not found.leaves_blocks_allocated
    assert found.locator is not None
    assert found.locator.linkage == LINKAGE
    assert found.locator.offset == found.offset_of(s.PARENT_LOCATOR)


@pytest.mark.parametrize("block_size", [M << shift for shift in range(9)])
def test_metadata_block_sizes_from_1_to_256_mib_are_accepted(block_size: int) -> None:
    assert load(metadata(block_size=block_size)).block_size == block_size


@pytest.mark.parametrize(("size", "logical"), [(512, 512), (64 << 40, 512), (4096, 4096), (M + 512, 512)])
def test_metadata_size_in_bounds_is_accepted(size: int, logical: int) -> None:
    assert load(metadata(virtual_size=size, logical=logical)).virtual_size == size


REFUSED = [
    (metadata(block_size=0), CorruptImage, r"BlockSize is 0, expected a power of two from 1 MiB to 256 MiB.*2162688"),
    (metadata(block_size=512 * K), CorruptImage, "BlockSize is 524288"),
    (metadata(block_size=3 * M), CorruptImage, "BlockSize is 3145728"),
    (metadata(block_size=512 * M), CorruptImage, "BlockSize is 536870912"),
    (metadata(virtual_size=0), CorruptImage, r"Virtual Disk Size is 0, expected a multiple of.*512.*2162696"),
    (metadata(virtual_size=513), CorruptImage, "Virtual Disk Size is 513"),
    (metadata(virtual_size=512, logical=4096), CorruptImage, "Virtual Disk Size is 512"),
    (metadata(virtual_size=(64 << 40) + 512), CorruptImage, "from 512 to 64 TiB"),
    (metadata(virtual_size=(1 << 64) - 512), CorruptImage, "Virtual Disk Size is 18446744073709551104"),
    (metadata(logical=520), CorruptImage, r"Logical Sector Size is 520, expected 512 or 4096.*2162704"),
    (metadata(physical=0), CorruptImage, r"Physical Sector Size is 0, expected 512 or 4096"),
    *(
        (metadata(without=guid), CorruptImage, f"the metadata has no {name} item, expected is one")
        for guid, name in (
            (craft.FILE_PARAMETERS, "File Parameters"),
            (craft.VIRTUAL_DISK_SIZE, "Virtual Disk Size"),
            (craft.VIRTUAL_DISK_ID, "Virtual Disk ID"),
            (craft.LOGICAL_SECTOR_SIZE, "Logical Sector Size"),
            (craft.PHYSICAL_SECTOR_SIZE, "Physical Sector Size"),
        )
    ),
    (metadata(flags=2), CorruptImage, "the metadata has no Parent Locator item"),
    (metadata(more=[PARENT]), CorruptImage, "HasParent is 0, expected 1 as there is a Parent Locator"),
    (metadata(flags=2, more=[(craft.PARENT_LOCATOR, 4, b"")]), CorruptImage, "locator's length is 0"),
    (
        metadata(more=[(craft.UNKNOWN, 4, b"x")]),
        UnsupportedFeature,
        "required metadata item that is not known.*0403020",
    ),
    (metadata(more=[(craft.UNKNOWN, 6, b"")]), UnsupportedFeature, "required metadata item that is not known"),
    (metadata(more=[(craft.INCOMPLETE_FILE, 4, b"")]), UnsupportedFeature, "incomplete: its creation or conversion"),
    (metadata(more=[(craft.INCOMPLETE_FILE, 0, b"")]), UnsupportedFeature, "incomplete"),
    (metadata(more=[(craft.PMEM_LABELS, 6, b"x")]), UnsupportedFeature, "persistent memory"),
    (metadata(more=[(craft.UNKNOWN, 5, b"x")]), CorruptImage, "flags of user item 04030201.* is 5, expected not both"),
    (metadata(more=[(craft.UNKNOWN, 0, b"x")] * 2), CorruptImage, "item 04030201.* is there twice"),
    (metadata(more=[(craft.UNKNOWN, 1, b"x")] * 2), CorruptImage, "user item 04030201.* is there twice"),
    (metadata(more=[("00" * 16, 0, b"x")]), CorruptImage, "a metadata item's GUID is 00000000.*another than zero"),
    (metadata(more=[(craft.FILE_PARAMETERS, 4, b"x" * 8)]), CorruptImage, "the File Parameters item is there twice"),
    (metadata_table(signature=b"Metadata"), CorruptImage, r"signature is 'Metadata', expected 'metadata'.*2097152"),
    (metadata_table(count=2048), CorruptImage, r"EntryCount is 2048, expected at most 2047 \(file offset 2097162\)"),
    (metadata_table(item(craft.FILE_PARAMETERS, 65535, 8, 4)), CorruptImage, r"offset of the File Parameters .* 65535"),
    (metadata_table(item(craft.FILE_PARAMETERS, M - 7, 8, 4)), CorruptImage, "expected 65536 to 1048568, within"),
    (metadata_table(item(craft.FILE_PARAMETERS, 0xFFFFFFFF, 8, 4)), CorruptImage, "is 4294967295"),
    (
        metadata_table(item(craft.FILE_PARAMETERS, 65536, 7, 4)),
        CorruptImage,
        "the length of the File Param.* is 7, .* 8",
    ),
    (metadata_table(item(craft.VIRTUAL_DISK_ID, 65536, 0, 4)), CorruptImage, "the offset of .* is 65536, expected 0"),
    (metadata_table(item(craft.VIRTUAL_DISK_ID, 0, 0, 4)), CorruptImage, "the length of .* is 0, expected 16"),
    (
        metadata_table(item(craft.UNKNOWN, 65536, M + 1, 1)),
        CorruptImage,
        "length of user .* is 1048577, expected at most",
    ),
    (
        metadata_table(item(craft.UNKNOWN, 65536, 9, 1), item(craft.FILE_PARAMETERS, 65544, 8, 4)),
        CorruptImage,
        "the File Parameters item lies at 65544 .* user item .* ends at 65545, allowed is no overlap.*2162696",
    ),
    (
        metadata_table(*(item((n + 1).to_bytes(16, "big").hex(), 65536 + n, 1, 1) for n in range(1025))),
        CorruptImage,
        "1025 user items, expected at most 1024",
    ),
]


@pytest.mark.parametrize(("meta", "error", "message"), REFUSED)
def test_metadata_that_is_wrong_is_refused(meta: bytes, error: type[ImageError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        load(meta)
    assert str(caught.value.offset) in str(caught.value)


def test_metadata_user_items_and_unknown_optional_ones_are_kept() -> None:
    more = [
        (craft.UNKNOWN, USER, b"mine"),
        (craft.UNKNOWN, 0, b"theirs"),
        (craft.FILE_PARAMETERS, USER, b"not the system's"),
        (craft.CHS_PARAMETERS, REQUIRED | DISK, bytes(8)),
        (craft.PMEM_LABELS, DISK, b""),
        (craft.INCOMPLETE_FILE, USER, b""),
    ]

    async def run() -> None:
        file, regions, found = await open_content(craft.image(meta=metadata(more=more)))
        assert len(found.items) == 11
        mine, theirs, users, _, empty, _ = found.items[5:]
        assert (mine.is_user, theirs.is_user, empty.length, empty.offset) == (True, False, 0, 0)
        assert await read_item(file, regions, mine) == b"mine"
        assert await read_item(file, regions, theirs) == b"theirs"
        assert await read_item(file, regions, users) == b"not the system's"
        assert await read_item(file, regions, empty) == b""

    asyncio.run(run())


def test_metadata_flags_of_known_items_do_not_matter() -> None:
    """VirtualBox's early images lack IsRequired on the physical sector size."""
    meta = metadata(without=craft.PHYSICAL_SECTOR_SIZE, more=[(craft.PHYSICAL_SECTOR_SIZE, 0, struct.pack("<I", 512))])
    assert load(meta).physical_sector_size == 512


def test_metadata_behind_the_end_of_the_file_is_refused() -> None:
    content = craft.image()[: 2 * M + 64 * K + 7]
    message = r"the File Parameters item ends at 2162696, allowed is at most the file's size of 2162695.*2162688"
    with pytest.raises(CorruptImage, match=message):
        asyncio.run(open_content(content))


def test_build_metadata_gives_the_bytes_that_windows_writes() -> None:
    """Items in the order, and with the flags, of the samples."""
    made = build_metadata(
        block_size=M, virtual_size=64 * M, disk_id=craft.DISK_ID, logical_sector_size=512, physical_sector_size=4096
    )
    assert made == metadata()[: len(made)]
    assert len(made) == 64 * K + 4096
    windows = craft.sample("swap")[2 * M : 3 * M]
    again = build_metadata(
        block_size=32 * M, virtual_size=10 << 30, disk_id=UUID("d2aa69e7-866c-428d-bd27-1c5776845258")
    )
    table = 32 + 5 * 32
    assert again[:table] == windows[:table]
    assert again[64 * K : 64 * K + 40] == windows[64 * K : 64 * K + 40]


def test_build_metadata_of_a_child_and_with_further_items() -> None:
    locator = parent_locator(LINKAGE, "p.vhdx")
    unknown = UUID(bytes_le=craft.raw(craft.UNKNOWN))
    extra = [
        (Item(unknown, 0, 4, is_user=True, is_virtual_disk=True), b"mine"),
        (Item(s.CHS_PARAMETERS, 0, 0, is_virtual_disk=True), b""),
    ]
    made = build_metadata(block_size=M, virtual_size=64 * M, disk_id=craft.DISK_ID, locator=locator, extra=extra)
    found = load(made)
    assert found.has_parent
    assert found.locator is not None
    assert replace(found.locator, offset=0) == locator
    assert (
        made
        == metadata(flags=2, more=[PARENT, (craft.UNKNOWN, USER | DISK, b"mine"), (craft.CHS_PARAMETERS, DISK, b"")])[
            : len(made)
        ]
    )


SAMPLES = {
    "swap": (32 * M, 10 << 30, 512, 4096, 3 * M, "d2aa69e7-866c-428d-bd27-1c5776845258"),
    "parent": (M, 64 * M, 512, 512, 2 * M, "dc01c643-5710-1540-b604-cc50f2ed8695"),
    "child": (M, 64 * M, 512, 4096, 3 * M, "a02b45d3-c77c-4639-8cf5-b9e9510f5cb6"),
    "k4": (M, 64 * M, 4096, 4096, 3 * M, "fe7d4af5-3e2c-4b7f-8aa6-84b4867fb8f1"),
}
"""Block size, virtual size, sectors, BAT offset: as 7-Zip and the samples' makers say."""


@pytest.mark.parametrize("name", SAMPLES)
def test_metadata_of_a_clean_sample(name: str) -> None:
    _, regions, found = asyncio.run(open_content(craft.sample(name)))
    block_size, size, logical, physical, bat_offset, disk_id = SAMPLES[name]
    assert (found.block_size, found.virtual_size, regions.bat_offset) == (block_size, size, bat_offset)
    assert (found.logical_sector_size, found.physical_sector_size) == (logical, physical)
    assert found.disk_id == UUID(disk_id)
    assert found.has_parent == (name == "child")


def test_metadata_of_the_child_sample_pins_the_parent_sample() -> None:
    _, _, found = asyncio.run(open_content(craft.sample("child")))
    parent = asyncio.run(load_headers(MemoryFile(craft.sample("parent"))))
    assert found.locator is not None
    assert found.locator.linkage == parent.current.data_write_guid
    assert found.locator.values["relative_path"] == ".\\parent.vhdx"
