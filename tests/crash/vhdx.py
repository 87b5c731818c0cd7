"""The VHDX writer, crashed: one scenario for each kind of file, and for each way in which its log is used.

Blocks of 1 MiB are the smallest there are, so disks have two or three: each state reads all of it.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nbdimg.formats import open_file
from nbdimg.formats.options import OpenOptions
from nbdimg.formats.vhdx.driver import VhdxDriver
from nbdimg.image.gate import Reference
from nbdimg.image.image import Image
from nbdimg.storage.memory import MemoryFile
from tests.crash.images import pattern
from tests.crash.workloads import KiB, Workload, sizes
from tests.support.crash import (
    SECTOR,
    Built,
    Client,
    CrashState,
    ExportTarget,
    RecordingFile,
    Scenario,
    Target,
    requests,
)
from tests.support.crash.expectations import fingerprints
from tests.support.crash.explore import shown
from tests.support.reading import read_all
from tests.support.vhdximages import IS_FIXED, UNMAPPED, Builder, flattened, run

M = 1 << 20
SHORT = M + 64 * KiB
"""Size of most disks: a block and a short one."""

PEER_EVERY = 40
"""Of the states that were recovered, or closed in order, one in so many is checked and read by others as well."""

CHILD_SERIAL = 1 << 61
"""Of the sectors that a child holds at first; its parent's have serial 0."""


class ParentGate:
    """Opens the parent, whatever it is called."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def open(self, reference: Reference) -> MemoryFile:
        return MemoryFile(self._content, "parent.vhdx", writable=False)


class Judge:
    """Others on a state that has no log: qemu-img on a file without a parent, 7-Zip on one with it (which cannot read
    behind the end of a shorter parent, and is not asked then). They are asked for one state in PEER_EVERY.
    """

    def __init__(self, parent: bytes, *, is_silent: bool) -> None:
        self._parent = parent
        self._is_silent = is_silent
        self._count = 0
        self.asked = 0

    async def __call__(self, state: CrashState) -> list[str]:
        if self._is_silent or not state.is_recovered:
            return []
        self._count += 1
        if self._count % PEER_EVERY:
            return []
        self.asked += 1
        content = state.files[0]
        image = await opened(MemoryFile(content, writable=False), self._parent, writable=False)
        guest = await read_all(image)
        try:
            found = self._ask(content, len(guest))
        except AssertionError as error:
            return [f"{error}"]
        wrong = [
            index
            for index, (ours, theirs) in enumerate(zip(fingerprints(bytes(guest)), fingerprints(found), strict=True))
            if ours != theirs
        ]
        return [f"sectors {shown(wrong)} are read otherwise by others"] if wrong else []

    def _ask(self, content: bytes, size: int) -> bytes:
        """The disk as others read it. Raises: AssertionError: they refuse it."""
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            path, raw = directory / "disk.vhdx", directory / "disk.raw"
            path.write_bytes(content)
            if self._parent:
                (directory / "parent.vhdx").write_bytes(self._parent)
                return flattened(path)[:size]
            run("qemu-img", "check", "-q", path)
            run("qemu-img", "convert", "-f", "vhdx", "-O", "raw", path, raw)
            return raw.read_bytes()


async def opened(file: RecordingFile | MemoryFile, parent: bytes, *, writable: bool) -> Image:
    """The file grows by no more than is asked for: all of it is in memory, in each state."""
    image = await open_file(file, "vhdx", OpenOptions(ParentGate(parent), writable=writable))
    space = driver_of(image)._space
    if space is not None:
        space._growth = M
    return image


def driver_of(image: Image) -> VhdxDriver:
    assert isinstance(image.driver, VhdxDriver)
    return image.driver


def scenario(
    name: str,
    built: Built,
    workload: Workload,
    *,
    parent: Built | None = None,
    entry_length_max: int | None = None,
) -> Scenario:
    """entry_length_max: of a log entry, so small that a flush takes several."""
    below = parent.files[0] if parent else b""
    is_shorter = parent is not None and len(parent.guest) < len(built.guest)

    async def open_it(files: Sequence[RecordingFile]) -> Target:
        driver = driver_of(image := await opened(files[0], below, writable=True))
        assert driver._journal is not None
        if entry_length_max is not None:
            driver._journal._entry_length_max = entry_length_max
        return ExportTarget(image)

    return Scenario(f"vhdx, {name}", lambda rng: built, open_it, workload, Judge(below, is_silent=is_shorter))


# Images


def plain(size: int, *, filled: Sequence[int], flags: int = 0) -> Built:
    """A disk whose blocks `filled` hold data."""
    guest = bytearray(size)
    builder = Builder(size, flags=flags)
    for block in filled:
        data = pattern(size)[block * M : (block + 1) * M]
        guest[block * M : block * M + len(data)] = data
        builder.add_full(block, data)
    return Built([bytes(builder.content)], bytes(guest))


def overlay(size: int, parent_size: int, *, is_used: bool) -> tuple[Built, Built]:
    """(a child, its parent). `is_used`: the child has one block with sectors of its own, and one unmapped."""
    below = pattern(parent_size, gap=5)
    parent = Builder(parent_size)
    parent.add_guest(below)
    guest = bytearray(below[:size].ljust(size, b"\0"))
    child = Builder(size, parent=".\\parent.vhdx")
    if is_used:
        own = pattern(size, CHILD_SERIAL)[:M]
        runs = ((8, 24), (100, 101), (1000, 2000))
        child.add_partial(0, own, runs)
        for first, stop in runs:
            guest[first * SECTOR : stop * SECTOR] = own[first * SECTOR : stop * SECTOR]
        child.set_block(1, UNMAPPED)
        guest[M : 2 * M] = bytes(M)
    return Built([bytes(child.content)], bytes(guest)), Built([bytes(parent.content)], below)


# What guests do


def near(count: int, requests_each: int, *, flushes: float = 0.15, wholes: float = 0.1) -> Workload:
    """Connections that keep to a few KiB around the edges of blocks; of their requests `wholes` are a trim, or zeroes,
    of a whole block.
    """

    async def one(client: Client, rng: random.Random) -> None:
        blocks = -(-client.size // M)
        for _ in range(requests_each):
            block = rng.randrange(blocks)
            choice = rng.random()
            if choice < wholes:
                give_up = client.trim if rng.random() < 0.6 else client.zero
                await give_up(block * M, min(M, client.size - block * M))
            elif choice < wholes + flushes:
                await client.flush()
            else:
                start = max(0, block * M + rng.choice((-16, -4, 0, 3, 8, 70)) * SECTOR)
                length = min(rng.randint(1, 12) * SECTOR, client.size - start)
                if rng.random() < 0.75:
                    await client.write(start, client.pattern(start, length), is_durable=rng.random() < 0.06)
                else:
                    await client.zero(start, length, may_unmap=rng.random() < 0.5)

    async def workload(client: Client, rng: random.Random) -> None:
        each = [random.Random(rng.random()) for _ in range(count)]
        await asyncio.gather(*(one(client, own) for own in each))

    return workload


def handed_on(rounds: int) -> Workload:
    """What one block gives up, the next takes: whole blocks go, a flush, and others are written in their place."""

    async def workload(client: Client, rng: random.Random) -> None:
        blocks = client.size // M
        for _ in range(rounds):
            gone, new = rng.sample(range(blocks), 2)
            await (client.trim if rng.random() < 0.6 else client.zero)(gone * M, M)
            if rng.random() < 0.8:
                await client.flush()
            start = new * M + rng.choice((0, 5, 2000)) * SECTOR
            writes = [client.write(start, client.pattern(start, 4 * SECTOR))]
            await asyncio.gather(*writes, *([client.flush()] if rng.random() < 0.5 else []))

    return workload


def wrapping(before: Workload, left: int) -> Workload:
    """The log's next entry begins `left` bytes before the end of the ring, again and again.

    Not while the newest one may lie where it goes, which no journal overwrites (V6): they have 8 KiB at most here, and
    the newest one ends at the position.
    """

    async def workload(client: Client, rng: random.Random) -> None:
        assert isinstance(client.target, ExportTarget)
        journal = driver_of(client.target.image)._journal
        assert journal is not None
        for _ in range(4):
            await before(client, rng)
            await client.flush()
            if journal._position >= 2 * 8 * KiB - left:
                journal._position = journal._length - left

    return workload


def small_requests(count: int) -> Workload:
    async def workload(client: Client, rng: random.Random) -> None:
        await requests(client, rng, count, length_max=8 * KiB, flushes=0.2)

    return workload


def reopened(workload: Workload) -> Workload:
    """Three sessions, each with an orderly end: headers come and go."""

    async def sessions(client: Client, rng: random.Random) -> None:
        for _ in range(2):
            await workload(client, rng)
            await client.flush()
            await client.target.close()
            image = await opened(client.trace.files[0], b"", writable=True)
            client.target = ExportTarget(image)
        await workload(client, rng)

    return sessions


_three = near(3, 8)
_few = near(2, 4)
_child, _parent = overlay(2 * M, M + 512 * KiB, is_used=False)
_used, _longer = overlay(2 * M, 3 * M, is_used=True)
_used_long, _shorter = overlay(2 * M, M + 512 * KiB, is_used=True)
_dynamic = plain(SHORT, filled=(0,))

SCENARIOS = (
    scenario("dynamic", _dynamic, _three),
    scenario("dynamic, anywhere", _dynamic, small_requests(25)),
    scenario("space handed on", plain(3 * M, filled=(0, 1)), handed_on(8)),
    scenario("fixed", plain(SHORT, filled=(0, 1), flags=IS_FIXED), _three),
    scenario("child", _child, _three, parent=_parent),
    scenario("child in use", _used, near(2, 10), parent=_longer),
    scenario("several entries for a flush", _child, near(2, 10), parent=_parent, entry_length_max=8 * KiB),
    scenario("log wraps", _dynamic, wrapping(near(2, 4), 4 * KiB)),
    scenario("resize", plain(3 * M, filled=(0, 2)), sizes(0.4, 0.8, 1, between=_few)),
    scenario("resize, fixed", plain(SHORT, filled=(0, 1), flags=IS_FIXED), sizes(2, 0.7, 1.5, between=_few)),
    scenario("resize, child in use", _used_long, sizes(0.8, 1.4, between=_few), parent=_shorter),
    scenario("sessions", plain(SHORT, filled=()), reopened(near(2, 4))),
)
