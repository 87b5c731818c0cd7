"""Check of an image: every reference is counted, and compared with the refcounts that the image holds.

    refcount table, blocks   ->  stored refcounts
    header, L1, snapshots, bitmaps, LUKS header, L2 tables, data, refcount table, blocks   ->  references

A refcount above its references is a leak: space is lost. One below is a corruption: the cluster may be given to another
guest cluster. What `qemu-img check` says is said here: the same counts and the same exit status, but for

    a refcount block's pointer is impossible         here always corruption (2), QEMU at times: cannot be checked (1)
    a table at an impossible place                   not followed here; QEMU reads what lies there as a table
    a snapshot's L1 table does not reach its size    here corruption: what it lacks may be what leaks; QEMU: sound
    what QEMU's check does not look at               see `references`

Spec: qcow2 "Reference counts", "Bitmaps", "Snapshots".
"""

from __future__ import annotations

import asyncio
from itertools import compress
from operator import gt, lt

from nbdimg.errors import CorruptImage, ImageError, UnsupportedFeature
from nbdimg.formats.findings import CheckReport
from nbdimg.formats.qcow2 import structs as s
from nbdimg.formats.qcow2.bitmaps import TYPE_DIRTY_TRACKING, table_size_for
from nbdimg.formats.qcow2.counts import differing, last_used
from nbdimg.formats.qcow2.header import Header
from nbdimg.formats.qcow2.paced import PIECE_SIZE
from nbdimg.formats.qcow2.packed import RefcountCodec, decode_offsets
from nbdimg.formats.qcow2.references import MEMORY_MAX, Progress, References
from nbdimg.formats.qcow2.structs import Autoclear, ExtensionType
from nbdimg.storage.file import BlockFile
from nbdimg.units import align_up, div_ceil

_SNAPSHOT_EXTRA_MIN = 16
"""Bytes that a version 3 snapshot needs: the VM state's and the disk's size."""
_BITMAP_FLAGS_RESERVED = 0xFFFF_FFFC
"""QEMU counts bit 2 (extra data compatible) as reserved too, as it takes no extra data."""
_BLOCKS_AT_ONCE = 512
"""Refcount blocks that are counted before the loop gets its turn."""


async def check(file: BlockFile, header: Header, *, progress: Progress | None = None) -> CheckReport:
    """Look at everything and change nothing. What cannot be checked is a finding of kind "error".

    Raises: OSError.
    """
    survey = Survey(file, header)
    await survey.run(progress)
    return survey.report


class Survey:
    """One check, with all that a repair wants to know. Args: is_fixing: as in `References`.

    `blocks` are the refcount blocks that may be read and written in place. `needs_rebuild` says that some cannot be,
    or that the table itself cannot. If `report.check_errors`, nothing here is complete.
    """

    def __init__(
        self, file: BlockFile, header: Header, *, is_fixing: bool = False, memory_max: int = MEMORY_MAX
    ) -> None:
        self.file = file
        self.header = header
        self.report = CheckReport(total_clusters=div_ceil(header.size // 512 * 512, header.cluster_size))
        self.codec = RefcountCodec(header.refcount_order)
        self.blocks: dict[int, int] = {}
        """Index in the refcount table -> offset of the block."""
        self.refcount_clusters: list[int] = []
        """Clusters whose reference from the refcount structures has been counted."""
        self.needs_rebuild = False
        self.is_table_disputed = False
        """Whether an L1 entry names the refcount table, which looks sound: moving that would hide what is wrong."""
        self._is_fixing = is_fixing
        self._memory_max = memory_max
        self._references: References | None = None

    @property
    def references(self) -> References:
        assert self._references is not None
        return self._references

    async def run(self, progress: Progress | None = None) -> None:
        """Raises: OSError."""
        try:
            self._check_memory()
            self._references = References(self.file, self.header, self.report, is_fixing=self._is_fixing)
            await self._load_refcounts()
            await self._count(progress)
        except ImageError as error:
            self.report.add("error", "image", error.offset, str(error))
            return
        await self._count_blocks()
        await self._compare()

    def _check_memory(self) -> None:
        clusters = div_ceil(self.file.size, self.header.cluster_size) + 1
        needed = 2 * clusters * max(1, self.header.refcount_bits // 8)
        if needed > self._memory_max:
            raise UnsupportedFeature(
                self.file.path,
                f"the refcounts of {clusters} clusters take {needed} bytes of memory to check, "
                f"allowed are {self._memory_max}",
            )

    # Refcounts that the image holds

    async def _load_refcounts(self) -> None:
        header, references = self.header, self.references
        for start in range(0, header.refcount_table_clusters * header.cluster_size, PIECE_SIZE):
            length = min(PIECE_SIZE, header.refcount_table_clusters * header.cluster_size - start)
            piece = await references.read(header.refcount_table_offset + start, length)
            if piece.count(0) == len(piece):
                continue
            for index, entry in enumerate(decode_offsets(piece), start // 8):
                if not entry or not self._is_block(index, entry):
                    continue
                self.blocks[index] = entry
                await self._load_block(index * header.refcount_entries, entry)

    async def _load_block(self, first: int, offset: int) -> None:
        """The refcounts of clusters from `first` on."""
        stored, size = self.references.stored, self.header.cluster_size
        for start in range(0, size, PIECE_SIZE):
            if first >= len(stored):
                break
            counts = self.codec.decode(await self.references.read(offset + start, min(PIECE_SIZE, size - start)))
            stored[first : first + len(counts)] = counts[: len(stored) - first]
            first += len(counts)

    def _is_block(self, index: int, entry: int) -> bool:
        """Whether a refcount table entry points at something that can be a block."""
        cluster_size = self.header.cluster_size
        end = align_up(self.file.size, cluster_size)
        if entry % cluster_size == 0 and entry < end:
            return True
        self.needs_rebuild = True
        at = self.header.refcount_table_offset + 8 * index
        expected = f"expected a multiple of {cluster_size} below {end}"
        self.references.corruption("refcount table", at, f"entry {index} is {entry:#018x}, {expected}")
        return False

    async def _count_blocks(self) -> None:
        """The refcount structures, counted last: what else refers to a block makes it unusable."""
        references, header = self.references, self.header
        length = header.refcount_table_clusters * header.cluster_size
        offset = header.refcount_table_offset
        if not references.is_inside(offset, length):
            self.needs_rebuild = True
            message = f"{length} bytes at {offset:#x} are not inside the file's {self.file.size} bytes"
            references.corruption("refcount table", s.REFCOUNT_FIELDS_OFFSET, message)
        else:
            table = references.add_region("refcount table", offset, length) or range(0)
            if not self.needs_rebuild and any(cluster in references.l2_tables for cluster in table):
                self.is_table_disputed = True
                message = f"the range of {length} bytes at {offset:#x} holds what an L1 entry takes for an L2 table"
                references.broken("refcount table", offset, message)
            self.refcount_clusters.extend(table)
            self.needs_rebuild |= any(references.counts[cluster] != 1 for cluster in table)
        for number, (index, offset) in enumerate(list(self.blocks.items())):
            if number % _BLOCKS_AT_ONCE == 0:
                await asyncio.sleep(0)
            cluster = offset >> header.cluster_bits
            is_counted = references.add("refcount block", cluster)
            count = references.counts[cluster]
            if is_counted:
                self.refcount_clusters.append(cluster)
            else:
                count += 1
            if count != 1:
                self.needs_rebuild = True
                del self.blocks[index]
                references.corruption(
                    "refcount block", offset, f"block {index} at {offset:#x} has {count} references, expected 1"
                )

    # References

    async def _count(self, progress: Progress | None) -> None:
        header, references = self.header, self.references
        references.add_table("header", 0, header.cluster_size)
        await references.count_l1("active L1 table", header.l1_offset, header.l1_size, is_active=True)
        await self._count_snapshots()
        self._count_luks()
        await self._count_bitmaps()
        await references.count_l2_tables(progress)

    async def _count_snapshots(self) -> None:
        header, references = self.header, self.references
        start = offset = header.snapshot_table_offset
        for index in range(header.snapshot_count):
            offset = align_up(offset, 8)
            if offset >= self.file.size:
                references.broken("snapshot table", offset, f"snapshot {index} lies behind the end of the file")
                break
            fields = s.SNAPSHOT.unpack(await references.read(offset, s.SNAPSHOT.size))
            l1_offset, l1_size, id_length, name_length, extra_length = *fields[:4], fields[8]
            if extra_length > s.SNAPSHOT_EXTRA_MAX:
                raise CorruptImage(
                    self.file.path,
                    f"snapshot {index} has {extra_length} bytes of extra data, allowed are {s.SNAPSHOT_EXTRA_MAX} "
                    f"(offset {offset + 36})",
                    offset + 36,
                )
            if header.version >= 3 and extra_length < _SNAPSHOT_EXTRA_MIN:
                message = (
                    f"snapshot {index} has {extra_length} bytes of extra data, expected {_SNAPSHOT_EXTRA_MIN} or more"
                )
                references.corruption("snapshot table", offset + 36, message)
            disk_size = 0
            if extra_length >= _SNAPSHOT_EXTRA_MIN:
                disk_size = int.from_bytes(await references.read(offset + s.SNAPSHOT.size + 8, 8))
            await self._count_snapshot(index, offset, l1_offset, l1_size, disk_size)
            offset += s.SNAPSHOT.size + extra_length + id_length + name_length
            if offset - start > s.SNAPSHOT_TABLE_BYTES_MAX:
                raise CorruptImage(
                    self.file.path, f"the snapshot table takes more than {s.SNAPSHOT_TABLE_BYTES_MAX} bytes", start
                )
        if offset > start:
            references.add_table("snapshot table", start, offset - start)

    async def _count_snapshot(self, index: int, at: int, l1_offset: int, l1_size: int, disk_size: int) -> None:
        """What a table that is too short for the disk lacks are references."""
        cluster_size = self.header.cluster_size
        entries_max = s.L1_BYTES_MAX // 8
        if l1_offset % cluster_size or (l1_size and not l1_offset):
            message = (
                f"snapshot {index} has its L1 table at {l1_offset:#x}, expected a non-zero multiple of {cluster_size}"
            )
            self.references.broken("snapshot table", at, message)
        elif l1_size > entries_max:
            message = f"snapshot {index} has {l1_size} L1 entries, allowed are {entries_max}"
            self.references.broken("snapshot table", at + 8, message)
        else:
            needed = self.header.l1_entries_needed(disk_size)
            if l1_size < needed:
                message = f"snapshot {index} has {l1_size} L1 entries, its disk of {disk_size} bytes takes {needed}"
                self.references.broken("snapshot table", at + 8, message)
            await self.references.count_l1(f"L1 table of snapshot {index}", l1_offset, l1_size, is_active=False)

    def _count_luks(self) -> None:
        extension = self.header.extension(ExtensionType.LUKS)
        if extension is None:
            return
        offset, length = s.LUKS_EXTENSION.unpack(extension.data)
        if offset % self.header.cluster_size or not length or offset + length > s.HOST_OFFSET_MAX:
            raise CorruptImage(
                self.file.path,
                f"the LUKS header takes {length} bytes at {offset}, expected some at a multiple of "
                f"{self.header.cluster_size} (header offset {extension.offset})",
                extension.offset,
            )
        if self.references.add_table("LUKS header", offset, length) is None:
            raise CorruptImage(
                self.file.path, f"the LUKS header of {length} bytes at {offset} is not inside the file", offset
            )

    # Bitmaps

    async def _count_bitmaps(self) -> None:
        """Without its autoclear bit the extension counts as absent: the bitmaps are leaks. Raises: CorruptImage."""
        extension = self.header.extension(ExtensionType.BITMAPS)
        if extension is None or not self.header.autoclear & Autoclear.BITMAPS:
            return
        count, reserved, length, offset = s.BITMAPS_EXTENSION.unpack(extension.data)
        at = extension.offset
        if not 1 <= count <= s.BITMAPS_MAX or reserved:
            raise self._bad_bitmaps(at, f"the count of bitmaps is {count}, expected 1 to {s.BITMAPS_MAX}")
        if offset % self.header.cluster_size or not offset or not 1 <= length <= s.BITMAP_DIRECTORY_BYTES_MAX:
            raise self._bad_bitmaps(at + 8, f"the bitmap directory takes {length} bytes at {offset:#x}")
        if self.references.add_table("bitmap directory", offset, length) is None:
            raise self._bad_bitmaps(at + 8, "the bitmap directory is not inside the file")
        end = offset + length
        for _ in range(count):
            if offset + s.BITMAP.size > end:
                raise self._bad_bitmaps(offset, f"the bitmap directory holds fewer than {count} bitmaps")
            fields = s.BITMAP.unpack(await self.references.read(offset, s.BITMAP.size))
            await self._count_bitmap(offset, fields)
            offset += align_up(s.BITMAP.size + fields[5] + fields[6], 8)
        if offset != end:
            raise self._bad_bitmaps(offset, f"the bitmap directory's {count} bitmaps end at {offset}, expected {end}")

    def _bad_bitmaps(self, offset: int, message: str) -> CorruptImage:
        """A bitmap that cannot be read hides references, and nothing can be repaired: it must be removed first."""
        self.references.broken("bitmaps", offset, message)
        return CorruptImage(self.file.path, f"{message} (offset {offset})", offset)

    async def _count_bitmap(self, at: int, fields: tuple[int, ...]) -> None:
        offset, entry_count, flags, kind, granularity_bits, name_size, extra_size = fields
        cluster_size = self.header.cluster_size
        if (
            not offset
            or offset % cluster_size
            or not 1 <= entry_count <= s.BITMAP_TABLE_ENTRIES_MAX
            or entry_count * cluster_size > s.BITMAP_BYTES_MAX
            or not s.BITMAP_GRANULARITY_BITS_MIN <= granularity_bits <= s.BITMAP_GRANULARITY_BITS_MAX
            or flags & _BITMAP_FLAGS_RESERVED
            or kind != TYPE_DIRTY_TRACKING
            or not 1 <= name_size <= s.BITMAP_NAME_MAX
            or extra_size
            or (not flags & 1 and entry_count != table_size_for(self.header.size, 1 << granularity_bits, cluster_size))
        ):
            raise self._bad_bitmaps(at, f"the bitmap directory's entry at {at:#x} breaks the format")
        if self.references.add_table("bitmap table", offset, entry_count * 8) is None:
            raise self._bad_bitmaps(at, "a bitmap table is not inside the file")
        for start in range(0, entry_count * 8, PIECE_SIZE):
            piece = await self.references.read(offset + start, min(PIECE_SIZE, entry_count * 8 - start))
            for index, entry in enumerate(decode_offsets(piece), start // 8):
                place = entry & s.OFFSET_MASK
                if entry & s.BITMAP_RESERVED or (place and (entry & 1 or place % cluster_size)):
                    raise self._bad_bitmaps(offset + 8 * index, f"bitmap table entry {index} is {entry:#018x}")
                if place:
                    self.references.add_table("bitmap data", place, cluster_size)

    # Comparison

    async def _compare(self) -> None:
        references, bits = self.references, self.header.cluster_bits
        counts, stored = references.counts, references.stored
        end = references.cluster_count + (1 if counts[-1] else 0)
        self.report.image_end_offset = (await last_used(counts, stored, end) + 1) << bits
        async for first, found, expected in differing(stored, counts, end):
            self._report(first, found, expected)
            clusters = compress(range(first, first + len(found)), map(lt, found, expected))
            per_block = self.header.refcount_entries
            self.needs_rebuild |= any(cluster // per_block not in self.blocks for cluster in clusters)

    def _report(self, first: int, found: list[int], expected: list[int]) -> None:
        """Of the clusters from `first` on, those that differ; by number alone once there is no room for more."""
        position = 0
        for position, (refcount, count) in enumerate(zip(found, expected, strict=True)):
            if self.report.is_full:
                break
            if refcount != count:
                cluster = first + position
                message = f"cluster {cluster} has refcount {refcount}, expected {count}"
                offset = cluster << self.header.cluster_bits
                self.report.add("leak" if refcount > count else "corruption", "refcount", offset, message)
        else:
            return
        found, expected = found[position:], expected[position:]
        self.report.omit(sum(map(gt, found, expected)), sum(map(lt, found, expected)))
