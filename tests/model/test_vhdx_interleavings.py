"""Concurrent requests on VHDX images, in hundreds of seeded orders of their file calls (`tests.support.interleave`).

What a schedule leaves must read as the model says, and for a part of the seeds qemu-img and 7-Zip must read it too.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdimg.export.inflight import InFlight
from nbdimg.formats import open_file
from nbdimg.formats.options import OpenOptions
from nbdimg.formats.vhdx.bat import Bat
from nbdimg.formats.vhdx.driver import VhdxDriver
from nbdimg.image.image import Image
from nbdimg.storage.file import BlockFile
from nbdimg.storage.memory import MemoryFile
from tests.crash.images import pattern
from tests.support.interleave import MemoryGate, Mix, NeverConflicting, Schedule, Template, run_in_memory
from tests.support.reading import read_all
from tests.support.vhdximages import IS_FIXED, UNMAPPED, Builder, dynamic, flattened, judge

M = 1 << 20
SIZE = 2 * M
SEEDS_PER_KIND = 50
PEER_EVERY = 25


def _child(sector_size: int) -> Template:
    """The first block has sectors of its own; the parent is as large."""
    below = pattern(SIZE, gap=4)
    builder = Builder(SIZE, sector_size=sector_size, parent=".\\parent.vhdx")
    guest = bytearray(below)
    builder.add_partial(0, b"\x77" * M, ((0, 2), (9, 40)))
    for first, stop in ((0, 2), (9, 40)):
        guest[first * sector_size : stop * sector_size] = b"\x77" * ((stop - first) * sector_size)
    parent = dynamic(below, sector_size=sector_size)
    return Template("child", bytes(builder.content), {"parent.vhdx": parent}, bytes(guest), {}, M)


def _plain(flags: int) -> Template:
    guest = pattern(M) + bytes(SIZE - M)
    builder = Builder(SIZE, flags=flags)
    builder.add_guest(guest, all_blocks=bool(flags))
    if not flags:
        builder.set_block(1, UNMAPPED)
    return Template("plain", bytes(builder.content), {}, guest, {}, 4096)


KINDS = {"dynamic": _plain(0), "fixed": _plain(IS_FIXED), "child": _child(512), "child, 4K": _child(4096)}


async def opened(file: BlockFile, files: dict[str, BlockFile], *, writable: bool) -> Image:
    return await open_file(file, "vhdx", OpenOptions(MemoryGate(files), writable=writable))


class VhdxSchedule(Schedule):
    async def _open(self) -> Image:
        """An answer may take two pages of the table at once: with fewer in memory a request would never end."""
        image = await opened(self.file, dict(self.files), writable=True)
        driver = image.driver
        assert isinstance(driver, VhdxDriver)
        assert driver._space is not None
        driver._space._growth = M
        driver.bat.pages._slices_max = self.mix.slices
        driver.bat.bitmaps._slices_max = self.mix.slices
        return image

    def _range(self) -> tuple[int, int]:
        """Around the edges of blocks, and of runs of sectors; whole blocks at times."""
        unit, generator = self.model.unit, self.generator
        if generator.random() < 0.15:
            return generator.choice(((0, M), (M, M), (0, SIZE)))
        start = generator.choice((0, M)) + generator.choice((-2048, -512, 0, 0, 512, 4096, 4608))
        start = min(max(0, start + generator.randrange(4) * unit), SIZE - 16384)
        return start, generator.choice((unit, 512, 1024, 4096, 16384))


async def _look_after(schedule: Schedule, directory: Path, *, asks_peers: bool) -> list[str]:
    content, model = bytes(schedule.file.content), schedule.model
    files: dict[str, BlockFile] = {
        name: MemoryFile(file.content, name, writable=False) for name, file in schedule.files.items()
    }
    guest = await read_all(await opened(MemoryFile(content, writable=False), files, writable=False))
    difference = model.difference(guest, 0, model.now, model.now)
    found = [] if difference is None else [f"the end: {difference}"]
    if asks_peers:
        path = directory / "disk.vhdx"
        path.write_bytes(content)
        for name, data in schedule.template.files.items():
            (directory / name).write_bytes(data)
        if not schedule.template.files:
            judge(path, guest)
        if flattened(path) != guest:
            found.append("7-Zip reads something else")
    return found


def differences_of(
    template: Template, seeds: range, directory: Path, *, queue: type[InFlight] | None = None
) -> list[str]:
    found: list[str] = []

    async def main() -> None:
        for seed in seeds:
            schedule = VhdxSchedule(seed, template, Mix(requests=20, slices=2 + seed % 3), queue() if queue else None)
            await schedule.run()
            differences = schedule.differences or await _look_after(
                schedule, directory, asks_peers=seed % PEER_EVERY == 0
            )
            found.extend(f"seed {seed}: {each}" for each in differences)

    run_in_memory(main())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_schedules_of_concurrent_requests_on_vhdx_agree_with_the_model(tmp_path: Path, kind: str) -> None:
    assert differences_of(KINDS[kind], range(SEEDS_PER_KIND), tmp_path) == []


@pytest.mark.parametrize("kind", ["dynamic", "child"])
def test_control_without_the_overlap_queue_schedules_differ(tmp_path: Path, kind: str) -> None:
    assert differences_of(KINDS[kind], range(1, 24), tmp_path, queue=NeverConflicting) != []


def test_control_bits_that_are_not_set_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bat, "_set_sectors", lambda *arguments: None)
    assert differences_of(KINDS["child"], range(1, 10), tmp_path) != []
