"""Check and repair: each damage is found where it is, what is sound is not, and a repair mends and loses nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdimg.formats import open_file
from nbdimg.formats.gate import DenyGate
from nbdimg.formats.options import OpenOptions
from nbdimg.formats.vhdx.check import VhdxReport, check
from nbdimg.formats.vhdx.create import CreateOptions, create
from nbdimg.formats.vhdx.repair import repair
from nbdimg.storage.memory import MemoryFile
from nbdimg.storage.posix import PosixFile
from nbdimg.units import KiB, MiB, TiB
from tests.formats.vhdx import craft
from tests.support.crash import RecordingFile
from tests.support.crash.states import crash_states
from tests.support.crash.trace import Trace
from tests.support.reading import read_all
from tests.support.vhdximages import BAT_OFFSET, FULL, IS_FIXED, PARTIAL, UNMAPPED, ZERO, Builder, judge, run

CLEAN, INCOMPLETE, CORRUPT, LEAKS = 0, 1, 2, 3
GUEST = b"\1" * MiB + bytes(MiB) + b"\2" * MiB + b"\3" * 512
"""Blocks 0, 2 and 3 of a dynamic image are present, from 4, 5 and 6 MiB on."""


def plain() -> Builder:
    builder = Builder(len(GUEST))
    builder.add_guest(GUEST)
    return builder


def child() -> Builder:
    builder = Builder(4 * MiB, parent=".\\parent.vhdx")
    builder.add_partial(0, b"\1" * MiB, [(0, 8)])
    builder.add_full(1, b"\2" * MiB)
    return builder


def checked(content: bytes | bytearray) -> VhdxReport:
    file = MemoryFile(content, "x.vhdx", writable=False)
    report = asyncio.run(check(file))
    assert file.content == content
    return report


def repaired(content: bytes | bytearray, *, leaks_only: bool = False) -> tuple[VhdxReport, bytearray]:
    file = MemoryFile(content, "x.vhdx")
    report = asyncio.run(repair(file, leaks_only=leaks_only))
    return report, file.content


async def guest_of(file: MemoryFile) -> bytes:
    return await read_all(await open_file(file, "vhdx", OpenOptions(DenyGate())))


# Sound


@pytest.mark.parametrize("builder", [plain(), child(), Builder(1 * MiB), Builder(40 * MiB, flags=IS_FIXED)])
def test_check_of_a_sound_image_finds_nothing(builder: Builder) -> None:
    report = checked(builder.content)
    assert (report.findings, report.exit_status, report.log) == ([], CLEAN, "clean")


@pytest.mark.parametrize("name", ["child", "d2", "k4", "parent", "swap"])
def test_check_of_a_sample_finds_nothing(name: str) -> None:
    report = checked(craft.sample(name))
    assert (report.findings, report.exit_status) == ([], CLEAN)


@pytest.mark.parametrize(
    "options",
    ["block_size=1M", "block_size=8M,block_state_zero=off", "subformat=fixed,block_state_zero=off", "log_size=3M"],
)
def test_check_of_qemus_images_finds_nothing(tmp_path: Path, options: str) -> None:
    path = tmp_path / "a.vhdx"
    run("qemu-img", "create", "-q", "-f", "vhdx", "-o", options, path, "40M")
    assert checked(path.read_bytes()).findings == []
    run("qemu-io", "-f", "vhdx", "-c", "write -q 9M 20M", "-c", "write -q 39M 1M", path)
    assert checked(path.read_bytes()).findings == []


def test_check_of_qemus_fixed_image_finds_the_space_that_no_block_has(tmp_path: Path) -> None:
    path = tmp_path / "a.vhdx"
    run("qemu-img", "create", "-q", "-f", "vhdx", "-o", "subformat=fixed", path, "40M")
    report = checked(path.read_bytes())
    assert (report.exit_status, report.allocated_clusters) == (LEAKS, 0)


def test_check_counts_blocks() -> None:
    report = checked(plain().content)
    assert (report.allocated_clusters, report.total_clusters, report.image_end_offset) == (3, 4, 7 * MiB)


def test_check_of_a_log_to_be_replayed_looks_at_what_it_makes_of_the_image() -> None:
    report = checked(craft.sample("vhdx-log-replay"))
    assert report.log.startswith("to be replayed: ")
    assert (report.findings, report.exit_status) == ([], CLEAN)


def test_check_of_a_long_and_empty_file_takes_no_memory_for_its_length(tmp_path: Path) -> None:
    path = tmp_path / "far.vhdx"
    path.write_bytes(plain().content)
    os.truncate(path, 12 * TiB)

    async def main() -> VhdxReport:
        file = PosixFile(path, writable=False)
        tracemalloc.start()
        try:
            report = await check(file)
            assert tracemalloc.get_traced_memory()[1] < 6 * MiB
        finally:
            tracemalloc.stop()
            await file.close()
        return report

    assert asyncio.run(main()).leaks > 11 << 20


def test_check_of_the_largest_table_is_fast(tmp_path: Path) -> None:
    path = tmp_path / "a.vhdx"
    create(path, 64 * TiB, CreateOptions(block_size=MiB))
    block = 63 << 20
    with open(path, "r+b") as image:
        image.truncate(517 * MiB)
        image.seek(3 * MiB + 8 * (block + block // 4096))
        image.write(struct.pack("<Q", 516 * MiB | FULL))
    file = PosixFile(path, writable=False)
    started = time.monotonic()
    report = asyncio.run(check(file))
    assert time.monotonic() - started < 5
    asyncio.run(file.close())
    assert (report.findings, report.allocated_clusters, report.total_clusters) == ([], 1, 64 * MiB)


# Damaged

Damage = Callable[[bytearray], object]


def entry(index: int, value: int) -> Damage:
    return lambda content: struct.pack_into("<Q", content, BAT_OFFSET + 8 * index, value)


def blot(offset: int) -> Damage:
    return lambda content: content.__setitem__(offset, content[offset] ^ 0xFF)


def grown(size: int) -> Damage:
    return lambda content: content.extend(bytes(size - len(content)))


BAT_DAMAGES: list[tuple[Builder, Damage, int, str]] = [
    (plain(), entry(0, 4 * MiB | FULL | 8), 0, "0x000000000040000e, expected the reserved bits 3 to 19 to be 0"),
    (plain(), entry(1, 4), 1, "which is the reserved state 4, expected 0 to 3, 6 or 7"),
    (plain(), entry(1, 5), 1, "which is the reserved state 5"),
    (plain(), entry(1, 9 * MiB | ZERO), 1, "expected no offset in state 2"),
    (plain(), entry(1, 9 * MiB), 1, "expected no offset in state 0"),
    (plain(), entry(0, 4 * MiB | PARTIAL), 0, "which is partially present, expected only in a file with a parent"),
    (plain(), entry(1, FULL), 1, "expected an offset of at least 1 MiB where data is present"),
    (plain(), entry(1, 4 * MiB | FULL), 1, "4194304 to 5242880, where another block or sector bitmap is"),
    (plain(), entry(1, 3 * MiB | FULL), 1, "3145728 to 4194304, where the BAT region is, expected a place of its own"),
    (plain(), entry(1, 1 * MiB | FULL), 1, "where the log is"),
    (plain(), entry(1, 2 * MiB | FULL), 1, "where the metadata region is"),
    (plain(), entry(1, 7 * MiB | FULL), 1, "which ends at 8388608, expected inside the file's 7340032 bytes"),
    (plain(), entry(1, 7 * MiB | UNMAPPED), 1, "which ends at 8388608"),
    (plain(), entry(1, (1 << 63) | FULL), 1, "expected inside the file's"),
    (child(), entry(4096, 0), 4096, "expected a sector bitmap, as block 0 is partially present"),
    (child(), entry(4096, 2), 4096, "expected state 0 or 6 of a sector bitmap"),
    (child(), entry(4096, 5 * MiB | FULL), 4096, "where another block or sector bitmap is"),
    (child(), entry(4096, 4 * MiB | FULL | 1 << 19), 4096, "expected the reserved bits"),
]


@pytest.mark.parametrize(("builder", "damage", "index", "message"), BAT_DAMAGES)
def test_check_of_a_damaged_bat_says_entry_offset_and_what_is_expected(
    builder: Builder, damage: Damage, index: int, message: str
) -> None:
    content = bytearray(builder.content)
    damage(content)
    report = checked(content)
    assert report.exit_status == CORRUPT
    found = [each for each in report.findings if each.kind == "corruption"]
    assert any(message in each.message for each in found), found
    assert {each.structure for each in found} == {"BAT"}
    assert BAT_OFFSET + 8 * index in [each.offset for each in found]


def test_check_of_a_short_last_block_that_the_file_just_holds_finds_nothing() -> None:
    content = plain().content
    del content[6 * MiB + 512 :]
    assert checked(content).exit_status == CLEAN
    del content[6 * MiB + 511 :]
    assert checked(content).exit_status == CORRUPT


DAMAGES: list[tuple[Damage, int, str, int | None]] = [
    (blot(64 * KiB + 100), CORRUPT, "header 1", 64 * KiB),
    (blot(128 * KiB + 20), CORRUPT, "header 2", 128 * KiB),
    (blot(192 * KiB + 9), CORRUPT, "region table 1", 192 * KiB),
    (blot(256 * KiB), CORRUPT, "region table 2", 256 * KiB),
    (grown(13 * MiB), LEAKS, "unused space", 7 * MiB),
    (entry(2, 0), LEAKS, "unused space", 5 * MiB),
    (entry(4096, 7 * MiB | FULL), CLEAN, "", None),
    (blot(0), INCOMPLETE, "image", 0),
    (blot(2 * MiB), INCOMPLETE, "image", 2 * MiB),
    (lambda content: (blot(64 * KiB)(content), blot(128 * KiB)(content)), INCOMPLETE, "image", 64 * KiB),
    (lambda content: (blot(192 * KiB)(content), blot(256 * KiB)(content)), INCOMPLETE, "image", 192 * KiB),
]


@pytest.mark.parametrize(("damage", "status", "structure", "offset"), DAMAGES)
def test_check_of_other_damage_says_structure_and_offset(
    damage: Damage, status: int, structure: str, offset: int | None
) -> None:
    content = plain().content
    damage(content)
    report = checked(content)
    assert report.exit_status == status, report.findings
    assert [(each.structure, each.offset) for each in report.findings] == ([(structure, offset)] if structure else [])


def test_check_of_an_image_without_parent_counts_a_sector_bitmap_as_leak() -> None:
    builder = Builder(5000 * MiB)
    builder.set_entry(4096, 4 * MiB | FULL)
    builder.append(b"", MiB)
    report = checked(builder.content)
    assert (report.exit_status, report.findings[0].offset) == (LEAKS, BAT_OFFSET + 8 * 4096)


def test_check_of_a_log_that_holds_nothing_valid_is_a_corruption() -> None:
    content = craft.image(log_guid=craft.LOG_GUID)
    report = checked(content)
    assert (report.log, report.exit_status) == ("broken", CORRUPT)
    assert [(each.structure, each.offset) for each in report.findings] == [("log", MiB)]


def test_check_of_millions_of_wrong_entries_keeps_some() -> None:
    builder = Builder(100000 * MiB)
    builder.content[BAT_OFFSET : BAT_OFFSET + 800000] = b"\4" + bytes(7) * 1 + (b"\4" + bytes(7)) * 99999
    report = checked(builder.content)
    assert (len(report.findings), report.corruptions) == (1000, 100000 - 24)


# Repair


@pytest.mark.parametrize("offset", [64 * KiB + 100, 128 * KiB, 192 * KiB + 9, 256 * KiB])
def test_repair_writes_a_lost_copy_again_from_the_other(tmp_path: Path, offset: int) -> None:
    content = plain().content
    blot(offset)(content)
    report, mended = repaired(content)
    assert (report.exit_status, report.corruptions_fixed, report.findings) == (CLEAN, 1, [])
    assert mended[192 * KiB : 256 * KiB] == mended[256 * KiB : 320 * KiB] == plain().content[192 * KiB : 256 * KiB]
    for header in (mended[64 * KiB : 68 * KiB], mended[128 * KiB : 132 * KiB]):
        assert craft.sealed(header) == header
        assert header[16:32] != craft.FILE_WRITE_GUID.bytes_le
        assert header[32:48] == craft.DATA_WRITE_GUID.bytes_le
        assert header[48:64] == bytes(16)
    assert mended[2 * MiB :] == content[2 * MiB :]
    path = tmp_path / "a.vhdx"
    path.write_bytes(mended)
    judge(path, GUEST)


def test_repair_of_an_image_without_a_log_leaves_a_lost_region_table() -> None:
    """What is in both tables can be written only through the log."""
    content = plain().content
    for offset in (64 * KiB, 128 * KiB):
        content[offset : offset + 4096] = craft.header(offset // (64 * KiB), log_length=0, log_offset=0)
    blot(192 * KiB + 9)(content)
    report, mended = repaired(content)
    assert [each.structure for each in report.findings] == ["region table 1"]
    assert report.corruptions_fixed == 0
    assert mended == content


def test_repair_of_leaks_cuts_trailing_space_and_leaves_the_rest() -> None:
    content = plain().content
    grown(13 * MiB)(content)
    blot(192 * KiB)(content)
    report, mended = repaired(content, leaks_only=True)
    assert (report.exit_status, report.leaks_fixed, report.corruptions_fixed) == (CORRUPT, 6, 0)
    assert len(mended) == 7 * MiB
    assert mended[192 * KiB : 256 * KiB] == content[192 * KiB : 256 * KiB]


@pytest.mark.parametrize("leaks_only", [False, True])
def test_repair_clears_sector_bitmaps_of_a_file_without_parent(leaks_only: bool) -> None:
    """Other programs leave them behind, with offsets that mean nothing."""
    builder = Builder(9000 * MiB)
    builder.add_full(0, b"\1" * MiB)
    expected = bytes(builder.content[3 * MiB : 5 * MiB])
    builder.set_entry(4096, 4 * MiB | FULL)
    builder.set_entry(8193, 0x55555_00006)
    report, mended = repaired(builder.content, leaks_only=leaks_only)
    assert (report.exit_status, report.leaks_fixed) == (CLEAN, 2)
    assert mended[3 * MiB :] == expected
    assert checked(mended).exit_status == CLEAN


def test_check_of_unused_space_finds_no_leak_in_a_hole_that_a_repair_has_punched(tmp_path: Path) -> None:
    content = plain().content
    entry(2, ZERO)(content)
    content += b"\4" * MiB
    path = tmp_path / "a.vhdx"
    path.write_bytes(content)

    async def checked_and_repaired() -> list[tuple[int, int]]:
        file = PosixFile(path, writable=True)
        before, after = await check(file), await repair(file, leaks_only=True)
        await file.close()
        return [(report.leaks, report.leaks_fixed) for report in (before, after)]

    assert asyncio.run(checked_and_repaired()) == [(2, 0), (0, 2)]
    assert path.read_bytes()[4 * MiB :] == content[4 * MiB : 5 * MiB] + bytes(MiB) + content[6 * MiB : 7 * MiB]


class DeviceFile(MemoryFile):
    """A block device: it cannot be cut."""

    async def truncate(self, size: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def test_check_and_repair_of_a_larger_block_device_take_its_rest_for_no_leak() -> None:
    content = plain().content + bytes(2 * MiB)
    assert asyncio.run(check(DeviceFile(content))).leaks == 2
    report = asyncio.run(check(DeviceFile(content), is_device=True))
    assert (report.is_clean, report.device_rest) == (True, 2 * MiB)
    report = asyncio.run(repair(DeviceFile(content), leaks_only=True, is_device=True))
    assert (report.is_clean, report.leaks_fixed, report.device_rest) == (True, 0, 2 * MiB)


def test_repair_with_a_wrong_entry_cuts_nothing() -> None:
    content = plain().content
    grown(13 * MiB)(content)
    entry(2, 5 * MiB | 4)(content)
    report, mended = repaired(content)
    assert (report.exit_status, report.leaks_fixed) == (CORRUPT, 0)
    assert mended == content


def test_repair_of_a_sound_image_changes_nothing() -> None:
    content = plain().content
    assert repaired(content)[1] == content


def test_repair_replays_the_log() -> None:
    report, mended = repaired(craft.sample("vhdx-log-replay"))
    assert (report.exit_status, report.log) == (CLEAN, "clean: it has been replayed")
    assert checked(mended).log == "clean"


def test_repair_leaves_a_broken_log() -> None:
    content = craft.image(log_guid=craft.LOG_GUID)
    report, mended = repaired(content)
    assert (report.exit_status, mended) == (CORRUPT, content)


def crashes(content: bytearray, *, without_barriers: bool = False) -> Iterator[str]:
    """What is wrong with states that a crash during a repair leaves."""
    trace = Trace()
    file = RecordingFile(trace, content, inline_share=0)
    asyncio.run(repair(file, leaks_only=False))
    for state in crash_states(trace, seed=1, cap=4, without_barriers=without_barriers):
        left = MemoryFile(state.files[0])
        try:
            if asyncio.run(guest_of(left)) != GUEST or asyncio.run(repair(left, leaks_only=False)).exit_status:
                yield f"{state}"
        except Exception as error:
            yield f"{state}: {error}"


def test_repair_that_is_interrupted_leaves_what_can_be_repaired_again() -> None:
    content = plain().content
    grown(8 * MiB)(content)
    blot(192 * KiB)(content)
    assert list(crashes(content)) == []
    assert next(crashes(content, without_barriers=True), None) is not None


def test_repair_of_leaks_gives_a_new_file_write_guid_before_it_changes_anything_else() -> None:
    """[MS-VHDX] 2.2.2: what a crash leaves, too, has another FileWriteGuid if anything in the file has changed."""
    content = plain().content
    entry(2, ZERO)(content)
    grown(13 * MiB)(content)
    trace = Trace()
    asyncio.run(repair(RecordingFile(trace, content, inline_share=0), leaks_only=True))
    is_cut = False
    for state in crash_states(trace, seed=1):
        left = state.files[0]
        guids = [left[start + 16 : start + 32] for start in (64 * KiB, 128 * KiB)]
        if len(left) < len(content) or left[MiB:] != content[MiB:]:
            is_cut = True
            assert craft.FILE_WRITE_GUID.bytes_le not in guids, state
    assert is_cut
