"""Races that have lost data in other implementations, each played out with file calls that wait for the test.

Where a race is decided by one rule of ours, a control takes the rule away and sees the damage. Names in brackets are
the public reports: cloud-hypervisor's issues by number; A and B are two that QEMU has.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable
from pathlib import Path

import pytest

from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.formats.qcow2.refcount import Refcounts, Run
from nbdimg.storage.memory import MemoryFile
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


async def played(stage: Stage, held: Awaitable[object], trims: int, fills: int) -> list[asyncio.Task[object]]:
    """While `held` waits in the file: trim cluster `trims`, flush, and write cluster `fills` anew, flush; go on."""
    tasks = [asyncio.ensure_future(held)]
    await settle()
    stage.file.stop_no_more()
    tasks.append(stage.trim(trims))
    await settle()
    tasks.append(stage.flush())
    await settle()
    tasks.append(stage.write(fills, 0xAB))
    await settle()
    tasks.append(stage.flush())
    await settle()
    stage.file.go_on()
    await asyncio.gather(*tasks)
    return tasks


async def race_a(content: bytes, *, is_ordered: bool) -> tuple[bytes, bytes, bytes]:
    """A: the overwrite of a zero cluster that keeps its space is under way; a trim of it; space is taken elsewhere."""
    stage = await staged(content, is_ordered=is_ordered)
    host = stage.host(5)
    await stage.zero(5)
    await stage.flush()
    stage.file.stops = lambda name, offset: name == "pwrite" and offset == host
    await played(stage, stage.write(5, 0xCD), trims=5, fills=40)
    found = await stage.read(5), await stage.read(40)
    return await stage.close(), *found


def test_trim_behind_overwrite_of_kept_zero_cluster_waits_for_it(image: bytes, tmp_path: Path) -> None:
    content, trimmed, other = run_in_memory(race_a(image, is_ordered=True))
    assert summary(checked(tmp_path / "after", content)) == CLEAN
    assert trimmed == bytes(CLUSTER)
    assert other == b"\xab" * CLUSTER


def test_control_trim_beside_overwrite_of_kept_zero_cluster_gives_it_away_twice(image: bytes, tmp_path: Path) -> None:
    content, _, other = run_in_memory(race_a(image, is_ordered=False))
    assert checked(tmp_path / "after", content).corruptions
    assert other == b"\xcd" * CLUSTER


async def race_b(content: bytes, *, is_ordered: bool) -> tuple[bytes, bytes, bytes]:
    """B: a write in place is under way; a trim of its cluster; the cluster is taken elsewhere; the write arrives."""
    stage = await staged(content, is_ordered=is_ordered)
    stage.stop_at("pwrite", 5)
    await played(stage, stage.write(5, 0xCD), trims=5, fills=40)
    found = await stage.read(5), await stage.read(40)
    return await stage.close(), *found


def test_trim_behind_write_in_place_waits_for_it(image: bytes, tmp_path: Path) -> None:
    content, trimmed, other = run_in_memory(race_b(image, is_ordered=True))
    assert summary(checked(tmp_path / "after", content)) == CLEAN
    assert trimmed == bytes(CLUSTER)
    assert other == b"\xab" * CLUSTER


def test_control_trim_beside_write_in_place_lets_it_into_foreign_data(image: bytes, tmp_path: Path) -> None:
    """As in QEMU, a check of the image sees nothing of it."""
    content, _, other = run_in_memory(race_b(image, is_ordered=False))
    assert summary(checked(tmp_path / "after", content)) == CLEAN
    assert other == b"\xcd" * CLUSTER


async def race_read(content: bytes, *, is_ordered: bool) -> bytes:
    stage = await staged(content, is_ordered=is_ordered)
    stage.stop_at("pread", 5)
    tasks = await played(stage, stage.read(5), trims=5, fills=40)
    found = tasks[0].result()
    assert isinstance(found, bytes)
    await stage.close()
    return found


def test_read_under_way_while_its_cluster_is_trimmed_returns_old_bytes(image: bytes) -> None:
    assert run_in_memory(race_read(image, is_ordered=True)) == b"\x06" * CLUSTER


def test_control_read_under_way_beside_trim_returns_foreign_bytes(image: bytes) -> None:
    assert run_in_memory(race_read(image, is_ordered=False)) == b"\xab" * CLUSTER


# A punch that comes late (8624)


async def late_punch(content: bytes) -> tuple[bytes, bytes]:
    """The flush after a trim is held in its punch; writes and another client's flush go on meanwhile."""
    stage = await staged(content)
    stage.stop_at("punch", 5)
    await stage.trim(5)
    first = stage.flush()
    await settle()
    stage.file.stop_no_more()
    writes = [stage.write(40, 0xAB), stage.write(41, 0xAC)]
    second = stage.flush()
    await settle()
    stage.file.go_on()
    await asyncio.gather(first, second, *writes)
    found = await stage.read(40) + await stage.read(41)
    return await stage.close(), found


def test_cluster_is_not_reused_before_its_punch_has_returned(image: bytes, tmp_path: Path) -> None:
    content, found = run_in_memory(late_punch(image))
    assert summary(checked(tmp_path / "after", content)) == CLEAN
    assert found == b"\xab" * CLUSTER + b"\xac" * CLUSTER


def test_control_cluster_that_is_free_before_its_punch_is_wiped(image: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    lower = Refcounts._lower

    async def lower_then_punch(self: Refcounts, start: int, stop: int, punch: bool) -> None:
        await lower(self, start, stop, False)
        if punch:
            await self._file.punch(start * CLUSTER, (stop - start) * CLUSTER)

    monkeypatch.setattr(Refcounts, "_lower", lower_then_punch)
    assert b"\0" in run_in_memory(late_punch(image))[1]


# One cluster for two (8606)


def test_allocator_gives_no_cluster_twice_in_ten_thousand_steps(image: bytes) -> None:
    """Against a set of what is in use; freed clusters come back only after a flush."""
    generator = random.Random(8606)

    async def main() -> None:
        stage = await staged(image)
        counts, used, leaving = stage.counts, set[int](), set[int]()
        await counts.cache.load(0)
        in_use = [cluster for cluster in range(counts.end) if count_of(counts, cluster)]
        used.update(in_use)
        own: list[int] = []
        for step in range(10_000):
            if generator.random() < 0.52 or not own:
                run = counts.allocate(generator.randrange(1, 5))
                assert isinstance(run, Run), f"step {step}"
                got = set(range(run.cluster, run.cluster + run.count))
                assert not got & (used | leaving), f"step {step}: {sorted(got & (used | leaving))} given twice"
                used |= got
                own.extend(got)
            else:
                cluster = own.pop(generator.randrange(len(own)))
                counts.free(cluster, punch=generator.random() < 0.5)
                used.discard(cluster)
                leaving.add(cluster)
            if step % 97 == 0:
                await stage.driver.settle()
                leaving.clear()
            used |= counts.metadata
        await stage.driver.settle()
        for cluster in range(counts.end):
            assert bool(count_of(counts, cluster)) == (cluster in used), f"cluster {cluster}"
        assert len(own) > 100

    run_in_memory(main())


def test_image_of_every_instant_opens_and_allocates_over_nothing(tmp_path: Path) -> None:
    """L2 tables of small clusters are made one after the other; the file as of each write is opened, filled, checked.

    What was durable at that write must be there, whatever the new writes took.
    """
    made = made_image(tmp_path / "made", "cluster_size=512", "write -P 9 0 512")

    async def instants() -> list[tuple[bytes, dict[int, int]]]:
        file = StoppableFile(made)
        file.is_slow = False
        image = await open_template(file, {})
        durable: dict[int, int] = {0: 9}
        pending: dict[int, int] = {}
        states = []
        for number in range(12):
            offset = (number * 37 + 37) % 500 * 512
            pending[offset] = number + 20
            known = len(file.writes)
            before = bytes(file.content)
            await image.write(offset, bytes([number + 20]) * 512)
            await image.flush()
            for at, data in file.writes[known:]:
                grown = bytearray(before.ljust(at + len(data), b"\0"))
                grown[at : at + len(data)] = data
                before = bytes(grown)
                states.append((before, dict(durable)))
            durable |= pending
        await image.close()
        return states

    async def outlive(content: bytes, durable: dict[int, int]) -> bytes:
        file = MemoryFile(content)
        image = await open_template(file, {})
        for offset in range(256, SIZE // 512, 16):
            await image.write(offset * 512 + 256, b"\xee" * 100)
        await image.flush()
        found = await read_all(image)
        for offset, value in durable.items():
            assert found[offset : offset + 256] == bytes([value]) * 256, f"guest offset {offset}"
        await image.close()
        return bytes(file.content)

    states = run_in_memory(instants())
    assert len(states) >= 40
    for number, (content, durable) in enumerate(states):
        after = run_in_memory(outlive(content, durable))
        if number % 8 == 0:
            assert checked(tmp_path / "after", after).corruptions == 0, f"state {number}"


# Counts that are read while they change


class EagerFile(StoppableFile):
    """A read that stops has its bytes already."""

    async def pread(self, offset: int, view: memoryview) -> None:
        MemoryFile.try_pread(self, offset, view)
        content = bytes(view)
        await self._pass("pread", offset)
        view[:] = content


def test_counts_read_before_they_were_changed_and_evicted_are_not_taken(tmp_path: Path) -> None:
    """A block of two slices: its load for one slice waits, meanwhile the load for the other brings both."""
    made = made_image(tmp_path / "made", "cluster_size=8k,refcount_bits=64", "write -P 1 0 8k")

    async def main() -> tuple[int, int]:
        file = EagerFile(made)
        image = await open_template(file, {})
        assert isinstance(image.driver, Qcow2Driver)
        counts = image.driver.refcounts
        assert counts is not None
        file.stops = lambda name, offset: name == "pread"
        late = asyncio.ensure_future(counts.cache.load(0))
        await settle()
        file.stop_no_more()
        await counts.cache.load(1)
        first = counts.allocate(1)
        assert isinstance(first, Run)
        await image.flush()
        counts.cache.drop(0)
        file.go_on()
        await late
        await counts.cache.load(0)
        counts._hint = 0
        second = counts.allocate(1)
        assert isinstance(second, Run)
        await image.driver.abandon()
        return first.cluster, second.cluster

    first, second = run_in_memory(main())
    assert first != second


def test_counts_of_a_block_in_two_slices_are_found_where_they_lie(tmp_path: Path) -> None:
    made = bytearray(made_image(tmp_path / "made", "cluster_size=8k,refcount_bits=64", "write -P 1 0 8k"))
    block = int.from_bytes(made[int.from_bytes(made[48:56], "big") :][:8], "big")
    made[block + 8 * 600 : block + 8 * 601] = (7).to_bytes(8, "big")

    async def main() -> None:
        stage = await staged(bytes(made))
        await stage.counts.cache.load(1)
        assert [count_of(stage.counts, cluster) for cluster in (0, 599, 600, 601)] == [1, 0, 7, 0]

    run_in_memory(main())
