"""The bitmaps extension in the header: it names the directory, and changes so that no crash leaves half of it.

Within a sector it changes in one write. Where it lies across two, comes or goes, autoclear bit 0 is clear meanwhile: a
crash leaves the image without bitmaps, never with torn ones, and the rest of the header whole. The backing file name
moves only where a copy can be made first, or within the first sector; other extensions never.
"""

from __future__ import annotations

from dataclasses import replace
from struct import Struct

from nbdimg.errors import UnsupportedFeature
from nbdimg.formats.qcow2 import structs as s
from nbdimg.formats.qcow2.header import Extension, Header
from nbdimg.formats.qcow2.structs import Autoclear, ExtensionType
from nbdimg.storage.file import BlockFile
from nbdimg.storage.ordering import write_durably
from nbdimg.units import align_up

_BACKING_FIELDS_OFFSET = 8
_BACKING_FIELDS = Struct(">QI")


def check_room(file: BlockFile, header: Header, count: int) -> None:
    """Raises: UnsupportedFeature: the image cannot have `count` bitmaps."""
    if count and header.version < 3:
        raise UnsupportedFeature(file.path, "images of version 2 cannot store bitmaps, version 3 can", 4)
    if count > s.BITMAPS_MAX:
        raise UnsupportedFeature(file.path, f"{count} bitmaps are too many, allowed are {s.BITMAPS_MAX}")
    if count and header.extension(ExtensionType.BITMAPS) is None and _unused(header) is None:
        content = _laid_out(file, header, bytes(s.BITMAPS_EXTENSION.size))
        if _place_of_name(header) is None and not _is_one_sector(file, header, content):
            length, at = len(header.backing_name_bytes), header.backing_name_offset
            raise UnsupportedFeature(
                file.path,
                f"the header has no room for bitmaps: with clusters of {header.cluster_size} bytes a crash could lose "
                f"the backing file name of {length} bytes as it gives way, a shorter one can (offset {at})",
                at,
            )


def _laid_out(file: BlockFile, header: Header, data: bytes) -> bytes:
    """Cluster 0 with this bitmaps extension behind the others. The header itself stays as it is."""
    extensions = [*header.extensions, Extension(ExtensionType.BITMAPS, data)]
    return replace(header, extensions=extensions).to_bytes(file.path)


async def switch(file: BlockFile, header: Header, data: bytes | None) -> None:
    """Make the header name a directory with this extension, or none."""
    extension = header.extension(ExtensionType.BITMAPS)
    if data is None and extension is None:
        return
    is_on = bool(header.autoclear & Autoclear.BITMAPS)
    is_one_write = data is not None and extension is not None and _is_in_sector(extension)
    if is_on and not is_one_write:
        await _set_autoclear(file, header, header.autoclear & ~int(Autoclear.BITMAPS))
    if data is None:
        await _remove_extension(file, header)
        return
    if extension is None:
        await _append_extension(file, header, data)
    else:
        await write_durably(file, extension.offset, data)
        header.extensions = [replace(each, data=data) if each is extension else each for each in header.extensions]
    if not header.autoclear & Autoclear.BITMAPS:
        await _set_autoclear(file, header, header.autoclear | Autoclear.BITMAPS)


async def _append_extension(file: BlockFile, header: Header, data: bytes) -> None:
    """Put the extension in the place of an unused one, or behind the others, in writes of which none does harm when it
    is torn.

    The backing file name makes room first: a copy, then its offset, 12 bytes of sector 0. Then what follows the end
    marker is nobody's: the extension's data and a new end marker go there, and its type and length, 8 bytes that no
    sector boundary cuts, go over the old marker.
    """
    unused = _unused(header)
    if unused is not None:
        await write_durably(file, unused.offset, data)
        await _rename(file, header, unused, replace(unused, type=ExtensionType.BITMAPS, data=data))
        return
    place = _place_of_name(header)
    if place is None:
        await _write_sector(file, header, _laid_out(file, header, data))
        return
    if place != header.backing_name_offset:
        name = header.backing_name_bytes
        await write_durably(file, place, name)
        await write_durably(file, _BACKING_FIELDS_OFFSET, _BACKING_FIELDS.pack(place, len(name)))
        header.backing_name_offset = place
    start = header.extensions_end
    await write_durably(file, start + s.EXTENSION.size, data + bytes(s.EXTENSION.size))
    await write_durably(file, start, s.EXTENSION.pack(ExtensionType.BITMAPS, len(data)))
    header.extensions = [*header.extensions, Extension(ExtensionType.BITMAPS, data, start + s.EXTENSION.size)]


async def _remove_extension(file: BlockFile, header: Header) -> None:
    """The last extension becomes the end marker. Another one stays where it is and is called unused, for the next; if
    there is such a one already (QEMU keeps what it does not know), it means nothing as autoclear bit 0 is clear.
    """
    extension = header.extensions[-1]
    if extension.type == ExtensionType.BITMAPS:
        await write_durably(file, extension.offset - s.EXTENSION.size, bytes(s.EXTENSION.size))
        header.extensions = header.extensions[:-1]
        return
    found = header.extension(ExtensionType.BITMAPS)
    if found is not None and header.extension(ExtensionType.UNUSED) is None:
        await _rename(file, header, found, replace(found, type=ExtensionType.UNUSED))


async def _rename(file: BlockFile, header: Header, old: Extension, new: Extension) -> None:
    """Change the type of an extension, by 8 bytes that no sector boundary cuts."""
    await write_durably(file, old.offset - s.EXTENSION.size, s.EXTENSION.pack(new.type, len(new.data)))
    header.extensions = [new if each is old else each for each in header.extensions]


def _unused(header: Header) -> Extension | None:
    """One that was for bitmaps and may be again."""
    found = header.extension(ExtensionType.UNUSED)
    return found if found is not None and len(found.data) == s.BITMAPS_EXTENSION.size else None


def _place_of_name(header: Header) -> int | None:
    """Where the backing file name may lie when a bitmaps extension follows the others: where it is, 0 without one, or
    behind that, so that both are there for a while. None: there is no room.
    """
    stop = header.extensions_end + 2 * s.EXTENSION.size + s.BITMAPS_EXTENSION.size
    offset, length = header.backing_name_offset, len(header.backing_name_bytes)
    if not length or offset >= stop:
        return offset
    place = align_up(max(stop, offset + length), 8)
    return place if place + length <= header.cluster_size else None


def _is_one_sector(file: BlockFile, header: Header, content: bytes) -> bool:
    """Whether all of the header, and of cluster 0 as it is to be, lies in the first sector."""
    return max(_end(header), _end(Header.from_bytes(file.path, content))) <= s.SECTOR_SIZE


async def _write_sector(file: BlockFile, header: Header, content: bytes) -> None:
    """Put cluster 0 in the header's place, see `_is_one_sector`."""
    await write_durably(file, 0, content[: s.SECTOR_SIZE])
    parsed = Header.from_bytes(file.path, content)
    header.extensions, header.backing_name_offset = parsed.extensions, parsed.backing_name_offset


def _end(header: Header) -> int:
    """Where the end marker and the backing file name end."""
    name_end = header.backing_name_offset + len(header.backing_name_bytes)
    return max(header.extensions_end + s.EXTENSION.size, name_end)


def _is_in_sector(extension: Extension) -> bool:
    last = extension.offset + s.BITMAPS_EXTENSION.size - 1
    return extension.offset // s.SECTOR_SIZE == last // s.SECTOR_SIZE


async def _set_autoclear(file: BlockFile, header: Header, autoclear: int) -> None:
    await write_durably(file, s.AUTOCLEAR_OFFSET, s.U64.pack(autoclear))
    header.autoclear = autoclear
