"""What a file is to the layers above: bytes at offsets, with a barrier.

`try_` methods never wait: they do the work now or say no. The others may wait, on a worker thread or on a remote
engine; a file need not have a descriptor. `OSError` passes through untouched.
"""

from __future__ import annotations

from typing import Protocol

from nbdimg.storage.mapped import Pages

Buffer = bytes | bytearray | memoryview

INLINE_READ_MAX = 1 << 20
"""Bytes; a copy of this size takes about 0.2 ms, which is what clients wait while an image is opened beside them."""


ZERO_WRITE_SIZE = 1 << 20
"""Bytes in one write where zeroes must be written out."""


class BlockFile(Protocol):
    """One file, open. Offsets, lengths and sizes are bytes."""

    path: str
    """For messages."""
    is_writable: bool

    @property
    def size(self) -> int:
        """Bytes in the file; a block device's capacity."""
        ...

    @property
    def pages(self) -> Pages | None:
        """From which bytes can be sent as they lie in memory. None: the file is not what lies there."""
        ...

    def try_pread(self, offset: int, view: memoryview) -> bool:
        """Fill `view` from memory. False: some of it would have to be waited for; `view` is then undefined."""
        ...

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        """Write all of `data` without waiting. False: nothing is known to be written, use `pwrite`."""
        ...

    async def pread(self, offset: int, view: memoryview) -> None:
        """Fill `view`; what lies beyond the end of the file reads as zeroes."""
        ...

    async def pwrite(self, offset: int, data: Buffer) -> None:
        """Write all of `data`. On OSError any part of the range may have changed."""
        ...

    async def fdatasync(self) -> None:
        """The barrier: what was written before the call is durable when it returns."""
        ...

    async def punch(self, offset: int, length: int) -> bool:
        """Give the range's space back; it reads as zeroes then. False: not supported here, nothing was changed."""
        ...

    async def zero(self, offset: int, length: int) -> bool:
        """Make the range read as zeroes and keep its space. False: not supported here, nothing was changed."""
        ...

    async def truncate(self, size: int) -> None:
        """Set the size in bytes."""
        ...

    async def prefetch(self, offset: int, length: int) -> None:
        """Ask for the range to be in memory soon."""
        ...

    def try_data_extent(self, offset: int) -> tuple[bool, int] | None:
        """As `data_extent`. None: it would have to be waited for."""
        ...

    async def data_extent(self, offset: int) -> tuple[bool, int]:
        """Whether the byte at `offset` is backed by data, and where that run ends (at most the file's size)."""
        ...

    async def close(self) -> None:
        """Nothing else is called any more; a second close does nothing."""
        ...


async def fetch(file: BlockFile, offset: int, view: memoryview) -> None:
    """As `pread`, without waiting where that can be: for what opening an image reads, of which most is a few KiB."""
    if len(view) > INLINE_READ_MAX or not file.try_pread(offset, view):
        await file.pread(offset, view)


async def extent_at(file: BlockFile, offset: int) -> tuple[bool, int]:
    """As `data_extent`, without waiting where that can be."""
    return file.try_data_extent(offset) or await file.data_extent(offset)


async def zero(file: BlockFile, start: int, stop: int) -> None:
    """Make the range read as zeroes, by writing them where `BlockFile.zero` does not do it. Raises: OSError."""
    if not await file.zero(start, stop - start):
        for offset in range(start, stop, ZERO_WRITE_SIZE):
            await file.pwrite(offset, bytes(min(ZERO_WRITE_SIZE, stop - offset)))


async def read(file: BlockFile, offset: int, length: int) -> bytes:
    """`length` bytes by `fetch`; they are in memory, so whoever asks has bounded it. Raises: OSError."""
    content = bytearray(length)
    await fetch(file, offset, memoryview(content))
    return bytes(content)
