"""Changes to the dirty bitmaps of an image that nobody uses: add, remove, clear, enable, disable, merge.

An editor works on the list in memory; `save` puts all of it in the old one's place in one step. What is not changed
stays where it is on disk. Nothing that the image refers to is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nbdimg.errors import ConfigError, UnsupportedFeature, escaped
from nbdimg.formats.qcow2 import structs as s
from nbdimg.formats.qcow2.bitmap_header import check_room
from nbdimg.formats.qcow2.bitmap_store import Change, claim, replace_bitmaps, settle
from nbdimg.formats.qcow2.bitmaps import (
    TABLE_BYTES_MAX,
    BitmapEntry,
    BitmapFlag,
    load_bits,
    load_directory,
    load_table,
    table_size_for,
)
from nbdimg.formats.qcow2.header import Header
from nbdimg.formats.qcow2.open import open_metadata
from nbdimg.formats.qcow2.refcount import Refcounts
from nbdimg.image.bitmap import DirtyBitmap, byte_count
from nbdimg.storage.file import BlockFile
from nbdimg.units import KiB, is_power_of_two

DEFAULT_GRANULARITY_MIN = 4 * KiB
DEFAULT_GRANULARITY_MAX = 64 * KiB
"""The default is the cluster size within these, as in QEMU."""

GRANULARITY_MIN = 1 << s.BITMAP_GRANULARITY_BITS_MIN
GRANULARITY_MAX = 1 << s.BITMAP_GRANULARITY_BITS_MAX


class BitmapEditor:
    """Made by `open_editor`. Every method raises ConfigError when the bitmap that it means is missing or unfit."""

    def __init__(self, file: BlockFile, header: Header, counts: Refcounts, entries: list[BitmapEntry]) -> None:
        self._file = file
        self._header = header
        self._counts = counts
        self._before = entries
        self._changes: dict[str, Change] = {entry.name: (entry, None) for entry in entries}

    @property
    def entries(self) -> list[BitmapEntry]:
        return [entry for entry, _ in self._changes.values()]

    def add(self, name: str, granularity: int | None = None, *, is_enabled: bool = True) -> None:
        """A new bitmap, clean. `granularity`: bytes. Raises: UnsupportedFeature: the image has no room for it."""
        path, header = self._file.path, self._header
        if granularity is None:
            granularity = min(max(header.cluster_size, DEFAULT_GRANULARITY_MIN), DEFAULT_GRANULARITY_MAX)
        if not (is_power_of_two(granularity) and GRANULARITY_MIN <= granularity <= GRANULARITY_MAX):
            raise ConfigError(
                f"granularity is {granularity}, expected a power of two from {GRANULARITY_MIN} to {GRANULARITY_MAX}"
            )
        if not name or len(_encoded(name)) > s.BITMAP_NAME_MAX or "\0" in name:
            raise ConfigError(
                f"bitmap name {escaped(name)}: expected 1 to {s.BITMAP_NAME_MAX} bytes of UTF-8 without NUL"
            )
        if name in self._changes:
            raise ConfigError(f"{path}: there is a bitmap {escaped(name)} already")
        check_room(self._file, header, len(self._changes) + 1)
        table_size = table_size_for(header.size, granularity, header.cluster_size)
        table_bytes = 8 * (table_size + sum(entry.table_size for entry in self.entries))
        if table_size * header.cluster_size > s.BITMAP_BYTES_MAX or table_bytes > TABLE_BYTES_MAX:
            raise UnsupportedFeature(
                path,
                f"a bitmap of granularity {granularity} takes {byte_count(header.size, granularity)} bytes here, more "
                f"than is allowed: use a larger granularity",
            )
        if not table_size:
            raise UnsupportedFeature(path, "a disk of size 0 has no bitmaps")
        flags = int(BitmapFlag.AUTO) if is_enabled else 0
        entry = BitmapEntry(name, granularity.bit_length() - 1, flags)
        self._changes[name] = entry, DirtyBitmap(name, granularity, header.size)

    def remove(self, name: str) -> None:
        """Inconsistent ones too."""
        self._find(name)
        del self._changes[name]

    def clear(self, name: str) -> None:
        entry = self._usable(name)
        self._changes[name] = entry, DirtyBitmap(name, entry.granularity, self._header.size)

    def enable(self, name: str, *, is_enabled: bool) -> None:
        """From the next change on the bitmap follows, or it stays as it is."""
        entry = self._usable(name)
        flags = entry.flags | BitmapFlag.AUTO if is_enabled else entry.flags & ~int(BitmapFlag.AUTO)
        self._changes[name] = replace(entry, flags=flags), self._changes[name][1]

    async def merge(self, name: str, sources: Sequence[str]) -> None:
        """What is dirty in any of `sources` becomes dirty in `name`; granularities may differ."""
        entry = self._usable(name)
        for source in sources:
            self._usable(source)
        merged = await self._bits(name)
        for source in sources:
            merged.merge(await self._bits(source))
        self._changes[name] = entry, merged

    async def save(self) -> None:
        """Raises: OSError, ImageError: all of it has changed or nothing, and space may be lost."""
        changes = list(self._changes.values())
        self._before = await replace_bitmaps(self._file, self._header, self._counts, self._before, changes)
        self._changes = {entry.name: (entry, None) for entry in self._before}
        await settle(self._file, self._counts)

    async def _bits(self, name: str) -> DirtyBitmap:
        entry, bitmap = self._changes[name]
        if bitmap is not None:
            return bitmap
        table = await load_table(self._file, self._header, entry)
        return await load_bits(self._file, self._header, entry, table)

    def _find(self, name: str) -> BitmapEntry:
        if name not in self._changes:
            known = ", ".join(escaped(each) for each in list(self._changes)[:16]) or "none"
            raise ConfigError(f"{self._file.path}: there is no bitmap {escaped(name)}, known are {known}")
        return self._changes[name][0]

    def _usable(self, name: str) -> BitmapEntry:
        entry = self._find(name)
        if not entry.is_consistent:
            raise ConfigError(
                f"{self._file.path}: bitmap {escaped(name)} is inconsistent, as the image was not closed cleanly: it "
                f"can only be removed"
            )
        return entry


def _encoded(name: str) -> bytes:
    """Names from a command line may hold bytes that are no UTF-8: then they are too long for any limit."""
    try:
        return name.encode()
    except UnicodeEncodeError:
        return bytes(s.BITMAP_NAME_MAX + 1)


async def open_editor(file: BlockFile) -> BitmapEditor:
    """The bitmaps of the image in `file`, which is open for writing and locked, and stays the caller's.

    Raises: CorruptImage, UnsupportedFeature, OSError.
    """
    header, counts = await open_metadata(file)
    entries = await load_directory(file, header)
    await claim(file, header, counts, entries)
    return BitmapEditor(file, header, counts, entries)
