"""The parts of a file whose log has been replayed, and where each of them lies."""

from __future__ import annotations

from dataclasses import dataclass

from nbdimg.errors import CorruptImage
from nbdimg.formats.vhdx.geometry import Geometry
from nbdimg.formats.vhdx.header import Headers
from nbdimg.formats.vhdx.metadata import Metadata, load_metadata
from nbdimg.formats.vhdx.region import Regions, load_regions
from nbdimg.formats.vhdx.structs import HEADER_SECTION_SIZE
from nbdimg.storage.file import BlockFile


@dataclass(frozen=True, slots=True)
class Parts:
    """Of a file whose log has been replayed, in it or in memory."""

    headers: Headers
    regions: Regions
    metadata: Metadata
    geometry: Geometry

    def structures(self) -> list[tuple[int, int, str]]:
        """(start, stop, name) of all but the blocks and bitmaps, in order; they do not overlap."""
        header = self.headers.current
        log = [(header.log_offset, header.log_stop, "the log")] if header.log_length else []
        regions = [(entry.offset, entry.offset + entry.length, entry.name) for entry in self.regions.entries]
        return sorted([(0, HEADER_SECTION_SIZE, "the header section"), *log, *regions])

    def check_bat_length(self, path: str) -> None:
        """Raises: CorruptImage: the BAT's region does not hold an entry for each block."""
        regions, needed = self.regions, 8 * self.geometry.entry_count
        if needed > regions.bat_length:
            raise CorruptImage(
                path,
                f"the BAT region has {regions.bat_length} bytes, expected at least {needed} for "
                f"{self.geometry.block_count} blocks (offset {regions.bat_offset})",
                regions.bat_offset,
            )


async def load_parts(file: BlockFile, headers: Headers) -> Parts:
    """Raises: CorruptImage, UnsupportedFeature, OSError: as `load_regions` and `load_metadata`."""
    regions = await load_regions(file, headers.current)
    metadata = await load_metadata(file, regions)
    geometry = Geometry(
        size=metadata.virtual_size,
        block_size=metadata.block_size,
        sector_size=metadata.logical_sector_size,
        has_parent=metadata.has_parent,
        is_fixed=metadata.leaves_blocks_allocated,
    )
    return Parts(headers, regions, metadata, geometry)
