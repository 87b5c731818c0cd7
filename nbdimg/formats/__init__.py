"""The formats, and the one way to open an image of any of them."""

from __future__ import annotations

import os
from collections.abc import Callable

from nbdimg.errors import ConfigError, UnsupportedFeature
from nbdimg.formats import raw
from nbdimg.formats.probe import HEAD_SIZE, planted, probe
from nbdimg.image.driver import FormatDriver
from nbdimg.image.image import HeadGuard, Image
from nbdimg.storage.file import BlockFile
from nbdimg.storage.locks import lock_image
from nbdimg.storage.posix import PosixFile

DRIVERS: dict[str, Callable[[BlockFile], FormatDriver]] = {"raw": raw.RawDriver}
CREATORS: dict[str, Callable[[str, int], None]] = {"raw": raw.create}


def check_format(name: str | None) -> None:
    """Raises: ConfigError: no driver has this name."""
    if name is not None and name not in DRIVERS:
        raise ConfigError(f"unknown format {name!r}, known are {', '.join(DRIVERS)}")


async def open_image(
    path: str | os.PathLike[str], *, format: str | None = None, writable: bool = True, lock: bool = True
) -> Image:
    """Open an image, locked against other users unless `lock` is False.

    Without `format` the file's magic decides; a file without one is raw, and then a write that would plant a magic
    is refused.

    Raises:
        ConfigError: `format` has no driver.
        ImageLocked: another process uses the image.
        UnsupportedFeature: the magic names a format that has no driver.
        OSError: the file cannot be opened or read.
    """
    check_format(format)
    file = PosixFile(path, writable=writable)
    try:
        if lock:
            lock_image(file.descriptor, file.path, writable=writable)
        guard = None
        if format is None:
            format = await _probed(file)
            guard = HeadGuard(HEAD_SIZE, planted) if format == "raw" and writable else None
        return Image(DRIVERS[format](file), writable=writable, guard=guard)
    except BaseException:
        await file.close()
        raise


async def _probed(file: PosixFile) -> str:
    head = memoryview(bytearray(min(HEAD_SIZE, file.size)))
    await file.pread(0, head)
    name = probe(bytes(head)) or "raw"
    if name not in DRIVERS:
        raise UnsupportedFeature(
            file.path, f"this is a {name} image, which is not supported; --format raw serves its bytes as they are"
        )
    return name


def create_image(path: str | os.PathLike[str], size: int, *, format: str = "raw") -> None:
    """Make a new, empty image of `size` bytes.

    Raises: ConfigError: `format` has no driver. OSError: the file exists or cannot be made.
    """
    check_format(format)
    CREATORS[format](os.fspath(path), size)
