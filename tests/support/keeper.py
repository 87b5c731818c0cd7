"""A service manager that starts a server again and again, and keeps what the server asks it to keep meanwhile."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.activation import activation_argv
from tests.support.rss import wait_until
from tests.support.server import ServerProcess

MESSAGE_SIZE, DESCRIPTORS_MAX = 4096, 768
READY_LIMIT_S = 30.0


class Keeper:
    """Speaks sd_notify(3) at a socket of its own. `room`: how many descriptors it keeps at most."""

    def __init__(self, directory: Path, *, room: int = 4096, tells_room: bool = True) -> None:
        self.kept: list[tuple[str, int]] = []
        self.room = room
        self._environment = {"NOTIFY_SOCKET": str(directory / "notify")} | (
            {"FDSTORE": str(room)} if tells_room else {}
        )
        self._is_ready = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._environment["NOTIFY_SOCKET"])
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        self.server: ServerProcess | None = None

    def start(self, *arguments: str) -> ServerProcess:
        """`nbdimg ARGUMENTS` with what is kept; returns when it is ready. Raises: RuntimeError: it never is."""
        self._is_ready.clear()
        self.server = None
        descriptors = [descriptor for _, descriptor in self.kept]
        names = ":".join(name for name, _ in self.kept)
        argv = activation_argv(descriptors, names, *arguments)
        server = ServerProcess(argv, self._environment, descriptors)
        wait_until(lambda: self._is_ready.is_set() or not server.is_running(), READY_LIMIT_S)
        if not self._is_ready.is_set():
            said = server.stderr()
            server.kill()
            server.stop()
            raise RuntimeError(f"the server is not ready: {said}")
        self.server = server
        return server

    def stop(self) -> str:
        """End the server in order. Returns what it has said on standard error."""
        assert self.server is not None
        self.server.terminate()
        status = self.server.wait()
        said = self.server.stderr()
        assert status == 0, said
        self.server.stop()
        self.server = None
        return said

    def restart(self, *arguments: str) -> ServerProcess:
        self.stop()
        return self.start(*arguments)

    def _listen(self) -> None:
        while True:
            message, ancillary, _, _ = self._socket.recvmsg(MESSAGE_SIZE, socket.CMSG_SPACE(4 * DESCRIPTORS_MAX))
            descriptors = array.array("i")
            for _, _, data in ancillary:
                descriptors.frombytes(data)
            lines = message.decode().split("\n")
            if lines == ["END=1"]:
                return
            self._take(lines, list(descriptors))

    def _take(self, lines: Sequence[str], descriptors: list[int]) -> None:
        name = next((line.removeprefix("FDNAME=") for line in lines if line.startswith("FDNAME=")), "stored")
        if "FDSTORE=1" in lines:
            while descriptors and len(self.kept) < self.room:
                self.kept.insert(0, (name, descriptors.pop(0)))
        if "FDSTOREREMOVE=1" in lines:
            descriptors += [descriptor for each, descriptor in self.kept if each == name]
            self.kept = [each for each in self.kept if each[0] != name]
        for descriptor in descriptors:
            os.close(descriptor)
        if "READY=1" in lines:
            self._is_ready.set()

    def close(self) -> None:
        if self.server is not None:
            self.server.stop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"END=1", self._environment["NOTIFY_SOCKET"])
        self._thread.join()
        self._socket.close()
        for _, descriptor in self.kept:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
