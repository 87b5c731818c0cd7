"""The dirty bitmaps of an open image: kept up while it changes, stored at the orderly end.

    consistent ──first change──▶ marked in_use, bits kept up in memory ──close──▶ stored, consistent
                                          │
                                          └── crash ──▶ in_use on disk: inconsistent, may only be removed

What survives a crash (kill -9, power): the image, every bitmap that is not enabled, and, until the first change after
opening, the enabled ones too. Enabled bitmaps of an image that was changed and not closed are lost: in_use says so, to
QEMU as well, which does the same to all bitmaps as soon as it opens the image for writing.

    (B1) No guest byte changes before in_use of every enabled bitmap is durable. A flag is four bytes within a sector:
         it is set in place, whatever else a crash leaves, and until the barrier behind it what is consistent is also
         right. So autoclear bit 0 stays set: to clear it meanwhile, as QEMU does for it rewrites the directory, would
         put the other bitmaps at stake.
    (B2) Marking waits for the first change: a server that is killed before has lost nothing.
    (B3) Stored bits, tables and directory go to new clusters. The header extension names them last (Q6), and what it
         named before is freed when that is durable. Where there is no space they go over what is in use, before that
         is consistent.
    (B4) The extension changes in one write within a sector, or in several while autoclear bit 0 is clear
         (`bitmap_header`).
    (B5) If the barrier behind a flag failed nobody knows what the disk has: every later change fails, as nothing was
         changed since.
    (B6) When the list changes under an open image, what is in use and goes on recording stays in use, with the bits
         that it had on disk; what stops to record is stored, and what is new or cleared is consistent until the next
         change marks it (B1). For that no request may be in flight, and all that was written must be durable.
    (B7) Before the header says that the disk has another size all are stored at that size, in use: that is what takes
         space. Then their flags are cleared in place. Until they are stored the disk has all as they were.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Sequence
from dataclasses import replace
from struct import Struct

from nbdimg.errors import RequestError, UnsupportedFeature, escaped
from nbdimg.formats.qcow2.bitmap_write import Change, claim, replace_bitmaps, settle
from nbdimg.formats.qcow2.bitmaps import (
    BitmapEntry,
    BitmapFlag,
    check_fit,
    directory_region,
    load_bits,
    load_directory,
    load_table,
    table_size_for,
)
from nbdimg.formats.qcow2.header import Header
from nbdimg.formats.qcow2.packed import encode_offsets
from nbdimg.formats.qcow2.refcount import Refcounts
from nbdimg.formats.qcow2.structs import OFFSET_MASK
from nbdimg.image.bitmap import DirtyBitmap, byte_count
from nbdimg.storage.file import BlockFile
from nbdimg.storage.ordering import (
    OUT_OF_SPACE,
    Plan,
    Stage,
    UnwrittenError,
    Write,
    leaves_no_doubt,
    run,
    space_may_wait,
)
from nbdimg.units import MiB

MEMORY_MAX = 512 * MiB
"""Bits of one image in memory: what QEMU allows a single bitmap, 256 TiB at 64 KiB."""

_FLAGS_OFFSET = 12
_U32 = Struct(">I")


class BitmapStore:
    """What an open image knows of its bitmaps; see `image.driver.BitmapStore`. Made by `open_store`."""

    def __init__(self, file: BlockFile, header: Header, entries: list[BitmapEntry]) -> None:
        self.entries = entries
        self.recording: tuple[DirtyBitmap, ...] = ()
        self._file = file
        self._header = header
        self._loaded: dict[str, DirtyBitmap] = {}
        self._loading = asyncio.Lock()
        self.is_marked = False
        """Whether every recording bitmap is durably in use."""
        self._marked: set[str] = set()
        """What may be in use on disk by our doing, and is stored at the end."""
        self._resizing: list[Callable[[], None]] = []
        """What undoes the resize under way."""
        self._failure: OSError | None = None

    def forget(self) -> None:
        """See `TableCache.forget`."""
        self._loaded.clear()
        self.recording = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.entries if entry.is_consistent or entry.name in self._marked)

    async def get(self, name: str) -> DirtyBitmap:
        """The bitmap of one of `names`, as it is now. It is loaded once, however many ask for it at the same time.

        Raises: UnsupportedFeature: it would take too much memory. RequestError: EINVAL, there is none of this name.
        """
        if name not in self._loaded:
            async with self._loading:
                if name not in self._loaded:
                    self._loaded[name] = await self._load(name)
        return self._loaded[name]

    async def _load(self, name: str) -> DirtyBitmap:
        entry = next((entry for entry in self.entries if entry.name == name), None)
        if entry is None:
            raise RequestError(errno.EINVAL, f"bitmap {escaped(name)} is not there any more")
        size = byte_count(self._header.size, entry.granularity)
        taken = self._taken()
        if taken + size > MEMORY_MAX:
            self._loaded = {each: bits for each, bits in self._loaded.items() if self._is_needed(bits)}
            taken = self._taken()
        if taken + size > MEMORY_MAX:
            raise UnsupportedFeature(
                self._file.path,
                f"bitmap {escaped(name)} takes {size} bytes of memory and others take {taken}, allowed are "
                f"{MEMORY_MAX} (offset {entry.offset})",
                entry.offset,
            )
        table = await load_table(self._file, self._header, entry)
        return await load_bits(self._file, self._header, entry, table)

    def _taken(self) -> int:
        return sum(bitmap.byte_count for bitmap in self._loaded.values())

    def _is_needed(self, bitmap: DirtyBitmap) -> bool:
        """Whether the file lacks what a loaded one knows, or will."""
        return bitmap.name in self._marked or bitmap in self.recording

    async def record(self) -> None:
        """Load the enabled bitmaps: from now on every change must be set in them.

        Raises: UnsupportedFeature: they would take too much memory.
        """
        enabled = [entry for entry in self.entries if entry.is_consistent and entry.is_enabled]
        taken = sum(byte_count(self._header.size, entry.granularity) for entry in enabled)
        if taken > MEMORY_MAX:
            raise _too_much(self._file.path, taken)
        self.recording = tuple([await self.get(entry.name) for entry in enabled])

    async def mark(self) -> None:
        """Durably say that the enabled bitmaps are in use (B1). Not to be called twice at the same time.

        Raises: OSError: they are not, and nothing may be changed (B5).
        """
        self._check()
        names = {bitmap.name for bitmap in self.recording}
        self._marked |= names
        await self._put_flags(names, BitmapFlag.IN_USE)
        self.is_marked = True

    def _check(self) -> None:
        """Raises: OSError (B5)."""
        if self._failure is not None:
            raise OSError(self._failure.errno, self._failure.strerror)

    async def _put_flags(self, names: set[str], more: int = 0) -> None:
        """Write the flags of these bitmaps, and `more`, in place; durable on return. Raises: OSError (B5)."""
        entries = [entry for entry in self.entries if entry.name in names]
        if not entries:
            return
        writes = [Write(self._file, entry.offset + _FLAGS_OFFSET, _U32.pack(entry.flags | more)) for entry in entries]
        try:
            await run(Plan((Stage(tuple(writes), (self._file,)),)))
        except UnwrittenError:
            raise
        except OSError as error:
            self._failure = error
            raise

    # Another size of the disk (B7): check, resize, place, then the header, and release; or undo

    def check_size(self, size: int) -> None:
        """Raises: UnsupportedFeature: the bitmaps would be too large for a disk of `size` bytes."""
        check_fit(self._file.path, self._header, size, self.entries)
        taken = sum(byte_count(size, entry.granularity) for entry in self.entries)
        if taken > MEMORY_MAX:
            raise _too_much(self._file.path, taken)

    def resize(self, size: int) -> None:
        """All of `names`, which `get` has loaded, are of this size in memory."""
        self._resizing = [self._loaded[name].resize(size) for name in self.names]

    async def place(self, counts: Refcounts) -> None:
        """Store what was resized, still in use. Nothing else may change the image meanwhile, and what did is durable.

        Raises: OSError, ImageError: as `replace_bitmaps`.
        """
        self._check()
        changes: list[Change] = []
        for entry in self.entries:
            in_use = replace(entry, flags=entry.flags | BitmapFlag.IN_USE)
            changes.append((in_use, self._loaded[entry.name]))
        placed = await replace_bitmaps(self._file, self._header, counts, self.entries, changes)
        self.entries = [replace(entry, flags=entry.flags & ~int(BitmapFlag.IN_USE)) for entry in placed]
        self._marked, self.is_marked = set(self.names), True
        with space_may_wait():
            await settle(self._file, counts)

    async def release(self) -> None:
        """The header has the size: what was placed is consistent. Raises: OSError: it may be in use still."""
        self._resizing = []
        await self._unmark(set(self.names))

    def undo(self) -> None:
        """The disk keeps its former size."""
        for undo in self._resizing:
            undo()
        self._resizing = []

    async def _unmark(self, names: set[str]) -> None:
        """Make these bitmaps consistent again, which are stored as they are. If that fails they are stored at the end,
        and the next change marks them again whatever the disk has.
        """
        self.is_marked = False
        await self._put_flags(names)
        self._marked -= names

    async def store(self, counts: Refcounts) -> None:
        """Write what was marked and make it consistent again; all of the list if a change of it was left halfway and
        the header names none now (B4). Nothing else may change the image meanwhile.

        Raises: OSError, ImageError: they are not stored, and stay in use; or they are, and the space of what they had
        before is free with a later plan, or lost.
        """
        is_named = not self.entries or directory_region(self._header) is not None
        if not self._marked and is_named:
            return
        changes: list[Change] = []
        for entry in self.entries:
            changes.append((entry, self._loaded[entry.name] if entry.name in self._marked else None))
        try:
            self.entries = await replace_bitmaps(self._file, self._header, counts, self.entries, changes)
        except OSError as error:
            is_full = error.errno in OUT_OF_SPACE and leaves_no_doubt(error)
            is_named = directory_region(self._header) is not None
            if not is_full or not is_named or not await self._overwrite():
                raise
            await self._unmark(self._marked.copy())
        else:
            self._marked = set()
            self.is_marked = False
        await settle(self._file, counts)

    async def replace(self, counts: Refcounts, changes: Sequence[Change]) -> None:
        """Put `changes`, made of `entries`, in the place of all bitmaps (B6), and record those that are enabled then.

        Raises: OSError, ImageError: as `get` and `replace_bitmaps`; where that leaves no doubt about what the disk has,
            nothing is recorded otherwise than before.
        """
        self._check()
        loaded = await self._loaded_with(changes)
        in_use = {entry.name for entry, bits in changes if bits is None and entry.is_enabled} & self._marked
        on_disk: list[Change] = []
        for entry, bits in changes:
            if entry.name in in_use:
                on_disk.append((replace(entry, flags=entry.flags | BitmapFlag.IN_USE), None))
            elif bits is None and entry.name in self._marked:
                on_disk.append((entry, loaded[entry.name]))
            else:
                on_disk.append((entry, bits))
        placed = await replace_bitmaps(self._file, self._header, counts, self.entries, on_disk)
        self.entries = [
            replace(now, flags=entry.flags) if entry.name in in_use else now
            for (entry, _), now in zip(changes, placed, strict=True)
        ]
        self._loaded, self._marked = loaded, in_use
        self.recording = tuple(loaded[entry.name] for entry in self.entries if entry.is_consistent and entry.is_enabled)
        self.is_marked = all(bitmap.name in in_use for bitmap in self.recording)
        with space_may_wait():
            await settle(self._file, counts)

    async def _loaded_with(self, changes: Sequence[Change]) -> dict[str, DirtyBitmap]:
        """What is in memory when they are made: all that record then, or are stored, and of the others those that are
        now, as far as there is room.
        """
        loaded: dict[str, DirtyBitmap] = {}
        others: dict[str, DirtyBitmap] = {}
        for entry, bits in changes:
            is_recording = entry.is_consistent and entry.is_enabled
            if bits is None and is_recording:
                bits = await self.get(entry.name)
            bits = bits or self._loaded.get(entry.name)
            if bits is not None:
                (loaded if is_recording or entry.name in self._marked else others)[entry.name] = bits
        taken = sum(bitmap.byte_count for bitmap in loaded.values())
        if taken > MEMORY_MAX:
            raise _too_much(self._file.path, taken)
        for name, bitmap in others.items():
            if taken + bitmap.byte_count <= MEMORY_MAX:
                loaded[name] = bitmap
                taken += bitmap.byte_count
        return loaded

    async def _overwrite(self) -> bool:
        """Without new space: bits go over those on disk, which are in use and so lost by a crash anyway. A part of a
        bitmap that had no cluster of bits, and needs one, is dirty as a whole. False: a table has another size.
        """
        cluster_size = self._header.cluster_size
        tables = []
        for entry in self.entries:
            if entry.name not in self._marked:
                continue
            bitmap = self._loaded[entry.name]
            table = await load_table(self._file, self._header, entry)
            if len(table) != table_size_for(bitmap.size, bitmap.granularity, cluster_size):
                return False
            for index, place in enumerate(table):
                piece = bitmap.stored(index * cluster_size, (index + 1) * cluster_size)
                if place & OFFSET_MASK:
                    await self._file.pwrite(place & OFFSET_MASK, piece.ljust(cluster_size, b"\0"))
                elif any(piece):
                    table[index] = 1
            tables.append(Write(self._file, entry.table_offset, encode_offsets(table)))
        await run(Plan((Stage(tuple(tables), (self._file,)),)))
        return True


def _too_much(path: str, taken: int) -> UnsupportedFeature:
    return UnsupportedFeature(path, f"its bitmaps would take {taken} bytes of memory, allowed are {MEMORY_MAX}")


async def open_store(file: BlockFile, header: Header, counts: Refcounts | None) -> BitmapStore | None:
    """The image's bitmaps, recording those that are enabled if `counts` says that the image will be written.

    Raises: CorruptImage, UnsupportedFeature.
    """
    entries = await load_directory(file, header)
    if not entries:
        return None
    store = BitmapStore(file, header, entries)
    if counts is not None:
        await claim(file, header, counts, entries)
        await store.record()
    return store
