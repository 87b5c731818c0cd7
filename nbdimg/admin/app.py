"""Which path is answered by what, and what stands around every answer."""

from __future__ import annotations

import asyncio
import logging

from aiohttp import web

from nbdimg.admin import exports, health, openapi, overview
from nbdimg.admin.backend import BACKEND, Backend
from nbdimg.admin.guard import Guard
from nbdimg.admin.problems import BODY_SIZE_MAX, Handler, answering_problems
from nbdimg.errors import escaped
from nbdimg.server.listen import peer_of
from nbdimg.server.log import LimitedLog

SEND_TIMEOUT_S = 30.0
"""For a response that its client does not take."""

_EXPORT = "/v1/exports/{name:[^/]+}"
"""By any name: aiohttp's own pattern takes none with braces."""

HEALTH_ROUTES = (
    web.get("/livez", health.livez),
    web.get("/readyz", health.readyz),
    web.get("/startupz", health.startupz),
    web.get("/metrics", health.metrics),
)

ADMIN_ROUTES = (
    *HEALTH_ROUTES,
    web.get("/v1/openapi.json", openapi.show_document),
    web.get("/v1/status", overview.show_status),
    web.get("/v1/stats", overview.show_stats),
    web.post("/v1/reload", overview.reload),
    web.get("/v1/clients", overview.list_clients),
    web.delete("/v1/clients/{id}", overview.disconnect_client),
    web.get("/v1/exports", exports.list_exports),
    web.post("/v1/exports", exports.add_export),
    web.get(_EXPORT, exports.show_export),
    web.delete(_EXPORT, exports.remove_export),
    web.post(f"{_EXPORT}/resize", exports.resize_export),
    web.get(f"{_EXPORT}/snapshots", exports.list_snapshots),
    web.post(f"{_EXPORT}/snapshots", exports.create_snapshot),
    web.delete(f"{_EXPORT}/snapshots/{{snapshot:[^/]+}}", exports.delete_snapshot),
    web.get(f"{_EXPORT}/bitmaps", exports.list_bitmaps),
    web.post(f"{_EXPORT}/bitmaps", exports.change_bitmaps),
)

logger = logging.getLogger("nbdimg")


def application(backend: Backend, guard: Guard, *, is_admin: bool) -> web.Application:
    """The whole API, or health and metrics alone."""
    logging_changes = [_ChangeLog().log] if is_admin else []
    app = web.Application(
        middlewares=[_sending, *logging_changes, answering_problems, guard.admit], client_max_size=BODY_SIZE_MAX
    )
    app[BACKEND] = backend
    app.add_routes(ADMIN_ROUTES if is_admin else HEALTH_ROUTES)
    return app


@web.middleware
async def _sending(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give up on a client that does not take its answer."""
    response = await handler(request)
    sign(response)
    try:
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await response.prepare(request)
            await response.write_eof()
    except (TimeoutError, ConnectionError):
        if request.transport is not None:
            request.transport.abort()
    return response


def sign(response: web.StreamResponse) -> None:
    """An answer tells whose it is, not of which libraries and versions, and is not to be kept."""
    response.headers["Server"] = "nbdimg"
    response.headers["Cache-Control"] = "no-store"


class _ChangeLog:
    """One line for each request that may change something, whatever came of it; of those whose client was not let in,
    which anybody may send, not more than of NBD's clients.
    """

    def __init__(self) -> None:
        self._strangers = LimitedLog()

    @web.middleware
    async def log(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method in ("GET", "HEAD"):
            return await handler(request)
        peer = _peer(request)
        response = await handler(request)
        line = f"{peer}: admin: {request.method} {escaped(request.rel_url.raw_path)}: {response.status}"
        if response.status in (401, 403):
            self._strangers.say(logging.INFO, line)
        else:
            logger.info("%s", line)
        return response


def _peer(request: web.Request) -> str:
    """Who asks, as the log names NBD clients."""
    transport = request.transport
    if transport is None:
        return "a client that is gone"
    return peer_of(transport.get_extra_info("socket"), transport.get_extra_info("peername"))[0]
