"""One error at every file call of a workload: EIO, ENOSPC, and a write that did half and then failed.

After it the workload goes on. Whatever failed: a check finds at most leaks; every byte is one that was there before or
that was to be written, and what a flush has covered is what it was; the export works on, or says with ImageFailed that
it does not, and then an opening anew works. Bytes are compared in small pieces, for a write that failed may be torn.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbdimg.errors import ImageFailed
from nbdimg.formats.qcow2.check import check
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.formats.qcow2.mapping import Mapping
from nbdimg.formats.qcow2.open import read_header
from nbdimg.formats.qcow2.refcount import Refcounts
from nbdimg.image.image import Image
from nbdimg.storage.file import Buffer
from nbdimg.storage.memory import MemoryFile
from tests.support.faultfile import FaultFile, TornFile, os_error
from tests.support.interleave import open_template, run_in_memory
from tests.support.qcow2edit import qemu_check, qemu_img, qemu_io
from tests.support.reading import read_all

WORD = 128
"""Bytes that are judged as one: half of any write here is a multiple of it."""
SIZE = 256 << 10
QEMU_EVERY = 53
"""One injection of so many is looked at by qemu-img check as well."""


@dataclass(frozen=True, slots=True)
class Fault:
    number: int
    tears: bool = False


FAULTS = {"EIO": Fault(errno.EIO), "ENOSPC": Fault(errno.ENOSPC), "short write": Fault(errno.ENOSPC, tears=True)}


@dataclass(frozen=True, slots=True)
class Step:
    """`kind` is write, zero, keep, trim or flush."""

    kind: str
    offset: int = 0
    length: int = 0
    value: int = 0


@dataclass(frozen=True, slots=True)
class Workload:
    content: bytes
    base: bytes
    guest: bytes
    steps: tuple[Step, ...]


class Expected:
    """For each word of the disk, the values that it may have now, and those that it may have after a crash."""

    def __init__(self, guest: bytes) -> None:
        words = range(0, len(guest), WORD)
        self.now = [frozenset((guest[at : at + WORD],)) for at in words]
        self.durable = self.now.copy()

    def change(self, step: Step, *, is_sure: bool) -> None:
        written = frozenset((bytes([step.value]) * WORD,))
        for index in range(step.offset // WORD, (step.offset + step.length) // WORD):
            self.now[index] = written if is_sure else self.now[index] | written
            self.durable[index] |= written

    def flushed(self) -> None:
        self.durable = self.now.copy()

    def difference(self, found: bytes, allowed: list[frozenset[bytes]]) -> str | None:
        for index, values in enumerate(allowed):
            word = found[index * WORD : (index + 1) * WORD]
            if word not in values:
                return f"bytes at {index * WORD} are {word.hex()}, expected {sorted(each.hex() for each in values)}"
        return None


def _steps(seed: int, cluster: int, kinds: tuple[str, ...], count: int = 24) -> tuple[Step, ...]:
    generator = random.Random(seed)
    steps = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        if kind == "flush":
            steps.append(Step("flush"))
            continue
        start = generator.randrange(SIZE // cluster - 4) * cluster
        if kind == "write" and generator.random() < 0.6:
            start += cluster // 2 & ~7
        length = generator.choice((cluster, cluster // 2 & ~7, 2 * cluster))
        steps.append(Step(kind, start, length, 0 if kind != "write" else number + 100))
    return tuple(steps)


def _made(path: Path, options: str, *writes: str) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(SIZE))
    if writes:
        qemu_io(path, *writes)


def _fresh(path: Path) -> None:
    _made(path, "cluster_size=4k", "write -q -P 1 0 16k")


def _overlay(path: Path) -> None:
    base = path.parent / "base"
    base.write_bytes(bytes(n * 7 % 251 for n in range(200_000)))
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", "base", "-F", "raw", path, str(SIZE))
    qemu_io(path, "write -q -P 1 8k 8k")


def _trimmed(path: Path) -> None:
    _made(path, "cluster_size=4k", "write -q -P 1 0 256k")


def _snapshot(path: Path) -> None:
    _made(path, "cluster_size=4k", "write -q -P 1 0 200k")
    qemu_img("snapshot", "-c", "one", path)


def _tiny(path: Path) -> None:
    """A refcount block holds 64 counts, the refcount table 64 blocks: both grow."""
    _made(path, "cluster_size=512,refcount_bits=64", "write -q -P 1 0 30k")


def _lazy(path: Path) -> None:
    _made(path, "cluster_size=4k,lazy_refcounts=on", "write -q -P 1 0 16k")


CHANGES = ("write", "write", "flush", "write", "zero", "flush", "trim", "write", "flush", "keep", "write")
WORKLOADS: dict[str, tuple[Callable[[Path], None], tuple[Step, ...]]] = {
    "fresh": (_fresh, _steps(1, 4096, CHANGES)),
    "copy from backing": (_overlay, _steps(2, 4096, CHANGES)),
    "trim and reuse": (_trimmed, _steps(3, 4096, ("trim", "trim", "flush", "write", "zero", "write", "flush"))),
    "copy from snapshot": (_snapshot, _steps(4, 4096, CHANGES)),
    "growing refcounts": (
        _tiny,
        (*_steps(5, 512, ("write", "flush", "write", "trim")), Step("write", 65536, 32768, 9)),
    ),
    "lazy": (_lazy, _steps(6, 4096, CHANGES)),
}


@pytest.fixture(params=list(WORKLOADS))
def workload(request: pytest.FixtureRequest, tmp_path: Path) -> Workload:
    path = tmp_path / "disk"
    make, steps = WORKLOADS[request.param]
    make(path)
    raw = tmp_path / "raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
    base = tmp_path / "base"
    return Workload(path.read_bytes(), base.read_bytes() if base.exists() else b"", raw.read_bytes(), steps)


def _carry_out(image: Image, step: Step) -> Awaitable[None]:
    if step.kind == "write":
        return image.write(step.offset, bytes([step.value]) * step.length)
    if step.kind == "trim":
        return image.trim(step.offset, step.length)
    if step.kind == "flush":
        return image.flush()
    return image.zero(step.offset, step.length, may_unmap=step.kind == "zero", is_fast_only=False)


class Run:
    """One run of a workload with a fault at the call `at` (None: without)."""

    def __init__(self, workload: Workload, fault: Fault, at: int | None, *, slow_only: bool) -> None:
        self.workload = workload
        self.expected = Expected(workload.guest)
        self.memory = MemoryFile(workload.content)
        self.file = TornFile(self.memory, slow_only=slow_only)
        self.fault = fault
        self.at = at
        self.errors: list[BaseException] = []
        self.differences: list[str] = []
        self.has_failed = False

    async def run(self) -> None:
        image = await open_template(self.file, {"base": MemoryFile(self.workload.base)})
        calls = len(self.file.calls)
        self.file.tears = self.fault.tears
        if self.at is not None:
            self.file.fail_at(self.at, self.fault.number)
        for step in self.workload.steps:
            await self._step(image, step)
        self.call_count = len(self.file.calls) - calls
        self.file.heal()
        await self._step(image, Step("write", 20480, 8192, 251))
        await self._step(image, Step("flush"))
        self.has_failed = image.gate.failure is not None
        self._compare(await read_all(image), self.expected.now, "reading on")
        if self.has_failed:
            with pytest.raises(ImageFailed):
                await image.write(0, b"x")
            await image.driver.abandon()
        else:
            await image.close()
        await self._look_after()

    async def _step(self, image: Image, step: Step) -> None:
        try:
            if step.kind == "write" and image.try_write(step.offset, memoryview(bytes([step.value]) * step.length)):
                pass
            else:
                await _carry_out(image, step)
        except (OSError, ImageFailed) as error:
            self.errors.append(error)
            self.expected.change(step, is_sure=False)
            return
        if step.kind == "flush":
            self.expected.flushed()
        elif step.kind == "trim":
            self.expected.change(step, is_sure=False)
        else:
            self.expected.change(step, is_sure=True)

    def _compare(self, found: bytes, allowed: list[frozenset[bytes]], when: str) -> None:
        difference = self.expected.difference(found, allowed)
        if difference is not None:
            self.differences.append(f"{when}: {difference}")

    async def _look_after(self) -> None:
        """What lies in the file now, and that it can be opened and changed."""
        content = bytes(self.memory.content)
        header = await read_header(MemoryFile(content))
        report = await check(MemoryFile(content), header)
        vouched = header.is_dirty and self.has_failed
        if (report.corruptions or report.check_errors) and not vouched:
            self.differences.append(f"check: {report.findings[:3]}")
        if report.leaks and not self.has_failed:
            self.differences.append(f"closed in order with {report.leaks} leaks")
        file = MemoryFile(content)
        image = await open_template(file, {"base": MemoryFile(self.workload.base)})
        self._compare(await read_all(image), self.expected.durable, "opened anew")
        await image.write(40960, b"\xfc" * 4096)
        await image.close()
        after = await check(file, await read_header(file))
        if after.corruptions or after.check_errors:
            self.differences.append(f"check after opening anew: {after.findings[:3]}")
        self.left = content


def inject(workload: Workload, fault: Fault, at: int | None, *, slow_only: bool) -> Run:
    run = Run(workload, fault, at, slow_only=slow_only)
    run_in_memory(run.run())
    return run


def call_count(workload: Workload, *, slow_only: bool) -> int:
    run = inject(workload, FAULTS["EIO"], None, slow_only=slow_only)
    assert run.errors == []
    assert run.differences == []
    return run.call_count


@pytest.mark.parametrize("slow_only", [True, False], ids=["waiting calls", "both kinds of calls"])
def test_error_at_every_file_call_leaves_leaks_at_most(workload: Workload, slow_only: bool, tmp_path: Path) -> None:
    count = call_count(workload, slow_only=slow_only)
    assert count > 20
    seen = set[int]()
    for name, fault in FAULTS.items():
        for at in range(count):
            run = inject(workload, fault, at, slow_only=slow_only)
            assert run.differences == [], f"{name} at call {at} of {count} ({run.file.calls[-1]}), {run.errors}"
            seen.update(each.errno for each in run.errors if isinstance(each, OSError) and each.errno is not None)
            if at % QEMU_EVERY == 0 and not run.has_failed:
                path = tmp_path / "left"
                path.write_bytes(run.left)
                assert qemu_check(path).exit_status == 0, f"{name} at call {at}"
    assert {errno.EIO, errno.ENOSPC} <= seen


def test_number_of_injections_is_what_the_figures_say(tmp_path: Path) -> None:
    total = 0
    for number, (make, steps) in enumerate(WORKLOADS.values()):
        directory = tmp_path / str(number)
        directory.mkdir()
        path = directory / "disk"
        make(path)
        raw = directory / "raw"
        qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
        base = directory / "base"
        made = Workload(path.read_bytes(), base.read_bytes() if base.exists() else b"", raw.read_bytes(), steps)
        total += len(FAULTS) * sum(call_count(made, slow_only=slow_only) for slow_only in (True, False))
    assert total >= 1500


# Controls: the harness sees what it is there for


def _first_difference(workload: Workload) -> str | None:
    for fault in FAULTS.values():
        for at in range(30):
            found = inject(workload, fault, at, slow_only=True).differences
            if found:
                return found[0]
    return None


@pytest.mark.parametrize("workload", ["copy from backing"], indirect=True)
def test_control_failed_writes_that_become_visible_are_caught(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mapping, "release", Mapping.commit)
    assert "bytes at" in str(_first_difference(workload))


@pytest.mark.parametrize("workload", ["fresh"], indirect=True)
def test_control_failed_writes_that_keep_their_clusters_are_caught(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Refcounts, "give_back", lambda self, run: None)
    assert "leaks" in str(_first_difference(workload))


# A disk that stays full


class FullFile(FaultFile):
    """Writes that would make the file longer than `capacity` fail for want of space."""

    capacity = 1 << 60

    async def pwrite(self, offset: int, data: Buffer) -> None:
        if offset + len(data) > self.capacity:
            raise os_error(errno.ENOSPC)
        await super().pwrite(offset, data)


async def _is_refused(work: Awaitable[None]) -> bool:
    """Whether it failed for want of space; it fails for nothing else."""
    try:
        await work
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return True
    return False


@pytest.mark.parametrize("workload", ["fresh", "copy from snapshot", "growing refcounts", "lazy"], indirect=True)
def test_full_disk_takes_overwrites_and_flushes_and_recovers(workload: Workload, tmp_path: Path) -> None:
    """Metadata that has no place yet waits: no flush poisons the image."""

    async def main() -> bytes:
        memory = MemoryFile(workload.content)
        file = FullFile(memory, slow_only=True)
        image = await open_template(file, {})
        await image.write(0, b"\x21" * 8192)
        await image.flush()
        file.capacity = memory.size
        refused = 0
        for number in range(40):
            refused += await _is_refused(image.write(60_000 + number * 4096, b"\x22" * 700))
            await image.write(number * 64, bytes([number]) * 64)
            await _is_refused(image.flush())
            assert image.gate.failure is None
        assert refused
        file.capacity = 1 << 60
        await image.flush()
        await image.write(60_000, b"\x23" * 4096)
        found = await read_all(image)
        assert found[: 40 * 64] == b"".join(bytes([number]) * 64 for number in range(40))
        assert found[60_000 : 60_000 + 4096] == b"\x23" * 4096
        await image.close()
        return bytes(memory.content)

    path = tmp_path / "left"
    path.write_bytes(run_in_memory(main()))
    report = qemu_check(path)
    assert (report.exit_status, report.leaks, report.corruptions) == (0, 0, 0)


@pytest.mark.parametrize("workload", ["fresh"], indirect=True)
def test_barrier_that_fails_ends_the_image_with_a_sentence(workload: Workload) -> None:
    async def main() -> None:
        file = FaultFile(MemoryFile(workload.content))
        image = await open_template(file, {})
        await image.write(0, b"x" * 512)
        file.fail("fdatasync", errno.EIO)
        with pytest.raises(ImageFailed, match="what was written since the last one may be lost; open it anew"):
            await image.flush()
        file.heal()
        with pytest.raises(ImageFailed):
            await image.write(0, b"y" * 512)
        with pytest.raises(ImageFailed):
            await image.close()

    asyncio.run(main())


@pytest.mark.parametrize("workload", ["lazy"], indirect=True)
def test_lazy_image_whose_dirty_mark_had_no_space_is_marked_by_the_next_flush(workload: Workload) -> None:
    """Refcounts may stay behind only once the image says so on disk."""

    async def main() -> bytes:
        memory = MemoryFile(workload.content)
        file = FaultFile(memory, slow_only=True)
        image = await open_template(file, {})
        assert isinstance(image.driver, Qcow2Driver)
        await image.write(100_000, b"x" * 512)
        file.fail("pwrite", errno.ENOSPC)
        with pytest.raises(OSError, match="No space"):
            await image.flush()
        file.heal()
        await image.flush()
        return bytes(memory.content)

    content = run_in_memory(main())
    assert content[79] == 1, "incompatible feature bit 0 (header offset 72)"
