"""Region tables."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest

from nbdimg.errors import CorruptImage, ImageError, UnsupportedFeature
from nbdimg.formats.vhdx.header import load_headers
from nbdimg.formats.vhdx.region import RegionEntry, Regions, build_region_table, load_regions
from nbdimg.formats.vhdx.structs import BAT_REGION, METADATA_REGION
from nbdimg.storage.memory import MemoryFile
from tests.formats.vhdx import craft
from tests.formats.vhdx.craft import BAT, METADATA, REGIONS, UNKNOWN, K, M, region, region_table

BAD_TABLE = b"\0" + region_table(*REGIONS)[1:]


def load(table: bytes | None = None, table2: bytes | None = None, second: bytes | None = None) -> Regions:
    async def run() -> Regions:
        file = MemoryFile(craft.image(table=table, table2=table2, second=second), "x.vhdx")
        return await load_regions(file, (await load_headers(file)).current)

    return asyncio.run(run())


def test_regions_are_found() -> None:
    found = load()
    assert (found.bat_offset, found.bat_length) == (3 * M, M)
    assert (found.metadata_offset, found.metadata_length) == (2 * M, M)
    assert [entry.guid for entry in found.entries] == [BAT_REGION, METADATA_REGION]
    assert found.damaged_slots == ()
    assert found.content == region_table(*REGIONS)


def test_region_table_damaged_first_copy_gives_the_second() -> None:
    found = load(table=BAD_TABLE, table2=region_table(*REGIONS))
    assert found.damaged_slots == (0,)
    assert found.bat_offset == 3 * M
    assert found.content == region_table(*REGIONS)


def test_region_table_damaged_second_copy_is_reported() -> None:
    assert load(table2=BAD_TABLE).damaged_slots == (1,)


def test_region_table_copies_that_differ_give_the_first() -> None:
    found = load(table2=region_table(region(BAT, 9 * M), region(METADATA, 2 * M)))
    assert (found.bat_offset, found.damaged_slots) == (3 * M, (1,))


def test_region_table_with_both_copies_damaged_is_refused() -> None:
    with pytest.raises(CorruptImage, match=r"neither region table.*'regi'.*196608 and 262144"):
        load(table=BAD_TABLE)


def test_region_table_whose_content_is_wrong_is_not_replaced_by_the_second() -> None:
    with pytest.raises(CorruptImage, match="the metadata region is not in the region table"):
        load(table=region_table(region(BAT, 3 * M)), table2=region_table(*REGIONS))


def test_region_known_and_not_required_is_accepted() -> None:
    found = load(table=region_table(region(BAT, 3 * M, flags=0), region(METADATA, 2 * M, flags=0)))
    assert not found.bat.is_required
    assert not found.metadata.is_required


def test_region_unknown_and_not_required_is_kept() -> None:
    found = load(table=region_table(*REGIONS, region(UNKNOWN, 8 * M, 2 * M, flags=0)))
    extra = RegionEntry(UUID(bytes_le=craft.raw(UNKNOWN)), 8 * M, 2 * M, False)
    assert found.entries[2] == extra


REFUSED = [
    ((*REGIONS, region(UNKNOWN, 8 * M)), UnsupportedFeature, r"region 04030201-0605-0807-090a-.* is required.*196688"),
    ((region(BAT, 3 * M),), CorruptImage, r"the metadata region is not in the region table, expected is one.*196608"),
    ((region(METADATA, 3 * M),), CorruptImage, "the BAT region is not in the region table"),
    ((), CorruptImage, "the BAT region is not in the region table"),
    ((*REGIONS, region(BAT, 8 * M)), CorruptImage, r"the BAT region is there twice, allowed is one.*196688"),
    ((*REGIONS, *[region(UNKNOWN, 8 * M, flags=0)] * 2), CorruptImage, "is there twice"),
    ((region(BAT, 3 * M, 0), REGIONS[1]), CorruptImage, r"the length of the BAT region is 0.*196648"),
    ((region(BAT, 3 * M, 4096), REGIONS[1]), CorruptImage, r"the length of the BAT region is 4096"),
    ((region(BAT, 3 * M + 512), REGIONS[1]), CorruptImage, r"the offset of the BAT region is 3146240.*196640"),
    ((region(BAT, 0), REGIONS[1]), CorruptImage, r"the offset of the BAT region is 0"),
    ((region(BAT, (1 << 64) - M), REGIONS[1]), CorruptImage, r"the offset of the BAT region is 18446744073708503040"),
    ((region(BAT, (1 << 48) - M, 2 * M), REGIONS[1]), CorruptImage, r"below 256 TiB"),
    (
        (region(BAT, 2 * M), REGIONS[1]),
        CorruptImage,
        r"metadata region lies at 2097152.*BAT region at 2097152.*overlap",
    ),
    ((region(BAT, 1 * M), REGIONS[1]), CorruptImage, r"the log lies at 1048576.*the BAT region"),
    ((region(METADATA, 1 * M, 2 * M), REGIONS[0]), CorruptImage, r"the metadata region lies at 1048576.*the log"),
    ((*REGIONS, region(UNKNOWN, 2 * M, 9 * M, 0)), CorruptImage, "allowed is no overlap"),
]


@pytest.mark.parametrize(("entries", "error", "message"), REFUSED)
def test_region_table_with_a_wrong_entry_is_refused(
    entries: tuple[bytes, ...], error: type[ImageError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        load(table=region_table(*entries))
    assert f"(file offset {caught.value.offset})" in str(caught.value)


def test_region_table_with_too_many_entries_is_refused() -> None:
    with pytest.raises(CorruptImage, match=r"EntryCount is 2048, expected at most 2047 \(file offset 196616\)"):
        load(table=region_table(*REGIONS, count=2048))


def test_region_table_that_is_full_is_accepted() -> None:
    extra = [numbered_guid(index) for index in range(2045)]
    entries = [region(guid, (8 + index) * M, flags=0) for index, guid in enumerate(extra)]
    assert len(load(table=region_table(*REGIONS, *entries)).entries) == 2047


def numbered_guid(index: int) -> str:
    return (index + 1).to_bytes(16, "little").hex()


def test_region_may_begin_where_another_ends_and_lie_before_the_log() -> None:
    second = craft.header(2, log_offset=4 * M)
    found = load(table=region_table(region(BAT, 1 * M), region(METADATA, 2 * M)), second=second)
    assert found.bat_offset == 1 * M


def test_region_in_place_of_a_log_that_is_not_there_is_accepted() -> None:
    second = craft.header(2, log_length=0, log_offset=0)
    assert load(table=region_table(region(BAT, 1 * M), REGIONS[1]), second=second).bat_offset == 1 * M


def test_build_region_table_gives_the_bytes_of_the_specification() -> None:
    entries = [RegionEntry(BAT_REGION, 3 * M, M), RegionEntry(METADATA_REGION, 2 * M, M)]
    table = build_region_table(entries)
    assert len(table) == 64 * K
    assert table == region_table(*REGIONS)
