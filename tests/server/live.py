"""What the tests of a live server share: an image with known bytes, and the question "is a fresh client served?"."""

from __future__ import annotations

import fcntl
import os
import struct
import termios
import time
from pathlib import Path

from tests.support.rawclient import Client
from tests.support.rawprotocol import MIB, ConnectionClosed
from tests.support.server import ServerProcess

PATTERN_LENGTH = MIB
SERVE_LIMIT_S = 1.0

Address = str | tuple[str, int]


def pattern(offset: int, length: int) -> bytes:
    """The bytes of `pattern_image`: each 8-byte word holds its own offset, big-endian; zeroes after the first MiB."""
    start, stop = offset // 8 * 8, offset + length
    words = (struct.pack(">Q", word if word < PATTERN_LENGTH else 0) for word in range(start, stop, 8))
    return b"".join(words)[offset - start : stop - start]


def pattern_image(path: Path, size: int) -> Path:
    """A sparse raw image whose first MiB (or less) is the pattern."""
    with open(path, "wb") as file:
        file.write(pattern(0, min(size, PATTERN_LENGTH)))
        file.truncate(size)
    return path


def serve_time(address: Address, name: str = "disk", timeout_s: float = SERVE_LIMIT_S) -> float:
    """Seconds from connect to the bytes of a 4 KiB read. Raises: AssertionError when it fails or takes too long."""
    start = time.monotonic()
    try:
        with Client(address, timeout_s) as client:
            client.greet()
            client.negotiate(name, structured=False)
            reply = client.read(0, 4096)
            client.disconnect()
    except (OSError, ConnectionClosed) as error:
        raise AssertionError(
            f"a fresh client is not served after {time.monotonic() - start:.3f} s: {error!r}"
        ) from error
    seconds = time.monotonic() - start
    assert reply.error == 0
    assert seconds <= timeout_s, f"a fresh client waited {seconds:.3f} s"
    return seconds


def assert_alive(server: ServerProcess, address: Address, name: str = "disk", errors_from: int = 0) -> None:
    """The same process runs, serves a fresh client within `SERVE_LIMIT_S`, and has printed no traceback.

    `errors_from`: where in stderr to begin, so that a failure is not blamed on the tests after it.
    """
    assert server.is_running(), f"the server died with {server.process.returncode}: {server.stderr()[-2000:]}"
    serve_time(address, name)
    errors = server.stderr()[errors_from:]
    for mark in ("Traceback", "never retrieved", "AssertionError"):
        assert mark not in errors, errors[-4000:]


def unsent_bytes(client: Client) -> int:
    """Bytes that the server has not yet taken out of a Unix socket (SIOCOUTQ)."""
    answer = fcntl.ioctl(client.sock.fileno(), termios.TIOCOUTQ, b"\0" * 4)
    return int(struct.unpack("i", answer)[0])


def is_on_tmpfs(path: os.PathLike[str]) -> bool:
    """Whether the path lies on tmpfs, by the longest mount point in /proc/self/mounts that holds it."""
    real = os.path.realpath(path)
    best, kind = "", ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, fs_type, *_ = line.split()
        is_above = real == mount or real.startswith(mount.rstrip("/") + "/")
        if is_above and len(mount) >= len(best):
            best, kind = mount, fs_type
    return kind in ("tmpfs", "ramfs")
