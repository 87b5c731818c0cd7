"""Options that several verbs have."""

from __future__ import annotations

from typing import Annotated

import typer

from nbdimg.formats import DRIVERS

Format = Annotated[
    str | None, typer.Option(metavar="|".join(DRIVERS), help="The image's format (default: by its magic number).")
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
KeyFile = Annotated[
    str | None, typer.Option("--key-file", metavar="FILE", help="The passphrase of an encrypted image, from a file.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
