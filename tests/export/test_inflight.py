"""The overlap queue (I1 to I4) against a list that knows every entry."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import pytest

from nbdimg.export import inflight
from nbdimg.export.inflight import CROWD_MAX, GRANULE_BITS, READERS_MAX, WIDE_GRANULES, Entry, InFlight

GRANULE = 1 << GRANULE_BITS
WIDE = WIDE_GRANULES * GRANULE


@dataclass(eq=False)
class Reference:
    """One entry of the brute-force queue: it waits for every older entry in the way that has not left."""

    number: int
    start: int
    stop: int
    is_exclusive: bool
    entry: Entry
    waits_for: set[int] = field(default_factory=set)

    def meets(self, start: int, stop: int, is_exclusive: bool) -> bool:
        return self.start < stop and start < self.stop and (self.is_exclusive or is_exclusive)


class Model:
    """Drives an InFlight and the reference together, and compares them after every step."""

    def __init__(self) -> None:
        self.queue = InFlight()
        self.entries: list[Reference] = []
        self.number = 0
        self.woken: list[int] = []

    def conflicts(self, start: int, stop: int, is_exclusive: bool) -> bool:
        return any(old.meets(start, stop, is_exclusive) for old in self.entries)

    def enter(self, start: int, stop: int, is_exclusive: bool) -> Reference:
        in_the_way = {old.number for old in self.entries if old.meets(start, stop, is_exclusive)}
        assert self.queue.conflicts(start, stop, is_exclusive=is_exclusive) == bool(in_the_way)
        entry = self.queue.enter(start, stop, is_exclusive=is_exclusive)
        number = self.number
        self.number += 1
        entry.on_ready = lambda: self.woken.append(number)
        added = Reference(number, start, stop, is_exclusive, entry, in_the_way)
        self.entries.append(added)
        self.check()
        return added

    def leave(self, leaving: Reference) -> list[int]:
        """Returns the numbers of the entries that became ready, in the order in which they were told."""
        self.woken = []
        self.entries.remove(leaving)
        ready = []
        for other in self.entries:
            if leaving.number in other.waits_for:
                other.waits_for.discard(leaving.number)
                if not other.waits_for:
                    ready.append(other.number)
        self.queue.leave(leaving.entry)
        assert self.woken == ready
        self.check()
        return ready

    def check(self) -> None:
        assert self.queue.count == len(self.entries)
        assert self.queue.exclusive_count == sum(each.is_exclusive for each in self.entries)
        running = [entry for entry in self.entries if entry.entry.is_ready]
        for reference in self.entries:
            assert reference.entry.is_ready == (not reference.waits_for)
            assert all(number < reference.number for number in reference.waits_for), "I1"
            assert (reference.entry.start, reference.entry.stop) == (reference.start, reference.stop), "I3"
        for index, one in enumerate(running):
            for other in running[:index]:
                assert not one.meets(other.start, other.stop, other.is_exclusive), "I2"


def assert_empty(queue: InFlight) -> None:
    assert queue.count == 0
    for shelf in (queue._exclusive, queue._shared):
        assert shelf.buckets == {}
        assert shelf.wide == {}


def random_range(generator: random.Random) -> tuple[int, int]:
    """Small ranges, ranges over granule edges, wide ones; crowded, so that many overlap."""
    kind = generator.randrange(10)
    if kind < 6:
        start = generator.randrange(64) * 512
        return start, start + generator.randint(1, 8) * 512
    if kind < 8:
        start = generator.randint(0, 3) * GRANULE + generator.randint(-2, 2) * 512
        start = max(0, start)
        return start, start + generator.randint(1, 4) * GRANULE // 2
    if kind == 8:
        start = generator.randrange(2 * WIDE)
        return start, start + generator.randint(WIDE - GRANULE, WIDE + 2 * GRANULE)
    return 0, 1 << generator.choice([30, 40, 63, 64])


@pytest.mark.parametrize("seed", range(60))
def test_random_enter_and_leave_agree_with_the_reference(seed: int) -> None:
    generator = random.Random(seed)
    model = Model()
    for _ in range(200):
        ready = [entry for entry in model.entries if entry.entry.is_ready]
        if ready and (generator.random() < 0.45 or len(model.entries) > 40):
            model.leave(generator.choice(ready))
        else:
            start, stop = random_range(generator)
            model.enter(start, stop, generator.random() < 0.5)
        start, stop = random_range(generator)
        for is_exclusive in (False, True):
            found = model.queue.conflicts(start, stop, is_exclusive=is_exclusive)
            assert found == model.conflicts(start, stop, is_exclusive), f"seed {seed}"
    while model.entries:
        model.leave(generator.choice([entry for entry in model.entries if entry.entry.is_ready]))
    assert_empty(model.queue)


def test_reference_catches_a_queue_that_forgets_wide_entries() -> None:
    """The control of the test above."""

    class Forgetful(InFlight):
        def _conflicting(self, start: int, stop: int, is_exclusive: bool) -> object:  # type: ignore[override]
            wide = self._exclusive.wide
            return (entry for entry in super()._conflicting(start, stop, is_exclusive) if entry not in wide)

    model = Model()
    model.queue = Forgetful()
    model.enter(0, 2 * WIDE, True)
    with pytest.raises(AssertionError):
        model.enter(0, 512, True)


def test_shared_entries_on_one_range_run_together() -> None:
    model = Model()
    entries = [model.enter(0, 4096, False) for _ in range(5)]
    assert all(entry.entry.is_ready for entry in entries)


def test_exclusive_entry_waits_for_all_shared_and_blocks_later_ones() -> None:
    model = Model()
    readers = [model.enter(0, 4096, False) for _ in range(2)]
    writer = model.enter(1000, 1001, True)
    late = model.enter(0, 4096, False)
    assert not writer.entry.is_ready
    assert not late.entry.is_ready
    assert model.leave(readers[0]) == []
    assert model.leave(readers[1]) == [writer.number]
    assert model.leave(writer) == [late.number]


def test_entries_that_only_touch_do_not_meet() -> None:
    model = Model()
    model.enter(0, 512, True)
    assert model.enter(512, 1024, True).entry.is_ready
    assert model.enter(GRANULE - 512, GRANULE, True).entry.is_ready
    assert model.enter(GRANULE, GRANULE + 512, True).entry.is_ready


def test_waiters_become_ready_in_order_of_arrival() -> None:
    model = Model()
    first = model.enter(0, 100 * 512, True)
    waiters = [model.enter(n * 512, (n + 1) * 512, True) for n in (7, 3, 99, 0, 50)]
    assert model.leave(first) == [waiter.number for waiter in waiters]


def test_chain_of_exclusive_entries_runs_one_by_one_in_order_of_arrival() -> None:
    model = Model()
    chain = [model.enter(0, 512, True) for _ in range(10)]
    for current, following in itertools.pairwise(chain):
        assert model.leave(current) == [following.number]


def test_entry_over_many_granules_waits_once_for_an_entry_that_it_meets_in_several() -> None:
    model = Model()
    first = model.enter(0, 5 * GRANULE, True)
    second = model.enter(GRANULE, 4 * GRANULE, True)
    assert model.leave(first) == [second.number]


@pytest.mark.parametrize("granules", [WIDE_GRANULES - 1, WIDE_GRANULES, WIDE_GRANULES + 1])
@pytest.mark.parametrize("start", [0, 1, GRANULE - 1])
def test_wide_entry_meets_small_ones_at_both_ends_and_not_beyond(granules: int, start: int) -> None:
    model = Model()
    stop = start + granules * GRANULE
    wide = model.enter(start, stop, True)
    for at in (start, (start + stop) // 2, stop - 1):
        assert model.queue.conflicts(at, at + 1, is_exclusive=False)
    assert not model.queue.conflicts(stop, stop + 1, is_exclusive=True)
    if start:
        assert not model.queue.conflicts(start - 1, start, is_exclusive=True)
    small = model.enter(stop - 1, stop, True)
    assert model.leave(wide) == [small.number]
    model.leave(small)
    assert_empty(model.queue)


def test_wide_entry_leaves_no_bucket_of_its_neighbours_behind() -> None:
    model = Model()
    small = model.enter(3 * GRANULE, 3 * GRANULE + 1, False)
    wide = model.enter(0, 2 * WIDE, False)
    model.leave(wide)
    assert model.queue.conflicts(3 * GRANULE, 3 * GRANULE + 1, is_exclusive=True)
    model.leave(small)
    assert_empty(model.queue)


def test_wide_entry_behind_a_crowd_leaves_no_bucket_of_the_crowd_behind() -> None:
    queue = InFlight()
    entries = [queue.enter(0, 512, is_exclusive=False) for _ in range(CROWD_MAX)]
    entries.append(queue.enter(0, 2 * WIDE, is_exclusive=True))
    assert entries[-1].is_wall
    for entry in entries:
        queue.leave(entry)
    assert_empty(queue)


def test_conflicts_of_an_empty_queue_is_false_for_any_range() -> None:
    assert not InFlight().conflicts(0, 1 << 64, is_exclusive=True)


def test_conflicts_leaves_no_trace() -> None:
    """I4: who completes at once never enters."""
    queue = InFlight()
    entry = queue.enter(0, 512, is_exclusive=True)
    buckets = dict(queue._exclusive.buckets)
    queue.conflicts(0, 10 * GRANULE, is_exclusive=True)
    queue.conflicts(0, 2 * WIDE, is_exclusive=True)
    assert queue._exclusive.buckets == buckets
    assert queue._shared.buckets == {}
    queue.leave(entry)
    assert_empty(queue)


def test_entry_without_callback_becomes_ready_silently() -> None:
    queue = InFlight()
    first = queue.enter(0, 512, is_exclusive=True)
    second = queue.enter(0, 512, is_exclusive=True)
    queue.leave(first)
    assert second.is_ready
    queue.leave(second)


def test_thousands_of_entries_leave_nothing() -> None:
    generator = random.Random(1)
    queue = InFlight()
    entries = [queue.enter(n * 4096, (n + 1) * 4096, is_exclusive=True) for n in range(4096)]
    generator.shuffle(entries)
    for entry in entries:
        queue.leave(entry)
    assert_empty(queue)


@pytest.mark.parametrize("seed", range(40))
def test_nobody_in_a_crowd_runs_too_early_or_never(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """With walls an entry may wait for longer than it must, so the reference is held against one side alone."""
    monkeypatch.setattr(inflight, "CROWD_MAX", 5)
    monkeypatch.setattr(inflight, "READERS_MAX", 5 + seed % 2 * 10)
    generator = random.Random(seed)
    queue, entries, wall_count = InFlight(), list[Entry](), 0
    for step in range(400):
        ready = [entry for entry in entries if entry.is_ready]
        assert ready or not entries, "a deadlock"
        if ready and (generator.random() < 0.4 or len(entries) > 60 or step > 300):
            queue.leave(entries.pop(entries.index(generator.choice(ready))))
        elif step <= 300:
            start, stop = random_range(generator)
            is_exclusive = generator.random() < 0.5
            in_the_way = [each for each in entries if meet(each, start, stop, is_exclusive)]
            assert not in_the_way or queue.conflicts(start, stop, is_exclusive=is_exclusive)
            entries.append(queue.enter(start, stop, is_exclusive=is_exclusive))
            wall_count += entries[-1].is_wall
        for index, entry in enumerate(entries):
            if entry.is_ready:
                older = entries[:index]
                assert not any(meet(each, entry.start, entry.stop, entry.is_exclusive) for each in older), "I2"
    assert wall_count
    assert_empty(queue)


def meet(entry: Entry, start: int, stop: int, is_exclusive: bool) -> bool:
    return entry.start < stop and start < entry.stop and (entry.is_exclusive or is_exclusive)


@pytest.mark.parametrize("length", [512, GRANULE // 2, 2 * WIDE], ids=["same sector", "staggered", "wide"])
@pytest.mark.parametrize("is_exclusive", [False, True])
def test_entries_in_one_place_wait_for_few_however_many_they_are(length: int, is_exclusive: bool) -> None:
    queue = InFlight()
    first = queue.enter(0, GRANULE, is_exclusive=True)
    step = 0 if length == 512 else 512
    entries = [queue.enter(n % 512 * step, n % 512 * step + length, is_exclusive=is_exclusive) for n in range(4096)]
    assert max(entry._waits_for for entry in entries) <= (CROWD_MAX if is_exclusive else READERS_MAX)
    for entry in (first, *entries):
        queue.leave(entry)
    assert_empty(queue)


@pytest.mark.parametrize("length", [512, 2 * WIDE], ids=["small", "wide"])
def test_reads_wait_for_no_crowd_of_reads_however_slow_one_of_them_is(length: int) -> None:
    """A BLOCK_STATUS of the whole disk is held against all that others read, and would hold up whoever comes then."""
    queue = InFlight()
    for number in range(4 * CROWD_MAX):
        queue.enter(number % 8 * GRANULE, number % 8 * GRANULE + length, is_exclusive=False)
    late = queue.enter(0, 2 * WIDE, is_exclusive=False)
    assert late.is_ready
    assert not late.is_wall
    assert not queue.conflicts(0, length, is_exclusive=False)
    assert queue.conflicts(0, length, is_exclusive=True)


def test_a_crowd_elsewhere_is_nobodys_business() -> None:
    queue = InFlight()
    for _ in range(2 * CROWD_MAX):
        queue.enter(0, 512, is_exclusive=True)
    assert not queue.conflicts(GRANULE, 2 * GRANULE, is_exclusive=True)
    assert not queue.conflicts(GRANULE, 2 * WIDE, is_exclusive=True)
