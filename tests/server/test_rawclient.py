"""The raw client against scripted bytes: it accepts what proto.md allows and raises on what it forbids.

This is the control of every live test that relies on the client's checks.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.rawclient import Client
from tests.support.rawprotocol import ChunkType, Command, CommandFlag, ConnectionClosed, ProtocolViolation, Request

COOKIE = 0x1122334455667788
OFFSET = 1 << 32
DONE = b"\x00\x01"
MORE = b"\x00\x00"
COOKIE_BYTES = b"\x11\x22\x33\x44\x55\x66\x77\x88"
OFFSET_BYTES = b"\x00\x00\x00\x01\x00\x00\x00\x00"


def simple(error: int, data: bytes = b"") -> bytes:
    return b"\x67\x44\x66\x98" + struct.pack(">I", error) + COOKIE_BYTES + data


def structured(flags: bytes, chunk_type: int, payload: bytes = b"") -> bytes:
    return b"\x66\x8e\x33\xef" + flags + struct.pack(">H", chunk_type) + COOKIE_BYTES + length_32(payload) + payload


def extended(flags: bytes, chunk_type: int, payload: bytes = b"", offset: bytes = OFFSET_BYTES) -> bytes:
    head = b"\x6e\x8a\x27\x8c" + flags + struct.pack(">H", chunk_type) + COOKIE_BYTES + offset
    return head + b"\0\0\0\0" + length_32(payload) + payload


def length_32(payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))


def data_at(distance: int, data: bytes) -> bytes:
    return struct.pack(">Q", OFFSET + distance) + data


def hole_at(distance: int, length: int) -> bytes:
    return struct.pack(">QI", OFFSET + distance, length)


def extents_32(*pairs: tuple[int, int]) -> bytes:
    return b"\0\0\0\7" + b"".join(struct.pack(">II", *pair) for pair in pairs)


def extents_64(count: int, *pairs: tuple[int, int]) -> bytes:
    return b"\0\0\0\7" + struct.pack(">I", count) + b"".join(struct.pack(">QQ", *pair) for pair in pairs)


READ_8 = Request(Command.READ, COOKIE, OFFSET, 8)
READ_8_DF = Request(Command.READ, COOKIE, OFFSET, 8, CommandFlag.DF)
FLUSH = Request(Command.FLUSH, COOKIE)
STATUS = Request(Command.BLOCK_STATUS, COOKIE, OFFSET, 4096)
STATUS_ONE = Request(Command.BLOCK_STATUS, COOKIE, OFFSET, 4096, CommandFlag.REQ_ONE)
NO_TEXT = b"\0\0\0\x16\0\0"
EINVAL_TEXT = b"\0\0\0\x16\0\3bad"


@dataclass(frozen=True)
class Script:
    """What the server sends on `form` after `request`."""

    name: str
    form: str
    request: Request
    answer: bytes


ALLOWED = [
    Script("simple_read", "simple", READ_8, simple(0, b"datadata")),
    Script("simple_error", "simple", READ_8, simple(22)),
    Script("simple_flush_after_structured", "structured", FLUSH, simple(0)),
    Script("structured_read", "structured", READ_8, structured(DONE, ChunkType.OFFSET_DATA, data_at(0, b"datadata"))),
    Script(
        "structured_read_in_reverse",
        "structured",
        READ_8,
        structured(MORE, ChunkType.OFFSET_HOLE, hole_at(4, 4))
        + structured(MORE, ChunkType.OFFSET_DATA, data_at(0, b"data"))
        + structured(DONE, ChunkType.NONE),
    ),
    Script("structured_error", "structured", READ_8, structured(DONE, ChunkType.ERROR, EINVAL_TEXT)),
    Script(
        "structured_error_after_data",
        "structured",
        READ_8,
        structured(MORE, ChunkType.OFFSET_DATA, data_at(0, b"data"))
        + structured(DONE, ChunkType.ERROR_OFFSET, NO_TEXT + data_at(4, b"")),
    ),
    Script("extents", "structured", STATUS, structured(DONE, ChunkType.BLOCK_STATUS, extents_32((512, 3), (8192, 0)))),
    Script("extended_read", "extended", READ_8, extended(DONE, ChunkType.OFFSET_DATA, data_at(0, b"datadata"))),
    Script(
        "extended_extents", "extended", STATUS, extended(DONE, ChunkType.BLOCK_STATUS_EXT, extents_64(1, (1 << 40, 0)))
    ),
]

DATA = ChunkType.OFFSET_DATA
HOLE = ChunkType.OFFSET_HOLE
FORBIDDEN = [
    Script("simple_read_after_structured", "structured", READ_8, simple(0, b"datadata")),
    Script("simple_after_extended", "extended", FLUSH, simple(0)),
    Script("structured_when_not_negotiated", "simple", FLUSH, structured(DONE, ChunkType.NONE)),
    Script("structured_after_extended", "extended", FLUSH, structured(DONE, ChunkType.NONE)),
    Script("extended_when_not_negotiated", "structured", FLUSH, extended(DONE, ChunkType.NONE)),
    Script("other_cookie", "simple", Request(Command.FLUSH, 1), simple(0)),
    Script("gap_at_the_end", "structured", READ_8, structured(DONE, DATA, data_at(0, b"data"))),
    Script("gap_at_the_start", "structured", READ_8, structured(DONE, DATA, data_at(4, b"data"))),
    Script("nothing_at_all", "structured", READ_8, structured(DONE, ChunkType.NONE)),
    Script(
        "overlap",
        "structured",
        READ_8,
        structured(MORE, DATA, data_at(0, b"datad")) + structured(DONE, HOLE, hole_at(4, 4)),
    ),
    Script("data_beyond_the_request", "structured", READ_8, structured(DONE, DATA, data_at(0, b"datadata!"))),
    Script("data_before_the_request", "structured", READ_8, structured(DONE, DATA, data_at(-1, b"datadata!"))),
    Script("empty_data", "structured", READ_8, structured(DONE, DATA, data_at(0, b""))),
    Script("empty_hole", "structured", READ_8, structured(DONE, HOLE, hole_at(0, 0))),
    Script("hole_too_long", "structured", READ_8, structured(DONE, HOLE, hole_at(0, 8) + b"\0")),
    Script(
        "df_in_two_chunks",
        "structured",
        READ_8_DF,
        structured(MORE, DATA, data_at(0, b"data")) + structured(DONE, DATA, data_at(4, b"data")),
    ),
    Script("none_without_done", "structured", FLUSH, structured(MORE, ChunkType.NONE)),
    Script("none_with_payload", "structured", FLUSH, structured(DONE, ChunkType.NONE, b"x")),
    Script("unknown_reply_flag", "structured", FLUSH, structured(b"\0\3", ChunkType.NONE)),
    Script("unknown_chunk", "structured", FLUSH, structured(DONE, 0x7777)),
    Script("data_for_flush", "structured", FLUSH, structured(DONE, DATA, data_at(0, b"data"))),
    Script("error_0", "structured", FLUSH, structured(DONE, ChunkType.ERROR, b"\0\0\0\0\0\0")),
    Script("error_text_cut", "structured", FLUSH, structured(DONE, ChunkType.ERROR, EINVAL_TEXT[:-1])),
    Script(
        "error_offset_outside",
        "structured",
        READ_8,
        structured(DONE, ChunkType.ERROR_OFFSET, NO_TEXT + data_at(8, b"")),
    ),
    Script("no_extents", "structured", STATUS, structured(DONE, ChunkType.BLOCK_STATUS, extents_32())),
    Script("extent_of_0", "structured", STATUS, structured(DONE, ChunkType.BLOCK_STATUS, extents_32((0, 0)))),
    Script(
        "extent_beyond",
        "structured",
        STATUS,
        structured(DONE, ChunkType.BLOCK_STATUS, extents_32((4096, 0), (512, 3))),
    ),
    Script("req_one_two", "structured", STATUS_ONE, structured(DONE, 5, extents_32((512, 0), (512, 3)))),
    Script("req_one_longer", "structured", STATUS_ONE, structured(DONE, 5, extents_32((8192, 0)))),
    Script("context_missing", "structured", STATUS, structured(DONE, ChunkType.NONE)),
    Script(
        "context_twice",
        "structured",
        STATUS,
        structured(MORE, 5, extents_32((512, 0))) + structured(DONE, 5, extents_32((512, 0))),
    ),
    Script("extents_32_in_extended", "extended", STATUS, extended(DONE, 5, extents_32((512, 0)))),
    Script("extents_64_in_structured", "structured", STATUS, structured(DONE, 6, extents_64(1, (512, 0)))),
    Script("extent_count_wrong", "extended", STATUS, extended(DONE, 6, extents_64(2, (512, 0)))),
    Script("extended_offset_not_echoed", "extended", READ_8, extended(DONE, DATA, data_at(0, b"datadata"), bytes(8))),
]


@dataclass(frozen=True)
class Pair:
    client: Client
    server: socket.socket


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with Client(path, timeout_s=5) as client:
            accepted, _ = listener.accept()
            with accepted:
                yield Pair(client, accepted)


def prepare(pair: Pair, script: Script) -> None:
    pair.client.structured = script.form != "simple"
    pair.client.extended = script.form == "extended"
    pair.client.contexts = {"base:allocation": 7}
    pair.client.send_requests([script.request])
    pair.server.sendall(script.answer)


@pytest.mark.parametrize("script", ALLOWED, ids=lambda script: script.name)
def test_client_accepts_allowed_reply(pair: Pair, script: Script) -> None:
    prepare(pair, script)
    reply = pair.client.read_reply()
    if script.request.command == Command.READ and reply.error == 0:
        assert reply.data == (b"data\0\0\0\0" if reply.holes else b"datadata")
    assert reply.error in (0, 22)


@pytest.mark.parametrize("script", FORBIDDEN, ids=lambda script: script.name)
def test_client_raises_on_forbidden_reply(pair: Pair, script: Script) -> None:
    prepare(pair, script)
    with pytest.raises(ProtocolViolation):
        pair.client.read_reply()


def test_client_reports_a_reply_that_is_cut(pair: Pair) -> None:
    prepare(pair, Script("cut", "simple", READ_8, simple(0, b"data")))
    pair.server.close()
    with pytest.raises(ConnectionClosed) as caught:
        pair.client.read_reply()
    assert caught.value.received == b"data"


def test_requests_are_laid_out_as_the_specification_says() -> None:
    request = Request(Command.WRITE, COOKIE, OFFSET, 4, CommandFlag.FUA, b"data")
    rest = b"\x00\x01\x00\x01" + COOKIE_BYTES + OFFSET_BYTES
    assert request.serialize() == b"\x25\x60\x95\x13" + rest + b"\0\0\0\4data"
    assert request.serialize(extended=True) == b"\x21\xe4\x1c\x71" + rest + b"\0\0\0\0\0\0\0\4data"
