"""The crash model's own rules, on a few operations whose states are written out by hand."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from tests.support.crash.expectations import ZERO, Expectations, fingerprints
from tests.support.crash.states import EXHAUSTIVE_MAX, FULL, Replay, choices, crash_states
from tests.support.crash.trace import NEVER, SECTOR, Change, Flush, Kind, Operation, RecordingFile, Sync, Trace

A, B, C, Z = (letter * SECTOR for letter in (b"a", b"b", b"c", b"\0"))

Work = Callable[..., Awaitable[None]]


def recorded(work: Work, *contents: bytes, failing_syncs: frozenset[int] = frozenset()) -> Trace:
    trace = Trace()
    files = [RecordingFile(trace, content) for content in contents]
    files[0].failing_syncs = failing_syncs

    async def main() -> None:
        await work(*files)

    asyncio.run(main())
    return trace


def left(trace: Trace, *, without_barriers: bool = False) -> set[tuple[bytes, ...]]:
    """The files that a crash at the end of the trace can leave."""
    replay = Replay(trace, without_barriers=without_barriers)
    pending = replay.advance(trace.now + 1)
    states = (replay.build(pending, choice) for choice in choices(pending, random.Random(0)))
    return {tuple(bytes(patch.content()) for patch in patches) for patches in states}


def test_crash_after_two_sectors_leaves_each_subset() -> None:
    async def work(file: RecordingFile) -> None:
        await file.pwrite(0, A)
        await file.pwrite(SECTOR, B)

    assert left(recorded(work, Z + Z)) == {(Z + Z,), (A + Z,), (Z + B,), (A + B,)}


def test_crash_after_a_barrier_leaves_what_it_covers_d1() -> None:
    async def work(file: RecordingFile) -> None:
        await file.pwrite(0, A)
        await file.fdatasync()
        await file.pwrite(SECTOR, B)

    trace = recorded(work, Z + Z)
    assert left(trace) == {(A + Z,), (A + B,)}
    assert left(trace, without_barriers=True) == {(Z + Z,), (A + Z,), (Z + B,), (A + B,)}


def test_crash_with_a_barrier_of_another_file_leaves_either_d1() -> None:
    async def work(first: RecordingFile, second: RecordingFile) -> None:
        await first.pwrite(0, A)
        await second.pwrite(0, B)
        await second.fdatasync()

    assert left(recorded(work, Z, Z)) == {(Z, B), (A, B)}


@pytest.mark.parametrize(("started", "ended", "is_covered"), [(1, 2, True), (1, 4, False), (1, NEVER, False)])
def test_write_is_covered_when_it_ended_before_the_barrier_started_d1(
    started: int, ended: int, is_covered: bool
) -> None:
    trace = Trace(now=6)
    RecordingFile(trace, Z)
    trace.operations.append(Operation(0, Kind.DATA, started, 0, A, ended=ended))
    trace.syncs.append(Sync(0, 3, 5))
    assert left(trace) == ({(A,)} if is_covered else {(Z,), (A,)})


def test_barrier_that_has_not_ended_covers_nothing_d1() -> None:
    trace = Trace(now=6)
    RecordingFile(trace, Z)
    trace.operations.append(Operation(0, Kind.DATA, 1, 0, A, ended=2))
    trace.syncs.append(Sync(0, 3))
    assert left(trace) == {(Z,), (A,)}


def test_failed_barrier_leaves_its_writes_in_doubt_for_ever_d3() -> None:
    async def work(file: RecordingFile) -> None:
        await file.pwrite(0, A)
        with pytest.raises(OSError, match="Input/output"):
            await file.fdatasync()
        await file.pwrite(SECTOR, B)
        await file.fdatasync()

    assert left(recorded(work, Z + Z, failing_syncs=frozenset((0,)))) == {(Z + B,), (A + B,)}


def test_write_in_doubt_never_comes_back_over_a_durable_one_d3() -> None:
    async def work(file: RecordingFile) -> None:
        await file.pwrite(0, A)
        with pytest.raises(OSError, match="Input/output"):
            await file.fdatasync()
        await file.pwrite(0, B)
        await file.fdatasync()

    assert left(recorded(work, Z, failing_syncs=frozenset((0,)))) == {(B,)}


def test_failed_write_may_be_there_d3() -> None:
    async def work(file: RecordingFile) -> None:
        file.failing_writes = frozenset((0,))
        with pytest.raises(OSError, match="No space"):
            await file.pwrite(0, A)
        assert bytes(file.content) == Z
        await file.fdatasync()

    assert left(recorded(work, Z)) == {(Z,), (A,)}


def test_overwrites_apply_in_the_order_of_their_starts_s1() -> None:
    async def work(file: RecordingFile) -> None:
        await file.pwrite(0, A)
        await file.pwrite(0, B)

    assert left(recorded(work, Z)) == {(Z,), (A,), (B,)}


def test_write_within_a_sector_is_there_or_not_s2() -> None:
    async def work(file: RecordingFile) -> None:
        await file.pwrite(8, b"12345678")

    assert left(recorded(work, A)) == {(A,), (A[:8] + b"12345678" + A[16:],)}


def test_write_over_sectors_is_torn_at_them_s2() -> None:
    async def work(file: RecordingFile) -> None:
        await file.pwrite(500, b"x" * 24)

    torn = {A[:500] + b"x" * 12 + B, A + b"x" * 12 + B[12:]}
    whole = {A + B, A[:500] + b"x" * 24 + B[12:]}
    found = left(recorded(work, A + B))
    assert whole < {file for (file,) in found} <= whole | torn


def test_punch_leaves_zeroes_or_not() -> None:
    async def work(file: RecordingFile) -> None:
        assert await file.punch(0, SECTOR)

    assert left(recorded(work, A + B)) == {(A + B,), (Z + B,)}


def test_write_past_the_end_loses_bytes_and_extension_apart_s3() -> None:
    async def work(file: RecordingFile) -> None:
        await file.pwrite(SECTOR, B)

    assert left(recorded(work, A)) == {(A,), (A + Z,), (A + B,)}


def test_truncate_down_is_lost_or_not_and_leaves_zeroes_behind_a_later_end_s3() -> None:
    async def work(file: RecordingFile) -> None:
        await file.truncate(100)
        await file.fdatasync()
        await file.truncate(SECTOR)

    trace = recorded(work, A)
    assert left(trace) == {(A[:100],), (A[:100] + bytes(412),)}
    assert left(trace, without_barriers=True) == {(A,), (A[:100],), (A[:100] + bytes(412),)}


def test_many_pending_operations_are_sampled_with_all_and_none_first() -> None:
    count = EXHAUSTIVE_MAX + 4
    pending = [Operation(0, Kind.DATA, n, n * SECTOR, A) for n in range(count)]
    found = list(choices(pending, random.Random(1)))
    assert found[:2] == [[FULL] * count, [0] * count]
    for n in range(count):
        assert [FULL if other == n else 0 for other in range(count)] in found
        assert [0 if other == n else FULL for other in range(count)] in found
        assert [FULL if other < n else 0 for other in range(count)] in found


def test_few_pending_operations_are_taken_in_every_subset() -> None:
    pending = [Operation(0, Kind.DATA, n, n * SECTOR, A) for n in range(EXHAUSTIVE_MAX)]
    assert len({tuple(choice) for choice in choices(pending, random.Random(1))}) == 1 << EXHAUSTIVE_MAX


def test_states_are_not_repeated_and_keep_to_the_cap() -> None:
    async def work(file: RecordingFile) -> None:
        for n in range(6):
            await file.pwrite(n * SECTOR, A)

    trace = recorded(work, Z * 6)
    every = [state.files[0] for state in crash_states(trace, seed=0, cap=1000)]
    assert len(set(every)) == len(every) == 64
    assert len(list(crash_states(trace, seed=0, cap=3))) <= 3 * 7


def test_tears_lie_on_top_of_everything_and_of_nothing() -> None:
    pending = [Operation(0, Kind.DATA, 1, 0, A + B), Operation(0, Kind.DATA, 2, 2 * SECTOR, C)]
    found = {tuple(choice) for choice in choices(pending, random.Random(1))}
    for others in (0, FULL):
        assert {(0b01, others), (0b10, others)} <= found


def test_state_whose_bytes_beyond_the_end_differ_is_not_repeated() -> None:
    async def work(file: RecordingFile) -> None:
        await file.pwrite(SECTOR, B)

    assert len(list(crash_states(recorded(work, A), seed=0))) == 3


def test_state_is_visited_again_when_the_guest_knows_of_another_flush() -> None:
    async def work(file: RecordingFile) -> None:
        await file.fdatasync()

    trace = recorded(work, Z)
    trace.guest = Z
    trace.changes = [Change(0, [A], 3, acked=4)]
    trace.flushes = [Flush(5, 6)]
    trace.now = 6
    states = [values(state.expected) for state in crash_states(trace, seed=0)]
    assert states == [{b"0"}, {b"a"}]


def test_key_is_the_same_for_the_same_content_however_it_came_about() -> None:
    async def one(file: RecordingFile) -> None:
        await file.pwrite(0, B)
        await file.pwrite(0, A + Z)
        await file.fdatasync()

    async def other(file: RecordingFile) -> None:
        await file.pwrite(0, A)
        await file.pwrite(SECTOR, Z)

    first = list(crash_states(recorded(one, Z + Z), seed=0))[-1]
    keys = {state.key: state.files for state in crash_states(recorded(other, Z + B), seed=0)}
    assert keys[first.key] == first.files == [A + Z]


def expected(initial: bytes, *events: Change | Flush, at: int = 100) -> Expectations:
    trace = Trace(initial)
    trace.changes = [event for event in events if isinstance(event, Change)]
    trace.flushes = [event for event in events if isinstance(event, Flush)]
    expectations = Expectations(trace)
    expectations.advance(at)
    return expectations


def values(expectations: Expectations, index: int = 0) -> set[bytes]:
    """The sector's admissible values, as letters."""
    letters = {hash(A): b"a", hash(B): b"b", hash(C): b"c", ZERO: b"0"}
    return {letters[value] for value in expectations.admissible[index]}


def test_unflushed_writes_are_all_admissible_g2() -> None:
    assert values(expected(Z, Change(0, [A], 1, acked=2), Change(0, [B], 3))) == {b"0", b"a", b"b"}


def test_change_is_not_admissible_before_it_is_submitted_g2() -> None:
    assert values(expected(Z, Change(0, [A], 5), at=4)) == {b"0"}


def test_flush_raises_the_floor_to_what_was_acked_before_it_was_submitted_g1() -> None:
    first, second = Change(0, [A], 1, acked=2), Change(0, [B], 3, acked=5)
    assert values(expected(Z, first, second, Flush(4, 6))) == {b"a", b"b"}
    assert values(expected(Z, first, second, Flush(6, 7))) == {b"b"}
    assert values(expected(Z, first, second, Flush(6, 7), at=6)) == {b"0", b"a", b"b"}


def test_failed_flush_raises_no_floor_g1() -> None:
    assert values(expected(Z, Change(0, [A], 1, acked=2), Flush(3, 4, is_failed=True))) == {b"0", b"a"}


def test_fua_raises_the_floor_of_its_own_sectors_alone_g1() -> None:
    first, second = Change(0, [A, A], 1, acked=2), Change(1, [B], 3, is_durable=True, acked=4)
    expectations = expected(Z + Z, first, second)
    assert values(expectations, 0) == {b"0", b"a"}
    assert values(expectations, 1) == {b"b"}


def test_durable_trim_admits_zeroes_and_what_was_there_g3() -> None:
    write, trim = Change(0, [A], 1, acked=2), Change(0, [Z], 3, is_definite=False, acked=4)
    assert values(expected(B, write, trim, Flush(5, 6))) == {b"a", b"0"}


def test_failed_write_below_the_floor_stays_admissible_until_the_next_definite_one_g3() -> None:
    failed = Change(0, [A], 1, acked=2, is_failed=True)
    trim = Change(0, [Z], 3, is_definite=False, acked=4)
    assert values(expected(B, failed, trim, Flush(5, 6))) == {b"b", b"a", b"0"}
    assert values(expected(B, failed, trim, Flush(5, 6), Change(0, [C], 7, acked=8), Flush(9, 10))) == {b"c"}


def test_shrunk_and_grown_disk_has_either_size_until_durable_and_zeroes_at_its_end_g4() -> None:
    shrink = Change(1, [Z], 1, is_definite=False, is_durable=True, size=SECTOR, acked=3)
    grow = Change(1, [Z], 4, is_durable=True, size=2 * SECTOR, acked=6)
    assert expected(A + B, shrink, at=2).sizes == [2 * SECTOR, SECTOR]
    assert values(expected(A + B, shrink, at=2), 1) == {b"b", b"0"}
    assert expected(A + B, shrink, grow, at=3).sizes == [SECTOR]
    assert expected(A + B, shrink, grow, at=5).sizes == [SECTOR, 2 * SECTOR]
    assert expected(A + B, shrink, grow).sizes == [2 * SECTOR]
    assert values(expected(A + B, shrink, grow), 1) == {b"0"}


def test_grown_disk_has_zeroes_where_it_had_nothing() -> None:
    grow = Change(1, [Z], 1, is_durable=True, size=2 * SECTOR, acked=2)
    expectations = expected(A, grow)
    assert expectations.violated_by(fingerprints(A + Z)) == []
    assert expectations.violated_by(fingerprints(A + B)) == [1]
