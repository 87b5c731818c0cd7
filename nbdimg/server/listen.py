"""Listening sockets from NBD URIs."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
import sys

from nbdimg.errors import ConfigError, ListenError
from nbdimg.uri import NbdUri

BACKLOG = 1024
"""Connections that the kernel queues; it cuts this to net.core.somaxconn."""

UNIX_BUFFER_SIZE = 1 << 20
"""Socket buffer in bytes for Unix sockets, where the kernel's default of 208 KiB costs a wake-up for every piece of a
large transfer. TCP sizes its buffers itself."""

KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 60, 10, 6
USER_TIMEOUT_MS = 120_000
"""A peer that has vanished is noticed in two minutes, not in the kernel's two hours."""

_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33


def check_exposure(uri: NbdUri, *, is_allowed: bool) -> None:
    """Raises: ConfigError: the address is reachable from other machines, in plain text, without leave."""
    if uri.socket is not None or is_allowed:
        return
    host = uri.host or ""
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    if not is_loopback:
        raise ConfigError(
            f"{uri} is reachable from other machines and NBD without TLS is plain text: "
            "listen on 127.0.0.1, ::1 or a Unix socket, or allow it with --insecure-plaintext"
        )


def listen(uri: NbdUri) -> tuple[list[socket.socket], NbdUri]:
    """Bind and listen, non-blocking. Returns the sockets and the URI with the real port.

    Raises: ListenError: naming the address and the reason.
    """
    try:
        if uri.socket is not None:
            return [_listen_unix(uri.socket)], uri
        return _listen_tcp(uri)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ListenError(f"cannot listen on {uri}: {reason}") from None


def _listen_unix(path: str) -> socket.socket:
    """A socket file that nobody answers at is left over from a server that died, and is replaced."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(path).st_mode) and not _answers(path):
                os.unlink(path)
        sock.bind(path)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        return True


def _listen_tcp(uri: NbdUri) -> tuple[list[socket.socket], NbdUri]:
    """One socket for each address that the host name has; port 0 picks a free one."""
    addresses = socket.getaddrinfo(uri.host, uri.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    port = uri.port
    try:
        for family, kind, protocol, _, address in addresses:
            sock = socket.socket(family, kind, protocol)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address[0], port, *address[2:]))
            port = sock.getsockname()[1]
            sock.listen(BACKLOG)
            sock.setblocking(False)
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets, NbdUri(host=uri.host, port=port, name=uri.name, is_tls=uri.is_tls)


def prepare(sock: socket.socket) -> None:
    """Options for an accepted socket."""
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        for option, forced in ((socket.SO_SNDBUF, _SO_SNDBUFFORCE), (socket.SO_RCVBUF, _SO_RCVBUFFORCE)):
            try:
                sock.setsockopt(socket.SOL_SOCKET, forced, UNIX_BUFFER_SIZE)
            except PermissionError:
                sock.setsockopt(socket.SOL_SOCKET, option, UNIX_BUFFER_SIZE)
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)


def peer_name(sock: socket.socket, address: object) -> str:
    """The client in log lines: its address, or a Unix client's process."""
    if sock.family == socket.AF_UNIX:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid = int.from_bytes(credentials[:4], sys.byteorder)
        return f"unix pid {pid}"
    assert isinstance(address, tuple)
    return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"
