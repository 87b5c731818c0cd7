"""What systemd hands over, and what it wants to be told: inherited sockets, and the state of the service.

Without systemd's environment variables all of it does nothing. Source: sd_listen_fds(3), sd_notify(3),
sd_watchdog_enabled(3); the protocol is three variables and a datagram socket, so no library is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import socket
from array import array
from collections.abc import MutableMapping, Sequence
from time import CLOCK_MONOTONIC, clock_gettime_ns
from typing import NamedTuple

from nbdimg.errors import ConfigError
from nbdimg.uri import NbdUri

FIRST_DESCRIPTOR = 3
"""SD_LISTEN_FDS_START."""

TLS_SUFFIX = "tls"
"""A socket whose name ends so requires TLS: `FileDescriptorName=nbd-tls`."""

ADMIN_NAME, METRICS_NAME = "admin", "metrics"
"""Sockets of these names are not for NBD clients."""

KEPT_PREFIX = "nbdimg+"
"""Descriptors of such names are those that a process of this service has had kept. A socket that is given no name has
its unit's, as nbdimg-vm1.socket; no unit's has a plus."""

DESCRIPTORS_PER_MESSAGE = 200
"""The kernel passes 253 at once."""

KEEP_TIMEOUT_S = 5.0

logger = logging.getLogger("nbdimg")


class Inherited(NamedTuple):
    """A listening socket that this process was started with."""

    socket: socket.socket
    uri: NbdUri
    name: str


class Inheritance(NamedTuple):
    """What this process was started with. `kept`: by name, the descriptors that `Notifier.keep` was given before."""

    listeners: list[Inherited]
    kept: dict[str, list[int]]


def is_for_clients(inherited: Inherited) -> bool:
    """Whether it is for NBD clients, and not for HTTP."""
    return inherited.name not in (ADMIN_NAME, METRICS_NAME)


def inherit(environment: MutableMapping[str, str] | None = None) -> Inheritance:
    """The descriptors of LISTEN_FDS, if they are meant for this process; the variables are removed, as nobody else may
    take them.

    Raises: ConfigError: one is no listening stream socket, or the variables are no numbers.
    """
    environment = os.environ if environment is None else environment
    pid, count, names = (environment.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES"))
    inheritance = Inheritance([], {})
    if not count or pid != str(os.getpid()):
        return inheritance
    if not count.isdecimal():
        raise ConfigError(f"LISTEN_FDS is {count!r}, expected a number")
    listed = names.split(":") if names else []
    named = listed + ["unknown"] * (int(count) - len(listed))
    for descriptor, name in enumerate(named[: int(count)], FIRST_DESCRIPTOR):
        if name.startswith(KEPT_PREFIX):
            os.set_inheritable(descriptor, False)
            inheritance.kept.setdefault(name, []).append(descriptor)
        else:
            inheritance.listeners.append(_inherited(descriptor, name))
    return inheritance


def _inherited(descriptor: int, name: str) -> Inherited:
    what = f"descriptor {descriptor} ({name}) of LISTEN_FDS"
    try:
        os.set_inheritable(descriptor, False)
        sock = socket.socket(fileno=descriptor)
    except OSError as error:
        raise ConfigError(f"{what} is no socket: {error.strerror}") from None
    is_listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    is_known = sock.family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM
    if not is_known or not is_listening:
        raise ConfigError(f"{what} must be a listening Unix or TCP stream socket (Accept=no)")
    sock.setblocking(False)
    return Inherited(sock, _uri_of(sock, is_tls=name.endswith(TLS_SUFFIX)), name)


def _uri_of(sock: socket.socket, *, is_tls: bool) -> NbdUri:
    address = sock.getsockname()
    if sock.family != socket.AF_UNIX:
        return NbdUri(host=address[0], port=address[1], is_tls=is_tls)
    path = address if isinstance(address, str) else "@" + address[1:].decode(errors="backslashreplace")
    return NbdUri(socket=path, is_tls=is_tls)


class Notifier:
    """Tells the service manager about this process. Must be made on the running loop.

    Args: environment: NOTIFY_SOCKET, WATCHDOG_USEC, WATCHDOG_PID and FDSTORE are taken out of it.
    """

    def __init__(self, environment: MutableMapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        address, period, pid, kept_max = (
            environment.pop(name, "") for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "FDSTORE")
        )
        self._loop = asyncio.get_running_loop()
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.keeps_descriptors = False
        """Whether `keep` has a meaning here."""
        if address.startswith(("@", "/")):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            if address.startswith("@"):
                # Landlock does not reach it later. At a path, each message goes to whoever is there by then.
                with contextlib.suppress(OSError):
                    self._socket.connect(self._address)
            self.keeps_descriptors = kept_max.isdecimal() and int(kept_max) > 0
            is_mine = pid in ("", str(os.getpid()))
            if is_mine and period.isdecimal() and int(period):
                self._interval_s = int(period) / 1e6 / 2
                self._watch()

    def ready(self, status: str) -> None:
        """Listening, or listening again with what was reloaded."""
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """`ready` must follow."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={clock_gettime_ns(CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        self._send("STOPPING=1", "STATUS=draining")

    def keep(self, name: str, descriptors: Sequence[int]) -> None:
        """Have descriptors kept for the next process of this service, until `forget`; returns when they are. Those that
        are more than the service may have kept are closed. Blocks.

        Args: name: begins with KEPT_PREFIX.

        Raises: OSError.
        """
        for start in range(0, len(descriptors), DESCRIPTORS_PER_MESSAGE):
            self._pass(f"FDSTORE=1\nFDNAME={name}", descriptors[start : start + DESCRIPTORS_PER_MESSAGE])
        self._wait_processed()

    def forget(self, name: str) -> None:
        """What was kept under this name is the business of this process alone from now on. Blocks.

        Raises: OSError: the service manager was not told.
        """
        if self._socket is not None:
            self._pass(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def _pass(self, message: str, descriptors: Sequence[int] = ()) -> None:
        assert self._socket is not None
        passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
        self._socket.settimeout(KEEP_TIMEOUT_S)
        try:
            self._tell(message, passed)
        finally:
            self._socket.setblocking(False)

    def _wait_processed(self) -> None:
        """The other end of a pipe is closed behind everything that was sent before."""
        here, there = os.pipe()
        try:
            try:
                self._pass("BARRIER=1", [there])
            finally:
                os.close(there)
            watched = select.poll()
            watched.register(here, 0)
            watched.poll(KEEP_TIMEOUT_S * 1000)
        finally:
            os.close(here)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _tell(self, message: str, passed: Sequence[tuple[int, int, array[int]]] = ()) -> None:
        """Not by sendto, of which the sandbox sees the address. Raises: OSError."""
        assert self._socket is not None
        self._socket.sendmsg([message.encode()], passed, 0, self._address)

    def _watch(self) -> None:
        """A timer of the loop that serves clients: a loop that is stuck sends nothing, and is restarted for it."""
        self._send("WATCHDOG=1")
        self._timer = self._loop.call_later(self._interval_s, self._watch)

    def _send(self, *lines: str) -> None:
        if self._socket is None:
            return
        try:
            self._tell("\n".join(" ".join(line.split()) for line in lines))
        except OSError as error:
            logger.warning("the service manager was not told %s: %s", lines[0], error.strerror)
