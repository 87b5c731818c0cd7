"""The header in cluster 0: fields, extensions, backing file name; every check that an untrusted file needs.

    0      fields of version 2                                72 bytes
    72     fields of version 3, then fields unknown here      to header_length
    ..     extensions: type, length, data padded to 8         to the end marker
    ..     backing file name                                  within cluster 0

A header is parsed whole and written whole; what is unknown here (fields, extensions, compatible bits) is kept as it
was. What must change at one stroke is contiguous and is written alone (`structs.L1_FIELDS` and its like).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from nbdimg.errors import CorruptImage, UnsupportedFeature, escaped
from nbdimg.formats.qcow2 import structs as s
from nbdimg.formats.qcow2.structs import (
    Autoclear,
    Compatible,
    Compression,
    Crypt,
    ExtensionType,
    FeatureKind,
    Incompatible,
)
from nbdimg.units import align_up, div_ceil

_KNOWN_INCOMPATIBLE = int(
    Incompatible.DIRTY
    | Incompatible.CORRUPT
    | Incompatible.DATA_FILE
    | Incompatible.COMPRESSION
    | Incompatible.EXTENDED_L2
)
KNOWN_AUTOCLEAR = int(Autoclear.BITMAPS | Autoclear.RAW_DATA_FILE)


@dataclass(frozen=True, slots=True)
class Extension:
    """One header extension, verbatim; `offset` is where its data begins in the file."""

    type: int
    data: bytes
    offset: int = 0


@dataclass(slots=True)
class Header:
    """Offsets and sizes in bytes but where the name says otherwise. `from_bytes` gives a checked one."""

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    """Entries."""
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    crypt_method: int = Crypt.NONE
    snapshot_count: int = 0
    snapshot_table_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_length: int = s.HEADER_LENGTH
    compression: int = Compression.ZLIB
    unknown_fields: bytes = b""
    """Header bytes from 112 to header_length."""
    extensions: list[Extension] = field(default_factory=list)
    backing_name: str | None = None
    backing_name_offset: int = 0

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def has_subclusters(self) -> bool:
        return bool(self.incompatible & Incompatible.EXTENDED_L2)

    @property
    def has_data_file(self) -> bool:
        return bool(self.incompatible & Incompatible.DATA_FILE)

    @property
    def is_data_file_raw(self) -> bool:
        return bool(self.autoclear & Autoclear.RAW_DATA_FILE)

    @property
    def is_dirty(self) -> bool:
        return bool(self.incompatible & Incompatible.DIRTY)

    @property
    def is_corrupt(self) -> bool:
        return bool(self.incompatible & Incompatible.CORRUPT)

    @property
    def has_lazy_refcounts(self) -> bool:
        return bool(self.compatible & Compatible.LAZY_REFCOUNTS)

    @property
    def l2_entry_size(self) -> int:
        return 16 if self.has_subclusters else 8

    @property
    def l2_entries(self) -> int:
        """Entries in an L2 table: 64 KiB clusters and 8-byte entries give 8192."""
        return self.cluster_size // self.l2_entry_size

    @property
    def refcount_bits(self) -> int:
        return 1 << self.refcount_order

    @property
    def refcount_entries(self) -> int:
        """Entries in a refcount block: 64 KiB clusters and 16 bits give 32768."""
        return self.cluster_size * 8 // self.refcount_bits

    def l1_entries_needed(self, size: int) -> int:
        """L1 entries for `size` bytes: 1 TiB of 64 KiB clusters takes 2048, 512 MiB each."""
        return div_ceil(size, self.cluster_size * self.l2_entries)

    def extension(self, type: int) -> Extension | None:
        return next((each for each in self.extensions if each.type == type), None)

    def set_extension(self, type: int, data: bytes | None) -> None:
        """Replace the extension of this type, or remove it with None."""
        self.extensions = [each for each in self.extensions if each.type != type]
        if data is not None:
            self.extensions.append(Extension(type, data))

    def text(self, type: int) -> str | None:
        """An extension that holds a string."""
        found = self.extension(type)
        return found.data.decode() if found else None

    def feature_names(self, kind: FeatureKind) -> dict[int, str]:
        """By bit, what the image itself calls features of a kind; made safe to print."""
        table = self.extension(ExtensionType.FEATURE_NAMES)
        if table is None:
            return {}
        whole = len(table.data) // s.FEATURE_NAME.size * s.FEATURE_NAME.size
        entries = s.FEATURE_NAME.iter_unpack(table.data[:whole])
        return {bit: escaped(name.rstrip(b"\0")) for found, bit, name in entries if found == kind}

    @property
    def extensions_end(self) -> int:
        """Where the last extension ends, and the end marker is."""
        if not self.extensions:
            return self.header_length
        last = self.extensions[-1]
        return last.offset + align_up(len(last.data), 8)

    @property
    def backing_name_bytes(self) -> bytes:
        """As stored; none without a backing file."""
        return (self.backing_name or "").encode()

    @property
    def backing_format(self) -> str | None:
        return self.text(ExtensionType.BACKING_FORMAT)

    @property
    def data_file_name(self) -> str | None:
        return self.text(ExtensionType.DATA_FILE)

    def to_bytes(self, path: str) -> bytes:
        """Cluster 0 up to the end of the backing file name, with zeroes behind it as far as the cluster goes.

        Raises: UnsupportedFeature: it does not fit into the cluster.
        """
        parts = [b""]
        if self.version >= 3:
            parts.append(
                s.HEADER_V3.pack(
                    self.incompatible, self.compatible, self.autoclear, self.refcount_order, self.header_length
                )
            )
            if self.header_length > s.COMPRESSION_TYPE_OFFSET:
                parts.append(bytes([self.compression]).ljust(8, b"\0") + self.unknown_fields)
        for each in self.extensions:
            parts.append(s.EXTENSION.pack(each.type, len(each.data)) + _padded(each.data))
        parts.append(s.EXTENSION.pack(ExtensionType.END, 0))
        area = b"".join(parts)
        name = self.backing_name_bytes
        name_offset = s.HEADER.size + len(area) if name else 0
        fields = s.HEADER.pack(
            s.MAGIC,
            self.version,
            name_offset,
            len(name),
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_size,
            self.l1_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.snapshot_count,
            self.snapshot_table_offset,
        )
        content = fields + area + name
        if len(content) > self.cluster_size:
            raise UnsupportedFeature(
                path,
                f"the header with its extensions and backing file name takes {len(content)} bytes, "
                f"more than a cluster of {self.cluster_size}",
            )
        self.backing_name_offset = name_offset
        return content.ljust(self.cluster_size, b"\0")

    @classmethod
    def from_bytes(cls, path: str, head: bytes) -> Header:
        """Parse cluster 0 (`head`: at least the fields; a whole cluster when the file has one).

        Raises: CorruptImage, UnsupportedFeature: naming field, what was found, what is allowed, and the offset.
        """
        return _Parser(path, head).header()


def cluster_bits_of(path: str, head: bytes) -> int:
    """How much of the file `Header.from_bytes` wants to see, from its first 72 bytes. Raises: CorruptImage."""
    return _Parser(path, head).cluster_bits()


def _padded(data: bytes) -> bytes:
    return data.ljust(align_up(len(data), 8), b"\0")


class _Parser:
    def __init__(self, path: str, head: bytes) -> None:
        self._path = path
        self._head = head

    def _refuse(self, what: str, found: object, allowed: str, offset: int) -> CorruptImage:
        return CorruptImage(self._path, f"{what} is {found}, expected {allowed} (header offset {offset})", offset)

    def _fields(self) -> tuple[int, ...]:
        try:
            fields = s.HEADER.unpack_from(self._head)
        except struct.error:
            raise CorruptImage(
                self._path, f"the file has {len(self._head)} bytes, a qcow2 header takes {s.HEADER.size}", 0
            ) from None
        if fields[0] != s.MAGIC:
            raise self._refuse("magic", f"{fields[0]:#010x}", f"{s.MAGIC:#010x}", 0)
        if fields[1] not in (2, 3):
            raise UnsupportedFeature(self._path, f"version is {fields[1]}, expected 2 or 3 (header offset 4)", 4)
        return fields

    def cluster_bits(self) -> int:
        bits = self._fields()[4]
        if not s.CLUSTER_BITS_MIN <= bits <= s.CLUSTER_BITS_MAX:
            raise self._refuse("cluster_bits", bits, f"{s.CLUSTER_BITS_MIN} to {s.CLUSTER_BITS_MAX}", 20)
        return bits

    def header(self) -> Header:
        fields = self._fields()
        cluster_bits = self.cluster_bits()
        (_, version, name_offset, name_size, _, size, crypt_method, l1_size, l1_offset) = fields[:9]
        refcount_table_offset, refcount_table_clusters, snapshot_count, snapshot_table_offset = fields[9:]
        header = Header(
            version=version,
            cluster_bits=cluster_bits,
            size=size,
            l1_size=l1_size,
            l1_offset=l1_offset,
            refcount_table_offset=refcount_table_offset,
            refcount_table_clusters=refcount_table_clusters,
            crypt_method=crypt_method,
            snapshot_count=snapshot_count,
            snapshot_table_offset=snapshot_table_offset,
            header_length=s.HEADER.size,
        )
        if version >= 3:
            self._parse_version_3(header)
        self._parse_extensions(header, name_offset)
        self._check_features(header)
        self._parse_backing_name(header, name_offset, name_size)
        self._check_tables(header)
        self._check_extensions(header)
        return header

    def _parse_version_3(self, header: Header) -> None:
        try:
            fields = s.HEADER_V3.unpack_from(self._head, s.HEADER.size)
        except struct.error:
            raise CorruptImage(
                self._path, f"the file has {len(self._head)} bytes, a version 3 header takes 104", s.HEADER.size
            ) from None
        header.incompatible, header.compatible, header.autoclear, header.refcount_order, length = fields
        if not 104 <= length <= header.cluster_size or length % 8:
            raise self._refuse("header_length", length, f"a multiple of 8 from 104 to {header.cluster_size}", 100)
        if length > len(self._head):
            raise self._refuse("header_length", length, f"at most the file's {len(self._head)} bytes", 100)
        if header.refcount_order > s.REFCOUNT_ORDER_MAX:
            raise self._refuse("refcount_order", header.refcount_order, f"0 to {s.REFCOUNT_ORDER_MAX}", 96)
        header.header_length = length
        if length > s.COMPRESSION_TYPE_OFFSET:
            header.compression = self._head[s.COMPRESSION_TYPE_OFFSET]
            header.unknown_fields = self._head[s.HEADER_LENGTH : length]

    def _parse_extensions(self, header: Header, name_offset: int) -> None:
        stop = min(name_offset or header.cluster_size, header.cluster_size, len(self._head))
        offset = header.header_length
        seen: set[int] = set()
        while offset + s.EXTENSION.size <= stop:
            type, length = s.EXTENSION.unpack_from(self._head, offset)
            data_offset = offset + s.EXTENSION.size
            if length > stop - data_offset:
                raise self._refuse(
                    f"the length of extension {type:#010x}", length, f"at most {stop - data_offset}", offset + 4
                )
            if type == ExtensionType.END:
                return
            if type in seen:
                raise CorruptImage(
                    self._path,
                    f"extension {type:#010x} is there twice, allowed is one (header offset {offset})",
                    offset,
                )
            seen.add(type)
            header.extensions.append(Extension(type, self._head[data_offset : data_offset + length], data_offset))
            offset = data_offset + align_up(length, 8)

    def _check_features(self, header: Header) -> None:
        unknown = header.incompatible & ~_KNOWN_INCOMPATIBLE
        if unknown:
            names = ", ".join(_feature_names(header, unknown))
            raise UnsupportedFeature(
                self._path, f"incompatible features are not known here: {names} (header offset 72)", 72
            )
        if header.has_subclusters and header.cluster_bits < s.CLUSTER_BITS_EXTENDED_MIN:
            raise self._refuse("cluster_bits", header.cluster_bits, "14 to 21 with extended L2 entries", 20)
        has_type = bool(header.incompatible & Incompatible.COMPRESSION)
        if header.compression not in (Compression.ZLIB, Compression.ZSTD):
            raise UnsupportedFeature(
                self._path,
                f"compression_type is {header.compression}, known are 0 (zlib) and 1 (zstd) (header offset 104)",
                s.COMPRESSION_TYPE_OFFSET,
            )
        if has_type != (header.compression != Compression.ZLIB):
            raise self._refuse(
                "compression_type", header.compression, "non-zero exactly when incompatible feature bit 3 is set", 104
            )
        if header.is_data_file_raw and not header.has_data_file:
            raise self._refuse("autoclear_features", hex(header.autoclear), "bit 1 only with an external data file", 88)
        if header.crypt_method not in (Crypt.NONE, Crypt.AES, Crypt.LUKS):
            raise self._refuse("crypt_method", header.crypt_method, "0 (none), 1 (AES) or 2 (LUKS)", 32)
        if header.has_data_file and header.snapshot_count:
            raise self._refuse("nb_snapshots", header.snapshot_count, "0 with an external data file", 60)

    def _parse_backing_name(self, header: Header, offset: int, size: int) -> None:
        if offset == 0:
            return
        first = header.extensions_end
        if not 1 <= size <= s.BACKING_NAME_MAX:
            raise self._refuse("backing_file_size", size, f"1 to {s.BACKING_NAME_MAX}", 16)
        stop = min(header.cluster_size, len(self._head))
        if not first <= offset <= stop - size:
            raise self._refuse("backing_file_offset", offset, f"{first} to {stop - size}", 8)
        if header.is_data_file_raw:
            raise self._refuse("backing_file_offset", offset, "0 with a raw external data file", 8)
        header.backing_name = self._text(self._head[offset : offset + size], "the backing file name", offset)
        header.backing_name_offset = offset

    def _text(self, data: bytes, what: str, offset: int) -> str:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            raise self._refuse(what, escaped(data), "UTF-8", offset) from None
        if not text.isprintable():
            raise self._refuse(what, escaped(text), "printable characters", offset)
        return text

    def _check_tables(self, header: Header) -> None:
        cluster_size = header.cluster_size
        if not header.size <= s.SIZE_MAX:
            raise self._refuse("size", header.size, f"at most {s.SIZE_MAX}", 24)
        entries_max = s.L1_BYTES_MAX // 8
        needed = header.l1_entries_needed(header.size)
        if not needed <= header.l1_size <= entries_max:
            raise self._refuse("l1_size", header.l1_size, f"{needed} to {entries_max}", 36)
        self._check_table("l1_table_offset", header.l1_offset, header.l1_size * 8, 40, cluster_size)
        clusters_max = max(1, s.REFCOUNT_TABLE_BYTES_MAX // cluster_size)
        if not 1 <= header.refcount_table_clusters <= clusters_max:
            raise self._refuse("refcount_table_clusters", header.refcount_table_clusters, f"1 to {clusters_max}", 56)
        self._check_table(
            "refcount_table_offset",
            header.refcount_table_offset,
            header.refcount_table_clusters * cluster_size,
            48,
            cluster_size,
        )
        if header.snapshot_count > s.SNAPSHOTS_MAX:
            raise self._refuse("nb_snapshots", header.snapshot_count, f"at most {s.SNAPSHOTS_MAX}", 60)
        if header.snapshot_count:
            least = header.snapshot_count * s.SNAPSHOT.size
            self._check_table("snapshots_offset", header.snapshot_table_offset, least, 64, cluster_size)

    def _check_table(self, field: str, offset: int, length: int, at: int, cluster_size: int) -> None:
        """A table may be empty at 0; else it lies on a cluster boundary behind the header."""
        if offset % cluster_size or (length and not cluster_size <= offset <= s.HOST_OFFSET_MAX - length):
            raise self._refuse(
                field, offset, f"a multiple of {cluster_size} from {cluster_size}, and the table below 2^56", at
            )

    def _check_extensions(self, header: Header) -> None:
        for extension in header.extensions:
            length, offset = len(extension.data), extension.offset
            if extension.type == ExtensionType.BACKING_FORMAT:
                if length > s.BACKING_FORMAT_MAX:
                    raise self._refuse("the backing format's length", length, f"at most {s.BACKING_FORMAT_MAX}", offset)
                self._text(extension.data, "the backing format", offset)
            elif extension.type == ExtensionType.DATA_FILE:
                self._text(extension.data, "the data file name", offset)
            elif extension.type == ExtensionType.BITMAPS and length != s.BITMAPS_EXTENSION.size:
                raise self._refuse("the bitmaps extension's length", length, "24", offset)
            elif extension.type == ExtensionType.LUKS:
                if length != s.LUKS_EXTENSION.size:
                    raise self._refuse("the LUKS extension's length", length, "16", offset)
                if header.crypt_method != Crypt.LUKS:
                    raise self._refuse("crypt_method", header.crypt_method, "2 with a LUKS header extension", 32)
        if header.crypt_method == Crypt.LUKS and header.extension(ExtensionType.LUKS) is None:
            raise CorruptImage(self._path, "crypt_method is 2 (LUKS), and there is no LUKS header extension", 32)


def _feature_names(header: Header, bits: int) -> list[str]:
    """Incompatible bits by the image's own table, else by number."""
    names = header.feature_names(FeatureKind.INCOMPATIBLE)
    return [names.get(bit, f"bit {bit}") for bit in range(64) if bits >> bit & 1]


def feature_name_table() -> bytes:
    """The extension's data for a new image."""
    return b"".join(s.FEATURE_NAME.pack(kind, bit, name.encode()) for kind, bit, name in s.FEATURE_NAMES)
