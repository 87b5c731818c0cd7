"""Handshake: INFO and GO.

    u32 length of the name, name, u16 count of information requests, count times u16

Spec: proto.md "NBD_OPT_INFO", "NBD_OPT_GO", "NBD_REP_INFO".
"""

from __future__ import annotations

import struct

import pytest

from nbdimg.wire.handshake import ExportInfo, Handshake, State
from tests.support.rawprotocol import Rep, info_data, meta_data, option_bytes, parse_infos
from tests.wire.haggling import DISK, PLAIN, WRITABLE, Exports, ask, ask_type, begun, is_in_step

INFO, GO = 6, 7
BOTH = pytest.mark.parametrize("option", [INFO, GO], ids=["info", "go"])

VALID = b"\0\0\0\4disk\0\2\0\3\0\1"
"""The export `disk`, asked for NBD_INFO_BLOCK_SIZE and NBD_INFO_NAME."""


def is_unharmed(handshake: Handshake) -> bool:
    """Whether haggling goes on after a refusal, and ends well."""
    if handshake.session is not None or not is_in_step(handshake):
        return False
    return ask_type(handshake, GO, VALID) == Rep.ACK and handshake.state is State.DONE


def test_go_answers_with_the_bytes_of_the_specification() -> None:
    handshake = begun()
    answer = handshake.receive(bytes.fromhex("49484156454f5054 00000007 0000000e") + VALID)
    assert answer == bytes.fromhex(
        "0003e889045565a9 00000007 00000003 0000000c 0000 1122334455667700 0d6d"  # NBD_INFO_EXPORT
        "0003e889045565a9 00000007 00000003 00000006 0001 6469736b"  # NBD_INFO_NAME, disk
        "0003e889045565a9 00000007 00000003 0000000e 0003 00000200 00001000 04000000"  # NBD_INFO_BLOCK_SIZE
        "0003e889045565a9 00000007 00000001 00000000"
    )
    assert handshake.state is State.DONE


@BOTH
@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ([], {0}),
        ([0], {0}),
        ([1], {0, 1}),
        ([2], {0, 2}),
        ([3], {0, 3}),
        ([3, 2, 1, 0], {0, 1, 2, 3}),
        ([4], {0}),
        ([0xFFFF, 3, 0x8000], {0, 3}),
    ],
)
def test_info_types_asked_for_are_told_and_unknown_ones_ignored(option: int, asked: list[int], told: set[int]) -> None:
    infos = parse_infos(ask(begun(), option, info_data("disk", asked)))
    assert set(infos.infos) == told
    assert len(infos.infos) == len(told)
    assert (infos.size, infos.flags) == (DISK.size, WRITABLE)
    assert infos.name == ("disk" if 1 in told else None)
    assert infos.description == ("a disk" if 2 in told else None)
    assert infos.block_size == ((512, 4096, 64 << 20) if 3 in told else None)


@BOTH
@pytest.mark.parametrize("asked", [[0, 0], [1, 1, 1], [3, 3], [2, 1, 2, 1], [3] * 30_000])
def test_info_types_asked_for_twice_are_told_once(option: int, asked: list[int]) -> None:
    infos = parse_infos(ask(begun(), option, info_data("disk", asked)))
    assert sorted(infos.infos) == sorted({0, *asked})


def test_info_description_of_an_export_without_one_is_not_told() -> None:
    assert parse_infos(ask(begun(), INFO, info_data("plain", [2]))).infos == [0]


def test_info_name_for_an_alias_is_the_canonical_name() -> None:
    assert parse_infos(ask(begun(), INFO, info_data("main", [1]))).name == "disk"


@pytest.mark.parametrize("asked", [[], [0, 1, 2, 3], [3], [7, 7, 1]])
@pytest.mark.parametrize("before", [[], [8], [11], [8, 11]], ids=str)
@pytest.mark.parametrize("has_contexts", [False, True])
def test_go_right_after_info_tells_the_same(asked: list[int], before: list[int], has_contexts: bool) -> None:
    handshake = begun()
    for option in before:
        ask(handshake, option)
    if has_contexts:
        ask(handshake, 10, meta_data("disk", ["base:allocation"]))
    told = [(reply.type, reply.data) for reply in ask(handshake, INFO, info_data("disk", asked))]
    assert [(reply.type, reply.data) for reply in ask(handshake, GO, info_data("disk", asked))] == told


def test_info_does_not_end_the_handshake() -> None:
    handshake = begun()
    for name in ("disk", "plain", "disk"):
        assert ask_type(handshake, INFO, info_data(name)) == Rep.ACK
    assert is_unharmed(handshake)


def test_go_session_names_the_export_and_what_was_negotiated() -> None:
    handshake = begun()
    ask(handshake, 8)
    ask(handshake, 10, meta_data("disk", ["base:allocation"]))
    ask(handshake, GO, info_data("main", [3]))
    session = handshake.session
    assert session is not None
    assert session.export is DISK
    assert session.is_structured
    assert not session.is_extended
    assert session.obeys_block_size
    assert list(session.contexts.values()) == ["base:allocation"]


@pytest.mark.parametrize(("asked", "obeys"), [([], False), ([0, 1, 2, 4], False), ([3], True), ([0, 3, 3], True)])
def test_go_client_obeys_block_sizes_only_if_it_asked_for_them(asked: list[int], obeys: bool) -> None:
    handshake = begun()
    ask(handshake, INFO, info_data("disk", [3]))
    ask(handshake, GO, info_data("disk", asked))
    assert handshake.session is not None
    assert handshake.session.obeys_block_size is obeys


# Transmission flags


@BOTH
@pytest.mark.parametrize(
    ("before", "contexts_of", "added"),
    [
        ([], None, 0),
        ([8], None, 0x0080),
        ([11], None, 0x0080),
        ([8], "disk", 0x0080),
        ([11], "disk", 0x1080),
        ([11], "plain", 0x0080),
        ([8, 11], "disk", 0x1080),
    ],
)
def test_flags_that_depend_on_negotiation_are_added(
    option: int, before: list[int], contexts_of: str | None, added: int
) -> None:
    """SEND_DF with chunks, BLOCK_STATUS_PAYLOAD with extended headers and contexts of this export."""
    handshake = begun()
    for each in before:
        ask(handshake, each)
    if contexts_of:
        ask(handshake, 10, meta_data(contexts_of, ["base:allocation"]))
    assert parse_infos(ask(handshake, option, info_data("disk"))).flags == WRITABLE | added


# Refusals


@BOTH
def test_info_data_cut_at_every_byte_is_invalid_and_stays_in_step(option: int) -> None:
    """CVE-2022-26495 and CVE-2022-26496: a name length that the data does not hold."""
    for cut in range(len(VALID)):
        handshake = begun()
        assert ask_type(handshake, option, VALID[:cut]) == Rep.ERR_INVALID, cut
        assert is_unharmed(handshake)


@BOTH
@pytest.mark.parametrize("extra", [1, 2, 3, 16, 1000])
def test_info_data_with_bytes_behind_is_invalid(option: int, extra: int) -> None:
    handshake = begun()
    assert ask_type(handshake, option, VALID + bytes(extra)) == Rep.ERR_INVALID
    assert is_unharmed(handshake)


@BOTH
@pytest.mark.parametrize("name_length", [3, 5, 9, 10, 11, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFA, 0xFFFFFFFF])
def test_info_name_length_that_does_not_fit_is_invalid(option: int, name_length: int) -> None:
    """CVE-2022-26495: lengths whose sum with the other fields wraps at 2^32."""
    handshake = begun()
    assert ask_type(handshake, option, info_data("disk", [3, 1], name_length=name_length)) == Rep.ERR_INVALID
    assert is_unharmed(handshake)


@BOTH
@pytest.mark.parametrize("count", [0, 1, 3, 0x7FFF, 0xFFFF])
def test_info_request_count_that_does_not_fit_is_invalid(option: int, count: int) -> None:
    handshake = begun()
    assert ask_type(handshake, option, info_data("disk", [3, 1], info_count=count)) == Rep.ERR_INVALID
    assert is_unharmed(handshake)


@BOTH
@pytest.mark.parametrize(
    "name",
    [b"disk\0", b"\0disk", b"di\0sk", b"\xff", b"disk\xc3", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"],
    ids=["nul-end", "nul-start", "nul-inside", "ff", "cut", "overlong", "surrogate", "beyond-unicode"],
)
def test_info_name_with_nul_or_bad_utf8_is_invalid(option: int, name: bytes) -> None:
    handshake = begun()
    assert ask_type(handshake, option, info_data(name)) == Rep.ERR_INVALID
    assert is_unharmed(handshake)


@BOTH
@pytest.mark.parametrize(("length", "reply"), [(4096, Rep.ERR_UNKNOWN), (4097, Rep.ERR_TOO_BIG)])
def test_info_name_at_the_longest_string_is_looked_up_and_beyond_too_big(option: int, length: int, reply: int) -> None:
    """CVE-2020-10761: a name of legal length must not overflow the error that quotes it."""
    handshake = begun()
    answer = ask(handshake, option, info_data("é" * (length // 2) + "x" * (length % 2)))
    assert [each.type for each in answer] == [reply]
    assert len(answer[0].data) <= 4096
    assert is_unharmed(handshake)


def test_info_name_of_4096_bytes_is_served() -> None:
    name = "n" * 4096
    exports = Exports([ExportInfo(name=name, size=512, flags=PLAIN.flags)])
    assert parse_infos(ask(begun(exports=exports), GO, info_data(name, [1]))).name == name


@BOTH
@pytest.mark.parametrize("name", ["", "nothing", "Disk", "disk ", "../disk", "disk\n\x1b[2J"])
def test_info_of_an_unknown_export_is_refused_and_haggling_goes_on(option: int, name: str) -> None:
    handshake = begun()
    (reply,) = ask(handshake, option, info_data(name, [0, 1, 2, 3]))
    assert reply.type == Rep.ERR_UNKNOWN
    assert reply.text.isprintable()
    assert is_unharmed(handshake)


@BOTH
def test_info_while_shutting_down_is_refused_with_shutdown(option: int) -> None:
    exports = Exports()
    handshake = begun(exports=exports)
    ask(handshake, INFO, VALID)
    exports.is_shutting_down = True
    for name in ("disk", "nothing"):
        assert ask_type(handshake, option, info_data(name)) == Rep.ERR_SHUTDOWN
    assert handshake.state is State.OPTIONS
    assert handshake.session is None
    exports.is_shutting_down = False
    assert is_unharmed(handshake)


def test_go_becoming_valid_after_many_refusals_succeeds() -> None:
    handshake = begun()
    for name in (b"nothing", b"\xff", b"\0", b"x" * 5000):
        assert ask_type(handshake, GO, info_data(name)) >= 0x80000000
    assert is_unharmed(handshake)


def test_go_and_then_anything_is_left_for_the_transmission_phase() -> None:
    handshake = begun()
    handshake.receive(option_bytes(GO, VALID) + option_bytes(GO, VALID))
    assert handshake.state is State.DONE
    assert handshake.leftover == option_bytes(GO, VALID)


def test_info_export_tells_the_size_of_now() -> None:
    """A size that changed between INFO and GO is told by GO (growing an export)."""

    class Growing(Exports):
        size = 512

        def find(self, name: str) -> ExportInfo | None:
            self.size += 512
            return ExportInfo(name=name, size=self.size, flags=PLAIN.flags)

    handshake = begun(exports=Growing())
    sizes = [parse_infos(ask(handshake, option, info_data("x"))).size for option in (INFO, GO)]
    assert sizes == [1024, 1536]
    assert handshake.session is not None
    assert handshake.session.export.size == 1536


def test_info_request_list_as_long_as_the_option_allows_is_answered() -> None:
    count = (64 * 1024 - len(b"\0\0\0\4disk\0\0")) // 2
    data = b"\0\0\0\4disk" + struct.pack(f">H{count}H", count, *range(count))
    assert parse_infos(ask(begun(), INFO, data)).infos == [0, 1, 2, 3]
