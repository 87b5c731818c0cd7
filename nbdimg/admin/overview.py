"""The server as a whole: `/v1/status`, `/v1/stats`, `/v1/reload`, and who is connected: `/v1/clients`."""

from __future__ import annotations

import os
from time import monotonic
from typing import Any

from aiohttp import web

from nbdimg.admin.backend import BACKEND, Backend, fields_of
from nbdimg.admin.problems import Refusal
from nbdimg.admin.requests import json_body, query_choice
from nbdimg.export.meter import CommandMeter, Meter
from nbdimg.wire.constants import Command

CLIENT_ID_DIGITS_MAX = 18
DISCONNECT_MODES = ("drain", "hard")


async def show_status(request: web.Request) -> web.Response:
    """Answers in every state."""
    backend = request.app[BACKEND]
    states = [each for each in backend.exports() if not each.is_hidden]
    return web.json_response(
        {
            "state": backend.state,
            "pid": os.getpid(),
            "uptime": round(monotonic() - backend.started_s, 3),
            "exports": len(states),
            "failed_exports": [*(each.name for each in states if each.failure is not None), *backend.unserved],
            "connections": sum(each.connections for each in states),
            "uris": [] if backend.state == "starting" else [str(uri) for uri in backend.service.uris],
        }
    )


async def show_stats(request: web.Request) -> web.Response:
    """Counters since each export was opened, and `time` in seconds on the server's clock: two answers make rates."""
    return web.json_response({"time": monotonic(), "exports": _stats(request.app[BACKEND])})


def _stats(backend: Backend) -> list[dict[str, Any]]:
    registry = backend.service.registry
    found = []
    for state in backend.exports():
        export = None if state.is_hidden else registry.lookup(state.name)
        if export is not None:
            now = {"name": state.name, "connections": state.connections, "in_flight": state.in_flight}
            found.append({**now, **_counters(export.meter)})
    return found


def _counters(meter: Meter) -> dict[str, Any]:
    read, write = meter.commands[Command.READ], meter.commands[Command.WRITE]
    others = [each for number, each in meter.commands.items() if number not in (Command.READ, Command.WRITE)]
    others.append(meter.unknown)
    return {
        "reads": read.count,
        "read_bytes": read.bytes,
        "read_seconds": read.sum_s,
        "writes": write.count,
        "write_bytes": write.bytes,
        "write_seconds": write.sum_s,
        "others": sum(each.count for each in others),
        "other_seconds": sum(each.sum_s for each in others),
        "errors": sum(map(_errors, (read, write, *others))),
    }


def _errors(meter: CommandMeter) -> int:
    return sum(meter.errors.values())


async def reload(request: web.Request) -> web.Response:
    await json_body(request)
    control = request.app[BACKEND].control
    if not await control.reload():
        image, refusal = control.refused_image, control.refusal or ""
        if image is None:
            raise Refusal(422, refusal)
        raise Refusal(422, f"{image}: {refusal.replace(f'{image}: ', '', 1)}", image=image)
    return web.Response(status=204)


async def list_clients(request: web.Request) -> web.Response:
    control = request.app[BACKEND].control
    clients = control.clients(request.query.get("export"))
    return web.json_response(
        {"clients": [{**fields_of(each), "identities": sorted(each.identities)} for each in clients]}
    )


async def disconnect_client(request: web.Request) -> web.Response:
    control = request.app[BACKEND].control
    text = request.match_info["id"]
    is_hard = query_choice(request, "mode", DISCONNECT_MODES) == "hard"
    if not (text.isascii() and text.isdecimal() and len(text) <= CLIENT_ID_DIGITS_MAX):
        raise Refusal(404, f"{text!r:.80} is no client's id, which is a number")
    await control.disconnect(int(text), hard=is_hard)
    return web.Response(status=204)
