"""Where everything lies in a new image. Pure: no file is touched here.

    header | refcount table | refcount blocks | LUKS header | L1 table | L2 tables | data clusters
    ^ cluster 0                                                                    all have refcount 1, none else is

L2 tables and data clusters are there when space is preallocated; the clusters of an external data file lie in that
file. Every table is one arithmetic sequence, so it is made piece by piece: memory does not grow with the image.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from nbdimg.errors import ConfigError
from nbdimg.formats.qcow2 import structs as s
from nbdimg.formats.qcow2.create_options import CreateOptions, check
from nbdimg.formats.qcow2.header import Header, feature_name_table
from nbdimg.formats.qcow2.packed import encode_offsets
from nbdimg.formats.qcow2.structs import Autoclear, Compatible, Compression, Crypt, ExtensionType, Incompatible
from nbdimg.units import KiB, MiB, align_up, div_ceil

Piece = tuple[int, bytes]
"""(offset in the image file, content)."""

PIECE_SIZE = 1 * MiB
"""Bytes of a table, or of zeroes, in memory and in one write."""

FEATURE_NAMES_CLUSTER_MIN = 8 * KiB
"""Smaller clusters do without the feature name table, as with QEMU: its 392 bytes would leave names no room."""

_WORD = 8
"""Bytes in an entry of L1, of the refcount table, and in half an extended L2 entry."""


def rounded_size(size: int) -> int:
    """The size that an image asked to have `size` bytes gets: whole sectors, rounded up."""
    return align_up(size, s.SECTOR_SIZE)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies. Offsets and lengths in bytes; tables that are not there have none."""

    header: Header
    cluster_count: int
    """Refcounted clusters: all of the image file."""
    refcount_blocks_offset: int
    refcount_block_count: int
    luks_offset: int
    l2_offset: int
    l2_table_count: int
    data_offset: int
    """Of guest cluster 0: in the image, or 0 in an external data file."""
    data_cluster_count: int
    """Guest clusters that L2 tables map."""
    l2_flags: int
    """Beside the offset in every L2 entry that maps a cluster."""
    subclusters: int
    """The second word of an extended L2 entry that maps a cluster."""

    @property
    def file_size(self) -> int:
        return self.cluster_count * self.header.cluster_size

    @property
    def metadata_length(self) -> int:
        """Bytes that `pieces` gives."""
        return sum(length for length, _ in self._tables())

    def pieces(self) -> Iterator[Piece]:
        """All tables in pieces of at most PIECE_SIZE bytes; what is zero is left a hole."""
        for _, pieces in self._tables():
            yield from pieces

    def _tables(self) -> tuple[tuple[int, Iterator[Piece]], ...]:
        header = self.header
        cluster_size = header.cluster_size
        return (
            (
                self.refcount_block_count * _WORD,
                _sequence(
                    header.refcount_table_offset, self.refcount_blocks_offset, cluster_size, self.refcount_block_count
                ),
            ),
            (
                div_ceil(self.cluster_count * header.refcount_bits, 8),
                _ones(self.refcount_blocks_offset, self.cluster_count, header.refcount_bits),
            ),
            (
                self.l2_table_count * _WORD,
                _sequence(header.l1_offset, self.l2_offset | s.COPIED, cluster_size, self.l2_table_count),
            ),
            (
                self.data_cluster_count * header.l2_entry_size,
                _sequence(
                    self.l2_offset,
                    self.data_offset | self.l2_flags,
                    cluster_size,
                    self.data_cluster_count,
                    self.subclusters if header.has_subclusters else None,
                ),
            ),
        )


def layout(size: int, options: CreateOptions, luks_length: int = 0) -> Layout:
    """Plan an image of `size` bytes, rounded up to whole sectors, with a LUKS header of `luks_length` bytes.

    1 GiB, metadata preallocated, 64 KiB clusters: header at cluster 0, refcount table 1, refcount block 2, L1 table 3,
    L2 tables 4 and 5, guest cluster n at 6 + n, and 16390 clusters with refcount 1.

    Raises: ConfigError: `check` refuses it, or its metadata exceed a limit.
    """
    check(size, options)
    header = _header(rounded_size(size), options)
    cluster_size = header.cluster_size
    data_count = div_ceil(header.size, cluster_size) if options.has_tables else 0
    l2_count = header.l1_size if options.has_tables else 0
    l1_count = div_ceil(header.l1_size * _WORD, cluster_size)
    luks_count = div_ceil(luks_length, cluster_size)
    others = 1 + luks_count + l1_count + l2_count + (0 if header.has_data_file else data_count)
    table_count, block_count = _refcount_structure(others, cluster_size, header.refcount_entries)
    _check_refcount_table(table_count, header)

    blocks_start = 1 + table_count
    luks_start = blocks_start + block_count
    l1_start = luks_start + luks_count
    l2_start = l1_start + l1_count
    header.refcount_table_offset = cluster_size
    header.refcount_table_clusters = table_count
    header.l1_offset = l1_start * cluster_size if header.l1_size else 0
    if options.luks_passphrase is not None:
        header.set_extension(ExtensionType.LUKS, s.LUKS_EXTENSION.pack(luks_start * cluster_size, luks_length))
    planned = Layout(
        header=header,
        cluster_count=others + table_count + block_count,
        refcount_blocks_offset=blocks_start * cluster_size,
        refcount_block_count=block_count,
        luks_offset=luks_start * cluster_size,
        l2_offset=l2_start * cluster_size,
        l2_table_count=l2_count,
        data_offset=0 if header.has_data_file else (l2_start + l2_count) * cluster_size,
        data_cluster_count=data_count,
        l2_flags=_l2_flags(options),
        subclusters=s.ALL_ALLOCATED if options.is_data_file_raw else 0,
    )
    if planned.file_size > s.HOST_OFFSET_MAX:
        raise ConfigError(f"the image file would have {planned.file_size} bytes, allowed are {s.HOST_OFFSET_MAX}")
    return planned


def _header(size: int, options: CreateOptions) -> Header:
    """All that does not depend on where tables lie."""
    incompatible = 0
    if options.data_file_name is not None:
        incompatible |= Incompatible.DATA_FILE
    if options.compression == "zstd":
        incompatible |= Incompatible.COMPRESSION
    if options.has_extended_l2:
        incompatible |= Incompatible.EXTENDED_L2
    header = Header(
        version=options.version,
        cluster_bits=options.cluster_size.bit_length() - 1,
        size=size,
        l1_size=0,
        l1_offset=0,
        refcount_table_offset=0,
        refcount_table_clusters=0,
        crypt_method=Crypt.NONE if options.luks_passphrase is None else Crypt.LUKS,
        incompatible=incompatible,
        compatible=Compatible.LAZY_REFCOUNTS if options.has_lazy_refcounts else 0,
        autoclear=Autoclear.RAW_DATA_FILE if options.is_data_file_raw else 0,
        refcount_order=options.refcount_bits.bit_length() - 1,
        header_length=s.HEADER_LENGTH if options.version >= 3 else s.HEADER.size,
        compression=Compression.ZSTD if options.compression == "zstd" else Compression.ZLIB,
        backing_name=options.backing_name,
    )
    header.l1_size = header.l1_entries_needed(size)
    if options.backing_format is not None:
        header.set_extension(ExtensionType.BACKING_FORMAT, options.backing_format.encode())
    if options.data_file_name is not None:
        header.set_extension(ExtensionType.DATA_FILE, options.data_file_name.encode())
    if options.version >= 3 and options.cluster_size >= FEATURE_NAMES_CLUSTER_MIN:
        header.set_extension(ExtensionType.FEATURE_NAMES, feature_name_table())
    return header


def _l2_flags(options: CreateOptions) -> int:
    """A preallocated cluster holds zeroes, which decrypt to noise: so with encryption the entry says that it reads as
    zeroes. Extended entries say it, or leave it to the backing file, by having no subcluster allocated; only a raw data
    file is the guest's content as it is, whatever it holds already."""
    is_noise = options.luks_passphrase is not None and not options.has_extended_l2
    return s.COPIED | (s.ZERO if is_noise else 0)


def _refcount_structure(others: int, cluster_size: int, entries: int) -> tuple[int, int]:
    """Clusters of table, and blocks, that describe `others` clusters and themselves.

    65536 others with 64 KiB clusters of 32768 entries: 2 blocks describe 65536, but with 1 table and the blocks it is
    65539 clusters, which takes 3 blocks and makes 65540.
    """
    table_count = block_count = 1
    while (needed := div_ceil(others + table_count + block_count, entries)) != block_count:
        block_count = needed
        table_count = div_ceil(block_count * _WORD, cluster_size)
    return table_count, block_count


def _check_refcount_table(table_count: int, header: Header) -> None:
    length, most = table_count * header.cluster_size, s.REFCOUNT_TABLE_BYTES_MAX
    if length > most:
        raise ConfigError(
            f"the refcount table would take {length} bytes, allowed are {most}: "
            f"{header.size} bytes cannot be preallocated with clusters of {header.cluster_size} bytes "
            f"and refcounts of {header.refcount_bits} bits"
        )


def _sequence(offset: int, first: int, step: int, count: int, second_word: int | None = None) -> Iterator[Piece]:
    """Big-endian 64-bit entries first, first + step, ... at `offset`; `second_word` follows each where it is given."""
    words = 1 if second_word is None else 2
    per_piece = PIECE_SIZE // (words * _WORD)
    for done in range(0, count, per_piece):
        here = min(per_piece, count - done)
        start = first + done * step
        entries = array("Q", range(start, start + here * step, step))
        if second_word is not None:
            firsts, entries = entries, array("Q", (second_word,)) * (2 * here)
            entries[0::2] = firsts
        yield (offset + done * words * _WORD, encode_offsets(entries))


def _ones(offset: int, count: int, bits: int) -> Iterator[Piece]:
    """`count` refcounts of 1; those narrower than a byte are packed from its low end."""
    unit = (1).to_bytes(bits // 8, "big") if bits >= 8 else bytes((sum(1 << at for at in range(0, 8, bits)),))
    whole, rest = divmod(count * bits, 8)
    pattern = unit * (PIECE_SIZE // len(unit))
    for done in range(0, whole, PIECE_SIZE):
        yield (offset + done, pattern[: whole - done])
    if rest:
        yield (offset + whole, bytes((sum(1 << at for at in range(0, rest, bits)),)))
