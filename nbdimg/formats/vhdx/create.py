"""Making new images: an order of writing that leaves a whole image or none.

    1  log (zeroes), metadata, BAT, both headers, both region tables, a fixed file's blocks     barrier
    2  the file identifier, in one sector, which no crash can tear                              barrier, the directory's

Before 2 the file has no signature and opens as no VHDX image. What fails or is interrupted removes the file.

    0        header section
    1 MiB    log
    + log    metadata region, 1 MiB
    + 1 MiB  BAT region
    + BAT    a fixed file's blocks

It is the layout of Windows. Both regions are marked as required, as the specification wants and VirtualBox insists.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from io import FileIO
from typing import Literal
from uuid import uuid4

from nbdimg.errors import ConfigError, escaped
from nbdimg.formats.newfile import naming, new_file, write_at
from nbdimg.formats.vhdx import structs as s
from nbdimg.formats.vhdx.geometry import Geometry, State
from nbdimg.formats.vhdx.header import Header, file_identifier
from nbdimg.formats.vhdx.locator import Locator, parent_locator
from nbdimg.formats.vhdx.metadata import build_metadata
from nbdimg.formats.vhdx.parent import Parent
from nbdimg.formats.vhdx.region import RegionEntry, build_region_table
from nbdimg.storage import system
from nbdimg.units import GiB, MiB, align_up, is_power_of_two

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all). What it raises ends the work, and nothing is left of the image."""

Subformat = Literal["dynamic", "fixed", "differencing"]
SUBFORMATS: tuple[Subformat, ...] = ("dynamic", "fixed", "differencing")

BLOCK_SIZE = 32 * MiB
"""Default, that of Windows: 64 TiB take a BAT of 16 MiB. What is unused of a block in a sparse file costs nothing."""

CHILD_BLOCK_SIZE = 2 * MiB
"""Default of a differencing file, that of Windows: less is kept of a chain than with larger blocks."""

LOG_SIZE = 1 * MiB
METADATA_LENGTH = 1 * MiB
RESERVE_SIZE = 1 * GiB
"""Bytes that one call reserves: between calls progress is seen and an interruption is heard."""
_PIECE_SIZE = 1 * MiB
_SIGNATURE_SECTOR = 512
_CREATOR = "nbdimg"
_PATH_MAX = 4096
"""Characters of the way to the parent; the format allows 32767."""


@dataclass(frozen=True, slots=True)
class CreateOptions:
    """Sizes in bytes; None: the default for the kind of file, or what the parent has."""

    subformat: Subformat = "dynamic"
    block_size: int | None = None
    log_size: int = LOG_SIZE
    logical_sector_size: int | None = None
    physical_sector_size: int | None = None
    parent: Parent | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """What a new image looks like; everything in bytes."""

    geometry: Geometry
    physical_sector_size: int
    log_length: int
    metadata_offset: int
    bat_offset: int
    data_offset: int
    file_size: int

    @property
    def bat_length(self) -> int:
        return self.data_offset - self.bat_offset


_DEFAULTS = CreateOptions()


def layout(size: int | None, options: CreateOptions) -> Layout:
    """The layout of an image of `size` bytes, rounded up to whole logical sectors; None: as large as the parent.

    Raises: ConfigError: an option is out of its range, or two do not go together.
    """
    _check(options)
    parent = options.parent
    if size is None:
        if parent is None:
            raise ConfigError("SIZE is missing, only a parent can stand in for it")
        size = parent.size
    logical = options.logical_sector_size or (parent.logical_sector_size if parent else 512)
    size = align_up(size, logical)
    if not 0 < size <= s.VIRTUAL_SIZE_MAX:
        raise ConfigError(f"the size is {size} bytes, expected {logical} to {s.VIRTUAL_SIZE_MAX} (64 TiB)")
    geometry = Geometry(
        size=size,
        block_size=options.block_size or (CHILD_BLOCK_SIZE if parent else BLOCK_SIZE),
        sector_size=logical,
        has_parent=parent is not None,
        is_fixed=options.subformat == "fixed",
    )
    metadata_offset = s.HEADER_SECTION_SIZE + options.log_size
    bat_offset = metadata_offset + METADATA_LENGTH
    data_offset = bat_offset + align_up(8 * geometry.entry_count, MiB)
    return Layout(
        geometry=geometry,
        physical_sector_size=options.physical_sector_size or (parent.physical_sector_size if parent else 4096),
        log_length=options.log_size,
        metadata_offset=metadata_offset,
        bat_offset=bat_offset,
        data_offset=data_offset,
        file_size=data_offset + (geometry.block_count * geometry.block_size if geometry.is_fixed else 0),
    )


def _check(options: CreateOptions) -> None:
    if options.subformat not in SUBFORMATS:
        raise ConfigError(f"the subformat is {escaped(options.subformat)}, expected {', '.join(SUBFORMATS)}")
    if options.subformat == "differencing" and options.parent is None:
        raise ConfigError("the subformat is differencing and there is no parent, expected one")
    if options.subformat != "differencing" and options.parent is not None:
        raise ConfigError(f"the subformat is {options.subformat} and there is a parent, expected differencing")
    block_size = options.block_size
    if block_size is not None and not (
        is_power_of_two(block_size) and s.BLOCK_SIZE_MIN <= block_size <= s.BLOCK_SIZE_MAX
    ):
        raise ConfigError(f"the block size is {block_size} bytes, expected a power of two from 1 MiB to 256 MiB")
    if options.log_size % MiB or not MiB <= options.log_size <= s.LOG_LENGTH_MAX:
        raise ConfigError(
            f"the log size is {options.log_size} bytes, expected a multiple of 1 MiB from 1 MiB to 256 MiB"
        )
    for name, sector_size in (("logical", options.logical_sector_size), ("physical", options.physical_sector_size)):
        if sector_size is not None and sector_size not in s.SECTOR_SIZES:
            raise ConfigError(f"the {name} sector size is {sector_size} bytes, expected 512 or 4096")
    parent = options.parent
    if parent and options.logical_sector_size not in (None, parent.logical_sector_size):
        raise ConfigError(
            f"the logical sector size is {options.logical_sector_size} bytes, expected that of the parent "
            f"{parent.path}, {parent.logical_sector_size}"
        )


def create(
    path: str | os.PathLike[str],
    size: int | None,
    options: CreateOptions = _DEFAULTS,
    *,
    progress: Progress | None = None,
) -> Layout:
    """Make a new image, which is durable when this returns. The file must not exist. See `layout` for `size`.

    Raises: ConfigError: as `layout`; the parent's name cannot be stored. OSError: the file exists, there is no space,
    ...; with the file's name.
    """
    path = os.fspath(path)
    planned = layout(size, options)
    locator = None if options.parent is None else _locator(path, options.parent)
    with ExitStack() as undo, ExitStack() as files, naming(path):
        file = new_file(path, files, undo)
        _write(file, planned, _metadata(planned, options, locator), progress)
        system.sync_directory(os.path.dirname(path) or ".")
        undo.pop_all()
    return planned


def _locator(path: str, parent: Parent) -> Locator:
    """By the way from the image's directory. A path of this system means nothing to Windows and is not stored."""
    way = os.path.relpath(os.path.realpath(parent.path), os.path.realpath(os.path.dirname(path) or "."))
    if "\\" in way:
        raise ConfigError(f"{parent.path}: the parent's path from the image has a backslash, which cannot be stored")
    try:
        way.encode("utf-16-le")
    except UnicodeEncodeError:
        raise ConfigError(f"{escaped(parent.path)}: the parent's path is not UTF-8, and cannot be stored") from None
    if len(way) > _PATH_MAX:
        raise ConfigError(f"the parent's path has {len(way)} characters, expected at most {_PATH_MAX}")
    return parent_locator(parent.data_write_guid, way if way.startswith("../") else f"./{way}")


def _metadata(planned: Layout, options: CreateOptions, locator: Locator | None) -> bytes:
    parent, geometry = options.parent, planned.geometry
    content = build_metadata(
        block_size=geometry.block_size,
        virtual_size=geometry.size,
        disk_id=parent.disk_id if parent else uuid4(),
        logical_sector_size=geometry.sector_size,
        physical_sector_size=planned.physical_sector_size,
        leaves_blocks_allocated=geometry.is_fixed,
        locator=locator,
        extra=parent.items if parent else (),
    )
    if len(content) > METADATA_LENGTH:
        raise ConfigError(
            f"the metadata with the parent's own items takes {len(content)} bytes, expected at most {METADATA_LENGTH}"
        )
    return content


def _write(file: FileIO, planned: Layout, metadata: bytes, progress: Progress | None) -> None:
    """Both stages. The space comes first: what is too large fails early."""
    file.truncate(planned.file_size)
    _preallocate(file, planned.data_offset, planned.file_size, progress)
    write_at(file, planned.metadata_offset, metadata)
    if planned.geometry.is_fixed:
        _write_fixed_bat(file, planned)
    header = Header(0, uuid4(), uuid4(), s.NO_GUID, planned.log_length, s.HEADER_SECTION_SIZE)
    for slot, offset in enumerate(s.HEADER_OFFSETS):
        write_at(file, offset, replace(header, sequence_number=slot).to_bytes())
    table = build_region_table(
        [
            RegionEntry(s.BAT_REGION, planned.bat_offset, planned.bat_length),
            RegionEntry(s.METADATA_REGION, planned.metadata_offset, METADATA_LENGTH),
        ]
    )
    for offset in s.REGION_TABLE_OFFSETS:
        write_at(file, offset, table)
    system.fdatasync(file.fileno())
    write_at(file, 0, file_identifier(_CREATOR)[:_SIGNATURE_SECTOR])
    system.fdatasync(file.fileno())


def _preallocate(file: FileIO, start: int, stop: int, progress: Progress | None) -> None:
    """Space for the blocks; where the file system cannot reserve it, zeroes are written."""
    size = RESERVE_SIZE
    for offset in range(start, stop, size):
        length = min(size, stop - offset)
        if not system.fallocate(file.fileno(), system.RESERVE, offset, length):
            for position in range(offset, offset + length, _PIECE_SIZE):
                write_at(file, position, bytes(min(_PIECE_SIZE, offset + length - position)))
        if progress is not None:
            progress(offset + length - start, stop - start)


def _write_fixed_bat(file: FileIO, planned: Layout) -> None:
    """All blocks in a row: with 32 MiB and data from 4 MiB, entry 1 is 36 MiB | 6. One write for each chunk."""
    geometry = planned.geometry
    for chunk, first in enumerate(range(0, geometry.block_count, geometry.chunk_ratio)):
        count = min(geometry.chunk_ratio, geometry.block_count - first)
        offset = planned.data_offset + first * geometry.block_size
        stop = offset + count * geometry.block_size
        entries = array("Q", range(offset | State.FULLY_PRESENT, stop | State.FULLY_PRESENT, geometry.block_size))
        write_at(file, planned.bat_offset + 8 * geometry.payload_index(chunk * geometry.chunk_ratio), entries.tobytes())
