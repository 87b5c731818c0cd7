"""Thousands of mutants of whole images: each is served or refused, in bounded time and memory, and that is all.

Fields of headers, region tables, metadata, BAT, bitmaps and log become values at the edges of what they may be;
checksums are put right again, so that what they guard is reached.
"""

from __future__ import annotations

import asyncio
import os
import random
import struct
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from nbdimg.errors import NbdimgError
from nbdimg.formats import open_file
from nbdimg.formats.options import OpenOptions
from nbdimg.image.image import Image
from tests.formats.vhdx import craft
from tests.formats.vhdx.craft import LOG_GUID, K, M
from tests.formats.vhdx.test_bat import OneGate
from tests.support.mutants import CPU_MAX_S, MEMORY_MAX, check_located, complaint
from tests.support.qcow2mutants import BoundedFile
from tests.support.vhdximages import BAT_OFFSET, FULL, IS_FIXED, UNMAPPED, ZERO, Builder

COUNT = int(os.environ.get("NBDIMG_MUTANTS", "5200"))
"""Mutants, half of them read and half of them written to. More are tried with NBDIMG_MUTANTS."""
CHUNKS = 10
TRACED_EACH = 51
READ = 64 * K
SIZE = 2 * M + 64 * K

HEADERS, TABLES, ITEMS = (64 * K, 128 * K), (192 * K, 256 * K), 2 * M
SEALED = tuple((at, 4 * K) for at in HEADERS) + tuple((at, 64 * K) for at in TABLES)
"""(offset, length) of what has a checksum in its bytes 4 to 7."""

Field = tuple[int, int, int]
"""Offset, bytes, weight."""

FIELDS: tuple[Field, ...] = (
    *(
        (at + offset, size, 2)
        for at in HEADERS
        for offset, size in ((0, 4), (8, 8), (48, 8), (64, 2), (66, 2), (68, 4))
    ),
    *((at + 72, 8, 3) for at in HEADERS),
    *(
        (at + offset, size, 2)
        for at in TABLES
        for offset, size in ((8, 4), (32, 8), (40, 4), (44, 4), (64, 8), (72, 4))
    ),
    (ITEMS, 8, 1),
    (ITEMS + 10, 2, 3),
    *((ITEMS + 32 * n + offset, 4, 2) for n in range(1, 7) for offset in (0, 16, 20, 24)),
    (ITEMS + 64 * K, 4, 8),
    (ITEMS + 64 * K + 4, 4, 6),
    (ITEMS + 64 * K + 8, 8, 8),
    (ITEMS + 64 * K + 16, 4, 4),
    (ITEMS + 64 * K + 20, 4, 2),
    *((ITEMS + 64 * K + 40 + n, 2, 1) for n in range(0, 120, 2)),
    *((BAT_OFFSET + 8 * n, 8, 20) for n in (0, 1, 2, 4096)),
    *((M + n, 4, 2) for n in range(0, 128, 4)),
)
PLACES = (0, M, 2 * M, 3 * M, 4 * M, 5 * M, 6 * M, 100 * M, 1 << 40, 1 << 48, 1 << 63, (1 << 64) - M)


@cache
def parent() -> bytes:
    below = Builder(SIZE)
    below.add_guest(b"\x11" * SIZE)
    return bytes(below.content)


def _dynamic() -> Builder:
    builder = Builder(SIZE)
    builder.add_full(0, b"\x22" * M)
    builder.set_block(1, ZERO)
    return builder


def _fixed() -> Builder:
    builder = Builder(SIZE, flags=IS_FIXED)
    builder.add_guest(b"\x33" * SIZE)
    return builder


def _child() -> Builder:
    builder = Builder(SIZE, parent=".\\parent.vhdx")
    builder.add_partial(0, b"\x44" * M, ((1, 9), (100, 101)))
    builder.set_block(2, UNMAPPED)
    return builder


def _logged() -> Builder:
    """Its log puts block 1 in place."""
    builder = _dynamic()
    block = builder.append(b"\x55" * M, M)
    page = bytearray(builder.content[BAT_OFFSET : BAT_OFFSET + 4 * K])
    struct.pack_into("<Q", page, 8, block | FULL)
    size = len(builder.content)
    entry = craft.entry(9, 0, (BAT_OFFSET, bytes(page)), (BAT_OFFSET + 64 * K, 64 * K), flushed=size, last=size)
    builder.content[M : M + len(entry)] = entry
    builder.content[128 * K : 132 * K] = craft.header(3, log_guid=LOG_GUID)
    return builder


BASES: dict[str, Callable[[], Builder]] = {"dynamic": _dynamic, "fixed": _fixed, "child": _child, "log in use": _logged}


@cache
def base(name: str) -> bytes:
    return bytes(BASES[name]().content)


@dataclass(frozen=True, slots=True)
class Mutant:
    name: str
    seed: int
    content: bytes | bytearray
    changes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}: {'; '.join(self.changes)}"


def _value(generator: random.Random, old: int, size: int) -> int:
    match generator.randrange(6):
        case 0:
            value = generator.choice((0, 1, 2, 7, 8, 511, 512, 4096, 65536, (1 << 8 * size) - 1, 1 << 8 * size - 1))
        case 1:
            value = old + generator.choice((-1, 1, -512, 512, -M, M))
        case 2:
            value = generator.choice(PLACES) | generator.choice((0, 1, 2, 3, 4, 6, 7, 7, 6, 8))
        case 3:
            value = old ^ 1 << generator.randrange(8 * size)
        case 4:
            value = generator.choice((old & 7, FULL)) | generator.choice(PLACES)
        case _:
            value = generator.getrandbits(8 * size)
    return value & (1 << 8 * size) - 1


def mutant(seed: int) -> Mutant:
    """Of one base or the other; checksums are right in three of four."""
    generator = random.Random(seed)
    name = list(BASES)[seed % len(BASES)]
    content = bytearray(base(name))
    changes = []
    weights = [weight for _, _, weight in FIELDS]
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        ((at, size, _),) = generator.choices(FIELDS, weights)
        value = _value(generator, int.from_bytes(content[at : at + size], "little"), size)
        content[at : at + size] = value.to_bytes(size, "little")
        changes.append(f"{size} bytes at {at} = {value:#x}")
        if any(start <= at < start + 64 * K for start in TABLES) and generator.random() < 0.7:
            content[TABLES[1] : TABLES[1] + 64 * K] = content[TABLES[0] : TABLES[0] + 64 * K]
    if generator.random() < 0.75:
        for at, length in SEALED:
            content[at : at + length] = craft.sealed(content[at : at + length])
        if name == "log in use":
            content[M : M + 8 * K] = craft.sealed(content[M : M + 8 * K])
    if generator.random() < 0.06:
        del content[generator.choice((0, 1, 64 * K, 192 * K, M, 2 * M, 3 * M, 3 * M + 8, 4 * M, 5 * M - 1)) :]
        changes.append(f"cut to {len(content)}")
    return Mutant(name, seed, content, tuple(changes))


async def opened(file: BoundedFile, *, writable: bool) -> Image:
    return await open_file(file, "vhdx", OpenOptions(OneGate(parent()), writable=writable))


def places(image: Image) -> list[int]:
    """Offsets of what is read: the edges of the first blocks, and the end."""
    found = [start for start in (0, M - READ // 2, 2 * M - READ // 2, image.size - READ) if 0 <= start < image.size]
    return found or [0]


async def read_only(each: Mutant) -> None:
    file = BoundedFile(each.content, writable=False)
    image = await opened(file, writable=False)
    for start in places(image):
        count = min(READ, image.size - start)
        try:
            await image.map(start, count, 100)
            check_located(image.driver, start)
            await image.read(start, memoryview(bytearray(count)))
        except (NbdimgError, OSError):
            continue
    await image.close()
    assert file.content == each.content, "opening read-only changed the file"


async def change(each: Mutant) -> None:
    image = await opened(BoundedFile(each.content), writable=True)
    generator = random.Random(each.seed)
    try:
        for step in range(6):
            start = generator.choice(places(image))
            length = min(generator.choice((1, 512, 4096, 9000)), image.size - start)
            try:
                match generator.randrange(4):
                    case 0 | 1:
                        await image.write(start, b"x" * length)
                    case 2:
                        await image.zero(start, length, may_unmap=bool(step & 1), is_fast_only=False)
                    case _:
                        await image.trim(start & -M, min(M, image.size - (start & -M)))
                if step == 3:
                    await image.flush()
            except (NbdimgError, OSError):
                continue
    finally:
        await image.close()


Visit = Callable[[Mutant], Coroutine[Any, Any, None]]
VISITS: tuple[Visit, ...] = (read_only, change)


def judged(each: Mutant, visit: Visit, *, is_traced: bool) -> str | None:
    """The mutant's own copies count as memory of the test."""
    return complaint(each, visit, is_traced=is_traced, own_bytes=3 * len(each.content))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_mutant_is_served_or_refused_within_bounds(chunk: int) -> None:
    count = COUNT // CHUNKS
    found = []
    for seed in range(chunk * count, (chunk + 1) * count):
        visit = VISITS[seed // len(BASES) % 2]
        text = judged(mutant(seed), visit, is_traced=seed % TRACED_EACH == 0)
        if text:
            found.append(text)
    assert found == []


def test_control_unmutated_bases_are_served() -> None:
    for name in BASES:
        for visit in VISITS:
            asyncio.run(visit(Mutant(name, 1, base(name), ())))


def test_control_many_mutants_get_past_the_open() -> None:
    done = 0
    for seed in range(120):
        try:
            asyncio.run(read_only(mutant(seed)))
        except NbdimgError:
            continue
        done += 1
    assert 30 < done < 110


def test_control_other_errors_time_memory_and_writes_are_caught() -> None:
    each = Mutant("dynamic", 0, base("dynamic"), ("none",))

    async def planted(each: Mutant) -> None:
        raise ValueError("planted")

    async def slow(each: Mutant) -> None:
        until = time.process_time() + 1.1 * CPU_MAX_S
        while time.process_time() < until:
            pass

    async def large(each: Mutant) -> None:
        bytearray(MEMORY_MAX + 4 * len(each.content))

    async def writes(each: Mutant) -> None:
        BoundedFile(each.content, writable=False).try_pwrite(0, b"x")

    assert "ValueError: planted" in (judged(each, planted, is_traced=False) or "")
    assert " s" in (judged(each, slow, is_traced=False) or "")
    assert "MiB" in (judged(each, large, is_traced=True) or "")
    assert "AssertionError" in (judged(each, writes, is_traced=False) or "")
    assert judged(each, read_only, is_traced=False) is None
