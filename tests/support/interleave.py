"""Seeded schedules of concurrent requests against one Export over a qcow2 image in memory.

Everything is decided by the seed: which request comes when, and which of the waiting file calls goes on next. The loop
never asks the operating system for events, so that a schedule takes milliseconds and does the same again.

The oracle is a model of registers. A unit (a sector, or a quarter of one) holds one value; a change has a time of
submission and of its reply. A read may find, in each unit, every value that is not superseded: a change that is sure of
its effect, was submitted after the value's own was replied to, and was itself replied to before the read began.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import selectors
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nbdimg.export.export import Export, Status
from nbdimg.export.inflight import Entry, InFlight
from nbdimg.formats import open_file
from nbdimg.formats.options import OpenOptions
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.image.gate import Reference
from nbdimg.image.image import Image, Segment
from nbdimg.storage.file import BlockFile
from nbdimg.storage.memory import MemoryFile
from nbdimg.wire.constants import ALLOCATION_DEPTH, BASE_ALLOCATION, Command, CommandFlag
from nbdimg.wire.messages import Request
from tests.support.faultfile import HeldFile
from tests.support.reading import read_all

T = TypeVar("T")

NEVER = 1 << 60
STATE_ZERO = 2
"""Flag of base:allocation. Spec: proto.md "Metadata contexts"."""
IN_FLIGHT_MAX = 8
TURNS = 5
"""Turns of the loop between two steps of a schedule: what a released call sets off runs, what follows may overlap."""
IDLE_TURNS_MAX = 200
CONTEXTS = {0: BASE_ALLOCATION, 1: ALLOCATION_DEPTH}

Work = Generator[Any, Any, None]
Held = list[tuple[str, "asyncio.Future[None]"]]


class _NoEvents(selectors.SelectSelector):
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return []


def run_in_memory(work: Coroutine[Any, Any, T]) -> T:
    """Run it on a loop that knows no sockets, signals or threads."""
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(_NoEvents())) as runner:
        return runner.run(work)


class NeverConflicting(InFlight):
    """The queue of controls: everything runs at once."""

    def _conflicting(self, start: int, stop: int, is_exclusive: bool) -> Iterator[Entry]:
        return iter(())


class InlineWorkers:
    """Takes the place of the worker threads: what they would do is done at once."""

    def run(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        try:
            done.set_result(function(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done


@dataclass(frozen=True, slots=True)
class Template:
    """An image as qemu's tools made it.

    `files`: what it refers to, by stored name. `guest` and `snapshots`: its content as qemu-img converts it. Trims are
    sure to zero whole units of `trim_unit` bytes; 0: they promise nothing.
    """

    name: str
    content: bytes
    files: dict[str, bytes]
    guest: bytes
    snapshots: dict[str, bytes]
    trim_unit: int


class MemoryGate:
    def __init__(self, files: dict[str, BlockFile]) -> None:
        self._files = files

    async def open(self, reference: Reference) -> BlockFile:
        return self._files[reference.name]


async def open_template(file: BlockFile, files: dict[str, BlockFile], *, snapshot: str | None = None) -> Image:
    """The image in `file`; writable but for a snapshot."""
    options = OpenOptions(MemoryGate(files), writable=snapshot is None, snapshot=snapshot)
    return await open_file(file, "qcow2", options)


async def content_of(content: bytes, files: dict[str, bytes], *, snapshot: str | None = None) -> bytes:
    """All of the guest's bytes."""
    opened: dict[str, BlockFile] = {name: MemoryFile(data, name) for name, data in files.items()}
    image = await open_template(MemoryFile(content), opened, snapshot=snapshot)
    return await read_all(image)


@dataclass(eq=False, slots=True)
class Change:
    value: bytes
    submitted: int
    replied: int = NEVER
    is_certain: bool = True


@dataclass
class Model:
    """`unit` bytes of `guest` are a register; times are counts of events."""

    guest: bytes
    unit: int
    now: int = 1
    registers: dict[int, list[Change]] = field(default_factory=dict)

    def tick(self) -> int:
        self.now += 1
        return self.now

    def begin(self, offset: int, length: int, change: Change) -> None:
        for index in range(offset // self.unit, (offset + length) // self.unit):
            self.registers.setdefault(index, []).append(change)

    def _initial(self, index: int) -> bytes:
        return self.guest[index * self.unit : (index + 1) * self.unit].ljust(self.unit, b"\0")

    def admissible(self, index: int, submitted: int, replied: int) -> set[bytes]:
        """The values that a read from `submitted` to `replied` may find in a unit."""
        changes = self.registers.get(index, ())
        finished = [each.submitted for each in changes if each.is_certain and each.replied < submitted]
        newest = max(finished, default=0)
        values = {each.value for each in changes if each.submitted < replied and each.replied >= newest}
        return values if newest else values | {self._initial(index)}

    def difference(self, data: bytes, offset: int, submitted: int, replied: int) -> str | None:
        """Why `data`, found at `offset`, is wrong."""
        for start in range(0, len(data), self.unit):
            index = (offset + start) // self.unit
            found = data[start : start + self.unit]
            allowed = self.admissible(index, submitted, replied)
            if not any(found == value[: len(found)] for value in allowed):
                wanted = sorted(value[:8].hex() for value in allowed)
                return f"bytes at {offset + start} are {found[:8].hex()}...{found[-8:].hex()}, expected {wanted}"
        return None


@dataclass(frozen=True, slots=True)
class Mix:
    """`spots`: how many places of the disk a schedule works on; few make for many conflicts. `slices`: resident slices
    of either cache beyond what one table takes.
    """

    requests: int = 24
    spots: int = 4
    slices: int = 2


class Schedule:
    """One seed's run over a template. `differences` says what was found wrong; `content` is the file it left."""

    def __init__(self, seed: int, template: Template, mix: Mix, queue: InFlight | None = None) -> None:
        self.generator = random.Random(seed)
        self.template = template
        self.mix = mix
        self.size = len(template.guest)
        self.model = Model(template.guest, 512 if self.generator.random() < 0.6 else 128)
        self.held: Held = []
        self.file = self._held_file(template.content)
        self.files = {name: self._held_file(data) for name, data in template.files.items()}
        self.queue = queue
        self.values = itertools.count(1)
        self.tasks: set[asyncio.Task[None]] = set()
        self.differences: list[str] = []
        self.idle_turns = 0
        starts = [self.generator.randrange(self.size) for _ in range(mix.spots - 1)]
        self.spots = [*starts, self.size - 1]

    def _held_file(self, content: bytes) -> HeldFile:
        file = HeldFile(content)
        file.held = self.held
        file.is_inline = True
        return file

    def _set_inline(self, is_inline: bool) -> None:
        for file in (self.file, *self.files.values()):
            file.is_inline = is_inline

    async def run(self) -> None:
        self.export = Export("disk", await self._until_done(self._open()), payload_max=1 << 20)
        if self.queue is not None:
            self.export.inflight = self.queue
        left = self.mix.requests
        while left or self.tasks:
            can_submit = left and len(self.tasks) < IN_FLIGHT_MAX
            if can_submit and (not self.held or self.generator.random() < 0.4):
                left -= 1
                self._set_inline(self.generator.random() < 0.25)
                self._submit()
            elif not await self._step():
                return
            await self._settle()
        if self.export.inflight.count:
            self.differences.append(f"{self.export.inflight.count} entries were left in the queue")
        try:
            await self._until_done(self.export.close())
        except Exception as error:
            self.differences.append(f"close: {error!r}")

    async def _open(self) -> Image:
        image = await open_template(self.file, dict(self.files))
        driver = image.driver
        assert isinstance(driver, Qcow2Driver)
        assert driver.refcounts is not None
        mapping, counts = driver.mapping, driver.refcounts
        mapping.cache._slices_max = mapping._table_slices + self.mix.slices
        counts.cache._slices_max = counts._block_slices + self.mix.slices
        return image

    async def _until_done(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.get_running_loop().create_task(work)
        while not task.done():
            if self.held:
                await self._step()
            await self._settle()
        return task.result()

    async def _step(self) -> bool:
        """Let one waiting call go on; False: requests wait and there is none."""
        if self.held:
            self.idle_turns = 0
            self.held.pop(self.generator.randrange(len(self.held)))[1].set_result(None)
            return True
        self.idle_turns += 1
        if self.idle_turns > IDLE_TURNS_MAX:
            self.differences.append("deadlock: requests wait and no file call is under way")
        return self.idle_turns <= IDLE_TURNS_MAX

    async def _settle(self) -> None:
        for _ in range(TURNS):
            await asyncio.sleep(0)

    def _range(self) -> tuple[int, int]:
        unit, cluster = self.model.unit, self.export.image.driver.cluster_size
        spot = self.generator.choice(self.spots)
        start = max(0, spot - spot % cluster + self.generator.choice((-1, 0, 0, 1)) * cluster)
        if self.generator.random() < 0.5:
            start += self.generator.randrange(cluster // unit) * unit
        length = self.generator.choice((unit, 512, 512, 1024, cluster, cluster, 2 * cluster, 4 * cluster))
        start = min(start, (self.size - 1) // unit * unit)
        length = min(length, (self.size - start) // unit * unit)
        return (start, length) if length else (start - unit, unit)

    def _submit(self) -> None:
        kinds = ("write", "zero", "keep", "trim", "read", "flush", "status")
        kind = self.generator.choices(kinds, weights=(34, 9, 6, 12, 24, 10, 5))[0]
        offset, length = self._range()
        submitted = self.model.tick()
        if kind == "read":
            self._start(self._read(offset, length, submitted))
        elif kind == "flush":
            self._start(self._flush())
        elif kind == "status":
            self._start(self._status(offset, length, submitted))
        else:
            self._start(self._change(kind, offset, length, submitted))

    def _start(self, work: Work) -> None:
        """`work` submits at its first step, then yields what it waits for, and is sent the answer."""
        try:
            waits_for = next(work)
        except Exception as error:
            self.differences.append(repr(error))
            return

        async def finish() -> None:
            answer = None if waits_for is None else await waits_for
            try:
                work.send(answer)
            except StopIteration:
                return

        task = asyncio.get_running_loop().create_task(finish())
        self.tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        error = task.exception()
        if error is not None:
            self.differences.append(repr(error))

    def _note(self, what: str, data: bytes, offset: int, submitted: int) -> None:
        found = self.model.difference(data, offset, submitted, self.model.tick())
        if found is not None:
            self.differences.append(f"{what}: {found}")

    def _read(self, offset: int, length: int, submitted: int) -> Work:
        view = memoryview(bytearray(b"\xaa" * length))
        done = 0
        while done < length:
            count = self.export.try_read(offset + done, offset + length, view[done:])
            if count == 0:
                break
            if count < 0:
                view[done : done - count] = bytes(-count)
            done += abs(count)
        segments: list[Segment] | None = yield (self.export.read(offset + done, view[done:]) if done < length else None)
        for segment in segments or ():
            if segment.is_hole:
                start = segment.offset - offset
                view[start : start + segment.length] = bytes(segment.length)
        self._note("read", bytes(view), offset, submitted)

    def _change(self, kind: str, offset: int, length: int, submitted: int) -> Work:
        flags: int = CommandFlag.FUA if self.generator.random() < 0.15 else 0
        unit = self.model.unit
        if kind == "write":
            value = next(self.values).to_bytes(8, "big") * (unit // 8)
            request = Request(Command.WRITE, flags, 1, offset, length, memoryview(value * (length // unit)))
        else:
            value = bytes(unit)
            if kind == "keep":
                flags |= CommandFlag.NO_HOLE
            command = Command.TRIM if kind == "trim" else Command.WRITE_ZEROES
            request = Request(command, flags, 1, offset, length)
        changes = []
        for start, stop, is_certain in self._parts(kind, offset, offset + length):
            change = Change(value, submitted, is_certain=is_certain)
            self.model.begin(start, stop - start, change)
            changes.append(change)
        yield self.export.submit(request)
        replied = self.model.tick()
        for change in changes:
            change.replied = replied

    def _parts(self, kind: str, offset: int, stop: int) -> Sequence[tuple[int, int, bool]]:
        """(start, stop, whether the change is sure of its effect there)."""
        unit = self.template.trim_unit
        if kind != "trim":
            return ((offset, stop, True),)
        if not unit:
            return ((offset, stop, False),)
        first = min(stop, -(-offset // unit) * unit)
        last = stop if stop == self.size else max(first, stop // unit * unit)
        return ((offset, first, False), (first, last, True), (last, stop, False))

    def _flush(self) -> Work:
        yield self.export.submit(Request(Command.FLUSH, 0, 1, 0, 0))

    def _status(self, offset: int, length: int, submitted: int) -> Work:
        """What is said to read as zeroes may do so."""
        answers: Status = yield self.export.submit(Request(Command.BLOCK_STATUS, 0, 1, offset, length), CONTEXTS)
        for context, pairs in answers:
            position = offset
            for count, flags in pairs:
                if context == 0 and flags & STATE_ZERO:
                    self._note("status zero", bytes(count), position, submitted)
                position += count
            if position != offset + length:
                self.differences.append(f"status of {offset} for {length} bytes ends at {position}")
