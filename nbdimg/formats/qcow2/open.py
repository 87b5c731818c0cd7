"""Opening a qcow2 image: header, tables, references, and what must be set right before the first write."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain

from nbdimg.errors import ConfigError, CorruptImage, UnsupportedFeature
from nbdimg.formats.options import Backing, OpenOptions
from nbdimg.formats.qcow2 import luks
from nbdimg.formats.qcow2 import structs as s
from nbdimg.formats.qcow2.bitmap_store import open_store
from nbdimg.formats.qcow2.bitmaps import directory_region
from nbdimg.formats.qcow2.ciphers import legacy_cipher
from nbdimg.formats.qcow2.crypt import EncryptedFile, NoKey
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.formats.qcow2.header import KNOWN_AUTOCLEAR, Header, cluster_bits_of
from nbdimg.formats.qcow2.inflate import InflatedFile
from nbdimg.formats.qcow2.l1 import L1Table
from nbdimg.formats.qcow2.legacy import LegacyMapping, LegacySubclusterMapping
from nbdimg.formats.qcow2.mapping import Mapping, Store
from nbdimg.formats.qcow2.packed import decode_offsets
from nbdimg.formats.qcow2.refcount import Refcounts, load_table
from nbdimg.formats.qcow2.repair import repair
from nbdimg.formats.qcow2.snapshots import (
    Snapshot,
    find_snapshot,
    l1_clusters,
    load_snapshots,
    mapped_l1_size,
    stored_table_size,
)
from nbdimg.formats.qcow2.structs import COPIED, OFFSET_MASK, Crypt, ExtensionType
from nbdimg.formats.qcow2.subclusters import SubclusterMapping
from nbdimg.image.gate import Reference
from nbdimg.storage.file import BlockFile, fetch, read
from nbdimg.storage.ordering import write_durably
from nbdimg.storage.workers import workers
from nbdimg.units import align_up, div_ceil


async def read_header(file: BlockFile) -> Header:
    """Raises: CorruptImage, UnsupportedFeature."""
    fields = await read(file, 0, min(file.size, s.HEADER.size))
    head = await read(file, 0, min(file.size, 1 << cluster_bits_of(file.path, fields)))
    return Header.from_bytes(file.path, head)


async def open_driver(file: BlockFile, options: OpenOptions) -> Qcow2Driver:
    """Open the image in `file`, which stays the caller's until this returns.

    Raises:
        CorruptImage, UnsupportedFeature: what the image is not or has not.
        ConfigError: the snapshot or the key that is asked for does not fit.
        ImageError: the gate refuses a reference.
        What `options.open_backing` raises.
    """
    header = await read_header(file)
    backing = _backing(file, header)
    if options.writable and options.snapshot is not None:
        raise ConfigError(f"{file.path}: a snapshot can only be opened read-only")
    if options.writable or options.asks_for_writing:
        _check_writable(file, header)
    data_file = await _open_data_file(file, header, options)
    try:
        store = await _store(file, data_file, header, options)
        await options.open_backing(backing)
        return await _driver(file, data_file, header, store, options)
    except BaseException:
        if data_file is not None:
            await data_file.close()
        raise


async def _driver(
    file: BlockFile, data_file: BlockFile | None, header: Header, store: Store, options: OpenOptions
) -> Qcow2Driver:
    """What the image takes besides itself is there: from here on it may be changed."""
    if options.writable:
        header = await _prepare(file, header)
    snapshots = await load_snapshots(file, header) if header.snapshot_count and _wants_snapshots(options) else []
    l1, size = await _l1_table(file, header, snapshots, options.snapshot)
    refcounts = await _refcounts(file, header, l1, snapshots) if options.writable else None
    if refcounts is not None and options.file_size_max is not None:
        refcounts.clusters_max = options.file_size_max >> header.cluster_bits
    bitmaps = await open_store(file, header, refcounts) if options.snapshot is None else None
    mapping = _mapping_of(header)(file, header, l1, store, refcounts, size)
    return Qcow2Driver(file, data_file, header, mapping, refcounts, bitmaps)


def _backing(file: BlockFile, header: Header) -> Backing | None:
    if header.backing_name is None:
        return None
    offset = header.backing_name_offset
    if header.backing_format is None:
        raise UnsupportedFeature(
            file.path,
            f"backing file {header.backing_name!r} has no format beside it, expected one in a header extension "
            f"(qemu-img rebase -u -F FORMAT writes it)",
            offset,
        )
    reference = Reference(file.path, "backing file", header.backing_name, offset, is_writable=False)
    return Backing((reference,), header.backing_format)


async def open_metadata(file: BlockFile) -> tuple[Header, Refcounts]:
    """Header and refcounts of an image whose metadata alone will be changed; nothing that it refers to is opened.

    Raises: CorruptImage, UnsupportedFeature.
    """
    header = await read_header(file)
    _check_writable(file, header)
    header = await _prepare(file, header)
    snapshots = await load_snapshots(file, header)
    l1, _ = await _l1_table(file, header, snapshots, None)
    return header, await _refcounts(file, header, l1, snapshots)


def _wants_snapshots(options: OpenOptions) -> bool:
    return options.writable or options.snapshot is not None


def _mapping_of(header: Header) -> type[Mapping]:
    if header.crypt_method == Crypt.AES:
        return LegacySubclusterMapping if header.has_subclusters else LegacyMapping
    return SubclusterMapping if header.has_subclusters else Mapping


def _check_writable(file: BlockFile, header: Header) -> None:
    """Raises: CorruptImage, UnsupportedFeature: the image can only be opened read-only."""
    if header.is_corrupt:
        raise CorruptImage(
            file.path, "it is marked corrupt (incompatible feature bit 1): repair it, or open it read-only", 72
        )
    if header.crypt_method == Crypt.AES:
        raise UnsupportedFeature(file.path, "images with legacy AES encryption can only be opened read-only", 32)


async def _prepare(file: BlockFile, header: Header) -> Header:
    """What comes before the first write: repair, and the autoclear bits that nobody here keeps."""
    if header.is_dirty:
        # What is refused for its size is refused before a repair walks all of it.
        snapshots = await load_snapshots(file, header)
        l1_clusters(file.path, header, snapshots, div_ceil(file.size, header.cluster_size))
        report = await repair(file, header, leaks_only=False)
        if not report.is_clean:
            raise CorruptImage(
                file.path, f"it was not closed cleanly and cannot be repaired: {report.findings[0].message}", 72
            )
        header = await read_header(file)
    kept = header.autoclear & KNOWN_AUTOCLEAR
    if header.version >= 3 and header.autoclear != kept:
        header.autoclear = kept
        await write_durably(file, s.AUTOCLEAR_OFFSET, s.U64.pack(kept))
    return header


async def _l1_table(
    file: BlockFile, header: Header, snapshots: list[Snapshot], wanted: str | None
) -> tuple[L1Table, int]:
    """The active L1 table or a snapshot's, and the virtual size that goes with it."""
    offset, count, size = header.l1_offset, header.l1_size, header.size
    if wanted is not None:
        snapshot = find_snapshot(file.path, snapshots, wanted)
        offset, count = snapshot.l1_offset, mapped_l1_size(header, snapshot) // 8
        size = header.size if snapshot.disk_size is None else snapshot.disk_size
        if count > snapshot.l1_size:
            raise CorruptImage(
                file.path,
                f"snapshot {snapshot.id}: l1_size is {snapshot.l1_size}, expected at least {count}",
                header.snapshot_table_offset,
            )
    if offset + 8 * count > align_up(file.size, header.cluster_size):
        raise CorruptImage(
            file.path,
            f"the L1 table ends at {offset + 8 * count}, expected inside the file's {file.size} bytes "
            f"(header offset 40)",
            s.L1_FIELDS_OFFSET,
        )
    content = bytearray(8 * count)
    await fetch(file, offset, memoryview(content))
    return L1Table(file, offset, decode_offsets(content)), size


async def _refcounts(file: BlockFile, header: Header, l1: L1Table, snapshots: list[Snapshot]) -> Refcounts:
    """Raises: CorruptImage: tables that would be written lie one in the other. UnsupportedFeature: `l1_clusters`."""
    bits, end = header.cluster_bits, div_ceil(file.size, header.cluster_size)
    table = await load_table(file, header)

    def clusters(offset: int, length: int) -> range:
        """Those inside the file: a damaged entry may claim any number."""
        return range(offset >> bits, min((offset >> bits) + div_ceil(length, header.cluster_size), end))

    metadata = {0}
    for what, owned in (
        ("the L1 table", clusters(header.l1_offset, 8 * header.l1_size)),
        ("the refcount table", clusters(header.refcount_table_offset, header.refcount_table_clusters << bits)),
        ("a refcount block", [offset >> bits for offset in _used(table) if offset]),
        ("an L2 table", [(entry & OFFSET_MASK) >> bits for entry in l1.entries if entry > COPIED]),
    ):
        _claim(file.path, metadata, what, owned, bits)
    metadata.update((entry & OFFSET_MASK) >> bits for entry in l1.entries if entry & OFFSET_MASK)
    metadata.update(chain.from_iterable(l1_clusters(file.path, header, snapshots, end)))
    regions = _extension_regions(header)
    if snapshots:
        regions.append((header.snapshot_table_offset, stored_table_size(snapshots)))
    for offset, length in regions:
        metadata.update(clusters(offset, length))
    return Refcounts(file, header, table, metadata)


def _used(table: array[int]) -> array[int]:
    """The table without the zeroes at its end, which are nearly all of most tables."""
    return table[: div_ceil(len(table.tobytes().rstrip(b"\0")), table.itemsize)]


def _claim(path: str, metadata: set[int], what: str, owned: Sequence[int], bits: int) -> None:
    """Add clusters to `metadata` that nothing else there may hold. Raises: CorruptImage."""
    count = len(metadata) + len(owned)
    before = metadata.copy()
    metadata.update(owned)
    if len(metadata) == count:
        return
    for cluster in owned:
        if cluster in before:
            at = cluster << bits
            raise CorruptImage(path, f"{what} lies in other metadata, expected clusters of its own (offset {at})", at)
        before.add(cluster)


def _extension_regions(header: Header) -> list[tuple[int, int]]:
    """What header extensions point to: the LUKS header, the bitmap directory."""
    regions = []
    luks_extension = header.extension(ExtensionType.LUKS)
    if luks_extension is not None:
        offset, length = s.LUKS_EXTENSION.unpack(luks_extension.data)
        regions.append((offset, min(length, luks.AREA_SIZE_MAX)))
    directory = directory_region(header)
    if directory is not None:
        regions.append((directory[0], min(directory[1], s.BITMAP_DIRECTORY_BYTES_MAX)))
    return regions


async def _open_data_file(file: BlockFile, header: Header, options: OpenOptions) -> BlockFile | None:
    if not header.has_data_file:
        return None
    extension = header.extension(ExtensionType.DATA_FILE)
    name = header.data_file_name
    if extension is None or name is None:
        raise UnsupportedFeature(file.path, "its data is in an external file, and the header does not name it", 72)
    reference = Reference(file.path, "external data file", name, extension.offset, options.writable)
    return await options.gate.open(reference)


async def _store(file: BlockFile, data_file: BlockFile | None, header: Header, options: OpenOptions) -> Store:
    inflated = InflatedFile(file, header.cluster_bits, header.compression)
    data: BlockFile = data_file or file
    if header.crypt_method != Crypt.NONE:
        key = await workers().run(options.keys.of, file.path)
        if key is not None:
            data = await _encrypted(file, data, header, key)
        elif options.is_keyless:
            data = EncryptedFile(data, NoKey(file.path))
        else:
            raise NoKey(file.path).error()
    return Store(
        data,
        inflated,
        is_external=data_file is not None,
        is_plain=header.crypt_method == Crypt.NONE and data_file is None,
        has_backing=header.backing_name is not None,
    )


async def _encrypted(file: BlockFile, data: BlockFile, header: Header, key: bytes) -> EncryptedFile:
    if header.crypt_method == Crypt.AES:
        return EncryptedFile(data, legacy_cipher(file.path, key))
    area = await read_luks_area(file, header)
    return EncryptedFile(data, await workers().run(luks.unlock, file.path, area, key))


async def read_luks_area(file: BlockFile, header: Header) -> bytes:
    """LUKS header and key slots of an image that has them. Raises: CorruptImage: they are not where they should be."""
    extension = header.extension(ExtensionType.LUKS)
    assert extension is not None
    offset, length = s.LUKS_EXTENSION.unpack(extension.data)
    luks.check_area_size(file.path, length)
    if offset + length > file.size:
        raise CorruptImage(
            file.path,
            f"the LUKS header ends at {offset + length}, expected inside the file's {file.size} bytes "
            f"(offset {extension.offset})",
            extension.offset,
        )
    return await read(file, offset, length)
