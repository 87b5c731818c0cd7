"""Opening beneath a directory, by openat2 and by the walk that stands in for it. The controls open the naive way."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdimg.storage import beneath, system
from nbdimg.storage.beneath import RACE_ATTEMPTS, Root, names_beneath, open_beneath
from nbdimg.storage.posix import PosixFile

SECRET = b"secret" * 100
CONTENT = b"inside" * 100

WAYS = ("openat2", "walk")
AT_FDCWD = -100


def resolve_by(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `open_beneath` use openat2, or find it missing. Skips where the kernel or a sandbox lacks it."""
    if way == "walk":
        monkeypatch.setattr(system, "openat2", failing(errno.ENOSYS))
        return
    try:
        os.close(system.openat2(AT_FDCWD, b".", os.O_RDONLY, system.RESOLVE_BENEATH))
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise
        pytest.skip(f"openat2 does not work here: {error}")


class failing:  # noqa: N801 (reads as a function)
    """In place of openat2: raises an errno, `times` times or for ever; then the real one. Counts its calls."""

    def __init__(self, number: int, times: int | None = None) -> None:
        self.number = number
        self.times = times
        self.count = 0
        self.real = system.openat2

    def __call__(self, directory: int, path: bytes, flags: int, resolve: int) -> int:
        self.count += 1
        if self.times is None or self.count <= self.times:
            raise OSError(self.number, os.strerror(self.number))
        return self.real(directory, path, flags, resolve)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    way: str = request.param
    resolve_by(way, monkeypatch)
    return way


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The directory to stay in; the secret is in its sibling."""
    inside = tmp_path / "in"
    (inside / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_bytes(SECRET)
    for place in (inside, inside / "sub", inside / "sub" / "deep"):
        (place / "file").write_bytes(CONTENT)
    return inside


@pytest.fixture
def directory(tree: Path) -> Iterator[int]:
    """A descriptor for `tree`. No other descriptor may be left open."""
    descriptor = os.open(tree, os.O_PATH | os.O_DIRECTORY)
    before = os.listdir("/proc/self/fd")
    yield descriptor
    assert os.listdir("/proc/self/fd") == before
    os.close(descriptor)


def content_beneath(directory: int, path: str) -> bytes:
    descriptor = open_beneath(directory, path, writable=False)
    with open(descriptor, "rb") as file:
        return file.read()


def refused(directory: int, path: str, *, writable: bool = False) -> OSError:
    with pytest.raises(OSError) as caught:  # noqa: PT011 (the callers look at the errno)
        open_beneath(directory, path, writable=writable)
    return caught.value


@pytest.mark.parametrize("path", ["file", "./file", "sub/file", "sub//deep/./file"])
def test_open_plain_path_gives_the_file(way: str, directory: int, path: str) -> None:
    assert content_beneath(directory, path) == CONTENT


@pytest.mark.parametrize("writable", [False, True])
def test_open_sets_the_descriptors_flags(way: str, directory: int, writable: bool) -> None:
    descriptor = open_beneath(directory, "file", writable=writable)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    assert flags & os.O_ACCMODE == (os.O_RDWR if writable else os.O_RDONLY)
    assert flags & os.O_NONBLOCK
    assert fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(descriptor)


INNER_LINKS = {"file-link": "sub/file", "directory-link/file": "sub", "up-link": "sub/deep/../file"}


@pytest.mark.parametrize(("path", "target"), INNER_LINKS.items())
def test_open_link_that_stays_beneath_is_followed_only_by_openat2(
    way: str, tree: Path, directory: int, path: str, target: str
) -> None:
    (tree / path.partition("/")[0]).symlink_to(target)
    if way == "openat2":
        assert content_beneath(directory, path) == CONTENT
    else:
        assert refused(directory, path).errno == errno.ELOOP


def test_open_dots_that_stay_beneath_are_followed_only_by_openat2(way: str, directory: int) -> None:
    if way == "openat2":
        assert content_beneath(directory, "sub/deep/../../file") == CONTENT
    else:
        assert refused(directory, "sub/deep/../../file").errno == errno.EXDEV


ESCAPES = {
    "../out/file": None,
    "sub/../../out/file": None,
    "link": "../out/file",
    "sub/link": "../../out/file",
    "link/file": "../out",
    "absolute-link": "{out}/file",
    "absolute-link/file": "{out}",
}
"""Paths that lead to the secret, with the symlink that the first component which ends in "link" is."""


@pytest.mark.parametrize(("path", "target"), ESCAPES.items())
def test_open_path_that_leads_out_is_refused(
    way: str, tree: Path, directory: int, path: str, target: str | None
) -> None:
    if target is not None:
        link, _, _ = path.partition("link")
        (tree / f"{link}link").symlink_to(target.format(out=tree.parent / "out"))
    expected = errno.EXDEV if way == "openat2" or target is None else errno.ELOOP
    assert refused(directory, path).errno == expected
    assert (tree / path).read_bytes() == SECRET, "control: the naive way escapes"


@pytest.mark.parametrize(("path", "names"), [("", {"file", "sub"}), (".", {"file", "sub"}), ("sub", {"file", "deep"})])
def test_names_are_those_of_the_directory(way: str, directory: int, path: str, names: set[str]) -> None:
    assert set(names_beneath(directory, path)) == names


@pytest.mark.parametrize(
    ("path", "target"),
    [("..", None), ("../out", None), ("sub/../../out", None), ("link", "../out"), ("sub/link", "{out}"), ("/", None)],
)
def test_names_of_a_directory_outside_are_not_told(
    way: str, tree: Path, directory: int, path: str, target: str | None
) -> None:
    if target is not None:
        (tree / path).symlink_to(target.format(out=tree.parent / "out"))
    with pytest.raises(OSError) as caught:  # noqa: PT011 (the errno says which)
        names_beneath(directory, path)
    assert caught.value.errno in (errno.EXDEV, errno.ELOOP)
    assert os.listdir(tree / path), "control: the naive way tells"


@pytest.mark.parametrize("path", ["file", "sub/file"])
def test_names_of_a_file_are_refused(way: str, directory: int, path: str) -> None:
    with pytest.raises(NotADirectoryError):
        names_beneath(directory, path)


def test_names_of_a_large_directory_are_bounded(
    way: str, tree: Path, directory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        (tree / "sub" / str(number)).touch()
    assert len(names_beneath(directory, "sub")) == 14
    monkeypatch.setattr(beneath, "LISTING_MAX", 5)
    assert len(names_beneath(directory, "sub")) == 5


def test_open_absolute_path_is_refused_even_to_a_file_beneath(way: str, tree: Path, directory: int) -> None:
    assert refused(directory, str(tree / "file")).errno == errno.EXDEV


def test_open_endless_link_is_refused(way: str, tree: Path, directory: int) -> None:
    (tree / "link").symlink_to("link")
    assert refused(directory, "link").errno == errno.ELOOP


@pytest.mark.parametrize("path", ["{}", "./{}"])
def test_open_magic_link_is_refused(way: str, tree: Path, path: str) -> None:
    """Beneath /proc/self/fd by name, and yet it is the secret."""
    secret = os.open(tree.parent / "out" / "file", os.O_RDONLY)
    descriptors = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY)
    assert refused(descriptors, path.format(secret)).errno == errno.ELOOP
    assert Path(f"/proc/self/fd/{secret}").read_bytes() == SECRET, "control: the naive way escapes"
    os.close(secret)
    os.close(descriptors)


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("absent", errno.ENOENT),
        ("absent/file", errno.ENOENT),
        ("file/file", errno.ENOTDIR),
        ("n" * 300, errno.ENAMETOOLONG),
    ],
)
def test_open_other_failure_keeps_its_errno(way: str, directory: int, path: str, number: int) -> None:
    assert refused(directory, path).errno == number


@pytest.mark.parametrize("path", ["", "/", "file/", "file/.", "..", "sub/", "."])
@pytest.mark.parametrize("writable", [False, True])
def test_open_name_of_no_file_is_refused(way: str, directory: int, path: str, writable: bool) -> None:
    refused(directory, path, writable=writable)


def test_open_name_without_a_form_in_the_file_systems_encoding_is_refused(way: str, directory: int) -> None:
    with pytest.raises(UnicodeEncodeError):
        open_beneath(directory, "\ud800", writable=False)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("writable", [False, True])
def test_open_fifo_is_refused_and_does_not_wait(way: str, tree: Path, directory: int, writable: bool) -> None:
    os.mkfifo(tree / "fifo")
    error = refused(directory, "fifo", writable=writable)
    assert (error.errno, error.strerror) == (errno.EINVAL, "it is a FIFO")


def test_open_directory_is_refused(way: str, directory: int) -> None:
    error = refused(directory, "sub")
    assert (error.errno, error.strerror) == (errno.EINVAL, "it is a directory")


def test_open_socket_is_refused(way: str, tree: Path, directory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        assert refused(directory, "socket").errno == errno.ENXIO


def test_open_character_device_is_refused(way: str) -> None:
    devices = os.open("/dev", os.O_PATH | os.O_DIRECTORY)
    error = refused(devices, "null")
    assert (error.errno, error.strerror) == (errno.EINVAL, "it is a character device")
    os.close(devices)


def test_open_block_device_is_refused(way: str) -> None:
    devices = os.open("/dev", os.O_PATH | os.O_DIRECTORY)
    for name in sorted(os.listdir("/dev")):
        status = os.stat(name, dir_fd=devices, follow_symlinks=False)
        if stat.S_ISBLK(status.st_mode) and os.access(f"/dev/{name}", os.R_OK):
            break
    else:
        pytest.skip("no block device here may be read")
    error = refused(devices, name)
    os.close(devices)
    if error.errno in (errno.ENXIO, errno.ENOMEDIUM, errno.EPERM):
        pytest.skip(f"/dev/{name} cannot be opened: {error}")
    assert (error.errno, error.strerror) == (errno.EINVAL, "it is a block device")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_open_without_openat2_walks(directory: int, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(system, "openat2", failing(number))
    assert content_beneath(directory, "sub/file") == CONTENT


def test_open_that_openat2_refuses_is_not_tried_by_walking(directory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "openat2", failing(errno.EACCES))
    assert refused(directory, "file").errno == errno.EACCES


def test_open_that_races_with_renames_is_tried_again(directory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_by("openat2", monkeypatch)
    openat2 = failing(errno.EAGAIN, times=RACE_ATTEMPTS - 1)
    monkeypatch.setattr(system, "openat2", openat2)
    assert content_beneath(directory, "file") == CONTENT
    assert openat2.count == RACE_ATTEMPTS


def test_open_that_races_with_renames_for_ever_is_refused(directory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    openat2 = failing(errno.EAGAIN)
    monkeypatch.setattr(system, "openat2", openat2)
    assert refused(directory, "file").errno == errno.EAGAIN
    assert openat2.count == RACE_ATTEMPTS


def test_openat2_without_restrictions_escapes_as_control(directory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_by("openat2", monkeypatch)
    with open(system.openat2(directory, b"../out/file", os.O_RDONLY, 0), "rb") as file:
        assert file.read() == SECRET


def test_root_opens_beneath_its_directory_and_names_the_file(tree: Path, directory: int) -> None:
    root = Root(tree)
    file = root.open("sub/file", writable=False)
    assert file.path == str(tree.resolve() / "sub" / "file")
    status = os.stat(tree / "sub" / "file")
    assert file.identity == (status.st_dev, status.st_ino)
    root.close()
    root.close()
    assert os.pread(file.descriptor, 6, 0) == CONTENT[:6]
    asyncio.run(file.close())


def test_root_stays_the_same_directory_when_its_name_moves(tree: Path) -> None:
    root = Root(tree)
    tree.rename(tree.parent / "moved")
    tree.symlink_to("out")
    file = root.open("file", writable=False)
    assert os.pread(file.descriptor, 6, 0) == CONTENT[:6]
    assert tree.joinpath("file").read_bytes() == SECRET, "control: the name leads elsewhere now"
    asyncio.run(file.close())
    root.close()


def test_root_given_by_a_link_knows_both_its_names(tree: Path) -> None:
    (tree.parent / "alias").symlink_to("in")
    root = Root(tree.parent / "alias")
    assert (root.path, root.alias) == (str(tree.resolve()), str(tree.parent / "alias"))
    root.close()


@pytest.mark.parametrize(("name", "error"), [("absent", FileNotFoundError), ("file", NotADirectoryError)])
def test_root_that_is_no_directory_is_refused(tree: Path, name: str, error: type[OSError]) -> None:
    with pytest.raises(error):
        Root(tree / name)


def test_posix_file_of_a_descriptor_takes_it_over(tree: Path) -> None:
    descriptor = os.open(tree / "file", os.O_RDONLY)
    file = PosixFile("a name", writable=False, descriptor=descriptor)
    assert (file.path, file.descriptor, file.size) == ("a name", descriptor, len(CONTENT))
    asyncio.run(file.close())
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_posix_file_of_a_wrong_descriptor_closes_it(tree: Path) -> None:
    descriptor = os.open(tree, os.O_RDONLY)
    with pytest.raises(OSError, match="neither a regular file nor a block device"):
        PosixFile("a name", writable=False, descriptor=descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_posix_file_identity_is_the_files_whatever_its_name(tree: Path) -> None:
    os.link(tree / "file", tree / "hard")
    (tree / "soft").symlink_to("file")
    files = [PosixFile(tree / name, writable=False) for name in ("file", "hard", "soft", "sub/file")]
    first, hard, soft, other = (file.identity for file in files)
    assert first == hard == soft != other
    for file in files:
        asyncio.run(file.close())
