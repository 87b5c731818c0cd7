"""One client: its socket, its phases, its deadlines, its end.

     ┌─▶ TLS ──┐
     │         ▼
    HANDSHAKE ──GO──▶ TRANSMISSION ──DISC, end of input──▶ FINISHING ──all answered──▶ closed
        │                  │      └──────────drain───────────▶ │ ──all answered──▶ LEAVING ──▶ closed
        └── ProtocolError, deadline, broken socket ────────────┴─────────────────────▶ closed at once

What is asked in HANDSHAKE is negotiation.py's, what in TRANSMISSION transmission.py's; both work through this shell.

A drain refuses no request: clients that reconnect (QEMU, the kernel) hand an error, ESHUTDOWN too, to their guest as an
I/O error, and ask again what was not answered. So nothing more is received, what has arrived is answered, and then
the end of output is said. LEAVING: the client's own end is awaited for a moment, and what it still sends is
dropped; to close over unread bytes would reset the connection, and the reset may overtake the last replies.

A drain may also leave the client to the next server (see handover.py): then nothing is said, the socket stays open, and
LEAVING falls away. A payload that is under way is received whole before, the beginning of a request is left as it is.

Deadlines are looked at by the server's sweep (`check_deadlines`), not by a timer for each event.
"""

from __future__ import annotations

import itertools
import logging
import socket
from collections.abc import Callable, Collection
from typing import NamedTuple

from nbdimg.errors import NbdimgError, ProtocolError, TlsError, escaped
from nbdimg.export.access import Client
from nbdimg.export.export import Export, Overlays
from nbdimg.export.registry import View
from nbdimg.server.audit import Refusal, Visit
from nbdimg.server.handover import LeftClient, files_of
from nbdimg.server.negotiation import Negotiation
from nbdimg.server.outbox import Outbox, TlsOutbox
from nbdimg.server.shared import Shared
from nbdimg.server.tls import Tls, TlsSocket
from nbdimg.server.transmission import Transmission
from nbdimg.units import counted
from nbdimg.wire.constants import TransmissionFlag
from nbdimg.wire.handshake import ExportInfo, Session, TlsMode

logger = logging.getLogger("nbdimg")

LEAVE_TIMEOUT_S = 0.25
"""How long a client that was told the end of output may take to close its side."""


_numbers = itertools.count(1)


class Watch(NamedTuple):
    """What a sweep saw of a connection's input. `since_s` is when the client last owed nothing, or paid enough."""

    since_s: float
    handled_count: int
    received_bytes: int


class Connection:
    """Owns `sock`, which is non-blocking and already accepted. `peer` names the client in messages, `client` is what
    is known of it before it says anything. `mode` is the listener's. `on_opened`: it has an export from now on.
    """

    __slots__ = (
        "_is_draining",
        "_is_finishing",
        "_is_left",
        "_is_lined_up",
        "_is_look_scheduled",
        "_is_reading",
        "_kept_from",
        "_left_s",
        "_limits",
        "_mode",
        "_negotiation",
        "_on_closed",
        "_on_opened",
        "_overlay",
        "_plain_sock",
        "_received_bytes",
        "_session",
        "_shared",
        "_sock",
        "_tls",
        "_transmission",
        "_view",
        "_visit",
        "_watch",
        "descriptor",
        "export",
        "is_closed",
        "is_encrypted",
        "number",
        "outbox",
        "peer",
        "started_s",
    )

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        client: Client,
        mode: TlsMode,
        shared: Shared,
        on_opened: Callable[[Connection], None],
        on_closed: Callable[[Connection], None],
    ) -> None:
        self.number = next(_numbers)
        """Unique in this process."""
        self._plain_sock = sock
        self._sock: socket.socket | TlsSocket = sock
        self.descriptor = sock.fileno()
        self.peer = peer
        self._shared = shared
        self._limits = shared.limits
        self._on_opened = on_opened
        self._on_closed = on_closed
        self._view = View(shared.registry, client, self._on_refused)
        self._mode = mode
        self._tls: TlsSocket | None = None
        self.is_encrypted = False
        """Whether the TLS handshake is complete."""
        self.outbox = Outbox(sock, shared, self._on_room, self._on_broken)
        self._negotiation: Negotiation | None = Negotiation(self, shared, self._view, mode)
        self._transmission: Transmission | None = None
        self.export: Export | None = None
        """As it is registered; what the client works with may be an overlay of it."""
        self._overlay: Export | None = None
        self._session: Session | None = None
        self._visit: Visit | None = None
        """Since the client has opened an export."""
        self._kept_from: Export | None = None
        """The last export that the client asked for and may not open: clients ask for one in several ways."""
        self.is_closed = False
        self._is_reading = False
        self._is_look_scheduled = False
        self._is_lined_up = False
        """Whether requests are received when they have their turn."""
        self._is_finishing = False
        self._is_draining = False
        self._is_left = False
        """Whether the next server is to have the client, once it is in a state to be left."""
        self._left_s: float | None = None
        self.started_s = shared.loop.time()
        self._received_bytes = 0
        self._watch = Watch(self.started_s, 0, 0)

    @property
    def identities(self) -> frozenset[str]:
        """What TLS has proven of the client."""
        return self._view.client.identities

    @property
    def tls_version(self) -> str | None:
        """As "TLSv1.3"; None: the connection is plain so far."""
        return self._tls.version if self._tls is not None and self.is_encrypted else None

    @property
    def is_read_only(self) -> bool:
        """Whether the client was given an export that it may not change."""
        return self._session is not None and bool(self._session.export.flags & TransmissionFlag.READ_ONLY)

    @property
    def contexts(self) -> Collection[str]:
        """Metadata contexts that the client may ask for."""
        return () if self._session is None else self._session.contexts.values()

    @property
    def in_flight(self) -> int:
        """Requests that wait for storage, for others, or for their client to take the reply."""
        return 0 if self._transmission is None else self._transmission.in_flight

    @property
    def is_entering(self) -> bool:
        """Whether what the client wants to open is being made for it."""
        return self._negotiation is not None and self._negotiation.is_entering

    def start(self) -> None:
        """Greet the client."""
        assert self._negotiation is not None
        self._negotiation.greet()

    async def take_up(self, left: LeftClient) -> None:
        """In place of `start`: go on with a session that the server before this one has begun, or close."""
        assert self._negotiation is not None
        try:
            await self._negotiation.take_up(left)
        except (NbdimgError, OSError) as error:
            self._give_up(f"its session on {escaped(left.session.export.name)} cannot go on: {error}")

    def pause(self) -> None:
        """Take no more input for now."""
        if self._is_reading:
            self._is_reading = False
            self._shared.loop.remove_reader(self.descriptor)

    def unpause(self) -> None:
        if not (self._is_reading or self._is_finishing or self.is_closed or self.is_entering):
            self._is_reading = True
            self._shared.loop.add_reader(self.descriptor, self._on_readable)
            self.look_inside_soon()

    def look_inside_soon(self) -> None:
        """Receive again, in a turn of its own, what TLS holds and the descriptor does not tell of."""
        if self._tls is None or not self._tls.has_more or self._left_s is not None:
            return
        if self._is_reading and not self._is_look_scheduled:
            self._is_look_scheduled = True
            self._shared.loop.call_soon(self._look_inside)

    def _look_inside(self) -> None:
        self._is_look_scheduled = False
        if self._is_reading:
            self._on_readable()

    def on_hangup(self) -> None:
        """The client is gone, or its socket failed: receive what is left, or send, to meet the end or the error."""
        if self._is_reading:
            self._on_readable()
        elif self.outbox.pending_bytes:
            self.outbox.send_pending()

    def _on_readable(self) -> None:
        if self._is_look_scheduled:
            return
        if self._shared.rounds.left_s <= 0 and self._transmission is not None and self._left_s is None:
            self._wait_for_turn()
            return
        self._shared.spinner.touch()
        try:
            if self._left_s is not None:
                self._drop_input()
            elif self._transmission is not None:
                self._receive_requests(self._transmission)
            elif self._negotiation is not None:
                self._negotiation.line_up()
        except Exception as error:
            self.fail(error)
        self.look_inside_soon()

    def _wait_for_turn(self) -> None:
        self.pause()
        if not self._is_lined_up:
            self._is_lined_up = True
            self._shared.rounds.line_up(self._take_requests, has_come=True)

    def _take_requests(self) -> None:
        self._is_lined_up = False
        transmission = self._transmission
        assert transmission is not None
        if not (self.is_closed or self._is_finishing or transmission.is_paused):
            self._on_readable()
            if not transmission.is_paused:
                self.unpause()

    def fail(self, error: Exception) -> None:
        """What came cannot be taken, or not yet; at worst it is this connection's end and nobody else's."""
        if isinstance(error, (BlockingIOError, InterruptedError)):
            return
        if isinstance(error, OSError):
            self._on_broken(error)
        elif isinstance(error, ProtocolError):
            self.protocol_error(error)
        else:
            self._say(logging.ERROR, f"closed after an internal error: {type(error).__name__}: {error}")
            logger.debug("the failure's traceback", exc_info=error)
            self.close()

    def _receive_requests(self, transmission: Transmission) -> None:
        buffers = transmission.buffers()
        sock = self._sock
        try:
            count = sock.recv_into(buffers[0]) if len(buffers) == 1 else sock.recvmsg_into(buffers)[0]
        except (BlockingIOError, InterruptedError):
            transmission.park()
            return
        if not count:
            transmission.park()
            self.end_of_input()
            return
        self._received_bytes += count
        transmission.received(count)

    def receive(self, size: int) -> bytes:
        """At most `size` bytes; b"" at the end of input. Raises: BlockingIOError, OSError, TlsError."""
        return self._sock.recv(size)

    def start_tls(self, tls: Tls) -> TlsSocket:
        """Exchange the socket and the outbox for those of TLS."""
        self._sock = self._tls = tls.wrap(self._plain_sock)
        self.outbox = TlsOutbox(self._tls, self._shared, self._on_room, self._on_broken)
        return self._tls

    def own(self, export: Export, overlay: Export) -> None:
        """Have an overlay of `export`, and give it back at the end."""
        self.export, self._overlay = export, overlay

    @property
    def overlay(self) -> Export | None:
        """Of `export`, that the client works with in its place."""
        return self._overlay

    def begin_transmission(self, session: Session, leftover: bytes) -> None:
        """The client has opened what `session` says, or its overlay of that.

        Raises: ProtocolError: it is not there any more.
        """
        self.unpause()
        export = self._overlay
        if export is None:
            self.export = export = self._shared.registry.lookup(session.export.name)
        if export is None:
            raise ProtocolError(f"export {escaped(session.export.name)} was removed during the handshake")
        self._negotiation = None
        self._on_opened(self)
        self._session = session
        self._transmission = Transmission(self, self._shared, session, export, leftover)
        self._visit = Visit(
            session.export.name,
            export.meter,
            self.peer,
            self.identities,
            self.tls_version,
            is_read_only=self.is_read_only,
        )
        self._shared.audit.attached(self._visit)
        if leftover:
            self._transmission.resume()

    def end_of_input(self) -> None:
        """The client has closed its side; it may still read: all that it asked is answered (rule 16)."""
        if self._negotiation is not None and self._mode is TlsMode.REQUIRED and self._tls is None:
            self.refuse(Refusal.TLS, "left without TLS, which is required here")
        self._is_left = False
        self.finish_input()
        self.close_if_done()

    def finish_input(self) -> None:
        """Nothing more is read; the connection closes when everything in flight is answered."""
        self._is_finishing = True
        self.pause()

    def close_if_done(self) -> None:
        if self._is_left and not self.is_closed:
            self._receive_payload_alone()
        if not self._is_finishing or self.is_closed:
            return
        if not self.outbox.is_empty() or (self._transmission is not None and self._transmission.has_work()):
            return
        if not self._is_draining:
            self.close()
        elif self._is_left:
            self._leave_to_successor()
        elif self._left_s is None:
            self._leave()

    def _receive_payload_alone(self) -> None:
        transmission = self._transmission
        assert transmission is not None
        self._is_left = not transmission.has_finished_input
        if not transmission.wants_payload():
            self.finish_input()
            return
        self._is_finishing = False
        if not transmission.is_paused:
            self.unpause()

    def _leave_to_successor(self) -> None:
        assert self._session is not None
        assert self._transmission is not None
        assert self.export is not None
        files = files_of(self.export) if self._overlay is None else files_of(self.export, self._overlay)
        client = LeftClient(self._plain_sock, self._session, files, self._transmission.unhandled)
        self._part()
        self._shared.estate.add(client)

    def _leave(self) -> None:
        self._left_s = self._shared.loop.time()
        try:
            if self._tls is not None:
                self._tls.say_goodbye()
            self._plain_sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._on_broken(error)
            return
        self._is_reading = True
        self._shared.loop.add_reader(self.descriptor, self._on_readable)

    def _drop_input(self) -> None:
        if not self._plain_sock.recv_into(self._shared.scratch):
            self.close()

    def _on_room(self) -> None:
        if self._transmission is not None:
            self._transmission.on_room()
        elif self._negotiation is not None:
            self._negotiation.on_room()
        self.close_if_done()

    def _on_broken(self, error: OSError) -> None:
        self._say(logging.DEBUG, f"socket: {error.strerror}")
        self.close()

    def protocol_error(self, error: ProtocolError) -> None:
        """The peer broke the protocol: one line in the log, and the end."""
        self.refuse(Refusal.TLS if isinstance(error, TlsError) else Refusal.PROTOCOL, str(error))
        self.close()

    def _on_refused(self, export: Export, reason: str) -> None:
        """A hidden export was asked for, which the client was told is not there."""
        if export is not self._kept_from:
            self._kept_from = export
            self.refuse(Refusal.ACCESS, f"may not open export {escaped(export.name)}: {reason}", export.name)

    def refuse(self, reason: Refusal, message: str, export: str | None = None) -> None:
        """A client that has opened an export is refused nothing: what it does then, the server's own log tells.

        The line comes behind the answer, or its time would tell a hidden export from one that is not there.
        """
        if self._visit is None:
            tell = self._shared.audit.refused
            self._shared.loop.call_soon(tell, self.peer, reason, message, export, self.identities, self.tls_version)
        else:
            self._say(logging.WARNING, message)

    def _say(self, level: int, message: str) -> None:
        self._shared.log.say(level, f"{self.peer}: {message}")

    def is_welcome(self) -> bool:
        """Whether a handshake now would give the client what it has; access rules change."""
        return self._session is None or self.is_offered(self._session.export)

    def is_offered(self, granted: ExportInfo) -> bool:
        """Whether a handshake now would give the client as much."""
        offered = self._view.find(granted.name)
        if offered is None or (offered.flags & ~granted.flags & TransmissionFlag.READ_ONLY):
            return False
        return self.has_the_tls_for(offered)

    def has_the_tls_for(self, offered: ExportInfo) -> bool:
        needs_tls = self._mode is TlsMode.REQUIRED or (self._mode is TlsMode.SELECTIVE and offered.is_tls_only)
        return self.is_encrypted or not needs_tls

    def begin_drain(self) -> None:
        """Answer what has arrived, take nothing more, and part from the client, or leave it to the next server."""
        self._is_draining = self._view.is_shutting_down = True
        if self._transmission is None:
            self.close()
            return
        self._is_left = self._shared.estate.is_open and not self._is_finishing and self._can_be_left()
        self._transmission.begin_drain(takes_payload=self._is_left)
        self.finish_input()
        self.close_if_done()

    def _can_be_left(self) -> bool:
        """Whether another process could go on with the client: its keys and an unnamed overlay die with this one."""
        return self._tls is None and (self._overlay is None or (self.export is not None and self.export.keeps_overlays))

    def excuse(self, absence_s: float, now: float) -> None:
        """The server was away for so long: that is not held against the client."""
        if self._transmission is None:
            self.started_s = min(now, self.started_s + absence_s)
        self._watch = self._watch._replace(since_s=self._watch.since_s + absence_s)
        if self.outbox.stalled_since_s is not None:
            self.outbox.stalled_since_s += absence_s

    def check_deadlines(self, now: float) -> None:
        """Close the connection if its client has let a deadline pass. Called every so often."""
        limits = self._limits
        transmission = self._transmission
        if transmission is None:
            if now - self.started_s >= limits.handshake_timeout_s:
                self.refuse(Refusal.TIMEOUT, f"no handshake within {limits.handshake_timeout_s:g} s")
                self.close()
            return
        if self._left_s is not None:
            if now - self._left_s >= LEAVE_TIMEOUT_S:
                self.close()
            return
        if self._is_stalled(now):
            self._give_up(f"took no reply for {limits.stall_timeout_s:g} s")
            return
        watch = self._watch
        received = self._received_bytes - watch.received_bytes
        if not transmission.is_mid_request() or transmission.handled_count != watch.handled_count:
            self._watch = Watch(now, transmission.handled_count, self._received_bytes)
        elif now - watch.since_s >= limits.request_timeout_s:
            if received < limits.payload_rate * limits.request_timeout_s:
                seconds = now - watch.since_s
                self._give_up(f"the rest of a request did not come: {counted(received, 'byte')} in {seconds:.1f} s")
            else:
                self._watch = Watch(now, transmission.handled_count, self._received_bytes)

    def _is_stalled(self, now: float) -> bool:
        """Whether the client has taken nothing for too long. A socket is said to be writable when a good part of its
        buffer is free; what a slow client has taken until then is found out by trying to send.
        """
        outbox = self.outbox
        since_s = outbox.stalled_since_s
        if since_s is None or now - since_s < self._limits.stall_timeout_s:
            return False
        outbox.send_pending()
        return outbox.stalled_since_s == since_s

    def give_way(self, kept_s: float) -> None:
        """Close a connection that has had its place for so long without opening an export."""
        self.refuse(Refusal.LIMIT, f"no handshake within {kept_s:g} s, and another wants its place")
        self.close()

    def _give_up(self, reason: str) -> None:
        self._say(logging.WARNING, f"closed: {reason}")
        self.close()

    def close(self) -> None:
        """Close the socket now; requests in flight run on and are not answered."""
        if not self.is_closed:
            self._part()
            self._sock.close()

    def _part(self) -> None:
        """Have no more to do with the client; its socket stays open."""
        self.is_closed = True
        self.pause()
        self.outbox.discard()
        if self._transmission is not None:
            self._transmission.on_broken()
        if self._visit is not None:
            assert self._transmission is not None
            self._shared.audit.detached(self._visit, self._transmission.tally)
        if self._overlay is not None:
            assert self.export is not None
            assert self.export.overlays is not None
            self._shared.start(self._give_back(self.export.overlays, self._overlay), self.export)
        self._on_closed(self)

    async def _give_back(self, overlays: Overlays, overlay: Export) -> None:
        if not await overlays.detach(overlay) and self._is_draining:
            self._shared.estate.renounce()
