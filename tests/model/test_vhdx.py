"""Random changes of VHDX images against a byte model, with other programs as the judges of what is left on disk.

Each case runs two rounds of changes with an orderly end behind each. After each round qemu-img finds nothing wrong
with a file without a parent, and 7-Zip reads the model's bytes through whatever chain there is; nbdimg opens the file
again. Between the rounds QEMU writes to files that it can write to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdimg.formats import open_image
from nbdimg.formats.vhdx.bat import Bat
from nbdimg.formats.vhdx.space import Space
from tests.formats.vhdx.craft import M
from tests.model.disk import Disk
from tests.support.vhdximages import Builder, dynamic, fixed, flattened, judge, run

STEPS = 60
SIZE = 5 * M
LENGTHS = (1, 512, 4096, 65536, 300_000, M, 2 * M)


class Case(Disk):
    def __init__(self, directory: Path, seed: int, make: Callable[[Case], None], sector_size: int = 512) -> None:
        super().__init__(directory, seed, bytearray(SIZE), LENGTHS, (10, 3, 3, 2, 3))
        self.sector_size = sector_size
        self.path = directory / "disk.vhdx"
        self.parent = directory / "parent.vhdx"
        make(self)

    async def round(self) -> None:
        image = await open_image(self.path, format="vhdx")
        for _ in range(STEPS):
            await self.step(image, *self.range(M))
        await self.check(image, 0, SIZE, "before closing")
        await image.close()
        again = await open_image(self.path, format="vhdx", writable=False)
        await self.check(again, 0, SIZE, "opened again")
        await again.close()

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
    case.model[:] = case.sample(2 * M, 65536) + bytes(3 * M)
    case.path.write_bytes(dynamic(bytes(case.model), sector_size=case.sector_size))


def _fixed(case: Case) -> None:
    case.model[:] = case.sample(SIZE, 65536)
    case.path.write_bytes(fixed(bytes(case.model), sector_size=case.sector_size))


def _by_qemu(options: str) -> Callable[[Case], None]:
    def make(case: Case) -> None:
        run("qemu-img", "create", "-q", "-f", "vhdx", "-o", options, case.path, str(SIZE))

    return make


def _child(parent_size: int, block_size: int = M) -> Callable[[Case], None]:
    """Block 1 has sectors of its own, of the parent's."""

    def make(case: Case) -> None:
        below = case.sample(parent_size, 65536)
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
