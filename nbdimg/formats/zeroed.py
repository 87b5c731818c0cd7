"""Large tables in memory that are mostly zero: what nobody has written to takes no room."""

from __future__ import annotations

from array import array
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Literal

Typecode = Literal["B", "H", "I", "Q"]
"""Of an array's items: 8, 16, 32 or 64 bits."""


def zeroed_bytes(length: int) -> mmap:
    """`length` zeroes, or one if that is 0."""
    return mmap(-1, max(1, length), flags=MAP_PRIVATE | MAP_ANONYMOUS)


def zeroed(typecode: Typecode, count: int) -> memoryview:
    """`count` zeroes of an array's type, whose slices are the same memory."""
    return memoryview(zeroed_bytes(count * array(typecode).itemsize)).cast(typecode)[:count]
