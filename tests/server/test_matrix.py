"""Hostile and unusual clients against a live server: each case has its verdict, and the next client is served.

A case is a function from a connection to a verdict, a short sentence like "ERR_INVALID, in sync". "in sync" and "kept"
are not assumed: after the answer the same connection asks for something valid, whose answer is checked.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.server.live import assert_alive, pattern, pattern_image
from tests.support.rawclient import Client
from tests.support.rawprotocol import (
    EXTENDED_REQUEST_MAGIC,
    FIXED_NEWSTYLE,
    KIB,
    MIB,
    NO_ZEROES,
    REQUEST_MAGIC,
    Command,
    CommandFlag,
    ConnectionClosed,
    Info,
    Option,
    Rep,
    TransmissionFlag,
    info_data,
    meta_data,
    option_bytes,
    parse_infos,
)
from tests.support.server import NbdimgServer, PeerServer

GIB = 1024 * MIB
IMAGE_SIZE = 5 * GIB  # above 4 GiB, so that 32-bit extents have to be clamped
CLOSE_LIMIT_S = 2.0
OPTION_COUNT_MAX = 1024
OPTION_LENGTH_TAKEN_MAX = MIB  # what socket buffers and one read may swallow of a 64 MiB option

Probe = Callable[[Client], str]


@dataclass(frozen=True)
class Case:
    """`wanted` lists the verdicts that are right; `reads_only` runs it on the read-only server."""

    name: str
    probe: Probe
    wanted: frozenset[str]
    is_read_only: bool = False


CASES: list[Case] = []


def add(name: str, probe: Probe, *wanted: str, is_read_only: bool = False) -> None:
    CASES.append(Case(name, probe, frozenset(wanted), is_read_only))


def closed(client: Client) -> str:
    return "closed" if client.wait_closed(CLOSE_LIMIT_S) is not None else f"open after {CLOSE_LIMIT_S} s"


# Handshake


def option_verdict(client: Client, option: int, data: bytes = b"", length: int | None = None) -> str:
    """Name of the final reply; ", in sync" when INFO works on the same connection afterwards."""
    try:
        client.send_option(option, data, length)
        final = client.read_option_replies(option)[-1]
    except ConnectionClosed:
        return "closed"
    verdict = Rep(final.type).name
    try:
        client.info("disk")
    except ConnectionClosed:
        return f"{verdict}, then closed"
    return f"{verdict}, in sync"


def with_option(option: int, data: bytes = b"", length: int | None = None, before: tuple[int, ...] = ()) -> Probe:
    """A probe that sends the option after those of `before`, which the server has to acknowledge."""

    def probe(client: Client) -> str:
        client.greet()
        for earlier in before:
            assert client.option(earlier)[-1].type == Rep.ACK
        return option_verdict(client, option, data, length)

    return probe


def client_flags(flags: int, after: bytes = b"") -> Probe:
    def probe(client: Client) -> str:
        client.greet(None)
        try:
            client.send(struct.pack(">I", flags) + after)
        except ConnectionClosed:
            return "closed"
        return closed(client)

    return probe


def bytes_at_connect(data: bytes) -> Probe:
    def probe(client: Client) -> str:
        client.send_while_taken(data)
        return closed(client)

    return probe


def export_name_without_flags(client: Client) -> str:
    client.greet(0)
    export = client.export_name("disk")
    return "served" if export.size == IMAGE_SIZE and client.read(0, 512).data == pattern(0, 512) else "wrong export"


def export_name_after(option: int, name: str) -> Probe:
    """EXPORT_NAME after an acknowledged option; the flags tell whether DF is offered."""

    def probe(client: Client) -> str:
        client.greet()
        assert client.option(option)[-1].type == Rep.ACK
        client.structured = True
        try:
            export = client.export_name(name)
        except ConnectionClosed:
            return "closed"
        return "served with DF" if export.flags & TransmissionFlag.SEND_DF else "served without DF"

    return probe


def export_name_unknown(client: Client) -> str:
    client.greet()
    client.send_option(Option.EXPORT_NAME, b"no such export")
    return closed(client)


def abort(data: bytes) -> Probe:
    def probe(client: Client) -> str:
        client.greet()
        final = client.option(Option.ABORT, data)[-1]
        return f"{Rep(final.type).name}, {closed(client)}"

    return probe


def option_huge_and_sent(client: Client) -> str:
    """Verdict with the bytes that the server let through before it closed."""
    client.greet()
    sent = client.send_while_taken(option_bytes(Option.LIST, bytes(64 * MIB)))
    verdict = closed(client)
    return verdict if sent < OPTION_LENGTH_TAKEN_MAX else f"{verdict}, took {sent} bytes"


def option_magic_wrong(client: Client) -> str:
    client.greet()
    client.send_option(Option.LIST, magic=0x4948415645464154)
    return closed(client)


def options_without_end(client: Client) -> str:
    """More options than the limit, every reply read."""
    client.greet()
    answered = 0
    try:
        for _ in range(OPTION_COUNT_MAX + 1):
            client.option(Option.LIST)
            answered += 1
    except ConnectionClosed:
        return "closed at the limit" if answered >= OPTION_COUNT_MAX // 2 else f"closed after {answered}"
    return "never closed"


def options_never_read(client: Client) -> str:
    client.greet()
    client.send_while_taken(option_bytes(Option.LIST) * 5000)
    return closed(client)


def options_pipelined(client: Client) -> str:
    """Three options and a GO in one packet."""
    client.greet()
    data = option_bytes(Option.LIST) + option_bytes(77, b"?") + option_bytes(Option.STRUCTURED_REPLY)
    client.send(data + option_bytes(Option.GO, info_data("disk")))
    verdicts = [Rep(client.read_option_replies(option)[-1].type).name for option in (3, 77, 8, 7)]
    client.structured = True
    assert client.read(8, 8).data == pattern(8, 8)
    return " ".join(verdicts)


def infos(asked: tuple[int, ...]) -> Probe:
    """The verdict names each info type with the times it came, without BLOCK_SIZE, which is always welcome."""

    def probe(client: Client) -> str:
        client.greet()
        got = parse_infos(client.option(Option.INFO, info_data("disk", asked))).infos
        return ", ".join(f"{Info(kind).name} x{got.count(kind)}" for kind in sorted({*got} - {Info.BLOCK_SIZE}))

    return probe


def info_then_go_differs(client: Client) -> str:
    """GO after INFO with the same parameters gives the same answer."""
    client.greet()
    data = info_data("disk", [Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE])
    told = [(reply.type, reply.data) for reply in client.option(Option.INFO, data)]
    return "same" if told == [(reply.type, reply.data) for reply in client.option(Option.GO, data)] else "different"


def long_name_is_not_echoed(client: Client) -> str:
    client.greet()
    final = client.option(Option.GO, info_data("A" * 4096))[-1]
    return Rep(final.type).name if final.text.count("A") <= 256 else f"echoes {final.text.count('A')} bytes"


def control_characters_are_escaped(client: Client) -> str:
    client.greet()
    final = client.option(Option.GO, info_data("\x1b[2J\n"))[-1]
    return "raw" if {"\x1b", "\n"} & set(final.text) else Rep(final.type).name


def starttls_then_plaintext(client: Client) -> str:
    """Without TLS the option is refused, and what follows is an ordinary option."""
    client.greet()
    client.send(option_bytes(Option.STARTTLS) + option_bytes(Option.LIST))
    final = client.read_option_replies(Option.STARTTLS)[-1]
    return "refused" if final.is_error and client.read_option_replies(Option.LIST)[-1].type == Rep.ACK else "accepted"


def meta_context_void_for_other_export(client: Client) -> str:
    """Contexts selected for a name that is not the one of GO do not count: BLOCK_STATUS is invalid."""
    client.greet()
    assert client.option(Option.STRUCTURED_REPLY)[-1].type == Rep.ACK
    client.structured = True
    client.set_meta_contexts("other", ["base:allocation"])
    client.contexts = {}
    client.go("disk")
    return client.request(Command.BLOCK_STATUS, 0, 4096).error_name


def meta_contexts_replaced_by_failure(client: Client) -> str:
    """A SET_META_CONTEXT that fails voids the earlier selection."""
    client.greet()
    assert client.option(Option.STRUCTURED_REPLY)[-1].type == Rep.ACK
    client.structured = True
    client.set_meta_contexts("disk", ["base:allocation"])
    assert client.option(Option.SET_META_CONTEXT, meta_data("no such", ["base:allocation"]))[-1].is_error
    client.contexts = {}
    client.go("disk")
    return client.request(Command.BLOCK_STATUS, 0, 4096).error_name


GO = info_data("disk")
SET_META = meta_data("disk", ["base:allocation"])
SR = (Option.STRUCTURED_REPLY,)
EH = (Option.EXTENDED_HEADERS,)

add("client_flag_unknown", client_flags(1 << 2 | FIXED_NEWSTYLE, option_bytes(Option.LIST)), "closed")
add("client_flags_all_ones", client_flags(0xFFFFFFFF, option_bytes(Option.LIST)), "closed")
add("option_without_fixed_newstyle", client_flags(NO_ZEROES, option_bytes(Option.GO, GO)), "closed")
add("export_name_with_client_flags_0", export_name_without_flags, "served")
add("export_name_unknown", export_name_unknown, "closed")
add("export_name_after_structured_reply", export_name_after(Option.STRUCTURED_REPLY, "disk"), "served with DF")
add("export_name_after_extended_headers", export_name_after(Option.EXTENDED_HEADERS, "disk"), "closed")
add("garbage_64_kib_at_connect", bytes_at_connect(bytes(range(256)) * 256), "closed")
add("zeroes_64_kib_at_connect", bytes_at_connect(bytes(64 * KIB)), "closed")
add("option_magic_wrong", option_magic_wrong, "closed")
add("option_unknown", with_option(0x4321), "ERR_UNSUP, in sync")
add("option_unknown_with_60_kib", with_option(0x4321, bytes(60 * KIB)), "ERR_UNSUP, in sync")
add("option_unknown_with_1_mib", with_option(0x4321, bytes(MIB)), "ERR_UNSUP, in sync")
add("option_length_ffffffff", with_option(Option.LIST, b"", 0xFFFFFFFF), "closed")
add("option_unknown_length_ffffffff", with_option(0x4321, b"", 0xFFFFFFFF), "closed")
add("option_64_mib_sent", option_huge_and_sent, "closed")
add("option_peek_export", with_option(Option.PEEK_EXPORT), "ERR_UNSUP, in sync")
add("list_with_data", with_option(Option.LIST, b"12345678"), "ERR_INVALID, in sync")
add("abort", abort(b""), "ACK, closed")
add("abort_with_data", abort(b"good-bye"), "ACK, closed")
add("options_without_end", options_without_end, "closed at the limit")
add("options_5000_never_read", options_never_read, "closed")
add("options_pipelined", options_pipelined, "ACK ERR_UNSUP ACK ACK")
add("starttls_not_configured", starttls_then_plaintext, "refused")
add(
    "starttls_with_data",
    with_option(Option.STARTTLS, b"x"),
    *(f"{error}, in sync" for error in ("ERR_INVALID", "ERR_UNSUP", "ERR_POLICY", "ERR_PLATFORM")),
)
add("go_empty", with_option(Option.GO), "ERR_INVALID, in sync")
add("go_5_bytes", with_option(Option.GO, bytes(5)), "ERR_INVALID, in sync")
add("go_name_length_beyond_data", with_option(Option.GO, info_data("disk", name_length=200)), "ERR_INVALID, in sync")
add(
    "go_name_length_ffffffff", with_option(Option.GO, info_data("disk", name_length=0xFFFFFFFF)), "ERR_INVALID, in sync"
)
add(
    "info_name_length_ffffffff", with_option(Option.INFO, info_data("", name_length=0xFFFFFFFF)), "ERR_INVALID, in sync"
)
add("go_info_count_beyond_data", with_option(Option.GO, info_data("disk", [3], info_count=9)), "ERR_INVALID, in sync")
add("go_trailing_bytes", with_option(Option.GO, GO + b"trailing"), "ERR_INVALID, in sync")
add("go_64_kib_tail", with_option(Option.GO, info_data("", name_length=4) + bytes(60 * KIB)), "ERR_INVALID, in sync")
add("go_name_with_nul", with_option(Option.GO, info_data("disk\0x")), "ERR_INVALID, in sync")
add("go_name_not_utf8", with_option(Option.GO, info_data(b"\xff\xfe")), "ERR_INVALID, in sync", "ERR_UNKNOWN, in sync")
add("go_unknown_export", with_option(Option.GO, info_data("no such")), "ERR_UNKNOWN, in sync")
add("go_name_of_4096", long_name_is_not_echoed, "ERR_UNKNOWN")
add("go_name_of_4097", with_option(Option.GO, info_data("A" * 4097)), "ERR_INVALID, in sync", "ERR_TOO_BIG, in sync")
add("go_name_with_escape_codes", control_characters_are_escaped, "ERR_UNKNOWN", "ERR_INVALID")
add("info_asks_nothing", infos(()), "EXPORT x1")
add("info_asks_unknown_type", infos((0x1234,)), "EXPORT x1")
add("info_asks_name_twice", infos((Info.NAME, Info.NAME)), "EXPORT x1, NAME x1")
add("info_then_go", info_then_go_differs, "same")
add("structured_reply_with_data", with_option(Option.STRUCTURED_REPLY, b"x"), "ERR_INVALID, in sync")
add("structured_reply_twice", with_option(8, before=SR), "ACK, in sync", "ERR_INVALID, in sync")
add("structured_reply_after_extended", with_option(8, before=EH), "ERR_EXT_HEADER_REQD, in sync")
add("extended_headers", with_option(Option.EXTENDED_HEADERS), "ACK, in sync")
add("extended_headers_with_data", with_option(Option.EXTENDED_HEADERS, b"x"), "ERR_INVALID, in sync")
add("set_meta_without_structured_reply", with_option(Option.SET_META_CONTEXT, SET_META), "ERR_INVALID, in sync")
add("set_meta_trailing_bytes", with_option(10, SET_META + bytes(8), before=SR), "ERR_INVALID, in sync")
add("list_meta_trailing_bytes", with_option(9, SET_META + bytes(8), before=SR), "ERR_INVALID, in sync")
add("set_meta_unknown_export", with_option(10, meta_data("no", ["base:"]), before=SR), "ERR_UNKNOWN, in sync")
add(
    "set_meta_query_count_beyond_data",
    with_option(10, meta_data("disk", ["base:allocation"], 0xFFFFFFFF), before=SR),
    "ERR_INVALID, in sync",
    "ERR_TOO_BIG, in sync",
)
add("set_meta_query_without_colon", with_option(10, meta_data("disk", ["base"]), before=SR), "ERR_INVALID, in sync")
add("set_meta_unknown_namespace", with_option(10, meta_data("disk", ["x-nobody:thing"]), before=SR), "ACK, in sync")
add("set_meta_empty_data", with_option(10, before=SR), "ERR_INVALID, in sync")
add("meta_context_of_another_name", meta_context_void_for_other_export, "EINVAL")
add("meta_context_replaced_by_failure", meta_contexts_replaced_by_failure, "EINVAL")


# Transmission


def request_verdict(client: Client, command: int, offset: int, length: int, flags: int, payload: bytes) -> str:
    """Name of the error (or OK); ", kept" when a read on the same connection then returns the right bytes."""
    try:
        reply = client.request(command, offset, length, flags, payload)
    except ConnectionClosed:
        return "closed"
    try:
        is_right = client.read(8, 504).data == pattern(8, 504)
    except ConnectionClosed:
        return f"{reply.error_name}, then closed"
    return f"{reply.error_name}, kept" if is_right else f"{reply.error_name}, wrong data"


def with_request(
    command: int,
    offset: int = 0,
    length: int = 0,
    flags: int = 0,
    payload: bytes = b"",
    form: str = "structured",
    contexts: tuple[str, ...] = (),
) -> Probe:
    """A probe that sends one request. `form` is simple, structured or extended."""

    def probe(client: Client) -> str:
        client.greet()
        client.negotiate("disk", structured=form != "simple", extended=form == "extended", contexts=contexts)
        return request_verdict(client, command, offset, length, flags, payload)

    return probe


def request_magic(magic: int, extended: bool) -> Probe:
    def probe(client: Client) -> str:
        client.greet()
        client.negotiate("disk", extended=extended)
        client.send_requests([client.new_request(Command.READ, 0, 512)], magic)
        try:
            client.receive(1)
        except ConnectionClosed:
            return "closed"
        return f"answered, {closed(client)}"

    return probe


def write_header_only(length: int, extended: bool = False) -> Probe:
    """A WRITE of too many bytes, its payload never sent."""

    def probe(client: Client) -> str:
        client.greet()
        client.negotiate("disk", extended=extended)
        client.send_requests([client.new_request(Command.WRITE, 0, length)])
        return closed(client)

    return probe


def disconnect_with_arguments(client: Client) -> str:
    client.greet()
    client.negotiate("disk")
    client.send_requests([client.new_request(Command.DISC, 1, 2)])
    try:
        client.receive(1)
    except ConnectionClosed:
        return "closed"
    return "answered"


def cookies_repeated(client: Client) -> str:
    client.greet()
    client.negotiate("disk")
    request = client.new_request(Command.READ, 16, 4096)
    client.send_requests([request] * 8)
    replies = client.read_replies(8)
    return "answered" if all(reply.data == pattern(16, 4096) for reply in replies) else "mixed up"


def error_text_of_read(client: Client) -> str:
    client.greet()
    client.negotiate("disk")
    reply = client.read(IMAGE_SIZE, 512)
    return f"{reply.form}, {'text' if reply.error_text else 'no text'}"


def extents_of_4_gib(client: Client) -> str:
    client.greet()
    client.negotiate("disk", contexts=["base:allocation"])
    reply = client.request(Command.BLOCK_STATUS, 0, 0xFFFFFFFF)
    return f"{reply.error_name}, {len(reply.extents)} contexts"


def extents_64_bit(client: Client) -> str:
    client.greet()
    client.negotiate("disk", extended=True, contexts=["base:allocation"])
    reply = client.request(Command.BLOCK_STATUS, 0, IMAGE_SIZE)
    (extents,) = reply.extents.values()
    total = sum(length for length, _ in extents)
    return f"{reply.error_name}, {'covers the image' if total == IMAGE_SIZE else f'{total} bytes'}"


def one_byte_at_a_time(client: Client) -> str:
    client.greet()
    client.negotiate("disk")
    (request,) = client.reads(1, 512)
    for byte in client.announce(request):
        client.send(bytes([byte]))
    return "served" if client.read_reply().data == pattern(0, 512) else "wrong data"


W = b"\xa5" * 4096
LAST = IMAGE_SIZE - 512
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = CommandFlag
ALLOCATION = ("base:allocation",)
KEPT_INVALID = "EINVAL, kept"

add("request_magic_wrong", request_magic(0x12345678, False), "closed")
add("request_magic_extended_in_compact", request_magic(EXTENDED_REQUEST_MAGIC, False), "closed")
add("request_magic_compact_in_extended", request_magic(REQUEST_MAGIC, True), "closed")
add("command_unknown", with_request(99), KEPT_INVALID)
add("command_unknown_with_length", with_request(0xFFFF, 0, 4096), KEPT_INVALID)
add("command_resize", with_request(Command.RESIZE, 4 * GIB), KEPT_INVALID)
add("flag_unknown", with_request(Command.READ, 0, 512, 0x8000), KEPT_INVALID)
add("flag_unknown_on_write", with_request(Command.WRITE, 2 * MIB, 4096, 0x8000, W), KEPT_INVALID)
add("flag_unknown_on_cache", with_request(Command.CACHE, 0, 512, 0x4000), KEPT_INVALID)
add("flag_df_on_write", with_request(Command.WRITE, 2 * MIB, 4096, DF, W), KEPT_INVALID)
add("flag_df_without_structured", with_request(Command.READ, 0, 512, DF, form="simple"), KEPT_INVALID)
add("flag_no_hole_on_read", with_request(Command.READ, 0, 512, NO_HOLE), KEPT_INVALID)
add("flag_req_one_on_read", with_request(Command.READ, 0, 512, REQ_ONE), KEPT_INVALID)
add("flag_fast_zero_on_trim", with_request(Command.TRIM, 2 * MIB, 4096, FAST_ZERO), KEPT_INVALID)
add("flag_payload_len_in_compact", with_request(Command.READ, 0, 512, PAYLOAD_LEN), KEPT_INVALID)
add("fast_zero", with_request(Command.WRITE_ZEROES, 2 * MIB, 4096, FAST_ZERO), "OK, kept", "ENOTSUP, kept")
for fua_command in (Command.READ, Command.FLUSH, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES):
    fua_length = 0 if fua_command == Command.FLUSH else 512
    add(
        f"fua_on_{fua_command.name.lower()}",
        with_request(fua_command, 0 if fua_length == 0 else 2 * MIB, fua_length, FUA),
        "OK, kept",
    )
add("fua_on_block_status", with_request(Command.BLOCK_STATUS, 0, 512, FUA, contexts=ALLOCATION), "OK, kept")
for zero_command in (Command.READ, Command.WRITE, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES):
    add(f"zero_length_{zero_command.name.lower()}", with_request(zero_command, 0, 0), "OK, kept", KEPT_INVALID)
add("zero_length_block_status", with_request(Command.BLOCK_STATUS, 0, 0, contexts=ALLOCATION), KEPT_INVALID)
add("block_status_without_contexts", with_request(Command.BLOCK_STATUS, 0, 512), KEPT_INVALID)
add("block_status_in_simple", with_request(Command.BLOCK_STATUS, 0, 512, form="simple"), KEPT_INVALID)
add("block_status_ffffffff", extents_of_4_gib, "OK, 1 contexts")
add("block_status_64_bit", extents_64_bit, "OK, covers the image")
add("block_status_beyond_end", with_request(Command.BLOCK_STATUS, LAST, 1024, contexts=ALLOCATION), KEPT_INVALID)
add("flush_with_offset", with_request(Command.FLUSH, 512, 512), "OK, kept", KEPT_INVALID)
add("read_beyond_end", with_request(Command.READ, LAST, 1024), KEPT_INVALID)
add("read_at_2_to_63", with_request(Command.READ, 1 << 63, 512), KEPT_INVALID)
add("read_wraps", with_request(Command.READ, (1 << 64) - 512, 512), KEPT_INVALID)
add("read_beyond_end_simple", with_request(Command.READ, LAST, 1024, form="simple"), KEPT_INVALID)
add("read_error_is_structured", error_text_of_read, "structured, text")
for long_length in (33 * MIB, 64 * MIB):
    add(
        f"read_{long_length // MIB}_mib",
        with_request(Command.READ, 0, long_length),
        "OK, kept",
        KEPT_INVALID,
        "EOVERFLOW, kept",
    )
add("read_64_mib_and_more", with_request(Command.READ, 0, 64 * MIB + 512), KEPT_INVALID, "EOVERFLOW, kept")
add("read_ffffffff", with_request(Command.READ, 0, 0xFFFFFFFF), KEPT_INVALID, "EOVERFLOW, kept")
add("read_2_to_63_extended", with_request(Command.READ, 0, 1 << 63, form="extended"), KEPT_INVALID, "EOVERFLOW, kept")
add("write_32_mib_and_1", with_request(Command.WRITE, 8 * MIB, 32 * MIB + 1, 0, bytes(32 * MIB + 1)), "OK, kept")
add("write_64_mib", with_request(Command.WRITE, 8 * MIB, 64 * MIB, 0, bytes(64 * MIB)), "OK, kept")
add("write_64_mib_and_1", write_header_only(64 * MIB + 1), "closed")
add("write_ffffffff", write_header_only(0xFFFFFFFF), "closed")
add("write_2_to_63_extended", write_header_only(1 << 63, extended=True), "closed")
add("write_beyond_end", with_request(Command.WRITE, LAST, 4096, 0, W), "ENOSPC, kept")
add("write_wraps", with_request(Command.WRITE, (1 << 64) - 512, 4096, 0, W), "ENOSPC, kept")
add("write_zeroes_beyond_end", with_request(Command.WRITE_ZEROES, LAST, 4096), "ENOSPC, kept")
add("write_zeroes_wraps", with_request(Command.WRITE_ZEROES, (1 << 64) - 512, 512), "ENOSPC, kept")
add("write_zeroes_ffffffff", with_request(Command.WRITE_ZEROES, 2 * GIB, 0xFFFFFFFF), "ENOSPC, kept")
add("write_zeroes_3_gib", with_request(Command.WRITE_ZEROES, 2 * GIB, 3 * GIB), "OK, kept")
add("trim_beyond_end", with_request(Command.TRIM, LAST, 4096), KEPT_INVALID)
add("trim_ffffffff", with_request(Command.TRIM, 2 * GIB, 0xFFFFFFFF), KEPT_INVALID)
add("cache_beyond_end", with_request(Command.CACHE, LAST, 4096), KEPT_INVALID)
add("payload_on_trim_extended", with_request(Command.TRIM, 0, 8, PAYLOAD_LEN, bytes(8), "extended"), KEPT_INVALID)
add("cookies_repeated", cookies_repeated, "answered")
add("disc_with_arguments", disconnect_with_arguments, "closed")
add("request_one_byte_at_a_time", one_byte_at_a_time, "served")
for ro_command, ro_payload in ((Command.WRITE, W), (Command.TRIM, b""), (Command.WRITE_ZEROES, b"")):
    add(
        f"read_only_{ro_command.name.lower()}",
        with_request(ro_command, 0, 4096, 0, ro_payload),
        "EPERM, kept",
        is_read_only=True,
    )


@dataclass(frozen=True)
class Servers:
    writable: NbdimgServer
    read_only: NbdimgServer


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    directory: Path = tmp_path_factory.mktemp("matrix")
    writable = pattern_image(directory / "writable.raw", IMAGE_SIZE)
    read_only = pattern_image(directory / "read-only.raw", IMAGE_SIZE)
    other = pattern_image(directory / "other.raw", MIB)
    options = ["--format", "raw"]
    with (
        NbdimgServer(f"disk={writable}", f"other={other}", options=options) as first,
        NbdimgServer(f"disk={read_only}", options=[*options, "--read-only"]) as second,
    ):
        yield Servers(first, second)


def test_matrix_holds_at_least_40_cases_with_different_names() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 40


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hostile_case_gets_its_verdict_and_the_next_client_is_served(servers: Servers, case: Case) -> None:
    server = servers.read_only if case.is_read_only else servers.writable
    errors_from = len(server.stderr())
    with Client(server.socket_path, timeout_s=10) as client:
        verdict = case.probe(client)
    assert_alive(server, server.socket_path, errors_from=errors_from)
    assert verdict in case.wanted


def fragile(mode: str) -> PeerServer:
    program = str(Path(__file__).with_name("fragile_server.py"))
    return PeerServer(lambda path: [sys.executable, program, path, mode])


@pytest.mark.parametrize("name", ["write_beyond_end", "read_only_write", "flag_unknown_on_write"])
def test_server_that_accepts_everything_misses_the_verdict(name: str) -> None:
    (case,) = [case for case in CASES if case.name == name]
    with fragile("exit") as server, Client(server.socket_path, timeout_s=2) as client:
        verdict = with_request(Command.WRITE, LAST, 4096, 0x8000, W, form="simple")(client)
    assert verdict not in case.wanted


@pytest.mark.parametrize("mode", ["exit", "hang"])
def test_death_of_another_server_fails_the_check_for_life(mode: str) -> None:
    with fragile(mode) as server:
        assert_alive(server, server.socket_path)
        client = Client(server.socket_path, timeout_s=1)
        client.greet()
        client.go("disk", ())
        client.send_requests([client.new_request(0x4242)])
        assert client.wait_closed(0.5) is not None or mode == "hang"
        with pytest.raises(AssertionError):
            assert_alive(server, server.socket_path)
        client.close()
