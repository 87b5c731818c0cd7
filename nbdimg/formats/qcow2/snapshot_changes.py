"""Internal snapshots made, applied and deleted: of an open, writable driver with no request and no flush in flight.

A snapshot is an L1 table of its own over L2 tables and data that it shares with the disk and with other snapshots; each
of them counts as one reference to all of it. What the disk shares has no COPIED flag: a write goes elsewhere.

    create   raise the counts of the disk's tree | clear its flags | the snapshot's L1, the new snapshot table
             | header: snapshot table | the old snapshot table is freed
    apply    raise the counts of the snapshot's tree | clear its flags | a new active L1
             | header: size and L1 table | the disk's former tree and L1 are freed
    delete   the new snapshot table
             | header: snapshot table | the snapshot's tree, its L1 and the old snapshot table are freed | set flags

At each bar everything before it is durable. The header's fields lie in one sector and are one write: that is when it
happens, and a crash leaves the image as it was before or as it is after. References are never fewer than counted (Q1):
counts are raised before there is a new reference and lowered after an old one is gone (Q4), and what is freed goes
through the quarantine (Q5). The header comes last (Q6).

Between the bars flags and counts may not fit each other: COPIED is missing with refcount 1, or is there with 2 and one
reference. Neither harms a reader or a writer, but a check calls it corrupt; in version 3 the dirty bit, durable
throughout, has it repaired at the next opening. Version 2 has no such bit; a check there repairs it when asked.

Until the header is written a change that cannot be carried out, for counts that are too narrow, for lack of space or a
table that cannot be read, is taken back and changes nothing. Where there is no space even for that, or for what follows
the header, an image of version 3 goes on; leaks and missing flags are left to the next opening, for which the dirty
bit stays. After a barrier that failed nothing is taken back: nobody knows what the disk has.

Spec: qcow2.rst "Snapshots", "Cluster mapping".
"""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

from nbdimg.errors import ConfigError, CorruptImage, ImageError, UnsupportedFeature, escaped
from nbdimg.formats import quarantine
from nbdimg.formats.qcow2 import structs as s
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.formats.qcow2.l1 import L1Table
from nbdimg.formats.qcow2.packed import encode_offsets
from nbdimg.formats.qcow2.refcount import Refcounts, Run
from nbdimg.formats.qcow2.snapshots import (
    NAME_BYTES_MAX,
    TABLE_BYTES_MAX,
    Snapshot,
    find_snapshot,
    l1_clusters,
    load_l1,
    load_snapshots,
    serialize,
    stored_table_size,
)
from nbdimg.formats.qcow2.structs import COPIED, OFFSET_MASK
from nbdimg.formats.qcow2.trees import Trees, host_clusters
from nbdimg.image.driver import Miss, answered
from nbdimg.storage.ordering import Plan, Stage, Write, hindered, leaves_no_doubt, merged, run, write_durably
from nbdimg.units import div_ceil

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with L2 tables done and L2 tables in all; a table that is walked twice counts twice."""

_ID_DIGITS_MAX = 18


async def create_snapshot(driver: Qcow2Driver, name: str, *, now_ns: int, progress: Progress | None = None) -> Snapshot:
    """Keep the disk as it is now under `name`; `now_ns` is the date to note, nanoseconds since 1970 UTC.

    Raises:
        ConfigError: the name cannot be one, or is taken.
        UnsupportedFeature: counts are too narrow for one more reference, or there are too many snapshots.
        CorruptImage: something that would be kept is not what it should be.
        OSError: what was done is taken back if there was no space or a table cannot be read; else see
            `Qcow2Driver.overhaul`.
    """
    _check_name(name)
    snapshots = await _load(driver)
    taken = next((each for each in snapshots if name in (each.name, each.id)), None)
    if taken is not None:
        raise ConfigError(
            f"{driver.file.path}: the name {escaped(name)} is taken by snapshot {escaped(taken.id)} "
            f"({escaped(taken.name)}), expected a new one"
        )
    header = driver.header
    l1 = driver.mapping.l1.entries[: header.l1_entries_needed(driver.size)]
    made = Snapshot(
        _next_id(snapshots),
        name,
        l1_offset=0,
        l1_size=len(l1),
        seconds=now_ns // 10**9 & 0xFFFF_FFFF,
        nanoseconds=now_ns % 10**9,
        disk_size=driver.size,
    )
    _check_table(driver, [*snapshots, made])
    change = _Change(driver, snapshots, progress, 3 * _tables(l1))

    async def switch() -> Snapshot:
        change.trees.check_l1(driver.mapping.l1.entries)
        await change.trees.check(l1)
        await change.raise_tree(l1)
        await change.fix_flags(l1)
        await change.fix_active_l1()
        plain = array("Q", [entry & ~COPIED for entry in l1])
        kept = replace(made, l1_offset=await change.place(encode_offsets(plain)))
        await change.switch_table(len(snapshots) + 1, await change.place(serialize([*snapshots, kept], driver.size)))
        return kept

    return await change.carry_out(switch)


async def apply_snapshot(driver: Qcow2Driver, wanted: str, *, progress: Progress | None = None) -> Snapshot:
    """Make the disk what it was, its size included; what it is now is lost. The snapshot stays; its VM state is left
    where it is.

    For a moment the snapshot's tree has one reference more than before and after it, which narrow counts must hold.

    Raises: ConfigError: there is no snapshot of this id or name. UnsupportedFeature: the image has bitmaps. Else as
        `create_snapshot`.
    """
    snapshots = await _load(driver)
    snapshot = find_snapshot(driver.file.path, snapshots, wanted)
    header, path = driver.header, driver.file.path
    if driver.bitmaps is not None and driver.bitmaps.names:
        raise UnsupportedFeature(
            path, "it has dirty bitmaps, which cannot follow when a snapshot is applied: remove them first"
        )
    size = driver.size if snapshot.disk_size is None else snapshot.disk_size
    needed = header.l1_entries_needed(size)
    if needed > snapshot.l1_size or size > s.SIZE_MAX:
        raise CorruptImage(
            path,
            f"snapshot {escaped(snapshot.id)} has {snapshot.l1_size} L1 entries for {size} bytes, expected {needed}",
            header.snapshot_table_offset,
        )
    l1 = (await load_l1(driver.file, header, snapshot))[:needed]
    former = driver.mapping.l1.entries[:]
    change = _Change(driver, snapshots, progress, 3 * _tables(l1) + 2 * _tables(former))

    async def switch() -> None:
        await change.trees.check(l1)
        await change.trees.check(former)
        if size != driver.size and any(each.disk_size is None for each in snapshots):
            await change.pin_sizes()
        await change.raise_tree(l1)
        await change.fix_flags(l1)
        entries = array("Q", [entry & ~COPIED for entry in l1] or [0])
        await change.switch_l1(L1Table(driver.file, await change.place(encode_offsets(entries)), entries), size)

    async def finish() -> None:
        await change.lower_tree(former)

    await change.carry_out(switch, finish)
    return snapshot


async def delete_snapshot(driver: Qcow2Driver, wanted: str, *, progress: Progress | None = None) -> Snapshot:
    """Forget a snapshot and give back what only it needed, its VM state included.

    Raises: ConfigError: there is no snapshot of this id or name. Else as `create_snapshot`.
    """
    snapshots = await _load(driver)
    snapshot = find_snapshot(driver.file.path, snapshots, wanted)
    rest = [each for each in snapshots if each is not snapshot]
    l1 = await load_l1(driver.file, driver.header, snapshot)
    active = driver.mapping.l1
    change = _Change(driver, snapshots, progress, 2 * _tables(l1) + _tables(active.entries))

    async def switch() -> None:
        change.trees.check_l1(active.entries)
        await change.trees.check(l1)
        await change.switch_table(len(rest), await change.place(serialize(rest, driver.size)) if rest else 0)

    async def finish() -> None:
        await change.lower_tree(l1)
        change.free(snapshot.l1_offset, 8 * snapshot.l1_size)
        await change.settle()
        await change.fix_flags(active.entries)
        await change.fix_active_l1()

    await change.carry_out(switch, finish)
    return snapshot


async def _load(driver: Qcow2Driver) -> list[Snapshot]:
    if driver.header.has_data_file:
        raise UnsupportedFeature(driver.file.path, "an image with an external data file cannot have internal snapshots")
    return await load_snapshots(driver.file, driver.header)


def _check_name(name: str) -> None:
    size = len(name.encode(errors="surrogateescape"))
    if not 1 <= size <= NAME_BYTES_MAX or not name.isprintable():
        raise ConfigError(
            f"the snapshot name {escaped(name)} has {size} bytes, expected 1 to {NAME_BYTES_MAX}, all printable"
        )


def _check_table(driver: Qcow2Driver, snapshots: list[Snapshot]) -> None:
    size = len(serialize(snapshots, driver.size))
    if len(snapshots) > s.SNAPSHOTS_MAX or size > TABLE_BYTES_MAX:
        raise UnsupportedFeature(
            driver.file.path,
            f"the snapshot table would hold {len(snapshots)} snapshots in {size} bytes, allowed are {s.SNAPSHOTS_MAX} "
            f"in {TABLE_BYTES_MAX}",
        )
    assert driver.refcounts is not None
    l1_clusters(driver.file.path, driver.header, snapshots, driver.refcounts.end)


def _next_id(snapshots: list[Snapshot]) -> str:
    """One more than the highest decimal id; a name that is that number would be hard to reach, and is passed over."""
    ids = [each.id for each in snapshots]
    decimal = [int(each) for each in ids if each.isascii() and each.isdecimal() and len(each) <= _ID_DIGITS_MAX]
    number = max(decimal, default=0) + 1
    taken = {each.name for each in snapshots}
    while str(number) in taken:
        number += 1
    return str(number)


def _tables(l1: array[int]) -> int:
    return len(l1) - l1.count(0)


class _Change:
    """One change. What it has done up to the header's write is remembered, to be taken back if need be."""

    def __init__(
        self, driver: Qcow2Driver, snapshots: list[Snapshot], progress: Progress | None, table_count: int
    ) -> None:
        counts = driver.refcounts
        assert counts is not None
        self._driver = driver
        self._file = driver.file
        self._counts: Refcounts = counts
        self._bits = driver.header.cluster_bits
        self._cluster_size = driver.header.cluster_size
        self._snapshots = snapshots
        self._raised: array[int] = array("Q")
        self._raised_count = 0
        """Counts raised, in the order in which `_raised` is walked."""
        self._placed: list[Run] = []
        self._has_reached_flags = False
        """Whether flags may not be what the former counts ask for."""
        self._progress = progress
        self._tables_done = 0
        self._table_count = table_count
        self._freed_count = 0
        self.trees = Trees(driver, counts, snapshots, self._count_table)

    def _count_table(self) -> None:
        self._tables_done += 1
        if self._progress is not None:
            self._progress(min(self._tables_done, self._table_count), self._table_count)

    # The order of a change

    async def carry_out(
        self, switch: Callable[[], Awaitable[T]], finish: Callable[[], Awaitable[None]] | None = None
    ) -> T:
        """`switch`, which ends with the header's write, and take it back if it cannot be done; else `finish`."""
        refusal: ImageError | OSError
        async with self._driver.overhaul():
            try:
                switched = await switch()
            except ImageError as error:
                refusal = error
            except OSError as error:
                if not leaves_no_doubt(error):
                    raise
                refusal = error
            else:
                if finish is not None:
                    with self._driver.leaving_repair():
                        await finish()
                return switched
            with self._driver.leaving_repair():
                await self._take_back()
        raise refusal

    async def _take_back(self) -> None:
        left = self._raised_count
        if not left and not self._placed:
            return
        async for cluster, count in self.trees.runs(self._raised):
            if not left:
                break
            count = min(count, left)
            await self._lower(cluster, count, punch=False)
            left -= count
        for placed in self._placed:
            self._counts.free(placed.cluster, placed.count)
        await self.settle()
        if self._has_reached_flags:
            await self.fix_flags(self._driver.mapping.l1.entries)
            await self.fix_active_l1()

    # Counts

    async def raise_tree(self, l1: array[int]) -> None:
        """One reference more to all of a tree, durable."""
        self._raised = l1
        async for cluster, count in self.trees.runs(l1):
            await self._raise(cluster, count)
            if self._counts.cache.is_strained:
                await self.settle()
        await self.settle()

    async def _raise(self, cluster: int, count: int) -> None:
        position, stop = cluster, cluster + count

        def raise_rest() -> int | Miss:
            return self._counts.raise_counts(position, stop - position)

        while position < stop:
            raised = await hindered(answered(raise_rest))
            self._raised_count += raised
            position += raised

    async def lower_tree(self, l1: array[int]) -> None:
        """One reference less to all of a tree: nothing durable refers to it any more."""
        async for cluster, count in self.trees.runs(l1):
            await self._lower(cluster, count, punch=True)

    async def _lower(self, cluster: int, count: int, *, punch: bool) -> None:
        self._counts.free(cluster, count, punch=punch)
        self._freed_count += 1
        if self._freed_count % quarantine.RUNS_MAX == 0:
            await self.settle()

    def free(self, offset: int, length: int) -> None:
        """A table's clusters, when nothing durable refers to it any more."""
        clusters = host_clusters(offset, length, self._bits)
        if clusters:
            self._counts.free(clusters[0], len(clusters), punch=True)

    async def settle(self) -> None:
        """Raises: OSError. ImageError: a count was wrong."""
        await self._driver.settle()
        self._driver.check()

    # Tables, and the header

    async def place(self, content: bytes) -> int:
        """Write a table into clusters of its own, durable; where it lies, 0 if it is empty."""
        count = div_ceil(len(content), self._cluster_size)
        if not count:
            return 0
        placed = await hindered(answered(lambda: self._counts.allocate_contiguous(count)))
        self._placed.append(placed)
        self._counts.metadata.update(range(placed.cluster, placed.cluster + count))
        await self.settle()
        offset = placed.cluster << self._bits
        await write_durably(self._file, offset, content.ljust(count << self._bits, b"\0"))
        return offset

    async def pin_sizes(self) -> None:
        """Write down the disk's size in each snapshot that relies on it, for it is about to change."""
        content = serialize(self._snapshots, self._driver.size)
        await self.switch_table(len(self._snapshots), await self.place(content))

    async def switch_table(self, snapshot_count: int, offset: int) -> None:
        """Make the table at `offset` the snapshot table; the one that there was is freed."""
        header = self._driver.header
        await write_durably(self._file, s.SNAPSHOT_FIELDS_OFFSET, s.SNAPSHOT_FIELDS.pack(snapshot_count, offset))
        self._placed.clear()
        self.free(header.snapshot_table_offset, stored_table_size(self._snapshots))
        header.snapshot_count, header.snapshot_table_offset = snapshot_count, offset

    async def switch_l1(self, table: L1Table, size: int) -> None:
        """Make `table` the active L1 table, of a disk of `size` bytes; the one that there was is freed."""
        driver, header = self._driver, self._driver.header
        fields = s.SIZE_FIELDS.pack(size, header.crypt_method, len(table.entries), table.offset)
        await write_durably(self._file, s.SIZE_OFFSET, fields)
        self._placed.clear()
        self.free(header.l1_offset, 8 * header.l1_size)
        header.size, header.l1_size, header.l1_offset = size, len(table.entries), table.offset
        self._counts.metadata.update((entry & OFFSET_MASK) >> self._bits for entry in table.entries if entry)
        driver.mapping.switch(table, size)
        driver.size = size

    # COPIED

    async def fix_flags(self, l1: array[int]) -> None:
        """Give the entries of a tree's L2 tables the flag that their counts ask for, durable. Slices in which nothing
        changes are not written: they may be holes of the file, and there may be no space for them.
        """
        self._has_reached_flags = True
        per_slice = s.SLICE_SIZE // 8
        async for cluster, start, words in self.trees.pieces(l1):
            writes = []
            for number in {index // per_slice for index in await self._fix_words(words)}:
                offset = (cluster << self._bits) + start + number * s.SLICE_SIZE
                content = encode_offsets(words[number * per_slice : (number + 1) * per_slice])
                writes.append(Write(self._file, offset, content))
            if writes:
                await run(Plan((Stage(merged(writes), ()),)))
        await self._file.fdatasync()
        mapping = self._driver.mapping
        mapping.switch(mapping.l1, mapping.size)

    async def _fix_words(self, words: array[int]) -> list[int]:
        """Indexes of those entries whose flag had to be changed; what is no plain entry has none."""
        changed = []
        base, counts = 0, array("Q")
        for index in range(0, len(words), self.trees.words):
            entry = words[index]
            cluster = (entry & self.trees.aligned) >> self._bits
            if not cluster or entry & self.trees.odd:
                continue
            if not base <= cluster < base + len(counts):
                base, counts = await self._counts_from(cluster)
            if (counts[cluster - base] == 1) != (entry >= COPIED):
                words[index] = entry ^ COPIED
                changed.append(index)
        return changed

    async def _counts_from(self, cluster: int) -> tuple[int, array[int]]:
        return await hindered(answered(lambda: self._counts.counts_from(cluster)))

    async def fix_active_l1(self) -> None:
        """The same for the active L1 table, whose flags follow those of its L2 tables."""
        l1 = self._driver.mapping.l1
        for index, entry in enumerate(l1.entries):
            if entry & OFFSET_MASK:
                cluster = (entry & OFFSET_MASK) >> self._bits
                base, counts = await self._counts_from(cluster)
                if (counts[cluster - base] == 1) != (entry >= COPIED):
                    l1.set(index, entry ^ COPIED)
        await self.settle()
