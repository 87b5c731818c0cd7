"""EncryptedFile against a plain file in memory."""

from __future__ import annotations

import asyncio
import random

import pytest
from cryptography.hazmat.primitives.ciphers import modes

from nbdimg.formats.qcow2.ciphers import SECTOR_SIZE, XtsCipher, plain64_ivs
from nbdimg.formats.qcow2.crypt import PIECE_SIZE, EncryptedFile
from nbdimg.storage.memory import MemoryFile
from tests.formats.qcow2.test_ciphers import KEY_64, reference
from tests.support.faultfile import FaultFile

SHIFT = -3
FIRST = 8 * SECTOR_SIZE
"""Tests stay behind this offset, so that shifted sectors are positive."""


def encrypted(content: bytes, *, shift: int = 0) -> MemoryFile:
    """A file in memory whose plaintext is `content`, from FIRST on, made without the code under test."""
    sector = FIRST // SECTOR_SIZE + shift
    return MemoryFile(bytes(FIRST) + reference(modes.XTS, KEY_64, sector, content))


def opened(inner: MemoryFile | FaultFile, shift: int = 0) -> EncryptedFile:
    return EncryptedFile(inner, XtsCipher("x", KEY_64, plain64_ivs), shift)


def read(file: EncryptedFile, offset: int, length: int, *, inline: bool) -> bytes:
    view = memoryview(bytearray(b"\xaa" * length))
    if inline:
        assert file.try_pread(FIRST + offset, view)
    else:
        asyncio.run(file.pread(FIRST + offset, view))
    return bytes(view)


def write(file: EncryptedFile, offset: int, data: bytes, *, inline: bool) -> None:
    if inline:
        assert file.try_pwrite(FIRST + offset, data)
    else:
        asyncio.run(file.pwrite(FIRST + offset, data))


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("shift", [0, SHIFT])
def test_random_reads_and_writes_give_what_a_plain_file_gives(inline: bool, shift: int) -> None:
    seed = 20
    rng = random.Random(seed)
    plain = bytearray(rng.randbytes(16 * SECTOR_SIZE))
    inner = encrypted(bytes(plain), shift=shift)
    file = opened(inner, shift)
    for step in range(150):
        offset, length = rng.randrange(len(plain)), rng.choice([0, 1, 16, 511, 512, 513, 1024, 3000])
        length = min(length, len(plain) - offset)
        if rng.random() < 0.5:
            offset, length = offset & ~511, length & ~511
        if rng.random() < 0.5:
            plain[offset : offset + length] = data = rng.randbytes(length)
            write(file, offset, data, inline=inline)
        else:
            assert read(file, offset, length, inline=inline) == plain[offset : offset + length], (seed, step)
    assert inner.content == encrypted(bytes(plain), shift=shift).content, seed


@pytest.mark.parametrize(("offset", "length"), [(0, 3 * PIECE_SIZE), (0, PIECE_SIZE + 512), (700, 2 * PIECE_SIZE + 99)])
def test_run_longer_than_a_piece_is_refused_inline_and_done_by_workers(offset: int, length: int) -> None:
    plain = bytearray(random.Random(4).randbytes(4 * PIECE_SIZE))
    inner = encrypted(bytes(plain), shift=SHIFT)
    before, file = bytes(inner.content), opened(inner, SHIFT)
    assert read(file, offset, length, inline=False) == plain[offset : offset + length]
    data = random.Random(5).randbytes(length)
    assert not file.try_pread(FIRST + offset, memoryview(bytearray(length)))
    assert not file.try_pwrite(FIRST + offset, data)
    assert inner.content == before
    write(file, offset, data, inline=False)
    plain[offset : offset + length] = data
    assert inner.content == encrypted(bytes(plain), shift=SHIFT).content


@pytest.mark.parametrize(("offset", "length"), [(0, 512), (100, 50)])
def test_inline_try_says_no_where_the_inner_file_does(offset: int, length: int) -> None:
    inner = encrypted(bytes(4 * SECTOR_SIZE))
    before, file = bytes(inner.content), opened(FaultFile(inner, slow_only=True))
    assert not file.try_pread(FIRST + offset, memoryview(bytearray(length)))
    assert not file.try_pwrite(FIRST + offset, bytes(length))
    assert inner.content == before


def test_inline_write_reads_only_the_sectors_that_it_covers_in_part() -> None:
    inner = FaultFile(encrypted(bytes(8 * SECTOR_SIZE)))
    file = opened(inner)
    for offset, length, reads in [(0, 1024, 0), (100, 0, 0), (0, 1000, 1), (100, 50, 1), (100, 924, 1), (100, 1000, 2)]:
        inner.calls.clear()
        assert file.try_pwrite(FIRST + offset, bytes(length))
        assert inner.calls == ["try_pread"] * reads + ["try_pwrite"], (offset, length)


def test_shifted_view_reads_under_other_sector_numbers() -> None:
    plain = random.Random(6).randbytes(2 * SECTOR_SIZE)
    file = opened(encrypted(plain, shift=SHIFT))
    assert read(file.shifted(SHIFT), 0, len(plain), inline=True) == plain
    assert read(file.shifted(SHIFT - 1).shifted(1), 0, len(plain), inline=True) == plain
    assert read(file, 0, len(plain), inline=True) != plain  # control


def test_zeroing_and_punching_are_refused_and_all_is_data() -> None:
    inner = encrypted(bytes(4 * SECTOR_SIZE))
    before, file = bytes(inner.content), opened(inner)
    assert not asyncio.run(file.zero(FIRST, SECTOR_SIZE))
    assert not asyncio.run(file.punch(FIRST, SECTOR_SIZE))
    assert inner.content == before
    assert file.try_data_extent(FIRST) == (True, len(before))
    assert file.size == len(before)


def test_read_beyond_the_end_gives_noise_that_a_write_beside_it_keeps() -> None:
    file = opened(encrypted(b""))
    noise = read(file, 0, 2 * SECTOR_SIZE, inline=True)
    assert reference(modes.XTS, KEY_64, FIRST // SECTOR_SIZE, noise) == bytes(2 * SECTOR_SIZE)
    write(file, 100, b"written", inline=False)
    assert read(file, 0, 2 * SECTOR_SIZE, inline=False) == noise[:100] + b"written" + noise[107:]


def test_other_calls_reach_the_inner_file() -> None:
    inner = FaultFile(encrypted(bytes(SECTOR_SIZE)))
    file = opened(inner)
    asyncio.run(file.fdatasync())
    asyncio.run(file.truncate(SECTOR_SIZE))
    asyncio.run(file.prefetch(0, SECTOR_SIZE))
    asyncio.run(file.close())
    assert inner.calls == ["fdatasync", "truncate", "prefetch"]
    assert (file.path, file.is_writable, file.size) == ("memory", True, SECTOR_SIZE)
