"""Where space goes: writes that fail, images that must not grow, and the header's own cluster.

The numbers are cloud-hypervisor's issues, in which each of these lost data.
"""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

from nbdimg.errors import CorruptImage
from nbdimg.export.export import Export
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.formats.qcow2.refcount import Refcounts
from nbdimg.storage.file import Buffer
from nbdimg.storage.memory import MemoryFile
from tests.support.faultfile import os_error
from tests.support.interleave import open_template, run_in_memory
from tests.support.qcow2stage import (
    CLEAN,
    CLUSTER,
    SIZE,
    Stage,
    StoppableFile,
    checked,
    count_of,
    made_image,
    numbered_image,
    settle,
    staged,
    summary,
)
from tests.support.reading import read_all


@pytest.fixture
def image(tmp_path: Path) -> bytes:
    """Guest clusters 0 to 7 hold their number + 1."""
    return numbered_image(tmp_path / "made")


# Writes that fail (8637, 8748)


class FullFile(StoppableFile):
    """Beyond `capacity` bytes there is no space; what fits of a write is written before it fails."""

    capacity = 1 << 60

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        return False

    async def pwrite(self, offset: int, data: Buffer) -> None:
        view = memoryview(data)
        if offset + len(view) > self.capacity:
            fits = max(0, self.capacity - offset)
            if fits:
                await super().pwrite(offset, view[:fits])
            raise os_error(errno.ENOSPC)
        await super().pwrite(offset, view)


async def fill_and_recover(content: bytes) -> tuple[bytes, int, int]:
    """A thousand writes into a full file; then there is space. Returns content, and used clusters before and after."""
    file = FullFile(content)
    image = await open_template(file, {})
    driver = image.driver
    assert isinstance(driver, Qcow2Driver)
    counts = driver.refcounts
    assert counts is not None
    await image.write(20 * CLUSTER, b"\x14" * CLUSTER)
    await image.flush()
    before = sum(bool(count_of(counts, cluster)) for cluster in range(2000))
    file.capacity = len(file.content)
    for number in range(1000):
        with pytest.raises(OSError, match="No space"):
            await image.write((30 + number % 20) * CLUSTER + number % 3 * 100, b"\xff" * (1000 + number % 2 * CLUSTER))
    await image.write(3 * CLUSTER, b"\x33" * CLUSTER)
    await image.flush()
    after = sum(bool(count_of(counts, cluster)) for cluster in range(2000))
    file.capacity = 1 << 60
    await image.write(31 * CLUSTER, b"\x31" * CLUSTER)
    found = await read_all(image)
    assert found[30 * CLUSTER : 31 * CLUSTER] == bytes(CLUSTER)
    assert found[31 * CLUSTER : 32 * CLUSTER] == b"\x31" * CLUSTER
    assert found[3 * CLUSTER : 4 * CLUSTER] == b"\x33" * CLUSTER
    assert found[20 * CLUSTER : 21 * CLUSTER] == b"\x14" * CLUSTER
    await image.close()
    return bytes(file.content), before, after


def test_writes_that_fail_for_space_return_their_clusters(image: bytes, tmp_path: Path) -> None:
    content, before, after = run_in_memory(fill_and_recover(image))
    assert after == before
    assert len(content) <= len(image) + 4 * CLUSTER
    assert summary(checked(tmp_path / "after", content)) == CLEAN


def test_control_writes_that_keep_their_clusters_are_seen(
    image: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Refcounts, "give_back", lambda self, run: None)
    content, before, after = run_in_memory(fill_and_recover(image))
    assert after > before
    assert checked(tmp_path / "after", content).leaks


def test_write_that_fails_after_its_counts_were_evicted_returns_its_cluster(image: bytes, tmp_path: Path) -> None:
    """A flush and evictions while the write is under way: the counts are not resident when it fails."""

    async def main() -> bytes:
        stage = await staged(image)
        stage.file.stops = lambda name, offset: name == "pwrite" and offset >= len(image)
        write = stage.write(40, 0xAB)
        await settle()
        stage.file.stop_no_more()
        await stage.write(41, 0xAC)
        await stage.flush()
        for key in list(stage.counts.cache.slices):
            stage.counts.cache.drop(key)
        stage.file.stopped.pop()[2].set_exception(os_error(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            await write
        return await stage.close()

    assert summary(checked(tmp_path / "after", run_in_memory(main()))) == CLEAN


# A file that grows with every flush (8597)


@pytest.mark.parametrize("options", ["cluster_size=4096", "cluster_size=4096,lazy_refcounts=on"])
def test_overwrites_with_a_flush_each_do_not_grow_the_file(tmp_path: Path, options: str) -> None:
    made = made_image(tmp_path / "made", options, "write -P 1 0 32k")

    async def main() -> bytes:
        file = MemoryFile(made)
        image = await open_template(file, {})
        generator = random.Random(8597)
        await image.write(0, bytes(8 * CLUSTER))
        await image.flush()
        size = len(file.content)
        for _ in range(10_000):
            assert image.try_write(generator.randrange(60) * 512, memoryview(bytes(512)))
            await image.flush()
        assert len(file.content) == size
        await image.close()
        return bytes(file.content)

    assert summary(checked(tmp_path / "after", run_in_memory(main()))) == CLEAN


def test_trims_and_rewrites_with_a_flush_each_reuse_what_they_free(image: bytes, tmp_path: Path) -> None:
    async def main() -> bytes:
        file = MemoryFile(image)
        export = await open_template(file, {})
        sizes = []
        for number in range(1000):
            cluster = number % 8
            await export.trim(cluster * CLUSTER, CLUSTER)
            await export.flush()
            await export.write(cluster * CLUSTER, bytes([number % 251]) * CLUSTER)
            await export.flush()
            sizes.append(len(file.content))
        assert sizes[-1] == sizes[20]
        await export.close()
        return bytes(file.content)

    assert summary(checked(tmp_path / "after", run_in_memory(main()))) == CLEAN


# Host offset 0 (8358)


def test_header_with_refcount_0_is_never_given_to_data(image: bytes) -> None:
    """The counts in the file say that cluster 0 is free."""
    broken = bytearray(image)
    table = int.from_bytes(broken[48:56], "big")
    block = int.from_bytes(broken[table : table + 8], "big")
    assert broken[block : block + 2] == b"\0\1"
    broken[block : block + 2] = b"\0\0"

    async def main() -> bytes:
        stage = await staged(bytes(broken))
        with pytest.raises(CorruptImage, match="cluster 0 holds metadata"):
            await stage.write(40, 0xAB)
        with pytest.raises(CorruptImage):
            await stage.write(41, 0xAB)
        return bytes(stage.file.content)

    assert run_in_memory(main())[:72] == image[:72]


def test_data_entry_with_host_offset_0_is_refused_and_the_header_stays(image: bytes) -> None:
    broken = bytearray(image)
    l1 = int.from_bytes(broken[40:48], "big")
    l2 = int.from_bytes(broken[l1 : l1 + 8], "big") & ~(1 << 63)
    broken[l2 : l2 + 8] = (1 << 63).to_bytes(8, "big")

    async def main() -> bytes:
        stage = Stage(
            file := StoppableFile(bytes(broken)), Export("x", await open_template(file, {}), payload_max=4096)
        )
        with pytest.raises(CorruptImage):
            await stage.write(0, 0xAB)
        return bytes(stage.file.content)

    assert run_in_memory(main())[:72] == image[:72]


def test_random_changes_write_to_cluster_0_nothing_but_header_fields(image: bytes) -> None:
    """Of a workload with every kind of change, only refcount table and feature fields may land in cluster 0."""
    generator = random.Random(8358)

    async def main() -> list[tuple[int, bytes]]:
        stage = await staged(image)
        for _ in range(400):
            cluster = generator.randrange(SIZE // CLUSTER)
            action = generator.choice((stage.trim, stage.zero, stage.flush, None))
            if action is None:
                await stage.write(cluster, 0xEE, offset=512, length=1024)
            elif action == stage.flush:
                await stage.flush()
            else:
                await action(cluster)  # type: ignore[call-arg]
        await stage.close()
        return stage.file.writes

    writes = run_in_memory(main())
    assert len(writes) > 200
    assert [
        offset for offset, data in writes if offset < CLUSTER and (offset, len(data)) not in ((48, 12), (72, 8))
    ] == []
