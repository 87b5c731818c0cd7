"""PosixFile over real files: ext4 (or whatever holds the temporary directory), tmpfs, and a loop device."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdimg.storage import posix, system
from nbdimg.storage.posix import INLINE_WRITE_MAX, SLOW_WRITE_S, PosixFile
from tests.server.live import is_on_tmpfs
from tests.support.rss import descriptor_count

PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """64 KiB whose byte at offset n is n // 256."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(n // 256 for n in range(64 * 1024)))
    return path


@pytest.fixture
def shm_path() -> Iterator[Path]:
    """As `path`, in memory."""
    if not is_on_tmpfs(Path("/dev/shm")):
        pytest.skip("/dev/shm is not a tmpfs here")
    directory = tempfile.mkdtemp(prefix="nbdimg-", dir="/dev/shm")
    path = Path(directory, "disk.img")
    path.write_bytes(bytes(n // 256 for n in range(64 * 1024)))
    yield path
    shutil.rmtree(directory)


@pytest.fixture
def disk_path(path: Path) -> Path:
    """`path` on a file system that has a device below it, so that a page can be cold."""
    if is_on_tmpfs(path):
        pytest.skip("the temporary directory is in memory")
    return path


def make_cold(path: Path) -> None:
    """Write the file back and drop its pages from the cache."""
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


async def read_resident(file: PosixFile, offset: int, length: int) -> bytes | None:
    """What `try_pread` reads once the pages are in memory: a kernel short of it may drop them at any time.

    None: it never said yes.
    """
    for _ in range(RESIDENT_ATTEMPTS):
        if (content := read_now(file, offset, length)) is not None:
            return content
        await read_slowly(file, offset, length)
    return None


async def write_resident(file: PosixFile, offset: int, data: bytes) -> bool:
    """Whether `try_pwrite` writes once the pages are in memory."""
    for _ in range(RESIDENT_ATTEMPTS):
        await read_slowly(file, 0, 64 * 1024)
        if file.try_pwrite(offset, data):
            return True
    return False


RESIDENT_ATTEMPTS = 50
COLD_ATTEMPTS = 50
"""RWF_NOWAIT on a cold page starts its read, and a fast disk may be done before the kernel looks again."""


def make_nowait_say_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every page look cold."""
    real = os.preadv

    def preadv(descriptor: int, views: tuple[memoryview], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return real(descriptor, views, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)


def read_now(file: PosixFile, offset: int, length: int) -> bytes | None:
    view = memoryview(bytearray(length))
    return bytes(view) if file.try_pread(offset, view) else None


async def read_slowly(file: PosixFile, offset: int, length: int) -> bytes:
    view = memoryview(bytearray(b"\xaa" * length))
    await file.pread(offset, view)
    return bytes(view)


def test_try_pread_of_cached_pages_fills_the_view(path: Path) -> None:
    file = PosixFile(path, writable=False)
    assert asyncio.run(read_resident(file, 256, 512)) == bytes([1] * 256 + [2] * 256)


def test_try_pread_of_a_cold_page_says_no_and_pread_brings_it(disk_path: Path) -> None:
    file = PosixFile(disk_path, writable=False)
    for _ in range(COLD_ATTEMPTS):
        make_cold(disk_path)
        if read_now(file, 8192, 16) is None:
            break
    else:
        pytest.skip("the kernel did not let go of the page")
    assert asyncio.run(read_slowly(file, 8192, 16)) == bytes([32] * 16)
    assert asyncio.run(read_resident(file, 8192, 16)) == bytes([32] * 16)


def test_try_pread_that_would_block_says_no_every_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_nowait_say_again(monkeypatch)
    file = PosixFile(path, writable=False)
    assert read_now(file, 8192, 16) is None
    assert read_now(file, 8192, 16) is None
    assert asyncio.run(read_slowly(file, 8192, 16)) == bytes([32] * 16)


def test_prefetch_makes_a_cold_range_resident_in_time(disk_path: Path) -> None:
    make_cold(disk_path)
    file = PosixFile(disk_path, writable=False)

    async def prefetch_until_resident() -> None:
        await file.prefetch(0, 4096)
        for _ in range(5000):
            if read_now(file, 0, 4096) is not None:
                return
            await asyncio.sleep(0.001)
        pytest.fail("the range did not come into memory")

    asyncio.run(prefetch_until_resident())


def test_pread_across_the_end_reads_zeroes_behind_it(path: Path) -> None:
    file = PosixFile(path, writable=False)
    end = file.size
    assert read_now(file, end - 4, 8) is None
    assert asyncio.run(read_slowly(file, end - 4, 8)) == b"\xff" * 4 + b"\0" * 4
    assert asyncio.run(read_slowly(file, end + MIB, 4096)) == bytes(4096)


def test_pread_of_nothing_touches_nothing(path: Path) -> None:
    file = PosixFile(path, writable=False)
    assert asyncio.run(read_slowly(file, 0, 0)) == b""


def test_read_on_tmpfs_is_answered_inline(shm_path: Path) -> None:
    """With RWF_NOWAIT where the kernel's tmpfs has it, else by a plain read: memory is never waited for."""
    file = PosixFile(shm_path, writable=True)
    assert system.is_memory_file_system(os.stat(shm_path).st_dev)
    assert read_now(file, 512, 256) == bytes([2] * 256)
    assert read_now(file, 768, 256) == bytes([3] * 256)
    assert file.try_pwrite(100, b"partial page")


def refuse_nowait(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make every preadv with RWF_NOWAIT answer EOPNOTSUPP; returns the flags that callers used."""
    real, seen = os.preadv, []

    def preadv(descriptor: int, views: tuple[memoryview], offset: int, flags: int = 0) -> int:
        seen.append(flags)
        if flags & os.RWF_NOWAIT:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(descriptor, views, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    return seen


def test_nowait_unsupported_on_a_disk_is_remembered_and_workers_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "is_memory_file_system", lambda device: False)
    file = PosixFile(path, writable=True)
    seen = refuse_nowait(monkeypatch)
    assert read_now(file, 0, 16) is None
    assert read_now(file, 0, 16) is None
    assert seen == [os.RWF_NOWAIT]
    assert not file.try_pwrite(0, b"x" * 10)
    assert asyncio.run(read_slowly(file, 256, 16)) == bytes([1] * 16)


def test_file_of_a_server_asks_it_for_nothing_on_the_loop(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server may have gone: each call hangs then."""
    monkeypatch.setattr(system, "is_memory_file_system", lambda device: False)
    refuse_nowait(monkeypatch)
    file, seek, callers = PosixFile(path, writable=True), os.lseek, set()

    def lseek(descriptor: int, offset: int, whence: int) -> int:
        callers.add(threading.get_ident())
        return seek(descriptor, offset, whence)

    async def main() -> None:
        monkeypatch.setattr(os, "lseek", lseek)
        assert not file.try_pwrite(0, bytes(4096))
        assert file.size == 64 * 1024
        await file.pwrite(MIB, b"end")
        await file.pwrite(0, b"x")
        assert file.size == MIB + 3
        await file.truncate(2 * MIB)
        assert file.size == 2 * MIB
        assert file.try_data_extent(0) is None
        assert await file.data_extent(64 * 1024) == (False, MIB)
        assert await file.data_extent(MIB) == (True, MIB + 4096)
        await file.close()

    asyncio.run(main())
    assert threading.get_ident() not in callers


def test_file_of_a_server_that_takes_a_part_of_a_write_has_its_size(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "is_memory_file_system", lambda device: False)
    refuse_nowait(monkeypatch)
    file, write = PosixFile(path, writable=True), os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if len(data) <= 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:-1000], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="No space left"):
        asyncio.run(file.pwrite(64 * 1024, bytes(3000)))
    assert file.size == path.stat().st_size == 64 * 1024 + 2000


def test_nowait_unsupported_in_memory_is_remembered_and_read_inline(
    shm_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = refuse_nowait(monkeypatch)
    file = PosixFile(shm_path, writable=True)
    assert read_now(file, 256, 16) == bytes([1] * 16)
    assert read_now(file, 512, 16) == bytes([2] * 16)
    assert seen == [os.RWF_NOWAIT, 0, 0]
    assert file.try_pwrite(10, b"inline")


def test_try_pread_other_error_passes_through(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(*args: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    file = PosixFile(path, writable=False)
    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(OSError, match="Input/output error") as caught:
        read_now(file, 0, 16)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize(("offset", "length"), [(0, PAGE), (PAGE, 3 * PAGE), (100, 10), (PAGE - 1, 2), (PAGE, 17)])
def test_try_pwrite_over_resident_pages_is_done_inline(path: Path, offset: int, length: int) -> None:
    file = PosixFile(path, writable=True)
    assert asyncio.run(write_resident(file, offset, b"\x5a" * length))
    assert path.read_bytes()[offset : offset + length] == b"\x5a" * length


PARTIAL_RANGES = [(100, 10), (PAGE - 1, PAGE + 1), (PAGE, 17), (2 * PAGE - 1, 2)]


@pytest.mark.parametrize(("offset", "length"), PARTIAL_RANGES)
def test_try_pwrite_where_a_partial_page_is_not_resident_says_no_and_writes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, offset: int, length: int
) -> None:
    before = path.read_bytes()
    make_nowait_say_again(monkeypatch)
    file = PosixFile(path, writable=True)
    assert not file.try_pwrite(offset, b"\x5a" * length)
    assert path.read_bytes() == before
    asyncio.run(file.pwrite(offset, b"\x5a" * length))
    assert path.read_bytes()[offset : offset + length] == b"\x5a" * length


def test_try_pwrite_into_a_cold_partial_page_says_no_and_writes_nothing(disk_path: Path) -> None:
    file = PosixFile(disk_path, writable=True)
    for attempt in range(COLD_ATTEMPTS):
        before = disk_path.read_bytes()
        make_cold(disk_path)
        if not file.try_pwrite(100, b"%8d" % attempt):
            break
    else:
        pytest.skip("the kernel did not let go of the page")
    make_cold(disk_path)
    assert disk_path.read_bytes() == before


def test_try_pwrite_of_whole_cold_pages_is_done_inline(disk_path: Path) -> None:
    make_cold(disk_path)
    file = PosixFile(disk_path, writable=True)
    assert file.try_pwrite(PAGE, b"\x5a" * 2 * PAGE)


def test_try_pwrite_behind_the_end_needs_no_page(disk_path: Path) -> None:
    make_cold(disk_path)
    file = PosixFile(disk_path, writable=True)
    assert file.try_pwrite(64 * 1024 + 10, b"abc")
    assert file.size == 64 * 1024 + 13


def test_try_pwrite_at_and_above_the_inline_limit(tmp_path: Path) -> None:
    path = tmp_path / "large.img"
    path.write_bytes(b"")
    file = PosixFile(path, writable=True)
    assert file.try_pwrite(0, bytes(INLINE_WRITE_MAX))
    assert not file.try_pwrite(0, bytes(INLINE_WRITE_MAX + 1))


def test_try_pwrite_after_a_slow_one_goes_to_workers_for_a_while(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]

    def slow_pwrite(descriptor: int, view: memoryview, offset: int) -> int:
        now[0] += 2 * SLOW_WRITE_S
        return len(view)

    file = PosixFile(path, writable=True)
    monkeypatch.setattr(posix, "perf_counter", lambda: now[0])
    monkeypatch.setattr(os, "pwrite", slow_pwrite)
    assert file.try_pwrite(0, bytes(PAGE))
    assert not file.try_pwrite(0, bytes(PAGE))
    now[0] += 2 * SLOW_WRITE_S * posix.SLOW_WRITE_PAUSES
    assert file.try_pwrite(0, bytes(PAGE))


def test_try_pwrite_that_the_kernel_cuts_short_says_no(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = PosixFile(path, writable=True)
    monkeypatch.setattr(os, "pwrite", lambda descriptor, view, offset: len(view) - 1)
    assert not file.try_pwrite(0, bytes(PAGE))


def test_pwrite_on_a_full_device_raises_enospc(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = PosixFile(path, writable=True)
    monkeypatch.setattr(os, "pwrite", lambda descriptor, view, offset: 0)
    with pytest.raises(OSError, match="No space") as caught:
        asyncio.run(file.pwrite(0, b"data"))
    assert caught.value.errno == errno.ENOSPC


def test_pwrite_that_the_kernel_cuts_short_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = PosixFile(path, writable=True)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, view, offset: real(descriptor, view[:3], offset))
    asyncio.run(file.pwrite(1000, b"0123456789"))
    assert path.read_bytes()[1000:1010] == b"0123456789"


def test_write_to_a_read_only_file_raises_ebadf(path: Path) -> None:
    file = PosixFile(path, writable=False)
    with pytest.raises(OSError, match="Bad file descriptor"):
        asyncio.run(file.pwrite(0, b"data"))


def test_punch_reads_as_zeroes_keeps_the_size_and_makes_a_hole(path: Path) -> None:
    file = PosixFile(path, writable=True)

    async def punch() -> bool:
        done = await file.punch(4096, 8192)
        await file.fdatasync()
        return done

    if not asyncio.run(punch()):
        pytest.skip("this file system has no hole punching")
    assert file.size == 64 * 1024
    assert path.read_bytes()[4096:12288] == bytes(8192)
    assert path.read_bytes()[12288:12544] == bytes([48] * 256)
    assert file.try_data_extent(0) == (True, 4096)
    assert file.try_data_extent(4096) == (False, 12288)
    assert file.try_data_extent(5000) == (False, 12288)


def test_punch_of_parts_of_pages_zeroes_exactly_the_range(path: Path) -> None:
    before = path.read_bytes()
    file = PosixFile(path, writable=True)
    if not asyncio.run(file.punch(4000, 5001)):
        pytest.skip("this file system has no hole punching")
    assert path.read_bytes() == before[:4000] + bytes(5001) + before[9001:]


def test_zero_reads_as_zeroes_keeps_size_and_space(path: Path) -> None:
    before = path.read_bytes()
    file = PosixFile(path, writable=True)
    os.fsync(file.descriptor)
    blocks = os.stat(path).st_blocks
    if not asyncio.run(file.zero(1000, 20_000)):
        pytest.skip("this file system has no FALLOC_FL_ZERO_RANGE")
    assert path.read_bytes() == before[:1000] + bytes(20_000) + before[21_000:]
    assert os.stat(path).st_blocks >= blocks


def test_zero_on_tmpfs_is_either_done_or_refused_without_a_change(shm_path: Path) -> None:
    before = shm_path.read_bytes()
    file = PosixFile(shm_path, writable=True)
    is_done = asyncio.run(file.zero(1000, 2000))
    assert shm_path.read_bytes() == (before[:1000] + bytes(2000) + before[3000:] if is_done else before)


def test_punch_on_tmpfs_makes_a_hole(shm_path: Path) -> None:
    file = PosixFile(shm_path, writable=True)
    assert asyncio.run(file.punch(PAGE, PAGE))
    assert file.try_data_extent(PAGE) == (False, 2 * PAGE)


@pytest.mark.parametrize("number", sorted(system.UNSUPPORTED))
def test_fallocate_unsupported_answers_false(number: int, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    fake_libc(monkeypatch, [number])
    assert not asyncio.run(PosixFile(path, writable=True).punch(0, 4096))


def test_fallocate_interrupted_is_repeated(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    calls = fake_libc(monkeypatch, [errno.EINTR, errno.EINTR, 0])
    assert asyncio.run(PosixFile(path, writable=True).zero(0, 4096))
    assert calls == [(system.ZERO, 0, 4096)] * 3


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_fallocate_failure_raises(number: int, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    fake_libc(monkeypatch, [number])
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        asyncio.run(PosixFile(path, writable=True).zero(0, 4096))
    assert caught.value.errno == number


def fake_libc(monkeypatch: pytest.MonkeyPatch, answers: list[int]) -> list[tuple[int, int, int]]:
    """Let fallocate answer with these errnos in turn (0: success); returns (mode, offset, length) of its calls."""
    calls = []
    left = list(answers)

    class Libc:
        @staticmethod
        def fallocate(descriptor: int, mode: int, offset: int, length: int) -> int:
            calls.append((mode, offset, length))
            return -1 if left[0] else 0

    monkeypatch.setattr(system, "_libc", Libc)
    monkeypatch.setattr(ctypes, "get_errno", lambda: left.pop(0))
    return calls


def test_data_extent_of_a_sparse_file_alternates(tmp_path: Path) -> None:
    path = tmp_path / "sparse.img"
    with open(path, "wb") as file:
        file.truncate(8 * MIB)
        file.seek(MIB)
        file.write(b"x" * MIB)
        file.seek(3 * MIB)
        file.write(b"x" * MIB)
    sparse = PosixFile(path, writable=False)
    assert sparse.try_data_extent(0) == (False, MIB)
    assert sparse.try_data_extent(MIB) == (True, 2 * MIB)
    assert sparse.try_data_extent(MIB + 5) == (True, 2 * MIB)
    assert sparse.try_data_extent(2 * MIB) == (False, 3 * MIB)
    assert sparse.try_data_extent(4 * MIB) == (False, 8 * MIB)
    assert sparse.try_data_extent(8 * MIB - 1) == (False, 8 * MIB)


def test_data_extent_without_seek_data_is_all_data(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = PosixFile(path, writable=False)
    real = os.lseek

    def lseek(descriptor: int, offset: int, whence: int) -> int:
        if whence == os.SEEK_DATA:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, offset, whence)

    monkeypatch.setattr(os, "lseek", lseek)
    assert file.try_data_extent(1000) == (True, 64 * 1024)


def test_truncate_and_size(path: Path) -> None:
    file = PosixFile(path, writable=True)
    asyncio.run(file.truncate(100_000))
    assert file.size == 100_000
    asyncio.run(file.truncate(10))
    assert file.size == 10


def test_close_twice_is_harmless_and_frees_the_descriptor(path: Path) -> None:
    file = PosixFile(path, writable=False)
    descriptor = file.descriptor

    async def close_twice() -> None:
        await file.close()
        await file.close()

    asyncio.run(close_twice())
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_close_that_hangs_holds_up_no_one_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a file on a network file system without its server, which writes what it has first."""
    closers: list[int] = []
    file, close = PosixFile(path, writable=True), os.close

    def noted_close(descriptor: int) -> None:
        closers.append(threading.get_ident())
        close(descriptor)

    async def main() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(os, "close", noted_close)
            await file.close()

    asyncio.run(main())
    assert len(closers) == 1
    assert threading.get_ident() not in closers


@pytest.mark.parametrize("writable", [False, True])
def test_open_directory_is_refused(tmp_path: Path, writable: bool) -> None:
    count = descriptor_count(os.getpid())
    with pytest.raises(OSError, match=r"directory|neither a regular file"):
        PosixFile(tmp_path, writable=writable)
    assert descriptor_count(os.getpid()) == count


@pytest.mark.timeout(10)
@pytest.mark.parametrize("writable", [False, True])
def test_open_fifo_is_refused_without_waiting_for_a_peer(tmp_path: Path, writable: bool) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    count = descriptor_count(os.getpid())
    with pytest.raises(OSError, match="neither a regular file nor a block device") as caught:
        PosixFile(path, writable=writable)
    assert caught.value.filename == str(path)
    assert descriptor_count(os.getpid()) == count


def test_open_character_device_is_refused() -> None:
    with pytest.raises(OSError, match="neither a regular file nor a block device"):
        PosixFile("/dev/null", writable=False)


def test_open_missing_file_raises_enoent(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        PosixFile(tmp_path / "missing", writable=False)


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[str]:
    """A block device of 4 MiB."""
    if os.geteuid() != 0 or shutil.which("losetup") is None:
        pytest.skip("a loop device needs root and losetup")
    backing = tmp_path / "loop.img"
    with open(backing, "wb") as file:
        file.truncate(4 * MIB)
    made = subprocess.run(["losetup", "--find", "--show", backing], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    device = made.stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


def test_block_device_is_served_at_its_capacity_as_all_data(loop_device: str) -> None:
    file = PosixFile(loop_device, writable=True)

    async def exercise() -> bytes:
        try:
            await file.pwrite(1000, b"block device")
            await file.fdatasync()
            await file.punch(8192, 4096)
            assert not await file.zero(1, 10)
            return await read_slowly(file, 1000, 12)
        finally:
            await file.close()

    assert file.is_block_device
    assert file.size == 4 * MIB
    assert file.try_data_extent(0) == (True, 4 * MIB)
    assert asyncio.run(exercise()) == b"block device"
