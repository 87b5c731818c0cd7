"""Linux calls that Python's `os` lacks: fallocate with modes, the file system's type, a block device's size."""

from __future__ import annotations

import ctypes
import errno
import os
from functools import lru_cache

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
ZERO = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE

UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL, errno.EBADF, errno.ENODEV})
"""What fallocate answers where a mode does not exist; EINVAL for a block device's unaligned range."""


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return libc


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> bool:
    """fallocate(2). False: the mode is not supported here and nothing was changed.

    Raises: OSError: the call failed for another reason.
    """
    while _libc().fallocate(descriptor, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number in UNSUPPORTED:
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True


def is_memory_file_system(device: int) -> bool:
    """Whether files with this `st_dev` live in memory only, so that a read never waits for a device."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                fields = line.split()
                if fields[2] == wanted:
                    return fields[fields.index("-") + 1] in ("tmpfs", "ramfs", "devtmpfs")
    except OSError:
        pass
    return False
