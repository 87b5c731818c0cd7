"""Image files with known bytes and known holes, and the checks of files against them; nothing here uses nbdimg."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.support.libnbd_script import random_bytes

KIB = 1024
MIB = 1024 * KIB

# (offset, length) of the data in the standard sparse sample, in bytes: at the start, a lone file-system block,
# a run that begins and ends inside a block, and one that touches the end of the image.
SPARSE_SIZE = 16 * MIB
SPARSE_DATA = ((0, 64 * KIB), (MIB, 4 * KIB), (3 * MIB + 100, 200 * KIB), (SPARSE_SIZE - 8 * KIB, 8 * KIB))


def write_sparse(
    path: Path, *, size: int = SPARSE_SIZE, data: Iterable[tuple[int, int]] = SPARSE_DATA, seed: int = 1
) -> bytes:
    """Create a file of `size` bytes with seeded bytes in `data` and holes elsewhere; returns all its bytes."""
    expected = bytearray(size)
    with open(path, "wb") as file:
        file.truncate(size)
        for index, (offset, length) in enumerate(data):
            expected[offset : offset + length] = random_bytes(seed * 1000 + index, length)
            file.seek(offset)
            file.write(expected[offset : offset + length])
        file.flush()
        os.fsync(file.fileno())
    return bytes(expected)


def write_full(path: Path, size: int, seed: int = 2) -> bytes:
    """Create a file of `size` seeded bytes with no hole; returns them."""
    expected = random_bytes(seed, size)
    with open(path, "wb") as file:
        file.write(expected)
        file.flush()
        os.fsync(file.fileno())
    return expected


def file_extents(path: Path) -> list[tuple[int, int, bool]]:
    """(offset, length, is_data) from SEEK_DATA and SEEK_HOLE: alternating, contiguous, up to the file's size."""
    found: list[tuple[int, int, bool]] = []
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        offset, is_data = 0, _is_data(descriptor, 0)
        while offset < size:
            stop = min(size, _seek(descriptor, offset, os.SEEK_HOLE if is_data else os.SEEK_DATA, size))
            found.append((offset, stop - offset, is_data))
            offset, is_data = stop, not is_data
    finally:
        os.close(descriptor)
    return found


def _seek(descriptor: int, offset: int, whence: int, otherwise: int) -> int:
    try:
        return os.lseek(descriptor, offset, whence)
    except OSError:
        return otherwise


def _is_data(descriptor: int, offset: int) -> bool:
    return _seek(descriptor, offset, os.SEEK_DATA, -1) == offset


def allocated_bytes(path: Path) -> int:
    """What the file occupies on disk, in bytes."""
    return os.stat(path).st_blocks * 512


def first_difference(path: Path, expected: bytes | bytearray) -> int | None:
    """The offset of the first byte that is not as expected (a difference in length counts); None if equal."""
    actual = path.read_bytes()
    if actual == expected:
        return None
    shared = min(len(actual), len(expected))
    return next((i for i in range(shared) if actual[i] != expected[i]), shared)


def flip_byte(path: Path, offset: int) -> None:
    """Change one byte of the file, for the controls: a check that passes afterwards checks nothing."""
    with open(path, "r+b") as file:
        file.seek(offset)
        (value,) = file.read(1)
        file.seek(offset)
        file.write(bytes([value ^ 0xFF]))


def run(
    *argv: str | os.PathLike[str], cwd: Path | None = None, timeout_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run a client to its end with its output captured; the exit status is the caller's to judge."""
    return subprocess.run(
        [os.fspath(word) for word in argv],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=timeout_s,
    )


def run_ok(*argv: str | os.PathLike[str], timeout_s: float = 60.0) -> str:
    """Run a client that must exit 0; returns its standard output."""
    completed = run(*argv, timeout_s=timeout_s)
    assert completed.returncode == 0, f"{argv}: {completed.returncode}\n{completed.stdout}\n{completed.stderr}"
    return completed.stdout
