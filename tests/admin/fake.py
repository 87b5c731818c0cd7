"""HTTP listeners in a thread of this process, in front of a control that says and does what a test wants."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import SimpleNamespace, TracebackType
from typing import Any, Self, cast

from nbdimg.admin.backend import Backend
from nbdimg.admin.listeners import admin_listening
from nbdimg.config import ServerConfig
from nbdimg.errors import NotThere
from nbdimg.server.live import Control
from nbdimg.server.service import Service
from nbdimg.server.states import ExportState
from nbdimg.server.systemd import Inherited
from tests.support.threaded import ThreadedServer


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
        overlay=None,
        overlays=0,
        overlay_names=[],
    )


class FakeControl:
    """`states` are its exports; `error` is what every operation raises."""

    def __init__(self) -> None:
        self.states = [state("a"), state("b")]
        self.unserved: dict[str, str] = {}
        self.error: Exception | None = None
        self.calls: list[tuple[Any, ...]] = []

    def exports(self) -> list[ExportState]:
        return self.states

    def export(self, name: str) -> ExportState:
        for each in self.states:
            if each.name == name:
                return each
        raise NotThere(f"there is no export {name!r}")

    async def settled(self, name: str) -> ExportState:
        return self.export(name)

    async def resize(self, *arguments: Any, **choices: Any) -> ExportState:
        self.calls.append(arguments)
        if self.error is not None:
            raise self.error
        return self.states[0]


class FakeServer(ThreadedServer[Backend]):
    """`admin_listening(config)` in a thread. Not attached to a service until `attach`."""

    def __init__(self, config: ServerConfig, inherited: Sequence[Inherited] = ()) -> None:
        super().__init__(admin_listening(config, inherited))
        self.control = FakeControl()
        self.registry = SimpleNamespace(is_shutting_down=False)
        self._config = config

    def attach(self) -> None:
        """Let it serve."""
        service = SimpleNamespace(registry=self.registry, config=self._config, uris=[])
        self.entered.attach(cast(Service, service), cast(Control, self.control))

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def __enter__(self) -> Self:
        self._old_level = self._logger.level
        self._logger.setLevel(logging.INFO)
        try:
            return super().__enter__()
        except BaseException:
            self._logger.setLevel(self._old_level)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._logger.setLevel(self._old_level)
        super().__exit__(kind, error, trace)
