"""What handlers take from a request, checked: JSON bodies and query parameters."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

from aiohttp import web

from nbdimg.admin.problems import Refusal
from nbdimg.configfile import ConfigFileError
from nbdimg.configfile.reader import Reader, Table
from nbdimg.units import alternatives

BODY_NAME = "request body"
"""Stands for the file's name in what is wrong with a body."""

BODY_TIMEOUT_S = 10.0
"""For a body of at most 64 KiB, from its request's header on."""

JSON_TYPE = "application/json"


async def json_body(request: web.Request) -> object:
    """Raises: Refusal: it is no JSON, is not said to be, or does not come."""
    if request.content_type != JSON_TYPE:
        raise Refusal(415, f"the content type is {request.content_type}, expected {JSON_TYPE}")
    if "Content-Encoding" in request.headers:
        raise Refusal(415, "the body has a content encoding, expected none")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            raw = await request.read()
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {BODY_TIMEOUT_S:g} s", {"Connection": "close"}) from None
    except web.RequestPayloadError:
        raise Refusal(400, "the body is not encoded as its header says") from None
    try:
        text = raw.decode()
        content = json.loads(text) if text else {}
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise Refusal(400, "the body is nested too deeply") from None
    except ValueError:
        raise Refusal(400, "the body is not JSON in UTF-8") from None
    return content


async def table_body(request: web.Request, known: Sequence[str]) -> tuple[Table, Reader]:
    """A body that is one table; `checked` must follow when its keys have been taken. Raises: Refusal."""
    reader = Reader(BODY_NAME, await json_body(request), None)
    return reader.table((), reader.content, known), reader


def checked(reader: Reader) -> None:
    """Raises: ConfigFileError: all that was wrong with a body."""
    if problems := reader.problems():
        raise ConfigFileError(problems)


def query_choice(request: web.Request, name: str, allowed: Sequence[str]) -> str:
    """The first of `allowed` where the query does not say. Raises: Refusal."""
    value = request.query.get(name, allowed[0])
    if value not in allowed:
        raise Refusal(422, f"{name} is {value!r:.80}, expected {alternatives(allowed)}")
    return value
