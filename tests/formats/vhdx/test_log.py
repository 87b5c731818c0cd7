"""The log's entries and the search for the active sequence. What replay does with it is in test_replay.py."""

from __future__ import annotations

import asyncio
import random
import struct
import time
from collections.abc import Callable
from uuid import UUID

import pytest

from nbdimg.errors import CorruptImage, UnsupportedFeature
from nbdimg.formats.vhdx import structs as s
from nbdimg.formats.vhdx.header import Header, load_headers
from nbdimg.formats.vhdx.log import (
    Change,
    Page,
    Sequence,
    Zeroes,
    build_entry,
    entry_length,
    load_active,
    read_changes,
    ring_writes,
)
from nbdimg.storage.memory import MemoryFile
from tests.formats.vhdx import craft
from tests.formats.vhdx.craft import LOG_GUID, SECTOR, K, M, entry, image, page, ring
from tests.formats.vhdx.reference import active_sequence, entry_at
from tests.formats.vhdx.rings import find_active, scan

BAT = 3 * M
ONE = 8 * K
"""Bytes of an entry with one page."""
END = M - SECTOR


def header_of(content: bytes | bytearray, log_offset: int = M) -> Header:
    return Header(1, craft.FILE_WRITE_GUID, craft.DATA_WRITE_GUID, LOG_GUID, len(content), log_offset)


def numbers(content: bytes | bytearray) -> list[int] | None:
    """The sequence numbers that would be replayed."""
    found = find_active(content, header_of(content))
    return [each.sequence_number for each in found.entries] if found else None


def one(number: int, tail: int, *, guid: UUID = LOG_GUID, at: int = BAT) -> bytes:
    return entry(number, tail, (at, page(number % 256)), guid=guid)


def torn(data: bytes, sector: int, half: bool = False) -> bytes:
    """Of this sector, or of its second half, nothing was written: zeroes."""
    start, stop = sector * SECTOR + (2048 if half else 0), (sector + 1) * SECTOR
    return data[:start] + bytes(stop - start) + data[stop:]


def other(data: bytes, offset: int, value: bytes) -> bytes:
    """Changed at an offset, with the right checksum again."""
    return craft.sealed(data[:offset] + value + data[offset + len(value) :])


def two_pages(number: int = 10, tail: int = 0) -> bytes:
    return entry(number, tail, (BAT, page(1)), (BAT + SECTOR, page(2)))


MANY = [(BAT + index * SECTOR, page(index)) for index in range(130)]

# Where sequence numbers would be replayed is a list, oldest first; None means that the file must be refused.
SEQUENCES: dict[str, tuple[bytearray, list[int] | None]] = {
    "one entry": (ring((0, one(10, 0))), [10]),
    "one entry in the middle": (ring((40 * K, one(10, 40 * K))), [10]),
    "one entry in the last sectors": (ring((M - ONE, one(10, M - ONE))), [10]),
    "one entry across the end": (ring((END, one(10, END))), [10]),
    "three entries, all live": (ring((0, one(10, 0)), (ONE, one(11, 0)), (2 * ONE, one(12, 0))), [10, 11, 12]),
    "three entries, two live": (ring((0, one(10, 0)), (ONE, one(11, 0)), (2 * ONE, one(12, ONE))), [11, 12]),
    "three entries, the last alone live": (
        ring((0, one(10, 0)), (ONE, one(11, 0)), (2 * ONE, one(12, 2 * ONE))),
        [12],
    ),
    "wrapped, tail at the end of the ring (Q1)": (
        ring((M - 2 * ONE, one(10, M - 2 * ONE)), (M - ONE, one(11, M - 2 * ONE)), (0, one(12, M - 2 * ONE))),
        [10, 11, 12],
    ),
    "wrapped across the end, tail before it": (
        ring((END - ONE, one(10, END - ONE)), (END, one(11, END - ONE)), (SECTOR, one(12, END - ONE))),
        [10, 11, 12],
    ),
    "wrapped, tail behind the end": (
        ring((M - ONE, one(10, M - ONE)), (0, one(11, 0)), (ONE, one(12, 0))),
        [11, 12],
    ),
    "stale entries behind the head (Q2)": (
        ring((0, one(10, 0)), (ONE, one(7, ONE)), (2 * ONE, one(8, ONE))),
        [10],
    ),
    "stale entries before the tail": (
        ring((0, one(8, 0)), (ONE, one(9, 0)), (2 * ONE, one(10, 2 * ONE))),
        [10],
    ),
    "stale entry before, with a gap in the numbers": (ring((0, one(8, 0)), (ONE, one(10, ONE))), [10]),
    "stale entry partly overwritten": (
        ring((0, entry(3, 0, (BAT, page(3)), (BAT, page(4)))), (ONE, one(11, ONE)), (0, one(10, 0))),
        [11],
    ),
    "stale sequence far behind": (ring((0, one(10, 0)), (512 * K, one(4, 512 * K))), [10]),
    "stale sequence far before": (ring((0, one(4, 0)), (512 * K, one(10, 512 * K))), [10]),
    "two candidates, the greater number first": (
        ring((0, one(20, 0)), (ONE, one(21, 0)), (512 * K, one(10, 512 * K)), (512 * K + ONE, one(11, 512 * K))),
        [20, 21],
    ),
    "two candidates, the greater number last": (
        ring((0, one(10, 0)), (ONE, one(11, 0)), (512 * K, one(20, 512 * K)), (512 * K + ONE, one(21, 512 * K))),
        [20, 21],
    ),
    "two candidates, the longer one older": (
        ring((0, one(10, 0)), (ONE, one(11, 0)), (2 * ONE, one(12, 0)), (512 * K, one(13, 512 * K))),
        [13],
    ),
    "two candidates that touch": (ring((0, one(10, 0)), (ONE, one(20, ONE))), [20]),
    "two candidates that touch, the older behind": (ring((0, one(20, 0)), (ONE, one(10, ONE))), [20]),
    "tail outside, no other": (ring((0, one(10, 512 * K))), None),
    "tail outside, an older sequence is whole": (ring((0, one(10, 512 * K)), (256 * K, one(4, 256 * K))), [4]),
    "tail at an entry of another sequence": (
        ring((0, one(10, 512 * K)), (512 * K, one(4, 512 * K))),
        [4],
    ),
    "tail within an entry": (ring((0, two_pages(10)), (12 * K, one(11, SECTOR))), None),
    "tail at an entry that is behind the head": (ring((0, one(10, ONE)), (ONE, one(7, ONE))), [7]),
    "tail entry overwritten (Q3)": (ring((ONE, one(11, 0)), (2 * ONE, one(12, 0))), None),
    "tail of an entry before the head outside": (ring((0, one(10, 512 * K)), (ONE, one(11, 0))), [10, 11]),
    "empty entry alone": (ring((0, entry(10, 0))), [10]),
    "empty entry, then one": (ring((0, entry(10, 0)), (SECTOR, one(11, 0))), [10, 11]),
    "empty entry as head": (ring((0, one(10, 0)), (ONE, entry(11, 0))), [10, 11]),
    "empty entry as head and tail": (ring((0, one(10, 0)), (ONE, entry(11, ONE))), [11]),
    "empty entries only": (ring((0, entry(10, 0)), (SECTOR, entry(11, 0)), (2 * SECTOR, entry(12, SECTOR))), [11, 12]),
    "empty entry in the last sector": (ring((END, entry(10, END))), [10]),
    "zero descriptor": (ring((0, entry(10, 0, (BAT, 64 * K)))), [10]),
    "zero descriptor of no bytes": (ring((0, entry(10, 0, (BAT, 0)))), [10]),
    "zero and data descriptors": (ring((0, entry(10, 0, (BAT, 64 * K), (BAT, page(1)), (BAT, SECTOR)))), [10]),
    "126 descriptors": (ring((0, entry(10, 0, *MANY[:126]))), [10]),
    "127 descriptors": (ring((0, entry(10, 0, *MANY[:127]))), [10]),
    "254 and 255 zero descriptors": (
        ring((0, entry(10, 0, *[(BAT, SECTOR)] * 254)), (8 * K, entry(11, 0, *[(BAT, SECTOR)] * 255))),
        [10, 11],
    ),
    "130 descriptors across the end": (ring((END, entry(10, END, *MANY))), [10]),
    "torn first sector": (ring((0, one(10, 0)), (ONE, torn(one(11, 0), 0))), [10]),
    "torn first sector, second half": (
        ring((0, one(10, 0)), (ONE, torn(entry(11, 0, *MANY[:126]), 0, half=True))),
        [10],
    ),
    "torn middle sector": (ring((0, one(10, 0)), (ONE, torn(two_pages(11), 1))), [10]),
    "torn last sector": (ring((0, one(10, 0)), (ONE, torn(two_pages(11), 2))), [10]),
    "torn last sector, second half": (ring((0, one(10, 0)), (ONE, torn(two_pages(11), 2, half=True))), [10]),
    "torn descriptor sector": (ring((0, one(10, 0)), (ONE, torn(entry(11, 0, *MANY), 1))), [10]),
    "torn across the end": (ring((M - ONE - SECTOR, one(10, M - ONE - SECTOR)), (END, torn(one(11, 0), 1))), [10]),
    "torn entry alone": (ring((0, torn(one(10, 0), 1))), None),
    "torn in the middle of the sequence": (
        ring((0, one(10, 0)), (ONE, torn(one(11, 0), 1)), (2 * ONE, one(12, 0))),
        [10],
    ),
    "no entry": (ring(), None),
    "no entry, other bytes": (ring(fill=b"\xa5"), None),
    "no entry, signatures everywhere": (ring(fill=b"loge"), None),
    "LogGuid of another session": (ring((0, one(10, 0, guid=UUID(int=1)))), None),
    "LogGuid zero": (ring((0, one(10, 0, guid=UUID(int=0)))), None),
    "LogGuid of another session behind": (ring((0, one(10, 0)), (ONE, one(11, 0, guid=UUID(int=1)))), [10]),
    "number is zero": (ring((0, one(0, 0))), None),
    "number is the greatest": (ring((0, one((1 << 64) - 1, 0))), [(1 << 64) - 1]),
    "number crosses 32 bits": (ring((0, one(0xFFFF_FFFF, 0)), (ONE, one(0x1_0000_0000, 0))), [0xFFFF_FFFF, 1 << 32]),
    "number does not wrap": (ring((0, one((1 << 64) - 1, 0)), (ONE, one(1, ONE))), [(1 << 64) - 1]),
    "number twice": (ring((0, one(10, 0)), (ONE, one(10, 0))), [10]),
    "ring full": (
        ring(*((index * ONE, one(10 + index, 0)) for index in range(128))),
        list(range(10, 138)),
    ),
    "ring full, tail in the middle": (
        ring(*((index * ONE, one((10 if index < 64 else -118) + 128 + index, 64 * ONE)) for index in range(128))),
        [index + 10 for index in range(64, 128)] + [index + 138 for index in range(64)],
    ),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_active_sequence(name: str) -> None:
    content, expected = SEQUENCES[name]
    assert numbers(content) == expected


@pytest.mark.parametrize("name", SEQUENCES)
def test_control_reference_finds_the_same_sequence(name: str) -> None:
    content, expected = SEQUENCES[name]
    if "signatures everywhere" not in name:
        assert active_sequence(bytes(content), LOG_GUID, M) == expected


@pytest.mark.parametrize("position", [0, SECTOR, END - 2 * SECTOR, END - SECTOR, END])
@pytest.mark.parametrize("count", [1, 2, 130])
def test_active_sequence_wraps_at_any_sector_of_an_entry(position: int, count: int) -> None:
    first = entry(10, position, *MANY[:count])
    behind = (position + len(first)) % M
    assert numbers(ring((position, first), (behind, one(11, position)))) == [10, 11]
    assert numbers(ring((position, first), (behind, torn(one(11, position), 1)))) == [10]


# Each changes one field of the second of two entries, whose checksum is right again: [10] without it, [10, 11] with.
BROKEN: dict[str, bytes] = {
    "signature": other(one(11, 0), 0, b"logE"),
    "checksum": one(11, 0)[:4] + b"\0\0\0\0" + one(11, 0)[8:],
    "EntryLength zero": other(one(11, 0), 8, struct.pack("<I", 0)),
    "EntryLength not of sectors": other(one(11, 0), 8, struct.pack("<I", 8191)),
    "EntryLength too short": other(one(11, 0), 8, struct.pack("<I", 4096)),
    "EntryLength too long": entry(11, 0, (BAT, page(1)), length=12288) + bytes(SECTOR),
    "EntryLength of the whole log": other(one(11, 0), 8, struct.pack("<I", M)),
    "EntryLength beyond the log": other(one(11, 0), 8, struct.pack("<I", 0xFFFF_F000)),
    "Tail not of sectors": one(11, 1),
    "Tail at the log's end": one(11, M),
    "Tail beyond the log": one(11, 0xFFFF_F000),
    "SequenceNumber of the entry": other(one(11, 0), 16, struct.pack("<Q", 12)),
    "LogGuid": one(11, 0, guid=UUID(int=2)),
    "DescriptorCount one less": entry(11, 0, (BAT, page(1)), count=0),
    "DescriptorCount one more": entry(11, 0, (BAT, page(1)), count=2),
    "DescriptorCount more than fits": entry(11, 0, (BAT, page(1)), count=126 + 128 + 1),
    "DescriptorCount huge": entry(11, 0, (BAT, page(1)), count=0xFFFF_FFFF),
    "descriptor signature": other(one(11, 0), 64, b"data"),
    "descriptor SequenceNumber": other(one(11, 0), 64 + 24, struct.pack("<Q", 10)),
    "second descriptor SequenceNumber": other(two_pages(11), 96 + 24, struct.pack("<Q", 12)),
    "last of 130 descriptors": other(entry(11, 0, *MANY), SECTOR + 3 * 32 + 24, struct.pack("<Q", 10)),
    "descriptor target not of sectors": entry(11, 0, (BAT + 512, page(1))),
    "descriptor target is the file identifier": entry(11, 0, (0, page(1))),
    "descriptor target is header 1": entry(11, 0, (64 * K, page(1))),
    "descriptor target is header 2": entry(11, 0, (128 * K, page(1))),
    "descriptor target is before the region tables": entry(11, 0, (192 * K - SECTOR, page(1))),
    "descriptor target is the log's start": entry(11, 0, (M, page(1))),
    "descriptor target is the log's last sector": entry(11, 0, (2 * M - SECTOR, page(1))),
    "descriptor target overflows": entry(11, 0, ((1 << 64) - SECTOR, page(1))),
    "descriptor target beyond 256 TiB": entry(11, 0, (1 << 48, page(1))),
    "zero descriptor not of sectors": entry(11, 0, (BAT, 512)),
    "zero descriptor of the headers": entry(11, 0, (0, M)),
    "zero descriptor into the log": entry(11, 0, (M - SECTOR, 2 * SECTOR)),
    "zero descriptor out of the log": entry(11, 0, (2 * M - SECTOR, 2 * SECTOR)),
    "zero descriptor over the log": entry(11, 0, (192 * K, 8 * M)),
    "zero descriptor overflows": entry(11, 0, (BAT, (1 << 64) - SECTOR)),
    "zero descriptor ends beyond 256 TiB": entry(11, 0, (BAT, 1 << 48)),
    "data sector signature": other(one(11, 0), SECTOR, b"Data"),
    "data sector SequenceHigh": other(one(11, 0), SECTOR + 4, struct.pack("<I", 1)),
    "data sector SequenceLow": other(one(11, 0), 2 * SECTOR - 4, struct.pack("<I", 10)),
    "last data sector SequenceLow": other(two_pages(11), 3 * SECTOR - 4, struct.pack("<I", 10)),
    "data byte": one(11, 0)[:5000] + b"\xee" + one(11, 0)[5001:],
    "byte behind the descriptors": one(11, 0)[:4000] + b"\xee" + one(11, 0)[4001:],
}


@pytest.mark.parametrize("name", BROKEN)
def test_entry_with_a_broken_field_ends_the_sequence(name: str) -> None:
    content = ring((0, one(10, 0)), (ONE, BROKEN[name]))
    assert numbers(content) == [10]
    assert active_sequence(bytes(content), LOG_GUID, M) == [10]


def test_control_entry_without_a_broken_field_belongs_to_the_sequence() -> None:
    for second in (one(11, 0), two_pages(11), entry(11, 0, *MANY), other(one(11, 0), 0, b"loge")):
        assert numbers(ring((0, one(10, 0)), (ONE, second))) == [10, 11]


@pytest.mark.parametrize(
    "target", [(192 * K, page(1)), (M - SECTOR, page(1)), (2 * M, page(1)), (192 * K, M - 192 * K), (9 * M, M)]
)
def test_entry_may_target_what_touches_log_and_headers_and_what_is_behind_the_file(target: tuple[int, int]) -> None:
    assert numbers(ring((0, entry(10, 0, target)))) == [10]


@pytest.mark.parametrize("offset", [M // 2, 3 * M, 12345])
def test_entry_offsets_that_are_no_multiple_of_a_mebibyte_are_accepted(offset: int) -> None:
    """They are what the file's size was, and others than Windows write what it is."""
    assert numbers(ring((0, entry(10, 0, flushed=offset, last=offset)))) == [10]


def simulated(seed: int, sectors: int) -> tuple[bytearray, list[int] | None]:
    """A ring as a writer leaves it that was stopped: some laps, a lag of the tail, the last entry maybe torn.

    What the newest entry's tail holds back is never overwritten: the next entry may be torn.
    """
    rng = random.Random(seed)
    size = sectors * SECTOR
    content = ring(length=size, fill=rng.choice([b"\0", b"\xff"]))
    number = rng.choice([1, 0xFFFF_FFFA, rng.getrandbits(62)])
    position = rng.randrange(sectors) * SECTOR
    held: list[tuple[int, int, int]] = []
    for step in range(rng.randrange(1, 4 * sectors)):
        pages = [(BAT + index * SECTOR, page(rng.randrange(256))) for index in range(rng.randrange(3))]
        room = size - sum(each[2] for each in held)
        kept = list(held)
        while kept and (rng.random() < 0.4 or (len(pages) + 2) * SECTOR > room):
            kept.pop(0)
        if (len(pages) + 2) * SECTOR > room:
            pages = []
        data = entry(number, kept[0][1] if kept else position, *pages)
        assert len(data) <= room, f"seed {seed}"
        is_torn = step > 0 and rng.random() < 0.1
        written = torn(data, rng.randrange(len(data) // SECTOR)) if is_torn else data
        for start in range(0, len(data), SECTOR):
            at = (position + start) % size
            content[at : at + SECTOR] = written[start : start + SECTOR]
        if is_torn:
            break
        held = [*kept, (number, position, len(data))]
        number, position = number + 1, (position + len(data)) % size
    return content, [each[0] for each in held]


@pytest.mark.parametrize("sectors", [3, 4, 5, 8, 16, 64])
def test_active_sequence_is_what_a_stopped_writer_had_not_applied(sectors: int) -> None:
    for seed in range(60):
        content, expected = simulated(seed, sectors)
        assert numbers(content) == expected, f"seed {seed}, {sectors} sectors"


def scattered(seed: int, sectors: int) -> bytearray:
    """A ring of entries with any tails, few different numbers and some damage, the later over the earlier."""
    rng = random.Random(seed)
    size = sectors * SECTOR
    content = ring(length=size)
    for _ in range(rng.randrange(1, 2 * sectors)):
        count = rng.choice([0, 0, 1, 1, 2])
        pages = [(BAT, page(index)) for index in range(count)]
        run, position = rng.randrange(1, 4), rng.randrange(sectors) * SECTOR
        number, tail = rng.randrange(0, 12), rng.choice([position, rng.randrange(sectors) * SECTOR])
        for step in range(run):
            data = entry(number + step, tail, *pages)
            if rng.random() < 0.1:
                data = torn(data, rng.randrange(len(data) // SECTOR))
            for start in range(0, len(data), SECTOR):
                at = (position + start) % size
                content[at : at + SECTOR] = data[start : start + SECTOR]
            position = (position + len(data)) % size
    return content


def test_active_sequence_of_scattered_entries_is_that_of_the_specification() -> None:
    seen = {True: 0, False: 0}
    for seed in range(400):
        content = scattered(seed, random.Random(seed).choice([2, 4, 7, 16]))
        expected = active_sequence(bytes(content), LOG_GUID, M)
        assert numbers(content) == expected, f"seed {seed}"
        seen[expected is None] += 1
    assert min(seen.values()) > 40


def test_entries_of_scattered_rings_are_those_that_the_specification_calls_valid() -> None:
    for seed in range(100):
        content = bytes(scattered(seed, 8))
        scanner = scan(content, header_of(content))
        valid = {at for at in range(0, len(content), SECTOR) if entry_at(content, at, LOG_GUID, M)}
        assert set(scanner._valid) == valid, f"seed {seed}"


SEARCH_MAX_S = 0.25


def timed(search: Callable[[], object], times: int = 3) -> float:
    best = 1e9
    for _ in range(times):
        started = time.process_time()
        search()
        best = min(best, time.process_time() - started)
    return best


HEAVY: dict[str, Callable[[], bytearray]] = {
    "full of entries": lambda: ring(*((index * ONE, one(10 + index, 0)) for index in range(128))),
    "full of entries whose tail is outside": lambda: ring(*((i * ONE, one(10 + i, SECTOR)) for i in range(128))),
    "full of empty entries": lambda: ring(*((index * SECTOR, entry(10 + index, 0)) for index in range(256))),
    "one long entry of zero descriptors": lambda: ring((0, entry(10, 0, *[(BAT, SECTOR)] * 32000))),
    "headers of long entries everywhere": lambda: ring(
        *((index * SECTOR, entry(10, 0, count=4000, length=M - SECTOR)) for index in range(256))
    ),
}


@pytest.mark.parametrize("name", HEAVY)
def test_search_of_a_mebibyte_takes_milliseconds(name: str) -> None:
    """At most 16 ms each on a desk; the rest is for a busy machine, and quadratic work takes seconds."""
    content = HEAVY[name]()
    assert timed(lambda: find_active(content, header_of(content))) < SEARCH_MAX_S


def test_control_search_in_the_words_of_the_specification_takes_too_long() -> None:
    content = bytes(HEAVY["full of entries whose tail is outside"]())
    assert timed(lambda: active_sequence(content, LOG_GUID, M), times=1) > SEARCH_MAX_S


def logged(content: bytearray) -> MemoryFile:
    return MemoryFile(image(log=bytes(content), log_guid=LOG_GUID), "x.vhdx")


async def load(file: MemoryFile, *, ignore_log: bool = False) -> tuple[Sequence | None, list[Change]]:
    header = (await load_headers(file)).current
    active = await load_active(file, header, ignore_log=ignore_log)
    changes: list[Change] = []
    if active is not None:
        async for some in read_changes(file, header, active):
            changes += some
    return active, changes


@pytest.mark.parametrize("name", SEQUENCES)
def test_load_active_finds_in_a_file_what_is_in_the_ring(name: str) -> None:
    content, expected = SEQUENCES[name]
    if expected is None:
        with pytest.raises(CorruptImage, match=r"LogGuid is 11111111-.* holds no valid sequence"):
            asyncio.run(load(logged(content)))
        assert asyncio.run(load(logged(content), ignore_log=True)) == (None, [])
        return
    active, _ = asyncio.run(load(logged(content)))
    assert active is not None
    assert [each.sequence_number for each in active.entries] == expected
    assert active.end == (active.head.position + active.head.length) % M


def test_load_active_without_log_guid_does_not_look_at_the_log() -> None:
    file = MemoryFile(image(log=one(10, 0)))
    assert asyncio.run(load(file)) == (None, [])


def test_load_active_refusal_says_what_is_wrong_with_the_first_entry() -> None:
    broken = BROKEN["descriptor target is header 1"]
    with pytest.raises(
        CorruptImage, match=r"entry at 1052672 has a target of 4096 bytes at 65536, expected from 196608"
    ):
        asyncio.run(load(logged(ring((SECTOR, broken)))))


def test_load_active_of_a_truncated_file_is_refused() -> None:
    content = ring((0, entry(10, 0, (BAT, page(1)), flushed=5 * M)))
    message = r"the file was truncated: it has 4194304 bytes, the log says at least 5242880 \(log entry at 1048576\)"
    with pytest.raises(CorruptImage, match=message):
        asyncio.run(load(logged(content)))
    with pytest.raises(CorruptImage, match="truncated"):
        asyncio.run(load(logged(content), ignore_log=True))


@pytest.mark.parametrize(
    ("flushed", "last", "message"),
    [
        (1 << 63, 4 * M, "the file was truncated: it has 4194304 bytes, the log says at least 9223372036854775808 "),
        (4 * M, (1 << 48) + M, r"LastFileOffset is 281474977759232, expected at most 281474976710656 .* 1056824\)"),
    ],
)
def test_load_active_of_offsets_that_cannot_be_takes_no_older_entry_instead(
    flushed: int, last: int, message: str
) -> None:
    """The newest entry is whole: what is before it is not what the file was left as."""
    second = entry(11, 0, (BAT, page(1)), flushed=flushed, last=last)
    with pytest.raises(CorruptImage, match=message):
        asyncio.run(load(logged(ring((0, one(10, 0)), (ONE, second)))))


def test_load_active_only_the_heads_flushed_offset_counts() -> None:
    content = ring((0, entry(10, 0, (BAT, page(1)), flushed=5 * M)), (ONE, entry(11, 0, flushed=4 * M)))
    active, _ = asyncio.run(load(logged(content)))
    assert active is not None
    assert active.head.sequence_number == 11


def test_load_active_of_a_log_behind_the_files_end_is_refused() -> None:
    second = craft.header(2, log_guid=LOG_GUID, log_offset=64 * M)
    with pytest.raises(CorruptImage, match="holds no valid sequence"):
        asyncio.run(load(MemoryFile(image(second=second))))


def test_load_active_of_a_log_longer_than_the_limit_is_refused_only_when_it_is_in_use() -> None:
    length = s.LOG_LENGTH_MAX + M
    with pytest.raises(UnsupportedFeature, match=r"LogLength is 269484032 .* expected at most 268435456"):
        asyncio.run(load(MemoryFile(image(second=craft.header(2, log_guid=LOG_GUID, log_length=length)))))
    assert asyncio.run(load(MemoryFile(image(second=craft.header(2, log_length=length))))) == (None, [])


def test_load_active_reads_a_log_of_more_than_one_piece() -> None:
    size = 3 * M
    content = ring((M - SECTOR, one(10, M - SECTOR)), (M + SECTOR, one(11, M - SECTOR)), length=size)
    second = craft.header(2, log_guid=LOG_GUID, log_length=size, log_offset=4 * M)
    file = MemoryFile(image(second=second) + content)
    active, changes = asyncio.run(load(file))
    assert active is not None
    assert [each.sequence_number for each in active.entries] == [10, 11]
    assert changes == [Page(BAT, page(10)), Page(BAT, page(11))]


def test_read_changes_gives_pages_and_zeroes_in_order() -> None:
    wanted: list[craft.Descriptor] = [
        (BAT, page(1)),
        (5 * M, 64 * K),
        (BAT + SECTOR, page(2)),
        (BAT, SECTOR),
        (BAT, page(3)),
    ]
    content = ring((0, one(9, 0)), (ONE, entry(10, ONE, *wanted)), (6 * SECTOR, entry(11, ONE)))
    _, changes = asyncio.run(load(logged(content)))
    assert changes == [
        Page(BAT, page(1)),
        Zeroes(5 * M, 64 * K),
        Page(BAT + SECTOR, page(2)),
        Zeroes(BAT, SECTOR),
        Page(BAT, page(3)),
    ]


@pytest.mark.parametrize("position", [0, M - 2 * SECTOR, END, 64 * K])
def test_read_changes_of_many_descriptors_at_any_place(position: int) -> None:
    content = ring((position, entry(10, position, *MANY, (5 * M, 8 * K))))
    _, changes = asyncio.run(load(logged(content)))
    assert changes == [*(Page(offset, data) for offset, data in MANY), Zeroes(5 * M, 8 * K)]


def test_read_changes_of_a_log_that_changes_meanwhile_is_refused() -> None:
    async def run() -> None:
        file = logged(ring((0, one(10, 0))))
        header = (await load_headers(file)).current
        active = await load_active(file, header)
        assert active is not None
        file.content[M : M + SECTOR] = one(11, 0)[:SECTOR]
        async for _ in read_changes(file, header, active):
            pass

    with pytest.raises(CorruptImage, match="the log entry at 1048576 changed while it was read"):
        asyncio.run(run())


PAGES = [Page(offset, data) for offset, data in MANY]


@pytest.mark.parametrize(
    ("changes", "descriptors"),
    [
        ([], []),
        ([Page(BAT, page(1))], [(BAT, page(1))]),
        ([Zeroes(BAT, M), Page(BAT, page(1))], [(BAT, M), (BAT, page(1))]),
        (PAGES[:126], MANY[:126]),
        (PAGES[:127], MANY[:127]),
        (PAGES, MANY),
    ],
)
def test_build_entry_gives_the_bytes_of_the_specification(
    changes: list[Change], descriptors: list[craft.Descriptor]
) -> None:
    for number in (1, 0x1234_5678_9ABC):
        made = build_entry(number, 64 * K, LOG_GUID, changes, 4 * M, 9 * M)
        assert made == entry(number, 64 * K, *descriptors, flushed=4 * M, last=9 * M)
        zeroes = sum(isinstance(each, Zeroes) for each in changes)
        assert len(made) == entry_length(len(changes) - zeroes, zeroes)


def test_build_entry_literal_bytes() -> None:
    data = bytes(range(1, 9)) + b"\xaa" * 4084 + b"\xf1\xf2\xf3\xf4"
    made = build_entry(0x0000_0002_0000_0007, 0x5000, LOG_GUID, [Page(0x30_0000, data)], 0x40_0000, 0x240_0000)
    assert made[:4] == b"loge"
    assert made[4:8] == craft.castagnoli(made[:4] + bytes(4) + made[8:]).to_bytes(4, "little")
    assert made[8:96] == bytes.fromhex(
        "00200000 00500000 0700000002000000 01000000 00000000"
        "11111111222233334444555555555555 0000400000000000 0000400200000000"
        "64657363 f1f2f3f4 0102030405060708 0000300000000000 0700000002000000"
    )
    assert made[96:4096] == bytes(4000)
    assert made[4096:] == b"data\2\0\0\0" + b"\xaa" * 4084 + b"\7\0\0\0"


@pytest.mark.parametrize(
    ("pages", "zeroes", "expected"),
    [(0, 0, 4096), (1, 0, 8192), (126, 0, 127 * 4096), (127, 0, 129 * 4096), (0, 126, 4096), (0, 127, 8192),
     (0, 254, 8192), (0, 255, 12288), (1, 126, 12288)],
)  # fmt: skip
def test_entry_length_counts_descriptor_and_data_sectors(pages: int, zeroes: int, expected: int) -> None:
    assert entry_length(pages, zeroes) == expected


@pytest.mark.parametrize("position", [0, SECTOR, END - SECTOR, END])
def test_ring_writes_place_an_entry_where_it_is_found_again(position: int) -> None:
    made = build_entry(10, position, LOG_GUID, PAGES[:3], 4 * M, 4 * M)
    content = bytearray(3 * M)
    writes = ring_writes(position, made, M, M)
    assert len(writes) == (2 if position + len(made) > M else 1)
    for offset, data in writes:
        assert M <= offset <= 2 * M - len(data)
        content[offset : offset + len(data)] = data
    assert content[M : 2 * M] == ring((position, made))


def test_ring_writes_worked_example() -> None:
    made = build_entry(1, 0, LOG_GUID, PAGES[:1], 0, 0)
    assert ring_writes(1044480, made, M, M) == [(M + 1044480, made[:4096]), (M, made[4096:])]


SAMPLES = {
    "vhdx-log-replay": ([20480, 28672], 80117443871106390, 2),
    "d2": ([0], 1, 1),
    "w0": ([0], 10, 1),
    "w2": ([0], 10, 1),
    "w5": ([0], 10, 1),
    "w9": ([0], 11, 2),
}
"""Where the live entries lie, the first one's number, and how many sectors and ranges they change."""


@pytest.mark.parametrize("name", SAMPLES)
def test_active_sequence_of_a_sample(name: str) -> None:
    active, changes = asyncio.run(load(MemoryFile(craft.sample(name))))
    positions, number, count = SAMPLES[name]
    assert active is not None
    assert [each.position for each in active.entries] == positions
    assert active.entries[0].sequence_number == number
    assert len(changes) == count
