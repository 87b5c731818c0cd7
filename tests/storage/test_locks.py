"""Image locks. OFD locks belong to the open file, so two opens of one process stand for two processes."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdimg.errors import ImageLocked
from nbdimg.storage.locks import FLOCK, lock_image


class Opener:
    """Opens of one file, closed at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptors: list[int] = []

    def open(self) -> int:
        self.descriptors.append(os.open(self.path, os.O_RDWR))
        return self.descriptors[-1]

    def lock(self, *, writable: bool) -> int:
        """Open and lock; a refused open is closed again, which drops the locks that it took before."""
        descriptor = self.open()
        try:
            lock_image(descriptor, str(self.path), writable=writable)
        except BaseException:
            self.close(descriptor)
            raise
        return descriptor

    def close(self, descriptor: int) -> None:
        self.descriptors.remove(descriptor)
        os.close(descriptor)


@pytest.fixture
def opener(tmp_path: Path) -> Iterator[Opener]:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    opener = Opener(path)
    yield opener
    for descriptor in opener.descriptors:
        os.close(descriptor)


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
def test_lock_where_one_of_two_writes_is_refused(opener: Opener, first: bool, second: bool) -> None:
    opener.lock(writable=first)
    purpose = "writing" if second else "reading"
    with pytest.raises(ImageLocked, match=f"cannot be locked for {purpose}: another process") as caught:
        opener.lock(writable=second)
    assert str(opener.path) in str(caught.value)


def test_lock_of_many_readers_is_granted(opener: Opener) -> None:
    for _ in range(4):
        opener.lock(writable=False)


def test_lock_is_dropped_with_the_descriptor(opener: Opener) -> None:
    opener.close(opener.lock(writable=True))
    opener.lock(writable=True)


def test_lock_refused_leaves_the_first_holder_its_lock(opener: Opener) -> None:
    opener.lock(writable=True)
    for _ in range(2):
        with pytest.raises(ImageLocked):
            opener.lock(writable=True)


@pytest.mark.parametrize("writable", [False, True])
def test_lock_meets_another_programs_exclusive_lock(opener: Opener, writable: bool) -> None:
    """A program that locks the whole file exclusively excludes readers and writers."""
    whole_file = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    fcntl.fcntl(opener.open(), fcntl.F_OFD_SETLK, whole_file)
    with pytest.raises(ImageLocked):
        opener.lock(writable=writable)


@pytest.mark.parametrize("byte", [201, 203])
def test_lock_writer_respects_a_single_denied_permission_byte(opener: Opener, byte: int) -> None:
    """Bytes 201 and 203: somebody denies others to write, to resize (QEMU's layout)."""
    fcntl.fcntl(opener.open(), fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    with pytest.raises(ImageLocked):
        opener.lock(writable=True)
    opener.lock(writable=False)


def test_lock_reader_respects_a_denied_read_byte(opener: Opener) -> None:
    fcntl.fcntl(opener.open(), fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 200, 1, 0))
    with pytest.raises(ImageLocked):
        opener.lock(writable=False)


def test_lock_bytes_of_others_mean_nothing(opener: Opener) -> None:
    """Bytes 0, 102 and 204 belong to no permission that conflicts with a writer's."""
    for byte in (0, 102, 204):
        fcntl.fcntl(opener.open(), fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    opener.lock(writable=True)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_lock_on_a_file_system_without_locks_is_refused_with_the_reason(
    opener: Opener, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*args: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(ImageLocked, match=os.strerror(number)):
        opener.lock(writable=True)


def test_lock_other_failure_passes_through(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "fcntl", fail)
    with pytest.raises(OSError, match="Input/output error"):
        opener.lock(writable=True)
