"""From bytes to requests, without I/O.

The receiver does not own the memory that bytes arrive in. A loop has one receive buffer for all its connections, and
a turn is: fill, parse, handle, *park*. What is left of a turn is one of three things:

    ┌────────┐  header complete   ┌──────────────────────┐
    │ HEADER │ ─────────────────▶ │ a request is returned │   payload, if any, lies in the shared buffer
    └────────┘                    └──────────────────────┘
       │  payload longer than what arrived, and not short (CARRIED_SHARE)
       ▼
    ┌─────────┐  a buffer of its own is filled, first in the list that `buffers` returns, with a short spill into
    │ PAYLOAD │  the shared buffer behind it, so that the next header costs no system call of its own
    └─────────┘

    HEADER with `starved` set: the payload's buffer was refused (`allocate` returned None); nothing more is parsed
    until the owner finds room and calls `next_request` again.

Invariants
    (R1) `buffers` → fill → `received(n)` → `next_request` until None → `park`: in this order, each turn.
    (R2) between `park` and `buffers` the receiver holds no view of the shared buffer.
    (R3) a payload is whole before its request is returned: half a WRITE changes nothing.
    (R4) any bytes give requests or ProtocolError, nothing else.

Spec: proto.md "Request message"; branch extension-ext-header.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import unpack_from
from typing import Any

from nbdimg.errors import ProtocolError
from nbdimg.wire.constants import EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC, Command, CommandFlag
from nbdimg.wire.messages import COMPACT_REQUEST, EXTENDED_REQUEST, PayloadRequest, Request

CARRIED_SHARE = 16
"""A WRITE payload of at most one such part of the shared buffer is not worth a buffer of its own: what has come of it
is carried to the next turn, where its request lies whole before those behind it."""

CONTEXT_IDS_MAX = 1024
"""Context ids in one BLOCK_STATUS payload; an export has a handful."""

_WRITE = int(Command.WRITE)
_BLOCK_STATUS = int(Command.BLOCK_STATUS)
_PAYLOAD_LEN = int(CommandFlag.PAYLOAD_LEN)


class Receiver:
    """Slices one connection's byte stream into requests.

    Args:
        scratch: the shared receive buffer.
        spill_size: bytes of `scratch` offered behind a payload of more than half its size; behind others, all of it.
        payload_max: the longest payload, in bytes; a longer one is a ProtocolError.
        allocate: gives a writable buffer of the asked length, or None when there is no room now.
        is_extended: requests are 32 bytes long.
    """

    __slots__ = (
        "_allocate",
        "_carried_max",
        "_carry",
        "_end",
        "_filled",
        "_is_extended",
        "_partial",
        "_payload",
        "_payload_max",
        "_position",
        "_scratch",
        "_spill_size",
        "header_size",
        "is_last_payload",
        "magic",
        "starved",
        "unpack",
    )

    def __init__(
        self,
        scratch: memoryview,
        spill_size: int,
        payload_max: int,
        allocate: Callable[[int], memoryview | None],
        *,
        is_extended: bool,
    ) -> None:
        self._scratch = scratch
        self._spill_size = spill_size
        self._payload_max = payload_max
        self._carried_max = min(len(scratch) // CARRIED_SHARE, payload_max)
        self._allocate = allocate
        header = EXTENDED_REQUEST if is_extended else COMPACT_REQUEST
        self.unpack: Callable[[memoryview, int], tuple[Any, ...]] = header.unpack_from
        self.header_size = header.size
        self._is_extended = is_extended
        self.magic = EXTENDED_REQUEST_MAGIC if is_extended else REQUEST_MAGIC
        self._carry = b""
        self._position = 0
        self._end = 0
        self._partial: Request | None = None
        self._payload: memoryview | None = None
        self._filled = 0
        self.starved = False
        self.is_last_payload = False
        """Whether nothing is wanted behind the payload that is being filled."""

    def is_mid_request(self) -> bool:
        """Whether bytes of an unfinished request have arrived."""
        return self._partial is not None or bool(self._carry)

    @property
    def carried(self) -> bytes:
        """What `park` has kept, behind the last request or the part of a payload that has come."""
        return self._carry

    @property
    def is_mid_payload(self) -> bool:
        """Whether a payload has a buffer of its own, which is not full yet."""
        return self._payload is not None

    def buffers(self) -> list[memoryview]:
        """Where the next bytes belong, in this order; never empty."""
        if self._payload is not None:
            assert not self._carry, "R1: what was parked is parsed before more is received"
            rest = self._payload[self._filled :]
            return [rest] if self.is_last_payload else [rest, self._spill(len(self._payload))]
        carry = self._carry
        self._position = 0
        self._end = len(carry)
        if carry:
            self._scratch[: self._end] = carry
            self._carry = b""
        return [self._scratch[self._end :]]

    def _spill(self, payload_size: int) -> memoryview:
        """Room for whole requests behind a payload of at most half the shared buffer; for little behind longer ones."""
        return self._scratch if 2 * payload_size <= len(self._scratch) else self._scratch[: self._spill_size]

    def received(self, count: int) -> None:
        """`count` bytes were put into the views that `buffers` returned."""
        payload = self._payload
        if payload is None:
            self._end += count
            return
        taken = min(count, len(payload) - self._filled)
        self._filled += taken
        self._position = 0
        self._end = count - taken

    def feed(self, data: bytes) -> None:
        """Bytes that arrived by another way, behind the handshake: kept for the next turn.

        Raises: ProtocolError: more than the receive buffer holds.
        """
        if len(self._carry) + len(data) > len(self._scratch):
            raise ProtocolError(f"{len(data)} bytes were sent behind the handshake before its answer")
        self._carry += data

    def window(self) -> tuple[memoryview, int, int]:
        """The shared buffer, and from where to where it holds bytes that are not parsed yet: none while a payload of
        its own is being filled.
        """
        if self._payload is not None:
            return self._scratch, 0, 0
        return self._scratch, self._position, self._end

    def offset_at(self, position: int) -> int | None:
        """What the header at `position` of the window, if one has come, says of where its request is about."""
        if position + self.header_size > self._end:
            return None
        offset: int = self.unpack(self._scratch, position)[4]
        return offset

    def advance(self, position: int) -> None:
        """Whole requests up to `position` of the window were dealt with by the caller."""
        if self._payload is None:
            self._position = position

    def next_request(self) -> Request | None:
        """The next complete request, or None when more bytes or more room are needed.

        Raises: ProtocolError: the magic is wrong or the payload too long: the stream cannot go on.
        """
        if self._payload is not None:
            return self._with_own_payload()
        position = self._position
        body = position + self.header_size
        if body > self._end:
            return None
        magic, flags, command, cookie, offset, length = self.unpack(self._scratch, position)
        if magic != self.magic:
            raise ProtocolError(f"request magic is {magic:#010x}, expected {self.magic:#010x}")
        if command == _WRITE:
            if self._is_extended:
                flags &= ~_PAYLOAD_LEN
            stop = body + length
            if stop <= self._end and length <= self._payload_max:
                self._position = stop
                self.starved = False
                return Request(command, flags, cookie, offset, length, self._scratch[body:stop])
            if length <= self._carried_max:
                return None
            return self._begin_payload(Request(command, flags, cookie, offset, length), body)
        if flags & _PAYLOAD_LEN and self._is_extended:
            return self._begin_payload(PayloadRequest(command, flags, cookie, offset, length), body)
        self._position = body
        return Request(command, flags, cookie, offset, length)

    def _begin_payload(self, request: Request, start: int) -> Request | None:
        """A payload of its own buffer: what has arrived of it is copied there."""
        length = request.length
        if length > self._payload_max:
            raise ProtocolError(f"payload of command {request.command} is {length} bytes, allowed {self._payload_max}")
        payload = self._allocate(length)
        if payload is None:
            self.starved = True
            return None
        self.starved = False
        self._filled = min(self._end - start, length)
        payload[: self._filled] = self._scratch[start : start + self._filled]
        self._position = start + self._filled
        self._payload, self._partial = payload, request
        return self._with_own_payload()

    def _with_own_payload(self) -> Request | None:
        payload, request = self._payload, self._partial
        assert payload is not None
        assert request is not None
        if self._filled < len(payload):
            return None
        self._payload = self._partial = None
        self._filled = 0
        request.payload = payload
        request.owns_payload = True
        if isinstance(request, PayloadRequest):
            self._interpret(request, payload)
        return request

    def _interpret(self, request: PayloadRequest, payload: memoryview) -> None:
        """Spec: extension-ext-header "NBD_CMD_BLOCK_STATUS": effect length u64, then ids u32."""
        if request.command != _BLOCK_STATUS:
            request.fault = f"command {request.command} takes no payload"
        elif 8 <= len(payload) <= 8 + 4 * CONTEXT_IDS_MAX and len(payload) % 4 == 0:
            (request.length,) = unpack_from(">Q", payload)
            request.contexts = unpack_from(f">{(len(payload) - 8) // 4}I", payload, 8)
        else:
            request.fault = (
                f"block status payload is {len(payload)} bytes, expected 8 + 4n, n at most {CONTEXT_IDS_MAX}"
            )

    def abandon(self) -> memoryview | None:
        """The buffer of a payload that has not come whole, for its owner to have again. Its request is forgotten, and
        what `park` has kept.
        """
        payload, self._payload, self._partial = self._payload, None, None
        self._filled = 0
        self._carry = b""
        return payload

    def park(self) -> None:
        """Give up the shared buffer at the end of a turn: what was not parsed is copied."""
        if self._position < self._end:
            self._carry = bytes(self._scratch[self._position : self._end])
        self._position = self._end = 0

    def resume(self) -> None:
        """Parse again what `park` kept, without new bytes: room was found, or a turn's budget had run out."""
        if self._payload is None:
            self.buffers()
        elif self._carry:
            self._scratch[: len(self._carry)] = self._carry
            self._position, self._end = 0, len(self._carry)
            self._carry = b""
