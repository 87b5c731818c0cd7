"""`nbdimg healthcheck`: for probes that run a command every few seconds, in a container without curl.

It imports next to nothing, so that it costs the machine next to nothing: `__main__` runs `main` without the rest of the
command line, and one GET is written by hand.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from time import monotonic

from nbdimg.cli.streams import EXIT_USAGE, complain
from nbdimg.errors import with_user_hidden

DEFAULT_SOCKET = "/run/nbdimg/admin.sock"
SOCKET_VARIABLE = "NBDIMG_ADMIN_SOCKET"
DEFAULT_HTTP_PORT, PORT_MAX = 80, 65535

TIMEOUT_S = 5.0
"""For the whole answer, once somebody takes the connection; before that, for each address of the host."""

ANSWER_SIZE_MAX = 64 << 10

PATHS = {"live": "/livez", "ready": "/readyz", "startup": "/startupz"}

EXIT_UNHEALTHY = 1

HELP = f"""\
Usage: nbdimg healthcheck [OPTIONS] [live|ready|startup]

  Ask a running server how it is. The exit status is 0 when it is well, 1 when it is not or does not answer.

  live      the process answers (the default)
  ready     clients may come, and no export has failed
  startup   everything is open

Options:
  --socket PATH  the server's admin socket (default: ${SOCKET_VARIABLE} or {DEFAULT_SOCKET})
  --url URL      where its metrics and health are, as http://127.0.0.1:9809, in place of a socket
  -h, --help     show this message and exit"""


class _UsageError(Exception):
    pass


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status."""
    if "-h" in arguments or "--help" in arguments:
        try:
            print(HELP)
        except OSError as error:
            complain(f"the help was not printed: {error.strerror}")
            return EXIT_UNHEALTHY
        return 0
    try:
        path, address, host = _parse(arguments)
    except _UsageError as error:
        complain(f"{error}; see nbdimg healthcheck --help")
        return EXIT_USAGE
    try:
        status, text = _get(path, address, host)
    except (OSError, ValueError) as error:
        complain(f"no answer from {host or address}: {getattr(error, 'strerror', '') or error}")
        return EXIT_UNHEALTHY
    if status == 200:
        return 0
    complain(f"{path} answers {status}: {text}")
    return EXIT_UNHEALTHY


def _parse(arguments: Sequence[str]) -> tuple[str, str | tuple[str, int], str]:
    """The path to ask for, the address to ask, and the host that it stands for; empty for a Unix socket."""
    given = iter(arguments)
    kinds, options = [], {"--socket": os.environ.get(SOCKET_VARIABLE) or DEFAULT_SOCKET}
    for argument in given:
        name, equals, value = argument.partition("=")
        if name in ("--socket", "--url"):
            options[name] = value if equals else next(given, "")
            if not options[name]:
                raise _UsageError(f"{name} needs a value")
        elif argument in PATHS:
            kinds.append(argument)
        else:
            raise _UsageError(f"{argument!r} is not allowed, expected {', '.join(PATHS)}, --socket or --url")
    if len(kinds) > 1:
        raise _UsageError(f"{' '.join(kinds)} is not allowed, expected one of them")
    kind = kinds[0] if kinds else "live"
    if "--url" not in options:
        return PATHS[kind], options["--socket"], ""
    return PATHS[kind], *_address(options["--url"])


def _address(url: str) -> tuple[tuple[str, int], str]:
    scheme, separator, rest = url.partition("://")
    authority = rest.removesuffix("/")
    host, colon, port = authority.rpartition(":")
    if not colon or port.endswith("]"):
        host, port = authority, str(DEFAULT_HTTP_PORT)
    host = host.removeprefix("[").removesuffix("]")
    is_number = port.isascii() and port.isdecimal() and int(port[:6]) <= PORT_MAX
    if scheme != "http" or not separator or not host or not is_number or set(authority) & set("/?#@ \r\n"):
        raise _UsageError(f"{with_user_hidden(url)!r} is not allowed, expected http://HOST:PORT")
    return (host, int(port)), authority


def _get(path: str, address: str | tuple[str, int], host: str) -> tuple[int, str]:
    """The status and one line of text. Raises: OSError, ValueError: what answers is not HTTP."""
    with _connected(address) as sock:
        until_s, answer = monotonic() + TIMEOUT_S, b""
        sock.sendall(f"GET {path} HTTP/1.0\r\nHost: {host or 'localhost'}\r\n\r\n".encode())
        while len(answer) < ANSWER_SIZE_MAX and (piece := sock.recv(ANSWER_SIZE_MAX)):
            answer += piece
            sock.settimeout(max(until_s - monotonic(), 1e-3))
    head, _, body = answer.decode(errors="replace").partition("\r\n\r\n")
    words = head.split(maxsplit=2)
    if len(words) < 2 or not words[0].startswith("HTTP/") or not words[1].isdecimal():
        raise ValueError("what answers there is not HTTP")
    lines = body.splitlines()
    return int(words[1]), lines[-1] if lines else ""


def _connected(address: str | tuple[str, int]) -> socket.socket:
    if isinstance(address, tuple):
        return socket.create_connection(address, TIMEOUT_S)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(TIMEOUT_S)
        sock.connect(address)
    except OSError:
        sock.close()
        raise
    return sock
