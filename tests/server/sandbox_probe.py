"""A process that confines itself as the server does, and then tries what it should not be able to do.

`sandbox_probe.py JSON`: {"mode", "version" (of the Landlock to pretend, or null), "filters" (false: pretend that no
system calls can be filtered), "exports": [[path, is_read_only]], "ports": [...], "attempts": {name: [what,
argument...]}}. Prints {"summary", "main": {name: outcome}, "thread": ...}
with an outcome of "ok" or the name of the errno or exception; the thread is started once the process is confined.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import importlib
import json
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

from nbdimg import ConfigError, ExportConfig, NbdUri, ServerConfig, formats
from nbdimg.image.gate import Reference
from nbdimg.server import sandbox, seccomp
from nbdimg.storage import landlock
from nbdimg.storage.posix import PosixFile

SECRET = b"\x5a"
IPPROTO_MPTCP = 262
PROGRAM = Path(shutil.which("true") or "").read_bytes()


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


def execute_memory(_: str) -> None:
    """A program that is in no directory."""
    descriptor = os.memfd_create("program", 0)
    os.write(descriptor, PROGRAM)
    child = os.fork()
    if not child:
        try:
            os.execve(descriptor, ["true"], {})
        except OSError as error:
            os._exit(error.errno or 1)
    if number := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise OSError(number, os.strerror(number))


def connect(port: int) -> None:
    socket.create_connection(("127.0.0.1", port), timeout=30).close()


def bind(port: int) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))


def connect_unix(name: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(name)


def send_to_unix(name: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", name)


def send_from_pair(name: str) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with here, there:
        here.sendmsg([b"x"], [], 0, name)


def send_by_udp(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", ("127.0.0.1", port))


def connect_mptcp(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP) as sock:
        sock.connect(("127.0.0.1", port))


def send_fast_open(port: int) -> None:
    with socket.socket() as sock:
        sock.sendto(b"x", socket.MSG_FASTOPEN, ("127.0.0.1", port))


def send_message_fast_open(port: int) -> None:
    with socket.socket() as sock:
        sock.sendmsg([b"x"], [], socket.MSG_FASTOPEN, ("127.0.0.1", port))


def listen_anywhere(_: int) -> None:
    with socket.socket() as sock:
        sock.listen()


def read_memory(pid: int) -> None:
    """Of a process, here this one: what is asked first is whether one may at all."""
    source = ctypes.create_string_buffer(b"x", 8)
    target = ctypes.create_string_buffer(8)
    vectors = [struct.pack("@PN", ctypes.addressof(each), 8) for each in (target, source)]
    if ctypes.CDLL(None, use_errno=True).process_vm_readv(pid or os.getpid(), vectors[0], 1, vectors[1], 1, 0) < 0:
        raise OSError(ctypes.get_errno(), "process_vm_readv")


def unshare(flags: int) -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), "unshare")


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
    "execute memory": execute_memory,
    "unix": connect_unix,
    "send to unix": send_to_unix,
    "send from pair": send_from_pair,
    "udp": send_by_udp,
    "mptcp": connect_mptcp,
    "fast open": send_fast_open,
    "message fast open": send_message_fast_open,
    "listen": listen_anywhere,
    "chmod": lambda path: os.chmod(path, 0o666),
    "chown": lambda path: os.chown(path, -1, os.getgid()),
    "touch": os.utime,
    "signal": send_signal,
    "limits": lambda pid: resource.prlimit(pid, resource.RLIMIT_NOFILE),
    "priority": lambda pid: os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid)),
    "memory": read_memory,
    "unshare": unshare,
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
    if not asked["filters"]:
        seccomp.ARCHITECTURES = {}
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
