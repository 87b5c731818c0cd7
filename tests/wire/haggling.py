"""A client's side of the handshake for tests of `Handshake`: bytes in, parsed replies out, no socket."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from nbdimg.errors import ProtocolError
from nbdimg.wire.constants import TransmissionFlag
from nbdimg.wire.handshake import ExportInfo, Handshake, State, TlsMode
from tests.support.rawprotocol import OPTION_REPLY, OPTION_REPLY_MAGIC, OptionReply, Rep, option_bytes

CLIENT_FLAGS = struct.pack(">I", 0b11)
"""FIXED_NEWSTYLE and NO_ZEROES."""

ALLOCATION = "base:allocation"
DEPTH = "qemu:allocation-depth"
BITMAP = "qemu:dirty-bitmap:monday"
CONTEXTS = (ALLOCATION, DEPTH, BITMAP)

WRITABLE = 0x0D6D
"""HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES, CAN_MULTI_CONN, SEND_CACHE, SEND_FAST_ZERO."""

DISK = ExportInfo(
    name="disk",
    size=0x1122334455667700,
    flags=TransmissionFlag(WRITABLE),
    description="a disk",
    block_size_min=512,
    block_size_preferred=4096,
    payload_max=0x4000000,
    contexts=CONTEXTS,
)
PLAIN = ExportInfo(name="plain", size=1 << 20, flags=TransmissionFlag(0x0003), contexts=(ALLOCATION,))
SECRET = ExportInfo(
    name="secret", size=1 << 30, flags=TransmissionFlag(0x0003), contexts=(ALLOCATION,), is_tls_only=True
)


class Exports:
    """A directory. `main` stands for DISK, as an alias."""

    def __init__(self, exports: Sequence[ExportInfo] = (DISK, PLAIN, SECRET)) -> None:
        self.is_shutting_down = False
        self.exports = tuple(exports)

    def find(self, name: str) -> ExportInfo | None:
        known = {export.name: export for export in self.exports}
        return known.get("disk" if name == "main" else name)

    def listed(self) -> Sequence[ExportInfo]:
        return self.exports


def begun(
    tls: TlsMode = TlsMode.OFF,
    *,
    exports: Exports | None = None,
    client_flags: int = 0b11,
    options_max: int = 1024,
    option_bytes_max: int = 4 << 20,
) -> Handshake:
    """A handshake whose client flags have been accepted."""
    handshake = Handshake(exports or Exports(), tls, options_max=options_max, option_bytes_max=option_bytes_max)
    handshake.greeting()
    assert handshake.receive(struct.pack(">I", client_flags)) == b""
    assert handshake.state is State.OPTIONS
    return handshake


def encrypted(tls: TlsMode) -> Handshake:
    """A handshake right after STARTTLS."""
    handshake = begun(tls)
    assert ask_type(handshake, 5) == Rep.ACK
    handshake.tls_started()
    return handshake


def parsed(raw: bytes) -> list[OptionReply]:
    """Option replies from the wire; they fill `raw` to its last byte."""
    replies = []
    position = 0
    while position < len(raw):
        magic, option, kind, length = OPTION_REPLY.unpack_from(raw, position)
        assert magic == OPTION_REPLY_MAGIC
        position += OPTION_REPLY.size
        data = raw[position : position + length]
        assert len(data) == length
        position += length
        replies.append(OptionReply(option, kind, data))
    return replies


def ask(handshake: Handshake, option: int, data: bytes = b"") -> list[OptionReply]:
    """The replies to one option: some of them, and one that is final."""
    replies = parsed(handshake.receive(option_bytes(option, data)))
    assert [reply.is_final for reply in replies] == [False] * (len(replies) - 1) + [True]
    assert {reply.option for reply in replies} == {option}
    for reply in replies:
        if reply.is_error:
            assert 0 < len(reply.data) <= 4096
            assert "\0" not in reply.text
    return replies


def ask_type(handshake: Handshake, option: int, data: bytes = b"") -> int:
    """The type of an option's final reply."""
    return ask(handshake, option, data)[-1].type


def is_in_step(handshake: Handshake) -> bool:
    """Whether the next option is understood as one. Counts against the handshake's limits."""
    return handshake.state is State.OPTIONS and ask_type(handshake, 0xABCD, b"xyz") in (Rep.ERR_UNSUP, Rep.ERR_TLS_REQD)


def closes(handshake: Handshake, raw: bytes) -> bool:
    """Whether `raw` ends the connection."""
    try:
        handshake.receive(raw)
    except ProtocolError:
        return True
    return False
