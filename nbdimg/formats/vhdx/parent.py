"""What a differencing file takes from its parent when it is made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from uuid import UUID

from nbdimg.formats.vhdx.header import load_headers
from nbdimg.formats.vhdx.metadata import Item, read_item
from nbdimg.formats.vhdx.parts import load_parts
from nbdimg.formats.vhdx.replay import open_replayed
from nbdimg.formats.vhdx.structs import (
    LOGICAL_SECTOR_SIZE,
    PHYSICAL_SECTOR_SIZE,
    VIRTUAL_DISK_ID,
    VIRTUAL_DISK_SIZE,
)
from nbdimg.storage.file import BlockFile
from nbdimg.storage.locks import lock_image
from nbdimg.storage.posix import PosixFile

_OWN = frozenset({VIRTUAL_DISK_SIZE, VIRTUAL_DISK_ID, LOGICAL_SECTOR_SIZE, PHYSICAL_SECTOR_SIZE})
"""Items of the virtual disk that every file builds itself."""


@dataclass(frozen=True, slots=True)
class Parent:
    """`data_write_guid` is the identity that a child names. `items` are further ones of the virtual disk, which a child
    has too.
    """

    path: str
    data_write_guid: UUID
    size: int
    disk_id: UUID
    logical_sector_size: int
    physical_sector_size: int
    items: tuple[tuple[Item, bytes], ...]


async def read_parent(path: str | os.PathLike[str]) -> Parent:
    """Read a file that is to be a parent; it is locked meanwhile, and left as it is.

    Raises: ImageLocked: somebody writes to it. ImageError: it is no sound VHDX file. OSError.
    """
    file: BlockFile
    file = opened = PosixFile(path, writable=False)
    try:
        lock_image(opened.descriptor, opened.path, writable=False)
        headers = await load_headers(file)
        file = await open_replayed(file, headers.current)
        parts = await load_parts(file, headers)
        metadata = parts.metadata
        items = [item for item in metadata.items if item.is_virtual_disk and (item.is_user or item.id not in _OWN)]
        return Parent(
            path=opened.path,
            data_write_guid=headers.current.data_write_guid,
            size=metadata.virtual_size,
            disk_id=metadata.disk_id,
            logical_sector_size=metadata.logical_sector_size,
            physical_sector_size=metadata.physical_sector_size,
            items=tuple([(item, await read_item(file, parts.regions, item)) for item in items]),
        )
    finally:
        await file.close()
