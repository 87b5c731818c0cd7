"""Another size for the guest's disk: of an open, writable image with no request and no flush in flight.

    grow     forget what is mapped behind the end | a longer L1 table, the data file's length, zeroes where something
             else would appear | bitmaps, in use | header: size and L1 table | bitmaps are consistent
    shrink   zeroes behind the new end in its last cluster | bitmaps, in use | header: size | bitmaps are consistent
             | forget what is mapped behind the end: the L1 table names no L2 table there any more, and what was named
             is freed

At each bar everything before it is durable. A crash leaves the disk with its old size and all its bytes up to the new
one, or with the new size. While it still has the old size, whatever lies behind the new one is as it was or zeroes: to
forget it before the header is written, as QEMU does, would show the backing file's bytes there. A shrink that
fails puts it back. What a crash leaves mapped behind the end is no error; the next resize, to whatever size, frees it.

New bytes of the disk read as zeroes, also where the last cluster, a longer backing file, a longer data file, or tables
that were left behind have something else. In all bitmaps they are dirty: where the disk was once longer, a backup may
have what it had there.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from nbdimg.errors import ConfigError, ImageError, UnsupportedFeature, escaped
from nbdimg.formats.qcow2 import structs as s
from nbdimg.formats.qcow2.bitmap_live import failing_in_doubt
from nbdimg.formats.qcow2.crypt import EncryptedFile
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.formats.qcow2.header import Header
from nbdimg.formats.qcow2.l1 import check_tables_differ
from nbdimg.formats.qcow2.packed import encode_offsets
from nbdimg.image.driver import ExtentKind, answered
from nbdimg.image.image import Image
from nbdimg.storage.ordering import space_may_wait
from nbdimg.units import MiB, align_up, div_ceil

Progress = Callable[[int, int], None]
"""Called with bytes of the disk done and bytes in all."""

ZERO_SIZE = 256 * MiB
"""Bytes that are zeroed between two reports of progress."""


def check(path: str, header: Header, size: int) -> None:
    """Raises: ConfigError: the disk cannot have this size. UnsupportedFeature: it cannot have another size."""
    if size % s.SECTOR_SIZE:
        raise ConfigError(f"{path}: size is {size}, expected a multiple of {s.SECTOR_SIZE}")
    size_max = min(s.SIZE_MAX, s.L1_BYTES_MAX // 8 * header.l2_entries * header.cluster_size)
    if not 0 <= size <= size_max:
        raise ConfigError(f"{path}: size is {size}, expected 0 to {size_max} with clusters of {header.cluster_size}")
    if header.version < 3 and header.snapshot_count:
        raise UnsupportedFeature(
            path, "version 2 does not note the size of a snapshot's disk, so an image with snapshots keeps its size", 60
        )


async def resize(image: Image, size: int, *, progress: Progress | None = None) -> None:
    """Give the disk `size` bytes; durable on return, and the image goes on with the new size. What lies behind a
    smaller size is lost. With the size that it has, only what lies behind its end is freed.

    Raises: as `check`; ConfigError: as `_check_keys`; nothing has changed. CorruptImage: as `check_tables_differ`.
        UnsupportedFeature: a bitmap is inconsistent, or too large. ImageError, OSError: the size is the old one, unless
        the image failed: then one of both. OSError: it is the new one, as the message says: as `_give_back`.
    """
    driver = image.driver
    assert isinstance(driver, Qcow2Driver)
    check(driver.file.path, driver.header, size)
    check_tables_differ(driver.file.path, driver.mapping.l1.entries)
    _check_bitmaps(driver, size)
    _check_keys(image, driver, size)
    if size < driver.size:
        await _shrink(image, driver, size)
        await _give_back(image, driver, progress)
        return
    await _forget(image, driver, progress)
    if size > driver.size:
        await _grow(image, driver, size, progress)


def _check_bitmaps(driver: Qcow2Driver, size: int) -> None:
    store = driver.bitmaps
    if store is not None:
        if not size and store.entries:
            raise UnsupportedFeature(driver.file.path, "a disk of size 0 has no bitmaps: remove them first")
        for entry in store.entries:
            if entry.name not in store.names:
                raise UnsupportedFeature(
                    driver.file.path,
                    f"bitmap {escaped(entry.name)} is inconsistent and cannot follow another size: remove it first "
                    f"(offset {entry.offset})",
                    entry.offset,
                )
        store.check_size(max(size, driver.size))


def _check_keys(image: Image, driver: Qcow2Driver, size: int) -> None:
    """Zeroes may have to be written out where the end of the disk cuts a cluster, and, in what is new, where nothing
    but data hides what is there: in a raw data file, and in version 2 over a longer backing file.

    Raises: ConfigError: that is so, and an image of the chain, from which the rest of a cluster may have to be copied,
        was opened without its key.
    """
    header, old, backing = driver.header, driver.size, image.backing
    is_cut = size != old and min(old, size) % driver.cluster_size != 0
    is_hidden_by_data = header.is_data_file_raw or (header.version < 3 and backing is not None and backing.size > old)
    if not is_cut and not (size > old and is_hidden_by_data):
        return
    each: Image | None = image
    while each is not None:
        if isinstance(each.driver, Qcow2Driver) and isinstance(each.driver.mapping.guest_file, EncryptedFile):
            each.driver.mapping.guest_file.check_key()
        each = each.backing


async def _resize_bitmaps(driver: Qcow2Driver, size: int) -> None:
    store = driver.bitmaps
    if store is not None:
        for name in store.names:
            await store.get(name)
        store.resize(size)


async def _place_bitmaps(image: Image, driver: Qcow2Driver) -> None:
    """The last that takes space: what does not find it leaves the old size, and all bitmaps as they were."""
    store, counts = driver.bitmaps, driver.refcounts
    if store is not None and counts is not None:
        await _flush(image)
        with failing_in_doubt(image):
            await store.place(counts)


async def _release_bitmaps(image: Image, driver: Qcow2Driver) -> None:
    """The size is durable: all bitmaps are consistent on disk again, or where there is no space for that at the end."""
    if driver.bitmaps is not None:
        with space_may_wait(), failing_in_doubt(image):
            await driver.bitmaps.release()


async def _flush(image: Image) -> None:
    image.gate.changed()
    await image.flush()


def _set_size(image: Image, driver: Qcow2Driver, size: int) -> None:
    driver.size = driver.mapping.size = size
    image.resized()


async def _shrink(image: Image, driver: Qcow2Driver, size: int) -> None:
    old = driver.size
    cut: list[tuple[int, bytearray]] = []
    try:
        await _zero_rest(image, driver, size, cut)
        await _resize_bitmaps(driver, size)
        await _place_bitmaps(image, driver)
        _set_size(image, driver, size)
        driver.header.size = size
        driver.resized()
        await _flush(image)
    except BaseException:
        _restore(image, driver, old)
        await _put_back(image, cut)
        raise
    await _release_bitmaps(image, driver)


async def _zero_rest(image: Image, driver: Qcow2Driver, size: int, cut: list[tuple[int, bytearray]]) -> None:
    """Zero what the last cluster of a disk of `size` bytes has behind its end; `cut` gets what was there, and where."""
    position, stop = size, min(driver.size, align_up(size, driver.cluster_size))
    while position < stop:
        extent = await answered(partial(driver.map, position, stop))
        end = min(extent.stop, stop)
        if extent.kind in (ExtentKind.DATA, ExtentKind.COMPRESSED):
            content = bytearray(end - position)
            await image.read(position, memoryview(content))
            cut.append((position, content))
            await image.zero(position, end - position, may_unmap=False, is_fast_only=False)
        position = end


async def _put_back(image: Image, cut: list[tuple[int, bytearray]]) -> None:
    """What was zeroed for a smaller disk that did not come to be. Where that fails the image does: a guest must not go
    on with zeroes. What is there still, as the zeroes found no space, takes none.
    """
    for offset, content in cut:
        found = bytearray(len(content))
        try:
            await image.read(offset, memoryview(found))
            if found != content:
                await image.write(offset, content)
        except (OSError, ImageError) as error:
            if image.gate.failure is None:
                reason = error.strerror if isinstance(error, OSError) else error
                image.gate.failure = (
                    f"{len(content)} bytes at {offset}, zeroed for a resize that failed, cannot be put back "
                    f"({reason}); open it anew"
                )
            return
    with suppress(OSError, ImageError):
        await image.flush()


def _restore(image: Image, driver: Qcow2Driver, old: int) -> None:
    """The new size did not reach the disk."""
    driver.header.size = old
    _set_size(image, driver, old)
    image.gate.changed()
    if driver.bitmaps is not None:
        driver.bitmaps.undo()


async def _give_back(image: Image, driver: Qcow2Driver, progress: Progress | None) -> None:
    """The space of what a smaller disk has lost. Raises: OSError: some is still taken. ImageError: the image failed."""
    try:
        if driver.data_file is not None and driver.data_file.size > driver.size:
            await driver.data_file.truncate(driver.size)
        with space_may_wait():
            await _forget(image, driver, progress)
    except OSError as error:
        done = f"the disk has {driver.size} bytes now, but the space of what it had behind them is not all free"
        raise OSError(error.errno, f"{done} ({error.strerror})") from None


async def _forget(image: Image, driver: Qcow2Driver, progress: Progress | None) -> None:
    """Free what is mapped behind the end of the disk."""
    start = offset = align_up(driver.size, driver.cluster_size)
    end = len(driver.mapping.l1.entries) * driver.header.l2_entries * driver.cluster_size
    while offset < end:
        offset = await answered(partial(driver.drop, offset))
        await asyncio.sleep(0)
        if driver.is_strained:
            await _flush(image)
        if progress is not None:
            progress(offset - start, end - start)
    if driver.mapping.is_dirty:
        await _flush(image)


async def _grow(image: Image, driver: Qcow2Driver, size: int, progress: Progress | None) -> None:
    old = driver.size
    try:
        await _resize_bitmaps(driver, size)
        await _grow_l1(driver, driver.header.l1_entries_needed(size))
        _set_size(image, driver, size)
        await _grow_data_file(image, driver, old, size)
        stop = align_up(old, driver.cluster_size)
        if image.backing is not None:
            stop = max(stop, align_up(image.backing.size, driver.cluster_size))
        if driver.header.is_data_file_raw and driver.header.crypt_method != s.Crypt.NONE:
            stop = size  # all of it is mapped, and what is not written decrypts to noise
        stop = min(stop, size)
        for position in range(old, stop, ZERO_SIZE):
            length = min(ZERO_SIZE, stop - position)
            await image.zero(position, length, may_unmap=True, is_fast_only=False)
            if progress is not None:
                progress(position + length - old, stop - old)
        await _place_bitmaps(image, driver)
        driver.header.size = size
        driver.resized()
        await _flush(image)
    except BaseException:
        _restore(image, driver, old)
        raise
    await _release_bitmaps(image, driver)


async def _grow_l1(driver: Qcow2Driver, count: int) -> None:
    """A table of at least `count` entries, in a new place; the header follows with the next plan. Where it finds no
    space that shows here, while nothing counts the place or refers to it.
    """
    header, l1, counts = driver.header, driver.mapping.l1, driver.refcounts
    assert counts is not None
    if count <= header.l1_size:
        return
    clusters = div_ceil(8 * count, header.cluster_size)
    run = await answered(lambda: counts.allocate_contiguous(clusters))
    offset, entries = run.cluster << header.cluster_bits, l1.entries + array("Q", bytes(8 * (count - header.l1_size)))
    try:
        await driver.file.pwrite(offset, encode_offsets(entries))
    except OSError:
        counts.give_back(run)
        raise
    counts.metadata.update(range(run.cluster, run.cluster + run.count))
    old_cluster = header.l1_offset >> header.cluster_bits
    old_clusters = div_ceil(8 * header.l1_size, header.cluster_size)
    l1.move(offset, entries)
    header.l1_offset, header.l1_size = l1.offset, count
    driver.resized()
    if old_clusters:
        counts.free(old_cluster, old_clusters, punch=True)


async def _grow_data_file(image: Image, driver: Qcow2Driver, old: int, size: int) -> None:
    """Nothing but zeroes in what is new of the data file; one that is a raw image of its own has all of it mapped."""
    file = driver.data_file
    if file is None:
        return
    if file.size > old and not await file.punch(old, min(file.size, size) - old):
        raise UnsupportedFeature(file.path, f"it has {file.size} bytes, and what lies behind {old} cannot be zeroed")
    if file.size < size:
        await file.truncate(size)
    if not driver.header.is_data_file_raw:
        return
    position = align_up(old, driver.cluster_size)
    while position < size:
        allocation = await answered(partial(driver.reserve, position, size))
        driver.commit(allocation)
        position = allocation.offset + allocation.length
        if driver.is_strained:
            await _flush(image)
