"""A server that is stopped and started again at the same address while clients go on working."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from nbdimg.uri import NbdUri
from tests.support.activation import HAND_OVER, listening
from tests.support.server import NbdimgServer


class LastingServer:
    """`nbdimg serve` on a loopback port that stays the same over `restart`.

    Args: is_activated: the listening socket is this process's, and stays open while there is no server.
    """

    def __init__(
        self, *images: str, options: Sequence[str] = (), scheme: str = "nbd", is_activated: bool = False
    ) -> None:
        self._images = images
        self._options = options
        self._listener: socket.socket | None = listening(("127.0.0.1", 0)) if is_activated else None
        port = 0 if self._listener is None else self._listener.getsockname()[1]
        self._server = self._start(f"{scheme}://127.0.0.1:{port}")
        self.port = NbdUri.parse(self._server.uri).port
        self._uri = f"{scheme}://127.0.0.1:{self.port}"

    def _start(self, uri: str) -> NbdimgServer:
        if self._listener is None:
            return NbdimgServer(*self._images, options=self._options, listen=[uri])
        descriptor = self._listener.fileno()
        name = "nbd-tls" if uri.startswith("nbds:") else "nbd"
        program = [sys.executable, "-c", HAND_OVER, str(descriptor), name, ""]
        return NbdimgServer(
            *self._images, options=self._options, listen=[uri], program=program, descriptors=[descriptor]
        )

    def restart(self, how: signal.Signals) -> None:
        """End the process with a signal, and start another; returns when that listens."""
        self._server.process.send_signal(how)
        status = self._server.wait()
        assert status == (0 if how == signal.SIGTERM else -how), self._server.stderr()
        self._server.stop()
        self._server = self._start(self._uri)

    def stop(self) -> str:
        """End in order. Returns what the last process said."""
        self._server.terminate()
        assert self._server.wait() == 0, self._server.stderr()
        return self._server.stderr()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.__exit__(kind, error, trace)
        if self._listener is not None:
            self._listener.close()
