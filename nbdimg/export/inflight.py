"""The overlap queue: which requests of an export must wait for which.

One per export, shared by all its connections. An entry is a byte range, shared (a read) or exclusive (anything that
changes data or mapping). Plain bookkeeping: nothing here suspends, waiting is a callback.

    (I1) An entry waits only for entries older than itself: no cycle, so no deadlock.
    (I2) Two running entries overlap only if both are shared.
    (I3) An entry's range never changes after it entered.
    (I4) A request that completes at once never enters; it first asks `conflicts`.

Ranges are looked up by granule, so that a check costs the same with one entry in flight or four thousand; an entry
that spans many granules stands in a list of its own.

Where thousands stand in one place, the next would be held against each, and each would know of all behind it. So an
entry that finds a crowd becomes a *wall*: it waits for all of the crowd, overlapping or not, whoever comes behind it
there waits for the wall, and the crowd need not be looked at again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

GRANULE_BITS = 20
"""Bucket size 1 MiB: larger than most requests, so that most entries stand in one bucket."""

WIDE_GRANULES = 64
"""Entries over more buckets than this (64 MiB: trims and zeroes of whole devices) are kept aside."""

CROWD_MAX = 256
"""Entries in one place beyond which the next is a wall. Two clients with all their requests in one MiB make none, and
behind so many a request would wait for a worker anyway; to look at them takes some 30 µs."""


class Entry:
    """One request in the queue: bytes `start` to `stop`, running when `is_ready`."""

    __slots__ = ("_blocked", "_waits_for", "is_exclusive", "is_wall", "on_ready", "start", "stop")

    def __init__(self, start: int, stop: int, *, is_exclusive: bool) -> None:
        self.start = start
        self.stop = stop
        self.is_exclusive = is_exclusive
        self.is_wall = False
        self.on_ready: Callable[[], None] | None = None
        self._waits_for = 0
        self._blocked: list[Entry] = []

    @property
    def is_ready(self) -> bool:
        return self._waits_for == 0


class InFlight:
    """The requests of one export that have entered and not left, in order of arrival."""

    def __init__(self) -> None:
        self.count = 0
        self.exclusive_count = 0
        """Of those, the ones that are exclusive."""
        self._buckets: dict[int, dict[Entry, None]] = {}
        self._wide: dict[Entry, None] = {}

    def conflicts(self, start: int, stop: int, *, is_exclusive: bool) -> bool:
        """Whether a request on this range would have to wait."""
        if not self.count:
            return False
        return any(True for _ in self._conflicting(start, stop, is_exclusive))

    def _conflicting(self, start: int, stop: int, is_exclusive: bool) -> Iterator[Entry]:
        """Entries in the way; one that spans buckets may come more than once."""
        for entry in chain(self._wide, *self._buckets_of(start, stop)):
            if entry.is_wall or (entry.start < stop and start < entry.stop and (is_exclusive or entry.is_exclusive)):
                yield entry

    def _buckets_of(self, start: int, stop: int) -> Iterator[dict[Entry, None]]:
        first, last = start >> GRANULE_BITS, (stop - 1) >> GRANULE_BITS
        buckets = self._buckets
        if last - first > len(buckets):
            return (bucket for index, bucket in buckets.items() if first <= index <= last)
        return (buckets[index] for index in range(first, last + 1) if index in buckets)

    def _pools(self, entry: Entry) -> Iterator[dict[Entry, None]]:
        if _is_wide(entry):
            yield self._wide
            return
        for index in range(entry.start >> GRANULE_BITS, ((entry.stop - 1) >> GRANULE_BITS) + 1):
            yield self._buckets.setdefault(index, {})

    def enter(self, start: int, stop: int, *, is_exclusive: bool) -> Entry:
        """Join behind every older entry in the way; `leave` must follow. The range is not empty."""
        assert start < stop
        entry = Entry(start, stop, is_exclusive=is_exclusive)
        in_the_way = set(self._conflicting(start, stop, is_exclusive))
        in_the_way |= self._walled_off(entry)
        for older in in_the_way:
            older._blocked.append(entry)
            entry._waits_for += 1
        for pool in self._pools(entry):
            pool[entry] = None
        self.count += 1
        self.exclusive_count += is_exclusive
        return entry

    def _walled_off(self, entry: Entry) -> set[Entry]:
        """The crowd for which `entry` stands from now on, if there is one where it belongs."""
        pools = list(self._buckets_of(entry.start, entry.stop))
        if _is_wide(entry):
            pools.append(self._wide)
        if sum(map(len, pools)) < CROWD_MAX:
            return set()
        entry.is_wall = True
        crowd = set(chain(*pools))
        for pool in pools:
            pool.clear()
        self._buckets = {index: bucket for index, bucket in self._buckets.items() if bucket}
        return crowd

    def leave(self, entry: Entry) -> None:
        """The request is done: whoever waited for it alone becomes ready, in order of arrival."""
        assert entry.is_ready
        first, last = entry.start >> GRANULE_BITS, (entry.stop - 1) >> GRANULE_BITS
        for pool in self._pools(entry):
            pool.pop(entry, None)
        for index in range(first, min(last, first + WIDE_GRANULES) + 1):
            if not self._buckets.get(index, True):
                del self._buckets[index]
        self.count -= 1
        self.exclusive_count -= entry.is_exclusive
        for blocked in entry._blocked:
            blocked._waits_for -= 1
            if blocked.is_ready and blocked.on_ready is not None:
                blocked.on_ready()


def _is_wide(entry: Entry) -> bool:
    return ((entry.stop - 1) >> GRANULE_BITS) - (entry.start >> GRANULE_BITS) >= WIDE_GRANULES
