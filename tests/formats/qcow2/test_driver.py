"""The order in which changes reach the disk (Q1 to Q6), and what a failed write leaves."""

from __future__ import annotations

import asyncio
import errno
import struct
import subprocess
from pathlib import Path

import pytest

from nbdimg.errors import CorruptImage, ImageFailed
from nbdimg.formats import open_file
from nbdimg.formats.options import OpenOptions
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.formats.qcow2.resize import resize
from nbdimg.formats.qcow2.snapshot_changes import create_snapshot
from nbdimg.image.image import Image
from nbdimg.storage.file import Buffer
from tests.support.faultfile import FaultFile
from tests.support.qcow2mutants import AnyGate, BoundedFile


class LoggedFile(BoundedFile):
    """Notes each write by the region it falls into, and each barrier."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.log: list[str] = []

    def _note(self, offset: int) -> None:
        names = {0: "header", 1: "refcount table", 2: "refcounts", 3: "L1", 4: "L2"}
        self.log.append(names.get(offset >> 12, "space"))

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        self._note(offset)
        return super().try_pwrite(offset, data)

    async def fdatasync(self) -> None:
        self.log.append("|")

    async def punch(self, offset: int, length: int) -> bool:
        self.log.append("punch")
        return await super().punch(offset, length)


def image_bytes(path: Path, options: str = "cluster_size=4k", *, is_written: bool = True) -> bytes:
    """Header, refcount table, refcount block, L1 table, and with `is_written` an L2 table, in clusters 0 to 4."""
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(path), "4M"]
    subprocess.run(create, check=True)
    if is_written:
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 8k", str(path)], check=True)
    return path.read_bytes()


async def opened(file: LoggedFile | FaultFile) -> Image:
    image = await open_file(file, "qcow2", OpenOptions(AnyGate(b""), writable=True))
    await image.flush()
    if isinstance(file, LoggedFile):
        file.log.clear()
    return image


def check(path: Path, content: bytes | bytearray) -> int:
    """qemu-img's verdict: 0 clean, 3 leaks."""
    path.write_bytes(content)
    return subprocess.run(["qemu-img", "check", "-q", str(path)]).returncode


def test_flush_of_an_allocation_orders_data_and_counts_before_the_entry(tmp_path: Path) -> None:
    """Q1, Q2."""

    async def main() -> None:
        file = LoggedFile(image_bytes(tmp_path / "a"))
        image = await opened(file)
        await image.write(64 << 10, b"x" * 4096)
        await image.flush()
        assert file.log == ["space", "refcounts", "|", "L2", "|"]

    asyncio.run(main())


def test_flush_of_a_new_l2_table_orders_it_before_the_l1_entry(tmp_path: Path) -> None:
    """Q3; the table lies in space that was never written."""

    async def main() -> None:
        file = LoggedFile(image_bytes(tmp_path / "a", is_written=False))
        image = await opened(file)
        await image.write(0, b"x" * 4096)
        await image.flush()
        assert file.log == ["space", "refcounts", "|", "L2", "|", "L1", "|"]

    asyncio.run(main())


@pytest.mark.parametrize("options", ["cluster_size=4k", "cluster_size=4k,lazy_refcounts=on"])
def test_flush_writes_nothing_again_that_is_durable(tmp_path: Path, options: str) -> None:
    """Nor the dirty bit of lazy refcounts, nor the size after a resize."""

    async def main() -> None:
        file = LoggedFile(image_bytes(tmp_path / "a", options, is_written=False))
        image = await opened(file)
        await resize(image, 5 << 20)
        await image.write(0, b"x" * 4096)
        await image.flush()
        file.log.clear()
        await image.write(0, b"y" * 4096)
        await image.flush()
        assert file.log == ["space", "|"]

    asyncio.run(main())


def test_trim_orders_the_entry_before_the_punch_and_the_count(tmp_path: Path) -> None:
    """Q4."""

    async def main() -> None:
        file = LoggedFile(image_bytes(tmp_path / "a"))
        image = await opened(file)
        await image.trim(0, 4096)
        await image.flush()
        assert file.log == ["|", "L2", "|", "punch"]
        file.log.clear()
        await image.close()
        assert file.log == ["refcounts", "|"]
        assert check(tmp_path / "after", file.content) == 0

    asyncio.run(main())


@pytest.mark.parametrize("options", ["cluster_size=4k", "cluster_size=4k,lazy_refcounts=on"])
def test_trimmed_space_is_not_reused_before_a_flush(tmp_path: Path, options: str) -> None:
    """Q5: until then the old bytes are what a crash would bring back. Behind it they are free, in memory at least."""

    async def main() -> None:
        file = LoggedFile(image_bytes(tmp_path / "a", options))
        image = await opened(file)
        (before,) = await image.map(0, 4096, 10)
        old = bytes(file.content[before.file_offset : before.file_offset + 4096])
        await image.trim(0, 4096)
        for offset in range(64 << 10, 128 << 10, 4096):
            await image.write(offset, b"y" * 4096)
        assert file.content[before.file_offset : before.file_offset + 4096] == old
        await image.flush()
        await image.write(256 << 10, b"z" * 4096)
        (after,) = await image.map(256 << 10, 4096, 10)
        assert after.file_offset == before.file_offset
        await image.close()
        assert check(tmp_path / "after", file.content) == 0

    asyncio.run(main())


def test_snapshot_raises_the_counts_before_it_clears_the_flags(tmp_path: Path) -> None:
    """Q1, the first bar of `create`: what has lost its flag has had two references on disk. Version 2 has no mark that
    would say of flags that they need not fit.
    """

    async def main() -> None:
        file = LoggedFile(image_bytes(tmp_path / "a", "cluster_size=4k,compat=0.10"))
        image = await opened(file)
        assert isinstance(image.driver, Qcow2Driver)
        await create_snapshot(image.driver, "one", now_ns=0)
        assert file.log[:3] == ["refcounts", "|", "L2"]
        await image.close()
        assert check(tmp_path / "after", file.content) == 0

    asyncio.run(main())


def test_abandoned_image_holds_what_was_flushed_and_at_most_leaks(tmp_path: Path) -> None:
    async def main() -> bytes:
        file = LoggedFile(image_bytes(tmp_path / "a"))
        image = await opened(file)
        await image.write(64 << 10, b"x" * 8192)
        await image.flush()
        await image.trim(0, 4096)
        await image.write(128 << 10, b"y" * 8192)
        await image.driver.abandon()
        return bytes(file.content)

    content = asyncio.run(main())
    assert check(tmp_path / "after", content) in (0, 3)
    found = subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "read -P 0x78 64k 8k", "-c", "read -P 7 0 8k", str(tmp_path / "after")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "verification failed" not in found.stdout


def test_metadata_that_finds_no_space_fails_that_flush_and_the_next_one_tries_again(tmp_path: Path) -> None:
    async def main() -> bytes:
        inner = BoundedFile(image_bytes(tmp_path / "a"))
        file = FaultFile(inner)
        image = await opened(file)
        await image.write(64 << 10, b"x" * 4096)
        file.fail("pwrite", errno.ENOSPC)
        with pytest.raises(OSError, match="No space left") as caught:
            await image.flush()
        assert caught.value.errno == errno.ENOSPC
        file.heal()
        await image.flush()
        await image.close()
        return bytes(inner.content)

    content = asyncio.run(main())
    assert check(tmp_path / "after", content) == 0
    assert b"x" * 4096 in content


@pytest.mark.parametrize("method", ["pwrite", "fdatasync"])
def test_metadata_that_fails_otherwise_poisons_the_image_and_close_writes_nothing(tmp_path: Path, method: str) -> None:
    async def main() -> None:
        inner = BoundedFile(image_bytes(tmp_path / "a"))
        file = FaultFile(inner)
        image = await opened(file)
        await image.write(64 << 10, b"x" * 4096)
        file.fail(method, errno.EIO)
        with pytest.raises(ImageFailed):
            await image.flush()
        file.heal()
        before = bytes(inner.content)
        with pytest.raises(ImageFailed):
            await image.write(128 << 10, b"x")
        with pytest.raises(ImageFailed):
            await image.close()
        assert inner.content == before
        assert check(tmp_path / "after", before) in (0, 3)

    asyncio.run(main())


def test_new_table_is_written_whole_over_what_was_there(tmp_path: Path) -> None:
    """A table of 16 KiB is in memory in four parts, and what was freed could not be punched."""
    path = tmp_path / "a"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=16k", str(path), "128M"]
    subprocess.run(create, check=True)

    async def main() -> bytes:
        inner = BoundedFile(path.read_bytes())
        file = FaultFile(inner)
        file.unsupported.add("punch")
        image = await opened(file)
        await image.write(0, b"\xff" * 16384)
        await image.flush()
        await image.trim(0, 16384)
        await image.flush()
        assert b"\xff" * 16384 in inner.content
        await image.write(64 << 20, b"x" * 16384)
        await image.close()
        assert b"\xff" * 4096 not in inner.content
        return bytes(inner.content)

    assert check(tmp_path / "after", asyncio.run(main())) == 0


def test_corruption_found_behind_the_last_flush_is_marked_by_the_close(tmp_path: Path) -> None:
    """Two entries of one cluster with one count: it is counted down once and cannot be again."""
    content = bytearray(image_bytes(tmp_path / "a"))
    struct.pack_into(">Q", content, 0x4010, 1 << 63 | 0x5000)

    async def main() -> None:
        file = LoggedFile(bytes(content))
        image = await opened(file)
        await image.trim(0, 4096)
        await image.trim(8192, 4096)
        await image.flush()
        assert file.content[72:80] == struct.pack(">Q", 0)
        await image.close()
        assert file.content[72:80] == struct.pack(">Q", 2)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ("cluster_size=4k,compat=0.10", ["space", "|"]),
        ("cluster_size=4k,compat=1.1", ["space", "|", "header", "|"]),
    ],
    ids=["version 2", "version 3"],
)
def test_flush_behind_corruption_makes_writes_in_place_durable_before_the_mark(
    tmp_path: Path, options: str, order: list[str]
) -> None:
    """No metadata is written any more, but what has its place still gets there."""
    content = bytearray(image_bytes(tmp_path / "a", options))
    struct.pack_into(">Q", content, 0x4010, 0xF00)

    async def main() -> None:
        file = LoggedFile(bytes(content))
        image = await opened(file)
        with pytest.raises(CorruptImage):
            await image.write(8192, b"x" * 4096)
        await image.write(0, b"y" * 4096)
        await image.flush()
        assert file.log == order

    asyncio.run(main())


def test_data_write_that_fails_gives_its_clusters_back(tmp_path: Path) -> None:
    async def main() -> bytes:
        inner = BoundedFile(image_bytes(tmp_path / "a"))
        file = FaultFile(inner, slow_only=True)
        image = await opened(file)
        file.fail("pwrite", errno.ENOSPC)
        for _ in range(20):
            with pytest.raises(OSError, match="No space left"):
                await image.write(64 << 10, b"x" * 65536)
        file.heal()
        await image.close()
        return bytes(inner.content)

    content = asyncio.run(main())
    assert check(tmp_path / "after", content) == 0
    assert len(content) < 64 << 10


def test_strained_tables_are_flushed_on_the_way(tmp_path: Path) -> None:
    """512-byte clusters: writing far apart changes more tables than may wait."""
    content = image_bytes(tmp_path / "a", "cluster_size=512", is_written=False)

    async def main() -> bytes:
        file = LoggedFile(content)
        image = await opened(file)
        image.driver.mapping.cache._slices_max = 64  # type: ignore[attr-defined]
        for offset in range(0, 4 << 20, 32 << 10):
            await image.write(offset, struct.pack(">Q", offset) * 64)
        assert file.log.count("|") > 4
        assert len(image.driver.mapping.cache.slices) < 80  # type: ignore[attr-defined]
        for offset in range(0, 4 << 20, 32 << 10):
            view = memoryview(bytearray(512))
            await image.read(offset, view)
            assert bytes(view) == struct.pack(">Q", offset) * 64
        await image.close()
        return bytes(file.content)

    assert check(tmp_path / "after", asyncio.run(main())) == 0


def test_lazy_refcounts_whose_table_moves_do_not_wait(tmp_path: Path) -> None:
    """Q5, Q6: the table's old place is given up, and on disk the header must not name guest data."""
    content = image_bytes(tmp_path / "a", "cluster_size=512,refcount_bits=64,lazy_refcounts=on")

    async def main() -> None:
        file = BoundedFile(content)
        image = await open_file(file, "qcow2", OpenOptions(AnyGate(b""), writable=True))
        assert isinstance(image.driver, Qcow2Driver)
        header = image.driver.header
        offset, before = 0, header.refcount_table_offset
        while header.refcount_table_offset == before:
            await image.write(offset, b"x" * 65536)
            offset += 65536
        await image.flush()
        assert file.content[48:56] == struct.pack(">Q", header.refcount_table_offset)
        assert header.is_dirty

    asyncio.run(main())
