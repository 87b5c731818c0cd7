"""Clients that outlive their server: left with the service manager when it stops, and taken up by the next one.

    drain ─▶ what has arrived is answered ─▶ images flushed and closed ─▶ sockets and state kept by systemd
                                                                                  │
    serving ◀─ sessions go on, with the first byte that was not answered ◀─ images open

A client notices a pause. It is left only in a state that bytes describe whole: in its transmission phase, without TLS,
every request answered whose last byte has come, and on an image or kept overlay that the next server opens as well.

    (H1) If anything fails at the end, nobody is left: a client of an image whose last flush failed must see its
         connection end, for the next server opens the image as if nothing had happened.
    (H2) What systemd keeps is forgotten there before the first byte of it is served: it never serves twice.
    (H3) A session goes on only if a handshake would give the client no less than it has, of the same files.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import NamedTuple

from nbdimg.export.export import Export
from nbdimg.server.systemd import KEPT_PREFIX, Inheritance, Notifier
from nbdimg.storage.posix import PosixFile
from nbdimg.wire.constants import TransmissionFlag
from nbdimg.wire.handshake import ExportInfo, Session

CLIENT_NAME, STATE_NAME = f"{KEPT_PREFIX}client", f"{KEPT_PREFIX}clients"
"""What systemd keeps them under: each socket, and one file that tells of all."""

VERSION = 1
"""Of the file's content."""

logger = logging.getLogger("nbdimg")


Files = tuple[tuple[int, int], ...]
"""Of each, the device and the inode."""


class LeftClient(NamedTuple):
    """`files`: by `files_of`. `received`: bytes behind the last request that was answered."""

    sock: socket.socket
    session: Session
    files: Files
    received: bytes


class Estate:
    """What one server leaves. `is_open`: whether clients are to be left at all."""

    def __init__(self) -> None:
        self.is_open = False
        self._clients: list[LeftClient] = []

    def __len__(self) -> int:
        return len(self._clients)

    def add(self, client: LeftClient) -> None:
        """Leave a client that is in a state to be left; where nobody is (any more), its connection ends."""
        if self.is_open:
            self._clients.append(client)
        else:
            client.sock.close()

    def renounce(self) -> None:
        """Leave nobody (H1): those who are there already lose their connection."""
        self.is_open = False
        for client in self._clients:
            client.sock.close()
        self._clients.clear()

    def settle(self, notifier: Notifier) -> None:
        """Have the service manager keep the clients, for a process that it starts later."""
        if not self:
            return
        state = os.memfd_create(STATE_NAME)
        with open(state, "wb") as file:
            file.write(_packed(self._clients))
            file.flush()
            try:
                # Where there is room for few, each of them is worth nothing without the state.
                notifier.keep(STATE_NAME, [state])
                notifier.keep(CLIENT_NAME, [each.sock.fileno() for each in self._clients])
            except OSError as error:
                logger.error("clients could not be left to the next server: %s", error.strerror or error)
            else:
                logger.info("clients left to the next server: %d", len(self._clients))
        self.renounce()


def claim(inheritance: Inheritance, notifier: Notifier) -> list[LeftClient]:
    """The clients that the server before this one has left. The service manager keeps them no longer (H2)."""
    kept = inheritance.kept
    sockets = [socket.socket(fileno=each) for each in kept.get(CLIENT_NAME, ())]
    states = [_content(each) for each in kept.get(STATE_NAME, ())]
    clients: list[LeftClient] = []
    try:
        for name in kept:
            notifier.forget(name)
        for state in states:
            clients.extend(_unpacked(state, sockets))
    except OSError as error:
        logger.error("clients cannot be taken back from the service manager: %s", error.strerror or error)
    except (ValueError, LookupError, TypeError) as error:
        logger.error("what is told of the clients of the server before this one cannot be read: %r", error)
    taken = {each.sock for each in clients}
    for sock in sockets:
        if sock not in taken:
            # The service manager may have it still.
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
    return clients


def files_of(*exports: Export) -> Files:
    """The image files of what a client works with, known by this in every process, whatever their names."""
    files = (export.image.driver.file for export in exports)
    return tuple(file.identity for file in files if isinstance(file, PosixFile))


def broken_promise(client: LeftClient, offered: ExportInfo, size: int, files: Files) -> str | None:
    """What of a session does not hold for the export as it is offered now; None: it can go on (H3).

    Args: size: of what the client works with, in bytes. files: its `files_of`.
    """
    granted = client.session.export
    if files != client.files:
        return "another file has taken the place of its image"
    if size < granted.size:
        return f"it has {size} bytes, the client was told {granted.size}"
    lost = granted.flags & ~offered.flags & ~TransmissionFlag.READ_ONLY
    if lost or (offered.flags & ~granted.flags & TransmissionFlag.READ_ONLY):
        return f"it is not offered as {granted.flags!r} any more"
    if offered.block_size_min > granted.block_size_min:
        return f"its smallest block has {offered.block_size_min} bytes, the client was told {granted.block_size_min}"
    missing = set(client.session.contexts.values()) - set(offered.contexts)
    if missing:
        return f"it has no metadata context {min(missing)} any more"
    return None


def _identity(descriptor: int) -> int:
    """What a socket is known by in every process."""
    return os.fstat(descriptor).st_ino


def _content(descriptor: int) -> bytes:
    with open(descriptor, "rb") as file:
        file.seek(0)
        return file.read()


def _packed(clients: Sequence[LeftClient]) -> bytes:
    told = [
        {
            "socket": _identity(each.sock.fileno()),
            "session": asdict(each.session),
            "files": each.files,
            "received": each.received.hex(),
        }
        for each in clients
    ]
    return json.dumps({"version": VERSION, "clients": told}).encode()


def _unpacked(state: bytes, sockets: Sequence[socket.socket]) -> list[LeftClient]:
    """Raises: ValueError, LookupError, TypeError: it was written by another version, or is damaged."""
    content = json.loads(state)
    if content["version"] != VERSION:
        raise ValueError(f"version {content['version']}, expected {VERSION}")
    found = {_identity(each.fileno()): each for each in sockets}
    return [
        LeftClient(
            found[each["socket"]],
            _session(each["session"]),
            tuple((device, inode) for device, inode in each["files"]),
            bytes.fromhex(each["received"]),
        )
        for each in content["clients"]
        if each["socket"] in found
    ]


def _session(told: dict[str, object]) -> Session:
    """A session from what `asdict` and JSON have made of it."""
    session = Session(**told)  # type: ignore[arg-type]
    export = ExportInfo(**session.export)  # type: ignore[arg-type]
    export = replace(export, flags=TransmissionFlag(export.flags), contexts=tuple(export.contexts))
    contexts = {int(key): name for key, name in session.contexts.items()}
    return replace(session, export=export, flags=TransmissionFlag(session.flags), contexts=contexts)
