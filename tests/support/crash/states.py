"""The files that a crash can leave, built from a trace.

Of each file there is a base: the longest run of operations, from the first on, that are all durable. What follows it
is the tail, durable and pending operations in the order of their starts. A choice says what is left of each pending
one; a state is the base with a few sectors patched. Its content is known by a sum over its sectors, so that a state
that was seen before costs neither a copy nor a look at what did not change.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from tests.support.crash.expectations import Expectations
from tests.support.crash.trace import SECTOR, ZEROES, Kind, Operation, Sync, Trace

EXHAUSTIVE_MAX = 8
"""With so many pending operations or fewer, every subset is a choice: 256."""

RANDOM_COUNT = 32
"""Random subsets where there are more."""

TEAR_SHARE = 0.2
"""Of the operations in a random subset, so many are torn as well."""

FULL = -1
"""All of an operation's sectors, as a mask: bit n stands for its n-th piece."""

KEPT_SHOWN = 12
"""Operations that a message about a state names."""

SUM_MASK = (1 << 64) - 1

Choice = list[int]
"""For each pending operation the mask of what is left of it: 0 nothing, FULL all, else it is torn."""

Key = tuple[tuple[int, int], ...]
"""For each file its size, and the sum over its sectors: equal for equal content."""


PAIR = struct.Struct("<qq")


def term(index: int, content: bytes) -> int:
    """A sector's share in its file's sum; a sector of zeroes has none.

    The hash of a tuple would not do: it is so regular that sums of it collide.
    """
    return 0 if content == ZEROES else hash(PAIR.pack(index, hash(content)))


@dataclass(slots=True)
class Patch:
    """A file as the base with some of its sectors replaced."""

    base: Disk
    sectors: dict[int, bytes]
    size: int

    def content(self) -> bytearray:
        content = bytearray(self.base.content)
        content.extend(bytes(max(0, self.size - len(content))))
        for index, sector in self.sectors.items():
            if index * SECTOR < self.size:
                content[index * SECTOR : (index + 1) * SECTOR] = sector
        del content[self.size :]
        return content

    def key(self) -> tuple[int, int]:
        terms = self.base.terms
        known = len(terms)
        total = self.base.sum
        for index, sector in self.sectors.items():
            total += term(index, sector) - (terms[index] if index < known else 0)
        return self.size, total & SUM_MASK

    def sector(self, index: int) -> bytes:
        found = self.sectors.get(index)
        return self.base.sector(index) if found is None else found

    def apply(self, operation: Operation, mask: int) -> None:
        if operation.kind is Kind.EXTEND:
            self.size = max(self.size, operation.size)
        elif operation.kind is Kind.SIZE:
            self.cut(min(self.size, operation.size))
            self.size = operation.size
        else:
            for number, (index, skip, piece) in enumerate(operation.pieces):
                if mask >> number & 1:
                    if len(piece) < SECTOR:
                        old = self.sector(index)
                        piece = old[:skip] + piece + old[skip + len(piece) :]
                    self.sectors[index] = piece

    def cut(self, size: int) -> None:
        """What lies from `size` on reads as zeroes when the file grows again."""
        index, skip = divmod(size, SECTOR)
        if skip:
            self.sectors[index] = self.sector(index)[:skip] + bytes(SECTOR - skip)
            index += 1
        beyond = [number for number in self.sectors if number >= index]
        for number in [*beyond, *range(index, len(self.base.terms))]:
            self.sectors[number] = ZEROES


class Disk:
    """The base of one file; whole sectors, zeroes behind `size`."""

    def __init__(self, content: bytes) -> None:
        self.size = len(content)
        self.content = bytearray(content) + bytes(-len(content) % SECTOR)
        self.terms = [term(index, self.sector(index)) for index in range(len(self.content) // SECTOR)]
        self.sum = sum(self.terms)

    def sector(self, index: int) -> bytes:
        return bytes(self.content[index * SECTOR : (index + 1) * SECTOR]) or ZEROES

    def absorb(self, operation: Operation) -> None:
        """`operation` is durable, and so is all before it."""
        patch = Patch(self, {}, self.size)
        patch.apply(operation, FULL)
        self.size = patch.size
        for index, sector in patch.sectors.items():
            missing = index + 1 - len(self.terms)
            if missing > 0:
                self.content.extend(bytes(missing * SECTOR))
                self.terms.extend([0] * missing)
            self.content[index * SECTOR : (index + 1) * SECTOR] = sector
            new = term(index, sector)
            self.sum += new - self.terms[index]
            self.terms[index] = new


class CrashState:
    """What a crash left: the files' bytes, in the order of the trace's files, and what the disk may then read as.

    point: the trace's time at which it happened. `expected` is of that time, and `files` can be had, only until the
    next state is asked for; files that were asked for stay. `is_recovered`: these are not the bytes of the crash but
    those after the image was opened for writing again; `is_closed`: and then written to and closed in order.
    """

    def __init__(
        self, point: int, pending: Sequence[Operation], choice: Choice, patches: list[Patch], expected: Expectations
    ) -> None:
        self.point = point
        self.pending = pending
        self.choice = choice
        self.expected = expected
        self.is_torn = any(mask not in (0, FULL) for mask in choice)
        self.is_recovered = False
        self.is_closed = False
        self.key: Key = tuple(patch.key() for patch in patches)
        self._patches = patches

    @cached_property
    def files(self) -> list[bytes]:
        return [bytes(patch.content()) for patch in self._patches]

    def after(self, files: Sequence[bytes], *, is_closed: bool = False) -> CrashState:
        """The same crash, when the image has been opened again, or closed after that, and its files are these."""
        state = CrashState(self.point, self.pending, self.choice, [], self.expected)
        state.files = list(files)
        state.is_recovered = True
        state.is_closed = is_closed
        return state

    def __str__(self) -> str:
        """Which of the pending operations this state has."""
        if all(mask == FULL for mask in self.choice):
            return f"crash at {self.point} with all of {len(self.pending)} pending"
        left = [
            f"{operation}" if mask == FULL else f"{operation} torn {mask:#b}"
            for operation, mask in zip(self.pending, self.choice, strict=True)
            if mask
        ]
        kept = "; ".join(left[:KEPT_SHOWN]) + ("; …" if len(left) > KEPT_SHOWN else "")
        return f"crash at {self.point} with {len(left)} of {len(self.pending)} pending: {kept or 'none'}"


class Replay:
    """Walks a trace from crash point to crash point.

    without_barriers: every sync is taken for one that covers nothing.
    """

    def __init__(self, trace: Trace, *, without_barriers: bool = False) -> None:
        self._operations = trace.operations
        self._syncs = [] if without_barriers else sorted(trace.syncs, key=lambda sync: sync.ended)
        self._next_operation = 0
        self._next_sync = 0
        self._disks = [Disk(file.initial) for file in trace.files]
        self._tails: list[list[Operation]] = [[] for _ in trace.files]
        self._durable: set[Operation] = set()
        self._doomed: set[Operation] = set()
        starts = {operation.started for operation in trace.operations} | {sync.started for sync in trace.syncs}
        self.points = [*sorted(starts), trace.now + 1]

    def advance(self, time: int) -> list[Operation]:
        """Go on to `time`. Returns the operations that are pending then, by their starts."""
        operations = self._operations
        while self._next_operation < len(operations) and operations[self._next_operation].started <= time:
            operation = operations[self._next_operation]
            self._tails[operation.file].append(operation)
            self._next_operation += 1
        while self._next_sync < len(self._syncs) and self._syncs[self._next_sync].ended <= time:
            self._settle(self._syncs[self._next_sync])
            self._next_sync += 1
        pending = [operation for tail in self._tails for operation in tail if operation not in self._durable]
        return sorted(pending, key=lambda operation: operation.started)

    def _settle(self, sync: Sync) -> None:
        tail = self._tails[sync.file]
        if sync.is_failed:
            self._doomed.update(
                operation for operation in tail if operation.started < sync.ended and operation not in self._durable
            )
            return
        self._durable.update(
            operation
            for operation in tail
            if operation.ended < sync.started and not operation.is_failed and operation not in self._doomed
        )
        count = next((n for n, operation in enumerate(tail) if operation not in self._durable), len(tail))
        for operation in tail[:count]:
            self._disks[sync.file].absorb(operation)
            self._durable.discard(operation)
        del tail[:count]

    def build(self, pending: Sequence[Operation], choice: Choice) -> list[Patch]:
        masks = dict(zip(pending, choice, strict=True))
        patches = []
        for disk, tail in zip(self._disks, self._tails, strict=True):
            patch = Patch(disk, {}, disk.size)
            for operation in tail:
                mask = masks.get(operation, FULL)
                if mask:
                    patch.apply(operation, mask)
            patch.cut(patch.size)
            patches.append(patch)
        return patches


def choices(pending: Sequence[Operation], rng: random.Random) -> Iterator[Choice]:
    """What may be left of the pending operations: all of them first, then none, then the rest in random order."""
    count = len(pending)
    yield [FULL] * count
    if not count:
        return
    yield [0] * count
    rest: list[_Plan] = [(bits, None, 0) for bits in _subsets(count)]
    rest += _tears(pending, (1 << count) - 1, rng)
    rest += _tears(pending, 0, rng)
    if count > EXHAUSTIVE_MAX:
        rest += [None] * RANDOM_COUNT
    rng.shuffle(rest)
    for plan in rest:
        if plan is None:
            yield [_left(operation, rng) for operation in pending]
            continue
        bits, torn, mask = plan
        choice = [FULL if bits >> n & 1 else 0 for n in range(count)]
        if torn is not None:
            choice[torn] = mask
        yield choice


_Plan = tuple[int, int | None, int] | None
"""A choice not yet laid out: bit n for the n-th pending operation, which of them is torn, its mask. None: at random."""


def _subsets(count: int) -> Iterable[int]:
    every = (1 << count) - 1
    if count <= EXHAUSTIVE_MAX:
        return range(1, every)
    singles = {1 << n for n in range(count)}
    return singles | {every ^ single for single in singles} | {(1 << n) - 1 for n in range(1, count)}


def _tears(pending: Sequence[Operation], others: int, rng: random.Random) -> Iterator[_Plan]:
    """A prefix, a suffix and a random part of each operation of several sectors, with the others all there or not."""
    for number, operation in enumerate(pending):
        pieces = len(operation.pieces)
        if pieces > 1:
            every = (1 << pieces) - 1
            prefix = (1 << rng.randrange(1, pieces)) - 1
            suffix = every ^ ((1 << rng.randrange(1, pieces)) - 1)
            yield from ((others, number, mask) for mask in {prefix, suffix, rng.randrange(1, every)})


def _left(operation: Operation, rng: random.Random) -> int:
    pieces = len(operation.pieces)
    if pieces > 1 and rng.random() < TEAR_SHARE:
        return rng.randrange(1, (1 << pieces) - 1)
    return FULL if rng.random() < 0.5 else 0


def crash_states(
    trace: Trace, *, seed: int, cap: int = 64, expected: Expectations | None = None, without_barriers: bool = False
) -> Iterator[CrashState]:
    """The states of `trace`, in order and without repetition, at most `cap` for a crash point.

    expected: what the disk may read as, when that is not for `trace` to say: in a recovery no guest is served.
    """
    rng = random.Random(seed)
    replay = Replay(trace, without_barriers=without_barriers)
    expectations = Expectations(trace) if expected is None else expected
    seen: set[tuple[int, Key]] = set()
    for point in replay.points:
        pending = replay.advance(point)
        if expected is None:
            expectations.advance(point)
        left = cap
        for choice in choices(pending, rng):
            state = CrashState(point, pending, choice, replay.build(pending, choice), expectations)
            if (expectations.epoch, state.key) in seen:
                continue
            seen.add((expectations.epoch, state.key))
            yield state
            left -= 1
            if not left:
                break
