"""An image's own file, opened by a verb that needs no other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nbdimg.errors import ImageError
from nbdimg.storage.locks import lock_image
from nbdimg.storage.posix import PosixFile


@asynccontextmanager
async def opened(path: str, *, writable: bool) -> AsyncIterator[PosixFile]:
    """Locked against other programs, as what a reader or (`writable`) the only writer has.

    Raises: ImageError: it cannot be opened, or is in use.
    """
    try:
        file = PosixFile(path, writable=writable)
    except OSError as error:
        raise ImageError(path, error.strerror or str(error)) from None
    try:
        lock_image(file.descriptor, file.path, writable=writable)
        yield file
    finally:
        await file.close()
