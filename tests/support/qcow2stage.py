"""A qcow2 image in memory whose file calls stop where a test wants them to, and requests by guest cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from nbdimg.export.export import Export
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.formats.qcow2.refcount import Refcounts
from nbdimg.image.driver import Miss
from nbdimg.storage.file import Buffer
from nbdimg.storage.memory import MemoryFile
from nbdimg.wire.constants import Command, CommandFlag
from nbdimg.wire.messages import Request
from tests.support.interleave import NeverConflicting, open_template
from tests.support.qcow2edit import QemuReport, qemu_check, qemu_img, qemu_io

CLUSTER = 4096
SIZE = 64 * CLUSTER
CLEAN = (0, 0, 0)


def count_of(counts: Refcounts, cluster: int) -> int | Miss:
    """A cluster's refcount as memory has it (R1)."""
    found = counts.counts_from(cluster)
    if isinstance(found, Miss):
        return found
    first, entries = found
    return entries[cluster - first]


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


def made_image(path: Path, options: str = f"cluster_size={CLUSTER}", *writes: str) -> bytes:
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(SIZE))
    qemu_io(path, *writes)
    return path.read_bytes()


def numbered_image(path: Path) -> bytes:
    """Guest clusters 0 to 7 hold their number + 1."""
    return made_image(path, f"cluster_size={CLUSTER}", *(f"write -P {n + 1} {n * 4}k 4k" for n in range(8)))


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
