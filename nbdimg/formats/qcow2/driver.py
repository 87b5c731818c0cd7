"""An open qcow2 image: the driver, and the order in which what it changed reaches the disk.

    stage 1    refcounts raised so far                             barrier: makes the guest's data durable as well
    stage 2    refcount table entries, or the table in a new place barrier, then the header's pointer to it, barrier
    stage 3    L2 slices                                           barrier
    stage 4    L1 entries, or the table in a new place             barrier
    stage 5    the header's size and L1 table, when they change    barrier
    then       what lost its last reference is counted down, and may be reused

An empty stage other than the first is left out: a flush after writes in place costs one barrier, after allocating two.

    (Q1) On disk, a cluster's refcount is never below its number of references: leaks allowed, dangling never.
    (Q2) An L2 entry reaches the disk after its data and after its refcount.
    (Q3) An L1 entry reaches the disk after its L2 table.
    (Q4) A refcount decrease reaches the disk after the entry that held the reference is gone.
    (Q5) A freed cluster is reused only after (Q4) is durable.
    (Q6) Header pointers (L1 table, refcount table, snapshot table, bitmap directory) change last.

With lazy refcounts the dirty bit is durable before stage 3; stages 1 and 2 then wait for the orderly end, or until the
table has moved, and an image that is opened dirty is repaired first.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from nbdimg.errors import CorruptImage, ImageError, ImageFailed
from nbdimg.formats.qcow2 import structs as s
from nbdimg.formats.qcow2.bitmap_store import BitmapStore
from nbdimg.formats.qcow2.header import Header
from nbdimg.formats.qcow2.mapping import Mapping
from nbdimg.formats.qcow2.refcount import Refcounts
from nbdimg.formats.qcow2.structs import Incompatible
from nbdimg.image.driver import Allocation, Extent, Miss, Unmap
from nbdimg.image.tables import TableCache
from nbdimg.storage.file import BlockFile
from nbdimg.storage.ordering import (
    Plan,
    Stage,
    UnwrittenError,
    Write,
    leaves_no_doubt,
    merged,
    run,
    space_may_wait,
    write_durably,
)


class Qcow2Driver:
    """Made by `open.open_driver`. Args: refcounts: None when nothing will be written."""

    name = "qcow2"
    sector_size = s.SECTOR_SIZE

    def __init__(
        self,
        file: BlockFile,
        data_file: BlockFile | None,
        header: Header,
        mapping: Mapping,
        refcounts: Refcounts | None,
        bitmaps: BitmapStore | None = None,
    ) -> None:
        self.file = file
        self.header = header
        self.mapping = mapping
        self.refcounts = refcounts
        self.bitmaps = bitmaps
        self.size = mapping.size
        self.cluster_size = header.cluster_size
        self.unmap_size = header.cluster_size // (s.SUBCLUSTERS if header.has_subclusters else 1)
        self.data_file = data_file
        self._files = (file,) if data_file is None else (data_file, file)
        self._fault: ImageError | None = None
        self._lags = self._is_closing = self._has_new_size = False
        self._is_mark_alone = False
        """Whether the last plan was made after corruption was found, without what waits to be written."""
        self._is_marking = False
        """The dirty bit is set here, and is not known to be on disk: the plan that holds it may fail."""
        self._wants_repair = False
        """A change of its tables has left leaks, or COPIED flags out: the dirty bit stays for the next opening."""
        self.map, self.locate = mapping.map, mapping.locate
        self.guest_file = mapping.guest_file

    # Changes

    @property
    def is_strained(self) -> bool:
        counts = self.refcounts
        return self.mapping.cache.is_strained or (counts is not None and counts.is_strained)

    @property
    def failure(self) -> str | None:
        return None if self._fault is None else str(self._fault).removeprefix(f"{self.file.path}: ")

    @property
    def tables(self) -> dict[str, TableCache]:
        counts = self.refcounts
        return {"l2": self.mapping.cache} | ({} if counts is None else {"refcount": counts.cache})

    def place(self, offset: int, stop: int) -> Extent | Miss:
        try:
            return self.mapping.place(offset, stop)
        except CorruptImage as error:
            raise self._failed(error) from None

    def reserve(self, offset: int, stop: int) -> Allocation | Miss:
        self.check()
        try:
            return self.mapping.reserve(offset, stop)
        except CorruptImage as error:
            raise self._failed(error) from None

    def commit(self, allocation: Allocation) -> None:
        self.mapping.commit(allocation)

    def release(self, allocation: Allocation) -> None:
        self.mapping.release(allocation)

    def unmap(self, offset: int, stop: int, to: Unmap) -> int | Miss:
        self.check()
        try:
            return self.mapping.unmap(offset, stop, to)
        except CorruptImage as error:
            raise self._failed(error) from None

    def drop(self, offset: int) -> int | Miss:
        """See `Mapping.drop`."""
        self.check()
        try:
            return self.mapping.drop(offset)
        except CorruptImage as error:
            raise self._failed(error) from None

    def made_bitmaps(self) -> BitmapStore:
        """The image's bitmaps, so that there may be some; until then it has none."""
        if self.bitmaps is None:
            self.bitmaps = BitmapStore(self.file, self.header, [])
        return self.bitmaps

    def resized(self) -> None:
        """`header` has another size, or names another L1 table: the next plan writes it (Q6)."""
        self._has_new_size = True

    def unmapped(self, offset: int, length: int) -> None:
        pass

    def check(self) -> None:
        """Raises: ImageError: corruption was found, or a change of the tables failed."""
        if self._fault is not None:
            raise self._fault

    def _failed(self, error: CorruptImage) -> CorruptImage:
        """Corruption was found while writing: no metadata is written any more but the mark of it."""
        if self.refcounts is not None and self._fault is None:
            self._fault = error
            self.header.incompatible |= Incompatible.CORRUPT if self.header.version >= 3 else 0
        return error

    # Order on disk

    def flush_plan(self) -> Plan:
        self._is_mark_alone = self._fault is not None
        if self._is_mark_alone:
            mark = [self._incompatible_write()] if self.header.version >= 3 else []
            return Plan((Stage((), self._files), *self._stages(mark)))
        counts = self.refcounts
        assert counts is not None
        first: list[Write] = []
        pointers: list[list[Write]] = []
        if self.header.has_lazy_refcounts and not self.header.is_dirty and self.mapping.is_dirty:
            self.header.incompatible |= Incompatible.DIRTY
            self._is_marking = True
        if self._is_marking:
            first = [self._incompatible_write()]
        self._lags = self._is_lazy and not counts.cache.is_strained and not counts.has_moved
        if self._lags:
            counts.capture_freed()
        else:
            blocks, *pointers = counts.capture()
            first += blocks
        return Plan(
            (
                Stage(merged(first), self._files),
                *(stage for writes in pointers for stage in self._stages(writes)),
                *self._stages(self.mapping.cache.capture()),
                *self._stages(self.mapping.l1.capture()),
                *self._stages([self._size_write()] if self._has_new_size else []),
            )
        )

    @property
    def _is_lazy(self) -> bool:
        """Whether refcounts may stay behind: the image says on disk that they do."""
        return self.header.has_lazy_refcounts and self.header.is_dirty and not self._is_closing

    def _stages(self, writes: list[Write]) -> list[Stage]:
        return [Stage(merged(writes), (self.file,))] if writes else []

    async def flushed(self) -> None:
        if self._is_mark_alone:
            if self.mapping.is_dirty:
                message = f"what was written since the last flush may be lost: {self.failure}; open it anew"
                raise ImageFailed(self.file.path, message)
            return
        counts = self.refcounts
        assert counts is not None
        self.mapping.cache.written()
        self.mapping.l1.written()
        self._has_new_size = self._is_marking = False
        if not self._lags:
            counts.written()
        if self._fault is not None:
            return
        try:
            await counts.reclaim()
        except CorruptImage as error:
            self._failed(error)

    def _size_write(self) -> Write:
        header = self.header
        fields = s.SIZE_FIELDS.pack(header.size, header.crypt_method, header.l1_size, header.l1_offset)
        return Write(self.file, s.SIZE_OFFSET, fields)

    def _incompatible_write(self) -> Write:
        return Write(self.file, s.INCOMPATIBLE_OFFSET, s.U64.pack(self.header.incompatible))

    async def set_dirty(self, is_dirty: bool) -> None:
        """Write the dirty bit, with a barrier behind it. What it vouches for is the caller's to have flushed.

        Raises: UnwrittenError: it is as it was. OSError.
        """
        bit, before = int(Incompatible.DIRTY), self.header.incompatible
        self.header.incompatible = before | bit if is_dirty else before & ~bit
        try:
            await write_durably(self.file, s.INCOMPATIBLE_OFFSET, s.U64.pack(self.header.incompatible))
        except UnwrittenError:
            self.header.incompatible = before
            raise

    async def settle(self) -> None:
        """Flush until nothing is left to do: refcounts that a flush counted down are written too. They must not lag."""
        counts = self.refcounts
        assert counts is not None
        assert not self._is_lazy
        while self._fault is None and (counts.is_dirty or self.mapping.is_dirty):
            await run(self.flush_plan())
            await self.flushed()

    @asynccontextmanager
    async def overhaul(self) -> AsyncIterator[None]:
        """Around a change of tables and refcounts at large, with no request and no flush in flight.

        Before it everything is durable; within it refcounts are not lazy, and in version 3 the dirty bit says on disk
        that COPIED flags and refcounts need not fit. If it fails the bit stays, so that the next opening repairs the
        image, and this driver changes nothing any more; `leaving_repair` is for what need not fail. The bit also stays
        where there is no space to clear it: then the end does.

        Raises: ImageError: an earlier change failed, or this one's counts are corrupt. OSError: without space even for
            the bit, or where counts that are due to be lowered cannot be read, nothing has changed and the driver goes
            on.
        """
        self.check()
        was_closing, self._is_closing = self._is_closing, True
        has_begun = False
        try:
            await self.settle()
            if self.header.version >= 3:
                await self.set_dirty(True)
            has_begun = True
            yield
            with space_may_wait():
                await self.settle()
                self.check()
                if self.header.version >= 3 and not self._wants_repair:
                    await self.set_dirty(False)
        except BaseException as error:
            if not has_begun and leaves_no_doubt(error):
                self._is_closing = was_closing
            elif self._fault is None:
                self._fault = ImageFailed(self.file.path, f"a change of its tables failed ({error}); open it anew")
            raise
        self._is_closing = was_closing

    @contextmanager
    def leaving_repair(self) -> Iterator[None]:
        """Around that part of an overhaul which a repair does as well. Where there is no space for it, or a table
        cannot be read, it is left to the next opening: no count is too low, and no flag says "write in place" wrongly.

        Raises: OSError: leaves a doubt, or the image is of version 2, which no opening repairs.
        """
        try:
            yield
        except OSError as error:
            if self.header.version < 3 or not leaves_no_doubt(error):
                raise
            self._wants_repair = True

    async def close(self) -> None:
        """Raises: OSError, ImageError."""
        self._is_closing = True
        await self.settle()
        if self._fault is not None:
            await run(self.flush_plan())
        if self.header.is_dirty and self._fault is None and not self._wants_repair:
            await self.set_dirty(False)
        if self.bitmaps is not None and self.refcounts is not None and self._fault is None:
            await self.bitmaps.store(self.refcounts)

    async def abandon(self) -> None:
        await self.mapping.close()
        for file in self._files:
            await file.close()
        if self.refcounts is not None:
            self.refcounts.forget()
        if self.bitmaps is not None:
            self.bitmaps.forget()
