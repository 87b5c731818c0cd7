"""TLS between a socket and the transmission phase.

    socket ──recv──▶ incoming BIO ──▶ SSL object ──read──▶ the buffers that the receiver laid out
    socket ◀──send── backlog ◀── outgoing BIO ◀── SSL object ◀──write── records gathered from outgoing parts

`TlsSocket` takes the place of a connection's socket at STARTTLS: the same calls with the same outcomes, so that the
plain path has no trace of it. Ciphertext goes through the BIOs a record at a time, or as many small ones as are no
longer than one, because a BIO keeps the memory that it once grew to; and whole, because the SSL object raises an
exception over each record that is not.

    (E1) After a receive no complete record is left inside, unless `has_more`: else a quiet descriptor means that there
         is nothing to read.
    (E2) Ciphertext that waits for the socket is at most BATCH records and a few control messages: nothing is encrypted
         before it has left.

A peer that closes without close_notify is taken as one that has closed: half a request changes nothing anyway.
Renegotiation, compression and session tickets are off. Spec: proto.md "TLS support"; RFC 8446.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from typing import cast

from nbdimg.config import TlsConfig
from nbdimg.errors import TlsError
from nbdimg.server.credentials import Credentials, reason
from nbdimg.units import KiB
from nbdimg.wire.handshake import TlsMode

RECORD_SIZE = 16 * KiB
"""The longest plaintext of one TLS record."""

BATCH = 16
"""Records that leave in one system call."""

BACKLOG_MAX = 1024 * KiB
"""Ciphertext that may wait for one socket. Data never reaches it (E2), answers to key updates might in the long run."""

PIECE_RECORDS_MAX = 64
"""Records given to the SSL object at once."""

RECORDS_MAX = 512
"""Records of one receive, about half a millisecond. What has come behind them is kept for the next: the records of
256 KiB, with a byte in each, take 14 ms."""

CONTROLS_MAX = 16
"""Records without data in one receive. A key update costs up to 30 µs, and real clients send one in many GiB."""

CIPHERTEXT_SIZE = 256 * KiB
"""Ciphertext taken from a socket at once."""


HEADER_SIZE = 5
RECORD_OVERHEAD_MAX = 2048
"""What a record may have beside its plaintext. Spec: RFC 5246 6.2.3; in TLS 1.3 it is 256."""

_NOTHING = memoryview(b"")

_ReadInto = Callable[[int, memoryview], int]
"""`SSLObject.read` with a buffer; typeshed knows bytearray alone."""


class Workspace:
    """Buffers of one loop that belong to whoever has the turn."""

    def __init__(self) -> None:
        self.ciphertext = memoryview(bytearray(CIPHERTEXT_SIZE))
        self.plaintext = memoryview(bytearray(RECORD_SIZE))


class Records:
    """Where records end in a stream of them: type u8, version u16, length u16, `length` bytes. Spec: RFC 8446 5.1."""

    __slots__ = ("_header", "_missing", "whole_count")

    def __init__(self) -> None:
        self.whole_count = 0
        """Records that have come to their end."""
        self._header = b""
        """What has come of the header of a record under way, until it is whole."""
        self._missing = 0
        """Bytes of a record under way behind its header."""

    def cut(self, stream: memoryview, at: int, stop: int) -> int:
        """Where to cut a stream of which `at` to `stop` has come: behind as many whole records, PIECE_RECORDS_MAX at
        most, as RECORD_SIZE holds, or behind the one that begins or goes on at `at`; `stop` if that one is not whole.
        Ask for each piece in turn.
        """
        if not self._missing and not self._header:
            end, last, count = at, min(stop, at + RECORD_SIZE) - HEADER_SIZE, 0
            while end <= last and count < PIECE_RECORDS_MAX:
                next_end = end + HEADER_SIZE + (stream[end + 3] << 8 | stream[end + 4])
                if next_end > last + HEADER_SIZE:
                    break
                end = next_end
                count += 1
            if end > at:
                self.whole_count += count
                return end
        return self._end(stream, at, stop)

    def _end(self, stream: memoryview, at: int, stop: int) -> int:
        """Where one record ends, or `stop`."""
        body = at
        if not self._missing:
            header = self._header
            body += HEADER_SIZE - len(header)
            if body > stop:
                self._header = header + bytes(stream[at:stop])
                return stop
            header += bytes(stream[at:body])
            self._header = b""
            self._missing = min(header[3] << 8 | header[4], RECORD_SIZE + RECORD_OVERHEAD_MAX)
        end = min(body + self._missing, stop)
        self._missing -= end - body
        if not self._missing:
            self.whole_count += 1
        return end


class Tls:
    """A server's TLS as `config` says, with its files as they are now. New files make a new one.

    Raises: ConfigError: as `Credentials`.
    """

    def __init__(self, config: TlsConfig) -> None:
        self.mode = TlsMode(config.mode)
        self._credentials = Credentials(config)
        self._work = Workspace()

    def wrap(self, sock: socket.socket) -> TlsSocket:
        return TlsSocket(sock, self._credentials, self._work)


class TlsSocket:
    """A non-blocking socket under TLS, server side. The handshake comes first: `advance` until it says who is there.

    Where a socket would block, or no whole record has come, BlockingIOError is raised as a socket does.
    """

    __slots__ = (
        "_backlog",
        "_credentials",
        "_has_ended",
        "_incoming",
        "_is_goodbye_said",
        "_kept",
        "_outgoing",
        "_proposed",
        "_read_count",
        "_records",
        "_sock",
        "_ssl",
        "_work",
        "sent_bytes",
    )

    def __init__(self, sock: socket.socket, credentials: Credentials, work: Workspace) -> None:
        self._sock = sock
        self._credentials = credentials
        self._work = work
        self._incoming = ssl.MemoryBIO()
        self._records = Records()
        self._outgoing = ssl.MemoryBIO()
        self._ssl = credentials.context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._proposed: frozenset[str] = frozenset()
        self._backlog: bytes | memoryview = b""
        self._read_count = 0
        """Reads that gave data: of one record each, at most."""
        self._kept = _NOTHING
        """Ciphertext that has come behind RECORDS_MAX records."""
        self._has_ended = False
        """close_notify has come."""
        self._is_goodbye_said = False
        self.sent_bytes = 0
        """Ciphertext that has left."""

    def fileno(self) -> int:
        return self._sock.fileno()

    # The handshake

    def advance(self) -> frozenset[str] | None:
        """Take the next bytes of the client's handshake. Returns the client's identities when it is complete.

        Its answers wait in the backlog: `flush` follows, also behind a TlsError, which owes the peer an alert.

        Raises: BlockingIOError; OSError; TlsError: the handshake has failed.
        """
        work = self._work.ciphertext[:RECORD_SIZE]
        count = self._sock.recv_into(work)
        if not count:
            raise TlsError("left in the middle of the TLS handshake")
        self._incoming.write(work[:count])
        at = 0
        while at < count:
            at = self._records.cut(work, at, count)
        try:
            self._proposed = self._credentials.advance(self._ssl, self._proposed)
        except ssl.SSLError as error:
            raise TlsError(f"TLS handshake: {reason(error)}") from None
        if self._ssl.version() is None:
            return None
        return self._credentials.identities(self._ssl, self._proposed)

    @property
    def version(self) -> str | None:
        """The protocol's, as "TLSv1.3"; None before the handshake is complete."""
        return self._ssl.version()

    def has_input(self) -> bool:
        """Whether bytes came behind the handshake in the same receive."""
        return self._incoming.pending > 0

    # In

    @property
    def has_more(self) -> bool:
        """Whether the next receive may give bytes, or the end of input, of which the descriptor does not tell."""
        return self._has_ended or bool(self._kept)

    def recv(self, size: int) -> bytes:
        """At most `size` bytes; b"" at the end of input."""
        view = memoryview(bytearray(size))
        return bytes(view[: self._receive([view])])

    def recv_into(self, view: memoryview) -> int:
        return self._receive([view])

    def recvmsg_into(self, views: Sequence[memoryview]) -> tuple[int]:
        return (self._receive(views),)

    def _receive(self, views: Sequence[memoryview]) -> int:
        """Bytes put into `views`, which have room for two records at least; 0 at the end of input.

        Raises: BlockingIOError; OSError; TlsError: what came is no TLS, was tampered with, is an alert, or holds too
            many records without data.
        """
        filled = self._decrypt(views, 0)
        if filled or self._has_ended:
            return filled
        # A record of which a part has come lies inside: its plaintext needs room too (E1).
        size = sum(map(len, views)) - RECORD_SIZE
        assert size > 0, "E1: room for two records"
        if self._kept:
            work = self._kept
            count = min(size, len(work))
        else:
            work = self._work.ciphertext
            count = self._sock.recv_into(work[: min(size, len(work))])
        at = 0
        records = self._records
        records.whole_count = self._read_count = 0
        while at < count and records.whole_count < RECORDS_MAX:
            end = records.cut(work, at, count)
            self._incoming.write(work[at:end])
            at = end
            filled = self._decrypt(views, filled)
            if records.whole_count - self._read_count > CONTROLS_MAX:
                raise TlsError(f"more than {CONTROLS_MAX} records without data at once")
        if self._kept:
            self._kept = work[at:] if at < len(work) else _NOTHING
        elif at < count:
            self._kept = memoryview(bytes(work[at:count]))
        if self._outgoing.pending:
            self.flush()
        if count and not filled and not self._has_ended:
            raise BlockingIOError
        return filled

    def _decrypt(self, views: Sequence[memoryview], filled: int) -> int:
        """Read what is inside into `views`, of which `filled` bytes are taken; returns how many are then."""
        read, incoming = cast("_ReadInto", self._ssl.read), self._incoming
        start = 0
        try:
            for view in views:
                stop = start + len(view)
                while filled < stop and not self._has_ended and (incoming.pending or self._ssl.pending()):
                    rest = view[filled - start :]
                    count = read(len(rest), rest)
                    filled += count
                    self._read_count += 1
                    self._has_ended = not count
                start = stop
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            raise TlsError(f"TLS: {reason(error)}") from None
        return filled

    # Out

    @property
    def backlog_size(self) -> int:
        """Bytes of ciphertext that wait for the socket."""
        return len(self._backlog)

    def send(self, data: bytes | memoryview) -> int:
        return self.sendmsg([data])

    def sendmsg(self, parts: Sequence[bytes | memoryview]) -> int:
        """Encrypt and send BATCH records at most. Returns how many bytes were taken: they leave now or, as
        `backlog_size` tells, with the next `flush`.

        Raises: BlockingIOError: earlier ciphertext waits still; OSError.
        """
        if not self.flush():
            raise BlockingIOError
        taken = 0
        records: list[bytes] = []
        for piece in self._pieces(parts):
            self._ssl.write(piece)
            records.append(self._outgoing.read())
            taken += len(piece)
            if len(records) == BATCH:
                break
        try:
            sent = self._sock.sendmsg(records)
        except (BlockingIOError, InterruptedError):
            sent = 0
        self.sent_bytes += sent
        if sent < sum(map(len, records)):
            self._backlog = memoryview(b"".join(records))[sent:]
        return taken

    def _pieces(self, parts: Sequence[bytes | memoryview]) -> Iterator[memoryview]:
        """`parts` cut and joined to pieces of a record's size; each is used before the next is made."""
        joined, fill = self._work.plaintext, 0
        for part in parts:
            view, at = memoryview(part), 0
            while at < len(view):
                if not fill and len(view) - at >= RECORD_SIZE:
                    yield view[at : at + RECORD_SIZE]
                    at += RECORD_SIZE
                    continue
                count = min(RECORD_SIZE - fill, len(view) - at)
                joined[fill : fill + count] = view[at : at + count]
                fill += count
                at += count
                if fill == RECORD_SIZE:
                    yield joined
                    fill = 0
        if fill:
            yield joined[:fill]

    def flush(self) -> bool:
        """Send ciphertext that waits. Returns whether all of it has left. Raises: OSError."""
        if self._outgoing.pending:
            self._backlog = bytes(self._backlog) + self._outgoing.read()
        if not self._backlog:
            return True
        if len(self._backlog) > BACKLOG_MAX:
            raise ConnectionAbortedError(errno.ECONNABORTED, "TLS control messages are asked for and not taken")
        try:
            sent = self._sock.send(self._backlog)
        except (BlockingIOError, InterruptedError):
            return False
        self.sent_bytes += sent
        self._backlog = self._backlog[sent:]
        return not self._backlog

    def say_goodbye(self) -> None:
        """Say close_notify, once, if it goes without waiting. Raises: OSError."""
        if not self._is_goodbye_said and self.flush():
            self._is_goodbye_said = True
            with contextlib.suppress(ssl.SSLError):
                self._ssl.unwrap()
            self.flush()

    def close(self) -> None:
        """Say close_notify if it goes without waiting, and close the socket.

        What the client has said meanwhile, its own close_notify as a rule, is taken out of the socket: to close over
        unread bytes resets the connection, and the reset may overtake the last replies.
        """
        with contextlib.suppress(OSError):
            self.say_goodbye()
            self._sock.recv_into(self._work.ciphertext)
        self._sock.close()
