"""Raw's memory of data runs against a set of bytes, and creation."""

from __future__ import annotations

import asyncio
import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdimg.formats import create_image, open_image, raw
from nbdimg.formats.raw import RawDriver
from nbdimg.image.driver import Extent, ExtentKind, Miss
from nbdimg.storage.memory import MemoryFile
from tests.support.faultfile import FaultFile

SIZE = 48


class SparseFile(MemoryFile):
    """A file of `SIZE` bytes that is data where `is_data` says so; counts the look-ups."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__(bytes(size))
        self.is_data = [False] * size
        self.lookups = 0

    def fill(self, start: int, stop: int, is_data: bool) -> None:
        self.is_data[start:stop] = [is_data] * (stop - start)

    def try_data_extent(self, offset: int) -> tuple[bool, int]:
        self.lookups += 1
        if offset >= len(self.is_data):
            return False, len(self.is_data)
        kind = self.is_data[offset]
        stop = offset
        while stop < len(self.is_data) and self.is_data[stop] == kind:
            stop += 1
        return kind, stop


def mapped(driver: RawDriver, offset: int) -> Extent:
    extent = driver.map(offset, driver.size)
    assert isinstance(extent, Extent)
    return extent


def remembered(driver: RawDriver) -> list[tuple[int, int]]:
    return [(run.offset, run.stop) for run in driver._runs]


def test_hole_that_is_waited_for_is_asked_for_each_time() -> None:
    """A hole may be written to behind the range that its finder has for itself; data may as well stay data."""
    file = SparseFile()
    file.fill(16, 32, True)
    driver = RawDriver(FaultFile(file, slow_only=True))

    async def main() -> None:
        for _ in range(2):
            missing = driver.map(0, SIZE)
            assert isinstance(missing, Miss)
            await missing.load()
            assert isinstance(driver.map(1, SIZE), Miss)
            found = driver.map(0, SIZE)
            assert isinstance(found, Extent)
            assert (found.kind, found.offset, found.stop) == (ExtentKind.ZERO, 0, 16)
        missing = driver.map(20, SIZE)
        assert isinstance(missing, Miss)
        await missing.load()
        assert mapped(driver, 20).kind is ExtentKind.DATA

    asyncio.run(main())
    assert mapped(driver, 25).kind is ExtentKind.DATA
    assert remembered(driver) == [(20, 32)]


RANGES = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(lambda r: (r[0], min(SIZE, r[0] + r[1])))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), RANGES),
        st.tuples(st.just("unmap"), RANGES),
        st.tuples(st.just("map"), RANGES),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_map_under_writes_and_unmaps_tells_the_truth_and_remembers_disjoint_sorted_runs(
    steps: list[tuple[str, tuple[int, int]]],
) -> None:
    file = SparseFile()
    driver = RawDriver(file)
    model: set[int] = set()
    """Bytes that the driver may remember as data: seen as data and not unmapped since."""
    for action, (start, stop) in steps:
        if action == "write":
            file.fill(start, stop, True)
        elif action == "unmap":
            file.fill(start, stop, False)
            driver.unmapped(start, stop - start)
            model -= set(range(start, stop))
        else:
            extent = mapped(driver, start)
            assert extent.offset <= start < extent.stop <= SIZE
            assert extent.file_offset == extent.offset
            expected = ExtentKind.DATA if file.is_data[start] else ExtentKind.ZERO
            assert extent.kind is expected
            assert all(file.is_data[n] == file.is_data[start] for n in range(start, extent.stop))
            if expected is ExtentKind.DATA:
                model |= set(range(extent.offset, extent.stop))
        runs = remembered(driver)
        assert runs == sorted(runs)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(runs)), "neighbours are not merged"
        assert {n for start, stop in runs for n in range(start, stop)} == model
        assert driver._starts == [start for start, _ in runs]


@settings(max_examples=300, deadline=None)
@given(st.lists(RANGES, max_size=20), st.lists(RANGES, max_size=20))
def test_remember_and_unmapped_agree_with_a_set_of_bytes(
    data: list[tuple[int, int]], holes: list[tuple[int, int]]
) -> None:
    driver = RawDriver(SparseFile())
    model: set[int] = set()
    for index in range(max(len(data), len(holes))):
        if index < len(data):
            start, stop = data[index]
            run = driver._remember(start, stop)
            model |= set(range(start, stop))
            assert run.offset <= start < stop <= run.stop
        if index < len(holes):
            start, stop = holes[index]
            driver.unmapped(start, stop - start)
            model -= set(range(start, stop))
        assert {n for start, stop in remembered(driver) for n in range(start, stop)} == model


@pytest.mark.parametrize(
    ("before", "added", "after"),
    [
        ([], (10, 20), [(10, 20)]),
        ([(0, 10)], (10, 20), [(0, 20)]),
        ([(20, 30)], (10, 20), [(10, 30)]),
        ([(0, 10), (20, 30)], (10, 20), [(0, 30)]),
        ([(0, 10), (20, 30)], (11, 19), [(0, 10), (11, 19), (20, 30)]),
        ([(0, 10), (12, 14), (20, 30)], (5, 25), [(0, 30)]),
        ([(0, 30)], (10, 20), [(0, 30)]),
    ],
)
def test_remember_merges_what_it_touches(
    before: list[tuple[int, int]], added: tuple[int, int], after: list[tuple[int, int]]
) -> None:
    driver = RawDriver(SparseFile())
    for start, stop in before:
        driver._remember(start, stop)
    driver._remember(*added)
    assert remembered(driver) == after


@pytest.mark.parametrize(
    ("hole", "after"),
    [
        ((12, 15), [(10, 12), (15, 20), (30, 40)]),
        ((10, 20), [(30, 40)]),
        ((5, 12), [(12, 20), (30, 40)]),
        ((15, 35), [(10, 15), (35, 40)]),
        ((20, 30), [(10, 20), (30, 40)]),
        ((0, 48), []),
        ((40, 48), [(10, 20), (30, 40)]),
    ],
)
def test_unmapped_splits_and_shortens_runs(hole: tuple[int, int], after: list[tuple[int, int]]) -> None:
    driver = RawDriver(SparseFile())
    driver._remember(10, 20)
    driver._remember(30, 40)
    driver.unmapped(hole[0], hole[1] - hole[0])
    assert remembered(driver) == after


def test_map_of_remembered_data_costs_no_lookup_and_of_a_hole_always_one() -> None:
    file = SparseFile()
    file.fill(0, 16, True)
    file.fill(32, 40, True)
    driver = RawDriver(file)
    for offset in (0, 5, 15, 32, 39, 3, 33):
        mapped(driver, offset)
    assert file.lookups == 2
    for _ in range(3):
        mapped(driver, 20)
    assert file.lookups == 5


def test_place_is_the_whole_image_in_place_and_costs_no_lookup() -> None:
    file = SparseFile()
    driver = RawDriver(file)
    for offset in (0, 20, SIZE - 1):
        extent = driver.place(offset, SIZE)
        assert isinstance(extent, Extent)
        assert (extent.offset, extent.stop, extent.file_offset, extent.writable) == (0, SIZE, 0, True)
    assert file.lookups == 0


def test_map_of_a_hole_that_was_filled_meanwhile_is_data() -> None:
    file = SparseFile()
    driver = RawDriver(file)
    assert mapped(driver, 10).kind is ExtentKind.ZERO
    file.fill(10, 12, True)
    assert mapped(driver, 10).kind is ExtentKind.DATA


def test_runs_are_forgotten_at_the_limit_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "RUNS_MAX", 4)
    file = SparseFile()
    for start in range(0, SIZE, 4):
        file.fill(start, start + 2, True)
    driver = RawDriver(file)
    for offset in range(SIZE):
        expected = ExtentKind.DATA if offset % 4 < 2 else ExtentKind.ZERO
        assert mapped(driver, offset).kind is expected
        assert len(remembered(driver)) <= 4
    assert mapped(driver, 0).kind is ExtentKind.DATA


def test_many_runs_stay_within_the_limit() -> None:
    driver = RawDriver(MemoryFile(bytes(1)))
    for index in range(raw.RUNS_MAX + 10):
        driver._remember(4 * index, 4 * index + 1)
    assert len(driver._runs) == len(driver._starts) == 10


def test_holes_in_a_run_make_no_more_runs_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "RUNS_MAX", 4)
    file = SparseFile()
    file.fill(0, SIZE, True)
    driver = RawDriver(file)
    for offset in range(1, SIZE, 3):
        assert mapped(driver, offset).kind is ExtentKind.DATA
        file.fill(offset, offset + 1, False)
        driver.unmapped(offset, 1)
        assert len(driver._runs) == len(driver._starts) <= 4
    assert [mapped(driver, offset).kind for offset in range(3)] == [ExtentKind.DATA, ExtentKind.ZERO, ExtentKind.DATA]


def test_file_that_shrank_maps_its_lost_end_as_zeroes() -> None:
    file = SparseFile()
    driver = RawDriver(file)
    del file.is_data[10:]
    extent = mapped(driver, 20)
    assert (extent.kind, extent.stop) == (ExtentKind.ZERO, SIZE)


def test_create_makes_a_sparse_file_and_never_replaces_one(tmp_path: Path) -> None:
    path = tmp_path / "new.img"
    create_image(path, 10 << 20)
    assert path.stat().st_size == 10 << 20
    assert path.stat().st_blocks * 512 < 1 << 20
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        create_image(path, 4096)
    assert path.read_bytes() == b"precious"


def test_trim_and_zero_that_may_unmap_give_back_space_that_was_reserved_and_never_written(tmp_path: Path) -> None:
    path = tmp_path / "reserved.img"
    with path.open("xb") as made:
        os.posix_fallocate(made.fileno(), 0, 1 << 20)
    reserved = path.stat().st_blocks

    async def main() -> None:
        image = await open_image(path)
        assert isinstance(image.driver, RawDriver)
        if mapped(image.driver, 1 << 19).kind is not ExtentKind.ZERO:
            pytest.skip("this file system shows what is reserved as data")
        await image.trim(0, 1 << 19)
        assert path.stat().st_blocks <= reserved // 2
        await image.zero(1 << 19, 1 << 19, may_unmap=True, is_fast_only=False)
        await image.close()
        assert path.stat().st_blocks == 0

    asyncio.run(main())
