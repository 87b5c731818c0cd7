"""An open VHDX image.

    (V5) A BAT entry becomes FULLY_PRESENT after its payload block is durable: the entry is in a log entry behind the
         barrier that covers the payload. V1 to V4 and V6 are the journal's.

Nothing is written before the first change of a session, not even a header: what changes a mapping or a guest's bytes
first gets a `Miss`, whose loading begins the session.
"""

from __future__ import annotations

from uuid import UUID

from nbdimg.formats.vhdx.bat import Bat
from nbdimg.formats.vhdx.journal import Journal
from nbdimg.formats.vhdx.space import Space
from nbdimg.formats.vhdx.structs import PAGE_SIZE
from nbdimg.image.driver import Allocation, Extent, Miss, Unmap
from nbdimg.storage.file import BlockFile
from nbdimg.storage.ordering import Plan, Stage
from nbdimg.units import MiB, align_down


class VhdxDriver:
    """Made by `open.open_driver`. `journal` and `space` are None when nothing will be written."""

    name = "vhdx"
    unmap_size = PAGE_SIZE

    def __init__(
        self,
        file: BlockFile,
        bat: Bat,
        journal: Journal | None,
        space: Space | None,
        *,
        block_size: int,
        sector_size: int,
        data_write_guid: UUID,
    ) -> None:
        self.file = file
        self.bat = bat
        self.size = bat.size
        self.cluster_size = block_size
        self.sector_size = sector_size
        self.data_write_guid = data_write_guid
        """When it was opened: what a child names as its parent's identity."""
        self._journal = journal
        self._space = space
        self.map = bat.map

    @property
    def is_strained(self) -> bool:
        return self.bat.pages.is_strained or self.bat.bitmaps.is_strained

    def _idle(self) -> Miss | None:
        """What a first change lacks."""
        if self._journal is None or self._journal.has_begun:
            return None
        return Miss(self._journal, 0)

    def place(self, offset: int, stop: int) -> Extent | Miss:
        return self._idle() or self.bat.place(offset, stop)

    def reserve(self, offset: int, stop: int) -> Allocation | Miss:
        return self._idle() or self.bat.reserve(offset, stop)

    def commit(self, allocation: Allocation) -> None:
        self.bat.commit(allocation)

    def release(self, allocation: Allocation) -> None:
        self.bat.release(allocation)

    def unmap(self, offset: int, stop: int, to: Unmap) -> int | Miss:
        idle = self._idle()
        return self.bat.unmap(offset, stop, to) if idle is None else idle

    def unmapped(self, offset: int, length: int) -> None:
        pass

    def flush_plan(self) -> Plan:
        assert self._space is not None
        assert self._journal is not None
        first = Stage((), (self.file,))
        self._space.capture()
        entries = sorted(self.bat.pages.capture(), key=lambda write: write.offset, reverse=True)
        pages = [*self.bat.bitmaps.capture(), *entries]
        if not pages:
            return Plan((first,))
        flushed_offset = align_down(self._space.grown, MiB)
        return Plan((first, *self._journal.stages(pages, flushed_offset, self._space.end)))

    async def flushed(self) -> None:
        assert self._space is not None
        assert self._journal is not None
        self.bat.pages.written()
        self.bat.bitmaps.written()
        self._journal.written()
        await self._space.reclaim()

    async def close(self) -> None:
        """Declare the log empty, then cut off what the file was grown ahead: in this order, so that no log speaks of a
        larger file. Raises: OSError.
        """
        assert self._space is not None
        assert self._journal is not None
        if self._journal.has_begun:
            await self._journal.end()
        if self._space.grown > self._space.end:
            await self.file.truncate(self._space.end)

    async def abandon(self) -> None:
        await self.file.close()
