"""Random changes of VHDX images against a byte model, with other programs as the judges of what is left on disk.

Each case runs two rounds of changes with an orderly end behind each. After each round qemu-img finds nothing wrong
with a file without a parent, and 7-Zip reads the model's bytes through whatever chain there is; nbdimg opens the file
again. Between the rounds QEMU writes to files that it can write to.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nbdimg.formats import open_image
from nbdimg.formats.vhdx.bat import Bat
from nbdimg.formats.vhdx.space import Space
from nbdimg.image.image import Image
from tests.formats.vhdx.craft import M
from tests.formats.vhdx.test_bat import bytes_of
from tests.support.vhdximages import Builder, dynamic, fixed, flattened, judge, run

STEPS = 60
SIZE = 5 * M
LENGTHS = (1, 512, 4096, 65536, 300_000, M, 2 * M)


@dataclass
class Case:
    """The image `disk.vhdx` in a directory, and what it should hold."""

    directory: Path
    seed: int
    make: Callable[[Case], None]
    sector_size: int = 512
    model: bytearray = field(default_factory=lambda: bytearray(SIZE))
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = random.Random(self.seed)
        self.path = self.directory / "disk.vhdx"
        self.parent = self.directory / "parent.vhdx"
        self.make(self)

    def sample(self, size: int) -> bytes:
        """Random, constant and empty runs, of 64 KiB each."""
        generator, parts = self.generator, []
        for _ in range(0, size, 65536):
            kind = generator.random()
            filler = bytes([generator.randrange(256)]) * 65536
            parts.append(bytes(65536) if kind < 0.4 else generator.randbytes(65536) if kind < 0.6 else filler)
        return b"".join(parts)[:size]

    def fail(self, what: str) -> str:
        return f"{what}; seed {self.seed}; last steps: {self.log[-6:]}"

    def range(self) -> tuple[int, int]:
        generator = self.generator
        offset = generator.randrange(SIZE)
        if generator.random() < 0.4:
            offset = generator.randrange(SIZE // M) * M
        length = min(generator.choice(LENGTHS), SIZE - offset)
        if generator.random() < 0.5:
            offset &= ~511
            length = min((length + 511) & ~511, SIZE - offset)
        return offset, length

    async def round(self) -> None:
        image = await open_image(self.path, format="vhdx")
        for _ in range(STEPS):
            await self.step(image, *self.range())
        is_same = await bytes_of(image, 0, SIZE) == self.model
        assert is_same, self.fail("before closing")
        await image.close()
        again = await open_image(self.path, format="vhdx", writable=False)
        is_same = await bytes_of(again, 0, SIZE) == self.model
        assert is_same, self.fail("opened again")
        await again.close()

    async def step(self, image: Image, offset: int, length: int) -> None:
        generator, model = self.generator, self.model
        kind = generator.choices(("write", "zero", "trim", "read", "flush"), (10, 3, 3, 2, 3))[0]
        self.log.append(f"{kind} {offset}+{length}")
        if kind == "write":
            data = generator.randbytes(length)
            is_fast = generator.random() < 0.7
            if not (is_fast and image.try_write(offset, memoryview(data))):
                await image.write(offset, data)
            model[offset : offset + length] = data
        elif kind == "zero":
            await image.zero(offset, length, may_unmap=generator.random() < 0.6, is_fast_only=False)
            model[offset : offset + length] = bytes(length)
        elif kind == "trim":
            await image.trim(offset, length)
            self.trimmed(offset, await bytes_of(image, offset, length))
        elif kind == "flush":
            await image.flush()
        is_same = await bytes_of(image, offset, length) == model[offset : offset + length]
        assert is_same, self.fail("read")

    def trimmed(self, offset: int, found: bytes) -> None:
        """Each 512 bytes are as they were, or zeroes where they changed; whole blocks are zeroes, but in a fixed file
        that cannot punch.
        """
        for start in range(0, len(found), 512):
            old, new = (
                self.model[offset + start : offset + start + 512][: len(found) - start],
                found[start : start + 512],
            )
            is_kept = old == new or all(after in (before, 0) for before, after in zip(old, new, strict=True))
            assert is_kept, self.fail(f"trim changed {offset + start}")
        self.model[offset : offset + len(found)] = found

    def judge(self) -> None:
        if self.sector_size == 512 and not self.parent.exists():
            judge(self.path, bytes(self.model))
        is_same = flattened(self.path) == self.model
        assert is_same, self.fail("7-Zip reads something else")

    def change_with_qemu(self) -> None:
        if self.sector_size != 512 or self.parent.exists():
            return
        commands = []
        for number in range(1, 4):
            offset = self.generator.randrange(0, SIZE - 9000, 512)
            commands += ["-c", f"write -q -P {number} {offset} 8192"]
            self.model[offset : offset + 8192] = bytes([number]) * 8192
        run("qemu-io", "-f", "vhdx", *commands, self.path)

    def run(self) -> None:
        before = self.parent.read_bytes() if self.parent.exists() else b""
        for _ in range(2):
            asyncio.run(self.round())
            self.judge()
            self.change_with_qemu()
        assert not before or self.parent.read_bytes() == before, "the parent was written"


def _dynamic(case: Case) -> None:
    case.model[:] = case.sample(2 * M) + bytes(3 * M)
    case.path.write_bytes(dynamic(bytes(case.model), sector_size=case.sector_size))


def _fixed(case: Case) -> None:
    case.model[:] = case.sample(SIZE)
    case.path.write_bytes(fixed(bytes(case.model), sector_size=case.sector_size))


def _by_qemu(options: str) -> Callable[[Case], None]:
    def make(case: Case) -> None:
        run("qemu-img", "create", "-q", "-f", "vhdx", "-o", options, case.path, str(SIZE))

    return make


def _child(parent_size: int, block_size: int = M) -> Callable[[Case], None]:
    """Block 1 has sectors of its own, of the parent's."""

    def make(case: Case) -> None:
        below = case.sample(parent_size)
        case.model[: min(parent_size, SIZE)] = below[:SIZE]
        case.parent.write_bytes(dynamic(below, block_size=2 * M, sector_size=case.sector_size))
        child = Builder(SIZE, block_size, case.sector_size, parent=".\\parent.vhdx")
        if block_size == M:
            own = case.generator.randbytes(M)
            runs = ((0, 8), (16, 17), (100, 200))
            child.add_partial(1, own, runs)
            for first, stop in runs:
                start, end = first * case.sector_size, stop * case.sector_size
                case.model[M + start : M + end] = own[start:end]
        case.path.write_bytes(child.content)

    return make


KINDS: dict[str, tuple[Callable[[Case], None], int]] = {
    "dynamic": (_dynamic, 512),
    "dynamic, 4096-byte sectors": (_dynamic, 4096),
    "dynamic by QEMU": (_by_qemu("block_size=1M,block_state_zero=off"), 512),
    "dynamic by QEMU, zero": (_by_qemu("block_size=2M,block_state_zero=on"), 512),
    "fixed": (_fixed, 512),
    "fixed, 4096-byte sectors": (_fixed, 4096),
    "fixed by QEMU": (_by_qemu("subformat=fixed,block_size=1M,block_state_zero=off"), 512),
    "child": (_child(SIZE), 512),
    "child of a longer parent": (_child(7 * M), 512),
    "child of larger blocks": (_child(SIZE, 4 * M), 512),
    "child, 4096-byte sectors": (_child(SIZE), 4096),
}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_random_changes_leave_what_the_model_holds(tmp_path: Path, kind: str, seed: int) -> None:
    make, sector_size = KINDS[kind]
    Case(tmp_path, seed, make, sector_size).run()


def test_random_changes_of_a_child_longer_than_its_parent_leave_what_the_model_holds(tmp_path: Path) -> None:
    """7-Zip does not read behind the end of a parent."""
    case = Case(tmp_path, 3, _child(2 * M + 65536))
    for _ in range(2):
        asyncio.run(case.round())


# Controls


def test_control_a_byte_that_differs_is_caught(tmp_path: Path) -> None:
    case = Case(tmp_path, 4, _dynamic)
    asyncio.run(case.round())
    case.judge()
    case.model[SIZE // 2] ^= 1
    with pytest.raises(AssertionError, match="compare"):
        case.judge()
    child = Case(tmp_path, 4, _child(SIZE))
    asyncio.run(child.round())
    child.judge()
    child.model[SIZE // 2] ^= 1
    with pytest.raises(AssertionError, match="7-Zip"):
        child.judge()


def test_control_bits_that_are_not_set_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, 5, _child(SIZE))
    monkeypatch.setattr(Bat, "_set_sectors", lambda *arguments: None)
    with pytest.raises(AssertionError, match="seed 5"):
        case.run()


def test_control_space_that_is_not_punched_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def reclaim(self: Space) -> None:
        self._free += self._leaving
        self._leaving = []

    monkeypatch.setattr(Space, "reclaim", reclaim)
    caught = 0
    for seed in range(6, 14):
        directory = tmp_path / f"{seed}"
        directory.mkdir()
        try:
            asyncio.run(Case(directory, seed, _dynamic).round())
        except AssertionError:
            caught += 1
    assert caught
