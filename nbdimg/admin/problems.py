"""Every refusal as `application/problem+json` with one sentence; nothing of the program's inside reaches a client.

Source: RFC 9457. Besides its members, `problems` lists all that is wrong with a body where that is more than one thing,
and `image` names the image file that could not be opened, read or written.
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from aiohttp import web

from nbdimg.configfile import ConfigFileError
from nbdimg.errors import ConfigError, ImageError, ImageFailed, ImageLocked, NbdimgError, NotThere

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

PROBLEM_TYPE = "application/problem+json"

logger = logging.getLogger("nbdimg")


class Refusal(NbdimgError):
    """A request is answered with this status and sentence."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None, **members: str) -> None:
        super().__init__(detail)
        self.status = status
        self.headers = headers
        self.members = members


def problem(
    status: int, detail: str, headers: dict[str, str] | None = None, **members: str | tuple[str, ...]
) -> web.Response:
    """Args: members: extension members."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **members}
    return web.Response(status=status, text=json.dumps(body), content_type=PROBLEM_TYPE, headers=headers)


@web.middleware
async def answering_problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What the guard or a handler raises becomes a response, for the layers around it to log and send."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return of_aiohttp(error)
    except Exception as error:
        return _of(error)


def _of(error: Exception) -> web.Response:
    if isinstance(error, Refusal):
        return problem(error.status, str(error), error.headers, **error.members)
    if isinstance(error, ConfigFileError):
        return problem(422, error.problems[0], problems=error.problems)
    if isinstance(error, ConfigError):
        return problem(404 if isinstance(error, NotThere) else 409, str(error))
    if isinstance(error, ImageError):
        status = 409 if isinstance(error, ImageLocked) else 500 if isinstance(error, ImageFailed) else 422
        return problem(status, str(error), image=error.path)
    if isinstance(error, OSError):
        status = 507 if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else 500
        reason = error.strerror or str(error)
        return problem(status, f"{error.filename}: {reason}" if error.filename else reason)
    return failed(error)


def failed(error: BaseException | None) -> web.Response:
    """For what nobody foresaw."""
    logger.error("internal error in the admin API: %r", error)
    logger.debug("the failure's traceback", exc_info=error)
    return problem(500, "internal error; the server's log says more")


def malformed(reason: str) -> web.Response:
    """For what cannot be read as a request. `reason`: aiohttp's; behind its first line it shows what was sent."""
    first = reason.strip().partition("\n")[0].rstrip(":.")
    return problem(400, f"this is no HTTP request: {first}" if first else "this is no HTTP request")


def of_aiohttp(error: web.HTTPException) -> web.Response:
    """What aiohttp refuses by itself."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return problem(405, f"{error.method} is not allowed here, expected {allowed}", {"Allow": allowed})
    if isinstance(error, web.HTTPNotFound):
        return problem(404, "there is nothing at this path; GET /v1/openapi.json tells what there is")
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return problem(413, f"the body is too large, expected at most {BODY_SIZE_MAX} bytes")
    if isinstance(error, web.HTTPExpectationFailed):
        return problem(417, "the header Expect is not allowed here, but for 100-continue")
    return problem(error.status, error.reason)


BODY_SIZE_MAX = 64 << 10
"""Bytes of a request's body. An export with a thousand access rules has less."""
