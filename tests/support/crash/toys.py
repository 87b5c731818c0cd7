"""Small formats with a switch for each fault that the crash harness must find. Wrong on purpose, and never shipped.

TOY, copy on write over a constant:

       0  table, ENTRY_COUNT entries of u64: 0 the cluster reads as its original, 1 as zeroes, else its host offset
    1024  data clusters of 2048 bytes

JOURNAL, whole-disk writes that survive a crash in their middle:

       0  record: magic, CRC-32 of the data, that is to be put in place; 512 zeroes when there is none
     512  the data of the record, DISK_SIZE bytes
     512 + DISK_SIZE  the disk

One request at a time changes the mapping: the toys keep a lock where a real format has an overlap queue.
"""

from __future__ import annotations

import asyncio
import struct
import zlib
from enum import Flag, auto

from nbdimg.errors import CorruptImage
from nbdimg.export.export import Status, Work
from nbdimg.storage.file import BlockFile
from nbdimg.wire.constants import Command, CommandFlag
from nbdimg.wire.messages import Request
from tests.support.crash.client import written
from tests.support.crash.states import CrashState
from tests.support.crash.trace import SECTOR

CLUSTER = 2048
ENTRY_COUNT = 128
TABLE = struct.Struct(f"<{ENTRY_COUNT}Q")
TABLE_SIZE = 1024
TOY_SIZE = 32 * CLUSTER
ORIGINAL, ZERO = 0, 1

assert TABLE.size == TABLE_SIZE


class Fault(Flag):
    NONE = 0
    NO_ORDER = auto()
    """The table is written beside the data, with one barrier behind both."""
    EARLY_REUSE = auto()
    """A cluster that a trim frees is written to again before the table without it is durable."""
    NO_FLUSH = auto()
    """A flush is answered without a barrier."""
    EAGER_CLEAR = auto()
    """A recovery clears the journal's record beside the writes that it makes superfluous."""


def original(length: int = TOY_SIZE) -> bytes:
    return b"".join(written(index, 0) for index in range(length // SECTOR))


class Toy:
    """An open TOY image, as a Target."""

    size = TOY_SIZE

    def __init__(self, file: BlockFile, table: list[int], fault: Fault) -> None:
        self._file = file
        self._table = table
        self._fault = fault
        self._free: list[int] = []
        self._quarantine: list[int] = []
        self._next = max([TABLE_SIZE, *(entry + CLUSTER for entry in table if entry > ZERO)])
        self._dirty: set[int] = set()
        self._lock = asyncio.Lock()

    def submit(self, request: Request) -> Work[Status | None] | None:
        if request.command == Command.FLUSH:
            return self._flush()
        return self._change(request)

    async def _change(self, request: Request) -> None:
        offset, stop = request.offset, request.offset + request.length
        payload = None if request.payload is None else bytes(request.payload)
        async with self._lock:
            while offset < stop:
                cluster = offset // CLUSTER
                after = min(stop, (cluster + 1) * CLUSTER)
                piece = bytes(after - offset) if payload is None else payload[: after - offset]
                if payload is None and len(piece) == CLUSTER:
                    self._unmap(cluster)
                elif request.command != Command.TRIM:
                    await self._write(cluster, offset % CLUSTER, piece)
                payload = None if payload is None else payload[len(piece) :]
                offset = after
        if request.flags & CommandFlag.FUA:
            await self._flush()

    def _unmap(self, cluster: int) -> None:
        if self._table[cluster] > ZERO:
            freed = self._free if self._fault & Fault.EARLY_REUSE else self._quarantine
            freed.append(self._table[cluster])
        self._point(cluster, ZERO)

    def _point(self, cluster: int, entry: int) -> None:
        self._table[cluster] = entry
        self._dirty.add(cluster * 8 // SECTOR)

    async def _write(self, cluster: int, skip: int, piece: bytes) -> None:
        entry = self._table[cluster]
        if entry > ZERO:
            await self._file.pwrite(entry + skip, piece)
            return
        content = await self.read(cluster * CLUSTER, CLUSTER)
        place = self._free.pop(0) if self._free else self._next
        self._next = max(self._next, place + CLUSTER)
        await self._file.pwrite(place, content[:skip] + piece + content[skip + len(piece) :])
        self._point(cluster, place)

    async def _flush(self) -> None:
        async with self._lock:
            if self._fault & Fault.NO_FLUSH:
                return
            table = TABLE.pack(*self._table)
            dirty, self._dirty = sorted(self._dirty), set()
            released, self._quarantine = self._quarantine, []
            if not self._fault & Fault.NO_ORDER:
                await self._file.fdatasync()
            starts = [index * SECTOR for index in dirty]
            await asyncio.gather(*(self._file.pwrite(start, table[start : start + SECTOR]) for start in starts))
            await self._file.fdatasync()
            self._free += released

    async def read(self, offset: int, length: int) -> bytes:
        parts = []
        for cluster in range(offset // CLUSTER, (offset + length + CLUSTER - 1) // CLUSTER):
            data = bytearray(CLUSTER)
            if self._table[cluster] == ORIGINAL:
                data[:] = original()[cluster * CLUSTER : (cluster + 1) * CLUSTER]
            elif self._table[cluster] > ZERO:
                await self._file.pread(self._table[cluster], memoryview(data))
            parts.append(bytes(data))
        skip = offset % CLUSTER
        return b"".join(parts)[skip : skip + length]

    async def close(self) -> None:
        await self._flush()


async def open_toy(file: BlockFile, fault: Fault) -> Toy:
    """Raises: CorruptImage."""
    data = bytearray(TABLE_SIZE)
    await file.pread(0, memoryview(data))
    table = list(TABLE.unpack(data))
    problems = toy_problems(table, file.size)
    if problems:
        raise CorruptImage(file.path, problems[0])
    return Toy(file, table, fault)


def toy_problems(table: list[int], size: int) -> list[str]:
    used = [entry for entry in table if entry > ZERO]
    problems = [f"a cluster at {entry} has two owners" for entry in sorted({e for e in used if used.count(e) > 1})]
    for entry in used:
        if entry < TABLE_SIZE or (entry - TABLE_SIZE) % CLUSTER or entry + CLUSTER > size:
            problems.append(f"cluster offset {entry} is unaligned or beyond the file's {size} bytes")
    return problems


async def check_toy(state: CrashState) -> list[str]:
    return toy_problems(list(TABLE.unpack(state.files[0][:TABLE_SIZE])), len(state.files[0]))


DISK_SIZE = 8 * SECTOR
RECORD = struct.Struct("<8sI500x")
MAGIC = b"JOURNAL1"

assert RECORD.size == SECTOR


class Journal:
    """An open JOURNAL image, as a Target. A write is answered when its record is durable, and put in place when the
    next one needs the journal.
    """

    size = DISK_SIZE

    def __init__(self, file: BlockFile, disk: bytes) -> None:
        self._file = file
        self._disk = disk
        self._is_in_place = True
        self._lock = asyncio.Lock()

    def submit(self, request: Request) -> Work[Status | None] | None:
        return None if request.command == Command.FLUSH else self._write(request)

    async def _write(self, request: Request) -> None:
        async with self._lock:
            if not self._is_in_place:
                await put_in_place(self._file, self._disk, Fault.NONE)
            disk = bytearray(self._disk)
            piece = bytes(request.length) if request.payload is None else bytes(request.payload)
            disk[request.offset : request.offset + len(piece)] = piece
            self._disk = bytes(disk)
            self._is_in_place = False
            record = RECORD.pack(MAGIC, zlib.crc32(disk))
            await asyncio.gather(self._file.pwrite(0, record), self._file.pwrite(SECTOR, disk))
            await self._file.fdatasync()

    async def read(self, offset: int, length: int) -> bytes:
        return self._disk[offset : offset + length]

    async def close(self) -> None:
        pass


async def put_in_place(file: BlockFile, disk: bytes, fault: Fault) -> None:
    await file.pwrite(SECTOR + DISK_SIZE, disk)
    if not fault & Fault.EAGER_CLEAR:
        await file.fdatasync()
    await file.pwrite(0, bytes(SECTOR))
    await file.fdatasync()


async def open_journal(file: BlockFile, fault: Fault) -> Journal:
    """Puts in place what a whole record describes."""
    head = bytearray(SECTOR + DISK_SIZE)
    await file.pread(0, memoryview(head))
    magic, checksum = RECORD.unpack_from(head)
    disk = bytes(head[SECTOR:])
    if magic == MAGIC and checksum == zlib.crc32(disk):
        await put_in_place(file, disk, fault)
    place = bytearray(DISK_SIZE)
    await file.pread(SECTOR + DISK_SIZE, memoryview(place))
    return Journal(file, bytes(place))
