"""Thousands of damaged structures: each is read or refused with an error of our own, soon, and nothing else happens."""

from __future__ import annotations

import asyncio
import os
import random
import struct
import time
from collections.abc import Callable, Iterator

import pytest

from nbdimg.errors import NbdimgError
from nbdimg.formats.vhdx.header import load_headers
from nbdimg.formats.vhdx.locator import candidates, parse_locator
from nbdimg.formats.vhdx.metadata import load_metadata
from nbdimg.formats.vhdx.region import load_regions
from nbdimg.formats.vhdx.replay import open_replayed, replay_to_file
from nbdimg.storage.file import Buffer
from nbdimg.storage.memory import MemoryFile
from tests.formats.vhdx import craft
from tests.formats.vhdx.craft import LOG_GUID, REGIONS, SECTOR, K, M, entry, image, metadata, page, region_table, ring

COUNT = int(os.environ.get("NBDIMG_MUTANTS", "5200")) // 8
"""Of each of four kinds, for each of two ways to open."""
CPU_MAX_S = 2.0
SIZE_MAX = 16 * M

WORDS = (0, 1, 2, 7, 8, 0x1000, 0x10000, M, M - 1, M + 1, 2 * M, 3 * M, 1 << 31, (1 << 32) - 1, (1 << 32) - 4096)
LONGS = (*WORDS, 1 << 32, 1 << 48, (1 << 48) - M, 1 << 63, (1 << 64) - 1, (1 << 64) - M, (1 << 64) - SECTOR)

LOG = ring(
    (0, entry(10, 0, (3 * M, page(1)), (3 * M, 8 * K), flushed=M, last=5 * M)),
    (3 * SECTOR, entry(11, 0, (3 * M, page(2)), flushed=M)),
)
LENGTH = 2 * M + 66 * K
"""Of a mutant: up to the items of its metadata. Where the BAT is said to be does not matter here."""
LOCATOR = craft.locator(
    ("parent_linkage", "{f1a2b3c4-0011-2233-4455-66778899aabb}"),
    ("relative_path", "..\\p.vhdx"),
    ("absolute_win32_path", "\\\\?\\C:\\p.vhdx"),
)


META = metadata(flags=2, more=[(craft.PARENT_LOCATOR, 4, LOCATOR), (craft.UNKNOWN, 1, b"mine")])
BASES = {
    "header": bytes(image(log=bytes(LOG))[:LENGTH]),
    "region": bytes(image()[:LENGTH]),
    "metadata": bytes(image(meta=META)[:LENGTH]),
    "log": bytes(image(log=bytes(LOG), log_guid=LOG_GUID)[:LENGTH]),
}


class Bounded(MemoryFile):
    """A file that does not become huge: a hostile size is an error of the system, as on a disk."""

    async def truncate(self, size: int) -> None:
        if size > SIZE_MAX:
            raise OSError("too large")
        await super().truncate(size)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        if offset + len(data) > SIZE_MAX:
            raise OSError("too large")
        await super().pwrite(offset, data)


class Unchanging(MemoryFile):
    """A file that nothing may try to change."""

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        raise AssertionError("a write to a file that was opened read-only")

    async def truncate(self, size: int) -> None:
        raise AssertionError("a change of size")

    async def zero(self, offset: int, length: int) -> bool:
        raise AssertionError("a range made zero")


def mutate(rng: random.Random, data: bytearray, reach: int) -> None:
    """One to three changes in the first `reach` bytes: fields of interesting values, bits, copies."""
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(reach)
        kind = rng.randrange(5)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            struct.pack_into("<I", data, min(at & ~3, len(data) - 4), rng.choice(WORDS))
        elif kind == 2:
            struct.pack_into("<Q", data, min(at & ~7, len(data) - 8), rng.choice(LONGS))
        elif kind == 3:
            struct.pack_into("<H", data, min(at & ~1, len(data) - 2), rng.choice((0, 1, 2047, 2048, 0xFFFF, 0xD800)))
        else:
            source, length = rng.randrange(reach), rng.choice((4, 16, 32, 64))
            piece = data[source : source + length]
            data[at : at + len(piece)] = piece[: len(data) - at]


def sealed(data: bytearray, is_right: bool) -> bytes:
    return craft.sealed(data) if is_right else bytes(data)


def mutant(kind: str, seed: int) -> bytearray:
    """Damaged in one structure, whose checksum is right again in most."""
    rng = random.Random(f"{kind} {seed}")
    is_right = rng.random() < 0.9
    content = bytearray(BASES[kind])

    def put(offset: int, data: Buffer) -> None:
        content[offset : offset + len(data)] = data

    if kind == "header":
        data = bytearray(craft.header(2, log_guid=LOG_GUID))
        mutate(rng, data, 80)
        put(128 * K, sealed(data, is_right))
    elif kind == "region":
        data = bytearray(region_table(*REGIONS, craft.region(craft.UNKNOWN, 8 * M, flags=0)))
        mutate(rng, data, 112)
        put(192 * K, sealed(data, is_right))
        put(256 * K, rng.choice([sealed(data, is_right), bytes(64 * K)]))
    elif kind == "metadata":
        start, length = rng.choice([(2 * M, 8 * 32), (2 * M + 64 * K, 40 + len(LOCATOR))])
        data = content[start : start + length]
        mutate(rng, data, length)
        put(start, data)
    else:
        data = LOG[: 3 * SECTOR]
        mutate(rng, data, rng.choice([64, 128, 3 * SECTOR]))
        put(M, sealed(data, is_right))
    return content


async def read_only(content: bytearray) -> None:
    below = Unchanging(content, writable=False)
    file = await open_replayed(below, (await load_headers(below)).current)
    regions = await load_regions(file, (await load_headers(below)).current)
    found = await load_metadata(file, regions)
    if found.locator:
        candidates(found.locator)
    await file.pread(max(0, min(file.size, 5 * M) - 8 * K), memoryview(bytearray(8 * K)))
    file.try_data_extent(0)


async def writable(content: bytearray) -> None:
    file = Bounded(content)
    headers = await load_headers(file)
    try:
        headers = await replay_to_file(file, headers, ignore_log=True)
    except OSError:
        return
    assert not headers.current.has_log
    regions = await load_regions(file, headers.current)
    await load_metadata(file, regions)


def outcomes(kind: str, visit: Callable[[bytearray], object]) -> Iterator[bool]:
    """Whether each mutant was served."""
    for seed in range(COUNT):
        started = time.process_time()
        try:
            asyncio_run(visit, mutant(kind, seed))
            yield True
        except NbdimgError as error:
            if len(str(error)) > 1000:
                raise AssertionError(f"the message of the {kind} mutant of seed {seed} is long") from error
            yield False
        except BaseException as error:
            error.add_note(f"{kind} mutant of seed {seed}")
            raise
        assert time.process_time() - started < CPU_MAX_S, f"{kind} mutant of seed {seed}"


def asyncio_run(visit: Callable[[bytearray], object], content: bytearray) -> None:
    """A coroutine that never waits, without a loop of its own: files in memory have nothing to wait for. When it
    lets others have their turn, it gives None.
    """
    coroutine = visit(content)
    assert asyncio.iscoroutine(coroutine)
    try:
        while coroutine.send(None) is None:
            pass
    except StopIteration:
        return
    coroutine.close()
    raise AssertionError("it waited")


@pytest.mark.parametrize("kind", ["header", "region", "metadata", "log"])
def test_mutants_are_served_or_refused(kind: str) -> None:
    served = {True: 0, False: 0}
    for visit in (read_only, writable):
        for each in outcomes(kind, visit):
            served[each] += 1
    assert min(served.values()) > COUNT // 20, served


def test_mutants_of_the_locator_are_parsed_or_refused() -> None:
    parsed = 0
    for seed in range(2 * COUNT):
        rng = random.Random(seed)
        data = bytearray(LOCATOR)
        mutate(rng, data, rng.choice([56, len(data)]))
        try:
            candidates(parse_locator("x.vhdx", bytes(data[: rng.choice([len(data), rng.randrange(len(data))])]), 0))
            parsed += 1
        except NbdimgError:
            continue
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    assert COUNT // 20 < parsed < 2 * COUNT


def test_control_a_mutant_that_raises_something_else_is_reported() -> None:
    async def broken(content: bytearray) -> None:
        raise KeyError(len(content))

    with pytest.raises(KeyError) as caught:
        next(outcomes("log", broken))
    assert caught.value.__notes__ == ["log mutant of seed 0"]
