"""Changes to the dirty bitmaps of an image: add, remove, clear, enable, disable, merge.

An editor works on the list in memory; `save` puts all of it in the old one's place in one step. What is not changed
stays where it is on disk. `open_editor` is for an image that nobody uses, of which nothing that it refers to is opened;
`bitmap_live` for one that is open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from nbdimg.errors import ConfigError, UnsupportedFeature, escaped
from nbdimg.formats.qcow2 import structs as s
from nbdimg.formats.qcow2.bitmap_header import check_room
from nbdimg.formats.qcow2.bitmap_store import MEMORY_MAX
from nbdimg.formats.qcow2.bitmap_write import Change, claim, replace_bitmaps, settle
from nbdimg.formats.qcow2.bitmaps import (
    BitmapEntry,
    BitmapFlag,
    check_fit,
    load_bits,
    load_directory,
    load_table,
)
from nbdimg.formats.qcow2.header import Header
from nbdimg.formats.qcow2.open import open_metadata
from nbdimg.image.bitmap import DirtyBitmap, byte_count
from nbdimg.storage.file import BlockFile
from nbdimg.units import KiB, is_power_of_two

DEFAULT_GRANULARITY_MIN = 4 * KiB
DEFAULT_GRANULARITY_MAX = 64 * KiB
"""The default is the cluster size within these, as in QEMU."""

GRANULARITY_MIN = 1 << s.BITMAP_GRANULARITY_BITS_MIN
GRANULARITY_MAX = 1 << s.BITMAP_GRANULARITY_BITS_MAX


BitmapVerb = Literal["add", "remove", "clear", "enable", "disable", "merge"]

Load = Callable[[BitmapEntry], Awaitable[DirtyBitmap]]
Save = Callable[[list[Change]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class BitmapAction:
    """One of several that are made together. `granularity`, `is_enabled`: of "add". `sources`: of "merge"."""

    action: BitmapVerb
    name: str
    granularity: int | None = None
    is_enabled: bool = True
    sources: tuple[str, ...] = ()


@dataclass(slots=True)
class _Union:
    """Bits that `save` makes, once, of others: stored, new, or made so themselves."""

    parts: list[BitmapEntry | DirtyBitmap | _Union]
    made: DirtyBitmap | None = None


class BitmapEditor:
    """What is to become of the bitmaps. Bits are not looked at before `save`: until then they may change.

    Every method raises ConfigError when the bitmap that it means is missing or unfit.

    Args:
        entries: as they are now.
        load: the bits of a consistent one; they stay as they are.
        save: puts the changes in the place of all; raises OSError, ImageError.
    """

    def __init__(self, file: BlockFile, header: Header, entries: Sequence[BitmapEntry], load: Load, save: Save) -> None:
        self._file = file
        self._header = header
        self._load = load
        self._save = save
        self._changes: dict[str, tuple[BitmapEntry, DirtyBitmap | _Union | None]] = {
            entry.name: (entry, None) for entry in entries
        }
        self._merged: list[BitmapEntry] = []
        """Those whose stored bits `save` asks for."""

    def carry_out(self, actions: Sequence[BitmapAction]) -> None:
        """One after the other, each on what those before it have left."""
        for each in actions:
            match each.action:
                case "add":
                    self.add(each.name, each.granularity, is_enabled=each.is_enabled)
                case "remove":
                    self.remove(each.name)
                case "clear":
                    self.clear(each.name)
                case "enable" | "disable":
                    self.enable(each.name, is_enabled=each.action == "enable")
                case "merge":
                    self.merge(each.name, each.sources)

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
        if not header.size:
            raise UnsupportedFeature(path, "a disk of size 0 has no bitmaps")
        flags = int(BitmapFlag.AUTO) if is_enabled else 0
        entry = BitmapEntry(name, granularity.bit_length() - 1, flags)
        check_fit(path, header, header.size, [*self.entries, entry])
        self._changes[name] = entry, self._clean(entry)

    def remove(self, name: str) -> None:
        """Inconsistent ones too."""
        self._find(name)
        del self._changes[name]

    def clear(self, name: str) -> None:
        entry = self._usable(name)
        self._changes[name] = entry, self._clean(entry)

    def enable(self, name: str, *, is_enabled: bool) -> None:
        """From the next change on the bitmap follows, or it stays as it is."""
        entry = self._usable(name)
        flags = entry.flags | BitmapFlag.AUTO if is_enabled else entry.flags & ~int(BitmapFlag.AUTO)
        self._changes[name] = replace(entry, flags=flags), self._changes[name][1]

    def merge(self, name: str, sources: Sequence[str]) -> None:
        """What is dirty in any of `sources` becomes dirty in `name`; granularities may differ."""
        entry = self._usable(name)
        for source in sources:
            self._usable(source)
        self._changes[name] = entry, _Union([self._part(each) for each in (name, *sources)])

    def _part(self, name: str) -> BitmapEntry | DirtyBitmap | _Union:
        entry, bits = self._changes[name]
        if bits is not None:
            return bits
        self._merged.append(entry)
        return entry

    async def load(self) -> None:
        """Have `save` find what it asks for, where `load` remembers it. Raises: OSError, ImageError."""
        for entry in self._merged:
            await self._load(entry)

    async def save(self) -> None:
        """Raises: OSError, ImageError: all of it has changed or nothing, and space may be lost."""
        changes: list[Change] = []
        for entry, bits in self._changes.values():
            changes.append((entry, None if bits is None else await self._made(bits)))
        await self._save(changes)

    async def _made(self, bits: BitmapEntry | DirtyBitmap | _Union) -> DirtyBitmap:
        if isinstance(bits, DirtyBitmap):
            return bits
        if isinstance(bits, BitmapEntry):
            return await self._load(bits)
        if bits.made is None:
            first, *others = bits.parts
            merged = (await self._made(first)).copy()
            for other in others:
                for _ in merged.merge(await self._made(other)):
                    await asyncio.sleep(0)
            bits.made = merged
        return bits.made

    def _clean(self, entry: BitmapEntry) -> DirtyBitmap:
        size = byte_count(self._header.size, entry.granularity)
        others = (other for other, bits in self._changes.values() if bits and other.name != entry.name)
        taken = sum(byte_count(self._header.size, other.granularity) for other in others)
        if taken + size > MEMORY_MAX:
            raise UnsupportedFeature(
                self._file.path,
                f"bitmap {escaped(entry.name)} takes {size} bytes of memory and others that change with it take "
                f"{taken}, allowed are {MEMORY_MAX}",
            )
        return DirtyBitmap(entry.name, entry.granularity, self._header.size)

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

    async def load(entry: BitmapEntry) -> DirtyBitmap:
        return await load_bits(file, header, entry, await load_table(file, header, entry))

    async def save(changes: list[Change]) -> None:
        await replace_bitmaps(file, header, counts, entries, changes)
        await settle(file, counts)

    return BitmapEditor(file, header, entries, load, save)
