"""Linux calls that Python's `os` lacks: fallocate with modes, sync_file_range, openat2, the file system's type."""

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

SYNC_FILE_RANGE_WRITE = 0x02

UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL, errno.EBADF, errno.ENODEV})
"""What fallocate answers where a mode does not exist; EINVAL for a block device's unaligned range."""


SYS_OPENAT2 = 437
"""The same on every architecture that Python runs on; Linux 5.6."""

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_BENEATH = 0x08


class OpenHow(ctypes.Structure):
    """struct open_how: flags, mode, resolve; each a u64."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


assert ctypes.sizeof(OpenHow) == 24


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    libc.syscall.argtypes = [
        ctypes.c_long,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.POINTER(OpenHow),
        ctypes.c_size_t,
    ]
    libc.syscall.restype = ctypes.c_long
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


def begin_write_back(descriptor: int, offset: int, length: int) -> bool:
    """sync_file_range(2): begin to write dirty pages of the range to the device; it may wait for a queue, not for the
    device. False: it cannot be done here. Nothing becomes durable by it.
    """
    return bool(_libc().sync_file_range(descriptor, offset, length, SYNC_FILE_RANGE_WRITE) == 0)


def openat2(directory: int, path: bytes, flags: int, resolve: int) -> int:
    """openat2(2): open `path` from the descriptor `directory`, its resolution restricted by RESOLVE_ flags.

    Raises: OSError: the call failed; ENOSYS where the kernel lacks it, EPERM also where a sandbox forbids it.
    """
    how = OpenHow(flags=flags, resolve=resolve)
    while True:
        descriptor: int = _libc().syscall(SYS_OPENAT2, directory, path, ctypes.byref(how), ctypes.sizeof(how))
        if descriptor >= 0:
            return descriptor
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


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


RESERVE = 0
"""For `fallocate`: give the range space of its own; its content stays, holes read as zeroes."""


def fdatasync(descriptor: int) -> None:
    """The barrier, for those who need no loop. Raises: OSError."""
    os.fdatasync(descriptor)


def sync_directory(path: str) -> None:
    """Make the names in a directory durable, where there is such a call and the directory is readable.

    Raises: OSError.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)
