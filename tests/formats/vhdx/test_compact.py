"""Compaction: the disk stays, the file shrinks, others agree, and a crash at any moment loses nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdimg.errors import CorruptImage, UnsupportedFeature
from nbdimg.formats import open_file, resize_image
from nbdimg.formats.options import OpenOptions
from nbdimg.formats.vhdx import compact as module
from nbdimg.formats.vhdx.check import check
from nbdimg.formats.vhdx.compact import Compacted, compact
from nbdimg.image.gate import Reference
from nbdimg.storage.memory import MemoryFile
from nbdimg.storage.posix import PosixFile
from nbdimg.units import KiB, MiB
from tests.formats.vhdx import craft
from tests.support.crash import RecordingFile
from tests.support.crash.states import crash_states
from tests.support.crash.trace import Trace
from tests.support.faultfile import FaultFile
from tests.support.reading import read_all
from tests.support.vhdximages import (
    BAT_OFFSET,
    FULL,
    IS_FIXED,
    UNDEFINED,
    UNMAPPED,
    ZERO,
    Builder,
    dynamic,
    flattened,
    judge,
    run,
)

PARENT = b"\x0f" * (6 * MiB)


class Gate:
    """Opens the parent, whatever it is called."""

    async def open(self, reference: Reference) -> MemoryFile:
        return MemoryFile(dynamic(PARENT), "parent.vhdx", writable=False)


async def guest_of(file: MemoryFile, *, writable: bool = False) -> bytes:
    return await read_all(await open_file(file, "vhdx", OpenOptions(Gate(), writable=writable)))


def compacted(content: bytes | bytearray) -> tuple[bytearray, Compacted]:
    """The file's bytes afterwards; the disk is the same and a check finds no corruption."""
    file = MemoryFile(content, "x.vhdx")
    guest = asyncio.run(guest_of(file))
    done = asyncio.run(compact(file))
    assert asyncio.run(guest_of(file)) == guest
    assert asyncio.run(check(file)).corruptions == 0
    assert (done.old_size, done.size) == (len(content), len(file.content))
    return file.content, done


def entries(content: bytearray, count: int) -> tuple[int, ...]:
    return struct.unpack_from(f"<{count}Q", content, BAT_OFFSET)


def test_compact_drops_blocks_of_zeroes_and_moves_the_last_ones_into_their_places() -> None:
    builder = Builder(5 * MiB)
    builder.add_guest(b"\1" * MiB + bytes(2 * MiB) + b"\2" * MiB + b"\3" * MiB, all_blocks=True)
    content, done = compacted(builder.content)
    assert entries(content, 6) == (4 * MiB | FULL, ZERO, ZERO, 6 * MiB | FULL, 5 * MiB | FULL, 0)
    assert content[4 * MiB :] == b"\1" * MiB + b"\3" * MiB + b"\2" * MiB
    assert (done.dropped_count, done.moved_count) == (2, 2)


def test_compact_keeps_data_write_guid_and_leaves_the_log_empty() -> None:
    builder = Builder(2 * MiB)
    builder.add_guest(bytes(MiB) + b"\1" * MiB, all_blocks=True)
    content, _ = compacted(builder.content)
    for offset in (64 * KiB, 128 * KiB):
        header = content[offset : offset + 4 * KiB]
        assert craft.sealed(header) == header
        assert header[16:32] != craft.FILE_WRITE_GUID.bytes_le
        assert header[32:48] == craft.DATA_WRITE_GUID.bytes_le
        assert header[48:64] == bytes(16)


def test_compact_of_what_is_compact_changes_nothing() -> None:
    content = dynamic(b"\1" * MiB + bytes(MiB) + b"\2" * MiB)
    assert compacted(content)[0] == content


def test_compact_cuts_trailing_space() -> None:
    content = dynamic(b"\1" * MiB)
    assert compacted(content + bytes(7 * MiB))[0][2 * MiB :] == content[2 * MiB :]


def test_compact_on_a_block_device_leaves_its_end_where_it_is() -> None:
    file = FaultFile(MemoryFile(dynamic(b"\1" * MiB) + bytes(2 * MiB)))
    file.fail("truncate", errno.EINVAL)
    done = asyncio.run(compact(file))
    assert done.size == done.old_size == file.size


def test_compact_is_durable_when_it_returns() -> None:
    file = FaultFile(MemoryFile(dynamic(b"\1" * MiB) + bytes(7 * MiB)))
    asyncio.run(compact(file))
    changes = [each for each in file.calls if each in ("pwrite", "punch", "zero", "truncate", "fdatasync")]
    assert changes[-2:] == ["truncate", "fdatasync"]


def test_compact_costs_memory_for_what_is_in_use_and_not_for_the_files_size(tmp_path: Path) -> None:
    """A byte for each MiB, as for a check; 8 TiB is what a log may have made of it."""
    path = tmp_path / "x.vhdx"
    path.write_bytes(dynamic(b"\1" * MiB))
    os.truncate(path, 8 << 40)

    async def main() -> int:
        file = PosixFile(path, writable=True)
        tracemalloc.start()
        await compact(file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        await file.close()
        return peak

    assert asyncio.run(main()) < 24 * MiB
    assert path.stat().st_size == 5 * MiB


def test_compact_lets_old_places_of_unmapped_and_undefined_blocks_go() -> None:
    builder = Builder(3 * MiB)
    for block, state in enumerate((UNMAPPED, UNDEFINED)):
        builder.set_block(block, builder.append(b"\7" * MiB, MiB) | state)
    builder.add_full(2, b"\1" * MiB)
    content, done = compacted(builder.content)
    assert entries(content, 3) == (UNMAPPED, UNDEFINED, 4 * MiB | FULL)
    assert (len(content), done.dropped_count) == (5 * MiB, 0)


@pytest.mark.parametrize("can_punch", [True, False])
def test_compact_moves_a_block_with_its_zeroes_over_what_was_there(can_punch: bool) -> None:
    builder = Builder(4 * MiB, block_size=2 * MiB)
    builder.set_block(0, builder.append(b"\7" * 2 * MiB, 2 * MiB) | UNMAPPED)
    builder.add_full(1, b"\2" * MiB)
    memory = MemoryFile(builder.content)
    file = FaultFile(memory)
    if not can_punch:
        file.unsupported.add("punch")
    asyncio.run(compact(file))
    assert entries(memory.content, 2) == (UNMAPPED, 4 * MiB | FULL)
    assert memory.content[4 * MiB :] == b"\2" * MiB + bytes(MiB)


def test_compact_judges_a_short_last_block_by_the_guests_part() -> None:
    builder = Builder(MiB + 512)
    builder.add_full(1, bytes(512) + b"\7" * 512)
    assert entries(compacted(builder.content)[0], 2) == (0, ZERO)


def test_compact_of_a_child_keeps_zeroes_over_the_parent_and_moves_bitmaps() -> None:
    builder = Builder(6 * MiB, parent=".\\parent.vhdx")
    builder.add_full(0, bytes(MiB))
    builder.set_block(1, ZERO)
    builder.add_full(2, bytes(MiB))
    builder.add_partial(3, b"\1" * MiB, [(8, 16)])
    builder.add_full(4, b"\2" * MiB)
    content, done = compacted(builder.content)
    assert [entry & 7 for entry in entries(content, 6)] == [ZERO, ZERO, ZERO, 7, FULL, 0]
    assert (done.dropped_count, len(content)) == (2, 7 * MiB)
    (bitmap,) = struct.unpack_from("<Q", content, BAT_OFFSET + 8 * 4096)
    assert bitmap & 7 == FULL
    assert content[(bitmap & ~7) + 3 * 256 :][:4] == b"\0\xff\0\0"


def with_a_moved_bat() -> bytearray:
    """Grown, so that the BAT has 2 MiB at the end; what was before it has gone."""

    async def grow() -> bytearray:
        file = MemoryFile(dynamic(b"\1" * MiB + b"\2" * MiB + b"\3" * MiB), "x.vhdx")
        image = await open_file(file, "vhdx", OpenOptions(Gate(), writable=True))
        await resize_image(image, 131057 * MiB)
        await image.zero(0, 2 * MiB, may_unmap=True, is_fast_only=False)
        await image.close()
        return file.content

    return asyncio.run(grow())


def test_compact_brings_the_bat_back_that_a_growth_has_moved() -> None:
    content = with_a_moved_bat()
    assert len(content) == 9 * MiB
    file = MemoryFile(content, "x.vhdx")
    done = asyncio.run(compact(file))
    table = craft.region_table(craft.region(craft.BAT, 3 * MiB, 2 * MiB), craft.region(craft.METADATA, 2 * MiB))
    assert file.content[192 * KiB : 256 * KiB] == file.content[256 * KiB : 320 * KiB] == table
    assert (entries(file.content, 4), done.size) == ((ZERO, ZERO, 5 * MiB | FULL, 0), 6 * MiB)
    report = asyncio.run(check(file))
    assert (report.findings, report.log) == ([], "clean")


def test_compact_that_moves_the_bat_and_is_interrupted_leaves_the_disk_as_it_was() -> None:
    content = with_a_moved_bat()
    struct.pack_into("<Q", content, 2 * MiB + 64 * KiB + 8, 3 * MiB)
    assert list(crashes(content)) == []
    assert next(crashes(content, without_barriers=True), None) is not None


def test_compact_leaves_no_leak_where_a_gap_is_too_small_for_a_block(tmp_path: Path) -> None:
    builder = Builder(4 * MiB, block_size=2 * MiB)
    builder.add_full(0, b"\1" * 2 * MiB)
    builder.append(b"\4" * MiB, MiB)
    builder.add_full(1, b"\2" * 2 * MiB)
    path = tmp_path / "a.vhdx"
    path.write_bytes(builder.content)

    async def leaks() -> tuple[int, int]:
        file = PosixFile(path, writable=True)
        before = await check(file)
        await compact(file)
        after = await check(file)
        await file.close()
        return before.leaks, after.leaks

    assert asyncio.run(leaks()) == (1, 0)


def test_compact_does_not_take_a_bitmaps_hole_for_a_block() -> None:
    builder = Builder(8 * MiB, block_size=2 * MiB)
    builder.append(b"", MiB)
    builder.add_full(0, b"\1" * 2 * MiB)
    content, done = compacted(builder.content)
    assert entries(content, 1) == (5 * MiB | FULL,)
    assert done.moved_count == 0


def test_compact_replays_the_log_first() -> None:
    builder = Builder(2 * MiB)
    builder.append(b"\1" * MiB, MiB)
    page = struct.pack("<Q", 4 * MiB | FULL).ljust(4096, b"\0")
    logged = craft.entry(1, 0, (BAT_OFFSET, page), flushed=5 * MiB, last=5 * MiB)
    builder.content[128 * KiB : 132 * KiB] = craft.header(2, log_guid=craft.LOG_GUID)
    builder.content[MiB : MiB + len(logged)] = logged
    content, _ = compacted(builder.content)
    assert entries(content, 1) == (4 * MiB | FULL,)
    assert content[4 * MiB :] == b"\1" * MiB


def test_compact_of_a_fixed_image_is_refused() -> None:
    builder = Builder(2 * MiB, flags=IS_FIXED)
    builder.add_guest(bytes(2 * MiB), all_blocks=True)
    file = MemoryFile(builder.content)
    with pytest.raises(UnsupportedFeature, match="it is a fixed image"):
        asyncio.run(compact(file))
    assert file.content == builder.content


def test_compact_of_a_corrupt_image_is_refused_and_changes_nothing() -> None:
    builder = Builder(2 * MiB)
    builder.add_full(0, bytes(MiB))
    builder.set_block(1, 4 * MiB | FULL)
    file = MemoryFile(builder.content)
    with pytest.raises(CorruptImage, match="repair it first: BAT: entry 1 is"):
        asyncio.run(compact(file))
    assert file.content == builder.content


def test_compact_without_a_log_is_refused() -> None:
    content = Builder(2 * MiB).content
    for slot, offset in enumerate((64 * KiB, 128 * KiB)):
        content[offset : offset + 4096] = craft.header(slot, log_length=0, log_offset=0)
    struct.pack_into("<Q", content, BAT_OFFSET, 4 * MiB | FULL)
    with pytest.raises(UnsupportedFeature, match="it has no log"):
        asyncio.run(compact(MemoryFile(content + bytes(MiB))))


@pytest.mark.parametrize("seed", range(3))
def test_compact_of_a_random_image_is_what_others_read(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path, raw = tmp_path / "a.vhdx", tmp_path / "a.raw"
    run("qemu-img", "create", "-q", "-f", "vhdx", "-o", f"block_size={rng.choice((1, 2, 4))}M", path, "60M")
    for _ in range(20):
        fill = rng.choice((0, 0, rng.randrange(1, 256)))
        start = rng.randrange(56)
        run("qemu-io", "-f", "vhdx", "-c", f"write -q -P {fill} {start}M {rng.randrange(1, 4)}M", path)
    run("qemu-img", "convert", "-O", "raw", path, raw)
    reports: list[tuple[int, int]] = []

    async def work() -> Compacted:
        file = PosixFile(path, writable=True)
        try:
            return await compact(file, progress=lambda done, total: reports.append((done, total)))
        finally:
            await file.close()

    done = asyncio.run(work())
    assert done.size == os.path.getsize(path), f"seed {seed}"
    assert reports == sorted(reports)
    assert reports[-1][0] == reports[-1][1]
    judge(path, raw.read_bytes())
    assert flattened(path) == raw.read_bytes()


# Crashes


def crashes(content: bytearray, *, without_barriers: bool = False) -> Iterator[str]:
    """What is wrong with states that a crash during a compaction leaves."""
    guest = asyncio.run(guest_of(MemoryFile(content)))
    trace = Trace()
    asyncio.run(compact(RecordingFile(trace, content, inline_share=0)))
    for state in crash_states(trace, seed=1, cap=5, without_barriers=without_barriers):
        try:
            left = MemoryFile(state.files[0])
            if asyncio.run(guest_of(left)) != guest or asyncio.run(check(left)).corruptions > 1:
                yield f"{state}"
            elif asyncio.run(guest_of(left, writable=True)) != guest or asyncio.run(check(left)).log != "clean":
                yield f"{state}, opened for writing"
        except Exception as error:
            yield f"{state}: {error}"


@pytest.mark.parametrize("batch_size", [MiB, 64 * MiB])
def test_compact_that_is_interrupted_leaves_the_disk_as_it_was(
    monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    monkeypatch.setattr(module, "BATCH_SIZE", batch_size)
    builder = Builder(5 * MiB, parent=".\\parent.vhdx")
    builder.add_full(0, bytes(MiB))
    builder.add_full(1, b"\1" * MiB)
    builder.add_partial(2, b"\2" * MiB, [(8, 16)])
    builder.add_full(3, bytes(MiB))
    builder.add_full(4, b"\3" * MiB)
    assert list(crashes(builder.content)) == []


def test_control_compact_without_barriers_loses_data() -> None:
    builder = Builder(3 * MiB)
    builder.add_guest(bytes(MiB) + b"\1" * MiB + b"\2" * MiB, all_blocks=True)
    assert list(crashes(builder.content)) == []
    assert next(crashes(builder.content, without_barriers=True), None) is not None
