"""A blocking NBD client that shows the wire: it sends what it is told to, valid or not, and checks what comes back.

Nothing is imported from `nbdimg`. Sending never validates. Receiving does: a reply that breaks proto.md raises
`ProtocolViolation` (a simple reply to a read after structured replies were negotiated, a content chunk outside its
request, a successful read that leaves a gap, an extended reply that does not echo the offset, ...), so every test that
reads replies also checks those rules.

    client = Client("/run/nbd.sock")        or  Client(("127.0.0.1", 10809))
    client.greet()
    client.negotiate("disk", contexts=["base:allocation"])
    reply = client.read(0, 4096)
"""

from __future__ import annotations

import errno
import math
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from tests.support.rawprotocol import (
    EXPORT_NAME_PADDING,
    EXTENDED_REPLY_MAGIC,
    EXTENT_COUNT_MAX,
    FIXED_NEWSTYLE,
    GREETING,
    KIB,
    NBD_MAGIC,
    NO_ZEROES,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    REPLY_DONE,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    ChunkType,
    Command,
    CommandFlag,
    ConnectionClosed,
    ExportInfo,
    Info,
    Option,
    OptionReply,
    ProtocolViolation,
    Rep,
    Reply,
    Request,
    TransmissionFlag,
    info_data,
    meta_data,
    option_bytes,
    parse_infos,
)


class Client:
    """One connection. `address` is the path of a Unix socket or (host, port); all waiting ends at `timeout_s`."""

    def __init__(self, address: str | tuple[str, int], timeout_s: float = 30.0) -> None:
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        # Connecting to a Unix socket with a full backlog waits only in blocking mode; this limits the wait.
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", math.ceil(timeout_s), 0))
        try:
            self.sock.connect(address)
        except OSError:
            self.sock.close()
            raise
        self.sock.settimeout(timeout_s)
        if family == socket.AF_INET:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.structured = False
        self.extended = False
        self.no_zeroes = False
        self.export = ExportInfo()
        self.contexts: dict[str, int] = {}
        self._buffer = bytearray()
        self._next_cookie = 1
        self._outstanding: dict[int, deque[Request]] = {}
        self._partial: dict[int, _Assembly] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Bytes

    def send(self, data: bytes) -> None:
        """Send all of it. Raises: ConnectionClosed when the server no longer takes it."""
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ConnectionClosed(error.strerror or "send") from error

    def send_while_taken(self, data: bytes, idle_s: float = 0.5) -> int:
        """Send until all is sent, the server closes, or nothing was taken for `idle_s`; returns the bytes sent."""
        sent = 0
        view = memoryview(data)
        timeout_s = self.sock.gettimeout()
        self.sock.setblocking(False)
        try:
            while sent < len(data):
                try:
                    sent += self.sock.send(view[sent : sent + 64 * KIB])
                except BlockingIOError:
                    if not select.select([], [self.sock], [], idle_s)[1]:
                        break
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            self.sock.settimeout(timeout_s)
        return sent

    def receive(self, length: int) -> bytes:
        """Exactly `length` bytes. Raises: ConnectionClosed; TimeoutError."""
        while len(self._buffer) < length:
            if length - len(self._buffer) > 256 * KIB:
                return self._receive_long(length)
            piece = self._receive_some(256 * KIB)
            if not piece:
                raise ConnectionClosed("end of stream", bytes(self._buffer))
            self._buffer += piece
        data = bytes(self._buffer[:length])
        del self._buffer[:length]
        return data

    def receive_ahead(self, length: int) -> None:
        """Take `length` more bytes out of the socket and keep them for the replies that they belong to."""
        self._buffer = bytearray(self._receive_long(len(self._buffer) + length))

    def _receive_long(self, length: int) -> bytes:
        data = bytearray(length)
        filled = len(self._buffer)
        data[:filled] = self._buffer
        self._buffer.clear()
        view = memoryview(data)
        while filled < length:
            try:
                count = self.sock.recv_into(view[filled:])
            except ConnectionResetError as error:
                raise ConnectionClosed("reset") from error
            if count == 0:
                raise ConnectionClosed("end of stream", bytes(view[:64]))
            filled += count
        return bytes(data)

    def _receive_some(self, length: int) -> bytes:
        try:
            return self.sock.recv(length)
        except ConnectionResetError as error:
            raise ConnectionClosed("reset", bytes(self._buffer)) from error

    def wait_closed(self, timeout_s: float) -> float | None:
        """Discard what arrives until the server closes; seconds that took, None if it did not within `timeout_s`."""
        start = time.monotonic()
        while (left := start + timeout_s - time.monotonic()) > 0:
            if not select.select([self.sock], [], [], left)[0]:
                break
            try:
                if not self.sock.recv(256 * KIB):
                    return time.monotonic() - start
            except (ConnectionResetError, BrokenPipeError):
                return time.monotonic() - start
        return None

    def is_closed_without_reading(self) -> bool:
        """Whether the server has closed or reset the connection; leaves every byte in the socket.

        POLLHUP and POLLERR come when the peer is gone altogether, whatever is still unread.
        """
        poll = select.poll()
        poll.register(self.sock, 0)
        return bool(poll.poll(0))

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close so that TCP sends RST; a Unix socket with unread replies does the same."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self) -> None:
        self.sock.close()

    # Handshake

    def greet(self, client_flags: int | None = FIXED_NEWSTYLE | NO_ZEROES) -> int:
        """Read the greeting and send the client flags (None: send nothing); returns the handshake flags."""
        magic, option_magic, flags = GREETING.unpack(self.receive(GREETING.size))
        if (magic, option_magic) != (NBD_MAGIC, OPTION_MAGIC):
            raise ProtocolViolation(f"greeting {magic:#x} {option_magic:#x}")
        if flags & ~(FIXED_NEWSTYLE | NO_ZEROES):
            raise ProtocolViolation(f"unknown handshake flags {flags:#x}")
        if client_flags is not None:
            self.send(struct.pack(">I", client_flags))
            self.no_zeroes = bool(client_flags & NO_ZEROES)
        return int(flags)

    def send_option(self, option: int, data: bytes = b"", length: int | None = None, magic: int = OPTION_MAGIC) -> None:
        self.send(option_bytes(option, data, length, magic))

    def read_option_reply(self) -> OptionReply:
        magic, option, reply_type, length = OPTION_REPLY.unpack(self.receive(OPTION_REPLY.size))
        if magic != OPTION_REPLY_MAGIC:
            raise ProtocolViolation(f"option reply magic {magic:#x}")
        reply = OptionReply(option, reply_type, self.receive(length))
        if reply.is_error:
            if length > 4096:
                raise ProtocolViolation(f"error text of {length} bytes")
            if "\0" in reply.text:
                raise ProtocolViolation(f"NUL in error text {reply.text!r}")
        return reply

    def read_option_replies(self, option: int) -> list[OptionReply]:
        """The replies to one option up to and with the final one."""
        replies: list[OptionReply] = []
        while not replies or not replies[-1].is_final:
            replies.append(self.read_option_reply())
            if replies[-1].option != option:
                raise ProtocolViolation(f"reply to option {replies[-1].option}, expected {option}")
        return replies

    def option(self, option: int, data: bytes = b"") -> list[OptionReply]:
        self.send_option(option, data)
        return self.read_option_replies(option)

    def info(self, name: str = "", infos: Sequence[int] = (), option: int = Option.INFO) -> ExportInfo:
        """INFO or GO that has to succeed. Raises: ProtocolViolation with the server's error text."""
        replies = self.option(option, info_data(name, infos))
        if replies[-1].is_error:
            raise ProtocolViolation(f"option {option} refused with {replies[-1].type:#x}: {replies[-1].text}")
        return parse_infos(replies)

    def go(self, name: str = "", infos: Sequence[int] = (Info.BLOCK_SIZE,)) -> ExportInfo:
        self.export = self.info(name, infos, Option.GO)
        return self.export

    def export_name(self, name: str = "") -> ExportInfo:
        """Enter transmission by EXPORT_NAME. Raises: ConnectionClosed when the export is unknown."""
        self.send_option(Option.EXPORT_NAME, name.encode())
        size, flags = struct.unpack(">QH", self.receive(10))
        if not self.no_zeroes and any(self.receive(EXPORT_NAME_PADDING)):
            raise ProtocolViolation("padding of EXPORT_NAME is not zero")
        self.export = ExportInfo(size, TransmissionFlag(flags))
        return self.export

    def negotiate(
        self,
        name: str = "",
        structured: bool = True,
        extended: bool = False,
        contexts: Sequence[str] = (),
        infos: Sequence[int] = (Info.BLOCK_SIZE,),
    ) -> ExportInfo:
        """Options in the usual order up to GO. Raises: ProtocolViolation when one of them is refused."""
        if structured:
            self._acknowledged(Option.STRUCTURED_REPLY)
            self.structured = True
        if extended:
            self._acknowledged(Option.EXTENDED_HEADERS)
            self.structured = self.extended = True
        if contexts:
            self.set_meta_contexts(name, contexts)
        return self.go(name, infos)

    def _acknowledged(self, option: int) -> None:
        replies = self.option(option)
        if replies[-1].type != Rep.ACK:
            raise ProtocolViolation(f"option {option} refused with {replies[-1].type:#x}: {replies[-1].text}")

    def set_meta_contexts(self, name: str, queries: Sequence[str]) -> dict[str, int]:
        """SET_META_CONTEXT that has to succeed; returns {context: id}, which `contexts` keeps."""
        replies = self.option(Option.SET_META_CONTEXT, meta_data(name, queries))
        if replies[-1].is_error:
            raise ProtocolViolation(f"SET_META_CONTEXT refused: {replies[-1].text}")
        selected = [(reply.data[4:].decode(), struct.unpack(">I", reply.data[:4])[0]) for reply in replies[:-1]]
        if len({identifier for _, identifier in selected}) != len(selected):
            raise ProtocolViolation(f"metadata context ids are not unique: {selected}")
        self.contexts = dict(selected)
        return self.contexts

    # Transmission

    def new_request(
        self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b""
    ) -> Request:
        """A request with a fresh cookie. With extended headers a WRITE gets PAYLOAD_LEN, as proto.md demands."""
        if self.extended and command == Command.WRITE:
            flags |= CommandFlag.PAYLOAD_LEN
        cookie = self._next_cookie
        self._next_cookie += 1
        return Request(command, cookie, offset, length, flags, payload)

    def send_requests(self, requests: Iterable[Request], magic: int | None = None) -> None:
        """Send them back to back in one call, reading nothing."""
        self.send(self._serialized(requests, magic))

    def pipeline(self, requests: Iterable[Request], idle_s: float = 0.5) -> int:
        """Send as many bytes of them as the server takes (`send_while_taken`), reading nothing; returns that number."""
        return self.send_while_taken(self._serialized(requests), idle_s)

    def _serialized(self, requests: Iterable[Request], magic: int | None = None) -> bytes:
        return b"".join(self.announce(request, magic) for request in requests)

    def announce(self, request: Request, magic: int | None = None) -> bytes:
        """Expect a reply to the request and return its bytes, which the caller sends the way it likes."""
        self._outstanding.setdefault(request.cookie, deque()).append(request)
        return request.serialize(self.extended, magic)

    def reads(self, count: int, length: int, offset: int = 0, stride: int = 0) -> list[Request]:
        """`count` READ requests of `length` bytes, each `stride` bytes after the one before."""
        return [self.new_request(Command.READ, offset + index * stride, length) for index in range(count)]

    def request(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> Reply:
        """Send one request and read its reply; nothing else may be outstanding."""
        request = self.new_request(command, offset, length, flags, payload)
        self.send_requests([request])
        reply = self.read_reply()
        if reply.cookie != request.cookie:
            raise ProtocolViolation(f"reply to cookie {reply.cookie}, expected {request.cookie}")
        return reply

    def read(self, offset: int, length: int, flags: int = 0) -> Reply:
        return self.request(Command.READ, offset, length, flags)

    def write(self, offset: int, data: bytes, flags: int = 0) -> Reply:
        return self.request(Command.WRITE, offset, len(data), flags, data)

    def disconnect(self) -> None:
        """Send DISC, which has no reply."""
        self.send(self.new_request(Command.DISC).serialize(self.extended))

    def read_chunk(self) -> Chunk:
        """The next reply message. Raises: ProtocolViolation when its form is not the negotiated one."""
        magic = int.from_bytes(self.receive(4), "big")
        if magic == SIMPLE_REPLY_MAGIC and not self.extended:
            error, cookie = struct.unpack(">IQ", self.receive(12))
            request = self._oldest(cookie)
            is_read = request.command == Command.READ
            if is_read and self.structured:
                raise ProtocolViolation("simple reply to a READ after STRUCTURED_REPLY")
            payload = self.receive(request.length) if is_read and error == 0 else b""
            return Chunk("simple", REPLY_DONE, ChunkType.NONE, cookie, payload, error)
        if magic == STRUCTURED_REPLY_MAGIC and self.structured and not self.extended:
            flags, chunk_type, cookie, length = struct.unpack(">HHQI", self.receive(16))
            return Chunk("structured", flags, chunk_type, cookie, self.receive(length))
        if magic == EXTENDED_REPLY_MAGIC and self.extended:
            flags, chunk_type, cookie, offset, length = struct.unpack(">HHQQQ", self.receive(28))
            return Chunk("extended", flags, chunk_type, cookie, self.receive(length), offset=offset)
        raise ProtocolViolation(f"reply magic {magic:#x} is not of the negotiated form")

    def _oldest(self, cookie: int) -> Request:
        queue = self._outstanding.get(cookie)
        if not queue:
            raise ProtocolViolation(f"reply to cookie {cookie:#x}, which is not outstanding")
        return queue[0]

    def read_reply(self) -> Reply:
        """The next reply that is complete, whichever request it answers."""
        while True:
            chunk = self.read_chunk()
            assembly = self._partial.get(chunk.cookie)
            if assembly is None:
                assembly = self._partial[chunk.cookie] = _Assembly(self._oldest(chunk.cookie), chunk.form)
            assembly.add(chunk)
            if chunk.flags & REPLY_DONE:
                del self._partial[chunk.cookie]
                queue = self._outstanding[chunk.cookie]
                queue.popleft()
                if not queue:
                    del self._outstanding[chunk.cookie]
                return assembly.finish(set(self.contexts.values()))

    def read_replies(self, count: int) -> list[Reply]:
        return [self.read_reply() for _ in range(count)]


class _Assembly:
    """Collects the chunks of one reply and holds them against proto.md."""

    def __init__(self, request: Request, form: str) -> None:
        self.request = request
        self.reply = Reply(request.cookie, form)
        self._content: list[tuple[int, bytes | int]] = []

    def add(self, chunk: Chunk) -> None:
        self.reply.chunk_count += 1
        if chunk.form == "extended" and chunk.offset != self.request.offset:
            raise ProtocolViolation(f"extended reply with offset {chunk.offset}, request had {self.request.offset}")
        if chunk.flags & ~REPLY_DONE:
            raise ProtocolViolation(f"unknown reply flags {chunk.flags:#x}")
        if chunk.form == "simple":
            self.reply.error = chunk.error
            if chunk.payload:
                self._content.append((self.request.offset, chunk.payload))
        elif chunk.type == ChunkType.NONE:
            if chunk.payload or not chunk.flags & REPLY_DONE:
                raise ProtocolViolation("chunk NONE with a payload or without DONE")
        elif chunk.type in (ChunkType.OFFSET_DATA, ChunkType.OFFSET_HOLE):
            self._add_content(chunk)
        elif chunk.type in (ChunkType.BLOCK_STATUS, ChunkType.BLOCK_STATUS_EXT):
            self._add_extents(chunk)
        elif chunk.type in (ChunkType.ERROR, ChunkType.ERROR_OFFSET):
            self._add_error(chunk)
        else:
            raise ProtocolViolation(f"unknown chunk type {chunk.type:#x}")

    def _add_content(self, chunk: Chunk) -> None:
        if self.request.command != Command.READ:
            raise ProtocolViolation(f"content chunk for command {self.request.command}")
        offset = int.from_bytes(chunk.payload[:8], "big")
        if chunk.type == ChunkType.OFFSET_HOLE:
            if len(chunk.payload) != 12:
                raise ProtocolViolation(f"hole chunk of {len(chunk.payload)} bytes")
            length = int.from_bytes(chunk.payload[8:], "big")
            self.reply.holes.append((offset, length))
            self._content.append((offset, length))
        else:
            length = len(chunk.payload) - 8
            self._content.append((offset, chunk.payload[8:]))
        if length < 1 or offset < self.request.offset:
            raise ProtocolViolation(f"content chunk at {offset} with {length} bytes")
        if offset + length > self.request.offset + self.request.length:
            raise ProtocolViolation(f"content chunk at {offset} with {length} bytes leaves the request")

    def _add_extents(self, chunk: Chunk) -> None:
        if self.request.command != Command.BLOCK_STATUS:
            raise ProtocolViolation(f"extents for command {self.request.command}")
        is_extended = chunk.form == "extended"
        if is_extended != (chunk.type == ChunkType.BLOCK_STATUS_EXT):
            raise ProtocolViolation(f"chunk type {chunk.type} in the {chunk.form} form")
        context = int.from_bytes(chunk.payload[:4], "big")
        body = chunk.payload[8:] if is_extended else chunk.payload[4:]
        extents = list(struct.iter_unpack(">QQ" if is_extended else ">II", body))
        if is_extended and int.from_bytes(chunk.payload[4:8], "big") != len(extents):
            raise ProtocolViolation("the extent count differs from the payload")
        if context in self.reply.extents:
            raise ProtocolViolation(f"two chunks for the metadata context {context}")
        if not 1 <= len(extents) <= EXTENT_COUNT_MAX or any(length == 0 for length, _ in extents):
            raise ProtocolViolation(f"{len(extents)} extents, or an empty one")
        if sum(length for length, _ in extents[:-1]) >= self.request.length:
            raise ProtocolViolation("an extent begins beyond the request")
        is_one_inside = len(extents) == 1 and extents[0][0] <= self.request.length
        if self.request.flags & CommandFlag.REQ_ONE and not is_one_inside:
            raise ProtocolViolation(f"REQ_ONE answered with {extents}")
        self.reply.extents[context] = [(length, flags) for length, flags in extents]

    def _add_error(self, chunk: Chunk) -> None:
        error, text_length = struct.unpack(">IH", chunk.payload[:6])
        tail = 8 if chunk.type == ChunkType.ERROR_OFFSET else 0
        if error == 0 or len(chunk.payload) != 6 + text_length + tail or text_length > 4096:
            raise ProtocolViolation(f"malformed error chunk {chunk.payload[:64]!r}")
        if self.reply.error == 0:
            self.reply.error = error
            self.reply.error_text = chunk.payload[6 : 6 + text_length].decode()
        if tail:
            self.reply.error_offset = int.from_bytes(chunk.payload[-8:], "big")
            if not self.request.offset <= self.reply.error_offset < self.request.offset + self.request.length:
                raise ProtocolViolation(f"error offset {self.reply.error_offset} lies outside the request")

    def finish(self, selected: set[int]) -> Reply:
        """The reply, complete. Raises: ProtocolViolation on overlapping content, a gap, or a missing context."""
        self._content.sort(key=lambda part: part[0])
        if self.request.flags & CommandFlag.DF and len(self._content) > 1:
            raise ProtocolViolation(f"{len(self._content)} content chunks in spite of DF")
        pieces: list[bytes] = []
        position = self.request.offset
        for offset, content in self._content:
            if offset < position or (offset > position and self.reply.error == 0):
                raise ProtocolViolation(f"content at {offset}, expected {position}")
            piece = bytes(content)
            pieces.append(piece)
            position = offset + len(piece)
        if self.request.command == Command.READ and self.reply.error == 0:
            if position != self.request.offset + self.request.length:
                raise ProtocolViolation(f"the read ends at {position}")
            self.reply.data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        has_all = set(self.reply.extents) == selected or self.request.flags & CommandFlag.PAYLOAD_LEN
        if self.request.command == Command.BLOCK_STATUS and self.reply.error == 0 and not has_all:
            raise ProtocolViolation(f"extents of {sorted(self.reply.extents)}, selected {sorted(selected)}")
        return self.reply


def try_connect(address: str | tuple[str, int], timeout_s: float = 30.0) -> Client | None:
    """A connection, or None when nobody listens or the server hangs up at once."""
    try:
        return Client(address, timeout_s)
    except OSError as error:
        if error.errno in (errno.ECONNREFUSED, errno.ENOENT, errno.ECONNRESET):
            return None
        raise


def connect_negotiated(address: str | tuple[str, int], name: str = "", timeout_s: float = 30.0) -> Client:
    """A connection in transmission with structured replies."""
    client = Client(address, timeout_s)
    client.greet()
    client.negotiate(name)
    return client
