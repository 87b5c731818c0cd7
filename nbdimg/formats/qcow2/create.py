"""Making new images: an order of writing that leaves a whole image or none.

    1  tables, LUKS header, preallocated data, and the header but for its first sector      barrier, in both files
    2  the header's first sector, which no crash can tear                                   barrier, and the directory's

Before 2 the file has no magic and opens as no qcow2 image. What fails or is interrupted removes the files that it
made; a data file that was there before gets its length back.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from io import FileIO

from nbdimg.errors import ConfigError, UnsupportedFeature
from nbdimg.formats.newfile import naming, new_file, write_at
from nbdimg.formats.qcow2 import luks
from nbdimg.formats.qcow2 import structs as s
from nbdimg.formats.qcow2.create_options import CreateOptions, check
from nbdimg.formats.qcow2.layout import PIECE_SIZE, Layout, layout
from nbdimg.storage import system
from nbdimg.storage.locks import lock_image
from nbdimg.units import GiB

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all). What it raises ends the work, and nothing is left of the image."""

RESERVE_SIZE = 1 * GiB
"""Bytes that one call reserves: between calls progress is seen and an interruption is heard."""

_DEFAULTS = CreateOptions()


def create(
    path: str | os.PathLike[str], size: int, options: CreateOptions = _DEFAULTS, *, progress: Progress | None = None
) -> Layout:
    """Make a new image of `size` bytes, rounded up to whole sectors; it is durable when this returns.

    The file must not exist. An external data file is made too; one that exists keeps its content, and must be raw or
    empty for that. The backing file is not opened.

    Raises:
        ConfigError: the options do not go together, or the data file that exists cannot be used.
        UnsupportedFeature: encryption is asked for, and `cryptography` is not installed.
        ImageLocked: the data file is in use.
        OSError: the file exists, there is no space, ...; with the file's name.
    """
    path = os.fspath(path)
    check(size, options)
    if options.backing_name is not None:
        backing_path = os.path.realpath(referred_path(path, options.backing_name))
        if backing_path == os.path.realpath(path):
            raise ConfigError(f"{path}: the backing file is the image itself")
        data_name = options.data_file_name
        if data_name is not None and backing_path == os.path.realpath(referred_path(path, data_name)):
            raise ConfigError(f"{path}: the backing file is the data file as well")
    with ExitStack() as files, ExitStack() as undo:
        image = new_file(path, files, undo)
        luks_header = b"" if options.luks_passphrase is None else luks.create(path, options.luks_passphrase)
        planned = layout(size, options, len(luks_header))
        head = _head(path, planned)
        data_file = None
        if options.data_file_name is not None:
            data_file = _data_file(referred_path(path, options.data_file_name), planned, options, image, files, undo)
        _Writer(image, data_file, planned, options, progress).write(luks_header, head)
        with naming(path):
            system.sync_directory(os.path.dirname(path) or ".")
        undo.pop_all()
    return planned


def write_undurable(image: FileIO, planned: Layout) -> None:
    """A new image with neither data file nor preallocated space into an empty file, without a barrier.

    Raises: OSError.
    """
    image.truncate(planned.file_size)
    for offset, data in planned.pieces():
        write_at(image, offset, data)
    write_at(image, 0, planned.header.to_bytes(str(image.name)).rstrip(b"\0"))


def referred_path(path: str, name: str) -> str:
    """Where a file is that the image at `path` names: a relative name is beside the image."""
    return os.path.join(os.path.dirname(path), name)


def _head(path: str, planned: Layout) -> bytes:
    try:
        return planned.header.to_bytes(path)
    except UnsupportedFeature as error:
        raise ConfigError(str(error)) from None


def _data_file(
    path: str, planned: Layout, options: CreateOptions, image: FileIO, files: ExitStack, undo: ExitStack
) -> FileIO:
    """The data file, new or not, as long as the image's size."""
    size = planned.header.size
    try:
        file = new_file(path, files, undo)
        length = 0
    except FileExistsError:
        file = files.enter_context(FileIO(path, "r+"))
        if os.path.samestat(os.fstat(file.fileno()), os.fstat(image.fileno())):
            raise ConfigError(f"{path}: the data file is the image itself") from None
        if not _is_device(file) and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ConfigError(f"{path}: the data file is neither a regular file nor a block device") from None
        lock_image(file.fileno(), path, writable=True)
        length = file.seek(0, os.SEEK_END)
        _check_existing_data_file(path, file, length, size, options)
    if length < size:
        undo.callback(file.truncate, length)
        with naming(path):
            file.truncate(size)
    return file


def _check_existing_data_file(path: str, file: FileIO, length: int, size: int, options: CreateOptions) -> None:
    """What it holds becomes the guest's, or is never seen; it is not overwritten."""
    is_device = _is_device(file)
    if is_device and length < size:
        raise ConfigError(f"{path}: the device has {length} bytes, the image needs {size}")
    if is_device and options.has_tables and not options.is_data_file_raw and options.preallocation != "full":
        raise ConfigError(
            f"{path}: {options.preallocation} preallocation would show what the device holds, "
            "expected full preallocation or a raw data file"
        )
    if not is_device and length and not options.is_data_file_raw:
        raise ConfigError(f"{path}: the data file has {length} bytes, expected none unless it is raw")
    if not is_device and length > size:
        raise ConfigError(f"{path}: the data file has {length} bytes, the image would have only {size}")
    if length and options.is_data_file_raw and options.preallocation == "full":
        raise ConfigError(f"{path}: full preallocation would overwrite what the data file holds")


def _is_device(file: FileIO) -> bool:
    return stat.S_ISBLK(os.fstat(file.fileno()).st_mode)


class _Writer:
    def __init__(
        self,
        image: FileIO,
        data_file: FileIO | None,
        planned: Layout,
        options: CreateOptions,
        progress: Progress | None,
    ) -> None:
        self._image = image
        self._data_file = data_file
        self._planned = planned
        self._preallocation = options.preallocation
        self._progress = progress
        self._done = 0
        self._total = planned.metadata_length
        if options.preallocation in ("falloc", "full"):
            self._total += planned.file_size + (planned.header.size if data_file else 0)

    def write(self, luks_header: bytes, head: bytes) -> None:
        """Both stages. The space comes first: what is too large fails early, and tables have space of their own too."""
        image, planned = self._image, self._planned
        if self._data_file is not None:
            with naming(str(self._data_file.name)):
                self._preallocate(self._data_file, planned.header.size)
                system.fdatasync(self._data_file.fileno())
        with naming(str(image.name)):
            image.truncate(planned.file_size)
            self._preallocate(image, planned.file_size)
            for offset, data in planned.pieces():
                write_at(image, offset, data)
                self._advance(len(data))
            write_at(image, planned.luks_offset, luks_header)
            write_at(image, s.SECTOR_SIZE, head[s.SECTOR_SIZE :].rstrip(b"\0"))
            system.fdatasync(image.fileno())
            write_at(image, 0, head[: s.SECTOR_SIZE])
            system.fdatasync(image.fileno())

    def _preallocate(self, file: FileIO, length: int) -> None:
        if self._preallocation == "falloc" and not _is_device(file):
            for offset in range(0, length, RESERVE_SIZE):
                here = min(RESERVE_SIZE, length - offset)
                if not system.fallocate(file.fileno(), system.RESERVE, offset, here):
                    raise OSError(
                        errno.EOPNOTSUPP, "the file system cannot reserve space, full preallocation would write zeroes"
                    )
                self._advance(here)
        elif self._preallocation == "full":
            zeroes = memoryview(bytes(PIECE_SIZE))
            for offset in range(0, length, PIECE_SIZE):
                here = min(PIECE_SIZE, length - offset)
                write_at(file, offset, zeroes[:here])
                self._advance(here)

    def _advance(self, length: int) -> None:
        self._done += length
        if self._progress is not None:
            self._progress(self._done, self._total)
