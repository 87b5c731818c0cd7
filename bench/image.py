"""The raw image that all servers serve in turn, and what of it is in the page cache."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from pathlib import Path

from bench.cells import MIB

PAGE_SIZE = mmap.PAGESIZE


def create_image(path: Path, size: int) -> None:
    """A fully written file of `size` bytes (a multiple of 1 MiB) that no layer below can compress or leave sparse."""
    with open(path, "wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
        file.flush()
        os.fdatasync(file.fileno())


def settle(path: Path) -> None:
    """Write dirty pages out, so that one server's writes are not flushed during the next one's measurement."""
    with open(path, "rb") as file:
        os.fdatasync(file.fileno())


def warm(path: Path, offset: int, length: int) -> None:
    """Read the range into the page cache."""
    buffer = memoryview(bytearray(MIB))
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while length > 0:
            count = file.readinto(buffer[: min(MIB, length)])
            if not count:
                return
            length -= count


def evict(path: Path, offset: int, length: int) -> None:
    """Drop the range's clean pages from the page cache; dirty ones stay, so call `settle` first after writes."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)


def drop_caches() -> bool:
    """Drop the clean pages of the whole machine; False where that is not permitted (not root, or a container)."""
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1\n")
        return True
    return False


def resident_share(path: Path, offset: int, length: int) -> float:
    """The part of the page-aligned range that is in the page cache, 0.0 to 1.0. Raises: OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    vector = ctypes.create_string_buffer((length + PAGE_SIZE - 1) // PAGE_SIZE)
    with open(path, "rb") as file:
        address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), offset)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    try:
        if libc.mincore(address, length, vector) != 0:
            raise OSError(ctypes.get_errno(), "mincore")
    finally:
        libc.munmap(address, length)
    states = vector.raw
    return sum(state & 1 for state in states) / len(states)
