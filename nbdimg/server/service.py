"""A configuration brought to life: images opened, exports registered, listeners open; and undone again."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from nbdimg.config import ExportConfig, ServerConfig
from nbdimg.errors import ConfigError, ImageError, NbdimgError
from nbdimg.export.export import Export, default_name
from nbdimg.export.registry import Registry
from nbdimg.formats import open_image, read_key_file, snapshot_names
from nbdimg.image.image import Image
from nbdimg.limits import Limits
from nbdimg.server.listen import address_of
from nbdimg.server.server import Server
from nbdimg.server.systemd import Inherited
from nbdimg.server.terms import as_reached, check_identities, check_listener, terms_of
from nbdimg.server.tls import Tls
from nbdimg.uri import NbdUri

SNAPSHOT_EXPORTS_MAX = 64
"""Snapshots of one image that are exported beside it, the latest ones: each costs a descriptor and an L1 table."""

logger = logging.getLogger("nbdimg")


@dataclass(slots=True)
class Service:
    """A running server. `uris` name each export at each listener; `failures` what went wrong with images at the end.

    `config` has a name for each export; `exports` are those of a name, its snapshots too. `inherited`: listeners
    that are not of the configuration.
    """

    server: Server
    registry: Registry
    config: ServerConfig
    uris: list[NbdUri] = field(default_factory=list)
    failures: list[NbdimgError | OSError] = field(default_factory=list)
    exports: dict[str, list[Export]] = field(default_factory=dict)
    inherited: tuple[NbdUri, ...] = ()

    async def drain(self) -> None:
        """Stop accepting, and wait for clients to finish or the drain's deadline."""
        await self.server.drain()

    def add(self, config: ExportConfig, exports: list[Export]) -> None:
        """Register what `open_exports` gave. Raises: ConfigError: a name is taken; then none is registered."""
        added: list[Export] = []
        try:
            for export in exports:
                self.registry.add(export, terms_of(config))
                added.append(export)
        except ConfigError:
            for export in added:
                self.registry.remove(export.name)
            raise
        self.exports[named(config)] = exports

    def reload_tls(self) -> None:
        """Read the files of TLS anew. What is wrong with them is logged, and the old ones stay in use."""
        if self.config.tls is None:
            return
        try:
            self.server.set_tls(Tls(self.config.tls))
        except ConfigError as error:
            logger.error("the TLS files were not reloaded: %s", error)
        else:
            logger.info("the TLS files were reloaded")

    def announce(self, uri: NbdUri) -> None:
        """A listener is open."""
        self.uris.extend(
            as_reached(uri, self.config, self.registry.terms(each.name), each.name) for each in self.registry
        )

    def adjust(self, config: ExportConfig) -> None:
        """What of an export can be another while its image is open."""
        for export in self.exports[named(config)]:
            export.info = replace(export.info, description=config.description)
            self.registry.set_terms(export.name, terms_of(config))

    def remove(self, name: str) -> list[Export]:
        """Take an export and its snapshots out of sight; `Server.retire` must follow."""
        exports = self.exports.pop(name)
        for export in exports:
            self.registry.remove(export.name)
        return exports


@asynccontextmanager
async def serving(config: ServerConfig, inherited: Sequence[Inherited] = ()) -> AsyncIterator[Service]:
    """Serve until the block ends; then connections are cut, and images flushed and closed.

    Args: inherited: sockets that listen already; they take the place of listeners at the same address.

    Raises:
        ConfigError: the configuration contradicts itself.
        ImageError: an image cannot be opened.
        ListenError: an address cannot be listened on.
    """
    check_config(config)
    for each in inherited:
        check_listener(each.uri, config)
    taken = {address_of(each.uri) for each in inherited}
    tls = None if config.tls is None else Tls(config.tls)
    config = with_names(config)
    registry = Registry()
    server = Server(registry, config.limits)
    server.set_tls(tls)
    service = Service(server, registry, config)
    service.inherited = tuple(each.uri for each in inherited)
    try:
        for export in config.exports:
            exports = await open_exports(export, config.limits)
            try:
                service.add(export, exports)
            except ConfigError:
                await close_exports(exports)
                raise
        for each in inherited:
            server.adopt(each.socket, each.uri)
            service.announce(each.uri)
        for listener in config.listeners:
            if address_of(listener) not in taken:
                service.announce(server.listen(listener))
        yield service
    finally:
        service.failures.extend(await server.close())


def check_config(config: ServerConfig) -> None:
    """Raises: ConfigError: the configuration contradicts itself."""
    for uri in config.listeners:
        check_listener(uri, config)
    check_identities(config)


def with_names(config: ServerConfig) -> ServerConfig:
    """The same with a name for each export."""
    taken = [export.name for export in config.exports if export.name]
    exports: list[ExportConfig] = []
    for export in config.exports:
        name = export.name or default_name(export.path, taken)
        taken.append(name)
        exports.append(replace(export, name=name))
    return replace(config, exports=tuple(exports))


def named(config: ExportConfig) -> str:
    """The name that `with_names` has made sure of."""
    assert config.name is not None
    return config.name


async def open_exports(config: ExportConfig, limits: Limits, *, is_trial: bool = False) -> list[Export]:
    """An image, and each of its internal snapshots as NAME@SNAPSHOT.

    Args: is_trial: open it as far as that goes while another export writes to it: neither locked nor for writing.

    Raises: ConfigError, ImageError. OSError: the key file cannot be read.
    """
    exports: list[Export] = []
    key = read_key_file(config.key_path) if config.key_path is not None else None
    try:
        await _open_all(exports, config, limits, key, is_trial=is_trial)
    except BaseException as error:
        await close_exports(exports)
        if isinstance(error, OSError):
            raise ImageError(config.path, error.strerror or str(error)) from None
        raise
    return exports


async def close_exports(exports: Sequence[Export]) -> None:
    """Of exports that nobody has used: nothing is to be flushed, so nothing goes wrong."""
    for export in exports:
        with contextlib.suppress(NbdimgError, OSError):
            await export.close()


async def _open_all(
    exports: list[Export], config: ExportConfig, limits: Limits, key: bytes | None, *, is_trial: bool
) -> None:
    name = named(config)
    image = await open_image(
        config.path,
        format=config.format,
        writable=not (config.is_read_only or is_trial),
        lock=not is_trial,
        roots=config.roots,
        key=key,
    )
    exports.append(await _export(name, image, config, limits))
    snapshots = [] if config.format == "raw" else await snapshot_names(config.path)
    if len(snapshots) > SNAPSHOT_EXPORTS_MAX:
        logger.warning("%s: %d of %d snapshots are exported", name, SNAPSHOT_EXPORTS_MAX, len(snapshots))
    for snapshot in snapshots[-SNAPSHOT_EXPORTS_MAX:]:
        image = await open_image(
            config.path, format="qcow2", writable=False, lock=False, roots=config.roots, key=key, snapshot=snapshot
        )
        exports.append(await _export(f"{name}@{snapshot}", image, config, limits, is_snapshot=True))


async def _export(
    name: str, image: Image, config: ExportConfig, limits: Limits, *, is_snapshot: bool = False
) -> Export:
    try:
        export = Export(
            name,
            image,
            description=config.description,
            block_size_min=config.block_size_min,
            payload_max=limits.payload_size,
            is_snapshot=is_snapshot,
        )
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
    return export
