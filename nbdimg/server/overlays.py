"""Overlays at work: made when a client enters its export, closed when it has left.

    per-client    GO ─▶ unnamed file ─▶ served to one connection ─▶ thrown away, unflushed
    kept          GO ─▶ the file base@vm42.qcow2, made if it is not there ─▶ served to all connections that ask for vm42
                     ─▶ flushed and closed with the last of them, and kept

The golden image is open once, read-only and locked as such; its tables are in memory once, whatever the number of
overlays. What an overlay costs is a descriptor and the tables of what its client has written.

    (O1) INFO and LIST make nothing; only entering does.
    (O2) Nothing is closed while a request of a client that is gone still runs: closing waits in `Export.standstill`.
    (O3) A kept overlay is open once: who comes while it opens or closes waits for that.
    (O4) Per-client overlays do not say CAN_MULTI_CONN: several connections of one client would each see another disk.
         Kept ones do: their connections share one image.
    (O5) A kept overlay whose last flush finds no space stays open, and is flushed later: who comes back finds what was
         written. It is lost only if there is no space either when the export is removed or the server ends.

A flush of a per-client overlay does what every flush does, though there is no crash to survive: an error of the disk
is told where it belongs, and dirty memory stays bounded by what clients flush.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from functools import partial

from nbdimg.config import ExportConfig
from nbdimg.errors import ImageError, NbdimgError
from nbdimg.export.export import Export
from nbdimg.export.overlays import overlay_file_name, overlay_prefix
from nbdimg.formats.overlay import Golden
from nbdimg.image.image import Image
from nbdimg.limits import Limits
from nbdimg.server import sandbox
from nbdimg.storage.workers import workers
from nbdimg.units import counted
from nbdimg.wire.constants import OptionReply
from nbdimg.wire.handshake import OptionError

logger = logging.getLogger("nbdimg")

RETRY_S = 30.0
"""Seconds between two tries to flush and close a kept overlay that finds no space (O5); each writes a line of log."""


async def lend_overlays(base: Export, config: ExportConfig) -> None:
    """Have clients of a golden image's export get overlays, as `config` says; one is made and thrown away for a trial.

    Raises: ConfigError, ImageError: such an overlay cannot be made.
    """
    directory = config.overlays_in
    try:
        golden = await workers().run(Golden, base.image, config.path, directory)
        try:
            trial = await golden.open_unnamed(size_max=Limits().overlay_size)
            await trial.discard()
        except BaseException:
            golden.close()
            raise
    except OSError as error:
        reason = await workers().run(partial(sandbox.reason, error, directory, for_writing=True))
        raise ImageError(directory, f"no overlay can be made in it: {reason}") from None
    base.lend(GoldenOverlays(base, golden, is_kept=config.overlay == "kept"))


class _Kept:
    """A kept overlay that clients have, or wait for. `lock` is held while it opens and closes (O3)."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.export: Export | None = None
        self.client_count = 0


class GoldenOverlays:
    """See `export.export.Overlays`. `base` is the golden image's export; `golden` is closed with this."""

    def __init__(self, base: Export, golden: Golden, *, is_kept: bool) -> None:
        self.is_kept = is_kept
        self.size = golden.size
        self.lent: set[Export] = set()
        self._base = base
        self._golden = golden
        self._kept: dict[str, _Kept] = {}
        self._client_count = 0
        self._making_count = 0
        self._is_idle = asyncio.Event()
        self._is_closing = asyncio.Event()
        self._retries: dict[str, asyncio.Task[None]] = {}
        """Of kept overlays that stay open without a client (O5), by name."""

    async def attach(self, name: str | None, limits: Limits, *, may_make: bool) -> Export:
        self._client_count += 1
        try:
            if name is None:
                return await self._attach_unnamed(limits)
            return await self._attach_kept(name, limits, may_make=may_make)
        except BaseException:
            self._gone()
            raise

    async def detach(self, export: Export) -> bool:
        try:
            if self.is_kept:
                await self._leave(export)
            else:
                await self._throw_away(export)
        except (NbdimgError, OSError) as error:
            logger.error("%s", error)
            return False
        finally:
            self._gone()
        return True

    def _gone(self) -> None:
        self._client_count -= 1
        if not self._client_count:
            self._is_idle.set()

    async def close(self) -> None:
        self._is_closing.set()
        while self._client_count:
            self._is_idle.clear()
            await self._is_idle.wait()
        if self._retries:
            await asyncio.wait(self._retries.values())
        self._golden.close()

    def _export(self, name: str, image: Image, limits: Limits) -> Export:
        base = self._base.info
        export = Export(name, image, block_size_min=base.block_size_min, payload_max=limits.payload_size)
        export.meter = self._base.meter
        image.count_with(self._base.image)
        self.lent.add(export)
        return export

    # Per client

    async def _attach_unnamed(self, limits: Limits) -> Export:
        if self._client_count > limits.overlays:
            raise _too_many(limits)
        image = await self._golden.open_unnamed(size_max=limits.overlay_size)
        return self._export(self._base.name, image, limits)

    async def _throw_away(self, export: Export) -> None:
        try:
            async with export.standstill():
                await export.image.discard()
        finally:
            self.lent.discard(export)

    # Kept

    async def _attach_kept(self, name: str, limits: Limits, *, may_make: bool) -> Export:
        kept = self._kept.setdefault(name, _Kept())
        kept.client_count += 1
        try:
            async with kept.lock:
                if kept.export is None:
                    image = await self._open_kept(name, limits, may_make=may_make)
                    kept.export = self._export(f"{self._base.name}@{name}", image, limits)
                return kept.export
        except BaseException:
            self._left(name, kept)
            raise

    async def _leave(self, export: Export) -> None:
        name = export.name.removeprefix(f"{self._base.name}@")
        kept = self._kept[name]
        async with kept.lock:
            try:
                if kept.client_count == 1:
                    async with export.standstill():
                        await self._close_kept(name, kept, export)
            finally:
                self._left(name, kept)

    def _left(self, name: str, kept: _Kept) -> None:
        kept.client_count -= 1
        if not kept.client_count and kept.export is None:
            del self._kept[name]

    async def _close_kept(self, name: str, kept: _Kept, export: Export) -> None:
        """Raises: ImageError: not all is flushed; it is closed, or stays open (O5)."""
        try:
            await export.image.flush()
        except OSError as error:
            if not self._is_closing.is_set():
                if name not in self._retries:
                    self._retries[name] = asyncio.get_running_loop().create_task(self._retry(name))
                reason = f"{error.strerror}: it stays open until it can be flushed"
                raise ImageError(export.image.path, reason) from None
        except ImageError:
            pass  # closing says so again
        kept.export = None
        try:
            await export.close()
        finally:
            self.lent.discard(export)

    async def _retry(self, name: str) -> None:
        """Come and leave again, until it is closed or somebody has it."""
        try:
            while True:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._is_closing.wait(), RETRY_S)
                kept = self._kept.get(name)
                if kept is None or kept.export is None or kept.client_count:
                    return
                self._client_count += 1
                kept.client_count += 1
                await self.detach(kept.export)
        finally:
            del self._retries[name]

    async def _open_kept(self, name: str, limits: Limits, *, may_make: bool) -> Image:
        file_name = overlay_file_name(self._base.name, name)
        if file_name is None:
            raise OptionError(OptionReply.ERR_TOO_BIG, "the overlay's name makes no file name")
        try:
            return await self._golden.open_named(file_name, size_max=limits.overlay_size)
        except FileNotFoundError:
            if not may_make:
                raise OptionError(OptionReply.ERR_UNKNOWN, "there is no such overlay, and you may not write") from None
        await self._make_kept(file_name, limits)
        return await self._golden.open_named(file_name, size_max=limits.overlay_size)

    async def _make_kept(self, file_name: str, limits: Limits) -> None:
        self._making_count += 1
        try:
            count = await workers().run(self._golden.count, overlay_prefix(self._base.name))
            if count + self._making_count > limits.overlays:
                raise _too_many(limits)
            await workers().run(self._golden.make_named, file_name)
        finally:
            self._making_count -= 1


def _too_many(limits: Limits) -> OptionError:
    return OptionError(OptionReply.ERR_POLICY, f"this export has {counted(limits.overlays, 'overlay')} already")


def overlay_refusal(error: NbdimgError | OSError) -> OptionError:
    """What a client is told of an overlay that it cannot have; paths are the operator's alone."""
    if isinstance(error, OptionError):
        return error
    reason = "" if isinstance(error, ImageError) else f": {error.strerror}" if isinstance(error, OSError) else ""
    return OptionError(OptionReply.ERR_PLATFORM, f"the overlay cannot be opened{reason}")
