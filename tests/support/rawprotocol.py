"""NBD on the wire as tests see it: constants, layouts, and records of what was sent and received.

Written from the protocol facts (proto.md) and not from `nbdimg`, so that an expected result never comes from the code
under test. Building never validates: any field can be made wrong.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag

KIB = 1024
MIB = 1024 * KIB

NBD_MAGIC = 0x4E42444D41474943
OPTION_MAGIC = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
EXTENDED_REQUEST_MAGIC = 0x21E41C71
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REPLY_MAGIC = 0x6E8A278C

GREETING = struct.Struct(">QQH")  # NBDMAGIC, IHAVEOPT, handshake flags
OPTION = struct.Struct(">QII")  # IHAVEOPT, option, length of the data
OPTION_REPLY = struct.Struct(">QIII")  # magic, option, reply type, length of the data
REQUEST = struct.Struct(">IHHQQI")  # magic, command flags, command, cookie, offset, length
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")  # the same with a 64-bit length
SIMPLE_REPLY = struct.Struct(">IIQ")  # magic, error, cookie
STRUCTURED_REPLY = struct.Struct(">IHHQI")  # magic, reply flags, chunk type, cookie, length of the payload
EXTENDED_REPLY = struct.Struct(">IHHQQQ")  # magic, reply flags, chunk type, cookie, offset of the request, length

assert (GREETING.size, OPTION.size, OPTION_REPLY.size) == (18, 16, 20)
assert (REQUEST.size, EXTENDED_REQUEST.size) == (28, 32)
assert (SIMPLE_REPLY.size, STRUCTURED_REPLY.size, EXTENDED_REPLY.size) == (16, 20, 32)

FIXED_NEWSTYLE = 1
NO_ZEROES = 2
EXPORT_NAME_PADDING = 124
EXTENT_COUNT_MAX = 1 << 20


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Rep(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_PLATFORM = 0x80000004
    ERR_TLS_REQD = 0x80000005
    ERR_UNKNOWN = 0x80000006
    ERR_SHUTDOWN = 0x80000007
    ERR_BLOCK_SIZE_REQD = 0x80000008
    ERR_TOO_BIG = 0x80000009
    ERR_EXT_HEADER_REQD = 0x8000000A


class Info(IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CommandFlag(IntFlag):
    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ChunkType(IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


REPLY_DONE = 1


class NbdError(IntEnum):
    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class ConnectionClosed(Exception):
    """The server closed or reset the connection; `received` holds the bytes of the message that was cut."""

    def __init__(self, reason: str, received: bytes = b"") -> None:
        super().__init__(f"{reason} after {len(received)} bytes of a message")
        self.received = received


class ProtocolViolation(AssertionError):
    """The server sent something that proto.md forbids."""


@dataclass(frozen=True, slots=True)
class OptionReply:
    """One reply to an option; `type` is a `Rep` when known."""

    option: int
    type: int
    data: bytes

    @property
    def is_error(self) -> bool:
        return self.type >= 0x80000000

    @property
    def is_final(self) -> bool:
        return self.is_error or self.type == Rep.ACK

    @property
    def text(self) -> str:
        """The message of an error reply."""
        return self.data.decode()


@dataclass(slots=True)
class ExportInfo:
    """What GO, INFO or EXPORT_NAME told; `infos` lists the info types in the order they came."""

    size: int = -1
    flags: TransmissionFlag = field(default_factory=lambda: TransmissionFlag(0))
    name: str | None = None
    description: str | None = None
    block_size: tuple[int, int, int] | None = None
    infos: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Request:
    command: int
    cookie: int
    offset: int = 0
    length: int = 0
    flags: int = 0
    payload: bytes = b""

    def serialize(self, extended: bool = False, magic: int | None = None) -> bytes:
        """The request's bytes; with `extended` the 32-byte header. `magic` replaces the right one."""
        header, right_magic = (EXTENDED_REQUEST, EXTENDED_REQUEST_MAGIC) if extended else (REQUEST, REQUEST_MAGIC)
        used_magic = right_magic if magic is None else magic
        return header.pack(used_magic, self.flags, self.command, self.cookie, self.offset, self.length) + self.payload


@dataclass(frozen=True, slots=True)
class Chunk:
    """One reply message as it came. `form` is "simple", "structured" or "extended"; a simple reply has DONE set."""

    form: str
    flags: int
    type: int
    cookie: int
    payload: bytes
    error: int = 0
    offset: int | None = None


@dataclass(slots=True)
class Reply:
    """All chunks of one reply, put together.

    `data` is the content of a read (holes filled with zeroes), `holes` the (offset, length) of its hole chunks,
    `extents` the (length, flags) pairs of each metadata context's id.
    """

    cookie: int
    form: str
    error: int = 0
    error_text: str = ""
    error_offset: int | None = None
    data: bytes = b""
    holes: list[tuple[int, int]] = field(default_factory=list)
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    chunk_count: int = 0

    @property
    def error_name(self) -> str:
        """ "OK", or the protocol's name of the error."""
        if self.error == 0:
            return "OK"
        return NbdError(self.error).name if self.error in list(NbdError) else f"error {self.error}"


def option_bytes(option: int, data: bytes = b"", length: int | None = None, magic: int = OPTION_MAGIC) -> bytes:
    """An option; `length` replaces the length of the data in the header."""
    return OPTION.pack(magic, option, len(data) if length is None else length) + data


def info_data(
    name: str | bytes = "",
    infos: Sequence[int] = (Info.BLOCK_SIZE,),
    name_length: int | None = None,
    info_count: int | None = None,
) -> bytes:
    """The data of INFO and GO: u32 name length, name, u16 count, count x u16. The two lengths can be made wrong."""
    raw = name.encode() if isinstance(name, str) else name
    parts = [
        struct.pack(">I", len(raw) if name_length is None else name_length),
        raw,
        struct.pack(">H", len(infos) if info_count is None else info_count),
        *(struct.pack(">H", info) for info in infos),
    ]
    return b"".join(parts)


def meta_data(name: str, queries: Sequence[str | bytes], query_count: int | None = None) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT: u32, name, u32 count, count x (u32 length, query)."""
    raw = name.encode()
    parts = [struct.pack(">I", len(raw)), raw, struct.pack(">I", len(queries) if query_count is None else query_count)]
    for query in queries:
        text = query.encode() if isinstance(query, str) else query
        parts.append(struct.pack(">I", len(text)) + text)
    return b"".join(parts)


def parse_infos(replies: Iterable[OptionReply]) -> ExportInfo:
    """The REP_INFO replies of INFO or GO. Raises: ProtocolViolation when the mandatory INFO_EXPORT is missing."""
    export = ExportInfo()
    for reply in replies:
        if reply.type != Rep.INFO:
            continue
        kind = int.from_bytes(reply.data[:2], "big")
        export.infos.append(kind)
        if kind == Info.EXPORT:
            export.size, flags = struct.unpack(">QH", reply.data[2:])
            export.flags = TransmissionFlag(flags)
        elif kind == Info.NAME:
            export.name = reply.data[2:].decode()
        elif kind == Info.DESCRIPTION:
            export.description = reply.data[2:].decode()
        elif kind == Info.BLOCK_SIZE:
            minimum, preferred, maximum = struct.unpack(">III", reply.data[2:])
            export.block_size = (minimum, preferred, maximum)
    if Info.EXPORT not in export.infos:
        raise ProtocolViolation("no INFO_EXPORT in the replies")
    return export
