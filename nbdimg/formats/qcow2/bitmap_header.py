"""The bitmaps extension in the header: it names the directory, and changes so that no crash leaves half of it.

Within a sector it changes in one write. Where it lies across two, comes or goes, autoclear bit 0 is clear meanwhile: a
crash leaves the image without bitmaps, never with torn ones, and the rest of the header whole.
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
    if count and header.extension(ExtensionType.BITMAPS) is None:
        _laid_out(file, header, bytes(s.BITMAPS_EXTENSION.size))


def _laid_out(file: BlockFile, header: Header, data: bytes | None) -> bytes:
    """Cluster 0 with this bitmaps extension, or none. The header itself stays as it is."""
    others = [each for each in header.extensions if each.type != ExtensionType.BITMAPS]
    if data is not None:
        others.append(Extension(ExtensionType.BITMAPS, data))
    return replace(header, extensions=others).to_bytes(file.path)


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
    """Put the extension behind the others, in writes of which none does harm when it is torn.

    The backing file name makes room first: a copy, then its offset, 12 bytes of sector 0. Then what follows the end
    marker is nobody's: the extension's data and a new end marker go there, and its type and length, 8 bytes that no
    sector boundary cuts, go over the old marker.
    """
    start = _extensions_end(header)
    stop = start + 2 * s.EXTENSION.size + len(data)
    name = (header.backing_name or "").encode()
    if name and header.backing_name_offset < stop:
        moved = align_up(max(stop, header.backing_name_offset + len(name)), 8)
        if moved + len(name) > header.cluster_size:
            await _lay_out(file, header, data)
            return
        await write_durably(file, moved, name)
        await write_durably(file, _BACKING_FIELDS_OFFSET, _BACKING_FIELDS.pack(moved, len(name)))
        header.backing_name_offset = moved
    await write_durably(file, start + s.EXTENSION.size, data + bytes(s.EXTENSION.size))
    await write_durably(file, start, s.EXTENSION.pack(ExtensionType.BITMAPS, len(data)))
    header.extensions = [*header.extensions, Extension(ExtensionType.BITMAPS, data, start + s.EXTENSION.size)]


async def _remove_extension(file: BlockFile, header: Header) -> None:
    """The last extension becomes the end marker; another one goes with a new layout of the cluster."""
    last = header.extensions[-1]
    if last.type != ExtensionType.BITMAPS:
        await _lay_out(file, header, None)
        return
    await write_durably(file, last.offset - s.EXTENSION.size, bytes(s.EXTENSION.size))
    header.extensions = header.extensions[:-1]


async def _lay_out(file: BlockFile, header: Header, data: bytes | None) -> None:
    """Write cluster 0 anew, in one write: sectors of old and new must not be mixed if it has several."""
    content = _laid_out(file, header, data)
    await write_durably(file, 0, content)
    parsed = Header.from_bytes(file.path, content)
    header.extensions, header.backing_name_offset = parsed.extensions, parsed.backing_name_offset


def _extensions_end(header: Header) -> int:
    """Where the end marker is."""
    if not header.extensions:
        return header.header_length
    last = header.extensions[-1]
    return last.offset + align_up(len(last.data), 8)


def _is_in_sector(extension: Extension) -> bool:
    last = extension.offset + s.BITMAPS_EXTENSION.size - 1
    return extension.offset // s.SECTOR_SIZE == last // s.SECTOR_SIZE


async def _set_autoclear(file: BlockFile, header: Header, autoclear: int) -> None:
    await write_durably(file, s.AUTOCLEAR_OFFSET, s.U64.pack(autoclear))
    header.autoclear = autoclear
