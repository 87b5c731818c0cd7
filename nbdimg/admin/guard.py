"""Who may ask: the token of a TCP listener, and what keeps a browser from being driven against a local server.

A web page can make its visitor's browser send requests to 127.0.0.1. Three things stop it: no response allows other
origins, so a page can read none; what changes anything needs a JSON content type or DELETE, which a browser asks leave
for first and gets none; and where a listener is for this machine alone, the Host must name it, so a page's own name
that is resolved to 127.0.0.1 does not help it.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import re

from aiohttp import web

from nbdimg.admin.problems import Handler, Refusal
from nbdimg.errors import ConfigError
from nbdimg.server.credentials import read_token
from nbdimg.server.log import LimitedLog
from nbdimg.server.reload import Stamp, stamp

logger = logging.getLogger("nbdimg")


class TokenFile:
    """A bearer token in a file, which is read again when it has changed. While it is not as it must be, no token is
    accepted: who removes it wants that.

    Raises: ConfigError: it cannot be read, is open to everybody, or holds no token.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen: Stamp | None = stamp(path)
        self._token = read_token(path)

    def accepts(self, token: str) -> bool:
        """In a time that does not tell how much of `token` was right."""
        seen = stamp(self._path)
        if seen != self._seen:
            self._seen = seen
            self._token = self._read_again()
        return bool(self._token) and hmac.compare_digest(token.encode(errors="replace"), self._token)

    def _read_again(self) -> bytes:
        try:
            return read_token(self._path)
        except ConfigError as error:
            logger.error("no token is accepted any more: %s", error)
            return b""


class Guard:
    """Of one listener. `token` None: who can connect may ask. `host`: what a listener for this machine alone is bound
    to; None: it is not for this machine alone, or a Unix socket.
    """

    def __init__(self, token: TokenFile | None = None, host: str | None = None) -> None:
        self._token = token
        self._host = host
        self._log = LimitedLog()

    @web.middleware
    async def admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Raises: Refusal."""
        if self._host is not None and not self._is_named(request.headers.get("Host", "")):
            raise Refusal(403, "the Host header must name this machine by address, or as localhost")
        if self._token is not None:
            self._check_token(self._token, request)
        return await handler(request)

    def _check_token(self, token: TokenFile, request: web.Request) -> None:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise Refusal(401, "a token is needed: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
        if not token.accepts(given.strip()):
            self._log.say(logging.WARNING, f"{request.remote}: a wrong token for the admin API")
            raise Refusal(401, "the token is wrong", {"WWW-Authenticate": 'Bearer error="invalid_token"'})

    def _is_named(self, header: str) -> bool:
        """An address cannot be rebound; of names, those are good that cannot be a stranger's."""
        host = re.sub(r":[0-9]*$", "", header)
        if host.lower() in ("localhost", self._host):
            return True
        try:
            ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return True
