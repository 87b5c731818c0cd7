"""The header section: file type identifier and the two headers, with every check that an untrusted file needs.

A header is 4 KiB and there are two; the valid one with the greater sequence number is current. A change goes to the
other slot, with the sequence number one higher, and a barrier behind it: at every moment one of the two is whole.

    LogGuid   set exactly while the log may hold entries; zero means that it must not be replayed
    FileWriteGuid   new before the first change of the file in a session, whatever is changed
    DataWriteGuid   new before the first change that a guest can see; children name it, so a replay keeps it
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from uuid import UUID

from crc32c import crc32c

from nbdimg.errors import CorruptImage, UnsupportedFeature, escaped
from nbdimg.formats.vhdx import structs as s
from nbdimg.storage.file import BlockFile, read


@dataclass(frozen=True, slots=True)
class Header:
    """`log_offset` and `log_length` in bytes."""

    sequence_number: int
    file_write_guid: UUID
    data_write_guid: UUID
    log_guid: UUID
    log_length: int
    log_offset: int
    log_version: int = s.LOG_VERSION
    version: int = s.VERSION

    @property
    def has_log(self) -> bool:
        """Whether the log may hold entries, so that nothing else is to be read before it."""
        return self.log_guid != s.NO_GUID

    @property
    def log_stop(self) -> int:
        return self.log_offset + self.log_length

    def to_bytes(self) -> bytes:
        """The 4 KiB of a slot."""
        assert 0 <= self.sequence_number < 1 << 64
        fields = s.HEADER.pack(
            s.HEADER_SIGNATURE,
            0,
            self.sequence_number,
            self.file_write_guid.bytes_le,
            self.data_write_guid.bytes_le,
            self.log_guid.bytes_le,
            self.log_version,
            self.version,
            self.log_length,
            self.log_offset,
        )
        return with_checksum(fields.ljust(s.HEADER_SIZE, b"\0"))

    @classmethod
    def from_bytes(cls, data: bytes) -> Header | None:
        """A slot's header; None if its signature or its checksum says that there is none. Fields are not checked."""
        if len(data) < s.HEADER_SIZE:
            return None
        fields = s.HEADER.unpack_from(data)
        if fields[0] != s.HEADER_SIGNATURE or fields[1] != checksum(data[: s.HEADER_SIZE]):
            return None
        _, _, sequence_number, file_write, data_write, log, log_version, version, log_length, log_offset = fields
        return cls(
            sequence_number=sequence_number,
            file_write_guid=UUID(bytes_le=file_write),
            data_write_guid=UUID(bytes_le=data_write),
            log_guid=UUID(bytes_le=log),
            log_length=log_length,
            log_offset=log_offset,
            log_version=log_version,
            version=version,
        )


@dataclass(frozen=True, slots=True)
class Headers:
    """`current` lies in `slot` (0 or 1); `other` is None when that slot's header is not valid."""

    current: Header
    slot: int
    other: Header | None


def checksum(data: bytes | memoryview) -> int:
    """CRC-32C of a structure whose bytes 4 to 7 are its checksum, as if they were zero."""
    return crc32c(data[8:], crc32c(b"\0\0\0\0", crc32c(data[:4])))


def with_checksum(data: bytes) -> bytes:
    """The same bytes with the checksum in its place."""
    return data[:4] + checksum(data).to_bytes(4, "little") + data[8:]


async def load_headers(file: BlockFile) -> Headers:
    """The headers of a file, of which the current one is checked.

    Raises: CorruptImage, UnsupportedFeature: naming field, what was found, what is allowed, and the offset. OSError.
    """
    signature = await read(file, 0, len(s.FILE_SIGNATURE))
    if signature != s.FILE_SIGNATURE:
        raise CorruptImage(
            file.path, f"the file signature is {escaped(signature)}, expected 'vhdxfile' (file offset 0)", 0
        )
    slots = [await read(file, offset, s.HEADER_SIZE) for offset in s.HEADER_OFFSETS]
    headers = _newer(file.path, [Header.from_bytes(slot) for slot in slots], is_same=slots[0] == slots[1])
    _check(file.path, headers.current, s.HEADER_OFFSETS[headers.slot])
    return headers


def _newer(path: str, slots: list[Header | None], *, is_same: bool) -> Headers:
    """Which header is current. Disk2VHD writes two identical ones: only then may their sequence numbers be equal."""
    first, second = slots
    if first is None:
        if second is None:
            places = " and ".join(str(offset) for offset in s.HEADER_OFFSETS)
            raise CorruptImage(
                path,
                f"neither header has its signature 'head' and the right checksum, allowed is one at least "
                f"(file offsets {places})",
                s.HEADER_OFFSETS[0],
            )
        return Headers(second, 1, None)
    if second is None or first.sequence_number > second.sequence_number:
        return Headers(first, 0, second)
    if first.sequence_number < second.sequence_number:
        return Headers(second, 1, first)
    if not is_same:
        raise CorruptImage(
            path,
            f"SequenceNumber is {first.sequence_number} in both headers and they differ, allowed are different numbers "
            f"or identical headers (file offsets {s.HEADER_OFFSETS[0] + 8} and {s.HEADER_OFFSETS[1] + 8})",
            s.HEADER_OFFSETS[0] + 8,
        )
    return Headers(first, 0, second)


def _check(path: str, header: Header, at: int) -> None:
    def refuse(field: str, found: object, allowed: str, offset: int) -> CorruptImage:
        return CorruptImage(path, f"{field} is {found}, expected {allowed} (file offset {at + offset})", at + offset)

    if header.version != s.VERSION:
        raise UnsupportedFeature(path, f"Version is {header.version}, expected 1 (file offset {at + 66})", at + 66)
    if header.sequence_number > s.SEQUENCE_NUMBER_MAX:
        raise refuse("SequenceNumber", header.sequence_number, f"at most {s.SEQUENCE_NUMBER_MAX}", 8)
    if header.has_log and header.log_version != s.LOG_VERSION:
        raise UnsupportedFeature(
            path, f"LogVersion is {header.log_version}, expected 0 as LogGuid is set (file offset {at + 64})", at + 64
        )
    if header.log_length % s.ALIGNMENT:
        raise refuse("LogLength", header.log_length, "a multiple of 1 MiB", 68)
    if header.log_length == 0:
        if header.has_log:
            raise refuse("LogLength", 0, "more than 0 as LogGuid is set", 68)
        return
    if header.log_offset % s.ALIGNMENT or not (
        s.HEADER_SECTION_SIZE <= header.log_offset <= s.FILE_OFFSET_MAX - header.log_length
    ):
        raise refuse("LogOffset", header.log_offset, "a multiple of 1 MiB from 1 MiB, and the log below 256 TiB", 72)


def next_header(
    header: Header,
    *,
    file_write_guid: UUID | None = None,
    data_write_guid: UUID | None = None,
    log_guid: UUID | None = None,
) -> Header:
    """The header that follows: one number higher, with what is given and the rest as it was."""
    return replace(
        header,
        sequence_number=header.sequence_number + 1,
        file_write_guid=header.file_write_guid if file_write_guid is None else file_write_guid,
        data_write_guid=header.data_write_guid if data_write_guid is None else data_write_guid,
        log_guid=header.log_guid if log_guid is None else log_guid,
        log_version=s.LOG_VERSION,
    )


async def write_header(file: BlockFile, headers: Headers, header: Header) -> Headers:
    """Make `header` the current one, durably: into the slot that is not current, and a barrier. Raises: OSError."""
    assert header.sequence_number > headers.current.sequence_number
    slot = 1 - headers.slot
    await file.pwrite(s.HEADER_OFFSETS[slot], header.to_bytes())
    await file.fdatasync()
    return Headers(header, slot, headers.current)


def file_identifier(creator: str) -> bytes:
    """The first 64 KiB of a new file."""
    text = creator.encode("utf-16-le")[: s.CREATOR_SIZE]
    return (s.FILE_SIGNATURE + text).ljust(s.FILE_IDENTIFIER_SIZE, b"\0")


def creator_of(head: bytes) -> str:
    """Who made the file, by its first 520 bytes; anybody may have written anything there."""
    start = len(s.FILE_SIGNATURE)
    text = head[start : start + s.CREATOR_SIZE].decode("utf-16-le", "replace")
    return text.partition("\0")[0]
