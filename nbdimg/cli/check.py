"""`nbdimg check`: whether an image's metadata is sound, and its repair.

0    sound, or all of it is after a repair
1    the check could not be completed
2    corruptions: the image must be repaired before it is written to
3    leaks: space is lost, nothing else
63   the format has nothing to check
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from nbdimg.cli.opened import opened
from nbdimg.cli.options import AsJson, Format
from nbdimg.cli.output import ProgressReport, print_json, progress, shown
from nbdimg.cli.streams import complain
from nbdimg.errors import ConfigError, ImageError, UnsupportedFeature, escaped
from nbdimg.formats import check_format, probed_format
from nbdimg.formats.findings import CheckReport
from nbdimg.formats.qcow2.check import check as check_qcow2
from nbdimg.formats.qcow2.open import read_header
from nbdimg.formats.qcow2.repair import repair as repair_qcow2
from nbdimg.formats.vhdx.check import VhdxReport
from nbdimg.formats.vhdx.check import check as check_vhdx
from nbdimg.formats.vhdx.repair import repair as repair_vhdx
from nbdimg.server.loop import run_loop
from nbdimg.units import counted

EXIT_INCOMPLETE = 1
EXIT_UNSUPPORTED = 63

_REPAIRS = ("leaks", "all")


def check(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="An image that no other program writes to.")],
    repair: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(_REPAIRS), help="Mend leaks alone, or corruptions too; nobody may use the image."
        ),
    ] = None,
    format: Format = None,
    accept_lost_log: Annotated[
        bool,
        typer.Option(
            "--accept-lost-log",
            help="With --repair all: declare a vhdx log empty that is in use and holds no valid entry; "
            "what it held is lost.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Check an image's metadata; the data and other files are not looked at.

    The exit status is that of qemu-img check: 0 sound, 1 not completed, 2 corrupt, 3 leaks only, 63 nothing to check.
    """
    if repair is not None and repair not in _REPAIRS:
        raise ConfigError(f"--repair is {escaped(repair)}, expected {' or '.join(_REPAIRS)}")
    if accept_lost_log and repair != "all":
        raise ConfigError("--accept-lost-log changes the image, which takes --repair all")
    check_format(format)
    with progress("tables") as report:
        try:
            found, result = run_loop(_checked(image, format, repair, accept_lost_log, report))
        except (ImageError, OSError) as error:
            complain(str(error) if isinstance(error, ImageError) else f"{image}: {error.strerror}")
            return EXIT_INCOMPLETE
    if result is None:
        complain(f"{shown(image)}: a {found} image has no metadata, so there is nothing to check")
        if as_json:
            print_json(path=image, format=found, exit_status=EXIT_UNSUPPORTED)
        return EXIT_UNSUPPORTED
    if as_json:
        print_json(path=image, format=found, exit_status=result.exit_status, **_described(result))
    else:
        _print(image, result)
    return result.exit_status


async def _checked(
    path: str, format: str | None, repair: str | None, accepts_lost_log: bool, report: ProgressReport | None
) -> tuple[str, CheckReport | None]:
    """The image's format, and what was found; None for a format without metadata."""
    async with opened(path, writable=repair is not None) as file:
        format = format or await probed_format(file)
        if format == "vhdx":
            if repair is None:
                return format, await check_vhdx(file, is_device=file.is_block_device, progress=report)
            return format, await repair_vhdx(
                file,
                leaks_only=repair == "leaks",
                accepts_lost_log=accepts_lost_log,
                is_device=file.is_block_device,
                progress=report,
            )
        if accepts_lost_log:
            raise UnsupportedFeature(file.path, f"it is a {format} image, expected vhdx with --accept-lost-log")
        if format != "qcow2":
            return format, None
        header = await read_header(file)
        if repair is None:
            return format, await check_qcow2(file, header, progress=report)
        return format, await repair_qcow2(file, header, leaks_only=repair == "leaks", progress=report)


def _described(result: CheckReport) -> dict[str, Any]:
    fields = asdict(result)
    fields["findings"] = [asdict(each) for each in result.findings]
    return fields


def _print(path: str, result: CheckReport) -> None:
    for finding in result.findings:
        where = "" if finding.offset is None else f" (offset {finding.offset})"
        text = finding.message if finding.message.endswith(where) else finding.message + where
        print(f"{finding.kind}: {shown(finding.structure)}: {shown(text)}")
    if result.findings_omitted:
        print(f"... and {result.findings_omitted} more")
    leak = ("leaked MiB", "leaked MiB") if isinstance(result, VhdxReport) else ("leaked cluster", "leaked clusters")
    counts = (
        (result.corruptions_fixed, "corruption repaired", "corruptions repaired"),
        (result.leaks_fixed, "leak repaired", "leaks repaired"),
        (result.corruptions, "corruption", "corruptions"),
        (result.leaks, *leak),
        (result.check_errors, "error that ended the check", "errors that ended the check"),
    )
    said = [counted(count, one, more) for count, one, more in counts if count] or ["no errors found"]
    print(f"{shown(path)}: {', '.join(said)}")
    if isinstance(result, VhdxReport):
        rest = f", and the device has {result.device_rest} more" if result.device_rest else ""
        print(
            f"{result.allocated_clusters} of {counted(result.total_clusters, 'block')} allocated, "
            f"{result.fragmented_clusters} fragmented; the log is {result.log}; "
            f"in use up to byte {result.image_end_offset}{rest}"
        )
    elif result.total_clusters:
        share = 100 * result.allocated_clusters / result.total_clusters
        print(
            f"{result.allocated_clusters} of {counted(result.total_clusters, 'cluster')} allocated ({share:.1f} %), "
            f"{result.fragmented_clusters} fragmented, {result.compressed_clusters} compressed; "
            f"in use up to byte {result.image_end_offset}"
        )
