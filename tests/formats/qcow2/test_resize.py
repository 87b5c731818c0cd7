"""Another size for a qcow2 image: what the disk reads as, what becomes of the file, what is refused.

Images are made, judged and read by qemu's tools. Crashes: tests/crash.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdimg.errors import ConfigError, CorruptImage, ImageError, UnsupportedFeature
from nbdimg.formats import RESIZERS, open_file, open_image, resize_image
from nbdimg.formats.gate import DenyGate
from nbdimg.formats.options import OpenOptions
from nbdimg.formats.qcow2 import bitmaps, resize
from nbdimg.formats.qcow2.check import check
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.formats.qcow2.open import read_header
from nbdimg.image.image import Image
from nbdimg.storage.memory import MemoryFile
from nbdimg.storage.ordering import Plan
from nbdimg.storage.posix import PosixFile
from nbdimg.units import GiB, KiB, MiB, TiB
from tests.crash import qcow2 as scenarios
from tests.formats.qcow2.test_faults import FullFile
from tests.support.crash import run_now
from tests.support.faultfile import FaultFile, os_error
from tests.support.qcow2edit import Edit, QemuReport, make_luks, qemu_check, qemu_img, qemu_io
from tests.support.qcow2mutants import AnyGate
from tests.support.reading import read_all
from tests.support.turns import Turns

SEED = 20260131


def resized(path: Path, *sizes: int, key: bytes | None = None) -> None:
    """Open, give each size in turn, close."""

    async def run() -> None:
        image = await open_image(path, key=key, is_keyless=True)
        try:
            for size in sizes:
                await resize_image(image, size, may_shrink=True)
                assert image.size == size
        finally:
            await image.close()

    asyncio.run(run())


def guest(path: Path, *options: str) -> bytes:
    """What qemu reads."""
    raw = path.with_suffix(".guest")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", *options, path, raw)
    content = raw.read_bytes()
    raw.unlink()
    return content


def read(path: Path) -> bytes:
    """What we read."""

    async def run() -> bytes:
        image = await open_image(path, writable=False)
        try:
            return await read_all(image)
        finally:
            await image.close()

    return asyncio.run(run())


def assert_is(path: Path, expected: bytes) -> None:
    """The disk holds this, for us and for qemu, and the image is sound."""
    qemu_img("check", "-q", path)
    assert guest(path) == expected
    assert read(path) == expected


def made(path: Path, options: str, size: int, *more: str) -> bytes:
    """A new image with random data in places; returns what its disk reads as."""
    rng = random.Random(f"{SEED} {options}")
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, *more, path, str(size))
    raw = path.with_suffix(".piece")
    raw.write_bytes(rng.randbytes(size))
    writes = []
    for _ in range(6):
        start = rng.randrange(size // 512) * 512
        length = min(size - start, rng.randrange(1, size // 1024) * 512)
        writes.append(f"write -q -s {raw} {start} {length}")
    qemu_io(path, *writes)
    return guest(path)


KINDS = [
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=64k",
    "compat=0.10,cluster_size=1k",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=1k,lazy_refcounts=on",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=1k,refcount_bits=1",
    "cluster_size=4k,preallocation=metadata",
]
SIZES = (MiB + 512, 3 * MiB, 700 * KiB + 512, 5 * MiB, MiB, 300032, 512, 0, 2 * MiB)


@pytest.mark.parametrize("options", KINDS)
def test_resize_keeps_what_stays_and_adds_zeroes(tmp_path: Path, options: str) -> None:
    path = tmp_path / "a.qcow2"
    expected = made(path, options, MiB)
    for size in SIZES:
        resized(path, size)
        expected = expected[:size].ljust(size, b"\0")
        assert_is(path, expected)


def test_resize_goes_on_with_the_new_size_without_reopening(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    content = bytearray(made(path, "cluster_size=512", MiB))

    async def run() -> None:
        image = await open_image(path)
        for size, offset in ((8 * MiB, 7 * MiB), (2 * MiB, MiB + 700), (9 * MiB, 8 * MiB - 100)):
            await resize_image(image, size, may_shrink=True)
            content[size:] = b""
            content.extend(bytes(size - len(content)))
            await image.write(offset, b"x" * 5000)
            content[offset : offset + 5000] = b"x" * 5000
            assert await read_all(image) == content
        await image.close()

    asyncio.run(run())
    assert_is(path, bytes(content))


@pytest.mark.parametrize("size", [64 * TiB, 2 * GiB])
def test_grow_to_a_large_size_makes_one_table_and_no_more(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    before = path.stat().st_size
    resized(path, size)
    assert path.stat().st_size - before <= 2 * MiB
    assert qemu_check(path).exit_status == 0
    resized(path, MiB)
    assert qemu_check(path).exit_status == 0


def test_resize_beyond_what_the_format_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "1M")
    resized(path, 128 * GiB)
    assert qemu_check(path).exit_status == 0
    with pytest.raises(ConfigError, match=f"expected 0 to {128 * GiB} with clusters of 512"):
        resized(path, 128 * GiB + 512)
    with pytest.raises(ConfigError, match="size is 1000, expected a multiple of 512"):
        resized(path, 1000)


def test_shrink_gives_the_space_back(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "16M")
    qemu_io(path, "write -q -P 1 0 16M")
    before = path.stat().st_blocks * 512
    resized(path, 64 * KiB)
    assert before - path.stat().st_blocks * 512 > 15 * MiB
    assert qemu_check(path).allocated_clusters == 16
    qemu_io(path, "write -q -P 2 0 64k")
    assert_is(path, b"\2" * 64 * KiB)


def test_shrink_without_leave_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    made(path, "cluster_size=4k", MiB)
    before = path.read_bytes()

    async def run() -> None:
        image = await open_image(path)
        try:
            await resize_image(image, 512)
        finally:
            await image.close()

    with pytest.raises(ConfigError, match="from 1048576 to 512 bytes and lose what lies behind, which takes --shrink"):
        asyncio.run(run())
    assert path.read_bytes() == before


# What must not appear


@pytest.mark.parametrize("base", ["raw", "qcow2"])
@pytest.mark.parametrize(
    "options", ["cluster_size=4k", "compat=0.10,cluster_size=4k", "cluster_size=16k,extended_l2=on"]
)
def test_grow_over_a_longer_backing_file_hides_it(tmp_path: Path, options: str, base: str) -> None:
    below, path = tmp_path / "base", tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", base, below, "3000320")
    qemu_io(below, "write -q -P 1 0 3000320", options=("-f", base))
    expected = made(path, options, MiB + 1536, "-b", "base", "-F", base)
    resized(path, 2 * MiB)
    expected = expected.ljust(2 * MiB, b"\0")
    assert_is(path, expected)
    resized(path, 8 * MiB)
    assert_is(path, expected.ljust(8 * MiB, b"\0"))


class BarrierFile(MemoryFile):
    """Keeps what it holds at each barrier."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.durable: list[bytes] = []

    async def fdatasync(self) -> None:
        self.durable.append(bytes(self.content))


def test_grow_that_flushes_on_the_way_keeps_the_disk_at_every_barrier(tmp_path: Path) -> None:
    """Q5, Q6: the old L1 table goes only behind the header that names the new one."""
    path, base = tmp_path / "disk", tmp_path / "base"
    base.write_bytes(b"B" * 4 * MiB)
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "-b", base, "-F", "raw", path, "64k")
    qemu_io(path, "write -q -P 1 0 32k")
    before = b"\1" * 32 * KiB + b"B" * 32 * KiB

    async def run() -> None:
        file = BarrierFile(path.read_bytes())
        image = await open_file(file, "qcow2", OpenOptions(AnyGate(base.read_bytes()), writable=True))
        assert isinstance(image.driver, Qcow2Driver)
        image.driver.mapping.cache._slices_max = 8
        await resize_image(image, 4 * MiB)
        assert len(file.durable) > 40
        for content in file.durable[::4]:
            left = await open_file(MemoryFile(content), "qcow2", OpenOptions(AnyGate(base.read_bytes())))
            assert (await read_all(left))[: 64 * KiB] == before
        assert await read_all(image) == before.ljust(4 * MiB, b"\0")
        await image.close()

    asyncio.run(run())


def test_shrink_over_a_backing_file_allocates_nothing_for_what_goes(tmp_path: Path) -> None:
    below, path = tmp_path / "base", tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "raw", below, "64M")
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", "base", "-F", "raw", path)
    before = path.stat().st_size
    resized(path, MiB)
    assert path.stat().st_size == before
    assert_is(path, bytes(MiB))


def stale_last_cluster(path: Path) -> None:
    """The last cluster has bytes behind the end of the disk, as a shrinking qemu-img leaves them."""
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=64k", path, "256k")
    qemu_io(path, "write -q -P 7 0 256k")
    qemu_img("resize", "-q", "--shrink", path, "150016")


def stale_tables(path: Path) -> None:
    """L1 and L2 tables map what lies behind the end, as a crash while shrinking leaves them."""
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "256k")
    qemu_io(path, "write -q -P 7 0 256k")
    Edit(path).put(24, 150016)


@pytest.mark.parametrize("make", [stale_last_cluster, stale_tables])
def test_grow_zeroes_what_lies_behind_the_end(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "a.qcow2"
    make(path)
    resized(path, 256 * KiB)
    assert_is(path, b"\7" * 150016 + bytes(256 * KiB - 150016))


@pytest.mark.parametrize("make", [stale_last_cluster, stale_tables])
def test_control_a_new_size_in_the_header_alone_shows_what_lies_behind(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "a.qcow2"
    make(path)
    Edit(path).put(24, 256 * KiB)
    assert guest(path)[150016:].count(7) > 0


def test_resize_to_the_same_size_frees_what_lies_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    stale_tables(path)
    before = path.stat().st_blocks
    resized(path, 150016)
    assert before - path.stat().st_blocks > 80 * KiB // 512
    assert_is(path, b"\7" * 150016)


def test_shrink_leaves_nothing_for_qemu_to_show(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "256k")
    qemu_io(path, "write -q -P 7 0 256k")
    resized(path, 150016)
    qemu_img("resize", "-q", path, "256k")
    assert_is(path, b"\7" * 150016 + bytes(256 * KiB - 150016))


def test_shrink_within_a_cluster_of_subclusters_leaves_nothing_for_qemu_to_show(tmp_path: Path) -> None:
    """The first subcluster behind the new end has nothing, a later one of the same cluster has data."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=64k", path, "192k")
    qemu_io(path, "write -q -P 6 130k 512", "write -q -P 7 170k 2k")
    resized(path, 140 * KiB)
    qemu_img("resize", "-q", path, "192k")
    assert_is(path, bytes(130 * KiB) + bytes([6]) * 512 + bytes(62 * KiB - 512))


# Snapshots, bitmaps, compression, encryption, data files


@pytest.mark.parametrize("options", ["cluster_size=512", "cluster_size=16k,extended_l2=on"])
def test_resize_with_snapshots_keeps_them(tmp_path: Path, options: str) -> None:
    path = tmp_path / "a.qcow2"
    before = made(path, options, MiB)
    qemu_img("snapshot", "-c", "one", path)
    qemu_io(path, "write -q -P 9 100k 300k")
    now = guest(path)
    for size in (200 * KiB + 512, 4 * MiB, 512):
        resized(path, size)
        now = now[:size].ljust(size, b"\0")
        assert_is(path, now)
        qemu_img("convert", "-l", "snapshot.name=one", "-O", "raw", path, tmp_path / "one")
        kept = (tmp_path / "one").read_bytes()
        assert kept[: min(size, MiB)] == before[:size]
    qemu_img("snapshot", "-a", "one", path)
    assert_is(path, before)


def test_resize_of_version_2_with_snapshots_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    made(path, "compat=0.10", MiB)
    qemu_img("snapshot", "-c", "one", path)
    assert "v2 image which has snapshots" in qemu_img("resize", "-q", path, "2M", ok=(1,)).stderr
    with pytest.raises(UnsupportedFeature, match="an image with snapshots keeps its size"):
        resized(path, 2 * MiB)


@pytest.mark.parametrize("size", [4 * MiB, 300032])
def test_resize_with_bitmaps_keeps_them_consistent(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.qcow2"
    content = made(path, "cluster_size=4k", MiB)
    qemu_img("bitmap", "--add", "-g", "512", path, "fine")
    qemu_img("bitmap", "--add", "--disable", "-g", "64k", path, "idle")
    resized(path, size)
    assert_is(path, content[:size].ljust(size, b"\0"))
    listed = qemu_img("info", path).stdout
    assert listed.count(" name: ") == 2
    assert "in-use" not in listed
    qemu_img("bitmap", "--merge", "idle", path, "fine")


def test_disk_that_was_once_longer_is_dirty_in_all_bitmaps_from_where_it_ended(tmp_path: Path) -> None:
    """They were clean there, and a backup of before would have kept what the disk no longer has."""
    path = tmp_path / "a.qcow2"
    made(path, "cluster_size=4k", MiB)
    qemu_img("bitmap", "--add", "-g", "4k", path, "monday")
    qemu_img("bitmap", "--add", "--disable", "-g", "64k", path, "idle")
    resized(path, 256 * KiB)
    resized(path, 512 * KiB)

    async def run(name: str) -> list[tuple[int, bool]]:
        image = await open_image(path, writable=False)
        found = list((await image.bitmap(name)).runs(0, image.size))
        await image.close()
        return found

    for name in ("monday", "idle"):
        assert asyncio.run(run(name)) == [(256 * KiB, False), (256 * KiB, True)]


def test_resize_with_an_inconsistent_bitmap_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_img("bitmap", "--add", path, "lost")
    edit = Edit(path)
    directory = edit.get(edit.extension(0x23852875) + 16)
    edit.put(directory + 12, edit.get(directory + 12, 4) | 1, 4)
    assert "inconsistent" in qemu_img("resize", "-q", path, "2M", ok=(1,)).stderr
    with pytest.raises(UnsupportedFeature, match=r"bitmap 'lost' is inconsistent .*: remove it first"):
        resized(path, 2 * MiB)
    assert edit.get(24) == MiB


@pytest.mark.parametrize(
    ("names", "size", "message"),
    [
        (["b0"], 2 * TiB + 64 * KiB, "bitmap 'b0' of granularity 512 would take 536870928 bytes with a disk of"),
        (["b0"], 1 << 50, "bitmap 'b0' of granularity 512 would take 274877906944 bytes with a disk of"),
        (["b0", "b1"], 3 * TiB // 2, "its bitmaps would take 805306368 bytes of memory, allowed are 536870912"),
    ],
)
def test_disk_does_not_outgrow_what_its_bitmaps_may_take(
    tmp_path: Path, names: list[str], size: int, message: str
) -> None:
    """No program would open it any more, or none to write."""
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    for name in names:
        qemu_img("bitmap", "--add", "-g", "512", path, name)
    before = path.read_bytes()
    with pytest.raises(UnsupportedFeature, match=message):
        resized(path, size)
    assert path.read_bytes() == before


def test_disk_does_not_outgrow_what_the_tables_of_its_bitmaps_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has 32 entries at 64 MiB."""
    monkeypatch.setattr(bitmaps, "TABLE_BYTES_MAX", 8 * 95)
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "1M")
    for name in ("b0", "b1", "b2"):
        qemu_img("bitmap", "--add", "-g", "512", path, name)
    with pytest.raises(UnsupportedFeature, match="bitmap 'b2' of granularity 512 would take 16384 bytes"):
        resized(path, 64 * MiB)
    resized(path, 63 * MiB // 2)


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_resize_within_a_compressed_cluster(tmp_path: Path, kind: str) -> None:
    path, raw = tmp_path / "a.qcow2", tmp_path / "raw"
    content = b"".join(bytes([n % 251]) * 512 for n in range(2048))
    raw.write_bytes(content)
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={kind}", raw, path)
    resized(path, 500224)
    assert_is(path, content[:500224])
    resized(path, MiB)
    assert_is(path, content[:500224].ljust(MiB, b"\0"))


def test_resize_of_an_encrypted_image_needs_no_key_at_cluster_boundaries(tmp_path: Path) -> None:
    path, raw = tmp_path / "a.qcow2", tmp_path / "raw"
    image = make_luks(path, MiB, "write -q -P 5 0 1M")
    resized(path, 3 * MiB, 512 * KiB, 2 * MiB)
    qemu_img("convert", "-O", "raw", *image, raw)
    assert raw.read_bytes() == b"\5" * 512 * KiB + bytes(2 * MiB - 512 * KiB)
    assert qemu_check(path).exit_status == 0


def test_resize_of_an_encrypted_image_within_a_cluster_needs_its_key(tmp_path: Path) -> None:
    path, raw = tmp_path / "a.qcow2", tmp_path / "raw"
    image = make_luks(path, 100 * KiB, "write -q -P 5 0 100k")
    for size in (MiB, 50 * KiB):
        with pytest.raises(ConfigError, match="it is encrypted, and no key file was given for it"):
            resized(path, size)
        assert Edit(path).get(24) == 100 * KiB
    assert qemu_check(path).exit_status == 0
    resized(path, 50 * KiB, MiB, key=b"key")
    qemu_img("convert", "-O", "raw", *image, raw)
    assert raw.read_bytes() == b"\5" * 50 * KiB + bytes(MiB - 50 * KiB)
    assert qemu_check(path).exit_status == 0


@pytest.mark.parametrize("is_raw", [False, True])
@pytest.mark.parametrize("cluster", ["cluster_size=4k", "cluster_size=16k,extended_l2=on"])
def test_resize_with_a_data_file_resizes_that_too(tmp_path: Path, cluster: str, is_raw: bool) -> None:
    path, data = tmp_path / "a.qcow2", tmp_path / "d"
    qemu_img(
        *("create", "-q", "-f", "qcow2", "-o", f"{cluster},data_file={data},data_file_raw={'on' if is_raw else 'off'}"),
        *(path, "300032"),
    )
    qemu_io(path, "write -q -P 3 0 300032")
    content = b"\3" * 300032
    for size in (MiB, 150016, 2 * MiB, 0, 64 * KiB):
        resized(path, size)
        content = content[:size].ljust(size, b"\0")
        assert_is(path, content)
        if size:
            assert data.stat().st_size == size
        if is_raw:
            assert data.read_bytes() == content


def test_grow_with_a_longer_data_file_hides_what_it_has(tmp_path: Path) -> None:
    path, data = tmp_path / "a.qcow2", tmp_path / "d"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", path, "128k")
    with data.open("ab") as file:
        file.write(b"x" * 128 * KiB)
    resized(path, 192 * KiB)
    assert_is(path, bytes(192 * KiB))


def test_grow_of_an_encrypted_raw_data_file_adds_zeroes_and_no_noise(tmp_path: Path) -> None:
    path, data, raw = tmp_path / "a.qcow2", tmp_path / "d", tmp_path / "raw"
    options = f"cluster_size=4k,data_file={data},data_file_raw=on"
    image = make_luks(path, 64 * KiB, "write -q -P 5 0 64k", options=options)
    with pytest.raises(ConfigError, match="it is encrypted, and no key file was given for it"):
        resized(path, 128 * KiB)
    resized(path, 128 * KiB, key=b"key")
    qemu_img("convert", "-O", "raw", *image, raw)
    assert raw.read_bytes() == b"\5" * 64 * KiB + bytes(64 * KiB)
    assert qemu_check(path).exit_status == 0


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("cluster_size=4k", (MiB, 30 * KiB + 512)),
        ("cluster_size=64k,extended_l2=on", (MiB, 20 * KiB + 512)),
        ("cluster_size=4k,data_file={data}", (MiB, 30 * KiB)),
        ("cluster_size=4k,data_file={data},data_file_raw=on", (MiB, 66 * KiB, 30 * KiB)),
    ],
)
def test_resize_that_wants_a_key_changes_nothing_without_it(
    tmp_path: Path, options: str, wanted: tuple[int, ...]
) -> None:
    path, data = tmp_path / "a.qcow2", tmp_path / "d"
    image = make_luks(path, 66048, "write -q -P 5 0 66048", options=options.format(data=data))
    qemu_img("bitmap", "--add", *image, "dirty")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for size in wanted:
        with pytest.raises(ConfigError, match=r"a\.qcow2: it is encrypted, and no key file was given for it"):
            resized(path, size)
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("compat", "old"), [("1.1", 100 * KiB), ("0.10", 128 * KiB)])
def test_resize_that_wants_a_backing_files_key_changes_nothing_without_it(
    tmp_path: Path, compat: str, old: int
) -> None:
    path, base = tmp_path / "a.qcow2", tmp_path / "base"
    make_luks(base, MiB, "write -q -P 5 0 1M")
    over = ("-f", "qcow2", "-o", f"compat={compat}", "-b", "base", "-F", "qcow2")
    qemu_img("create", "-q", "-u", *over, path, str(old))
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", tmp_path / "top", str(old + 512))
    for image in (path, tmp_path / "top"):
        before = image.read_bytes()
        with pytest.raises(ConfigError, match="base: it is encrypted, and no key file was given for it"):
            resized(image, MiB)
        assert image.read_bytes() == before


def test_resize_at_cluster_boundaries_needs_no_key_of_a_backing_file(tmp_path: Path) -> None:
    path, base = tmp_path / "a.qcow2", tmp_path / "base"
    make_luks(base, MiB, "write -q -P 5 0 1M")
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "base", "-F", "qcow2", path, str(128 * KiB))
    resized(path, 192 * KiB, 64 * KiB, 2 * MiB)
    assert Edit(path).get(24) == 2 * MiB


# Failures


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_grow_without_space_keeps_the_old_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    path = tmp_path / "a.qcow2"
    content = made(path, "cluster_size=512", MiB)
    write = PosixFile._pwrite
    is_full = True

    def full(file: PosixFile, offset: int, view: memoryview) -> None:
        if is_full:
            raise os_error(number)
        write(file, offset, view)

    async def run() -> None:
        nonlocal is_full
        image = await open_image(path)
        monkeypatch.setattr(PosixFile, "_pwrite", full)
        with pytest.raises(OSError, match=os.strerror(number)):
            await resize_image(image, 64 * MiB)
        assert image.size == MiB
        is_full = False
        await image.write(0, b"y" * 512)
        await image.flush()
        assert image.size == MiB
        await resize_image(image, 3 * MiB)
        await image.close()

    asyncio.run(run())
    assert_is(path, (b"y" * 512 + content[512:]).ljust(3 * MiB, b"\0"))


def test_grow_without_space_for_its_l1_table_keeps_the_bitmaps_at_the_old_size(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    content = made(path, "cluster_size=512", MiB)
    qemu_img("bitmap", "--add", "-g", "512", path, "monday")

    async def run() -> None:
        image = await open_image(path)
        driver = image.driver
        assert isinstance(driver, Qcow2Driver)
        assert driver.refcounts is not None
        clusters_max, driver.refcounts.clusters_max = driver.refcounts.clusters_max, 0
        with pytest.raises(OSError, match="may not grow"):
            await resize_image(image, 64 * MiB)
        driver.refcounts.clusters_max = clusters_max
        assert (await image.bitmap("monday")).size == image.size == MiB
        await image.close()

    asyncio.run(run())
    assert_is(path, content)
    assert qemu_img("info", path).stdout.count(" name: monday") == 1


def test_grow_that_finds_no_space_for_its_l1_table_until_the_end_leaks_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    made(path, "cluster_size=512", MiB)
    qemu_img("bitmap", "--add", "-g", "512", path, "monday")

    async def run() -> None:
        file = FullFile(MemoryFile(path.read_bytes()), slow_only=True)
        image = await open_file(file, "qcow2", OpenOptions(DenyGate(), writable=True))
        file.capacity = file.size
        with pytest.raises(OSError, match="No space"):
            await resize_image(image, 64 * MiB)
        await image.close()
        report = await check(file, await read_header(file))
        assert (report.leaks, report.corruptions) == (0, 0)

    asyncio.run(run())


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=16k,extended_l2=on"])
def test_shrink_within_a_cluster_that_finds_no_space_leaves_what_lies_behind(tmp_path: Path, options: str) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "1M")
    qemu_img("bitmap", "--add", "-g", "512", path, "monday")
    qemu_io(path, "write -q -P 7 0 1M")

    async def run() -> None:
        file = FullFile(MemoryFile(path.read_bytes()), slow_only=True)
        image = await open_file(file, "qcow2", OpenOptions(DenyGate(), writable=True))
        file.capacity = file.size
        with pytest.raises(OSError, match="No space"):
            await resize_image(image, 700 * KiB + 512, may_shrink=True)
        assert await read_all(image) == b"\7" * MiB
        await image.close()
        left = await open_file(file, "qcow2", OpenOptions(DenyGate()))
        assert await read_all(left) == b"\7" * MiB
        assert list((await left.bitmap("monday")).runs(0, MiB)) == [(MiB, True)]

    asyncio.run(run())


def test_shrink_within_a_shared_cluster_that_finds_no_space_leaves_an_image_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_io(path, "write -q -P 7 0 1M")
    qemu_img("snapshot", "-c", "one", path)
    qemu_io(path, "write -q -P 7 0 512")

    async def run() -> None:
        file = FullFile(MemoryFile(path.read_bytes()), slow_only=True)
        image = await open_file(file, "qcow2", OpenOptions(DenyGate(), writable=True))
        file.capacity = file.size
        with pytest.raises(OSError, match="No space"):
            await resize_image(image, 700 * KiB, may_shrink=True)
        await image.write(0, b"x" * 512)
        assert await read_all(image) == b"x" * 512 + b"\7" * (MiB - 512)
        await image.close()
        assert (await check(file, await read_header(file))).exit_status == 0

    asyncio.run(run())


def test_shrink_that_cannot_put_back_what_it_zeroed_fails_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_io(path, "write -q -P 7 0 1M")

    async def run() -> None:
        file = FaultFile(MemoryFile(path.read_bytes()), slow_only=True)
        image = await open_file(file, "qcow2", OpenOptions(DenyGate(), writable=True))

        async def failing(*_: object) -> None:
            file.fail("pwrite", errno.EIO)
            raise os_error(errno.EIO)

        monkeypatch.setattr(resize, "_resize_bitmaps", failing)
        with pytest.raises(OSError, match="Input/output error"):
            await resize_image(image, 700 * KiB, may_shrink=True)
        file.heal()
        with pytest.raises(ImageError, match="716800, zeroed for a resize that failed, cannot be put back"):
            await image.write(0, b"x")
        with pytest.raises(ImageError):
            await image.close()

    asyncio.run(run())


def test_grow_with_a_failed_barrier_fails_the_image_and_leaves_a_sound_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.qcow2"
    content = made(path, "cluster_size=512", MiB)

    async def fails(file: PosixFile) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async def run() -> None:
        image = await open_image(path)
        monkeypatch.setattr(PosixFile, "fdatasync", fails)
        for _ in range(2):
            with pytest.raises(ImageError, match="a flush failed"):
                await resize_image(image, 64 * MiB)
        assert image.size == MiB
        await image.driver.abandon()

    asyncio.run(run())
    found: QemuReport = qemu_check(path)
    assert found.exit_status in (0, 3)
    assert guest(path) == content


def test_shrink_that_cannot_read_what_goes_fails_by_saying_that_the_disk_has_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "256k")
    qemu_io(path, "write -q -P 7 0 256k")
    last_table = Edit(path).l2(7)
    pread = PosixFile._pread

    def unreadable(file: PosixFile, offset: int, view: memoryview) -> None:
        if offset == last_table:
            raise OSError(errno.EIO, "Input/output error")
        pread(file, offset, view)

    async def run() -> None:
        image = await open_image(path)
        with monkeypatch.context() as patched:
            patched.setattr(PosixFile, "try_pread", lambda file, offset, view: False)
            patched.setattr(PosixFile, "_pread", unreadable)
            with pytest.raises(OSError, match=r"the disk has 131072 bytes now, but the space .*Input"):
                await resize_image(image, 128 * KiB, may_shrink=True)
        assert image.size == 128 * KiB
        await image.write(0, b"\7" * 512)
        await image.flush()
        await resize_image(image, 128 * KiB)
        await image.close()

    asyncio.run(run())
    assert_is(path, b"\7" * 128 * KiB)


def test_shrink_whose_data_file_keeps_its_length_fails_by_saying_that_the_disk_has_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = tmp_path / "a.qcow2", tmp_path / "d"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", path, "256k")

    async def fails(file: PosixFile, size: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(PosixFile, "truncate", fails)
        with pytest.raises(OSError, match="the disk has 131072 bytes now, but the space"):
            resized(path, 128 * KiB)
    assert_is(path, bytes(128 * KiB))


@pytest.mark.parametrize(
    ("index", "value"), [(0, 1 << 63 | 0x1234567), (0, 1 << 63 | 7 << 40), (900, 1 << 63 | 0x200 | 2), (900, 3 << 62)]
)
def test_shrink_of_malformed_tables_is_refused_and_frees_nothing_below(tmp_path: Path, index: int, value: int) -> None:
    """L1 entries by number below 100, L2 entries of the last table above."""
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "256k")
    qemu_io(path, "write -q -P 7 0 256k")
    edit = Edit(path)
    edit.put(edit.l1 + 8 * 7 if index < 100 else edit.l2(7) + 8 * 3, value)
    with pytest.raises(CorruptImage, match=r"entry .* is 0x"):
        resized(path, 128 * KiB)
    assert edit.get(72) & 2
    assert read(path)[: 128 * KiB] == b"\7" * 128 * KiB


def test_resize_of_an_image_that_names_an_l2_table_twice_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "256k")
    qemu_io(path, "write -q -P 7 0 64k")
    edit = Edit(path)
    edit.put(edit.l1 + 8 * 6, edit.l2(1))
    before = path.read_bytes()
    with pytest.raises(CorruptImage, match=r"L1 entry 6 is .*, expected an L2 table that no entry before it names"):
        resized(path, 32 * KiB)
    assert path.read_bytes() == before


# Crashes: the campaign is in tests/crash, here is what it must find


def crashed(name: str) -> set[str]:
    """Kinds of violations that 300 crashes of a scenario show."""
    return set(
        run_now(
            next(each for each in scenarios.SCENARIOS if each.name == f"qcow2, {name}"), seed=SEED, states=300
        ).violations
    )


def header_first(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Qcow2Driver.flush_plan

    def changed(driver: Qcow2Driver) -> Plan:
        is_first = driver._has_new_size
        stages = plan(driver).stages
        return Plan((stages[-1], *stages[:-1])) if is_first else Plan(stages)

    monkeypatch.setattr(Qcow2Driver, "flush_plan", changed)


def nothing_is_zeroed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def changed(image: Image, size: int, *, progress: resize.Progress | None = None) -> None:
        async def nothing(*arguments: object, **options: object) -> None:
            pass

        with monkeypatch.context() as patch:
            patch.setattr(image, "zero", nothing)
            await resize.resize(image, size)

    monkeypatch.setitem(RESIZERS, "qcow2", changed)


def forgotten_before_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    async def changed(image: Image, size: int, *, progress: resize.Progress | None = None) -> None:
        driver = image.driver
        assert isinstance(driver, Qcow2Driver)
        old = driver.size
        driver.size = driver.mapping.size = min(old, size)
        await resize._forget(image, driver, None)
        driver.size = driver.mapping.size = old
        await resize.resize(image, size)

    monkeypatch.setitem(RESIZERS, "qcow2", changed)


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (header_first, "resize, L1 grows"),
        (nothing_is_zeroed, "resize over a backing file"),
        (forgotten_before_the_header, "resize over a backing file"),
    ],
)
def test_control_fault_is_found_by_crashes(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None], name: str
) -> None:
    fault(monkeypatch)
    assert crashed(name)


def test_cluster_cut_in_two_reads_as_zeroes_when_the_disk_grows_again(tmp_path: Path) -> None:
    """Its end is longer than one write of zeroes."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", path, "4M")
    qemu_io(path, "write -P 7 0 4M")
    resized(path, 2 * MiB + 512 * KiB, 4 * MiB)
    assert guest(path) == bytes([7]) * (2 * MiB + 512 * KiB) + bytes(1536 * KiB)


def test_disk_with_bitmaps_is_not_made_empty(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_img("bitmap", "--add", path, "monday")
    with pytest.raises(UnsupportedFeature, match="a disk of size 0 has no bitmaps: remove them first"):
        resized(path, 0)
    assert len(guest(path)) == MiB


def test_shrink_gives_others_their_turn_behind_each_table(tmp_path: Path) -> None:
    """64 L2 tables of a disk of 2 MiB, whose clusters have 512 bytes, all in memory."""

    async def run() -> None:
        qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", tmp_path / "disk", "2M")
        file = MemoryFile((tmp_path / "disk").read_bytes())
        image = await open_file(file, "qcow2", OpenOptions(AnyGate(b""), writable=True))
        await image.write(0, b"x" * 2 * MiB)
        await image.flush()
        async with Turns() as turns:
            await resize_image(image, 512, may_shrink=True)
        assert turns.count > 64
        await image.close()

    asyncio.run(run())
