"""Thousands of structured mutants: each is served or refused, in bounded time and memory, and nothing else happens."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from nbdimg.errors import NbdimgError
from nbdimg.formats import open_file
from nbdimg.formats.options import OpenOptions
from nbdimg.image.image import Image
from tests.support.mutants import CPU_MAX_S, MEMORY_MAX, check_located, complaint
from tests.support.qcow2mutants import AnyGate, Base, BoundedFile, Mutant, bases, mutant

COUNT = int(os.environ.get("NBDIMG_MUTANTS", "5200"))
"""Mutants in all. More are tried with NBDIMG_MUTANTS."""
FIRST_SEED = int(os.environ.get("NBDIMG_MUTANT_SEED", "0"))
CHUNKS = 13
READ_MAX = 256 << 10
TRACED_EACH = 16

Visit = Callable[[Mutant], Coroutine[Any, Any, None]]


@pytest.fixture(scope="module")
def all_bases(tmp_path_factory: pytest.TempPathFactory) -> list[Base]:
    return bases(tmp_path_factory.mktemp("bases"))


async def read_all(image: Image) -> None:
    """All of a small image, the beginning and the end of a large one."""
    parts = [(0, min(image.size, READ_MAX))]
    if image.size > READ_MAX:
        parts.append((image.size - READ_MAX, READ_MAX))
    for offset, length in parts:
        for start in range(offset, offset + length, 16 << 10):
            count = min(16 << 10, offset + length - start)
            await image.map(start, count, 100)
            check_located(image.driver, start)
            try:
                await image.read(start, memoryview(bytearray(count)))
            except (NbdimgError, OSError):
                continue


async def read_only(each: Mutant) -> None:
    file = BoundedFile(each.content, writable=False)
    image = await open_file(file, "qcow2", OpenOptions(AnyGate(each.base.external)))
    try:
        await read_all(image)
    finally:
        await image.close()
        assert file.content == each.content, "opening read-only changed the file"


async def snapshot(each: Mutant) -> None:
    file = BoundedFile(each.content, writable=False)
    image = await open_file(file, "qcow2", OpenOptions(AnyGate(each.base.external), snapshot="1"))
    try:
        await read_all(image)
    finally:
        await image.close()


async def change(each: Mutant) -> None:
    generator = random.Random(each.seed)
    options = OpenOptions(AnyGate(each.base.external), writable=True)
    image = await open_file(BoundedFile(each.content), "qcow2", options)
    try:
        for step in range(6):
            if not image.size:
                break
            offset = generator.randrange(min(image.size, 64 << 10))
            length = min(generator.choice((1, 512, 3000, 9000)), image.size - offset)
            try:
                match generator.randrange(4):
                    case 0 | 1:
                        data = b"x" * length
                        if not (step % 2 and image.try_write(offset, memoryview(data))):
                            await image.write(offset, data)
                    case 2:
                        await image.zero(offset, length, may_unmap=bool(step & 1), is_fast_only=False)
                    case _:
                        await image.trim(offset, length)
                if step == 3:
                    await image.flush()
            except (NbdimgError, OSError):
                continue
    finally:
        await image.close()


VISITS: tuple[Visit, ...] = (read_only, change)


def complaints(all_bases: list[Base], seeds: range) -> list[str]:
    found = []
    for seed in seeds:
        base = all_bases[seed % len(all_bases)]
        each = mutant(base, seed)
        visits = (*VISITS, snapshot) if base.name == "snapshots" else VISITS
        for visit in visits:
            if text := complaint(each, visit, is_traced=seed % TRACED_EACH == 0):
                found.append(text)
    return found


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_mutant_is_served_or_refused_within_bounds(all_bases: list[Base], chunk: int) -> None:
    size = COUNT // CHUNKS
    first = FIRST_SEED + chunk * size
    assert complaints(all_bases, range(first, first + size)) == []


def test_control_an_unmutated_base_is_served(all_bases: list[Base]) -> None:
    for base in all_bases:
        for visit in VISITS:
            asyncio.run(visit(Mutant(base, 1, base.content, ())))


def test_control_most_mutants_differ_and_many_get_past_the_header(all_bases: list[Base]) -> None:
    opened = 0
    seeds = range(200)
    mutants = [mutant(all_bases[seed % len(all_bases)], seed) for seed in seeds]
    assert sum(each.content != each.base.content for each in mutants) > 180
    assert [each.content for each in mutants[:3]] == [mutant(each.base, each.seed).content for each in mutants[:3]]
    for each in mutants:
        try:
            asyncio.run(read_only(each))
        except NbdimgError:
            continue
        opened += 1
    assert 50 < opened < 190


def test_control_other_exceptions_time_memory_and_writes_are_caught(all_bases: list[Base]) -> None:
    each = Mutant(all_bases[0], 0, all_bases[0].content, ("none",))

    async def planted_error(each: Mutant) -> None:
        raise ValueError("planted")

    async def slow(each: Mutant) -> None:
        until = time.process_time() + 1.1 * CPU_MAX_S
        while time.process_time() < until:
            pass

    async def large(each: Mutant) -> None:
        bytearray(MEMORY_MAX + 1)

    async def writes(each: Mutant) -> None:
        BoundedFile(each.content, writable=False).try_pwrite(0, b"x")

    assert "ValueError: planted" in (complaint(each, planted_error, is_traced=False) or "")
    assert " s" in (complaint(each, slow, is_traced=False) or "")
    assert "MiB" in (complaint(each, large, is_traced=True) or "")
    assert "AssertionError" in (complaint(each, writes, is_traced=False) or "")
    assert complaint(each, read_only, is_traced=False) is None
