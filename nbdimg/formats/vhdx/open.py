"""Opening a VHDX image: header, log, regions, metadata, BAT, parent."""

from __future__ import annotations

import logging
from dataclasses import replace

from nbdimg.errors import ConfigError, CorruptImage, ImageError, UnsupportedFeature
from nbdimg.formats.options import Backing, OpenOptions
from nbdimg.formats.vhdx.driver import VhdxDriver
from nbdimg.formats.vhdx.header import Headers, load_headers
from nbdimg.formats.vhdx.journal import Journal
from nbdimg.formats.vhdx.locator import Locator, candidates, verify_linkage
from nbdimg.formats.vhdx.log import load_active
from nbdimg.formats.vhdx.metadata import Metadata
from nbdimg.formats.vhdx.parts import Parts, load_parts
from nbdimg.formats.vhdx.reach import reach
from nbdimg.formats.vhdx.replay import open_replayed, replay_to_file
from nbdimg.image.driver import FormatDriver
from nbdimg.image.gate import Reference
from nbdimg.storage.file import BlockFile
from nbdimg.units import MiB, align_up

logger = logging.getLogger("nbdimg")


async def open_driver(file: BlockFile, options: OpenOptions) -> VhdxDriver:
    """Open the image in `file`, which stays the caller's until this returns.

    A read-write open replays the log into the file; a read-only one replays it in memory. An image whose parent cannot
    be opened is left as it is.

    Raises: CorruptImage, UnsupportedFeature: what the image is not or has not. ConfigError: a snapshot was asked for,
    or a parent is given to an image without one. What `options.open_backing` raises.
    """
    if options.snapshot is not None:
        raise ConfigError(f"{file.path}: a vhdx image has no internal snapshots")
    logged = await _logged_metadata(file, options) if options.writable else None
    if logged is not None:
        await options.open_backing(_parent(file, logged, options.parent_path))
    driver, metadata = await load_driver(file, options)
    if logged is None:
        try:
            await options.open_backing(_parent(driver.file, metadata, options.parent_path))
        except BaseException:
            await driver.abandon()
            raise
    return driver


async def _logged_metadata(file: BlockFile, options: OpenOptions) -> Metadata | None:
    """As they will be when the log has been replayed; None: it is empty, or changes more than fits into memory.

    Raises: as `open_driver`.
    """
    headers = await load_headers(file)
    if not headers.current.has_log:
        return None
    try:
        file = await open_replayed(file, headers.current, ignore_log=options.accepts_lost_log)
    except UnsupportedFeature:
        return None
    return (await load_parts(file, headers)).metadata


async def load_driver(file: BlockFile, options: OpenOptions) -> tuple[VhdxDriver, Metadata]:
    """The image in `file` by itself, and its metadata, in which a parent is named. Raises: as `open_driver`."""
    headers = await load_headers(file)
    is_lost = options.accepts_lost_log and await _has_lost_log(file, headers)
    if options.writable:
        headers = await replay_to_file(file, headers, ignore_log=is_lost)
    else:
        file = await open_replayed(file, headers.current, ignore_log=is_lost)
    parts = await load_parts(file, headers)
    _check_bat(file, parts)
    _tell_damage(file.path, parts)
    journal = Journal(file, headers) if options.writable else None
    end = await reach(file, parts) if options.writable else 0
    return VhdxDriver(file, parts, journal, end), parts.metadata


async def _has_lost_log(file: BlockFile, headers: Headers) -> bool:
    """Whether the log is in use and holds nothing to replay, which is told. Raises: as `load_active`."""
    if not headers.current.has_log or await load_active(file, headers.current, ignore_log=True) is not None:
        return False
    logger.warning("%s: the log is in use and holds no valid entry; what it held is lost, as was accepted", file.path)
    return True


def _check_bat(file: BlockFile, parts: Parts) -> None:
    parts.check_bat_length(file.path)
    offset = parts.regions.bat_offset
    stop = offset + 8 * parts.geometry.entry_count
    if stop > align_up(file.size, MiB):
        raise CorruptImage(
            file.path,
            f"the BAT ends at {stop}, expected inside the file's {file.size} bytes (offset {offset})",
            offset,
        )


def _tell_damage(path: str, parts: Parts) -> None:
    """Of headers and region tables there are two each, and one is enough to go on with."""
    damaged = [f"region table {slot + 1}" for slot in parts.regions.damaged_slots]
    if parts.headers.other is None:
        damaged.insert(0, f"header {2 - parts.headers.slot}")
    for name in damaged:
        logger.warning("%s: %s is damaged, the other copy is used; nbdimg check --repair all mends it", path, name)


def _parent(file: BlockFile, metadata: Metadata, given: str | None) -> Backing | None:
    locator = metadata.locator
    if locator is None:
        if given is not None:
            raise ConfigError(f"{file.path}: a parent is given and the image has none, expected a differencing image")
        return None
    references = parent_references(file.path, locator, given)

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


def parent_references(path: str, locator: Locator, given: str | None) -> tuple[Reference, ...]:
    """Where the parent of the image at `path` may be, best first: only where it is `given`, if it is; else by each name
    that the locator has, and in the end by the same names without regard to case, as Windows takes them.

    Raises: CorruptImage: the locator names no file.
    """
    if given is not None:
        return (Reference(path, "the given parent", given, locator.offset, is_writable=False, is_given=True),)
    exact = [Reference(path, "parent locator", name, locator.offset, is_writable=False) for name in candidates(locator)]
    if not exact:
        raise CorruptImage(
            path,
            f"the parent locator's paths name no file, expected one at least (offset {locator.offset})",
            locator.offset,
        )
    return (*exact, *(replace(reference, ignores_case=True) for reference in exact))
