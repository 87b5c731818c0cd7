"""TableCache: what is resident, what waits to be written (C1 to C3)."""

from __future__ import annotations

import asyncio
import errno
import time
from array import array

import pytest

from nbdimg.image.tables import DIRTY_MAX, Slice, TableCache
from nbdimg.storage.memory import MemoryFile
from nbdimg.storage.ordering import Write


class Tables:
    """Slices of two entries, 2 bytes each on disk; a load waits until the test lets it."""

    def __init__(self, slices_max: int = 4) -> None:
        self.file = MemoryFile(bytes(range(64)))
        self.loads: list[int] = []
        self.gate: asyncio.Event | None = None
        self.failure: OSError | None = None
        self.cache = TableCache(self.file, slices_max, self.fetch, lambda entries: bytes(entries))

    async def fetch(self, key: int) -> None:
        self.loads.append(key)
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.cache.add(key, 2 * key, array("B", self.file.content[2 * key : 2 * key + 2]))

    def load(self, *keys: int) -> None:
        for key in keys:
            asyncio.run(self.cache.load(key))

    def change(self, key: int, value: int) -> Slice:
        found = self.cache.slices[key]
        found.entries[0] = value
        self.cache.changed(found)
        return found


def test_load_brings_a_slice_in_once() -> None:
    tables = Tables()
    tables.load(3, 3)
    assert tables.loads == [3]
    assert list(tables.cache.slices[3].entries) == [6, 7]


def test_load_asked_by_many_at_once_reads_once() -> None:
    """C2."""
    tables = Tables()

    async def main() -> None:
        tables.gate = asyncio.Event()
        waiting = [asyncio.create_task(tables.cache.load(3)) for _ in range(5)]
        await asyncio.sleep(0)
        tables.gate.set()
        await asyncio.gather(*waiting)

    asyncio.run(main())
    assert tables.loads == [3]


def test_load_that_fails_is_tried_again_by_the_next_that_waits() -> None:
    tables = Tables()

    async def main() -> list[object]:
        tables.gate = asyncio.Event()
        tables.failure = OSError(errno.EIO, "Input/output error")
        waiting = [asyncio.create_task(tables.cache.load(3)) for _ in range(2)]
        await asyncio.sleep(0)
        tables.gate.set()
        found: list[object] = list(await asyncio.gather(*waiting, return_exceptions=True))
        tables.failure = None
        await tables.cache.load(3)
        return found

    assert [type(each) for each in asyncio.run(main())] == [OSError, OSError]
    assert 3 in tables.cache.slices


def test_add_of_a_resident_slice_keeps_what_has_changed() -> None:
    tables = Tables()
    tables.load(3)
    changed = tables.change(3, 99)
    assert tables.cache.add(3, 6, array("B", [6, 7])) is changed
    assert list(tables.cache.slices[3].entries) == [99, 7]


def test_clean_slices_beyond_the_limit_are_evicted_the_unused_first() -> None:
    tables = Tables(slices_max=2)
    tables.load(0, 1)
    tables.cache.slices[0].seen_count = tables.cache.slices[0].use_count
    tables.load(2)
    assert set(tables.cache.slices) == {1, 2}


@pytest.mark.parametrize("state", ["dirty", "writing", "pinned"])
def test_slice_that_is_needed_is_never_evicted(state: str) -> None:
    """C1."""
    tables = Tables(slices_max=2)
    tables.load(0)
    kept = tables.cache.slices[0]
    if state == "pinned":
        kept.pin_count = 1
    else:
        tables.change(0, 99)
        if state == "writing":
            tables.cache.capture()
    tables.load(*range(1, 12))
    assert tables.cache.slices[0] is kept
    assert len(tables.cache.slices) <= 3


def test_all_needed_slices_stay_beyond_the_limit() -> None:
    tables = Tables(slices_max=2)
    for key in range(6):
        tables.load(key)
        tables.change(key, 90 + key)
    assert set(tables.cache.slices) == set(range(6))


def test_eviction_that_finds_every_slice_used_is_no_standstill() -> None:
    """One look at each of 16384 takes 2 ms; looking for the first behind all that had been moved took 40 to 90."""
    tables = Tables(slices_max=16384)

    def of_one_round() -> float:
        first = max(tables.cache.slices, default=-1) + 1
        for key in range(first, first + 16384):
            tables.cache.add(key, 0, array("B", [0, 0]))
        for slice_ in tables.cache.slices.values():
            slice_.use_count += 1
        started = time.thread_time()
        tables.cache.add(first + 16384, 0, array("B", [0, 0]))
        return time.thread_time() - started

    assert sum(of_one_round() for _ in range(4)) < 0.08


def test_hits_are_look_ups_that_did_not_wait_and_never_fall() -> None:
    tables = Tables(slices_max=1)

    def look_up(key: int, count: int) -> None:
        tables.cache.slices[key].use_count += count

    tables.load(0)
    look_up(0, 6)
    assert tables.cache.hit_count == 5
    tables.failure = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Input/output"):
        tables.load(1)
    tables.failure = None
    tables.load(1)
    assert tables.cache.hit_count == 5, "the look-up that waited for it is still to be made again"
    look_up(1, 3)
    assert tables.cache.hit_count == 7
    tables.load(2, 3)
    tables.cache.drop(3)
    assert (tables.cache.hit_count, tables.cache.load_count) == (7, 5)


def test_capture_holds_what_changed_and_written_makes_it_clean() -> None:
    tables = Tables()
    tables.load(0, 3)
    assert not tables.cache.is_dirty
    assert tables.cache.capture() == []
    tables.change(3, 99)
    tables.change(3, 98)
    assert tables.cache.is_dirty
    assert tables.cache.capture() == [Write(tables.file, 6, b"\x62\x07")]
    assert tables.cache.is_dirty, "it is not durable yet"
    tables.cache.written()
    assert not tables.cache.is_dirty
    assert tables.cache.capture() == []


def test_slice_that_was_written_makes_room_again() -> None:
    tables = Tables(slices_max=2)
    tables.load(0)
    tables.change(0, 99)
    tables.cache.capture()
    tables.cache.written()
    tables.load(*range(1, 12))
    assert 0 not in tables.cache.slices
    assert len(tables.cache.slices) == 2


def test_change_while_a_plan_runs_is_in_the_next_one() -> None:
    tables = Tables()
    tables.load(3)
    tables.change(3, 99)
    first = tables.cache.capture()
    tables.change(3, 55)
    assert first == [Write(tables.file, 6, b"\x63\x07")], "a plan holds bytes"
    tables.cache.written()
    assert tables.cache.is_dirty
    assert tables.cache.capture() == [Write(tables.file, 6, b"\x37\x07")]


def test_plan_that_failed_is_held_again_with_what_changed_since() -> None:
    """C3."""
    tables = Tables()
    tables.load(1, 3)
    tables.change(3, 99)
    tables.cache.capture()
    tables.change(1, 44)
    again = tables.cache.capture()
    assert sorted(again, key=lambda each: each.offset) == [
        Write(tables.file, 2, b"\x2c\x03"),
        Write(tables.file, 6, b"\x63\x07"),
    ]


def test_is_strained_when_half_of_the_room_waits() -> None:
    tables = Tables(slices_max=4)
    tables.load(0, 1, 2)
    tables.change(0, 1)
    tables.change(1, 1)
    assert not tables.cache.is_strained
    tables.cache.capture()
    assert not tables.cache.is_strained
    tables.change(2, 1)
    assert tables.cache.is_strained


def test_is_strained_when_a_flush_would_take_long_however_much_room_there_is() -> None:
    cache = TableCache(MemoryFile(b""), 16 * DIRTY_MAX, fetch_nothing, array.tobytes)
    for key in range(DIRTY_MAX + 1):
        assert not cache.is_strained
        cache.changed(cache.add(key, 4096 * key, array("B", b"\0")))
    assert cache.is_strained
    cache.capture()
    assert not cache.is_strained, "another flush would find nothing to write"
    for key in range(DIRTY_MAX + 1):
        assert not cache.is_strained
        cache.changed(cache.slices[key])
    assert cache.is_strained


async def fetch_nothing(key: int) -> None:
    raise AssertionError(key)


def test_drop_forgets_a_slice_changed_or_under_way() -> None:
    tables = Tables()
    tables.load(1, 3)
    tables.change(1, 44)
    tables.cache.capture()
    tables.change(3, 99)
    for key in (1, 3, 17):
        tables.cache.drop(key)
    assert tables.cache.slices == {}
    assert not tables.cache.is_dirty
    assert tables.cache.capture() == []


def test_drop_leaves_the_others_that_are_under_way_to_the_next_plan() -> None:
    """C3."""
    tables = Tables()
    tables.load(1, 3)
    tables.change(1, 44)
    tables.change(3, 99)
    tables.cache.capture()
    tables.cache.drop(1)
    assert tables.cache.capture() == [Write(tables.file, 6, b"\x63\x07")]


def test_drop_leaves_nothing_for_an_eviction_to_stumble_over() -> None:
    tables = Tables(slices_max=3)
    tables.load(0, 1, 2)
    tables.cache.drop(0)
    tables.load(*range(3, 12))
    assert len(tables.cache.slices) == 3


def test_forget_keeps_no_slice() -> None:
    tables = Tables()
    tables.load(0, 1, 2)
    tables.change(0, 99)
    tables.cache.capture()
    tables.change(1, 44)
    tables.cache.forget()
    assert tables.cache.slices == {}
    assert not tables.cache.is_dirty
