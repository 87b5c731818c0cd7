"""The log of a file that is written: where entries go, that one is active at every moment, and the headers' rules."""

from __future__ import annotations

import asyncio
import errno
import struct
from dataclasses import dataclass
from uuid import UUID

import pytest

from nbdimg.errors import UnsupportedFeature
from nbdimg.formats.vhdx.header import Header, load_headers
from nbdimg.formats.vhdx.journal import Journal
from nbdimg.formats.vhdx.log import Sequence
from nbdimg.storage.file import Buffer
from nbdimg.storage.memory import MemoryFile
from nbdimg.storage.ordering import Plan, Stage, UnwrittenError, Write, run
from tests.formats.vhdx import craft
from tests.formats.vhdx.craft import DATA_WRITE_GUID, FILE_WRITE_GUID, ZERO_GUID, M
from tests.formats.vhdx.rings import find_active
from tests.support.faultfile import FaultFile
from tests.support.vhdximages import Builder

SECTOR = 4096


class Noted(MemoryFile):
    """Notes the offset and length of each write, and each barrier as "|"."""

    def __init__(self, content: Buffer) -> None:
        super().__init__(content)
        self.log: list[tuple[int, int] | str] = []

    async def pwrite(self, offset: int, data: Buffer) -> None:
        self.log.append((offset, memoryview(data).nbytes))
        await super().pwrite(offset, data)

    async def fdatasync(self) -> None:
        self.log.append("|")


@dataclass
class Session:
    file: Noted
    journal: Journal

    def header(self) -> Header:
        """The current one."""
        headers = [Header.from_bytes(bytes(self.file.content[at : at + SECTOR])) for at in (65536, 131072)]
        return max((each for each in headers if each), key=lambda each: each.sequence_number)

    def active(self) -> Sequence | None:
        header = self.header()
        return find_active(self.file.content[header.log_offset : header.log_offset + header.log_length], header)

    async def flush(self, count: int, fill: int = 1) -> None:
        """So many pages from 3 MiB on."""
        pages = [Write(self.file, 3 * M + SECTOR * number, bytes([fill]) * SECTOR) for number in range(count)]
        await run(Plan(tuple(self.journal.stages(pages, 4 * M, 4 * M))))
        self.journal.written()


async def begun(log_length: int = M) -> Session:
    session = await idle(log_length)
    await session.journal.load(0)
    session.file.log.clear()
    return session


async def idle(log_length: int = M) -> Session:
    file = Noted(Builder(8 * M).content)
    if log_length > M:
        for at, number in ((65536, 1), (131072, 2)):
            file.content[at : at + SECTOR] = craft.header(number, log_length=log_length, log_offset=4 * M)
        file.content += bytes(log_length)
    return Session(file, Journal(file, await load_headers(file)))


def test_session_begins_with_an_empty_entry_and_two_headers() -> None:
    """V3, V4: the entry is durable before a header names it."""

    async def main() -> None:
        session = await idle()
        assert not session.journal.has_begun
        await session.journal.load(0)
        assert session.journal.has_begun
        assert session.file.log == [(M, SECTOR), "|", (65536, SECTOR), "|", (131072, SECTOR), "|"]
        first, second = (Header.from_bytes(bytes(session.file.content[at : at + SECTOR])) for at in (65536, 131072))
        assert first is not None
        assert second is not None
        assert (first.sequence_number, second.sequence_number) == (3, 4)
        for guid in ("file_write_guid", "data_write_guid", "log_guid"):
            assert getattr(first, guid) == getattr(second, guid)
        assert first.file_write_guid not in (FILE_WRITE_GUID, ZERO_GUID)
        assert first.data_write_guid not in (DATA_WRITE_GUID, ZERO_GUID)
        assert first.log_guid != ZERO_GUID
        active = session.active()
        assert active is not None
        assert (active.head.descriptor_count, active.head.position, active.head.tail) == (0, 0, 0)
        assert (active.head.flushed_offset, active.head.last_offset) == (4 * M, 4 * M)

    asyncio.run(main())


def test_session_begins_once_for_all_who_ask() -> None:
    async def main() -> None:
        session = await idle()
        await asyncio.gather(*(session.journal.load(0) for _ in range(5)))
        await session.journal.load(0)
        assert session.file.log.count((M, SECTOR)) == 1

    asyncio.run(main())


def test_session_ends_with_a_log_that_is_empty_and_guids_that_stay() -> None:
    async def main() -> None:
        session = await begun()
        before = session.header()
        await session.flush(3)
        session.file.log.clear()
        await session.journal.end()
        assert session.file.log == ["|", (65536, SECTOR), "|", (131072, SECTOR), "|"]
        after = session.header()
        assert (after.log_guid, after.sequence_number) == (ZERO_GUID, 6)
        assert (after.file_write_guid, after.data_write_guid) == (before.file_write_guid, before.data_write_guid)
        await session.journal.load(0)
        again = session.header()
        guids: set[UUID] = {before.log_guid, again.log_guid, before.data_write_guid, again.data_write_guid}
        assert len(guids | {before.file_write_guid, again.file_write_guid}) == 6
        assert session.active() is not None

    asyncio.run(main())


def test_one_entry_goes_to_the_log_and_then_its_pages_to_their_places() -> None:
    """V1; an entry of two pages takes 12 KiB, neighbours in place are one write."""

    async def main() -> None:
        session = await begun()
        await session.flush(2)
        assert session.file.log == [(M + SECTOR, 3 * SECTOR), "|", (3 * M, 2 * SECTOR)]
        active = session.active()
        assert active is not None
        assert (active.head.position, active.head.tail, active.head.descriptor_count) == (SECTOR, SECTOR, 2)
        assert active.end == 4 * SECTOR

    asyncio.run(main())


def test_every_entry_is_active_when_it_is_durable_around_the_ring_twice() -> None:
    """Entries of 8 KiB to half the log; each one's tail is itself, numbers go up by one."""

    async def main() -> None:
        session = await begun()
        first = session.active()
        assert first is not None
        number, position = first.head.sequence_number, SECTOR
        for step in range(60):
            count = (1, 2, 126, 7, 40, 3)[step % 6]
            await session.flush(count, step % 200 + 1)
            active = session.active()
            assert active is not None, step
            number += 1
            assert (active.head.sequence_number, active.head.position) == (number, position), step
            assert active.head.tail == position
            assert active.head.descriptor_count == count
            position = (position + SECTOR * (1 + count)) % M

    asyncio.run(main())


def test_entry_of_which_any_prefix_is_written_leaves_the_one_before_active() -> None:
    """V6: also where it wraps, and where both take half of the log."""

    async def main() -> None:
        session = await begun()
        for _ in range(5):
            await session.flush(126)
            active = session.active()
            assert active is not None
            stages = session.journal.stages(
                [Write(session.file, 3 * M + SECTOR * number, b"y" * SECTOR) for number in range(126)], 4 * M, 4 * M
            )
            before = bytes(session.file.content)
            for cut in (1, SECTOR, 64 * SECTOR, 126 * SECTOR):
                left = cut
                for write in stages[0].writes:
                    await session.file.pwrite(write.offset, write.data[:left])
                    left = max(0, left - len(write.data))
                found = session.active()
                assert found is not None
                assert found.head.sequence_number == active.head.sequence_number
                session.file.content[:] = before

    asyncio.run(main())


def test_more_pages_than_half_the_log_take_several_entries() -> None:
    """V2: the second begins when the first one's pages are durable in place. 1 MiB holds 126 pages in an entry."""

    async def main() -> None:
        session = await begun()
        await session.flush(300)
        lengths = [127 * SECTOR, 127 * SECTOR, 49 * SECTOR]
        file = session.file
        pieces = [126 * SECTOR, 126 * SECTOR, 48 * SECTOR]
        entries = [M + SECTOR, M + 128 * SECTOR, M + 255 * SECTOR]
        assert file.log[:6] == [(entries[0], lengths[0]), "|", (3 * M, pieces[0]), "|", (entries[1], lengths[1]), "|"]
        assert file.log[6:] == [
            (3 * M + pieces[0], pieces[1]),
            "|",
            (entries[2], SECTOR),
            (M, 48 * SECTOR),
            "|",
            (3 * M + 252 * SECTOR, pieces[2]),
        ]
        active = session.active()
        assert active is not None
        assert (active.head.position, active.head.tail) == (255 * SECTOR, 255 * SECTOR)
        assert active.end == 48 * SECTOR

    asyncio.run(main())


@pytest.mark.parametrize(("log_length", "pages"), [(M, 126), (2 * M, 254), (4 * M, 508)])
def test_entry_takes_at_most_half_of_the_log(log_length: int, pages: int) -> None:
    """V6: 2 MiB: 2 sectors of descriptors and 254 pages are 256 sectors."""

    async def main() -> None:
        session = await begun(log_length)
        await session.flush(pages)
        assert session.file.log.count("|") == 1
        await session.flush(pages + 1)
        assert session.file.log.count("|") == 4

    asyncio.run(main())


async def fails(session: Session, count: int, method: str) -> None:
    """A flush of so many pages whose `method` finds no space: "log" or "place", at the last entry."""
    file = session.file
    pages = [Write(file, 3 * M + SECTOR * number, b"y" * SECTOR) for number in range(count)]
    stages = session.journal.stages(pages, 4 * M, 4 * M)
    failing = FaultFile(file)
    failing.fail("pwrite", errno.ENOSPC)
    at = len(stages) - (2 if method == "log" else 1)
    stages[at] = Stage(
        tuple(Write(failing, write.offset, write.data) for write in stages[at].writes),
        stages[at].files,
        stages[at].done,
    )
    with pytest.raises(UnwrittenError):
        await run(Plan(tuple(stages)))


def test_entry_that_was_not_written_is_written_to_the_same_place_again() -> None:
    async def main() -> None:
        session = await begun()
        await fails(session, 1, "log")
        await session.flush(1)
        assert session.file.log == [(M + SECTOR, 2 * SECTOR), "|", (3 * M, SECTOR)]

    asyncio.run(main())


@pytest.mark.parametrize("times", [1, 3])
def test_entry_that_was_not_put_in_place_stays_until_another_is_durable(times: int) -> None:
    """V6: where a part of it is in place, it alone says what belongs together."""

    async def main() -> None:
        session = await begun()
        for _ in range(times):
            await fails(session, 2, "place")
        durable = session.active()
        assert durable is not None
        stages = session.journal.stages([Write(session.file, 3 * M, b"z" * SECTOR)], 4 * M, 4 * M)
        (entry,) = stages[0].writes
        session.file.try_pwrite(entry.offset, entry.data[: len(entry.data) // 2])
        assert session.active() == durable
        await session.flush(126)
        active = session.active()
        assert active is not None
        assert active.head.tail == active.head.position == durable.end

    asyncio.run(main())


def test_plan_of_several_entries_that_were_not_written_is_tried_again() -> None:
    async def main() -> None:
        session = await begun()
        await fails(session, 127, "log")
        await session.flush(127)
        active = session.active()
        assert active is not None
        assert active.head.descriptor_count == 1

    asyncio.run(main())


def test_entry_that_was_not_put_in_place_is_not_followed_by_one_that_cannot_hold_it_all() -> None:
    async def main() -> None:
        session = await begun()
        await fails(session, 127, "place")
        pages = [Write(session.file, 3 * M + SECTOR * number, b"y" * SECTOR) for number in range(127)]
        with pytest.raises(OSError, match="in place in part") as caught:
            session.journal.stages(pages, 4 * M, 4 * M)
        assert caught.value.errno == errno.EIO

    asyncio.run(main())


@pytest.mark.parametrize("index", range(6))
def test_session_whose_begin_fails_anywhere_opens_and_begins_again_with_the_same_names(index: int) -> None:
    """Calls 0 to 5: entry, barrier, header, barrier, header, barrier. A header may have reached the disk whatever the
    call said: the entry that it names must stay.
    """

    async def main() -> None:
        session = await idle()
        file = FaultFile(session.file)
        journal = Journal(file, await load_headers(session.file))
        file.fail_at(index, errno.EIO)
        with pytest.raises(OSError, match="Input/output"):
            await journal.load(0)
        file.heal()
        if session.header().has_log:
            assert session.active() is not None
        names = session.header()
        for again in range(6):
            file.fail_at(again, errno.ENOSPC)
            with pytest.raises(OSError, match="No space"):
                await journal.load(0)
            assert not session.header().has_log or session.active() is not None
            file.heal()
        await journal.load(0)
        assert session.active() is not None
        if names.has_log:
            assert session.header().log_guid == names.log_guid

    asyncio.run(main())


def test_file_without_a_log_is_not_written() -> None:
    async def main() -> None:
        content = Builder(8 * M).content
        for at, number in ((65536, 1), (131072, 2)):
            content[at : at + SECTOR] = craft.header(number, log_length=0, log_offset=0)
        file = MemoryFile(content)
        with pytest.raises(UnsupportedFeature, match=r"it has no log \(LogLength is 0\)"):
            Journal(file, await load_headers(file))

    asyncio.run(main())


def test_flushed_and_last_offset_are_those_of_the_plan() -> None:
    async def main() -> None:
        session = await begun()
        stages = session.journal.stages([Write(session.file, 3 * M, bytes(SECTOR))], 64 * M, 9 * M)
        assert struct.unpack_from("<QQ", stages[0].writes[0].data, 48) == (64 * M, 9 * M)

    asyncio.run(main())
