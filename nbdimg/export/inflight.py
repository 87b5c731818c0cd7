"""The overlap queue: which requests of an export must wait for which.

One per export, shared by all its connections. An entry is a byte range, shared (a read) or exclusive (anything that
changes data or mapping). Plain bookkeeping: nothing here suspends, waiting is a callback.

    (I1) An entry waits only for entries older than itself: no cycle, so no deadlock.
    (I2) Two running entries overlap only if both are shared.
    (I3) An entry's range never changes after it entered.
    (I4) A request that completes at once never enters; it first asks `conflicts`.

Ranges are looked up by granule, so that a check costs the same with one entry in flight or four thousand; an entry
that spans many granules stands in a list of its own. A shared one is looked up among the exclusive alone.

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

READERS_MAX = 4096
"""The same for a shared one where hardly any are exclusive: it need not wait for those, and one that is slow would hold
up all behind the wall. To look at them, as each write there does, takes some 0.1 ms."""


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


class _Shelf:
    """Entries by where they are."""

    __slots__ = ("buckets", "wide")

    def __init__(self) -> None:
        self.buckets: dict[int, dict[Entry, None]] = {}
        self.wide: dict[Entry, None] = {}

    def buckets_of(self, start: int, stop: int) -> Iterator[dict[Entry, None]]:
        first, last = start >> GRANULE_BITS, (stop - 1) >> GRANULE_BITS
        buckets = self.buckets
        if last - first > len(buckets):
            return (bucket for index, bucket in buckets.items() if first <= index <= last)
        return (buckets[index] for index in range(first, last + 1) if index in buckets)

    def pools_of(self, entry: Entry) -> Iterator[dict[Entry, None]]:
        """Where those stand that are held against what comes where `entry` belongs."""
        yield from self.buckets_of(entry.start, entry.stop)
        if _is_wide(entry):
            yield self.wide

    def put(self, entry: Entry) -> None:
        if _is_wide(entry):
            self.wide[entry] = None
            return
        for index in _granules(entry):
            self.buckets.setdefault(index, {})[entry] = None

    def take(self, entry: Entry) -> None:
        """From wherever it stands still: walls have cleared what they stand for, and left the empty bucket to us."""
        if _is_wide(entry):
            self.wide.pop(entry, None)
            return
        for index in _granules(entry):
            bucket = self.buckets.get(index)
            if bucket is not None:
                bucket.pop(entry, None)
                if not bucket:
                    del self.buckets[index]


class InFlight:
    """The requests of one export that have entered and not left, in order of arrival."""

    def __init__(self) -> None:
        self.count = 0
        self.exclusive_count = 0
        """Of those, the ones that are exclusive."""
        self._exclusive = _Shelf()
        """With the walls, also those that are shared: all look here."""
        self._shared = _Shelf()

    def conflicts(self, start: int, stop: int, *, is_exclusive: bool) -> bool:
        """Whether a request on this range would have to wait."""
        if not self.count:
            return False
        return any(True for _ in self._conflicting(start, stop, is_exclusive))

    def _conflicting(self, start: int, stop: int, is_exclusive: bool) -> Iterator[Entry]:
        """Entries in the way; one that spans buckets may come more than once."""
        for shelf in self._looked_at(is_exclusive):
            for entry in chain(shelf.wide, *shelf.buckets_of(start, stop)):
                if entry.is_wall or (entry.start < stop and start < entry.stop):
                    yield entry

    def _looked_at(self, is_exclusive: bool) -> tuple[_Shelf, ...]:
        if is_exclusive and self.count > self.exclusive_count:
            return self._exclusive, self._shared
        return (self._exclusive,)

    def enter(self, start: int, stop: int, *, is_exclusive: bool) -> Entry:
        """Join behind every older entry in the way; `leave` must follow. The range is not empty."""
        assert start < stop
        entry = Entry(start, stop, is_exclusive=is_exclusive)
        in_the_way = set(self._conflicting(start, stop, is_exclusive))
        in_the_way |= self._walled_off(entry)
        for older in in_the_way:
            older._blocked.append(entry)
            entry._waits_for += 1
        self._shelf_of(entry).put(entry)
        self.count += 1
        self.exclusive_count += is_exclusive
        return entry

    def _shelf_of(self, entry: Entry) -> _Shelf:
        return self._exclusive if entry.is_exclusive or entry.is_wall else self._shared

    def _walled_off(self, entry: Entry) -> set[Entry]:
        """The crowd for which `entry` stands from now on, if there is one where it belongs."""
        shelves = self._looked_at(is_exclusive=True)
        pools = [pool for shelf in shelves for pool in shelf.pools_of(entry)]
        count = sum(map(len, pools))
        if count < CROWD_MAX:
            return set()
        is_among_readers = not entry.is_exclusive and sum(map(len, self._exclusive.pools_of(entry))) < CROWD_MAX
        if is_among_readers and count < READERS_MAX:
            return set()
        entry.is_wall = True
        crowd = set(chain(*pools))
        for pool in pools:
            pool.clear()
        return crowd

    def leave(self, entry: Entry) -> None:
        """The request is done: whoever waited for it alone becomes ready, in order of arrival."""
        assert entry.is_ready
        self._shelf_of(entry).take(entry)
        self.count -= 1
        self.exclusive_count -= entry.is_exclusive
        for blocked in entry._blocked:
            blocked._waits_for -= 1
            if blocked.is_ready and blocked.on_ready is not None:
                blocked.on_ready()


def _granules(entry: Entry) -> range:
    return range(entry.start >> GRANULE_BITS, ((entry.stop - 1) >> GRANULE_BITS) + 1)


def _is_wide(entry: Entry) -> bool:
    return ((entry.stop - 1) >> GRANULE_BITS) - (entry.start >> GRANULE_BITS) >= WIDE_GRANULES
