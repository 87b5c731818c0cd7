"""Overlays: qcow2 images over a golden image that is open already, and that all of them share.

An overlay without a name is unlinked before anything is in it: a crash leaves nothing behind, so nothing is made
durable. One with a name is written under another and durable before it gets its own: it is there whole, or not at all.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from io import FileIO

from nbdimg.errors import ImageError, escaped
from nbdimg.formats.gate import DenyGate
from nbdimg.formats.newfile import naming
from nbdimg.formats.options import Backing, OpenOptions
from nbdimg.formats.qcow2.create import write_undurable
from nbdimg.formats.qcow2.create_options import CreateOptions
from nbdimg.formats.qcow2.layout import layout
from nbdimg.formats.qcow2.open import open_driver
from nbdimg.image.image import Image
from nbdimg.storage import system
from nbdimg.storage.beneath import Root
from nbdimg.storage.locks import lock_image
from nbdimg.storage.posix import PosixFile
from nbdimg.storage.workers import workers

TEMPORARY_PREFIX = ".new-"
"""Of a file that a crash kept from getting its name; no overlay's begins so."""


class _FreshFile(PosixFile):
    """A file that was just written is in memory: opening the image in it takes no worker for each of its tables."""

    async def pread(self, offset: int, view: memoryview) -> None:
        if not self.try_pread(offset, view):
            await super().pread(offset, view)


class Golden:
    """A golden image, open for reading, and the directory of its overlays. `size` is theirs, in bytes: its own,
    rounded up to sectors.

    Args: path: the image's. It must have led to the same file since before `image` was opened.

    Raises: ConfigError: such an overlay cannot be made. OSError.
    """

    def __init__(self, image: Image, path: str, directory: str) -> None:
        self.image = image
        self._directory = directory
        self._path = os.path.realpath(path)
        self._identity = _identity(self._path)
        self._planned = layout(
            image.size, CreateOptions(backing_name=self._reference(), backing_format=image.driver.name)
        )
        self.size = self._planned.header.size
        self._root = Root(directory)

    def _reference(self) -> str:
        """A name beside an overlay stays right when both move; `./` keeps QEMU from seeing a protocol in it."""
        directory, name = os.path.split(self._path)
        if directory != os.path.realpath(self._directory):
            return self._path
        return f"./{name}" if ":" in name else name

    def close(self) -> None:
        """Of the directory; the image is the caller's."""
        self._root.close()

    async def open_unnamed(self, *, size_max: int) -> Image:
        """A new overlay that is gone when it is closed. Args: size_max: of its file, in bytes. Raises: OSError."""
        file = await workers().run(self._make_unnamed)
        return await self._open(file, OpenOptions(DenyGate(), writable=True, file_size_max=size_max))

    def _make_unnamed(self) -> PosixFile:
        with naming(self._directory), tempfile.TemporaryFile(buffering=0, dir=self._directory) as file:
            write_undurable(file, self._planned)
            return _FreshFile(f"overlay of {self._path}", writable=True, descriptor=os.dup(file.fileno()))

    async def open_named(self, name: str, *, size_max: int) -> Image:
        """The overlay in the file `name`, a single component, locked.

        Raises:
            ImageLocked: somebody else uses it.
            ImageError: it is no qcow2 image, or lies over another one.
            OSError: FileNotFoundError: it is not there.
        """
        file = await workers().run(self._open_named, name)

        async def check(backing: Backing | None) -> None:
            await workers().run(self._check_backing, file.path, backing)

        options = OpenOptions(DenyGate(), writable=True, file_size_max=size_max, open_backing=check)
        return await self._open(file, options)

    def _open_named(self, name: str) -> PosixFile:
        with naming(os.path.join(self._directory, name)):
            file = self._root.open(name, writable=True)
        try:
            lock_image(file.descriptor, file.path, writable=True)
        except BaseException:
            os.close(file.descriptor)
            raise
        return file

    async def _open(self, file: PosixFile, options: OpenOptions) -> Image:
        """What it refers to is not opened: the golden image is open, and nothing else is allowed."""
        try:
            driver = await open_driver(file, options)
        except BaseException:
            await file.close()
            raise
        return Image(driver, writable=True, backing=self.image, shares_backing=True)

    def _check_backing(self, path: str, backing: Backing | None) -> None:
        """Raises: ImageError."""
        expected = f"expected {self._path} ({self.image.driver.name})"
        if backing is None:
            raise ImageError(path, f"it has no backing file, {expected}")
        reference = backing.references[0]
        found = None
        with suppress(OSError, ValueError):
            found = _identity(os.path.join(os.path.dirname(path), reference.name))
        if found != self._identity or backing.format != self.image.driver.name:
            name = escaped(reference.name)
            raise ImageError(path, f"its backing file is {name} ({backing.format}), {expected}", reference.offset)

    def count(self, prefix: str) -> int:
        """Files whose names begin with it. Blocks. Raises: OSError."""
        with os.scandir(self._directory) as entries:
            return sum(entry.name.startswith(prefix) for entry in entries)

    def make_named(self, name: str) -> None:
        """The overlay `name`, durable; one that is there already stays. Blocks.

        Raises: ImageError: the golden image's path leads to another file by now. OSError.
        """
        if _identity(self._path) != self._identity:
            raise ImageError(self._path, "it is another file than the one that is served, which takes a reload")
        path = os.path.join(self._directory, name)
        with naming(path):
            descriptor, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=self._directory)
            try:
                with FileIO(descriptor, "r+") as file:
                    write_undurable(file, self._planned)
                    system.fdatasync(file.fileno())
                with suppress(FileExistsError):
                    os.link(temporary, path)
            finally:
                os.unlink(temporary)
            system.sync_directory(self._directory)


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino
