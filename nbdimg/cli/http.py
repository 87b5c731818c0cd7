"""Talking to a running server's HTTP API, over its Unix socket or TCP. What it refuses comes out as the exception that
the same refusal is on this side.

Imported by the functions that need it: `http.client` is slow to import.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from nbdimg.cli.answers import NOTHING, Shape, check_answer
from nbdimg.errors import ConfigError, ImageError, NbdimgError, with_user_hidden
from nbdimg.storage.short import read_short

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 30.0
"""For answers that wait for nothing. A change may wait for clients and for storage, as long as the server lets it."""

TOKEN_FILE_SIZE_MAX = 64 << 10
"""Bytes: more is another file."""

TOKEN_PATIENCE_S = 10.0
"""For the writer of a FIFO to come to its end."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Api:
    """One server. Each request has a connection of its own, so that a server may restart in between.

    Args:
        socket_path: of the Unix socket, unless there is a `url`, as http://127.0.0.1:9808.
        token_path: a file with the token that goes with `url`.

    Raises: ConfigError: the URL or the token file is not as it must be.
    """

    def __init__(self, socket_path: str, url: str | None = None, token_path: str | None = None) -> None:
        self._socket_path = socket_path
        self._url = url
        self._headers = {"Accept": "application/json"}
        if url is not None:
            _check_url(url)
        if token_path is not None:
            if url is None:
                raise ConfigError("--token-file goes with --url; a Unix socket needs no token")
            self._headers["Authorization"] = f"Bearer {_read_token(token_path)}"

    @property
    def is_local(self) -> bool:
        """Whether the server is at a Unix socket, so on this machine."""
        return self._url is None

    def get(self, path: str, shape: Shape, **query: str) -> dict[str, Any]:
        """Raises: as `change`."""
        return self._shaped(self._request("GET", path, query, None), shape)

    def change(
        self, method: str, path: str, body: object = None, *, shape: Shape = NOTHING, **query: str
    ) -> dict[str, Any]:
        """What the server answers, of `shape`; empty when that is nothing.

        Raises: ConfigError: what was asked for is not there, taken or not allowed. ImageError: an image cannot be
            opened. NbdimgError: the server cannot be reached, something failed in it, or it answers otherwise.
        """
        return self._shaped(self._request(method, path, query, {} if body is None else body), shape)

    def _shaped(self, answer: dict[str, Any], shape: Shape) -> dict[str, Any]:
        check_answer(answer, shape)
        return answer

    def _request(self, method: str, path: str, query: dict[str, str], body: object) -> dict[str, Any]:
        connection = self._connection()
        is_post = method == "POST"
        headers = {**self._headers, "Content-Type": "application/json"} if is_post else self._headers
        limit_s = None
        target = f"{path}?{urlencode(query, errors='surrogateescape')}" if query else path
        try:
            connection.connect()
            if connection.sock is not None:
                limit_s = ANSWER_TIMEOUT_S if method == "GET" else None
                connection.sock.settimeout(limit_s)
            connection.request(method, target, json.dumps(body).encode() if is_post else None, headers)
            response = connection.getresponse()
            answer = response.read()
        except (OSError, UnicodeError) as error:
            raise NbdimgError(self._unreachable(error, limit_s)) from None
        except http.client.HTTPException as error:
            raise NbdimgError(self._is_no_server(f"no HTTP server ({error!r})")) from None
        finally:
            connection.close()
        return self._answer(response.status, answer)

    def _connection(self) -> http.client.HTTPConnection:
        if self._url is None:
            return _UnixConnection(self._socket_path, CONNECT_TIMEOUT_S)
        parts = urlsplit(self._url)
        assert parts.hostname is not None
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname, parts.port, timeout=CONNECT_TIMEOUT_S)

    def _unreachable(self, error: OSError | UnicodeError, limit_s: float | None) -> str:
        """Args: limit_s: how long an answer was waited for, if it was."""
        if isinstance(error, TimeoutError) and error.errno is None and limit_s is not None:
            return f"the server at {self._url or self._socket_path} is there and has not answered within {limit_s:g} s"
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, PermissionError) and self._url is None:
            return f"cannot reach the server at {self._socket_path}: {reason}; its socket is for its own user, and root"
        return self._is_no_server(reason)

    def _is_no_server(self, reason: str) -> str:
        hint = "; is a server running, with --admin-socket?" if self._url is None else ""
        return f"cannot reach the server at {self._url or self._socket_path}: {reason}{hint}"

    def _answer(self, status: int, text: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(text) if text else {}
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise NbdimgError(self._is_no_server(f"status {status} and no JSON: not an admin API of nbdimg"))
        if status < http.client.BAD_REQUEST:
            return answer
        detail = str(answer.get("detail", f"the server answered with status {status}"))
        if "image" in answer:
            path = str(answer["image"])
            raise ImageError(path, detail.removeprefix(f"{path}: "))
        if status >= http.client.INTERNAL_SERVER_ERROR:
            raise NbdimgError(detail)
        raise ConfigError(detail)


def export_path(name: str, *more: str) -> str:
    """The path of an export, or of what is beneath it. Raises: ConfigError: a name is empty."""
    if "" in (name, *more):
        raise ConfigError("a name is empty, expected that of an export or snapshot")
    return "/".join(["/v1/exports", *(quote(part, safe="", errors="surrogateescape") for part in (name, *more))])


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_sound = False
    if not is_sound or parts.path not in ("", "/") or parts.query or parts.username is not None:
        raise ConfigError(f"{with_user_hidden(url)!r} is not allowed, expected http://HOST:PORT")


def _read_token(path: str) -> str:
    try:
        token = read_short(path, TOKEN_FILE_SIZE_MAX, TOKEN_PATIENCE_S).decode(errors="replace").strip()
    except OSError as error:
        raise ConfigError(f"token file {os.fspath(path)}: {error.strerror}") from None
    if not 1 <= len(token) <= TOKEN_FILE_SIZE_MAX or not token.isascii() or not token.isprintable():
        raise ConfigError(f"token file {path}: expected one line with the token")
    return token
