"""The log of a file that is being written: metadata goes into an entry first, and then to its place.

    plan    guest data, and what the last plan put in place      barrier
            one log entry                                         barrier
            the same pages in place                               made durable by the next plan's first barrier

So a flush costs two barriers however many blocks it has made. Each entry's tail is itself: what earlier entries say is
in place and durable before it is written, or is in it too. A plan with more pages than half the log takes several
entries, each put in place and made durable before the next.

A plan that fails is followed by one that holds all its pages. If its entry was durable already, some of them may be in
place and others not, and until the next entry is durable only this one says what belongs together: the next goes behind
it, not over it.

    (V1) No metadata is written in place before the log entry that describes it is durable.
    (V2) The log's tail moves past an entry only when its in-place writes are durable.
    (V3) Headers alternate: the inactive one is written with the sequence number + 1, then a barrier.
    (V4) FileWriteGuid changes before the first modification of the file, DataWriteGuid before the first that a guest
         can see: both when a session begins, together with the LogGuid, behind a first, empty entry that bears it; for
         tools, which prepare much that no guest sees, DataWriteGuid alone, later.
    (V6) The last durable entry is never overwritten before a later one is durable: an entry takes at most half the log.

Spec: [MS-VHDX] 2.2.2, 2.3.
"""

from __future__ import annotations

import asyncio
import errno
import random
import uuid
from dataclasses import dataclass, field
from functools import partial

from nbdimg.errors import UnsupportedFeature
from nbdimg.formats.vhdx.header import Header, Headers, next_header, write_header
from nbdimg.formats.vhdx.log import Page, build_entry, entry_length, ring_writes
from nbdimg.formats.vhdx.structs import LOG_SECTOR_SIZE, NO_GUID
from nbdimg.storage.file import BlockFile
from nbdimg.storage.ordering import Plan, Stage, Write, merged, run
from nbdimg.units import align_down


@dataclass(frozen=True, slots=True)
class _Session:
    log_guid: uuid.UUID = field(default_factory=uuid.uuid4)
    file_write_guid: uuid.UUID = field(default_factory=uuid.uuid4)
    data_write_guid: uuid.UUID = field(default_factory=uuid.uuid4)


class Journal:
    """A log that is empty when the session begins, and left empty by `end`.

    Args: changes_data: whether a guest will see a difference, which children must know of.

    Raises: UnsupportedFeature: from the constructor: there is no log.
    """

    def __init__(self, file: BlockFile, headers: Headers, *, changes_data: bool = True) -> None:
        self._file = file
        self._changes_data = changes_data
        self._headers = headers
        self._length = headers.current.log_length
        self._offset = headers.current.log_offset
        if not self._length:
            raise UnsupportedFeature(file.path, "it has no log (LogLength is 0), so it can only be opened read-only")
        self._entry_length_max = self._length // 2
        self._position = 0
        self._sequence_number = random.getrandbits(62) + 1
        self._session = _Session()
        self._is_unplaced = False
        """Whether what the last durable entry says may be in place in part."""
        self._beginning: asyncio.Task[None] | None = None
        self.has_begun = False

    async def load(self, key: int) -> None:
        """Begin the session, for whoever is the first to change something. Raises: OSError."""
        if self.has_begun:
            return
        if self._beginning is None or self._beginning.done():
            self._beginning = asyncio.get_running_loop().create_task(self._begin())
        await asyncio.shield(self._beginning)

    async def _begin(self) -> None:
        """The same again when it failed: a header that names the log's entry may have reached the disk."""
        session = self._session
        size = align_down(self._file.size, 1 << 20)
        entry = build_entry(self._sequence_number, 0, session.log_guid, (), size, size)
        writes = (Write(self._file, offset, data) for offset, data in self._ring_writes(0, entry))
        await run(Plan((Stage(tuple(writes), (self._file,)),)))
        header = next_header(
            self._headers.current,
            file_write_guid=session.file_write_guid,
            data_write_guid=session.data_write_guid if self._changes_data else None,
            log_guid=session.log_guid,
        )
        await self._put_header(header)
        self._position = len(entry)
        self._sequence_number += 1
        self.has_begun = True

    async def change_data(self) -> None:
        """A guest will see a difference from now on (V4), though the session did not begin so. Raises: OSError."""
        await self._put_header(next_header(self._headers.current, data_write_guid=self._session.data_write_guid))

    async def _put_header(self, header: Header) -> None:
        """Into both slots (V3)."""
        self._headers = await write_header(self._file, self._headers, header)
        self._headers = await write_header(self._file, self._headers, next_header(header))

    def _ring_writes(self, position: int, entry: bytes) -> list[tuple[int, bytes]]:
        return ring_writes(position, entry, self._offset, self._length)

    @property
    def pages_max(self) -> int:
        """Pages that an entry of half the log holds (V6): 1 MiB takes 126."""
        count = self._entry_length_max // LOG_SECTOR_SIZE
        while entry_length(count, 0) > self._entry_length_max:
            count -= 1
        return count

    def stages(self, pages: list[Write], flushed_offset: int, last_offset: int) -> list[Stage]:
        """What follows the barrier that makes guest data durable. `written` comes next.

        Args: pages: 4 KiB each. flushed_offset: the file's size, durable by then. last_offset: where its last structure
        ends.

        Raises: OSError: the last plan failed with an entry put in place in part, and one entry does not hold all that
        this one would have to.
        """
        pages_max = self.pages_max
        if self._is_unplaced and len(pages) > pages_max:
            raise OSError(errno.EIO, "what a log entry says is in place in part, and another cannot hold all of it")
        position, number = self._position, self._sequence_number
        log_guid = self._headers.current.log_guid
        stages: list[Stage] = []
        for start in range(0, len(pages), pages_max):
            if stages:
                stages[-1] = Stage(stages[-1].writes, (self._file,), self.written)
            part = pages[start : start + pages_max]
            changes = [Page(write.offset, write.data) for write in part]
            entry = build_entry(number, position, log_guid, changes, flushed_offset, last_offset)
            logged = (Write(self._file, offset, data) for offset, data in self._ring_writes(position, entry))
            position = (position + len(entry)) % self._length
            number += 1
            stages.append(Stage(tuple(logged), (self._file,), partial(self._logged, position, number)))
            stages.append(Stage(merged(part), ()))
        return stages

    def _logged(self, position: int, number: int) -> None:
        """An entry is durable; the next one has this position and number."""
        self._position, self._sequence_number = position, number
        self._is_unplaced = True

    def written(self) -> None:
        """What the last entry says is in place, durable before the next entry."""
        self._is_unplaced = False

    async def end(self) -> None:
        """Everything is in place: declare the log empty. Raises: OSError."""
        await self._file.fdatasync()
        header = next_header(self._headers.current, log_guid=NO_GUID)
        await self._put_header(header)
        self.has_begun = False
        self._session = _Session()
