"""Races that have lost data in other implementations, each played out with file calls that wait for the test.

Where a race is decided by one rule of ours, a control takes the rule away and sees the damage. Names in brackets are
the public reports: cloud-hypervisor's issues by number; A and B are two that QEMU has.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from nbdimg.errors import CorruptImage
from nbdimg.export.export import Export
from nbdimg.export.inflight import Entry, InFlight
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.formats.qcow2.refcount import Refcounts, Run
from nbdimg.image.driver import Miss
from nbdimg.storage.file import Buffer
from nbdimg.storage.memory import MemoryFile
from nbdimg.wire.constants import Command, CommandFlag
from nbdimg.wire.messages import Request
from tests.support.faultfile import os_error
from tests.support.interleave import open_template, read_all, run_in_memory
from tests.support.qcow2edit import QemuReport, qemu_check, qemu_img, qemu_io

CLUSTER = 4096
SIZE = 64 * CLUSTER
CLEAN = (0, 0, 0)


class StoppableFile(MemoryFile):
    """Waiting calls that `stops(name, offset)` is true of take effect and return when `go_on` lets them."""

    def __init__(self, content: Buffer) -> None:
        super().__init__(content)
        self.stops: Callable[[str, int], bool] = lambda name, offset: False
        self.stopped: list[tuple[str, int, asyncio.Future[None]]] = []
        self.is_slow = True
        self.writes: list[tuple[int, bytes]] = []

    async def _pass(self, name: str, offset: int) -> None:
        if self.stops(name, offset):
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.stopped.append((name, offset, future))
            await future

    def stop_no_more(self) -> None:
        """One call has been stopped; all others pass."""
        assert len(self.stopped) == 1
        self.stops = lambda name, offset: False

    def go_on(self) -> None:
        for _, _, future in self.stopped:
            future.set_result(None)
        self.stopped.clear()

    def try_pread(self, offset: int, view: memoryview) -> bool:
        return not self.is_slow and super().try_pread(offset, view)

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        if self.is_slow:
            return False
        self.writes.append((offset, bytes(data)))
        return super().try_pwrite(offset, data)

    async def pread(self, offset: int, view: memoryview) -> None:
        await self._pass("pread", offset)
        super().try_pread(offset, view)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        await self._pass("pwrite", offset)
        self.writes.append((offset, bytes(data)))
        super().try_pwrite(offset, data)

    async def punch(self, offset: int, length: int) -> bool:
        await self._pass("punch", offset)
        return await super().zero(offset, length)


class NeverConflicting(InFlight):
    """The control's queue: everything runs at once."""

    def _conflicting(self, start: int, stop: int, is_exclusive: bool) -> Iterator[Entry]:
        return iter(())


class Stage:
    """An image that is served from memory, and requests by guest cluster. Data is named by one byte."""

    def __init__(self, file: StoppableFile, export: Export) -> None:
        self.file = file
        self.export = export
        driver = export.image.driver
        assert isinstance(driver, Qcow2Driver)
        assert driver.refcounts is not None
        self.driver = driver
        self.counts = driver.refcounts

    def write(self, cluster: int, value: int, *, offset: int = 0, length: int = CLUSTER) -> asyncio.Task[object]:
        payload = memoryview(bytes([value]) * length)
        return self._start(Request(Command.WRITE, 0, 1, cluster * CLUSTER + offset, length, payload))

    def trim(self, cluster: int) -> asyncio.Task[object]:
        return self._start(Request(Command.TRIM, 0, 1, cluster * CLUSTER, CLUSTER))

    def zero(self, cluster: int) -> asyncio.Task[object]:
        return self._start(Request(Command.WRITE_ZEROES, CommandFlag.NO_HOLE, 1, cluster * CLUSTER, CLUSTER))

    def flush(self) -> asyncio.Task[object]:
        return self._start(Request(Command.FLUSH, 0, 1, 0, 0))

    def _start(self, request: Request) -> asyncio.Task[object]:
        async def done() -> object:
            return None

        work = self.export.submit(request)
        return asyncio.get_running_loop().create_task(work if work is not None else done())

    def read(self, cluster: int) -> asyncio.Task[bytes]:
        async def whole() -> bytes:
            view = memoryview(bytearray(CLUSTER))
            for segment in await self.export.read(cluster * CLUSTER, view):
                assert not segment.is_hole or not any(view[: segment.length])
            return bytes(view)

        return asyncio.get_running_loop().create_task(whole())

    def host(self, cluster: int) -> int:
        """Where a cluster's data lies in the file; its table is resident."""
        extent = self.driver.map(cluster * CLUSTER, (cluster + 1) * CLUSTER)
        assert not isinstance(extent, Miss)
        return extent.file_offset

    def stop_at(self, name: str, cluster: int) -> None:
        """Data calls on a cluster's present place wait."""
        host = self.host(cluster)
        self.file.stops = lambda called, offset: called == name and host <= offset < host + CLUSTER

    async def close(self) -> bytes:
        await self.export.close()
        return bytes(self.file.content)


async def settle() -> None:
    for _ in range(60):
        await asyncio.sleep(0)


def _image(path: Path, options: str = f"cluster_size={CLUSTER}", *writes: str) -> bytes:
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(SIZE))
    qemu_io(path, *writes)
    return path.read_bytes()


@pytest.fixture
def image(tmp_path: Path) -> bytes:
    """Guest clusters 0 to 7 hold their number + 1."""
    return _image(tmp_path / "made", f"cluster_size={CLUSTER}", *(f"write -P {n + 1} {n * 4}k 4k" for n in range(8)))


async def staged(content: bytes, *, is_ordered: bool = True) -> Stage:
    file = StoppableFile(content)
    export = Export("disk", await open_template(file, {}), payload_max=1 << 20)
    if not is_ordered:
        export.inflight = NeverConflicting()
    stage = Stage(file, export)
    await stage.read(0)
    return stage


def checked(path: Path, content: bytes) -> QemuReport:
    path.write_bytes(content)
    return qemu_check(path)


def summary(report: QemuReport) -> tuple[int, int, int]:
    return report.exit_status, report.corruptions, report.leaks


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
        in_use = [cluster for cluster in range(counts.end) if counts.count(cluster)]
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
            assert bool(counts.count(cluster)) == (cluster in used), f"cluster {cluster}"
        assert len(own) > 100

    run_in_memory(main())


def test_image_of_every_instant_opens_and_allocates_over_nothing(tmp_path: Path) -> None:
    """L2 tables of small clusters are made one after the other; the file as of each write is opened, filled, checked.

    What was durable at that write must be there, whatever the new writes took.
    """
    made = _image(tmp_path / "made", "cluster_size=512", "write -P 9 0 512")

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
    before = sum(bool(counts.count(cluster)) for cluster in range(2000))
    file.capacity = len(file.content)
    for number in range(1000):
        with pytest.raises(OSError, match="No space"):
            await image.write((30 + number % 20) * CLUSTER + number % 3 * 100, b"\xff" * (1000 + number % 2 * CLUSTER))
    await image.write(3 * CLUSTER, b"\x33" * CLUSTER)
    await image.flush()
    after = sum(bool(counts.count(cluster)) for cluster in range(2000))
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
    made = _image(tmp_path / "made", options, "write -P 1 0 32k")

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
