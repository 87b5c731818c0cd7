"""The log: a ring of entries, each a change of metadata that is made in place only when the entry is durable.

An entry is contiguous but for the ring's end, and a whole number of 4 KiB sectors:

    header         64 bytes, then the first 126 descriptors            1 sector
    descriptors    128 in each                                         0 or more sectors
    data           one for each data descriptor, in their order        0 or more sectors

What an entry says is replayed from the entry that the newest one calls its tail up to the newest one. Everything else
in the ring is history: entries before the tail were applied, entries behind the newest are of an earlier round, and one
that was torn was never waited for.

A sector begins with the signature of what it is, so no valid entry reaches across the beginning of another. One pass
over the ring therefore finds all of them, whatever a hostile file holds (`Scanner`), and the search for the active
sequence needs only what is remembered of each: the file is read in pieces and the time is linear in the ring's length.
What is read is mostly in memory already, so others get their turn between the pieces.

Spec: [MS-VHDX] 2.3.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from uuid import UUID

from crc32c import crc32c

from nbdimg.errors import CorruptImage, UnsupportedFeature
from nbdimg.formats.vhdx import structs as s
from nbdimg.formats.vhdx.header import Header, with_checksum
from nbdimg.storage.file import BlockFile, read
from nbdimg.units import MiB, align_up

_SECTOR = s.LOG_SECTOR_SIZE
_FIRST_DESCRIPTORS = (_SECTOR - s.LOG_ENTRY.size) // s.LOG_DESCRIPTOR.size
_DESCRIPTORS = _SECTOR // s.LOG_DESCRIPTOR.size
assert (_FIRST_DESCRIPTORS, _DESCRIPTORS) == (126, 128)
_LOW = 0xFFFF_FFFF
_READ_SIZE = 1 * MiB


@dataclass(frozen=True, slots=True)
class Page:
    """The 4 KiB of the file from `offset`, a multiple of 4 KiB, become `data`."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Zeroes:
    """The file from `offset` for `length` bytes, multiples of 4 KiB, becomes zero."""

    offset: int
    length: int


Change = Page | Zeroes


@dataclass(frozen=True, slots=True)
class Entry:
    """What is remembered of a valid entry. `position`, `length` and `tail` are bytes in the ring; `flushed_offset` and
    `last_offset` bytes in the file."""

    position: int
    length: int
    sequence_number: int
    tail: int
    descriptor_count: int
    flushed_offset: int
    last_offset: int


@dataclass(frozen=True, slots=True)
class Sequence:
    """What must be replayed, oldest first: from the head's tail to the head."""

    entries: tuple[Entry, ...]
    log_length: int

    @property
    def head(self) -> Entry:
        return self.entries[-1]

    @property
    def end(self) -> int:
        """The position behind the head."""
        return (self.head.position + self.head.length) % self.log_length


@dataclass(slots=True)
class _Partial:
    """An entry of which some sectors were seen."""

    entry: Entry
    checksum: int
    crc: int
    seen: int
    descriptors_left: int
    data_count: int


class Scanner:
    """Finds the valid entries of a ring that is fed to it in order, from position 0 on.

    Then the ring is fed again, from its beginning, for as long as `is_open`: an entry that wraps is completed by that.
    `rejection` is why the first entry of this log that is not valid is not: for a message, as most rings have some.
    """

    def __init__(self, header: Header) -> None:
        self._guid = header.log_guid.bytes_le
        self._start = header.log_offset
        self._stop = header.log_stop
        self._length = header.log_length
        self._position = 0
        self._partial: _Partial | None = None
        self._valid: dict[int, Entry] = {}
        self.rejection: str | None = None

    @property
    def is_open(self) -> bool:
        return self._partial is not None

    def feed(self, sectors: memoryview) -> None:
        """Take the next sectors of the ring."""
        for start in range(0, len(sectors), _SECTOR):
            sector = sectors[start : start + _SECTOR]
            is_entry = sector[:4] == s.LOG_ENTRY_SIGNATURE
            if self._partial is not None:
                self._continue(self._partial, sector, is_entry=is_entry)
            if is_entry and self._position < self._length:
                self._begin(sector)
            self._position += _SECTOR

    def _reject(self, position: int, why: str) -> None:
        self._partial = None
        if self.rejection is None:
            self.rejection = f"the entry at {self._start + position} has {why}"

    def _begin(self, sector: memoryview) -> None:
        fields = s.LOG_ENTRY.unpack_from(sector)
        _, checksum, length, tail, sequence_number, count, _, guid, flushed_offset, last_offset = fields
        if guid != self._guid:
            return None
        position = self._position
        if length % _SECTOR or not _SECTOR <= length < self._length:
            return self._reject(position, f"EntryLength {length}, expected a multiple of 4096 below {self._length}")
        if tail % _SECTOR or tail >= self._length:
            return self._reject(position, f"Tail {tail}, expected a multiple of 4096 below {self._length}")
        if sequence_number == 0:
            return self._reject(position, "SequenceNumber 0, expected more")
        if _head_length(count) > length:
            return self._reject(position, f"DescriptorCount {count}, expected what fits into its {length} bytes")
        entry = Entry(position, length, sequence_number, tail, count, flushed_offset, last_offset)
        crc = crc32c(sector[8:], crc32c(b"loge\0\0\0\0"))
        self._partial = _Partial(entry, checksum, crc, 0, count, 0)
        return self._advance(self._partial, sector[s.LOG_ENTRY.size :], _FIRST_DESCRIPTORS)

    def _continue(self, partial: _Partial, sector: memoryview, *, is_entry: bool) -> None:
        if is_entry:
            return self._reject(partial.entry.position, f"{partial.seen} bytes, expected {partial.entry.length}")
        partial.crc = crc32c(sector, partial.crc)
        if partial.descriptors_left:
            return self._advance(partial, sector, _DESCRIPTORS)
        signature, high, _, low = s.LOG_DATA.unpack(sector)
        if signature != s.LOG_DATA_SIGNATURE or high << 32 | low != partial.entry.sequence_number:
            return self._reject(partial.entry.position, f"a data sector of another entry at {partial.seen} behind it")
        return self._seen(partial)

    def _advance(self, partial: _Partial, area: memoryview, most: int) -> None:
        """A sector with descriptors, which begin `area`."""
        count = min(partial.descriptors_left, most)
        why = self._check_descriptors(partial, area[: count * s.LOG_DESCRIPTOR.size])
        if why:
            return self._reject(partial.entry.position, why)
        partial.descriptors_left -= count
        entry = partial.entry
        if partial.descriptors_left == 0:
            expected = _head_length(entry.descriptor_count) + partial.data_count * _SECTOR
            if entry.length != expected:
                return self._reject(entry.position, f"EntryLength {entry.length}, its descriptors take {expected}")
        return self._seen(partial)

    def _check_descriptors(self, partial: _Partial, area: memoryview) -> str | None:
        """Counts the data descriptors; what is wrong with the first that is not valid."""
        wanted, start, stop = partial.entry.sequence_number, self._start, self._stop
        for signature, _, length, offset, sequence_number in s.LOG_DESCRIPTOR.iter_unpack(area):
            if sequence_number != wanted:
                return f"a descriptor of SequenceNumber {sequence_number}, expected {wanted}"
            if signature == s.LOG_DATA_DESCRIPTOR_SIGNATURE:
                partial.data_count += 1
                length = _SECTOR
            elif signature != s.LOG_ZERO_DESCRIPTOR_SIGNATURE:
                return "a descriptor that is neither 'desc' nor 'zero'"
            if (offset | length) % _SECTOR:
                return f"a target of {length} bytes at {offset}, expected multiples of 4096"
            if offset < s.LOG_TARGET_MIN or offset + length > s.FILE_OFFSET_MAX:
                return f"a target of {length} bytes at {offset}, expected from {s.LOG_TARGET_MIN}, below 256 TiB"
            if offset < stop and offset + length > start:
                return f"a target of {length} bytes at {offset}, expected none within the log"
        return None

    def _seen(self, partial: _Partial) -> None:
        partial.seen += _SECTOR
        if partial.seen < partial.entry.length:
            return
        self._partial = None
        if partial.crc != partial.checksum:
            self._reject(partial.entry.position, f"checksum {partial.checksum:#010x}, expected {partial.crc:#010x}")
        else:
            self._valid[partial.entry.position] = partial.entry

    def active(self) -> Sequence | None:
        """The active sequence; None: there is none, and what the log held is lost.

        Spec: "Log Sequence": from each position in turn the longest run of entries with consecutive numbers; it counts
        if its last entry's tail lies within it, and of those that count the one that ends in the highest number wins.
        """
        heads = self._heads()
        best: Entry | None = None
        for entry in sorted(self._valid.values(), key=lambda each: each.position):
            head = heads[entry.position]
            tail = self._valid.get(head.tail)
            if tail is None or heads[tail.position] is not head or tail.sequence_number < entry.sequence_number:
                continue
            if best is None or head.sequence_number > best.sequence_number:
                best = head
        return Sequence(tuple(self._run(best)), self._length) if best else None

    def _next(self, entry: Entry) -> Entry | None:
        following = self._valid.get((entry.position + entry.length) % self._length)
        is_next = following is not None and following.sequence_number == entry.sequence_number + 1
        return following if is_next else None

    def _heads(self) -> dict[int, Entry]:
        """Of each valid entry, by position, the last one of the run that it is in."""
        heads: dict[int, Entry] = {}
        for entry in sorted(self._valid.values(), key=lambda each: each.sequence_number, reverse=True):
            following = self._next(entry)
            heads[entry.position] = heads[following.position] if following else entry
        return heads

    def _run(self, head: Entry) -> Iterator[Entry]:
        """From the head's tail to the head."""
        entry: Entry | None = self._valid[head.tail]
        while entry is not None:
            yield entry
            entry = None if entry is head else self._next(entry)


def _head_length(descriptor_count: int) -> int:
    """Bytes of an entry before its data: 126 descriptors take 4096, 127 take 8192."""
    return align_up(s.LOG_ENTRY.size + descriptor_count * s.LOG_DESCRIPTOR.size, _SECTOR)


async def load_active(file: BlockFile, header: Header, *, ignore_log: bool = False) -> Sequence | None:
    """What must be replayed before anything else is read. None: nothing, the log is empty.

    With `ignore_log` a log in use that holds no valid entry is taken for empty: QEMU leaves such a file when it is
    stopped before its first entry, and so does damage to the log, with which changes are lost.

    Raises:
        CorruptImage: the log is in use and holds no valid entry, or the file is shorter than it was known to be, or
            would have to be longer than any.
        UnsupportedFeature: the log is longer than LOG_LENGTH_MAX.
        OSError.
    """
    if not header.has_log:
        return None
    if header.log_length > s.LOG_LENGTH_MAX:
        raise UnsupportedFeature(
            file.path,
            f"LogLength is {header.log_length} and the log must be replayed, expected at most {s.LOG_LENGTH_MAX} "
            f"(log at {header.log_offset})",
            header.log_offset,
        )
    scanner = Scanner(header)
    for position in range(0, header.log_length, _READ_SIZE):
        scanner.feed(memoryview(await read(file, header.log_offset + position, _READ_SIZE)))
        await asyncio.sleep(0)
    position = 0
    while scanner.is_open:
        scanner.feed(memoryview(await read(file, header.log_offset + position, _SECTOR)))
        position += _SECTOR
        await asyncio.sleep(0)
    active = scanner.active()
    if active is None and not ignore_log:
        why = f" ({scanner.rejection})" if scanner.rejection else ""
        raise CorruptImage(
            file.path,
            f"LogGuid is {header.log_guid} and the log at {header.log_offset} of {header.log_length} bytes holds no "
            f"valid sequence of entries, expected is one{why}: what it held is lost, unless there was nothing yet; "
            "--accept-lost-log goes on without it",
            header.log_offset,
        )
    if active is not None and file.size < active.head.flushed_offset:
        raise CorruptImage(
            file.path,
            f"the file was truncated: it has {file.size} bytes, the log says at least {active.head.flushed_offset} "
            f"(log entry at {header.log_offset + active.head.position})",
            header.log_offset + active.head.position,
        )
    if active is not None and active.head.last_offset > s.FILE_OFFSET_MAX:
        at = header.log_offset + active.head.position + 56
        raise CorruptImage(
            file.path,
            f"LastFileOffset is {active.head.last_offset}, expected at most {s.FILE_OFFSET_MAX} (256 TiB) "
            f"(file offset {at})",
            at,
        )
    return active


async def read_changes(file: BlockFile, header: Header, sequence: Sequence) -> AsyncIterator[list[Change]]:
    """All that a sequence of `load_active` changes, in order, some at a time.

    Raises: CorruptImage: the log changed since. OSError.
    """
    for entry in sequence.entries:
        position, left = entry.position, entry.descriptor_count
        data_position = position + _head_length(left)
        skip, most = s.LOG_ENTRY.size, _FIRST_DESCRIPTORS
        while left:
            count = min(left, most)
            sector = await _read_ring(file, header, position, _SECTOR)
            descriptors = sector[skip : skip + count * s.LOG_DESCRIPTOR.size]
            data_length = _data_count(file, header, entry, descriptors) * _SECTOR
            data = await _read_ring(file, header, data_position, data_length)
            yield list(_changes(descriptors, data))
            await asyncio.sleep(0)
            position, left = position + _SECTOR, left - count
            data_position += data_length
            skip, most = 0, _DESCRIPTORS


def _data_count(file: BlockFile, header: Header, entry: Entry, descriptors: bytes) -> int:
    count = 0
    for signature, _, _, _, sequence_number in s.LOG_DESCRIPTOR.iter_unpack(descriptors):
        is_data = signature == s.LOG_DATA_DESCRIPTOR_SIGNATURE
        if sequence_number != entry.sequence_number or not (is_data or signature == s.LOG_ZERO_DESCRIPTOR_SIGNATURE):
            offset = header.log_offset + entry.position
            raise CorruptImage(file.path, f"the log entry at {offset} changed while it was read", offset)
        count += is_data
    return count


def _changes(descriptors: bytes, data: bytes) -> Iterator[Change]:
    position = 0
    for signature, trailing, leading, offset, _ in s.LOG_DESCRIPTOR.iter_unpack(descriptors):
        if signature == s.LOG_ZERO_DESCRIPTOR_SIGNATURE:
            yield Zeroes(offset, leading)
            continue
        middle = data[position + 8 : position + _SECTOR - 4]
        yield Page(offset, leading.to_bytes(8, "little") + middle + trailing.to_bytes(4, "little"))
        position += _SECTOR


async def _read_ring(file: BlockFile, header: Header, position: int, length: int) -> bytes:
    """`length` bytes, less than the ring's, from a position that may lie behind its end."""
    position %= header.log_length
    first = min(length, header.log_length - position)
    content = await read(file, header.log_offset + position, first)
    if first < length:
        content += await read(file, header.log_offset, length - first)
    return content


def entry_length(page_count: int, zeroes_count: int) -> int:
    """Bytes that an entry takes in the ring: one page 8192, 126 pages 520192, 127 pages 528384."""
    return _head_length(page_count + zeroes_count) + page_count * _SECTOR


def build_entry(
    sequence_number: int,
    tail: int,
    log_guid: UUID,
    changes: Listing[Change],
    flushed_offset: int,
    last_offset: int,
) -> bytes:
    """An entry; without changes the empty one with which a log begins.

    `tail` is the position of the oldest entry that a replay must begin with, maybe this one's own. `flushed_offset` is
    a size below which the file cannot fall in a crash, `last_offset` the smallest size that holds all that is
    allocated; multiples of 1 MiB.
    """
    assert sequence_number > 0
    assert tail % _SECTOR == 0
    assert flushed_offset % s.ALIGNMENT == last_offset % s.ALIGNMENT == 0
    pages = [change for change in changes if isinstance(change, Page)]
    length = entry_length(len(pages), len(changes) - len(pages))
    head = s.LOG_ENTRY.pack(
        s.LOG_ENTRY_SIGNATURE,
        0,
        length,
        tail,
        sequence_number,
        len(changes),
        0,
        log_guid.bytes_le,
        flushed_offset,
        last_offset,
    )
    descriptors = b"".join(_descriptor(change, sequence_number) for change in changes)
    parts = [(head + descriptors).ljust(_head_length(len(changes)), b"\0")]
    high, low = sequence_number >> 32, sequence_number & _LOW
    parts += (s.LOG_DATA.pack(s.LOG_DATA_SIGNATURE, high, page.data[8:-4], low) for page in pages)
    entry = with_checksum(b"".join(parts))
    assert len(entry) == length
    return entry


def _descriptor(change: Change, sequence_number: int) -> bytes:
    assert change.offset % _SECTOR == 0
    assert change.offset >= s.LOG_TARGET_MIN
    if isinstance(change, Zeroes):
        assert change.length % _SECTOR == 0
        return s.LOG_DESCRIPTOR.pack(s.LOG_ZERO_DESCRIPTOR_SIGNATURE, 0, change.length, change.offset, sequence_number)
    assert len(change.data) == _SECTOR
    trailing, leading = int.from_bytes(change.data[-4:], "little"), int.from_bytes(change.data[:8], "little")
    return s.LOG_DESCRIPTOR.pack(s.LOG_DATA_DESCRIPTOR_SIGNATURE, trailing, leading, change.offset, sequence_number)


def ring_writes(position: int, entry: bytes, log_offset: int, log_length: int) -> list[tuple[int, bytes]]:
    """Where in the file an entry goes that begins at `position` of the ring: one piece, or two as the ring ends.

    The free space must hold it: 1 MiB of ring, position 1044480, 8192 bytes give 4096 at the end and 4096 at the start.
    """
    assert position % _SECTOR == 0
    assert position < log_length
    assert len(entry) < log_length
    first = min(len(entry), log_length - position)
    writes = [(log_offset + position, entry[:first])]
    if first < len(entry):
        writes.append((log_offset, entry[first:]))
    return writes
