"""`nbdimg resize`: another size for an image that nobody uses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Annotated

import typer

from nbdimg.cli.interrupt import interrupted_between
from nbdimg.cli.opened import opening
from nbdimg.cli.options import AllowReferences, AsJson, BackingKeyFile, Format, NewSize, Parent, key_paths
from nbdimg.cli.output import ProgressReport, print_json, progress, shown, sized
from nbdimg.errors import ImageFailed
from nbdimg.formats import open_image, read_key_file, resize_image, size_asked
from nbdimg.formats.newfile import naming
from nbdimg.image.image import Image
from nbdimg.server.loop import run_loop
from nbdimg.units import parse_new_size


def resize(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="An image that no other program has open.")],
    size: NewSize,
    shrink: Annotated[bool, typer.Option("--shrink", help="Lose what lies behind a smaller size.")] = False,
    format: Format = None,
    key_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The passphrase of an encrypted image, from a file; needed only where zeroes must be written.",
        ),
    ] = None,
    backing_key_file: BackingKeyFile = None,
    allow_references: AllowReferences = None,
    parent: Parent = None,
    as_json: AsJson = False,
) -> None:
    """Change the size of the guest's disk; what is new reads as zeroes.

    SIZE is rounded up to whole sectors, of 512 bytes but for some vhdx images; for raw ones it is taken as it is.
    """
    opener = partial(
        open_image,
        image,
        format=format,
        roots=tuple(allow_references or ()),
        key=None if key_file is None else read_key_file(key_file),
        own_keys={name: read_key_file(path) for name, path in key_paths(backing_key_file)},
        is_keyless=True,
        parent=parent,
    )
    with progress() as shown_progress, interrupted_between(shown_progress) as report:
        found, old, new = run_loop(_resized(image, size, shrink, opener, report))
    if as_json:
        print_json(path=image, format=found, size=new, old_size=old)
    elif new == old:
        print(f"{shown(image)}: {found} image of {sized(new)}, as before")
    else:
        print(f"{shown(image)}: {found} image of {sized(new)}, before {sized(old)}")


async def _resized(
    path: str,
    text: str,
    may_shrink: bool,
    opener: Callable[[], Awaitable[Image]],
    report: ProgressReport | None,
) -> tuple[str, int, int]:
    """The image's format, old and new size."""
    size, is_change = parse_new_size(text)
    with opening(path):
        image = await opener()
    try:
        old = image.size
        size = size_asked(image, size, is_change=is_change)
        with naming(path):
            await resize_image(image, size, may_shrink=may_shrink, progress=report)
    except BaseException:
        with suppress(ImageFailed, OSError):
            await image.close()
        raise
    await image.close()
    return image.driver.name, old, size
