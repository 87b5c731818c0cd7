"""Handshake: LIST_META_CONTEXT and SET_META_CONTEXT.

    u32 length of the export's name, name, u32 count of queries, count times (u32 length, query)

Spec: proto.md "NBD_OPT_LIST_META_CONTEXT", "NBD_OPT_SET_META_CONTEXT", "Metadata querying".
"""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from typing import Any

import pytest

from nbdimg.wire.constants import TransmissionFlag
from nbdimg.wire.handshake import Handshake
from tests.support.rawprotocol import KIB, OptionReply, Rep, info_data, meta_data
from tests.wire.haggling import ALLOCATION, BITMAP, CONTEXTS, DEPTH, DISK, Exports, ask, ask_type, begun, is_in_step

STRUCTURED_REPLY, LIST, SET, EXTENDED_HEADERS, GO = 8, 9, 10, 11, 7
BOTH = pytest.mark.parametrize("option", [LIST, SET], ids=["list", "set"])

VALID = b"\0\0\0\4disk\0\0\0\2\0\0\0\x0fbase:allocation\0\0\0\x15qemu:allocation-depth"


def structured(exports: Exports | None = None) -> Handshake:
    handshake = begun(exports=exports)
    ask(handshake, STRUCTURED_REPLY)
    return handshake


def contexts_of(replies: list[OptionReply]) -> list[tuple[int, str]]:
    """(id, name) of each context in an acknowledged answer."""
    assert replies[-1].type == Rep.ACK
    assert replies[-1].data == b""
    assert {reply.type for reply in replies[:-1]} <= {Rep.META_CONTEXT}
    return [(int.from_bytes(reply.data[:4], "big"), reply.data[4:].decode()) for reply in replies[:-1]]


def names_of(replies: list[OptionReply]) -> list[str]:
    return [name for _, name in contexts_of(replies)]


def session_contexts(handshake: Handshake, name: str = "disk") -> dict[int, str]:
    ask(handshake, GO, info_data(name))
    assert handshake.session is not None
    return handshake.session.contexts


def test_set_answers_with_the_bytes_of_the_specification() -> None:
    handshake = structured()
    answer = handshake.receive(bytes.fromhex("49484156454f5054 0000000a 00000038") + VALID)
    ids = [int.from_bytes(answer[20:24], "big"), int.from_bytes(answer[20 + 19 + 20 : 20 + 19 + 24], "big")]
    assert answer == (
        bytes.fromhex("0003e889045565a9 0000000a 00000004 00000013")
        + struct.pack(">I", ids[0])
        + b"base:allocation"
        + bytes.fromhex("0003e889045565a9 0000000a 00000004 00000019")
        + struct.pack(">I", ids[1])
        + b"qemu:allocation-depth"
        + bytes.fromhex("0003e889045565a9 0000000a 00000001 00000000")
    )
    assert session_contexts(handshake) == dict(zip(ids, ["base:allocation", "qemu:allocation-depth"], strict=True))


# LIST


@pytest.mark.parametrize(
    ("queries", "listed"),
    [
        ([], list(CONTEXTS)),
        (["base:allocation"], [ALLOCATION]),
        (["base:"], [ALLOCATION]),
        (["qemu:"], [DEPTH, BITMAP]),
        (["qemu:dirty-bitmap:"], [BITMAP]),
        (["qemu:dirty-bitmap:monday"], [BITMAP]),
        (["qemu:", "base:"], [DEPTH, BITMAP, ALLOCATION]),
        (["qemu:", "qemu:allocation-depth", "qemu:"], [DEPTH, BITMAP]),
        (["base:allocatio"], []),
        (["base:allocation2"], []),
        (["BASE:allocation"], []),
        (["qemu:dirty-bitmap"], []),
        (["qemu:dirty-bitmap:mon"], []),
        (["x-nobody:"], []),
        ([":"], []),
        (["base::"], []),
    ],
)
def test_list_gives_what_each_query_or_wildcard_matches_once(queries: list[str], listed: list[str]) -> None:
    handshake = begun()
    assert sorted(names_of(ask(handshake, LIST, meta_data("disk", queries)))) == sorted(listed)


def test_list_ids_are_zero() -> None:
    assert {context_id for context_id, _ in contexts_of(ask(begun(), LIST, meta_data("disk", [])))} == {0}


@pytest.mark.parametrize("before", [[], [STRUCTURED_REPLY], [EXTENDED_HEADERS]], ids=str)
def test_list_works_whatever_was_negotiated(before: list[int]) -> None:
    handshake = begun()
    for option in before:
        ask(handshake, option)
    assert names_of(ask(handshake, LIST, meta_data("disk", []))) == list(CONTEXTS)


def test_list_does_not_change_what_is_set() -> None:
    handshake = structured()
    selected = dict(contexts_of(ask(handshake, SET, meta_data("disk", [DEPTH]))))
    ask(handshake, LIST, meta_data("disk", []))
    ask(handshake, LIST, meta_data("plain", []))
    ask(handshake, LIST, meta_data("nothing", []))
    ask(handshake, LIST, b"malformed")
    assert session_contexts(handshake) == selected


# SET


@pytest.mark.parametrize(
    ("queries", "selected"),
    [
        ([], []),
        ([ALLOCATION], [ALLOCATION]),
        ([BITMAP, ALLOCATION], [BITMAP, ALLOCATION]),
        ([ALLOCATION, ALLOCATION, ALLOCATION], [ALLOCATION]),
        (["base:", "qemu:", "qemu:dirty-bitmap:"], []),
        (["base:", ALLOCATION, "qemu:nothing", "x-nobody:x"], [ALLOCATION]),
        (["base:allocation:"], []),
    ],
)
@pytest.mark.parametrize("dialect", [STRUCTURED_REPLY, EXTENDED_HEADERS], ids=["structured", "extended"])
def test_set_selects_exact_names_once_and_no_wildcards(dialect: int, queries: list[str], selected: list[str]) -> None:
    handshake = begun()
    ask(handshake, dialect)
    answered = contexts_of(ask(handshake, SET, meta_data("disk", queries)))
    assert sorted(name for _, name in answered) == sorted(selected)
    assert len({context_id for context_id, _ in answered}) == len(answered)
    assert session_contexts(handshake) == dict(answered)


def test_set_without_structured_replies_is_invalid_and_selects_nothing() -> None:
    handshake = begun()
    assert ask_type(handshake, SET, VALID) == Rep.ERR_INVALID
    ask(handshake, STRUCTURED_REPLY)
    assert session_contexts(handshake) == {}


def test_set_becoming_valid_after_structured_reply_selects() -> None:
    handshake = begun()
    assert ask_type(handshake, SET, VALID) == Rep.ERR_INVALID
    ask(handshake, STRUCTURED_REPLY)
    assert ask_type(handshake, SET, VALID) == Rep.ACK
    assert len(session_contexts(handshake)) == 2


def test_set_twice_replaces_the_first_set() -> None:
    handshake = structured()
    ask(handshake, SET, meta_data("disk", [ALLOCATION, DEPTH]))
    second = dict(contexts_of(ask(handshake, SET, meta_data("disk", [BITMAP]))))
    assert session_contexts(handshake) == second
    assert list(second.values()) == [BITMAP]


def test_set_of_no_query_clears_the_set() -> None:
    handshake = structured()
    ask(handshake, SET, VALID)
    assert names_of(ask(handshake, SET, meta_data("disk", []))) == []
    assert session_contexts(handshake) == {}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        VALID[:-1],
        VALID + b"\0",
        meta_data("nothing", [ALLOCATION]),
        meta_data("disk", ["allocation"]),
        meta_data("disk", [b"base:\xff"]),
        meta_data("disk", [b"base:\0"]),
        meta_data("disk", ["base:" + "x" * 4092]),
        meta_data("disk", [ALLOCATION], query_count=2),
        VALID + bytes(64 * KIB),
    ],
    ids=["empty", "cut", "trailing", "unknown", "namespace", "utf8", "nul", "long", "count", "oversized"],
)
def test_set_that_fails_has_cleared_the_set(data: bytes) -> None:
    """Spec: proto.md NBD_OPT_SET_META_CONTEXT: replaces all that was set before, also when it fails."""
    handshake = structured()
    assert ask_type(handshake, SET, VALID) == Rep.ACK
    assert ask_type(handshake, SET, data) >= 0x80000000
    assert session_contexts(handshake) == {}


def test_set_while_shutting_down_is_refused_with_shutdown() -> None:
    exports = Exports()
    handshake = structured(exports)
    ask(handshake, SET, VALID)
    exports.is_shutting_down = True
    assert ask_type(handshake, SET, VALID) == Rep.ERR_SHUTDOWN
    assert ask_type(handshake, LIST, VALID) == Rep.ERR_SHUTDOWN
    exports.is_shutting_down = False
    assert session_contexts(handshake) == {}


def test_set_for_one_export_is_void_for_another() -> None:
    handshake = structured()
    ask(handshake, SET, meta_data("disk", [ALLOCATION]))
    assert session_contexts(handshake, "plain") == {}


@pytest.mark.parametrize("has_extended_headers", [False, True])
def test_set_is_void_when_another_image_without_one_of_them_has_the_name_by_go(has_extended_headers: bool) -> None:
    exports = Exports()
    handshake = structured(exports)
    if has_extended_headers:
        ask(handshake, EXTENDED_HEADERS)
    ask(handshake, SET, meta_data("disk", [ALLOCATION, BITMAP]))
    exports.exports = (replace(DISK, contexts=(ALLOCATION, DEPTH)),)
    assert session_contexts(handshake) == {}
    assert handshake.session is not None
    assert TransmissionFlag.BLOCK_STATUS_PAYLOAD not in handshake.session.flags


def test_set_holds_for_another_image_that_has_all_of_them() -> None:
    exports = Exports()
    handshake = structured(exports)
    ask(handshake, SET, meta_data("disk", [BITMAP]))
    exports.exports = (replace(DISK, size=512, contexts=(BITMAP,)),)
    assert list(session_contexts(handshake).values()) == [BITMAP]


def test_set_for_an_alias_holds_for_the_same_export() -> None:
    handshake = structured()
    ask(handshake, SET, meta_data("main", [ALLOCATION]))
    assert list(session_contexts(handshake).values()) == [ALLOCATION]


def test_set_survives_other_options_until_go() -> None:
    handshake = structured()
    ask(handshake, SET, meta_data("disk", [DEPTH]))
    for option, data in ((3, b""), (6, info_data("plain")), (7, info_data("nothing")), (99, b"xx"), (8, b"")):
        ask(handshake, option, data)
    assert list(session_contexts(handshake).values()) == [DEPTH]


# Malformed data


@BOTH
def test_meta_context_data_cut_at_every_byte_is_invalid_and_stays_in_step(option: int) -> None:
    for cut in range(len(VALID)):
        handshake = structured()
        assert ask_type(handshake, option, VALID[:cut]) == Rep.ERR_INVALID, cut
        assert is_in_step(handshake)
        assert ask_type(handshake, option, VALID) == Rep.ACK


@BOTH
@pytest.mark.parametrize("extra", [1, 4, 16, 1000])
def test_meta_context_data_with_bytes_behind_is_never_acknowledged(option: int, extra: int) -> None:
    handshake = structured()
    assert [reply.type for reply in ask(handshake, option, VALID + bytes(extra))] == [Rep.ERR_INVALID]
    assert is_in_step(handshake)


@BOTH
@pytest.mark.parametrize("count", [0, 1, 3, 16384, 16385, 0x40000000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_meta_context_query_count_that_does_not_fit_is_invalid(option: int, count: int) -> None:
    data = meta_data("disk", [ALLOCATION, DEPTH], query_count=count)
    handshake = structured()
    assert ask_type(handshake, option, data) == Rep.ERR_INVALID
    assert is_in_step(handshake)


@BOTH
@pytest.mark.parametrize("field", [0, 12, 31], ids=["name", "first", "second"])
@pytest.mark.parametrize("length", [0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF, 1000])
def test_meta_context_string_length_that_does_not_fit_is_invalid(option: int, field: int, length: int) -> None:
    assert VALID[field : field + 3] == b"\0\0\0"
    data = VALID[:field] + struct.pack(">I", length) + VALID[field + 4 :]
    handshake = structured()
    assert ask_type(handshake, option, data) == Rep.ERR_INVALID
    assert is_in_step(handshake)


@BOTH
@pytest.mark.parametrize("query", ["", "base", "allocation", "b" * 4096, "qemu"])
def test_meta_context_query_without_a_namespace_is_invalid(option: int, query: str) -> None:
    handshake = structured()
    assert ask_type(handshake, option, meta_data("disk", [ALLOCATION, query])) == Rep.ERR_INVALID
    assert is_in_step(handshake)


@BOTH
@pytest.mark.parametrize("query", [b"base:\0", b"\0", b"base:\xff", b"\xed\xa0\x80:", b"base:allocation\0"])
def test_meta_context_query_with_nul_or_bad_utf8_is_invalid(option: int, query: bytes) -> None:
    handshake = structured()
    assert ask_type(handshake, option, meta_data("disk", [query])) == Rep.ERR_INVALID
    assert is_in_step(handshake)


@BOTH
def test_meta_context_query_of_the_longest_string_is_ignored_and_a_longer_one_too_big(option: int) -> None:
    handshake = structured()
    assert names_of(ask(handshake, option, meta_data("disk", ["x:" + "y" * 4094]))) == []
    assert ask_type(handshake, option, meta_data("disk", ["x:" + "y" * 4095])) == Rep.ERR_TOO_BIG
    assert is_in_step(handshake)


@BOTH
@pytest.mark.parametrize("name", ["nothing", "", "Disk"])
def test_meta_context_of_an_unknown_export_is_unknown(option: int, name: str) -> None:
    handshake = structured()
    assert ask_type(handshake, option, meta_data(name, [ALLOCATION])) == Rep.ERR_UNKNOWN
    assert is_in_step(handshake)


@BOTH
def test_meta_context_with_as_many_queries_as_fit_is_answered_once(option: int) -> None:
    """CVE-2025-47712 class: the answer does not grow with the number of queries."""
    queries = [ALLOCATION] * ((64 * KIB - 12) // 19)
    assert names_of(ask(structured(), option, meta_data("disk", queries))) == [ALLOCATION]


class Watched(str):
    """Counts how often it is compared with a beginning."""

    __slots__ = ()
    comparisons = 0

    def startswith(self, *arguments: Any) -> bool:
        Watched.comparisons += 1
        return super().startswith(*arguments)


@BOTH
def test_many_queries_are_not_compared_with_each_of_many_contexts(option: int) -> None:
    """13,000 queries, which one option holds, and the contexts of 1,000 bitmaps took 4 s."""
    contexts = tuple(Watched(f"qemu:dirty-bitmap:{number}") for number in range(1000))
    handshake = structured(Exports([replace(DISK, contexts=contexts)]))
    Watched.comparisons = 0
    assert names_of(ask(handshake, option, meta_data("disk", [f"{number}:" for number in range(5000)]))) == []
    assert Watched.comparisons <= len(contexts)


@BOTH
def test_what_queries_select_agrees_with_comparing_each_with_each(option: int) -> None:
    words = ["base:", "base:allocation", "qemu:", "qemu:dirty-bitmap:", ":", "qemu:a:", "a:", "qemu:dirty-bitmap:x:y"]
    contexts = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:x:y", "qemu:dirty-bitmap:z")
    rng = random.Random(41)
    handshake = structured(Exports([replace(DISK, contexts=contexts)]))
    for _ in range(200):
        queries = [rng.choice([*words, *contexts]) for _ in range(rng.randrange(1, 6))]
        expected: list[str] = []
        for query in queries:
            is_wildcard = option == LIST and (query == "qemu:dirty-bitmap:" or query.find(":") == len(query) - 1)
            found = [each for each in contexts if each == query or (is_wildcard and each.startswith(query))]
            expected += [each for each in found if each not in expected]
        assert names_of(ask(handshake, option, meta_data("disk", queries))) == expected, queries
