"""A closed image gives its memory back at once, not when the garbage collector finds the cycles around it.

It may never: a server keeps the collector from what it had at its start, and few objects hold what is large here.
"""

from __future__ import annotations

import asyncio
import gc
import subprocess
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nbdimg.formats import create_image, open_image
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.image.bitmap import PIECE_SIZE
from nbdimg.image.image import Image
from nbdimg.units import GiB, KiB, MiB, TiB

LEFT_MAX = 64 * KiB
"""Bytes: the objects themselves."""

Case = tuple[str, Callable[[Image], Awaitable[None]], int]


async def dirtied(image: Image) -> None:
    """A bit in each piece of the bitmap: those that are all clean take no memory."""
    assert isinstance(image.driver, Qcow2Driver)
    assert image.driver.bitmaps is not None
    (bitmap,) = image.driver.bitmaps.recording
    for offset in range(0, image.size, 8 * PIECE_SIZE * bitmap.granularity):
        bitmap.set_range(offset, offset + 1)


async def everywhere(image: Image) -> None:
    for offset in range(0, image.size, image.size // 1024):
        await image.read(offset, memoryview(bytearray(512)))


def with_bitmap(directory: Path) -> Case:
    path = str(directory / "disk.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1T"], check=True)
    subprocess.run(["qemu-img", "bitmap", "--add", path, "b0"], check=True)
    return path, dirtied, 2 * MiB


def over_a_base(directory: Path) -> Case:
    create_image(directory / "base.raw", GiB)
    path = str(directory / "disk.qcow2")
    make = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", path]
    subprocess.run(make, check=True)
    return path, everywhere, 512 * KiB


def of_many_blocks(directory: Path) -> Case:
    path = str(directory / "disk.vhdx")
    create_image(path, 16 * TiB, format="vhdx")
    return path, everywhere, 4 * MiB


@pytest.mark.parametrize("make", [with_bitmap, over_a_base, of_many_blocks])
def test_closed_image_gives_its_memory_back_at_once(make: Callable[[Path], Case], tmp_path: Path) -> None:
    path, use, used_min = make(tmp_path)

    async def main() -> tuple[int, int]:
        await use_and_close()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        used = await use_and_close()
        return used - before, tracemalloc.get_traced_memory()[0] - before

    async def use_and_close() -> int:
        image = await open_image(path)
        await use(image)
        used = tracemalloc.get_traced_memory()[0]
        await image.close()
        return used

    gc.disable()
    tracemalloc.start()
    try:
        used, left = asyncio.run(main())
    finally:
        tracemalloc.stop()
        gc.enable()
    assert used > used_min, "it was in memory"
    assert left < LEFT_MAX
