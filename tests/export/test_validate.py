"""Every request a session can be asked, against a table written from the specification.

The table below says, in the protocol's own numbers, what is expected; nothing of `nbdimg.export.validate` is used in
it. Spec: proto.md "Transmission flags", "Command flags", "Request types", "Error values", "Block size constraints".
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator

import pytest

from nbdimg.export.validate import Rules
from nbdimg.wire.constants import TransmissionFlag
from nbdimg.wire.handshake import ExportInfo, Session
from nbdimg.wire.messages import PayloadRequest, Request

OK = 0
SIZE = 1 << 20
PAYLOAD_MAX = 64 << 10

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, RESIZE, UNKNOWN = range(10)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
UNKNOWN_FLAG = 1 << 9
FLAG_BITS = (FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN, UNKNOWN_FLAG)

ADVERTISED_READ_ONLY = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 8 | 1 << 10
"""HAS_FLAGS READ_ONLY SEND_FLUSH SEND_FUA CAN_MULTI_CONN SEND_CACHE."""
ADVERTISED_WRITABLE = ADVERTISED_READ_ONLY & ~(1 << 1) | 1 << 5 | 1 << 6 | 1 << 11
"""The same without READ_ONLY, with SEND_TRIM SEND_WRITE_ZEROES SEND_FAST_ZERO."""
SEND_DF = 1 << 7
STATUS_PAYLOAD = 1 << 12

DIALECTS = ("simple", "structured", "extended")


def session(
    *,
    read_only: bool = False,
    dialect: str = "structured",
    contexts: bool = True,
    without: int = 0,
    block_size: int = 1,
    obeys: bool = True,
    size: int = SIZE,
) -> Session:
    """What a handshake results in; `without` takes transmission flags away."""
    flags = ADVERTISED_READ_ONLY if read_only else ADVERTISED_WRITABLE
    is_structured = dialect != "simple"
    selected = {0: "base:allocation", 1: "qemu:allocation-depth"} if contexts and is_structured else {}
    if is_structured:
        flags |= SEND_DF
    if dialect == "extended" and selected:
        flags |= STATUS_PAYLOAD
    flags &= ~without
    info = ExportInfo("disk", size, TransmissionFlag(flags), block_size_min=block_size, payload_max=PAYLOAD_MAX)
    return Session(
        export=info,
        flags=TransmissionFlag(flags),
        is_structured=is_structured,
        is_extended=dialect == "extended",
        obeys_block_size=obeys,
        contexts=selected,
    )


def answer(session_: Session, command: int, flags: int = 0, offset: int = 0, length: int = 512) -> int:
    """The errno of the refusal, OK for none."""
    refusal = Rules(session_).check(Request(command, flags, 1, offset, length), session_.export.size)
    if refusal is None:
        return OK
    assert str(refusal).isprintable()
    assert 0 < len(str(refusal)) < 200
    return refusal.errno


def expected(command: int, flags: int, *, read_only: bool, dialect: str, contexts: bool) -> int:
    """What the specification wants of a request with a valid range on an export with all that it may advertise."""
    if read_only and command in (WRITE, TRIM, WRITE_ZEROES):
        return errno.EPERM
    has_contexts = contexts and dialect != "simple"
    legal = {
        READ: FUA | (DF if dialect != "simple" else 0),
        WRITE: FUA,
        FLUSH: FUA,
        TRIM: FUA,
        CACHE: FUA,
        WRITE_ZEROES: FUA | NO_HOLE | FAST_ZERO,
    }
    if has_contexts:
        legal[BLOCK_STATUS] = FUA | REQ_ONE
    if command not in legal or flags & ~legal[command]:
        return errno.EINVAL
    return OK


def all_flags() -> Iterator[int]:
    for chosen in itertools.product((False, True), repeat=len(FLAG_BITS)):
        yield sum(bit for bit, is_set in zip(FLAG_BITS, chosen, strict=True) if is_set)


@pytest.mark.parametrize("contexts", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("read_only", [False, True])
def test_every_command_with_every_flag_combination_has_the_specified_answer(
    read_only: bool, dialect: str, contexts: bool
) -> None:
    """10 commands x 128 flag words. PAYLOAD_LEN is legal nowhere here: the receiver takes it off a WRITE that carries a
    payload, and a BLOCK_STATUS with it but without one is malformed."""
    agreed = session(read_only=read_only, dialect=dialect, contexts=contexts)
    differences = []
    for command in range(10):
        for flags in all_flags():
            want = expected(command, flags, read_only=read_only, dialect=dialect, contexts=contexts)
            got = answer(agreed, command, flags)
            if got != want:
                differences.append(f"command {command} flags {flags:#x}: {got}, specified {want}")
    assert not differences, "\n".join(differences)


@pytest.mark.parametrize("command", [10, 255, 256, 0x7FFF, 0xFFFF])
def test_unknown_command_is_einval(command: int) -> None:
    assert answer(session(), command) == errno.EINVAL


@pytest.mark.parametrize(
    ("flag", "command", "flags"),
    [
        (1 << 2, FLUSH, 0),
        (1 << 3, WRITE, FUA),
        (1 << 3, READ, FUA),
        (1 << 3, TRIM, FUA),
        (1 << 5, TRIM, 0),
        (1 << 6, WRITE_ZEROES, 0),
        (1 << 7, READ, DF),
        (1 << 10, CACHE, 0),
        (1 << 11, WRITE_ZEROES, FAST_ZERO),
    ],
)
def test_what_was_not_advertised_is_einval(flag: int, command: int, flags: int) -> None:
    assert answer(session(), command, flags) == OK
    assert answer(session(without=flag), command, flags) == errno.EINVAL


def test_fast_zero_without_write_zeroes_stays_refused() -> None:
    assert answer(session(without=1 << 6), WRITE_ZEROES, FAST_ZERO) == errno.EINVAL


# Bounds

PAST_END = {
    READ: errno.EINVAL,
    WRITE: errno.ENOSPC,
    TRIM: errno.EINVAL,
    CACHE: errno.EINVAL,
    WRITE_ZEROES: errno.ENOSPC,
    BLOCK_STATUS: errno.EINVAL,
}
"""Spec: proto.md "Error values": ENOSPC for WRITE and WRITE_ZEROES beyond the end, EINVAL for the others."""

INSIDE = [(0, 512), (SIZE - 512, 512), (SIZE - 1, 1), (0, 1), (1, 1), (12345, 678)]
OUTSIDE = [
    (SIZE - 511, 512),
    (SIZE, 1),
    (SIZE + 1, 1),
    (SIZE - 1, 2),
    ((1 << 63) - 1, 1),
    (1 << 63, 512),
    ((1 << 64) - 512, 512),
    ((1 << 64) - 1, 1),
    ((1 << 64) - 256, 512),
    (1, 1 << 32),
]
"""With the sums that wrap at 2^64 to a small number: 2^64 - 512 + 512 = 0."""


@pytest.mark.parametrize("command", PAST_END)
@pytest.mark.parametrize(("offset", "length"), INSIDE)
def test_range_inside_the_export_is_accepted(command: int, offset: int, length: int) -> None:
    assert answer(session(dialect="extended"), command, 0, offset, length) == OK


@pytest.mark.parametrize("command", PAST_END)
@pytest.mark.parametrize(("offset", "length"), OUTSIDE)
def test_range_beyond_the_end_is_refused(command: int, offset: int, length: int) -> None:
    assert answer(session(dialect="extended"), command, 0, offset, length) == PAST_END[command]


@pytest.mark.parametrize("command", [TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS])
def test_whole_export_in_one_request_without_payload_is_accepted(command: int) -> None:
    """Spec: commands without a payload have no length limit but the export's size."""
    huge = 1 << 63
    agreed = session(dialect="extended", size=huge)
    assert answer(agreed, command, 0, 0, huge) == OK
    assert answer(agreed, command, 0, 0, huge + 1) == PAST_END[command]
    assert answer(agreed, command, 0, (1 << 64) - 1, huge) == PAST_END[command]


@pytest.mark.parametrize("command", [TRIM, WRITE_ZEROES, CACHE, BLOCK_STATUS])
def test_longest_compact_request_is_not_refused_for_its_length(command: int) -> None:
    agreed = session(size=1 << 40)
    assert answer(agreed, command, 0, 0, (1 << 32) - 1) == OK


def test_read_at_and_above_the_payload_limit() -> None:
    assert answer(session(), READ, 0, 0, PAYLOAD_MAX) == OK
    assert answer(session(), READ, 0, 0, PAYLOAD_MAX + 1) == errno.EINVAL


@pytest.mark.parametrize("command", [READ, WRITE, TRIM, CACHE, WRITE_ZEROES])
@pytest.mark.parametrize("offset", [0, 1, SIZE])
def test_zero_length_within_the_export_is_accepted(command: int, offset: int) -> None:
    assert answer(session(), command, 0, offset, 0) == OK


@pytest.mark.parametrize("command", PAST_END)
def test_zero_length_beyond_the_end_is_refused(command: int) -> None:
    assert answer(session(), command, 0, SIZE + 1, 0) == PAST_END[command]


def test_block_status_of_no_bytes_is_einval() -> None:
    assert answer(session(), BLOCK_STATUS, 0, 0, 0) == errno.EINVAL


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (1, 1), (SIZE + 5, 7), ((1 << 64) - 1, (1 << 32) - 1)])
def test_flush_ignores_its_reserved_range(offset: int, length: int) -> None:
    assert answer(session(block_size=4096), FLUSH, 0, offset, length) == OK


def test_empty_export_has_no_byte_to_read() -> None:
    assert answer(session(size=0), READ, 0, 0, 1) == errno.EINVAL
    assert answer(session(size=0), WRITE, 0, 0, 1) == errno.ENOSPC
    assert answer(session(size=0), READ, 0, 0, 0) == OK


# Alignment


@pytest.mark.parametrize("block_size", [512, 4096, 65536])
@pytest.mark.parametrize("command", PAST_END)
def test_misaligned_request_of_a_client_that_negotiated_is_einval(command: int, block_size: int) -> None:
    agreed = session(block_size=block_size)
    assert answer(agreed, command, 0, block_size, block_size) == OK
    for offset, length in ((1, block_size), (block_size - 1, block_size), (0, 1), (0, block_size - 1), (512, 100)):
        assert answer(agreed, command, 0, offset, length) == errno.EINVAL


@pytest.mark.parametrize("command", PAST_END)
def test_misaligned_request_of_a_client_that_did_not_ask_is_served(command: int) -> None:
    assert answer(session(block_size=4096, obeys=False), command, 0, 100, 200) == OK


@pytest.mark.parametrize("command", [WRITE, WRITE_ZEROES])
def test_misaligned_and_beyond_the_end_is_told_as_beyond_the_end(command: int) -> None:
    assert answer(session(block_size=4096), command, 0, SIZE - 1, 4096) == errno.ENOSPC


# Read-only, malformed, block status with a payload


@pytest.mark.parametrize("command", [WRITE, TRIM, WRITE_ZEROES])
@pytest.mark.parametrize(("offset", "length"), [(0, 512), (SIZE, 512), (1 << 63, 1), (0, 0)])
def test_change_of_a_read_only_export_is_eperm_whatever_its_range(command: int, offset: int, length: int) -> None:
    assert answer(session(read_only=True), command, 0, offset, length) == errno.EPERM


def test_malformed_message_is_einval_before_anything_else() -> None:
    request = PayloadRequest(TRIM, PAYLOAD_LEN, 1, 0, 512)
    request.fault = "command 4 takes no payload"
    refusal = Rules(session(read_only=True)).check(request, SIZE)
    assert refusal is not None
    assert (refusal.errno, str(refusal)) == (errno.EINVAL, "command 4 takes no payload")


def status_answer(agreed: Session, ids: tuple[int, ...] | None, length: int = 512) -> int:
    request = PayloadRequest(BLOCK_STATUS, PAYLOAD_LEN, 1, 0, length)
    request.contexts = ids
    refusal = Rules(agreed).check(request, SIZE)
    return refusal.errno if refusal else OK


@pytest.mark.parametrize("ids", [(0,), (1,), (0, 1), (1, 0)])
def test_block_status_payload_with_selected_ids_is_accepted(ids: tuple[int, ...]) -> None:
    assert status_answer(session(dialect="extended"), ids) == OK


@pytest.mark.parametrize("ids", [(2,), (0, 2), (0, 0), (1, 0, 1), (0xFFFFFFFF,), None])
def test_block_status_payload_with_other_ids_is_einval(ids: tuple[int, ...] | None) -> None:
    assert status_answer(session(dialect="extended"), ids) == errno.EINVAL


def test_block_status_payload_without_any_id_is_einval() -> None:
    """There is nothing that it could be answered with."""
    assert status_answer(session(dialect="extended"), ()) == errno.EINVAL


def test_block_status_payload_without_contexts_or_extended_headers_is_einval() -> None:
    assert status_answer(session(dialect="extended", contexts=False), (0,)) == errno.EINVAL
    assert status_answer(session(dialect="structured"), (0,)) == errno.EINVAL


@pytest.mark.parametrize(("length", "want"), [(0, errno.EINVAL), (SIZE, OK), (SIZE + 1, errno.EINVAL), (1 << 63, 22)])
def test_block_status_payload_length_is_checked(length: int, want: int) -> None:
    assert status_answer(session(dialect="extended"), (0,), length) == want
