"""`nbdimg compact`: give the space back that an image no longer needs."""

from __future__ import annotations

from typing import Annotated

import typer

from nbdimg.cli.opened import opened
from nbdimg.cli.options import AsJson, Format
from nbdimg.cli.output import ProgressReport, print_json, progress, shown, sized
from nbdimg.errors import UnsupportedFeature
from nbdimg.formats import check_format, probed_format
from nbdimg.formats.vhdx.compact import Compacted
from nbdimg.formats.vhdx.compact import compact as compact_vhdx
from nbdimg.server.loop import run_loop
from nbdimg.units import counted


def compact(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A vhdx image that no other program has open.")],
    format: Format = None,
    as_json: AsJson = False,
) -> None:
    """Make a vhdx file smaller: blocks of zeroes are dropped, others moved together, the end cut off.

    The disk is the same afterwards, and the image may still be a parent. It can be ended at any time.
    """
    check_format(format)
    with progress() as report:
        done = run_loop(_compacted(image, format, report))
    if as_json:
        print_json(
            path=image,
            format="vhdx",
            file_size=done.size,
            old_file_size=done.old_size,
            dropped_blocks=done.dropped_count,
            moved_blocks=done.moved_count,
        )
    else:
        print(
            f"{shown(image)}: {sized(done.size)}, before {sized(done.old_size)}; "
            f"{counted(done.dropped_count, 'block')} dropped, {done.moved_count} moved"
        )


async def _compacted(path: str, format: str | None, report: ProgressReport | None) -> Compacted:
    async with opened(path, writable=True) as file:
        format = format or await probed_format(file)
        if format != "vhdx":
            raise UnsupportedFeature(file.path, f"it is a {format} image, expected vhdx")
        return await compact_vhdx(file, progress=report)
