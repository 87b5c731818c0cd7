"""Dirty bitmaps changed while the image is open: what is stored at once, what stays in use, and what a fault leaves."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from nbdimg.errors import ConfigError, ImageFailed, RequestError, UnsupportedFeature
from nbdimg.formats.qcow2 import bitmap_edit, bitmap_store
from nbdimg.formats.qcow2.bitmap_edit import BitmapAction
from nbdimg.formats.qcow2.bitmap_live import change_bitmaps, prepare
from nbdimg.formats.qcow2.resize import resize
from nbdimg.image.bitmap import DirtyBitmap
from nbdimg.image.image import Image
from nbdimg.storage.memory import MemoryFile
from tests.formats.qcow2.test_bitmaps import (
    FIRST,
    GRANULARITY,
    SIZE,
    checked,
    dirty_of,
    made,
    opened,
    stored,
    straddling,
    with_inconsistent,
)
from tests.support.faultfile import FaultFile, fail_at_each_call
from tests.support.qcow2edit import qemu_img

ADD = BitmapAction("add", "b1", GRANULARITY)
SWITCH = (ADD, BitmapAction("disable", "b0"))
"""What a backup does: one stops where the next one begins."""


async def change(image: Image, *actions: BitmapAction) -> None:
    """As a running server does, of which no request is in flight here."""
    await image.flush()
    await change_bitmaps(image, await prepare(image, actions))


async def dirty(image: Image, name: str) -> list[tuple[int, int]]:
    return dirty_of(list((await image.bitmap(name)).runs(0, image.size)))


async def on_disk(file: MemoryFile) -> dict[str, list[tuple[int, int]] | None]:
    """What a crash would leave now, which has no damage."""
    crashed = MemoryFile(file.content)
    assert await checked(crashed) == 0
    return await stored(crashed)


def test_switch_of_bitmaps_stores_the_one_that_stops_and_the_new_one_follows(tmp_path: Path) -> None:
    async def run() -> None:
        file = MemoryFile(made(tmp_path / "disk"))
        image = await opened(file)
        await image.write(0, b"1" * 512)
        assert await on_disk(file) == {"b0": None}
        await change(image, *SWITCH)
        assert image.bitmap_names == ("b0", "b1")
        assert await on_disk(file) == {"b0": [(0, 4096), *FIRST], "b1": []}
        await image.write(8192, b"2" * 512)
        assert await on_disk(file) == {"b0": [(0, 4096), *FIRST], "b1": None}
        assert await dirty(image, "b0") == [(0, 4096), *FIRST]
        assert await dirty(image, "b1") == [(8192, 12288)]
        await image.close()
        assert await on_disk(file) == {"b0": [(0, 4096), *FIRST], "b1": [(8192, 12288)]}
        (tmp_path / "after").write_bytes(file.content)
        qemu_img("check", tmp_path / "after")

    asyncio.run(run())


def test_bitmap_in_use_stays_in_use_while_others_change_and_keeps_what_it_knows(tmp_path: Path) -> None:
    """B6."""

    async def run() -> None:
        file = MemoryFile(made(tmp_path / "disk", bitmaps=("b0", "frozen")))
        image = await opened(file)
        await image.write(0, b"1" * 512)
        bitmap = await image.bitmap("b0")
        for actions in ((ADD,), (BitmapAction("remove", "frozen"),), (BitmapAction("clear", "b1"),)):
            await change(image, *actions)
            found = await on_disk(file)
            assert found["b0"] is None
            assert found["b1"] == []
        assert await image.bitmap("b0") is bitmap
        await image.write(8192, b"2" * 512)
        await image.close()
        assert await on_disk(file) == {"b0": [(0, 4096), (8192, 12288), *FIRST], "b1": [(8192, 12288)]}

    asyncio.run(run())


def test_clear_enable_merge_and_remove_of_an_open_image(tmp_path: Path) -> None:
    async def run() -> None:
        file = MemoryFile(made(tmp_path / "disk", bitmaps=("b0", "frozen")))
        image = await opened(file)
        await image.write(0, b"1" * 512)
        await change(image, BitmapAction("merge", "frozen", sources=("b0",)), BitmapAction("clear", "b0"))
        assert await on_disk(file) == {"frozen": [(0, 4096), *FIRST], "b0": []}
        await change(image, BitmapAction("enable", "frozen"))
        await image.write(8192, b"2" * 512)
        assert await on_disk(file) == {"frozen": None, "b0": None}
        await change(image, BitmapAction("remove", "b0"), BitmapAction("disable", "frozen"))
        assert await on_disk(file) == {"frozen": [(0, 4096), (8192, 12288), *FIRST]}
        assert image.writable(256 << 10, 257 << 10) is not None  # nothing records any more
        with pytest.raises(RequestError, match="bitmap 'b0' is not there any more"):
            await image.bitmap("b0")
        await change(image, BitmapAction("remove", "frozen"))
        assert (image.bitmap_names, await on_disk(file)) == ((), {})
        await image.close()
        assert await checked(file) == 0

    asyncio.run(run())


@pytest.mark.parametrize("options", ["lazy_refcounts=on", "cluster_size=512", "extended_l2=on"])
def test_first_bitmap_of_an_open_image_follows_from_there_on(tmp_path: Path, options: str) -> None:
    async def run() -> None:
        file = MemoryFile(made(tmp_path / "disk", options, bitmaps=()))
        image = await opened(file)
        await image.write(0, b"1" * 4096)
        await change(image, ADD)
        assert await stored(MemoryFile(file.content)) == {"b1": []}
        await image.write(SIZE - 512, b"2" * 512)
        await resize(image, 2 * SIZE)
        await image.close()
        assert await on_disk(file) == {"b1": [(SIZE - 4096, 2 * SIZE)]}

    asyncio.run(run())


def test_actions_together_are_all_carried_out_or_none(tmp_path: Path) -> None:
    async def run() -> None:
        file = MemoryFile(made(tmp_path / "disk"))
        image = await opened(file)
        before = bytes(file.content)
        with pytest.raises(ConfigError, match="there is no bitmap 'x', known are 'b0', 'b1'"):
            await prepare(image, (*SWITCH, BitmapAction("remove", "x")))
        with pytest.raises(ConfigError, match="there is a bitmap 'b0' already"):
            await prepare(image, (BitmapAction("remove", "b0"), BitmapAction("add", "b0"), BitmapAction("add", "b0")))
        assert [entry.name for entry in (await prepare(image, SWITCH)).entries] == ["b0", "b1"]
        assert (image.bitmap_names, bytes(file.content)) == (("b0",), before)
        await change(image, BitmapAction("remove", "b0"), BitmapAction("add", "b0", 65536))
        assert (await image.bitmap("b0")).granularity == 65536
        await image.close()
        assert await on_disk(file) == {"b0": []}

    asyncio.run(run())


def test_inconsistent_bitmap_of_an_open_image_can_only_be_removed(tmp_path: Path) -> None:
    async def run() -> None:
        file = with_inconsistent(tmp_path / "disk")
        image = await opened(file)
        with pytest.raises(ConfigError, match=r"bitmap 'b0' is inconsistent.*it can only be removed"):
            await change(image, BitmapAction("clear", "b0"))
        await change(image, BitmapAction("disable", "b1"))
        assert await on_disk(file) == {"b0": None, "b1": FIRST}
        await change(image, BitmapAction("remove", "b0"))
        await image.close()
        assert await on_disk(file) == {"b1": FIRST}

    asyncio.run(run())


def test_bitmaps_that_would_take_too_much_memory_are_refused_before_they_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte of bits for each 8 granules of 4 KiB: 32 of an image of 1 MiB."""
    for module in (bitmap_edit, bitmap_store):
        monkeypatch.setattr(module, "MEMORY_MAX", 100)

    async def run() -> None:
        file = MemoryFile(made(tmp_path / "disk"))
        image = await opened(file)
        more = [BitmapAction("add", f"m{number}", GRANULARITY) for number in range(4)]
        with pytest.raises(UnsupportedFeature, match="takes 32 bytes of memory and others that change with it take 96"):
            await change(image, *more)
        with pytest.raises(UnsupportedFeature, match="its bitmaps would take 128 bytes of memory, allowed are 100"):
            await change(image, *more[:3])
        await change(image, *more[:2])
        assert image.failure is None
        await image.close()

    asyncio.run(run())


def test_bitmaps_that_nobody_needs_in_memory_give_room_to_those_that_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three that take 32 bytes each, two may be in memory; what follows the disk is never among those that go."""
    for module in (bitmap_edit, bitmap_store):
        monkeypatch.setattr(module, "MEMORY_MAX", 70)

    async def run() -> None:
        file = MemoryFile(made(tmp_path / "disk", bitmaps=("b0", "frozen")))
        image = await opened(file)
        await image.write(0, b"1" * 512)
        assert await dirty(image, "frozen") == FIRST
        await change(image, ADD)
        await image.write(8192, b"2" * 512)
        with pytest.raises(UnsupportedFeature, match="'frozen' takes 32 bytes of memory and others take 64"):
            await image.bitmap("frozen")
        await change(image, BitmapAction("disable", "b0"))
        for _ in range(2):
            assert await dirty(image, "frozen") == FIRST
            assert await dirty(image, "b0") == [(0, 4096), (8192, 12288), *FIRST]
        with pytest.raises(UnsupportedFeature, match="its bitmaps would take 96 bytes of memory"):
            await resize(image, SIZE // 2 + 512)
        await image.close()
        expected = {"b0": [(0, 4096), (8192, 12288), *FIRST], "frozen": FIRST, "b1": [(8192, 12288)]}
        assert await on_disk(file) == expected

    asyncio.run(run())


def test_merges_are_computed_once_and_know_what_was_written_since_they_were_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each merge of the chain takes the one before it twice."""
    count = 0
    merge = DirtyBitmap.merge

    def counted(self: DirtyBitmap, other: DirtyBitmap) -> Iterator[None]:
        nonlocal count
        count += 1
        return merge(self, other)

    monkeypatch.setattr(DirtyBitmap, "merge", counted)

    async def run() -> None:
        image = await opened(MemoryFile(made(tmp_path / "disk", bitmaps=("b0", "frozen"))))
        chain = [
            BitmapAction("merge", name, sources=(name, other)) for name, other in 20 * [("b0", "b1"), ("b1", "b0")]
        ]
        prepared = await prepare(image, (BitmapAction("add", "b1", GRANULARITY, is_enabled=False), *chain))
        assert count == 0
        await image.write(0, b"1" * 512)
        await image.flush()
        await change_bitmaps(image, prepared)
        assert count == 80
        for name in ("b0", "b1"):
            assert await dirty(image, name) == [(0, 4096), *FIRST]
        await image.close()

    asyncio.run(run())


# Faults


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_fault_at_each_call_leaves_the_old_bitmaps_or_the_new_or_an_image_that_says_it_failed(
    tmp_path: Path, number: int
) -> None:
    """After one that leaves no doubt the image goes on, no bitmap misses a change, and no space is lost."""
    content = made(tmp_path / "disk", "cluster_size=4k", bitmaps=("b0", "frozen"))
    actions = (*SWITCH, BitmapAction("clear", "frozen"))
    outcomes = set()

    async def run(index: int) -> bool:
        memory = MemoryFile(content)
        file = FaultFile(memory, slow_only=True)
        image = await opened(file)
        await image.write(0, b"1" * 512)
        await image.flush()
        file.fail_at(index, number)
        has_changed = False
        with suppress(OSError):
            await change_bitmaps(image, await prepare(image, actions))
            has_changed = True
        file.heal()
        outcomes.add((has_changed, image.failure is None))
        if image.failure is not None:
            assert "a change of its bitmaps failed" in image.failure
            with pytest.raises(ImageFailed):
                await image.write(8192, b"2" * 512)
            return True
        await image.write(8192, b"2" * 512)
        await image.close()
        own = [(8192, 12288)]
        if has_changed:
            expected = {"b0": [(0, 4096), *FIRST], "frozen": [], "b1": own}
        else:
            expected = {"b0": [(0, 4096), *own, *FIRST], "frozen": FIRST}
        assert await on_disk(memory) == expected, f"call {index}"
        return file.is_reached

    assert fail_at_each_call(run) > 10
    assert outcomes == {(True, True), (False, True), (False, False)}


def test_full_disk_between_the_writes_of_a_header_costs_no_bitmap_and_no_space_in_the_end(tmp_path: Path) -> None:
    """Where the extension lies across two sectors the header names no directory meanwhile (B4)."""
    content = straddling(made(tmp_path / "disk", "cluster_size=4k", bitmaps=("frozen",)))
    found = set()

    async def run(index: int) -> bool:
        memory = MemoryFile(content)
        file = FaultFile(memory, slow_only=True)
        image = await opened(file)
        await image.flush()
        file.fail_at(index, errno.ENOSPC)
        with suppress(OSError):
            await change_bitmaps(image, await prepare(image, [ADD]))
        file.heal()
        found.add(len(await stored(MemoryFile(memory.content))))
        if image.failure is None:
            names = set(image.bitmap_names)
            await image.close()
            after = await stored(memory)
            assert after["frozen"] == FIRST, f"call {index}"
            assert set(after) == names, f"call {index}"
            assert await checked(memory) == 0, f"call {index}"
        return file.is_reached

    fail_at_each_call(run)
    assert found == {0, 1, 2}
