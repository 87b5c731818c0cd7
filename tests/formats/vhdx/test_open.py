"""Opening: the parent and whether it is the one that was meant, the table's bounds, and how little it takes."""

from __future__ import annotations

import asyncio
import struct
import time
import tracemalloc
from pathlib import Path
from uuid import UUID

import pytest

from nbdimg.errors import ConfigError, CorruptImage, ImageError
from nbdimg.formats import open_image
from nbdimg.formats.vhdx import structs as s
from nbdimg.storage.memory import MemoryFile
from tests.formats.vhdx import craft
from tests.formats.vhdx.craft import DATA_WRITE_GUID, LOG_GUID, M
from tests.formats.vhdx.test_bat import opened
from tests.support.reading import bytes_of
from tests.support.vhdximages import BAT_OFFSET, FULL, ZERO, Builder, flattened

OTHER = UUID("dddddddd-0000-0000-0000-00000000000d")


def write(path: Path, builder: Builder) -> bytes:
    path.write_bytes(builder.content)
    return bytes(builder.content)


def filled(size: int, fill: bytes, **options: int | UUID) -> Builder:
    builder = Builder(size, **options)  # type: ignore[arg-type]
    builder.add_guest(fill * size)
    return builder


async def read(path: Path, offset: int, length: int) -> bytes:
    image = await open_image(path, writable=False)
    try:
        return await bytes_of(image, offset, length)
    finally:
        await image.close()


# The parent


def test_chain_of_three_reads_through_all_of_it_and_writes_the_top_alone(tmp_path: Path) -> None:
    """Block sizes differ along it; another program reads the same."""
    below = write(tmp_path / "parent.vhdx", filled(8 * M, b"\x01", block_size=2 * M))
    middle = Builder(8 * M, parent=".\\parent.vhdx", data_write_guid=OTHER)
    middle.add_partial(1, b"\x02" * M, ((0, 2), (5, 6)))
    write(tmp_path / "middle.avhdx", middle)
    top = Builder(8 * M, block_size=4 * M, parent="middle.avhdx", linkage=OTHER)
    write(tmp_path / "top.avhdx", top)

    async def main() -> bytes:
        image = await open_image(tmp_path / "top.avhdx")
        await image.write(M + 512, b"\x03" * 512)
        guest = await bytes_of(image, 0, 8 * M)
        assert [each.depth for each in await image.map(M, 4096, 10)] == [2, 1, 3, 2, 3]
        await image.close()
        return guest

    guest = asyncio.run(main())
    sectors = [guest[start] for start in range(M, M + 8 * 512, 512)]
    assert sectors == [2, 3, 1, 1, 1, 2, 1, 1]
    assert flattened(tmp_path / "top.avhdx") == guest
    assert (tmp_path / "parent.vhdx").read_bytes() == below
    assert (tmp_path / "middle.avhdx").read_bytes() == middle.content


def test_parent_that_was_changed_since_is_refused_by_its_guids(tmp_path: Path) -> None:
    write(tmp_path / "parent.vhdx", filled(4 * M, b"\x01", data_write_guid=OTHER))
    write(tmp_path / "child.vhdx", Builder(4 * M, parent=".\\parent.vhdx"))
    with pytest.raises(ImageError, match=str(OTHER)) as caught:
        asyncio.run(read(tmp_path / "child.vhdx", 0, 512))
    assert str(DATA_WRITE_GUID) in str(caught.value)


def test_writing_to_a_parent_makes_its_children_refuse_it(tmp_path: Path) -> None:
    """V4: and reading it does not."""
    write(tmp_path / "parent.vhdx", filled(4 * M, b"\x01"))
    write(tmp_path / "child.vhdx", Builder(4 * M, parent=".\\parent.vhdx"))

    async def touch(*, changes: bool) -> None:
        image = await open_image(tmp_path / "parent.vhdx")
        await bytes_of(image, 0, M)
        if changes:
            await image.write(0, b"x")
        await image.close()

    asyncio.run(touch(changes=False))
    assert asyncio.run(read(tmp_path / "child.vhdx", 0, 512)) == b"\x01" * 512
    asyncio.run(touch(changes=True))
    with pytest.raises(ImageError, match=str(DATA_WRITE_GUID)):
        asyncio.run(read(tmp_path / "child.vhdx", 0, 512))


def test_parent_whose_log_is_in_use_is_replayed_in_memory(tmp_path: Path) -> None:
    """Its DataWriteGuid is what it was: the child fits."""
    builder = filled(4 * M, b"\x01")
    block = builder.append(b"\x05" * M, M)
    page = bytearray(builder.content[BAT_OFFSET : BAT_OFFSET + 4096])
    struct.pack_into("<Q", page, 8, block | FULL)
    size = len(builder.content)
    entry = craft.entry(9, 0, (BAT_OFFSET, bytes(page)), flushed=size, last=size)
    builder.content[M : M + len(entry)] = entry
    builder.content[131072 : 131072 + 4096] = craft.header(3, log_guid=LOG_GUID)
    before = write(tmp_path / "parent.vhdx", builder)
    write(tmp_path / "child.vhdx", Builder(4 * M, parent=".\\parent.vhdx"))
    assert asyncio.run(read(tmp_path / "child.vhdx", 0, 3 * M)) == b"\x01" * M + b"\x05" * M + b"\x01" * M
    assert (tmp_path / "parent.vhdx").read_bytes() == before


def logged_child() -> bytes:
    """Its log says that block 1 is zero."""
    builder = Builder(4 * M, parent=".\\parent.vhdx")
    page = bytearray(builder.content[BAT_OFFSET : BAT_OFFSET + 4096])
    struct.pack_into("<Q", page, 8, ZERO)
    size = len(builder.content)
    entry = craft.entry(9, 0, (BAT_OFFSET, bytes(page)), flushed=size, last=size)
    builder.content[M : M + len(entry)] = entry
    builder.content[131072 : 131072 + 4096] = craft.header(3, log_guid=LOG_GUID)
    return bytes(builder.content)


def test_child_whose_parent_does_not_open_keeps_its_log(tmp_path: Path) -> None:
    content = logged_child()
    (tmp_path / "child.vhdx").write_bytes(content)
    with pytest.raises(ImageError, match=r"parent\.vhdx.*No such file"):
        asyncio.run(open_image(tmp_path / "child.vhdx"))
    write(tmp_path / "parent.vhdx", filled(4 * M, b"\x01", data_write_guid=OTHER))
    with pytest.raises(ImageError, match=str(OTHER)):
        asyncio.run(open_image(tmp_path / "child.vhdx"))
    assert (tmp_path / "child.vhdx").read_bytes() == content


@pytest.mark.parametrize("pages_max", [1, 1000])
def test_child_whose_log_is_in_use_is_replayed_when_its_parent_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages_max: int
) -> None:
    """Also where the log changes more than fits into memory."""
    monkeypatch.setattr(s, "REPLAY_PAGES_MAX", pages_max)
    (tmp_path / "child.vhdx").write_bytes(logged_child())
    write(tmp_path / "parent.vhdx", filled(4 * M, b"\x01"))

    async def main() -> bytes:
        image = await open_image(tmp_path / "child.vhdx")
        guest = await bytes_of(image, 0, 3 * M)
        await image.close()
        return guest

    assert asyncio.run(main()) == b"\x01" * M + bytes(M) + b"\x01" * M
    content = (tmp_path / "child.vhdx").read_bytes()
    assert content[BAT_OFFSET + 8] == ZERO
    assert [content[at + 48 : at + 64] for at in (65536, 131072)] == [bytes(16)] * 2


def test_parent_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "parent.vhdx").write_bytes(bytes(4 * M))
    write(tmp_path / "child.vhdx", Builder(4 * M, parent=".\\parent.vhdx"))
    with pytest.raises(ImageError, match=r"parent\.vhdx"):
        asyncio.run(read(tmp_path / "child.vhdx", 0, 512))


def test_parent_that_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path / "child.vhdx", Builder(4 * M, parent=".\\gone\\parent.vhdx"))
    with pytest.raises((ImageError, OSError), match="parent"):
        asyncio.run(read(tmp_path / "child.vhdx", 0, 512))


def test_parent_with_other_sectors_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "parent.vhdx", filled(4 * M, b"\x01", sector_size=4096))
    write(tmp_path / "child.vhdx", Builder(4 * M, parent=".\\parent.vhdx"))
    with pytest.raises(
        CorruptImage, match=r"logical sectors have 512 bytes, those of its parent .* 4096, expected the"
    ):
        asyncio.run(read(tmp_path / "child.vhdx", 0, 512))


@pytest.mark.parametrize("name", ["..", ".\\", "a\\..\\.."])
def test_locator_whose_paths_name_no_file_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "child.vhdx", Builder(4 * M, parent=name))
    with pytest.raises(ImageError, match="parent locator"):
        asyncio.run(read(tmp_path / "child.vhdx", 0, 512))


def test_file_that_is_its_own_parent_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "child.vhdx", Builder(4 * M, parent=".\\child.vhdx"))
    with pytest.raises((ImageError, OSError)):
        asyncio.run(read(tmp_path / "child.vhdx", 0, 512))


@pytest.mark.parametrize("name", [".\\PARENT.vhdx", ".\\gone\\Parent.VHDX", "C:\\vm\\parent.VHDX"])
def test_parent_whose_name_differs_in_case_is_found_in_the_end(tmp_path: Path, name: str) -> None:
    write(tmp_path / "Parent.vhdx", filled(4 * M, b"\x01"))
    write(tmp_path / "child.vhdx", Builder(4 * M, parent=name))
    assert asyncio.run(read(tmp_path / "child.vhdx", 0, 512)) == b"\x01" * 512


def test_parent_of_the_same_name_elsewhere_comes_before_one_that_differs_in_case(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "PARENT.vhdx", filled(4 * M, b"\x02"))
    write(tmp_path / "parent.vhdx", filled(4 * M, b"\x01"))
    write(tmp_path / "child.vhdx", Builder(4 * M, parent=".\\sub\\parent.vhdx"))
    assert asyncio.run(read(tmp_path / "child.vhdx", 0, 512)) == b"\x01" * 512


# The given parent


async def read_with(path: Path, parent: Path) -> bytes:
    image = await open_image(path, writable=False, parent=parent)
    try:
        return await bytes_of(image, 0, 512)
    finally:
        await image.close()


def test_given_parent_is_taken_in_place_of_the_one_that_is_named(tmp_path: Path) -> None:
    """Wherever it lies; of another GUID it is refused as any is."""
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    child = tmp_path / "in" / "child.vhdx"
    write(tmp_path / "in" / "parent.vhdx", filled(4 * M, b"\x01"))
    write(tmp_path / "out" / "moved.vhdx", filled(4 * M, b"\x02"))
    write(tmp_path / "out" / "other.vhdx", filled(4 * M, b"\x03", data_write_guid=OTHER))
    write(child, Builder(4 * M, parent=".\\parent.vhdx"))
    assert asyncio.run(read(child, 0, 512)) == b"\x01" * 512
    assert asyncio.run(read_with(child, tmp_path / "out" / "moved.vhdx")) == b"\x02" * 512
    with pytest.raises(ImageError) as caught:
        asyncio.run(read_with(child, tmp_path / "out" / "other.vhdx"))
    assert str(OTHER) in str(caught.value)
    assert f"expected {DATA_WRITE_GUID} (parent_linkage)" in str(caught.value)


def test_given_parent_that_is_missing_is_refused_though_the_named_one_is_there(tmp_path: Path) -> None:
    write(tmp_path / "parent.vhdx", filled(4 * M, b"\x01"))
    write(tmp_path / "child.vhdx", Builder(4 * M, parent=".\\parent.vhdx"))
    with pytest.raises(ImageError, match=r"the given parent '.*gone\.vhdx' cannot be opened: No such file"):
        asyncio.run(read_with(tmp_path / "child.vhdx", tmp_path / "gone.vhdx"))


def test_given_parent_is_of_the_first_image_and_its_own_parent_is_confined(tmp_path: Path) -> None:
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    write(tmp_path / "out" / "base.vhdx", filled(4 * M, b"\x01"))
    write(tmp_path / "out" / "middle.vhdx", Builder(4 * M, parent=".\\base.vhdx", data_write_guid=OTHER))
    write(tmp_path / "in" / "top.vhdx", Builder(4 * M, parent=".\\gone.vhdx", linkage=OTHER))

    async def main(roots: tuple[Path, ...]) -> bytes:
        middle = tmp_path / "out" / "middle.vhdx"
        image = await open_image(tmp_path / "in" / "top.vhdx", writable=False, parent=middle, roots=roots)
        try:
            return await bytes_of(image, 0, 512)
        finally:
            await image.close()

    with pytest.raises(ImageError, match=r"middle\.vhdx: parent locator 'base\.vhdx' leads outside"):
        asyncio.run(main(()))
    assert asyncio.run(main((tmp_path / "out",))) == b"\x01" * 512


def test_given_parent_of_an_image_without_one_is_refused(tmp_path: Path) -> None:
    parent = tmp_path / "parent.vhdx"
    write(parent, Builder(4 * M))
    write(tmp_path / "disk.vhdx", Builder(4 * M))
    with pytest.raises(ConfigError, match="a parent is given and the image has none, expected a differencing image"):
        asyncio.run(read_with(tmp_path / "disk.vhdx", parent))
    (tmp_path / "disk.raw").write_bytes(bytes(M))
    with pytest.raises(ConfigError, match="a parent is given to a raw image, expected a differencing vhdx image"):
        asyncio.run(read_with(tmp_path / "disk.raw", parent))


# Damage that can be lived with


def test_one_bad_copy_of_header_and_region_table_is_told_and_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    builder = filled(4 * M, b"\x01")
    builder.content[131072 + 100] ^= 1
    builder.content[192 * 1024] ^= 1
    before = write(tmp_path / "disk.vhdx", builder)
    assert asyncio.run(read(tmp_path / "disk.vhdx", 0, 512)) == b"\x01" * 512
    assert [record.getMessage().removeprefix(f"{tmp_path}/") for record in caplog.records] == [
        f"disk.vhdx: {name} is damaged, the other copy is used; nbdimg check --repair all mends it"
        for name in ("header 2", "region table 1")
    ]
    assert (tmp_path / "disk.vhdx").read_bytes() == before


def test_header_that_is_damaged_is_written_anew_by_the_first_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    builder = filled(4 * M, b"\x01")
    builder.content[65536 + 100] ^= 1
    write(tmp_path / "disk.vhdx", builder)

    async def main() -> None:
        image = await open_image(tmp_path / "disk.vhdx")
        await image.write(0, b"x")
        await image.close()

    asyncio.run(main())
    assert "header 1 is damaged" in caplog.text
    caplog.clear()
    assert asyncio.run(read(tmp_path / "disk.vhdx", 0, 2)) == b"x\x01"
    assert caplog.text == ""


@pytest.mark.parametrize("writable", [False, True])
def test_lost_log_is_refused_unless_it_is_accepted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, writable: bool
) -> None:
    builder = filled(4 * M, b"\x01")
    builder.content[131072 : 131072 + 4096] = craft.header(3, log_guid=LOG_GUID)
    before = write(tmp_path / "disk.vhdx", builder)

    async def main(*, accepts: bool) -> bytes:
        image = await open_image(tmp_path / "disk.vhdx", writable=writable, accepts_lost_log=accepts)
        try:
            return await bytes_of(image, 0, 512)
        finally:
            await image.close()

    with pytest.raises(CorruptImage, match=r"holds no valid sequence .*; --accept-lost-log goes on without it"):
        asyncio.run(main(accepts=False))
    assert (tmp_path / "disk.vhdx").read_bytes() == before
    assert asyncio.run(main(accepts=True)) == b"\x01" * 512
    assert ["what it held is lost, as was accepted" in each.getMessage() for each in caplog.records] == [True]
    after = (tmp_path / "disk.vhdx").read_bytes()
    if not writable:
        assert after == before
    else:
        assert after[192 * 1024 :] == before[192 * 1024 :]
        assert asyncio.run(read(tmp_path / "disk.vhdx", 0, 512)) == b"\x01" * 512


def test_accepting_a_lost_log_loses_no_log_that_is_whole(tmp_path: Path) -> None:
    """Nor a file that was truncated."""
    builder = filled(2 * M, b"\x01")
    page = bytearray(builder.content[BAT_OFFSET : BAT_OFFSET + 4096])
    struct.pack_into("<Q", page, 0, 2)
    size = len(builder.content)
    builder.content[131072 : 131072 + 4096] = craft.header(3, log_guid=LOG_GUID)

    async def main() -> bytes:
        image = await open_image(tmp_path / "disk.vhdx", writable=False, accepts_lost_log=True)
        try:
            return await bytes_of(image, 0, 512)
        finally:
            await image.close()

    entry = craft.entry(9, 0, (BAT_OFFSET, bytes(page)), flushed=size, last=size)
    builder.content[M : M + len(entry)] = entry
    write(tmp_path / "disk.vhdx", builder)
    assert asyncio.run(main()) == bytes(512)
    entry = craft.entry(9, 0, (BAT_OFFSET, bytes(page)), flushed=size + M, last=size + M)
    builder.content[M : M + len(entry)] = entry
    write(tmp_path / "disk.vhdx", builder)
    with pytest.raises(CorruptImage, match="truncated"):
        asyncio.run(main())


def test_lost_log_of_a_parent_is_accepted_with_the_childs(tmp_path: Path) -> None:
    builder = filled(4 * M, b"\x01")
    builder.content[131072 : 131072 + 4096] = craft.header(3, log_guid=LOG_GUID)
    write(tmp_path / "parent.vhdx", builder)
    write(tmp_path / "child.vhdx", Builder(4 * M, parent=".\\parent.vhdx"))

    async def main(*, accepts: bool) -> bytes:
        image = await open_image(tmp_path / "child.vhdx", writable=False, accepts_lost_log=accepts)
        try:
            return await bytes_of(image, 0, 512)
        finally:
            await image.close()

    with pytest.raises(CorruptImage, match=r"parent\.vhdx: LogGuid is"):
        asyncio.run(main(accepts=False))
    assert asyncio.run(main(accepts=True)) == b"\x01" * 512


def test_internal_snapshot_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "disk.vhdx", Builder(4 * M))
    with pytest.raises(ConfigError, match="a vhdx image has no internal snapshots"):
        asyncio.run(open_image(tmp_path / "disk.vhdx", writable=False, snapshot="1"))


# The table's bounds


def test_table_that_is_too_small_for_the_disk_is_refused() -> None:
    """1 MiB holds 131072 entries: 131040 blocks of 1 MiB take 131040 + 31, 131041 take 131041 + 31 and still fit."""

    async def main() -> None:
        await opened(Builder(131041 * M).content)
        with pytest.raises(
            CorruptImage, match=r"BAT region has 1048576 bytes, expected at least 1048584 for 131042 bl"
        ):
            await opened(Builder(131042 * M).content)

    asyncio.run(main())


def test_table_behind_the_end_of_the_file_is_refused() -> None:
    async def main() -> None:
        content = Builder(8 * M).content
        await opened(content[: 3 * M + 1])
        with pytest.raises(CorruptImage, match="the BAT ends at 3145792, expected inside the file's 3145728 bytes"):
            await opened(content[: 3 * M])

    asyncio.run(main())


@pytest.mark.parametrize("writable", [False, True])
def test_open_of_64_tib_takes_little_time_and_memory(tmp_path: Path, writable: bool) -> None:
    """1 MiB blocks: 64 Mi entries, a table of 513 MiB in a sparse file."""
    size = 64 << 40
    table = craft.region_table(craft.region(craft.BAT, 3 * M, 513 * M), craft.region(craft.METADATA, 2 * M))
    content = craft.image(table=table, meta=craft.metadata(virtual_size=size))
    last = (1 << 26) - 1
    index = last + last // 4096
    path = tmp_path / "large.vhdx"
    with path.open("wb") as file:
        file.write(content)
        file.truncate(517 * M)
        file.seek(BAT_OFFSET + 8 * index)
        file.write(struct.pack("<Q", (516 * M) | FULL))
        file.seek(516 * M)
        file.write(b"\x77" * M)

    async def main() -> tuple[float, bytes]:
        started = time.process_time()
        image = await open_image(path, writable=writable)
        took = time.process_time() - started
        assert image.size == size
        end = await bytes_of(image, size - M - 512, M + 512)
        await image.close()
        return took, end

    took, end = asyncio.run(main())
    assert end == bytes(512) + b"\x77" * M
    assert took < 0.1
    tracemalloc.start()
    asyncio.run(main())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * M


def test_size_that_is_whole_sectors_but_not_whole_blocks_is_served() -> None:
    async def main() -> None:
        image = await opened(Builder(M + 512).content)
        assert image.size == M + 512
        assert isinstance(image.driver.file, MemoryFile)
        assert await bytes_of(image, M, 512) == bytes(512)

    asyncio.run(main())
