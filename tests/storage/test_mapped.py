"""Pages in memory, handed to system calls: only what is there, whole, for as long as the file is open."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from nbdimg.storage import mapped, system
from nbdimg.storage.mapped import WINDOW_SIZE, Pages
from nbdimg.storage.posix import PosixFile
from tests.server.live import is_on_tmpfs

SIZE = 256 << 10
CONTENT = random.Random(1).randbytes(SIZE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    return path


def with_pages(path: Path, check: Callable[[Pages], object]) -> None:
    async def main() -> None:
        if is_on_tmpfs(path):
            pytest.skip("the temporary directory is in memory")
        file = PosixFile(path, writable=True)
        try:
            assert file.pages is not None
            check(file.pages)
        finally:
            await file.close()

    asyncio.run(main())


def sent(view: memoryview) -> bytes:
    """What a socket takes from there."""
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs):
        theirs.setblocking(False)
        count = ours.send(view, socket.MSG_DONTWAIT)
        received = bytearray()
        while len(received) < count:
            received += theirs.recv(SIZE)
    return bytes(received)


def maps_of(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


@pytest.mark.parametrize(
    ("offset", "length"), [(0, SIZE), (0, 1), (4095, 2), (5000, 70000), (SIZE - 1, 1), (SIZE - 4097, 4097)]
)
def test_what_is_in_memory_is_sent_from_there(path: Path, offset: int, length: int) -> None:
    def check(pages: Pages) -> None:
        view = pages.resident(offset, length)
        assert view is not None
        expected = CONTENT[offset : offset + length]
        assert sent(view) == expected[: len(sent(view))]
        again = memoryview(bytearray(length))
        pages.fetch(offset, again)
        assert again == expected

    with_pages(path, check)


def test_a_file_of_which_a_call_has_waited_is_left_alone_ten_times_as_long(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(mapped, "perf_counter", lambda: now)

    def check(pages: Pages) -> None:
        nonlocal now
        pages.was_sent(mapped.SLOW_S)
        assert pages.resident(0, 4096) is not None
        pages.was_sent(0.3)
        now += 2.9
        assert pages.resident(0, 4096) is None
        now += 0.2
        assert pages.resident(0, 4096) is not None

    with_pages(path, check)


def test_what_is_not_in_memory_is_not_handed_out(path: Path) -> None:
    def check(pages: Pages) -> None:
        descriptor = os.open(path, os.O_RDWR)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(descriptor, 65536, 131072)
        os.close(descriptor)
        assert pages.resident(65536, 65536) is None
        assert pages.resident(0, 131072) is None
        assert pages.resident(131072, 65536) is not None

    with_pages(path, check)


def test_neither_what_the_file_has_not_nor_two_windows_nor_too_much(path: Path) -> None:
    def check(pages: Pages) -> None:
        assert pages.resident(SIZE - 4096, 8192) is None
        assert pages.resident(SIZE, 4096) is None
        os.truncate(path, WINDOW_SIZE + SIZE)
        with open(path, "r+b") as file:
            file.seek(WINDOW_SIZE - SIZE)
            file.write(CONTENT * 2)
        assert pages.resident(WINDOW_SIZE - 4096, 4096) is not None
        assert pages.resident(WINDOW_SIZE, 4096) is not None
        assert pages.resident(WINDOW_SIZE - 4096, 8192) is None
        assert pages.resident(0, mapped.RESIDENT_MAX + 1) is None

    with_pages(path, check)


def test_a_file_cut_meanwhile_is_an_error_of_the_call_and_zeroes_in_a_read(path: Path) -> None:
    def check(pages: Pages) -> None:
        view = pages.resident(65536, 65536)
        assert view is not None
        os.truncate(path, 65536 + 100)
        with pytest.raises(OSError, match=os.strerror(errno.EFAULT)):
            sent(view[4096:])
        again = memoryview(bytearray(b"x") * 8192)
        pages.fetch(65536, again)
        assert again == CONTENT[65536 : 65536 + 100] + bytes(8192 - 100)

    with_pages(path, check)


def test_a_window_that_is_not_used_for_a_while_is_given_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "WINDOWS_MAX", 2)
    os.truncate(path, 3 * WINDOW_SIZE)
    with open(path, "r+b") as file:
        for index in range(3):
            file.seek(index * WINDOW_SIZE)
            file.write(bytes([index]) * 4096)

    def is_mapped(pages: Pages, index: int) -> bool:
        view = pages.resident(index * WINDOW_SIZE, 4096)
        assert view is None or sent(view) == bytes([index]) * 4096
        return view is not None

    def check(pages: Pages) -> None:
        assert [is_mapped(pages, index) for index in (0, 1, 2)] == [True, True, False]
        mapped.tidy()
        assert [is_mapped(pages, index) for index in (1, 2)] == [True, False]
        mapped.tidy()
        assert maps_of(path) == 1
        assert [is_mapped(pages, index) for index in (1, 2, 0)] == [True, True, False]

    with_pages(path, check)


def test_windows_are_given_back_one_at_a_time(path: Path) -> None:
    """What is behind a window's pages takes milliseconds to let go of: all 128 at once would hold the loop up."""
    os.truncate(path, 3 * WINDOW_SIZE)
    with open(path, "r+b") as file:
        for index in range(3):
            file.seek(index * WINDOW_SIZE)
            file.write(bytes(4096))

    def check(pages: Pages) -> None:
        assert all(pages.resident(index * WINDOW_SIZE, 4096) is not None for index in range(3))
        left = []
        for _ in range(5):
            mapped.tidy()
            left.append(len(pages.windows))
        assert left == [3, 2, 1, 0, 0]

    with_pages(path, check)


def test_a_file_that_is_closed_is_not_mapped(path: Path) -> None:
    def check(pages: Pages) -> None:
        assert pages.resident(0, SIZE) is not None
        assert maps_of(path) == 1

    with_pages(path, check)
    assert maps_of(path) == 0


def test_what_gets_no_map_is_asked_for_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def refused(descriptor: int, offset: int, length: int) -> int:
        tries.append(offset)
        raise OSError(errno.ENODEV, "no maps here")

    monkeypatch.setattr(system, "map_pages", refused)

    def check(pages: Pages) -> None:
        assert pages.resident(0, 4096) is None
        assert pages.resident(4096, 4096) is None

    with_pages(path, check)
    assert tries == [0]


def test_where_the_address_space_is_limited_nothing_is_mapped(path: Path) -> None:
    program = f"""
import asyncio, resource
from nbdimg.storage.posix import PosixFile
async def resident():
    file = PosixFile({str(path)!r}, writable=True)
    view = file.pages and file.pages.resident(0, 65536)
    await file.close()
    return view is not None
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
print(asyncio.run(resident()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_of_a_file_that_one_may_not_write_the_kernel_does_not_say_what_is_in_memory(path: Path) -> None:
    """So it is read, and not mapped."""
    (path.parent / "own.img").write_bytes(CONTENT)
    (path.parent / "shared.img").write_bytes(CONTENT)
    program = """
import os, sys
from nbdimg.storage.system import knows_residence
files = [os.open(name, os.O_RDONLY) for name in ("disk.img", "own.img", "shared.img")]
os.chown(files[1], 65534, 65534)
os.chmod(files[2], 0o666)
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
print([knows_residence(file) for file in files])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=path.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "[False, True, True]\n"
