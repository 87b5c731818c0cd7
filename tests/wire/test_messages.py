"""Replies in the three dialects, byte for byte.

    simple reply      magic u32, error u32, cookie u64                                                       16 bytes
    structured chunk  magic u32, flags u16, type u16, cookie u64, length u32                                 20 bytes
    extended chunk    magic u32, flags u16, type u16, cookie u64, offset u64 (the request's), length u64     32 bytes

Spec: proto.md "Simple reply message", "Structured reply chunk message", "Structured reply types"; branch
extension-ext-header.
"""

from __future__ import annotations

import pytest

from nbdimg.wire.constants import NbdError
from nbdimg.wire.messages import ExtendedReplies, Replies, Request, SimpleReplies, StructuredReplies

COOKIE = 0x0102030405060708
OFFSET = 0x1112131415161718
GIB = 1 << 30

SIMPLE, STRUCTURED, EXTENDED = SimpleReplies(), StructuredReplies(), ExtendedReplies()
CHUNKED = pytest.mark.parametrize("replies", [STRUCTURED, EXTENDED], ids=["structured", "extended"])
ALL = pytest.mark.parametrize("replies", [SIMPLE, STRUCTURED, EXTENDED], ids=["simple", "structured", "extended"])


def asked(length: int = 4096) -> Request:
    return Request(0, 0, COOKIE, OFFSET, length)


def structured(flags: int, kind: int, payload: bytes) -> bytes:
    head = bytes.fromhex("668e33ef") + flags.to_bytes(2, "big") + kind.to_bytes(2, "big")
    return head + bytes.fromhex("0102030405060708") + len(payload).to_bytes(4, "big") + payload


def extended(flags: int, kind: int, payload: bytes) -> bytes:
    head = bytes.fromhex("6e8a278c") + flags.to_bytes(2, "big") + kind.to_bytes(2, "big")
    return head + bytes.fromhex("0102030405060708 1112131415161718") + len(payload).to_bytes(8, "big") + payload


def chunk(replies: Replies, flags: int, kind: int, payload: bytes) -> bytes:
    return (structured if replies is STRUCTURED else extended)(flags, kind, payload)


def put_data(replies: Replies, offset: int, length: int, is_last: bool, at: int = 0) -> bytes:
    buffer = bytearray(b"\xaa" * (at + replies.data_header_size + 8))
    replies.put_data(buffer, at, asked(), offset, length, is_last)
    assert buffer[:at] == b"\xaa" * at
    assert buffer[-8:] == b"\xaa" * 8
    return bytes(buffer[at:-8])


# Success


def test_simple_done_is_the_16_bytes_of_the_specification() -> None:
    assert SIMPLE.done(asked()) == bytes.fromhex("67446698 00000000 0102030405060708")


def test_structured_done_is_a_none_chunk_marked_done() -> None:
    assert STRUCTURED.done(asked()) == bytes.fromhex("668e33ef 0001 0000 0102030405060708 00000000")


def test_extended_done_is_a_none_chunk_that_echoes_the_offset() -> None:
    assert EXTENDED.done(asked()) == bytes.fromhex(
        "6e8a278c 0001 0000 0102030405060708 1112131415161718 0000000000000000"
    )


@ALL
def test_done_carries_the_cookie_whatever_its_bits(replies: Replies) -> None:
    request = Request(0, 0, (1 << 64) - 1, 0, 0)
    assert replies.done(request).count(b"\xff" * 8) == 1


def test_dialects_tell_whether_they_speak_in_chunks() -> None:
    assert [replies.is_chunked for replies in (SIMPLE, STRUCTURED, EXTENDED)] == [False, True, True]


# Data


@pytest.mark.parametrize("is_last", [True, False])
@pytest.mark.parametrize("at", [0, 1, 4096])
def test_simple_data_header_is_a_reply_without_error(is_last: bool, at: int) -> None:
    assert SIMPLE.data_header_size == 16
    assert put_data(SIMPLE, OFFSET, 4096, is_last, at) == bytes.fromhex("67446698 00000000 0102030405060708")


@pytest.mark.parametrize(("is_last", "flags"), [(True, "0001"), (False, "0000")])
@pytest.mark.parametrize("at", [0, 1, 4096])
def test_structured_data_header_counts_its_offset_in_the_length(is_last: bool, flags: str, at: int) -> None:
    assert STRUCTURED.data_header_size == 28
    assert put_data(STRUCTURED, OFFSET + 512, 0x1000, is_last, at) == bytes.fromhex(
        f"668e33ef {flags} 0001 0102030405060708 00001008 1112131415161918"
    )


@pytest.mark.parametrize(("is_last", "flags"), [(True, "0001"), (False, "0000")])
@pytest.mark.parametrize("at", [0, 1, 4096])
def test_extended_data_header_has_the_requests_offset_and_its_own(is_last: bool, flags: str, at: int) -> None:
    assert EXTENDED.data_header_size == 40
    assert put_data(EXTENDED, OFFSET + 512, 0x1000, is_last, at) == bytes.fromhex(
        f"6e8a278c {flags} 0001 0102030405060708 1112131415161718 0000000000001008 1112131415161918"
    )


@CHUNKED
def test_data_header_of_the_largest_read_is_exact(replies: Replies) -> None:
    payload = bytes.fromhex("0000000000000000")
    size = replies.data_header_size
    head = put_data(replies, 0, 64 << 20, True)
    assert head[-8:] == payload
    assert int.from_bytes(head[size - 12 : size - 8], "big") == (64 << 20) + 8


# Holes


@CHUNKED
@pytest.mark.parametrize(("is_last", "flags"), [(True, 1), (False, 0)])
def test_hole_is_offset_and_32_bit_length(replies: Replies, is_last: bool, flags: int) -> None:
    assert replies.hole(asked(), OFFSET, 0x4000, is_last) == chunk(
        replies, flags, 2, bytes.fromhex("1112131415161718 00004000")
    )


@CHUNKED
def test_hole_at_the_end_of_the_offsets_is_laid_out(replies: Replies) -> None:
    assert replies.hole(asked(), (1 << 64) - 1, (1 << 32) - 1, True)[-12:] == b"\xff" * 12


# Errors


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (NbdError.EPERM, 1),
        (NbdError.EIO, 5),
        (NbdError.ENOMEM, 12),
        (NbdError.EINVAL, 22),
        (NbdError.ENOSPC, 28),
        (NbdError.EOVERFLOW, 75),
        (NbdError.ENOTSUP, 95),
        (NbdError.ESHUTDOWN, 108),
    ],
)
def test_error_number_is_the_specifications(error: NbdError, number: int) -> None:
    raw = number.to_bytes(4, "big")
    assert SIMPLE.error(asked(), error, "text") == bytes.fromhex("67446698") + raw + bytes.fromhex("0102030405060708")
    assert STRUCTURED.error(asked(), error, "text") == structured(1, 0x8001, raw + b"\0\4text")
    assert EXTENDED.error(asked(), error, "text") == extended(1, 0x8001, raw + b"\0\4text")


def test_simple_error_has_no_text_and_no_offset() -> None:
    assert len(SIMPLE.error(asked(), NbdError.EIO, "x" * 100, OFFSET)) == 16


@CHUNKED
def test_error_with_an_offset_has_it_behind_the_text(replies: Replies) -> None:
    payload = bytes.fromhex("00000005 0003") + b"bad" + bytes.fromhex("1112131415161719")
    assert replies.error(asked(), NbdError.EIO, "bad", OFFSET + 1) == chunk(replies, 1, 0x8002, payload)


@CHUNKED
def test_error_at_offset_zero_is_an_error_with_an_offset(replies: Replies) -> None:
    payload = bytes.fromhex("00000005 0000 0000000000000000")
    assert replies.error(asked(), NbdError.EIO, "", 0) == chunk(replies, 1, 0x8002, payload)


@CHUNKED
def test_error_without_text_has_a_text_of_no_bytes(replies: Replies) -> None:
    assert replies.error(asked(), NbdError.EIO, "") == chunk(replies, 1, 0x8001, bytes.fromhex("00000005 0000"))


@CHUNKED
def test_error_text_is_counted_in_bytes_of_utf8(replies: Replies) -> None:
    assert replies.error(asked(), NbdError.EIO, "é") == chunk(replies, 1, 0x8001, b"\0\0\0\5\0\2\xc3\xa9")


@CHUNKED
@pytest.mark.parametrize("length", [4096, 4097, 100_000])
@pytest.mark.parametrize("offset", [None, OFFSET])
def test_error_text_is_cut_to_the_longest_string(replies: Replies, length: int, offset: int | None) -> None:
    """CVE-2020-10761 class: a long text must not overflow its 16-bit length."""
    tail = b"" if offset is None else bytes.fromhex("1112131415161718")
    kind = 0x8001 if offset is None else 0x8002
    payload = bytes.fromhex("00000005 1000") + b"x" * 4096 + tail
    assert replies.error(asked(), NbdError.EIO, "x" * length, offset) == chunk(replies, 1, kind, payload)


@CHUNKED
@pytest.mark.parametrize("text", ["x" + "é" * 2048, "x" * 4094 + "€", "x" * 4095 + "𝄞" * 3], ids=["2", "3", "4"])
def test_error_text_is_never_cut_inside_a_character(replies: Replies, text: str) -> None:
    """Spec: proto.md "String values": strings are UTF-8."""
    raw = replies.error(asked(), NbdError.EIO, text)
    header_size = 20 if replies is STRUCTURED else 32
    sent = raw[header_size + 6 :]
    assert int.from_bytes(raw[header_size + 4 : header_size + 6], "big") == len(sent) <= 4096
    assert text.startswith(sent.decode())


@CHUNKED
def test_error_text_that_is_no_unicode_is_still_sent_as_utf8(replies: Replies) -> None:
    """A file name from the command line may hold surrogates."""
    raw = replies.error(asked(), NbdError.EIO, "bad \udcff name")
    sent = raw[(20 if replies is STRUCTURED else 32) + 6 :].decode()
    assert sent.startswith("bad ")
    assert sent.endswith(" name")


# Block status


def test_structured_block_status_has_32_bit_extents() -> None:
    assert STRUCTURED.block_status(asked(), 7, [(0x1000, 3), (0xFFFFFFFF, 0)], True) == bytes.fromhex(
        "668e33ef 0001 0005 0102030405060708 00000014  00000007  00001000 00000003  ffffffff 00000000"
    )


def test_extended_block_status_has_a_count_and_64_bit_extents() -> None:
    assert EXTENDED.block_status(asked(), 7, [(0x1000, 3), (1 << 63, 1 << 40)], False) == bytes.fromhex(
        "6e8a278c 0000 0006 0102030405060708 1112131415161718 0000000000000028"
        "00000007 00000002"
        "0000000000001000 0000000000000003"
        "8000000000000000 0000010000000000"
    )


@CHUNKED
@pytest.mark.parametrize(("is_last", "flag"), [(True, 1), (False, 0)])
def test_block_status_is_done_only_with_the_last_context(replies: Replies, is_last: bool, flag: int) -> None:
    assert int.from_bytes(replies.block_status(asked(), 1, [(512, 0)], is_last)[4:6], "big") == flag


@CHUNKED
@pytest.mark.parametrize("count", [1, 2, 1024, 100_000])
def test_block_status_length_matches_its_extents(replies: Replies, count: int) -> None:
    extents = [(512 + index, index % 4) for index in range(count)]
    raw = replies.block_status(asked(), 0xFFFFFFFF, extents, True)
    fixed, each, header = (4, 8, 20) if replies is STRUCTURED else (8, 16, 32)
    assert len(raw) == header + fixed + each * count
    assert int.from_bytes(raw[header - 4 : header], "big") == fixed + each * count
    assert raw[header : header + 4] == b"\xff" * 4


# Request


def test_request_keep_payload_copies_a_borrowed_payload_once() -> None:
    shared = bytearray(b"guest data")
    request = Request(1, 0, 0, 0, 10, memoryview(shared))
    request.keep_payload()
    kept = request.payload
    shared[:] = b"\xee" * 10
    request.keep_payload()
    assert kept is not None
    assert request.payload is kept
    assert request.owns_payload
    assert bytes(kept) == b"guest data"


def test_request_keep_payload_without_one_does_nothing() -> None:
    request = asked()
    request.keep_payload()
    assert request.payload is None


def test_request_repr_shows_what_was_asked() -> None:
    assert repr(Request(6, 0x11, 0xAB, 512, GIB)) == "Request(6, 0x11, 0xab, 512, 1073741824)"
