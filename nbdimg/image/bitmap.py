"""A dirty bitmap in memory: which granules of the virtual disk have changed since it was made or cleared.

Bit n stands for the guest bytes from n * granularity on. Bits lie as qcow2 stores them: in byte n // 8, least
significant first; those behind the end of the disk are 0. With a granularity of 64 KiB the bytes 65536 to 131071 are
bit 1, value 2 of byte 0; a disk of 1 TiB takes 2 MiB.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from nbdimg.units import div_ceil, is_power_of_two

_PIECE = 4096
"""Bytes of bits that are compared at once: a comparison is fifty times as fast as the search in what differs."""

_MERGED_PIECES, _MERGED_RUNS = 64, 1024
"""Between two turns of the loop."""

_CLEAN, _DIRTY = bytes(_PIECE), b"\xff" * _PIECE
_NOT_CLEAN, _NOT_DIRTY = re.compile(rb"[^\x00]"), re.compile(rb"[^\xff]")


class DirtyBitmap:
    """Args: granularity: bytes, a power of two. size: of the virtual disk in bytes. The bitmap begins clean."""

    __slots__ = ("_shift", "bits", "name", "size")

    def __init__(self, name: str, granularity: int, size: int) -> None:
        assert is_power_of_two(granularity)
        self.name = name
        self.size = size
        self._shift = granularity.bit_length() - 1
        self.bits = bytearray(byte_count(size, granularity))
        """As they are stored. Whoever fills them in calls `trim_tail`."""

    @property
    def granularity(self) -> int:
        return 1 << self._shift

    def set_range(self, offset: int, stop: int) -> None:
        """The guest bytes from `offset` to before `stop` change; the range is not empty and ends within the disk."""
        assert 0 <= offset < stop <= self.size
        bits = self.bits
        first, last = offset >> self._shift, (stop - 1) >> self._shift
        if first == last:
            bits[first >> 3] |= 1 << (first & 7)
            return
        first_byte, last_byte = first >> 3, last >> 3
        head, tail = 0xFF << (first & 7) & 0xFF, 0xFF >> (7 - (last & 7))
        if first_byte == last_byte:
            bits[first_byte] |= head & tail
            return
        bits[first_byte] |= head
        bits[last_byte] |= tail
        bits[first_byte + 1 : last_byte] = b"\xff" * (last_byte - first_byte - 1)

    def clear(self) -> None:
        self.bits[:] = bytes(len(self.bits))

    def copy(self) -> DirtyBitmap:
        """As it is now; each then goes its own way."""
        made = DirtyBitmap(self.name, self.granularity, self.size)
        made.bits[:] = self.bits
        return made

    def merge(self, other: DirtyBitmap) -> Iterator[None]:
        """What is dirty in `other`, of the same size, is dirty here too when the iterator has ended: it gives others
        their turn between two pieces of work.
        """
        assert other.size == self.size
        if other._shift != self._shift:
            for number, (start, stop) in enumerate(other.dirty_runs(0, self.size), 1):
                self.set_range(start, stop)
                if number % _MERGED_RUNS == 0:
                    yield
            return
        for number, start in enumerate(range(0, len(self.bits), _PIECE), 1):
            piece = other.bits[start : start + _PIECE]
            if not _CLEAN.startswith(piece):
                both = int.from_bytes(self.bits[start : start + _PIECE], "little") | int.from_bytes(piece, "little")
                self.bits[start : start + _PIECE] = both.to_bytes(len(piece), "little")
            if number % _MERGED_PIECES == 0:
                yield

    def is_all(self, start: int, stop: int, *, dirty: bool) -> bool:
        """Whether the bytes of bits from `start` to before `stop` are all 0xFF, or 0; compared, which takes a fiftieth
        of counting.
        """
        same = _DIRTY if dirty else _CLEAN
        return all(
            self.bits.startswith(same[: min(_PIECE, stop - position)], position)
            for position in range(start, stop, _PIECE)
        )

    def resize(self, size: int) -> Callable[[], None]:
        """The disk has `size` bytes now; what is new is dirty: a copy may have other bytes there, from before the disk
        was once shorter, and nobody knows. What is returned undoes it.
        """
        old = self.size
        count = byte_count(size, self.granularity)
        kept = max(0, min(len(self.bits), count) - 1)
        cut = bytes(self.bits[kept:])

        def undo() -> None:
            self.size, self.bits[kept:] = old, cut

        del self.bits[count:]
        self.bits.extend(bytes(count - len(self.bits)))
        self.size = size
        self.trim_tail()
        if old < size:
            self.set_range(old, size)
        return undo

    def trim_tail(self) -> None:
        """Clear the bits behind the end of the disk."""
        used = div_ceil(self.size, self.granularity) & 7
        if used:
            self.bits[-1] &= 0xFF >> (8 - used)

    def runs(self, offset: int, stop: int) -> Iterator[tuple[int, bool]]:
        """(length, is dirty) of the runs that make up the guest bytes from `offset` to before `stop`, in order."""
        for start, end in self.dirty_runs(offset, stop):
            if start > offset:
                yield start - offset, False
            yield end - start, True
            offset = end
        if offset < stop:
            yield stop - offset, False

    def dirty_runs(self, offset: int, stop: int) -> Iterator[tuple[int, int]]:
        """Start and end, in guest bytes, of each dirty run, clipped to the range; found byte-wise, not bit by bit."""
        assert 0 <= offset <= stop <= self.size
        shift = self._shift
        bit, end = offset >> shift, div_ceil(stop, 1 << shift) if offset < stop else 0
        while bit < end:
            first = self._find(bit, end, is_set=True)
            if first == end:
                return
            bit = self._find(first, end, is_set=False)
            yield max(offset, first << shift), min(stop, bit << shift)

    def _find(self, bit: int, end: int, *, is_set: bool) -> int:
        """The first bit from `bit` on that is set, or is not; `end` when there is none before it."""
        flip = 0 if is_set else 0xFF
        index = bit >> 3
        value = (self.bits[index] ^ flip) & (0xFF << (bit & 7))
        if not value:
            limit = div_ceil(end, 8)
            found = _search(self.bits, index + 1, limit, is_set=is_set)
            if found == limit:
                return end
            index = found
            value = self.bits[index] ^ flip
        return min(end, index * 8 + (value & -value).bit_length() - 1)


def _search(bits: bytearray, start: int, stop: int, *, is_set: bool) -> int:
    """The first byte from `start` on that has a bit set, or clear; `stop` when there is none before it."""
    same, pattern = (_CLEAN, _NOT_CLEAN) if is_set else (_DIRTY, _NOT_DIRTY)
    while start + _PIECE <= stop and bits.startswith(same, start):
        start += _PIECE
    found = pattern.search(bits, start, min(stop, start + _PIECE))
    return found.start() if found else stop


def byte_count(size: int, granularity: int) -> int:
    """Bytes that the bits of a disk of `size` bytes take: 1 TiB at 64 KiB take 2 MiB."""
    return div_ceil(div_ceil(size, granularity), 8)
