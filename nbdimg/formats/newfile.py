"""A file that is being made: by one call or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO

from nbdimg.storage.file import Buffer
from nbdimg.storage.locks import lock_image


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Calls on a descriptor fail without a name: put it in, for the user's sake."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = path
        raise


def new_file(path: str, files: ExitStack, undo: ExitStack) -> FileIO:
    """A file that was not there, locked as an image that is written; closed by `files`, removed by `undo`.

    Raises: FileExistsError: it was there. ImageLocked. OSError.
    """
    try:
        file = files.enter_context(FileIO(path, "x+"))
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, "the file exists, and no file is ever overwritten", path) from None
    undo.callback(os.unlink, path)
    lock_image(file.fileno(), path, writable=True)
    return file


def write_at(file: FileIO, offset: int, data: Buffer) -> None:
    """All of `data`, from `offset` bytes on. Blocks. Raises: OSError: any part of it may be written."""
    view = memoryview(data)
    file.seek(offset)
    while view:
        view = view[file.write(view) :]
