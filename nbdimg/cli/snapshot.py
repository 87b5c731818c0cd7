"""`nbdimg snapshot`: internal snapshots of a qcow2 image that nobody uses."""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import typer

from nbdimg.cli.opened import opened_qcow2
from nbdimg.cli.options import AsJson
from nbdimg.cli.output import QUIET_S, ProgressReport, dated, print_json, print_table, progress, shown
from nbdimg.errors import UnsupportedFeature
from nbdimg.formats.gate import DenyGate
from nbdimg.formats.options import OpenOptions
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.formats.qcow2.open import open_driver, read_header
from nbdimg.formats.qcow2.snapshot_changes import apply_snapshot, create_snapshot, delete_snapshot
from nbdimg.formats.qcow2.snapshots import NO_ICOUNT, Snapshot, load_snapshots
from nbdimg.server.loop import run_loop

_COLUMNS = ("ID", "NAME", "SIZE", "VM STATE", "DATE")

Image = Annotated[str, typer.Argument(metavar="IMAGE", help="A qcow2 image that no other program writes to.")]
Wanted = Annotated[str, typer.Argument(metavar="NAME", help="The snapshot's id or name; the id is tried first.")]

snapshot = typer.Typer(
    name="snapshot",
    help="Make, list, apply and delete the snapshots inside a qcow2 image. An encrypted one needs no key.",
    no_args_is_help=True,
)


@snapshot.command()
def create(
    image: Image,
    name: Annotated[str, typer.Argument(metavar="NAME", help="No snapshot's name or id yet.")],
    as_json: AsJson = False,
) -> None:
    """Keep the disk as it is now under NAME."""
    now_ns = time.time_ns()

    async def change(driver: Qcow2Driver, report: ProgressReport | None) -> Snapshot:
        return await create_snapshot(driver, name, now_ns=now_ns, progress=report)

    _change(image, change, "made", as_json=as_json)


@snapshot.command()
def apply(image: Image, name: Wanted, as_json: AsJson = False) -> None:
    """Make the disk what it was; what it is now is lost. The snapshot stays."""

    async def change(driver: Qcow2Driver, report: ProgressReport | None) -> Snapshot:
        return await apply_snapshot(driver, name, progress=report)

    _change(image, change, "applied", as_json=as_json)


@snapshot.command()
def delete(image: Image, name: Wanted, as_json: AsJson = False) -> None:
    """Delete a snapshot and give back the space that only it used."""

    async def change(driver: Qcow2Driver, report: ProgressReport | None) -> Snapshot:
        return await delete_snapshot(driver, name, progress=report)

    _change(image, change, "deleted", as_json=as_json)


@snapshot.command("list")
def list_(image: Image, as_json: AsJson = False) -> None:
    """List an image's snapshots. No other file is opened, and nothing is changed."""
    size, snapshots = run_loop(_load(image))
    if as_json:
        print_json(path=image, snapshots=[_described(each, size) for each in snapshots])
    elif snapshots:
        print_table(_COLUMNS, [_row(each, size) for each in snapshots], right=["SIZE", "VM STATE"])
    elif sys.stdout.isatty():
        print(f"{shown(image)}: no snapshots")


async def _load(path: str) -> tuple[int, list[Snapshot]]:
    """The disk's size, for snapshots that do not tell their own, and all snapshots."""
    async with opened_qcow2(path, writable=False, parts="snapshots") as file:
        header = await read_header(file)
        return header.size, await load_snapshots(file, header)


_Change = Callable[[Qcow2Driver, ProgressReport | None], Awaitable[Snapshot]]


def _change(path: str, change: _Change, done: str, *, as_json: bool) -> None:
    with progress("tables", quiet_s=QUIET_S) as report:
        size, changed = run_loop(_changed(path, change, report))
    if as_json:
        print_json(path=path, snapshot=_described(changed, size))
    else:
        print(f"{shown(path)}: {done} snapshot {shown(changed.id)} ({shown(changed.name)})")


async def _changed(path: str, change: _Change, report: ProgressReport | None) -> tuple[int, Snapshot]:
    """Open the image alone, none of its backing files, and change it: its metadata, which is never encrypted."""
    async with opened_qcow2(path, writable=True, parts="snapshots") as file:
        if (await read_header(file)).has_data_file:
            raise UnsupportedFeature(path, "an image with an external data file cannot have internal snapshots")
        driver = await open_driver(file, OpenOptions(DenyGate(), writable=True, is_keyless=True))
        changed = await change(driver, report)
        await driver.close()
        return driver.size, changed


def _described(each: Snapshot, current_size: int) -> dict[str, Any]:
    """Sizes in bytes; `icount` null: the machine did not count instructions."""
    return {
        "id": each.id,
        "name": each.name,
        "date": dated(each.seconds),
        "size": current_size if each.disk_size is None else each.disk_size,
        "vm_state_size": each.vm_state_size,
        "vm_clock_ns": each.vm_clock_ns,
        "icount": None if each.icount == NO_ICOUNT else each.icount,
    }


def _row(each: Snapshot, current_size: int) -> tuple[str, ...]:
    size = current_size if each.disk_size is None else each.disk_size
    return (shown(each.id), shown(each.name), str(size), str(each.vm_state_size), dated(each.seconds))
