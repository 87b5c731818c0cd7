"""A configuration brought to life: images opened, exports registered, listeners open; and undone again."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from nbdimg.config import ExportConfig, ServerConfig
from nbdimg.errors import ConfigError, ImageError, NbdimgError
from nbdimg.export.export import Export, default_name
from nbdimg.export.registry import Registry
from nbdimg.formats import open_image, read_key_file, snapshot_names
from nbdimg.image.image import Image
from nbdimg.limits import Limits
from nbdimg.server.listen import check_exposure
from nbdimg.server.server import Server
from nbdimg.uri import NbdUri

SNAPSHOT_EXPORTS_MAX = 64
"""Snapshots of one image that are exported beside it, the latest ones: each costs a descriptor and an L1 table."""

logger = logging.getLogger("nbdimg")


@dataclass(slots=True)
class Service:
    """A running server. `uris` name each export at each listener; `failures` what went wrong with images at the end."""

    server: Server
    uris: list[NbdUri]
    failures: list[NbdimgError | OSError]

    async def drain(self) -> None:
        """Stop accepting, and wait for clients to finish or the drain's deadline."""
        await self.server.drain()


@asynccontextmanager
async def serving(config: ServerConfig) -> AsyncIterator[Service]:
    """Serve until the block ends; then connections are cut, and images flushed and closed.

    Raises:
        ConfigError: the configuration contradicts itself.
        ImageError: an image cannot be opened.
        ListenError: an address cannot be listened on.
    """
    for uri in config.listeners:
        if uri.is_tls:
            raise ConfigError(f"{uri}: TLS is not available, listen with {str(uri).replace('nbds', 'nbd', 1)}")
        check_exposure(uri, is_allowed=config.allows_plaintext)
    registry = Registry()
    server = Server(registry, config.limits)
    service = Service(server, [], [])
    try:
        taken = [export.name for export in config.exports if export.name]
        for export in config.exports:
            name = export.name or default_name(export.path, taken)
            taken.append(name)
            await _add_all(registry, name, export, config.limits)
        for listener in config.listeners:
            actual = server.listen(listener)
            service.uris.extend(replace(actual, name=export.name) for export in registry)
        yield service
    finally:
        service.failures.extend(await server.close())


async def _add_all(registry: Registry, name: str, config: ExportConfig, limits: Limits) -> None:
    """An image, and each of its internal snapshots as NAME@SNAPSHOT."""
    key = read_key_file(config.key_path) if config.key_path is not None else None
    try:
        image = await open_image(
            config.path, format=config.format, writable=not config.is_read_only, roots=config.roots, key=key
        )
        snapshots = [] if config.format == "raw" else await snapshot_names(config.path)
    except OSError as error:
        raise ImageError(config.path, error.strerror or str(error)) from None
    await _add(registry, name, image, config, limits)
    if len(snapshots) > SNAPSHOT_EXPORTS_MAX:
        logger.warning("%s: %d of %d snapshots are exported", name, SNAPSHOT_EXPORTS_MAX, len(snapshots))
    for snapshot in snapshots[-SNAPSHOT_EXPORTS_MAX:]:
        image = await open_image(
            config.path, format="qcow2", writable=False, lock=False, roots=config.roots, key=key, snapshot=snapshot
        )
        await _add(registry, f"{name}@{snapshot}", image, config, limits, is_snapshot=True)


async def _add(
    registry: Registry, name: str, image: Image, config: ExportConfig, limits: Limits, *, is_snapshot: bool = False
) -> None:
    try:
        export = Export(
            name,
            image,
            description=config.description,
            block_size_min=config.block_size_min,
            payload_max=limits.payload_size,
            is_snapshot=is_snapshot,
        )
        registry.add(export)
    except BaseException:
        await image.close()
        raise
    if export.info.size < image.size:
        logger.warning(
            "%s: the last %d bytes are not served, they do not fill a block of %d",
            name,
            image.size - export.info.size,
            config.block_size_min,
        )
