"""Tables as bytes: literal bytes of every refcount width, and 64-bit entries."""

from __future__ import annotations

import random
from array import array

import pytest

from nbdimg.formats.qcow2.packed import RefcountCodec, decode_offsets, encode_offsets

WIDTHS = [
    (0, b"\x1b\x80", [1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
    (1, b"\x1b\x80", [3, 2, 1, 0, 0, 0, 0, 2]),
    (2, b"\x1b\x80", [0xB, 1, 0, 8]),
    (3, b"\x1b\x80", [0x1B, 0x80]),
    (4, b"\x1b\x80\x00\x01", [0x1B80, 1]),
    (5, b"\x1b\x80\x00\x01\xff\xff\xff\xff", [0x1B800001, 0xFFFFFFFF]),
    (6, b"\x80\x00\x00\x00\x00\x00\x00\x01" + b"\xff" * 8, [0x8000000000000001, 0xFFFFFFFFFFFFFFFF]),
]
"""(refcount_order, bytes, counts). Spec: "Refcount blocks": less than 8 bits from the least significant bit on."""


@pytest.mark.parametrize(("order", "content", "counts"), WIDTHS)
def test_refcounts_of_every_width_are_read_and_written(order: int, content: bytes, counts: list[int]) -> None:
    codec = RefcountCodec(order)
    assert list(codec.decode(content)) == counts
    assert codec.encode(codec.decode(content)) == content
    assert list(codec.zeroes(5)) == [0] * 5
    zeroes = codec.zeroes(len(counts))
    for index, count in enumerate(counts):
        zeroes[index] = count
    assert codec.encode(zeroes) == content


@pytest.mark.parametrize("order", range(7))
def test_refcounts_hold_their_largest_value_without_touching_their_neighbours(order: int) -> None:
    codec, bits = RefcountCodec(order), 1 << order
    entries = codec.zeroes(64)
    entries[9] = (1 << bits) - 1
    decoded = codec.decode(codec.encode(entries))
    assert list(decoded) == [0] * 9 + [(1 << bits) - 1] + [0] * 54
    assert len(codec.encode(entries)) == 64 * bits // 8


@pytest.mark.parametrize("order", range(7))
def test_refcounts_of_random_bytes_come_back(order: int) -> None:
    content = random.Random(order).randbytes(4096)
    assert RefcountCodec(order).encode(RefcountCodec(order).decode(content)) == content


def test_encode_leaves_the_array_as_it_was() -> None:
    entries = array("H", [1, 2])
    assert RefcountCodec(4).encode(entries) == b"\0\1\0\2"
    assert list(entries) == [1, 2]
    offsets = array("Q", [0x8000000000050000])
    assert encode_offsets(offsets) == b"\x80\0\0\0\0\5\0\0"
    assert list(offsets) == [0x8000000000050000]


def test_offsets_are_big_endian() -> None:
    content = bytes.fromhex("8000000000050000 4040000000 01ff00 0000000000000001".replace(" ", ""))
    assert list(decode_offsets(content)) == [0x8000000000050000, 0x404000000001FF00, 1]
    assert encode_offsets(decode_offsets(bytearray(content))) == content
