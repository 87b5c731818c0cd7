"""`/v1/exports`: what is exported, its snapshots and its bitmaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast, get_args
from urllib.parse import quote

from aiohttp import web

from nbdimg.admin.backend import BACKEND, fields_of
from nbdimg.admin.problems import Refusal
from nbdimg.admin.requests import BODY_NAME, checked, json_body, query_choice, table_body
from nbdimg.configfile import export_of
from nbdimg.configfile.reader import Table
from nbdimg.configfile.values import boolean, export_name, list_of, one_of, size_in_bytes, string
from nbdimg.formats.qcow2.bitmap_edit import BitmapAction, BitmapVerb
from nbdimg.server.live import Control, RemoveMode
from nbdimg.server.states import BitmapState, ExportState
from nbdimg.units import sign_of_change

REMOVE_MODES = ("drain", "hide", "hard")

BITMAP_ACTIONS_MAX = 64
"""In one request: clients of the export wait for all of them."""


async def list_exports(request: web.Request) -> web.Response:
    return web.json_response({"exports": [fields_of(each) for each in request.app[BACKEND].control.exports()]})


async def show_export(request: web.Request) -> web.Response:
    return web.json_response(fields_of(request.app[BACKEND].control.export(request.match_info["name"])))


async def add_export(request: web.Request) -> web.Response:
    backend = request.app[BACKEND]
    control = backend.control
    config = export_of(await json_body(request), BODY_NAME, backend.service.config.tls)
    names = await control.add(config)
    states = [fields_of(control.export(name)) for name in names]
    headers = {"Location": f"/v1/exports/{quote(names[0], safe='')}"}
    return web.json_response({"exports": states}, status=201, headers=headers)


async def remove_export(request: web.Request) -> web.Response:
    control, state = await _found(request)
    mode = query_choice(request, "mode", REMOVE_MODES)
    await control.remove(state.name, cast(RemoveMode, mode))
    return web.Response(status=204)


async def resize_export(request: web.Request) -> web.Response:
    control, state = await _found(request)
    table, reader = await table_body(request, ("size", "shrink"))
    size, is_change = table.get("size", _new_size, (0, False))
    may_shrink = table.get("shrink", boolean, False)
    if "size" not in table:
        table.report("size is missing, expected bytes")
    checked(reader)
    return web.json_response(fields_of(await control.resize(state.name, size, is_change=is_change, shrink=may_shrink)))


def _new_size(value: object) -> tuple[int, bool]:
    """A size, or with a sign in front of it a change of the one there is; which of them."""
    if isinstance(value, str) and (sign := sign_of_change(value)):
        return sign * size_in_bytes(0)(value[1:]), True
    return size_in_bytes(1)(value), False


async def list_snapshots(request: web.Request) -> web.Response:
    control, state = await _found(request)
    return web.json_response({"snapshots": [fields_of(each) for each in await control.snapshots(state.name)]})


async def create_snapshot(request: web.Request) -> web.Response:
    control, state = await _found(request)
    table, reader = await table_body(request, ("name",))
    name = table.get("name", export_name, "")
    if "name" not in table:
        table.report("name is missing, expected the new snapshot's")
    checked(reader)
    snapshot = await control.snapshot_create(state.name, name)
    headers = {"Location": f"/v1/exports/{quote(state.name, safe='')}/snapshots/{quote(snapshot.name, safe='')}"}
    return web.json_response(fields_of(snapshot), status=201, headers=headers)


async def delete_snapshot(request: web.Request) -> web.Response:
    control, state = await _found(request)
    wanted = request.match_info["snapshot"]
    if not any(wanted in (each.id, each.name) for each in await control.snapshots(state.name)):
        raise Refusal(404, f"{state.name!r} has no snapshot {wanted!r:.80}")
    await control.snapshot_delete(state.name, wanted)
    return web.Response(status=204)


async def list_bitmaps(request: web.Request) -> web.Response:
    control, state = await _found(request)
    return _bitmaps(await control.bitmaps(state.name))


async def change_bitmaps(request: web.Request) -> web.Response:
    control, state = await _found(request)
    table, reader = await table_body(request, ("actions",))
    tables = table.tables("actions", ("action", "name", "granularity", "disabled", "sources"))
    actions = [_bitmap_action(each) for each in tables[:BITMAP_ACTIONS_MAX]]
    if not 1 <= len(tables) <= BITMAP_ACTIONS_MAX:
        table.report(f"there are {len(tables)}, expected 1 to {BITMAP_ACTIONS_MAX}", "actions")
    checked(reader)
    return _bitmaps(await control.bitmaps_change(state.name, actions))


def _bitmap_action(table: Table) -> BitmapAction:
    action = table.get("action", one_of(*get_args(BitmapVerb)), "")
    for key in ("action", "name", *(["sources"] if action == "merge" else [])):
        if key not in table:
            table.report(f"{key} is missing")
    for key, owner in (("granularity", "add"), ("disabled", "add"), ("sources", "merge")):
        if key in table and action != owner:
            table.report(f"not allowed here, expected with {owner} alone", key)
    return BitmapAction(
        cast(BitmapVerb, action),
        table.get("name", string, ""),
        table.get("granularity", size_in_bytes(1), None),
        not table.get("disabled", boolean, False),
        table.get("sources", list_of(string), ()),
    )


def _bitmaps(states: Sequence[BitmapState]) -> web.Response:
    return web.json_response({"bitmaps": [fields_of(each) for each in states]})


async def _found(request: web.Request) -> tuple[Control, ExportState]:
    """The export to work on; one that a reload opens anew is waited for. Raises: NotThere: the path names none."""
    control = request.app[BACKEND].control
    return control, await control.settled(request.match_info["name"])
