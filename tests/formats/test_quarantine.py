"""Space that was freed, and waits for a flush that no client asks for."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from nbdimg.formats import create_image, open_image, quarantine, resize_image
from nbdimg.formats.qcow2.create import create
from nbdimg.formats.qcow2.create_options import CreateOptions
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.formats.qcow2.refcount import Refcounts
from nbdimg.formats.qcow2.snapshot_changes import create_snapshot
from nbdimg.image.image import Image
from nbdimg.units import MiB

SIZE = 64 * MiB
WAITING_MIN = 64 * MiB
FORMATS = ("qcow2", "vhdx")


@pytest.fixture(params=FORMATS)
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(quarantine, "WAITING_MIN", WAITING_MIN)
    made = tmp_path / f"disk.{request.param}"
    create_image(made, SIZE, format=request.param)
    return made


async def write_and_trim(image: Image, offset: int) -> None:
    unit = image.driver.cluster_size
    data = memoryview(b"x" * 4096)
    if not image.try_write(offset, data):
        await image.write(offset, data)
    await image.trim(offset, unit)


def test_write_and_trim_again_and_again_without_a_flush_reuses_the_space(path: Path) -> None:
    async def main() -> int:
        image = await open_image(path)
        unit = image.driver.cluster_size
        for index in range(4 * (SIZE + WAITING_MIN) // unit):
            await write_and_trim(image, index * unit % SIZE)
        size = os.stat(path).st_size
        await image.close()
        return size

    assert asyncio.run(main()) <= SIZE + WAITING_MIN + 2 * 64 * MiB


def test_runs_that_wait_are_not_more_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "RUNS_MAX", 8)
    create_image(tmp_path / "disk", SIZE, format="qcow2")

    async def main() -> int:
        image = await open_image(tmp_path / "disk")
        driver = image.driver
        assert isinstance(driver, Qcow2Driver)
        assert driver.refcounts is not None
        unit = driver.cluster_size
        await image.write(0, bytes(range(1, 256)) * (100 * unit // 255 + 1))
        waiting_max = 0
        for offset in range(0, 100 * unit, 2 * unit):
            await image.trim(offset, unit)
            waiting_max = max(waiting_max, len(driver.refcounts._freed))
        await image.close()
        return waiting_max

    assert asyncio.run(main()) <= 8 + 1


def test_overwrites_of_what_a_snapshot_shares_are_not_flushed_for_space_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "WAITING_MIN", 1 * MiB)
    create_image(tmp_path / "disk", SIZE, format="qcow2")

    async def main() -> tuple[int, int]:
        image = await open_image(tmp_path / "disk")
        assert isinstance(image.driver, Qcow2Driver)
        content = b"x" * 8 * MiB
        await image.write(0, content)
        await image.flush()
        await create_snapshot(image.driver, "kept", now_ns=0)
        before = image.gate.times.count
        for offset in range(0, len(content), MiB):
            await image.write(offset, content[:MiB])
        overwritten = image.gate.times.count
        await image.trim(0, 2 * MiB)
        await image.trim(2 * MiB, 2 * MiB)
        trimmed = image.gate.times.count
        await image.close()
        return overwritten - before, trimmed - overwritten

    assert asyncio.run(main()) == (0, 1)


def test_runs_that_a_shrink_frees_wait_within_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "RUNS_MAX", 100)
    unit, entries, tables = 512, 64, 16
    create(tmp_path / "disk", tables * entries * unit, CreateOptions(cluster_size=unit))
    leaving: list[int] = []
    capture_freed = Refcounts.capture_freed

    def count(counts: Refcounts) -> None:
        leaving.append(len(counts._freed))
        capture_freed(counts)

    monkeypatch.setattr(Refcounts, "capture_freed", count)

    async def main() -> None:
        image = await open_image(tmp_path / "disk")
        for offset in range(image.size - unit, -1, -unit):
            await image.write(offset, b"x" * unit)
        await resize_image(image, unit, may_shrink=True)
        await image.close()

    asyncio.run(main())
    assert 100 < max(leaving) <= 100 + entries + 1
