"""The gates' policy: which names are taken for which files. What tries to escape is in test_confinement.py."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nbdimg.errors import ImageError, ImageLocked
from nbdimg.formats.gate import CHAIN_DEPTH_MAX, ConfinedGate, DenyGate
from nbdimg.image.gate import OpenGate, Reference
from nbdimg.storage.locks import lock_image
from nbdimg.storage.posix import PosixFile
from tests.storage.test_beneath import resolve_by


def named(owner: str | Path, name: str, *, writable: bool = False) -> Reference:
    return Reference(str(owner), "backing file", name, offset=512, is_writable=writable)


def opened(gate: OpenGate, reference: Reference) -> PosixFile:
    file = asyncio.run(_open(gate, reference))
    assert isinstance(file, PosixFile)
    return file


async def _open(gate: OpenGate, reference: Reference) -> object:
    return await gate.open(reference)


def refusal(gate: OpenGate, reference: Reference) -> ImageError:
    with pytest.raises(ImageError) as caught:
        opened(gate, reference)
    assert (caught.value.path, caught.value.offset) == (reference.owner_path, reference.offset)
    return caught.value


def is_same(file: PosixFile, path: Path) -> bool:
    status = os.stat(path)
    return file.identity == (status.st_dev, status.st_ino)


class Images:
    """Files beneath a directory, and gates for them; all closed at the end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.closers: list[Callable[[], object]] = []

    def make(self, name: str) -> Path:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
        return path

    def file(self, path: str | Path) -> PosixFile:
        file = PosixFile(path, writable=False)
        self.closers.append(lambda: asyncio.run(file.close()))
        return file

    def gate(
        self, top: str | Path, roots: tuple[Path, ...] = (), depth_max: int = 16, lock: bool = True
    ) -> ConfinedGate:
        gate = ConfinedGate(self.file(top), roots=roots, depth_max=depth_max, lock=lock)
        self.closers.append(gate.close)
        return gate

    def open(self, gate: ConfinedGate, owner: str | Path, name: str, *, writable: bool = False) -> PosixFile:
        return self.file_of(gate, named(owner, name, writable=writable))

    def file_of(self, gate: ConfinedGate, reference: Reference) -> PosixFile:
        file = opened(gate, reference)
        self.closers.append(lambda: asyncio.run(file.close()))
        return file


@pytest.fixture
def images(tmp_path: Path) -> Iterator[Images]:
    """Checks that nothing but what it closes is open at the end."""
    before = os.listdir("/proc/self/fd")
    images = Images(tmp_path.resolve())
    yield images
    for close in images.closers:
        close()
    assert os.listdir("/proc/self/fd") == before


@pytest.fixture
def openat2(monkeypatch: pytest.MonkeyPatch) -> None:
    """For names with `..` and for symlinks, which the walk in its place does not follow."""
    resolve_by("openat2", monkeypatch)


def test_deny_gate_refuses_a_file_that_is_there(images: Images) -> None:
    top, _ = images.make("top"), images.make("base")
    error = refusal(DenyGate(), named(top, "base"))
    assert str(error) == f"{top}: backing file 'base' is another file, allowed is none (offset 512)"


def test_gate_relative_name_is_beside_its_owner(images: Images) -> None:
    top, base = images.make("top"), images.make("base")
    file = images.open(images.gate(top), top, "base")
    assert is_same(file, base)
    assert (file.path, file.is_writable) == (str(base), False)


def test_gate_of_a_relative_top_path_opens_beside_it(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    images.make("top")
    base = images.make("base")
    monkeypatch.chdir(images.directory)
    assert is_same(images.open(images.gate("top"), "top", "base"), base)


def test_gate_relative_name_of_a_deeper_image_is_beside_that_image(images: Images) -> None:
    top, middle, base = images.make("top"), images.make("sub/middle"), images.make("sub/base")
    images.make("base")
    gate = images.gate(top)
    file = images.open(gate, top, "sub/middle")
    assert is_same(file, middle)
    assert is_same(images.open(gate, file.path, "base"), base)


@pytest.mark.usefixtures("openat2")
def test_gate_deeper_image_may_name_what_lies_above_it_beneath_the_root(images: Images) -> None:
    top, _, base = images.make("top"), images.make("sub/middle"), images.make("base")
    gate = images.gate(top)
    middle = images.open(gate, top, "sub/middle")
    file = images.open(gate, middle.path, "../base")
    assert is_same(file, base)
    images.make("sub/lower")
    lower = images.make("lower")
    assert is_same(images.open(gate, file.path, "lower"), lower)


@pytest.mark.usefixtures("openat2")
def test_gate_dots_behind_a_link_go_where_the_kernel_goes(images: Images) -> None:
    """`link/..` is the parent of what the link leads to, as for every program that opens the path as it stands."""
    top, base = images.make("top"), images.make("sub/base")
    images.make("sub/deep/file")
    images.make("base")
    (images.directory / "link").symlink_to("sub/deep")
    assert is_same(images.open(images.gate(top), top, "link/../base"), base)


def test_gate_name_with_a_colon_behind_a_slash_is_a_file(images: Images) -> None:
    top, base = images.make("top"), images.make("a:b")
    assert is_same(images.open(images.gate(top), top, "./a:b"), base)


@pytest.mark.parametrize("name", ["ein Bild.raw", "磁盘.qcow2", "-rf", "~", "%2e%2e", "a\\b", "*?", "$HOME", "..."])
def test_gate_odd_file_names_are_names(images: Images, name: str) -> None:
    top, base = images.make("top"), images.make(name)
    assert is_same(images.open(images.gate(top), top, name), base)


@pytest.mark.usefixtures("openat2")
@pytest.mark.parametrize("form", ["{}/base", "{}/./sub/../base", "//{}/base", "{}//base"])
def test_gate_absolute_name_beneath_the_root_is_opened(images: Images, form: str) -> None:
    top, base = images.make("top"), images.make("base")
    images.make("sub/file")
    name = form.format(images.directory)
    assert is_same(images.open(images.gate(top), top, name), base)


@pytest.mark.parametrize("name", ["alias", "real"])
def test_gate_absolute_name_may_use_the_directorys_alias(images: Images, name: str) -> None:
    images.make("real/top")
    base = images.make("real/base")
    (images.directory / "alias").symlink_to("real")
    top = images.directory / "alias" / "top"
    assert is_same(images.open(images.gate(top), top, str(images.directory / name / "base")), base)


def test_gate_absolute_name_in_a_sibling_with_the_roots_name_in_front_is_refused(images: Images) -> None:
    top, other = images.make("in/top"), images.make("in-other/base")
    assert "leads outside" in str(refusal(images.gate(top), named(top, str(other))))


@pytest.mark.parametrize("name", ["../bases/base", "{}/bases/base"])
def test_gate_allowed_directory_is_a_second_root(images: Images, name: str) -> None:
    top, base = images.make("in/top"), images.make("bases/base")
    name = name.format(images.directory)
    error = refusal(images.gate(top), named(top, name))
    assert "leads outside" in str(error)
    gate = images.gate(top, roots=(base.parent,))
    file = images.open(gate, top, name)
    assert is_same(file, base)
    lower = images.make("bases/lower")
    assert is_same(images.open(gate, file.path, "lower"), lower)


@pytest.mark.usefixtures("openat2")
def test_gate_allowed_directory_above_the_images_own_holds_both(images: Images) -> None:
    top, base = images.make("in/top"), images.make("bases/base")
    gate = images.gate(top, roots=(images.directory,))
    assert is_same(images.open(gate, top, "../bases/base"), base)


@pytest.mark.usefixtures("openat2")
@pytest.mark.parametrize("name", ["link", "{}/in/link"])
def test_gate_link_within_the_outermost_allowed_directory_is_followed(images: Images, name: str) -> None:
    top, base = images.make("in/top"), images.make("bases/base")
    (images.directory / "in" / "link").symlink_to("../bases/base")
    name = name.format(images.directory)
    assert "leads outside" in str(refusal(images.gate(top, roots=(base.parent,)), named(top, name)))
    gate = images.gate(top, roots=(base.parent, images.directory))
    assert is_same(images.open(gate, top, name), base)


def test_gate_allowed_directories_are_all_named_in_a_refusal(images: Images) -> None:
    top, base = images.make("in/top"), images.make("bases/base")
    gate = images.gate(top, roots=(base.parent, top.parent))
    assert str(refusal(gate, named(top, "../other/base"))) == (
        f"{top}: backing file '../other/base' leads outside, allowed is a regular file beneath {top.parent} or "
        f"{base.parent} or a directory of --allow-references (offset 512)"
    )


def test_gate_allowed_directory_that_is_absent_is_reported_and_nothing_stays_open(images: Images) -> None:
    top = images.file(images.make("top"))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError, match="absent"):
        ConfinedGate(top, roots=(images.directory, images.directory / "absent"))
    assert os.listdir("/proc/self/fd") == before


REFUSED_NAMES = [
    ("", "is empty"),
    ("a\0b", "has control characters or is not UTF-8"),
    ("a\nb", "has control characters or is not UTF-8"),
    ("\x7f", "has control characters or is not UTF-8"),
    ("a\x9bb", "has control characters or is not UTF-8"),
    ("\udcff", "has control characters or is not UTF-8"),
    (":b", "has the protocol '' "),
    ("a:b", "has the protocol 'a' "),
    ("my disk:b", "has the protocol 'my disk' "),
    ("file:base", "has the protocol 'file' "),
    ("fat:rw:/etc", "has the protocol 'fat' "),
    (".", "cannot be opened: it is a directory"),
    ("..", "leads outside"),
    ("/", "leads outside"),
    ("absent", "cannot be opened: No such file or directory"),
    ("top/x", "cannot be opened: Not a directory"),
    ("x" * 1023, "cannot be opened: File name too long"),
    ("/dev/null", "lies in /dev"),
    ("//dev//null", "lies in /dev"),
    ("/tmp/../proc/self/environ", "lies in /proc"),
    ("/sys/kernel/notes", "lies in /sys"),
]


@pytest.mark.parametrize(("name", "found"), REFUSED_NAMES)
def test_gate_name_is_refused_with_a_sentence(images: Images, name: str, found: str) -> None:
    top = images.make("top")
    images.make("base")
    message = str(refusal(images.gate(top), named(top, name)))
    assert message.startswith(f"{top}: backing file ")
    assert f" {found}" in message
    assert message.endswith(
        f", allowed is a regular file beneath {images.directory} or a directory of --allow-references (offset 512)"
    )
    assert message.isprintable()
    assert len(message) < 1000


@pytest.mark.parametrize("name", ["proc/self/environ", "/proc/self/environ", "sub/../proc/self/environ"])
def test_gate_of_an_image_in_the_root_directory_still_refuses_system_directories(
    images: Images, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The kernel calls /proc/self/environ a regular file, and beneath / it is."""
    file = images.file(images.make("top"))
    monkeypatch.setattr(file, "path", "/top")
    with ConfinedGate(file) as gate:
        assert "lies in /proc" in str(refusal(gate, named("/top", name)))


def test_gate_of_an_image_within_a_system_directory_opens_beside_it(images: Images) -> None:
    directory = Path(tempfile.mkdtemp(prefix="nbdimg-", dir="/dev/shm"))
    try:
        (directory / "top").write_bytes(b"top")
        (directory / "base").write_bytes(b"base")
        gate = images.gate(directory / "top")
        assert is_same(images.open(gate, directory / "top", str(directory / "base")), directory / "base")
        assert "lies in /dev" in str(refusal(gate, named(directory / "top", "/dev/null")))
    finally:
        shutil.rmtree(directory)


def test_gate_name_that_the_file_systems_encoding_lacks_is_refused(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = images.make("top")
    monkeypatch.setattr(os, "fsencode", lambda name: name.encode("latin-1"))
    error = refusal(images.gate(top), named(top, "磁盘"))
    assert "has characters that a file name in latin-1 cannot have" in str(error)


def test_gate_owner_that_it_did_not_open_is_refused(images: Images) -> None:
    top, other = images.make("top"), images.make("other")
    images.make("base")
    assert "is named by a file that is not of this chain" in str(refusal(images.gate(top), named(other, "base")))


@pytest.mark.usefixtures("openat2")
def test_gate_same_file_twice_is_refused_whatever_its_name(images: Images) -> None:
    top, base = images.make("top"), images.make("base")
    os.link(base, images.directory / "hard")
    (images.directory / "soft").symlink_to("base")
    gate = images.gate(top)
    file = images.open(gate, top, "base")
    for name in ("base", "hard", "soft"):
        message = str(refusal(gate, named(file.path, name)))
        assert "is a file that this chain holds already, allowed is each one once (offset 512)" in message


def test_gate_same_file_is_granted_after_a_refusal(images: Images) -> None:
    """What was not opened is not of the chain."""
    top, base = images.make("top"), images.make("base")
    gate = images.gate(top)
    writer = PosixFile(base, writable=True)
    lock_image(writer.descriptor, writer.path, writable=True)
    refusal(gate, named(top, "base"))
    asyncio.run(writer.close())
    images.open(gate, top, "base")


def test_gate_chain_at_the_limit_is_opened_and_beyond_it_refused(images: Images) -> None:
    owner = str(images.make("top"))
    gate = images.gate(owner, depth_max=CHAIN_DEPTH_MAX)
    for index in range(1, 17):
        images.make(f"{index}")
        owner = images.open(gate, owner, f"{index}").path
    images.make("17")
    assert str(refusal(gate, named(owner, "17"))) == (
        f"{owner}: backing file '17' is file 17 of this image's chain, allowed are 16 (offset 512)"
    )


def test_gate_failed_opens_do_not_count_towards_the_limit(images: Images) -> None:
    top = images.make("top")
    images.make("base")
    gate = images.gate(top, depth_max=1)
    for _ in range(3):
        refusal(gate, named(top, "absent"))
    images.open(gate, top, "base")


def test_gate_locks_a_backing_file_as_a_reader(images: Images) -> None:
    top, base = images.make("top"), images.make("base")
    images.open(images.gate(top), top, "base")
    images.open(images.gate(top), top, "base")
    writer = images.file(base)
    with pytest.raises(ImageLocked):
        lock_image(writer.descriptor, writer.path, writable=True)


def test_gate_locks_a_file_for_writing_as_an_image(images: Images) -> None:
    top, data = images.make("top"), images.make("data")
    file = images.open(images.gate(top), top, "data", writable=True)
    assert file.is_writable
    os.pwrite(file.descriptor, b"new", 0)
    assert data.read_bytes().startswith(b"new")
    error = refusal(images.gate(top), named(top, "data"))
    assert isinstance(error, ImageLocked)
    assert str(error) == (
        f"{top}: backing file 'data' is in use: {data}: cannot be locked for reading: another process or export has "
        "it open (offset 512)"
    )


def test_gate_without_locks_takes_none(images: Images) -> None:
    top, base = images.make("top"), images.make("base")
    writer = images.file(base)
    lock_image(writer.descriptor, writer.path, writable=False)
    images.open(images.gate(top, lock=False), top, "base", writable=True)


def test_gate_closed_leaves_its_files_open(images: Images) -> None:
    top = images.make("top")
    images.make("base")
    with images.gate(top) as gate:
        file = images.open(gate, top, "base")
    assert os.pread(file.descriptor, 4, 0) == b"base"
    with pytest.raises(AssertionError):
        opened(gate, named(top, "base"))


# Case


def but_for_case(owner: str | Path, name: str) -> Reference:
    return replace(named(owner, name), ignores_case=True)


@pytest.mark.parametrize("name", ["BASE.vhdx", "./base.VHDX", "{}/base.VHDX"])
def test_gate_name_that_ignores_case_finds_the_file(images: Images, name: str) -> None:
    top, base = images.make("top"), images.make("Base.vhdx")
    gate = images.gate(top)
    name = name.format(images.directory)
    assert "No such file" in str(refusal(gate, named(top, name)))
    file = images.file_of(gate, but_for_case(top, name))
    assert is_same(file, base)
    assert file.path.endswith("/Base.vhdx")


def test_gate_name_that_ignores_case_prefers_the_same_and_then_the_first(images: Images) -> None:
    top, same = images.make("top"), images.make("base.vhdx")
    images.make("BASE.vhdx")
    first = images.make("BASE.VHDX")
    assert is_same(images.file_of(images.gate(top), but_for_case(top, "base.vhdx")), same)
    assert is_same(images.file_of(images.gate(top), but_for_case(top, "bASE.vhdx")), first)


def test_gate_name_that_ignores_case_is_relative_to_its_owner(images: Images) -> None:
    top, middle, base = images.make("top"), images.make("sub/middle"), images.make("sub/Base")
    images.make("Base")
    gate = images.gate(top)
    file = images.open(gate, top, "sub/middle")
    assert is_same(file, middle)
    assert is_same(images.file_of(gate, but_for_case(file.path, "BASE")), base)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("other.vhdx", "cannot be opened: No such file or directory"),
        ("absent/base.vhdx", "cannot be opened: No such file or directory"),
        ("../out/SECRET", "leads outside"),
        ("link/SECRET", "leads outside"),
        ("TO-SECRET", "leads outside"),
        ("FIFO", "cannot be opened: it is a FIFO"),
    ],
)
@pytest.mark.usefixtures("openat2")
def test_gate_name_that_ignores_case_is_confined_like_any_other(images: Images, name: str, found: str) -> None:
    top, secret = images.make("in/top"), images.make("out/secret")
    (top.parent / "link").symlink_to("../out")
    (top.parent / "to-secret").symlink_to(secret)
    os.mkfifo(top.parent / "fifo")
    assert found in str(refusal(images.gate(top), but_for_case(top, name)))


# What the operator names


def given(owner: str | Path, name: str | Path) -> Reference:
    return Reference(str(owner), "the given parent", str(name), offset=512, is_writable=False, is_given=True)


@pytest.mark.parametrize("form", ["{}/out/base", "out/base", "in/../link"])
def test_gate_given_file_is_opened_wherever_it_lies(images: Images, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """From the working directory, as the image itself is."""
    top, base = images.make("in/top"), images.make("out/base")
    (images.directory / "link").symlink_to("out/base")
    monkeypatch.chdir(images.directory)
    assert is_same(images.file_of(images.gate(top), given(top, form.format(images.directory))), base)


def test_gate_given_file_allows_nothing_beside_it(images: Images) -> None:
    top, base = images.make("in/top"), images.make("out/base")
    beside = images.make("out/beside")
    gate = images.gate(top)
    file = images.file_of(gate, given(top, base))
    message = str(refusal(gate, named(file.path, "beside")))
    assert message == (
        f"{base}: backing file 'beside' leads outside, allowed is a regular file beneath {top.parent} or a directory "
        "of --allow-references (offset 512)"
    )
    gate = images.gate(top, roots=(base.parent,))
    file = images.file_of(gate, given(top, base))
    assert is_same(images.open(gate, file.path, "beside"), beside)


@pytest.mark.usefixtures("openat2")
def test_gate_given_link_into_a_root_names_from_where_the_file_is(images: Images) -> None:
    top, middle, base = images.make("in/top"), images.make("in/sub/middle"), images.make("in/sub/base")
    link = images.directory / "link"
    link.symlink_to(middle)
    gate = images.gate(top)
    file = images.file_of(gate, given(top, link))
    assert is_same(images.open(gate, file.path, "base"), base)


def test_gate_given_file_that_cannot_be_is_refused_with_a_sentence(images: Images) -> None:
    top = images.make("top")
    os.mkfifo(images.directory / "fifo")
    for name, found in (
        ("absent", "cannot be opened: No such file or directory"),
        ("fifo", "cannot be opened: neither a regular file nor a block device"),
        ("top", "is a file that this chain holds already, allowed is each one once"),
    ):
        path = images.directory / name
        assert str(refusal(images.gate(top), given(top, path))).startswith(f"{top}: the given parent '{path}' {found}")


def test_gate_given_file_is_locked_and_counted(images: Images) -> None:
    top, base = images.make("top"), images.make("base")
    with open(base, "r+b") as user:
        lock_image(user.fileno(), str(base), writable=True)
        with pytest.raises(ImageLocked, match=r"the given parent .* is in use"):
            opened(images.gate(top), given(top, base))
    assert "allowed are 0" in str(refusal(images.gate(top, depth_max=0), given(top, base)))


def test_deny_gate_refuses_a_given_file(images: Images) -> None:
    top, base = images.make("top"), images.make("base")
    assert "allowed is none" in str(refusal(DenyGate(), given(top, base)))
