"""One connection's handshake phase: from the greeting, through TLS, to an export that is open.

Its steps take turns with those of other clients (see reception.py). At STARTTLS the socket and the outbox are exchanged
for those of TLS; nothing else differs.

An overlay is made before its client's GO is answered, in a task that goes on when the client leaves meanwhile; until it
ends nothing is received. From there on the connection has the overlay, and gives it back when it closes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from nbdimg.errors import NbdimgError, ProtocolError, TlsError, escaped
from nbdimg.export.access import Right
from nbdimg.export.export import Export, Overlays
from nbdimg.export.registry import View, Wanted
from nbdimg.server.audit import Refusal
from nbdimg.server.handover import LeftClient, broken_promise, files_of
from nbdimg.server.outbox import Outbox
from nbdimg.server.overlays import overlay_refusal
from nbdimg.server.shared import Shared
from nbdimg.server.tls import Tls, TlsSocket
from nbdimg.units import KiB
from nbdimg.wire.constants import OptionReply
from nbdimg.wire.handshake import ExportInfo, Handshake, OptionError, Session, State, TlsMode

OPTIONS_RECEIVE_SIZE = 64 * KiB
"""Bytes of options taken at once; under TLS room for two records at least."""

TURN_OPTIONS = 16
"""Options of one client that are answered in one turn."""


class Shell(Protocol):
    """What the handshake phase needs of its connection."""

    outbox: Outbox
    is_closed: bool
    is_encrypted: bool

    def pause(self) -> None: ...

    def unpause(self) -> None: ...

    def receive(self, size: int) -> bytes: ...

    def look_inside_soon(self) -> None: ...

    def end_of_input(self) -> None: ...

    def start_tls(self, tls: Tls) -> TlsSocket: ...

    def is_offered(self, granted: ExportInfo) -> bool: ...

    def has_the_tls_for(self, offered: ExportInfo) -> bool: ...

    def own(self, export: Export, overlay: Export) -> None: ...

    def begin_transmission(self, session: Session, leftover: bytes) -> None: ...

    def refuse(self, reason: Refusal, message: str, export: str | None = None) -> None: ...

    def protocol_error(self, error: ProtocolError) -> None: ...

    def fail(self, error: Exception) -> None: ...


class Negotiation:
    """Args: shell: the connection. view: what its client sees. mode: the listener's."""

    __slots__ = ("_handshake", "_is_lined_up", "_shared", "_shell", "_tls", "_view", "is_entering")

    def __init__(self, shell: Shell, shared: Shared, view: View, mode: TlsMode) -> None:
        self._shell = shell
        self._shared = shared
        self._view = view
        self._tls: TlsSocket | None = None
        self._handshake = Handshake(
            view,
            mode,
            options_max=shared.limits.options,
            option_bytes_max=shared.limits.option_bytes,
            turn_options=TURN_OPTIONS,
        )
        self._is_lined_up = False
        """Whether the next step comes when it has its turn."""
        self.is_entering = False
        """Whether what the client wants to open is being made for it."""

    def greet(self) -> None:
        """Say who we are, and take what the client says."""
        shell = self._shell
        shell.unpause()
        shell.outbox.put(self._handshake.greeting())
        shell.outbox.send_turn()

    def line_up(self) -> None:
        """The client has sent something: it is looked at when it has its turn."""
        self._shell.pause()
        if not self._is_lined_up:
            self._is_lined_up = True
            self._shared.reception.line_up(self._take_turn)

    def _take_turn(self) -> None:
        self._is_lined_up = False
        if self._shell.is_closed:
            return
        try:
            self._haggle()
        except Exception as error:
            self._shell.fail(error)
        self._go_on()

    def _haggle(self) -> None:
        handshake = self._handshake
        if handshake.has_more:
            self._answer(handshake.receive(b""))
        elif self._tls is not None and handshake.state is State.TLS:
            self._advance_tls(self._tls)
        else:
            self._receive_options()

    def _go_on(self) -> None:
        """When the client has taken what it was answered: with what it has sent, or with what it sends then."""
        shell = self._shell
        if self._handshake.state is State.DONE or shell.outbox.pending_bytes:
            return
        if self._handshake.has_more and not shell.is_closed:
            self.line_up()
        else:
            shell.unpause()
            shell.look_inside_soon()

    def on_room(self) -> None:
        """The client has taken what it was answered."""
        if self._handshake.state is State.TLS and self._tls is None:
            self._begin_tls()
        self._go_on()

    def _receive_options(self) -> None:
        options = self._shell.receive(OPTIONS_RECEIVE_SIZE)
        if options:
            self._answer(self._handshake.receive(options))
        else:
            self._shell.end_of_input()

    def _answer(self, answer: bytes) -> None:
        shell, handshake = self._shell, self._handshake
        shell.outbox.put_or_queue(answer)
        if shell.is_closed:
            return
        if handshake.state is State.DONE:
            assert handshake.session is not None
            shell.begin_transmission(handshake.session, handshake.leftover)
        elif handshake.state is State.ENTERING:
            self._begin_entering()
        elif handshake.state is State.TLS:
            self._begin_tls()
        elif handshake.state is State.CLOSED:
            shell.end_of_input()

    def _begin_tls(self) -> None:
        """Once STARTTLS is answered, which goes out in clear, and before the client's next byte."""
        if self._shell.outbox.pending_bytes:
            return
        if self._shared.tls is None:
            self._shell.protocol_error(TlsError("STARTTLS, and TLS was switched off meanwhile"))
            return
        self._tls = self._shell.start_tls(self._shared.tls)

    def _advance_tls(self, tls: TlsSocket) -> None:
        try:
            identities = tls.advance()
        finally:
            self._shell.outbox.send_pending()
        if identities is None or self._shell.is_closed:
            return
        self._shared.audit.encrypted(tls.version or "")
        self._view.client = replace(self._view.client, identities=identities)
        self._shell.is_encrypted = True
        self._handshake.tls_started()
        if tls.has_input():
            self._receive_options()

    def _begin_entering(self) -> None:
        entry = self._handshake.entry
        assert entry is not None
        wanted = self._view.resolve(entry.export.name)
        assert wanted is not None
        assert wanted.export.overlays is not None
        self.is_entering = True
        self._shell.pause()
        work = self._enter(entry.export, wanted, wanted.export.overlays, may_make=self._may_make(wanted.export))
        self._shared.start(work, wanted.export)

    def _may_make(self, export: Export) -> bool:
        """Whether the client may have an overlay made that is not there yet."""
        return self._view.right(export) is Right.WRITE

    async def _enter(self, info: ExportInfo, wanted: Wanted, overlays: Overlays, *, may_make: bool) -> None:
        """Have an overlay attached, and answer GO. From its first line on the export may have been removed."""
        shell, handshake = self._shell, self._handshake
        overlay = None
        refusal = OptionError(OptionReply.ERR_UNKNOWN, "the export was removed meanwhile")
        try:
            overlay = await overlays.attach(wanted.overlay, self._shared.limits, may_make=may_make)
        except (NbdimgError, OSError) as error:
            shell.refuse(Refusal.IMAGE, f"gets no overlay of export {escaped(wanted.name)}: {error}", wanted.name)
            refusal = overlay_refusal(error)
        is_there = self._shared.registry.lookup(wanted.export.name) is wanted.export and shell.is_offered(info)
        if overlay is not None and (shell.is_closed or not is_there):
            await overlays.detach(overlay)
            overlay = None
        if shell.is_closed:
            return
        self.is_entering = False
        try:
            if overlay is None:
                self._answer(handshake.refused(refusal))
            else:
                shell.own(wanted.export, overlay)
                self._answer(handshake.entered(replace(info, size=overlay.info.size)))
        except Exception as error:
            shell.fail(error)
        self._go_on()

    async def take_up(self, left: LeftClient) -> None:
        """In place of `greet`: go on with a session that the server before this one has begun.

        Raises: ProtocolError: the client has no right to it any more, or what it works on has changed. ImageError,
            OSError: its overlay does not open.
        """
        shell, session = self._shell, left.session
        wanted, offered = self._view.resolve(session.export.name), self._view.find(session.export.name)
        if wanted is None or offered is None:
            raise ProtocolError("it is not there for this client any more")
        size, files = offered.size, files_of(wanted.export)
        if wanted.export.overlays is not None:
            self.is_entering = True
            may_make = self._may_make(wanted.export)
            overlay = await wanted.export.overlays.attach(wanted.overlay, self._shared.limits, may_make=may_make)
            self.is_entering = False
            if shell.is_closed:
                await wanted.export.overlays.detach(overlay)
                return
            shell.own(wanted.export, overlay)
            size, files = overlay.info.size, files_of(wanted.export, overlay)
        reason = broken_promise(left, offered, size, files)
        if reason is not None:
            raise ProtocolError(reason)
        if not shell.has_the_tls_for(offered):
            raise ProtocolError("it takes TLS now")
        shell.begin_transmission(session, left.received)
