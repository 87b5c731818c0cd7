"""The formats, and the one way to open an image of any of them, with what it refers to."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeVar

from nbdimg.errors import ConfigError, ImageError, ImageLocked, UnrecognizedFormat, UnsupportedFeature
from nbdimg.formats import raw
from nbdimg.formats.gate import ConfinedGate
from nbdimg.formats.keys import Keys, read_key_file
from nbdimg.formats.options import Backing, OpenOptions
from nbdimg.formats.probe import HEAD_SIZE, planted, probe
from nbdimg.formats.qcow2.create import create as qcow2_create
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.formats.qcow2.open import open_driver as qcow2_open
from nbdimg.formats.qcow2.resize import resize as qcow2_resize
from nbdimg.formats.qcow2.snapshots import labels, load_snapshots, mapped_l1_size
from nbdimg.formats.vhdx.create import create as vhdx_create
from nbdimg.formats.vhdx.open import open_driver as vhdx_open
from nbdimg.formats.vhdx.resize import resize as vhdx_resize
from nbdimg.image.driver import FormatDriver
from nbdimg.image.gate import Reference
from nbdimg.image.image import HeadGuard, Image
from nbdimg.storage.file import BlockFile, read
from nbdimg.storage.locks import lock_image
from nbdimg.storage.posix import PosixFile
from nbdimg.storage.workers import workers
from nbdimg.units import align_up

F = TypeVar("F", bound=BlockFile)

DRIVERS: dict[str, Callable[[BlockFile, OpenOptions], Awaitable[FormatDriver]]] = {
    "raw": raw.open_driver,
    "qcow2": qcow2_open,
    "vhdx": vhdx_open,
}
CREATORS: dict[str, Callable[[str, int], object]] = {
    "raw": raw.create,
    "qcow2": qcow2_create,
    "vhdx": vhdx_create,
}


class Resizer(Protocol):
    """See `qcow2.resize.resize`."""

    async def __call__(
        self, image: Image, size: int, *, progress: Callable[[int, int], None] | None = None
    ) -> None: ...


RESIZERS: dict[str, Resizer] = {"raw": raw.resize, "qcow2": qcow2_resize, "vhdx": vhdx_resize}


__all__ = [
    "CREATORS",
    "DRIVERS",
    "check_format",
    "create_image",
    "first_that_opens",
    "open_file",
    "open_image",
    "probed_format",
    "read_key_file",
    "resize_image",
    "size_asked",
    "snapshot_labels",
]


def check_format(name: str | None) -> None:
    """Raises: ConfigError: no driver has this name."""
    if name is not None and name not in DRIVERS:
        raise ConfigError(f"unknown format {name!r}, known are {', '.join(DRIVERS)}")


async def open_image(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    writable: bool = True,
    lock: bool = True,
    roots: Iterable[str | os.PathLike[str]] = (),
    key: bytes | None = None,
    own_keys: Mapping[str, bytes] | None = None,
    snapshot: str | None = None,
    is_keyless: bool = False,
    parent: str | os.PathLike[str] | None = None,
    accepts_lost_log: bool = False,
    asks_for_writing: bool = False,
) -> Image:
    """Open an image and its chain, locked against other users unless `lock` is False.

    Without `format` the file's magic decides; a file without one is raw, and then a write that would plant a magic
    is refused. What the image refers to lies beneath its own directory or one of `roots`. `key` is the passphrase of
    the chain's encrypted images, but for those to which a path in `own_keys` leads; `snapshot` is the id or name of an
    internal one, read-only. With `is_keyless` images open without a key, for those who do not touch the guest's data.
    `parent` is the file to take as the parent of a differencing vhdx image, which may lie anywhere; `accepts_lost_log`
    opens vhdx images whose log is lost, see `vhdx.log.load_active`. `asks_for_writing` refuses what is no image to be
    written to, though `writable` may be False.

    Raises:
        ConfigError: `format` has no driver; a key or the snapshot does not fit; a name in `own_keys` leads to no
            encrypted image of the chain; a parent is given to an image without one.
        ImageLocked: another process uses the image.
        ImageError: it cannot be opened for what it is or refers to.
        OSError: the file cannot be opened or read.
    """
    check_format(format)
    keys = await workers().run(Keys, key, own_keys)
    file = await workers().run(partial(_open_top, path, writable=writable, lock=lock))
    try:
        guard = None
        if format is None:
            format = await probed_format(file)
            guard = HeadGuard(HEAD_SIZE, planted) if format == "raw" and writable else None
        if format != "qcow2":
            keys.check_asked_for(file.path)  # neither it nor what a vhdx image lies over is ever encrypted

        async def check_keys(_: Backing | None) -> None:
            keys.check_asked_for(file.path)

        with await workers().run(partial(ConfinedGate, file, roots=roots, lock=lock)) as gate:
            options = OpenOptions(
                gate,
                writable,
                keys,
                snapshot,
                is_keyless,
                parent_path=None if parent is None else os.fspath(parent),
                accepts_lost_log=accepts_lost_log,
                asks_for_writing=asks_for_writing,
                open_backing=check_keys,
            )
            return await open_file(file, format, options, guard=guard)
    except BaseException:
        await file.close()
        raise


def _open_top(path: str | os.PathLike[str], *, writable: bool, lock: bool) -> PosixFile:
    file = PosixFile(path, writable=writable)
    try:
        if lock:
            lock_image(file.descriptor, file.path, writable=writable)
    except BaseException:
        os.close(file.descriptor)
        raise
    return file


async def open_file(file: BlockFile, format: str, options: OpenOptions, *, guard: HeadGuard | None = None) -> Image:
    """The image in an open file of a named format, and what its chain refers to through the options' gate.

    Raises: as `open_image`; the file is still open then.
    """
    if options.parent_path is not None and format != "vhdx":
        raise ConfigError(f"{file.path}: a parent is given to a {format} image, expected a differencing vhdx image")
    below: list[Image] = []

    async def open_backing(backing: Backing | None) -> None:
        if backing is not None:
            below.append(await _open_backing(backing, options))
        await options.open_backing(backing)

    try:
        driver = await DRIVERS[format](file, replace(options, open_backing=open_backing))
    except BaseException:
        for image in below:
            await image.close()
        raise
    return Image(driver, writable=options.writable, guard=guard, backing=below[0] if below else None)


async def _open_backing(backing: Backing, options: OpenOptions) -> Image:
    """Nothing of a chain is probed: the image says what format its backing image has."""
    reference = backing.references[0]
    if backing.format not in DRIVERS:
        raise UnsupportedFeature(
            reference.owner_path,
            f"{reference.field} {reference.name!r} is of format {backing.format!r}, known are {', '.join(DRIVERS)}",
            reference.offset,
        )
    file = await first_that_opens(backing.references, options.gate.open)
    below = OpenOptions(
        options.gate, keys=options.keys, is_keyless=options.is_keyless, accepts_lost_log=options.accepts_lost_log
    )
    try:
        image = await open_file(file, backing.format, below)
    except BaseException:
        await file.close()
        raise
    try:
        if backing.verify is not None:
            backing.verify(image.driver)
    except BaseException:
        await image.close()
        raise
    return image


async def first_that_opens(references: Sequence[Reference], open: Callable[[Reference], Awaitable[F]]) -> F:
    """The file of the first that `open`, a gate's, gives. Raises: ImageError: it gives none; the first one's reason."""
    refusals: list[ImageError] = []
    for reference in references:
        try:
            return await open(reference)
        except ImageLocked:
            raise
        except ImageError as refusal:
            refusals.append(refusal)
    raise refusals[0]


async def snapshot_labels(image: Image, *, count_max: int, bytes_max: int) -> tuple[dict[str, str], int]:
    """The ids of an open image's latest internal snapshots, for `open_image`, and what to call them, oldest first; and
    how many there are in all. At most `count_max`, whose L1 tables take at most `bytes_max` together.

    Raises: ImageError: their table is malformed. OSError: it cannot be read.
    """
    driver = image.driver
    if not isinstance(driver, Qcow2Driver):
        return {}, 0
    snapshots = await load_snapshots(driver.file, driver.header)
    called = labels(snapshots)
    sizes = {each.id: mapped_l1_size(driver.header, each) for each in reversed(snapshots)}
    latest = list(called)[-count_max:]
    while sum(sizes[each] for each in latest) > bytes_max:
        latest.pop(0)
    return {each: called[each] for each in latest}, len(called)


async def probed_format(file: PosixFile) -> str:
    """By its magic; raw without one. Raises: UnrecognizedFormat: no driver reads it. OSError."""
    name = probe(await read(file, 0, min(HEAD_SIZE, file.size))) or "raw"
    if name not in DRIVERS:
        raise UnrecognizedFormat(
            file.path, f"this is a {name} image, which is not supported; --format raw serves its bytes as they are"
        )
    return name


def create_image(path: str | os.PathLike[str], size: int, *, format: str = "raw") -> None:
    """Make a new, empty image of `size` bytes.

    Raises: ConfigError: `format` has no driver. OSError: the file exists or cannot be made.
    """
    check_format(format)
    CREATORS[format](os.fspath(path), size)


def size_asked(image: Image, size: int, *, is_change: bool) -> int:
    """What an image is to have that is asked for `size` bytes or, with `is_change`, for so many more (fewer, if
    negative) than it has: whole sectors, but for raw images. May be too large.

    Raises: ConfigError: it has fewer.
    """
    if is_change:
        if image.size + size < 0:
            raise ConfigError(f"{image.path}: the image has {image.size} bytes, of which {-size} cannot be taken away")
        size += image.size
    return align_up(size, image.driver.sector_size)


async def resize_image(
    image: Image, size: int, *, may_shrink: bool = False, progress: Callable[[int, int], None] | None = None
) -> None:
    """Give an image that is open for writing, with nothing in flight, another size; durable on return.

    Raises: ConfigError: the size cannot be, or is smaller without `may_shrink`. UnsupportedFeature: the image has what
        keeps its size as it is. ImageError, OSError.
    """
    if size < image.size and not may_shrink:
        raise ConfigError(
            f"{image.path}: the size would go from {image.size} to {size} bytes and lose what lies behind, which takes "
            "--shrink"
        )
    await RESIZERS[image.driver.name](image, size, progress=progress)
