"""Seeded schedules of concurrent requests against one Export, whose file completes calls when the schedule says.

A unit (a sector, or an eighth of one) holds one value. A change has a time of submission and of its reply. A read may
return, for each unit, any value that is not *superseded*: another change began after it was replied to and was itself
replied to before the read began. The same holds for what is durable when a FLUSH is replied to; a change with FUA
supersedes, in what is durable, all that was replied to before it began. Zero is the value of trims, zeroes and the
start.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from nbdimg.export.export import Export
from nbdimg.export.inflight import Entry, InFlight
from nbdimg.formats.raw import RawDriver
from nbdimg.image.image import Image
from nbdimg.wire.constants import Command, CommandFlag
from nbdimg.wire.messages import Request
from tests.support.faultfile import HeldFile
from tests.support.interleave import NeverConflicting

SECTOR_COUNT = 8
SIZE = SECTOR_COUNT * 512
REQUEST_COUNT = 24
IN_FLIGHT_MAX = 8
SCHEDULES = 3200
CHUNKS = 16
WORD = 4
NEVER = 1 << 60


@dataclass(eq=False)
class Change:
    value: bytes
    start: int
    stop: int
    submitted: int
    replied: int = NEVER


@dataclass
class Model:
    """`unit` bytes hold one value; times are counts of events."""

    unit: int
    changes: list[Change] = field(default_factory=list)
    now: int = 1

    def __post_init__(self) -> None:
        self.changes.append(Change(bytes(self.unit), 0, SIZE, 0, 0))

    def tick(self) -> int:
        self.now += 1
        return self.now

    def admissible(self, offset: int, submitted: int, replied: int) -> set[bytes]:
        """The values that a read from `submitted` to `replied` may find at this unit."""
        candidates = [c for c in self.changes if c.start <= offset < c.stop and c.submitted < replied]
        finished = [c for c in candidates if c.replied < submitted]
        return {c.value for c in candidates if not any(c.replied < newer.submitted for newer in finished)}

    def replaceable(self, offset: int, change: Change) -> set[bytes]:
        """The values that may be durable at this unit when `change` with FUA is replied to: all that it does not
        supersede."""
        covering = [c for c in self.changes if c.start <= offset < c.stop]
        return {c.value for c in covering if c.replied >= change.submitted}

    def difference(
        self, data: bytes, offset: int, allowed_at: Callable[[int], set[bytes]], *, may_tear: bool
    ) -> str | None:
        """Why `data`, found at `offset`, is wrong. With `may_tear` each word counts by itself: a barrier may find
        half of a change that was not replied to."""
        step = WORD if may_tear else self.unit
        for start in range(0, len(data), self.unit):
            unit = data[start : start + self.unit]
            allowed = allowed_at(offset + start)
            if unit in allowed:
                continue
            pieces = {unit[at : at + step] for at in range(0, self.unit, step)}
            if not pieces <= {value[:step] for value in allowed}:
                return f"unit at {offset + start}: {unit.hex()} is none of {sorted(v[:WORD].hex() for v in allowed)}"
        return None


class DurableFile(HeldFile):
    """Knows what a crash would leave at least: what was there when the last completed barrier began."""

    def __init__(self) -> None:
        super().__init__(bytes(SIZE))
        self.durable = bytes(SIZE)

    async def fdatasync(self) -> None:
        covered = bytes(self.content)
        await super().fdatasync()
        self.durable = covered


class Schedule:
    """One seed's run. `differences` says what was found wrong."""

    def __init__(self, seed: int, queue: InFlight | None = None) -> None:
        self.generator = random.Random(seed)
        self.model = Model(unit=512 if seed % 2 else 64)
        self.file = DurableFile()
        self.export = Export("disk", Image(RawDriver(self.file), writable=True), payload_max=1 << 20)
        if queue is not None:
            self.export.inflight = queue
        self.values = itertools.count(1)
        self.tasks: set[asyncio.Task[None]] = set()
        self.differences: list[str] = []
        self.idle_turns = 0

    def _range(self) -> tuple[int, int]:
        unit = self.model.unit
        start = self.generator.randrange(SIZE // unit)
        count = min(self.generator.choice((1, 1, 2, 3, 8)), SIZE // unit - start)
        return start * unit, count * unit

    async def run(self) -> None:
        left = REQUEST_COUNT
        while left or self.tasks:
            can_submit = left and len(self.tasks) < IN_FLIGHT_MAX
            if can_submit and (not self.file.held or self.generator.random() < 0.5):
                left -= 1
                self.file.is_inline = self.generator.random() < 0.2
                self._submit()
            elif self.file.held:
                self.file.release(self.generator.randrange(len(self.file.held)))
            else:
                assert self.tasks, "nothing runs and nothing is left"
                assert self._is_progressing(), "deadlock: requests wait and no file call is under way"
            await self._settle()
        self._check("end", bytes(self.file.content), 0, self.model.now)
        if self.export.inflight.count:
            self.differences.append(f"{self.export.inflight.count} entries were left in the queue")

    def _is_progressing(self) -> bool:
        self.idle_turns += 1
        return self.idle_turns < 100

    async def _settle(self) -> None:
        for _ in range(6):
            await asyncio.sleep(0)

    def _submit(self) -> None:
        kind = self.generator.choices(
            ("write", "zero", "trim", "read", "flush", "status"), weights=(34, 10, 8, 34, 8, 6)
        )[0]
        offset, length = self._range()
        submitted = self.model.tick()
        if kind == "read":
            self._start(self._read(offset, length, submitted))
        elif kind == "flush":
            self._start(self._flush(submitted))
        elif kind == "status":
            self._start(self._status(offset, length))
        else:
            self._start(self._change(kind, offset, length, submitted))

    def _start(self, work: Iterator[object]) -> None:
        """`work` submits at its first step, then yields what it waits for."""
        waits_for = next(work)
        if waits_for is None:
            next(work, None)
            return

        async def finish() -> None:
            await waits_for  # type: ignore[misc]
            next(work, None)

        task = asyncio.get_running_loop().create_task(finish())
        self.tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if task.exception() is not None:
            self.differences.append(repr(task.exception()))

    def _check(self, what: str, data: bytes, offset: int, submitted: int, *, may_tear: bool = False) -> None:
        replied = self.model.tick()
        self._note(what, data, offset, lambda at: self.model.admissible(at, submitted, replied), may_tear=may_tear)

    def _note(
        self, what: str, data: bytes, offset: int, allowed_at: Callable[[int], set[bytes]], *, may_tear: bool
    ) -> None:
        found = self.model.difference(data, offset, allowed_at, may_tear=may_tear)
        if found is not None:
            self.differences.append(f"{what}: {found}")

    def _read(self, offset: int, length: int, submitted: int) -> Iterator[object]:
        view = memoryview(bytearray(length))
        is_done = self.export.try_read(offset, offset + length, view) == length
        yield None if is_done else self.export.read(offset, view)
        self._check("read", bytes(view), offset, submitted)

    def _change(self, kind: str, offset: int, length: int, submitted: int) -> Iterator[object]:
        flags = CommandFlag.FUA if self.generator.random() < 0.2 else 0
        if kind == "write":
            unit = self.model.unit
            value = next(self.values).to_bytes(WORD, "big") * (unit // WORD)
            payload = memoryview(value * (length // unit))
            request = Request(Command.WRITE, flags, 1, offset, length, payload)
        else:
            value = bytes(self.model.unit)
            command = Command.WRITE_ZEROES if kind == "zero" else Command.TRIM
            request = Request(command, flags, 1, offset, length)
        change = Change(value, offset, offset + length, submitted)
        self.model.changes.append(change)
        yield self.export.submit(request)
        change.replied = self.model.tick()
        if flags:
            durable = self.file.durable[offset : offset + length]
            self._note(
                "durable after FUA", durable, offset, lambda at: self.model.replaceable(at, change), may_tear=True
            )

    def _flush(self, submitted: int) -> Iterator[object]:
        yield self.export.submit(Request(Command.FLUSH, 0, 1, 0, 0))
        self._check("durable after FLUSH", self.file.durable, 0, submitted, may_tear=True)

    def _status(self, offset: int, length: int) -> Iterator[object]:
        yield self.export.submit(Request(Command.BLOCK_STATUS, 0, 1, offset, length), {0: "base:allocation"})


def differences_of(seeds: range, queue: type[InFlight] | None = None) -> list[str]:
    found: list[str] = []

    async def main() -> None:
        for seed in seeds:
            schedule = Schedule(seed, queue() if queue else None)
            await schedule.run()
            found.extend(f"seed {seed}: {difference}" for difference in schedule.differences)

    asyncio.run(main())
    return found


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_schedules_of_concurrent_requests_agree_with_the_byte_model(chunk: int) -> None:
    size = SCHEDULES // CHUNKS
    found = differences_of(range(chunk * size, (chunk + 1) * size))
    assert found == []


class SharedWrites(InFlight):
    """Lets changes run beside reads and each other when they are told apart by their start."""

    def _conflicting(self, start: int, stop: int, is_exclusive: bool) -> Iterator[Entry]:
        return (entry for entry in super()._conflicting(start, stop, is_exclusive) if entry.start == start)


@pytest.mark.parametrize("queue", [NeverConflicting, SharedWrites])
def test_control_a_queue_that_does_not_order_is_caught(queue: type[InFlight]) -> None:
    assert differences_of(range(60), queue) != []


def test_control_a_flush_that_is_no_barrier_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(file: DurableFile) -> None:
        return

    monkeypatch.setattr(DurableFile, "fdatasync", nothing)
    assert any("durable" in difference for difference in differences_of(range(60)))


def test_model_allows_old_or_new_while_a_change_is_under_way_and_new_afterwards() -> None:
    model = Model(unit=512)
    change = Change(b"n" * 512, 0, 512, submitted=model.tick())
    model.changes.append(change)
    assert model.admissible(0, model.tick(), model.tick()) == {bytes(512), b"n" * 512}
    change.replied = model.tick()
    assert model.admissible(0, model.tick(), model.tick()) == {b"n" * 512}
    torn = b"n" * 256 + bytes(256)
    allowed = {b"n" * 512, bytes(512)}
    assert model.difference(torn, 0, lambda offset: allowed, may_tear=False) is not None
    assert model.difference(torn, 0, lambda offset: allowed, may_tear=True) is None
