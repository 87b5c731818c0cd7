"""Repair of what can be mended without a guest's bytes being at stake.

    the log             is replayed, as every open for writing does; one that is broken stays as it is
    a lost header       is written again from the other one
    a lost region table is written again from the other one, through the log
    trailing space      is cut off, unless an entry of the BAT is wrong: then nobody knows whose it is

A crash at any moment leaves an image that is as it was, or better. DataWriteGuid stays: a guest sees the same. What is
wrong in the BAT is told and left alone, and so is unused space between blocks, which `compact` gives back.
"""

from __future__ import annotations

from nbdimg.errors import ImageError
from nbdimg.formats.vhdx import structs as s
from nbdimg.formats.vhdx.check import Progress, Survey, VhdxReport
from nbdimg.formats.vhdx.header import load_headers
from nbdimg.formats.vhdx.offline import Parts, Session, touch
from nbdimg.formats.vhdx.replay import replay_to_file
from nbdimg.storage.file import BlockFile
from nbdimg.units import MiB


async def repair(file: BlockFile, *, leaks_only: bool, progress: Progress | None = None) -> VhdxReport:
    """Check and mend; the report is of the image afterwards. Nobody else may use the file.

    Args: leaks_only: leave headers and region tables alone.

    Raises: OSError: the image can still be opened, and the repair be repeated.
    """
    log = await _replay(file)
    before = await _surveyed(file, progress)
    if before.parts is None or before.report.check_errors:
        return before.report
    corruptions_fixed = 0
    if not leaks_only and before.report.log == "clean":
        corruptions_fixed = await _mend(file, before.parts)
    leaks_fixed = await _cut(file, before) if before.has_sound_bat and before.report.log == "clean" else 0
    after = before
    if corruptions_fixed or leaks_fixed:
        after = await _surveyed(file, progress)
        after.report.corruptions_fixed = corruptions_fixed
        after.report.leaks_fixed = leaks_fixed
    if log is not None and after.report.log == "clean":
        after.report.log = log
    return after.report


async def _surveyed(file: BlockFile, progress: Progress | None) -> Survey:
    survey = Survey(file)
    await survey.run(progress)
    return survey


async def _replay(file: BlockFile) -> str | None:
    """What was done; None: nothing. A log that cannot be replayed is for the check to tell."""
    try:
        headers = await load_headers(file)
        if not headers.current.has_log:
            return None
        await replay_to_file(file, headers)
    except ImageError:
        return None
    return "clean: it has been replayed"


async def _mend(file: BlockFile, parts: Parts) -> int:
    """Headers and region tables; returns how many were mended. A session writes both headers anew."""
    headers, regions = parts.headers, parts.regions
    count = int(headers.other is None)
    if regions.damaged_slots and headers.current.log_length:
        session = Session(file, headers)
        await session.begin(changes_data=False)
        for slot in regions.damaged_slots:
            start = s.REGION_TABLE_OFFSETS[slot]
            pages = range(0, s.REGION_TABLE_SIZE, s.PAGE_SIZE)
            await session.change({start + page: regions.content[page : page + s.PAGE_SIZE] for page in pages})
        await session.end()
        return count + len(regions.damaged_slots)
    if count:
        await touch(file)
    return count


async def _cut(file: BlockFile, survey: Survey) -> int:
    """Trailing space that is a leak; returns MiB. The log is empty, so none speaks of a larger file."""
    if survey.trailing_leak is None:
        return 0
    start, stop = survey.trailing_leak
    await touch(file)
    await file.truncate(start * MiB)
    await file.fdatasync()
    return stop - start
