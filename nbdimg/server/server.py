"""The server: listeners, connections, deadlines, and an orderly end.

listen ─▶ serving ─▶ drain: no new connection, requests in flight are answered, later ones get ESHUTDOWN
                          ─▶ close: connections cut, tasks awaited, images flushed and closed
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import socket
from collections.abc import Sequence
from typing import Any

from nbdimg.errors import NbdimgError
from nbdimg.export.registry import Registry
from nbdimg.limits import Limits
from nbdimg.server.connection import Connection
from nbdimg.server.listen import listen, peer_name, prepare
from nbdimg.server.shared import Shared
from nbdimg.uri import NbdUri

logger = logging.getLogger("nbdimg")

ACCEPTS_PER_TURN = 64
"""Connections accepted before others get their turn."""

ACCEPT_PAUSE_S = 0.2
"""How long accepting rests after an error: the process has run out of descriptors or memory."""

SWEEPS_PER_TIMEOUT = 20
"""Deadlines are looked at this often within the shortest of them: 5 % late at most."""

SWEEP_INTERVAL_MAX_S = 0.25


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A callback failed in a way that nobody foresaw: one line, and the server goes on."""
    error = context.get("exception")
    logger.error("internal error: %s: %r", context.get("message"), error)
    logger.debug("the failure's traceback", exc_info=error)


class Server:
    """Serves a registry's exports. Must be made, used and closed on one running loop."""

    def __init__(self, registry: Registry, limits: Limits | None = None) -> None:
        self._registry = registry
        self._limits = limits or Limits()
        self._loop = asyncio.get_running_loop()
        self._shared = Shared(self._loop, registry, self._limits)
        self._connections: dict[int, Connection] = {}
        self._hangups = select.poll()
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._listeners: list[socket.socket] = []
        self._paths: list[tuple[str, int]] = []
        shortest_s = min(self._limits.handshake_timeout_s, self._limits.request_timeout_s, self._limits.stall_timeout_s)
        self._sweep_interval_s = min(shortest_s / SWEEPS_PER_TIMEOUT, SWEEP_INTERVAL_MAX_S)
        self._sweeper = self._loop.call_later(self._sweep_interval_s, self._sweep)
        self._loop.set_exception_handler(_report)

    def listen(self, uri: NbdUri) -> NbdUri:
        """Accept connections at `uri` from now on. Returns it with the real port. Raises: ListenError."""
        sockets, actual = listen(uri)
        for sock in sockets:
            self._listeners.append(sock)
            self._loop.add_reader(sock.fileno(), self._accept, sock)
        if uri.socket is not None:
            self._paths.append((uri.socket, os.stat(uri.socket).st_ino))
        return actual

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._shared.log.say(logging.ERROR, f"cannot accept a connection: {error.strerror}")
                self._loop.remove_reader(listener.fileno())
                self._loop.call_later(ACCEPT_PAUSE_S, self._accept_again, listener)
                return
            self._adopt(sock, address)

    def _accept_again(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            self._loop.add_reader(listener.fileno(), self._accept, listener)

    def _adopt(self, sock: socket.socket, address: object) -> None:
        try:
            prepare(sock)
            peer = peer_name(sock, address)
        except OSError:
            sock.close()
            return
        if len(self._connections) >= self._limits.connections:
            self._shared.log.say(
                logging.WARNING, f"{peer}: refused, {self._limits.connections} clients are connected already"
            )
            sock.close()
            return
        connection = Connection(sock, peer, self._shared, self._forget)
        self._connections[connection.descriptor] = connection
        self._hangups.register(connection.descriptor, 0)
        self._is_empty.clear()
        connection.start()

    def _forget(self, connection: Connection) -> None:
        del self._connections[connection.descriptor]
        self._hangups.unregister(connection.descriptor)
        if not self._connections:
            self._is_empty.set()

    def _sweep(self) -> None:
        """Look at every connection's deadlines, and for clients that are gone.

        A reset that comes together with bytes is reported once by libuv, which then stops watching the socket: the
        poll here, which asks for nothing but errors and hang-ups, sees it.
        """
        now = self._loop.time()
        for descriptor, _ in self._hangups.poll(0):
            if descriptor in self._connections:
                self._connections[descriptor].on_hangup()
        for connection in list(self._connections.values()):
            connection.check_deadlines(now)
        self._shared.pool.tidy()
        self._sweeper = self._loop.call_later(self._sweep_interval_s, self._sweep)

    async def drain(self) -> None:
        """Stop accepting and let clients go in peace, within `drain_timeout_s`."""
        self._registry.is_shutting_down = True
        self._close_listeners()
        for connection in list(self._connections.values()):
            connection.begin_drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_empty.wait(), self._limits.drain_timeout_s)

    def _close_listeners(self) -> None:
        for sock in self._listeners:
            self._loop.remove_reader(sock.fileno())
            sock.close()
        self._listeners.clear()
        for path, inode in self._paths:
            try:
                if os.stat(path).st_ino == inode:
                    os.unlink(path)
            except FileNotFoundError:
                pass
        self._paths.clear()

    async def close(self) -> Sequence[NbdimgError | OSError]:
        """Cut what is connected, wait for requests that run, flush and close the images.

        Returns what went wrong with images; the server is closed all the same.
        """
        self._close_listeners()
        for connection in list(self._connections.values()):
            connection.close()
        self._sweeper.cancel()
        while self._shared.tasks:
            await asyncio.wait(self._shared.tasks)
        failures: list[NbdimgError | OSError] = []
        for export in self._registry:
            try:
                await export.close()
            except (NbdimgError, OSError) as error:
                failures.append(error)
        return failures
