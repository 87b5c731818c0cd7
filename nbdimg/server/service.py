"""A configuration brought to life: images opened, exports registered, listeners open; and undone again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from time import time

from nbdimg.config import ExportConfig, ServerConfig
from nbdimg.errors import ConfigError, ImageError, NbdimgError, escaped
from nbdimg.export.export import Export
from nbdimg.export.registry import Registry
from nbdimg.server import sandbox
from nbdimg.server.checks import check_config, check_directories, check_identities, check_listener, named, with_names
from nbdimg.server.connection import Connection
from nbdimg.server.handover import LeftClient, files_of
from nbdimg.server.listen import address_of
from nbdimg.server.opening import close_exports, open_exports, open_snapshot
from nbdimg.server.server import Server, telling_late
from nbdimg.server.systemd import Inherited
from nbdimg.server.terms import as_reached, exposed, terms_of
from nbdimg.server.tls import Tls
from nbdimg.uri import NbdUri

logger = logging.getLogger("nbdimg")


@dataclass(frozen=True, slots=True, eq=False)
class Leaving:
    """An export out of sight, with its snapshots, whose clients are still there. `closing` ends when they have left and
    the images are closed, with what went wrong.
    """

    config: ExportConfig
    is_live: bool
    exports: list[Export]
    closing: asyncio.Task[Sequence[NbdimgError]]


@dataclass(slots=True)
class Service:
    """A running server. `failures`: what went wrong with images at the end.

    `config` is what the server was configured to serve, with a name for each export; `live` is what was added to that
    while it serves. `exports` are those of a name, its snapshots too; `unserved` are the names of others that a reload
    has closed and could not open again, with the reason. `lock`: of who changes which exports or listeners there are;
    snapshots of an export come and go beside it, under `Export.upkeep` of its image.
    `inherited`: listeners that are not of the configuration. `sandbox`: what restricts this process, in a few words.
    `started_s`: seconds since 1970 UTC.
    """

    server: Server
    registry: Registry
    config: ServerConfig
    failures: list[NbdimgError] = field(default_factory=list)
    exports: dict[str, list[Export]] = field(default_factory=dict)
    unserved: dict[str, str] = field(default_factory=dict)
    live: dict[str, ExportConfig] = field(default_factory=dict)
    leaving: list[Leaving] = field(default_factory=list)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    inherited: tuple[NbdUri, ...] = ()
    sandbox: str = field(default_factory=sandbox.summary)
    started_s: float = field(default_factory=time)
    reload_count: int = 0
    refused_reload_count: int = 0
    _retiring: dict[Export, Export] = field(default_factory=dict)
    """By the image's export that of its snapshot which is being deleted."""

    async def drain(self) -> None:
        """Stop accepting, and wait for clients to finish or the drain's deadline."""
        await self.server.drain()

    @property
    def uris(self) -> list[NbdUri]:
        """Each export at each listener, as `Export.asked_as`."""
        return [
            as_reached(uri, self.config, self.registry.terms(each.name), each.asked_as)
            for uri in self.server.listeners
            for each in self.registry
        ]

    def check_serving(self) -> None:
        """Raises: ConfigError: the server stops: what is registered from then on would not be closed."""
        if self.registry.is_shutting_down:
            raise ConfigError("the server stops")

    async def open(self, config: ExportConfig) -> list[Export]:
        """Open and register an export. Raises: as `open_exports`, `add` and `check_serving`; then nothing is open."""
        self.check_serving()
        exports = await open_exports(config, self.config.limits)
        try:
            self.check_serving()
            self.add(config, exports)
        except ConfigError:
            await close_exports(exports)
            raise
        return exports

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
        self.unserved.pop(named(config), None)

    def reload_tls(self) -> None:
        """Read the files of TLS anew. What is wrong with them is logged, and the old ones stay in use."""
        if self.config.tls is None:
            return
        try:
            self.server.set_tls(Tls(self.config.tls))
        except ConfigError as error:
            logger.error("the TLS files were not reloaded: %s", error)
            self.refused_reload_count += 1
        else:
            self.reload_count += 1
            logger.info("the TLS files were reloaded")

    @contextlib.contextmanager
    def telling_exposed(self) -> Iterator[None]:
        """Around what changes exports, listeners or TLS: the log says at which listeners other machines reach exports
        in plain text from then on.
        """
        before = self._exposed()
        yield
        for uri in self._exposed():
            if uri not in before:
                logger.warning("%s: in plain text, anybody on the way can read and change what is transferred", uri)

    def _exposed(self) -> list[NbdUri]:
        return exposed(self.server.listeners, self._with_live(self.config))

    def _with_live(self, config: ServerConfig) -> ServerConfig:
        return replace(config, exports=(*config.exports, *self.live.values()))

    def check(self, config: ServerConfig) -> None:
        """Raises: as `check_config`: it contradicts itself, the exports added live, or the inherited listeners."""
        whole = self._with_live(config)
        check_config(whole)
        check_directories(config.image_directories)
        for uri in self.inherited:
            check_listener(uri, whole)

    def check_added(self, config: ExportConfig) -> None:
        """On a worker, for it follows paths. Raises: ConfigError: a rule needs TLS that is not there, plain text would
        reach it without leave, or it lies where the sandbox does not let it be opened.
        """
        sandbox.check_export(config)
        alone = replace(self.config, exports=(config,))
        check_identities(alone)
        if self.config.tls is not None and self.config.tls.mode == "selective":
            for uri in (*self.config.listeners, *self.inherited):
                check_listener(uri, alone)

    def family(self, base: Export) -> list[Export]:
        """An image's export and those of its snapshots; none when it has left."""
        exports = self.exports.get(base.name, [])
        return exports if base in exports[:1] else []

    async def add_snapshot(self, base: Export, snapshot_id: str, label: str) -> None:
        """Export one more snapshot of the image of `base`, on the terms that this has when it is open.

        Raises: as `open` and `_config_of`; ImageError: another file is at the image's path by now.
        """
        export = await open_snapshot(self._config_of(base), snapshot_id, label, self.config.limits)
        try:
            config = self._config_of(base)
            if files_of(export) != files_of(base):
                raise ImageError(export.image.path, "another file has taken its place since it was opened")
            payload_max = self.config.limits.payload_size
            export.info = replace(export.info, description=config.description, payload_max=payload_max)
            self.registry.add(export, terms_of(config))
        except NbdimgError:
            await close_exports([export])
            raise
        self.family(base).append(export)

    async def retire_snapshot(self, base: Export, snapshot_id: str) -> Export | None:
        """Take a snapshot's export, if it has one, out of sight; its clients drain, and it is closed. What goes wrong
        then is logged. Raises: `_config_of`.
        """
        self._config_of(base)
        export = next((each for each in self.family(base) if each.snapshot_id == snapshot_id), None)
        if export is not None:
            self.family(base).remove(export)
            self.registry.remove(export.name)
            self._retiring[base] = export
            try:
                self.tell_failures(await self.server.retire([export]))
            finally:
                del self._retiring[base]
        return export

    def clients_of(self, leaving: Leaving) -> list[Connection]:
        """Also those of a snapshot that is being deleted, which the image is not closed before."""
        retiring = [self._retiring[each] for each in leaving.exports if each in self._retiring]
        return self.server.clients_of([*leaving.exports, *retiring])

    def _config_of(self, base: Export) -> ExportConfig:
        """Raises: ConfigError: it has left, or the server stops: whoever closes it closes its snapshots as they are."""
        self.check_serving()
        if not self.family(base):
            raise ConfigError(f"the export {escaped(base.name)} was removed meanwhile")
        return self.live.get(base.name) or next(each for each in self.config.exports if each.name == base.name)

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

    def hide(self, name: str) -> Leaving:
        """Take an export out of sight and out of the configuration; it is closed when its clients have left."""
        config = self.live.pop(name, None)
        is_live = config is not None
        if config is None:
            config = next(each for each in self.config.exports if each.name == name)
            others = tuple(each for each in self.config.exports if each is not config)
            self.config = replace(self.config, exports=others)
        exports = self.remove(name)
        leaving = Leaving(config, is_live, exports, asyncio.create_task(self._outlast(exports)))
        self.leaving.append(leaving)
        leaving.closing.add_done_callback(lambda _: self.leaving.remove(leaving))
        return leaving

    async def _outlast(self, exports: Collection[Export]) -> Sequence[NbdimgError]:
        failures = await self.server.outlast(exports)
        self.tell_failures(failures)
        return failures

    def tell_failures(self, failures: Collection[NbdimgError]) -> None:
        """What went wrong with images that were closed: for the log or, once the server stops, part of how it ends."""
        if self.registry.is_shutting_down:
            self.failures.extend(failures)
        else:
            for failure in failures:
                logger.error("%s", failure)


@asynccontextmanager
async def serving(
    config: ServerConfig, inherited: Sequence[Inherited] = (), claim: Callable[[], Collection[LeftClient]] = tuple
) -> AsyncIterator[Service]:
    """Serve until the block ends; then connections are cut, and images flushed and closed.

    Args:
        inherited: sockets that listen already; they take the place of listeners at the same address.
        claim: gives the clients that the server before this one has left; called when nothing else can fail.

    Raises:
        ConfigError: the configuration contradicts itself.
        ImageError: an image cannot be opened.
        ListenError: an address cannot be listened on.
    """
    check_config(config)
    for each in inherited:
        check_listener(each.uri, config)
    check_directories(config.image_directories)
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
            await service.open(export)
        with service.telling_exposed():
            for each in inherited:
                server.adopt(each.socket, each.uri)
            for listener in config.listeners:
                if address_of(listener) not in taken:
                    server.listen(listener)
        await server.take_up(claim())
        yield service
    finally:
        registry.is_shutting_down = True
        server.hasten()  # or who is asked to go meanwhile, by an operation that runs, is given drain_timeout_s anew
        try:
            service.failures.extend(await server.close())
        finally:
            with telling_late("an image is not opened, or one that a reload takes away not closed,"):
                async with service.lock:
                    pass  # what runs under it closes what it has opened: nothing is exported any more
            for leaving in list(service.leaving):
                await leaving.closing
