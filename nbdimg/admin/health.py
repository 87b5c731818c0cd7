"""Health for whoever restarts, routes and starts: `/livez`, `/readyz`, `/startupz`. None of them touches storage.

/livez      the loop runs: whoever reads the answer has the proof
/startupz   200 once all exports and listeners are open
/readyz     200 while clients can come and every export takes requests; ?verbose says which does not, and why. One that
            a reload could not open again is one that does not
"""

from __future__ import annotations

from aiohttp import web

from nbdimg.admin.backend import BACKEND
from nbdimg.units import counted


async def livez(_: web.Request) -> web.Response:
    return web.Response(text="ok\n")


async def startupz(request: web.Request) -> web.Response:
    state = request.app[BACKEND].state
    return web.Response(status=503, text="starting\n") if state == "starting" else web.Response(text="ok\n")


async def readyz(request: web.Request) -> web.Response:
    """`[+]` and `[-]` before each export, as Kubernetes' own servers say it."""
    backend = request.app[BACKEND]
    failures = {each.name: each.failure for each in backend.exports() if not each.is_hidden}
    failures.update(backend.unserved)
    is_serving = backend.state == "serving"
    if failed := sum(each is not None for each in failures.values()):
        verdict = f"{failed} of {counted(len(failures), 'export')} failed"
    else:
        verdict = "ok" if is_serving else backend.state
    lines = [verdict]
    if "verbose" in request.query:
        lines[:0] = [f"[-]{name} {why}" if why else f"[+]{name} ok" for name, why in failures.items()]
    return web.Response(status=200 if is_serving and not failed else 503, text="".join(f"{line}\n" for line in lines))


async def metrics(request: web.Request) -> web.Response:
    body, content_type = await request.app[BACKEND].metrics()
    return web.Response(body=body, headers={"Content-Type": content_type})
