"""VHDX structures packed field by field from the specification, without the code that is tested.

The image is of 4 MiB: log at 1 MiB, metadata region at 2 MiB, BAT region at 3 MiB, one of each.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from uuid import UUID

from crc32c import crc32c

K = 1024
M = 1024 * K
SECTOR = 4096

LOG_GUID = UUID("11111111-2222-3333-4444-555555555555")
FILE_WRITE_GUID = UUID("aaaaaaaa-0000-0000-0000-000000000001")
DATA_WRITE_GUID = UUID("bbbbbbbb-0000-0000-0000-000000000002")
DISK_ID = UUID("cccccccc-0000-0000-0000-000000000003")
ZERO_GUID = UUID(int=0)

BAT = "66 77 C2 2D 23 F6 00 42 9D 64 11 5E 9B FD 4A 08"
METADATA = "06 A2 7C 8B 90 47 9A 4B B8 FE 57 5F 05 0F 88 6E"
FILE_PARAMETERS = "37 67 A1 CA 36 FA 43 4D B3 B6 33 F0 AA 44 E7 6B"
VIRTUAL_DISK_SIZE = "24 42 A5 2F 1B CD 76 48 B2 11 5D BE D8 3B F4 B8"
VIRTUAL_DISK_ID = "AB 12 CA BE E6 B2 23 45 93 EF C3 09 E0 00 C7 46"
LOGICAL_SECTOR_SIZE = "1D BF 41 81 6F A9 09 47 BA 47 F2 33 A8 FA AB 5F"
PHYSICAL_SECTOR_SIZE = "C7 48 A3 CD 5D 44 71 44 9C C9 E9 88 52 51 C5 56"
PARENT_LOCATOR = "2D 5F D3 A8 0B B3 4D 45 AB F7 D3 D8 48 34 AB 0C"
VHDX_LOCATOR = "B7 EF 4A B0 9E D1 81 4A B7 89 25 B8 E9 44 59 13"
CHS_PARAMETERS = "BC D7 02 DA 3A 3D 3C 42 AC 88 2A 36 AB 21 47 9B"
INCOMPLETE_FILE = "F0 85 CC 71 69 1B 28 4E 95 58 C3 BF 83 AE 75 D3"
PMEM_LABELS = "8A AE E1 10 7E 4B 69 41 A4 0F CD 70 DE 92 83 93"
UNKNOWN = "01 02 03 04 05 06 07 08 09 0A 0B 0C 0D 0E 0F 10"


def raw(guid: str) -> bytes:
    return bytes.fromhex(guid)


def castagnoli(data: bytes) -> int:
    """CRC-32C bit by bit: the definition, against which the package is held."""
    value = 0xFFFF_FFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F6_3B78 if value & 1 else 0)
    return value ^ 0xFFFF_FFFF


def sealed(data: bytes | bytearray) -> bytes:
    """With the checksum of the whole in bytes 4 to 7."""
    blank = bytes(data[:4]) + bytes(4) + bytes(data[8:])
    return blank[:4] + crc32c(blank).to_bytes(4, "little") + blank[8:]


def header(
    sequence_number: int = 1,
    *,
    log_guid: UUID = ZERO_GUID,
    log_length: int = M,
    log_offset: int = M,
    log_version: int = 0,
    version: int = 1,
    signature: bytes = b"head",
    data_write_guid: UUID = DATA_WRITE_GUID,
) -> bytes:
    fields = struct.pack("<4sIQ", signature, 0, sequence_number)
    fields += FILE_WRITE_GUID.bytes_le + data_write_guid.bytes_le + log_guid.bytes_le
    fields += struct.pack("<HHIQ", log_version, version, log_length, log_offset)
    return sealed(fields.ljust(4096, b"\0"))


def region(guid: str, offset: int, length: int = M, flags: int = 1) -> bytes:
    return raw(guid) + struct.pack("<QII", offset, length, flags)


REGIONS = (region(BAT, 3 * M), region(METADATA, 2 * M))


def region_table(*entries: bytes, count: int | None = None, signature: bytes = b"regi") -> bytes:
    fields = struct.pack("<4sIII", signature, 0, len(entries) if count is None else count, 0)
    return sealed((fields + b"".join(entries)).ljust(64 * K, b"\0"))


def item(guid: str, offset: int, length: int, flags: int) -> bytes:
    return raw(guid) + struct.pack("<IIII", offset, length, flags, 0)


def metadata_table(*entries: bytes, count: int | None = None, signature: bytes = b"metadata") -> bytes:
    fields = struct.pack("<8sHH20x", signature, 0, len(entries) if count is None else count)
    return (fields + b"".join(entries)).ljust(64 * K, b"\0")


def metadata(
    *,
    block_size: int = M,
    flags: int = 0,
    virtual_size: int = 64 * M,
    logical: int = 512,
    physical: int = 4096,
    more: Sequence[tuple[str, int, bytes]] = (),
    without: str = "",
) -> bytes:
    """A region of 1 MiB. `more` are further items: GUID, flags, content; `without` leaves one out."""
    items: list[tuple[str, int, bytes]] = [
        (FILE_PARAMETERS, 4, struct.pack("<II", block_size, flags)),
        (VIRTUAL_DISK_SIZE, 6, struct.pack("<Q", virtual_size)),
        (LOGICAL_SECTOR_SIZE, 6, struct.pack("<I", logical)),
        (PHYSICAL_SECTOR_SIZE, 6, struct.pack("<I", physical)),
        (VIRTUAL_DISK_ID, 6, DISK_ID.bytes_le),
    ]
    items = [each for each in items if each[0] != without]
    entries, content = [], b""
    for guid, kind, value in (*items, *more):
        entries.append(item(guid, 64 * K + len(content) if value else 0, len(value), kind))
        content += value
    return (metadata_table(*entries) + content).ljust(M, b"\0")


def locator(*pairs: tuple[str, str], kind: str = VHDX_LOCATOR, count: int | None = None) -> bytes:
    head = raw(kind) + struct.pack("<HH", 0, len(pairs) if count is None else count)
    start, text = 20 + 12 * len(pairs), b""
    for key, value in pairs:
        first, second = key.encode("utf-16-le"), value.encode("utf-16-le")
        offset = start + len(text)
        head += struct.pack("<IIHH", offset, offset + len(first), len(first), len(second))
        text += first + second
    return head + text


def image(
    *,
    first: bytes | None = None,
    second: bytes | None = None,
    table: bytes | None = None,
    table2: bytes | None = None,
    meta: bytes | None = None,
    log: bytes = b"",
    log_guid: UUID = ZERO_GUID,
) -> bytearray:
    """Header 2 is the current one."""
    content = bytearray(4 * M)

    def put(offset: int, data: bytes) -> None:
        content[offset : offset + len(data)] = data

    put(0, b"vhdxfile" + "nbdimg tests".encode("utf-16-le"))
    put(64 * K, header(1) if first is None else first)
    put(128 * K, header(2, log_guid=log_guid) if second is None else second)
    table = region_table(*REGIONS) if table is None else table
    put(192 * K, table)
    put(256 * K, table if table2 is None else table2)
    put(1 * M, log)
    put(2 * M, metadata() if meta is None else meta)
    return content


def page(fill: int) -> bytes:
    """4 KiB of which the first 8 and the last 4 bytes, which travel in the descriptor, are others than the rest."""
    return bytes([fill ^ 0xFF]) * 8 + bytes([fill]) * 4084 + bytes([fill ^ 0x55]) * 4


Descriptor = tuple[int, bytes] | tuple[int, int]
"""(file offset, page) for data, (file offset, length) for zeroes."""


def entry(
    sequence_number: int,
    tail: int,
    *descriptors: Descriptor,
    guid: UUID = LOG_GUID,
    flushed: int = 4 * M,
    last: int = 4 * M,
    length: int | None = None,
    count: int | None = None,
    signature: bytes = b"loge",
    change: Callable[[bytearray], None] | None = None,
) -> bytes:
    """A log entry. `change` alters it before the checksum is made."""
    area, sectors = b"", b""
    for offset, what in descriptors:
        if isinstance(what, int):
            area += struct.pack("<4sIQQQ", b"zero", 0, what, offset, sequence_number)
        else:
            area += b"desc" + what[4092:] + what[:8] + struct.pack("<QQ", offset, sequence_number)
            high, low = divmod(sequence_number, 1 << 32)
            sectors += struct.pack("<4sI", b"data", high) + what[8:4092] + struct.pack("<I", low)
    head_length = -(-(64 + len(area)) // SECTOR) * SECTOR
    whole = head_length + len(sectors) if length is None else length
    count = len(descriptors) if count is None else count
    head = struct.pack("<4sIIIQII", signature, 0, whole, tail, sequence_number, count, 0)
    head += guid.bytes_le + struct.pack("<QQ", flushed, last)
    content = bytearray((head + area).ljust(head_length, b"\0") + sectors)
    if change is not None:
        change(content)
    return sealed(content)


def ring(*placed: tuple[int, bytes], length: int = M, fill: bytes = b"\0") -> bytearray:
    """A log with entries at positions; one that reaches behind the end goes on at the start."""
    content = bytearray(fill * length)
    for position, data in placed:
        for start in range(0, len(data), SECTOR):
            at = (position + start) % length
            content[at : at + SECTOR] = data[start : start + SECTOR]
    return content


def sample(name: str) -> bytes:
    """A file of tests/data/vhdx."""
    path = Path(__file__).parents[2] / "data" / "vhdx" / f"{name}.vhdx.gz"
    return gzip.decompress(path.read_bytes())
