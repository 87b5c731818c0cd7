"""What HTTP requests are answered from."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from time import monotonic
from typing import Any, Literal

from aiohttp import web

from nbdimg.admin.metrics import exposition
from nbdimg.admin.problems import Refusal
from nbdimg.server.live import Control
from nbdimg.server.service import Service
from nbdimg.server.states import BitmapState, ClientState, ExportState, SnapshotState


class Backend:
    """A server before, while and after it serves: HTTP answers from the first moment to the last, and says which it is.

    starting ──attach──▶ serving ──drain begins──▶ stopping
    """

    def __init__(self) -> None:
        self.started_s = monotonic()
        self._service: Service | None = None
        self._control: Control | None = None
        self._page: asyncio.Task[tuple[bytes, str]] | None = None

    def attach(self, service: Service, control: Control) -> None:
        """All exports are open, and all listeners."""
        self._service = service
        self._control = control

    @property
    def state(self) -> Literal["starting", "serving", "stopping"]:
        if self._service is None:
            return "starting"
        return "stopping" if self._service.registry.is_shutting_down else "serving"

    def exports(self) -> list[ExportState]:
        """All that are open, in every state: none while starting."""
        return [] if self._control is None else self._control.exports()

    @property
    def unserved(self) -> Mapping[str, str]:
        """As `Control.unserved`; none while starting."""
        return {} if self._control is None else self._control.unserved

    @property
    def service(self) -> Service:
        """Raises: Refusal: images are being opened."""
        if self._service is None:
            raise _starting()
        return self._service

    async def metrics(self) -> tuple[bytes, str]:
        """As `exposition`. Who asks while a page is being written gets that one: the turns of several would add up for
        NBD's clients, and anybody may ask.

        Raises: Refusal: as `service`.
        """
        if self._page is None:
            self._page = asyncio.create_task(self._write_page())
        return await asyncio.shield(self._page)

    async def _write_page(self) -> tuple[bytes, str]:
        try:
            return await exposition(self.service)
        finally:
            self._page = None

    @property
    def control(self) -> Control:
        """Raises: Refusal: images are being opened, or the server stops."""
        if self._control is None:
            raise _starting()
        if self.state == "stopping":
            raise Refusal(503, "the server stops")
        return self._control


def _starting() -> Refusal:
    return Refusal(503, "the server is starting: images are being opened")


def fields_of(state: ExportState | ClientState | SnapshotState | BitmapState) -> dict[str, Any]:
    """As JSON wants it. `dataclasses.asdict` copies deeply and takes five times as long; exports may be many."""
    return {name: getattr(state, name) for name in state.__slots__}


BACKEND = web.AppKey("backend", Backend)
