"""Repair of what can be mended without a guest's bytes being at stake.

    the log             is replayed, as every open for writing does; one that is broken stays as it is, unless it is
                        accepted that what it held is lost
    a lost header       is written again from the other one
    a lost region table is written again from the other one, through the log
    unused space        is punched, and cut off at the end, unless an entry of the BAT is wrong: then nobody knows whose
                        it is
    stray entries       of sector bitmaps in a file without a parent are cleared, through the log

A crash at any moment leaves an image that is as it was, or better. DataWriteGuid stays: a guest sees the same. What is
wrong in the BAT is told and left alone.
"""

from __future__ import annotations

from nbdimg.errors import ImageError
from nbdimg.formats.vhdx import structs as s
from nbdimg.formats.vhdx.check import Progress, Survey, VhdxReport
from nbdimg.formats.vhdx.header import load_headers
from nbdimg.formats.vhdx.log import load_active
from nbdimg.formats.vhdx.offline import Session, touch, try_cut
from nbdimg.formats.vhdx.parts import Parts
from nbdimg.formats.vhdx.replay import replay_to_file
from nbdimg.storage.file import BlockFile
from nbdimg.storage.ordering import hindered
from nbdimg.units import MiB

_REPLAYED = "clean: it has been replayed"
_LOST = "clean: what it held was lost, and it has been declared empty"


async def repair(
    file: BlockFile,
    *,
    leaks_only: bool,
    accepts_lost_log: bool = False,
    is_device: bool = False,
    progress: Progress | None = None,
) -> VhdxReport:
    """Check and mend; the report is of the image afterwards. Nobody else may use the file.

    Args: leaks_only: leave headers and region tables alone. accepts_lost_log: declare a log empty that is in use and
    holds no valid entry. is_device: as `check`.

    Raises: OSError: the image can still be opened, and the repair be repeated.
    """
    log = await _replay(file, accepts_lost_log=accepts_lost_log)
    before = await _surveyed(file, is_device, progress)
    if before.parts is None or before.report.check_errors:
        return before.report
    mended = 0
    if not leaks_only and before.report.log == "clean":
        mended = await _mend(file, before.parts)
    leaks_fixed = 0
    if before.knows_unused:
        leaks_fixed = await _clear_entries(file, before) + await give_back(file, before)
    after = before
    if mended or leaks_fixed:
        after = await _surveyed(file, is_device, progress)
    after.report.corruptions_fixed = mended + (log == _LOST)
    after.report.leaks_fixed = leaks_fixed
    if log is not None and after.report.log == "clean":
        after.report.log = log
    return after.report


async def _surveyed(file: BlockFile, is_device: bool, progress: Progress | None) -> Survey:
    survey = Survey(file, is_device=is_device)
    await survey.run(progress)
    return survey


async def _replay(file: BlockFile, *, accepts_lost_log: bool) -> str | None:
    """What was done; None: nothing. A log that cannot be replayed is for the check to tell."""
    try:
        headers = await load_headers(file)
        if not headers.current.has_log:
            return None
        is_lost = accepts_lost_log and await load_active(file, headers.current, ignore_log=True) is None
        await replay_to_file(file, headers, ignore_log=is_lost)
    except ImageError:
        return None
    return _LOST if is_lost else _REPLAYED


async def _mend(file: BlockFile, parts: Parts) -> int:
    """Headers and region tables; returns how many were mended. A session writes both headers anew."""
    headers, regions = parts.headers, parts.regions
    count = int(headers.other is None)
    if regions.damaged_slots and headers.current.log_length:
        session = Session(file, headers)
        await session.begin()
        for slot in regions.damaged_slots:
            start = s.REGION_TABLE_OFFSETS[slot]
            pages = range(0, s.REGION_TABLE_SIZE, s.PAGE_SIZE)
            await session.change({start + page: regions.content[page : page + s.PAGE_SIZE] for page in pages})
        await session.end()
        return count + len(regions.damaged_slots)
    if count:
        await touch(file)
    return count


async def _clear_entries(file: BlockFile, survey: Survey) -> int:
    """Those that are stray; returns how many. Without a log they stay."""
    headers = await load_headers(file)
    if not survey.stray_entries or not headers.current.log_length:
        return 0
    session = Session(file, headers)
    await session.begin()
    await session.put(dict.fromkeys(survey.stray_entries, 0))
    await session.end()
    return len(survey.stray_entries)


async def give_back(file: BlockFile, survey: Survey) -> int:
    """Space that is a leak; returns MiB. The log is empty, so none speaks of a larger file, or puts back who had it.

    Raises: Hindrance: some of it could not be given back. OSError.
    """
    if not (survey.leaks and survey.knows_unused):
        return 0
    await touch(file)
    count = 0
    for start, stop in survey.leaks:
        if stop == len(survey.used):
            is_given = await hindered(try_cut(file, start * MiB))
        else:
            is_given = await hindered(file.punch(start * MiB, (stop - start) * MiB))
        count += is_given * (stop - start)
    await file.fdatasync()
    return count
