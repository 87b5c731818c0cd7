"""Dirty bitmaps in memory, against a plain list of granules; and the extents that BLOCK_STATUS makes of them."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdimg.export.status import dirty_pairs
from nbdimg.image.bitmap import DirtyBitmap
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
    assert bytes(bitmap.bits[:3]) == b"\x02\x07\x00"
    assert len(bitmap.bits) == 32


@settings(deadline=None)
@given(st.sampled_from([512, 1024, 4096, 65536]), st.lists(ranges, max_size=8), ranges)
def test_set_range_and_runs_agree_with_the_model(
    granularity: int, changes: list[tuple[int, int]], asked: tuple[int, int]
) -> None:
    bitmap, model = DirtyBitmap("b", granularity, SIZE), Model(granularity)
    for offset, stop in changes:
        bitmap.set_range(offset, stop)
        model.set_range(offset, stop)
    assert bytes(bitmap.bits) == model.bits()
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
    assert bytes(bitmap.bits) == model.bits()


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
    assert bytes(bitmap.bits) == model.bits()
    assert bitmap.size == size


def test_clear_leaves_nothing_dirty() -> None:
    bitmap = DirtyBitmap("b", 512, SIZE)
    bitmap.set_range(0, SIZE)
    bitmap.clear()
    assert list(bitmap.runs(0, SIZE)) == [(SIZE, False)]


def test_trim_tail_clears_the_bits_behind_the_end() -> None:
    bitmap = DirtyBitmap("b", 512, SIZE)
    bitmap.bits[:] = b"\xff" * len(bitmap.bits)
    bitmap.trim_tail()
    assert bitmap.bits[-1] == 0x1F  # 101 granules: 12 bytes and 5 bits


@pytest.mark.parametrize(("granularity", "count"), [(64 * KiB, 128), (128 * KiB, 64)])
def test_merge_over_16_tib_gives_others_their_turn(granularity: int, count: int) -> None:
    """Of 32 MiB of bits 256 KiB are merged at once, or 1,024 runs of another granularity."""
    bitmap, other = DirtyBitmap("b", 64 * KiB, 16 * TiB), DirtyBitmap("c", granularity, 16 * TiB)
    runs = 64 * 1024
    other.bits[: runs // 4] = b"\x55" * (runs // 4)
    assert sum(1 for _ in bitmap.merge(other)) == count
    used = runs // 4 * granularity // (64 * KiB)
    assert bytes(bitmap.bits[:used]) == (b"\x55" if granularity == 64 * KiB else b"\x33") * used
    assert bitmap.is_all(used, len(bitmap.bits), dirty=False)
    assert not bitmap.is_all(used - 1, len(bitmap.bits), dirty=False)


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
    bitmap.bits[:] = b"\x55" * len(bitmap.bits)
    assert dirty_pairs(bitmap, 0, 1024 * MiB, 65536, 640) == [(10 * 65536, 1)]
    assert dirty_pairs(bitmap, 0, 1024 * MiB, 512, 3) == [(512, 1), (512, 0), (512, 1)]
