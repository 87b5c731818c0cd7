"""`nbdimg map`: where the guest's bytes are, through the whole chain."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Generator
from typing import Annotated, Any

import typer

from nbdimg.cli.opened import opening
from nbdimg.cli.options import AllowReferences, Format, Parent, parsed
from nbdimg.cli.output import JSON_VERSION, shown
from nbdimg.errors import ConfigError
from nbdimg.formats import open_image
from nbdimg.formats.qcow2.crypt import EncryptedFile
from nbdimg.image.driver import Extent, ExtentKind
from nbdimg.image.image import Image
from nbdimg.server.loop import run_loop
from nbdimg.units import parse_size

_Lines = Generator[str, dict[str, Any] | None, None]

EXTENTS_AT_ONCE = 1024
"""Asked for in one go: memory does not grow with the image."""


def map_(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="An image that no other program writes to.")],
    start: Annotated[str, typer.Option(metavar="BYTES", help="Where to begin.")] = "0",
    length: Annotated[str | None, typer.Option(metavar="BYTES", help="How far to go (default: to the end).")] = None,
    format: Format = None,
    allow_references: AllowReferences = None,
    parent: Parent = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, its extents as those of qemu-img map.")
    ] = False,
) -> None:
    """Say of each part of the disk which file holds it, and where.

    An encrypted image needs no key. A part that no file has reads as zeroes.
    """
    first = parsed("--start", parse_size, start)
    count = parsed("--length", parse_size, length)
    run_loop(_map(image, format, tuple(allow_references or ()), parent, first, count, as_json))


async def _map(
    path: str,
    format: str | None,
    roots: tuple[str, ...],
    parent: str | None,
    start: int,
    length: int | None,
    as_json: bool,
) -> None:
    with opening(path):
        image = await open_image(path, format=format, writable=False, roots=roots, is_keyless=True, parent=parent)
    try:
        if start > image.size:
            raise ConfigError(f"{path}: --start is {start}, expected at most the image's size, {image.size}")
        stop = image.size if length is None else min(image.size, start + length)
        lines = _json_lines(path, image) if as_json else _table_lines()
        next(lines)
        async for part in parts(image, start, stop):
            sys.stdout.write(lines.send(part))
        sys.stdout.write(lines.send(None))
    finally:
        await image.close()


async def parts(image: Image, start: int, stop: int) -> AsyncIterator[dict[str, Any]]:
    """The range in order, as `qemu-img map --output=json` tells it, neighbours that go on from each other joined."""
    held: dict[str, Any] | None = None
    while start < stop:
        for extent in await image.map(start, stop - start, EXTENTS_AT_ONCE):
            part = _part(image, extent)
            start = extent.stop
            if held is not None and _goes_on(held, part):
                held["length"] += part["length"]
                continue
            if held is not None:
                yield held
            held = part
    if held is not None:
        yield held


def _part(image: Image, extent: Extent) -> dict[str, Any]:
    """`depth` counts from 0, the image itself; what nobody has belongs to the last file that reaches so far."""
    is_zero = extent.kind is ExtentKind.ZERO
    part: dict[str, Any] = {
        "start": extent.offset,
        "length": extent.length,
        "depth": extent.depth - 1 if extent.depth else _reach(image, extent.offset),
        "present": extent.depth > 0,
        "zero": is_zero,
        "data": not is_zero,
        "compressed": extent.kind is ExtentKind.COMPRESSED,
    }
    if extent.kind is ExtentKind.DATA and not isinstance(extent.file, EncryptedFile):
        part["offset"] = extent.file_offset
        part["filename"] = extent.file.path
    return part


def _reach(image: Image, offset: int) -> int:
    depth, backing = 0, image.backing
    while backing is not None and offset < backing.size:
        depth, backing = depth + 1, backing.backing
    return depth


_SAME = ("depth", "present", "zero", "data", "compressed", "filename")


def _goes_on(held: dict[str, Any], part: dict[str, Any]) -> bool:
    if any(held.get(field) != part.get(field) for field in _SAME):
        return False
    return "offset" not in part or held["offset"] + held["length"] == part["offset"]


def _json_lines(path: str, image: Image) -> _Lines:
    """Sent a part, gives its text; sent None, the text that ends the output."""
    head = {"version": JSON_VERSION, "path": path, "format": image.driver.name, "size": image.size}
    text = json.dumps(head)[:-1] + ', "extents": ['
    separator = "\n"
    part = yield ""
    while part is not None:
        text += separator + json.dumps(part)
        separator = ",\n"
        sent, text = text, ""
        part = yield sent
    yield text + "\n]}\n"


def _table_lines() -> _Lines:
    text = f"{'START':>20} {'LENGTH':>20} DEPTH {'OFFSET':>20} FILE\n"
    part = yield ""
    while part is not None:
        place = f"{part['offset']:>20} {shown(part['filename'])}" if "offset" in part else f"{_kind(part):>20}"
        sent, text = text + f"{part['start']:>20} {part['length']:>20} {part['depth']:>5} {place}\n", ""
        part = yield sent
    yield text


def _kind(part: dict[str, Any]) -> str:
    if part["compressed"]:
        return "compressed"
    if part["data"]:
        return "encrypted"
    return "zero" if part["present"] else "unallocated"
