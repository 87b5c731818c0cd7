"""Opening: feature bits, what comes before the first write, references, snapshots."""

from __future__ import annotations

import asyncio
import os
import struct
import subprocess
from pathlib import Path

import pytest

from nbdimg.errors import ConfigError, CorruptImage, ImageError, ImageLocked, UnsupportedFeature
from nbdimg.formats import open_file, open_image
from nbdimg.formats.gate import DenyGate
from nbdimg.formats.keys import Keys
from nbdimg.formats.options import OpenOptions
from nbdimg.formats.qcow2 import luks
from nbdimg.formats.qcow2.create import create as create_qcow2
from nbdimg.formats.qcow2.create_options import CreateOptions
from nbdimg.storage.file import Buffer
from nbdimg.storage.memory import MemoryFile
from tests.support.qcow2mutants import AnyGate

SIZE = 64 << 10


def qemu(*arguments: str | Path) -> None:
    subprocess.run([str(each) for each in arguments], check=True, capture_output=True)


def create(path: Path, options: str = "cluster_size=4k", *more: str) -> bytes:
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *more, path, str(SIZE))
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 8k", path)
    return path.read_bytes()


def poke(path: Path, offset: int, value: int, size: int = 8) -> bytes:
    content = bytearray(path.read_bytes())
    content[offset : offset + size] = value.to_bytes(size, "big")
    path.write_bytes(content)
    return bytes(content)


def field(path: Path, offset: int) -> int:
    return int(struct.unpack_from(">Q", path.read_bytes(), offset)[0])


async def open_and_close(path: Path, *, writable: bool, work: bytes = b"", key: bytes | None = None) -> None:
    image = await open_image(path, format="qcow2", writable=writable, key=key)
    try:
        if work:
            await image.write(32 << 10, work)
        view = memoryview(bytearray(4096))
        await image.read(0, view)
        assert bytes(view) == b"\7" * 4096
    finally:
        await image.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    create(tmp_path / "disk.qcow2")
    return tmp_path / "disk.qcow2"


def test_corrupt_image_is_read_and_never_written(path: Path) -> None:
    content = poke(path, 72, 2)
    asyncio.run(open_and_close(path, writable=False))
    with pytest.raises(CorruptImage, match=r"it is marked corrupt .*: repair it, or open it read-only"):
        asyncio.run(open_and_close(path, writable=True))
    assert path.read_bytes() == content


def test_dirty_image_is_read_as_it_is_and_repaired_before_it_is_written(path: Path) -> None:
    """A cluster's count is too low, as lazy refcounts leave it."""
    poke(path, 72, 1)
    content = poke(path, 0x2000 + 2 * 5, 0, 2)
    asyncio.run(open_and_close(path, writable=False))
    assert path.read_bytes() == content
    asyncio.run(open_and_close(path, writable=True, work=b"x" * 4096))
    assert field(path, 72) == 0
    qemu("qemu-img", "check", path)


def test_autoclear_bits_that_are_not_known_are_cleared_before_the_first_write_and_kept_read_only(path: Path) -> None:
    content = poke(path, 88, 1 << 40 | 1 << 2)
    asyncio.run(open_and_close(path, writable=False))
    assert path.read_bytes() == content

    class LoggedFile(MemoryFile):
        log: list[tuple[str, int]]

        async def pwrite(self, offset: int, data: Buffer) -> None:
            self.log.append(("write", offset))
            await super().pwrite(offset, data)

        async def fdatasync(self) -> None:
            self.log.append(("sync", 0))

    file = LoggedFile(content)
    file.log = []

    async def main() -> None:
        image = await open_file(file, "qcow2", OpenOptions(DenyGate(), writable=True))
        await image.write(32 << 10, b"x" * 4096)
        await image.close()

    asyncio.run(main())
    assert file.log[:2] == [("write", 88), ("sync", 0)]
    assert file.content[88:96] == bytes(8)


def test_compatible_bits_that_are_not_known_are_kept(path: Path) -> None:
    poke(path, 80, 1 << 33)
    asyncio.run(open_and_close(path, writable=True, work=b"x"))
    assert field(path, 80) == 1 << 33


def test_unknown_incompatible_feature_is_refused_by_qemus_name_for_it(tmp_path: Path) -> None:
    """64 KiB clusters: there QEMU writes its table of names; bit 3 is renamed to stand for one unknown here."""
    path = tmp_path / "disk.qcow2"
    content = create(path, "cluster_size=64k")
    at = content.index(b"\0\3compression type")
    path.write_bytes(content[: at + 1] + b"\x21" + content[at + 2 :])
    poke(path, 72, 1 << 0x21)
    for writable in (False, True):
        with pytest.raises(UnsupportedFeature, match="not known here: 'compression type'"):
            asyncio.run(open_and_close(path, writable=writable))


@pytest.mark.parametrize("missing", ["key", "right key", "data file", "backing file", "format of the backing file"])
def test_image_that_is_refused_is_not_repaired_before_and_nothing_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr(luks, "iterations_for", lambda *_: 1000)
    path = tmp_path / "disk.qcow2"
    options = CreateOptions(data_file_name="data", luks_passphrase=b"key", backing_name="base", backing_format="qcow2")
    create_qcow2(tmp_path / "base", SIZE)
    create_qcow2(path, SIZE, options)
    if missing == "format of the backing file":
        poke(path, path.read_bytes().index(struct.pack(">II", 0xE2792ACA, 5)), 0x12345678, 4)
    if missing in ("data file", "backing file"):
        (tmp_path / {"data file": "data", "backing file": "base"}[missing]).unlink()
    poke(path, 72, field(path, 72) | 1)
    content = poke(path, 88, 1 << 40)
    key = {"key": None, "right key": b"wrong"}.get(missing, b"key")
    descriptors = os.listdir("/proc/self/fd")
    with pytest.raises((ConfigError, ImageError), match=r"no key file|passphrase is wrong|data file|backing file"):
        asyncio.run(open_and_close(path, writable=True, key=key))
    assert path.read_bytes() == content
    assert os.listdir("/proc/self/fd") == descriptors


def test_backing_file_without_a_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    (tmp_path / "base.raw").write_bytes(bytes(SIZE))
    content = create(path, "cluster_size=4k", "-b", "base.raw", "-F", "raw")
    at = content.index(struct.pack(">II", 0xE2792ACA, 3))
    poke(path, at, 0x12345678, 4)
    with pytest.raises(UnsupportedFeature, match=r"backing file 'base.raw' has no format beside it, expected one"):
        asyncio.run(open_and_close(path, writable=False))


def test_backing_file_of_an_unknown_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    (tmp_path / "base.raw").write_bytes(bytes(SIZE))
    content = create(path, "cluster_size=4k", "-b", "base.raw", "-F", "raw")
    at = content.index(struct.pack(">II", 0xE2792ACA, 3)) + 8
    path.write_bytes(content[:at] + b"vdi" + content[at + 3 :])
    with pytest.raises(UnsupportedFeature, match=r"backing file 'base.raw' is of format 'vdi', known are raw, qcow2"):
        asyncio.run(open_and_close(path, writable=False))


def test_backing_file_is_never_probed(tmp_path: Path) -> None:
    """A raw backing file whose bytes are a qcow2 header is served as bytes."""
    (tmp_path / "base.raw").write_bytes(b"QFI\xfb" + bytes(SIZE - 4))
    path = tmp_path / "disk.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", path)

    async def main() -> bytes:
        image = await open_image(path, format="qcow2")
        view = memoryview(bytearray(8))
        await image.read(0, view)
        await image.close()
        return bytes(view)

    assert asyncio.run(main()) == b"QFI\xfb\0\0\0\0"


@pytest.mark.parametrize("kind", ["backing file", "external data file"])
def test_reference_that_the_gate_denies_is_refused_and_nothing_stays_open(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "disk.qcow2"
    if kind == "backing file":
        (tmp_path / "base.raw").write_bytes(bytes(SIZE))
        content = create(path, "cluster_size=4k", "-b", "base.raw", "-F", "raw")
    else:
        content = create(path, f"cluster_size=4k,data_file={tmp_path}/data.raw")
    with pytest.raises(ImageError, match=f"{kind} .* is another file, allowed is none"):
        asyncio.run(open_file(MemoryFile(content), "qcow2", OpenOptions(DenyGate())))


def test_snapshot_is_read_only_has_its_own_size_and_is_found_by_id_and_name(path: Path) -> None:
    qemu("qemu-img", "snapshot", "-c", "before", path)
    qemu("qemu-img", "resize", path, "128k")
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 4k", path)

    async def main(wanted: str) -> tuple[int, bytes]:
        image = await open_image(path, format="qcow2", writable=False, snapshot=wanted)
        view = memoryview(bytearray(4))
        await image.read(0, view)
        assert not image.try_write(0, memoryview(b"x"))
        await image.close()
        return image.size, bytes(view)

    assert asyncio.run(main("1")) == asyncio.run(main("before")) == (SIZE, b"\7\7\7\7")
    with pytest.raises(ConfigError, match="there is no snapshot 'after', known are 'before'"):
        asyncio.run(main("after"))
    with pytest.raises(ConfigError, match="a snapshot can only be opened read-only"):
        asyncio.run(open_image(path, format="qcow2", writable=True, snapshot="1"))


def test_snapshot_whose_l1_table_is_too_small_or_outside_is_refused(path: Path) -> None:
    qemu("qemu-img", "snapshot", "-c", "s", path)
    content = path.read_bytes()
    (table,) = struct.unpack_from(">Q", content, 64)
    for offset, value, size, message in (
        (table + 8, 0, 4, "snapshot 0: l1_size is 0, expected at least 1"),
        (table + 8, 0xFFFFFFFF, 4, "snapshot 0: l1_(size|table_offset) is"),
        (table, 1 << 40, 8, "the L1 table ends at"),
        (table, 0x123, 8, "snapshot 0: l1_table_offset is 291, expected a multiple of 4096"),
        (table + 36, 1025, 4, "snapshot 0: extra_data_size is 1025, expected at most 1024"),
        (table + 36, 8, 4, "snapshot 0: extra_data_size is 8, expected at least 16 in version 3"),
    ):
        changed = bytearray(content)
        changed[offset : offset + size] = value.to_bytes(size, "big")
        with pytest.raises(CorruptImage, match=message):
            asyncio.run(open_file(MemoryFile(changed), "qcow2", OpenOptions(DenyGate(), snapshot="1")))


def test_lazy_refcounts_set_the_dirty_bit_until_the_orderly_end(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, "cluster_size=4k,lazy_refcounts=on")

    async def main() -> None:
        image = await open_image(path, format="qcow2")
        assert field(path, 72) == 0
        await image.write(32 << 10, b"x" * 4096)
        await image.flush()
        assert field(path, 72) == 1
        await image.close()

    asyncio.run(main())
    assert field(path, 72) == 0
    qemu("qemu-img", "check", path)


def test_image_in_use_by_qemu_is_locked(path: Path) -> None:
    """A writer of ours keeps qemu-img out, and the other way round is in the storage tests."""

    async def main() -> None:
        image = await open_image(path, format="qcow2")
        done = await asyncio.to_thread(subprocess.run, ["qemu-img", "check", str(path)], capture_output=True, text=True)
        assert 'Failed to get shared "write" lock' in done.stderr
        with pytest.raises(ImageLocked):
            await open_image(path, format="qcow2", writable=False)
        await image.close()

    asyncio.run(main())


def test_flush_after_a_write_in_place_costs_one_barrier_and_after_an_allocation_two(path: Path) -> None:
    class CountingFile(MemoryFile):
        sync_count = 0

        async def fdatasync(self) -> None:
            self.sync_count += 1

    file = CountingFile(path.read_bytes())

    async def main() -> list[int]:
        image = await open_file(file, "qcow2", OpenOptions(AnyGate(b""), writable=True))
        await image.flush()
        costs = []
        for offset in (0, 32 << 10, 0):
            before = file.sync_count
            await image.write(offset, b"x" * 4096)
            await image.flush()
            costs.append(file.sync_count - before)
        return costs

    assert asyncio.run(main()) == [1, 2, 1]


def test_key_is_not_shown_with_the_options() -> None:
    assert "horse" not in repr(OpenOptions(DenyGate(), keys=Keys(b"correct horse", {"x": b"horse"})))
