"""Persistent dirty bitmaps in files: what QEMU made is read, what is malformed is refused, and no crash leaves a
bitmap that says less than what has changed.
"""

from __future__ import annotations

import asyncio
import errno
import re
import struct
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest

from nbdimg.errors import ConfigError, CorruptImage, ImageError, ImageFailed, UnsupportedFeature
from nbdimg.formats import open_file
from nbdimg.formats.gate import DenyGate
from nbdimg.formats.options import OpenOptions
from nbdimg.formats.qcow2 import bitmap_store
from nbdimg.formats.qcow2.bitmap_edit import BitmapEditor, open_editor
from nbdimg.formats.qcow2.bitmaps import BitmapEntry, directory_region, load_bits, load_directory, load_table
from nbdimg.formats.qcow2.check import check
from nbdimg.formats.qcow2.header import Header
from nbdimg.formats.qcow2.open import read_header
from nbdimg.formats.qcow2.resize import resize
from nbdimg.formats.qcow2.structs import ExtensionType
from nbdimg.image.bitmap import DirtyBitmap
from nbdimg.image.image import Image
from nbdimg.storage.file import BlockFile, Buffer
from nbdimg.storage.memory import MemoryFile
from nbdimg.storage.ordering import Hindrance, UnwrittenError
from tests.support.crash import CrashState, RecordingFile, Trace, crash_states
from tests.support.faultfile import FaultFile, fail_at_each_call
from tests.support.qcow2edit import qemu_img, qemu_io
from tests.support.reading import read_all

SIZE = 1 << 20
GRANULARITY = 4096
BITMAPS_TYPE = 0x23852875

Ranges = list[tuple[int, int]]
"""(start, stop) in bytes."""


def made(path: Path, options: str = "", *, size: int = SIZE, bitmaps: tuple[str, ...] = ("b0",)) -> bytes:
    """An image by QEMU: `b0` records, and 64 KiB from 256 KiB on are dirty in every bitmap; `frozen` is disabled."""
    qemu_img("create", "-q", "-f", "qcow2", *(("-o", options) if options else ()), path, str(size))
    for name in bitmaps:
        qemu_img("bitmap", "--add", "-g", str(GRANULARITY), path, name)
    qemu_io(path, "write -q -P 1 256k 64k")
    if "frozen" in bitmaps:
        qemu_img("bitmap", "--disable", path, "frozen")
    return path.read_bytes()


FIRST: Ranges = [(256 << 10, 320 << 10)]


async def opened(file: BlockFile, *, writable: bool = True) -> Image:
    return await open_file(file, "qcow2", OpenOptions(DenyGate(), writable=writable))


def dirty_of(bitmap_runs: list[tuple[int, bool]]) -> Ranges:
    found, offset = [], 0
    for length, is_dirty in bitmap_runs:
        if is_dirty:
            found.append((offset, offset + length))
        offset += length
    return found


async def stored(file: BlockFile) -> dict[str, Ranges | None]:
    """By name what each bitmap on disk says; None: it is inconsistent."""
    header = await read_header(file)
    found: dict[str, Ranges | None] = {}
    for entry in await load_directory(file, header):
        found[entry.name] = None
        if entry.is_consistent:
            bitmap = await load_bits(file, header, entry, await load_table(file, header, entry))
            found[entry.name] = dirty_of(list(bitmap.runs(0, bitmap.size)))
    return found


async def checked(file: BlockFile) -> int:
    return (await check(file, await read_header(file))).exit_status


# What QEMU made


@pytest.mark.parametrize("options", ["", "cluster_size=512", "cluster_size=2M", "extended_l2=on"])
def test_bitmaps_of_qemu_are_read(tmp_path: Path, options: str) -> None:
    content = made(tmp_path / "disk", options, bitmaps=("b0", "frozen"))
    assert asyncio.run(stored(MemoryFile(content))) == {"b0": FIRST, "frozen": FIRST}


def test_bitmap_table_entries_of_ones_and_zeroes_are_read(tmp_path: Path) -> None:
    """Spec: an entry without an offset says that its bits are all 0 or, with bit 0, all 1."""
    content = bytearray(made(tmp_path / "disk"))
    for entry, expected in ((1, [(0, SIZE)]), (0, [])):
        put("table", 0, ">Q", entry)(content)
        assert asyncio.run(stored(MemoryFile(content))) == {"b0": expected}


def test_bitmap_of_an_image_whose_autoclear_bit_is_clear_is_none(tmp_path: Path) -> None:
    content = bytearray(made(tmp_path / "disk"))
    content[88:96] = bytes(8)
    assert asyncio.run(stored(MemoryFile(content))) == {}


# What is malformed


def extension(content: bytes | bytearray) -> int:
    """Where the bitmaps extension's data begins."""
    return content.index(struct.pack(">II", BITMAPS_TYPE, 24)) + 8


def directory(content: bytes | bytearray) -> int:
    return int(struct.unpack_from(">Q", content, extension(content) + 16)[0])


def field(content: bytes | bytearray, offset: int) -> int:
    """A 64-bit field of the first directory entry."""
    return int(struct.unpack_from(">Q", content, directory(content) + offset)[0])


def table(content: bytes | bytearray) -> int:
    """Where the first bitmap's table begins."""
    return field(content, 0)


def put(kind: str, offset: int, layout: str, *values: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        start = {"extension": extension, "directory": directory, "table": table}[kind](content)
        struct.pack_into(layout, content, start + offset, *values)

    return change


def with_inconsistent(path: Path) -> MemoryFile:
    """An image whose bitmap b0 is in use and enabled, as after a crash; b1 is consistent."""
    content = bytearray(made(path, bitmaps=("b0", "b1")))
    put("directory", 12, ">I", 3)(content)
    return MemoryFile(content)


def same_names(content: bytearray) -> None:
    start = directory(content)
    second = content.index(b"b1", start)
    content[second : second + 2] = b"b0"


MALFORMED = {
    "no bitmaps": (put("extension", 0, ">I", 0), "nb_bitmaps is 0, expected 1 to 65535"),
    "too many bitmaps": (put("extension", 0, ">I", 65536), "nb_bitmaps is 65536"),
    "one bitmap more": (put("extension", 0, ">I", 3), "(?s).*bitmap_directory_size is 64, expected 72 to"),
    "one bitmap less": (put("extension", 0, ">I", 1), "bitmap_directory_size is 64, expected 32"),
    "reserved": (put("extension", 4, ">I", 1), "reserved field is 1, expected 0"),
    "directory too large": (put("extension", 8, ">Q", 65535 * 1024 + 1), "bitmap_directory_size is 67107841"),
    "directory outside": (put("extension", 16, ">Q", 1 << 40), "bitmap_directory_offset is 1099511627776"),
    "directory at the header": (put("extension", 16, ">Q", 0), "bitmap_directory_offset is 0"),
    "directory misaligned": (put("extension", 16, ">Q", 65536 + 512), "bitmap_directory_offset is 66048"),
    "table outside": (put("directory", 0, ">Q", 1 << 40), "bitmap 0: table offset is 1099511627776"),
    "table misaligned": (put("directory", 0, ">Q", 65537), "bitmap 0: table offset is 65537"),
    "table empty": (put("directory", 8, ">I", 0), "bitmap 0: table size is 0, expected 1 to 8192"),
    "table too large": (put("directory", 8, ">I", 8193), "bitmap 0: table size is 8193"),
    "flags": (put("directory", 12, ">I", 8 | 2), "bitmap 0: flags is 0xa"),
    "extra data compatible": (put("directory", 12, ">I", 4 | 2), "bitmap 0: it has extra data"),
    "type": (put("directory", 16, ">B", 2), "bitmap 0: type is 2, expected 1"),
    "granularity too small": (put("directory", 17, ">B", 8), "granularity_bits is 8, expected 9 to 31"),
    "granularity too large": (put("directory", 17, ">B", 32), "granularity_bits is 32"),
    "no name": (put("directory", 18, ">H", 0), "name_size is 0, expected 1 to 1023"),
    "name too long": (put("directory", 18, ">H", 1024), "name_size is 1024"),
    "name beyond the directory": (put("directory", 18, ">H", 100), "name_size is 100, expected a name within"),
    "extra data": (put("directory", 20, ">I", 8), "bitmap 0: it has extra data"),
    "name not UTF-8": (put("directory", 24, ">B", 0xFF), "bitmap 0: name is '.*', expected UTF-8"),
    "name with NUL": (put("directory", 24, ">B", 0), "bitmap 0: name is .*, expected no NUL"),
    "same names": (same_names, "bitmap 1: name is 'b0', expected one that is there once"),
    "table entry reserved": (put("table", 0, ">Q", 1 << 62), "bitmap 'b0': table entry 0 is 0x4000000000000000"),
    "table entry with offset and bit 0": (put("table", 0, ">Q", 65537), "bitmap 'b0': table entry 0"),
    "table entry outside": (put("table", 0, ">Q", 1 << 40), "bitmap 'b0': table entry 0"),
    "bits on the L1 table": (put("table", 0, ">Q", 3 << 16), "cluster 3 belongs to a bitmap and to other metadata"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_open_for_writing_malformed_bitmaps_are_refused(tmp_path: Path, what: str) -> None:
    change, pattern = MALFORMED[what]
    content = bytearray(made(tmp_path / "disk", bitmaps=("b0", "b1")))
    asyncio.run(_open_and_close(MemoryFile(content)))  # the control: without the change it opens
    change(content)
    with pytest.raises(ImageError, match=pattern) as refusal:
        asyncio.run(_open_and_close(MemoryFile(content)))
    assert re.search(r"offset \d+\)$", str(refusal.value))


async def _open_and_close(file: BlockFile) -> None:
    await (await opened(file)).close()


def test_open_small_table_for_a_large_disk_is_refused(tmp_path: Path) -> None:
    """Granularity 512 with clusters of 512: a table of one entry covers 2 MiB."""
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", tmp_path / "disk", "3M")
    qemu_img("bitmap", "--add", "-g", "512", tmp_path / "disk", "b0")
    content = bytearray((tmp_path / "disk").read_bytes())
    put("directory", 8, ">I", 1)(content)
    with pytest.raises(CorruptImage, match="table size is 1, expected 2 to"):
        asyncio.run(_open_and_close(MemoryFile(content)))


# Recording


async def record_and_read(file: BlockFile, change: Callable[[Image], Awaitable[object]]) -> Ranges:
    image = await opened(file)
    await change(image)
    found = dirty_of(list((await image.bitmap("b0")).runs(0, image.size)))
    await image.close()
    assert await stored(file) == {"b0": found}
    assert await checked(file) == 0
    return found


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda image: image.write(100, b"x"), [(0, 4096), *FIRST]),
        (lambda image: image.write(8191, bytes(2)), [(4096, 12288), *FIRST]),
        (lambda image: image.zero(512, 512, may_unmap=True, is_fast_only=False), [(0, 4096), *FIRST]),
        (lambda image: image.zero(0, SIZE, may_unmap=False, is_fast_only=False), [(0, SIZE)]),
        (lambda image: image.trim(SIZE // 2, SIZE // 2), [*FIRST, (SIZE // 2, SIZE)]),
        (lambda image: image.trim(512, 512), FIRST),
        (lambda image: image.flush(), FIRST),
    ],
)
def test_change_of_each_kind_is_recorded_and_stored(
    tmp_path: Path, change: Callable[[Image], Awaitable[object]], expected: Ranges
) -> None:
    file = MemoryFile(made(tmp_path / "disk"))
    assert asyncio.run(record_and_read(file, change)) == expected


def test_fast_paths_stay_closed_until_the_bitmaps_are_marked(tmp_path: Path) -> None:
    async def run() -> None:
        image = await opened(MemoryFile(made(tmp_path / "disk")))
        data = memoryview(b"y" * 4096)
        await read_all(image)  # so that the tables are in memory, and nothing else stands in the way
        assert not image.try_write(256 << 10, data)
        await image.write(256 << 10, data)
        assert image.try_write(260 << 10, data)
        assert image.writable(256 << 10, (256 << 10) + 512) is None
        assert not image.gate.is_clean
        await image.close()

    asyncio.run(run())


def test_control_an_image_without_enabled_bitmaps_keeps_its_fast_paths(tmp_path: Path) -> None:
    async def run() -> None:
        content = made(tmp_path / "disk", bitmaps=("frozen",))
        image = await opened(MemoryFile(content))
        await read_all(image)
        assert image.try_write(256 << 10, memoryview(b"y" * 4096))
        assert image.writable(256 << 10, (256 << 10) + 512) is not None
        await image.close()

    asyncio.run(run())


def test_image_opened_for_writing_and_not_changed_is_not_touched(tmp_path: Path) -> None:
    content = made(tmp_path / "disk", bitmaps=("b0", "frozen"))
    file = MemoryFile(content)
    asyncio.run(_open_and_close(file))
    assert bytes(file.content) == content


def test_mark_fails_at_its_barrier_and_every_later_change_and_flush_fails(tmp_path: Path) -> None:
    """It was the barrier of what an earlier server wrote, too (F3)."""

    async def run() -> None:
        file = FaultFile(MemoryFile(made(tmp_path / "disk")), slow_only=True)
        image = await opened(file)
        before = await read_all(image)
        file.fail("fdatasync", errno.EIO)
        with pytest.raises(OSError, match="Input/output"):
            await image.write(0, b"z" * 512)
        file.heal()
        expected = r"its bitmaps could not be marked in use \(Input/output error\); open it anew"
        for change in (image.write(0, b"z" * 512), image.flush()):
            with pytest.raises(ImageFailed, match=expected):
                await change
        assert await read_all(image) == before

    asyncio.run(run())


def test_mark_fails_to_write_and_the_next_change_tries_again(tmp_path: Path) -> None:
    async def run() -> None:
        file = FaultFile(MemoryFile(made(tmp_path / "disk")), slow_only=True)
        image = await opened(file)
        file.fail("pwrite", errno.ENOSPC)
        with pytest.raises(OSError, match="No space"):
            await image.write(0, b"z" * 512)
        file.heal()
        await image.write(0, b"z" * 512)
        await image.close()
        assert await stored(file) == {"b0": [(0, 4096), *FIRST]}

    asyncio.run(run())


@pytest.mark.parametrize(
    ("names", "nth_last"),
    [(("b0",), 1), (("b0", "b1"), 1), (("b0",), 3)],
    ids=["to say that it is consistent", "to say that the second is", "to free the old one"],
)
def test_bitmaps_resized_without_space_at_the_end_are_stored_all_the_same(
    tmp_path: Path, names: tuple[str, ...], nth_last: int
) -> None:
    """What they had is nobody's once the header names the new ones: it is freed once, and the next change marks those
    in use.
    """
    content = made(tmp_path / "disk", "cluster_size=4k", bitmaps=names)
    start, stop = SIZE // 2, SIZE // 2 + 24 * 4096

    async def run(failing: int) -> tuple[list[str], bytes]:
        memory = MemoryFile(content)
        file = FaultFile(memory, slow_only=True)
        image = await opened(file)
        await image.write(0, b"x" * 4096)
        before = len(file.calls)
        file.fail_at(failing, errno.ENOSPC)
        await resize(image, 2 * SIZE)
        calls = file.calls[before:]
        for offset in range(start, stop, 4096):
            await image.write(offset, b"\x01" * 4096)
        crashed = bytes(memory.content)
        await image.close()
        dirty = [(0, 4096), *FIRST, (start, stop), (SIZE, 2 * SIZE)]
        assert await stored(memory) == dict.fromkeys(names, dirty)
        assert await checked(memory) == 0
        return calls, crashed

    calls, _ = asyncio.run(run(1 << 30))
    failing = [index for index, call in enumerate(calls) if call == "pwrite"][-nth_last]
    with_error, crashed = asyncio.run(run(failing))
    assert with_error[: failing + 1] == calls[: failing + 1]
    assert asyncio.run(stored(MemoryFile(crashed))) == dict.fromkeys(names)


class FullFile(FaultFile):
    """Has `space` bytes more for pages that were holes."""

    space = 1 << 62
    zeroes: frozenset[int] = frozenset()
    """Pages of zeroes that are no holes."""

    async def pwrite(self, offset: int, data: Buffer) -> None:
        needed = 0
        for start in range(offset // 4096 * 4096, offset + len(data), 4096):
            page = memoryview(bytearray(4096))
            await self.inner.pread(start, page)
            needed += 0 if any(page) or start in self.zeroes else 4096
        if needed > self.space:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.space -= needed
        await super().pwrite(offset, data)


@pytest.mark.parametrize("size", [SIZE // 2, 2 * SIZE])
def test_resize_that_finds_no_space_for_bitmaps_keeps_them_and_the_size_and_leaks_nothing(
    tmp_path: Path, size: int
) -> None:
    content = made(tmp_path / "disk", "cluster_size=4k", bitmaps=("b0", "frozen"))
    before: dict[str, Ranges | None] = {"b0": FIRST, "frozen": FIRST}

    async def run(space: int) -> bool:
        memory = MemoryFile(content)
        file = FullFile(memory, slow_only=True)
        image = await opened(file)
        file.space = space
        has_space = False
        with suppress(UnwrittenError, Hindrance):
            await resize(image, size)
            has_space = True
        assert has_space or await stored(memory) == before
        await image.close()
        added = [(SIZE, size)] if has_space and size > SIZE else []
        assert await stored(memory) == dict.fromkeys(before, FIRST + added)
        assert (await read_header(memory)).size == (size if has_space else SIZE)
        assert await checked(memory) == 0
        return has_space

    found = [asyncio.run(run(pages * 4096)) for pages in range(12)]
    assert found == sorted(found)
    assert set(found) == {False, True}


def test_shrink_that_finds_no_space_to_give_space_back_says_nothing_else_than_the_size_does(tmp_path: Path) -> None:
    """The size is durable by then; what lay behind it goes with a later flush."""
    content = made(tmp_path / "disk", "cluster_size=4k")

    async def run(index: int) -> bool:
        memory = MemoryFile(content)
        file = FaultFile(memory, slow_only=True)
        image = await opened(file)
        await image.flush()
        count = len(file.calls)
        file.fail_at(index, errno.ENOSPC)
        expected = SIZE
        with suppress(OSError, ImageError):
            await resize(image, SIZE // 4)
            expected = SIZE // 4
        has_found_no_space = file.calls[count:][index : index + 1] == ["pwrite"]
        file.heal()
        if image.failure is None:
            assert image.size == expected or not has_found_no_space, f"call {index}"
            await image.close()
            assert await checked(memory) == 0, f"call {index}"
        else:
            await image.discard()
        return file.is_reached

    assert fail_at_each_call(run) > 20


def test_resize_of_bitmaps_in_doubt_lets_no_later_flush_succeed(tmp_path: Path) -> None:
    """The barrier that failed may also have been that of what was written before."""
    content = made(tmp_path / "disk", bitmaps=("frozen",))

    async def run(index: int) -> bool:
        file = FaultFile(MemoryFile(content), slow_only=True)
        image = await opened(file)
        await image.bitmap("frozen")
        await image.write(256 << 10, b"x" * 512)
        count = len(file.calls)
        file.fail_at(index, errno.EIO)
        with suppress(OSError, ImageError):
            await resize(image, 2 * SIZE)
        if file.calls[count:][index : index + 1] == ["fdatasync"]:
            for change in (image.flush(), image.write(256 << 10, b"y" * 512)):
                with pytest.raises(ImageFailed):
                    await change
            with pytest.raises(ImageFailed):
                await image.close()
        else:
            await image.discard()
        return file.is_reached

    assert fail_at_each_call(run) > 10


@pytest.mark.parametrize("size", [SIZE // 2, 2 * SIZE])
def test_resize_that_finds_no_space_any_more_leaves_what_does_not_record_consistent(tmp_path: Path, size: int) -> None:
    """Whatever becomes of the process, as long as the header names the bitmaps of the former size."""
    content = made(tmp_path / "disk", "cluster_size=4k", bitmaps=("b0", "frozen"))
    named = directory_region(asyncio.run(read_header(MemoryFile(content))))
    counts: Counter[bool] = Counter()

    async def run(index: int) -> bool:
        memory = MemoryFile(content)
        file = FaultFile(memory, slow_only=True)
        image = await opened(file)
        first = len(file.calls) + index

        async def fill(method: str) -> None:
            if len(file.calls) >= first:
                file.fail("pwrite", errno.ENOSPC)

        file.delay = fill
        with suppress(OSError, ImageError):
            await resize(image, size)
        is_former = directory_region(await read_header(memory)) == named
        if is_former:
            assert (await stored(memory))["frozen"] == FIRST, f"call {index}"
        counts[is_former] += 1
        await image.discard()
        return len(file.calls) > first

    fail_at_each_call(run)
    assert min(counts[True], counts[False]) > 5


def test_bitmaps_closed_without_space_are_stored_in_the_place_that_they_have(tmp_path: Path) -> None:
    """What had no bits on disk is dirty as a whole."""
    path = tmp_path / "disk"
    made(path, "cluster_size=4k")
    qemu_img("bitmap", "--add", "-g", str(GRANULARITY), path, "later")
    content = path.read_bytes()

    async def run() -> None:
        memory = MemoryFile(content)
        file = FullFile(memory, slow_only=True)
        image = await opened(file)
        await image.write(300 << 10, b"x" * 65536)
        await image.flush()
        tables = await load_directory(memory, await read_header(memory))
        file.space, file.zeroes = 0, frozenset(entry.table_offset for entry in tables)
        await image.close()
        assert await stored(memory) == {"b0": [(256 << 10, 364 << 10)], "later": [(0, SIZE)]}
        assert await checked(memory) == 0

    asyncio.run(run())


def test_end_that_finds_no_space_at_one_call_and_says_nothing_leaks_nothing(tmp_path: Path) -> None:
    """What was taken for new bits, and is counted on disk by then, is given back where they go over the old ones."""
    content = made(tmp_path / "disk", "cluster_size=4k")

    async def run(index: int) -> bool:
        memory = MemoryFile(content)
        file = FaultFile(memory, slow_only=True)
        image = await opened(file)
        await image.write(0, b"x" * 512)
        await image.flush()
        count = len(file.calls)
        file.fail_at(index, errno.ENOSPC)
        with suppress(OSError, ImageError):
            await image.close()
            assert await checked(memory) == 0, f"call {index}"
        return len(file.calls) - count <= index

    index = 0
    while not asyncio.run(run(index)):
        index += 1
    assert index > 10


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_end_that_loses_a_bitmap_says_so_whichever_call_fails(tmp_path: Path, number: int) -> None:
    """A barrier, which some file systems let fail for space, leaves it open whether the header names a directory."""
    content = straddling(made(tmp_path / "disk", "cluster_size=4k"))

    async def run(index: int) -> bool:
        memory = MemoryFile(content)
        file = FaultFile(memory, slow_only=True)
        image = await opened(file)
        await image.write(0, b"x" * 512)
        await image.flush()
        file.fail_at(index, number)
        has_failed = False
        try:
            await image.close()
        except (OSError, ImageError):
            has_failed = True
        assert has_failed or await stored(memory) == {"b0": [(0, 4096), *FIRST]}, f"call {index}"
        return file.is_reached

    assert fail_at_each_call(run) > 10


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_bitmaps_of_which_some_could_not_be_marked_are_consistent_after_the_end(tmp_path: Path, number: int) -> None:
    """Two flags are written at once: the first is on disk when the second fails."""
    content = made(tmp_path / "disk", bitmaps=("b0", "b1"))

    async def run() -> None:
        memory = MemoryFile(content)
        file = FaultFile(memory, slow_only=True)
        image = await opened(file)
        file.fail_at(1, number)
        with pytest.raises(UnwrittenError):
            await image.write(0, b"x" * 4096)
        file.heal()
        assert await stored(memory) == {"b0": None, "b1": FIRST}
        await image.close()
        assert await stored(memory) == {"b0": FIRST, "b1": FIRST}
        assert await checked(memory) == 0

    asyncio.run(run())


def test_bitmap_whose_bits_fill_clusters_is_stored_as_it_is(tmp_path: Path) -> None:
    """A cluster of 512 bytes has the bits of 2 MiB. Of the table's three entries the second says that all are set; in
    the third's cluster no bits follow those of the last 1 MiB.
    """
    size = 5 << 20
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", tmp_path / "disk", str(size))
    qemu_img("bitmap", "--add", "-g", "512", tmp_path / "disk", "b0")

    async def run() -> bytes:
        memory = MemoryFile((tmp_path / "disk").read_bytes())
        image = await opened(memory)
        await image.zero(1 << 20, 4 << 20, may_unmap=True, is_fast_only=False)
        await image.close()
        assert await stored(memory) == {"b0": [(1 << 20, size)]}
        (entry,) = await load_directory(memory, await read_header(memory))
        assert [each == 1 for each in await load_table(memory, await read_header(memory), entry)] == [
            False,
            True,
            False,
        ]
        return bytes(memory.content)

    (tmp_path / "after").write_bytes(asyncio.run(run()))
    qemu_img("check", "-q", tmp_path / "after")


def test_bitmaps_that_were_stored_together_are_marked_each_at_its_place_by_the_next_change(tmp_path: Path) -> None:
    """B1: where the new directory has them."""
    content = made(tmp_path / "disk", "cluster_size=4k", bitmaps=("b0", "b1", "frozen"))

    async def run() -> None:
        memory = MemoryFile(content)
        image = await opened(memory)
        await resize(image, 2 * SIZE)
        await image.write(0, b"x" * 4096)
        grown = (SIZE, 2 * SIZE)
        assert await stored(MemoryFile(memory.content)) == {"b0": None, "b1": None, "frozen": [*FIRST, grown]}
        await image.close()
        ours = [(0, 4096), *FIRST, grown]
        assert await stored(memory) == {"b0": ours, "b1": ours, "frozen": [*FIRST, grown]}

    asyncio.run(run())


def test_bitmaps_that_take_too_much_memory_are_refused_when_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that record, of 3 MiB each."""
    monkeypatch.setattr(bitmap_store, "MEMORY_MAX", 5 << 20)
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", tmp_path / "disk", "12G")
    for name in ("b0", "b1"):
        qemu_img("bitmap", "--add", "-g", "512", tmp_path / "disk", name)
    content = (tmp_path / "disk").read_bytes()
    with pytest.raises(UnsupportedFeature, match="its bitmaps would take 6291456 bytes of memory, allowed are 5242880"):
        asyncio.run(_open_and_close(MemoryFile(content)))


# Crashes

WRITES: Ranges = [(0, 4096), (300 << 10, 330 << 10), (900 << 10, 901 << 10)]


async def recorded_session(content: bytes) -> tuple[Trace, list[tuple[int, int, int]]]:
    """A session of three writes; returns when each was submitted, and its range."""
    trace = Trace(bytes(SIZE))
    file = RecordingFile(trace, content, inline_share=0)
    image = await opened(file)
    submitted = []
    for start, stop in WRITES:
        submitted.append((trace.now, start, stop))
        await image.write(start, b"\xee" * (stop - start))
        await image.flush()
    await image.close()
    assert await stored(file) == {"b0": [(0, 4096), (256 << 10, 332 << 10), (900 << 10, 904 << 10)], "frozen": FIRST}
    return trace, submitted


async def session_problems(
    state: CrashState, submitted: list[tuple[int, int, int]], before: bytes, seen: set[str]
) -> list[str]:
    """What is wrong in a state that a crash during the session left."""
    (content,) = state.files
    file = MemoryFile(content)
    problems = []
    status = await checked(file)
    if status not in (0, 3):
        problems.append(f"check says {status}")
    now = await read_all(await opened(MemoryFile(content), writable=False))
    found = await stored(file)
    seen.add("absent" if "b0" not in found else "in use" if found["b0"] is None else "consistent")
    if found and found.get("frozen") != FIRST:
        problems.append("the disabled bitmap has changed")
    ranges = found.get("b0")
    if ranges is not None:
        may = FIRST + [(start, stop) for time, start, stop in submitted if time <= state.point]
        for offset in range(0, SIZE, GRANULARITY):
            is_dirty = any(start <= offset < stop for start, stop in ranges)
            if not is_dirty and before[offset : offset + GRANULARITY] != now[offset : offset + GRANULARITY]:
                problems.append(f"{offset} has changed and is clean")
            if is_dirty and not any(start < offset + GRANULARITY and offset < stop for start, stop in may):
                problems.append(f"{offset} is dirty and was never written")
    await _open_and_close(file)
    return [f"{problem}: {state}" for problem in problems]


def straddling(content: bytes) -> bytes:
    """The bitmaps extension at 480, its data at 488 to 511, becomes one at 496 to 519: over a sector's boundary."""
    at = content.index(struct.pack(">II", BITMAPS_TYPE, 24))
    moved = struct.pack(">II", 0x12345678, 488 - at - 8) + bytes(488 - at - 8) + content[at : at + 32]
    return content[:at] + moved + bytes(8) + content[at + len(moved) + 8 :]


@pytest.mark.parametrize("options", ["", "cluster_size=512", "lazy_refcounts=on", "straddling"])
def test_crash_in_a_session_leaves_bitmaps_that_are_right_or_in_use_or_gone(tmp_path: Path, options: str) -> None:
    seed = 11

    async def run() -> tuple[list[str], set[str], int]:
        kind = "cluster_size=4096" if options == "straddling" else options
        content = made(tmp_path / "disk", kind, bitmaps=("b0", "frozen"))
        if options == "straddling":
            content = straddling(content)
        trace, submitted = await recorded_session(content)
        before = await read_all(await opened(MemoryFile(content), writable=False))
        problems: list[str] = []
        seen: set[str] = set()
        count = 0
        for state in crash_states(trace, seed=seed, cap=12):
            count += 1
            if options == "lazy_refcounts=on":
                (crashed,) = state.files
                state = state.after([await _repaired(crashed)])
            problems += await session_problems(state, submitted, before, seen)
        return problems, seen, count

    problems, seen, count = asyncio.run(run())
    assert problems[:5] == [], f"seed {seed}"
    assert count > 60
    assert seen == ({"consistent", "in use", "absent"} if options == "straddling" else {"consistent", "in use"})


async def _repaired(content: bytes) -> bytes:
    """An image that was not closed is repaired when it is opened for writing."""
    file = MemoryFile(content)
    image = await opened(file)
    await image.driver.abandon()
    return bytes(file.content)


def test_control_a_crash_that_ignores_barriers_leaves_a_wrong_bitmap(tmp_path: Path) -> None:
    async def run() -> list[str]:
        content = made(tmp_path / "disk", bitmaps=("b0", "frozen"))
        trace, submitted = await recorded_session(content)
        before = await read_all(await opened(MemoryFile(content), writable=False))
        problems: list[str] = []
        for state in crash_states(trace, seed=3, cap=6, without_barriers=True):
            try:
                problems += await session_problems(state, submitted, before, set())
            except ImageError as error:
                problems.append(str(error))
        return problems

    assert any("has changed and is clean" in problem for problem in asyncio.run(run()))


UNKNOWN_TYPE = 0x12345678


def with_unknown_extension(content: bytes, kind: int = UNKNOWN_TYPE, data: bytes = bytes(range(1, 105))) -> bytes:
    """One that nobody knows behind that of the bitmaps, as far as into sector 1; the backing file name gives way."""
    at = content.index(struct.pack(">II", BITMAPS_TYPE, 24)) + 32
    extension = struct.pack(">II", kind, len(data)) + data
    end = at + len(extension) + 8
    edited = bytearray(content)
    edited[at:end] = extension.ljust(end - at, b"\0")
    name_offset, name_size = struct.unpack_from(">QI", content, 8)
    if name_offset:
        edited[end : end + name_size] = content[name_offset : name_offset + name_size]
        struct.pack_into(">Q", edited, 8, end)
    return bytes(edited)


def test_extension_between_others_is_called_unused_without_bitmaps_and_taken_by_the_next(tmp_path: Path) -> None:
    content = with_unknown_extension(made(tmp_path / "disk"))
    at = content.index(struct.pack(">II", BITMAPS_TYPE, 24)) + 8

    async def run() -> None:
        file = MemoryFile(content)
        for edit, kind in ((_remove_all, ExtensionType.UNUSED), (_add, ExtensionType.BITMAPS)):
            await edited(file, edit)
            extensions = (await read_header(file)).extensions[-2:]
            assert [(each.type, each.offset) for each in extensions] == [(kind, at), (UNKNOWN_TYPE, at + 32)]
            (tmp_path / "after").write_bytes(file.content)
            assert "WARNING" not in qemu_img("check", tmp_path / "after").stderr
        assert await stored(file) == {"new": []}

    asyncio.run(run())


def test_extension_beside_an_unused_one_stays_without_bitmaps_and_means_nothing(tmp_path: Path) -> None:
    """QEMU puts those that it does not know behind that of bitmaps which it adds."""
    content = with_unknown_extension(made(tmp_path / "disk"), ExtensionType.UNUSED, bytes(24))

    async def run() -> None:
        file = MemoryFile(content)
        before = [each.type for each in (await read_header(file)).extensions]
        for edit, left in ((_remove_all, []), (_add, ["new"])):
            await edited(file, edit)
            assert list(await stored(file)) == left
            assert [each.type for each in (await read_header(file)).extensions] == before

    asyncio.run(run())


def with_backing_name(content: bytes, length: int) -> bytes:
    """`length` bytes of name, right behind the end marker of an image without extensions."""
    offset = struct.unpack_from(">I", content, 100)[0] + 8
    edited = bytearray(content)
    struct.pack_into(">QI", edited, 8, offset, length)
    edited[offset : offset + length] = b"b" * length
    return bytes(edited)


def test_first_bitmap_is_refused_where_a_crash_could_lose_the_backing_file_name(tmp_path: Path) -> None:
    """It lies in two sectors, and there is no room for a copy."""
    content = with_backing_name(made(tmp_path / "disk", "cluster_size=1k", bitmaps=()), 480)

    async def run() -> None:
        file = MemoryFile(content)
        editor = await open_editor(file)
        with pytest.raises(UnsupportedFeature, match="no room for bitmaps"):
            editor.add("new", GRANULARITY)
        assert file.content == content

    asyncio.run(run())


def test_first_bitmap_moves_a_backing_file_name_over_itself_within_a_sector(tmp_path: Path) -> None:
    content = with_backing_name(made(tmp_path / "disk", "cluster_size=512", bitmaps=()), 340)

    async def run() -> None:
        file = MemoryFile(content)
        await edited(file, _add)
        assert await stored(file) == {"new": []}
        assert (await read_header(file)).backing_name == "b" * 340

    asyncio.run(run())


async def edited(file: BlockFile, edit: Callable[[BitmapEditor], Awaitable[None]]) -> None:
    editor = await open_editor(file)
    await edit(editor)
    await editor.save()
    assert await checked(file) == 0


async def _merge(editor: BitmapEditor) -> None:
    editor.merge("frozen", ["b0"])


async def _add(editor: BitmapEditor) -> None:
    editor.add("new", GRANULARITY)


async def _remove_all(editor: BitmapEditor) -> None:
    for entry in editor.entries:
        editor.remove(entry.name)


async def _clear(editor: BitmapEditor) -> None:
    editor.clear("b0")


@pytest.mark.parametrize("options", ["", "cluster_size=512", "backing", "backing, unknown"])
@pytest.mark.parametrize(
    ("bitmaps", "edit", "after"),
    [
        ((), _add, {"new": []}),
        (("b0",), _add, {"b0": FIRST, "new": []}),
        (("b0", "frozen"), _remove_all, {}),
        (("b0", "frozen"), _clear, {"b0": [], "frozen": FIRST}),
        (("b0", "frozen"), _merge, {"b0": FIRST, "frozen": FIRST}),
    ],
)
def test_crash_in_an_edit_leaves_the_old_bitmaps_or_the_new_or_none(
    tmp_path: Path,
    options: str,
    bitmaps: tuple[str, ...],
    edit: Callable[[BitmapEditor], Awaitable[None]],
    after: dict[str, Ranges],
) -> None:
    """With a backing file name behind the extensions, and writes torn at sectors; neither it nor an extension that is
    not known must ever be damaged.
    """
    seed = 5
    base = tmp_path / ("b" * 200 + ".raw")
    base.write_bytes(b"\x33" * SIZE)
    kind = f"backing_file={base},backing_fmt=raw" if "backing" in options else options

    async def run() -> None:
        content = made(tmp_path / "disk", kind, bitmaps=bitmaps)
        if "unknown" in options and bitmaps:
            content = with_unknown_extension(content)
        header = await read_header(MemoryFile(content))
        before = await stored(MemoryFile(content))
        trace = Trace(bytes(SIZE))
        file = RecordingFile(trace, content, inline_share=0)
        await edited(file, edit)
        assert await stored(file) == after
        (tmp_path / "after").write_bytes(file.content)
        qemu_img("check", tmp_path / "after")
        count = 0
        for state in crash_states(trace, seed=seed, cap=24):
            crashed = MemoryFile(state.files[0])
            assert await checked(crashed) in (0, 3), f"seed {seed}: {state}"
            found = await read_header(crashed)
            assert (found.backing_name, found.backing_format) == (header.backing_name, header.backing_format)
            assert found.text(UNKNOWN_TYPE) == header.text(UNKNOWN_TYPE)
            assert await stored(crashed) in (before, after, {}), f"seed {seed}: {state}"
            count += 1
        assert count > 5

    asyncio.run(run())


# Edits that are refused


@pytest.mark.parametrize(
    ("edit", "pattern"),
    [
        (lambda editor: editor.add("b0"), "there is a bitmap 'b0' already"),
        (lambda editor: editor.add(""), "expected 1 to 1023 bytes"),
        (lambda editor: editor.add("x" * 1024), "expected 1 to 1023 bytes"),
        (lambda editor: editor.add("x\0"), "without NUL"),
        (lambda editor: editor.add("\udcff"), "UTF-8"),
        (lambda editor: editor.add("x", 256), "granularity is 256, expected a power of two from 512 to 2147483648"),
        (lambda editor: editor.add("x", 1000), "granularity is 1000"),
        (lambda editor: editor.add("x", 1 << 32), "granularity is 4294967296"),
        (lambda editor: editor.remove("x"), "there is no bitmap 'x', known are 'b0'"),
    ],
)
def test_edit_that_cannot_be_is_refused(tmp_path: Path, edit: Callable[[BitmapEditor], None], pattern: str) -> None:
    async def run() -> None:
        editor = await open_editor(MemoryFile(made(tmp_path / "disk")))
        with pytest.raises(ConfigError, match=pattern):
            edit(editor)

    asyncio.run(run())


def test_edit_of_an_inconsistent_bitmap_is_refused_and_removal_is_not(tmp_path: Path) -> None:
    async def run() -> None:
        file = with_inconsistent(tmp_path / "disk")
        editor = await open_editor(file)
        for edit in (editor.clear, lambda name: editor.enable(name, is_enabled=True)):
            with pytest.raises(ConfigError, match=r"bitmap 'b0' is inconsistent.*it can only be removed"):
                edit("b0")
        with pytest.raises(ConfigError, match="is inconsistent"):
            editor.merge("b1", ["b0"])
        editor.remove("b0")
        await editor.save()
        assert await stored(file) == {"b1": FIRST}
        assert await checked(file) == 0

    asyncio.run(run())


def test_add_to_an_image_of_version_2_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        editor = await open_editor(MemoryFile(made(tmp_path / "disk", "compat=0.10", bitmaps=())))
        with pytest.raises(UnsupportedFeature, match=r"version 2 cannot store bitmaps, version 3 can"):
            editor.add("b0")

    asyncio.run(run())


def test_add_where_stale_bitmaps_were_replaces_them(tmp_path: Path) -> None:
    """The autoclear bit was cleared by a writer that knows no bitmaps: what the extension names is nobody's."""

    async def run() -> None:
        content = bytearray(made(tmp_path / "disk"))
        content[88:96] = bytes(8)
        file = MemoryFile(content)
        editor = await open_editor(file)
        assert editor.entries == []
        editor.add("new")
        await editor.save()
        assert await stored(file) == {"new": []}
        assert await checked(file) == 3

    asyncio.run(run())


def test_bitmap_that_many_ask_for_at_once_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each load may take as much time and memory as the bitmap's bits."""
    loaded = []

    async def counted(file: BlockFile, header: Header, entry: BitmapEntry, table: array[int]) -> DirtyBitmap:
        loaded.append(entry.name)
        await asyncio.sleep(0)
        return await load_bits(file, header, entry, table)

    monkeypatch.setattr(bitmap_store, "load_bits", counted)

    async def run() -> None:
        image = await opened(MemoryFile(made(tmp_path / "disk", bitmaps=("b0", "frozen"))))
        found = await asyncio.gather(*(image.bitmap("frozen") for _ in range(8)))
        assert all(each is found[0] for each in found)
        assert loaded == ["b0", "frozen"]
        await image.close()

    asyncio.run(run())
