"""Image locks that QEMU's programs respect, and that respect theirs.

QEMU holds shared OFD locks on single bytes: byte 100 + p for each permission p that it uses, byte 200 + p for each that
it denies to others; then it asks whether anybody else holds the opposite bytes.

              uses p (100 + p)          denies p (200 + p)
    writer    read 0, write 1, resize 3     write 1, resize 3
    reader    read 0                        write 1, resize 3

The locks belong to the open file description: closing the descriptor drops them, a crash too.
"""

from __future__ import annotations

import errno
import fcntl
import os
from struct import Struct

from nbdimg.errors import ImageLocked

FLOCK = Struct("hhqqi4x")
assert FLOCK.size == 32

_USED = 100
_DENIED = 200
_READ, _WRITE, _RESIZE = 0, 1, 3
_DENIES = (_WRITE, _RESIZE)


def _flock(kind: int, start: int) -> bytes:
    return FLOCK.pack(kind, os.SEEK_SET, start, 1, 0)


def _is_held_by_others(descriptor: int, byte: int) -> bool:
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    return bool(FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def lock_image(descriptor: int, path: str, *, writable: bool) -> None:
    """Take the locks for one user of an image, kept until the descriptor is closed.

    Raises: ImageLocked: another process uses the image in a way that excludes this one.
    """
    uses = (_READ, _WRITE, _RESIZE) if writable else (_READ,)
    held = [_USED + p for p in uses] + [_DENIED + p for p in _DENIES]
    opposite = [_DENIED + p for p in uses] + [_USED + p for p in _DENIES]
    purpose = "writing" if writable else "reading"
    try:
        for byte in held:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, byte))
        is_refused = any(_is_held_by_others(descriptor, byte) for byte in opposite)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            is_refused = True
        elif error.errno in (errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL):
            raise ImageLocked(path, f"cannot be locked for {purpose}: {error.strerror}") from None
        else:
            raise
    if is_refused:
        raise ImageLocked(path, f"cannot be locked for {purpose}: another process or export has it open")
