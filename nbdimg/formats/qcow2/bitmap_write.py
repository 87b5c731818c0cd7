"""Other dirty bitmaps put on disk in the place of all that there are, in one step (B3 and B4 of `bitmap_store`)."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from nbdimg.errors import CorruptImage, ImageError, UnsupportedFeature
from nbdimg.formats.qcow2 import structs as s
from nbdimg.formats.qcow2.bitmap_header import check_room, switch
from nbdimg.formats.qcow2.bitmaps import TURN_BYTES, BitmapEntry, clusters_of, load_table, table_size_for
from nbdimg.formats.qcow2.header import Header
from nbdimg.formats.qcow2.packed import encode_offsets
from nbdimg.formats.qcow2.refcount import Refcounts, Run
from nbdimg.image.bitmap import DirtyBitmap
from nbdimg.image.driver import answered
from nbdimg.storage.file import BlockFile
from nbdimg.storage.ordering import Plan, Stage, hindered, leaves_no_doubt, merged, run
from nbdimg.units import MiB, align_up, div_ceil

WRITE_SIZE = 1 * MiB
"""Bytes of bits in one write."""

Change = tuple[BitmapEntry, DirtyBitmap | None]
"""An entry that stays as it lies on disk, or one that gets these bits."""


async def claim(file: BlockFile, header: Header, counts: Refcounts, entries: Sequence[BitmapEntry]) -> None:
    """Enter the clusters of tables and bits as metadata: no guest data is placed or written there.

    Raises: CorruptImage: a cluster is something else already; it could not be freed without damage.
    """
    tables = [await load_table(file, header, entry) for entry in entries]
    for cluster in clusters_of(header, entries, tables):
        if cluster in counts.metadata:
            offset = cluster << header.cluster_bits
            raise CorruptImage(
                file.path,
                f"cluster {cluster} belongs to a bitmap and to other metadata, expected one (offset {offset})",
            )
        counts.metadata.add(cluster)


async def replace_bitmaps(
    file: BlockFile, header: Header, counts: Refcounts, before: Sequence[BitmapEntry], changes: Sequence[Change]
) -> list[BitmapEntry]:
    """Put `changes` in the place of all bitmaps in one step (B3); returns the new entries. `settle` follows: it frees
    what the old ones had.

    On an error the old ones hold, and space may be lost; not where it leaves no doubt about what the disk has.

    Raises: OSError. UnsupportedFeature: the header, or the file, has no room. CorruptImage: from the refcounts.
    """
    check_room(file, header, len(changes))
    space = _Space(file, header, counts)
    try:
        old, entries, extension = await hindered(_prepare(file, header, space, before, changes))
        await settle(file, counts)
        await switch(file, header, extension)
    except (OSError, ImageError) as error:
        if leaves_no_doubt(error) or isinstance(error, UnsupportedFeature):
            space.give_back()
        raise
    for cluster in old:
        counts.free(cluster, punch=True)
    return entries


async def _prepare(
    file: BlockFile, header: Header, space: _Space, before: Sequence[BitmapEntry], changes: Sequence[Change]
) -> tuple[list[int], list[BitmapEntry], bytes | None]:
    """Write what is new where nothing refers to it: the clusters of what goes, the new entries, the extension."""
    kept = {entry.table_offset for entry, bitmap in changes if bitmap is None}
    gone = [entry for entry in before if entry.table_offset not in kept]
    old = clusters_of(header, gone, [await load_table(file, header, entry) for entry in gone])
    old.extend(_directory_clusters(header, before))
    entries = []
    for entry, bitmap in changes:
        entries.append(entry if bitmap is None else await _write_bitmap(space, entry, bitmap))
    extension = None
    if entries:
        entries, extension = await _write_directory(space, entries)
    return old, entries, extension


def _directory_clusters(header: Header, entries: Sequence[BitmapEntry]) -> range:
    """Where they lie, whether or not the header names that at the moment (B4)."""
    if not entries:
        return range(0)
    stop = entries[-1].offset + len(entries[-1].to_bytes())
    return range(entries[0].offset >> header.cluster_bits, div_ceil(stop, header.cluster_size))


async def settle(file: BlockFile, counts: Refcounts) -> None:
    """Refcounts, and with them what was written into new clusters, are durable; what was freed is free."""
    while counts.is_dirty:
        blocks, *pointers = counts.capture()
        stages = (Stage(merged(writes), (file,)) for writes in (blocks, *filter(None, pointers)))
        await run(Plan(tuple(stages)))
        counts.written()
        await counts.reclaim()


class _Space:
    """Clusters for one change of the image in `file`, that may be given back until something refers to them."""

    def __init__(self, file: BlockFile, header: Header, counts: Refcounts) -> None:
        self.file = file
        self.header = header
        self._counts = counts
        self._taken: list[Run] = []

    async def allocate(self, count: int, *, is_contiguous: bool) -> Run:
        counts = self._counts
        ask = counts.allocate_contiguous if is_contiguous else counts.allocate
        taken = await answered(partial(ask, count))
        counts.metadata.update(range(taken.cluster, taken.cluster + taken.count))
        self._taken.append(taken)
        return taken

    def give_back(self) -> None:
        for taken in self._taken:
            self._counts.give_back(taken)


async def _write_bitmap(space: _Space, entry: BitmapEntry, bitmap: DirtyBitmap) -> BitmapEntry:
    """Bits and table in new clusters; clusters that are all clean or all dirty take none."""
    header = space.header
    cluster_size = header.cluster_size
    table_size = table_size_for(bitmap.size, bitmap.granularity, cluster_size)
    table = array("Q", bytes(8 * table_size))
    mixed = []
    for index in range(len(table)):
        start = index * cluster_size
        if start % TURN_BYTES == 0:
            await asyncio.sleep(0)
        stop = min(start + cluster_size, bitmap.byte_count)
        if stop - start == cluster_size and bitmap.is_all(start, stop, dirty=True):
            table[index] = 1
        elif not bitmap.is_all(start, stop, dirty=False):
            mixed.append(index)
    while mixed:
        place = await space.allocate(min(len(mixed), max(1, WRITE_SIZE // cluster_size)), is_contiguous=False)
        offset = place.cluster << header.cluster_bits
        batch, mixed = mixed[: place.count], mixed[place.count :]
        pieces = [bitmap.stored(index * cluster_size, (index + 1) * cluster_size) for index in batch]
        for number, index in enumerate(batch):
            table[index] = offset + number * cluster_size
        await space.file.pwrite(offset, b"".join(piece.ljust(cluster_size, b"\0") for piece in pieces))
    table_offset = await _write_table(space, encode_offsets(table))
    return replace(entry, table_offset=table_offset, table_size=len(table))


async def _write_table(space: _Space, content: bytes) -> int:
    """Into new contiguous clusters, padded with zeroes; returns where."""
    header = space.header
    place = await space.allocate(div_ceil(len(content), header.cluster_size), is_contiguous=True)
    offset = place.cluster << header.cluster_bits
    await space.file.pwrite(offset, content.ljust(align_up(len(content), header.cluster_size), b"\0"))
    return offset


async def _write_directory(space: _Space, entries: list[BitmapEntry]) -> tuple[list[BitmapEntry], bytes]:
    """The entries with their new offsets, and the extension that names the directory."""
    pieces = [entry.to_bytes() for entry in entries]
    content = b"".join(pieces)
    if len(content) > s.BITMAP_DIRECTORY_BYTES_MAX:
        raise UnsupportedFeature(
            space.file.path,
            f"the bitmap directory would take {len(content)} bytes, allowed are {s.BITMAP_DIRECTORY_BYTES_MAX}",
        )
    offset = position = await _write_table(space, content)
    placed = []
    for entry, piece in zip(entries, pieces, strict=True):
        placed.append(replace(entry, offset=position))
        position += len(piece)
    return placed, s.BITMAPS_EXTENSION.pack(len(entries), 0, len(content), offset)
