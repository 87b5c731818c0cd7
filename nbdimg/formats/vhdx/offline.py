"""What tools need that have a file for themselves: its parts, its BAT in pieces, and changes through the log.

    change    data, and what the last change put in place       barrier
              one log entry                                      barrier
              the same pages in place                            barrier

The rules are the journal's (V1 to V4, V6), and the tail of each entry is itself. A session here changes DataWriteGuid
only when a guest would see a difference: children of a file that was merely repaired or compacted still fit.

Spec: [MS-VHDX] 2.2.2, 2.3.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID, uuid4

from nbdimg.errors import UnsupportedFeature
from nbdimg.formats.vhdx import structs as s
from nbdimg.formats.vhdx.bat import Geometry
from nbdimg.formats.vhdx.header import Header, Headers, load_headers, next_header, read, write_header
from nbdimg.formats.vhdx.log import Page, build_entry, entry_length, ring_writes
from nbdimg.formats.vhdx.metadata import Metadata, load_metadata
from nbdimg.formats.vhdx.region import Regions, load_regions
from nbdimg.storage.file import BlockFile
from nbdimg.storage.ordering import Plan, Stage, Write, merged, run
from nbdimg.units import MiB, align_down, align_up

PIECE_SIZE = 256 * 1024
"""Bytes of the BAT that are in memory at once."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Of a file whose log has been replayed, in it or in memory."""

    headers: Headers
    regions: Regions
    metadata: Metadata
    geometry: Geometry

    def structures(self) -> list[tuple[int, int, str]]:
        """(start, stop, name) of all but the blocks and bitmaps; they do not overlap."""
        header = self.headers.current
        log = [(header.log_offset, header.log_stop, "the log")] if header.log_length else []
        regions = [(entry.offset, entry.offset + entry.length, entry.name) for entry in self.regions.entries]
        return sorted([(0, s.HEADER_SECTION_SIZE, "the header section"), *log, *regions])


async def load_parts(file: BlockFile, headers: Headers) -> Parts:
    """Raises: CorruptImage, UnsupportedFeature, OSError: as `load_regions` and `load_metadata`."""
    regions = await load_regions(file, headers.current)
    metadata = await load_metadata(file, regions)
    return Parts(headers, regions, metadata, geometry_of(metadata))


def geometry_of(metadata: Metadata) -> Geometry:
    return Geometry(
        size=metadata.virtual_size,
        block_size=metadata.block_size,
        sector_size=metadata.logical_sector_size,
        has_parent=metadata.has_parent,
        is_fixed=metadata.leaves_blocks_allocated and not metadata.has_parent,
    )


async def bat_pieces(file: BlockFile, offset: int, first: int, stop: int) -> AsyncIterator[tuple[int, array[int]]]:
    """(index of the first, entries) of all pieces of a BAT at `offset` that are not zero, from entry `first` to before
    `stop`, in order. Holes in the file are passed over.
    """
    position, end = offset + 8 * first, offset + 8 * stop
    while position < end:
        is_data, extent_stop = file.data_extent(position)
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


class Session:
    """Changes to the metadata of a file whose log is empty. Between `begin` and `end` nobody else uses the file."""

    def __init__(self, file: BlockFile, headers: Headers) -> None:
        self._file = file
        self._headers = headers
        self._offset, self._length = headers.current.log_offset, headers.current.log_length
        if not self._length:
            raise UnsupportedFeature(file.path, "it has no log (LogLength is 0), so it can only be opened read-only")
        self._position = 0
        self._sequence_number = random.getrandbits(62) + 1

    @property
    def headers(self) -> Headers:
        return self._headers

    @property
    def pages_max(self) -> int:
        """Pages that one change may have, so that it is in one entry of half the log: 126 with 1 MiB."""
        count = self._length // 2 // s.LOG_SECTOR_SIZE
        while entry_length(count, 0) > self._length // 2:
            count -= 1
        return count

    async def begin(self, *, changes_data: bool) -> None:
        """A first, empty entry, then the headers that declare the log in use. Raises: OSError."""
        log_guid = uuid4()
        await run(Plan((self._logged((), log_guid),)))
        current = self._headers.current
        header = next_header(
            current,
            file_write_guid=uuid4(),
            data_write_guid=uuid4() if changes_data else current.data_write_guid,
            log_guid=log_guid,
        )
        await self._write_twice(header)

    async def change(self, pages: Mapping[int, bytes]) -> None:
        """Put pages of 4 KiB at their file offsets, all or none of them; everything written before is durable by then.

        Raises: OSError: the file is as it was, or as it should be once its log has been replayed.
        """
        assert 0 < len(pages) <= self.pages_max
        changes = [Page(offset, data) for offset, data in sorted(pages.items())]
        logged = self._logged(changes, self._headers.current.log_guid)
        writes = merged(Write(self._file, page.offset, page.data) for page in changes)
        await run(Plan((Stage((), (self._file,)), logged, Stage(writes, (self._file,)))))

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
        await self._file.fdatasync()
        await self._write_twice(next_header(self._headers.current, log_guid=s.NO_GUID))

    def _logged(self, changes: Sequence[Page], log_guid: UUID) -> Stage:
        """The stage that writes the next entry."""
        size = self._file.size
        entry = build_entry(
            self._sequence_number, self._position, log_guid, changes, align_down(size, MiB), align_up(size, MiB)
        )
        writes = ring_writes(self._position, entry, self._offset, self._length)
        self._position = (self._position + len(entry)) % self._length
        self._sequence_number += 1
        return Stage(tuple(Write(self._file, offset, data) for offset, data in writes), (self._file,))

    async def _write_twice(self, header: Header) -> None:
        """Into both slots, so that either alone tells the same."""
        self._headers = await write_header(self._file, self._headers, header)
        self._headers = await write_header(self._file, self._headers, next_header(header))


async def touch(file: BlockFile) -> None:
    """Write both headers with a new FileWriteGuid, for a file that is about to be changed outside of a session.

    Raises: OSError.
    """
    headers = await load_headers(file)
    header = next_header(headers.current, file_write_guid=uuid4())
    await write_header(file, await write_header(file, headers, header), next_header(header))
