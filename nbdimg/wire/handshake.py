"""Fixed-newstyle handshake, server side, without I/O.

    ┌───────┐ client flags  ┌─────────┐  GO, EXPORT_NAME   ┌──────┐
    │ FLAGS │ ────────────▶ │ OPTIONS │ ─────────────────▶ │ DONE │  `session` is set
    └───────┘               └─────────┘ ──────┐            └──────┘
                  STARTTLS │     │ ▲ ▲        │                ▲
                           ▼     │ │ │        ▼ made on entry  │
                        ┌─────┐  │ │ │  ┌──────────┐ `entered` │
                        │ TLS │ ─┼─┘ └─ │ ENTERING │ ──────────┘
                        └─────┘  │  `refused` ─────┘   ABORT            ┌────────┐
                  `tls_started`  │                     ───────────────▶ │ CLOSED │  send what is left, then close
                                 ▼                                      └────────┘
                            ProtocolError: close without another word

`tls_started`: everything negotiated before is forgotten. In ENTERING what the client wants to enter is being made, and
the answer to its GO or EXPORT_NAME waits for that.

An option is answered and the stream stays in step whatever its data: its length is known before its meaning. In what
order the answers are decided for each option:

    1. TLS: mode REQUIRED before TLS answers everything but STARTTLS and ABORT with ERR_TLS_REQD.
    2. The option is unknown: ERR_UNSUP.
    3. Its data is malformed: ERR_INVALID. Data left over counts as malformed, it is never ignored.
    4. Its own handler.

Spec: proto.md "Fixed newstyle negotiation", "Option types", "TLS support".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from struct import Struct
from typing import Protocol

from nbdimg import limits
from nbdimg.errors import NbdimgError, ProtocolError, TlsError, escaped
from nbdimg.units import KiB, MiB
from nbdimg.wire.constants import (
    DIRTY_BITMAP,
    INIT_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    STRING_MAX,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)
from nbdimg.wire.messages import to_wire

GREETING = Struct(">QQH")
CLIENT_FLAGS = Struct(">I")
OPTION_HEADER = Struct(">QII")
OPTION_REPLY = Struct(">QIII")
EXPORT_NAME_ANSWER = Struct(">QH")
INFO_EXPORT = Struct(">HQH")
INFO_BLOCK_SIZE = Struct(">HIII")
U16 = Struct(">H")
U32 = Struct(">I")

assert GREETING.size == 18
assert OPTION_HEADER.size == 16
assert OPTION_REPLY.size == 20

SERVER_FLAGS = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
EXPORT_NAME_PADDING = 124

ANSWER_BYTES_MAX = 4 * MiB
"""Once the answers of a handshake exceed this, no further option is taken."""

LISTED_COST = 1 * KiB
"""What each export in LIST's answer counts among them besides its bytes: it takes time to tell of, too. Not in the
first one: who has asked what there is may enter it, also where there are many."""


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What the handshake tells of an export: sizes in bytes, `flags` as every client may see them."""

    name: str
    size: int
    flags: TransmissionFlag
    description: str = ""
    block_size_min: int = 1
    block_size_preferred: int = 4096
    payload_max: int = limits.Limits().payload_size
    contexts: tuple[str, ...] = ()
    is_tls_only: bool = False
    is_made_on_entry: bool = False
    """What the client enters is made when it asks, which takes a moment; only then `size` is sure."""


class Directory(Protocol):
    """The exports that one client may see."""

    is_shutting_down: bool

    def find(self, name: str) -> ExportInfo | None:
        """The export that answers to `name`, aliases included."""
        ...

    def listed(self) -> Sequence[ExportInfo]:
        """The exports to list, under their own names."""
        ...


class TlsMode(Enum):
    """Spec: proto.md "TLS versions" modes NOTLS, SELECTIVETLS, FORCEDTLS."""

    OFF = "off"
    SELECTIVE = "selective"
    REQUIRED = "required"


@dataclass(slots=True)
class Negotiated:
    """What options have switched on so far; STARTTLS replaces it by a new one."""

    is_structured: bool = False
    is_extended: bool = False
    context_export: str | None = None
    contexts: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Session:
    """The outcome of a handshake: what the transmission phase needs to know.

    `contexts` maps the ids of selected metadata contexts to their names, in the order of selection.
    """

    export: ExportInfo
    flags: TransmissionFlag
    is_structured: bool
    is_extended: bool
    obeys_block_size: bool
    contexts: dict[int, str]


class State(Enum):
    FLAGS = "flags"
    OPTIONS = "options"
    TLS = "tls"
    ENTERING = "entering"
    DONE = "done"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Entry:
    """A GO or EXPORT_NAME whose answer waits for `export`; `answer` makes it of the export as it turns out."""

    option: int
    export: ExportInfo
    answer: Callable[[ExportInfo], bytes]


class OptionError(NbdimgError):
    """Answered with an option reply; haggling goes on."""

    def __init__(self, reply: OptionReply, message: str) -> None:
        super().__init__(message)
        self.reply = reply


def _invalid(message: str) -> OptionError:
    return OptionError(OptionReply.ERR_INVALID, message)


class _Data:
    """A cursor over an option's data: every read is checked, and so is what is left."""

    __slots__ = ("_bytes", "_position")

    def __init__(self, data: bytes) -> None:
        self._bytes = data
        self._position = 0

    def _take(self, count: int) -> bytes:
        stop = self._position + count
        if stop > len(self._bytes):
            raise _invalid(f"option data ends at byte {len(self._bytes)}, a field needs {stop}")
        taken = self._bytes[self._position : stop]
        self._position = stop
        return taken

    def u16(self) -> int:
        return int(U16.unpack(self._take(2))[0])

    def u32(self) -> int:
        return int(U32.unpack(self._take(4))[0])

    def string(self) -> str:
        return _decoded(self._take(self.u32()))

    def end(self) -> None:
        if self._position != len(self._bytes):
            raise _invalid(f"{len(self._bytes) - self._position} bytes behind the option's data")


def _decoded(raw: bytes) -> str:
    """A name from the wire. Spec: proto.md "String values"."""
    if len(raw) > STRING_MAX:
        raise OptionError(OptionReply.ERR_TOO_BIG, f"a string of {len(raw)} bytes, allowed {STRING_MAX}")
    if b"\0" in raw:
        raise _invalid("a string with a NUL byte")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise _invalid("a string that is not UTF-8") from None


class Handshake:
    """One client's handshake: `receive` bytes, send what it returns, until `state` is DONE or CLOSED.

    Args:
        directory: the exports this client may see.
        tls: the listener's TLS mode. In state TLS the owner wraps the socket and calls `tls_started`. In state ENTERING
            it has the export `entry` made, and calls `entered` or `refused`.
        options_max, option_bytes_max: how much haggling one client gets.
        turn_options: of which so many are answered in one call of `receive`.
    """

    def __init__(
        self,
        directory: Directory,
        tls: TlsMode = TlsMode.OFF,
        *,
        options_max: int = limits.Limits().options,
        option_bytes_max: int = limits.Limits().option_bytes,
        turn_options: int = limits.Limits().options,
    ) -> None:
        self.state = State.FLAGS
        self.has_more = False
        """Whether options may wait that `receive` has not looked at yet: call it again, without bytes."""
        self.session: Session | None = None
        self.entry: Entry | None = None
        self.leftover = b""
        self._directory = directory
        self._tls = tls
        self._is_encrypted = False
        self._negotiated = Negotiated()
        self._buffer = b""
        self._discard = 0
        self._turn_options = turn_options
        self._options_left = options_max
        self._bytes_left = option_bytes_max
        self._answer_bytes_left = ANSWER_BYTES_MAX
        self._has_listed = False
        self._pads_export_name = True
        self._is_fixed = True

    def greeting(self) -> bytes:
        """The first bytes on the wire."""
        return GREETING.pack(INIT_MAGIC, OPTION_MAGIC, SERVER_FLAGS)

    def tls_started(self) -> None:
        """The socket is encrypted now. Spec: proto.md "TLS support": all prior state is discarded (CVE-2021-3716)."""
        assert self.state is State.TLS
        self._negotiated = Negotiated()
        self._is_encrypted = True
        self.state = State.OPTIONS

    def receive(self, data: bytes) -> bytes:
        """Take bytes from the client and return bytes for it.

        In state DONE, `leftover` holds what came behind the handshake.

        Raises: ProtocolError: close the connection; what this call would have returned is not to be sent.
        """
        self._buffer += data
        replies: list[bytes] = []
        while len(replies) < self._turn_options and (reply := self._step()) is not None:
            replies.append(reply)
        self.has_more = len(replies) == self._turn_options and self.state is State.OPTIONS
        if self.state is State.TLS and self._buffer:
            raise TlsError("plain bytes behind STARTTLS")
        self._keep_leftover()
        return b"".join(replies)

    def _keep_leftover(self) -> None:
        if self.state is State.DONE:
            self.leftover, self._buffer = self._buffer, b""

    def entered(self, export: ExportInfo) -> bytes:
        """What `entry` waited for is there: the answer."""
        assert self.state is State.ENTERING
        assert self.entry is not None
        answer = self.entry.answer(export)
        self._keep_leftover()
        return answer

    def refused(self, error: OptionError) -> bytes:
        """What `entry` waited for cannot be: the answer, and those to options that have come meanwhile.

        Raises: ProtocolError: as `receive`.
        """
        assert self.state is State.ENTERING
        assert self.entry is not None
        if self.entry.option == Option.EXPORT_NAME:
            raise ProtocolError(f"EXPORT_NAME: {error}")
        self.state = State.OPTIONS
        return self._refuse(self.entry.option, error) + self.receive(b"")

    def _enter(self, option: int, export: ExportInfo, answer: Callable[[ExportInfo], bytes]) -> bytes:
        if not export.is_made_on_entry:
            return answer(export)
        self.entry = Entry(option, export, answer)
        self.state = State.ENTERING
        return b""

    def _step(self) -> bytes | None:
        """Consume one message; None when there is none."""
        if self._discard:
            skipped = min(self._discard, len(self._buffer))
            self._buffer = self._buffer[skipped:]
            self._discard -= skipped
            return b"" if skipped else None
        if self.state is State.FLAGS:
            return self._client_flags()
        if self.state is not State.OPTIONS or len(self._buffer) < OPTION_HEADER.size:
            return None
        magic, number, length = OPTION_HEADER.unpack_from(self._buffer)
        if magic != OPTION_MAGIC:
            raise ProtocolError(f"option magic is {magic:#018x}, expected {OPTION_MAGIC:#018x}")
        if not self._is_fixed and number != Option.EXPORT_NAME:
            raise ProtocolError(f"option {number} without the client flag C_FIXED_NEWSTYLE")
        if length > limits.OPTION_SIZE_MAX:
            return self._skip(number, length)
        end = OPTION_HEADER.size + length
        if len(self._buffer) < end:
            return None
        option_data = self._buffer[OPTION_HEADER.size : end]
        self._buffer = self._buffer[end:]
        self._charge(length)
        answer = self._answer(number, option_data)
        self._answer_bytes_left -= len(answer)
        return answer

    def _client_flags(self) -> bytes | None:
        if len(self._buffer) < CLIENT_FLAGS.size:
            return None
        (flags,) = CLIENT_FLAGS.unpack_from(self._buffer)
        self._buffer = self._buffer[CLIENT_FLAGS.size :]
        if flags & ~int(SERVER_FLAGS):
            raise ProtocolError(f"client flags are {flags:#x}, allowed {int(SERVER_FLAGS):#x}")
        self._is_fixed = bool(flags & HandshakeFlag.FIXED_NEWSTYLE)
        self._pads_export_name = not flags & HandshakeFlag.NO_ZEROES
        self.state = State.OPTIONS
        return b""

    def _charge(self, length: int) -> None:
        """Count an option. Answers count too, against the next one: LIST over many exports is no amplifier."""
        self._options_left -= 1
        self._bytes_left -= length
        if self._options_left < 0 or self._bytes_left < 0 or self._answer_bytes_left < 0:
            raise ProtocolError("the handshake has more options, or more option data, than is allowed")

    def _skip(self, number: int, length: int) -> bytes:
        """Too long to parse: answer now, drop the data as it comes."""
        if length > limits.OPTION_DISCARD_MAX:
            raise ProtocolError(f"option {number} announces {length} bytes, allowed {limits.OPTION_DISCARD_MAX}")
        self._charge(length)
        self._buffer = self._buffer[OPTION_HEADER.size :]
        self._discard = length
        if number == Option.ABORT:
            return self._abort(number, _Data(b""))
        if number == Option.SET_META_CONTEXT:
            self._forget_contexts()
        if number == Option.EXPORT_NAME:
            raise ProtocolError(f"export name of {length} bytes, allowed {STRING_MAX}")
        refusal = self._tls_refusal(number)
        if refusal is None and number in _HANDLERS:
            refusal = OptionError(
                OptionReply.ERR_TOO_BIG, f"option data of {length} bytes, allowed {limits.OPTION_SIZE_MAX}"
            )
        return self._refuse(number, refusal or _unsupported(number))

    def _answer(self, number: int, option_data: bytes) -> bytes:
        refusal = self._tls_refusal(number)
        if number == Option.EXPORT_NAME:
            if refusal is not None:
                raise TlsError("EXPORT_NAME before STARTTLS, and TLS is required")
            return self._export_name(option_data)
        if refusal is not None:
            return self._refuse(number, refusal)
        handler = _HANDLERS.get(number)
        if handler is None:
            return self._refuse(number, _unsupported(number))
        try:
            return handler(self, number, _Data(option_data))
        except OptionError as error:
            return self._refuse(number, error)

    def _tls_refusal(self, number: int) -> OptionError | None:
        if self._tls is not TlsMode.REQUIRED or self._is_encrypted or number in (Option.STARTTLS, Option.ABORT):
            return None
        return OptionError(OptionReply.ERR_TLS_REQD, "this server requires TLS: send STARTTLS first")

    def _reply(self, number: int, reply: OptionReply, payload: bytes = b"") -> bytes:
        return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, number, reply, len(payload)) + payload

    def _refuse(self, number: int, error: OptionError) -> bytes:
        return self._reply(number, error.reply, to_wire(str(error)))

    def _find(self, name: str) -> ExportInfo:
        """Raises: OptionError: shutting down, unknown, or only over TLS."""
        if self._directory.is_shutting_down:
            raise OptionError(OptionReply.ERR_SHUTDOWN, "the server is shutting down")
        export = self._directory.find(name)
        needs_tls = self._tls is TlsMode.SELECTIVE and not self._is_encrypted
        if needs_tls and (export is None or export.is_tls_only):
            raise OptionError(OptionReply.ERR_TLS_REQD, f"export {escaped(name)} is not available without TLS")
        if export is None:
            raise OptionError(OptionReply.ERR_UNKNOWN, f"no export is named {escaped(name)}")
        return export

    def _flags(self, export: ExportInfo) -> TransmissionFlag:
        """The export's flags, with those that depend on what this client negotiated."""
        flags = export.flags
        if self._negotiated.is_structured or self._negotiated.is_extended:
            flags |= TransmissionFlag.SEND_DF
        if self._negotiated.is_extended and self._selected(export):
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        return flags

    def _selected(self, export: ExportInfo) -> dict[int, str]:
        """The contexts selected for this export. Spec: proto.md NBD_OPT_SET_META_CONTEXT: bound to the name.

        None, if another image has the name by now, without one of them: every reply to BLOCK_STATUS must tell of all.
        """
        contexts = self._negotiated.contexts
        is_whole = set(contexts.values()) <= set(export.contexts)
        return contexts if self._negotiated.context_export == export.name and is_whole else {}

    def _finish(self, export: ExportInfo, *, obeys_block_size: bool) -> None:
        negotiated = self._negotiated
        self.session = Session(
            export=export,
            flags=self._flags(export),
            is_structured=negotiated.is_structured,
            is_extended=negotiated.is_extended,
            obeys_block_size=obeys_block_size,
            contexts=self._selected(export),
        )
        self.state = State.DONE

    def _export_name(self, option_data: bytes) -> bytes:
        """EXPORT_NAME has no error reply: a refusal closes the connection."""
        if self._negotiated.is_extended:
            raise ProtocolError("EXPORT_NAME after EXTENDED_HEADERS")
        try:
            export = self._find(_decoded(option_data))
        except OptionError as error:
            raise ProtocolError(f"EXPORT_NAME: {error}") from None

        def answer(export: ExportInfo) -> bytes:
            self._finish(export, obeys_block_size=False)
            padding = bytes(EXPORT_NAME_PADDING) if self._pads_export_name else b""
            return EXPORT_NAME_ANSWER.pack(export.size, self._flags(export)) + padding

        return self._enter(Option.EXPORT_NAME, export, answer)

    def _abort(self, number: int, data: _Data) -> bytes:
        self.state = State.CLOSED
        return self._reply(number, OptionReply.ACK)

    def _list(self, number: int, data: _Data) -> bytes:
        data.end()
        hides_tls_only = self._tls is TlsMode.SELECTIVE and not self._is_encrypted
        replies = []
        for export in self._directory.listed():
            if not (hides_tls_only and export.is_tls_only):
                name = export.name.encode()
                entry = U32.pack(len(name)) + name + export.description.encode()
                replies.append(self._reply(number, OptionReply.SERVER, entry))
        if self._has_listed:
            self._answer_bytes_left -= LISTED_COST * len(replies)
        self._has_listed = True
        return b"".join(replies) + self._reply(number, OptionReply.ACK)

    def _starttls(self, number: int, data: _Data) -> bytes:
        data.end()
        if self._tls is TlsMode.OFF:
            raise OptionError(OptionReply.ERR_POLICY, "this server does not offer TLS")
        if self._is_encrypted:
            raise _invalid("TLS is already in use")
        self.state = State.TLS
        return self._reply(number, OptionReply.ACK)

    def _info(self, number: int, data: _Data) -> bytes:
        name = data.string()
        asked = {data.u16() for _ in range(data.u16())}
        data.end()
        export = self._find(name)
        if number == Option.INFO:
            return self._told(number, export, asked)

        def answer(export: ExportInfo) -> bytes:
            self._finish(export, obeys_block_size=Info.BLOCK_SIZE in asked)
            return self._told(number, export, asked)

        return self._enter(number, export, answer)

    def _told(self, number: int, export: ExportInfo, asked: set[int]) -> bytes:
        infos = [INFO_EXPORT.pack(Info.EXPORT, export.size, self._flags(export))]
        if Info.NAME in asked:
            infos.append(U16.pack(Info.NAME) + export.name.encode())
        if Info.DESCRIPTION in asked and export.description:
            infos.append(U16.pack(Info.DESCRIPTION) + export.description.encode())
        if Info.BLOCK_SIZE in asked:
            infos.append(
                INFO_BLOCK_SIZE.pack(
                    Info.BLOCK_SIZE, export.block_size_min, export.block_size_preferred, export.payload_max
                )
            )
        replies = [self._reply(number, OptionReply.INFO, info) for info in infos]
        return b"".join(replies) + self._reply(number, OptionReply.ACK)

    def _structured_reply(self, number: int, data: _Data) -> bytes:
        data.end()
        if self._negotiated.is_extended:
            raise OptionError(OptionReply.ERR_EXT_HEADER_REQD, "extended headers are already in use")
        if self._negotiated.is_structured:
            raise _invalid("structured replies are already in use")
        self._negotiated.is_structured = True
        return self._reply(number, OptionReply.ACK)

    def _extended_headers(self, number: int, data: _Data) -> bytes:
        data.end()
        if self._negotiated.is_extended:
            raise _invalid("extended headers are already in use")
        self._negotiated.is_extended = True
        return self._reply(number, OptionReply.ACK)

    def _meta_context(self, number: int, data: _Data) -> bytes:
        is_list = number == Option.LIST_META_CONTEXT
        if not is_list:
            self._forget_contexts()
            if not (self._negotiated.is_structured or self._negotiated.is_extended):
                raise _invalid("SET_META_CONTEXT needs STRUCTURED_REPLY or EXTENDED_HEADERS first")
        name = data.string()
        queries = [data.string() for _ in range(self._query_count(data.u32()))]
        data.end()
        for query in queries:
            if ":" not in query:
                raise _invalid(f"metadata context {escaped(query)} has no namespace")
        export = self._find(name)
        chosen = _matching(export.contexts, queries, is_list=is_list)
        if is_list:
            replies = [self._reply(number, OptionReply.META_CONTEXT, U32.pack(0) + c.encode()) for c in chosen]
            return b"".join(replies) + self._reply(number, OptionReply.ACK)
        self._negotiated.context_export = export.name
        self._negotiated.contexts = dict(enumerate(chosen, start=1))
        replies = [
            self._reply(number, OptionReply.META_CONTEXT, U32.pack(context_id) + context.encode())
            for context_id, context in self._negotiated.contexts.items()
        ]
        return b"".join(replies) + self._reply(number, OptionReply.ACK)

    def _forget_contexts(self) -> None:
        """Spec: proto.md NBD_OPT_SET_META_CONTEXT: every call replaces what was selected, also one that fails."""
        self._negotiated.context_export = None
        self._negotiated.contexts = {}

    def _query_count(self, count: int) -> int:
        """A count that the data could hold: each query takes four bytes at least."""
        if count > limits.OPTION_SIZE_MAX // U32.size:
            raise _invalid(f"{count} queries do not fit into the option's data")
        return count


def _unsupported(number: int) -> OptionError:
    return OptionError(OptionReply.ERR_UNSUP, f"option {number} is not supported")


def _matching(contexts: Sequence[str], queries: Sequence[str], *, is_list: bool) -> list[str]:
    """The contexts that the queries name, each once. `qemu:` and the like are wildcards in LIST only.

    An export may have a thousand contexts and an option 13,000 queries: they are not compared each with each.

    Spec: proto.md "Metadata querying".
    """
    if is_list and not queries:
        return list(contexts)
    meant: dict[str, list[str]] = {context: [context] for context in contexts}
    if is_list:
        for context in contexts:
            meant.setdefault(context.partition(":")[0] + ":", []).append(context)
            if context.startswith(DIRTY_BITMAP):
                meant.setdefault(DIRTY_BITMAP, []).append(context)
    asked = dict.fromkeys(queries)
    return list(dict.fromkeys(context for query in asked for context in meant.get(query, ())))


_HANDLERS: dict[int, Callable[[Handshake, int, _Data], bytes]] = {
    Option.ABORT: Handshake._abort,
    Option.LIST: Handshake._list,
    Option.STARTTLS: Handshake._starttls,
    Option.INFO: Handshake._info,
    Option.GO: Handshake._info,
    Option.STRUCTURED_REPLY: Handshake._structured_reply,
    Option.LIST_META_CONTEXT: Handshake._meta_context,
    Option.SET_META_CONTEXT: Handshake._meta_context,
    Option.EXTENDED_HEADERS: Handshake._extended_headers,
}
