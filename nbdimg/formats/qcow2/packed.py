"""Tables between bytes on disk and arrays in memory: big-endian 64-bit entries, refcounts of 1 to 64 bits, and what the
descriptor of a compressed cluster packs into one entry.

An array's item is the machine's; `byteswap` turns it into the disk's. Refcounts of less than a byte are packed from the
least significant bit on: with 2 bits the byte 0x1B = 00 01 10 11 holds the counts 3, 2, 1, 0.
"""

from __future__ import annotations

import sys
from array import array
from functools import lru_cache

from nbdimg.formats.qcow2.structs import SECTOR_SIZE
from nbdimg.formats.zeroed import Typecode

_IS_LITTLE = sys.byteorder == "little"
_TYPES: dict[int, Typecode] = {3: "B", 4: "H", 5: "I", 6: "Q"}


def decode_offsets(content: bytes | bytearray) -> array[int]:
    """64-bit entries: L1, L2, refcount table, bitmap table."""
    return _decode("Q", content)


def encode_offsets(entries: array[int]) -> bytes:
    return _encode(entries)


def _decode(typecode: str, content: bytes | bytearray) -> array[int]:
    entries = array(typecode)
    entries.frombytes(content)
    if _IS_LITTLE:
        entries.byteswap()
    return entries


def _encode(entries: array[int]) -> bytes:
    if _IS_LITTLE:
        entries = entries[:]
        entries.byteswap()
    return entries.tobytes()


class RefcountCodec:
    """Refcounts of 2^order bits; those of less than a byte take one each in memory."""

    def __init__(self, order: int) -> None:
        self._bits = 1 << order
        self.typecode = _TYPES[max(order, 3)]
        """Of the arrays."""

    def zeroes(self, count: int) -> array[int]:
        return array(self.typecode, [0]) * count

    def decode(self, content: bytes | bytearray) -> array[int]:
        if self._bits >= 8:
            return _decode(self.typecode, content)
        unpacked = _unpacked(self._bits)
        return array("B", b"".join([unpacked[byte] for byte in content]))

    def encode(self, entries: array[int]) -> bytes:
        if self._bits >= 8:
            return _encode(entries)
        content = bytearray(len(entries) * self._bits // 8)
        per_byte = 8 // self._bits
        for index in range(per_byte):
            shift = index * self._bits
            for position, count in enumerate(entries[index::per_byte]):
                if count:
                    content[position] |= count << shift
        return bytes(content)


@lru_cache(maxsize=3)
def _unpacked(bits: int) -> tuple[bytes, ...]:
    """For each byte the counts that it holds."""
    mask = (1 << bits) - 1
    return tuple(bytes([byte >> shift & mask for shift in range(0, 8, bits)]) for byte in range(256))


def compressed_clusters(entry: int, cluster_bits: int) -> tuple[int, int]:
    """First and last host cluster that a compressed cluster's data touches.

    With 64 KiB clusters x = 54: the entry 0x4040_0000_0001_ff00 names byte 0x1ff00 and one further sector, so 512 more
    bytes than the rest of its first sector: up to 0x201ff, clusters 1 and 2.
    """
    offset, length = compressed_range(entry, cluster_bits)
    return offset >> cluster_bits, (offset + length - 1) >> cluster_bits


def compressed_range(entry: int, cluster_bits: int) -> tuple[int, int]:
    """(host offset, length) of a compressed cluster's data; behind its end there may be other data.

    Spec: qcow2.rst "Compressed Clusters Descriptor".
    """
    shift = 62 - (cluster_bits - 8)
    offset = entry & ((1 << shift) - 1)
    sectors = entry >> shift & ((1 << (cluster_bits - 8)) - 1)
    return offset, (sectors + 1) * SECTOR_SIZE - (offset & (SECTOR_SIZE - 1))
