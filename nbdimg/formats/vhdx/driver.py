"""An open VHDX image.

    (V5) A BAT entry becomes FULLY_PRESENT after its payload block is durable: the entry is in a log entry behind the
         barrier that covers the payload. V1 to V4 and V6 are the journal's, B1 to B4 the table's.

Nothing is written before the first change of a session, not even a header.
"""

from __future__ import annotations

from nbdimg.formats.vhdx.bat import Bat
from nbdimg.formats.vhdx.journal import Journal
from nbdimg.formats.vhdx.offline import try_cut
from nbdimg.formats.vhdx.parts import Parts
from nbdimg.formats.vhdx.space import Space
from nbdimg.formats.vhdx.structs import PAGE_SIZE
from nbdimg.image.tables import TableCache
from nbdimg.storage.file import BlockFile
from nbdimg.storage.ordering import Plan, Stage
from nbdimg.units import MiB, align_down, align_up


class VhdxDriver:
    """Made by `open.load_driver`. `journal` is None when nothing will be written, and then `reach` does not matter."""

    name = "vhdx"
    unmap_size = PAGE_SIZE
    failure: str | None = None

    def __init__(self, file: BlockFile, parts: Parts, journal: Journal | None, reach: int) -> None:
        self.file = self.guest_file = file
        self._journal = journal
        self._space = Space(file, max(reach, *(stop for _, stop, _ in parts.structures())))
        self.bat = bat = Bat(file, parts, self._space, journal)
        self.size = bat.size
        self.cluster_size = parts.geometry.block_size
        self.sector_size = parts.geometry.sector_size
        self.data_write_guid = parts.headers.current.data_write_guid
        """When it was opened: what a child names as its parent's identity."""
        self.map, self.locate, self.place = bat.map, bat.locate, bat.place
        self.reserve, self.commit, self.release = bat.reserve, bat.commit, bat.release
        self.unmap = bat.unmap

    @property
    def is_strained(self) -> bool:
        return self.bat.pages.is_strained or self.bat.bitmaps.is_strained or self._space.is_strained

    @property
    def tables(self) -> dict[str, TableCache]:
        return {"bat": self.bat.pages, "sector_bitmap": self.bat.bitmaps}

    def unmapped(self, offset: int, length: int) -> None:
        pass

    def flush_plan(self) -> Plan:
        """Bitmaps come before the BAT, and a bitmap's own entry, which stands behind those of its chunk, before them:
        when it takes several log entries, no block is partially present before it has its bitmap.
        """
        assert self._journal is not None
        first = Stage((), (self.file,))
        self._space.capture()
        entries = sorted(self.bat.pages.capture(), key=lambda write: write.offset, reverse=True)
        pages = [*self.bat.bitmaps.capture(), *entries]
        if not pages:
            return Plan((first,))
        grown = self._space.grown
        last_offset = min(self._space.end, align_up(grown, MiB))
        return Plan((first, *self._journal.stages(pages, align_down(grown, MiB), last_offset)))

    async def flushed(self) -> None:
        assert self._journal is not None
        self.bat.pages.written()
        self.bat.bitmaps.written()
        self._journal.written()
        await self._space.reclaim()

    async def close(self) -> None:
        """Declare the log empty, then cut off what is free at the end, grown ahead or given up: in this order, so that
        no log speaks of a larger file. Raises: OSError.
        """
        assert self._journal is not None
        if self._journal.has_begun:
            await self._journal.end()
        end = self._space.shorten()
        if self._space.grown > end:
            await try_cut(self.file, end)

    async def abandon(self) -> None:
        await self.file.close()
        self.bat.pages.forget()
        self.bat.bitmaps.forget()
