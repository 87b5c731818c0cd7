"""Extents to status pairs, against one value per byte."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdimg.export.status import STATUS_FLAGS, status_pairs
from nbdimg.image.driver import Extent, ExtentKind
from nbdimg.storage.memory import MemoryFile

FILE = MemoryFile()
BASE = STATUS_FLAGS["base:allocation"]
DEPTH = STATUS_FLAGS["qemu:allocation-depth"]
HOLE_AND_ZERO = 3


def extents(*runs: tuple[str, int], start: int = 0, depth: int = 1) -> list[Extent]:
    """`("data", 512)`, ... one after the other from `start`."""
    found = []
    for kind, length in runs:
        found.append(Extent(ExtentKind(kind), start, length, FILE, start, True, depth))
        start += length
    return found


def test_data_is_0_and_a_hole_is_hole_and_zero() -> None:
    assert status_pairs(extents(("data", 512), ("zero", 1024)), BASE, 1) == [(512, 0), (1024, HOLE_AND_ZERO)]


def test_depth_is_that_of_the_file_which_decides() -> None:
    pairs = status_pairs(extents(("data", 512)) + extents(("data", 512), start=512, depth=3), DEPTH, 1)
    assert pairs == [(512, 1), (512, 3)]


def test_equal_neighbours_are_merged() -> None:
    runs = extents(("data", 1), ("data", 2), ("zero", 3), ("zero", 4), ("data", 5))
    assert status_pairs(runs, BASE, 1) == [(3, 0), (7, HOLE_AND_ZERO), (5, 0)]


def test_no_extents_give_no_pairs() -> None:
    assert status_pairs([], BASE, 512) == []


@pytest.mark.parametrize(
    ("runs", "pairs"),
    [
        ([("zero", 100), ("data", 412)], [(512, 0)]),
        ([("data", 100), ("zero", 412)], [(512, 0)]),
        ([("zero", 600), ("data", 424)], [(512, 3), (512, 0)]),
        ([("zero", 512), ("data", 1), ("zero", 511), ("zero", 512)], [(512, 3), (512, 0), (512, 3)]),
        ([("zero", 100), ("data", 10), ("zero", 402), ("data", 512)], [(1024, 0)]),
        ([("zero", 1024), ("data", 76)], [(1024, 3), (76, 0)]),
        ([("data", 500), ("zero", 600)], [(512, 0), (588, 3)]),
    ],
)
def test_unit_shared_by_extents_promises_the_least(runs: list[tuple[str, int]], pairs: list[tuple[int, int]]) -> None:
    assert status_pairs(extents(*runs), BASE, 512) == pairs


def reference(values: list[int], alignment: int) -> list[tuple[int, int]]:
    """Each unit gets the least of its bytes' values."""
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(values), alignment):
        unit = values[start : start + alignment]
        if pairs and pairs[-1][1] == min(unit):
            pairs[-1] = (pairs[-1][0] + len(unit), min(unit))
        else:
            pairs.append((len(unit), min(unit)))
    return pairs


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["data", "zero"]), st.integers(1, 20)), min_size=1, max_size=12),
    st.sampled_from([1, 2, 4, 8, 16]),
    st.integers(0, 40),
)
def test_pairs_agree_with_a_value_for_each_byte(runs: list[tuple[str, int]], alignment: int, start: int) -> None:
    """And so cover the range to the byte: not one beyond its end, where the export may end."""
    values = [0 if kind == "data" else HOLE_AND_ZERO for kind, length in runs for _ in range(length)]
    assert status_pairs(extents(*runs, start=start), BASE, alignment) == reference(values, alignment)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 20)), min_size=1, max_size=12), st.sampled_from([1, 4, 16]))
def test_depth_pairs_agree_with_a_value_for_each_byte(runs: list[tuple[int, int]], alignment: int) -> None:
    chain: list[Extent] = []
    for depth, length in runs:
        chain += extents(("data", length), start=chain[-1].stop if chain else 0, depth=depth)
    values = [depth for depth, length in runs for _ in range(length)]
    assert status_pairs(chain, DEPTH, alignment) == reference(values, alignment)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["data", "zero"]), st.integers(1, 20)), min_size=1, max_size=12),
    st.sampled_from([2, 4, 8, 16]),
)
def test_pairs_of_a_range_of_whole_units_agree_with_a_value_for_each_byte(
    runs: list[tuple[str, int]], alignment: int
) -> None:
    """What a client that obeys the minimum block size sees."""
    rest = -sum(length for _, length in runs) % alignment
    whole = [*runs, ("zero", rest)] if rest else runs
    values = [0 if kind == "data" else HOLE_AND_ZERO for kind, length in whole for _ in range(length)]
    assert status_pairs(extents(*whole), BASE, alignment) == reference(values, alignment)


def test_range_that_goes_on_ends_at_a_whole_unit() -> None:
    runs = extents(("data", 4096), ("zero", 8192), ("data", 4096), ("zero", 8192), ("data", 1024))
    assert status_pairs(runs, BASE, 16384) == [(25600, 0)]
    assert status_pairs(runs, BASE, 16384, is_cut=True) == [(16384, 0)]
    assert status_pairs(runs[:1], BASE, 16384, is_cut=True) == [(4096, 0)]
