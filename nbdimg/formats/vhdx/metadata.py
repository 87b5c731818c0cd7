"""The metadata region: a table of items, and what the items say of the virtual disk.

    0        table: header, then an entry of 32 bytes for each item      64 KiB
    64 KiB   the items, anywhere behind the table and not aligned

No checksum protects any of it. Items of a user are opaque and stay as they are; a required item that is unknown here
forbids to open the file. Three items are not in the specification, and Windows knows them: each has its own answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from struct import Struct
from uuid import UUID

from nbdimg.errors import CorruptImage, UnsupportedFeature, escaped
from nbdimg.formats.vhdx import structs as s
from nbdimg.formats.vhdx.locator import Locator, parse_locator
from nbdimg.formats.vhdx.region import Regions
from nbdimg.storage.file import BlockFile, read
from nbdimg.units import align_up, is_power_of_two

_U32 = Struct("<I")
_U64 = Struct("<Q")

_NAMES = {
    s.FILE_PARAMETERS: "File Parameters",
    s.VIRTUAL_DISK_SIZE: "Virtual Disk Size",
    s.VIRTUAL_DISK_ID: "Virtual Disk ID",
    s.LOGICAL_SECTOR_SIZE: "Logical Sector Size",
    s.PHYSICAL_SECTOR_SIZE: "Physical Sector Size",
    s.PARENT_LOCATOR: "Parent Locator",
    s.CHS_PARAMETERS: "CHS Parameters",
    s.INCOMPLETE_FILE: "Incomplete File",
    s.PMEM_LABELS: "PMEM Label Storage",
}
_LENGTHS = {
    s.FILE_PARAMETERS: s.FILE_PARAMETERS_FIELDS.size,
    s.VIRTUAL_DISK_SIZE: _U64.size,
    s.VIRTUAL_DISK_ID: 16,
    s.LOGICAL_SECTOR_SIZE: _U32.size,
    s.PHYSICAL_SECTOR_SIZE: _U32.size,
}
_UNDERSTOOD = frozenset((*_LENGTHS, s.PARENT_LOCATOR, s.CHS_PARAMETERS))
"""May be required. The CHS parameters are a geometry that nothing of what NBD serves depends on."""


@dataclass(frozen=True, slots=True)
class Item:
    """`offset` in bytes from the start of the region, 0 for an item that is present and empty."""

    id: UUID
    offset: int
    length: int
    is_user: bool = False
    is_virtual_disk: bool = False
    is_required: bool = False

    @property
    def name(self) -> str:
        known = None if self.is_user else _NAMES.get(self.id)
        return f"the {known} item" if known else f"{'user ' if self.is_user else ''}item {self.id}"


@dataclass(frozen=True, slots=True)
class Metadata:
    """Sizes in bytes. `items` are all of the table, in its order; `region_offset` is where the region lies."""

    block_size: int
    leaves_blocks_allocated: bool
    """A fixed image; never with a parent, where the flag means nothing."""
    has_parent: bool
    virtual_size: int
    disk_id: UUID
    """What SCSI page 83h shows, the same in a child and in its parent."""
    logical_sector_size: int
    physical_sector_size: int
    locator: Locator | None
    items: tuple[Item, ...]
    region_offset: int

    def item(self, id: UUID) -> Item | None:
        """The item of the system with this GUID."""
        return next((item for item in self.items if item.id == id and not item.is_user), None)

    def offset_of(self, id: UUID) -> int:
        """Where the content of an item that is there lies in the file."""
        item = self.item(id)
        assert item is not None
        return self.region_offset + item.offset


async def load_metadata(file: BlockFile, regions: Regions) -> Metadata:
    """All that the metadata says. Call it when the log has been replayed.

    Raises: CorruptImage, UnsupportedFeature: naming item, what was found, what is allowed, and the offset. OSError.
    """
    table = await read(file, regions.metadata_offset, s.METADATA_TABLE_SIZE)
    items = parse_table(file.path, table, regions.metadata_offset, regions.metadata_length)
    for item in items:
        _check_understood(file.path, item, regions.metadata_offset)
    return await _Loader(file, regions, items).metadata()


async def read_item(file: BlockFile, regions: Regions, item: Item) -> bytes:
    """The content of an item. Raises: CorruptImage: it lies behind the file's end. OSError."""
    offset = regions.metadata_offset + item.offset
    if item.length and offset + item.length > file.size:
        raise CorruptImage(
            file.path,
            f"{item.name} ends at {offset + item.length}, allowed is at most the file's size of {file.size} "
            f"(file offset {offset})",
            offset,
        )
    return await read(file, offset, item.length)


def parse_table(path: str, table: bytes, at: int, region_length: int) -> tuple[Item, ...]:
    """The items that a table names, each in bounds and no two overlapping. `at` is where the table lies in the file.

    Raises: CorruptImage: naming item, what was found, what is allowed, and the offset.
    """
    signature, _, count, _ = s.METADATA_TABLE.unpack_from(table)
    if signature != s.METADATA_SIGNATURE:
        raise CorruptImage(
            path,
            f"the metadata signature is {escaped(signature)}, expected 'metadata' (file offset {at})",
            at,
        )
    if count > s.METADATA_ITEMS_MAX:
        raise CorruptImage(
            path,
            f"the metadata's EntryCount is {count}, expected at most {s.METADATA_ITEMS_MAX} (file offset {at + 10})",
            at + 10,
        )
    items: dict[tuple[UUID, bool], Item] = {}
    for index in range(count):
        place = s.METADATA_TABLE.size + index * s.METADATA_ITEM.size
        item = _item(path, table, place, at + place, region_length)
        if (item.id, item.is_user) in items:
            raise CorruptImage(
                path, f"{item.name} is there twice, allowed is one (file offset {at + place})", at + place
            )
        items[item.id, item.is_user] = item
    _check_items(path, tuple(items.values()), at)
    return tuple(items.values())


def _item(path: str, table: bytes, place: int, at: int, region_length: int) -> Item:
    guid, offset, length, flags, _ = s.METADATA_ITEM.unpack_from(table, place)
    item = Item(
        UUID(bytes_le=guid),
        offset,
        length,
        bool(flags & s.IS_USER),
        bool(flags & s.IS_VIRTUAL_DISK),
        bool(flags & s.IS_REQUIRED),
    )

    def refuse(what: str, found: object, allowed: str, field: int) -> CorruptImage:
        return CorruptImage(path, f"{what} is {found}, expected {allowed} (file offset {at + field})", at + field)

    if item.id == s.NO_GUID:
        raise refuse("a metadata item's GUID", item.id, "another than zero", 0)
    if item.is_user and item.is_required:
        raise refuse(f"the flags of {item.name}", flags, "not both IsUser and IsRequired", 24)
    if length > s.METADATA_ITEM_SIZE_MAX:
        raise refuse(f"the length of {item.name}", length, f"at most {s.METADATA_ITEM_SIZE_MAX}", 20)
    if length == 0:
        if offset:
            raise refuse(f"the offset of {item.name}", offset, "0 as it is empty", 16)
    elif not s.METADATA_TABLE_SIZE <= offset <= region_length - length:
        allowed = f"{s.METADATA_TABLE_SIZE} to {region_length - length}, within the metadata region"
        raise refuse(f"the offset of {item.name}", offset, allowed, 16)
    if not item.is_user and length != _LENGTHS.get(item.id, length):
        raise refuse(f"the length of {item.name}", length, str(_LENGTHS[item.id]), 20)
    return item


def _check_items(path: str, items: tuple[Item, ...], at: int) -> None:
    users = sum(item.is_user for item in items)
    if users > s.METADATA_USER_ITEMS_MAX:
        raise CorruptImage(
            path,
            f"the metadata has {users} user items, expected at most {s.METADATA_USER_ITEMS_MAX} (file offset {at})",
            at,
        )
    placed = sorted((item for item in items if item.length), key=lambda item: item.offset)
    for item, following in pairwise(placed):
        if following.offset < item.offset + item.length:
            raise CorruptImage(
                path,
                f"{following.name} lies at {following.offset} of the metadata region and {item.name} ends at "
                f"{item.offset + item.length}, allowed is no overlap (file offset {at + following.offset})",
                at + following.offset,
            )


def _check_understood(path: str, item: Item, at: int) -> None:
    """Raises: UnsupportedFeature: the file must not be opened by who does not know this item."""
    if item.is_user:
        return
    if item.id == s.INCOMPLETE_FILE:
        what = "is marked as incomplete: its creation or conversion was not finished, allowed are finished files"
    elif not item.is_required or item.id in _UNDERSTOOD:
        return
    elif item.id == s.PMEM_LABELS:
        what = "is a persistent memory device with label storage, allowed are disks"
    else:
        what = "has a required metadata item that is not known here, allowed are those of the specification"
    raise UnsupportedFeature(path, f"the file {what} (item {item.id}, metadata region at {at})", at)


class _Loader:
    """The values of the items that are known."""

    def __init__(self, file: BlockFile, regions: Regions, items: tuple[Item, ...]) -> None:
        self._file = file
        self._regions = regions
        self._items = items
        self._known = {item.id: item for item in items if not item.is_user}

    def _refuse(self, id: UUID, field: str, found: object, allowed: str) -> CorruptImage:
        offset = self._regions.metadata_offset + self._known[id].offset
        return CorruptImage(self._file.path, f"{field} is {found}, expected {allowed} (file offset {offset})", offset)

    async def _content(self, id: UUID) -> bytes:
        item = self._known.get(id)
        if item is None:
            offset = self._regions.metadata_offset
            raise CorruptImage(
                self._file.path,
                f"the metadata has no {_NAMES[id]} item, expected is one (file offset {offset})",
                offset,
            )
        return await read_item(self._file, self._regions, item)

    async def metadata(self) -> Metadata:
        block_size, flags = s.FILE_PARAMETERS_FIELDS.unpack(await self._content(s.FILE_PARAMETERS))
        if not (is_power_of_two(block_size) and s.BLOCK_SIZE_MIN <= block_size <= s.BLOCK_SIZE_MAX):
            raise self._refuse(s.FILE_PARAMETERS, "BlockSize", block_size, "a power of two from 1 MiB to 256 MiB")
        has_parent = bool(flags & s.HAS_PARENT)
        logical = await self._sector_size(s.LOGICAL_SECTOR_SIZE)
        physical = await self._sector_size(s.PHYSICAL_SECTOR_SIZE)
        return Metadata(
            block_size=block_size,
            leaves_blocks_allocated=bool(flags & s.LEAVE_BLOCKS_ALLOCATED) and not has_parent,
            has_parent=has_parent,
            virtual_size=await self._virtual_size(logical),
            disk_id=UUID(bytes_le=await self._content(s.VIRTUAL_DISK_ID)),
            logical_sector_size=logical,
            physical_sector_size=physical,
            locator=await self._locator(has_parent),
            items=self._items,
            region_offset=self._regions.metadata_offset,
        )

    async def _sector_size(self, id: UUID) -> int:
        (size,) = _U32.unpack(await self._content(id))
        if size not in s.SECTOR_SIZES:
            raise self._refuse(id, _NAMES[id], size, "512 or 4096")
        return int(size)

    async def _virtual_size(self, logical: int) -> int:
        (size,) = _U64.unpack(await self._content(s.VIRTUAL_DISK_SIZE))
        if size % logical or not 0 < size <= s.VIRTUAL_SIZE_MAX:
            allowed = f"a multiple of the logical sector size {logical}, from {logical} to 64 TiB"
            raise self._refuse(s.VIRTUAL_DISK_SIZE, "Virtual Disk Size", size, allowed)
        return int(size)

    async def _locator(self, has_parent: bool) -> Locator | None:
        item = self._known.get(s.PARENT_LOCATOR)
        if not has_parent:
            if item is not None:
                raise self._refuse(s.FILE_PARAMETERS, "HasParent", 0, "1 as there is a Parent Locator")
            return None
        content = await self._content(s.PARENT_LOCATOR)
        offset = self._regions.metadata_offset + self._known[s.PARENT_LOCATOR].offset
        return parse_locator(self._file.path, content, offset)


def build_metadata(
    *,
    block_size: int,
    virtual_size: int,
    disk_id: UUID,
    logical_sector_size: int = 512,
    physical_sector_size: int = 4096,
    leaves_blocks_allocated: bool = False,
    locator: Locator | None = None,
    extra: Sequence[tuple[Item, bytes]] = (),
) -> bytes:
    """The table and the items of a new file: what its region begins with, a multiple of 4 KiB.

    `extra` are further items with their content, in a child those of its parent that are the virtual disk's; their
    offsets are chosen here.
    """
    flags = s.LEAVE_BLOCKS_ALLOCATED if leaves_blocks_allocated else 0
    flags |= s.HAS_PARENT if locator else 0
    disk = s.IS_REQUIRED | s.IS_VIRTUAL_DISK
    contents = [
        (s.FILE_PARAMETERS, s.IS_REQUIRED, s.FILE_PARAMETERS_FIELDS.pack(block_size, flags)),
        (s.VIRTUAL_DISK_SIZE, disk, _U64.pack(virtual_size)),
        (s.LOGICAL_SECTOR_SIZE, disk, _U32.pack(logical_sector_size)),
        (s.PHYSICAL_SECTOR_SIZE, disk, _U32.pack(physical_sector_size)),
        (s.VIRTUAL_DISK_ID, disk, disk_id.bytes_le),
    ]
    if locator is not None:
        contents.append((s.PARENT_LOCATOR, s.IS_REQUIRED, locator.to_bytes()))
    for item, content in extra:
        kind = item.is_user * s.IS_USER | item.is_virtual_disk * s.IS_VIRTUAL_DISK | item.is_required * s.IS_REQUIRED
        contents.append((item.id, kind, content))
    assert len(contents) <= s.METADATA_ITEMS_MAX
    table, items = [s.METADATA_TABLE.pack(s.METADATA_SIGNATURE, 0, len(contents), b"")], b""
    for id, kind, content in contents:
        assert len(content) <= s.METADATA_ITEM_SIZE_MAX
        offset = s.METADATA_TABLE_SIZE + len(items) if content else 0
        table.append(s.METADATA_ITEM.pack(id.bytes_le, offset, len(content), kind, 0))
        items += content
    whole = b"".join(table).ljust(s.METADATA_TABLE_SIZE, b"\0") + items
    return whole.ljust(align_up(len(whole), s.PAGE_SIZE), b"\0")
