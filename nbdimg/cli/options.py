"""Options that several verbs have, and what the values of options mean."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, Literal, TypeVar, overload

import typer

from nbdimg.errors import ConfigError, escaped
from nbdimg.formats import DRIVERS

T = TypeVar("T")

Format = Annotated[
    str | None,
    typer.Option(
        "--format", "-f", metavar="|".join(DRIVERS), help="The image's format (default: by its magic number)."
    ),
]
AllowReferences = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DIR",
        help="Backing and data files may lie in DIR too, not only in the image's own directory; repeatable.",
    ),
]
Parent = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="The parent of a differencing vhdx image, in place of the one it names."),
]
BackingKeyFile = Annotated[
    list[str] | None,
    typer.Option(
        metavar="IMAGE=FILE",
        help="The passphrase, from a file, of one image of a chain that has its own; repeatable.",
    ),
]
AcceptLostLog = Annotated[
    bool,
    typer.Option(
        "--accept-lost-log",
        help="Open a vhdx image whose log is in use and holds nothing valid, as if it were empty: what it held is "
        "lost.",
    ),
]
Overlay = Annotated[
    bool,
    typer.Option(
        "--overlay", help="Never write to the image: give each connection an overlay, thrown away when it ends."
    ),
]
KeepOverlays = Annotated[
    bool,
    typer.Option(
        "--keep-overlays",
        help="Never write to the image: what clients write is kept in --overlay-dir, in the overlay that they ask for "
        "as EXPORT@OVERLAY, or in that of their certificate.",
    ),
]
OverlayDir = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Where overlays lie (default, unless they are kept: $TMPDIR or /var/tmp)."),
]
NewSize = Annotated[
    str,
    typer.Argument(metavar="[+|-]SIZE", help="Bytes, or with K, M, G, T, P, E; with a sign, more or less of them."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@overload
def parsed(option: str, parse: Callable[[str], T], text: str) -> T: ...


@overload
def parsed(option: str, parse: Callable[[str], T], text: str | None) -> T | None: ...


def parsed(option: str, parse: Callable[[str], T], text: str | None) -> T | None:
    """What `text` means as the value of `option`; None: the option is not given.

    Raises: ConfigError: naming the option besides what `parse` says.
    """
    if text is None:
        return None
    try:
        return parse(text)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from None


def key_paths(options: list[str] | None, whole: Callable[[str], str] = str) -> tuple[tuple[str, str], ...]:
    """Images, and the files of their passphrases, of --backing-key-file, each as `whole` makes it. An image's name may
    have a `=`.

    Raises: ConfigError: a part is empty, or an image is named twice.
    """
    found: dict[str, str] = {}
    for text in options or ():
        name, _, path = text.rpartition("=")
        if not name or not path:
            expected = "expected IMAGE=FILE, no part of it empty"
            raise ConfigError(f"--backing-key-file: {escaped(text)} is not allowed, {expected}")
        if (image := whole(name)) in found:
            raise ConfigError(f"--backing-key-file: {escaped(image)} is given twice")
        found[image] = whole(path)
    return tuple(found.items())


def overlay_mode(overlay: bool, keep_overlays: bool) -> Literal["per-client", "kept"] | None:
    """What --overlay and --keep-overlays say of an export. Raises: ConfigError: they exclude each other."""
    if overlay and keep_overlays:
        raise ConfigError("--overlay throws overlays away and --keep-overlays does not, expected one of them")
    return "kept" if keep_overlays else "per-client" if overlay else None


def name_and_image(argument: str, *, is_here: bool = True) -> tuple[str | None, str]:
    """What `[NAME=]IMAGE` says. Where the image is on this machine (`is_here`), an existing file whose own name has a
    `=` is taken as it is.

    Raises: ConfigError: a part is empty.
    """
    name, equals, path = argument.partition("=")
    if (argument and not equals) or (is_here and os.path.exists(argument)):
        return None, argument
    if not name or not path:
        raise ConfigError(f"{escaped(argument)} is not allowed, expected IMAGE or NAME=IMAGE, no part of it empty")
    return name, path
