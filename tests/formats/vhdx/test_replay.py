"""Replay in memory and in the file."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import random
import shutil
import struct
import subprocess
from pathlib import Path
from uuid import UUID

import pytest

from nbdimg.errors import CorruptImage, UnsupportedFeature
from nbdimg.formats.vhdx import structs as s
from nbdimg.formats.vhdx.header import Header, load_headers
from nbdimg.formats.vhdx.log import Page, Zeroes, load_active
from nbdimg.formats.vhdx.metadata import load_metadata
from nbdimg.formats.vhdx.region import load_regions
from nbdimg.formats.vhdx.replay import Layer, ReplayedFile, open_replayed, replay_to_file
from nbdimg.storage.file import BlockFile, Buffer
from nbdimg.storage.memory import MemoryFile
from nbdimg.storage.posix import PosixFile
from tests.formats.vhdx import craft
from tests.formats.vhdx.craft import LOG_GUID, SECTOR, K, M, entry, image, page, ring
from tests.support.peers import require_program
from tests.support.turns import Turns

BAT = 3 * M
ONE = 8 * K


def logged(*entries: tuple[int, bytes], length: int = 4 * M) -> bytearray:
    content = image(log=bytes(ring(*entries)), log_guid=LOG_GUID)
    content[BAT:] = b"\x77" * M
    return content[:length] + bytes(max(0, length - 4 * M))


def applied(content: bytearray, *changes: tuple[int, bytes], size: int | None = None) -> bytes:
    """`content` with changes made by hand and of another size: what is expected."""
    result = bytearray(content)
    for offset, data in changes:
        result += bytes(max(0, offset + len(data) - len(result)))
        result[offset : offset + len(data)] = data
    return bytes(result if size is None else result.ljust(size, b"\0"))


# The log's entries, what they change, the size afterwards.
CASES: dict[str, tuple[tuple[tuple[int, bytes], ...], list[tuple[int, bytes]], int]] = {
    "one page": (((0, entry(10, 0, (BAT, page(1)))),), [(BAT, page(1))], 4 * M),
    "from the tail to the head only": (
        (
            (0, entry(10, 0, (BAT, page(1)))),
            (ONE, entry(11, ONE, (BAT + SECTOR, page(2)))),
            (2 * ONE, entry(12, ONE, (BAT + 2 * SECTOR, page(3)))),
            (3 * ONE, entry(4, 0, (BAT + 3 * SECTOR, page(4)))),
        ),
        [(BAT + SECTOR, page(2)), (BAT + 2 * SECTOR, page(3))],
        4 * M,
    ),
    "the later page counts": (
        ((0, entry(10, 0, (BAT, page(1)))), (ONE, entry(11, 0, (BAT, page(2))))),
        [(BAT, page(2))],
        4 * M,
    ),
    "zeroes": (((0, entry(10, 0, (BAT + SECTOR, 64 * K))),), [(BAT + SECTOR, bytes(64 * K))], 4 * M),
    "zeroes, then a page": (
        ((0, entry(10, 0, (BAT, 64 * K), (BAT + 8 * K, page(5)))),),
        [(BAT, bytes(64 * K)), (BAT + 8 * K, page(5))],
        4 * M,
    ),
    "a page, then zeroes": (
        ((0, entry(10, 0, (BAT + 8 * K, page(5)), (BAT, 64 * K))),),
        [(BAT, bytes(64 * K))],
        4 * M,
    ),
    "a page, zeroes and a page in three entries": (
        (
            (0, entry(10, 0, (BAT, page(5)), (BAT + SECTOR, page(6)))),
            (12 * K, entry(11, 0, (BAT, 8 * K))),
            (16 * K, entry(12, 0, (BAT, page(7)))),
        ),
        [(BAT, page(7)), (BAT + SECTOR, bytes(SECTOR))],
        4 * M,
    ),
    "region tables": (((0, entry(10, 0, (320 * K, page(1)))),), [(320 * K, page(1))], 4 * M),
    "nothing, size as it is": (((0, entry(10, 0)),), [], 4 * M),
    "LastFileOffset behind the end": (((0, entry(10, 0, (BAT, page(1)), last=7 * M)),), [(BAT, page(1))], 7 * M),
    "LastFileOffset behind the end, rounded up": (((0, entry(10, 0, last=6 * M + 1)),), [], 7 * M),
    "LastFileOffset below the end": (((0, entry(10, 0, last=1 * M)),), [], 4 * M),
    "LastFileOffset of the head counts": (
        ((0, entry(10, 0, last=9 * M)), (SECTOR, entry(11, 0, last=5 * M))),
        [],
        5 * M,
    ),
    "page behind the end": (((0, entry(10, 0, (6 * M, page(1)))),), [(6 * M, page(1))], 6 * M + SECTOR),
    "zeroes across the end": (
        ((0, entry(10, 0, (4 * M - SECTOR, 2 * M))),),
        [(4 * M - SECTOR, bytes(SECTOR))],
        6 * M - SECTOR,
    ),
    "wrapped": (
        (
            (M - ONE, entry(10, M - ONE, (BAT, page(1)))),
            (0, entry(11, M - ONE, (BAT, page(2)), (BAT + SECTOR, page(3)))),
        ),
        [(BAT, page(2)), (BAT + SECTOR, page(3))],
        4 * M,
    ),
}


async def content_of(file: BlockFile, step: int | None = None) -> bytes:
    result = bytearray(file.size)
    view = memoryview(result)
    step = step or len(result)
    for start in range(0, len(result), step):
        piece = view[start : start + step]
        if not file.try_pread(start, piece):
            await file.pread(start, piece)
    return bytes(result)


@pytest.mark.parametrize("name", CASES)
def test_replay_in_memory_shows_the_changes_and_leaves_the_file(name: str) -> None:
    async def run() -> None:
        entries, changes, size = CASES[name]
        content = logged(*entries)
        below = MemoryFile(content, writable=False)
        file = await open_replayed(below, (await load_headers(below)).current)
        assert file.size == size
        assert not file.is_writable
        assert await content_of(file) == applied(content, *changes, size=size)
        assert await content_of(file, 1000) == applied(content, *changes, size=size)
        assert below.content == content

    asyncio.run(run())


@pytest.mark.parametrize("name", CASES)
def test_replay_to_file_makes_the_changes_and_clears_the_log(name: str) -> None:
    async def run() -> None:
        entries, changes, size = CASES[name]
        content = logged(*entries)
        file = MemoryFile(content)
        headers = await replay_to_file(file, await load_headers(file))
        assert headers == await load_headers(file)
        expected = applied(content, *changes, size=size)
        assert file.content[: 64 * K] == expected[: 64 * K]
        assert file.content[192 * K :] == expected[192 * K :]

    asyncio.run(run())


def test_replay_to_file_headers_afterwards() -> None:
    async def run() -> None:
        file = MemoryFile(logged((0, entry(10, 0, (BAT, page(1))))))
        headers = await replay_to_file(file, await load_headers(file))
        both = [Header.from_bytes(bytes(file.content[at : at + 4096])) for at in (64 * K, 128 * K)]
        for header in both:
            assert header is not None
            assert header.log_guid == UUID(int=0)
            assert header.file_write_guid not in (craft.FILE_WRITE_GUID, UUID(int=0))
            assert header.data_write_guid == craft.DATA_WRITE_GUID
            assert (header.log_offset, header.log_length) == (M, M)
        assert both[headers.slot] == headers.current
        assert headers.current.sequence_number == 5
        assert await replay_to_file(file, headers) is headers

    asyncio.run(run())


def test_replay_of_a_clean_file_does_nothing() -> None:
    async def run() -> None:
        file = MemoryFile(image(log=entry(10, 0, (BAT, page(1)))))
        before, headers = bytes(file.content), await load_headers(file)
        assert await open_replayed(file, headers.current) is file
        assert await replay_to_file(file, headers) is headers
        assert file.content == before

    asyncio.run(run())


def test_replay_of_a_log_in_use_without_entries_is_refused_unless_it_is_to_be_ignored() -> None:
    async def run() -> None:
        file = MemoryFile(logged())
        headers = await load_headers(file)
        before = bytes(file.content)
        with pytest.raises(CorruptImage, match="holds no valid sequence"):
            await open_replayed(file, headers.current)
        with pytest.raises(CorruptImage, match="holds no valid sequence"):
            await replay_to_file(file, headers)
        assert await open_replayed(file, headers.current, ignore_log=True) is file
        assert file.content == before
        headers = await replay_to_file(file, headers, ignore_log=True)
        assert not headers.current.has_log
        assert file.content[192 * K :] == before[192 * K :]

    asyncio.run(run())


def test_replay_of_a_truncated_file_writes_nothing() -> None:
    async def run() -> None:
        file = MemoryFile(logged((0, entry(10, 0, (BAT, page(1)), flushed=64 * M))))
        before = bytes(file.content)
        headers = await load_headers(file)
        with pytest.raises(CorruptImage, match="truncated"):
            await replay_to_file(file, headers)
        with pytest.raises(CorruptImage, match="truncated"):
            await open_replayed(file, headers.current)
        assert file.content == before

    asyncio.run(run())


def test_replay_in_memory_of_more_than_the_limit_is_refused_and_the_file_takes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s, "REPLAY_PAGES_MAX", 100)
    pages = [(BAT + index * SECTOR, page(index)) for index in range(250)]
    content = logged((0, entry(10, 0, *pages[:120])), (121 * SECTOR, entry(11, 0, *pages[110:130], (BAT, ONE))))

    async def run() -> None:
        file = MemoryFile(content)
        headers = await load_headers(file)
        with pytest.raises(UnsupportedFeature, match=r"the log at 1048576 must be replayed in memory and changes 100"):
            await open_replayed(file, headers.current)
        await replay_to_file(file, headers)
        expected = applied(content, *pages[:130], (BAT, bytes(ONE)))
        assert file.content[BAT:] == expected[BAT:]

    asyncio.run(run())


def test_replay_of_many_ranges_of_zeroes_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s, "REPLAY_RANGES_MAX", 50)
    ranges = [(BAT + index * ONE, SECTOR) for index in range(60)]
    content = logged((0, entry(10, 0, *ranges)))

    async def run() -> None:
        file = MemoryFile(content)
        headers = await load_headers(file)
        with pytest.raises(UnsupportedFeature, match="50 ranges of zeroes"):
            await open_replayed(file, headers.current)
        await replay_to_file(file, headers)
        assert file.content[BAT:] == applied(content, *((at, bytes(length)) for at, length in ranges))[BAT:]

    asyncio.run(run())


# What lies over a file.


def test_overlay_is_what_a_buffer_would_be() -> None:
    """Against changes that are made in a buffer one after the other."""
    for seed in range(150):
        rng = random.Random(seed)
        size = 24 * SECTOR
        model, layer = bytearray(b"\x99" * size), Layer()
        for _ in range(rng.randrange(1, 30)):
            offset = rng.randrange(24) * SECTOR
            if rng.random() < 0.5:
                data = page(rng.randrange(256))
                layer.add(Page(offset, data))
            else:
                data = bytes(rng.randrange(0, 6) * SECTOR)
                layer.add(Zeroes(offset, len(data)))
            model = (model[:offset] + data + model[offset + len(data) :]).ljust(size, b"\x99")[:size]
        for _ in range(20):
            start = rng.randrange(size)
            view = bytearray(b"\x99" * rng.randrange(1, size - start + 1))
            layer.patch(start, memoryview(view))
            assert view == model[start : start + len(view)], f"seed {seed}"
        starts = [start for start, _ in layer.zeroes()]
        stops = [stop for _, stop in layer.zeroes()]
        assert all(stop < start for stop, start in zip(stops, starts[1:], strict=False)), f"seed {seed}"
        rebuilt = bytearray(b"\x99" * (size + 6 * SECTOR))
        for start, stop in layer.zeroes():
            rebuilt[start:stop] = bytes(stop - start)
        for start, data in layer.runs():
            rebuilt[start : start + len(data)] = data
        assert rebuilt[:size] == model, f"seed {seed}"


def test_overlay_runs_join_neighbours_up_to_a_mebibyte() -> None:
    layer = Layer()
    for index in [*range(300), 302, 301, 400]:
        layer.add(Page(index * SECTOR, page(index % 256)))
    runs = [(offset // SECTOR, len(data) // SECTOR) for offset, data in layer.runs()]
    assert runs == [(0, 256), (256, 44), (301, 2), (400, 1)]


def replayed(content: bytes, *changes: Page | Zeroes, size: int) -> ReplayedFile:
    layer = Layer()
    for change in changes:
        layer.add(change)
    return ReplayedFile(MemoryFile(content, writable=False), layer, size)


def test_replayed_file_says_where_data_is() -> None:
    file = replayed(bytes(10 * SECTOR), Page(8 * SECTOR, page(1)), Zeroes(2 * SECTOR, 4 * SECTOR), size=20 * SECTOR)
    found, offset = [], 0
    while offset < file.size:
        is_data, stop = asyncio.run(file.data_extent(offset))
        found.append((offset // SECTOR, stop // SECTOR, is_data))
        offset = stop
    assert found == [(0, 2, True), (2, 6, False), (6, 8, True), (8, 9, True), (9, 10, True), (10, 20, False)]
    assert file.try_data_extent(2 * SECTOR + 5) == (False, 6 * SECTOR)
    mixed = replayed(bytes(SECTOR), Zeroes(0, 8 * SECTOR), Page(2 * SECTOR, page(1)), size=8 * SECTOR)
    assert mixed.try_data_extent(0) == (False, 2 * SECTOR)
    assert mixed.try_data_extent(2 * SECTOR) == (True, 3 * SECTOR)
    assert mixed.try_data_extent(3 * SECTOR) == (False, 8 * SECTOR)


def test_replayed_file_cannot_be_changed() -> None:
    async def run() -> None:
        file = replayed(bytes(SECTOR), size=SECTOR)
        assert not file.try_pwrite(0, b"x")
        for change in (file.pwrite(0, b"x"), file.punch(0, 1), file.zero(0, 1), file.truncate(0)):
            with pytest.raises(OSError, match="Read-only file system"):
                await change
        await file.fdatasync()
        await file.prefetch(0, 1)
        assert await content_of(file) == bytes(SECTOR)
        await file.close()

    asyncio.run(run())


class Reluctant(MemoryFile):
    """Never answers at once, and cannot zero."""

    def try_pread(self, offset: int, view: memoryview) -> bool:
        return False

    async def pread(self, offset: int, view: memoryview) -> None:
        await asyncio.sleep(0)
        super().try_pread(offset, view)

    async def zero(self, offset: int, length: int) -> bool:
        return False


@pytest.mark.parametrize("name", CASES)
def test_replay_on_a_file_that_waits_and_cannot_zero(name: str) -> None:
    async def run() -> None:
        entries, changes, size = CASES[name]
        content = logged(*entries)
        file = Reluctant(content)
        headers = await load_headers(file)
        over = await open_replayed(file, headers.current)
        assert await content_of(over) == applied(content, *changes, size=size)
        await replay_to_file(file, headers)
        assert file.content[192 * K :] == applied(content, *changes, size=size)[192 * K :]

    asyncio.run(run())


# Crashes during a replay.


class Recorder(MemoryFile):
    """Remembers every change of its content, and the barriers between them."""

    def __init__(self, content: bytes | bytearray) -> None:
        super().__init__(content)
        self.steps: list[tuple[str, int, bytes]] = []

    async def pwrite(self, offset: int, data: Buffer) -> None:
        self.steps.append(("write", offset, bytes(data)))
        await super().pwrite(offset, data)

    async def zero(self, offset: int, length: int) -> bool:
        self.steps.append(("write", offset, bytes(length)))
        return await super().zero(offset, length)

    async def truncate(self, size: int) -> None:
        self.steps.append(("size", size, b""))
        await super().truncate(size)

    async def fdatasync(self) -> None:
        self.steps.append(("barrier", 0, b""))


class Full(Recorder):
    async def truncate(self, size: int) -> None:
        raise OSError(errno.EFBIG, "too large")


def test_replay_to_file_of_a_size_that_is_refused_writes_no_more_and_leaves_the_log() -> None:
    """Zeroes up to 200 TiB are not written one by one: behind the end there is nothing to make zero."""

    async def run() -> None:
        file = Full(logged((0, entry(10, 0, (BAT + 64 * K, 200 << 40)))))
        with pytest.raises(OSError, match="too large"):
            await replay_to_file(file, await load_headers(file))
        assert [(offset, len(data)) for kind, offset, data in file.steps if kind == "write"][1:] == [
            (BAT + 64 * K, M - 64 * K)
        ]
        assert (await load_headers(file)).current.log_guid == LOG_GUID

    asyncio.run(run())


class Holed(Recorder):
    """Has holes, which are zero: (start, stop)."""

    holes = ((4 * M, 5 * M), (6 * M, 8 * M))

    def try_data_extent(self, offset: int) -> tuple[bool, int]:
        for start, stop in self.holes:
            if offset < stop:
                return (True, start) if offset < start else (False, stop)
        return True, self.size


def test_replay_to_file_leaves_holes_alone() -> None:
    """Each range would cost a call of the system. What only begins or ends in a hole is no hole."""
    inside = [(4 * M, SECTOR), (4 * M + 2 * SECTOR, M - 2 * SECTOR), (6 * M + SECTOR, SECTOR), (7 * M, SECTOR)]
    other = [(5 * M + SECTOR, SECTOR), (6 * M - SECTOR, SECTOR), (7 * M + 3 * SECTOR, M), (9 * M - SECTOR, 64 * K)]
    content = logged((0, entry(10, 0, *inside, *other, last=10 * M)), length=9 * M)
    content[4 * M :] = b"\x77" * (5 * M)
    for start, stop in Holed.holes:
        content[start:stop] = bytes(stop - start)

    async def run() -> None:
        file = Holed(content)
        await replay_to_file(file, await load_headers(file))
        zeroed = [(offset, len(data)) for kind, offset, data in file.steps if kind == "write" and offset >= 4 * M]
        assert zeroed == [*other[:-1], (9 * M - SECTOR, SECTOR)]
        zeroes = [(offset, bytes(length)) for offset, length in (*inside, *other)]
        assert file.content[BAT:] == applied(content, *zeroes, size=10 * M)[BAT:]

    asyncio.run(run())


@pytest.mark.parametrize("writable", [False, True])
def test_replay_gives_others_their_turn(writable: bool) -> None:
    """A file that is in memory does not wait, and a log may have millions of changes."""
    ranges = [(BAT, SECTOR)] * 20000
    log = ring((0, entry(10, 0, *ranges)), length=3 * M)
    second = craft.header(2, log_guid=LOG_GUID, log_length=3 * M, log_offset=4 * M)

    async def run() -> None:
        file = MemoryFile(image(second=second) + log, "x.vhdx", writable=writable)
        headers = await load_headers(file)
        async with Turns() as turns:
            await load_active(file, headers.current)
            assert turns.count >= 3
            await (replay_to_file(file, headers) if writable else open_replayed(file, headers.current))
            assert turns.count > len(ranges) // 128

    asyncio.run(run())


ENTRIES = (
    (0, entry(10, 0, (BAT, page(1)), (BAT + 64 * K, 64 * K), last=5 * M)),
    (ONE, entry(11, 0, (BAT + SECTOR, page(2)), (BAT + 64 * K, page(3)), last=5 * M)),
)


def recorded() -> tuple[bytearray, list[tuple[str, int, bytes]], bytes]:
    content = logged(*ENTRIES)
    file = Recorder(content)

    async def run() -> None:
        await replay_to_file(file, await load_headers(file))

    asyncio.run(run())
    return content, file.steps, bytes(file.content)


def test_replay_to_file_order_of_writes_and_barriers() -> None:
    _, steps, _ = recorded()
    headers = (64 * K, 128 * K)
    order = [kind if kind != "write" else "header" if offset in headers else "change" for kind, offset, _ in steps]
    assert order == [
        "header", "barrier",
        "change", "change", "change", "barrier",
        "size", "barrier",
        "header", "barrier",
        "header", "barrier",
    ]  # fmt: skip
    first, *later = [Header.from_bytes(data) for _, offset, data in steps if offset in headers]
    assert first is not None
    assert first.log_guid == LOG_GUID
    assert first.file_write_guid != craft.FILE_WRITE_GUID
    assert [header.log_guid.int for header in later if header] == [0, 0]
    assert {header.file_write_guid for header in (first, *later) if header} == {first.file_write_guid}


def crashed(content: bytearray, steps: list[tuple[str, int, bytes]], rng: random.Random) -> bytearray:
    """After a crash: all that a barrier made durable, and of what follows some sectors of 512 bytes, in any order."""
    state = bytearray(content)
    durable = max((index for index, step in enumerate(steps) if step[0] == "barrier"), default=-1)
    for index, (kind, offset, data) in enumerate(steps):
        is_sure = index < durable
        if kind == "size" and (is_sure or rng.random() < 0.5):
            state += bytes(max(0, offset - len(state)))
        elif kind == "write":
            for start in range(0, len(data), 512):
                if is_sure or rng.random() < 0.6:
                    at = offset + start
                    state += bytes(max(0, at + 512 - len(state)))
                    state[at : at + 512] = data[start : start + 512]
    return state


def test_replay_to_file_after_a_crash_at_any_moment_ends_the_same() -> None:
    content, steps, final = recorded()
    rng = random.Random(4)
    seen = set()

    async def finish(state: bytearray) -> None:
        file = MemoryFile(state)
        headers = await load_headers(file)
        seen.add(headers.current.has_log)
        over = await open_replayed(MemoryFile(state, writable=False), headers.current)
        assert (await content_of(over))[192 * K :] == final[192 * K :]
        headers = await replay_to_file(file, headers)
        assert file.content[192 * K :] == final[192 * K :]
        assert headers.current.data_write_guid == craft.DATA_WRITE_GUID

    for count in range(len(steps) + 1):
        for _ in range(3):
            asyncio.run(finish(crashed(content, steps[:count], rng)))
    assert seen == {True, False}


def test_control_replay_without_barriers_does_not_survive_a_crash() -> None:
    content, steps, final = recorded()
    unordered = [step for step in steps if step[0] != "barrier"]
    lost = 0
    for seed in range(60):
        file = MemoryFile(crashed(content, unordered, random.Random(seed)))
        try:
            headers = asyncio.run(load_headers(file))
            asyncio.run(replay_to_file(file, headers))
        except CorruptImage:
            lost += 1
            continue
        lost += file.content[192 * K :] != final[192 * K :]
    assert lost > 10


# Samples.

BAT_CHANGES: dict[str, dict[int, int]] = {
    "d2": {0: 0x800006},
    "w0": {0: 0x800006},
    "w2": {1: 0x1000006, 2: 0x1800006},
    "w5": {1: 0x1000006},
    "w9": {**dict.fromkeys(range(1024), 0), 1024: 0x1000006},
}
"""BAT entries after the replay; the others are as before it. As the README of the samples says."""


def unpacked(tmp_path: Path, name: str) -> Path:
    path = tmp_path / f"{name}.vhdx"
    path.write_bytes(craft.sample(name))
    return path


async def bat_of(file: BlockFile, count: int = 1025) -> list[int]:
    """The first entries of the BAT: 1024 blocks of 8 MiB and a sector bitmap take as many."""
    regions = await load_regions(file, (await load_headers(file)).current)
    content = bytearray(count * 8)
    await file.pread(regions.bat_offset, memoryview(content))
    return [each[0] for each in struct.iter_unpack("<Q", content)]


@pytest.mark.parametrize("name", BAT_CHANGES)
def test_replay_of_a_sample_in_memory_and_in_the_file(tmp_path: Path, name: str) -> None:
    path = unpacked(tmp_path, name)
    before = path.read_bytes()

    async def run() -> None:
        below = PosixFile(path, writable=False)
        file = await open_replayed(below, (await load_headers(below)).current)
        expected = await bat_of(below)
        for index, value in BAT_CHANGES[name].items():
            expected[index] = value
        assert await bat_of(file) == expected
        regions = await load_regions(file, (await load_headers(file)).current)
        assert (await load_metadata(file, regions)).logical_sector_size == 512
        await file.close()
        assert path.read_bytes() == before
        written = PosixFile(path, writable=True)
        await replay_to_file(written, await load_headers(written))
        assert await bat_of(written) == expected
        await written.close()

    asyncio.run(run())


def test_replay_of_the_windows_sample_gives_the_disk_that_is_known(tmp_path: Path) -> None:
    path = unpacked(tmp_path, "vhdx-log-replay")
    before = path.read_bytes()

    async def digest(file: BlockFile) -> str:
        total, length = hashlib.sha256(), 32 * M
        content, zeroes = bytearray(length), bytes(length)
        for block in await bat_of(file, 32):
            if block & 7 == 6:
                await file.pread(block & ~0xFFFFF, memoryview(content))
            total.update(content if block & 7 == 6 else zeroes)
        return total.hexdigest()

    async def run() -> None:
        below = PosixFile(path, writable=False)
        file = await open_replayed(below, (await load_headers(below)).current)
        assert await digest(file) == "3ba3b309425b7ff5e8e0199edceed95226250f880c53b24e8eae93865f3fad5e"
        assert await bat_of(below) == [0] * 1025
        await file.close()

    asyncio.run(run())
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["d2", "w0"])
def test_replay_of_one_entry_is_qemus(tmp_path: Path, name: str) -> None:
    """QEMU replays a log of a single entry rightly (of more it does not)."""
    qemu_img = require_program("qemu-img")
    ours, theirs = unpacked(tmp_path, name), tmp_path / "theirs.vhdx"
    shutil.copy(ours, theirs)

    async def run() -> None:
        file = PosixFile(ours, writable=True)
        await replay_to_file(file, await load_headers(file))
        await file.close()

    asyncio.run(run())
    subprocess.run([qemu_img, "check", "-q", "-r", "all", theirs], check=False, capture_output=True)
    assert ours.read_bytes()[192 * K : M] == theirs.read_bytes()[192 * K : M]
    assert ours.read_bytes()[2 * M :] == theirs.read_bytes()[2 * M :]


@pytest.mark.parametrize("name", ["d2", "w0", "w2", "w5", "w9", "vhdx-log-replay"])
def test_replayed_sample_is_clean_to_others(tmp_path: Path, name: str) -> None:
    qemu_img = require_program("qemu-img")
    path = unpacked(tmp_path, name)
    refused = subprocess.run([qemu_img, "info", path], capture_output=True, check=False)
    assert b"contains a log that needs to be replayed" in refused.stderr

    async def run() -> None:
        file = PosixFile(path, writable=True)
        await replay_to_file(file, await load_headers(file))
        await file.close()

    asyncio.run(run())
    subprocess.run([qemu_img, "check", path], check=True, capture_output=True)
