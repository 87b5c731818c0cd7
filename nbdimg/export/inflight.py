"""The overlap queue: which requests of an export must wait for which.

One per export, shared by all its connections. An entry is a byte range, shared (a read) or exclusive (anything that
changes data or mapping). Plain bookkeeping: nothing here suspends, waiting is a callback.

    (I1) An entry waits only for entries older than itself: no cycle, so no deadlock.
    (I2) Two running entries overlap only if both are shared.
    (I3) An entry's range never changes after it entered.
    (I4) A request that completes at once never enters; it first asks `conflicts`.

Ranges are looked up by granule, so that a check costs the same with one entry in flight or four thousand; an entry
that spans many granules stands in a list of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

GRANULE_BITS = 20
"""Bucket size 1 MiB: larger than most requests, so that most entries stand in one bucket."""

WIDE_GRANULES = 64
"""Entries over more buckets than this (64 MiB: trims and zeroes of whole devices) are kept aside."""


class Entry:
    """One request in the queue: bytes `start` to `stop`, running when `is_ready`."""

    __slots__ = ("_blocked", "_waits_for", "is_exclusive", "on_ready", "start", "stop")

    def __init__(self, start: int, stop: int, *, is_exclusive: bool) -> None:
        self.start = start
        self.stop = stop
        self.is_exclusive = is_exclusive
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
        first, last = start >> GRANULE_BITS, (stop - 1) >> GRANULE_BITS
        pools = [self._wide] if self._wide else []
        if last - first > len(self._buckets):
            pools.extend(self._buckets.values())
        else:
            pools.extend(self._buckets[index] for index in range(first, last + 1) if index in self._buckets)
        for pool in pools:
            for entry in pool:
                if entry.start < stop and start < entry.stop and (is_exclusive or entry.is_exclusive):
                    yield entry

    def _pools(self, entry: Entry) -> Iterator[dict[Entry, None]]:
        first, last = entry.start >> GRANULE_BITS, (entry.stop - 1) >> GRANULE_BITS
        if last - first >= WIDE_GRANULES:
            yield self._wide
            return
        for index in range(first, last + 1):
            yield self._buckets.setdefault(index, {})

    def enter(self, start: int, stop: int, *, is_exclusive: bool) -> Entry:
        """Join behind every older entry in the way; `leave` must follow. The range is not empty."""
        assert start < stop
        entry = Entry(start, stop, is_exclusive=is_exclusive)
        for older in set(self._conflicting(start, stop, is_exclusive)):
            older._blocked.append(entry)
            entry._waits_for += 1
        for pool in self._pools(entry):
            pool[entry] = None
        self.count += 1
        self.exclusive_count += is_exclusive
        return entry

    def leave(self, entry: Entry) -> None:
        """The request is done: whoever waited for it alone becomes ready, in order of arrival."""
        assert entry.is_ready
        first, last = entry.start >> GRANULE_BITS, (entry.stop - 1) >> GRANULE_BITS
        for pool in self._pools(entry):
            del pool[entry]
        for index in range(first, min(last, first + WIDE_GRANULES) + 1):
            if not self._buckets.get(index, True):
                del self._buckets[index]
        self.count -= 1
        self.exclusive_count -= entry.is_exclusive
        for blocked in entry._blocked:
            blocked._waits_for -= 1
            if blocked.is_ready and blocked.on_ready is not None:
                blocked.on_ready()
