"""Any bytes: nothing but `NbdimgError` leaves the protocol core, and how bytes are cut does not matter (R4).

Inputs are arbitrary bytes, sequences of half-sensible messages, and valid sessions that were damaged. Every run uses
the same examples (`derandomize`). The controls at the end break the core on purpose: the same harness must notice.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nbdimg.errors import NbdimgError, ProtocolError
from nbdimg.wire.handshake import Handshake, Session, State, TlsMode
from tests.support.rawprotocol import EXTENDED_REQUEST, REQUEST, info_data, meta_data, option_bytes
from tests.wire.haggling import ALLOCATION, CLIENT_FLAGS, DEPTH, Exports, parsed
from tests.wire.receiving import Owner, Seen

EXAMPLES = settings(
    max_examples=250,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
"""Of one test."""


# Handshake: the harness


@dataclass(frozen=True, slots=True)
class Haggled:
    """How a handshake ended. After an error only the error counts: what would have been returned is not sent."""

    error: str | None
    state: State | None = None
    session: Session | None = None
    replies: bytes = b""
    leftover: bytes = b""


def haggle(handshake: Handshake, pieces: list[bytes]) -> Haggled:
    """Any exception but a `ProtocolError` leaves this function."""
    replies = []
    rest = b""
    try:
        for index, piece in enumerate(pieces):
            replies.append(handshake.receive(piece))
            if handshake.state in (State.DONE, State.CLOSED):
                rest = b"".join(pieces[index + 1 :])
                break
    except ProtocolError as error:
        return Haggled(str(error))
    is_done = handshake.state is State.DONE
    return Haggled(
        None, handshake.state, handshake.session, b"".join(replies), handshake.leftover + rest if is_done else b""
    )


def cut_at(stream: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted({cut % (len(stream) + 1) for cut in cuts}), len(stream)]
    return [stream[start:stop] for start, stop in pairwise(edges)]


def check_handshake(make: Callable[[], Handshake], stream: bytes, cuts: list[int]) -> Haggled:
    whole = haggle(make(), [stream])
    assert haggle(make(), [bytes([byte]) for byte in stream]) == whole
    assert haggle(make(), cut_at(stream, cuts)) == whole
    assert (whole.session is not None) == (whole.state is State.DONE)
    if whole.state is not State.DONE or whole.replies[:4] == b"\x00\x03\xe8\x89":
        parsed(whole.replies)
    return whole


# Handshake: the inputs

u16 = st.integers(0, 0xFFFF)
u32 = st.one_of(st.integers(0, 20), st.sampled_from([0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]), st.integers(0, 0xFFFFFFFF))
cut_lists = st.lists(st.integers(0, 2000), max_size=6)
tls_modes = st.sampled_from(TlsMode)
raw_names = st.one_of(st.sampled_from([b"disk", b"plain", b"secret", b"main", b""]), st.binary(max_size=12))
queries = st.one_of(st.sampled_from([ALLOCATION, DEPTH, "qemu:", "base:", "x"]), st.binary(max_size=12))

infos = st.one_of(
    st.builds(info_data, st.sampled_from(["disk", "plain", "nothing"]), st.just([0, 3])),
    st.builds(
        info_data, raw_names, st.lists(st.one_of(st.integers(0, 4), u16), max_size=5), st.none() | u32, st.none() | u16
    ),
)
metas = st.one_of(
    st.builds(meta_data, st.just("disk"), st.lists(st.sampled_from([ALLOCATION, DEPTH, "qemu:", "base:"]), max_size=3)),
    st.builds(
        meta_data, st.sampled_from(["disk", "plain", "secret", "no"]), st.lists(queries, max_size=4), st.none() | u32
    ),
)
numbers = st.one_of(st.integers(1, 12), st.sampled_from([3, 5, 6, 8, 9, 10, 11]), u32)
options = st.one_of(
    st.builds(option_bytes, numbers, st.one_of(st.just(b""), st.binary(max_size=40), infos, metas)),
    st.builds(option_bytes, st.sampled_from([6, 7]), infos),
    st.builds(option_bytes, st.sampled_from([9, 10]), metas),
    st.builds(option_bytes, numbers, st.binary(max_size=20), st.one_of(st.integers(0, 40), u32)),
    st.builds(option_bytes, st.sampled_from([4, 8, 10, 99]), st.just(bytes(300)), st.integers(65530, 65540)),
    st.sampled_from([option_bytes(2), option_bytes(2, b"enough"), option_bytes(5), option_bytes(8), option_bytes(11)]),
)
client_flags = st.one_of(st.just(CLIENT_FLAGS), st.sampled_from([bytes([0, 0, 0, flags]) for flags in range(4)]))
haggles = st.builds(
    lambda flags, messages, tail: flags + b"".join(messages) + tail,
    client_flags,
    st.lists(options, max_size=8),
    st.binary(max_size=20),
)

VALID_HANDSHAKES = (
    CLIENT_FLAGS + option_bytes(8) + option_bytes(10, meta_data("disk", [DEPTH])) + option_bytes(7, info_data("disk")),
    CLIENT_FLAGS + option_bytes(11) + option_bytes(3) + option_bytes(6, info_data("disk", [1, 2, 3])) + option_bytes(2),
    CLIENT_FLAGS + option_bytes(9, meta_data("disk", ["qemu:", "base:"])) + option_bytes(7, info_data("plain", [])),
    bytes(4) + option_bytes(1, b"disk") + b"behind",
    CLIENT_FLAGS + option_bytes(3) + option_bytes(5),
)


@st.composite
def damaged(draw: st.DrawFn, originals: tuple[bytes, ...]) -> bytes:
    """A valid stream with one to four faults: a byte changed, a run cut out, repeated or put in, a field set."""
    stream = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(stream) - 1, 0)))
        size = draw(st.integers(1, 24))
        kind = draw(st.sampled_from(["flip", "cut", "repeat", "insert", "field", "truncate"]))
        if kind == "flip" and stream:
            stream[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del stream[at : at + size]
        elif kind == "repeat":
            stream[at:at] = stream[at : at + size]
        elif kind == "insert":
            stream[at:at] = draw(st.binary(max_size=size))
        elif kind == "field":
            stream[at : at + 4] = struct.pack(">I", draw(u32))
        elif kind == "truncate":
            del stream[at:]
    return bytes(stream)


def limited(tls: TlsMode) -> Callable[[], Handshake]:
    return lambda: Handshake(Exports(), tls, options_max=6, option_bytes_max=70_000)


def test_handshake_of_arbitrary_bytes_gives_replies_or_a_protocol_error() -> None:
    ends: Counter[object] = Counter()

    @EXAMPLES
    @given(st.one_of(st.just(b""), client_flags), st.binary(max_size=200), cut_lists, tls_modes)
    def fuzz(head: bytes, tail: bytes, cuts: list[int], tls: TlsMode) -> None:
        whole = check_handshake(limited(tls), head + tail, cuts)
        ends[whole.error is not None] += 1

    fuzz()
    assert set(ends) == {True, False}


def test_handshake_of_half_sensible_options_gives_replies_or_a_protocol_error() -> None:
    ends: Counter[object] = Counter()
    reply_types: Counter[int] = Counter()

    @EXAMPLES
    @given(haggles, cut_lists, tls_modes)
    def fuzz(stream: bytes, cuts: list[int], tls: TlsMode) -> None:
        whole = check_handshake(limited(tls), stream, cuts)
        ends[whole.state] += 1
        if whole.state is State.OPTIONS:
            reply_types.update(reply.type for reply in parsed(whole.replies))

    fuzz()
    assert {None, State.OPTIONS, State.DONE, State.CLOSED} <= set(ends)
    assert len(reply_types) >= 7


def test_handshake_of_damaged_sessions_gives_replies_or_a_protocol_error() -> None:
    ends: Counter[object] = Counter()

    @EXAMPLES
    @given(damaged(VALID_HANDSHAKES), cut_lists, tls_modes)
    def fuzz(stream: bytes, cuts: list[int], tls: TlsMode) -> None:
        ends[check_handshake(limited(tls), stream, cuts).state] += 1

    fuzz()
    assert {None, State.OPTIONS, State.DONE} <= set(ends)


# Receiver: the harness


@dataclass(frozen=True, slots=True)
class Received:
    error: str | None
    seen: tuple[Seen, ...]
    owes: bool


def receive(owner: Owner, pieces: list[bytes]) -> Received:
    """Any exception but a `ProtocolError` leaves this function."""
    try:
        owner.deliver_in(pieces)
    except ProtocolError as error:
        return Received(str(error), tuple(owner.seen), False)
    return Received(None, tuple(owner.seen), owner.receiver.is_mid_request())


def check_receiver(make: Callable[..., Owner], stream: bytes, cuts: list[int], grants: list[bool]) -> Received:
    whole = receive(make(), [stream])
    assert receive(make(), [bytes([byte]) for byte in stream]) == whole
    assert receive(make(), cut_at(stream, cuts)) == whole
    assert receive(make(turn_requests=1), cut_at(stream, cuts)) == whole
    assert receive(make(grants=grants), cut_at(stream, cuts)) == whole
    return whole


# Receiver: the inputs

u64 = st.one_of(st.integers(0, 600), st.sampled_from([1024, 1025, 1 << 32, (1 << 64) - 1]))
commands = st.one_of(st.sampled_from([*range(10), *[1] * 8, *[7] * 4]), u16)
command_flags = st.one_of(st.sampled_from([0, 1, 0x20, 0x21]), u16)


@st.composite
def requests(draw: st.DrawFn, is_extended: bool) -> bytes:
    command, flags, length = draw(commands), draw(command_flags), draw(u64)
    payload = draw(st.binary(max_size=40)) * draw(st.integers(0, 30))
    if draw(st.booleans()):
        length = len(payload)
    if is_extended:
        return EXTENDED_REQUEST.pack(0x21E41C71, flags, command, draw(u64), draw(u64), length) + payload
    return REQUEST.pack(0x25609513, flags, command, draw(u64), draw(u64), length & 0xFFFFFFFF) + payload


def valid_sessions(is_extended: bool) -> tuple[bytes, ...]:
    """Reads, writes of several sizes, and with extended headers a payload of ids."""
    stream = b""
    for cookie, size in enumerate([0, 5, 300, 1024]):
        if is_extended:
            stream += EXTENDED_REQUEST.pack(0x21E41C71, 0x20, 1, cookie, 0, size) + bytes(size)
            stream += EXTENDED_REQUEST.pack(0x21E41C71, 0x20, 7, cookie, 0, 16) + struct.pack(">QII", 4096, 1, 2)
            stream += EXTENDED_REQUEST.pack(0x21E41C71, 0, 0, cookie, 0, 1 << 40)
        else:
            stream += REQUEST.pack(0x25609513, 0, 1, cookie, 0, size) + bytes(size)
            stream += REQUEST.pack(0x25609513, 1, 6, cookie, 0, 1 << 31)
    return (stream, stream[: len(stream) // 4])


def maker(is_extended: bool) -> Callable[..., Owner]:
    def make(turn_requests: int = 1_000_000, grants: list[bool] | None = None) -> Owner:
        return Owner(is_extended=is_extended, turn_requests=turn_requests, grants=grants or ())

    return make


grant_lists = st.lists(st.booleans(), max_size=8)
DIALECTS = pytest.mark.parametrize("is_extended", [False, True], ids=["compact", "extended"])


@DIALECTS
def test_receiver_of_arbitrary_bytes_gives_requests_or_a_protocol_error(is_extended: bool) -> None:
    magic = struct.pack(">I", 0x21E41C71 if is_extended else 0x25609513)

    @EXAMPLES
    @given(st.booleans(), st.binary(max_size=300), cut_lists, grant_lists)
    def fuzz(has_magic: bool, tail: bytes, cuts: list[int], grants: list[bool]) -> None:
        check_receiver(maker(is_extended), (magic if has_magic else b"") + tail, cuts, grants)

    fuzz()


@DIALECTS
def test_receiver_of_half_sensible_requests_gives_requests_or_a_protocol_error(is_extended: bool) -> None:
    ends: Counter[object] = Counter()

    @EXAMPLES
    @given(st.lists(requests(is_extended), max_size=5), st.binary(max_size=30), cut_lists, grant_lists)
    def fuzz(messages: list[bytes], tail: bytes, cuts: list[int], grants: list[bool]) -> None:
        whole = check_receiver(maker(is_extended), b"".join(messages) + tail, cuts, grants)
        ends[whole.error is None] += 1
        ends.update("payload" for seen in whole.seen if seen.payload)
        ends.update("refused" for seen in whole.seen if seen.is_refused)
        ends.update("ids" for seen in whole.seen if seen.contexts)

    fuzz()
    assert set(ends) >= ({True, False, "payload"} | ({"refused"} if is_extended else set()))


@DIALECTS
def test_receiver_of_damaged_sessions_gives_requests_or_a_protocol_error(is_extended: bool) -> None:
    ends: Counter[object] = Counter()

    @EXAMPLES
    @given(damaged(valid_sessions(is_extended)), cut_lists, grant_lists)
    def fuzz(stream: bytes, cuts: list[int], grants: list[bool]) -> None:
        whole = check_receiver(maker(is_extended), stream, cuts, grants)
        ends[whole.error is None] += 1

    fuzz()
    assert set(ends) == {True, False}


# Controls: the same harness and inputs over a core that is broken


class Untranslating(Handshake):
    """Raises what is not a `NbdimgError` where an option is malformed."""

    def receive(self, data: bytes) -> bytes:
        replies = super().receive(data)
        if any(reply.type == 0x80000003 for reply in parsed(replies) if self.state is State.OPTIONS):
            struct.unpack(">I", b"")
        return replies


class Forgetful(Handshake):
    """Loses one byte in 256 when it comes alone."""

    def receive(self, data: bytes) -> bytes:
        return b"" if data == b"V" else super().receive(data)


class ForgetfulOwner(Owner):
    """Lets another connection overwrite the shared buffer before it parks."""

    def park(self) -> None:
        self.scratch[:] = bytes(len(self.scratch))
        self.receiver.park()


class UntranslatingOwner(Owner):
    """Raises what is not a `NbdimgError` for a command that it does not know."""

    def deliver(self, data: bytes) -> None:
        super().deliver(data)
        if any(seen.command > 9 for seen in self.seen):
            struct.unpack(">I", b"")


CONTROL = settings(EXAMPLES, phases=[Phase.generate])


def test_control_struct_error_from_the_handshake_is_noticed() -> None:
    @CONTROL
    @given(haggles, cut_lists)
    def fuzz(stream: bytes, cuts: list[int]) -> None:
        check_handshake(lambda: Untranslating(Exports()), stream, cuts)

    assert not issubclass(struct.error, NbdimgError)
    with pytest.raises(struct.error):
        fuzz()


def test_control_handshake_that_depends_on_how_bytes_are_cut_is_noticed() -> None:
    @CONTROL
    @given(haggles, cut_lists)
    def fuzz(stream: bytes, cuts: list[int]) -> None:
        check_handshake(lambda: Forgetful(Exports()), stream, cuts)

    with pytest.raises(AssertionError):
        fuzz()


def test_control_struct_error_from_the_receiver_is_noticed() -> None:
    @CONTROL
    @given(st.lists(requests(False), max_size=5), cut_lists)
    def fuzz(messages: list[bytes], cuts: list[int]) -> None:
        check_receiver(lambda **arguments: UntranslatingOwner(**arguments), b"".join(messages), cuts, [])

    with pytest.raises(struct.error):
        fuzz()


def test_control_receiver_whose_buffer_is_overwritten_is_noticed() -> None:
    @CONTROL
    @given(st.lists(requests(False), max_size=5), cut_lists)
    def fuzz(messages: list[bytes], cuts: list[int]) -> None:
        check_receiver(lambda **arguments: ForgetfulOwner(**arguments), b"".join(messages), cuts, [])

    with pytest.raises(AssertionError):
        fuzz()
