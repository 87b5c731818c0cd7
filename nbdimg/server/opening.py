"""The image of a configured export opened, with those of its internal snapshots."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from nbdimg.config import ExportConfig
from nbdimg.errors import ConfigError, ImageError, NbdimgError, escaped
from nbdimg.export.export import Export
from nbdimg.formats import open_image, read_key_file, snapshot_labels
from nbdimg.image.image import Image
from nbdimg.limits import Limits
from nbdimg.server import sandbox
from nbdimg.server.checks import named
from nbdimg.server.overlays import lend_overlays
from nbdimg.storage.workers import workers
from nbdimg.units import MiB, counted

SNAPSHOT_EXPORTS_MAX = 64
"""Snapshots of one image that are exported beside it, the latest ones: each costs a descriptor and an L1 table."""

SNAPSHOT_TABLES_MAX = 64 * MiB
"""Bytes of the L1 tables of those that are exported when an image is opened: 64 of 64 TiB at 64 KiB clusters."""

Opener = Callable[..., Awaitable[Image]]

logger = logging.getLogger("nbdimg")


async def open_exports(config: ExportConfig, limits: Limits, *, is_trial: bool = False) -> list[Export]:
    """An image, and each of its internal snapshots as NAME@SNAPSHOT, but for one that overlays lie over.

    Args: is_trial: open it as far as that goes while another export writes to it: neither locked nor for writing.

    Raises: ConfigError, ImageError.
    """
    exports: list[Export] = []
    opener = await _opener(config)
    try:
        await _open_all(exports, config, limits, opener, is_trial=is_trial)
    except BaseException as error:
        await close_exports(exports)
        if isinstance(error, OSError):
            raise await _unopened(config, error) from None
        raise
    return exports


async def _opener(config: ExportConfig) -> Opener:
    """`open_image` with what the image and its snapshots have in common. Raises: as `read_key_file`."""
    read = partial(workers().run, read_key_file)
    key = None if config.key_path is None else await read(config.key_path)
    own_keys = {image: await read(path) for image, path in config.key_paths}
    return partial(open_image, config.path, roots=config.roots, key=key, own_keys=own_keys)


async def _unopened(config: ExportConfig, error: OSError) -> ImageError:
    path = str(error.filename or config.path)
    ask = partial(sandbox.reason, error, path, for_writing=not config.only_reads_image)
    return ImageError(path, await workers().run(ask))


async def close_exports(exports: Sequence[Export]) -> None:
    """Of exports that nobody has used: nothing is to be flushed, so nothing goes wrong."""
    for export in exports:
        with contextlib.suppress(NbdimgError, OSError):
            await export.close()


async def _open_all(
    exports: list[Export], config: ExportConfig, limits: Limits, opener: Opener, *, is_trial: bool
) -> None:
    name = named(config)
    image = await opener(
        format=config.format,
        writable=not (config.only_reads_image or is_trial),
        asks_for_writing=not config.only_reads_image,
        lock=not is_trial,
        parent=config.parent_path,
        accepts_lost_log=config.accepts_lost_log,
    )
    exports.append(await _export(name, image, config, limits))
    if config.overlay is not None:
        await lend_overlays(exports[0], config)
        return
    labels, count = await snapshot_labels(image, count_max=SNAPSHOT_EXPORTS_MAX, bytes_max=SNAPSHOT_TABLES_MAX)
    if len(labels) < count:
        logger.warning("%s: of %s %d are exported", name, counted(count, "snapshot"), len(labels))
    for snapshot_id, label in labels.items():
        try:
            exports.append(await _open_snapshot(config, snapshot_id, label, limits, opener))
        except ConfigError as error:
            logger.warning("snapshot %s of %s is not exported: %s", escaped(label), escaped(name), error)


async def open_snapshot(config: ExportConfig, snapshot_id: str, label: str, limits: Limits) -> Export:
    """An internal snapshot as NAME@LABEL, of an image that is open already. Raises: as `open_exports`."""
    opener = await _opener(config)
    try:
        return await _open_snapshot(config, snapshot_id, label, limits, opener)
    except OSError as error:
        raise await _unopened(config, error) from None


async def _open_snapshot(config: ExportConfig, snapshot_id: str, label: str, limits: Limits, opener: Opener) -> Export:
    image = await opener(format="qcow2", writable=False, lock=False, snapshot=snapshot_id)
    return await _export(f"{named(config)}@{label}", image, config, limits, snapshot_id=snapshot_id)


async def _export(
    name: str, image: Image, config: ExportConfig, limits: Limits, *, snapshot_id: str | None = None
) -> Export:
    try:
        export = Export(
            name,
            image,
            description=config.description,
            block_size_min=config.block_size_min,
            payload_max=limits.payload_size,
            snapshot_id=snapshot_id,
        )
    except BaseException:
        await image.close()
        raise
    if export.info.size < image.size:
        logger.warning(
            "%s: the last %s not served, less than a block of %d",
            name,
            counted(image.size - export.info.size, "byte is", "bytes are"),
            config.block_size_min,
        )
    return export
