"""Tables read one after another, at once where they are in memory, while the loop gets its turn between them."""

from __future__ import annotations

from nbdimg.storage.file import BlockFile


class PacedReader:
    """Args: pace: bytes after which a read waits for a worker although it need not."""

    def __init__(self, file: BlockFile, pace: int) -> None:
        self._file = file
        self._pace = pace
        self._unpaused = 0

    async def read(self, offset: int, length: int) -> bytearray:
        """Raises: OSError."""
        content = bytearray(length)
        view = memoryview(content)
        self._unpaused += length
        if self._unpaused >= self._pace or not self._file.try_pread(offset, view):
            self._unpaused = 0
            await self._file.pread(offset, view)
        return content
