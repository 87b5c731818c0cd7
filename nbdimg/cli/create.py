"""`nbdimg create`: new images."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, cast

import typer

from nbdimg.cli.interrupt import ends_heard
from nbdimg.cli.opened import opening
from nbdimg.cli.options import AsJson, parsed
from nbdimg.cli.output import QUIET_S, print_json, progress, shown
from nbdimg.cli.streams import complain
from nbdimg.errors import ConfigError, escaped
from nbdimg.formats import DRIVERS, create_image, open_image, read_key_file
from nbdimg.formats.qcow2 import create as qcow2
from nbdimg.formats.qcow2.create_options import (
    COMPRESSIONS,
    PREALLOCATIONS,
    CompressionName,
    CreateOptions,
    Preallocation,
    check,
)
from nbdimg.formats.vhdx import create as vhdx
from nbdimg.formats.vhdx.parent import Parent, read_parent
from nbdimg.server.loop import run_loop
from nbdimg.units import counted, parse_size

_FORMATS = ("raw", "qcow2", "vhdx")
_SUFFIXES = {".qcow2": "qcow2", ".vhdx": "vhdx", ".avhdx": "vhdx", ".raw": "raw", ".img": "raw"}
_VERSIONS = {"2": 2, "0.10": 2, "v2": 2, "3": 3, "1.1": 3, "v3": 3}
_DEFAULTS = CreateOptions()
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def create(
    path: Annotated[str, typer.Argument(metavar="PATH", help="The new file; one that exists is never overwritten.")],
    size: Annotated[
        str | None,
        typer.Argument(
            metavar="SIZE", help="Bytes, or with K, M, G, T, P, E (default: the size of the backing file or parent)."
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format", "-f", metavar="|".join(_FORMATS), help="By the suffix .qcow2, .vhdx, .raw or .img if not given."
        ),
    ] = None,
    compat: Annotated[
        str | None, typer.Option(metavar="2|3", help="The qcow2 version, also as 0.10 or 1.1 (default: 3).")
    ] = None,
    cluster_size: Annotated[
        str | None, typer.Option(metavar="BYTES", help="A power of two from 512 to 2M (default: 64K).")
    ] = None,
    refcount_bits: Annotated[
        int | None,
        typer.Option(metavar="N", help="Width of a reference count, a power of two from 1 to 64 (default: 16)."),
    ] = None,
    extended_l2: Annotated[
        bool, typer.Option("--extended-l2", help="Allocate in 32nds of a cluster; clusters of at least 16K.")
    ] = False,
    compression_type: Annotated[
        str | None, typer.Option(metavar="|".join(COMPRESSIONS), help="For compressed clusters (default: zlib).")
    ] = None,
    lazy_refcounts: Annotated[
        bool, typer.Option("--lazy-refcounts", help="Reference counts may be late; a crash then needs a repair.")
    ] = False,
    backing: Annotated[
        str | None,
        typer.Option(
            "--backing", "-b", metavar="FILE", help="Backing file, stored as given: relative to PATH's directory."
        ),
    ] = None,
    backing_format: Annotated[
        str | None,
        typer.Option(
            "--backing-format", "-F", metavar="FORMAT", help="Its format; needed with --backing, never guessed."
        ),
    ] = None,
    data_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Keep the guest's data in this file, relative to PATH's directory."),
    ] = None,
    data_file_raw: Annotated[
        bool, typer.Option("--data-file-raw", help="The data file is a raw image of its own; one that exists is used.")
    ] = False,
    preallocation: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(PREALLOCATIONS), help="Map all clusters, and reserve or write them (default: off)."
        ),
    ] = None,
    encrypt_key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Encrypt with LUKS; the passphrase, from a file.")
    ] = None,
    subformat: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(vhdx.SUBFORMATS), help="The kind of vhdx (default: dynamic, or as --parent says)."
        ),
    ] = None,
    block_size: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES", help="Of a vhdx, a power of two from 1M to 256M (default: 32M, with a parent 2M)."
        ),
    ] = None,
    log_size: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Of a vhdx, a multiple of 1M, to 256M (default: 1M).")
    ] = None,
    logical_sector_size: Annotated[
        int | None, typer.Option(metavar="512|4096", help="Of a vhdx (default: 512, or the parent's).")
    ] = None,
    physical_sector_size: Annotated[
        int | None, typer.Option(metavar="512|4096", help="Of a vhdx (default: 4096, or the parent's).")
    ] = None,
    parent: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The vhdx that the new one differs from; never to be changed from now on."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a new, empty image.

    SIZE is rounded up to whole sectors, of 512 bytes but for a vhdx. With SIZE the backing file is not opened.
    """
    format = _format(path, format)
    _check_has(
        format,
        "vhdx",
        {
            "--subformat": subformat,
            "--block-size": block_size,
            "--log-size": log_size,
            "--logical-sector-size": logical_sector_size,
            "--physical-sector-size": physical_sector_size,
            "--parent": parent,
        },
    )
    _check_has(
        format,
        "qcow2",
        {
            "--compat": compat,
            "--cluster-size": cluster_size,
            "--refcount-bits": refcount_bits,
            "--extended-l2": extended_l2 or None,
            "--compression-type": compression_type,
            "--lazy-refcounts": lazy_refcounts or None,
            "--backing": backing,
            "--backing-format": backing_format,
            "--data-file": data_file,
            "--data-file-raw": data_file_raw or None,
            "--preallocation": preallocation,
            "--encrypt-key-file": encrypt_key_file,
        },
    )
    if format == "vhdx":
        vhdx_options = vhdx.CreateOptions(
            subformat=cast(vhdx.Subformat, subformat or ("differencing" if parent else "dynamic")),
            block_size=parsed("--block-size", parse_size, block_size),
            log_size=vhdx.LOG_SIZE if log_size is None else parsed("--log-size", parse_size, log_size),
            logical_sector_size=logical_sector_size,
            physical_sector_size=physical_sector_size,
            parent=None if parent is None else _parent(parent),
        )
        wanted = None if size is None else parse_size(size)
        report = _create_vhdx(path, wanted, vhdx_options)
        asked = report["size"] if wanted is None else wanted
    else:
        options = CreateOptions(
            version=_version(compat),
            cluster_size=(
                _DEFAULTS.cluster_size if cluster_size is None else parsed("--cluster-size", parse_size, cluster_size)
            ),
            refcount_bits=_DEFAULTS.refcount_bits if refcount_bits is None else refcount_bits,
            has_extended_l2=extended_l2,
            compression=cast(CompressionName, compression_type or _DEFAULTS.compression),
            has_lazy_refcounts=lazy_refcounts,
            backing_name=backing,
            backing_format=backing_format,
            data_file_name=data_file,
            is_data_file_raw=data_file_raw,
            preallocation=cast(Preallocation, preallocation or _DEFAULTS.preallocation),
            luks_passphrase=None if encrypt_key_file is None else read_key_file(encrypt_key_file),
        )
        check(0, options)
        asked = _size(path, size, options)
        report = _create_raw(path, asked) if format == "raw" else _create_qcow2(path, asked, options)
    if as_json:
        print_json(**report)
    else:
        _say(report, asked)


def _parent(path: str) -> Parent:
    with opening(path):
        return run_loop(read_parent(path))


def _format(path: str, name: str | None) -> str:
    if name is None:
        suffix = os.path.splitext(path)[1].lower()
        if suffix not in _SUFFIXES:
            raise ConfigError(
                f"{path}: the suffix does not say the format, expected {', '.join(_SUFFIXES)} or the option --format"
            )
        return _SUFFIXES[suffix]
    if name not in _FORMATS:
        raise ConfigError(f"unknown format {escaped(name)}, expected {' or '.join(_FORMATS)}")
    return name


def _check_has(format: str, owner: str, options: Mapping[str, object]) -> None:
    """Raises: ConfigError: one of `options` is given (not None), which images of the format `owner` alone have."""
    given = next((name for name, value in options.items() if value is not None), None)
    if given is not None and format != owner:
        raise ConfigError(f"a {format} image has no {given}; did you mean --format {owner}?")


def _version(text: str | None) -> int:
    if text is None:
        return _DEFAULTS.version
    if text not in _VERSIONS:
        raise ConfigError(f"--compat is {escaped(text)}, expected {', '.join(_VERSIONS)}")
    return _VERSIONS[text]


def _size(path: str, text: str | None, options: CreateOptions) -> int:
    """Bytes as asked for, or those of the backing file."""
    if text is not None:
        return parse_size(text)
    if options.backing_name is None or options.backing_format is None:
        raise ConfigError(f"{path}: SIZE is missing, only a backing file can stand in for it")
    if options.backing_format not in DRIVERS:
        raise ConfigError(
            f"the backing format is {escaped(options.backing_format)}, which cannot be opened here: give SIZE"
        )
    if _PROTOCOL.match(options.backing_name):
        raise ConfigError(f"the backing file {escaped(options.backing_name)} is not a path, give SIZE")
    return run_loop(_image_size(qcow2.referred_path(path, options.backing_name), options.backing_format))


async def _image_size(path: str, format: str) -> int:
    with opening(path):
        image = await open_image(path, format=format, writable=False, is_keyless=True)
    try:
        return image.size
    finally:
        await image.close()


@contextmanager
def _signals_unwind(path: str) -> Iterator[None]:
    """While an image is made, the signals that ask for the end do so as an exception does, so that no half of it stays.
    The first one counts: another would end the removal of the half.
    """
    is_ending = False

    def on_signal(number: int, frame: object) -> None:
        nonlocal is_ending
        if not is_ending:
            is_ending = True
            raise SystemExit(128 + number)

    with ends_heard(on_signal):
        try:
            yield
        except SystemExit:
            left = "" if os.path.lexists(path) else ", nothing of it was left"  # it may have been made by then
            complain(f"{shown(path)}: interrupted{left}")
            raise


# Each makes the image and returns what was made, for --json; sizes in bytes


def _create_raw(path: str, size: int) -> dict[str, Any]:
    with _signals_unwind(path):
        create_image(path, size, format="raw")
    return {"path": path, "format": "raw", "size": size}


def _create_qcow2(path: str, size: int, options: CreateOptions) -> dict[str, Any]:
    """What preallocates is long enough to be watched from the start."""
    quiet_s = 0.0 if options.preallocation in ("falloc", "full") else QUIET_S
    with _signals_unwind(path), progress(quiet_s=quiet_s) as report:
        made = qcow2.create(path, size, options, progress=report)
    return {
        "path": path,
        "format": "qcow2",
        "size": made.header.size,
        "file_size": made.file_size,
        "compat": options.version,
        "cluster_size": options.cluster_size,
        "refcount_bits": options.refcount_bits,
        "extended_l2": options.has_extended_l2,
        "compression_type": options.compression,
        "lazy_refcounts": options.has_lazy_refcounts,
        "backing": options.backing_name,
        "backing_format": options.backing_format,
        "data_file": options.data_file_name,
        "data_file_raw": options.is_data_file_raw,
        "preallocation": options.preallocation,
        "encrypted": options.luks_passphrase is not None,
    }


def _create_vhdx(path: str, size: int | None, options: vhdx.CreateOptions) -> dict[str, Any]:
    with _signals_unwind(path), progress(quiet_s=0.0 if options.subformat == "fixed" else QUIET_S) as report:
        made = vhdx.create(path, size, options, progress=report)
    return {
        "path": path,
        "format": "vhdx",
        "size": made.geometry.size,
        "file_size": made.file_size,
        "subformat": options.subformat,
        "block_size": made.geometry.block_size,
        "log_size": made.log_length,
        "logical_sector_size": made.geometry.sector_size,
        "physical_sector_size": made.physical_sector_size,
        "parent": None if options.parent is None else options.parent.path,
    }


def _say(report: dict[str, Any], asked: int) -> None:
    size = report["size"]
    rounded = f" (rounded up from {asked} to whole sectors)" if size != asked else ""
    kind = f"encrypted {report['format']}" if report.get("encrypted") else report["format"]
    if "subformat" in report:
        kind = f"{report['subformat']} {kind}"
    line = f"{shown(report['path'])}: {kind} image of {counted(size, 'byte')}{rounded}"
    if report.get("backing"):
        line += f", backed by {shown(report['backing'])} ({report['backing_format']})"
    if report.get("parent"):
        line += f", whose parent is {shown(report['parent'])}"
    if report.get("data_file"):
        line += f", its data in {shown(report['data_file'])}"
    print(line)
