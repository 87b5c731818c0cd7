"""What changes do to a file: their order, the barriers they cost, the states and bits they leave."""

from __future__ import annotations

import asyncio
import errno
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nbdimg.formats import open_file
from nbdimg.formats.options import OpenOptions
from nbdimg.formats.vhdx.check import check
from nbdimg.formats.vhdx.driver import VhdxDriver
from nbdimg.formats.vhdx.header import Header
from nbdimg.image.image import Image
from nbdimg.storage.file import Buffer
from nbdimg.storage.memory import MemoryFile
from nbdimg.storage.ordering import Write
from tests.formats.vhdx.craft import DATA_WRITE_GUID, FILE_WRITE_GUID, ZERO_GUID, M
from tests.formats.vhdx.test_bat import OneGate
from tests.support.faultfile import FaultFile
from tests.support.reading import bytes_of
from tests.support.vhdximages import (
    BAT_OFFSET,
    DATA_OFFSET,
    FULL,
    IS_FIXED,
    NOT_PRESENT,
    PARTIAL,
    UNDEFINED,
    UNMAPPED,
    ZERO,
    Builder,
    judge,
)

PARENT = b"\x11" * (8 * M)


class LoggedFile(MemoryFile):
    """Notes each change by the region it falls into, and each barrier."""

    def __init__(self, content: Buffer, *, writable: bool = True) -> None:
        super().__init__(content, "disk.vhdx", writable=writable)
        self.log: list[str] = []

    def _note(self, offset: int) -> None:
        self.log.append({0: "header", 1: "log", 2: "metadata", 3: "BAT"}.get(offset // M, "space"))

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        assert self.is_writable, "a read-only file was written"
        self._note(offset)
        return super().try_pwrite(offset, data)

    async def fdatasync(self) -> None:
        self.log.append("|")

    async def punch(self, offset: int, length: int) -> bool:
        self.log.append("punch")
        return await super().punch(offset, length)

    async def truncate(self, size: int) -> None:
        self.log.append("size")
        await super().truncate(size)

    def entry(self, index: int) -> tuple[int, int]:
        """(state, offset) in the table on disk."""
        (entry,) = struct.unpack_from("<Q", self.content, BAT_OFFSET + 8 * index)
        return entry & 0xFFFFF, entry & ~0xFFFFF

    def header(self) -> Header:
        headers = [Header.from_bytes(bytes(self.content[at : at + 4096])) for at in (65536, 131072)]
        return max((each for each in headers if each), key=lambda each: each.sequence_number)


async def opened(builder: Builder, *, writable: bool = True) -> tuple[Image, LoggedFile]:
    below = Builder(len(PARENT))
    below.add_guest(PARENT)
    file = LoggedFile(builder.content, writable=writable)
    image = await open_file(file, "vhdx", OpenOptions(OneGate(bytes(below.content)), writable=writable))
    await image.flush()
    file.log.clear()
    return image, file


def child() -> Builder:
    return Builder(8 * M, parent=".\\parent.vhdx")


# Order and barriers


def test_nothing_is_written_before_the_first_change() -> None:
    async def main() -> None:
        builder = Builder(8 * M)
        builder.add_full(0, b"x" * M)
        image, file = await opened(builder)
        await bytes_of(image, 0, 8 * M)
        await image.flush()
        await image.close()
        assert file.log == []
        assert file.content == builder.content

    asyncio.run(main())


@pytest.mark.parametrize("state", [NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED])
@pytest.mark.parametrize("kind", ["dynamic", "child"])
def test_trim_and_zeroes_that_change_nothing_begin_no_session(kind: str, state: int) -> None:
    """B4: what is zero stays as it is, and a part of a block that only the parent has cannot be given back."""

    async def main() -> None:
        builder = child() if kind == "child" else Builder(8 * M)
        for block in range(8):
            builder.set_block(block, state)
        shows_parent = kind == "child" and state == NOT_PRESENT
        image, file = await opened(builder)
        await image.trim(4096, 4096)
        if not shows_parent:
            await image.trim(0, 4 * M)
            await image.zero(M, 3 * M + 512, may_unmap=True, is_fast_only=False)
            await image.zero(M, 3 * M + 512, may_unmap=False, is_fast_only=True)
        await image.flush()
        await image.close()
        assert set(file.log) <= {"|"}
        assert file.content == builder.content

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["dynamic", "child"])
def test_trim_that_changes_something_begins_a_session(kind: str) -> None:
    """The control of the one above: data goes, or the parent is hidden."""

    async def main() -> None:
        builder = child() if kind == "child" else Builder(8 * M)
        if kind == "dynamic":
            builder.add_full(1, b"x" * M)
        image, file = await opened(builder)
        await image.trim(M, M)
        assert file.header().data_write_guid != DATA_WRITE_GUID
        assert await bytes_of(image, M, M) == bytes(M)
        await image.close()

    asyncio.run(main())


def test_first_allocation_begins_the_session_and_costs_two_barriers_more() -> None:
    """V1, V3, V4, V5."""

    async def main() -> None:
        image, file = await opened(Builder(8 * M))
        await image.write(M + 512, b"x" * 512)
        assert file.log == ["log", "|", "header", "|", "header", "|", "size", "space"]
        file.log.clear()
        await image.flush()
        assert file.log == ["|", "log", "|", "BAT"]

    asyncio.run(main())


@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_flush_of_allocations_costs_two_barriers_however_many_there_are(blocks: int) -> None:
    async def main() -> None:
        image, file = await opened(Builder(8 * M))
        await image.write(0, b"x" * 512)
        await image.flush()
        file.log.clear()
        for block in range(blocks):
            await image.write(block * M, b"y" * 4096)
        await image.flush()
        assert file.log == ["space"] * blocks + (["|"] if blocks == 1 else ["|", "log", "|", "BAT"])
        await image.flush()
        assert file.log.count("|") == (1 if blocks == 1 else 2)

    asyncio.run(main())


def test_partially_present_block_takes_one_entry_for_table_and_bitmap() -> None:
    async def main() -> None:
        image, file = await opened(child())
        await image.write(512, b"x" * 512)
        file.log.clear()
        await image.flush()
        assert file.log[:3] == ["|", "log", "|"]
        assert sorted(file.log[3:]) == ["BAT", "BAT", "space"]

    asyncio.run(main())


def test_flush_writes_no_page_again_that_is_in_place() -> None:
    async def main() -> None:
        image, file = await opened(child())
        await image.write(512, b"x" * 512)
        await image.flush()
        file.log.clear()
        await image.write(512, b"y" * 512)
        await image.flush()
        assert file.log == ["space", "|"]

    asyncio.run(main())


def test_flush_that_put_its_pages_in_place_may_be_followed_by_one_of_several_entries() -> None:
    async def main() -> None:
        image, file = await opened(Builder(8 * M))
        await image.write(0, b"x" * M)
        await image.flush()
        driver = image.driver
        assert isinstance(driver, VhdxDriver)
        assert driver._journal is not None
        pages = [Write(file, BAT_OFFSET + 4096 * number, bytes(4096)) for number in range(127)]
        assert len(driver._journal.stages(pages, 4 * M, 4 * M)) == 4

    asyncio.run(main())


def test_block_that_could_not_be_written_whole_gives_its_space_back_at_once() -> None:
    """Where the disk is full, metadata needs it."""

    async def main() -> None:
        image, inner = await opened(Builder(8 * M))
        file = FaultFile(inner, slow_only=True)
        await image.write(0, b"x" * M)
        await image.flush()
        driver = image.driver
        assert isinstance(driver, VhdxDriver)
        driver.bat._file = file
        file.fail("pwrite", errno.ENOSPC)
        with pytest.raises(OSError, match="No space left"):
            await image.write(M, b"y" * M)
        assert file.calls[-2:] == ["pwrite", "punch"]
        assert [page.pin_count for page in driver.bat.pages.slices.values()] == [0]
        file.heal()
        await image.write(0, b"z")
        await image.flush()
        await image.write(M, b"y" * M)
        await image.close()
        assert inner.entry(1) == (FULL, inner.entry(0)[1] + M)

    asyncio.run(main())


def test_trim_is_in_the_log_before_its_space_is_punched() -> None:
    """B2."""

    async def main() -> None:
        builder = Builder(8 * M)
        builder.add_full(0, b"x" * M)
        image, file = await opened(builder)
        await image.write(0, b"y")
        file.log.clear()
        await image.trim(0, M)
        await image.flush()
        assert file.log == ["|", "log", "|", "BAT", "punch"]
        assert not any(file.content[DATA_OFFSET : DATA_OFFSET + M])

    asyncio.run(main())


def test_trimmed_space_is_not_used_again_before_a_flush() -> None:
    """B2: until then its old bytes are what a crash would bring back."""

    async def main() -> None:
        builder = Builder(8 * M)
        old = builder.add_full(0, b"x" * M)
        image, file = await opened(builder)
        await image.trim(0, M)
        for block in (1, 2, 3):
            await image.write(block * M, b"y" * M)
        assert file.content[old : old + M] == b"x" * M
        await image.flush()
        await image.write(4 * M, b"z" * 4096)
        (extent,) = await image.map(4 * M, 4096, 10)
        assert extent.file_offset == old
        await image.close()
        assert await bytes_of(image, 0, 5 * M) == bytes(M) + b"y" * (3 * M) + b"z" * 4096 + bytes(M - 4096)

    asyncio.run(main())


def test_close_empties_the_log_and_then_cuts_off_what_was_grown_ahead() -> None:
    async def main() -> None:
        image, file = await opened(Builder(8 * M))
        await image.write(0, b"x")
        await image.flush()
        assert file.size == 64 * M
        file.log.clear()
        await image.close()
        assert file.log == ["|", "header", "|", "header", "|", "size"]
        assert file.size == DATA_OFFSET + M
        assert file.header().log_guid == ZERO_GUID

    asyncio.run(main())


def test_close_cuts_off_what_was_trimmed_at_the_end() -> None:
    """Nothing else would: later sessions do not look for it, and a check calls it a leak."""

    async def main() -> None:
        builder = Builder(8 * M)
        builder.add_guest(b"x" * (6 * M))
        image, file = await opened(builder)
        for block in (5, 4):
            await image.trim(block * M, M)
        await image.flush()
        await image.trim(3 * M, M)
        await image.close()
        assert file.size == DATA_OFFSET + 3 * M
        assert (await check(file)).is_clean

    asyncio.run(main())


def test_close_leaves_the_end_of_a_block_device_where_it_is() -> None:
    async def main() -> None:
        builder = Builder(8 * M)
        builder.add_guest(b"x" * (6 * M))
        file = FaultFile(memory := MemoryFile(bytes(builder.content)))
        file.fail("truncate", errno.EINVAL)
        image = await open_file(file, "vhdx", OpenOptions(OneGate(b""), writable=True))
        await image.trim(5 * M, M)
        await image.close()
        report = await check(MemoryFile(memory.content))
        assert (report.log, report.corruptions, report.leaks) == ("clean", 0, 1)

    asyncio.run(main())


def test_guids_change_with_the_first_change_and_no_other() -> None:
    """V4; both slots hold them, and what was abandoned keeps its log."""

    async def main() -> None:
        image, file = await opened(Builder(8 * M))
        assert (file.header().file_write_guid, file.header().data_write_guid) == (FILE_WRITE_GUID, DATA_WRITE_GUID)
        await image.write(0, b"x")
        first = file.header()
        assert not {first.file_write_guid, first.data_write_guid} & {FILE_WRITE_GUID, DATA_WRITE_GUID, ZERO_GUID}
        assert first.log_guid != ZERO_GUID
        await image.write(M, b"x")
        await image.flush()
        assert file.header() == first
        await image.driver.abandon()
        assert file.header() == first

    asyncio.run(main())


def test_abandoned_image_holds_what_was_flushed_and_is_replayed() -> None:
    """The replay gives the file a new FileWriteGuid and leaves DataWriteGuid: no guest saw a change."""

    async def main() -> None:
        image, file = await opened(Builder(8 * M))
        await image.write(0, b"x" * M)
        await image.flush()
        before = file.header()
        file.content[BAT_OFFSET : BAT_OFFSET + 4096] = bytes(4096)
        image2 = await open_file(LoggedFile(file.content, writable=False), "vhdx", OpenOptions(OneGate(b"")))
        assert await bytes_of(image2, 0, M) == b"x" * M
        again = LoggedFile(file.content)
        image3 = await open_file(again, "vhdx", OpenOptions(OneGate(b""), writable=True))
        assert await bytes_of(image3, 0, M) == b"x" * M
        assert again.header().data_write_guid == before.data_write_guid
        assert again.header().file_write_guid != before.file_write_guid
        assert again.header().log_guid == ZERO_GUID

    asyncio.run(main())


# States and bits


async def whole(image: Image) -> None:
    await image.write(2 * M, b"w" * M)


async def part(image: Image) -> None:
    await image.write(2 * M + 600, b"p" * 100)


async def trim(image: Image) -> None:
    await image.trim(2 * M, M)


async def zero(image: Image) -> None:
    await image.zero(2 * M, M, may_unmap=True, is_fast_only=False)


async def keep(image: Image) -> None:
    await image.zero(2 * M, M, may_unmap=False, is_fast_only=False)


Step = Callable[[Image], Awaitable[None]]


@pytest.mark.parametrize(
    ("kind", "steps", "state"),
    [
        ("dynamic", (part,), FULL),
        ("dynamic", (whole, trim), UNMAPPED),
        ("dynamic", (whole, zero), ZERO),
        ("dynamic", (whole, keep), FULL),
        ("dynamic", (trim,), NOT_PRESENT),
        ("dynamic", (zero,), NOT_PRESENT),
        ("dynamic", (whole, zero, part), FULL),
        ("fixed", (trim,), FULL),
        ("fixed", (zero,), FULL),
        ("child", (part,), PARTIAL),
        ("child", (whole,), FULL),
        ("child", (part, whole), FULL),
        ("child", (trim,), UNMAPPED),
        ("child", (zero,), ZERO),
        ("child", (keep,), FULL),
        ("child", (part, trim), UNMAPPED),
        ("child", (zero, part), FULL),
        ("child", (trim, part), FULL),
    ],
)
def test_state_of_a_block_after_changes(kind: str, steps: tuple[Step, ...], state: int) -> None:
    """A state without data has no offset: "reserved, must be 0" for ZERO."""
    builder = child() if kind == "child" else Builder(8 * M, flags=IS_FIXED if kind == "fixed" else 0)
    if kind == "fixed":
        builder.add_guest(b"f" * (8 * M))

    async def main() -> None:
        for flushes in (False, True):
            image, file = await opened(builder)
            for step in steps:
                await step(image)
                if flushes:
                    await image.flush()
            expected = await bytes_of(image, 0, 8 * M)
            await image.close()
            found, offset = file.entry(2)
            assert found == state
            assert (offset >= DATA_OFFSET) is (state in (FULL, PARTIAL))
            assert await bytes_of(await open_again(file), 0, 8 * M) == expected

    asyncio.run(main())


async def open_again(file: LoggedFile) -> Image:
    below = Builder(len(PARENT))
    below.add_guest(PARENT)
    return await open_file(MemoryFile(file.content, writable=False), "vhdx", OpenOptions(OneGate(bytes(below.content))))


def test_bits_of_written_sectors_are_set_and_no_others() -> None:
    """Block 2 begins with bit 4096; sectors 1 and 9 to 11 of it."""

    async def main() -> None:
        image, file = await opened(child())
        await image.write(2 * M + 600, b"p" * 100)
        await image.write(2 * M + 9 * 512, b"q" * 1025)
        await image.close()
        state, bitmap = file.entry(4096)
        assert state == FULL
        bits = file.content[bitmap : bitmap + M]
        assert bits[512:514] == bytes([0b0000_0010, 0b0000_1110])
        assert sum(bits) == 2 + 14
        expected = bytearray(PARENT)
        expected[2 * M + 600 : 2 * M + 700] = b"p" * 100
        expected[2 * M + 9 * 512 : 2 * M + 9 * 512 + 1025] = b"q" * 1025
        assert await bytes_of(await open_again(file), 0, 8 * M) == expected

    asyncio.run(main())


def test_bits_that_another_program_left_of_an_absent_block_do_not_count() -> None:
    async def main() -> None:
        builder = child()
        bitmap = builder.append(b"\xff" * 4096, M)
        builder.set_entry(4096, bitmap | FULL)
        image, file = await opened(builder)
        await image.write(2 * M, b"q" * 512)
        await image.close()
        assert file.content[bitmap + 512 : bitmap + 768] == b"\x01" + bytes(255)
        assert file.content[bitmap : bitmap + 512] == b"\xff" * 512
        assert file.content[bitmap + 768 : bitmap + 4096] == b"\xff" * (4096 - 768)
        assert await bytes_of(await open_again(file), 2 * M, M) == b"q" * 512 + PARENT[: M - 512]

    asyncio.run(main())


def test_child_with_several_blocks_shares_one_bitmap() -> None:
    async def main() -> None:
        image, file = await opened(child())
        for block in range(8):
            await image.write(block * M + 1024, bytes([block + 1]) * 512)
            await image.flush()
        await image.close()
        assert file.size == DATA_OFFSET + 9 * M
        entries = [file.entry(index) for index in (*range(8), 4096)]
        assert [state for state, _ in entries] == [PARTIAL] * 8 + [FULL]
        assert sorted(offset for _, offset in entries) == [DATA_OFFSET + n * M for n in range(9)]

    asyncio.run(main())


def test_strained_tables_are_flushed_on_the_way(tmp_path: Path) -> None:
    """Every written block changes another page of the table."""

    async def main() -> LoggedFile:
        builder = Builder(12 * 512 * M)
        image, file = await opened(builder)
        driver = image.driver
        assert isinstance(driver, VhdxDriver)
        driver.bat.pages._slices_max = 4
        for number in range(12):
            await image.write(number * 512 * M, struct.pack("<Q", number + 1) * 64)
        assert file.log.count("log") > 3
        assert len(driver.bat.pages.slices) <= 6
        for number in range(12):
            assert await bytes_of(image, number * 512 * M, 512) == struct.pack("<Q", number + 1) * 64
        await image.close()
        return file

    path = tmp_path / "disk.vhdx"
    file = asyncio.run(main())
    path.write_bytes(file.content)
    guest = bytearray(M)
    guest[:512] = struct.pack("<Q", 1) * 64
    again = LoggedFile(file.content, writable=False)

    async def first() -> bytes:
        return await bytes_of(await open_file(again, "vhdx", OpenOptions(OneGate(b""))), 0, M)

    assert asyncio.run(first()) == guest


def test_short_last_block_is_whole_in_the_file(tmp_path: Path) -> None:
    async def main() -> bytes:
        image, file = await opened(Builder(M + 512))
        await image.write(M, b"x" * 512)
        await image.close()
        assert file.size == DATA_OFFSET + M
        return bytes(file.content)

    path = tmp_path / "disk.vhdx"
    path.write_bytes(asyncio.run(main()))
    judge(path, bytes(M) + b"x" * 512)
