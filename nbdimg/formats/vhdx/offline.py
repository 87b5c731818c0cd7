"""What tools need that have a file for themselves: its BAT in pieces, and changes through the log.

A session changes DataWriteGuid only when a guest would see a difference: children of a file that was merely repaired or
compacted still fit.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import AsyncIterator, Mapping, Sequence
from uuid import uuid4

from nbdimg.formats.vhdx import structs as s
from nbdimg.formats.vhdx.header import Headers, load_headers, next_header, write_header
from nbdimg.formats.vhdx.journal import Journal
from nbdimg.formats.vhdx.region import RegionEntry, build_region_table
from nbdimg.storage.file import BlockFile, extent_at, read
from nbdimg.storage.ordering import Plan, Stage, Write, run
from nbdimg.units import MiB, align_down, align_up

PIECE_SIZE = 256 * 1024
"""Bytes of the BAT that are in memory at once."""


async def bat_pieces(file: BlockFile, offset: int, first: int, stop: int) -> AsyncIterator[tuple[int, array[int]]]:
    """(index of the first, entries) of all pieces of a BAT at `offset` that are not zero, from entry `first` to before
    `stop`, in order. Holes in the file are passed over.
    """
    position, end = offset + 8 * first, offset + 8 * stop
    while position < end:
        is_data, extent_stop = await extent_at(file, position)
        if not is_data and extent_stop <= position:
            return
        if not is_data and align_down(extent_stop, 8) > position:
            position = align_down(extent_stop, 8)
            continue
        length = min(PIECE_SIZE, end - position)
        content = await read(file, position, length)
        if content.count(0) != length:
            yield (position - offset) // 8, array("Q", content)
        position += length


async def region_pages(file: BlockFile, entries: Sequence[RegionEntry]) -> dict[int, bytes]:
    """What must change, by file offset, for both region tables to have these entries. Raises: OSError."""
    table = build_region_table(entries)
    pages: dict[int, bytes] = {}
    for start in s.REGION_TABLE_OFFSETS:
        for offset in range(0, len(table), s.PAGE_SIZE):
            page = table[offset : offset + s.PAGE_SIZE]
            if await read(file, start + offset, s.PAGE_SIZE) != page:
                pages[start + offset] = page
    return pages


class Session:
    """Changes to the metadata of a file whose log is empty. Between `begin` and `end` nobody else uses the file.

    Raises: as `Journal`.
    """

    def __init__(self, file: BlockFile, headers: Headers) -> None:
        self._file = file
        self._journal = Journal(file, headers, changes_data=False)

    @property
    def pages_max(self) -> int:
        """Pages that one change may have, so that it is in one entry of the log: 126 with 1 MiB."""
        return self._journal.pages_max

    async def begin(self) -> None:
        """A first, empty entry, then the headers that declare the log in use. Raises: OSError."""
        await self._journal.load(0)

    async def change_data(self) -> None:
        """Comes before the first change that a guest will see. Raises: OSError."""
        await self._journal.change_data()

    async def change(self, pages: Mapping[int, bytes]) -> None:
        """Put pages of 4 KiB at their file offsets, all or none of them; everything written before is durable by then.

        Raises: OSError: the file is as it was, or as it should be once its log has been replayed.
        """
        assert 0 < len(pages) <= self.pages_max
        size, barrier = self._file.size, Stage((), (self._file,))
        writes = [Write(self._file, offset, data) for offset, data in sorted(pages.items())]
        stages = self._journal.stages(writes, align_down(size, MiB), align_up(size, MiB))
        await run(Plan((barrier, *stages, barrier)))
        self._journal.written()

    async def put(self, words: Mapping[int, int]) -> None:
        """Put 64-bit words at their file offsets: each is changed whole, all of them in several entries if need be.

        Raises: OSError.
        """
        pages: dict[int, dict[int, int]] = {}
        for offset, word in words.items():
            pages.setdefault(align_down(offset, s.PAGE_SIZE), {})[offset % s.PAGE_SIZE] = word
        offsets = sorted(pages)
        for start in range(0, len(offsets), self.pages_max):
            changed: dict[int, bytes] = {}
            for offset in offsets[start : start + self.pages_max]:
                content = bytearray(await read(self._file, offset, s.PAGE_SIZE))
                for place, word in pages[offset].items():
                    content[place : place + 8] = word.to_bytes(8, "little")
                changed[offset] = bytes(content)
            await self.change(changed)

    async def end(self) -> None:
        """Declare the log empty: everything is in place. Raises: OSError."""
        await self._journal.end()


async def try_cut(file: BlockFile, size: int) -> bool:
    """Make the file end at `size` bytes. False: a block device, whose end stays where it is. Raises: OSError."""
    try:
        await file.truncate(size)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


async def touch(file: BlockFile) -> None:
    """Write both headers with a new FileWriteGuid, for a file that is about to be changed outside of a session.

    Raises: OSError.
    """
    headers = await load_headers(file)
    header = next_header(headers.current, file_write_guid=uuid4())
    await write_header(file, await write_header(file, headers, header), next_header(header))
