"""Listening sockets from NBD URIs."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import socket
import stat
from collections.abc import Collection, Iterator
from dataclasses import replace
from struct import Struct
from typing import Any

from nbdimg.config import ServerConfig, TcpAddress
from nbdimg.errors import ListenError
from nbdimg.export.access import Client
from nbdimg.uri import DEFAULT_PORT, NbdUri

BACKLOG = 1024
"""Connections that the kernel queues; it cuts this to net.core.somaxconn."""

UNIX_BUFFER_SIZE = 1 << 20
"""Socket buffer in bytes for Unix sockets, where the kernel's default of 208 KiB costs a wake-up for every piece of a
large transfer. TCP sizes its buffers itself."""

SOCKET_PATH_MAX = 107
"""Bytes of a Unix socket's path: sun_path without the NUL at its end. Source: unix(7)."""

KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 60, 10, 6
USER_TIMEOUT_MS = 120_000
"""A peer that has vanished is noticed in two minutes, not in the kernel's two hours."""

logger = logging.getLogger("nbdimg")

_MAYBE_LEFT_OVER = "Address already in use, or the file was left over: the sandbox lets nobody ask, except at the start"

_PEER_CREDENTIALS = Struct("=iII")
"""Linux's struct ucred: pid, uid, gid."""

_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33

_Found = list[tuple[Any, ...]]
"""What getaddrinfo returns."""

_found: dict[str, _Found] = {}
"""By host, what `ask_before_listening` was told. It is the process's, as the sandbox is."""


def address_of(uri: NbdUri) -> tuple[str, int]:
    """Where `uri` listens, whatever it demands there: two listeners cannot have the same."""
    return (uri.socket, -1) if uri.socket is not None else (uri.host or "", uri.port)


def check_socket_path(path: str | None) -> None:
    """Raises: ListenError: no Unix socket can have that path."""
    if path is not None and (size := len(os.fsencode(path))) > SOCKET_PATH_MAX:
        raise ListenError(f"cannot listen on {path}: the path has {size} bytes, expected at most {SOCKET_PATH_MAX}")


def is_exposed(uri: NbdUri) -> bool:
    """Whether other machines reach the address."""
    return uri.socket is None and not is_loopback(uri.host or "")


def is_loopback(host: str) -> bool:
    """Whether `host` means this machine alone. Other names than localhost are not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_name(host: str) -> bool:
    """Whether others must be asked for its addresses, or for its zone's number (`fe80::1%eth0`). Most need not be asked
    for localhost.
    """
    try:
        return "%" in str(ipaddress.ip_address(host))
    except ValueError:
        return host != "localhost"


def ask_before_listening(config: ServerConfig, inherited: Collection[NbdUri]) -> None:
    """Ask others what listening takes to know of them, for a process that will not be able to ask: the addresses of
    hosts, whether anybody answers at the files of Unix sockets.

    Args: inherited: listeners that are open already.

    Raises: ListenError.
    """
    taken = {address_of(each) for each in inherited}
    for uri in config.listeners:
        if address_of(uri) not in taken:
            with _named(_with_port(uri)):
                _ask(uri.socket, uri.host)
    if config.admin is not None and config.admin.socket_path is not None:
        with _named(config.admin.socket_path):
            _ask(config.admin.socket_path, None)
    for address in (config.admin.address if config.admin else None, config.metrics_address):
        if address is not None:
            with _named(str(address)):
                _ask(None, address.host)


def _ask(path: str | None, host: str | None) -> None:
    if path is not None:
        check_socket_path(path)
        _remove_left_over(path)
    elif host is not None:
        _found[host] = _look_up(host)


def listen(uri: NbdUri) -> tuple[list[socket.socket], NbdUri]:
    """Bind and listen, non-blocking. Returns the sockets and the URI with the real port.

    Raises: ListenError: naming the address and the reason.
    """
    with _named(_with_port(uri)):
        if uri.socket is not None:
            return [_listen_unix(uri.socket)], uri
        assert uri.host is not None
        sockets = _listen_tcp(uri.host, uri.port)
        return sockets, replace(uri, port=sockets[0].getsockname()[1])


def _with_port(uri: NbdUri) -> str:
    """A URI leaves the default port out."""
    return f"{uri} (port {DEFAULT_PORT})" if uri.socket is None and uri.port == DEFAULT_PORT else str(uri)


def listen_private(path: str) -> socket.socket:
    """As `listen`, at a Unix socket that only this process's user, and root, may connect to."""
    with _named(path):
        return _listen_unix(path, is_private=True)


def check_socket_directory(path: str) -> None:
    """Raises: ListenError: what `listen_private` says where the directory of `path` is not there."""
    with _named(path), _directory_named(path):
        os.stat(os.path.join(os.path.dirname(os.path.abspath(path)), ""))


@contextlib.contextmanager
def _directory_named(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, f"there is no directory {os.path.dirname(path)}") from None


def listen_tcp(address: TcpAddress) -> tuple[list[socket.socket], TcpAddress]:
    """As `listen`; returns the address with the real port."""
    with _named(str(address)):
        sockets = _listen_tcp(address.host, address.port)
        return sockets, replace(address, port=sockets[0].getsockname()[1])


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Turns what the system says into a ListenError."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ListenError(f"cannot listen on {what}: {reason}") from None


def remove_socket(path: str, inode: int) -> None:
    """Remove the file of a Unix socket, unless another server's stands there by now.

    What hinders that is logged and nothing more: who listens there next replaces the file, and images are still to be
    flushed.
    """
    try:
        if os.stat(path).st_ino == inode:
            os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("socket %s cannot be removed: %s", path, error.strerror)


def _listen_unix(path: str, *, is_private: bool = False) -> socket.socket:
    """A socket file that nobody answers at is left over from a server that died, and is replaced.

    Args: is_private: nobody but its owner gets permissions, by the process's umask: as long as no thread makes files.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_left_over(path)
        with _directory_named(path), _umask(0o177) if is_private else contextlib.nullcontext():
            sock.bind(path)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def _remove_left_over(path: str) -> None:
    """Raises: OSError: somebody answers at the file, or that cannot be found out, or it is no socket."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "there is something else of that name, which is no socket")
        if _answers(path):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        os.unlink(path)


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except PermissionError as error:
            if error.errno != errno.EPERM:
                raise
            raise OSError(errno.EADDRINUSE, _MAYBE_LEFT_OVER) from None
        return True


def _listen_tcp(host: str, port: int) -> list[socket.socket]:
    """One socket for each address that the host name has, on one port; 0 picks a free one."""
    addresses = _found[host] if host in _found else _look_up(host)
    sockets: list[socket.socket] = []
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
    return sockets


def _look_up(host: str) -> _Found:
    return list(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE))


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


def peer_of(sock: socket.socket, address: object) -> tuple[str, Client]:
    """The client in log lines (its address, or a Unix client's process), and in access rules."""
    if sock.family == socket.AF_UNIX:
        pid, uid, gid = _PEER_CREDENTIALS.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        )
        return f"unix pid {pid}", Client(uid=uid, gid=gid)
    assert isinstance(address, tuple)
    name = f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"
    return name, Client(address=ipaddress.ip_address(address[0]))
