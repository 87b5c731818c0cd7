"""A running server's exports and clients, looked at and changed while it serves.

What changes which exports there are runs alone: one lock holds that and reloads apart. What waits for clients does not
hold it, so that another operation can cut short what a slow client delays. Operations on one image take turns too, by a
lock of its export that whoever closes it takes as well; storage that hangs under one image holds up no other. So an
export may have left when an operation on it ends: it is looked at again behind each await. An operation runs to its end
also when its caller is cancelled.

The file's exports and those added live are kept apart. A reload makes the file's exports be as the file says, and one
that was removed live comes back; it never touches exports that were added live, and refuses a file that names one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence, Set
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

from nbdimg.config import ExportConfig
from nbdimg.errors import ConfigError, ImageFailed, ImageLocked, NbdimgError, NotThere, UnsupportedFeature, escaped
from nbdimg.export.export import Export, default_name
from nbdimg.formats import resize_image, size_asked
from nbdimg.formats.newfile import naming
from nbdimg.formats.qcow2.bitmap_edit import BitmapAction
from nbdimg.formats.qcow2.bitmap_live import change_bitmaps, prepare
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.formats.qcow2.snapshot_changes import create_snapshot, delete_snapshot
from nbdimg.formats.qcow2.snapshots import Snapshot, find_snapshot, load_snapshots
from nbdimg.server.checks import named
from nbdimg.server.connection import Connection
from nbdimg.server.opening import SNAPSHOT_EXPORTS_MAX
from nbdimg.server.reload import Reloader, images_of
from nbdimg.server.service import Leaving, Service
from nbdimg.server.states import (
    BitmapState,
    ClientState,
    ExportState,
    SnapshotState,
    bitmap_state,
    client_state,
    export_state,
    snapshot_state,
)
from nbdimg.storage.workers import workers
from nbdimg.wire.constants import DIRTY_BITMAP

T = TypeVar("T")

NAMES_MAX = 5
"""Names in a message that says which there are."""

logger = logging.getLogger("nbdimg")

RemoveMode = Literal["hide", "drain", "hard"]
"""What becomes of the clients of an export that leaves; see `Control.remove`."""


class Control:
    """Operations on a running service. `reloader` None: it was started without a configuration file.

    Each raises NotThere for a name that is not there, naming some that are, and ConfigError while the server stops.
    """

    def __init__(self, service: Service, reloader: Reloader | None) -> None:
        self._service = service
        self._reloader = reloader
        self._running: set[asyncio.Task[Any]] = set()

    def exports(self) -> list[ExportState]:
        """All, in order of appearance; hidden ones last."""
        clients: dict[Export, list[Connection]] = {}
        for connection in self._service.server.connections:
            if connection.export is not None:
                clients.setdefault(connection.export, []).append(connection)
        return [
            export_state(export, clients.get(export, []), is_live=is_live, is_hidden=is_hidden)
            for export, is_live, is_hidden in self._known()
        ]

    def _known(self) -> Iterator[tuple[Export, bool, bool]]:
        """Each export, whether it was added live, and whether it is hidden."""
        service = self._service
        for name, exports in service.exports.items():
            for export in exports:
                yield export, name in service.live, False
        for leaving in service.leaving:
            for export in leaving.exports:
                yield export, leaving.is_live, True

    @property
    def unserved(self) -> Mapping[str, str]:
        """Exports that a reload has closed and could not open again, by name, and why."""
        return self._service.unserved

    def export(self, name: str) -> ExportState:
        """The visible one of this name, else the hidden one."""
        for export, _, _ in self._known():
            if export.name == name:
                return self._state(export)
        raise self._unknown(name)

    async def settled(self, name: str) -> ExportState:
        """As `export`; of one that a reload opens anew, when that is over."""
        if self._leaving(name) is None:
            await self._see_back(name)
        return self.export(name)

    def _state(self, export: Export) -> ExportState:
        """Also of one that a reload has just taken away."""
        known = ((is_live, is_hidden) for each, is_live, is_hidden in self._known() if each is export)
        is_live, is_hidden = next(known, (False, True))
        clients = self._service.server.clients_of([export])
        return export_state(export, clients, is_live=is_live, is_hidden=is_hidden)

    def clients(self, export: str | None = None) -> list[ClientState]:
        """All, or those of one export, the longest connected first."""
        if export is not None:
            self.export(export)
        now_s = asyncio.get_running_loop().time()
        found = [client_state(each, now_s) for each in self._service.server.connections]
        return [each for each in found if export is None or each.export == export]

    # Exports and clients come and go

    async def add(self, config: ExportConfig) -> list[str]:
        """Open an image and export it, with its snapshots; returns their names. Without a name it gets one.

        Raises: ConfigError: a name is taken, a rule needs TLS that is not there, the image is still open for clients
            of an export that was removed. ImageError: it cannot be opened. OSError: its key file cannot be read.
        """
        return await self._to_the_end(self._locked(self._add(config)))

    async def _add(self, config: ExportConfig) -> list[str]:
        service = self._service
        name = config.name or default_name(config.path, service.exports)
        self._check_free(name)
        config = replace(config, name=name)
        await workers().run(service.check_added, config)
        try:
            exports = await service.open(config)
        except ImageLocked:
            images = await images_of((config, *(each.config for each in service.leaving)))
            holder = next((each for each in service.leaving if images[each.config] == images[config]), None)
            if holder is None:
                raise
            raise ConfigError(
                f"{config.path} is still open for clients of {escaped(named(holder.config))}, which was removed: "
                "remove that again with drain or hard"
            ) from None
        with service.telling_exposed():
            service.live[name] = config
        logger.info("export %s was added: %s", escaped(name), config.path)
        return [each.name for each in exports]

    async def remove(self, name: str, mode: RemoveMode) -> None:
        """Take an export out of sight at once, with its snapshots. A snapshot cannot be removed alone.

        hide    who is connected goes on as before; when the last one has left, the images are closed, in the background
        drain   what clients have asked is answered, then their connections end, after `drain_timeout_s` at the latest;
                returns when the images are closed
        hard    connections are cut; returns when the images are closed

        A hidden export can be removed again with "drain" or "hard", one that drains with "hard". An export of the
        file comes back with the next reload.

        Raises: ImageError, OSError: a flush failed at the end; the export is gone all the same.
        """
        await self._to_the_end(self._remove(name, mode))

    async def _remove(self, name: str, mode: RemoveMode) -> None:
        leaving = self._leaving(name)
        if leaving is None:
            leaving = await self._locked(self._hide(name, mode))
        if mode != "hide":
            await self._see_off(leaving, is_hard=mode == "hard")

    def _leaving(self, name: str) -> Leaving | None:
        """What was removed under a name that is not visible."""
        if name in self._service.exports:
            return None
        return next((each for each in reversed(self._service.leaving) if each.config.name == name), None)

    async def _hide(self, name: str, mode: RemoveMode) -> Leaving:
        """Another removal may have been faster."""
        leaving = self._leaving(name)
        if leaving is not None:
            return leaving
        if name not in self._service.exports:
            snapshot = self._visible(name)
            raise ConfigError(f"{escaped(snapshot.name)} is a snapshot, which is removed with its image or deleted")
        logger.info("export %s was removed: %s", escaped(name), mode)
        return self._service.hide(name)

    async def _see_off(self, leaving: Leaving, *, is_hard: bool) -> None:
        service = self._service
        await service.server.dismiss(service.clients_of(leaving), is_hard=is_hard)
        failures = await asyncio.shield(leaving.closing)
        if failures:
            raise failures[0]

    async def disconnect(self, client_id: int, hard: bool = False) -> None:
        """Make one client go: as `remove` with "drain" or, with `hard`, at once. It may connect again.

        Raises: NotThere: no client has this id.
        """
        server = self._service.server
        found = [each for each in server.connections if each.number == client_id]
        if not found:
            raise NotThere(f"there is no client {client_id}")
        logger.info("%s: disconnected on request", found[0].peer)
        await self._to_the_end(server.dismiss(found, is_hard=hard))

    # An image changes

    async def resize(self, name: str, size: int, *, is_change: bool = False, shrink: bool = False) -> ExportState:
        """Give an export's disk another size in bytes, durably; with `is_change`, so many bytes more than it has when
        its turn comes, or fewer. Rounded up to whole sectors, but for raw images. Requests wait meanwhile.

        NBD has no word for it: clients that connect see the new size, those that are connected may use it from now on.
        Behind a smaller end writes get ENOSPC, other requests EINVAL, also those that waited.

        Raises: ConfigError: it is smaller and `shrink` is not given, it cannot be, the export is read-only or a
            snapshot. UnsupportedFeature, ImageError, OSError: the size is the old one, unless the message says another.
        """
        return await self._on_image(name, partial(self._resize, size=size, is_change=is_change, shrink=shrink))

    async def _resize(self, export: Export, *, size: int, is_change: bool, shrink: bool) -> ExportState:
        _check_changeable(export)
        name = export.name
        old = export.image.size
        size = size_asked(export.image, size, is_change=is_change)
        if size == 0:
            raise ConfigError(f"{escaped(name)}: the size would go from {old} to 0 bytes, expected some to be left")
        if size < old and not shrink:
            raise ConfigError(
                f"{escaped(name)}: the size would go from {old} to {size} bytes and lose what lies behind, which takes "
                "shrink"
            )
        try:
            async with _overhaul(export):
                await resize_image(export.image, size, may_shrink=shrink)
        finally:
            if export.image.size != old:
                logger.info("export %s was resized from %d to %d bytes", escaped(name), old, export.image.size)
        return self._state(export)

    async def snapshots(self, name: str) -> list[SnapshotState]:
        """An image's snapshots, oldest first; of a format without them, none. Raises: ImageError, OSError."""
        return await self._on_image(name, self._snapshots)

    async def _snapshots(self, export: Export) -> list[SnapshotState]:
        driver = export.image.driver
        if not isinstance(driver, Qcow2Driver):
            return []
        found = await load_snapshots(driver.file, driver.header)
        return [self._snapshot_state(export, each, driver.size) for each in found]

    async def snapshot_create(self, name: str, tag: str) -> SnapshotState:
        """Keep an export's disk as it is now under `tag`, durably, and export that as NAME@TAG. Requests wait
        meanwhile.

        Raises: ConfigError: the tag is taken or cannot be one, the export is read-only or a snapshot.
            UnsupportedFeature: the format has no snapshots. ImageError, OSError.
        """
        return await self._on_image(name, partial(self._snapshot_create, tag=tag))

    async def _snapshot_create(self, export: Export, *, tag: str) -> SnapshotState:
        _check_changeable(export)
        driver = _qcow2_driver(export, "snapshots")
        self._check_free(f"{export.name}@{tag}")
        async with _overhaul(export):
            made = await create_snapshot(driver, tag, now_ns=time.time_ns())
        logger.info("export %s: snapshot %s was made", escaped(export.name), escaped(tag))
        await self._export_snapshot(export, made.id, tag)
        return self._snapshot_state(export, made, driver.size)

    async def snapshot_delete(self, name: str, tag: str) -> None:
        """Forget a snapshot by its id or name. Its export is removed first, its clients drain.

        Raises: ConfigError: there is no such snapshot; else as `snapshot_create`.
        """
        await self._on_image(name, partial(self._snapshot_delete, tag=tag))

    async def _snapshot_delete(self, export: Export, *, tag: str) -> None:
        _check_changeable(export)
        driver = _qcow2_driver(export, "snapshots")
        service = self._service
        snapshot = find_snapshot(driver.file.path, await load_snapshots(driver.file, driver.header), tag)
        exported = await service.retire_snapshot(export, snapshot.id)
        try:
            async with _overhaul(export):
                await delete_snapshot(driver, snapshot.id)
        except BaseException:
            if exported is not None:
                await self._export_snapshot(export, snapshot.id, exported.name.removeprefix(f"{export.name}@"))
            raise
        logger.info("export %s: snapshot %s was deleted", escaped(export.name), escaped(tag))

    async def _export_snapshot(self, export: Export, snapshot_id: str, label: str) -> None:
        """What hinders that is logged: the snapshot itself is there."""
        service, name = self._service, escaped(export.name)
        if sum(each.is_snapshot for each in service.family(export)) >= SNAPSHOT_EXPORTS_MAX:
            logger.warning("%s: %d snapshots are exported, and not one more", name, SNAPSHOT_EXPORTS_MAX)
            return
        try:
            await service.add_snapshot(export, snapshot_id, label)
        except (NbdimgError, OSError) as error:
            logger.error("snapshot %s of %s is not exported: %s", escaped(label), name, error)

    async def bitmaps(self, name: str) -> list[BitmapState]:
        """An image's dirty bitmaps; of a format without them, none."""
        return await self._on_image(name, self._bitmaps)

    async def _bitmaps(self, export: Export) -> list[BitmapState]:
        driver = export.image.driver
        if not isinstance(driver, Qcow2Driver) or driver.bitmaps is None:
            return []
        return [bitmap_state(each) for each in driver.bitmaps.entries]

    async def bitmaps_change(self, name: str, actions: Sequence[BitmapAction]) -> list[BitmapState]:
        """Carry out all of `actions`, one after the other and in one moment at which no request is half done, or none
        of them; durably. Requests wait meanwhile. Returns the bitmaps that there are then.

        Clients that connect are offered these. One that a client has chosen as a metadata context is not removed.

        Raises: ConfigError: a bitmap is missing, there already, inconsistent, or in use by a client; the export is
            read-only or a snapshot. UnsupportedFeature: the format has none, or no room. ImageError, OSError.
        """
        return await self._on_image(name, partial(self._bitmaps_change, actions=actions))

    async def _bitmaps_change(self, export: Export, *, actions: Sequence[BitmapAction]) -> list[BitmapState]:
        _check_changeable(export)
        _qcow2_driver(export, "dirty bitmaps")
        with naming(export.image.path):
            editor = await prepare(export.image, actions)
        left = {entry.name for entry in editor.entries}
        gone = {f"{DIRTY_BITMAP}{each.name}" for each in await self._bitmaps(export) if each.name not in left}
        self._check_unused(export, gone)
        export.withdraw(gone)
        async with _overhaul(export):
            await change_bitmaps(export.image, editor)
        said = ", ".join(f"{each.action} {escaped(each.name)}" for each in actions)
        logger.info("export %s: bitmaps were changed: %s", escaped(export.name), said)
        return await self._bitmaps(export)

    def _check_unused(self, export: Export, contexts: Set[str]) -> None:
        for client in self._service.server.clients_of([export]):
            for context in contexts & set(client.contexts):
                bitmap = escaped(context.removeprefix(DIRTY_BITMAP))
                raise ConfigError(
                    f"bitmap {bitmap} is in use by client {client.number} ({client.peer}), expected one that no client "
                    "has asked for: disconnect it first"
                )

    def _snapshot_state(self, export: Export, snapshot: Snapshot, size: int) -> SnapshotState:
        exports = self._service.family(export)
        exported = next((each.name for each in exports if each.snapshot_id == snapshot.id), None)
        return snapshot_state(snapshot, size, exported)

    async def reload(self) -> bool:
        """Read the configuration file again and apply it. False: `refusal` says why it was not, or not wholly, applied.

        Raises: ConfigError: the server was started without a configuration file.
        """
        if self._reloader is None:
            raise ConfigError("the server was started without --config, so there is no file to read again")
        return await self._to_the_end(self._reloader.reload())

    @property
    def refusal(self) -> str | None:
        """What the configuration file was refused for when it was last read, in a sentence; None: it was not."""
        return None if self._reloader is None else self._reloader.refusal

    @property
    def refused_image(self) -> str | None:
        """The path of the image for which it was refused, if it was for one."""
        return None if self._reloader is None else self._reloader.refused_image

    # What operations share

    async def _locked(self, work: Coroutine[Any, Any, T]) -> T:
        """Run what changes which exports there are when nothing else of the kind and no reload runs."""
        async with self._service.lock:
            with closing(work):
                self._service.check_serving()
                return await work

    async def _on_image(self, name: str, work: Callable[[Export], Awaitable[T]]) -> T:
        """Run an operation on an export's image when no other one on that runs. Of one that a reload opens anew
        meanwhile, it is the new export.
        """
        service = self._service

        async def locked() -> T:
            while True:
                await self._see_back(name)
                export = self._image_export(name)
                async with export.upkeep:
                    service.check_serving()
                    if service.registry.lookup(name) is export:
                        return await work(export)

        return await self._to_the_end(locked())

    async def _see_back(self, name: str) -> None:
        """Where a reload has an export of the file away, wait for its end."""
        service = self._service
        if name not in service.registry and any(named(each) == name for each in service.config.exports):
            async with service.lock:
                pass

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it, whatever becomes of the caller."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()

    def _check_free(self, name: str) -> None:
        if name in self._service.registry:
            raise ConfigError(f"there is an export {escaped(name)} already, expected another name")

    def _visible(self, name: str) -> Export:
        export = self._service.registry.lookup(name)
        if export is None or export.name != name:
            raise self._unknown(name)
        return export

    def _unknown(self, name: str) -> NotThere:
        known = list(self._service.exports)
        said = ", ".join(map(escaped, known[:NAMES_MAX])) or "none"
        if len(known) > NAMES_MAX:
            said += f" and {len(known) - NAMES_MAX} more"
        return NotThere(f"there is no export {escaped(name)}, known are {said}")

    def _image_export(self, name: str) -> Export:
        export = self._visible(name)
        if export.is_snapshot:
            raise ConfigError(f"{escaped(name)} is a snapshot, expected the export of an image")
        return export


def _check_changeable(export: Export) -> None:
    image = export.image
    if not image.is_writable:
        raise ConfigError(f"the image of {escaped(export.name)} is open read-only, expected one that may be changed")
    if image.failure is not None:
        raise ImageFailed(image.path, image.failure)


@asynccontextmanager
async def _overhaul(export: Export) -> AsyncIterator[None]:
    """Around a change of an image's tables: nothing is in flight, everything is durable. An OSError names the image."""
    async with export.standstill():
        with naming(export.image.path):
            await export.image.flush()
            try:
                yield
            finally:
                export.image.overhauled()


def _qcow2_driver(export: Export, parts: str) -> Qcow2Driver:
    """Raises: UnsupportedFeature: it is another format's."""
    driver = export.image.driver
    if not isinstance(driver, Qcow2Driver):
        raise UnsupportedFeature(export.image.path, f"{driver.name} images have no {parts}, qcow2 images do")
    return driver
