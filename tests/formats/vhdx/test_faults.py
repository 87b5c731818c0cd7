"""One error at every file call of a workload: EIO, ENOSPC, and a write that did half and then failed.

After it the workload goes on. Whatever failed: every sector holds what was there before or what was to be written, and
what a flush has covered is what it was; the image works on, or says with ImageFailed that it does not; and an opening
anew works, for reading and for writing, with the same bytes.
"""

from __future__ import annotations

import asyncio
import errno
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbdimg.errors import ImageFailed
from nbdimg.formats import open_file
from nbdimg.formats.options import OpenOptions
from nbdimg.formats.vhdx.driver import VhdxDriver
from nbdimg.image.image import Image
from nbdimg.storage.file import BlockFile, Buffer
from nbdimg.storage.memory import MemoryFile
from nbdimg.storage.ordering import Plan
from tests.formats.vhdx.craft import M
from tests.formats.vhdx.test_bat import OneGate
from tests.support.faultfile import TornFile, os_error
from tests.support.reading import bytes_of
from tests.support.vhdximages import BAT_OFFSET, IS_FIXED, Builder

SECTOR = 512
SIZE = 2 * M + 65536
EVERY = 3
"""Of a workload's calls, one in so many fails; which ones is another matter for each kind of fault."""
QEMU_EVERY = 40
PARENT = bytes(n * 7 % 251 for n in range(251)) * (SIZE // 251 + 1)


class PausedFile(TornFile):
    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is called meanwhile neither fails nor counts."""
        calls, fail_at = list(self.calls), self._fail_at
        self._fail_at = None
        yield
        self.calls, self._fail_at = calls, fail_at


FAULTS = {"EIO": (errno.EIO, False), "ENOSPC": (errno.ENOSPC, False), "short write": (errno.ENOSPC, True)}

Step = tuple[str, int, int]
"""write, zero, keep, trim or flush; offset and length, in sectors."""

BLOCK = M // SECTOR
STEPS: tuple[Step, ...] = (
    ("write", 3, 4),
    ("write", BLOCK - 2, 5),
    ("flush", 0, 0),
    ("trim", 0, BLOCK),
    ("write", 2 * BLOCK, 128),
    ("flush", 0, 0),
    ("write", 9, 2),
    ("zero", BLOCK, BLOCK),
    ("write", BLOCK + 64, 64),
    ("keep", 2 * BLOCK + 8, 16),
    ("flush", 0, 0),
    ("write", 0, BLOCK),
    ("zero", 2 * BLOCK, 128),
    ("write", 2 * BLOCK + 1, 3),
    ("trim", BLOCK + 64, 32),
    ("flush", 0, 0),
    ("write", BLOCK + 500, 1),
)


def _dynamic() -> Builder:
    builder = Builder(SIZE)
    builder.add_guest(PARENT[:M] + bytes(SIZE - M))
    return builder


def _fixed() -> Builder:
    builder = Builder(SIZE, flags=IS_FIXED)
    builder.add_guest(PARENT[:SIZE])
    return builder


def _child() -> Builder:
    builder = Builder(SIZE, parent=".\\parent.vhdx")
    builder.add_partial(1, b"\x77" * M, ((0, 8), (70, 80)))
    return builder


KINDS: dict[str, Callable[[], Builder]] = {"dynamic": _dynamic, "fixed": _fixed, "child": _child}


def parent() -> bytes:
    below = Builder(SIZE)
    below.add_guest(PARENT[:SIZE])
    return bytes(below.content)


BELOW = parent()


async def opened(file: BlockFile, *, writable: bool = True) -> Image:
    image = await open_file(file, "vhdx", OpenOptions(OneGate(BELOW), writable=writable))
    if writable:
        driver = image.driver
        assert isinstance(driver, VhdxDriver)
        assert driver._space is not None
        driver._space._growth = M
    return image


class Expected:
    """For each sector the values that it may have, and those that it may have once the session was lost."""

    def __init__(self, guest: bytes) -> None:
        self.now = [frozenset((guest[at : at + SECTOR],)) for at in range(0, len(guest), SECTOR)]
        self.durable = self.now.copy()

    def change(self, first: int, count: int, value: bytes, *, is_sure: bool) -> None:
        written = frozenset((value,))
        for index in range(first, first + count):
            self.now[index] = written if is_sure else self.now[index] | written
            self.durable[index] |= written

    def flushed(self) -> None:
        self.durable = self.now.copy()

    def difference(self, found: bytes, allowed: list[frozenset[bytes]], *, may_tear: range) -> str | None:
        for index, values in enumerate(allowed):
            sector = found[index * SECTOR : (index + 1) * SECTOR]
            if sector not in values and index not in may_tear:
                return f"sector {index} is {sector[:8].hex()}, expected {sorted(each[:8].hex() for each in values)}"
        return None


@dataclass
class Run:
    """One injection. `image` works on or `has_failed`."""

    file: PausedFile
    expected: Expected
    errors: int = 0
    has_failed: bool = False
    may_tear: range = range(0)

    async def step(self, image: Image, number: int, step: Step) -> None:
        kind, first, count = step
        value = bytes([number + 1]) * SECTOR if kind == "write" else bytes(SECTOR)
        is_done = False
        try:
            await self._act(image, kind, first * SECTOR, value * count)
            is_done = True
        except ImageFailed:
            self.errors += 1
            self.has_failed = True
        except OSError:
            self.errors += 1
            if kind == "write":
                self.may_tear = range(first, first + count)
        if kind == "flush":
            if is_done:
                self.expected.flushed()
        elif kind == "trim" and is_done:
            self.expected.change(first, count, value, is_sure=False)
        else:
            self.expected.change(first, count, value, is_sure=is_done)

    async def _act(self, image: Image, kind: str, offset: int, data: bytes) -> None:
        match kind:
            case "write":
                view = memoryview(data)
                if not image.try_write(offset, view):
                    await image.write(offset, view)
            case "flush":
                await image.flush()
            case "trim":
                await image.trim(offset, len(data))
            case _:
                await image.zero(offset, len(data), may_unmap=kind == "zero", is_fast_only=False)


async def guest_of(kind: str) -> bytes:
    return await bytes_of(await opened(MemoryFile(KINDS[kind]().content, writable=False), writable=False), 0, SIZE)


async def injected(kind: str, index: int, number: int, *, tears: bool, slow_only: bool) -> tuple[list[str], bytes, int]:
    """(what is wrong, the file that is left, file calls). `index` is past the last call: nothing fails."""
    file = PausedFile(MemoryFile(KINDS[kind]().content, "disk.vhdx"), slow_only=slow_only)
    image = await opened(file)
    file.tears = tears
    run = Run(file, Expected(await guest_of(kind)))
    file.fail_at(index, number)
    start = len(file.calls)
    for position, step in enumerate(STEPS):
        await run.step(image, position, step)
    found: list[str] = []
    if not run.has_failed:
        with file.paused():
            seen = await bytes_of(image, 0, SIZE)
        found.append(run.expected.difference(seen, run.expected.now, may_tear=run.may_tear) or "")
    try:
        await image.close()
    except (OSError, ImageFailed):
        run.errors += 1
        run.has_failed = True
    calls = len(file.calls) - start
    if index < calls and not run.errors and file.calls[start + index] != "punch":
        found.append("an error was swallowed")
    content = bytes(file.inner.content)  # type: ignore[attr-defined]
    allowed = run.expected.durable if run.has_failed else run.expected.now
    reading = MemoryFile(content, writable=False)
    after = await bytes_of(await opened(reading, writable=False), 0, SIZE)
    found.append(run.expected.difference(after, allowed, may_tear=run.may_tear) or "")
    again = MemoryFile(content)
    image = await opened(again)
    if await bytes_of(image, 0, SIZE) != after:
        found.append("opened for writing it reads otherwise")
    await image.write(M + 1024, b"again")
    await image.close()
    return [each for each in found if each], bytes(again.content), calls


def judged(path: Path, content: bytes) -> str | None:
    path.write_bytes(content)
    done = subprocess.run(["qemu-img", "check", "-q", str(path)], capture_output=True, text=True)
    return None if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize(
    ("fault", "slow_only"), [("EIO", True), ("ENOSPC", False), ("ENOSPC", True), ("short write", False)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_error_at_every_call_loses_nothing_that_was_flushed(
    tmp_path: Path, kind: str, fault: str, slow_only: bool
) -> None:
    number, tears = FAULTS[fault]

    async def main() -> list[str]:
        found, _, calls = await injected(kind, 1 << 30, number, tears=tears, slow_only=slow_only)
        assert not found
        assert calls >= 30
        for index in range(list(FAULTS).index(fault) % EVERY, calls, EVERY):
            wrong, content, _ = await injected(kind, index, number, tears=tears, slow_only=slow_only)
            if kind != "child" and index % QEMU_EVERY < EVERY:
                wrong += filter(None, [judged(tmp_path / "disk.vhdx", content)])
            found += [f"{fault} at call {index}: {each}" for each in wrong]
        return found

    assert asyncio.run(main()) == []


def test_metadata_that_finds_no_space_fails_that_flush_and_the_next_one_tries_again() -> None:
    async def main() -> None:
        file = TornFile(MemoryFile(Builder(SIZE).content))
        image = await opened(file)
        await image.write(0, b"x" * 4096)
        file.fail("pwrite", errno.ENOSPC)
        with pytest.raises(OSError, match="No space left"):
            await image.flush()
        file.heal()
        await image.flush()
        await image.close()
        assert isinstance(file.inner, MemoryFile)
        again = await opened(MemoryFile(file.inner.content, writable=False), writable=False)
        assert await bytes_of(again, 0, 4096) == b"x" * 4096

    asyncio.run(main())


def test_write_without_space_over_sectors_that_a_block_has_and_has_not_leaves_what_it_had() -> None:
    """One that takes the rest of a hole and the first bytes of a sector behind it."""

    async def main() -> None:
        file = TornFile(MemoryFile(_child().content, "disk.vhdx"))
        image = await opened(file)
        await image.write(0, b"x" * 512)
        file.fail("pwrite", errno.ENOSPC)
        with pytest.raises(OSError, match="No space left"):
            await image.write(M + 69 * SECTOR, b"y" * (SECTOR + 100))
        file.heal()
        assert await bytes_of(image, M + 70 * SECTOR + 100, 10 * SECTOR - 100) == b"\x77" * (10 * SECTOR - 100)

    asyncio.run(main())


class PowerLossError(Exception):
    pass


class FailingFile(MemoryFile):
    """Writes at `full` find no space; of one in `cut` the first half is written, and then there is no power."""

    full: int | None = None
    cut = range(0)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        if offset == self.full:
            raise os_error(errno.ENOSPC)
        if offset in self.cut:
            self.try_pwrite(offset, memoryview(data)[: len(data) // 2])
            raise PowerLossError
        await super().pwrite(offset, data)


def test_crash_in_the_flush_behind_one_that_found_no_space_in_place_leaves_every_block_readable() -> None:
    """V6: of that one a block is in place, and the entry of its sector bitmap, in another page, is not."""

    async def main() -> None:
        file = FailingFile(Builder(SIZE, parent=".\\parent.vhdx").content, "disk.vhdx")
        image = await opened(file)
        await image.write(4096, b"a" * 512)
        file.full = BAT_OFFSET + 8 * 4096
        with pytest.raises(OSError, match="No space"):
            await image.flush()
        file.full = None
        await image.write(M, b"b" * 512)
        file.cut = range(M, 2 * M)
        with pytest.raises(PowerLossError):
            await image.flush()
        again = await opened(MemoryFile(file.content, "disk.vhdx"))
        assert await bytes_of(again, 4096, 512) == b"a" * 512

    asyncio.run(main())


def test_control_a_plan_that_is_not_run_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = VhdxDriver.flush_plan

    def without_log(self: VhdxDriver) -> Plan:
        return Plan(real(self).stages[:1])

    monkeypatch.setattr(VhdxDriver, "flush_plan", without_log)
    found, _, _ = asyncio.run(injected("dynamic", 1 << 30, errno.EIO, tears=False, slow_only=False))
    assert found


def test_control_errors_are_injected() -> None:
    async def main() -> None:
        file = TornFile(MemoryFile(Builder(SIZE).content))
        image = await opened(file)
        file.fail_at(0, errno.EIO)
        with pytest.raises(OSError, match=str(os_error(errno.EIO).strerror)):
            await image.write(0, b"x")

    asyncio.run(main())
