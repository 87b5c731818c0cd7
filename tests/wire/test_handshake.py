"""Handshake: greeting, client flags, framing, limits, and the options without data of their own.

Expected bytes are written out from proto.md "Newstyle negotiation", "Fixed newstyle negotiation", "Option types".
"""

from __future__ import annotations

import random
import struct
from dataclasses import replace

import pytest

from nbdimg.errors import ProtocolError
from nbdimg.limits import Limits
from nbdimg.wire.handshake import ExportInfo, Handshake, Session, State, TlsMode
from tests.support.rawprotocol import KIB, MIB, Rep, info_data, meta_data, option_bytes
from tests.wire.haggling import (
    CLIENT_FLAGS,
    DISK,
    PLAIN,
    WRITABLE,
    Exports,
    ask,
    ask_type,
    begun,
    closes,
    is_in_step,
    parsed,
)

SEED = 20

EXPORT_NAME, ABORT, LIST, PEEK_EXPORT, STARTTLS, INFO, GO = range(1, 8)
STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT, EXTENDED_HEADERS = range(8, 12)
ANSWERED = (LIST, STARTTLS, INFO, GO, STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT, EXTENDED_HEADERS)
"""The options that a server without TLS knows and that do not end the handshake by themselves."""
UNKNOWN = (0, PEEK_EXPORT, 12, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


# Greeting and client flags


def test_greeting_is_nbdmagic_ihaveopt_and_both_flags() -> None:
    assert Handshake(Exports()).greeting() == bytes.fromhex("4e42444d41474943 49484156454f5054 0003")


def test_options_and_reply_have_the_layout_of_the_specification() -> None:
    handshake = begun()
    asked = bytes.fromhex("49484156454f5054 00000008 00000000")
    assert handshake.receive(asked) == bytes.fromhex("0003e889045565a9 00000008 00000001 00000000")


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_client_flags_that_were_offered_are_accepted(flags: int) -> None:
    assert begun(client_flags=flags).state is State.OPTIONS


@pytest.mark.parametrize("bit", range(2, 32))
def test_client_flags_with_an_unknown_bit_close(bit: int) -> None:
    handshake = Handshake(Exports())
    with pytest.raises(ProtocolError, match=f"{3 | 1 << bit:#x}"):
        handshake.receive(struct.pack(">I", 3 | 1 << bit))


def test_client_flags_in_four_pieces_are_accepted_with_the_last() -> None:
    handshake = Handshake(Exports())
    for piece in (b"\0", b"\0", b"\0"):
        assert handshake.receive(piece) == b""
        assert handshake.state is State.FLAGS
    handshake.receive(b"\3")
    assert handshake.state is State.OPTIONS


@pytest.mark.parametrize("flags", [0, 2])
@pytest.mark.parametrize("option", [*ANSWERED, ABORT, *UNKNOWN])
def test_option_without_fixed_newstyle_closes(flags: int, option: int) -> None:
    assert closes(begun(client_flags=flags), option_bytes(option))


# Framing


@pytest.mark.parametrize("index", range(8))
def test_option_magic_with_one_wrong_byte_closes(index: int) -> None:
    message = bytearray(option_bytes(LIST))
    message[index] ^= 0x01
    assert closes(begun(), bytes(message))


def test_option_cut_at_every_byte_waits_for_the_rest() -> None:
    message = option_bytes(GO, info_data("disk", [3]))
    whole = begun().receive(message)
    for cut in range(1, len(message)):
        handshake = begun()
        assert handshake.receive(message[:cut]) == b""
        assert handshake.state is State.OPTIONS
        assert handshake.receive(message[cut:]) == whole


def dialogues() -> dict[str, bytes]:
    """Whole sessions, each from the client flags on."""
    haggling = (
        option_bytes(STRUCTURED_REPLY),
        option_bytes(LIST),
        option_bytes(77, b"x" * 300),
        option_bytes(GO, info_data("nothing", [1, 2, 3])),
        option_bytes(SET_META_CONTEXT, meta_data("disk", ["base:allocation", "qemu:allocation-depth"])),
        option_bytes(INFO, info_data("disk", [0, 1, 2, 3, 9])),
        option_bytes(LIST_META_CONTEXT, meta_data("disk", [])),
        option_bytes(EXTENDED_HEADERS, b"not empty"),
    )
    negotiated = CLIENT_FLAGS + b"".join(haggling)
    return {
        "go": negotiated + option_bytes(GO, info_data("disk", [3])),
        "go with requests behind": negotiated + option_bytes(GO, info_data("disk")) + b"\x25\x60\x95\x13" + bytes(40),
        "export name": negotiated + option_bytes(EXPORT_NAME, b"disk") + b"behind",
        "abort": negotiated + option_bytes(ABORT, b"enough"),
        "skipped option": negotiated + option_bytes(LIST, bytes(64 * KIB + 1)) + option_bytes(LIST),
        "bare client": struct.pack(">I", 0) + option_bytes(EXPORT_NAME, b"plain"),
    }


def outcome(handshake: Handshake, pieces: list[bytes]) -> tuple[bytes, State, Session | None, bytes]:
    """Replies, state, session and leftover; what comes behind the handshake stays with the owner."""
    replies = []
    rest = b""
    for index, piece in enumerate(pieces):
        replies.append(handshake.receive(piece))
        if handshake.state is not State.OPTIONS and handshake.state is not State.FLAGS:
            rest = b"".join(pieces[index + 1 :])
            break
    return b"".join(replies), handshake.state, handshake.session, handshake.leftover + rest


@pytest.mark.parametrize("name", dialogues())
def test_dialogue_byte_by_byte_or_split_anywhere_gives_the_same_as_whole(name: str) -> None:
    stream = dialogues()[name]
    expected = outcome(Handshake(Exports()), [stream])
    assert len(expected[0]) > 0
    if len(stream) < 4096:
        assert outcome(Handshake(Exports()), [bytes([byte]) for byte in stream]) == expected
    generator = random.Random(SEED)
    for _ in range(20):
        cuts = sorted(generator.sample(range(1, len(stream)), 6))
        pieces = [stream[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
        assert outcome(Handshake(Exports()), pieces) == expected


def test_pipelined_options_are_answered_in_order() -> None:
    handshake = begun()
    asked = [STRUCTURED_REPLY, 99, EXTENDED_HEADERS, LIST_META_CONTEXT]
    replies = parsed(handshake.receive(b"".join(option_bytes(option) for option in asked)))
    assert [reply.option for reply in replies] == asked


@pytest.mark.parametrize("option", UNKNOWN)
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 4096, 64 * KIB])
def test_unknown_option_is_unsupported_and_its_data_consumed(option: int, length: int) -> None:
    handshake = begun()
    lookalike = (option_bytes(ABORT) * (length // 16 + 1))[:length]
    assert ask_type(handshake, option, lookalike) == Rep.ERR_UNSUP
    assert is_in_step(handshake)


# Limits


@pytest.mark.parametrize("option", ANSWERED)
def test_known_option_with_data_at_the_parse_limit_is_parsed(option: int) -> None:
    handshake = begun()
    assert ask_type(handshake, option, bytes(64 * KIB)) == Rep.ERR_INVALID
    assert is_in_step(handshake)


@pytest.mark.parametrize("option", ANSWERED)
@pytest.mark.parametrize("length", [64 * KIB + 1, 2 * MIB])
def test_known_option_beyond_the_parse_limit_is_too_big_and_skipped(option: int, length: int) -> None:
    """CVE-2017-15119: an oversized option costs the server a bounded amount, and the stream stays in step."""
    handshake = begun()
    assert ask_type(handshake, option, option_bytes(ABORT) * (length // 16) + bytes(length % 16)) == Rep.ERR_TOO_BIG
    assert is_in_step(handshake)


@pytest.mark.parametrize("option", UNKNOWN)
@pytest.mark.parametrize("length", [64 * KIB + 1, 2 * MIB])
def test_unknown_option_beyond_the_parse_limit_is_unsupported_and_skipped(option: int, length: int) -> None:
    handshake = begun()
    assert ask_type(handshake, option, bytes(length)) == Rep.ERR_UNSUP
    assert is_in_step(handshake)


def test_skipped_option_is_answered_once_and_its_data_dropped_as_it_comes() -> None:
    handshake = begun()
    head = option_bytes(LIST, length=100_000)
    replies = handshake.receive(head)
    for _ in range(100):
        replies += handshake.receive(bytes(1000))
    assert [reply.type for reply in parsed(replies)] == [Rep.ERR_TOO_BIG]
    assert is_in_step(handshake)


@pytest.mark.parametrize("option", [EXPORT_NAME, ABORT, *ANSWERED, *UNKNOWN])
@pytest.mark.parametrize("length", [2 * MIB + 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_option_that_announces_more_than_is_skipped_closes_on_its_header(option: int, length: int) -> None:
    assert closes(begun(), option_bytes(option, length=length))


def test_options_at_the_count_limit_are_answered_and_the_next_closes() -> None:
    handshake = begun(options_max=3)
    for option in (LIST, 99, STRUCTURED_REPLY):
        ask(handshake, option)
    assert closes(handshake, option_bytes(LIST))


def test_options_default_count_limit_is_1024() -> None:
    handshake = Handshake(Exports([]))
    handshake.receive(CLIENT_FLAGS)
    assert len(parsed(handshake.receive(option_bytes(LIST) * 1024))) == 1024
    assert closes(handshake, option_bytes(LIST))


def test_options_of_one_turn_are_answered_and_the_others_wait() -> None:
    handshake = Handshake(Exports(), turn_options=16)
    handshake.receive(CLIENT_FLAGS)
    handshake.receive(option_bytes(99) * 15)
    assert not handshake.has_more
    counts, waits = [], []
    for asked in (option_bytes(99) * 40 + option_bytes(GO, info_data("disk")) + b"behind", b"", b""):
        counts.append(len(parsed(handshake.receive(asked))))
        waits.append(handshake.has_more)
    assert (counts, waits) == ([16, 16, 11], [True, True, False])
    assert handshake.state is State.DONE
    assert handshake.leftover == b"behind"


def test_lists_of_many_exports_end_before_their_bytes_do() -> None:
    handshake = begun(exports=Exports([replace(PLAIN, name=f"{number}") for number in range(1024)]))
    for _ in range(5):
        assert len(ask(handshake, LIST)) == 1025
    assert closes(handshake, option_bytes(LIST))


def test_client_that_has_listed_many_exports_may_enter_one() -> None:
    handshake = begun(exports=Exports([replace(PLAIN, name=f"{number}") for number in range(5000)]))
    assert len(ask(handshake, LIST)) == 5001
    assert ask(handshake, GO, info_data("4999"))[-1].type == Rep.ACK


def test_option_bytes_at_the_limit_are_answered_and_one_more_closes() -> None:
    handshake = begun(option_bytes_max=100)
    ask(handshake, 99, bytes(60))
    ask(handshake, LIST)
    ask(handshake, 99, bytes(40))
    ask(handshake, LIST)
    assert closes(handshake, option_bytes(99, bytes(1)))


def test_option_bytes_of_skipped_data_count_before_they_come() -> None:
    handshake = begun(option_bytes_max=3 * 64 * KIB)
    assert ask_type(handshake, 99, bytes(100_000)) == Rep.ERR_UNSUP
    assert closes(handshake, option_bytes(99, length=100_000))


def test_option_bytes_default_limit_is_4_mib() -> None:
    assert Limits().option_bytes == 4 * MIB
    handshake = begun(option_bytes_max=Limits().option_bytes)
    ask(handshake, 99, bytes(2 * MIB))
    ask(handshake, 99, bytes(2 * MIB))
    assert closes(handshake, option_bytes(99, b"x"))


# EXPORT_NAME


@pytest.mark.parametrize(
    ("client_flags", "padding"), [(0b11, 0), (0b10, 0), (0b01, 124), (0b00, 124)], ids=["both", "nz", "fixed", "none"]
)
def test_export_name_answer_is_size_and_flags_and_124_zeroes_unless_declined(client_flags: int, padding: int) -> None:
    handshake = begun(client_flags=client_flags)
    answer = handshake.receive(bytes.fromhex("49484156454f5054 00000001 00000004") + b"disk")
    assert answer == bytes.fromhex("1122334455667700 0d6d") + bytes(padding)
    assert handshake.state is State.DONE
    assert handshake.session == Session(
        export=DISK,
        flags=DISK.flags,
        is_structured=False,
        is_extended=False,
        obeys_block_size=False,
        contexts={},
    )


def test_export_name_after_structured_reply_sets_send_df() -> None:
    handshake = begun()
    ask(handshake, STRUCTURED_REPLY)
    assert handshake.receive(option_bytes(EXPORT_NAME, b"disk")) == struct.pack(">QH", DISK.size, WRITABLE | 0x80)
    assert handshake.session is not None
    assert handshake.session.is_structured
    assert handshake.session.flags == WRITABLE | 0x80


def test_export_name_after_extended_headers_closes() -> None:
    handshake = begun()
    ask(handshake, EXTENDED_HEADERS)
    assert closes(handshake, option_bytes(EXPORT_NAME, b"disk"))
    assert handshake.session is None


def test_export_name_keeps_contexts_that_were_set_for_that_export() -> None:
    handshake = begun()
    ask(handshake, STRUCTURED_REPLY)
    ask(handshake, SET_META_CONTEXT, meta_data("disk", ["base:allocation"]))
    handshake.receive(option_bytes(EXPORT_NAME, b"disk"))
    assert handshake.session is not None
    assert list(handshake.session.contexts.values()) == ["base:allocation"]


@pytest.mark.parametrize(
    "name",
    [b"", b"nothing", b"disk\0", b"\0", b"dis\xff", b"\xed\xa0\x80", b"d" * 4097, b"d" * 64 * KIB, b"DISK", b"disk/"],
    ids=["empty", "unknown", "nul", "only-nul", "not-utf8", "surrogate", "4097", "65536", "case", "suffix"],
)
def test_export_name_that_names_no_export_closes(name: bytes) -> None:
    handshake = begun()
    assert closes(handshake, option_bytes(EXPORT_NAME, name))
    assert handshake.session is None


def test_export_name_beyond_the_parse_limit_closes_on_its_header() -> None:
    assert closes(begun(), option_bytes(EXPORT_NAME, length=64 * KIB + 1))


def test_export_name_that_is_empty_finds_the_default_export() -> None:
    handshake = begun(exports=Exports([ExportInfo(name="", size=4096, flags=PLAIN.flags)]))
    assert handshake.receive(option_bytes(EXPORT_NAME)) == bytes.fromhex("0000000000001000 0003")


def test_export_name_while_shutting_down_closes() -> None:
    exports = Exports()
    handshake = begun(exports=exports)
    exports.is_shutting_down = True
    assert closes(handshake, option_bytes(EXPORT_NAME, b"disk"))


def test_bytes_behind_the_handshake_are_left_over_untouched() -> None:
    handshake = begun()
    behind = bytes.fromhex("25609513 0000 0002 0000000000000000 0000000000000000 00000000") + b"more"
    handshake.receive(option_bytes(GO, info_data("disk")) + behind)
    assert handshake.state is State.DONE
    assert handshake.leftover == behind


# ABORT


@pytest.mark.parametrize("data", [b"", b"x", bytes(64 * KIB)], ids=["none", "one", "65536"])
def test_abort_is_acknowledged_whatever_its_data_and_ends_the_handshake(data: bytes) -> None:
    handshake = begun()
    assert ask_type(handshake, ABORT, data) == Rep.ACK
    assert handshake.state is State.CLOSED
    assert handshake.session is None


def test_abort_with_data_beyond_the_parse_limit_is_acknowledged_all_the_same() -> None:
    """Spec: proto.md NBD_OPT_ABORT: the reply is ACK, a payload is ignored."""
    handshake = begun()
    replies = parsed(handshake.receive(option_bytes(ABORT, bytes(64 * KIB + 1))))
    assert [reply.type for reply in replies] == [Rep.ACK]
    assert handshake.state is State.CLOSED


def test_abort_ends_the_options_behind_it() -> None:
    handshake = begun()
    replies = parsed(handshake.receive(option_bytes(ABORT) + option_bytes(LIST) + option_bytes(GO, info_data("disk"))))
    assert [(reply.option, reply.type) for reply in replies] == [(ABORT, Rep.ACK)]
    assert handshake.receive(option_bytes(LIST)) == b""


# LIST


def test_list_gives_each_export_with_its_description() -> None:
    replies = ask(begun(), LIST)
    assert [(reply.type, reply.data) for reply in replies] == [
        (Rep.SERVER, b"\0\0\0\4diska disk"),
        (Rep.SERVER, b"\0\0\0\5plain"),
        (Rep.SERVER, b"\0\0\0\6secret"),
        (Rep.ACK, b""),
    ]


def test_list_counts_a_name_in_bytes_of_utf8() -> None:
    exports = Exports([ExportInfo(name="diskén", size=1, flags=PLAIN.flags, description="für")])
    assert ask(begun(exports=exports), LIST)[0].data == b"\0\0\0\7disk\xc3\xa9n" + b"f\xc3\xbcr"


def test_list_of_no_exports_is_only_acknowledged() -> None:
    assert [reply.type for reply in ask(begun(exports=Exports([])), LIST)] == [Rep.ACK]


@pytest.mark.parametrize("option", [LIST, STARTTLS, STRUCTURED_REPLY, EXTENDED_HEADERS])
@pytest.mark.parametrize("length", [1, 4, 16, 17, 4096])
def test_option_without_data_refuses_data_and_stays_in_step(option: int, length: int) -> None:
    handshake = begun()
    assert ask_type(handshake, option, (option_bytes(ABORT) * 300)[:length]) == Rep.ERR_INVALID
    assert is_in_step(handshake)
    ask(handshake, GO, info_data("disk"))
    assert handshake.session is not None
    assert not handshake.session.is_structured
    assert not handshake.session.is_extended


# STRUCTURED_REPLY and EXTENDED_HEADERS


@pytest.mark.parametrize(
    ("options", "replies", "is_structured", "is_extended"),
    [
        ([], [], False, False),
        ([8], [Rep.ACK], True, False),
        ([11], [Rep.ACK], False, True),
        ([8, 8], [Rep.ACK, Rep.ERR_INVALID], True, False),
        ([11, 11], [Rep.ACK, Rep.ERR_INVALID], False, True),
        ([8, 11], [Rep.ACK, Rep.ACK], True, True),
        ([11, 8], [Rep.ACK, Rep.ERR_EXT_HEADER_REQD], False, True),
        ([8, 11, 8], [Rep.ACK, Rep.ACK, Rep.ERR_EXT_HEADER_REQD], True, True),
    ],
)
def test_reply_dialect_is_what_was_acknowledged(
    options: list[int], replies: list[int], is_structured: bool, is_extended: bool
) -> None:
    handshake = begun(tls=TlsMode.OFF)
    assert [ask_type(handshake, option) for option in options] == replies
    ask(handshake, GO, info_data("disk"))
    session = handshake.session
    assert session is not None
    assert (session.is_structured, session.is_extended) == (is_structured, is_extended)
    assert bool(session.flags & 0x80) == (is_structured or is_extended)
