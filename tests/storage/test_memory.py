"""MemoryFile keeps the promises of BlockFile."""

from __future__ import annotations

import asyncio

from nbdimg.storage.file import BlockFile
from nbdimg.storage.memory import MemoryFile


def read(file: BlockFile, offset: int, length: int) -> bytes:
    view = memoryview(bytearray(b"\xaa" * length))
    asyncio.run(file.pread(offset, view))
    return bytes(view)


def test_read_across_the_end_gives_zeroes_behind_it() -> None:
    file = MemoryFile(b"abcd")
    assert read(file, 2, 4) == b"cd\0\0"
    assert read(file, 100, 3) == b"\0\0\0"
    assert read(file, 0, 0) == b""


def test_write_behind_the_end_grows_the_file_over_zeroes() -> None:
    file = MemoryFile(b"ab")
    asyncio.run(file.pwrite(5, b"xy"))
    assert bytes(file.content) == b"ab\0\0\0xy"
    assert file.size == 7


def test_write_inside_keeps_the_size() -> None:
    file = MemoryFile(b"abcdef")
    assert file.try_pwrite(1, memoryview(b"XY"))
    assert bytes(file.content) == b"aXYdef"


def test_zero_and_punch_keep_the_size() -> None:
    file = MemoryFile(b"abcdef")
    assert asyncio.run(file.zero(4, 10))
    assert asyncio.run(file.punch(0, 2))
    assert asyncio.run(file.zero(100, 10))
    assert bytes(file.content) == b"\0\0cd\0\0"


def test_truncate_shortens_and_grows() -> None:
    file = MemoryFile(b"abcdef")
    asyncio.run(file.truncate(3))
    assert bytes(file.content) == b"abc"
    asyncio.run(file.truncate(5))
    assert bytes(file.content) == b"abc\0\0"


def test_all_of_it_is_data() -> None:
    assert MemoryFile(bytes(100)).try_data_extent(50) == (True, 100)
