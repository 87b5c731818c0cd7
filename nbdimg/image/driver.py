"""The contract between a format and the image layer.

A driver answers where guest bytes live; it never sees a request, a socket or guest data. Offsets and lengths are
bytes. A method without `async` does no I/O and never suspends: what it lacks, it names in a `Miss`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from nbdimg.storage.file import BlockFile
from nbdimg.storage.ordering import Plan


class ExtentKind(Enum):
    DATA = "data"
    """Stored bytes, in `file` from `file_offset`."""
    ZERO = "zero"
    """Reads as zeroes; with `writable` a write may still go to `file` in place."""


@dataclass(slots=True)
class Extent:
    """A run of guest bytes of one kind, from `offset` for `length` bytes.

    `file_offset` is where the byte at `offset` lies in `file`. With `writable`, a write to these guest bytes goes
    there in place. `depth` counts the files of the chain down to the one that decides: 1 is the image itself.
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


@dataclass(frozen=True, slots=True)
class Miss:
    """A metadata table that is not in memory: `load` it and ask again."""

    file: BlockFile
    offset: int
    length: int


class FormatDriver(Protocol):
    name: str
    size: int
    """Virtual size in bytes."""
    cluster_size: int
    """Unit of allocation in bytes; raw 1."""
    file: BlockFile

    def map(self, offset: int) -> Extent | Miss:
        """The extent that holds the guest byte at `offset` (below `size`). It may begin before it."""
        ...

    def place(self, offset: int) -> Extent | Miss:
        """The extent in which a write to the guest byte at `offset` goes in place; its kind says nothing."""
        ...

    async def load(self, miss: Miss) -> None:
        """Bring in what `map` lacked."""
        ...

    def unmapped(self, offset: int, length: int) -> None:
        """The image layer has punched or zeroed the guest range in place: what `map` remembers of it is stale."""
        ...

    def flush_plan(self) -> Plan:
        """What must be written, in order, for everything done so far to be durable."""
        ...
