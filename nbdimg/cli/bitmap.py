"""`nbdimg bitmap`: the persistent dirty bitmaps of a qcow2 image that nobody uses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from nbdimg.cli.interrupt import interrupted_between
from nbdimg.cli.opened import opened_qcow2
from nbdimg.cli.options import parsed
from nbdimg.cli.output import print_json, print_table, shown
from nbdimg.errors import escaped
from nbdimg.formats.qcow2.bitmap_edit import BitmapAction, BitmapVerb, open_editor
from nbdimg.formats.qcow2.bitmaps import BitmapEntry, load_directory
from nbdimg.formats.qcow2.open import read_header
from nbdimg.server.loop import run_loop
from nbdimg.units import parse_size

_COLUMNS = ("NAME", "GRANULARITY", "STATE")

bitmap = typer.Typer(
    name="bitmap", help="Dirty bitmaps of a qcow2 image: which parts of the disk have changed.", no_args_is_help=True
)

Image = Annotated[str, typer.Argument(metavar="IMAGE", help="A qcow2 image that no other program writes to.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The bitmap.")]
Granularity = Annotated[
    str | None,
    typer.Option(
        "--granularity",
        "-g",
        metavar="BYTES",
        help="A power of two from 512 to 2G (default: the cluster size, 4K to 64K).",
    ),
]
Disabled = Annotated[bool, typer.Option("--disabled", help="It does not follow changes until it is enabled.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the image's bitmaps as one JSON object.")]


@bitmap.command()
def add(
    image: Image,
    name: Name,
    granularity: Granularity = None,
    disabled: Disabled = False,
    as_json: AsJson = False,
) -> None:
    """Add a clean bitmap; from now on it follows every change."""
    size = parsed("--granularity", parse_size, granularity)
    action = BitmapAction("add", name, granularity=size, is_enabled=not disabled)
    _change(image, action, f"added {escaped(name)}", as_json)


def _changing(verb: BitmapVerb, done: str) -> Callable[..., None]:
    """The command that does `verb` to a bitmap."""

    def command(image: Image, name: Name, as_json: AsJson = False) -> None:
        _change(image, BitmapAction(verb, name), f"{done} {escaped(name)}", as_json)

    return command


_VERBS: tuple[tuple[BitmapVerb, str, str], ...] = (
    ("remove", "removed", "Remove a bitmap; an inconsistent one too."),
    ("clear", "cleared", "Make a bitmap clean: from here on it counts anew."),
    ("enable", "enabled", "Let a bitmap follow changes."),
    ("disable", "disabled", "Let a bitmap stay as it is, whatever changes."),
)
for _verb, _done, _help in _VERBS:
    bitmap.command(_verb, help=_help)(_changing(_verb, _done))


@bitmap.command()
def merge(
    image: Image,
    name: Name,
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Bitmaps of the same image.")],
    as_json: AsJson = False,
) -> None:
    """Make dirty in NAME what is dirty in any SOURCE; granularities may differ."""
    said = ", ".join(escaped(source) for source in sources)
    action = BitmapAction("merge", name, sources=tuple(sources))
    _change(image, action, f"merged {said} into {escaped(name)}", as_json)


@bitmap.command("list")
def list_(image: Image, as_json: AsJson = False) -> None:
    """List an image's bitmaps. No other file is opened, and nothing is changed."""
    entries = run_loop(_load(image))
    if as_json:
        _print_json(image, entries)
    elif entries:
        print_bitmaps([(each.name, each.granularity, each.is_enabled, each.is_consistent) for each in entries])
    elif sys.stdout.isatty():
        print(f"{shown(image)}: no bitmaps")


def _change(path: str, action: BitmapAction, done: str, as_json: bool) -> None:
    with interrupted_between(None):
        entries = run_loop(_changed(path, action))
    if as_json:
        _print_json(path, entries)
    else:
        print(f"{shown(path)}: {done}")


async def _changed(path: str, action: BitmapAction) -> list[BitmapEntry]:
    async with opened_qcow2(path, writable=True, parts="dirty bitmaps") as file:
        editor = await open_editor(file)
        editor.carry_out([action])
        await editor.save()
        return editor.entries


async def _load(path: str) -> list[BitmapEntry]:
    async with opened_qcow2(path, writable=False, parts="dirty bitmaps") as file:
        return await load_directory(file, await read_header(file))


def print_bitmaps(bitmaps: Sequence[tuple[str, int, bool, bool]]) -> None:
    """Of each its name, its granularity, whether it is enabled and whether it is consistent."""
    rows = []
    for name, granularity, is_enabled, is_consistent in bitmaps:
        state = "inconsistent" if not is_consistent else "enabled" if is_enabled else "disabled"
        rows.append((shown(name), str(granularity), state))
    print_table(_COLUMNS, rows, right=["GRANULARITY"])


def _print_json(path: str, entries: Sequence[BitmapEntry]) -> None:
    print_json(path=path, bitmaps=[described(each) for each in entries])


def described(entry: BitmapEntry) -> dict[str, Any]:
    """For --json, granularity in bytes. An inconsistent bitmap can only be removed."""
    return {
        "name": entry.name,
        "granularity": entry.granularity,
        "enabled": entry.is_enabled,
        "consistent": entry.is_consistent,
    }
