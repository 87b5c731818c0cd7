"""Plain HTTP over a Unix socket or TCP, as another program would speak it: one request a connection, nothing hidden."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Mapping
from typing import Any, NamedTuple

TIMEOUT_S = 30.0
PROBLEM = "application/problem+json"

Address = str | tuple[str, int]


class Answer(NamedTuple):
    """`headers` by lower-case name."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def detail(self) -> str:
        """The sentence of a problem, which every refusal must be. Source: RFC 9457."""
        assert self.headers["content-type"].startswith(PROBLEM), self
        problem = self.json()
        assert (problem["type"], problem["status"]) == ("about:blank", self.status)
        assert problem["title"]
        assert "Traceback" not in self.body.decode()
        return str(problem["detail"])


def connected(address: Address) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    sock.settimeout(TIMEOUT_S)
    try:
        sock.connect(address)
    except OSError:
        sock.close()
        raise
    return sock


def exchanged(address: Address, request: bytes) -> Answer:
    """Send the bytes, and read until the server closes."""
    with connected(address) as sock:
        sock.sendall(request)
        return received(sock)


def received(sock: socket.socket) -> Answer:
    """One answer, to its end."""
    raw = b""
    while piece := sock.recv(65536):
        raw += piece
    head, separator, body = raw.partition(b"\r\n\r\n")
    assert separator, raw[:200]
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    assert len(body) == int(headers.get("content-length", len(body)))
    return Answer(int(first.split()[1]), headers, body)


def ask(
    address: Address,
    method: str,
    target: str,
    body: object = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """`body`: bytes as they are, anything else as JSON; a body is said to be JSON unless `headers` say otherwise. Bytes
    that are no UTF-8 stand in headers as `surrogateescape` has them.
    """
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    given = {"Host": "localhost", "Connection": "close"}
    if body is not None:
        given |= {"Content-Type": "application/json", "Content-Length": str(len(raw))}
    given |= headers or {}
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
    return exchanged(address, "\r\n".join([*lines, "", ""]).encode(errors="surrogateescape") + raw)


def http_address(log: str) -> list[tuple[str, int]]:
    """Where a server says that it speaks HTTP on TCP."""
    return [(host, int(port)) for host, port in re.findall(r"at http://([0-9.]+):([0-9]+)", log)]
