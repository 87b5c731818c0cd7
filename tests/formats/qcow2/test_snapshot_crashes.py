"""Changes of internal snapshots that meet errors of the file, or a crash: whole images, with everybody's bytes."""

from __future__ import annotations

import asyncio
import errno
import itertools
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from nbdimg.errors import ImageFailed
from nbdimg.formats import open_file
from nbdimg.formats.gate import DenyGate
from nbdimg.formats.options import OpenOptions
from nbdimg.formats.qcow2 import snapshots
from nbdimg.formats.qcow2.check import check
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.formats.qcow2.open import read_header
from nbdimg.formats.qcow2.snapshot_changes import apply_snapshot, create_snapshot, delete_snapshot
from nbdimg.formats.qcow2.snapshots import Snapshot, load_snapshots
from nbdimg.formats.qcow2.structs import OFFSET_MASK
from nbdimg.image.image import Image
from nbdimg.storage.memory import MemoryFile
from nbdimg.units import KiB
from tests.formats.qcow2.test_bitmaps import FullFile
from tests.support.crash import (
    Built,
    Client,
    CrashState,
    ExportTarget,
    RecordingFile,
    Report,
    Scenario,
    Target,
    run_now,
)
from tests.support.faultfile import FaultFile, os_error
from tests.support.qcow2disk import NOW_NS, Disk, driver_of, opened
from tests.support.qcow2edit import qemu_check
from tests.support.reading import read_all

# Errors of the file


@pytest.mark.parametrize("version", ["compat=0.10", "compat=1.1"])
@pytest.mark.parametrize("verb", ["create", "apply", "delete"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_snapshot_change_that_meets_an_error_at_any_call_leaves_a_whole_image(
    tmp_path: Path, version: str, verb: str, number: int
) -> None:
    disk = disk_with_a_snapshot(tmp_path / "image", version + ",cluster_size=4k")
    content = disk.path.read_bytes()
    verbs: dict[str, Callable[[Qcow2Driver], Awaitable[Snapshot]]] = {
        "create": lambda driver: create_snapshot(driver, "two", now_ns=NOW_NS),
        "apply": lambda driver: apply_snapshot(driver, "one"),
        "delete": lambda driver: delete_snapshot(driver, "one"),
    }
    done = verbs[verb]
    one, active = disk.snapshots["one"], bytes(disk.active)
    outcomes: list[str] = []

    async def run(index: int) -> bool:
        memory = MemoryFile(content)
        file = FaultFile(memory)
        driver = await opened(file)
        count = len(file.calls)
        file.fail_at(index, number)
        outcome = await outcome_of(done(driver), driver, number)
        is_over = len(file.calls) - count <= index
        file.heal()
        image = Image(driver, writable=True)
        if outcome != "failed":
            await image.close()
        disk.path.write_bytes(memory.content)
        report = qemu_check(disk.path)
        if outcome == "refused":
            assert report.exit_status == 0, (index, report)
        memory = MemoryFile(memory.content)
        again = await open_file(memory, "qcow2", OpenOptions(DenyGate(), writable=True))
        found = await read_all(again)
        assert found == active or (verb == "apply" and outcome != "refused" and found == one), (index, outcome)
        await again.close()
        disk.path.write_bytes(memory.content)
        report = qemu_check(disk.path)
        assert report.exit_status in ((0, 3) if version != "compat=0.10" or outcome != "failed" else (0, 2, 3)), index
        names = {each.name: each for each in await load_snapshots(memory, await read_header(memory))}
        assert set(names) - {"one", "two"} == set()
        for name in names:
            past = await open_file(MemoryFile(memory.content), "qcow2", OpenOptions(DenyGate(), snapshot=name))
            assert await read_all(past) == (one if name == "one" else active), (index, outcome, name)
        outcomes.append(outcome)
        return is_over

    index = 0
    while not asyncio.run(run(index)):
        index += 1
    assert "failed" in outcomes
    assert number != errno.ENOSPC or "refused" in outcomes


@pytest.mark.parametrize("verb", ["create", "apply", "delete"])
def test_snapshot_change_on_a_disk_that_lets_nothing_be_written_for_a_while_leaves_an_image_that_goes_on(
    tmp_path: Path, verb: str
) -> None:
    """As a file system that writes each block to a new place: tables in place find no space either."""
    disk = disk_with_a_snapshot(tmp_path / "image")
    content, start, one = disk.path.read_bytes(), bytes(disk.active), disk.snapshots["one"]
    verbs: dict[str, Callable[[Qcow2Driver], Awaitable[Snapshot]]] = {
        "create": create_two,
        "apply": lambda driver: apply_snapshot(driver, "one"),
        "delete": lambda driver: delete_snapshot(driver, "one"),
    }
    outcomes = set()

    async def run(count: int) -> bool:
        disk.active[:] = start
        memory = MemoryFile(content)
        file = FaultFile(memory)
        driver = await opened(file)
        first = file.calls.count("pwrite")

        async def fail_from_its_turn(method: str) -> None:
            if method == "pwrite" and file.calls.count("pwrite") - first == count:
                file.fail("pwrite", errno.ENOSPC)

        file.delay = fail_from_its_turn
        outcome = await outcome_of(verbs[verb](driver), driver, errno.ENOSPC)
        is_over = file.calls.count("pwrite") - first <= count
        file.delay = None
        file.heal()
        if outcome == "done" and verb == "apply":
            disk.active[:] = one
        image = Image(driver, writable=True)
        await disk.guest(image, random.Random(count), 8)
        assert await read_all(image) == disk.active
        await image.close()
        disk.path.write_bytes(memory.content)
        is_dirty = (await read_header(memory)).is_dirty
        assert is_dirty or qemu_check(disk.path).exit_status == 0, count
        outcomes.add((outcome, is_dirty))
        again = await open_file(memory, "qcow2", OpenOptions(DenyGate(), writable=True))
        await end_whole(again, disk, memory)
        names = [each.name for each in await load_snapshots(memory, await read_header(memory))]
        expected = {"create": ["one", "two"], "apply": ["one"], "delete": []}
        assert names == (expected[verb] if outcome == "done" else ["one"]), count
        for name in names:
            past = await open_file(MemoryFile(memory.content), "qcow2", OpenOptions(DenyGate(), snapshot=name))
            assert await read_all(past) == (one if name == "one" else start), (count, name)
        return is_over

    count = 0
    while not asyncio.run(run(count)):
        count += 1
    left = "done" if verb == "delete" else "refused"
    assert outcomes == {("refused", False), ("done", False), (left, True)}


def test_snapshot_deleted_on_a_full_disk_writes_no_holes_of_its_tables(tmp_path: Path) -> None:
    """Fifteen of an L2 table's sixteen pages are holes here, as in any sparse copy of an image."""
    disk = Disk.made(tmp_path / "image", "cluster_size=64k", 256 * KiB)
    disk.write_qemu(1, 0, 200_000)
    disk.create_qemu("one")
    disk.write_qemu(2, 0, 512)

    async def run() -> None:
        memory = MemoryFile(disk.path.read_bytes())
        file = FullFile(memory, slow_only=True)
        driver = await opened(file)
        file.space = 0
        await delete_snapshot(driver, "one")
        await end_whole(Image(driver, writable=True), disk, memory)
        assert not (await read_header(memory)).is_dirty

    asyncio.run(run())


async def outcome_of(action: Awaitable[Snapshot], driver: Qcow2Driver, number: int) -> str:
    """ "done", "refused" and taken back, or "failed" with a driver that changes nothing any more."""
    try:
        await action
    except OSError as error:
        if error.errno != number:
            raise
        try:
            driver.check()
        except ImageFailed:
            return "failed"
        return "refused"
    return "done"


def disk_with_a_snapshot(path: Path, options: str = "cluster_size=4k") -> Disk:
    disk = Disk.made(path, options, 256 * KiB)
    disk.write_qemu(1, 0, 100_000)
    disk.create_qemu("one")
    disk.write_qemu(2, 50_000, 100_000)
    return disk


async def end_whole(image: Image, disk: Disk, memory: MemoryFile) -> None:
    """An image that has gone on has everybody's bytes, and neither leaks nor is corrupt when it is closed."""
    assert await read_all(image) == disk.active
    await image.close()
    disk.path.write_bytes(memory.content)
    assert qemu_check(disk.path).exit_status == 0


def create_two(driver: Qcow2Driver) -> Awaitable[Snapshot]:
    return create_snapshot(driver, "two", now_ns=NOW_NS)


class BadSectors(FaultFile):
    """Reads of any byte of `bad` fail once something was written."""

    bad = range(0)

    def _check(self, offset: int, length: int) -> None:
        if "pwrite" in self.calls and offset < self.bad.stop and self.bad.start < offset + length:
            raise os_error(errno.EIO)

    def try_pread(self, offset: int, view: memoryview) -> bool:
        self._check(offset, len(view))
        return super().try_pread(offset, view)

    async def pread(self, offset: int, view: memoryview) -> None:
        self._check(offset, len(view))
        await super().pread(offset, view)


@pytest.mark.parametrize("table", ["L2 table", "first refcount block", "second refcount block"])
def test_snapshot_change_that_cannot_read_a_table_is_refused_and_the_image_goes_on(tmp_path: Path, table: str) -> None:
    """Nor does it need the table to be taken back: counts of the first block have been raised by then."""
    disk = disk_with_a_snapshot(tmp_path / "image", "cluster_size=512")

    async def run() -> None:
        memory = MemoryFile(disk.path.read_bytes())
        file = BadSectors(memory)
        driver = await opened(file)
        assert driver.refcounts is not None
        start = {
            "L2 table": driver.mapping.l1.entries[0] & OFFSET_MASK,
            "first refcount block": driver.refcounts.table[0],
            "second refcount block": driver.refcounts.table[1],
        }[table]
        file.bad = range(start, start + 512)
        assert await outcome_of(create_two(driver), driver, errno.EIO) == "refused"
        file.bad = range(0)
        assert await outcome_of(create_two(driver), driver, errno.EIO) == "done"
        image = Image(driver, writable=True)
        await end_whole(image, disk, memory)

    asyncio.run(run())


def test_snapshot_change_behind_a_trim_whose_counts_cannot_be_read_is_refused_and_the_image_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a flush goes on, which leaves them for the next one."""
    monkeypatch.setattr(snapshots, "FIRST_BYTES", 512)
    disk = disk_with_a_snapshot(tmp_path / "image", "cluster_size=512")
    disk.write_qemu(3, 100_000, 100_000)

    async def run() -> None:
        memory = MemoryFile(disk.path.read_bytes())
        file = BadSectors(memory)
        image = Image(await opened(file), writable=True)
        driver = driver_of(image)
        assert driver.refcounts is not None
        (extent,) = await image.map(150_016, 512, 1)
        start = driver.refcounts.table[extent.file_offset // 512 // 256]
        file.bad = range(start, start + 512)
        await image.zero(150_016, 32 * KiB, may_unmap=True, is_fast_only=False)
        disk.active[150_016 : 150_016 + 32 * KiB] = bytes(32 * KiB)
        await image.flush()
        assert await outcome_of(create_two(driver), driver, errno.EIO) == "refused"
        await image.write(110_080, b"x" * 512)
        disk.active[110_080:110_592] = b"x" * 512
        await image.flush()
        file.bad = range(0)
        assert await outcome_of(create_two(driver), driver, errno.EIO) == "done"
        await end_whole(image, disk, memory)

    asyncio.run(run())


def test_snapshot_change_for_whose_mark_there_is_no_space_is_refused_and_the_image_goes_on(tmp_path: Path) -> None:
    disk = disk_with_a_snapshot(tmp_path / "image", "cluster_size=4k,lazy_refcounts=on")

    async def run() -> None:
        memory = MemoryFile(disk.path.read_bytes())
        file = FaultFile(memory)
        image = Image(await opened(file), writable=True)
        driver = driver_of(image)
        await disk.guest(image, random.Random("mark"), 8)
        file.fail("pwrite", errno.ENOSPC)
        assert await outcome_of(create_two(driver), driver, errno.ENOSPC) == "refused"
        file.heal()
        await disk.guest(image, random.Random("more"), 8)
        assert await outcome_of(create_two(driver), driver, errno.ENOSPC) == "done"
        await end_whole(image, disk, memory)

    asyncio.run(run())


def test_dirty_bit_for_which_there_was_no_space_is_written_before_refcounts_are_left_behind(tmp_path: Path) -> None:
    """With nothing that waits for a flush the bit is the first write of a change. It was not written."""
    disk = disk_with_a_snapshot(tmp_path / "image", "cluster_size=4k,lazy_refcounts=on")

    async def run() -> None:
        memory = MemoryFile(disk.path.read_bytes())
        file = FaultFile(memory)
        image = Image(await opened(file), writable=True)
        driver = driver_of(image)
        file.fail("pwrite", errno.ENOSPC)
        assert await outcome_of(create_two(driver), driver, errno.ENOSPC) == "refused"
        file.heal()
        assert not (await read_header(memory)).is_dirty
        await image.write(0, b"x" * 4096)
        disk.active[:4096] = b"x" * 4096
        await image.flush()
        assert (await read_header(memory)).is_dirty
        await end_whole(image, disk, memory)

    asyncio.run(run())


def test_snapshot_change_refused_for_space_at_any_write_leaves_no_dirty_bit_behind_an_orderly_end(
    tmp_path: Path,
) -> None:
    """With lazy refcounts, behind changes that wait for a flush: the bit is on disk before the counts are."""
    disk = disk_with_a_snapshot(tmp_path / "image", "cluster_size=4k,lazy_refcounts=on")
    content, start = disk.path.read_bytes(), bytes(disk.active)

    async def run(count: int) -> str:
        disk.active[:] = start
        memory = MemoryFile(content)
        file = FaultFile(memory)
        image = Image(await opened(file), writable=True)
        await disk.guest(image, random.Random("lazy"), 8)
        first = file.calls.count("pwrite")

        async def fail_at_its_turn(method: str) -> None:
            if method == "pwrite" and file.calls.count("pwrite") - first == count:
                file.fail_at(0, errno.ENOSPC)

        file.delay = fail_at_its_turn
        outcome = await outcome_of(create_two(driver_of(image)), driver_of(image), errno.ENOSPC)
        file.delay = None
        if outcome != "failed":
            await image.close()
            assert not (await read_header(memory)).is_dirty, (count, outcome)
        return outcome

    outcomes = [asyncio.run(run(0))]
    while outcomes[-1] != "done":
        outcomes.append(asyncio.run(run(len(outcomes))))
    assert outcomes.count("refused") > 5


def test_snapshot_change_whose_barrier_finds_no_space_fails_for_what_was_written_is_in_doubt(tmp_path: Path) -> None:
    disk = disk_with_a_snapshot(tmp_path / "image")

    async def run() -> None:
        file = FaultFile(MemoryFile(disk.path.read_bytes()))
        driver = await opened(file)

        async def fail_behind_the_mark(method: str) -> None:
            if method == "fdatasync" and file.calls.count("fdatasync") == 1:
                file.fail_at(0, errno.ENOSPC)

        file.delay = fail_behind_the_mark
        assert await outcome_of(create_two(driver), driver, errno.ENOSPC) == "failed"

    asyncio.run(run())


# Crashes

CRASH_SIZE = 192 * KiB


def scenario(tmp_path: Path, options: str) -> Scenario:
    """Every change of snapshots, among a guest's writes. `kept`: what each snapshot must read as, and the disk "before"
    one was applied.
    """
    kept: dict[str, bytes] = {}
    path = tmp_path / "crash"
    checked = itertools.count()

    def build(rng: random.Random) -> Built:
        disk = Disk.made(path, options, CRASH_SIZE if "0.10" in options else CRASH_SIZE * 2 // 3)
        disk.write_qemu(0x11, 0, 100 * KiB)
        disk.create_qemu("old")
        if len(disk.active) < CRASH_SIZE:
            disk.resize(CRASH_SIZE)
        disk.write_qemu(0x22, 60 * KiB, 100 * KiB)
        kept.clear()
        kept["old"] = disk.snapshots["old"]
        return Built([path.read_bytes()], bytes(disk.active))

    async def open_(files: Sequence[RecordingFile]) -> Target:
        return ExportTarget(await open_file(files[0], "qcow2", OpenOptions(DenyGate(), writable=True)))

    async def workload(client: Client, rng: random.Random) -> None:
        target = client.target
        assert isinstance(target, ExportTarget)
        driver = driver_of(target.image)
        model = bytearray(client.trace.guest)

        async def write(count: int) -> None:
            for _ in range(count):
                offset = rng.randrange(len(model) // 4096) * 4096
                data = client.pattern(offset, 4096)
                await client.write(offset, data)
                model[offset : offset + 4096] = data

        async def create() -> None:
            kept["new"] = bytes(model)
            await create_snapshot(driver, "new", now_ns=NOW_NS)

        async def apply() -> None:
            kept["before"] = bytes(model)
            model[:] = kept["old"]
            await apply_snapshot(driver, "old")

        async def delete() -> None:
            await delete_snapshot(driver, "old")

        await write(4)
        await client.step("create", create)
        await write(4)
        await client.flush()
        old = kept["old"]
        await client.step("apply", lambda: client.change(0, old, apply, is_durable=True, size=len(old)))
        await client.step("applied", lambda: write(4))
        await client.step("delete", delete)
        await write(3)

    async def check_state(state: CrashState) -> list[str]:
        file = MemoryFile(state.files[0])
        header = await read_header(file)
        problems = []
        if not header.is_dirty:
            report = await check(file, header)
            wrong = [each for each in report.findings if each.kind == "corruption"]
            flags_only = header.version < 3 and all("COPIED" in each.message for each in wrong)
            if report.check_errors or (report.corruptions and not flags_only):
                problems.append(f"{report.corruptions} corruptions: {wrong[:1]}")
            if next(checked) % 8 == 0:
                path.write_bytes(state.files[0])
                said = qemu_check(path)
                if said.exit_status not in ((0, 3) if header.version >= 3 else (0, 2, 3)):
                    problems.append(f"{said}")
        names = {each.name for each in await load_snapshots(file, header)}
        begun, done = state.expected.steps_begun, state.expected.steps_done
        if ("new" in names) < ("create" in done) or ("new" in names) > ("create" in begun):
            problems.append("the new snapshot is there or not, against what was said")
        if ("old" in names) < ("delete" not in begun) or ("old" in names) > ("delete" not in done):
            problems.append("the old snapshot is there or not, against what was said")
        for name in names:
            image = await open_file(file, "qcow2", OpenOptions(DenyGate(), snapshot=name))
            if await read_all(image) != kept[name]:
                problems.append(f"snapshot {name} has changed")
        if "apply" in begun and "applied" not in begun and not state.is_closed:
            image = await open_file(file, "qcow2", OpenOptions(DenyGate()))
            if await read_all(image) not in (kept["old"], kept["before"]):
                problems.append("the disk is neither what it was nor the snapshot")
        return problems

    return Scenario("snapshots", build, open_, workload, check_state)


CRASHED = {
    "version 2": "compat=0.10,cluster_size=4k",
    "version 3": "cluster_size=4k",
    "lazy": "cluster_size=4k,lazy_refcounts=on",
    "clusters of 512, 4 bits": "cluster_size=512,refcount_bits=4",
    "extended": "cluster_size=16k,extended_l2=on",
}


def crashed(tmp_path: Path, options: str, states: int = 120, **keywords: int | bool) -> Report:
    return run_now(scenario(tmp_path, options), seed=7, states=states, states_of_one=states, nested_cap=2, **keywords)


@pytest.mark.parametrize("kind", CRASHED)
def test_snapshot_changes_survive_a_crash_at_any_point(tmp_path: Path, kind: str) -> None:
    report = crashed(tmp_path, CRASHED[kind])
    assert not report.violation_count, f"{report}"


def test_snapshot_changes_without_barriers_do_not(tmp_path: Path) -> None:
    report = crashed(tmp_path, CRASHED["version 3"], states=100, without_barriers=True)
    assert report.violation_count > 10, f"{report}"
