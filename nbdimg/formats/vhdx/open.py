"""Opening a VHDX image: header, log, regions, metadata, BAT, parent."""

from __future__ import annotations

from nbdimg.errors import ConfigError, CorruptImage, ImageError
from nbdimg.formats.options import Backing, Opened, OpenOptions
from nbdimg.formats.vhdx.bat import Bat, Geometry
from nbdimg.formats.vhdx.driver import VhdxDriver
from nbdimg.formats.vhdx.header import Header, load_headers
from nbdimg.formats.vhdx.journal import Journal
from nbdimg.formats.vhdx.locator import candidates, verify_linkage
from nbdimg.formats.vhdx.metadata import Metadata, load_metadata
from nbdimg.formats.vhdx.region import Regions, load_regions
from nbdimg.formats.vhdx.replay import open_replayed, replay_to_file
from nbdimg.formats.vhdx.space import Space
from nbdimg.formats.vhdx.structs import HEADER_SECTION_SIZE
from nbdimg.image.driver import FormatDriver
from nbdimg.image.gate import Reference
from nbdimg.storage.file import BlockFile
from nbdimg.units import MiB, align_up


async def open_driver(file: BlockFile, options: OpenOptions) -> Opened:
    """Open the image in `file`, which stays the caller's until this returns.

    A read-write open replays the log into the file; a read-only one replays it in memory.

    Raises: CorruptImage, UnsupportedFeature: what the image is not or has not. ConfigError: a snapshot was asked for.
    """
    if options.snapshot is not None:
        raise ConfigError(f"{file.path}: a vhdx image has no internal snapshots")
    headers = await load_headers(file)
    if options.writable:
        headers = await replay_to_file(file, headers)
    else:
        file = await open_replayed(file, headers.current)
    regions = await load_regions(file, headers.current)
    metadata = await load_metadata(file, regions)
    geometry = Geometry(
        size=metadata.virtual_size,
        block_size=metadata.block_size,
        sector_size=metadata.logical_sector_size,
        has_parent=metadata.has_parent,
        is_fixed=metadata.leaves_blocks_allocated and not metadata.has_parent,
    )
    _check_bat(file, regions, geometry)
    journal = space = None
    if options.writable:
        journal = Journal(file, headers)
        space = Space(file, _structures(headers.current, regions))
    driver = VhdxDriver(
        file,
        Bat(file, regions.bat_offset, geometry, space),
        journal,
        space,
        block_size=metadata.block_size,
        sector_size=metadata.logical_sector_size,
        data_write_guid=headers.current.data_write_guid,
    )
    return Opened(driver, _parent(file, metadata))


def _check_bat(file: BlockFile, regions: Regions, geometry: Geometry) -> None:
    needed = 8 * geometry.entry_count
    if needed > regions.bat_length:
        raise CorruptImage(
            file.path,
            f"the BAT region has {regions.bat_length} bytes, expected at least {needed} for {geometry.block_count} "
            f"blocks (offset {regions.bat_offset})",
            regions.bat_offset,
        )
    if regions.bat_offset + needed > align_up(file.size, MiB):
        raise CorruptImage(
            file.path,
            f"the BAT ends at {regions.bat_offset + needed}, expected inside the file's {file.size} bytes "
            f"(offset {regions.bat_offset})",
            regions.bat_offset,
        )


def _structures(header: Header, regions: Regions) -> list[tuple[int, int]]:
    """Where no payload block may lie."""
    return [
        (0, HEADER_SECTION_SIZE),
        (header.log_offset, header.log_offset + header.log_length),
        *((entry.offset, entry.offset + entry.length) for entry in regions.entries),
    ]


def _parent(file: BlockFile, metadata: Metadata) -> Backing | None:
    locator = metadata.locator
    if not metadata.has_parent or locator is None:
        return None
    references = tuple(
        Reference(file.path, "parent locator", name, locator.offset, is_writable=False) for name in candidates(locator)
    )
    if not references:
        raise CorruptImage(
            file.path,
            f"the parent locator's paths name no file, expected one at least (offset {locator.offset})",
            locator.offset,
        )

    def verify(parent: FormatDriver) -> None:
        if not isinstance(parent, VhdxDriver):
            raise ImageError(file.path, f"its parent {parent.file.path} is a {parent.name} image, expected vhdx")
        verify_linkage(file.path, locator, parent.file.path, parent.data_write_guid)
        if parent.sector_size != metadata.logical_sector_size:
            raise CorruptImage(
                file.path,
                f"logical sectors have {metadata.logical_sector_size} bytes, those of its parent {parent.file.path} "
                f"{parent.sector_size}, expected the same along a chain",
            )

    return Backing(references, "vhdx", verify)
