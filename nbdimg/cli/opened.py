"""Images as verbs open them, and an image's own file for those that need no other."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from nbdimg.errors import ImageError, UnsupportedFeature
from nbdimg.formats import probed_format
from nbdimg.formats.newfile import naming
from nbdimg.storage.locks import lock_image
from nbdimg.storage.posix import PosixFile


@contextmanager
def opening(path: str) -> Iterator[None]:
    """Raises: ImageError: a file could not be opened or read: `path`, or the one that the error names."""
    try:
        yield
    except OSError as error:
        raise ImageError(str(error.filename or path), error.strerror or str(error)) from None


@asynccontextmanager
async def opened(path: str, *, writable: bool) -> AsyncIterator[PosixFile]:
    """Locked against other programs, as what a reader or (`writable`) the only writer has.

    Raises: ImageError: it cannot be opened, or is in use. OSError: what is done with it failed; it has a name then.
    """
    with opening(path):
        file = PosixFile(path, writable=writable)
    try:
        lock_image(file.descriptor, file.path, writable=writable)
        with naming(path):
            yield file
    finally:
        await file.close()


@asynccontextmanager
async def opened_qcow2(path: str, *, writable: bool, parts: str) -> AsyncIterator[PosixFile]:
    """As `opened`, for verbs that are about `parts` of a qcow2 image. Raises: UnsupportedFeature: it is another one."""
    async with opened(path, writable=writable) as file:
        format = await probed_format(file)
        if format != "qcow2":
            raise UnsupportedFeature(file.path, f"{format} images have no {parts}, qcow2 images do")
        yield file
