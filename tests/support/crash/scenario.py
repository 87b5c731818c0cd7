"""A writer to be crashed: an image, how to open it, what a guest does to it, and what must hold of its files."""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nbdimg.errors import NbdimgError
from tests.support.crash.client import Client, Target, requests
from tests.support.crash.expectations import Expectations, fingerprints
from tests.support.crash.explore import CLOSED, CORRUPT, STUCK, Explorer, Observation, Report, shown
from tests.support.crash.states import FULL, CrashState, Replay
from tests.support.crash.trace import SECTOR, RecordingFile, Trace

STATES_OF_ONE = 400
"""Of a trace, unless told otherwise: rather another run of the workload than more of the same one."""

GOING_ON_COUNT = 50
"""Requests that a recovered image is given, to see that it still takes them."""

SERIALS = 1 << 20
"""For the writes of one run."""

GOING_ON_SERIAL = 1 << 62
"""Above those of any run."""

CAP_MIN = 4
"""States of a crash point that even a long trace gets: all that is pending, nothing, and two of the rest."""


@dataclass(frozen=True)
class Built:
    """An image as it lies on disk, durable, before the workload. `guest`: what its disk reads as."""

    files: Sequence[bytes]
    guest: bytes


async def nothing_to_check(state: CrashState) -> list[str]:
    """For a format without metadata."""
    return []


@dataclass(frozen=True)
class Scenario:
    """build: makes the image; not crashed. open: opens it for writing from these files, recovering what there is to
    recover; raises when it cannot. workload: what is done to it, with a client whose `target` is what `open` gave;
    steps of its own that are no guest I/O go through `client.step`, `resize` and `change`, and the scenario sees to
    it that no request on the same sectors is in flight beside them. check: sentences about what is corrupt in a state's
    files; it is called with the files of the crash, again with those after an opening that wrote (`is_recovered`), and
    at times with those after more requests and an orderly end (`is_closed`).

    failing_syncs, failing_writes: which barriers and waiting writes of the first file fail; requests may then fail too.
    """

    name: str
    build: Callable[[random.Random], Built]
    open: Callable[[Sequence[RecordingFile]], Awaitable[Target]]
    workload: Callable[[Client, random.Random], Awaitable[None]]
    check: Callable[[CrashState], Awaitable[list[str]]] = nothing_to_check
    failing_syncs: frozenset[int] = frozenset()
    failing_writes: frozenset[int] = frozenset()

    @property
    def is_faulty(self) -> bool:
        return bool(self.failing_syncs or self.failing_writes)


async def record(scenario: Scenario, seed: int) -> Trace:
    """Run the workload and close the image that it leaves. The files do not crash; a seed always gives the same trace.

    Raises: AssertionError: the files hold what no recorded operation put there.
    """
    built = scenario.build(random.Random(f"build {seed}"))
    trace = Trace(built.guest, random.Random(f"turns {seed}"))
    files = [RecordingFile(trace, content, f"{scenario.name}-{n}") for n, content in enumerate(built.files)]
    files[0].failing_syncs = scenario.failing_syncs
    files[0].failing_writes = scenario.failing_writes
    target = await scenario.open(files)
    client = Client(trace, target, may_fail=scenario.is_faulty, serial=seed * SERIALS)
    await scenario.workload(client, random.Random(f"guest {seed}"))
    trace.rng = None
    await _close(client.target, is_quiet=client.may_fail)
    _check_record(trace)
    return trace


def _check_record(trace: Trace) -> None:
    """A file that has an operation which is not recorded would be crashed into states that cannot be."""
    replay = Replay(trace)
    pending = replay.advance(trace.now)
    replayed = [patch.content() for patch in replay.build(pending, [0 if each.is_failed else FULL for each in pending])]
    assert any(trace.races()) or replayed == [file.content for file in trace.files]


async def _close(target: Target, *, is_quiet: bool) -> None:
    try:
        await target.close()
    except (OSError, NbdimgError):
        if not is_quiet:
            raise


class Verifier:
    """Opens a state's files for writing and reads everything. Every `going_on_every`-th state is then written to,
    flushed, closed, checked and read again; 0 for none.
    """

    def __init__(self, scenario: Scenario, seed: int, *, going_on_every: int = 20) -> None:
        self._scenario = scenario
        self._seed = seed
        self._going_on_every = going_on_every
        self._count = 0

    async def __call__(self, state: CrashState) -> Observation:
        problems: list[tuple[str, str]] = []
        trace = Trace()
        files = self._files(trace, state.files)
        try:
            problems += [(CORRUPT, text) for text in await self._scenario.check(state)]
            target = await self._scenario.open(files)
            guest = await target.read(0, target.size)
        except Exception as error:  # whatever a damaged file makes a driver raise
            return Observation(problems=(*problems, (CLOSED, f"{type(error).__name__}: {error}")), recovery=trace)
        recovery = trace.until_now()
        if recovery.operations:
            problems += [(CORRUPT, text) for text in await self._check_recovered(state, files, guest)]
        self._count += 1
        if self._going_on_every and self._count % self._going_on_every == 0:
            problems += [(STUCK, text) for text in await self._go_on(state, target, guest, files)]
        return Observation(target.size, array("q", fingerprints(guest)), tuple(problems), recovery)

    def _files(self, trace: Trace, contents: Sequence[bytes]) -> list[RecordingFile]:
        name = self._scenario.name
        return [RecordingFile(trace, data, f"{name}-{n}", inline_share=1.0) for n, data in enumerate(contents)]

    async def _check_recovered(self, state: CrashState, files: Sequence[RecordingFile], guest: bytes) -> list[str]:
        """A recovery leaves a whole image, whose disk a second one does not change."""
        contents = [bytes(file.content) for file in files]
        problems: list[str] = []
        try:
            problems += [f"{text} (opened again)" for text in await self._scenario.check(state.after(contents))]
            target = await self._scenario.open(self._files(Trace(), contents))
            is_same = await target.read(0, target.size) == guest
        except Exception as error:
            return [*problems, f"a recovered image does not open: {type(error).__name__}: {error}"]
        return problems if is_same else [*problems, "a second recovery changes the disk"]

    async def _go_on(
        self, state: CrashState, target: Target, guest: bytes, files: Sequence[RecordingFile]
    ) -> list[str]:
        """The image works: it takes requests, is whole when closed, and then holds what was written."""
        later = Trace(guest)
        client = Client(later, target, serial=GOING_ON_SERIAL)
        rng = random.Random(f"{self._seed} {self._count}")
        try:
            await requests(client, rng, GOING_ON_COUNT, length_max=16 * SECTOR)
            await client.flush()
            read = await target.read(0, target.size)
            await target.close()
            closed = [bytes(file.content) for file in files]
            again = await self._scenario.open(self._files(Trace(), closed))
            expected = Expectations(later)
            expected.advance(later.now)
            wrong = expected.violated_by(fingerprints(read))
            problems = [f"sectors {shown(wrong)} are not what was written"] if wrong else []
            if read != await again.read(0, again.size):
                problems.append("the disk reads otherwise when it is closed and opened again")
            return problems + await self._scenario.check(state.after(closed, is_closed=True))
        except Exception as error:
            return [f"{type(error).__name__}: {error}"]


async def run(
    scenario: Scenario,
    *,
    seed: int,
    states: int,
    states_of_one: int = STATES_OF_ONE,
    timeout_s: float | None = None,
    cap: int = 64,
    nested_cap: int = 8,
    going_on_every: int = 20,
    without_barriers: bool = False,
) -> Report:
    """Record with `seed`, `seed` + 1, and so on, until `states` have been visited or `timeout_s` is over.

    states_of_one: about so many in each trace, evenly over its crash points; `cap`: of one crash point at most.
    """
    started = time.monotonic()
    states_of_one = min(states_of_one, states)
    report = Report(scenario.name + (", barriers taken out" if without_barriers else ""))
    while report.states < states:
        trace = await record(scenario, seed)
        verify = Verifier(scenario, seed, going_on_every=going_on_every)
        share = max(CAP_MIN, states_of_one // (len(trace.operations) + len(trace.syncs) + 1))
        explorer = Explorer(verify, report, cap=min(cap, share), nested_cap=nested_cap, states_max=states)
        await explorer.explore(trace, seed, without_barriers=without_barriers)
        seed += 1
        if timeout_s is not None and time.monotonic() - started > timeout_s:
            break
    return report


def run_now(scenario: Scenario, **options: Any) -> Report:
    """As `run`, in a loop of its own."""
    return asyncio.run(run(scenario, **options))
