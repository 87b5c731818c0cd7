"""A server in a thread with its operations within reach, and clients at work beside them."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from nbdimg.config import ExportConfig, ServerConfig
from nbdimg.server.live import Control
from nbdimg.server.reload import Reloader
from nbdimg.server.systemd import Notifier
from nbdimg.uri import NbdUri
from tests.server.tls_live import LiveServer
from tests.support.rawclient import Client, connect_negotiated
from tests.support.rawprotocol import MIB
from tests.support.rss import wait_until
from tests.support.threaded import WAIT_S

T = TypeVar("T")


class ControlledServer(LiveServer):
    """`exports` at a Unix socket. `reload` makes `wanted` what the configuration file says."""

    def __init__(self, directory: Path, *exports: ExportConfig, **more: Any) -> None:
        self.wanted = ServerConfig(exports, listeners=(NbdUri(socket=str(directory / "s")),), **more)
        super().__init__(self.wanted)
        self._file = str(directory / "file")

    def __enter__(self) -> Self:
        super().__enter__()
        self.control = self.ask(self._controlled())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.now(self._reloader.stop)
        super().__exit__(kind, error, trace)

    async def _controlled(self) -> Control:
        self._reloader = Reloader(self.service, lambda: (self.wanted, False), Notifier({}), self._file)
        return Control(self.service, self._reloader)

    def look(self) -> dict[str, int]:
        """The exports' names, and how many clients each has."""
        return {each.name: each.connections for each in self.now(self.control.exports)}

    @property
    def socket_path(self) -> str:
        return str(self.wanted.listeners[0].socket)

    def connect(self, name: str) -> Client:
        return connect_negotiated(self.socket_path, name, WAIT_S)


class Worker(threading.Thread):
    """Writes and reads back 4 KiB after 4 KiB in the MiB at `start` of an export, until `finish`.

    Whoever else writes there makes it fail.
    """

    def __init__(self, server: ControlledServer, name: str, start: int = 0) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._export = name
        self._start = start
        self._is_over = threading.Event()
        self.count = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with self._server.connect(self._export) as client:
                while not self._is_over.is_set():
                    offset = self._start + self.count % 256 * 4096
                    data = self.count.to_bytes(8, "big") * 512
                    assert client.write(offset, data).error == 0
                    assert client.read(offset, 4096).data == data
                    self.count += 1
        except BaseException as error:
            self.error = error

    def finish(self) -> None:
        self._is_over.set()
        self.join(WAIT_S)
        assert not self.is_alive()


class AtWork:
    """Workers on exports for the length of the block; each must have got on in it, without an error.

    Those on one export have a MiB each.
    """

    def __init__(self, server: ControlledServer, *names: str) -> None:
        self._workers = [Worker(server, name, names[:index].count(name) * MIB) for index, name in enumerate(names)]

    def __enter__(self) -> Self:
        for worker in self._workers:
            worker.start()
        self.wait_progress()
        return self

    def wait_progress(self) -> None:
        """Until each has done some more, or failed."""
        before = [worker.count for worker in self._workers]
        pairs = list(zip(self._workers, before, strict=True))
        assert wait_until(lambda: all(each.error or each.count > count + 1 for each, count in pairs), WAIT_S)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait_progress()
        for worker in self._workers:
            worker.finish()
        if kind is None:
            assert [worker.error for worker in self._workers] == [None] * len(self._workers)
