"""Transmission-phase messages: the request record, and the three dialects of replies.

    compact request   magic u32, flags u16, type u16, cookie u64, offset u64, length u32                     28 bytes
    extended request  magic u32, flags u16, type u16, cookie u64, offset u64, length u64                     32 bytes
    simple reply      magic u32, error u32, cookie u64                                                       16 bytes
    structured chunk  magic u32, flags u16, type u16, cookie u64, length u32                                 20 bytes
    extended chunk    magic u32, flags u16, type u16, cookie u64, offset u64 (the request's), length u64     32 bytes

All big-endian. Spec: proto.md "Transmission", "Structured replies", branch extension-ext-header.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import ClassVar

from nbdimg.wire.constants import (
    CHUNK_DONE,
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRING_MAX,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    NbdError,
)

COMPACT_REQUEST = Struct(">IHHQQI")
EXTENDED_REQUEST = Struct(">IHHQQQ")
SIMPLE_REPLY = Struct(">IIQ")
STRUCTURED_CHUNK = Struct(">IHHQI")
EXTENDED_CHUNK = Struct(">IHHQQQ")
STRUCTURED_DATA = Struct(">IHHQIQ")
EXTENDED_DATA = Struct(">IHHQQQQ")
HOLE_PAYLOAD = Struct(">QI")
ERROR_PAYLOAD = Struct(">IH")
ERROR_OFFSET = Struct(">Q")
STATUS_PAYLOAD = Struct(">I")
STATUS_EXTENT = Struct(">II")
STATUS_EXT_PAYLOAD = Struct(">II")
STATUS_EXT_EXTENT = Struct(">QQ")

assert COMPACT_REQUEST.size == 28
assert EXTENDED_REQUEST.size == 32
assert SIMPLE_REPLY.size == 16
assert STRUCTURED_CHUNK.size == 20
assert EXTENDED_CHUNK.size == 32

_NONE = int(Chunk.NONE)
_DATA = int(Chunk.OFFSET_DATA)
_HOLE = int(Chunk.OFFSET_HOLE)

StatusExtents = Sequence[tuple[int, int]]


def to_wire(text: str) -> bytes:
    """A sentence for the client, cut to the specification's 4096 bytes between two characters."""
    return text.encode("utf-8", "replace")[:STRING_MAX].decode("utf-8", "ignore").encode()


class Request:
    """One request. `command` and `flags` are the wire's numbers, known or not; offset and length are bytes. `arrived_s`
    is a `perf_counter` time, set by whoever measures.

    `payload` is set for a WRITE, and valid only until the receiver's next call unless `owns_payload`: see
    `transmission.Receiver`.
    """

    __slots__ = ("arrived_s", "command", "cookie", "flags", "length", "offset", "owns_payload", "payload")

    contexts: tuple[int, ...] | None = None
    fault: str | None = None

    def __init__(
        self,
        command: int,
        flags: int,
        cookie: int,
        offset: int,
        length: int,
        payload: memoryview | None = None,
    ) -> None:
        self.command = command
        self.flags = flags
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.payload = payload
        self.owns_payload = False
        self.arrived_s = 0.0

    def keep_payload(self) -> None:
        """Make the payload outlive the receive buffer, by copying it if it must be."""
        if self.payload is not None and not self.owns_payload:
            self.payload = memoryview(bytes(self.payload))
            self.owns_payload = True

    def __repr__(self) -> str:
        return f"Request({self.command}, {self.flags:#x}, {self.cookie:#x}, {self.offset}, {self.length})"


class PayloadRequest(Request):
    """A request other than WRITE that came with a payload, under extended headers.

    `contexts` holds the ids of a BLOCK_STATUS. `fault` is a sentence when the message was malformed but the stream is
    in step: it is to be answered EINVAL.
    """

    __slots__ = ("contexts", "fault")

    def __init__(self, command: int, flags: int, cookie: int, offset: int, length: int) -> None:
        super().__init__(command, flags, cookie, offset, length)
        self.contexts = None
        self.fault = None


class Replies:
    """One dialect. Every method returns, or lays out, complete bytes for the socket."""

    is_chunked: ClassVar[bool]
    data_header_size: ClassVar[int]
    """Bytes in front of a READ's data."""
    done_size: ClassVar[int]
    """Bytes of a success without data."""

    def put_read(self, buffer: bytearray, at: int, cookie: int, offset: int, length: int) -> None:
        """As `put_data` for a READ that is answered whole."""
        raise NotImplementedError

    def put_done(self, buffer: bytearray, at: int, cookie: int, offset: int) -> None:
        """As `done`, written into `buffer` at `at`."""
        raise NotImplementedError

    def put_data(self, buffer: bytearray, at: int, request: Request, offset: int, length: int, is_last: bool) -> None:
        """Write the header for `length` data bytes of the image at `offset` into `buffer` at `at`."""
        raise NotImplementedError

    def hole(self, request: Request, offset: int, length: int, is_last: bool) -> bytes:
        """`length` bytes at `offset` read as zeroes."""
        raise NotImplementedError

    def done(self, request: Request) -> bytes:
        """Success, or the end of a reply whose last chunk was not marked so."""
        raise NotImplementedError

    def error(self, request: Request, error: NbdError, text: str, offset: int | None = None) -> bytes:
        """Failure, the end of the reply. `text` is cut to the specification's 4096 bytes."""
        raise NotImplementedError

    def block_status(self, request: Request, context: int, extents: StatusExtents, is_last: bool) -> bytes:
        """One context's extents as (length in bytes, flags)."""
        raise NotImplementedError


class SimpleReplies(Replies):
    """A 16-byte header and, for a READ, all its data: what the kernel's client speaks."""

    is_chunked = False
    data_header_size = SIMPLE_REPLY.size
    done_size = SIMPLE_REPLY.size

    def put_read(self, buffer: bytearray, at: int, cookie: int, offset: int, length: int) -> None:
        SIMPLE_REPLY.pack_into(buffer, at, SIMPLE_REPLY_MAGIC, 0, cookie)

    def put_done(self, buffer: bytearray, at: int, cookie: int, offset: int) -> None:
        SIMPLE_REPLY.pack_into(buffer, at, SIMPLE_REPLY_MAGIC, 0, cookie)

    def put_data(self, buffer: bytearray, at: int, request: Request, offset: int, length: int, is_last: bool) -> None:
        SIMPLE_REPLY.pack_into(buffer, at, SIMPLE_REPLY_MAGIC, 0, request.cookie)

    def done(self, request: Request) -> bytes:
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, request.cookie)

    def error(self, request: Request, error: NbdError, text: str, offset: int | None = None) -> bytes:
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, request.cookie)


class _ChunkedReplies(Replies):
    is_chunked = True

    def _chunk(self, request: Request, kind: int, payload: bytes, is_last: bool) -> bytes:
        raise NotImplementedError

    def hole(self, request: Request, offset: int, length: int, is_last: bool) -> bytes:
        return self._chunk(request, _HOLE, HOLE_PAYLOAD.pack(offset, length), is_last)

    def error(self, request: Request, error: NbdError, text: str, offset: int | None = None) -> bytes:
        message = to_wire(text)
        payload = ERROR_PAYLOAD.pack(error, len(message)) + message
        if offset is None:
            return self._chunk(request, Chunk.ERROR, payload, True)
        return self._chunk(request, Chunk.ERROR_OFFSET, payload + ERROR_OFFSET.pack(offset), True)


class StructuredReplies(_ChunkedReplies):
    """20-byte chunks, negotiated by STRUCTURED_REPLY."""

    data_header_size = STRUCTURED_DATA.size
    done_size = STRUCTURED_CHUNK.size

    def put_read(self, buffer: bytearray, at: int, cookie: int, offset: int, length: int) -> None:
        STRUCTURED_DATA.pack_into(buffer, at, STRUCTURED_REPLY_MAGIC, CHUNK_DONE, _DATA, cookie, length + 8, offset)

    def put_done(self, buffer: bytearray, at: int, cookie: int, offset: int) -> None:
        STRUCTURED_CHUNK.pack_into(buffer, at, STRUCTURED_REPLY_MAGIC, CHUNK_DONE, _NONE, cookie, 0)

    def done(self, request: Request) -> bytes:
        return STRUCTURED_CHUNK.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, _NONE, request.cookie, 0)

    def put_data(self, buffer: bytearray, at: int, request: Request, offset: int, length: int, is_last: bool) -> None:
        STRUCTURED_DATA.pack_into(
            buffer, at, STRUCTURED_REPLY_MAGIC, is_last, _DATA, request.cookie, length + 8, offset
        )

    def _chunk(self, request: Request, kind: int, payload: bytes, is_last: bool) -> bytes:
        flags = CHUNK_DONE if is_last else 0
        return STRUCTURED_CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie, len(payload)) + payload

    def block_status(self, request: Request, context: int, extents: StatusExtents, is_last: bool) -> bytes:
        payload = STATUS_PAYLOAD.pack(context) + b"".join(STATUS_EXTENT.pack(*extent) for extent in extents)
        return self._chunk(request, Chunk.BLOCK_STATUS, payload, is_last)


class ExtendedReplies(_ChunkedReplies):
    """32-byte chunks with 64-bit lengths, negotiated by EXTENDED_HEADERS."""

    data_header_size = EXTENDED_DATA.size
    done_size = EXTENDED_CHUNK.size

    def put_read(self, buffer: bytearray, at: int, cookie: int, offset: int, length: int) -> None:
        EXTENDED_DATA.pack_into(buffer, at, EXTENDED_REPLY_MAGIC, CHUNK_DONE, _DATA, cookie, offset, length + 8, offset)

    def put_done(self, buffer: bytearray, at: int, cookie: int, offset: int) -> None:
        EXTENDED_CHUNK.pack_into(buffer, at, EXTENDED_REPLY_MAGIC, CHUNK_DONE, _NONE, cookie, offset, 0)

    def done(self, request: Request) -> bytes:
        return EXTENDED_CHUNK.pack(EXTENDED_REPLY_MAGIC, CHUNK_DONE, _NONE, request.cookie, request.offset, 0)

    def put_data(self, buffer: bytearray, at: int, request: Request, offset: int, length: int, is_last: bool) -> None:
        EXTENDED_DATA.pack_into(
            buffer, at, EXTENDED_REPLY_MAGIC, is_last, _DATA, request.cookie, request.offset, length + 8, offset
        )

    def _chunk(self, request: Request, kind: int, payload: bytes, is_last: bool) -> bytes:
        flags = CHUNK_DONE if is_last else 0
        header = EXTENDED_CHUNK.pack(EXTENDED_REPLY_MAGIC, flags, kind, request.cookie, request.offset, len(payload))
        return header + payload

    def block_status(self, request: Request, context: int, extents: StatusExtents, is_last: bool) -> bytes:
        payload = STATUS_EXT_PAYLOAD.pack(context, len(extents))
        payload += b"".join(STATUS_EXT_EXTENT.pack(*extent) for extent in extents)
        return self._chunk(request, Chunk.BLOCK_STATUS_EXT, payload, is_last)
