"""Opening files that must lie beneath a directory, whoever chose their names.

The kernel resolves the path and refuses to leave the directory (openat2 with RESOLVE_BENEATH), so no symlink, no `..`
and no rename in between leads out of it. A check of the name followed by an ordinary open has that race.

                  openat2                             component by component, where openat2 is missing
    `..`          followed while it stays beneath     refused
    symlink       followed while it stays beneath     refused
                  (an absolute one never does)
    magic link    refused                             refused

Where openat2 answers ENOSYS (before Linux 5.6) or EPERM (a sandbox), the walk takes over; it allows less, never more.
"""

from __future__ import annotations

import errno
import os
import stat
from itertools import islice

from nbdimg.storage import system
from nbdimg.storage.posix import PosixFile

RESOLVE = system.RESOLVE_BENEATH | system.RESOLVE_NO_MAGICLINKS

LISTING_MAX = 16384
"""Names of a directory that are looked at: 10 ms or so, and no directory of images has more."""

RACE_ATTEMPTS = 64
"""openat2 answers EAGAIN when a rename anywhere raced with `..`; whoever renames that often is refused."""

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC

_KINDS = {
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


class Root:
    """A directory that files are opened beneath, open until `close`. Renaming it later changes nothing.

    `path` is its real path, without symlinks; `alias` the absolute path by which it was given.

    Raises: OSError: from the constructor, when it cannot be opened or is no directory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.alias = os.path.abspath(path)
        self.path = os.path.realpath(path)
        self._descriptor = os.open(self.path, _DIRECTORY)

    def open(self, path: str, *, writable: bool) -> PosixFile:
        """Open a regular file by its path from here. Raises: as `open_beneath`."""
        assert self._descriptor >= 0
        descriptor = open_beneath(self._descriptor, path, writable=writable)
        return PosixFile(os.path.join(self.path, path), writable=writable, descriptor=descriptor)

    def names(self, path: str) -> list[str]:
        """What the directory at `path` from here holds, in no order. Raises: as `names_beneath`."""
        assert self._descriptor >= 0
        return names_beneath(self._descriptor, path)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def open_beneath(directory: int, path: str, *, writable: bool) -> int:
    """A descriptor for the regular file at `path` beneath `directory`.

    Never waits for the other end of a FIFO.

    Raises:
        OSError: EXDEV: the path leads out of the directory. ELOOP: it leads through a magic link, too many symlinks,
            or, without openat2, any symlink. EINVAL: it is something else than a file; the message says what.
            ENXIO: it is a socket, or a device that does not exist. Or what open(2) says.
        UnicodeEncodeError: the path has no form in the file system's encoding.
    """
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    descriptor = _open(directory, path, flags)
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind == stat.S_IFREG:
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, f"it is {_KINDS.get(kind, 'no file')}")


def names_beneath(directory: int, path: str) -> list[str]:
    """What the directory at `path` beneath `directory` holds, in no order; of very many the first LISTING_MAX.

    Raises: as `open_beneath`. OSError: ENOTDIR: it is no directory.
    """
    descriptor = _open(directory, path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with os.scandir(descriptor) as entries:
            return [entry.name for entry in islice(entries, LISTING_MAX)]
    finally:
        os.close(descriptor)


def _open(directory: int, path: str, flags: int) -> int:
    try:
        return _resolve(directory, os.fsencode(path), flags)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise
        return _walk(directory, path, flags)


def _resolve(directory: int, path: bytes, flags: int) -> int:
    for _ in range(RACE_ATTEMPTS - 1):
        try:
            return system.openat2(directory, path, flags, RESOLVE)
        except BlockingIOError:
            continue
    return system.openat2(directory, path, flags, RESOLVE)


def _walk(directory: int, path: str, flags: int) -> int:
    """Open `path` one component after the other, none of which may be a symlink or `..`."""
    *parents, last = path.split("/")
    if path.startswith("/") or ".." in (*parents, last):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    current = os.dup(directory)
    try:
        for component in filter(None, parents):
            inner = _step(current, component, _DIRECTORY)
            os.close(current)
            current = inner
        return _step(current, last or ".", flags)
    finally:
        os.close(current)


def _step(directory: int, component: str, flags: int) -> int:
    try:
        return os.open(component, flags | os.O_NOFOLLOW, dir_fd=directory)
    except NotADirectoryError:
        # Linux's answer to a symlink that is opened as a directory without following it.
        if stat.S_ISLNK(os.stat(component, dir_fd=directory, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from None
        raise
