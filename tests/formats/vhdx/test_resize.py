"""Resizing: what was there stays, what is new reads as zeroes, others agree, a crash leaves one of the two sizes."""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from nbdimg.errors import ConfigError, ImageFailed, UnsupportedFeature
from nbdimg.formats import open_file, open_image, resize_image
from nbdimg.formats.findings import CheckReport
from nbdimg.formats.options import OpenOptions
from nbdimg.formats.vhdx.check import check
from nbdimg.formats.vhdx.driver import VhdxDriver
from nbdimg.formats.vhdx.header import load_headers
from nbdimg.image.gate import Reference
from nbdimg.image.image import Image
from nbdimg.storage.file import Buffer
from nbdimg.storage.memory import MemoryFile
from nbdimg.storage.posix import PosixFile
from nbdimg.units import GiB, KiB, MiB, TiB
from tests.formats.vhdx import craft
from tests.support.crash import RecordingFile
from tests.support.crash.states import crash_states
from tests.support.crash.trace import Trace
from tests.support.faultfile import FaultFile, fail_at_each_call
from tests.support.reading import bytes_of
from tests.support.vhdximages import (
    BAT_OFFSET,
    FULL,
    IS_FIXED,
    UNMAPPED,
    Builder,
    dynamic,
    fixed,
    flattened,
    judge,
    run,
)

SIZE_OFFSET = 2 * MiB + 64 * KiB + 8
"""Of Virtual Disk Size in these images."""


class Gate:
    """Opens a parent of this many MiB, full of 0x0f."""

    def __init__(self, size: int = 0) -> None:
        self._size = size

    async def open(self, reference: Reference) -> MemoryFile:
        return MemoryFile(dynamic(b"\x0f" * self._size), "parent.vhdx", writable=False)


async def opened(
    file: MemoryFile | RecordingFile | FaultFile, gate: Gate | None = None, *, writable: bool = True
) -> Image:
    return await open_file(file, "vhdx", OpenOptions(gate or Gate(), writable=writable))


async def guest_of(image: Image) -> bytes:
    """The disk, of a large one the beginning."""
    return await bytes_of(image, 0, min(image.size, 16 * MiB))


def resized(content: bytes | bytearray, *sizes: int, gate: Gate | None = None) -> tuple[bytearray, bytes]:
    """The file's bytes and the disk's, in one session with all the sizes and in the next the same."""

    async def work() -> tuple[bytearray, bytes]:
        file = MemoryFile(content, "x.vhdx")
        image = await opened(file, gate)
        for size in sizes:
            await resize_image(image, size, may_shrink=True)
            assert image.size == size
        guest = await guest_of(image)
        await image.close()
        assert await guest_of(await opened(file, gate, writable=False)) == guest
        report = await check(file)
        assert (report.corruptions, report.check_errors, report.log) == (0, 0, "clean")
        return file.content, guest

    return asyncio.run(work())


def entries(content: bytearray, count: int) -> tuple[int, ...]:
    return struct.unpack_from(f"<{count}Q", content, BAT_OFFSET)


def test_resize_that_grows_adds_zeroes() -> None:
    content, guest = resized(dynamic(b"\1" * 2 * MiB), 5 * MiB)
    assert guest == b"\1" * 2 * MiB + bytes(3 * MiB)
    assert struct.unpack_from("<Q", content, SIZE_OFFSET) == (5 * MiB,)
    assert len(content) == 6 * MiB


def test_resize_gives_a_new_data_write_guid_and_leaves_the_log_empty() -> None:
    content, _ = resized(dynamic(b"\1" * MiB), 5 * MiB)
    for offset in (64 * KiB, 128 * KiB):
        header = content[offset : offset + 4 * KiB]
        assert craft.sealed(header) == header
        assert header[16:32] != craft.FILE_WRITE_GUID.bytes_le
        assert header[32:48] != craft.DATA_WRITE_GUID.bytes_le
        assert header[48:64] == bytes(16)


def test_resize_forgets_the_former_tables_and_goes_on_counting() -> None:
    async def main() -> None:
        image = await opened(MemoryFile(dynamic(b"\1" * MiB), "x.vhdx"))
        await guest_of(image)
        await guest_of(image)
        assert isinstance(image.driver, VhdxDriver)
        former = image.driver.tables["bat"]
        before = former.hit_count, former.load_count
        assert min(before) > 0
        await resize_image(image, 5 * MiB)
        tables = dict(image.tables())
        assert (tables["bat"].hit_count, tables["bat"].load_count) == before
        assert tables["bat"] is not former
        assert not former.slices
        await image.close()

    asyncio.run(main())


def test_resize_to_the_same_size_changes_nothing() -> None:
    content = dynamic(b"\1" * MiB)
    assert resized(content, MiB)[0] == content


def test_resize_that_grows_zeroes_what_a_short_block_held_behind_the_end() -> None:
    builder = Builder(MiB + 512)
    builder.add_full(1, b"\1" * MiB)
    _, guest = resized(builder.content, 2 * MiB)
    assert guest == bytes(MiB) + b"\1" * 512 + bytes(MiB - 512)


def test_resize_where_the_file_system_cannot_zero_writes_zeroes_behind_the_end() -> None:
    builder = Builder(MiB + 512)
    builder.add_full(1, b"\1" * MiB)
    memory = MemoryFile(builder.content)
    file = FaultFile(memory)
    file.unsupported.add("zero")

    async def work() -> bytes:
        image = await open_file(file, "vhdx", OpenOptions(Gate(), writable=True))
        await resize_image(image, 2 * MiB)
        await image.close()
        return await guest_of(await opened(memory, writable=False))

    assert asyncio.run(work()) == bytes(MiB) + b"\1" * 512 + bytes(MiB - 512)


def test_resize_that_grows_clears_entries_of_blocks_that_were_not_there() -> None:
    builder = Builder(2 * MiB)
    builder.add_full(0, b"\1" * MiB)
    for block in (2, 3, 600, 4097):
        builder.set_block(block, 4 * MiB | FULL)
    content, guest = resized(builder.content, 5000 * MiB)
    assert guest[: 4 * MiB] == b"\1" * MiB + bytes(3 * MiB)
    assert entries(content, 5001)[1:] == (0,) * 5000


def test_resize_that_grows_beyond_the_region_moves_the_bat(tmp_path: Path) -> None:
    content, _ = resized(dynamic(b"\1" * 3 * MiB), 131057 * MiB)
    table = craft.region_table(craft.region(craft.BAT, 7 * MiB, 2 * MiB), craft.region(craft.METADATA, 2 * MiB))
    assert content[192 * KiB : 256 * KiB] == content[256 * KiB : 320 * KiB] == table
    assert struct.unpack_from("<4Q", content, 7 * MiB) == (4 * MiB | FULL, 5 * MiB | FULL, 6 * MiB | FULL, 0)
    path = tmp_path / "a.vhdx"
    path.write_bytes(content)
    run("qemu-img", "check", "-q", path)
    run("qemu-io", "-r", "-f", "vhdx", "-c", "read -q -P 1 0 3M", "-c", "read -q -P 0 3M 9M", path)


def test_resize_keeps_the_bat_where_it_just_fits() -> None:
    largest = (MiB // 8 - 31) * MiB  # 131072 entries, of which 31 are bitmaps'
    assert len(resized(dynamic(b"\1" * MiB), largest)[0]) == 5 * MiB


def test_resize_that_shrinks_lets_blocks_behind_the_end_go() -> None:
    content, guest = resized(dynamic(b"\1" * 4 * MiB), MiB + 512)
    assert guest == b"\1" * (MiB + 512)
    assert entries(content, 4) == (4 * MiB | FULL, 5 * MiB | FULL, 0, 0)
    assert resized(content, 4 * MiB)[1] == b"\1" * (MiB + 512) + bytes(3 * MiB - 512)


def test_resize_that_shrinks_gives_back_the_space_of_what_it_lets_go(tmp_path: Path) -> None:
    """At the end of the file, and before what the disk still has."""
    path = tmp_path / "x.vhdx"
    builder = Builder(8 * MiB)
    for block in (7, 0, 6, 5, 1, 4):
        builder.add_full(block, b"\1" * MiB)
    path.write_bytes(builder.content)

    async def work() -> CheckReport:
        image = await open_image(path)
        await resize_image(image, 2 * MiB, may_shrink=True)
        await image.close()
        file = PosixFile(path, writable=False)
        report = await check(file)
        await file.close()
        return report

    report = asyncio.run(work())
    assert (report.corruptions, report.leaks, report.allocated_clusters) == (0, 0, 2)
    assert path.stat().st_size == len(builder.content) - MiB
    judge(path, b"\1" * (2 * MiB))


def test_resize_down_and_up_in_one_session_shows_zeroes() -> None:
    assert resized(dynamic(b"\1" * 4 * MiB), MiB, 3 * MiB)[1] == b"\1" * MiB + bytes(2 * MiB)


def test_resize_of_a_fixed_image_adds_blocks() -> None:
    content, guest = resized(fixed(b"\1" * 2 * MiB), 4 * MiB)
    assert entries(content, 5) == (*((4 + block) * MiB | FULL for block in range(4)), 0)
    assert (len(content), guest) == (8 * MiB, b"\1" * 2 * MiB + bytes(2 * MiB))


def test_resize_of_a_fixed_image_reserves_the_space(tmp_path: Path) -> None:
    path = tmp_path / "a.vhdx"
    path.write_bytes(fixed(b"\1" * 2 * MiB))

    async def work() -> None:
        image = await open_image(path)
        await resize_image(image, 6 * MiB)
        await image.close()

    asyncio.run(work())
    assert os.stat(path).st_blocks * 512 >= 6 * MiB
    judge(path, b"\1" * 2 * MiB + bytes(4 * MiB))
    assert flattened(path) == b"\1" * 2 * MiB + bytes(4 * MiB)


def test_resize_of_a_fixed_image_passes_over_a_bitmaps_entry() -> None:
    builder = Builder(15 * 256 * MiB, block_size=256 * MiB, flags=IS_FIXED)
    file = SparseFile(builder.content)

    async def work() -> None:
        image = await opened(file)
        await resize_image(image, 17 * 256 * MiB)
        await image.close()

    asyncio.run(work())
    assert entries(file.content, 19)[14:] == (0, 4 * MiB | FULL, 0, 260 * MiB | FULL, 0)


class SparseFile(MemoryFile):
    """Its size can be large, its bytes are the first MiB alone."""

    _size: int | None = None

    @property
    def size(self) -> int:
        return len(self.content) if self._size is None else self._size

    async def truncate(self, size: int) -> None:
        self._size = size

    def try_data_extent(self, offset: int) -> tuple[bool, int]:
        is_data = offset < len(self.content)
        return is_data, len(self.content) if is_data else self.size


def test_resize_of_a_child_keeps_its_bitmap_and_clears_the_rest_of_the_chunk() -> None:
    builder = Builder(2 * MiB, parent=".\\parent.vhdx")
    builder.add_partial(1, b"\1" * MiB, [(8, 16)])
    builder.set_block(2, 5 * MiB | FULL)
    builder.set_block(3, 9 * MiB | UNMAPPED)
    content, guest = resized(builder.content, 4 * MiB, gate=Gate(2 * MiB))
    assert guest == b"\x0f" * (MiB + 4096) + b"\1" * 4096 + b"\x0f" * (MiB - 8192) + bytes(2 * MiB)
    assert entries(content, 4) == (0, 5 * MiB | 7, 0, 0)
    assert entries(content, 4097)[4096] == 4 * MiB | FULL


def test_resize_of_a_child_that_would_show_more_of_its_parent_is_refused() -> None:
    builder = Builder(2 * MiB, parent=".\\parent.vhdx")
    with pytest.raises(UnsupportedFeature, match="expected a parent that is not larger"):
        resized(builder.content, 4 * MiB, gate=Gate(3 * MiB))
    assert resized(builder.content, MiB, gate=Gate(3 * MiB))[1] == b"\x0f" * MiB


def test_resize_of_a_child_whose_parent_is_given_asks_for_no_name_of_it() -> None:
    """Its locator has none; the parent that is open stays what is read."""
    content = Builder(2 * MiB, parent=".\\parent.vhdx").content
    name, other = ("relative_path".encode("utf-16-le"), "relative_text".encode("utf-16-le"))
    assert content.count(name) == 1
    file = MemoryFile(content.replace(name, other), "x.vhdx")

    async def work() -> None:
        options = OpenOptions(Gate(2 * MiB), writable=True, parent_path="parent.vhdx")
        image = await open_file(file, "vhdx", options)
        await resize_image(image, 3 * MiB)
        await image.write(2 * MiB, b"\1" * MiB)
        await image.close()
        image = await open_file(file, "vhdx", options)
        assert await guest_of(image) == b"\x0f" * (2 * MiB) + b"\1" * MiB
        await image.close()

    asyncio.run(work())


@pytest.mark.parametrize(("size", "sector_size"), [(0, 512), (100, 512), (512, 4096), (64 * TiB + 512, 512)])
def test_resize_to_a_size_that_cannot_be_is_refused(size: int, sector_size: int) -> None:
    with pytest.raises(ConfigError, match=f"the size is {size} bytes, expected a multiple of the .* {sector_size}"):
        resized(Builder(MiB, sector_size=sector_size).content, size)


def test_resize_after_writes_keeps_them_and_the_image_goes_on() -> None:
    async def work() -> bytes:
        file = MemoryFile(Builder(4 * MiB).content)
        image = await opened(file)
        await image.write(MiB, b"\1" * 512)
        await resize_image(image, 8 * MiB)
        await image.write(7 * MiB, b"\2" * 512)
        await image.close()
        return await guest_of(await opened(file, writable=False))

    found = asyncio.run(work())
    expected = bytes(MiB) + b"\1" * 512 + bytes(6 * MiB - 512) + b"\2" * 512 + bytes(MiB - 512)
    assert found == expected


def test_resize_that_fails_ends_the_session_and_the_file_opens_again() -> None:
    async def work() -> bytes:
        file = RecordingFile(Trace(), dynamic(b"\1" * MiB), inline_share=0)
        image = await opened(file)
        file.failing_syncs = frozenset({4})
        with pytest.raises(OSError, match="Input/output"):
            await resize_image(image, 4 * MiB)
        with pytest.raises(ImageFailed, match="a resize was not finished"):
            await image.flush()
        with pytest.raises(ImageFailed):
            await image.close()
        return await guest_of(await opened(MemoryFile(file.content)))

    assert asyncio.run(work())[:MiB] == b"\1" * MiB


class FullFile(FaultFile):
    """May not become longer than `size_max`."""

    size_max: int | None = None

    async def truncate(self, size: int) -> None:
        self._check(size)
        await super().truncate(size)

    async def zero(self, offset: int, length: int) -> bool:
        self._check(offset + length)
        return await super().zero(offset, length)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        self._check(offset + len(data))
        await super().pwrite(offset, data)

    def _check(self, stop: int) -> None:
        if self.size_max is not None and stop > self.size_max:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("room", [0, MiB])
@pytest.mark.parametrize(("content", "size"), [(dynamic(b"\1" * MiB), 512 * GiB), (fixed(b"\1" * MiB), 3 * MiB)])
def test_growth_that_finds_no_space_keeps_the_size_and_the_image_goes_on(content: bytes, size: int, room: int) -> None:
    async def work() -> None:
        memory = MemoryFile(content)
        file = FullFile(memory)
        image = await opened(file)
        await image.write(0, b"\2" * 512)
        file.size_max = len(content) + room
        for _ in range(2):
            with pytest.raises(OSError, match="No space left on device"):
                await resize_image(image, size)
            assert (image.size, image.failure) == (MiB, None)
            await image.write(512, b"\3" * 512)
            await image.flush()
        file.size_max = None
        await resize_image(image, 2 * MiB)
        await image.write(MiB, b"\4" * MiB)
        await image.close()
        guest = await guest_of(await opened(MemoryFile(memory.content)))
        assert guest == b"\2" * 512 + b"\3" * 512 + b"\1" * (MiB - 1024) + b"\4" * MiB
        report = await check(MemoryFile(memory.content))
        assert (report.corruptions, report.leaks) == (0, 0)

    asyncio.run(work())


@pytest.mark.parametrize(("before", "after"), [(1, 4), (6, 2), (1, 512 * KiB)])
def test_resize_that_finds_no_space_tells_the_size_that_the_disk_has_and_leaks_nothing(before: int, after: int) -> None:
    went_on_count = 0

    async def work(index: int) -> bool:
        nonlocal went_on_count
        file = FaultFile(MemoryFile(dynamic(b"\1" * (before * MiB))), slow_only=True)
        image = await opened(file)
        file_size = file.size
        file.fail_at(index, errno.ENOSPC)
        is_refused = False
        try:
            await resize_image(image, after * MiB, may_shrink=True)
        except (OSError, ImageFailed):
            is_refused = True
        if image.failure is None:
            assert image.size == (before if is_refused else after) * MiB, f"call {index}"
            assert not is_refused or file.size == file_size, f"call {index}"
            went_on_count += is_refused
            is_reached = file.is_reached
            file.heal()
            await image.close()
            assert (await check(file)).leaks == 0, f"call {index}"
            return is_reached
        return file.is_reached

    fail_at_each_call(work)
    assert went_on_count >= 2


def test_growth_that_finds_no_space_for_all_of_its_blocks_gives_back_what_it_took() -> None:
    async def work() -> None:
        content = fixed(b"\1" * MiB)
        file = FaultFile(MemoryFile(content))
        image = await opened(file)
        file.fail("zero", errno.ENOSPC)
        with pytest.raises(OSError, match="No space left on device"):
            await resize_image(image, 3 * MiB)
        assert file.size == len(content)

    asyncio.run(work())


@pytest.mark.parametrize(("content", "size"), [(dynamic(b"\1" * MiB), 512 * GiB), (fixed(b"\1" * MiB), 3 * MiB)])
def test_growth_that_finds_no_space_leaves_a_parent_that_its_children_fit(content: bytes, size: int) -> None:
    async def work() -> None:
        file = FullFile(MemoryFile(content))
        image = await opened(file)
        file.size_max = len(content)
        with pytest.raises(OSError, match="No space left on device"):
            await resize_image(image, size)
        await image.close()
        assert (await load_headers(file)).current.data_write_guid == craft.DATA_WRITE_GUID

    asyncio.run(work())


def test_resize_behind_a_session_that_could_not_begin_leaves_a_log_that_can_be_read() -> None:
    """A header may name the former session's log on disk: it is ended first, not written over."""

    async def work(index: int) -> bool:
        memory = MemoryFile(dynamic(b"\1" * MiB))
        file = FaultFile(memory, slow_only=True)
        image = await opened(file)
        file.fail_at(4, errno.EIO)  # an entry, its barrier, the first header, its barrier
        with pytest.raises(OSError, match="Input/output"):
            await image.write(0, b"\2" * 512)
        file.fail_at(index, errno.EIO)
        with suppress(OSError, ImageFailed):
            await resize_image(image, 4 * MiB)
        assert (await guest_of(await opened(MemoryFile(memory.content))))[:MiB] == b"\1" * MiB, f"call {index}"
        return file.is_reached

    assert fail_at_each_call(work) > 10


# Crashes


def crashes(
    content: bytes, sizes: Sequence[int], *, gate: Gate | None = None, without_barriers: bool = False
) -> Iterator[str]:
    """What is wrong with states that a crash during a resize leaves."""
    trace = Trace()
    guests: list[bytes] = []

    async def work() -> None:
        image = await opened(RecordingFile(trace, content, inline_share=0), gate)
        guests.append(await guest_of(image))
        for size in sizes:
            await resize_image(image, size, may_shrink=True)
            guests.append(await guest_of(image))
        await image.close()

    async def found(left: MemoryFile) -> tuple[bytes, bytes]:
        before = await guest_of(await opened(left, gate, writable=False))
        image = await opened(left, gate)
        after = await guest_of(image)
        await image.close()
        assert (await check(left)).corruptions == 0
        return before, after

    asyncio.run(work())
    for state in crash_states(trace, seed=1, cap=4, without_barriers=without_barriers):
        try:
            before, after = asyncio.run(found(MemoryFile(state.files[0])))
            if before != after or before not in guests:
                yield f"{state}: {len(before)} bytes"
        except Exception as error:
            yield f"{state}: {error}"


def test_resize_that_is_interrupted_leaves_the_old_disk_or_the_new_one() -> None:
    builder = Builder(2 * MiB - 512)
    builder.add_full(0, b"\1" * MiB)
    builder.add_full(1, b"\2" * MiB)
    assert list(crashes(bytes(builder.content), (3 * MiB, MiB))) == []


def test_resize_of_a_fixed_image_that_is_interrupted_leaves_one_of_the_disks() -> None:
    assert list(crashes(fixed(b"\1" * (2 * MiB - 512)), (3 * MiB,))) == []


@pytest.mark.parametrize("sizes", [(5 * MiB, 2 * MiB + 4096), (200 * GiB, MiB + 4096)], ids=["in place", "table moves"])
def test_resize_of_a_child_that_is_interrupted_leaves_one_of_the_disks(sizes: tuple[int, ...]) -> None:
    """Of a block in part its own, of one that hides its parent, and of the parent in what the child has not."""
    builder = Builder(3 * MiB + 4096, parent=".\\parent.vhdx")
    builder.add_partial(0, b"\1" * MiB, [(8, 24), (100, 101), (1000, 2000)])
    builder.set_block(1, UNMAPPED)
    builder.add_partial(3, b"\2" * MiB, [(0, 8), (16, 24)])
    gate = Gate(3 * MiB)
    assert list(crashes(bytes(builder.content), sizes, gate=gate)) == []


def test_control_resize_without_barriers_leaves_neither() -> None:
    builder = Builder(2 * MiB - 512)
    builder.add_full(1, b"\2" * MiB)
    assert next(crashes(bytes(builder.content), (3 * MiB,), without_barriers=True), None) is not None
