"""Persistent dirty bitmaps on disk: the directory, the tables, the bits. Reading and checking; `bitmap_write` writes.

    header extension   count, size and offset of the directory      means nothing unless autoclear bit 0 is set
    directory          an entry for each bitmap, padded to 8 bytes: 24 bytes of fields, the name
    table              64-bit entries: a cluster of bits, or 0 (all clean), or 1 (all dirty)

With 64 KiB clusters and a granularity of 64 KiB, a cluster of bits covers 32 GiB of the disk.

A bitmap is *consistent* unless its flag in_use is set: then somebody was writing to the image and did not come to store
it. Nobody knows what it misses, so it is listed and may be removed, and is good for nothing else. A consistent bitmap
that is *enabled* (flag auto) must follow every change of the disk; one that is not stays as it is.

Spec: qcow2.rst "Bitmaps extension", "Bitmap directory", "Bitmap table".
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntFlag

from nbdimg.errors import CorruptImage, UnsupportedFeature, escaped
from nbdimg.formats.qcow2 import structs as s
from nbdimg.formats.qcow2.header import Header
from nbdimg.formats.qcow2.packed import decode_offsets
from nbdimg.formats.qcow2.structs import OFFSET_MASK, Autoclear, ExtensionType
from nbdimg.image.bitmap import DirtyBitmap, byte_count
from nbdimg.storage.file import BlockFile, fetch, read
from nbdimg.units import MiB, align_up, div_ceil

TABLE_BYTES_MAX = 16 * MiB
"""Of all bitmap tables of an image together: a bitmap of 16 TiB at 64 KiB takes 512 KiB with the smallest clusters."""

TYPE_DIRTY_TRACKING = 1

TURN_BYTES = 1 * MiB
"""Of bits, looked at between two turns of the loop."""


class BitmapFlag(IntFlag):
    IN_USE = 1 << 0
    AUTO = 1 << 1
    EXTRA_DATA_COMPATIBLE = 1 << 2


@dataclass(frozen=True, slots=True)
class BitmapEntry:
    """A directory entry. `offset`: where it lies in the file. `table_size`: entries."""

    name: str
    granularity_bits: int
    flags: int
    table_offset: int = 0
    table_size: int = 0
    offset: int = 0

    @property
    def granularity(self) -> int:
        """Bytes."""
        return 1 << self.granularity_bits

    @property
    def is_consistent(self) -> bool:
        return not self.flags & BitmapFlag.IN_USE

    @property
    def is_enabled(self) -> bool:
        return bool(self.flags & BitmapFlag.AUTO)

    def to_bytes(self) -> bytes:
        name = self.name.encode()
        fields = s.BITMAP.pack(
            self.table_offset,
            self.table_size,
            self.flags,
            TYPE_DIRTY_TRACKING,
            self.granularity_bits,
            len(name),
            0,
        )
        return (fields + name).ljust(align_up(s.BITMAP.size + len(name), 8), b"\0")


def table_size_for(size: int, granularity: int, cluster_size: int) -> int:
    """Table entries of a bitmap over `size` bytes: 1 TiB at 64 KiB takes 32 clusters of 64 KiB; one at least."""
    return max(1, div_ceil(byte_count(size, granularity), cluster_size))


def check_fit(path: str, header: Header, size: int, entries: Iterable[BitmapEntry]) -> None:
    """Raises: UnsupportedFeature: a disk of `size` bytes cannot have all of these."""
    table_bytes = 0
    for entry in entries:
        granularity, table_size = entry.granularity, entry.table_size
        if entry.is_consistent:
            table_size = table_size_for(size, granularity, header.cluster_size)
        table_bytes += 8 * table_size
        if table_size * header.cluster_size > s.BITMAP_BYTES_MAX or table_bytes > TABLE_BYTES_MAX:
            raise UnsupportedFeature(
                path,
                f"bitmap {escaped(entry.name)} of granularity {granularity} would take {byte_count(size, granularity)} "
                f"bytes with a disk of {size} bytes, more than is allowed: a larger granularity takes less",
            )


def directory_region(header: Header) -> tuple[int, int] | None:
    """Offset and length of the directory that is in force."""
    extension = header.extension(ExtensionType.BITMAPS)
    if extension is None or not header.autoclear & Autoclear.BITMAPS:
        return None
    _, _, size, offset = s.BITMAPS_EXTENSION.unpack(extension.data)
    return offset, size


async def load_directory(file: BlockFile, header: Header) -> list[BitmapEntry]:
    """The bitmaps that the image has, inconsistent ones too; none when their autoclear bit is clear.

    Raises: CorruptImage, UnsupportedFeature: naming the field, what was found, what is allowed, and the offset.
    """
    region = directory_region(header)
    if region is None:
        return []
    extension = header.extension(ExtensionType.BITMAPS)
    assert extension is not None
    at = extension.offset
    count, reserved, size, offset = s.BITMAPS_EXTENSION.unpack(extension.data)
    if not 1 <= count <= s.BITMAPS_MAX:
        raise _refusal(file, "nb_bitmaps", count, f"1 to {s.BITMAPS_MAX}", at)
    if reserved:
        raise _refusal(file, "the bitmaps extension's reserved field", reserved, "0", at + 4)
    if not count * s.BITMAP.size <= size <= s.BITMAP_DIRECTORY_BYTES_MAX:
        allowed = f"{count * s.BITMAP.size} to {s.BITMAP_DIRECTORY_BYTES_MAX}"
        raise _refusal(file, "bitmap_directory_size", size, allowed, at + 8)
    if not _is_place(file, header, offset, size):
        allowed = f"a multiple of {header.cluster_size}, not 0, with the directory inside the file"
        raise _refusal(file, "bitmap_directory_offset", offset, allowed, at + 16)
    return _parse(file, header, await read(file, offset, size), offset, count)


def _parse(file: BlockFile, header: Header, directory: bytes, offset: int, count: int) -> list[BitmapEntry]:
    entries: list[BitmapEntry] = []
    names: set[str] = set()
    position = table_bytes = 0
    for number in range(count):
        at = offset + position
        if position + s.BITMAP.size > len(directory):
            raise _refusal(file, "bitmap_directory_size", len(directory), f"room for {count} entries", at)
        entry, length = _parse_entry(file, header, directory, position, f"bitmap {number}: ", at)
        if entry.name in names:
            raise _refusal(file, f"bitmap {number}: name", escaped(entry.name), "one that is there once", at)
        names.add(entry.name)
        entries.append(entry)
        table_bytes += 8 * entry.table_size
        position += length
    if position != len(directory):
        raise _refusal(file, "bitmap_directory_size", len(directory), f"{position} for its {count} entries", offset)
    if table_bytes > TABLE_BYTES_MAX:
        raise UnsupportedFeature(
            file.path, f"the bitmap tables take {table_bytes} bytes, allowed are {TABLE_BYTES_MAX} (offset {offset})"
        )
    return entries


def _parse_entry(
    file: BlockFile, header: Header, directory: bytes, position: int, which: str, at: int
) -> tuple[BitmapEntry, int]:
    """The entry at `position`, and how many bytes it takes."""
    table_offset, table_size, flags, kind, granularity_bits, name_size, extra_size = s.BITMAP.unpack_from(
        directory, position
    )
    if extra_size or flags & BitmapFlag.EXTRA_DATA_COMPATIBLE:
        raise UnsupportedFeature(file.path, f"{which}it has extra data, which nothing here knows (offset {at})", at)
    reserved = flags & ~int(BitmapFlag.IN_USE | BitmapFlag.AUTO)
    if reserved:
        raise _refusal(file, f"{which}flags", hex(flags), "bits 0 and 1 alone", at + 12)
    if kind != TYPE_DIRTY_TRACKING:
        raise UnsupportedFeature(file.path, f"{which}type is {kind}, expected 1 (offset {at + 16})", at + 16)
    least, most = s.BITMAP_GRANULARITY_BITS_MIN, s.BITMAP_GRANULARITY_BITS_MAX
    if not least <= granularity_bits <= most:
        raise _refusal(file, f"{which}granularity_bits", granularity_bits, f"{least} to {most}", at + 17)
    if not 1 <= name_size <= s.BITMAP_NAME_MAX:
        raise _refusal(file, f"{which}name_size", name_size, f"1 to {s.BITMAP_NAME_MAX}", at + 18)
    length = align_up(s.BITMAP.size + name_size, 8)
    raw = directory[position + s.BITMAP.size : position + s.BITMAP.size + name_size]
    if position + length > len(directory):
        raise _refusal(file, f"{which}name_size", name_size, "a name within the directory", at + 18)
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise _refusal(file, f"{which}name", escaped(raw), "UTF-8", at + 24) from None
    if "\0" in name:
        raise _refusal(file, f"{which}name", escaped(name), "no NUL", at + 24)
    size_max = s.BITMAP_BYTES_MAX // header.cluster_size
    is_in_use = flags & BitmapFlag.IN_USE
    needed = 1 if is_in_use else table_size_for(header.size, 1 << granularity_bits, header.cluster_size)
    if not needed <= table_size <= size_max:
        raise _refusal(file, f"{which}table size", table_size, f"{needed} to {size_max}", at + 8)
    if not _is_place(file, header, table_offset, 8 * table_size):
        allowed = f"a multiple of {header.cluster_size}, not 0, with the table inside the file"
        raise _refusal(file, f"{which}table offset", table_offset, allowed, at)
    return BitmapEntry(name, granularity_bits, flags, table_offset, table_size, at), length


def _is_place(file: BlockFile, header: Header, offset: int, length: int) -> bool:
    """Whether metadata may lie there: on a cluster boundary, behind the header, inside the file."""
    return (
        offset % header.cluster_size == 0
        and header.cluster_size <= offset <= s.HOST_OFFSET_MAX - length
        and offset + length <= align_up(file.size, header.cluster_size)
    )


def _refusal(file: BlockFile, what: str, found: object, allowed: str, at: int) -> CorruptImage:
    return CorruptImage(file.path, f"{what} is {found}, expected {allowed} (offset {at})", at)


async def load_table(file: BlockFile, header: Header, entry: BitmapEntry) -> array[int]:
    """Raises: CorruptImage: an entry points where no bits can be."""
    content = bytearray(8 * entry.table_size)
    await file.pread(entry.table_offset, memoryview(content))
    table = decode_offsets(content)
    for index, place in enumerate(table):
        offset = place & OFFSET_MASK
        if (
            place & s.BITMAP_RESERVED
            or (offset and place & 1)
            or (offset and not _is_place(file, header, offset, header.cluster_size))
        ):
            raise _refusal(
                file,
                f"bitmap {escaped(entry.name)}: table entry {index}",
                f"{place:#018x}",
                "0, 1 or the offset of a cluster inside the file",
                entry.table_offset + 8 * index,
            )
    return table


async def load_bits(file: BlockFile, header: Header, entry: BitmapEntry, table: array[int]) -> DirtyBitmap:
    """A consistent bitmap, whose table this is."""
    bitmap = DirtyBitmap(entry.name, entry.granularity, header.size)
    buffer = memoryview(bytearray(header.cluster_size))
    for start in range(0, bitmap.byte_count, header.cluster_size):
        if start % TURN_BYTES == 0:
            await asyncio.sleep(0)
        place = table[start // header.cluster_size]
        stop = min(start + header.cluster_size, bitmap.byte_count)
        offset = place & OFFSET_MASK
        if offset:
            stored = buffer[: stop - start]
            await fetch(file, offset, stored)
            bitmap.load(start, stored)
        elif place & 1:
            bitmap.set_range(8 * start * entry.granularity, min(8 * stop * entry.granularity, header.size))
    return bitmap


def clusters_of(header: Header, entries: Iterable[BitmapEntry], tables: Iterable[array[int]]) -> list[int]:
    """Numbers of the clusters that tables and bits take, as often as they are named."""
    bits = header.cluster_bits
    clusters: list[int] = []
    for entry, table in zip(entries, tables, strict=True):
        first = entry.table_offset >> bits
        clusters.extend(range(first, first + div_ceil(8 * entry.table_size, header.cluster_size)))
        clusters.extend(place >> bits for place in (each & OFFSET_MASK for each in table) if place)
    return clusters
