"""A process that confines itself as the server does, and then tries what it should not be able to do.

`sandbox_probe.py JSON`: {"mode", "version" (of the Landlock to pretend, or null), "exports": [[path, is_read_only]],
"ports": [...], "attempts": {name: [what, argument...]}}. Prints {"summary", "main": {name: outcome}, "thread": ...}
with an outcome of "ok" or the name of the errno or exception; the thread is started once the process is confined.
"""

from __future__ import annotations

import asyncio
import errno
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import Any
from unittest.mock import patch

from nbdimg import ConfigError, ExportConfig, NbdUri, ServerConfig, formats
from nbdimg.image.gate import Reference
from nbdimg.server import sandbox
from nbdimg.storage import landlock
from nbdimg.storage.posix import PosixFile

SECRET = b"\x5a"


class OpenGate:
    """What `ConfinedGate` is there to prevent: opens whatever an image names."""

    def __init__(self, image: PosixFile, **_: object) -> None:
        self._directory = os.path.dirname(image.path)

    def __enter__(self) -> OpenGate:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    async def open(self, reference: Reference) -> PosixFile:
        path = os.path.join(self._directory, reference.name)
        return PosixFile(path, writable=reference.is_writable)


def read(path: str) -> None:
    with open(path, "rb") as file:
        file.read(1)


def write(path: str) -> None:
    with open(path, "r+b") as file:
        file.write(b"")


def make(path: str) -> None:
    with open(path, "xb"):
        os.unlink(path)


def remove(path: str) -> None:
    os.unlink(path)
    with open(path, "xb"):
        pass


def rename(path: str) -> None:
    os.rename(path, path + ".new")
    os.rename(path + ".new", path)


def make_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
    os.unlink(path)


def execute(path: str) -> None:
    subprocess.run([path], check=True)


def connect(port: int) -> None:
    socket.create_connection(("127.0.0.1", port), timeout=30).close()


def bind(port: int) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))


def connect_abstract(name: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect("\0" + name)


def send_signal(pid: int) -> None:
    os.kill(pid, signal.SIGCONT)


def open_image(path: str) -> None:
    """With a gate that lets everything pass. "ok" is only what gives the bytes of a secret."""
    sector = memoryview(bytearray(512))

    async def scenario() -> None:
        image = await formats.open_image(path, format="qcow2", writable=True, lock=False)
        try:
            await image.read(0, sector)
        finally:
            await image.close()

    with patch("nbdimg.formats.ConfinedGate", OpenGate):
        asyncio.run(scenario())
    if bytes(sector) != SECRET * 512:
        raise ValueError("this is not the secret")


ATTEMPTS: dict[str, Any] = {
    "read": read,
    "write": write,
    "truncate": lambda path: os.truncate(path, os.stat(path).st_size),
    "list": os.listdir,
    "make": make,
    "remove": remove,
    "rename": rename,
    "socket": make_socket,
    "execute": execute,
    "connect": connect,
    "bind": bind,
    "abstract": connect_abstract,
    "signal": send_signal,
    "import": importlib.import_module,
    "image": open_image,
}


def outcome(what: str, *arguments: Any) -> str:
    try:
        ATTEMPTS[what](*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, repr(error))
    except Exception as error:
        cause = error.__cause__
        return errno.errorcode[cause.errno or 0] if isinstance(cause, OSError) else f"{type(error).__name__}: {error}"
    return "ok"


def main() -> int:
    asked = json.loads(sys.argv[1])
    attempts = asked["attempts"]
    if asked["version"] is not None:
        landlock.version = lambda: asked["version"]
    config = ServerConfig(
        tuple(ExportConfig(path, is_read_only=is_read_only) for path, is_read_only in asked["exports"]),
        listeners=tuple(NbdUri(host="127.0.0.1", port=port) for port in asked["ports"]),
        sandbox=asked["mode"],
    )
    try:
        sandbox.confine(config)
    except ConfigError as error:
        print(json.dumps({"refusal": str(error)}))
        return 0
    found: dict[str, Any] = {"summary": sandbox.summary(), "thread": {}}

    def run() -> None:
        found["thread"] = {name: outcome(*attempt) for name, attempt in attempts.items() if attempt[0] != "image"}

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    found["main"] = {name: outcome(*attempt) for name, attempt in attempts.items()}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
