"""What each sector of the disk may hold after a crash, as the guest's events go by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.support.crash.trace import NEVER, SECTOR, ZEROES, Change, Flush, Step, Trace

ZERO = hash(ZEROES)


def fingerprints(guest: bytes) -> list[int]:
    """A number for each sector of `guest`, equal for equal bytes; the end is filled up with zeroes."""
    whole = guest + bytes(-len(guest) % SECTOR)
    return [hash(whole[start : start + SECTOR]) for start in range(0, len(whole), SECTOR)]


@dataclass(slots=True)
class _Register:
    """One sector's history. `floor` indexes the newest element that is durable for certain."""

    history: list[tuple[Change | None, int]]
    floor: int = 0

    def admissible(self) -> frozenset[int]:
        """The values from the floor on; from the last definite element before it, if the floor is not definite."""
        first = self.floor
        while first and not _is_settled(self.history[first][0]):
            first -= 1
        del self.history[:first]
        self.floor -= first
        return frozenset(value for _, value in self.history)


def _is_settled(change: Change | None) -> bool:
    return change is None or (change.is_definite and not change.is_failed and change.acked < NEVER)


@dataclass
class Expectations:
    """The sector model of `trace`, at the time that `advance` was last told.

    `admissible[n]`: the fingerprints that sector n may have; `ever[n]`: all that were ever put there. `sizes`: the
    disk's admissible sizes in bytes. `epoch` counts what has narrowed a choice: states that are equal and of one epoch
    need one look. `steps_begun`, `steps_done`: names, in order.
    """

    trace: Trace
    epoch: int = 0
    admissible: list[frozenset[int]] = field(default_factory=list)
    ever: list[set[int]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    steps_begun: list[str] = field(default_factory=list)
    steps_done: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        initial = fingerprints(self.trace.guest)
        self._registers = [_Register([(None, value)]) for value in initial]
        self.admissible = [frozenset((value,)) for value in initial]
        self.ever = [{value, ZERO} for value in initial]
        self._size_register: list[tuple[Change | None, int]] = [(None, len(self.trace.guest))]
        self.sizes = [len(self.trace.guest)]
        self._not_durable: list[Change] = []
        self._events = self._in_order()
        self._next = 0

    def _in_order(self) -> Sequence[tuple[int, bool, Change | Flush | Step]]:
        """(time, whether this is the ack, event)."""
        trace = self.trace
        every: list[Change | Flush | Step] = [*trace.changes, *trace.flushes, *trace.steps]
        events = [(event.submitted, False, event) for event in every]
        events += [(event.acked, True, event) for event in every if event.acked < NEVER]
        return sorted(events, key=lambda event: event[0])

    def advance(self, time: int) -> None:
        """Take in the events up to `time`."""
        while self._next < len(self._events) and self._events[self._next][0] <= time:
            _, is_ack, event = self._events[self._next]
            self._next += 1
            if isinstance(event, Step):
                (self.steps_done if is_ack else self.steps_begun).append(event.name)
                self.epoch += is_ack
            elif isinstance(event, Flush):
                if is_ack and not event.is_failed:
                    self._settle([change for change in self._not_durable if change.acked < event.submitted])
            elif not is_ack:
                self._submitted(event)
            elif not event.is_failed:
                self._not_durable.append(event)
                if event.is_durable:
                    self._settle([event])

    def violated_by(self, sectors: Sequence[int]) -> list[int]:
        """Which of the disk's `sectors` hold what they may not."""
        pairs = enumerate(zip(sectors, self.admissible, strict=False))
        return [index for index, (value, admissible) in pairs if value not in admissible]

    def _submitted(self, change: Change) -> None:
        if change.size is not None:
            self._size_register.append((change, change.size))
            self.sizes.append(change.size)
        while len(self._registers) < change.first + len(change.values):
            self._registers.append(_Register([(None, ZERO)]))
            self.admissible.append(frozenset((ZERO,)))
            self.ever.append({ZERO})
        for index, value in enumerate(change.values, change.first):
            fingerprint = hash(value)
            self._registers[index].history.append((change, fingerprint))
            self.admissible[index] |= {fingerprint}
            self.ever[index].add(fingerprint)

    def _settle(self, changes: list[Change]) -> None:
        """These are durable: nothing older than them may come back."""
        if changes:
            self.epoch += 1
        self._not_durable = [change for change in self._not_durable if change not in changes]
        for change in changes:
            for index in range(change.first, change.first + len(change.values)):
                self._raise_floor(index, change)
            if change.size is not None:
                newest = max(n for n, (owner, _) in enumerate(self._size_register) if owner in (change, None))
                del self._size_register[:newest]
                self.sizes = [size for _, size in self._size_register]

    def _raise_floor(self, index: int, change: Change) -> None:
        register = self._registers[index]
        position = next((n for n, (owner, _) in enumerate(register.history) if owner is change), 0)
        if position > register.floor:
            register.floor = position
            self.admissible[index] = register.admissible()
