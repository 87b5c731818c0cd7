"""Image over a driver that misses, and over raw with files that cannot punch, cannot zero, or fail."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import pytest

from nbdimg.errors import ImageFailed, RequestError
from nbdimg.formats.probe import HEAD_SIZE, planted
from nbdimg.formats.raw import RawDriver
from nbdimg.image.driver import Extent, ExtentKind
from nbdimg.image.image import SPAN_EXTENTS_MAX, TRY_WRITE_MAX, HeadGuard, Image
from nbdimg.storage.file import ZERO_WRITE_SIZE
from nbdimg.storage.memory import MemoryFile
from tests.support.fakedriver import FakeDriver
from tests.support.faultfile import FaultFile

T = TypeVar("T")

CLUSTER = 512
PATTERN = bytes(n % 251 for n in range(64 * 1024))


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def raw_image(content: bytes = PATTERN, *, is_guarded: bool = False) -> tuple[Image, FaultFile]:
    file = FaultFile(MemoryFile(content))
    guard = HeadGuard(HEAD_SIZE, planted) if is_guarded else None
    return Image(RawDriver(file), writable=True, guard=guard), file


def content(file: FaultFile) -> bytes:
    assert isinstance(file.inner, MemoryFile)
    return bytes(file.inner.content)


def shuffled_image() -> tuple[Image, FakeDriver]:
    """Sixteen clusters: number 0 lies at 1024, 1 at 0, 2 is a hole, the others at their own offsets plus 4096."""
    places: list[int | None] = [1024, 0, None, *(n * CLUSTER + 4096 for n in range(3, 16))]
    driver = FakeDriver(MemoryFile(PATTERN), places)
    return Image(driver, writable=True), driver


def expected(offset: int, length: int) -> bytes:
    """What `shuffled_image` holds."""
    guest = PATTERN[1024:1536] + PATTERN[:512] + bytes(512) + PATTERN[4096 + 3 * 512 : 4096 + 16 * 512]
    return guest[offset : offset + length]


async def read(image: Image, offset: int, length: int) -> bytes:
    """With holes put in, and the promise about the segments checked."""
    view = memoryview(bytearray(b"\xaa" * length))
    position = offset
    for segment in await image.read(offset, view):
        assert segment.offset == position
        assert segment.length > 0
        if segment.is_hole:
            place = slice(position - offset, position - offset + segment.length)
            assert bytes(view[place]) == b"\xaa" * segment.length, "the view was touched in a hole"
            view[place] = bytes(segment.length)
        position += segment.length
    assert position == offset + length
    return bytes(view)


# Miss, load, ask again


def test_read_of_a_table_not_resident_loads_it_once() -> None:
    image, driver = shuffled_image()
    assert run(read(image, 100, 2000)) == expected(100, 2000)
    assert run(read(image, 0, 512)) == expected(0, 512)
    assert driver.loads == [0]


def test_read_across_two_tables_loads_both() -> None:
    image, driver = shuffled_image()
    assert run(read(image, 4000, 1000)) == expected(4000, 1000)
    assert driver.loads == [0, 1]


@pytest.mark.parametrize("offset", [0, 1, 511, 512, 1023, 1024, 1535, 1536, 4095, 4096, 8191])
@pytest.mark.parametrize("length", [1, 2, 511, 512, 513, 1025, 8192])
def test_read_at_every_cluster_edge_gives_the_mapped_bytes(offset: int, length: int) -> None:
    image, _ = shuffled_image()
    length = min(length, image.size - offset)
    assert run(read(image, offset, length)) == expected(offset, length)


def test_try_read_of_a_missing_table_says_no_and_works_after_load() -> None:
    image, driver = shuffled_image()
    view = memoryview(bytearray(CLUSTER))
    assert image.try_read(0, CLUSTER, view) == 0
    assert driver.loads == []
    run(read(image, 0, 1))
    assert image.try_read(0, CLUSTER, view) == CLUSTER
    assert bytes(view) == expected(0, CLUSTER)


def test_try_read_stops_at_the_end_of_the_extent_of_the_range_and_of_the_view() -> None:
    image, driver = shuffled_image()
    driver.resident = {0, 1}
    view = memoryview(bytearray(100))
    assert image.try_read(500, 2000, view) == 12
    assert bytes(view[:12]) == expected(500, 12)
    assert image.try_read(0, 50, view) == 50
    assert image.try_read(0, 512, view) == 100


def test_try_read_of_a_hole_tells_its_length_within_the_range_and_leaves_the_view() -> None:
    image, driver = shuffled_image()
    driver.resident = {0, 1}
    view = memoryview(bytearray(b"\xaa" * 16))
    assert image.try_read(1024, 4096, view) == -512
    assert image.try_read(1030, 1034, view) == -4
    assert bytes(view) == b"\xaa" * 16


def test_try_read_where_storage_would_wait_says_no() -> None:
    image, file = raw_image()
    file.slow_only = True
    assert image.try_read(0, 16, memoryview(bytearray(16))) == 0


def test_try_write_of_a_missing_table_says_no_and_writes_nothing() -> None:
    image, _ = shuffled_image()
    assert not image.try_write(0, memoryview(b"x"))
    assert run(read(image, 0, 512)) == expected(0, 512)


def test_try_write_across_extents_writes_each() -> None:
    image, driver = shuffled_image()
    driver.resident = {0, 1}
    assert image.try_write(500, memoryview(b"y" * 100))
    assert run(read(image, 0, 1024)) == expected(0, 500) + b"y" * 100 + expected(600, 424)


def test_try_write_across_extents_of_which_one_would_wait_says_no_and_write_does_it() -> None:
    image, driver = shuffled_image()
    driver.resident = {0}
    assert not image.try_write(4090, memoryview(b"y" * 100))
    run(image.write(4090, b"y" * 100))
    assert run(read(image, 4000, 1000)) == expected(4000, 90) + b"y" * 100 + expected(4190, 810)


def test_try_write_up_to_the_end_of_an_extent_is_done() -> None:
    image, driver = shuffled_image()
    driver.resident = {0, 1}
    assert image.try_write(412, memoryview(b"z" * 100))
    assert run(read(image, 412, 100)) == b"z" * 100


def test_try_write_of_more_than_is_written_inline_says_no_in_however_many_pieces_it_would_go() -> None:
    count = TRY_WRITE_MAX // CLUSTER + 1
    driver = FakeDriver(MemoryFile(bytes(count * CLUSTER)), [n * CLUSTER for n in reversed(range(count))])
    driver.resident = set(range(count))
    image = Image(driver, writable=True)
    assert not image.try_write(0, memoryview(b"x" * count * CLUSTER))
    assert image.try_write(0, memoryview(b"x" * TRY_WRITE_MAX))


def test_change_span_of_a_write_in_very_many_places_is_whole_clusters() -> None:
    """To look at all of them would take as long as the write."""
    count = SPAN_EXTENTS_MAX + 1
    driver = FakeDriver(MemoryFile(bytes(count * CLUSTER)), [n * CLUSTER for n in reversed(range(count))])
    driver.resident = set(range(count))
    image = Image(driver, writable=True)
    assert image.change_span(1, SPAN_EXTENTS_MAX * CLUSTER) == (1, SPAN_EXTENTS_MAX * CLUSTER)
    assert image.change_span(1, count * CLUSTER - 1) == (0, count * CLUSTER)


def test_write_of_a_missing_table_loads_it() -> None:
    image, driver = shuffled_image()
    run(image.write(4090, b"0123456789"))
    assert driver.loads == [0, 1]
    assert run(read(image, 4090, 10)) == b"0123456789"


def test_map_clips_to_the_range_and_covers_it() -> None:
    image, _ = shuffled_image()
    extents = run(image.map(100, 2000, extents_max=100))
    assert [(extent.offset, extent.length) for extent in extents] == [
        (100, 412),
        (512, 512),
        (1024, 512),
        (1536, 512),
        (2048, 52),
    ]
    assert extents[0].file_offset == 1124
    assert [extent.kind for extent in extents[:3]] == [ExtentKind.DATA, ExtentKind.DATA, ExtentKind.ZERO]


def test_map_stops_at_extents_max() -> None:
    image, _ = shuffled_image()
    extents = run(image.map(0, 8192, extents_max=3))
    assert [extent.offset for extent in extents] == [0, 512, 1024]


def test_prefetch_asks_for_data_only() -> None:
    inner = FaultFile(MemoryFile(PATTERN))
    driver = FakeDriver(inner, [0, None, 1024])
    run(Image(driver, writable=True).prefetch(0, 1536))
    assert inner.calls.count("prefetch") == 2


# Zero length


def test_zero_length_requests_do_nothing() -> None:
    image, file = raw_image(is_guarded=True)

    async def main() -> None:
        assert await image.read(100, memoryview(bytearray())) == []
        await image.write(100, b"")
        await image.trim(100, 0)
        await image.zero(100, 0, may_unmap=True, is_fast_only=False)
        assert await image.map(100, 0, 10) == []
        await image.prefetch(100, 0)

    run(main())
    assert content(file) == PATTERN


# Trim and zero


def test_trim_punches_the_range_and_forgets_the_mapping() -> None:
    image, file = raw_image()
    run(image.trim(1000, 5000))
    assert content(file) == PATTERN[:1000] + bytes(5000) + PATTERN[6000:]


def test_trim_tells_the_driver_each_piece() -> None:
    driver = FakeDriver(MemoryFile(PATTERN), [0, 512, 1024])
    run(Image(driver, writable=True).trim(500, 600))
    assert driver.unmaps == [(500, 12), (512, 512), (1024, 76)]


def test_trim_where_punching_is_not_supported_leaves_the_bytes() -> None:
    image, file = raw_image()
    file.unsupported = {"punch"}
    run(image.trim(1000, 5000))
    assert content(file) == PATTERN


@pytest.mark.parametrize("may_unmap", [True, False])
@pytest.mark.parametrize("unsupported", [set(), {"punch"}, {"zero"}, {"punch", "zero"}])
def test_zero_reads_as_zeroes_whatever_the_file_supports(may_unmap: bool, unsupported: set[str]) -> None:
    image, file = raw_image()
    file.unsupported = unsupported
    run(image.zero(1000, 5000, may_unmap=may_unmap, is_fast_only=False))
    assert content(file) == PATTERN[:1000] + bytes(5000) + PATTERN[6000:]
    assert ("punch" in file.calls) == may_unmap


def test_zero_without_unmap_never_punches() -> None:
    image, file = raw_image()
    run(image.zero(0, 4096, may_unmap=False, is_fast_only=False))
    assert "punch" not in file.calls
    assert "zero" in file.calls


def test_zero_written_out_goes_in_bounded_pieces() -> None:
    image, file = raw_image(b"x" * (2 * ZERO_WRITE_SIZE + 1000))
    file.unsupported = {"punch", "zero"}
    run(image.zero(10, 2 * ZERO_WRITE_SIZE + 500, may_unmap=True, is_fast_only=False))
    assert content(file) == b"x" * 10 + bytes(2 * ZERO_WRITE_SIZE + 500) + b"x" * 490
    assert file.calls.count("pwrite") == 3


@pytest.mark.parametrize("may_unmap", [True, False])
def test_zero_fast_where_it_would_be_written_out_is_enotsup_and_changes_nothing(may_unmap: bool) -> None:
    image, file = raw_image()
    file.unsupported = {"punch", "zero"}
    with pytest.raises(RequestError) as caught:
        run(image.zero(1000, 5000, may_unmap=may_unmap, is_fast_only=True))
    assert caught.value.errno == errno.EOPNOTSUPP
    assert content(file) == PATTERN
    assert "pwrite" not in file.calls


@pytest.mark.parametrize("unsupported", ["punch", "zero"])
def test_zero_fast_is_done_when_one_of_both_ways_exists(unsupported: str) -> None:
    image, file = raw_image()
    file.unsupported = {unsupported}
    run(image.zero(0, 4096, may_unmap=True, is_fast_only=True))
    assert content(file)[:4096] == bytes(4096)


def test_zero_of_a_hole_that_may_stay_one_writes_nothing_even_where_punching_is_not_supported() -> None:
    file = FaultFile(MemoryFile(bytes(8192)))
    file.unsupported = {"punch"}
    image = Image(HoleDriver(file), writable=True)
    run(image.zero(0, 4096, may_unmap=True, is_fast_only=True))
    run(image.trim(0, 4096))
    assert not {"zero", "pwrite"} & set(file.calls)


def test_zero_of_a_hole_that_must_have_space_asks_for_it() -> None:
    file = FaultFile(MemoryFile(bytes(8192)))
    image = Image(HoleDriver(file), writable=True)
    run(image.zero(0, 4096, may_unmap=False, is_fast_only=False))
    assert "zero" in file.calls


class HoleDriver(RawDriver):
    """All of it is a hole that can be written to."""

    def map(self, offset: int, stop: int) -> Extent:
        return self._extent(ExtentKind.ZERO, 0, self.size)


def test_zero_that_fails_is_raised_and_leaves_the_gate_dirty() -> None:
    """A part of the range may have changed: the next flush must not be free, not even at once."""

    async def main() -> None:
        image, file = raw_image()
        await image.flush()
        file.fail("zero", errno.EIO)
        with pytest.raises(OSError, match="Input/output error"):
            await image.zero(0, 4096, may_unmap=False, is_fast_only=False)
        assert not image.gate.is_clean

    run(main())


def test_try_write_that_fails_behind_its_first_part_leaves_the_gate_dirty() -> None:
    """A reader sees that part: a flush behind it covers what was read."""

    async def main() -> None:
        file = FaultFile(MemoryFile(PATTERN))
        driver = FakeDriver(file, [0, 1024])
        driver.resident = {0}
        image = Image(driver, writable=True)
        await image.flush()
        file.fail_at(1, errno.ENOSPC)
        with pytest.raises(OSError, match="No space"):
            image.try_write(0, memoryview(b"x" * 1024))
        assert await read(image, 0, 512) == b"x" * 512
        assert not image.gate.is_clean

    run(main())


def test_write_that_fails_leaves_the_gate_dirty() -> None:
    async def main() -> None:
        image, file = raw_image()
        await image.flush()
        file.fail("pwrite", errno.ENOSPC)
        with pytest.raises(OSError, match="No space"):
            await image.write(0, b"data")
        assert not image.gate.is_clean

    run(main())


# The guard of probed raw images


MAGICS = [
    (0, b"QFI\xfb"),
    (0, b"vhdxfile"),
    (0, b"KDMV"),
    (0x40, b"\x7f\x10\xda\xbe"),
    (0, b"QED\0"),
    (0, b"LUKS\xba\xbe"),
]


def assert_refused(image: Image, offset: int, data: bytes) -> None:
    assert not image.try_write(offset, memoryview(data)), "the fast path let a guarded write through"
    with pytest.raises(RequestError, match="would make this probed raw image look like") as caught:
        run(image.write(offset, data))
    assert caught.value.errno == errno.EPERM


@pytest.mark.parametrize(("offset", "magic"), MAGICS)
def test_guard_refuses_a_planted_magic_and_changes_nothing(offset: int, magic: bytes) -> None:
    image, file = raw_image(is_guarded=True)
    assert_refused(image, offset, magic)
    assert_refused(image, offset, magic + bytes(8192))
    assert content(file) == PATTERN


@pytest.mark.parametrize(("offset", "magic"), MAGICS)
def test_guard_refuses_the_last_byte_of_a_magic_planted_byte_by_byte(offset: int, magic: bytes) -> None:
    for order in (range(len(magic)), reversed(range(len(magic)))):
        image, file = raw_image(b"\xee" * 4096, is_guarded=True)
        *most, last = order
        for index in most:
            run(image.write(offset + index, magic[index : index + 1]))
        before = content(file)
        assert_refused(image, offset + last, magic[last : last + 1])
        assert content(file) == before


@pytest.mark.parametrize(("offset", "magic"), MAGICS)
def test_guard_refuses_a_magic_planted_by_two_writes(offset: int, magic: bytes) -> None:
    image, _ = raw_image(b"\xee" * 4096, is_guarded=True)
    run(image.write(offset, magic[:2]))
    assert_refused(image, offset + 2, magic[2:] + b"more")


@pytest.mark.parametrize("may_unmap", [True, False])
def test_guard_refuses_zeroes_that_complete_a_magic(may_unmap: bool) -> None:
    """QED's magic ends in a zero byte, which WRITE_ZEROES writes as well as WRITE does."""
    image, file = raw_image(b"\xee" * 4096, is_guarded=True)
    run(image.write(0, b"QED\xee"))
    with pytest.raises(RequestError) as caught:
        run(image.zero(3, 1, may_unmap=may_unmap, is_fast_only=False))
    assert caught.value.errno == errno.EPERM
    assert content(file)[:4] == b"QED\xee"


def test_guard_refuses_or_ignores_a_trim_that_completes_a_magic() -> None:
    image, file = raw_image(b"\xee" * 4096, is_guarded=True)
    run(image.write(0, b"QED\xee"))
    with suppress(RequestError):
        run(image.trim(3, 1))
    assert planted(content(file)[:HEAD_SIZE]) is None


def test_guard_allows_other_bytes_in_the_head_and_everything_behind_it() -> None:
    image, file = raw_image(is_guarded=True)
    run(image.write(0, b"\x55\xaa" * 300))
    assert image.try_write(HEAD_SIZE, memoryview(b"QFI\xfb"))
    run(image.write(HEAD_SIZE - 1, b"xQFI\xfb"))
    assert content(file)[:600] == b"\x55\xaa" * 255 + b"\x55" + b"xQFI\xfb" + (b"\x55\xaa" * 300)[516:]


def test_guard_of_an_image_shorter_than_the_head() -> None:
    image, file = raw_image(b"\xee" * 16, is_guarded=True)
    assert_refused(image, 0, b"vhdxfile")
    run(image.write(8, b"vhdxfile"))
    assert content(file) == b"\xee" * 8 + b"vhdxfile"


def test_without_a_guard_a_magic_is_written() -> None:
    image, file = raw_image()
    assert image.try_write(0, memoryview(b"QFI\xfb"))
    assert content(file)[:4] == b"QFI\xfb"


# After a failed flush


def test_after_a_failed_flush_every_change_is_refused_and_reads_go_on() -> None:
    image, file = raw_image()

    async def main() -> None:
        file.fail("fdatasync", errno.EIO)
        with pytest.raises(ImageFailed):
            await image.flush()
        file.heal()
        with pytest.raises(ImageFailed):
            image.try_write(0, memoryview(b"x"))
        with pytest.raises(ImageFailed):
            await image.write(0, b"x")
        with pytest.raises(ImageFailed):
            await image.trim(0, 512)
        with pytest.raises(ImageFailed):
            await image.zero(0, 512, may_unmap=True, is_fast_only=True)
        with pytest.raises(ImageFailed):
            await image.flush()
        assert await read(image, 0, 512) == PATTERN[:512]
        with pytest.raises(ImageFailed):
            await image.close()

    run(main())
    assert content(file) == PATTERN


def test_close_flushes_what_is_dirty_and_closes_the_file() -> None:
    image, file = raw_image()
    run(image.close())
    assert file.calls.count("fdatasync") == 1


def test_flush_of_a_read_only_image_is_one_barrier_after_opening() -> None:
    """What an earlier server wrote may still be in the page cache."""
    file = FaultFile(MemoryFile(PATTERN, writable=False))
    image = Image(RawDriver(file), writable=False)
    run(image.flush())
    run(image.flush())
    assert file.calls == ["fdatasync"]


def test_close_of_a_read_only_image_does_not_flush() -> None:
    file = FaultFile(MemoryFile(PATTERN, writable=False))
    run(Image(RawDriver(file), writable=False).close())
    assert file.calls == []
