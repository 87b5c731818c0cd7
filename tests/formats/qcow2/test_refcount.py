"""The allocator: first fit, new blocks, a table that grows, and the quarantine of what was freed (R1 to R4)."""

from __future__ import annotations

import asyncio
import errno
import subprocess
from array import array
from pathlib import Path

import pytest

from nbdimg.errors import CorruptImage, UnsupportedFeature
from nbdimg.formats import open_image
from nbdimg.formats.qcow2 import structs
from nbdimg.formats.qcow2.header import Header
from nbdimg.formats.qcow2.refcount import Refcounts, Run
from nbdimg.image.driver import Miss
from nbdimg.storage.memory import MemoryFile
from nbdimg.storage.ordering import Hindrance, Plan, Stage, run
from nbdimg.units import MiB
from tests.support.faultfile import FaultFile
from tests.support.qcow2stage import count_of

BITS = 9
CLUSTER = 1 << BITS
"""With 16-bit counts a block of 512 bytes counts 256 clusters, and a cluster of the table names 64 blocks."""


class Bench:
    """A file with header, refcount table and one block in clusters 0 to 2, and counts given for the first clusters."""

    def __init__(self, counts: list[int], *, order: int = 4, table_clusters: int = 1, metadata: set[int] | None = None):
        block = b"".join(count.to_bytes(2, "big") for count in counts).ljust(CLUSTER, b"\0")
        if order == 6:
            block = b"".join(count.to_bytes(8, "big") for count in counts).ljust(CLUSTER, b"\0")
        head = bytes(CLUSTER) + (2 * CLUSTER).to_bytes(8, "big").ljust(CLUSTER, b"\0") + block
        self.file = MemoryFile(head.ljust(len(counts) * CLUSTER, b"\xee"))
        self.header = Header(
            version=3,
            cluster_bits=BITS,
            size=1 << 20,
            l1_size=0,
            l1_offset=0,
            refcount_table_offset=CLUSTER,
            refcount_table_clusters=table_clusters,
            refcount_order=order,
        )
        table = array("Q", [2 * CLUSTER] + [0] * 63)
        self.counts = Refcounts(self.file, self.header, table, {0, 1, 2} if metadata is None else metadata)

    def allocate(self, count: int) -> Run:
        while isinstance(answer := self.counts.allocate(count), Miss):
            asyncio.run(answer.load())
        return answer

    def count(self, cluster: int) -> int:
        while isinstance(answer := count_of(self.counts, cluster), Miss):
            asyncio.run(answer.load())
        return answer

    def flush(self) -> None:
        """What a flush does with counts alone."""

        async def main() -> None:
            stages = (Stage(tuple(writes), (self.file,)) for writes in self.counts.capture())
            await run(Plan(tuple(stages)))
            self.counts.written()
            await self.counts.reclaim()

        asyncio.run(main())


def test_counts_narrower_than_a_byte_take_no_more_memory_than_others() -> None:
    """4 KiB of 1-bit counts are 32 KiB in memory."""
    header = Bench([]).header
    header.cluster_bits, header.refcount_order = 12, 0
    blocks = range(1, 601)
    file = MemoryFile(bytes(4096 * (len(blocks) + 1)))
    counts = Refcounts(file, header, array("Q", [4096 * block for block in blocks]), set())

    async def main() -> None:
        for block in range(len(blocks)):
            answer = count_of(counts, block * 32768)
            assert isinstance(answer, Miss)
            await answer.load()

    asyncio.run(main())
    assert sum(len(each.entries) * each.entries.itemsize for each in counts.cache.slices.values()) == 16 * MiB


def test_allocate_is_first_fit_and_stops_where_a_cluster_is_in_use() -> None:
    bench = Bench([1, 1, 1, 0, 1, 0, 0, 1])
    assert bench.allocate(5) == Run(3, 1, is_fresh=False)
    assert bench.allocate(5) == Run(5, 2, is_fresh=False)
    assert bench.allocate(5) == Run(8, 5, is_fresh=True)
    assert [bench.count(each) for each in range(14)] == [1] * 13 + [0]


def test_allocate_keeps_used_space_and_fresh_space_apart() -> None:
    """R3: one run reads as zeroes whole, or is not said to."""
    bench = Bench([1, 1, 1, 1, 0, 0])
    assert bench.allocate(9) == Run(4, 2, is_fresh=False)
    assert bench.allocate(9) == Run(6, 9, is_fresh=True)


def test_freed_cluster_is_used_again_only_after_the_plan_that_freed_it() -> None:
    """R1, Q4, Q5."""
    bench = Bench([1, 1, 1, 1, 1, 1])
    assert bench.count(4) == 1
    bench.counts.free(4)
    assert bench.count(4) == 1
    assert bench.allocate(1).cluster == 6
    first, _ = bench.counts.capture()
    assert bench.allocate(1).cluster == 7
    assert first[0].data[8:10] == b"\0\1", "on disk it is still counted"
    bench.counts.written()
    asyncio.run(bench.counts.reclaim())
    assert bench.count(4) == 0
    assert bench.allocate(1) == Run(4, 1, is_fresh=False)


def test_freed_after_the_plan_was_made_waits_for_the_next_one() -> None:
    bench = Bench([1] * 6)
    assert bench.count(3) == 1
    bench.counts.free(3)
    bench.counts.capture()
    bench.counts.free(5)
    bench.counts.written()
    asyncio.run(bench.counts.reclaim())
    assert (bench.count(3), bench.count(5)) == (0, 1)
    bench.flush()
    assert bench.count(5) == 0


def test_freed_space_is_punched_only_with_the_last_reference() -> None:
    """R2: two clusters hold two references, one holds one."""
    bench = Bench([1, 1, 1, 2, 1, 2])
    bench.counts.free(3, 3, punch=True)
    bench.flush()
    assert [bench.count(each) for each in (3, 4, 5)] == [1, 0, 1]
    assert bench.file.content[3 * CLUSTER : 6 * CLUSTER] == b"\xee" * 512 + bytes(512) + b"\xee" * 512


def test_cluster_freed_twice_that_has_one_reference_is_corruption() -> None:
    bench = Bench([1] * 6)
    bench.counts.free(4)
    bench.counts.free(4)
    with pytest.raises(CorruptImage, match=r"cluster 4 was referred to and has refcount 0, expected 1 \(offset 2048\)"):
        bench.flush()


def test_reclaim_that_cannot_read_a_block_goes_on_where_it_stopped() -> None:
    """What has been counted down is not counted down again: clusters 250 to 255 have a reference left."""
    bench = Bench([1] * 250 + [2] * 6)
    second = bench.file.size
    bench.counts.table[1] = second
    bench.file.content[second:] = b"\0\2" * 256
    file = FaultFile(bench.file)
    bench.counts._file = file
    assert bench.count(250) == 2
    bench.counts.free(250, 12)
    bench.counts.capture_freed()
    file.fail("pread", errno.EIO)
    for _ in range(2):
        with pytest.raises(Hindrance):
            asyncio.run(bench.counts.reclaim())
    file.heal()
    asyncio.run(bench.counts.reclaim())
    assert [bench.count(each) for each in range(249, 263)] == [1] * 13 + [2]


def test_append_beyond_what_an_entry_can_say_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench([1] * 6)
    bench.count(5)
    monkeypatch.setattr(structs, "HOST_OFFSET_MAX", 258 * CLUSTER)
    with pytest.raises(UnsupportedFeature, match="the file would grow beyond 132096 bytes"):
        bench.counts.allocate_contiguous(253)


def test_free_of_a_cluster_that_no_block_counts_is_corruption() -> None:
    bench = Bench([1] * 6)
    bench.counts.free(100_000)
    with pytest.raises(CorruptImage, match="cluster 100000 was referred to and has refcount 0"):
        bench.flush()


def test_give_back_is_free_at_once() -> None:
    bench = Bench([1] * 4)
    taken = bench.allocate(3)
    bench.counts.give_back(taken)
    assert [bench.count(each) for each in range(4, 7)] == [0, 0, 0]
    assert bench.allocate(3).cluster == taken.cluster


def test_new_block_lies_in_the_first_cluster_that_it_counts() -> None:
    bench = Bench([1] * 256)
    assert bench.allocate(2) == Run(257, 2, is_fresh=True)
    bench.flush()
    content = bench.file.content
    assert content[CLUSTER : CLUSTER + 16] == (1024).to_bytes(8, "big") + (256 * CLUSTER).to_bytes(8, "big")
    assert content[256 * CLUSTER : 256 * CLUSTER + 8] == b"\0\1\0\1\0\1\0\0"


def test_table_that_is_full_grows_in_a_new_place_and_the_header_names_it_last() -> None:
    bench = Bench([1] * 256)
    bench.counts.table = array("Q", [2 * CLUSTER] * 64)
    bench.counts._hint = bench.counts.end = 64 * 256
    taken = bench.allocate(1)
    offset = bench.header.refcount_table_offset
    assert bench.header.refcount_table_clusters > 1
    assert bench.count(offset >> BITS) == 1
    assert bench.count(taken.cluster) == 1
    _, (table,), (pointer,) = bench.counts.capture()
    assert (pointer.offset, pointer.data[:8]) == (48, offset.to_bytes(8, "big"))
    assert table.offset == offset
    assert len(bench.counts.table) * 8 == bench.header.refcount_table_clusters * CLUSTER
    assert {offset >> BITS, taken.cluster} - bench.counts.metadata == {taken.cluster}


def test_table_that_the_header_may_name_already_follows_the_blocks_that_it_names() -> None:
    """Q1: the plan that moved the table failed, nobody knows where, and a block has come since."""
    bench = Bench([1] * 256)
    bench.counts.table = array("Q", [2 * CLUSTER] * 64)
    bench.counts._hint = bench.counts.end = 64 * 256
    bench.allocate(1)
    bench.counts.capture()
    known = set(bench.counts.table)
    while not (added := set(bench.counts.table) - known):
        bench.allocate(256)
    blocks, (table,), _ = bench.counts.capture()
    assert table.offset == bench.header.refcount_table_offset
    assert added <= {write.offset for write in blocks}
    assert table.offset not in {write.offset for write in blocks}


def test_allocate_of_a_metadata_cluster_is_corruption() -> None:
    """R4: the counts say that the table is free."""
    bench = Bench([1, 0, 1, 1])
    with pytest.raises(CorruptImage, match=r"cluster 1 holds metadata and has refcount 0, expected 1 \(offset 512\)"):
        bench.allocate(1)


@pytest.mark.parametrize("offset", [512 + 8, 1 << 40, 1 << 60])
def test_block_outside_or_unaligned_is_refused_by_its_entry(offset: int) -> None:
    bench = Bench([1] * 4)
    bench.counts.table[0] = offset
    with pytest.raises(CorruptImage, match=rf"refcount table entry 0 is {offset:#x}, expected .* \(offset 512\)"):
        bench.allocate(1)


def test_raise_counts_refuses_what_the_width_does_not_hold() -> None:
    bench = Bench([1, 1, 1, 0xFFFF, 5])
    assert bench.count(4) == 5
    assert bench.counts.raise_counts(4, 1) == 1
    assert bench.count(4) == 6
    with pytest.raises(UnsupportedFeature, match="cluster 3 has 65535 references, 16-bit refcounts allow 65535"):
        bench.counts.raise_counts(3, 1)
    with pytest.raises(CorruptImage, match="cluster 5 was referred to and has refcount 0"):
        bench.counts.raise_counts(5, 1)


def test_allocate_contiguous_goes_behind_everything_where_the_hole_is_too_small() -> None:
    bench = Bench([1, 1, 1, 0, 1, 1])
    assert bench.count(3) == 0
    found = bench.counts.allocate_contiguous(10)
    assert isinstance(found, Run)
    assert found.count == 10
    assert found.cluster > 5
    assert bench.count(3) == 0
    assert all(bench.count(each) == 1 for each in range(found.cluster, found.cluster + 10))


@pytest.mark.parametrize("bits", [16, 64])
def test_file_that_grows_through_its_table_several_times_is_clean(tmp_path: Path, bits: int) -> None:
    """512-byte clusters: with 64-bit counts a table cluster reaches 2 MiB."""
    path = tmp_path / "disk.qcow2"
    options = f"cluster_size=512,refcount_bits={bits}"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(path), "12M"], check=True)

    async def main() -> None:
        image = await open_image(path, format="qcow2")
        for offset in range(0, 12 << 20, 1 << 20):
            await image.write(offset, b"\x55" * (1 << 20))
            if offset % (4 << 20) == 0:
                await image.flush()
        await image.close()

    asyncio.run(main())
    subprocess.run(["qemu-img", "check", "-q", str(path)], check=True)
    pattern = subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "read -P 0x55 0 12M", str(path)], check=True, capture_output=True, text=True
    )
    assert "verification failed" not in pattern.stdout
