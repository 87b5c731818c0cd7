"""What is remembered of backing images is true until the image above maps something there, and bounded."""

from __future__ import annotations

import random

import pytest

from nbdimg.image import seen
from nbdimg.image.driver import Extent, ExtentKind
from nbdimg.image.seen import AROUND, SeenThrough
from nbdimg.storage.memory import MemoryFile

UNIT = 4096
FILE = MemoryFile(b"")


def data(start: int, stop: int, shift: int = 1 << 30) -> Extent:
    return Extent(ExtentKind.DATA, start, stop - start, FILE, start + shift, False, 2)


def known(memory: SeenThrough, offset: int, stop: int) -> Extent | None:
    extent = memory.extents.get(offset // UNIT)
    return extent if extent is not None and extent.offset <= offset and stop <= extent.stop else None


def test_remember_keeps_the_aligned_group_and_no_more() -> None:
    memory = SeenThrough(UNIT)
    memory.remember(data(0, 100 * UNIT), 20 * UNIT + 5)
    assert sorted(memory.extents) == list(range(AROUND, 2 * AROUND))
    extent = known(memory, 31 * UNIT, 32 * UNIT)
    assert extent is not None
    assert (extent.offset, extent.stop, extent.file_offset) == (16 * UNIT, 32 * UNIT, 16 * UNIT + (1 << 30))
    assert (extent.kind, extent.file, extent.depth, extent.writable) == (ExtentKind.DATA, FILE, 2, False)


def test_remember_of_part_of_a_cluster_answers_for_that_part_alone() -> None:
    memory = SeenThrough(UNIT)
    memory.remember(data(UNIT + 512, UNIT + 1024), UNIT + 600)
    assert known(memory, UNIT + 512, UNIT + 1024) is not None
    assert known(memory, UNIT + 512, UNIT + 1025) is None
    assert known(memory, UNIT + 511, UNIT + 1024) is None


@pytest.mark.parametrize("seed", range(20))
def test_forget_leaves_nothing_that_covers_what_was_forgotten(seed: int) -> None:
    """Against a set of the clusters that the image above has mapped since."""
    rng = random.Random(seed)
    memory = SeenThrough(UNIT)
    mapped: set[int] = set()
    for _ in range(400):
        first = rng.randrange(64)
        if rng.random() < 0.6:
            stop = next((each for each in range(first, 65) if each in mapped), 65)
            if stop > first:
                memory.remember(data(first * UNIT, stop * UNIT), first * UNIT + rng.randrange(UNIT))
        else:
            count = rng.choice([1, 1, 1, 5, 40])
            mapped.update(range(first, first + count))
            memory.forget(first * UNIT + rng.choice([0, 100]), (first + count) * UNIT - rng.choice([0, 100]))
        if rng.random() < 0.1:
            mapped.clear()
            memory.extents.clear()
        for cluster, extent in memory.extents.items():
            covered = range(extent.offset // UNIT, extent.stop // UNIT)
            assert cluster in covered
            assert not mapped.intersection(covered), seed


def test_remember_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "CLUSTERS_MAX", 3 * AROUND)
    memory = SeenThrough(UNIT)
    for group in range(10):
        memory.remember(data(0, 1 << 40), group * AROUND * UNIT)
        assert len(memory.extents) <= 3 * AROUND
        assert known(memory, group * AROUND * UNIT, (group + 1) * AROUND * UNIT) is not None
