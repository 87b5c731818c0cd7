"""Handshake: the three TLS modes, and STARTTLS.

Spec: proto.md "TLS support", "NBD_OPT_STARTTLS"; modes NOTLS, SELECTIVETLS, FORCEDTLS.
"""

from __future__ import annotations

import pytest

from nbdimg.wire.handshake import Handshake, State, TlsMode
from tests.support.rawprotocol import KIB, Rep, info_data, meta_data, option_bytes
from tests.wire.haggling import ALLOCATION, ask, ask_type, begun, closes, encrypted, is_in_step, parsed

EXPORT_NAME, ABORT, LIST, PEEK_EXPORT, STARTTLS, INFO, GO = range(1, 8)
STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT, EXTENDED_HEADERS = range(8, 12)
ALL_MODES = pytest.mark.parametrize("tls", list(TlsMode), ids=lambda mode: mode.value)
WITH_TLS = pytest.mark.parametrize("tls", [TlsMode.SELECTIVE, TlsMode.REQUIRED], ids=lambda mode: mode.value)

REQUESTS: dict[str, tuple[int, bytes]] = {
    "list": (LIST, b""),
    "list-data": (LIST, b"x"),
    "peek": (PEEK_EXPORT, b"disk"),
    "info-disk": (INFO, info_data("disk", [1])),
    "info-secret": (INFO, info_data("secret", [1])),
    "info-unknown": (INFO, info_data("nothing", [1])),
    "info-malformed": (INFO, b"malformed"),
    "go-secret": (GO, info_data("secret")),
    "go-unknown": (GO, info_data("nothing")),
    "go-malformed": (GO, b""),
    "structured": (STRUCTURED_REPLY, b""),
    "list-meta": (LIST_META_CONTEXT, meta_data("disk", [])),
    "set-meta": (SET_META_CONTEXT, meta_data("disk", [])),
    "extended": (EXTENDED_HEADERS, b""),
    "oversized": (INFO, bytes(64 * KIB + 1)),
    "unknown": (99, b"payload"),
    "unknown-oversized": (99, bytes(64 * KIB + 1)),
}

ACK, INVALID, UNKNOWN, UNSUP, TLS_REQD, TOO_BIG = (
    Rep.ACK,
    Rep.ERR_INVALID,
    Rep.ERR_UNKNOWN,
    Rep.ERR_UNSUP,
    Rep.ERR_TLS_REQD,
    Rep.ERR_TOO_BIG,
)

# request           OFF      SELECTIVE  after TLS
TABLE = {
    "list":         (ACK,     ACK,      ACK),
    "list-data":    (INVALID, INVALID,  INVALID),
    "peek":         (UNSUP,   UNSUP,    UNSUP),
    "info-disk":    (ACK,     ACK,      ACK),
    "info-secret":  (ACK,     TLS_REQD, ACK),
    "info-unknown": (UNKNOWN, TLS_REQD, UNKNOWN),
    "info-malformed": (INVALID, INVALID, INVALID),
    "go-secret":    (ACK,     TLS_REQD, ACK),
    "go-unknown":   (UNKNOWN, TLS_REQD, UNKNOWN),
    "go-malformed": (INVALID, INVALID,  INVALID),
    "structured":   (ACK,     ACK,      ACK),
    "list-meta":    (ACK,     ACK,      ACK),
    "set-meta":     (INVALID, INVALID,  INVALID),
    "extended":     (ACK,     ACK,      ACK),
    "oversized":    (TOO_BIG, TOO_BIG,  TOO_BIG),
    "unknown":      (UNSUP,   UNSUP,    UNSUP),
    "unknown-oversized": (UNSUP, UNSUP, UNSUP),
}  # fmt: skip
EVERY_REQUEST = pytest.mark.parametrize("request_name", REQUESTS)


@EVERY_REQUEST
def test_tls_off_answers_by_the_table_and_never_asks_for_tls(request_name: str) -> None:
    assert ask_type(begun(TlsMode.OFF), *REQUESTS[request_name]) == TABLE[request_name][0]


@EVERY_REQUEST
def test_tls_selective_asks_for_tls_only_where_an_export_needs_it(request_name: str) -> None:
    handshake = begun(TlsMode.SELECTIVE)
    assert ask_type(handshake, *REQUESTS[request_name]) == TABLE[request_name][1]
    assert is_in_step(handshake)


@EVERY_REQUEST
def test_tls_required_refuses_everything_before_tls_and_stays_in_step(request_name: str) -> None:
    handshake = begun(TlsMode.REQUIRED)
    for _ in range(2):
        assert [reply.type for reply in ask(handshake, *REQUESTS[request_name])] == [TLS_REQD]
    assert handshake.session is None
    assert ask_type(handshake, STARTTLS) == ACK
    handshake.tls_started()
    assert ask_type(handshake, *REQUESTS[request_name]) == TABLE[request_name][2]


@WITH_TLS
@EVERY_REQUEST
def test_tls_in_use_is_never_asked_for_again(request_name: str, tls: TlsMode) -> None:
    assert ask_type(encrypted(tls), *REQUESTS[request_name]) == TABLE[request_name][2]


# EXPORT_NAME and ABORT


@pytest.mark.parametrize(
    ("tls", "name", "is_closed"),
    [
        (TlsMode.OFF, b"disk", False),
        (TlsMode.OFF, b"secret", False),
        (TlsMode.SELECTIVE, b"disk", False),
        (TlsMode.SELECTIVE, b"secret", True),
        (TlsMode.SELECTIVE, b"nothing", True),
        (TlsMode.REQUIRED, b"disk", True),
        (TlsMode.REQUIRED, b"secret", True),
    ],
)
def test_export_name_before_tls_closes_where_tls_is_needed(tls: TlsMode, name: bytes, is_closed: bool) -> None:
    """CVE-2019-14850: nothing of an export is touched before TLS."""
    handshake = begun(tls)
    assert closes(handshake, option_bytes(EXPORT_NAME, name)) is is_closed
    assert (handshake.session is None) is is_closed


@WITH_TLS
@pytest.mark.parametrize("name", [b"disk", b"secret"])
def test_export_name_after_tls_is_served(tls: TlsMode, name: bytes) -> None:
    handshake = encrypted(tls)
    assert not closes(handshake, option_bytes(EXPORT_NAME, name))
    assert handshake.state is State.DONE


@pytest.mark.parametrize("client_flags", [0, 2])
def test_export_name_without_fixed_newstyle_closes_where_tls_is_required(client_flags: int) -> None:
    assert closes(begun(TlsMode.REQUIRED, client_flags=client_flags), option_bytes(EXPORT_NAME, b"disk"))


@ALL_MODES
def test_abort_before_tls_is_acknowledged_in_every_mode(tls: TlsMode) -> None:
    handshake = begun(tls)
    assert ask_type(handshake, ABORT) == ACK
    assert handshake.state is State.CLOSED


# LIST


@pytest.mark.parametrize(
    ("handshake", "names"),
    [
        (begun(TlsMode.OFF), ["disk", "plain", "secret"]),
        (begun(TlsMode.SELECTIVE), ["disk", "plain"]),
        (encrypted(TlsMode.SELECTIVE), ["disk", "plain", "secret"]),
        (encrypted(TlsMode.REQUIRED), ["disk", "plain", "secret"]),
    ],
    ids=["off", "selective", "selective-after", "required-after"],
)
def test_list_hides_tls_only_exports_until_tls(handshake: Handshake, names: list[str]) -> None:
    entries = [reply.data for reply in ask(handshake, LIST)[:-1]]
    assert [entry[4 : 4 + entry[3]].decode() for entry in entries] == names


@pytest.mark.parametrize("option", [INFO, GO, LIST_META_CONTEXT])
def test_tls_only_and_unknown_exports_look_the_same_before_tls(option: int) -> None:
    texts = []
    for name in ("secret", "absent"):
        data = meta_data(name, []) if option == LIST_META_CONTEXT else info_data(name)
        (reply,) = ask(begun(TlsMode.SELECTIVE), option, data)
        texts.append((reply.type, reply.text.replace(name, "NAME")))
    assert texts[0] == texts[1]


def test_contexts_of_a_tls_only_export_are_not_told_before_tls() -> None:
    handshake = begun(TlsMode.SELECTIVE)
    ask(handshake, STRUCTURED_REPLY)
    for option in (LIST_META_CONTEXT, SET_META_CONTEXT):
        assert [reply.is_error for reply in ask(handshake, option, meta_data("secret", [ALLOCATION]))] == [True]


# STARTTLS


def test_starttls_without_tls_is_refused_by_policy_and_haggling_goes_on() -> None:
    handshake = begun(TlsMode.OFF)
    assert ask_type(handshake, STARTTLS) == Rep.ERR_POLICY
    assert handshake.state is State.OPTIONS
    assert is_in_step(handshake)


@WITH_TLS
def test_starttls_is_acknowledged_and_waits_for_the_owner(tls: TlsMode) -> None:
    handshake = begun(tls)
    answer = handshake.receive(bytes.fromhex("49484156454f5054 00000005 00000000"))
    assert answer == bytes.fromhex("0003e889045565a9 00000005 00000001 00000000")
    assert handshake.state is State.TLS
    assert handshake.receive(b"") == b""
    handshake.tls_started()
    assert is_in_step(handshake)


@WITH_TLS
@pytest.mark.parametrize("length", [1, 16, 64 * KIB, 64 * KIB + 1])
def test_starttls_with_data_is_refused_and_tls_does_not_start(tls: TlsMode, length: int) -> None:
    handshake = begun(tls)
    assert ask_type(handshake, STARTTLS, bytes(length)) in (Rep.ERR_INVALID, Rep.ERR_TOO_BIG)
    assert handshake.state is State.OPTIONS
    assert ask_type(handshake, STARTTLS) == ACK


@WITH_TLS
def test_starttls_a_second_time_is_invalid(tls: TlsMode) -> None:
    handshake = encrypted(tls)
    assert ask_type(handshake, STARTTLS) == Rep.ERR_INVALID
    assert handshake.state is State.OPTIONS
    assert is_in_step(handshake)


@WITH_TLS
@pytest.mark.parametrize("behind", [b"I", option_bytes(LIST), option_bytes(STARTTLS), b"\x16\x03\x01"])
def test_plaintext_in_the_same_bytes_as_starttls_closes(tls: TlsMode, behind: bytes) -> None:
    """CVE-2021-3716 class: bytes injected before TLS must not be taken for bytes inside it."""
    assert closes(begun(tls), option_bytes(STARTTLS) + behind)


@WITH_TLS
def test_plaintext_between_starttls_and_tls_closes(tls: TlsMode) -> None:
    handshake = begun(tls)
    ask(handshake, STARTTLS)
    assert closes(handshake, b"I")


@pytest.mark.parametrize(
    "before",
    [
        [(STRUCTURED_REPLY, b"")],
        [(EXTENDED_HEADERS, b"")],
        [(STRUCTURED_REPLY, b""), (SET_META_CONTEXT, meta_data("disk", [ALLOCATION]))],
        [(EXTENDED_HEADERS, b""), (SET_META_CONTEXT, meta_data("disk", [ALLOCATION])), (INFO, info_data("disk", [3]))],
    ],
    ids=["structured", "extended", "structured-contexts", "extended-contexts"],
)
def test_tls_started_forgets_all_that_was_negotiated(before: list[tuple[int, bytes]]) -> None:
    """CVE-2021-3716."""
    handshake = begun(TlsMode.SELECTIVE)
    for option, data in before:
        assert ask_type(handshake, option, data) == ACK
    ask(handshake, STARTTLS)
    handshake.tls_started()
    assert ask_type(handshake, SET_META_CONTEXT, meta_data("disk", [ALLOCATION])) == Rep.ERR_INVALID
    ask(handshake, GO, info_data("disk", []))
    session = handshake.session
    assert session is not None
    assert not session.is_structured
    assert not session.is_extended
    assert not session.obeys_block_size
    assert session.contexts == {}
    assert not session.flags & 0x1080


def test_tls_started_allows_negotiating_everything_again() -> None:
    handshake = begun(TlsMode.SELECTIVE)
    for _ in range(2):
        assert ask_type(handshake, STRUCTURED_REPLY) == ACK
        assert ask_type(handshake, EXTENDED_HEADERS) == ACK
        if handshake.state is State.OPTIONS and ask_type(handshake, STARTTLS) == ACK:
            handshake.tls_started()
    ask(handshake, GO, info_data("secret"))
    assert handshake.session is not None
    assert handshake.session.is_extended


def test_tls_started_does_not_refill_the_limits() -> None:
    handshake = begun(TlsMode.REQUIRED, options_max=4)
    ask(handshake, LIST)
    ask(handshake, STARTTLS)
    handshake.tls_started()
    ask(handshake, LIST)
    ask(handshake, LIST)
    assert closes(handshake, option_bytes(LIST))


@ALL_MODES
def test_pipelined_requests_of_every_kind_stay_in_step(tls: TlsMode) -> None:
    requests = [request for name, request in REQUESTS.items() if name not in ("go-secret",)]
    handshake = begun(tls)
    replies = parsed(handshake.receive(b"".join(option_bytes(*request) for request in requests)))
    assert [reply.option for reply in replies if reply.is_final] == [option for option, _ in requests]
    asks_for_tls = {reply.type == TLS_REQD for reply in replies if reply.is_final}
    assert asks_for_tls == {TlsMode.OFF: {False}, TlsMode.SELECTIVE: {False, True}, TlsMode.REQUIRED: {True}}[tls]
