"""HTTP listeners in a thread of this process, in front of a control that says and does what a test wants."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from types import SimpleNamespace, TracebackType
from typing import Any, Self, cast

from nbdimg.admin.backend import Backend
from nbdimg.admin.listeners import admin_listening
from nbdimg.config import ServerConfig
from nbdimg.errors import ConfigError
from nbdimg.server.live import Control
from nbdimg.server.loop import run_loop
from nbdimg.server.service import Service
from nbdimg.server.states import ExportState
from nbdimg.server.systemd import Inherited

START_TIMEOUT_S = 30.0


def state(name: str, *, failure: str | None = None, is_hidden: bool = False) -> ExportState:
    return ExportState(
        name=name,
        path=f"/{name}.img",
        format="raw",
        size=1 << 20,
        is_read_only=False,
        description="",
        is_snapshot=False,
        is_hidden=is_hidden,
        connections=0,
        in_flight=0,
        origin="config",
        failure=failure,
    )


class FakeControl:
    """`states` are its exports; `error` is what every operation raises."""

    def __init__(self) -> None:
        self.states = [state("a"), state("b")]
        self.error: Exception | None = None
        self.calls: list[tuple[Any, ...]] = []

    def exports(self) -> list[ExportState]:
        return self.states

    def export(self, name: str) -> ExportState:
        for each in self.states:
            if each.name == name:
                return each
        raise ConfigError(f"there is no export {name!r}")

    async def resize(self, *arguments: Any, **choices: Any) -> ExportState:
        self.calls.append(arguments)
        if self.error is not None:
            raise self.error
        return self.states[0]


class FakeServer(logging.Handler):
    """`admin_listening(config)` in a thread. Not attached to a service until `attach`. `lines` is what was logged."""

    def __init__(self, config: ServerConfig, inherited: Sequence[Inherited] = ()) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        self.control = FakeControl()
        self.registry = SimpleNamespace(is_shutting_down=False)
        self._logger = logging.getLogger("nbdimg")
        self._config = config
        self._inherited = inherited
        self._ready: Future[tuple[Backend, asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def attach(self) -> None:
        """Let it serve."""
        service = SimpleNamespace(registry=self.registry, config=self._config, uris=[])
        self.backend.attach(cast(Service, service), cast(Control, self.control))

    def _run(self) -> None:
        try:
            run_loop(self._main())
        except BaseException as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error)

    async def _main(self) -> None:
        async with admin_listening(self._config, self._inherited) as backend:
            stop = asyncio.Event()
            self._ready.set_result((backend, asyncio.get_running_loop(), stop))
            await stop.wait()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def __enter__(self) -> Self:
        self._logger.addHandler(self)
        self._old_level = self._logger.level
        self._logger.setLevel(logging.INFO)
        self._thread.start()
        try:
            self.backend, self._loop, self._stop = self._ready.result(START_TIMEOUT_S)
        except BaseException:
            self._hang_up()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_TIMEOUT_S)
        self._hang_up()
        assert not self._thread.is_alive()

    def _hang_up(self) -> None:
        self._logger.setLevel(self._old_level)
        self._logger.removeHandler(self)
