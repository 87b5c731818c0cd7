"""Checks recorded histories of 512-byte sectors: is each one an atomic register, and did a read see a torn one?

Every write stamps its sectors with a value used once, so per sector the check is Gibbons and Korach's ("Testing shared
memories", 1997) for reads with known writers, n log n. A value's *zone* spans from the first response among its
operations (its write and all reads that returned it) to the last invocation among them:

    write v   |-------|                    first response f = 9
    read v        |---------|              last invocation  s = 14
    read v               |------|          f < s: a forward zone [9, 14]; else a backward zone [s, f]

A history is linearizable if and only if no read returns a value nobody wrote or responds before its write was invoked,
no two forward zones overlap, and no backward zone lies inside a forward one.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SECTOR_SIZE = 512
STAMP = struct.Struct(">Q")
STAMPS_PER_SECTOR = SECTOR_SIZE // STAMP.size
INITIAL = 0  # the value of a sector before the first write, as if written before all time
BEFORE_ALL = -1


@dataclass(frozen=True, slots=True)
class Operation:
    """A read that returned `value`, or a write of it; `invoked` and `returned` are on one clock."""

    is_write: bool
    value: int
    invoked: int
    returned: int


@dataclass(frozen=True, slots=True)
class _Zone:
    low: int
    high: int
    value: int


def stamped(value: int, sector_count: int) -> bytes:
    """The payload of a write: every 8 bytes hold `value`."""
    return STAMP.pack(value) * (STAMPS_PER_SECTOR * sector_count)


def stamps(data: bytes) -> list[int | None]:
    """The value of each sector of `data`; None for a torn one, whose 64 stamps differ."""
    found: list[int | None] = []
    for start in range(0, len(data), SECTOR_SIZE):
        sector = data[start : start + SECTOR_SIZE]
        first = sector[: STAMP.size]
        found.append(STAMP.unpack(first)[0] if sector == first * STAMPS_PER_SECTOR else None)
    return found


def violation(history: Iterable[Operation]) -> str | None:
    """Why a register's history is not linearizable; None if it is. Written values are unique and not `INITIAL`."""
    writes: dict[int, tuple[int, int]] = {INITIAL: (BEFORE_ALL, BEFORE_ALL)}
    reads: list[Operation] = []
    for operation in history:
        if operation.is_write:
            assert operation.value not in writes, "a value was written twice"
            writes[operation.value] = (operation.invoked, operation.returned)
        else:
            reads.append(operation)
    first_response = {value: returned for value, (_, returned) in writes.items()}
    last_invocation = {value: invoked for value, (invoked, _) in writes.items()}
    for read in reads:
        if read.value not in writes:
            return f"read {read.value:#x}, which nobody wrote"
        if read.returned < writes[read.value][0]:
            return f"read {read.value:#x} before it was written"
        first_response[read.value] = min(first_response[read.value], read.returned)
        last_invocation[read.value] = max(last_invocation[read.value], read.invoked)
    forward: list[_Zone] = []
    backward: list[_Zone] = []
    for value, response in first_response.items():
        invocation = last_invocation[value]
        if response < invocation:
            forward.append(_Zone(response, invocation, value))
        else:
            backward.append(_Zone(invocation, response, value))
    return _zone_conflict(sorted(forward, key=lambda zone: zone.low), sorted(backward, key=lambda zone: zone.low))


def _zone_conflict(forward: Sequence[_Zone], backward: Sequence[_Zone]) -> str | None:
    for before, after in itertools.pairwise(forward):
        if after.low < before.high:
            return f"{before.value:#x} is current until {before.high}, {after.value:#x} already from {after.low}"
    index = 0
    for zone in backward:
        while index < len(forward) and forward[index].high <= zone.low:
            index += 1
        if index < len(forward) and forward[index].low < zone.low and zone.high < forward[index].high:
            return f"{zone.value:#x} falls into the time of {forward[index].value:#x}"
    return None
