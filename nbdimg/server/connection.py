"""One client: its socket, its handshake, its deadlines, its end.

    HANDSHAKE ──GO──▶ TRANSMISSION ──DISC, end of input──▶ FINISHING ──all answered──▶ closed
        │                  │                                   │
        └── ProtocolError, deadline, broken socket ────────────┴─────────────────────▶ closed at once

Deadlines are looked at by the server's sweep (`check_deadlines`), not by a timer for each event.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import NamedTuple

from nbdimg.errors import ProtocolError, escaped
from nbdimg.server.outbox import Outbox
from nbdimg.server.shared import Shared
from nbdimg.server.transmission import Transmission
from nbdimg.units import KiB
from nbdimg.wire.handshake import Handshake, State

logger = logging.getLogger("nbdimg")

HANDSHAKE_RECEIVE_SIZE = 16 * KiB
"""Bytes taken at once during the handshake."""

DRAIN_QUIET_S = 0.25
"""While the server drains, a connection with nothing in flight is closed after this much silence."""


class Watch(NamedTuple):
    """What a sweep saw of a connection's input. `since_s` is when the client last owed nothing, or paid enough."""

    since_s: float
    handled_count: int
    received_bytes: int


class Connection:
    """Owns `sock`, which is non-blocking and already accepted. `peer` names the client in messages."""

    def __init__(self, sock: socket.socket, peer: str, shared: Shared, on_closed: Callable[[Connection], None]) -> None:
        self._sock = sock
        self.descriptor = sock.fileno()
        self._peer = peer
        self._shared = shared
        self._on_closed = on_closed
        self.outbox = Outbox(sock, shared, self._on_room, self._on_broken)
        self._handshake: Handshake | None = Handshake(
            shared.registry, options_max=shared.limits.options, option_bytes_max=shared.limits.option_bytes
        )
        self._transmission: Transmission | None = None
        self._is_closed = False
        self._is_reading = False
        self._is_finishing = False
        self._is_draining = False
        self._started_s = shared.loop.time()
        self._received_bytes = 0
        self._watch = Watch(self._started_s, 0, 0)

    def start(self) -> None:
        """Greet the client."""
        assert self._handshake is not None
        self.unpause()
        self.outbox.put(self._handshake.greeting())
        self.outbox.send_turn()

    def pause(self) -> None:
        """Take no more input for now."""
        if self._is_reading:
            self._is_reading = False
            self._shared.loop.remove_reader(self.descriptor)

    def unpause(self) -> None:
        if not (self._is_reading or self._is_finishing or self._is_closed):
            self._is_reading = True
            self._shared.loop.add_reader(self.descriptor, self._on_readable)

    def on_hangup(self) -> None:
        """The client is gone, or its socket failed: receive what is left, or send, to meet the end or the error."""
        if self._is_reading:
            self._on_readable()
        elif self.outbox.pending_bytes:
            self.outbox.send_pending()

    def _on_readable(self) -> None:
        self._shared.spinner.touch()
        try:
            if self._transmission is not None:
                self._receive_requests(self._transmission)
            else:
                self._receive_options()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self._on_broken(error)
        except ProtocolError as error:
            self.protocol_error(error)
        except Exception as error:
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
            self._end_of_input()
            return
        self._received_bytes += count
        transmission.received(count)

    def _receive_options(self) -> None:
        handshake = self._handshake
        assert handshake is not None
        options = self._sock.recv(HANDSHAKE_RECEIVE_SIZE)
        if not options:
            self._end_of_input()
            return
        self.outbox.put_or_queue(handshake.receive(options))
        if handshake.state is State.DONE:
            self._begin_transmission(handshake)
        elif handshake.state is State.CLOSED:
            self.finish_input()
            self.close_if_done()
        elif self.outbox.pending_bytes >= self._shared.limits.output_bytes:
            self.pause()

    def _begin_transmission(self, handshake: Handshake) -> None:
        session = handshake.session
        assert session is not None
        export = self._shared.registry.lookup(session.export.name)
        if export is None:
            raise ProtocolError(f"export {escaped(session.export.name)} was removed during the handshake")
        self._handshake = None
        self._transmission = Transmission(self, self._shared, session, export, handshake.leftover)
        self._transmission.is_draining = self._is_draining
        if handshake.leftover:
            self._transmission.resume()

    def _end_of_input(self) -> None:
        """The client has closed its side; it may still read: all that it asked is answered (rule 16)."""
        self.finish_input()
        self.close_if_done()

    def finish_input(self) -> None:
        """Nothing more is read; the connection closes when everything in flight is answered."""
        self._is_finishing = True
        self.pause()

    def close_if_done(self) -> None:
        if not self._is_finishing or self._is_closed:
            return
        if self.outbox.pending_bytes or (self._transmission is not None and self._transmission.in_flight):
            return
        self.close()

    def _on_room(self) -> None:
        if self._transmission is not None:
            self._transmission.on_room()
        else:
            self.unpause()
        self.close_if_done()

    def _on_broken(self, error: OSError) -> None:
        self._say(logging.DEBUG, f"socket: {error.strerror}")
        self.close()

    def protocol_error(self, error: ProtocolError) -> None:
        """The peer broke the protocol: one line in the log, and the end."""
        self._say(logging.WARNING, str(error))
        self.close()

    def _say(self, level: int, message: str) -> None:
        self._shared.log.say(level, f"{self._peer}: {message}")

    def begin_drain(self) -> None:
        """The server stops: requests that come from now on are refused, those in flight are answered."""
        self._is_draining = True
        if self._transmission is None:
            self.close()
        else:
            self._transmission.is_draining = True

    def check_deadlines(self, now: float) -> None:
        """Close the connection if its client has let a deadline pass. Called every so often."""
        limits = self._shared.limits
        transmission = self._transmission
        if transmission is None:
            if now - self._started_s >= limits.handshake_timeout_s:
                self._give_up(f"no handshake within {limits.handshake_timeout_s:g} s")
            return
        stalled_since = self.outbox.stalled_since_s
        if stalled_since is not None and now - stalled_since >= limits.stall_timeout_s:
            self._give_up(f"took no reply for {limits.stall_timeout_s:g} s")
            return
        watch = self._watch
        received = self._received_bytes - watch.received_bytes
        is_mid_request = transmission.is_mid_request()
        if self._is_draining and not received and not is_mid_request:
            if now - watch.since_s >= DRAIN_QUIET_S:
                self._is_finishing = True
                self.close_if_done()
        elif not is_mid_request or transmission.handled_count != watch.handled_count:
            self._watch = Watch(now, transmission.handled_count, self._received_bytes)
        elif now - watch.since_s >= limits.request_timeout_s:
            if received < limits.payload_rate * limits.request_timeout_s:
                self._give_up(f"the rest of a request did not come: {received} bytes in {now - watch.since_s:.1f} s")
            else:
                self._watch = Watch(now, transmission.handled_count, self._received_bytes)

    def _give_up(self, reason: str) -> None:
        self._say(logging.WARNING, f"closed: {reason}")
        self.close()

    def close(self) -> None:
        """Close the socket now; requests in flight run on and are not answered."""
        if self._is_closed:
            return
        self._is_closed = True
        self.pause()
        self.outbox.discard()
        if self._transmission is not None:
            self._transmission.on_broken()
        self._sock.close()
        self._on_closed(self)
