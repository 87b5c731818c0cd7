"""Visits the states of a trace, judges what is found in each, and counts."""

from __future__ import annotations

import time
from array import array
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from tests.support.crash.expectations import Expectations
from tests.support.crash.states import CrashState, Key, crash_states
from tests.support.crash.trace import Trace

CLOSED = "does not open"
CORRUPT = "corrupt"
LOST = "flushed sector lost"
ALIEN = "alien sector"
SIZE = "wrong size"
RACE = "racing operations"
STUCK = "does not go on"
KINDS = (CLOSED, CORRUPT, LOST, ALIEN, SIZE, RACE, STUCK)

EXAMPLES_MAX = 8
"""Violations of a kind that a report describes."""

REMEMBERED_MAX = 2048
"""Observations kept for states that come again after a flush; 8 bytes a sector each, without their recoveries."""


@dataclass(frozen=True)
class Observation:
    """What opening a state showed. `sectors`: the fingerprints of all sectors, `size`: the disk's bytes; None and 0
    when it did not open. `problems`: (one of KINDS, a sentence). `recovery`: the trace of the opening.
    """

    size: int = 0
    sectors: array[int] | None = None
    problems: tuple[tuple[str, str], ...] = ()
    recovery: Trace | None = None


HEADER = (
    "| writer | guest requests | file operations / barriers | crash points | most pending | states (distinct) "
    "| torn | recoveries (their states) | states/s | violations |\n|---|---|---|---|---|---|---|---|---|---|"
)
"""Of the table whose rows are `Report.row`."""

Verify = Callable[[CrashState], Awaitable[Observation]]


@dataclass
class Report:
    """Counts. `states` are different in content, or have a guest that knows of more flushes; `distinct` are different
    in content.
    """

    name: str
    seeds: list[int] = field(default_factory=list)
    request_count: int = 0
    operation_count: int = 0
    sync_count: int = 0
    point_count: int = 0
    pending_max: int = 0
    states: int = 0
    distinct: int = 0
    torn: int = 0
    recoveries: int = 0
    nested: int = 0
    elapsed_s: float = 0.0
    violations: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def violation_count(self) -> int:
        return sum(self.violations.values())

    def violated(self, kind: str, text: str) -> None:
        self.violations[kind] += 1
        known = self.examples.setdefault(kind, [])
        if len(known) < EXAMPLES_MAX:
            known.append(f"seed {self.seeds[-1]}: {text}")

    def row(self) -> str:
        speed = self.states / self.elapsed_s if self.elapsed_s else 0
        found = ", ".join(f"{self.violations[kind]:,} {kind}" for kind in KINDS if self.violations[kind])
        return (
            f"| {self.name} | {self.request_count:,} | {self.operation_count:,} / {self.sync_count:,} "
            f"| {self.point_count:,} | {self.pending_max} | {self.states:,} ({self.distinct:,}) | {self.torn:,} "
            f"| {self.recoveries:,} ({self.nested:,}) | {speed:,.0f} | {found or '0'} |"
        )

    def described(self) -> list[str]:
        return [f"{kind}: {text}" for kind, texts in self.examples.items() for text in texts]

    def __str__(self) -> str:
        return "\n".join([HEADER, self.row(), *self.described()])


class Explorer:
    """Adds what it finds to `report`, for as long as that has fewer than `states_max` states.

    cap: states of one crash point. nested_cap: states of one crash point within a recovery; 0 leaves recoveries alone.
    """

    def __init__(
        self, verify: Verify, report: Report, *, cap: int = 64, nested_cap: int = 8, states_max: int | None = None
    ) -> None:
        self._verify = verify
        self._report = report
        self._cap = cap
        self._nested_cap = nested_cap
        self._states_max = states_max
        self._known: OrderedDict[tuple[Key, int], Observation] = OrderedDict()
        self._contents: set[Key] = set()
        self._nested: set[tuple[Key, int]] = set()

    async def explore(self, trace: Trace, seed: int, *, without_barriers: bool = False) -> None:
        report = self._report
        report.seeds.append(seed)
        report.request_count += len(trace.changes) + len(trace.flushes)
        report.operation_count += len(trace.operations)
        report.sync_count += len(trace.syncs)
        started = time.perf_counter()
        self._known.clear()
        self._contents.clear()
        self._nested.clear()
        for first, second in trace.races():
            report.violated(RACE, f"{first} and {second}")
        point = -1
        for state in crash_states(trace, seed=seed, cap=self._cap, without_barriers=without_barriers):
            report.point_count += state.point != point
            point = state.point
            report.pending_max = max(report.pending_max, len(state.pending))
            await self._visit(state, seed)
            if self._states_max is not None and report.states >= self._states_max:
                break
        report.elapsed_s += time.perf_counter() - started

    async def _visit(self, state: CrashState, seed: int) -> None:
        report = self._report
        report.states += 1
        report.torn += state.is_torn
        if state.key not in self._contents:
            self._contents.add(state.key)
            report.distinct += 1
        identity = (state.key, len(state.expected.steps_done))
        seen = self._known.get(identity)
        if seen is None:
            seen = await self._verify(state)
            self._known[identity] = replace(seen, recovery=None)
            if len(self._known) > REMEMBERED_MAX:
                self._known.popitem(last=False)
            self._count(seen, lambda: f"{state}")
            if seen.recovery is not None and seen.recovery.operations:
                report.recoveries += 1
                await self._explore_recovery(state, seen.recovery, seed)
        self._judge(seen, state.expected, lambda: f"{state}")

    async def _explore_recovery(self, state: CrashState, recovery: Trace, seed: int) -> None:
        """A crash while the image is opened after a crash; this far and no further."""
        report = self._report
        for first, second in recovery.races():
            report.violated(RACE, f"{first} and {second}; opening {state}")
        if not self._nested_cap:
            return
        for nested in crash_states(recovery, seed=seed, cap=self._nested_cap, expected=state.expected):
            identity = (nested.key, state.expected.epoch)
            if identity not in self._nested:
                self._nested.add(identity)
                await self._visit_nested(nested, f"{state}")

    async def _visit_nested(self, nested: CrashState, parent: str) -> None:
        self._report.nested += 1
        seen = await self._verify(nested)
        self._count(seen, lambda: f"recovery {nested}, after {parent}")
        self._judge(seen, nested.expected, lambda: f"recovery {nested}, after {parent}")

    def _count(self, seen: Observation, where: Callable[[], str]) -> None:
        """What the opening showed; a kind counts once a state."""
        for kind, text in dict(reversed(seen.problems)).items():
            self._report.violated(kind, f"{text}; {where()}")

    def _judge(self, seen: Observation, expected: Expectations, where: Callable[[], str]) -> None:
        """Compare what was read with what may be there; a kind counts once a state."""
        if seen.sectors is None:
            return
        if seen.size not in expected.sizes:
            self._report.violated(SIZE, f"{seen.size} bytes, expected one of {expected.sizes}; {where()}")
        found: dict[str, list[int]] = {}
        for index in expected.violated_by(seen.sectors):
            kind = LOST if seen.sectors[index] in expected.ever[index] else ALIEN
            found.setdefault(kind, []).append(index)
        for kind, indexes in found.items():
            self._report.violated(kind, f"sectors {shown(indexes)}; {where()}")


def shown(indexes: Sequence[int]) -> str:
    more = f" and {len(indexes) - 6} more" if len(indexes) > 6 else ""
    return ", ".join(map(str, indexes[:6])) + more
