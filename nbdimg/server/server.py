"""The server: listeners, connections, deadlines, and an orderly end.

listen ─▶ serving ─▶ drain: no new connection, requests in flight are answered, later ones are not taken
                          ─▶ close: connections cut, tasks awaited, images flushed and closed
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import socket
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from nbdimg.errors import NbdimgError, escaped
from nbdimg.export.export import Export
from nbdimg.export.registry import Registry
from nbdimg.limits import Limits
from nbdimg.server.audit import Audit, Refusal
from nbdimg.server.connection import Connection
from nbdimg.server.handover import Estate, LeftClient
from nbdimg.server.listen import listen, peer_of, prepare, remove_socket
from nbdimg.server.log import tell_internal
from nbdimg.server.shared import Shared
from nbdimg.server.tls import Tls
from nbdimg.storage import mapped
from nbdimg.units import counted
from nbdimg.uri import NbdUri
from nbdimg.wire.handshake import TlsMode

logger = logging.getLogger("nbdimg")

ACCEPTS_PER_TURN = 64
"""Connections accepted before others get their turn."""

ACCEPT_PAUSE_S = 0.2
"""How long accepting rests after an error: the process has run out of descriptors or memory."""

PLACE_KEPT_S = 1.0
"""How long a client that has not opened an export keeps its place when all are taken and another wants one."""

SWEEPS_PER_TIMEOUT = 20
"""Deadlines are looked at this often within the shortest of them: 5 % late at most."""

SWEEP_INTERVAL_MAX_S = 0.25

CLOSE_EXPECTED_S = 3.0
"""After this time the log names what is waited for at an image's end: behind a drain of 5 s, that is before the 10 s
are over after which `docker stop` kills."""

ABSENCE_MIN_S = 0.5
"""A sweep that comes so late finds clients that nobody looked after: the process was stopped (SIGSTOP, a paused
container), or something held its loop."""


class _Listener(NamedTuple):
    """What `uri` asked for, `actual` with the real port. `path` and `inode`: the file made for a Unix socket."""

    uri: NbdUri
    actual: NbdUri
    sockets: list[socket.socket]
    path: str | None = None
    inode: int = 0


class _Departure(NamedTuple):
    """Connections that somebody waits for to go. `is_over`: they are gone or, unless the departure `is_patient`, shall
    have no more time.
    """

    connections: set[Connection]
    is_over: asyncio.Event
    is_patient: bool


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A callback failed in a way that nobody foresaw: one line, and the server goes on."""
    tell_internal(str(context.get("message")), context.get("exception"))


class Server:
    """Serves a registry's exports. Must be made, used and closed on one running loop."""

    def __init__(self, registry: Registry, limits: Limits | None = None) -> None:
        self._registry = registry
        self._limits = limits or Limits()
        self._loop = asyncio.get_running_loop()
        self._shared = Shared(self._loop, registry, self._limits)
        self._connections: dict[int, Connection] = {}
        self._newcomers: dict[Connection, None] = {}
        """Of them, those that have not opened an export yet, the eldest first."""
        self._hangups = select.poll()
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._listeners: list[_Listener] = []
        self._departures: list[_Departure] = []
        self._is_hasty = False
        self._sweep_interval_s = _sweep_interval(self._limits)
        self._sweep_due_s = self._loop.time() + self._sweep_interval_s
        self._sweeper = self._loop.call_at(self._sweep_due_s, self._sweep)
        self._loop.set_exception_handler(_report)

    def listen(self, uri: NbdUri) -> NbdUri:
        """Accept connections at `uri` from now on. Returns it with the real port. Raises: ListenError."""
        sockets, actual = listen(uri)
        inode = 0 if uri.socket is None else os.stat(uri.socket).st_ino
        self._start_accepting(_Listener(uri, actual, sockets, uri.socket, inode))
        return actual

    def adopt(self, sock: socket.socket, uri: NbdUri) -> None:
        """Accept connections at a socket that listens already, and whose file, if it has one, is another's."""
        self._start_accepting(_Listener(uri, uri, [sock]))

    @property
    def listeners(self) -> list[NbdUri]:
        """Where connections are accepted, with real ports."""
        return [each.actual for each in self._listeners]

    @property
    def connections(self) -> list[Connection]:
        """Those that are up, the oldest first."""
        return sorted(self._connections.values(), key=lambda each: each.number)

    @property
    def connection_count(self) -> int:
        return len(self._connections)

    @property
    def audit(self) -> Audit:
        """Who came and was refused, counted."""
        return self._shared.audit

    @property
    def estate(self) -> Estate:
        """Clients that a drain leaves to the next server, if it is open."""
        return self._shared.estate

    @property
    def lent_bytes(self) -> int:
        """Bytes of buffers that hold payload in flight."""
        return self._shared.pool.lent_bytes

    def is_listening(self, uri: NbdUri) -> bool:
        """Whether `listen` was given it."""
        return any(each.uri == uri for each in self._listeners)

    def unlisten(self, uri: NbdUri) -> None:
        """Accept no more at what `listen` was given; its connections go on."""
        (listener,) = [each for each in self._listeners if each.uri == uri][:1]
        self._listeners.remove(listener)
        self._stop_accepting(listener)

    def _start_accepting(self, listener: _Listener) -> None:
        self._listeners.append(listener)
        for sock in listener.sockets:
            self._loop.add_reader(sock.fileno(), self._accept, sock, listener.uri.is_tls)

    def _stop_accepting(self, listener: _Listener) -> None:
        for sock in listener.sockets:
            self._loop.remove_reader(sock.fileno())
            sock.close()
        if listener.path is not None:
            remove_socket(listener.path, listener.inode)

    def set_limits(self, limits: Limits) -> None:
        """For connections from now on, and for all of them together."""
        self._limits = limits
        self._shared.limits = limits
        self._shared.pool.limit = limits.total_bytes
        self._sweep_interval_s = min(self._sweep_interval_s, _sweep_interval(limits))

    def set_tls(self, tls: Tls | None) -> None:
        """For connections from now on; those that are up keep what they began with."""
        self._shared.tls = tls

    def _tls_mode(self, is_tls: bool) -> TlsMode:
        """That of a listener with scheme nbds (`is_tls`), which stays closed without credentials, or nbd."""
        if is_tls:
            return TlsMode.REQUIRED
        return TlsMode.OFF if self._shared.tls is None else self._shared.tls.mode

    def _accept(self, listener: socket.socket, is_tls: bool) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._shared.log.say(logging.ERROR, f"cannot accept a connection: {error.strerror}")
                self._loop.remove_reader(listener.fileno())
                self._loop.call_later(ACCEPT_PAUSE_S, self._accept_again, listener, is_tls)
                return
            connection = self._adopt(sock, address, self._tls_mode(is_tls))
            if connection is not None:
                connection.start()

    async def take_up(self, clients: Collection[LeftClient]) -> None:
        """Go on with the sessions of clients that the server before this one has left. They are in plain text, so by
        the rules of listeners that allow that.
        """
        for client in clients:
            try:
                address = client.sock.getpeername()
            except OSError:
                client.sock.close()
                continue
            connection = self._adopt(client.sock, address, self._tls_mode(is_tls=False))
            if connection is not None:
                await connection.take_up(client)

    def _accept_again(self, listener: socket.socket, is_tls: bool) -> None:
        if listener.fileno() >= 0:
            self._loop.add_reader(listener.fileno(), self._accept, listener, is_tls)

    def _adopt(self, sock: socket.socket, address: object, mode: TlsMode) -> Connection | None:
        """Its connection, which has said nothing yet; None: the client is gone, or turned away."""
        try:
            prepare(sock)
            peer, client = peer_of(sock, address)
        except OSError:
            sock.close()
            return None
        self._shared.audit.accept_count += 1
        if len(self._connections) >= self._limits.connections and not self._has_made_room():
            found = counted(self._limits.connections, "client is", "clients are")
            self._shared.audit.refused(peer, Refusal.LIMIT, f"{found} connected already")
            sock.close()
            return None
        connection = Connection(sock, peer, client, mode, self._shared, self._newcomers.pop, self._forget)
        self._connections[connection.descriptor] = connection
        self._newcomers[connection] = None
        self._hangups.register(connection.descriptor, 0)
        self._is_empty.clear()
        return connection

    def _has_made_room(self) -> bool:
        """Whether the eldest of those that have not opened an export has given its place away: else silent clients
        keep all others out for as long as a handshake may take. Who waits for an overlay is not what is late.
        """
        kept_since_s = self._loop.time() - PLACE_KEPT_S
        for eldest in self._newcomers:
            if eldest.started_s > kept_since_s:
                break
            if not eldest.is_entering:
                eldest.give_way(PLACE_KEPT_S)
                return True
        return False

    def _forget(self, connection: Connection) -> None:
        del self._connections[connection.descriptor]
        self._newcomers.pop(connection, None)
        self._hangups.unregister(connection.descriptor)
        for departure in self._departures:
            departure.connections.discard(connection)
            if not departure.connections:
                departure.is_over.set()
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
        late_s = now - self._sweep_due_s
        for connection in list(self._connections.values()):
            if late_s >= ABSENCE_MIN_S:
                connection.excuse(late_s, now)
            connection.check_deadlines(now)
        self._shared.pool.tidy()
        mapped.tidy()
        self._sweep_due_s = now + self._sweep_interval_s
        self._sweeper = self._loop.call_at(self._sweep_due_s, self._sweep)

    async def drain(self) -> None:
        """Stop accepting and let clients go in peace, within `drain_timeout_s`."""
        self._registry.is_shutting_down = True
        self._close_listeners()
        for connection in list(self._connections.values()):
            connection.begin_drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_empty.wait(), self._limits.drain_timeout_s)

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            self._stop_accepting(listener)
        self._listeners.clear()

    async def retire(self, exports: Collection[Export]) -> Sequence[NbdimgError]:
        """Close exports that the registry no longer has: their clients go in peace within `drain_timeout_s`.

        Returns what went wrong with images; they are closed all the same.
        """
        await self.dismiss(self.clients_of(exports))
        return await self._close_all(exports)

    async def outlast(self, exports: Collection[Export]) -> Sequence[NbdimgError]:
        """As `retire`, when the last client has left, however long it stays."""
        await self._wait_gone(self.clients_of(exports), is_patient=True)
        return await self.retire(exports)

    async def dismiss_unwelcome(self, exports: Collection[Export]) -> None:
        """Make those of the exports' clients go to whom a handshake would no longer give what they have."""
        await self.dismiss([each for each in self.clients_of(exports) if not each.is_welcome()])

    def clients_of(self, exports: Collection[Export]) -> list[Connection]:
        """Who has opened one of them."""
        wanted = set(exports)
        return [each for each in self._connections.values() if each.export in wanted]

    async def dismiss(self, connections: Collection[Connection], *, is_hard: bool = False) -> None:
        """Make them go in peace within `drain_timeout_s`, or with `is_hard` at once; they are closed on return."""
        if not (is_hard or self._is_hasty):
            for connection in connections:
                connection.begin_drain()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wait_gone(connections), self._limits.drain_timeout_s)
        for connection in connections:
            connection.close()

    async def _wait_gone(self, connections: Collection[Connection], *, is_patient: bool = False) -> None:
        staying = {each for each in connections if not each.is_closed}
        if not staying or (self._is_hasty and not is_patient):
            return
        departure = _Departure(staying, asyncio.Event(), is_patient)
        self._departures.append(departure)
        try:
            await departure.is_over.wait()
        finally:
            self._departures.remove(departure)

    def hasten(self) -> None:
        """Give clients that were made to go no more time, now and later."""
        self._is_hasty = True
        for departure in self._departures:
            if not departure.is_patient:
                departure.is_over.set()

    async def close(self) -> Sequence[NbdimgError]:
        """Cut what is connected, wait for requests that run, flush and close the images.

        Returns what went wrong with images; the server is closed all the same.
        """
        self._close_listeners()
        for connection in list(self._connections.values()):
            connection.close()
        self._sweeper.cancel()
        failures = await self._close_all(list(self._registry))
        while self._shared.tasks:
            await asyncio.wait(self._shared.tasks)
        self._shared.tell_rest()
        return failures

    async def _close_all(self, exports: Collection[Export]) -> Sequence[NbdimgError]:
        """Each as soon as nothing works with it any more: storage that hangs under one holds up no other."""
        # What runs now may work for a connection that is gone; what starts later cannot be of these exports.
        running: dict[Export, list[asyncio.Task[None]]] = {export: [] for export in exports}
        for task, export in self._shared.tasks.items():
            if export in running:
                running[export].append(task)
        # What goes wrong inside one cuts no other short: an error that nobody foresaw is raised behind all of them.
        closing = [asyncio.create_task(self._close(export, tasks)) for export, tasks in running.items()]
        if closing:
            await asyncio.wait(closing)
        return [failure for failure in (each.result() for each in closing) if failure is not None]

    async def _close(self, export: Export, tasks: Collection[asyncio.Task[None]]) -> NbdimgError | None:
        """When what is at work on the image at large is done too. Returns what went wrong."""
        failure = None
        with telling_late(f"export {escaped(export.name)}: {export.image.path} is not closed"):
            if tasks:
                await asyncio.wait(tasks)
            async with export.upkeep:
                has_failed = export.image.failure is not None
                try:
                    await export.close()
                except NbdimgError as error:
                    failure = error
        if failure is not None or has_failed:
            self.estate.renounce()
        return failure


@contextlib.contextmanager
def telling_late(what: str) -> Iterator[None]:
    """Around what waits for storage at the end: the log says `what` when it takes longer than CLOSE_EXPECTED_S."""
    late = asyncio.get_running_loop().call_later(
        CLOSE_EXPECTED_S,
        logger.warning,
        "%s after %g seconds: what was asked of its storage is not done",
        what,
        CLOSE_EXPECTED_S,
    )
    try:
        yield
    finally:
        late.cancel()


def _sweep_interval(limits: Limits) -> float:
    shortest_s = min(limits.handshake_timeout_s, limits.request_timeout_s, limits.stall_timeout_s)
    return min(shortest_s / SWEEPS_PER_TIMEOUT, SWEEP_INTERVAL_MAX_S)
