"""A changed configuration, applied to a running server.

load ──▶ difference ──▶ prepare: open images and sockets ──▶ commit, in one turn ──▶ settle: drain, close, reopen
          │                        │
          └── ConfigError          └── ImageError, ListenError         what was prepared is closed again,
                                                                       and the server is as it was

(R1) Up to the commit nothing that a client can see changes; the commit itself cannot fail.
(R2) Exports, listeners and connections that the difference does not name are not touched.
(R3) An image that an export which leaves holds is tried without its lock while preparing, and opened when it has
     been given back. Should that fail, the old export is opened again, under the new rules: only its clients have
     noticed, and whoever asked for the reload is told. Should that fail too, it is in `Service.unserved`.
     `Service.config` names what is exported, in any case. Clients of an export that was removed earlier, and hidden,
     are made to go when its image is wanted.
(R4) One reload at a time, and none while an operation of `live` runs that adds or removes an export; what is asked for
     meanwhile follows once. Operations on images go on: an image that is to be opened anew is tried when the one on it
     has ended, and closed likewise.
(R5) Exports that were added live are not the file's: they stay, and a file that names one of them is refused.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from nbdimg.config import AdminConfig, ExportConfig, ServerConfig
from nbdimg.errors import ConfigError, ImageError, ListenError, NbdimgError
from nbdimg.export.export import Export
from nbdimg.limits import Limits
from nbdimg.server import sandbox
from nbdimg.server.checks import image_of, named, with_names
from nbdimg.server.credentials import read_token
from nbdimg.server.difference import Difference, adjusted_to, difference
from nbdimg.server.listen import address_of, check_socket_directory
from nbdimg.server.opening import close_exports, open_exports
from nbdimg.server.service import Service
from nbdimg.server.systemd import Notifier
from nbdimg.server.tls import Tls
from nbdimg.storage.workers import workers
from nbdimg.units import counted
from nbdimg.uri import NbdUri

WATCH_INTERVAL_S = 2.0
"""How often a watched file is looked at; the standard library has no inotify, and one stat costs a microsecond. A
change is taken up when it has stayed as it is for so long."""

LASTING = frozenset({"admin", "metrics_address", "log_format"})
"""Fields of ServerConfig that stay what they were at the start."""

Stamp = tuple[str, int, int, int, int, int]

logger = logging.getLogger("nbdimg")


@dataclass(slots=True)
class _Prepared:
    """What is open and not yet to be seen: `ready` now, `later` when the images that leave have been given back.
    `later_names`: of all that these export, their snapshots too. `images`: as `images_of`, of what comes and leaves.
    """

    ready: list[tuple[ExportConfig, list[Export]]]
    later: list[ExportConfig]
    later_names: list[str]
    images: dict[ExportConfig, str]


class Reloader:
    """Applies what `load` returns to a running service.

    Args:
        load: reads the configuration in `path`, and whether to watch it; runs on a worker.
            Raises: NbdimgError, OSError.
        seen: the file's stamp before the service's configuration was read. TLS files are watched likewise.
    """

    def __init__(
        self,
        service: Service,
        load: Callable[[], tuple[ServerConfig, bool]],
        notifier: Notifier,
        path: str,
        *,
        is_watching: bool = False,
        seen: Stamp | None = None,
        watch_interval_s: float = WATCH_INTERVAL_S,
    ) -> None:
        self._service = service
        self._load = load
        self._notifier = notifier
        self._path = path
        self.refusal: str | None = None
        """What the last configuration was refused for, all or a part of it, in a sentence; None: it was not."""
        self.refused_image: str | None = None
        """The path of the image for which it was refused; None: it was for something else."""
        self._is_watching = is_watching
        self._seen = {path: seen, **_stamps(_tls_files(service.config))}
        self._watch_interval_s = watch_interval_s
        self._is_wanted = asyncio.Event()
        self._is_closing = False
        self._worker = asyncio.create_task(self._serve_requests())
        self._watcher = asyncio.create_task(self._watch())

    def request(self) -> None:
        """Reload soon. May be called from a signal's callback."""
        self._is_wanted.set()

    def stop(self) -> None:
        """Begin no further reload. The end of one that is under way is awaited by that of the server."""
        self._is_closing = True
        self._is_wanted.set()
        self._watcher.cancel()

    async def _serve_requests(self) -> None:
        while True:
            await self._is_wanted.wait()
            if self._is_closing or self._service.registry.is_shutting_down:
                return
            self._is_wanted.clear()
            try:
                await self.reload()
            except Exception as error:
                logger.error("internal error while reloading: %r", error)
                logger.debug("the failure's traceback", exc_info=error)

    async def _watch(self) -> None:
        """A file that is away for a moment is not a change; what takes its place is. One that differs from look to look
        is still being written: half of it may be a configuration too, of half the exports.
        """
        last: dict[str, Stamp | None] = {}
        while True:
            await asyncio.sleep(self._watch_interval_s)
            if self._is_watching:
                seen = self._seen
                now = await workers().run(_stamps, list(seen))
                is_changed = any(now[path] not in (None, seen[path]) for path in seen)
                if is_changed and now == last and self._seen is seen:
                    self._seen = {path: now[path] or seen[path] for path in seen}
                    self.request()
                last = now

    async def reload(self) -> bool:
        """Load and apply. False: it was refused, or an image could not be opened again, which the log and the service
        manager were told.
        """
        async with self._service.lock:
            return await self._reload()

    async def _reload(self) -> bool:
        try:
            self._service.check_serving()
            self._notifier.reloading()
            seen = await workers().run(stamp, self._path)
            config, is_watching = await workers().run(self._load)
            self._seen = {self._path: seen, **await workers().run(_stamps, _tls_files(config))}
            found, failures = await self.apply(with_names(config))
        except (NbdimgError, OSError) as error:
            return self._refuse("nothing was reloaded", error)
        self._is_watching = is_watching
        logger.info("%s: %s", "reloaded in part" if failures else "reloaded", found)
        if failures:
            return self._refuse("not all was reloaded", failures[0])
        self.refusal = self.refused_image = None
        self._service.reload_count += 1
        self._tell(status(self._service))
        return True

    def _refuse(self, what: str, error: NbdimgError | OSError) -> Literal[False]:
        self.refusal = f"{what}: {_reason(error)}"
        logger.error("%s", self.refusal)
        self._service.refused_reload_count += 1
        self.refused_image = error.path if isinstance(error, ImageError) else None
        self._tell(f"{status(self._service)}; {self.refusal}")
        return False

    def _tell(self, text: str) -> None:
        """Ready again; not when the server has begun to stop meanwhile, and has said so."""
        if not self._service.registry.is_shutting_down:
            self._notifier.ready(text)

    async def apply(self, new: ServerConfig) -> tuple[Difference, Sequence[NbdimgError | OSError]]:
        """Returns what has changed, and why images that had been in use could not be opened again.

        TLS files are read again whether `new` differs or not: certificates are renewed in place.

        Raises: ConfigError, ImageError, ListenError, OSError: `new` cannot be; nothing has changed.
        """
        service = self._service
        for each in new.exports:
            if each.name in service.live:
                raise ConfigError(f"export {each.name} was added live: remove that one, or give this one another name")
        lasting: dict[str, Any] = {name: getattr(service.config, name) for name in LASTING}
        asked, new = new, replace(new, **lasting)
        tls = await workers().run(self._check, asked, new)
        found = difference(service.config, new)
        prepared = await self._prepare(found, new.limits)
        with service.telling_exposed():
            try:
                service.check_serving()
                self._open_listeners(found)
            except (ConfigError, ListenError):
                await _discard(prepared)
                raise
            if new != asked:
                logger.warning("what is new in [admin], [metrics] and log_format takes a restart")
            leaving = self._commit(found, prepared, new)
        service.server.set_tls(tls)
        return found, await self._settle(found, prepared, leaving)

    def _check(self, asked: ServerConfig, new: ServerConfig) -> Tls | None:
        """On a worker, for it follows paths: what is asked for, and what of that is to be. Returns its TLS.

        Raises: ConfigError, ListenError, OSError.
        """
        self._service.check(asked)
        if asked.admin not in (None, new.admin):
            _check_admin_files(asked.admin)
        sandbox.check(new)
        return None if new.tls is None else Tls(new.tls)

    async def _prepare(self, found: Difference, limits: Limits) -> _Prepared:
        prepared = _Prepared([], [], [], {})
        wanted = (*found.added, *(new for _, new in found.reopened))
        if not wanted:
            return prepared
        hidden = {each.config: each.exports for each in self._service.leaving}
        prepared.images = images = await images_of((*wanted, *hidden, *found.leaving))
        held = {images[config]: exports for config, exports in hidden.items()}
        held |= {images[each]: self._service.exports[named(each)] for each in found.leaving}
        try:
            for each in wanted:
                if images[each] in held:
                    async with held[images[each]][0].upkeep:
                        trial = await open_exports(each, limits, is_trial=True)
                    await close_exports(trial)
                    prepared.later.append(each)
                    prepared.later_names += [export.name for export in trial]
                else:
                    prepared.ready.append((each, await open_exports(each, limits)))
            self._check_names(found, prepared)
        except BaseException:
            await _discard(prepared)
            raise
        return prepared

    def _check_names(self, found: Difference, prepared: _Prepared) -> None:
        """Raises: ConfigError: two exports would have one name, as `a@b` and the snapshot b of a."""
        service = self._service
        leaving = {export.name for each in found.leaving for export in service.exports.get(named(each), [])}
        names = [each.name for each in service.registry if each.name not in leaving]
        names += [export.name for _, exports in prepared.ready for export in exports]
        names += prepared.later_names
        ((name, count),) = Counter(names).most_common(1) or (("", 0),)
        if count > 1:
            raise ConfigError(f"two exports would be named {name!r}, expected each name once")

    def _open_listeners(self, found: Difference) -> None:
        """What takes the address of one that leaves, or its port at another address, takes its place at once.

        Raises: ListenError: all is as it was, but for what `_listen_again` tells of.
        """
        server = self._service.server
        inherited = {address_of(each) for each in self._service.inherited}
        opened: list[NbdUri] = []
        closed: list[NbdUri] = []
        try:
            for uri in found.listeners_added:
                if address_of(uri) in inherited:
                    continue
                for leaving in found.listeners_removed:
                    if _is_in_the_way(leaving, uri) and server.is_listening(leaving):
                        server.unlisten(leaving)
                        closed.append(leaving)
                server.listen(uri)
                opened.append(uri)
        except ListenError:
            for uri in opened:
                server.unlisten(uri)
            for uri in closed:
                self._listen_again(uri)
            raise

    def _listen_again(self, uri: NbdUri) -> None:
        """Where that fails, at an address that the machine no longer has, it is for the next reload to try."""
        service = self._service
        try:
            service.server.listen(uri)
        except ListenError as error:
            logger.error("%s", error)
            others = tuple(each for each in service.config.listeners if each != uri)
            service.config = replace(service.config, listeners=others)

    def _commit(self, found: Difference, prepared: _Prepared, new: ServerConfig) -> list[Export]:
        """Exports out of sight, others in their place. Returns those that leave."""
        service = self._service
        leaving = [export for each in found.leaving for export in service.remove(named(each))]
        for config, exports in prepared.ready:
            service.add(config, exports)
        for _, config in found.adjusted:
            service.adjust(config)
        if found.has_new_limits:
            service.server.set_limits(new.limits)
            for export in service.registry:
                export.info = replace(export.info, payload_max=new.limits.payload_size)
        for uri in found.listeners_removed:
            if service.server.is_listening(uri):
                service.server.unlisten(uri)
        service.config = new
        return leaving

    async def _settle(
        self, found: Difference, prepared: _Prepared, leaving: Sequence[Export]
    ) -> Sequence[NbdimgError | OSError]:
        """Returns why images could not be opened again."""
        server = self._service.server
        adjusted = [export for _, new in found.adjusted for export in self._service.exports[named(new)]]
        await server.dismiss_unwelcome(adjusted)
        wanted = {prepared.images[each] for each in prepared.later}
        hidden = [each for each in self._service.leaving if prepared.images.get(each.config) in wanted]
        self._service.tell_failures(await server.retire(leaving))
        for each in hidden:
            await server.dismiss(self._service.clients_of(each))
            await asyncio.wait((each.closing,))
        failures = {config: failure for config in prepared.later if (failure := await self._add_late(config))}
        if failures:
            await self._restore(failures, found, prepared.images)
        unserved = {named(each): _reason(why) for each, why in failures.items()}
        self._service.unserved = {name: why for name, why in unserved.items() if name not in self._service.exports}
        return list(failures.values())

    async def _restore(
        self, failed: Collection[ExportConfig], found: Difference, images: Mapping[ExportConfig, str]
    ) -> None:
        """The exports that had the images of those that `failed`, as they were but for who may open them, which is as
        it was to be for the image, where nothing took their names.
        """
        service = self._service
        served = tuple(each for each in service.config.exports if each not in failed)
        service.config = replace(service.config, exports=served)
        heirs = {images[each]: each for each in failed}
        for old in found.leaving:
            heir = heirs.get(images[old])
            if heir is None or named(old) in service.exports:
                continue
            restored = adjusted_to(old, heir)
            if not await self._add_late(restored):
                service.config = replace(service.config, exports=(*service.config.exports, restored))

    async def _add_late(self, config: ExportConfig) -> NbdimgError | OSError | None:
        """Returns why not."""
        try:
            await self._service.open(config)
        except (NbdimgError, OSError) as error:
            logger.error("%s could not be opened again: %s", named(config), error)
            return error
        return None


async def images_of(configs: Collection[ExportConfig]) -> dict[ExportConfig, str]:
    """`image_of` each, on a worker, for it follows paths."""
    return await workers().run(lambda: {each: image_of(each) for each in configs})


def _check_admin_files(admin: AdminConfig) -> None:
    """For the next start, which is not in the sandbox of this one.

    Raises: ConfigError, ListenError: as that would, for a token file or a socket's directory.
    """
    if admin.socket_path is not None:
        check_socket_directory(admin.socket_path)
    if admin.token_path is not None:
        try:
            read_token(admin.token_path)
        except ConfigError:
            if sandbox.may_read(admin.token_path) or not os.access(admin.token_path, os.R_OK):
                raise


def _reason(error: NbdimgError | OSError) -> str:
    return str(error) if isinstance(error, NbdimgError) else f"{error.filename}: {error.strerror}"


def _is_in_the_way(leaving: NbdUri, uri: NbdUri) -> bool:
    """Whether both may not be open at once: 0.0.0.0 excludes every other address with its port."""
    if leaving.socket is not None or uri.socket is not None:
        return leaving.socket == uri.socket
    return leaving.port == uri.port


async def _discard(prepared: _Prepared) -> None:
    for _, exports in prepared.ready:
        await close_exports(exports)


def stamp(path: str) -> Stamp | None:
    """What differs when a file was written, exchanged or given another mode, also by way of a symbolic link to its
    directory, as Kubernetes exchanges a ConfigMap's. None: it is not there.
    """
    try:
        real = os.path.realpath(path)
        found = os.stat(real)
    except OSError:
        return None
    return real, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode


def _stamps(paths: Sequence[str]) -> dict[str, Stamp | None]:
    return {path: stamp(path) for path in paths}


def _tls_files(config: ServerConfig) -> list[str]:
    return [] if config.tls is None else config.tls.paths


def status(service: Service) -> str:
    """One line for the service manager."""
    return f"serving {counted(len(service.exports), 'export')}"
