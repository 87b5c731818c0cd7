"""The search for the active sequence as the specification words it, one step after the other, at whatever cost.

[MS-VHDX] 2.3.3 "Log Sequence". Only for small rings.
"""

from __future__ import annotations

import struct
from uuid import UUID

from tests.formats.vhdx.craft import SECTOR, sealed

Found = tuple[int, int, int, int]
"""Position, length, sequence number, tail."""


def entry_at(ring: bytes, position: int, guid: UUID, log_offset: int) -> Found | None:
    """The entry that begins at `position`, if all of it is as it must be."""
    size = len(ring)
    doubled = ring[position:] + ring[:position]
    signature, _, length, tail, number, count, _ = struct.unpack_from("<4sIIIQII", doubled)
    if signature != b"loge" or doubled[32:48] != guid.bytes_le or number == 0:
        return None
    if length % SECTOR or not 0 < length < size or tail % SECTOR or tail >= size:
        return None
    content = doubled[:length]
    if sealed(content) != content:
        return None
    head = -(-(64 + 32 * count) // SECTOR) * SECTOR
    if head > length:
        return None
    data_count = 0
    for index in range(count):
        kind, _, middle, target, own = struct.unpack_from("<4sIQQQ", content, 64 + 32 * index)
        reach = {b"desc": SECTOR, b"zero": middle}.get(kind)
        if reach is None or own != number or target % SECTOR or reach % SECTOR or target < 192 * 1024:
            return None
        if target + reach > 1 << 48 or (target < log_offset + size and target + reach > log_offset):
            return None
        data_count += kind == b"desc"
    if head + data_count * SECTOR != length:
        return None
    for start in range(head, length, SECTOR):
        kind, high = struct.unpack_from("<4sI", content, start)
        (low,) = struct.unpack_from("<I", content, start + SECTOR - 4)
        if kind != b"data" or high << 32 | low != number:
            return None
    return position, length, number, tail


def active_sequence(ring: bytes, guid: UUID, log_offset: int) -> list[int] | None:
    """The sequence numbers that must be replayed, oldest first."""
    size = len(ring)
    candidate: list[Found] = []
    tail = old_tail = 0
    while True:
        current: list[Found] = []
        head, left = tail, size
        while (found := entry_at(ring, head, guid, log_offset)) and found[1] <= left:
            if current and found[2] != current[-1][2] + 1:
                break
            current.append(found)
            left -= found[1]
            head = (head + found[1]) % size
        is_valid = bool(current) and any(each[0] == current[-1][3] for each in current)
        if is_valid and (not candidate or current[-1][2] > candidate[-1][2]):
            candidate = current
        tail = head if is_valid else (tail + SECTOR) % size
        if tail <= old_tail:
            break
        old_tail = tail
    if not candidate:
        return None
    first = next(index for index, each in enumerate(candidate) if each[0] == candidate[-1][3])
    return [each[2] for each in candidate[first:]]
