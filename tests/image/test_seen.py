"""What is remembered of backing images is true until the image above maps something there, and bounded."""

from __future__ import annotations

import random

import pytest

from nbdimg.errors import CorruptImage
from nbdimg.formats.raw import RawDriver
from nbdimg.image import seen
from nbdimg.image.driver import Extent, ExtentKind, Miss
from nbdimg.image.image import Image
from nbdimg.image.seen import AROUND, SeenThrough
from nbdimg.storage.memory import MemoryFile
from tests.support.fakedriver import TABLE_SIZE, FakeDriver

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


class Hollow(FakeDriver):
    """A resident image of clusters of 512 bytes that maps runs without a place as one extent, and counts the asking."""

    def __init__(self, places: list[int | None]) -> None:
        super().__init__(FILE, places, has_backing=True)
        self.resident = set(range(1 + self.size // TABLE_SIZE))
        self.map_count = 0
        self.malformed: set[int] = set()

    def map(self, offset: int, stop: int) -> Extent | Miss:
        self.map_count += 1
        asked = range(offset // self.cluster_size, -(-stop // self.cluster_size))
        if self.malformed.intersection(asked):
            raise CorruptImage("hollow", "malformed")
        extent = super().map(offset, stop)
        assert isinstance(extent, Extent)
        while extent.stop < min(stop, self.size) and extent.kind is ExtentKind.BACKING:
            following = super().map(extent.stop, stop)
            assert isinstance(following, Extent)
            if following.kind is not ExtentKind.BACKING:
                break
            extent.length += following.length
        return extent


def test_one_look_up_in_the_middle_of_a_group_answers_for_all_of_it_and_only_the_top_remembers() -> None:
    clusters = 3 * AROUND
    base = Image(RawDriver(MemoryFile(bytes(clusters * 512))), writable=False)
    middle = Hollow([None] * clusters)
    top = Hollow([None] * clusters)
    below = Image(middle, writable=False, backing=base)
    image = Image(top, writable=False, backing=below)
    image.look_up((AROUND + 7) * 512, (AROUND + 8) * 512)
    top.map_count = middle.map_count = 0
    for cluster in range(AROUND, 2 * AROUND):
        found = image.look_up(cluster * 512, cluster * 512 + 512)
        assert isinstance(found, Extent)
        assert (found.file_offset - found.offset, found.depth) == (0, 3)
    assert (top.map_count, middle.map_count) == (0, 0)
    below.look_up(AROUND * 512, AROUND * 512 + 512)
    assert middle.map_count, "nothing is remembered twice"


def test_look_up_behind_a_cluster_of_the_image_itself_is_remembered_from_there_on() -> None:
    base = Image(RawDriver(MemoryFile(bytes(AROUND * 512))), writable=False)
    top = Hollow([None] * 3 + [0] + [None] * (AROUND - 4))
    image = Image(top, writable=False, backing=base)
    for offset in (7 * 512, 512):
        found = image.look_up(offset, offset + 512)
        assert isinstance(found, Extent)
        assert (found.file_offset, found.depth) == (found.offset, 2)
    top.map_count = 0
    for cluster in (0, 1, 2, *range(7, AROUND)):
        image.look_up(cluster * 512, cluster * 512 + 512)
    assert top.map_count == 0
    own = image.look_up(3 * 512, 4 * 512)
    assert isinstance(own, Extent)
    assert own.depth == 1


@pytest.mark.parametrize("is_below", [False, True])
@pytest.mark.parametrize("malformed", [0, 3, 7, AROUND - 1])
def test_malformed_cluster_of_a_group_fails_its_own_readers_alone(malformed: int, is_below: bool) -> None:
    base = Image(RawDriver(MemoryFile(bytes(AROUND * 512))), writable=False)
    middle, top = Hollow([None] * AROUND), Hollow([None] * AROUND)
    (middle if is_below else top).malformed = {malformed}
    image = Image(top, writable=False, backing=Image(middle, writable=False, backing=base))
    for cluster in (5, 0, 15, 3, 7, 4, 8):
        if cluster == malformed:
            with pytest.raises(CorruptImage):
                image.look_up(cluster * 512, cluster * 512 + 512)
        else:
            found = image.look_up(cluster * 512, cluster * 512 + 512)
            assert isinstance(found, Extent)
            assert (found.file_offset, found.depth) == (found.offset, 3)
