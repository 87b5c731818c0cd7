"""`nbdimg ctl bitmap`: the dirty bitmaps of an export, changed while clients use it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nbdimg.cli.answers import BITMAPS
from nbdimg.cli.bitmap import Disabled, Granularity, print_bitmaps
from nbdimg.cli.ctl import SocketPath, TokenFile, Url, path_of, report, server_api
from nbdimg.cli.healthcheck import DEFAULT_SOCKET
from nbdimg.cli.options import AsJson, parsed
from nbdimg.cli.output import print_json, shown
from nbdimg.units import parse_size

if TYPE_CHECKING:
    from nbdimg.cli.http import Api

ctl_bitmap = typer.Typer(
    name="bitmap", help="Change and list the dirty bitmaps of an export, while it is used.", no_args_is_help=True
)

Export = Annotated[str, typer.Argument(metavar="EXPORT", help="An export's name.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The bitmap.")]
Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Bitmaps, which change in one moment.")]


@ctl_bitmap.command()
def add(
    export: Export,
    names: Names,
    granularity: Granularity = None,
    disabled: Disabled = False,
    disable: Annotated[
        list[str] | None,
        typer.Option("--disable", metavar="OTHER", help="Disable OTHER in the same moment; repeatable."),
    ] = None,
    socket: SocketPath = DEFAULT_SOCKET,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Add a clean bitmap; from now on it follows every change."""
    size = parsed("--granularity", parse_size, granularity)
    given = {"disabled": disabled} | ({} if size is None else {"granularity": size})
    stopped = disable or []
    actions = [*_actions("add", names, **given), *_actions("disable", stopped)]
    done = f"added {_listed(names)}" + (f", disabled {_listed(stopped)}" if stopped else "")
    _change(server_api(socket, url, token_file), export, actions, done, as_json)


def _changing(verb: str, done: str) -> Callable[..., None]:
    """The command that does `verb` to bitmaps."""

    def command(
        export: Export,
        names: Names,
        socket: SocketPath = DEFAULT_SOCKET,
        url: Url = None,
        token_file: TokenFile = None,
        as_json: AsJson = False,
    ) -> None:
        api = server_api(socket, url, token_file)
        _change(api, export, _actions(verb, names), f"{done} {_listed(names)}", as_json)

    return command


for _verb, _done, _help in (
    ("remove", "removed", "Remove a bitmap; an inconsistent one too, but none that a client reads."),
    ("clear", "cleared", "Make a bitmap clean: from here on it counts anew."),
    ("enable", "enabled", "Let a bitmap follow changes."),
    ("disable", "disabled", "Let a bitmap stay as it is, whatever changes; a crash does not cost it any more."),
):
    ctl_bitmap.command(_verb, help=_help)(_changing(_verb, _done))


@ctl_bitmap.command()
def merge(
    export: Export,
    name: Name,
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Bitmaps of the same image.")],
    socket: SocketPath = DEFAULT_SOCKET,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Make dirty in NAME what is dirty in any SOURCE; granularities may differ."""
    actions = _actions("merge", [name], sources=sources)
    done = f"merged {_listed(sources)} into {shown(name)}"
    _change(server_api(socket, url, token_file), export, actions, done, as_json)


@ctl_bitmap.command("list")
def list_(
    export: Export,
    socket: SocketPath = DEFAULT_SOCKET,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """List the dirty bitmaps of an export's image."""
    found = server_api(socket, url, token_file).get(path_of(export, "bitmaps"), BITMAPS)["bitmaps"]
    if as_json:
        print_json(name=export, bitmaps=found)
    elif found:
        keys = ("name", "granularity", "is_enabled", "is_consistent")
        print_bitmaps([tuple(each[key] for key in keys) for each in found])
    elif sys.stdout.isatty():
        print(f"{shown(export)}: no bitmaps")


def _actions(action: str, names: Sequence[str], **more: object) -> list[dict[str, Any]]:
    return [{"action": action, "name": name, **more} for name in names]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names))


def _change(api: Api, export: str, actions: list[dict[str, Any]], done: str, as_json: bool) -> None:
    bitmaps = api.change("POST", path_of(export, "bitmaps"), {"actions": actions}, shape=BITMAPS)["bitmaps"]
    report(f"{shown(export)}: {done}", as_json, name=export, bitmaps=bitmaps)
