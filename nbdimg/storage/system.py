"""Linux calls that Python's `os` lacks: fallocate with modes, sync_file_range, openat2, prctl, any by its number; maps
that are for the kernel alone; the file system's type. And calls on descriptors for those who have no `BlockFile`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from functools import lru_cache
from struct import Struct

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
ZERO = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE
RESERVE = 0
"""Modes of `fallocate`. RESERVE: give the range space of its own; its content stays, holes read as zeroes."""

SYNC_FILE_RANGE_WRITE = 0x02

UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL, errno.EBADF, errno.ENODEV})
"""What fallocate answers where a mode does not exist; EINVAL for a block device's unaligned range."""

SYS_OPENAT2 = 437
"""The same on every architecture that Python runs on; Linux 5.6."""

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_BENEATH = 0x08

PROT_READ, MAP_SHARED = 0x1, 0x1
_MAP_FAILED = ctypes.c_void_p(-1).value

PR_SET_NO_NEW_PRIVS = 38
"""Of a thread, and what it starts."""

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
_OPEN_HOW = Struct("=QQQ")  # struct open_how: flags, mode, resolve
assert _OPEN_HOW.size == 24


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    libc.syscall.restype = ctypes.c_long
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def system_call(number: int, *arguments: int | bytes | None) -> int:
    """syscall(2), with integers as words, and bytes as the address of what they hold.

    Raises: OSError.
    """
    words = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result: int = _libc().syscall(ctypes.c_long(number), *words)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def set_process_option(option: int, value: int) -> None:
    """prctl(2): some options are the thread's. Raises: OSError."""
    if _libc().prctl(option, *(ctypes.c_ulong(each) for each in (value, 0, 0, 0))) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


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
    how = _OPEN_HOW.pack(flags, 0, resolve)
    while True:
        with contextlib.suppress(InterruptedError):
            return system_call(SYS_OPENAT2, directory, path, how, len(how))


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


def map_pages(descriptor: int, offset: int, length: int) -> int:
    """mmap(2), to be read from and shared; the file may end before it does. Returns the address. Raises: OSError."""
    address: int | None = _libc().mmap(None, length, PROT_READ, MAP_SHARED, descriptor, offset)
    if address is None or address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return address


def unmap_pages(address: int, length: int) -> None:
    """munmap(2) of what `map_pages` returned. Nothing may refer to it any more."""
    _libc().munmap(address, length)


def memory_at(address: int, length: int) -> memoryview:
    """The bytes there, which are not kept from being unmapped."""
    return memoryview((ctypes.c_ubyte * length).from_address(address)).cast("B")


class Residence:
    """Asks which pages of a map are in memory, at most `pages_max` at a time."""

    def __init__(self, pages_max: int) -> None:
        self._pages = bytearray(pages_max)
        self._vector = ctypes.addressof((ctypes.c_ubyte * pages_max).from_buffer(self._pages))
        self._all = bytes([1]) * pages_max
        self._mincore = ctypes.PyDLL(None).mincore
        self._mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

    def is_whole(self, address: int, start: int, stop: int) -> bool:
        """mincore(2): whether all of the bytes from `start` to `stop` of the map at `address` are.

        It is untrue for a file that this process neither owns nor may write. It does not wait, and so keeps the
        interpreter's lock.
        """
        first = start // PAGE_SIZE
        count = -(-stop // PAGE_SIZE) - first
        if self._mincore(address + first * PAGE_SIZE, count * PAGE_SIZE, self._vector):
            return False
        return self._pages.startswith(self._all[:count])


def reads_without_waiting(descriptor: int) -> bool:
    """Whether the file system knows RWF_NOWAIT. Network file systems do not."""
    try:
        os.preadv(descriptor, (bytearray(1),), 0, os.RWF_NOWAIT)
    except OSError as error:
        return error.errno != errno.EOPNOTSUPP
    return True


def knows_residence(descriptor: int) -> bool:
    """Whether mincore(2) is true of this open file. Source: Linux, `can_do_mincore`."""
    if os.fstat(descriptor).st_uid == os.geteuid():
        return True
    return os.access(f"/proc/self/fd/{descriptor}", os.W_OK, effective_ids=True)


def pread(descriptor: int, offset: int, view: memoryview) -> None:
    """Fill `view`; what lies beyond the end of the file reads as zeroes. Raises: OSError."""
    position = 0
    while position < len(view):
        count = os.preadv(descriptor, (view[position:],), offset + position)
        if count == 0:
            view[position:] = bytes(len(view) - position)
            return
        position += count


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
