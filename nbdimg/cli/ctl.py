"""`nbdimg ctl`: look at and change a running server, without a restart and without disturbing other exports."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nbdimg.cli.answers import CLIENTS, EXPORT, EXPORTS, SNAPSHOT, SNAPSHOTS, STATUS
from nbdimg.cli.healthcheck import DEFAULT_SOCKET, SOCKET_VARIABLE
from nbdimg.cli.options import (
    AcceptLostLog,
    AllowReferences,
    AsJson,
    BackingKeyFile,
    KeepOverlays,
    NewSize,
    Overlay,
    OverlayDir,
    Parent,
    key_paths,
    name_and_image,
    overlay_mode,
    parsed,
)
from nbdimg.cli.output import dated, print_json, print_table, shown, sized
from nbdimg.cli.rules import Allow, AllowReadOnly, access_rules
from nbdimg.errors import ConfigError
from nbdimg.formats import DRIVERS
from nbdimg.units import counted, parse_new_size, parse_size

if TYPE_CHECKING:
    from nbdimg.cli.http import Api

SocketPath = Annotated[
    str, typer.Option("--socket", metavar="PATH", envvar=SOCKET_VARIABLE, help="The server's admin socket.")
]
Url = Annotated[str | None, typer.Option("--url", metavar="URL", help="The server's HTTP API, in place of a socket.")]
TokenFile = Annotated[str | None, typer.Option("--token-file", metavar="FILE", help="The token that goes with --url.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="An export's name.")]

ctl = typer.Typer(
    name="ctl",
    help="Look at and change a running server.\n\nEach command takes --socket, or --url and --token-file, behind it.",
    no_args_is_help=True,
)
snapshot = typer.Typer(name="snapshot", help="Make, list and delete snapshots of an export.", no_args_is_help=True)
ctl.add_typer(snapshot)


def server_api(socket: str, url: str | None, token_file: str | None) -> Api:
    """Raises: ConfigError."""
    from nbdimg.cli.http import Api

    return Api(socket, url, token_file)


def path_of(*parts: str) -> str:
    from nbdimg.cli.http import export_path

    return export_path(*parts)


@ctl.command()
def exports(
    socket: SocketPath = DEFAULT_SOCKET, url: Url = None, token_file: TokenFile = None, as_json: AsJson = False
) -> None:
    """List what is exported."""
    found = server_api(socket, url, token_file).get("/v1/exports", EXPORTS)["exports"]
    if as_json:
        print_json(exports=found)
        return
    columns = ("NAME", "SIZE", "FORMAT", "MODE", "CLIENTS", "OVERLAYS", "IN FLIGHT", "STATE", "PATH")
    print_table(columns, [_export_row(each) for each in found], right=("SIZE", "CLIENTS", "IN FLIGHT"))


def _export_row(export: dict[str, Any]) -> tuple[str, ...]:
    mode = "ro" if export["is_read_only"] else "rw"
    state = "failed" if export["failure"] else "leaving" if export["is_hidden"] else "ok"
    name, format, path = (shown(export[key]) for key in ("name", "format", "path"))
    size, clients, in_flight = (str(export[key]) for key in ("size", "connections", "in_flight"))
    overlays = "-" if export["overlay"] is None else f"{export['overlays']} {shown(export['overlay'])}"
    return (name, size, format, mode, clients, overlays, in_flight, state, path)


@ctl.command()
def clients(
    export: Annotated[str | None, typer.Argument(metavar="NAME", help="Only those of this export.")] = None,
    socket: SocketPath = DEFAULT_SOCKET,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """List who is connected."""
    query = {} if export is None else {"export": export}
    found = server_api(socket, url, token_file).get("/v1/clients", CLIENTS, **query)["clients"]
    if as_json:
        print_json(clients=found)
        return
    columns = ("ID", "PEER", "EXPORT", "TLS", "MODE", "SECONDS", "IN FLIGHT", "IDENTITIES")
    print_table(columns, [_client_row(each) for each in found], right=("ID", "SECONDS", "IN FLIGHT"))


def _client_row(client: dict[str, Any]) -> tuple[str, ...]:
    is_attached = client["export"] is not None
    overlay = "" if client["overlay"] is None else f"@{client['overlay']}"
    return (
        str(client["id"]),
        shown(client["peer"]),
        shown(f"{client['export']}{overlay}") if is_attached else "-",
        shown(client["tls"] or "-"),
        "-" if not is_attached else "ro" if client["is_read_only"] else "rw",
        f"{client['since']:.0f}",
        str(client["in_flight"]),
        shown(" ".join(client["identities"])) or "-",
    )


@ctl.command()
def add(
    image: Annotated[
        str, typer.Argument(metavar="[NAME=]IMAGE", help="An image on the server's machine, and what to export it as.")
    ],
    format: Annotated[
        str | None,
        typer.Option(
            "--format", "-f", metavar="|".join(DRIVERS), help="The image's format (default: by its magic number)."
        ),
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", "-r", help="Refuse every change.")] = False,
    description: Annotated[str | None, typer.Option(metavar="TEXT", help="What clients see beside the name.")] = None,
    min_block_size: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Advertised minimum block size, a power of two up to 64K.")
    ] = None,
    key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="The passphrase of an encrypted image, from a file.")
    ] = None,
    backing_key_file: BackingKeyFile = None,
    allow_references: AllowReferences = None,
    overlay: Overlay = False,
    keep_overlays: KeepOverlays = False,
    overlay_dir: OverlayDir = None,
    parent: Parent = None,
    accept_lost_log: AcceptLostLog = False,
    allow: Allow = None,
    allow_read_only: AllowReadOnly = None,
    no_tls: Annotated[
        bool, typer.Option("--no-tls", help='Serve it in clear too, with tls.mode = "selective".')
    ] = False,
    socket: SocketPath = DEFAULT_SOCKET,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Export an image too, to all who may connect, or to whom --allow and --allow-read-only name.

    Its name is the file's up to the first dot unless NAME says another.
    """
    api = server_api(socket, url, token_file)
    whole = os.path.abspath if api.is_local else str
    name, path = name_and_image(image, is_here=api.is_local)
    given = {
        "name": name,
        "path": whole(path),
        "format": format,
        "read_only": read_only or None,
        "description": description,
        "min_block_size": parsed("--min-block-size", parse_size, min_block_size),
        "key_file": parsed("--key-file", whole, key_file),
        "key_files": dict(key_paths(backing_key_file, whole)) or None,
        "allow_references": None if allow_references is None else [whole(each) for each in allow_references],
        "overlay": overlay_mode(overlay, keep_overlays),
        "overlay_dir": parsed("--overlay-dir", whole, overlay_dir),
        "parent": parsed("--parent", whole, parent),
        "accept_lost_log": accept_lost_log or None,
        "access": access_rules(allow, allow_read_only),
        "tls": False if no_tls else None,
    }
    body = {key: value for key, value in given.items() if value is not None}
    added = api.change("POST", "/v1/exports", body, shape=EXPORTS)["exports"]
    if as_json:
        print_json(exports=added)
        return
    for each in added:
        asked = f"; clients ask for {shown(each['name'])}@NAME" if keep_overlays else ""
        print(f"{shown(each['name'])}: {sized(each['size'])}, {shown(each['format'])}{asked}")


@ctl.command()
def remove(
    name: Name,
    mode: Annotated[
        str,
        typer.Option(
            metavar="drain|hide|hard",
            help="drain: requests in flight are answered, then clients are cut; hide: who is connected goes on, nobody "
            "else comes; hard: clients are cut.",
        ),
    ] = "drain",
    socket: SocketPath = DEFAULT_SOCKET,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Export an image no longer, nor its snapshots."""
    server_api(socket, url, token_file).change("DELETE", path_of(name), mode=mode)
    report(f"{shown(name)}: removed", as_json, name=name, mode=mode)


@ctl.command(context_settings={"ignore_unknown_options": True})  # -1M is a size
def resize(
    name: Name,
    size: NewSize,
    shrink: Annotated[
        bool, typer.Option("--shrink", help="Let the disk become smaller; what is behind is lost.")
    ] = False,
    socket: SocketPath = DEFAULT_SOCKET,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Give a disk another size, which clients that connect see and those that are connected may use.

    SIZE is rounded up to whole sectors, as by nbdimg resize. With a sign it is added to the size that the disk has when
    the server's turn to resize it comes: two +1G at a time make 2G.
    """
    api = server_api(socket, url, token_file)
    count, is_change = parse_new_size(size)
    if not shrink and (count < 0 or not is_change):
        old = api.get(path_of(name), EXPORT)["size"]
        new = old + count if is_change else count
        if new < old:
            raise ConfigError(
                f"{shown(name)}: the size would go from {old} to {new} bytes and lose what lies behind, which takes "
                "--shrink"
            )
    body = {"size": f"{count:+d}" if is_change else count, "shrink": shrink}
    export = api.change("POST", path_of(name, "resize"), body, shape=EXPORT)
    report(f"{shown(name)}: {sized(export['size'])}", as_json, export=export)


@ctl.command()
def disconnect(
    client: Annotated[int, typer.Argument(metavar="ID", help="From nbdimg ctl clients.")],
    hard: Annotated[bool, typer.Option("--hard", help="Do not answer what is in flight.")] = False,
    socket: SocketPath = DEFAULT_SOCKET,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Make one client go. It may connect again."""
    mode = "hard" if hard else "drain"
    server_api(socket, url, token_file).change("DELETE", f"/v1/clients/{client}", mode=mode)
    report(f"client {client}: disconnected", as_json, id=client, mode=mode)


@ctl.command()
def reload(
    socket: SocketPath = DEFAULT_SOCKET, url: Url = None, token_file: TokenFile = None, as_json: AsJson = False
) -> None:
    """Have the configuration file read again. One that is refused changes nothing."""
    server_api(socket, url, token_file).change("POST", "/v1/reload")
    report("reloaded", as_json, reloaded=True)


@ctl.command()
def status(
    socket: SocketPath = DEFAULT_SOCKET, url: Url = None, token_file: TokenFile = None, as_json: AsJson = False
) -> None:
    """Say how the server is."""
    found = server_api(socket, url, token_file).get("/v1/status", STATUS)
    if as_json:
        print_json(**found)
        return
    print(f"{shown(found['state'])}, pid {found['pid']}, up for {found['uptime']:.0f} s")
    print(f"{counted(found['exports'], 'export')}, {counted(found['connections'], 'connection')}")
    for name in found["failed_exports"]:
        print(f"failed: {shown(name)}")
    if not found["uris"] and found["state"] == "serving":
        print("nothing is exported; nbdimg ctl add IMAGE does")
    for uri in found["uris"]:
        print(shown(uri))


@snapshot.command()
def create(
    name: Name,
    tag: Annotated[str, typer.Argument(metavar="SNAPSHOT", help="The new snapshot's name.")],
    socket: SocketPath = DEFAULT_SOCKET,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Keep a disk as it is now, and export that as NAME@SNAPSHOT."""
    api = server_api(socket, url, token_file)
    made = api.change("POST", path_of(name, "snapshots"), {"name": tag}, shape=SNAPSHOT)
    where = f", exported as {shown(made['export'])}" if made["export"] else ""
    report(f"{shown(name)}: made snapshot {shown(made['id'])} ({shown(made['name'])}){where}", as_json, snapshot=made)


@snapshot.command()
def delete(
    name: Name,
    tag: Annotated[str, typer.Argument(metavar="SNAPSHOT", help="The snapshot's name or id.")],
    socket: SocketPath = DEFAULT_SOCKET,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Forget a snapshot; its clients have to go."""
    server_api(socket, url, token_file).change("DELETE", path_of(name, "snapshots", tag))
    report(f"{shown(name)}: deleted snapshot {shown(tag)}", as_json, name=name, snapshot=tag)


@snapshot.command("list")
def list_(
    name: Name,
    socket: SocketPath = DEFAULT_SOCKET,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """List the snapshots of an export's image, oldest first."""
    found = server_api(socket, url, token_file).get(path_of(name, "snapshots"), SNAPSHOTS)["snapshots"]
    if as_json:
        print_json(name=name, snapshots=found)
    elif found:
        columns = ("ID", "NAME", "SIZE", "DATE", "EXPORT")
        print_table(columns, [_snapshot_row(each) for each in found], right=["SIZE"])
    elif sys.stdout.isatty():
        print(f"{shown(name)}: no snapshots")


def _snapshot_row(each: dict[str, Any]) -> tuple[str, ...]:
    date = dated(each["created_s"])
    return (shown(each["id"]), shown(each["name"]), str(each["size"]), date, shown(each["export"] or "-"))


def report(line: str, as_json: bool, **fields: object) -> None:
    """What was done."""
    if as_json:
        print_json(**fields)
    else:
        print(line)
