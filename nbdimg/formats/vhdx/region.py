"""The region tables: where the BAT and the metadata lie.

There are two copies; the second is used when the first has lost its signature or its checksum. A writer repairs the
damaged one through the log. Files without the required flag on the two known regions exist (QEMU writes them).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from uuid import UUID

from nbdimg.errors import CorruptImage, UnsupportedFeature
from nbdimg.formats.vhdx import structs as s
from nbdimg.formats.vhdx.header import Header, checksum, with_checksum
from nbdimg.storage.file import BlockFile, read

_NAMES = {s.BAT_REGION: "the BAT region", s.METADATA_REGION: "the metadata region"}


@dataclass(frozen=True, slots=True)
class RegionEntry:
    """`offset` and `length` in bytes, multiples of 1 MiB."""

    guid: UUID
    offset: int
    length: int
    is_required: bool = True

    @property
    def name(self) -> str:
        return _NAMES.get(self.guid, f"region {self.guid}")


@dataclass(frozen=True, slots=True)
class Regions:
    """`content` is the valid table's 64 KiB, and `damaged_slots` are the copies (0, 1) that differ from it.

    A region may reach behind the file's end: who reads from it checks what it needs.
    """

    entries: tuple[RegionEntry, ...]
    bat: RegionEntry
    metadata: RegionEntry
    content: bytes
    damaged_slots: tuple[int, ...]

    @property
    def bat_offset(self) -> int:
        return self.bat.offset

    @property
    def bat_length(self) -> int:
        return self.bat.length

    def with_bat(self, bat: RegionEntry) -> Regions:
        """These, with the BAT at another place; `content` and `damaged_slots` are still those of the file."""
        entries = tuple(bat if each is self.bat else each for each in self.entries)
        return replace(self, entries=entries, bat=bat)

    @property
    def metadata_offset(self) -> int:
        return self.metadata.offset

    @property
    def metadata_length(self) -> int:
        return self.metadata.length


async def load_regions(file: BlockFile, header: Header) -> Regions:
    """The regions of a file whose log has been replayed.

    Raises: CorruptImage, UnsupportedFeature: naming field, what was found, what is allowed, and the offset. OSError.
    """
    copies = [await read(file, offset, s.REGION_TABLE_SIZE) for offset in s.REGION_TABLE_OFFSETS]
    slot = next((slot for slot, copy in enumerate(copies) if _is_whole(copy)), None)
    if slot is None:
        places = " and ".join(str(offset) for offset in s.REGION_TABLE_OFFSETS)
        raise CorruptImage(
            file.path,
            f"neither region table has its signature 'regi' and the right checksum, allowed is one at least "
            f"(file offsets {places})",
            s.REGION_TABLE_OFFSETS[0],
        )
    entries = parse_region_table(file.path, copies[slot], s.REGION_TABLE_OFFSETS[slot])
    _check_places(file.path, entries, header)
    bat, metadata = (_known(file.path, entries, guid, slot) for guid in (s.BAT_REGION, s.METADATA_REGION))
    damaged = tuple(other for other in (0, 1) if copies[other] != copies[slot])
    return Regions(entries, bat, metadata, copies[slot], damaged)


def _is_whole(table: bytes) -> bool:
    signature, found, _, _ = s.REGION_TABLE.unpack_from(table)
    return bool(signature == s.REGION_SIGNATURE and found == checksum(table))


def parse_region_table(path: str, table: bytes, at: int) -> tuple[RegionEntry, ...]:
    """The entries of one table, each checked by itself. `at` is where the table lies. Raises: as `load_regions`."""
    count = s.REGION_TABLE.unpack_from(table)[2]
    if count > s.REGIONS_MAX:
        raise CorruptImage(
            path,
            f"the region table's EntryCount is {count}, expected at most {s.REGIONS_MAX} (file offset {at + 8})",
            at + 8,
        )
    entries: dict[UUID, RegionEntry] = {}
    for index in range(count):
        place = s.REGION_TABLE.size + index * s.REGION.size
        entry = _entry(path, table, place, at + place)
        if entry.guid in entries:
            raise CorruptImage(
                path, f"{entry.name} is there twice, allowed is one (file offset {at + place})", at + place
            )
        entries[entry.guid] = entry
    return tuple(entries.values())


def _entry(path: str, table: bytes, place: int, at: int) -> RegionEntry:
    guid, offset, length, flags = s.REGION.unpack_from(table, place)
    entry = RegionEntry(UUID(bytes_le=guid), offset, length, bool(flags & 1))
    if entry.is_required and entry.guid not in _NAMES:
        raise UnsupportedFeature(
            path,
            f"{entry.name} is required and not known here, known are {s.BAT_REGION} (BAT) and "
            f"{s.METADATA_REGION} (metadata) (file offset {at})",
            at,
        )
    if length == 0 or length % s.ALIGNMENT:
        raise CorruptImage(
            path,
            f"the length of {entry.name} is {length}, expected a multiple of 1 MiB above 0 (file offset {at + 24})",
            at + 24,
        )
    if offset % s.ALIGNMENT or not s.HEADER_SECTION_SIZE <= offset <= s.FILE_OFFSET_MAX - length:
        raise CorruptImage(
            path,
            f"the offset of {entry.name} is {offset}, expected a multiple of 1 MiB from 1 MiB, and the region below "
            f"256 TiB (file offset {at + 16})",
            at + 16,
        )
    return entry


def _check_places(path: str, entries: Iterable[RegionEntry], header: Header) -> None:
    """No two of the header section, the log and the regions overlap."""
    ranges = [(0, s.HEADER_SECTION_SIZE, "the header section")]
    if header.log_length:
        ranges.append((header.log_offset, header.log_stop, "the log"))
    ranges += [(entry.offset, entry.offset + entry.length, entry.name) for entry in entries]
    ranges.sort()
    for (start, stop, name), (next_start, next_stop, next_name) in pairwise(ranges):
        if next_start < stop:
            raise CorruptImage(
                path,
                f"{next_name} lies at {next_start} to {next_stop} and {name} at {start} to {stop}, "
                f"allowed is no overlap (file offset {next_start})",
                next_start,
            )


def _known(path: str, entries: Iterable[RegionEntry], guid: UUID, slot: int) -> RegionEntry:
    found = next((entry for entry in entries if entry.guid == guid), None)
    if found is None:
        at = s.REGION_TABLE_OFFSETS[slot]
        raise CorruptImage(path, f"{_NAMES[guid]} is not in the region table, expected is one (file offset {at})", at)
    return found


def build_region_table(entries: Sequence[RegionEntry]) -> bytes:
    """The 64 KiB of a table."""
    assert len(entries) <= s.REGIONS_MAX
    parts = [s.REGION_TABLE.pack(s.REGION_SIGNATURE, 0, len(entries), 0)]
    for entry in entries:
        assert entry.offset % s.ALIGNMENT == 0
        assert entry.length % s.ALIGNMENT == 0
        parts.append(s.REGION.pack(entry.guid.bytes_le, entry.offset, entry.length, entry.is_required))
    return with_checksum(b"".join(parts).ljust(s.REGION_TABLE_SIZE, b"\0"))
