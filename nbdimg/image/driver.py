"""The contract between a format and the image layer.

A driver answers where guest bytes live and makes room for them; it never sees a request, a socket or guest data.
Offsets and lengths are bytes. A method without `async` does no I/O and never suspends: what it lacks, it names in a
`Miss`.

    write    place ── in place? ──▶ write
                └──── no ────▶ reserve ─▶ write data, head and tail ─▶ commit      (or release, when the write failed)

Files of an extent may be views: of a compressed cluster, of an encrypted area. Whoever reads need not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeVar, runtime_checkable

from nbdimg.image.bitmap import DirtyBitmap
from nbdimg.image.tables import TableCache
from nbdimg.storage.file import BlockFile
from nbdimg.storage.ordering import Plan

T = TypeVar("T")


class ExtentKind(Enum):
    """What guest bytes are."""

    DATA = "data"
    """Stored bytes, in `file` from `file_offset`."""
    ZERO = "zero"
    """Reads as zeroes."""
    BACKING = "backing"
    """Whatever the backing image has there; only drivers say this, the image layer looks further."""
    COMPRESSED = "compressed"
    """Stored bytes that `file` inflates; never written in place."""


@dataclass(slots=True)
class Extent:
    """A run of guest bytes of one kind, from `offset` for `length` bytes.

    `file_offset` is where the byte at `offset` lies in `file`. With `writable`, a write to these guest bytes goes
    there in place. `depth` counts the files of the chain down to the one that decides: 1 is the image itself, 0 that
    none does and the zeroes are nobody's.
    """

    kind: ExtentKind
    offset: int
    length: int
    file: BlockFile
    file_offset: int
    writable: bool
    depth: int = 1

    @property
    def stop(self) -> int:
        return self.offset + self.length


class MissSource(Protocol):
    """What brings in what an answer lacked."""

    async def load(self, key: int) -> None:
        """Bring in what `key` means to the source, for whoever asks again. Raises: as `Miss.load`."""
        ...


@dataclass(frozen=True, slots=True)
class Miss:
    """Something that an answer takes and that is not in memory: `load` it and ask again."""

    source: MissSource
    key: int

    async def load(self) -> None:
        """Raises: OSError: it cannot be read. ImageError: it is not what it should be."""
        await self.source.load(self.key)


async def answered(ask: Callable[[], T | Miss]) -> T:
    """What `ask` says once it lacks nothing. Raises: as it, and as `Miss.load`."""
    while isinstance(answer := ask(), Miss):
        await answer.load()
    return answer


@dataclass(slots=True)
class Allocation:
    """Space for the guest bytes from `offset` for `length`, not yet visible to readers.

    It begins at or before the byte that was asked for and may end before the write does. What the write does not
    cover at either end, its head and tail, must be filled with what the guest sees there now; `head` and `tail` say
    what that is. With `is_zeroed` the space reads as zeroes already.
    """

    offset: int
    length: int
    file: BlockFile
    file_offset: int
    head: ExtentKind
    tail: ExtentKind
    is_zeroed: bool
    token: object
    """The driver's own."""
    is_new: bool = True
    """Whether no guest sees any of the space yet: it is punched when filling it fails."""


class Unmap(Enum):
    """What `unmap` is for."""

    TRIM = "trim"
    """Give space back; the bytes need not change, if they do they read as zeroes."""
    ZERO = "zero"
    """Read as zeroes, and give space back."""
    KEEP = "keep"
    """Read as zeroes, and keep the space."""


class BitmapStore(Protocol):
    """The dirty bitmaps that are stored in an image.

    Only what is consistent appears here. `recording` ones are loaded and must follow every change; before the first,
    `mark` has to have succeeded.
    """

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def recording(self) -> Sequence[DirtyBitmap]: ...

    is_marked: bool

    async def get(self, name: str) -> DirtyBitmap:
        """The bitmap of one of `names`.

        Raises: OSError, ImageError: it cannot be loaded. RequestError: EINVAL, there is none of this name any more.
        """
        ...

    async def mark(self) -> None:
        """Say on disk that the recording bitmaps are in use; not to be called twice at the same time.

        Raises: OSError: nothing may be changed.
        """
        ...


@runtime_checkable
class HasBitmaps(Protocol):
    """A driver of a format that can store bitmaps."""

    @property
    def bitmaps(self) -> BitmapStore | None:
        """None: this image has none."""
        ...


@runtime_checkable
class HasTables(Protocol):
    """A driver that keeps tables of its metadata in memory."""

    @property
    def tables(self) -> Mapping[str, TableCache]:
        """By the kind of table, in the format's words."""
        ...


class FormatDriver(Protocol):
    """One open image of a format. What answers at once raises ImageError where the image is malformed, or where it has
    failed and would be changed; what takes space raises OSError where the file may not grow.
    """

    name: str
    """The format's, as users write it."""
    size: int
    """Virtual size in bytes."""
    cluster_size: int
    """Unit of allocation in bytes; raw 1."""
    unmap_size: int
    """Unit of `unmap` in bytes."""
    sector_size: int
    """Unit of the sizes that the disk can be given, in bytes; raw 1."""
    file: BlockFile
    """The image's own, whatever else it refers to."""

    @property
    def guest_file(self) -> BlockFile:
        """Where the guest's data is stored as it is."""
        ...

    @property
    def is_strained(self) -> bool:
        """Whether so much metadata waits for a flush that one should be made before more is changed."""
        ...

    @property
    def failure(self) -> str | None:
        """Why the mapping is not changed any more; None: it is."""
        ...

    def map(self, offset: int, stop: int) -> Extent | Miss:
        """The extent that holds the guest byte at `offset` (below `size`). It may begin before it and end behind
        `stop`; a driver looks no further than `stop` for where the run ends.
        """
        ...

    def locate(self, offset: int, stop: int) -> int:
        """Where in `guest_file` the guest bytes from `offset` to `stop` are stored; -1: `map` knows. At a fraction of
        its cost, for what most requests are of: data of this image within one cluster whose place is in memory.
        """
        ...

    def place(self, offset: int, stop: int) -> Extent | Miss:
        """As `map`, for a write: if `writable` it goes in place, and then the kind says nothing; else `reserve`."""
        ...

    def reserve(self, offset: int, stop: int) -> Allocation | Miss:
        """Room for a write from `offset` towards `stop`, where `place` says that it does not go in place."""
        ...

    def commit(self, allocation: Allocation) -> None:
        """The space is filled: make it what the guest sees."""
        ...

    def release(self, allocation: Allocation) -> None:
        """Filling the space failed: give it back."""
        ...

    def unmap(self, offset: int, stop: int, to: Unmap) -> int | Miss:
        """Change the mapping of whole units; returns up to where that was done. `offset` itself means that mapping
        cannot do it there, and the caller works in place.
        """
        ...

    def unmapped(self, offset: int, length: int) -> None:
        """The image layer has punched or zeroed the guest range in place: what `map` remembers of it is stale."""
        ...

    def flush_plan(self) -> Plan:
        """What must be written, in order, for everything done so far to be durable."""
        ...

    async def flushed(self) -> None:
        """The last plan is durable: what it freed may be reused. Raises: OSError: not now, but after the next one.
        ImageFailed: what was changed before it is not in it, nor will be.
        """
        ...

    async def close(self) -> None:
        """Leave the file as an orderly end does: called after a last flush when the image is writable, and then the
        files are closed. With an image that failed, only `abandon` is called.
        """
        ...

    async def abandon(self) -> None:
        """Close the files and write nothing."""
        ...
