"""Dirty bitmaps in memory, against a plain list of granules; and the extents that BLOCK_STATUS makes of them."""

from __future__ import annotations

import time
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdimg.export.status import dirty_pairs
from nbdimg.image.bitmap import PIECE_SIZE, DirtyBitmap
from nbdimg.units import KiB, MiB, TiB

SIZE = 100 * 512 + 100
"""A hundred and one granules of 512 bytes, the last of them short."""

ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(lambda pair: (pair[0], min(SIZE, sum(pair))))


class Model:
    """Every granule is a bool."""

    def __init__(self, granularity: int, size: int = SIZE) -> None:
        self.granularity = granularity
        self.size = size
        self.dirty = [False] * -(-size // granularity)

    def set_range(self, offset: int, stop: int) -> None:
        for index in range(offset // self.granularity, (stop - 1) // self.granularity + 1):
            self.dirty[index] = True

    def runs(self, offset: int, stop: int) -> list[tuple[int, bool]]:
        runs: list[tuple[int, bool]] = []
        while offset < stop:
            index = offset // self.granularity
            length = min(stop, (index + 1) * self.granularity) - offset
            value = self.dirty[index]
            if runs and runs[-1][1] == value:
                runs[-1] = runs[-1][0] + length, value
            else:
                runs.append((length, value))
            offset += length
        return runs

    def bits(self) -> bytes:
        content = bytearray(-(-len(self.dirty) // 8))
        for index, value in enumerate(self.dirty):
            content[index // 8] |= value << index % 8
        return bytes(content)


def test_set_range_sets_the_bits_that_the_format_has() -> None:
    """Spec: bit 0 of byte 0 is the first granule, least significant first."""
    bitmap = DirtyBitmap("b", 64 * KiB, 16 * MiB)
    bitmap.set_range(64 * KiB, 64 * KiB + 1)
    bitmap.set_range(9 * 64 * KiB - 1, 11 * 64 * KiB)
    assert bitmap.stored(0, 3) == b"\x02\x07\x00"
    assert bitmap.byte_count == 32


@settings(deadline=None)
@given(st.sampled_from([512, 1024, 4096, 65536]), st.lists(ranges, max_size=8), ranges)
def test_set_range_and_runs_agree_with_the_model(
    granularity: int, changes: list[tuple[int, int]], asked: tuple[int, int]
) -> None:
    bitmap, model = DirtyBitmap("b", granularity, SIZE), Model(granularity)
    for offset, stop in changes:
        bitmap.set_range(offset, stop)
        model.set_range(offset, stop)
    assert bitmap.stored(0, bitmap.byte_count) == model.bits()
    assert list(bitmap.runs(*asked)) == model.runs(*asked)
    assert list(bitmap.runs(asked[0], asked[0])) == []


@settings(deadline=None)
@given(st.sampled_from([512, 4096]), st.sampled_from([512, 4096]), st.lists(ranges, max_size=4), st.lists(ranges))
def test_merge_of_any_granularities_is_a_superset_rounded_out(
    into: int, source: int, changes: list[tuple[int, int]], others: list[tuple[int, int]]
) -> None:
    bitmap, other, model = DirtyBitmap("b", into, SIZE), DirtyBitmap("o", source, SIZE), Model(into)
    for offset, stop in changes:
        bitmap.set_range(offset, stop)
        model.set_range(offset, stop)
    coarse = Model(source)
    for offset, stop in others:
        other.set_range(offset, stop)
        coarse.set_range(offset, stop)
    for index, value in enumerate(coarse.dirty):
        if value:
            model.set_range(index * source, min(SIZE, (index + 1) * source))
    for _ in bitmap.merge(other):
        pass
    assert bitmap.stored(0, bitmap.byte_count) == model.bits()


@settings(deadline=None)
@given(st.lists(ranges, max_size=4), st.integers(0, 3 * SIZE))
def test_resize_keeps_what_is_left_and_is_dirty_beyond(changes: list[tuple[int, int]], size: int) -> None:
    bitmap, model = DirtyBitmap("b", 1024, SIZE), Model(1024)
    for offset, stop in changes:
        bitmap.set_range(offset, stop)
        model.set_range(offset, stop)
    bitmap.resize(size)
    count = -(-size // 1024)
    model.dirty = (model.dirty + [False] * count)[:count]
    if size > SIZE:
        model.set_range(SIZE, size)
    assert bitmap.stored(0, bitmap.byte_count) == model.bits()
    assert bitmap.size == size


def test_clear_leaves_nothing_dirty() -> None:
    bitmap = DirtyBitmap("b", 512, SIZE)
    bitmap.set_range(0, SIZE)
    bitmap.clear()
    assert list(bitmap.runs(0, SIZE)) == [(SIZE, False)]


def test_bits_behind_the_end_of_the_disk_are_not_loaded() -> None:
    bitmap = DirtyBitmap("b", 512, SIZE)
    bitmap.load(0, memoryview(b"\xff" * bitmap.byte_count))
    assert bitmap.stored(12, 13) == b"\x1f"  # 101 granules: 12 bytes and 5 bits


LARGE = 3 * 8 * PIECE_SIZE + 1003
"""Granules: three pieces of bits and a part of one."""

bit_ranges = st.tuples(
    st.sampled_from([0, 8 * PIECE_SIZE, 16 * PIECE_SIZE, 24 * PIECE_SIZE]).flatmap(
        lambda edge: st.integers(max(0, edge - 20), edge + 20)
    ),
    st.one_of(st.integers(1, 40), st.integers(1, LARGE)),
).map(lambda pair: (pair[0], min(LARGE, sum(pair))))

steps = st.lists(
    st.tuples(st.sampled_from(["set", "set", "copy", "merge", "load", "clear", "cut", "undo"]), bit_ranges)
)


@settings(deadline=None)
@given(steps)
def test_bitmap_of_several_pieces_agrees_with_a_number_that_has_its_bits(
    steps: list[tuple[str, tuple[int, int]]],
) -> None:
    """What was copied stays as it was."""
    bitmap, model = DirtyBitmap("b", 512, 512 * LARGE), 0
    copies: list[tuple[DirtyBitmap, int]] = []
    for step, (first, stop) in steps:
        part = (1 << stop) - (1 << first)
        if step == "set":
            bitmap.set_range(512 * first, 512 * stop)
            model |= part
        elif step == "copy":
            copies.append((bitmap, model))
            bitmap = bitmap.copy()
        elif step == "merge" and copies:
            for _ in bitmap.merge(copies[first % len(copies)][0]):
                pass
            model |= copies[first % len(copies)][1]
        elif step == "load":
            bitmap, model = DirtyBitmap("b", 512, 512 * LARGE), part
            content = memoryview(part.to_bytes(bitmap.byte_count, "little"))
            for start in range(0, len(content), 8 * first or 512):
                bitmap.load(start, content[start : start + (8 * first or 512)])
        elif step == "clear":
            bitmap.clear()
            model = 0
        elif step == "cut" and stop < LARGE:
            bitmap.resize(512 * stop)
            bitmap.resize(512 * LARGE)
            model = model & (1 << stop) - 1 | (1 << LARGE) - (1 << stop)
        elif step == "undo":
            bitmap.resize(512 * stop)()
    for made, bits in [*copies, (bitmap, model)]:
        assert int.from_bytes(made.stored(0, made.byte_count), "little") == bits
        dirty = sum(((1 << end // 512) - (1 << start // 512)) for start, end in made.dirty_runs(0, made.size))
        assert dirty == bits
        for start in range(0, made.byte_count - 100, 4096):
            for stop in (start + 100, start + 4096):
                found = made.stored(start, min(stop, made.byte_count))
                assert made.is_all(start, start + len(found), dirty=True) == (found.count(255) == len(found))
                assert made.is_all(start, start + len(found), dirty=False) == (not any(found))


def test_bitmap_of_256_tib_takes_memory_for_what_is_mixed_alone() -> None:
    """Its bits are 512 MiB, a list of their pieces 1 MiB."""
    tracemalloc.start()
    try:
        bitmap = DirtyBitmap("b", 64 * KiB, 256 * TiB)
        for offset in range(0, 256 * TiB, TiB):
            bitmap.set_range(offset, offset + 512)
        kept = bitmap.copy()
        bitmap.set_range(64 * KiB, 256 * TiB)
        for _ in kept.merge(bitmap):
            pass
        undo = kept.resize(TiB)
        kept.resize(256 * TiB)
        undo()
        assert list(bitmap.runs(0, bitmap.size)) == [(bitmap.size, True)]
        assert tracemalloc.get_traced_memory()[1] < 16 * MiB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("granularity", "count"), [(64 * KiB, 128), (128 * KiB, 64)])
def test_merge_over_16_tib_gives_others_their_turn(granularity: int, count: int) -> None:
    """Of 32 MiB of bits 256 KiB are merged at once, or 1,024 runs of another granularity."""
    bitmap, other = DirtyBitmap("b", 64 * KiB, 16 * TiB), DirtyBitmap("c", granularity, 16 * TiB)
    runs = 64 * 1024
    other.load(0, memoryview(b"\x55" * (runs // 4)))
    assert sum(1 for _ in bitmap.merge(other)) == count
    used = runs // 4 * granularity // (64 * KiB)
    assert bitmap.stored(0, used) == (b"\x55" if granularity == 64 * KiB else b"\x33") * used
    assert bitmap.is_all(used, bitmap.byte_count, dirty=False)
    assert not bitmap.is_all(used - 1, bitmap.byte_count, dirty=False)


@pytest.mark.parametrize("is_dirty", [False, True])
def test_runs_over_16_tib_take_milliseconds_not_seconds(is_dirty: bool) -> None:
    """32 MiB of bits; bit by bit that is 268 million steps, with a regular expression alone 0.3 s."""
    bitmap = DirtyBitmap("b", 64 * KiB, 16 * TiB)
    if is_dirty:
        bitmap.set_range(0, 16 * TiB)
    best = min(_seconds(bitmap) for _ in range(5))
    assert best < 0.1, f"{best} s"


def _seconds(bitmap: DirtyBitmap) -> float:
    started = time.process_time()
    assert len(list(bitmap.runs(0, bitmap.size))) == 1
    return time.process_time() - started


# As extents of BLOCK_STATUS


@settings(deadline=None)
@given(
    st.lists(ranges, max_size=8),
    ranges,
    st.sampled_from([256, 512, 4096]),
    st.sampled_from([1, 2, 3, 1000]),
)
def test_dirty_pairs_cover_the_range_from_the_front_and_miss_nothing_dirty(
    changes: list[tuple[int, int]], asked: tuple[int, int], alignment: int, pairs_max: int
) -> None:
    bitmap, model = DirtyBitmap("b", 512, SIZE), Model(512)
    for offset, stop in changes:
        bitmap.set_range(offset, stop)
        model.set_range(offset, stop)
    start, end = asked
    pairs = dirty_pairs(bitmap, start, end, alignment, pairs_max)
    assert 1 <= len(pairs) <= pairs_max
    assert all(first[1] != second[1] for first, second in pairwise(pairs))
    position = start
    for length, flags in pairs:
        stop = position + length
        assert length > 0
        assert length % alignment == 0 or stop == end
        for unit in range(position, stop, alignment):
            runs = model.runs(unit, min(unit + alignment, end))
            assert flags == int(any(is_dirty for _, is_dirty in runs))
        position = stop
    assert position == end or pairs_max < 1000


def test_dirty_pairs_of_many_runs_in_one_unit_stop_soon() -> None:
    """Every other granule of 512 bytes is dirty: a million runs of one unit after the other, all dirty."""
    bitmap = DirtyBitmap("b", 512, 1024 * MiB)
    bitmap.load(0, memoryview(b"\x55" * bitmap.byte_count))
    assert dirty_pairs(bitmap, 0, 1024 * MiB, 65536, 640) == [(10 * 65536, 1)]
    assert dirty_pairs(bitmap, 0, 1024 * MiB, 512, 3) == [(512, 1), (512, 0), (512, 1)]
