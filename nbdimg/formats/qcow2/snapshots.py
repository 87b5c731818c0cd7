"""The snapshot table: internal snapshots, each an L1 table and a size under an id and a name.

Spec: qcow2.rst "Snapshot table". Entries follow one another, each padded to 8 bytes:

    40 bytes of fields, extra data (VM state size, disk size, icount, unknown), id, name, padding
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from nbdimg.errors import ConfigError, CorruptImage, UnsupportedFeature, escaped
from nbdimg.formats.qcow2 import structs as s
from nbdimg.formats.qcow2.header import Header
from nbdimg.formats.qcow2.packed import decode_offsets
from nbdimg.storage.file import BlockFile
from nbdimg.units import KiB, MiB, align_up, div_ceil

T = TypeVar("T")

TABLE_BYTES_MAX = 16 * MiB
"""Of a snapshot table that is read: QEMU allows 64 MiB; ordinary entries take less than 200 bytes."""

FIRST_BYTES, ENTRY_BYTES = 64 * KiB, 256
"""What is read at first, at least and for each entry. Where a table ends stands in its entries alone, and images with
snapshots are long: all that it might take would cost the loop 40 ms each time.
"""

NAME_BYTES_MAX = 255
"""Of a name in UTF-8; QEMU keeps no more of it in memory."""

L1_CLUSTERS_MAX = 1 << 19
"""Of the L1 tables of an image's snapshots, when it is written to: each is remembered, all in 45 MiB. With 4 KiB
clusters that is enough for 512 snapshots of 1 TiB, with 64 KiB clusters for 65536 of 4 TiB.
"""

NO_ICOUNT = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`disk_size` None: the entry does not say, the image's own counts. `unknown_extra` is kept as it was, and so are
    bytes of the id and the name that are not UTF-8.
    """

    id: str
    name: str
    l1_offset: int
    l1_size: int
    """Entries; more than the disk size needs where VM state was saved."""
    seconds: int = 0
    nanoseconds: int = 0
    vm_clock_ns: int = 0
    vm_state_size: int = 0
    disk_size: int | None = None
    icount: int = NO_ICOUNT
    unknown_extra: bytes = b""
    stored_size: int = field(default=0, compare=False)
    """Bytes that the entry takes in the file that it was read from; writers before QEMU 5.0 left the icount out."""

    def to_bytes(self, current_size: int) -> bytes:
        """The entry with its padding; `current_size` stands in for an unknown disk size."""
        size = current_size if self.disk_size is None else self.disk_size
        extra = s.SNAPSHOT_EXTRA.pack(self.vm_state_size, size, self.icount) + self.unknown_extra
        id, name = self.id.encode(errors="surrogateescape"), self.name.encode(errors="surrogateescape")
        fields = s.SNAPSHOT.pack(
            self.l1_offset,
            self.l1_size,
            len(id),
            len(name),
            self.seconds,
            self.nanoseconds,
            self.vm_clock_ns,
            min(self.vm_state_size, 0xFFFF_FFFF),
            len(extra),
        )
        entry = fields + extra + id + name
        return entry.ljust(align_up(len(entry), 8), b"\0")


def labels(snapshots: Iterable[Snapshot]) -> dict[str, str]:
    """By id what each is called: its name, but the id where an earlier one has that name, another one has it as its
    id, or it is no name to ask for: empty, longer than `NAME_BYTES_MAX`, with NUL or bytes that are not UTF-8.
    """
    names: dict[str, str] = {}
    for snapshot in snapshots:
        names.setdefault(snapshot.id, snapshot.name)
    called: dict[str, str] = {}
    taken: set[str] = set()
    for id, name in names.items():
        is_taken = name in taken or (name != id and name in names)
        called[id] = id if is_taken or not _can_be_asked_for(name) else name
        taken.add(name)
    return called


def _can_be_asked_for(name: str) -> bool:
    try:
        return 1 <= len(name.encode()) <= NAME_BYTES_MAX and "\0" not in name
    except UnicodeEncodeError:
        return False


def serialize(snapshots: Iterable[Snapshot], current_size: int) -> bytes:
    return b"".join(snapshot.to_bytes(current_size) for snapshot in snapshots)


def stored_table_size(snapshots: Iterable[Snapshot]) -> int:
    """Bytes of the table that these were read from."""
    return sum(snapshot.stored_size for snapshot in snapshots)


def mapped_l1_size(header: Header, snapshot: Snapshot) -> int:
    """Bytes of a snapshot's L1 table that map its disk; what is behind them is VM state."""
    return 8 * header.l1_entries_needed(header.size if snapshot.disk_size is None else snapshot.disk_size)


def l1_clusters(path: str, header: Header, snapshots: Iterable[Snapshot], end: int) -> list[range]:
    """Host clusters of the snapshots' L1 tables, those before cluster `end`: a damaged entry may claim any number.

    Raises: UnsupportedFeature: they are more than `L1_CLUSTERS_MAX`.
    """
    found = []
    for snapshot in snapshots:
        first = snapshot.l1_offset >> header.cluster_bits
        found.append(range(first, min(first + div_ceil(8 * snapshot.l1_size, header.cluster_size), end)))
    count = sum(map(len, found))
    if count > L1_CLUSTERS_MAX:
        raise UnsupportedFeature(
            path,
            f"the L1 tables of its snapshots take {count} clusters, allowed are {L1_CLUSTERS_MAX} in an image that is "
            "written to",
        )
    return found


async def load_l1(file: BlockFile, header: Header, snapshot: Snapshot) -> array[int]:
    """A snapshot's L1 table, VM state included. Raises: CorruptImage: it is not inside the file."""
    length = 8 * snapshot.l1_size
    if length and not header.cluster_size <= snapshot.l1_offset <= align_up(file.size, header.cluster_size) - length:
        raise CorruptImage(
            file.path,
            f"the L1 table of snapshot {escaped(snapshot.id)} takes {length} bytes at {snapshot.l1_offset}, expected a "
            f"place behind the header and inside the file's {file.size} bytes",
            snapshot.l1_offset,
        )
    content = bytearray(length)
    await file.pread(snapshot.l1_offset, memoryview(content))
    return decode_offsets(content)


async def load_snapshots(file: BlockFile, header: Header) -> list[Snapshot]:
    """Raises: CorruptImage: naming the entry, what was found and what is allowed."""
    if not header.snapshot_count:
        return []
    offset = header.snapshot_table_offset
    longest = max(0, min(TABLE_BYTES_MAX, file.size - offset))
    length = min(longest, max(FIRST_BYTES, ENTRY_BYTES * header.snapshot_count))
    while True:
        table = bytearray(length)
        await file.pread(offset, memoryview(table))
        try:
            return list(_parse(file.path, header, bytes(table)))
        except CorruptImage:
            if length == longest:
                raise
            length = longest


def _parse(path: str, header: Header, table: bytes) -> Iterator[Snapshot]:
    position = 0
    for number in range(header.snapshot_count):
        snapshot = _parse_entry(path, header, table, position, number)
        position += snapshot.stored_size
        yield snapshot


def _parse_entry(path: str, header: Header, table: bytes, position: int, number: int) -> Snapshot:
    """The entry at `position`, a multiple of 8. Raises: CorruptImage."""
    at = header.snapshot_table_offset + position

    def refuse(field: str, found: object, allowed: str) -> CorruptImage:
        return CorruptImage(path, f"snapshot {number}: {field} is {found}, expected {allowed} (offset {at})", at)

    try:
        fields = s.SNAPSHOT.unpack_from(table, position)
    except struct.error:
        raise refuse("its entry", "cut off", f"inside the file and the table's first {TABLE_BYTES_MAX} bytes") from None
    l1_offset, l1_size, id_size, name_size, seconds, nanoseconds, vm_clock, vm_state_size, extra_size = fields
    if extra_size > s.SNAPSHOT_EXTRA_MAX:
        raise refuse("extra_data_size", extra_size, f"at most {s.SNAPSHOT_EXTRA_MAX}")
    if header.version >= 3 and extra_size < 16:
        raise refuse("extra_data_size", extra_size, "at least 16 in version 3")
    if l1_offset % header.cluster_size or l1_offset + 8 * l1_size > s.HOST_OFFSET_MAX:
        raise refuse("l1_table_offset", l1_offset, f"a multiple of {header.cluster_size} below 2^56")
    if 8 * l1_size > s.L1_BYTES_MAX:
        raise refuse("l1_size", l1_size, f"at most {s.L1_BYTES_MAX // 8}")
    extra_start = position + s.SNAPSHOT.size
    id_start = extra_start + extra_size
    name_start = id_start + id_size
    stop = name_start + name_size
    if stop > len(table):
        raise refuse("its entry", f"{stop - position} bytes", "inside the file")
    extra = table[extra_start:id_start]
    vm_state_size = _extra_field(extra, 0, vm_state_size)
    disk_size = _extra_field(extra, 1, None)
    needed = header.l1_entries_needed(disk_size or 0)
    if needed > l1_size:
        raise refuse("l1_size", l1_size, f"at least {needed} for its disk size")
    return Snapshot(
        id=table[id_start:name_start].decode(errors="surrogateescape"),
        name=table[name_start:stop].decode(errors="surrogateescape"),
        l1_offset=l1_offset,
        l1_size=l1_size,
        seconds=seconds,
        nanoseconds=nanoseconds,
        vm_clock_ns=vm_clock,
        vm_state_size=vm_state_size,
        disk_size=disk_size,
        icount=_extra_field(extra, 2, NO_ICOUNT),
        unknown_extra=extra[s.SNAPSHOT_EXTRA.size :],
        stored_size=align_up(stop, 8) - position,
    )


def _extra_field(extra: bytes, index: int, otherwise: T) -> int | T:
    """One of the numbers that extra data begins with: older writers have left out the last ones, or all."""
    stop = 8 * (index + 1)
    return int.from_bytes(extra[stop - 8 : stop], "big") if len(extra) >= stop else otherwise


def find_snapshot(path: str, snapshots: list[Snapshot], wanted: str) -> Snapshot:
    """By id, else by name. Raises: ConfigError: there is none."""
    for snapshot in snapshots:
        if snapshot.id == wanted:
            return snapshot
    for snapshot in snapshots:
        if snapshot.name == wanted:
            return snapshot
    names = ", ".join(escaped(snapshot.name) for snapshot in snapshots) or "none"
    raise ConfigError(f"{path}: there is no snapshot {escaped(wanted)}, known are {names}")
