"""Tables read one after another, at once where they are in memory, while the loop gets its turn between them."""

from __future__ import annotations

from nbdimg.storage.file import BlockFile
from nbdimg.units import KiB

PIECE_SIZE = 64 * KiB
"""Tables are read in pieces of this; after each the loop gets its turn. 8192 entries take 1 to 2 ms."""


class PacedReader:
    """After PIECE_SIZE bytes a read waits for a worker although it need not."""

    def __init__(self, file: BlockFile) -> None:
        self._file = file
        self._unpaused = 0

    async def read(self, offset: int, length: int) -> bytearray:
        """Raises: OSError."""
        content = bytearray(length)
        view = memoryview(content)
        self._unpaused += length
        if self._unpaused >= PIECE_SIZE or not self._file.try_pread(offset, view):
            self._unpaused = 0
            await self._file.pread(offset, view)
        return content
