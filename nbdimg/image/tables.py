"""Resident metadata: slices of on-disk tables, a bounded number of them, and which of them wait to be written.

absent ──load──▶ clean ──changed──▶ dirty ──capture──▶ writing ──written──▶ clean ──evicted──▶ absent
                                      ▲                   │
                                      └─────changed───────┘   both at once: in this plan, and again in the next

(C1) Only clean slices that nobody has pinned are evicted: what a reload would read is what memory had.
(C2) A slice is loaded once, however many ask for it at the same time.
(C3) A slice that was captured stays `writing` until its plan is durable; if the plan fails, the next capture
     holds it again.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from nbdimg.storage.file import BlockFile
from nbdimg.storage.ordering import Write

DIRTY_MAX = 1024
"""Slices that wait to be written before a flush is made for them: capturing so many takes the loop 5 to 10 ms, in which
the clients of all other images wait.
"""


class Slice:
    """`entries` of a table from file offset `offset` on."""

    __slots__ = ("entries", "is_dirty", "is_writing", "key", "offset", "pin_count", "seen_count", "use_count")

    def __init__(self, key: int, offset: int, entries: array[int]) -> None:
        self.key = key
        self.offset = offset
        self.entries = entries
        self.use_count = 0
        """Look-ups that found what they asked for here; from -1 on where one had to wait for it, and is made again."""
        self.seen_count = -2
        """What that was when eviction last came by: a slice that is new then counts as used."""
        self.is_dirty = False
        self.is_writing = False
        self.pin_count = 0

    @property
    def hit_count(self) -> int:
        """Look-ups that did not have to wait."""
        return max(0, self.use_count)


class TableCache:
    """Args:
    file: where the tables lie.
    slices_max: how many slices may be resident; dirty and pinned ones are kept beyond it.
    fetch: reads the slices that a miss of `key` calls for and gives them to `add`.
    encode: an array's bytes on disk.
    """

    def __init__(
        self,
        file: BlockFile,
        slices_max: int,
        fetch: Callable[[int], Awaitable[None]],
        encode: Callable[[array[int]], bytes],
    ) -> None:
        self.slices: dict[int, Slice] = {}
        """By key; for look-ups on the request path, which add to `use_count` themselves."""
        self._order: OrderedDict[int, None] = OrderedDict()
        """Keys of `slices` in the order in which eviction comes by; a plain dict finds its first item the slower the
        more were taken from before it."""
        self._file = file
        self._slices_max = slices_max
        self._fetch = fetch
        self._encode = encode
        self._dirty: dict[int, Slice] = {}
        self._writing: list[Slice] = []
        self._loading: dict[int, asyncio.Future[None]] = {}
        self.written_count = 0
        """Plans that have become durable: what was read from disk before the last of them may be old."""
        self.load_count = 0
        """Look-ups that had to read from disk; who waits for a load that is under way is not counted again."""
        self._gone_hit_count = 0

    @property
    def hit_count(self) -> int:
        """Look-ups that memory answered; it never falls."""
        return self._gone_hit_count + sum(slice_.hit_count for slice_ in self.slices.values())

    async def load(self, key: int) -> None:
        """Bring a slice in. Raises: OSError, ImageError, for everybody who waits for it."""
        while key in self._loading:
            await asyncio.wait((self._loading[key],))
        if key in self.slices:
            return
        self.load_count += 1
        loading = self._loading[key] = asyncio.get_running_loop().create_future()
        try:
            await self._fetch(key)
        finally:
            del self._loading[key]
            loading.set_result(None)

    def add(self, key: int, offset: int, entries: array[int]) -> Slice:
        """Make a slice resident; one that is resident already stays, for it may have changed since. The new one is
        never what makes room: whoever asked for it would ask for ever, or change what is not resident.
        """
        found = self.slices.get(key)
        if found is not None:
            return found
        if len(self.slices) >= self._slices_max:
            self._evict()
        added = self.slices[key] = Slice(key, offset, entries)
        if key in self._loading:
            added.use_count = -1
        self._order[key] = None
        return added

    def _evict(self) -> None:
        """Drop the first slice that was not used since it was last looked at here."""
        for _ in range(2 * len(self.slices)):
            key = next(iter(self._order))
            oldest = self.slices[key]
            is_used = oldest.use_count != oldest.seen_count
            if not (is_used or oldest.is_dirty or oldest.is_writing or oldest.pin_count):
                self._gone_hit_count += oldest.hit_count
                del self.slices[key], self._order[key]
                return
            oldest.seen_count = oldest.use_count
            self._order.move_to_end(key)

    def changed(self, slice_: Slice) -> None:
        """Its entries have; the next plan writes it."""
        if not slice_.is_dirty:
            slice_.is_dirty = True
            self._dirty[slice_.key] = slice_

    @property
    def is_dirty(self) -> bool:
        return bool(self._dirty or self._writing)

    @property
    def is_strained(self) -> bool:
        """Whether half of the room is taken by what waits to be written, or the next flush would take long: what one
        under way writes is no part of that.
        """
        dirty_count = len(self._dirty)
        return 2 * (dirty_count + len(self._writing)) > self._slices_max or dirty_count > DIRTY_MAX

    def capture(self) -> list[Write]:
        """The writes that make everything durable that has changed; `written` follows when they are."""
        waiting = {slice_.key: slice_ for slice_ in self._writing} | self._dirty
        self._dirty = {}
        self._writing = list(waiting.values())
        for slice_ in self._writing:
            slice_.is_dirty, slice_.is_writing = False, True
        return [Write(self._file, slice_.offset, self._encode(slice_.entries)) for slice_ in self._writing]

    def written(self) -> None:
        """What `capture` gave is durable."""
        self.written_count += 1
        for slice_ in self._writing:
            slice_.is_writing = False
        self._writing = []

    def forget(self) -> None:
        """The file is closed: give the memory back now, not when the garbage collector finds the cycles around it."""
        self.slices.clear()
        self._order.clear()
        self._dirty.clear()
        self._writing.clear()

    def succeed(self, former: TableCache) -> None:
        """Go on counting for `former`, which has no place in the file any more, and is forgotten."""
        self._gone_hit_count += former.hit_count
        self.load_count += former.load_count
        former.forget()

    def drop(self, key: int) -> None:
        """Forget a slice whose table is gone, changed or not."""
        dropped = self.slices.pop(key, None)
        if dropped is not None:
            del self._order[key]
            self._gone_hit_count += dropped.hit_count
            self._dirty.pop(key, None)
            self._writing = [slice_ for slice_ in self._writing if slice_ is not dropped]
