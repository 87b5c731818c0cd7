"""The L1 table in memory, and which pieces of it wait to be written."""

from __future__ import annotations

from array import array

from nbdimg.errors import CorruptImage
from nbdimg.formats.qcow2 import structs as s
from nbdimg.formats.qcow2.packed import encode_offsets
from nbdimg.storage.file import BlockFile
from nbdimg.storage.ordering import Write

L1_PIECE = s.SECTOR_SIZE
"""The L1 table is written in pieces of this."""


class L1Table:
    """The active L1 table, or a snapshot's: host offsets of L2 tables with COPIED flags."""

    def __init__(self, file: BlockFile, offset: int, entries: array[int]) -> None:
        self._file = file
        self.offset = offset
        self.entries = entries
        self.is_moving = False
        """Whether the captured plan writes the table to a new place, where the header is to find it (Q6)."""
        self._has_moved = False
        self._dirty: set[int] = set()
        self._writing: set[int] = set()

    def set(self, index: int, entry: int) -> None:
        """Change one entry; the next plan writes its piece."""
        self.entries[index] = entry
        self._dirty.add(index * 8 // L1_PIECE)

    def move(self, offset: int, entries: array[int]) -> None:
        """The table, with these entries, is at `offset` from the next plan on."""
        self.offset, self.entries = offset, entries
        self._has_moved = True

    @property
    def is_dirty(self) -> bool:
        return bool(self._dirty) or self._has_moved

    def capture(self) -> list[Write]:
        """The writes that make everything durable that has changed; `written` follows when they are."""
        self._writing |= self._dirty
        self._dirty = set()
        self.is_moving |= self._has_moved
        self._has_moved = False
        if self.is_moving:
            return [Write(self._file, self.offset, encode_offsets(self.entries))]
        per_piece = L1_PIECE // 8
        return [
            Write(
                self._file,
                self.offset + piece * L1_PIECE,
                encode_offsets(self.entries[piece * per_piece : (piece + 1) * per_piece]),
            )
            for piece in sorted(self._writing)
        ]

    def written(self) -> None:
        """What `capture` gave is durable."""
        self._writing.clear()
        self.is_moving = False


def check_tables_differ(path: str, entries: array[int]) -> None:
    """Before a walk of all L2 tables of an L1 table: through millions of entries that name one it takes hours, however
    small the file is.

    Raises: CorruptImage: an entry names a table that another one names.
    """
    tables: set[int] = set()
    for index, entry in enumerate(entries):
        offset = entry & s.OFFSET_MASK
        if not offset:
            continue
        if offset in tables:
            raise CorruptImage(
                path, f"L1 entry {index} is {entry:#018x}, expected an L2 table that no entry before it names", offset
            )
        tables.add(offset)
