"""VHDX on disk: layouts, identifiers, limits. Everything is little-endian. Spec: [MS-VHDX] 2.

    0        file type identifier            64 KiB     never rewritten
    64 KiB   header 1                         4 KiB     the one with the greater sequence number is current
    128 KiB  header 2                         4 KiB
    192 KiB  region table 1                  64 KiB
    256 KiB  region table 2                  64 KiB     the same again
    1 MiB    log, metadata region, BAT region, payload blocks, sector bitmaps: in any order, each at a multiple of 1 MiB

GUIDs are stored in the mixed order that `uuid.UUID(bytes_le=…)` reads. Each checksum is a CRC-32C of its whole
structure with the checksum itself as zero.
"""

from __future__ import annotations

from struct import Struct
from uuid import UUID

from nbdimg.units import KiB, MiB, TiB

FILE_SIGNATURE = b"vhdxfile"
FILE_IDENTIFIER_SIZE = 64 * KiB
CREATOR_SIZE = 512
"""UTF-16, behind the signature; for people only."""

HEADER = Struct("<4sIQ16s16s16sHHIQ")
"""`head`, checksum, sequence number, FileWriteGuid, DataWriteGuid, LogGuid, log version, version, log length, log
offset."""
assert HEADER.size == 80
HEADER_SIZE = 4 * KiB
HEADER_OFFSETS = (64 * KiB, 128 * KiB)
HEADER_SIGNATURE = b"head"
HEADER_SECTION_SIZE = 1 * MiB
VERSION = 1
LOG_VERSION = 0

REGION_TABLE = Struct("<4sIII")
"""`regi`, checksum, entry count, reserved."""
assert REGION_TABLE.size == 16
REGION = Struct("<16sQII")
"""GUID, file offset, length, bit 0: required."""
assert REGION.size == 32
REGION_TABLE_SIZE = 64 * KiB
REGION_TABLE_OFFSETS = (192 * KiB, 256 * KiB)
REGION_SIGNATURE = b"regi"
REGIONS_MAX = 2047
"""Spec: what fits behind the table's header."""
assert REGION_TABLE.size + REGIONS_MAX * REGION.size <= REGION_TABLE_SIZE

METADATA_TABLE = Struct("<8sHH20s")
"""`metadata`, reserved, entry count, reserved."""
assert METADATA_TABLE.size == 32
METADATA_ITEM = Struct("<16sIIII")
"""GUID, offset from the start of the region, length, flags, reserved."""
assert METADATA_ITEM.size == 32
METADATA_TABLE_SIZE = 64 * KiB
METADATA_SIGNATURE = b"metadata"
METADATA_ITEMS_MAX = 2047
METADATA_USER_ITEMS_MAX = 1024
METADATA_ITEM_SIZE_MAX = 1 * MiB
"""Spec."""
IS_USER = 1 << 0
IS_VIRTUAL_DISK = 1 << 1
IS_REQUIRED = 1 << 2

FILE_PARAMETERS_FIELDS = Struct("<II")
"""Block size; bit 0: leave blocks allocated (a fixed image), bit 1: has a parent."""
LEAVE_BLOCKS_ALLOCATED = 1 << 0
HAS_PARENT = 1 << 1

LOCATOR = Struct("<16sHH")
"""Type, reserved, pair count."""
assert LOCATOR.size == 20
LOCATOR_PAIR = Struct("<IIHH")
"""Offsets of key and value from the start of the item, their lengths; both UTF-16 without NUL."""
assert LOCATOR_PAIR.size == 12
LOCATOR_PAIRS_MAX = 256
"""openvmm's limit; five keys are defined."""

ENTRY_STATE_MASK = 0x7
"""Of an entry of the BAT."""
ENTRY_RESERVED_MASK = 0xF_FFF8
ENTRY_OFFSET_MASK = 0xFFFF_FFFF_FFF0_0000
assert ENTRY_STATE_MASK | ENTRY_RESERVED_MASK | ENTRY_OFFSET_MASK == (1 << 64) - 1

PAGE_SIZE = 4 * KiB
"""What one data descriptor of the log changes, and so the unit in which metadata is changed."""

LOG_SECTOR_SIZE = 4 * KiB
LOG_ENTRY = Struct("<4sIIIQII16sQQ")
"""`loge`, checksum, entry length, tail, sequence number, descriptor count, reserved, LogGuid, flushed file offset, last
file offset."""
assert LOG_ENTRY.size == 64
LOG_DESCRIPTOR = Struct("<4sIQQQ")
"""`desc`: bytes 4092 to 4095 of the sector, its bytes 0 to 7, file offset, sequence number.
`zero`: reserved, length, file offset, sequence number."""
assert LOG_DESCRIPTOR.size == 32
LOG_DATA = Struct("<4sI4084sI")
"""`data`, sequence number's upper half, bytes 8 to 4091 of the sector, sequence number's lower half."""
assert LOG_DATA.size == LOG_SECTOR_SIZE
LOG_ENTRY_SIGNATURE = b"loge"
LOG_DATA_DESCRIPTOR_SIGNATURE = b"desc"
LOG_ZERO_DESCRIPTOR_SIGNATURE = b"zero"
LOG_DATA_SIGNATURE = b"data"
LOG_TARGET_MIN = 192 * KiB
"""Replay writes nothing below: the identifier and the headers are no part of what is logged (openvmm's rule)."""
assert REGION_TABLE_OFFSETS[0] == LOG_TARGET_MIN

NO_GUID = UUID(int=0)
BAT_REGION = UUID("2DC27766-F623-4200-9D64-115E9BFD4A08")
METADATA_REGION = UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E")
FILE_PARAMETERS = UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
VIRTUAL_DISK_SIZE = UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
VIRTUAL_DISK_ID = UUID("BECA12AB-B2E6-4523-93EF-C309E000C746")
LOGICAL_SECTOR_SIZE = UUID("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
PHYSICAL_SECTOR_SIZE = UUID("CDA348C7-445D-4471-9CC9-E9885251C556")
PARENT_LOCATOR = UUID("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
VHDX_LOCATOR = UUID("B04AEFB7-D19E-4A81-B789-25B8E9445913")

# Not in the specification; Windows knows them (openvmm's format.rs names them).

CHS_PARAMETERS = UUID("DA02D7BC-3D3A-423C-AC88-2A36AB21479B")
INCOMPLETE_FILE = UUID("71CC85F0-1B69-4E28-9558-C3BF83AE75D3")
PMEM_LABELS = UUID("10E1AE8A-4B7E-4169-A40F-CD70DE928393")

ALIGNMENT = 1 * MiB
"""Of the log, of regions, of blocks."""
BLOCK_SIZE_MIN = 1 * MiB
BLOCK_SIZE_MAX = 256 * MiB
VIRTUAL_SIZE_MAX = 64 * TiB
SECTOR_SIZES = (512, 4096)
FILE_OFFSET_MAX = 256 * TiB
"""openvmm's limit: four times the largest disk, and no sum of offsets and lengths comes near 2^63."""
SEQUENCE_NUMBER_MAX = (1 << 64) - (1 << 32)
"""Of a header: so that it can be counted up. Writers begin at 0 or at a random 32-bit number."""

LOG_LENGTH_MAX = 256 * MiB
"""A longer log is not replayed; without entries it may have any length. Every writer's default is 1 MiB. It bounds the
time of an open: the log is read once or twice, in pieces, and of each valid entry a record stays in memory."""
REPLAY_PAGES_MAX = 16384
"""4 KiB sectors of a replay that are in memory at once: 64 MiB."""
REPLAY_RANGES_MAX = 65536
"""The same for ranges of zeroes."""
