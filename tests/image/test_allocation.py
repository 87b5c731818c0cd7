"""Image over a driver that makes room: heads and tails, chains of images, failures on the way."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from nbdimg.errors import ImageFailed, RequestError
from nbdimg.formats.raw import RawDriver
from nbdimg.image.driver import ExtentKind
from nbdimg.image.image import Image
from nbdimg.storage.memory import MemoryFile
from tests.support.fakedriver import TABLE_SIZE, FakeDriver
from tests.support.faultfile import FaultFile
from tests.support.reading import bytes_of

T = TypeVar("T")

CLUSTER = 512
BACKING = bytes(n * 7 % 253 + 1 for n in range(16 * CLUSTER))


class RubbishFile(MemoryFile):
    """Space that was used before: what grows it does not read as zeroes but as rubbish."""

    def try_pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> bool:
        if offset > len(self.content):
            self.content.extend(b"\xee" * (offset - len(self.content)))
        view = memoryview(data)
        if offset + len(view) > len(self.content):
            self.content.extend(b"\xee" * (-(offset + len(view)) % CLUSTER + offset + len(view) - len(self.content)))
        self.content[offset : offset + len(view)] = view
        return True


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def empty_image(*, zeroed: bool = False, cut: int = 0, clusters: int = 16) -> tuple[Image, FakeDriver]:
    """Nothing is allocated, and everything is resident."""
    driver = FakeDriver(RubbishFile(), [None] * clusters, zeroed=zeroed, cut=cut)
    driver.resident = set(range(clusters))
    return Image(driver, writable=True), driver


def overlay(backing_size: int, **options: Any) -> tuple[Image, FakeDriver]:
    driver = FakeDriver(RubbishFile(), [None] * 16, has_backing=True, zeroed=False, **options)
    driver.resident = {0, 1}
    backing = Image(RawDriver(MemoryFile(BACKING[:backing_size], writable=False)), writable=False)
    return Image(driver, writable=True, backing=backing), driver


EDGES = [
    (0, 512),
    (0, 1),
    (100, 1),
    (511, 1),
    (511, 2),
    (100, 924),
    (512, 1024),
    (600, 3000),
    (7, 2041),
    (0, 8192),
    (8191, 1),
    (4095, 2),
]


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("zeroed", [True, False])
@pytest.mark.parametrize(("offset", "length"), EDGES)
def test_write_into_unallocated_clusters_zeroes_head_and_tail(
    offset: int, length: int, zeroed: bool, is_fast: bool
) -> None:
    image, driver = empty_image(zeroed=zeroed)
    if zeroed:
        driver.file = MemoryFile()
    data = bytes(n % 255 + 1 for n in range(length))
    if is_fast:
        assert image.try_write(offset, memoryview(data))
    else:
        run(image.write(offset, data))
    assert run(bytes_of(image, 0, image.size)) == bytes(offset) + data + bytes(image.size - offset - length)
    assert "release" not in driver.events


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("backing_size", [0, 1, 511, 700, 1024, 4097, 8192])
@pytest.mark.parametrize(("offset", "length"), EDGES)
def test_write_into_unallocated_clusters_copies_head_and_tail_from_backing(
    offset: int, length: int, backing_size: int, is_fast: bool
) -> None:
    image, _ = overlay(backing_size)
    model = bytearray(BACKING[:backing_size].ljust(8192, b"\0"))
    assert run(bytes_of(image, 0, 8192)) == model
    data = b"\x55" * length
    if not is_fast or not image.try_write(offset, memoryview(data)):
        run(image.write(offset, data))
    model[offset : offset + length] = data
    assert run(bytes_of(image, 0, 8192)) == model


def test_write_whose_backing_would_wait_is_not_done_fast_and_gives_its_space_back() -> None:
    file = FaultFile(MemoryFile(BACKING, writable=False), slow_only=True)
    driver = FakeDriver(MemoryFile(), [None] * 16, has_backing=True, zeroed=False)
    driver.resident = {0, 1}
    image = Image(driver, writable=True, backing=Image(RawDriver(file), writable=False))
    assert not image.try_write(100, memoryview(b"x"))
    assert driver.events == ["reserve 0-0", "release"]
    run(image.write(100, b"x"))
    assert run(bytes_of(image, 0, 512)) == BACKING[:100] + b"x" + BACKING[101:512]


def test_write_to_a_shared_cluster_copies_the_rest_of_it() -> None:
    driver = FakeDriver(MemoryFile(BACKING), [0, 512, 1024], zeroed=False)
    driver.resident, driver.shared = {0}, {1}
    image = Image(driver, writable=True)
    assert image.try_write(600, memoryview(b"new"))
    assert run(bytes_of(image, 0, 1536)) == BACKING[:600] + b"new" + BACKING[603:1536]
    assert driver.places[1] == 8192
    assert bytes(driver.file.content[:8192]) == BACKING  # type: ignore[attr-defined]


def test_write_into_the_last_partial_cluster_stays_inside_and_pads_it() -> None:
    image, driver = empty_image(cut=100)
    end = 16 * CLUSTER - 100
    run(image.write(end - 10, b"0123456789"))
    assert run(bytes_of(image, end - 20, 20)) == bytes(10) + b"0123456789"
    (extent,) = run(image.map(end - CLUSTER + 100, CLUSTER - 100, 10))
    assert extent.stop == end
    assert driver.events == ["reserve 15-15", "commit"]


def test_write_over_several_clusters_reserves_them_at_once() -> None:
    image, driver = empty_image()
    run(image.write(600, b"x" * 3000))
    assert driver.events == ["reserve 1-7", "commit"]


@pytest.mark.parametrize("change", ["write", "trim"])
def test_change_beside_strained_tables_flushes_them_though_all_was_flushed(change: str) -> None:
    """A flush may itself have changed tables, which the next one writes."""

    async def main() -> None:
        driver = FakeDriver(MemoryFile(), [None] * 8, can_unmap=True)
        driver.resident = {0}
        image = Image(driver, writable=True)
        await image.flush()
        assert image.gate.is_clean
        driver.is_strained = True
        driver.events.clear()
        await (image.write(0, b"x" * CLUSTER) if change == "write" else image.trim(0, CLUSTER))
        assert driver.events[0] == "flush"

    run(main())


def test_write_that_fails_gives_its_space_back_and_shows_nothing() -> None:
    async def main() -> None:
        file = FaultFile(MemoryFile(), slow_only=True)
        driver = FakeDriver(file, [None] * 8, zeroed=False)
        driver.resident = {0}
        image = Image(driver, writable=True)
        await image.flush()
        file.fail("pwrite", errno.ENOSPC)
        with pytest.raises(OSError, match="No space"):
            await image.write(100, b"x" * 1000)
        assert driver.events[1:] == ["reserve 0-2", "release"]
        assert await bytes_of(image, 0, 4096) == bytes(4096)
        assert not image.gate.is_clean
        file.heal()
        await image.write(100, b"x" * 1000)
        assert await bytes_of(image, 0, 4096) == bytes(100) + b"x" * 1000 + bytes(2996)

    run(main())


def test_write_whose_head_cannot_be_read_gives_its_space_back() -> None:
    async def main() -> None:
        file = FaultFile(MemoryFile(BACKING, writable=False), slow_only=True)
        driver = FakeDriver(MemoryFile(), [None] * 16, has_backing=True, zeroed=False)
        driver.resident = {0, 1}
        image = Image(driver, writable=True, backing=Image(RawDriver(file), writable=False))
        file.fail("pread", errno.EIO)
        with pytest.raises(OSError, match="Input/output"):
            await image.write(100, b"x")
        assert driver.events == ["reserve 0-0", "release"]
        assert driver.places[0] is None

    run(main())


def test_write_with_strained_tables_flushes_first() -> None:
    image, driver = empty_image()
    driver.is_strained = True
    assert not image.try_write(0, memoryview(b"x"))
    assert driver.events == []
    run(image.write(0, b"x"))
    assert driver.events == ["flush", "reserve 0-0", "commit"]


def test_write_to_a_read_only_image_is_refused_and_reserves_nothing() -> None:
    driver = FakeDriver(MemoryFile(), [None] * 8)
    driver.resident = {0}
    image = Image(driver, writable=False)
    assert not image.try_write(0, memoryview(b"x"))
    with pytest.raises(RequestError) as caught:
        run(image.write(0, b"x"))
    assert caught.value.errno == errno.EPERM
    assert driver.events == []


def test_write_after_a_failed_flush_reserves_nothing() -> None:
    async def main() -> None:
        file = FaultFile(MemoryFile())
        driver = FakeDriver(file, [None] * 8)
        driver.resident = {0}
        image = Image(driver, writable=True)
        file.fail("fdatasync", errno.EIO)
        with pytest.raises(ImageFailed):
            await image.flush()
        with pytest.raises(ImageFailed):
            await image.write(0, b"x")
        assert driver.events == ["flush"]

    run(main())


# Looking through the chain


def test_look_up_tells_the_depth_of_the_file_that_decides() -> None:
    lowest = Image(RawDriver(MemoryFile(BACKING[:1024], writable=False)), writable=False)
    middle_driver = FakeDriver(MemoryFile(BACKING), [None, None, 0, None], has_backing=True)
    middle_driver.resident = {0}
    middle = Image(middle_driver, writable=False, backing=lowest)
    driver = FakeDriver(MemoryFile(BACKING), [0, None, None, None, None], has_backing=True)
    driver.resident = {0}
    image = Image(driver, writable=True, backing=middle)
    extents = run(image.map(0, 5 * CLUSTER, 10))
    assert [(extent.offset, extent.length, extent.kind.value, extent.depth) for extent in extents] == [
        (0, 512, "data", 1),
        (512, 512, "data", 3),
        (1024, 512, "data", 2),
        (1536, 512, "zero", 0),
        (2048, 512, "zero", 0),
    ]
    assert [extent.writable for extent in extents] == [True, False, False, False, False]


def test_look_up_in_a_backing_image_that_ends_mid_cluster_covers_with_no_gap() -> None:
    image, _ = overlay(700)
    extents = run(image.map(0, 2048, 100))
    position = 0
    for extent in extents:
        assert extent.offset == position
        position = extent.stop
    assert position == 2048
    assert [(extent.stop, extent.kind) for extent in extents[:3]] == [
        (512, ExtentKind.DATA),
        (700, ExtentKind.DATA),
        (1024, ExtentKind.ZERO),
    ]


def test_read_loads_tables_of_every_image_of_the_chain() -> None:
    lower = FakeDriver(MemoryFile(BACKING), [0, 512, None, 1536])
    upper = FakeDriver(MemoryFile(), [None] * 4, has_backing=True)
    image = Image(upper, writable=False, backing=Image(lower, writable=False))
    assert image.try_read(0, 512, memoryview(bytearray(512))) == 0
    assert run(bytes_of(image, 0, 2048)) == BACKING[:1024] + bytes(512) + BACKING[1536:2048]
    assert (upper.loads, lower.loads) == ([0], [0])


def test_close_closes_the_chain_also_when_the_flush_fails() -> None:
    class ClosingFile(MemoryFile):
        is_closed = False

        async def close(self) -> None:
            self.is_closed = True

    files = [ClosingFile(BACKING), ClosingFile(BACKING)]
    top = FaultFile(files[0])
    top.fail("fdatasync", errno.EIO)
    backing = Image(RawDriver(files[1]), writable=False)
    image = Image(FakeDriver(top, [0]), writable=True, backing=backing)
    with pytest.raises(ImageFailed):
        run(image.close())
    assert [file.is_closed for file in files] == [True, True]


def test_close_of_a_read_only_image_only_abandons() -> None:
    driver = FakeDriver(MemoryFile(BACKING), [0])
    run(Image(driver, writable=False).close())
    assert driver.events == []


# Whole units


@pytest.mark.parametrize(
    ("offset", "length", "events"),
    [
        (0, 1024, ["unmap 0-1024 trim"]),
        (1, 1023, ["unmap 512-1024 trim"]),
        (1, 510, []),
        (511, 2, []),
        (600, 1000, ["unmap 1024-1536 trim"]),
        (8000, 92, []),
        (7680, 412, ["unmap 7680-8092 trim"]),
        (3584, 1024, ["unmap 3584-4096 trim", "unmap 4096-4608 trim"]),
    ],
)
def test_trim_gives_whole_units_to_the_driver(offset: int, length: int, events: list[str]) -> None:
    places: list[int | None] = [n * CLUSTER for n in range(16)]
    driver = FakeDriver(MemoryFile(BACKING), places, cut=100, can_unmap=True)
    driver.resident = {0, 1}
    run(Image(driver, writable=True).trim(offset, length))
    assert driver.events == events


@pytest.mark.parametrize("may_unmap", [True, False])
@pytest.mark.parametrize(("offset", "length"), EDGES)
def test_zero_writes_the_edges_and_unmaps_the_units_between(offset: int, length: int, may_unmap: bool) -> None:
    places: list[int | None] = [n * CLUSTER for n in range(16)]
    driver = FakeDriver(MemoryFile(BACKING), places, can_unmap=True)
    image = Image(driver, writable=True)
    run(image.zero(offset, length, may_unmap=may_unmap, is_fast_only=False))
    expected = bytearray(BACKING)
    expected[offset : offset + length] = bytes(length)
    assert run(bytes_of(image, 0, 8192)) == expected
    to = "zero" if may_unmap else "keep"
    assert all(event.endswith(to) for event in driver.events if event.startswith("unmap"))


def test_zero_fast_with_edges_of_data_is_enotsup_and_changes_nothing() -> None:
    driver = FakeDriver(MemoryFile(BACKING), [n * CLUSTER for n in range(16)], can_unmap=True)
    image = Image(driver, writable=True)
    with pytest.raises(RequestError) as caught:
        run(image.zero(100, 2000, may_unmap=True, is_fast_only=True))
    assert caught.value.errno == errno.EOPNOTSUPP
    assert run(bytes_of(image, 0, 8192)) == BACKING
    assert driver.events == []


def test_zero_fast_with_edges_that_are_zero_is_done() -> None:
    places: list[int | None] = [n * CLUSTER for n in range(16)]
    places[0] = places[4] = None
    driver = FakeDriver(MemoryFile(BACKING), places, can_unmap=True)
    image = Image(driver, writable=True)
    run(image.zero(100, 2000, may_unmap=True, is_fast_only=True))
    assert run(bytes_of(image, 0, 2560)) == bytes(2560)


@pytest.mark.parametrize("backing_size", [300, 8192])
def test_zero_over_a_backing_image_hides_it_where_mapping_cannot(backing_size: int) -> None:
    image, _ = overlay(backing_size)
    run(image.zero(100, 3000, may_unmap=True, is_fast_only=False))
    expected = bytearray(BACKING[:backing_size].ljust(8192, b"\0"))
    expected[100:3100] = bytes(3000)
    assert run(bytes_of(image, 0, 8192)) == expected


# What a change must have for itself


def test_change_span_is_whole_clusters_only_where_the_mapping_may_change() -> None:
    driver = FakeDriver(MemoryFile(BACKING), [0, 512, None, 1024, *[None] * 12])
    image = Image(driver, writable=True)
    assert image.change_span(100, 200) == (0, 512), "not in memory: it may change"
    driver.resident = {0}
    assert image.change_span(100, 200) == (100, 200)
    assert image.change_span(500, 600) == (500, 600)
    assert image.change_span(1000, 1030) == (512, 1536)
    assert image.change_span(1100, 1200) == (1024, 1536)
    assert image.change_span(TABLE_SIZE - 1, TABLE_SIZE) == (TABLE_SIZE - CLUSTER, TABLE_SIZE)
