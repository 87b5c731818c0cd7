"""qcow2 on disk: layouts, masks, limits. Everything is big-endian. Spec: QEMU docs/interop/qcow2.rst.

A guest offset goes through two tables to a host offset; with 64 KiB clusters and 8-byte entries:

    guest offset   [ L1 index | L2 index 13 bits | offset in cluster 16 bits ]
    L1 entry       63 COPIED            9..55 offset of an L2 table
    L2 entry       63 COPIED  62 = 0    9..55 host offset      0 ZERO
    compressed     63 = 0     62 = 1    x..61 further sectors  0..x-1 byte offset     x = 62 - (cluster_bits - 8)
    extended L2    a second word: bits 0..31 subcluster allocated, bits 32..63 subcluster reads as zero
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct

from nbdimg.units import KiB, MiB

MAGIC = 0x514649FB
U64 = Struct(">Q")

HEADER = Struct(">IIQIIQIIQQIIQ")
"""magic, version, backing offset, backing size, cluster bits, size, crypt method, L1 size, L1 offset, refcount table
offset, refcount table clusters, snapshot count, snapshot table offset: all of version 2."""
assert HEADER.size == 72
HEADER_V3 = Struct(">QQQII")
"""incompatible, compatible, autoclear features, refcount order, header length: at offset 72."""
assert HEADER.size + HEADER_V3.size == 104
COMPRESSION_TYPE_OFFSET = 104
HEADER_LENGTH = 112
"""What new images get: the compression type and its padding included."""

EXTENSION = Struct(">II")
"""type, length; the data behind it is padded to 8 bytes."""
FEATURE_NAME = Struct(">BB46s")
"""a FeatureKind; bit; name padded with NUL."""
assert FEATURE_NAME.size == 48
BITMAPS_EXTENSION = Struct(">IIQQ")
"""bitmap count, reserved, directory size, directory offset."""
LUKS_EXTENSION = Struct(">QQ")
"""offset and length of the LUKS header."""

L1_FIELDS_OFFSET = 36
REFCOUNT_FIELDS_OFFSET = 48
SNAPSHOT_FIELDS_OFFSET = 60
SIZE_OFFSET = 24
INCOMPATIBLE_OFFSET = 72
AUTOCLEAR_OFFSET = 88
L1_FIELDS = Struct(">IQ")
"""L1 size in entries, L1 table offset: one write that cannot tear, for it lies within a sector."""
SIZE_FIELDS = Struct(">QIIQ")
"""size, crypt method, L1 size, L1 table offset: from SIZE_OFFSET on, within the same sector."""
assert SIZE_OFFSET + SIZE_FIELDS.size == L1_FIELDS_OFFSET + L1_FIELDS.size
REFCOUNT_FIELDS = Struct(">QI")
SNAPSHOT_FIELDS = Struct(">IQ")

SNAPSHOT = Struct(">QIHHIIQII")
"""L1 offset, L1 size, id length, name length, seconds, nanoseconds, VM clock, VM state size, extra data size."""
assert SNAPSHOT.size == 40
SNAPSHOT_EXTRA = Struct(">QQQ")
"""VM state size, virtual disk size, icount."""

BITMAP = Struct(">QIIBBHI")
"""table offset, table size in entries, flags, type, granularity bits, name size, extra data size."""
assert BITMAP.size == 24


class FeatureKind(IntEnum):
    """In the table of feature names. Spec: "Feature name table"."""

    INCOMPATIBLE = 0
    COMPATIBLE = 1
    AUTOCLEAR = 2


class Incompatible(IntFlag):
    """Bits that a reader must know. Spec: "incompatible_features"."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    DATA_FILE = 1 << 2
    COMPRESSION = 1 << 3
    EXTENDED_L2 = 1 << 4


class Compatible(IntFlag):
    LAZY_REFCOUNTS = 1 << 0


class Autoclear(IntFlag):
    BITMAPS = 1 << 0
    RAW_DATA_FILE = 1 << 1


class Crypt(IntEnum):
    NONE = 0
    AES = 1
    LUKS = 2


class Compression(IntEnum):
    ZLIB = 0
    ZSTD = 1


class ExtensionType(IntEnum):
    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    LUKS = 0x0537BE77
    DATA_FILE = 0x44415441
    UNUSED = 0x756E7573
    """Of nbdimg alone, skipped by all others: what was a bitmaps extension, and may be one again."""


FEATURE_NAMES: tuple[tuple[int, int, str], ...] = (
    (FeatureKind.INCOMPATIBLE, 0, "dirty bit"),
    (FeatureKind.INCOMPATIBLE, 1, "corrupt bit"),
    (FeatureKind.INCOMPATIBLE, 2, "external data file"),
    (FeatureKind.INCOMPATIBLE, 3, "compression type"),
    (FeatureKind.INCOMPATIBLE, 4, "extended L2 entries"),
    (FeatureKind.COMPATIBLE, 0, "lazy refcounts"),
    (FeatureKind.AUTOCLEAR, 0, "bitmaps"),
    (FeatureKind.AUTOCLEAR, 1, "raw external data"),
)
"""(kind, bit, name) of all that is known here; a new image carries it, so that others can name what they lack."""

COPIED = 1 << 63
"""In an L1 or L2 entry of the active image: the refcount is exactly 1, so it may be written in place."""
COMPRESSED = 1 << 62
ZERO = 1
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
L1_RESERVED = 0x7F00_0000_0000_01FF
L2_RESERVED = 0x3F00_0000_0000_01FE
BITMAP_RESERVED = 0xFF00_0000_0000_01FE

SUBCLUSTERS = 32
"""Of a cluster with extended L2 entries."""
ALL_ALLOCATED = 0xFFFF_FFFF

SECTOR_SIZE = 512

# QEMU's limits, adopted, so that what one opens the other does too.

CLUSTER_BITS_MIN = 9
CLUSTER_BITS_MAX = 21
CLUSTER_BITS_EXTENDED_MIN = 14
REFCOUNT_ORDER_MAX = 6
L1_BYTES_MAX = 32 * MiB
REFCOUNT_TABLE_BYTES_MAX = 8 * MiB
HOST_OFFSET_MAX = 1 << 56
SIZE_MAX = (1 << 63) - 512
BACKING_NAME_MAX = 1023
BACKING_FORMAT_MAX = 15
SNAPSHOTS_MAX = 65536
SNAPSHOT_TABLE_BYTES_MAX = 64 * MiB
SNAPSHOT_EXTRA_MAX = 1024
BITMAPS_MAX = 65535
BITMAP_DIRECTORY_BYTES_MAX = 1024 * BITMAPS_MAX
BITMAP_TABLE_ENTRIES_MAX = 0x800_0000
BITMAP_BYTES_MAX = 0x2000_0000
BITMAP_NAME_MAX = 1023
BITMAP_GRANULARITY_BITS_MIN = 9
BITMAP_GRANULARITY_BITS_MAX = 31

SLICE_SIZE = 4 * KiB
"""Tables are held, loaded and written in slices of at most this: one page, so that a random write costs one page."""
