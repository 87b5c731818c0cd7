"""A dirty bitmap in memory: which granules of the virtual disk have changed since it was made or cleared.

Bit n stands for the guest bytes from n * granularity on. Bits lie as qcow2 stores them: in byte n // 8, least
significant first; those behind the end of the disk are 0. With a granularity of 64 KiB the bytes 65536 to 131071 are
bit 1, value 2 of byte 0; a disk of 1 TiB takes 2 MiB.

They are kept in pieces. Those that are all clean, or all dirty, are one and the same, and copies share each piece until
one of them changes it: to make, copy, fill or search a bitmap of any disk holds the loop for milliseconds, where memory
for all its bits alone would take hundreds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from nbdimg.units import div_ceil, is_power_of_two

PIECE_SIZE = 4096
"""Bytes of bits. They are compared at once: a comparison is fifty times as fast as the search in what differs."""

_BITS = (8 * PIECE_SIZE).bit_length() - 1
_MASK = (1 << _BITS) - 1
"""Of a bit's number: which piece, and where in it."""

_MERGED_PIECES, _MERGED_RUNS = 64, 1024
"""Between two turns of the loop."""

_CLEAN, _DIRTY = bytearray(PIECE_SIZE), bytearray(b"\xff" * PIECE_SIZE)
"""Never changed."""
_NOT_CLEAN, _NOT_DIRTY = re.compile(rb"[^\x00]"), re.compile(rb"[^\xff]")


class DirtyBitmap:
    """Args: granularity: bytes, a power of two. size: of the virtual disk in bytes. The bitmap begins clean."""

    __slots__ = ("_is_own", "_pieces", "_shift", "name", "size")

    def __init__(self, name: str, granularity: int, size: int) -> None:
        assert is_power_of_two(granularity)
        self.name = name
        self.size = size
        self._shift = granularity.bit_length() - 1
        self.clear()

    @property
    def granularity(self) -> int:
        return 1 << self._shift

    @property
    def byte_count(self) -> int:
        """Bytes that its bits take where they are stored, and at most in memory."""
        return byte_count(self.size, self.granularity)

    def clear(self) -> None:
        count = div_ceil(self.byte_count, PIECE_SIZE)
        self._pieces = [_CLEAN] * count
        self._is_own = bytearray(count)
        """Of each piece, whether nobody else has it, so that it may be changed."""

    def set_range(self, offset: int, stop: int) -> None:
        """The guest bytes from `offset` to before `stop` change; the range is not empty and ends within the disk."""
        assert 0 <= offset < stop <= self.size
        first, last = offset >> self._shift, (stop - 1) >> self._shift
        number, last_number = first >> _BITS, last >> _BITS
        if first == last:
            if self._pieces[number] is not _DIRTY:
                self._own(number)[(first & _MASK) >> 3] |= 1 << (first & 7)
            return
        if number == last_number:
            self._set(number, first & _MASK, last & _MASK)
            return
        self._set(number, first & _MASK, _MASK)
        count = last_number - number - 1
        self._pieces[number + 1 : last_number] = [_DIRTY] * count
        self._is_own[number + 1 : last_number] = bytes(count)
        self._set(last_number, 0, last & _MASK)

    def _set(self, number: int, first: int, last: int) -> None:
        """The bits from `first` to `last` of a piece."""
        if self._pieces[number] is _DIRTY:
            return
        if last - first == _MASK:
            self._pieces[number], self._is_own[number] = _DIRTY, False
            return
        bits = self._own(number)
        first_byte, last_byte = first >> 3, last >> 3
        head, tail = 0xFF << (first & 7) & 0xFF, 0xFF >> (7 - (last & 7))
        if first_byte == last_byte:
            bits[first_byte] |= head & tail
            return
        bits[first_byte] |= head
        bits[last_byte] |= tail
        bits[first_byte + 1 : last_byte] = _DIRTY[first_byte + 1 : last_byte]

    def _own(self, number: int) -> bytearray:
        """A piece, to be changed."""
        if not self._is_own[number]:
            self._pieces[number], self._is_own[number] = self._pieces[number].copy(), True
        return self._pieces[number]

    def copy(self) -> DirtyBitmap:
        """As it is now; each then goes its own way."""
        made = DirtyBitmap(self.name, self.granularity, self.size)
        made._pieces = self._pieces.copy()
        self._is_own = bytearray(len(self._is_own))
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
        for number in range(len(self._pieces)):
            self._merge_piece(number, other)
            if (number + 1) % _MERGED_PIECES == 0:
                yield

    def _merge_piece(self, number: int, other: DirtyBitmap) -> None:
        own, piece = self._pieces[number], other._pieces[number]
        if piece is _CLEAN or own is _DIRTY:
            return
        if own is _CLEAN or piece is _DIRTY:
            self._pieces[number] = piece
            self._is_own[number] = other._is_own[number] = False
            return
        both = int.from_bytes(own, "little") | int.from_bytes(piece, "little")
        self._own(number)[:] = both.to_bytes(PIECE_SIZE, "little")

    def load(self, start: int, stored: memoryview) -> None:
        """Bytes of bits as they are stored, from byte `start` on, where it is clean so far."""
        position = 0
        while position < len(stored):
            number, at = divmod(start + position, PIECE_SIZE)
            part = bytearray(stored[position : position + PIECE_SIZE - at])
            if part == _DIRTY:
                self._pieces[number], self._is_own[number] = _DIRTY, False
            elif part.count(0) != len(part):
                self._own(number)[at : at + len(part)] = part
            position += len(part)
        if start + position >= self.byte_count:
            self._trim_tail()

    def stored(self, start: int, stop: int) -> bytes:
        """The bytes of bits from `start` to before `stop`, as far as there are any."""
        first = start // PIECE_SIZE
        stop = min(stop, self.byte_count)
        joined = b"".join(self._pieces[first : div_ceil(stop, PIECE_SIZE)])
        return joined[start - first * PIECE_SIZE : stop - first * PIECE_SIZE]

    def is_all(self, start: int, stop: int, *, dirty: bool) -> bool:
        """Whether the bytes of bits from `start` to before `stop` are all 0xFF, or 0."""
        same = _DIRTY if dirty else _CLEAN
        while start < stop:
            number, at = divmod(start, PIECE_SIZE)
            end = min(PIECE_SIZE, at + stop - start)
            piece = self._pieces[number]
            if piece is not same and piece[at:end] != same[at:end]:
                return False
            start += end - at
        return True

    def resize(self, size: int) -> Callable[[], None]:
        """The disk has `size` bytes now; what is new is dirty: a copy may have other bytes there, from before the disk
        was once shorter, and nobody knows. What is returned undoes it.
        """
        old = self.size
        count = div_ceil(byte_count(size, self.granularity), PIECE_SIZE)
        kept = max(0, min(len(self._pieces), count) - 1)
        cut = self._pieces[kept:]

        def undo() -> None:
            self.size = old
            self._pieces[kept:], self._is_own[kept:] = cut, bytes(len(cut))

        self._pieces[kept:] = [*cut, *[_CLEAN] * (count - kept - len(cut))][: count - kept]
        self._is_own[kept:] = bytes(count - kept)
        self.size = size
        self._trim_tail()
        if old < size:
            self.set_range(old, size)
        return undo

    def _trim_tail(self) -> None:
        """Clear the bits behind the end of the disk."""
        used = div_ceil(self.size, self.granularity) & _MASK
        if used and self._pieces[-1] is not _CLEAN:
            bits, byte = self._own(len(self._pieces) - 1), used >> 3
            bits[byte] &= (1 << (used & 7)) - 1
            bits[byte + 1 :] = _CLEAN[byte + 1 :]

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
        other = _CLEAN if is_set else _DIRTY
        while bit < end:
            piece = self._pieces[bit >> _BITS]
            if piece is not other and piece != other:
                found = _search(piece, bit & _MASK, is_set=is_set)
                if found is not None:
                    return min(end, (bit & ~_MASK) + found)
            bit = (bit | _MASK) + 1
        return end


def _search(piece: bytearray, bit: int, *, is_set: bool) -> int | None:
    """The first bit of a piece from `bit` on that is set, or is not."""
    flip, pattern = (0, _NOT_CLEAN) if is_set else (0xFF, _NOT_DIRTY)
    index = bit >> 3
    value = (piece[index] ^ flip) & (0xFF << (bit & 7))
    if not value:
        found = pattern.search(piece, index + 1)
        if found is None:
            return None
        index = found.start()
        value = piece[index] ^ flip
    return index * 8 + (value & -value).bit_length() - 1


def byte_count(size: int, granularity: int) -> int:
    """Bytes that the bits of a disk of `size` bytes take: 1 TiB at 64 KiB take 2 MiB."""
    return div_ceil(div_ceil(size, granularity), 8)
