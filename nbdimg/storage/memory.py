"""A file in memory: for tests, and for images that need none on disk. Its barrier has nothing to do."""

from __future__ import annotations

from nbdimg.storage.file import Buffer


class MemoryFile:
    pages = None

    def __init__(self, content: Buffer = b"", path: str = "memory", *, writable: bool = True) -> None:
        self.path = path
        self.is_writable = writable
        self.content = bytearray(content)

    @property
    def size(self) -> int:
        return len(self.content)

    def try_pread(self, offset: int, view: memoryview) -> bool:
        piece = self.content[offset : offset + len(view)]
        view[: len(piece)] = piece
        view[len(piece) :] = bytes(len(view) - len(piece))
        return True

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        view = memoryview(data)
        if offset > len(self.content):
            self.content.extend(bytes(offset - len(self.content)))
        self.content[offset : offset + len(view)] = view
        return True

    async def pread(self, offset: int, view: memoryview) -> None:
        self.try_pread(offset, view)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        self.try_pwrite(offset, data)

    async def fdatasync(self) -> None:
        pass

    async def punch(self, offset: int, length: int) -> bool:
        return await self.zero(offset, length)

    async def zero(self, offset: int, length: int) -> bool:
        stop = min(offset + length, len(self.content))
        self.content[offset:stop] = bytes(max(0, stop - offset))
        return True

    async def truncate(self, size: int) -> None:
        del self.content[size:]
        self.content.extend(bytes(size - len(self.content)))

    async def prefetch(self, offset: int, length: int) -> None:
        pass

    def try_data_extent(self, offset: int) -> tuple[bool, int]:
        return True, len(self.content)

    async def data_extent(self, offset: int) -> tuple[bool, int]:
        return self.try_data_extent(offset)

    async def close(self) -> None:
        pass
