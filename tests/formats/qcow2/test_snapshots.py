"""Internal snapshots, judged by QEMU: its check, its list, the disk's bytes and each snapshot's after every step."""

from __future__ import annotations

import asyncio
import json
import random
import struct
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nbdimg.errors import ConfigError, CorruptImage, UnsupportedFeature
from nbdimg.formats import open_image, snapshot_labels
from nbdimg.formats.qcow2 import snapshot_changes, snapshots
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.formats.qcow2.open import read_header
from nbdimg.formats.qcow2.snapshot_changes import apply_snapshot, create_snapshot, delete_snapshot
from nbdimg.formats.qcow2.snapshots import Snapshot, labels
from nbdimg.image.image import Image
from nbdimg.storage.memory import MemoryFile
from nbdimg.units import KiB, MiB
from tests.support.qcow2disk import NOW_NS, SIZE, Disk, change, driver_of, opened
from tests.support.qcow2edit import qemu_check, qemu_img
from tests.support.reading import read_all

KINDS = {
    "version 2": "compat=0.10",
    "version 3": "compat=1.1",
    "version 2, clusters of 512": "compat=0.10,cluster_size=512",
    "clusters of 512": "cluster_size=512",
    "clusters of 1k, 2 bits": "cluster_size=1k,refcount_bits=2",
    "clusters of 4k, 4 bits": "cluster_size=4k,refcount_bits=4",
    "clusters of 4k, 8 bits": "cluster_size=4k,refcount_bits=8",
    "clusters of 4k, 64 bits": "cluster_size=4k,refcount_bits=64",
    "clusters of 2M": "cluster_size=2M",
    "extended": "cluster_size=16k,extended_l2=on",
    "lazy": "cluster_size=4k,lazy_refcounts=on",
    "preallocated": "cluster_size=4k,preallocation=metadata",
}


def is_dirty(path: Path) -> bool:
    """Incompatible feature bit 0, of a version 3 header."""
    return bool(path.read_bytes()[72:80][-1] & 1)


MAKERS: dict[str, Callable[[Path], Disk]] = {
    **{kind: lambda path, options=options: Disk.made(path, options) for kind, options in KINDS.items()},  # type: ignore[misc]
    "zlib": lambda path: Disk.compressed(path, "zlib"),
    "zstd": lambda path: Disk.compressed(path, "zstd"),
    "backed": Disk.backed,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_snapshots_of_every_kind_of_image_keep_their_bytes(tmp_path: Path, kind: str) -> None:
    disk = MAKERS[kind](tmp_path / "image")
    disk.write_qemu(1, 4096, 200_000)
    disk.write_ours("first")
    disk.create("one")
    disk.verify()
    disk.write_ours("second")
    disk.create("two")
    disk.write_qemu(2, 100_000, 300_000)
    disk.verify()
    disk.delete("two")
    disk.verify()
    disk.write_ours("third")
    disk.apply("one")
    disk.verify()
    disk.write_ours("fourth")
    disk.verify()
    disk.delete("one")
    disk.verify()


@pytest.mark.parametrize("seed", range(5))
def test_snapshots_of_both_programs_in_any_order_keep_their_bytes(tmp_path: Path, seed: int) -> None:
    rng = random.Random(f"mixed {seed}")
    options = rng.choice(("cluster_size=1k", "cluster_size=4k", "cluster_size=16k,extended_l2=on", "compat=1.1"))
    disk = Disk.made(tmp_path / "image", options)
    for number in range(14):
        name = rng.choice(list(disk.snapshots)) if disk.snapshots else ""
        choice = rng.randrange(10)
        if choice < 2 and name:
            rng.choice((disk.apply, disk.apply_qemu))(name)
        elif choice < 4 and name:
            rng.choice((disk.delete, disk.delete_qemu))(name)
        elif choice < 6:
            rng.choice((disk.create, disk.create_qemu))(f"number {number}")
        elif choice < 7:
            disk.resize(rng.choice((SIZE // 2, SIZE, SIZE * 3 // 2)) // 512 * 512)
        else:
            disk.write_ours(f"{seed} {number}", 5)
            disk.write_qemu(number + 1, rng.randrange(100) * 512, 20_000)
        disk.verify()


def test_snapshot_size_comes_back_with_it_and_the_l1_table_grows_and_shrinks(tmp_path: Path) -> None:
    disk = Disk.made(tmp_path / "image", "cluster_size=512", 64 * KiB)
    disk.write_qemu(1, 0, 64 * KiB)
    disk.create("small")
    disk.resize(8 * MiB)
    disk.write_qemu(2, 7 * MiB, 64 * KiB)
    disk.create("large")
    disk.apply("small")
    disk.verify()
    disk.apply("large")
    disk.verify()
    disk.delete("small")
    disk.delete("large")
    disk.verify()


def test_snapshot_of_an_image_of_size_0_and_of_an_empty_one_are_like_any_other(tmp_path: Path) -> None:
    disk = Disk.made(tmp_path / "image", "compat=1.1", 0)
    disk.create("nothing")
    qemu_img("resize", "-q", "-f", "qcow2", disk.path, str(SIZE))
    disk.active = bytearray(SIZE)
    disk.create("empty")
    disk.write_qemu(3, 0, 70_000)
    disk.apply("empty")
    assert disk.read() == bytes(SIZE)
    disk.apply("nothing")
    qemu_img("check", disk.path)
    disk.apply("empty")
    disk.delete("nothing")
    disk.verify()


def test_snapshot_of_an_open_image_with_lazy_refcounts_leaves_them_lazy_and_its_end_clean(tmp_path: Path) -> None:
    disk = Disk.made(tmp_path / "image", "cluster_size=4k,lazy_refcounts=on")

    async def run() -> None:
        image = await open_image(disk.path, format="qcow2")
        await create_snapshot(driver_of(image), "one", now_ns=NOW_NS)
        disk.snapshots["one"] = bytes(disk.active)
        assert not is_dirty(disk.path)
        await disk.guest(image, random.Random("lazy"), 4)
        await image.flush()
        assert is_dirty(disk.path)
        await image.close()

    asyncio.run(run())
    assert not is_dirty(disk.path)
    disk.verify()


def test_snapshot_of_an_image_in_which_corruption_was_found_is_refused(tmp_path: Path) -> None:
    disk = Disk.made(tmp_path / "image", "cluster_size=4k")
    disk.write_qemu(1, 0, 8192)
    content = bytearray(disk.path.read_bytes())
    (l1,) = struct.unpack_from(">Q", content, 40)
    (l2,) = struct.unpack_from(">Q", content, l1)
    struct.pack_into(">Q", content, (l2 & ~(1 << 63)) + 16, 0xF00)

    async def run() -> None:
        memory = MemoryFile(content)
        driver = await opened(memory)
        image = Image(driver, writable=True)
        with pytest.raises(CorruptImage):
            await image.write(8192, b"x")
        before = bytes(memory.content)
        with pytest.raises(CorruptImage):
            await create_snapshot(driver, "one", now_ns=NOW_NS)
        assert memory.content == before

    asyncio.run(run())


def test_table_that_a_snapshot_shares_is_copied_with_what_lies_far_from_the_write(tmp_path: Path) -> None:
    """A table of 64 KiB maps 512 MiB, and is in memory in sixteen parts."""
    disk = Disk.made(tmp_path / "image", "cluster_size=64k", 256 * MiB)
    disk.write_qemu(1, 0, 64 * KiB)
    disk.write_qemu(2, 200 * MiB, 64 * KiB)
    disk.create("one")

    async def run() -> None:
        image = await open_image(disk.path, format="qcow2")
        await image.write(0, b"\3" * 4096)
        await image.close()

    asyncio.run(run())
    disk.active[:4096] = b"\3" * 4096
    disk.verify()


def test_snapshot_deleted_gives_its_space_back(tmp_path: Path) -> None:
    disk = Disk.made(tmp_path / "image", "compat=1.1", 8 * MiB)
    disk.write_qemu(1, 0, 4 * MiB)
    disk.create("one")
    disk.write_qemu(2, 0, 4 * MiB)
    before = disk.path.stat().st_blocks * 512
    disk.delete("one")
    assert before - disk.path.stat().st_blocks * 512 >= 4 * MiB
    disk.verify()


def test_snapshot_of_an_image_whose_refcount_table_must_grow_for_it_is_made(tmp_path: Path) -> None:
    disk = Disk.made(tmp_path / "image", "cluster_size=512,refcount_bits=64", 2 * MiB)
    disk.write_qemu(1, 0, 2 * MiB)
    for name in "abcdef":
        disk.create(name)
        disk.write_ours(name, 12)
    disk.verify()


def test_snapshot_record_says_what_qemu_says_of_it(tmp_path: Path) -> None:
    disk = Disk.made(tmp_path / "image", "compat=1.1")
    made = disk.create("Schnappschuß 📷")
    (said,) = json.loads(qemu_img("info", "--output=json", disk.path).stdout)["snapshots"]
    assert (said["id"], said["name"]) == ("1", "Schnappschuß 📷")
    assert (said["date-sec"], said["date-nsec"]) == divmod(NOW_NS, 10**9)
    assert (said["vm-state-size"], said["vm-clock-sec"], said["vm-clock-nsec"]) == (0, 0, 0)
    assert "icount" not in said
    assert (made.id, made.disk_size) == ("1", SIZE // 512 * 512)


# The open image


@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10,cluster_size=1k",
        "cluster_size=1k",
        "cluster_size=1k,lazy_refcounts=on",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=16k,extended_l2=on,lazy_refcounts=on",
    ],
)
def test_snapshots_of_an_open_image_stay_as_they_are_while_it_is_written(tmp_path: Path, options: str) -> None:
    disk = Disk.made(tmp_path / "image", options)
    rng = random.Random(options)

    async def run() -> None:
        image = await open_image(disk.path, format="qcow2")
        driver = driver_of(image)
        try:
            for name in ("one", "two", "three"):
                await disk.guest(image, rng, 12)
                await create_snapshot(driver, name, now_ns=NOW_NS)
                disk.snapshots[name] = bytes(disk.active)
                assert await read_all(image) == disk.active
            await disk.guest(image, rng, 12)
            await delete_snapshot(driver, "two")
            del disk.snapshots["two"]
            assert await read_all(image) == disk.active
            await disk.guest(image, rng, 12)
            await apply_snapshot(driver, "one")
            disk.active = bytearray(disk.snapshots["one"])
            assert await read_all(image) == disk.active
            await disk.guest(image, rng, 12)
            assert await read_all(image) == disk.active
        finally:
            await image.close()

    asyncio.run(run())
    disk.verify()


def test_snapshot_of_tables_that_lie_unwritten_where_there_was_something_else_is_made(tmp_path: Path) -> None:
    disk = Disk.made(tmp_path / "image", "cluster_size=512")
    disk.write_qemu(0xFF, 0, 256 * KiB)
    disk.create_qemu("old")
    disk.write_qemu(1, 0, 256 * KiB)
    disk.delete_qemu("old")

    async def run() -> None:
        image = await open_image(disk.path, format="qcow2")
        for offset in range(256 * KiB, SIZE - 512, 32 * KiB):
            await image.write(offset, memoryview(b"x" * 512))
            disk.active[offset : offset + 512] = b"x" * 512
        await create_snapshot(driver_of(image), "one", now_ns=NOW_NS)
        disk.snapshots["one"] = bytes(disk.active)
        await image.close()

    asyncio.run(run())
    disk.verify()


def test_snapshot_of_another_size_applied_to_an_open_image_changes_its_size_at_once(tmp_path: Path) -> None:
    disk = Disk.made(tmp_path / "image", "cluster_size=512", 64 * KiB)
    disk.write_qemu(1, 0, 64 * KiB)
    disk.create("small")
    disk.resize(2 * MiB)
    disk.write_qemu(2, 1 * MiB, 64 * KiB)
    disk.create("large")

    async def run() -> None:
        image = await open_image(disk.path, format="qcow2")
        for name in ("small", "large", "small"):
            await apply_snapshot(driver_of(image), name)
            disk.active = bytearray(disk.snapshots[name])
            assert image.size == len(disk.active)
            await disk.guest(image, random.Random(name), 10)
            assert await read_all(image) == disk.active
        await image.close()

    asyncio.run(run())
    disk.verify()


@pytest.mark.parametrize("name", ["one", "two"])
def test_snapshot_opened_reads_as_the_disk_did(tmp_path: Path, name: str) -> None:
    disk = Disk.made(tmp_path / "image", "cluster_size=4k")
    for each in ("one", "two", "three"):
        disk.write_ours(each)
        disk.create(each)

    async def run() -> bytes:
        image = await open_image(disk.path, format="qcow2", writable=False, snapshot=name)
        try:
            return await read_all(image)
        finally:
            await image.close()

    assert asyncio.run(run()) == disk.snapshots[name]


# Names


@pytest.mark.parametrize("name", ["", "line\nbreak", "x" * 256, "ä" * 128, "\udcff"])
def test_snapshot_name_that_cannot_be_one_is_refused(tmp_path: Path, name: str) -> None:
    disk = Disk.made(tmp_path / "image", "compat=1.1")
    with pytest.raises(ConfigError, match="expected 1 to 255, all printable"):
        disk.create(name)
    disk.verify()


@pytest.mark.parametrize("name", ["one", "1"])
def test_snapshot_name_that_is_a_name_or_an_id_already_is_refused(tmp_path: Path, name: str) -> None:
    disk = Disk.made(tmp_path / "image", "compat=1.1")
    disk.create("one")
    with pytest.raises(ConfigError, match=f"the name '{name}' is taken by snapshot '1'"):
        disk.create(name)


def test_snapshot_id_is_one_above_the_highest_and_nobodys_name(tmp_path: Path) -> None:
    disk = Disk.made(tmp_path / "image", "compat=1.1")
    assert [disk.create(name).id for name in ("one", "two", "4", "three")] == ["1", "2", "3", "5"]
    disk.delete("two")
    assert disk.create("five").id == "6"


@pytest.mark.parametrize("action", [apply_snapshot, delete_snapshot])
def test_snapshot_that_is_not_there_is_named_with_those_that_are(
    tmp_path: Path, action: Callable[[Qcow2Driver, str], Awaitable[Snapshot]]
) -> None:
    disk = Disk.made(tmp_path / "image", "compat=1.1")
    disk.create("one")
    with pytest.raises(ConfigError, match="there is no snapshot 'none', known are 'one'"):
        change(disk.path, lambda driver: action(driver, "none"))
    disk.verify()


# What is refused changes nothing


def test_snapshot_with_1_bit_counts_is_refused_and_taken_back(tmp_path: Path) -> None:
    disk = Disk.made(tmp_path / "image", "refcount_bits=1")
    disk.write_qemu(1, 0, 70_000)
    with pytest.raises(UnsupportedFeature, match="has 1 references, 1-bit refcounts allow 1"):
        disk.create("one")
    assert not is_dirty(disk.path)
    disk.verify()


def test_snapshot_that_some_counts_cannot_hold_is_refused_and_taken_back(tmp_path: Path) -> None:
    """Compressed clusters share host clusters: their counts overflow long after others have been raised."""
    rng = random.Random("narrow")
    content = b"".join(rng.randbytes(1000).ljust(4096, b"\0") for _ in range(256))
    raw, path = tmp_path / "raw", tmp_path / "image"
    raw.write_bytes(content)
    options = "cluster_size=4k,refcount_bits=4"
    qemu_img("convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    disk = Disk(path, content)
    disk.write_qemu(7, 0, 100_000)

    async def run() -> None:
        image = await open_image(path, format="qcow2")

        async def fill() -> None:
            for letter in "abcdefghijklmnop":
                await create_snapshot(driver_of(image), letter, now_ns=NOW_NS)
                disk.snapshots[letter] = bytes(disk.active)

        with pytest.raises(UnsupportedFeature, match="4-bit refcounts allow 15"):
            await fill()
        assert disk.snapshots
        await disk.guest(image, rng, 12)
        assert await read_all(image) == disk.active
        await image.close()

    asyncio.run(run())
    assert not is_dirty(path)
    disk.verify()


def test_snapshot_beside_a_data_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data'}", path, "1M")

    async def run() -> None:
        image = await open_image(path, format="qcow2")
        with pytest.raises(UnsupportedFeature, match="external data file"):
            await create_snapshot(driver_of(image), "one", now_ns=NOW_NS)
        await image.close()

    asyncio.run(run())


def test_snapshot_applied_under_bitmaps_is_refused(tmp_path: Path) -> None:
    disk = Disk.made(tmp_path / "image", "cluster_size=4k")
    qemu_img("bitmap", "--add", disk.path, "since")
    disk.create("one")
    with pytest.raises(UnsupportedFeature, match="it has dirty bitmaps"):
        disk.apply("one")
    disk.delete("one")
    disk.verify()
    said = json.loads(qemu_img("info", "--output=json", disk.path).stdout)
    assert said["format-specific"]["data"]["bitmaps"][0]["flags"] == ["auto"]


def l1_of(content: bytes) -> tuple[int, list[int]]:
    """Offset and entries of the active L1 table."""
    count, offset = struct.unpack_from(">IQ", content, 36)
    return offset, list(struct.unpack_from(f">{count}Q", content, offset))


def poke(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("an L2 table behind the end", "expected the offset of an L2 table|inside the file"),
        ("an L2 table twice", "L1 entry 3 is .*, expected an L2 table that no entry before it names"),
        ("the refcount table as data", "expected none that holds metadata"),
        ("reserved bits in an entry", "the reserved bits 0"),
        ("a free cluster as data", "was referred to and has refcount 0"),
    ],
)
def test_snapshot_of_a_damaged_tree_is_refused_and_taken_back(tmp_path: Path, what: str, message: str) -> None:
    disk = Disk.made(tmp_path / "image", "cluster_size=4k", 8 * MiB)
    disk.write_qemu(1, 0, 100_000)
    disk.write_qemu(1, 6 * MiB, 100_000)
    content = disk.path.read_bytes()
    l1_offset, l1 = l1_of(content)
    l2_offset = l1[-1] & 0x00FF_FFFF_FFFF_FE00
    refcount_table = struct.unpack_from(">Q", content, 48)[0]
    copied = 1 << 63
    place, entry = {
        "an L2 table behind the end": (l1_offset + 8 * 3, copied | 1 << 40),
        "an L2 table twice": (l1_offset + 8 * 2, l2_offset),
        "the refcount table as data": (l2_offset, copied | refcount_table),
        "reserved bits in an entry": (l2_offset, copied | 1 << 57 | 4096 * 20),
        "a free cluster as data": (l2_offset, copied | 4096 * 4000),
    }[what]
    poke(disk.path, place, struct.pack(">Q", entry))
    damaged = disk.path.read_bytes()
    before = qemu_check(disk.path)
    with pytest.raises(CorruptImage, match=message):
        disk.create("one")
    assert disk.path.read_bytes()[:4096] == damaged[:4096]
    after = qemu_check(disk.path)
    assert after.corruptions <= before.corruptions
    assert after.leaks <= before.leaks


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("the refcount table as an L2 table", "expected the offset of an L2 table"),
        ("the header as an L2 table", "expected the offset of an L2 table"),
        ("reserved bits in an L1 entry", "expected the offset of an L2 table"),
        ("an L2 table twice", "L1 entry 1 is .*, expected an L2 table that no entry before it names"),
        ("an L1 table behind the end", "expected a place behind the header and inside the file"),
    ],
)
@pytest.mark.parametrize("action", [apply_snapshot, delete_snapshot])
def test_snapshot_whose_own_tree_is_damaged_is_neither_applied_nor_deleted(
    tmp_path: Path, what: str, message: str, action: Callable[[Qcow2Driver, str], Awaitable[Snapshot]]
) -> None:
    disk = Disk.made(tmp_path / "image", "cluster_size=4k", 4 * MiB)
    disk.write_qemu(1, 0, 100_000)
    disk.create_qemu("one")
    disk.write_qemu(2, 0, 100_000)
    content = disk.path.read_bytes()
    _, table = table_of(disk.path)
    (l1_offset,) = struct.unpack_from(">Q", content, table)
    place, value = {
        "the refcount table as an L2 table": (l1_offset, struct.unpack_from(">Q", content, 48)[0]),
        "the header as an L2 table": (l1_offset, 1 << 63),
        "reserved bits in an L1 entry": (l1_offset, 0x20001),
        "an L2 table twice": (l1_offset + 8, struct.unpack_from(">Q", content, l1_offset)[0]),
        "an L1 table behind the end": (table, 1 << 40),
    }[what]
    poke(disk.path, place, struct.pack(">Q", value))
    damaged = disk.path.read_bytes()
    with pytest.raises(CorruptImage, match=message):
        change(disk.path, lambda driver: action(driver, "one"))
    assert disk.path.read_bytes() == damaged


# Tables of other writers


def table_of(path: Path) -> tuple[int, int]:
    """(count, offset) of the snapshot table."""
    found: tuple[int, int] = struct.unpack_from(">IQ", path.read_bytes(), 60)
    return found


def rewrite_entry(
    path: Path, index: int, *, extra: bytes | None = None, name: bytes | None = None, vm_state_size: int = 0
) -> None:
    """Give an entry of the snapshot table other extra data, or another name; the table stays where it is."""
    count, start = table_of(path)
    content = path.read_bytes()
    table, offset = b"", start
    for number in range(count):
        fields = list(struct.unpack_from(">QIHHIIQII", content, offset))
        id_start = offset + 40 + fields[8]
        parts = [
            content[offset + 40 : id_start],
            content[id_start : id_start + fields[2]],
            content[id_start + fields[2] : id_start + fields[2] + fields[3]],
        ]
        offset = id_start + fields[2] + fields[3]
        offset += -offset % 8
        if number == index:
            parts[0] = parts[0] if extra is None else extra
            parts[2] = parts[2] if name is None else name
            fields[3], fields[7], fields[8] = len(parts[2]), vm_state_size, len(parts[0])
        table += struct.pack(">QIHHIIQII", *fields) + b"".join(parts)
        table += bytes(-len(table) % 8)
    assert len(table) <= 512
    poke(path, start, table.ljust(512, b"\0"))


@pytest.mark.parametrize(("options", "extra_size"), [("compat=0.10", 0), ("compat=0.10", 16), ("compat=1.1", 16)])
def test_snapshot_entry_of_an_older_writer_is_kept(tmp_path: Path, options: str, extra_size: int) -> None:
    disk = Disk.made(tmp_path / "image", options + ",cluster_size=512")
    disk.write_qemu(1, 0, 100_000)
    disk.create_qemu("one")
    rewrite_entry(disk.path, 0, extra=struct.pack(">QQ", 0, len(disk.active))[:extra_size])
    disk.write_qemu(2, 0, 100_000)
    disk.create("two")
    disk.verify()
    disk.apply("one")
    disk.verify()
    disk.delete("one")
    disk.verify()


def test_snapshot_entry_without_a_size_gets_the_disks_before_that_changes(tmp_path: Path) -> None:
    disk = Disk.made(tmp_path / "image", "compat=0.10,cluster_size=512", 64 * KiB)
    disk.write_qemu(1, 0, 64 * KiB)
    disk.create_qemu("silent")
    disk.create_qemu("small")
    rewrite_entry(disk.path, 0, extra=b"")
    rewrite_entry(disk.path, 1, extra=struct.pack(">QQ", 0, 16 * KiB))
    disk.snapshots["small"] = disk.snapshots["small"][: 16 * KiB]
    disk.apply("small")
    disk.verify()
    disk.apply("silent")
    assert len(disk.active) == 64 * KiB
    disk.verify()


def test_snapshot_entry_keeps_extra_data_and_bytes_that_are_not_known_here(tmp_path: Path) -> None:
    disk = Disk.made(tmp_path / "image", "compat=1.1")
    disk.create_qemu("one")
    extra = struct.pack(">QQQ", 0, len(disk.active), 77) + b"unknown!tail"
    rewrite_entry(disk.path, 0, extra=extra, name=b"caf\xe9")
    disk.create("two")
    _, offset = table_of(disk.path)
    entry = disk.path.read_bytes()[offset : offset + 128]
    assert entry[40:].startswith(extra + b"1caf\xe9")
    change(disk.path, lambda driver: delete_snapshot(driver, "caf\udce9"))
    disk.snapshots = {"two": disk.snapshots["two"]}
    disk.verify()


def test_snapshot_with_vm_state_keeps_it_until_it_is_deleted(tmp_path: Path) -> None:
    """The VM's state lies behind the disk: a snapshot of a larger disk, its entry made to say that it was smaller."""
    disk = Disk.made(tmp_path / "image", "cluster_size=512", 256 * KiB)
    disk.write_qemu(1, 0, 256 * KiB)
    disk.create_qemu("machine")
    disk.resize(64 * KiB)
    extra = struct.pack(">QQQ", 100_000, 64 * KiB, (1 << 64) - 1)
    rewrite_entry(disk.path, 0, extra=extra, vm_state_size=100_000)
    disk.snapshots["machine"] = disk.snapshots["machine"][: 64 * KiB]
    disk.write_ours("on")
    disk.create("disk only")
    disk.verify()
    disk.apply("machine")
    disk.verify()
    said = json.loads(qemu_img("info", "--output=json", disk.path).stdout)["snapshots"]
    assert [each["vm-state-size"] for each in said] == [100_000, 0]
    disk.write_ours("further")
    disk.delete("machine")
    disk.verify()


def test_snapshot_made_where_a_vm_state_is_left_behind_the_disk_leaves_it_out(tmp_path: Path) -> None:
    """QEMU's apply brings the VM's state into the active L1 table."""
    disk = Disk.made(tmp_path / "image", "cluster_size=512", 256 * KiB)
    disk.write_qemu(1, 0, 256 * KiB)
    disk.create_qemu("machine")
    disk.resize(64 * KiB)
    rewrite_entry(disk.path, 0, extra=struct.pack(">QQQ", 100_000, 64 * KiB, (1 << 64) - 1), vm_state_size=100_000)
    disk.snapshots["machine"] = disk.snapshots["machine"][: 64 * KiB]
    disk.apply_qemu("machine")
    made = disk.create("disk only")
    assert made.l1_size == 2
    disk.verify()
    disk.delete("machine")
    disk.verify()
    disk.apply("disk only")
    disk.verify()


# Controls


def test_control_flags_that_are_not_cleared_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(self: object, *arguments: object) -> None: ...

    disk = Disk.made(tmp_path / "image", "cluster_size=4k")
    disk.write_qemu(1, 0, 100_000)
    monkeypatch.setattr(snapshot_changes._Change, "fix_flags", nothing)
    disk.create("one")
    with pytest.raises(AssertionError):
        disk.verify()
    disk.write_qemu(2, 0, 100_000)
    assert disk.read("-l", "snapshot.name=one") != disk.snapshots["one"]


def test_control_counts_that_are_not_raised_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(self: object, *arguments: object) -> None: ...

    disk = Disk.made(tmp_path / "image", "cluster_size=4k")
    disk.write_qemu(1, 0, 100_000)
    monkeypatch.setattr(snapshot_changes._Change, "raise_tree", nothing)
    disk.create("one")
    assert qemu_check(disk.path).corruptions


def test_control_model_that_differs_is_seen(tmp_path: Path) -> None:
    disk = Disk.made(tmp_path / "image", "cluster_size=4k")
    disk.create("one")
    disk.snapshots["one"] = b"\1" + disk.snapshots["one"][1:]
    with pytest.raises(AssertionError, match="one"):
        disk.verify()


def test_create_beyond_the_l1_tables_that_are_remembered_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk.made(tmp_path / "image", "cluster_size=4k")
    disk.create("one")
    monkeypatch.setattr(snapshots, "L1_CLUSTERS_MAX", 1)
    before = disk.path.read_bytes()
    with pytest.raises(UnsupportedFeature, match="take 2 clusters, allowed are 1"):
        disk.create("two")
    assert disk.path.read_bytes() == before
    disk.delete("one")
    disk.create("two")
    disk.verify()


@pytest.mark.parametrize(
    ("count_max", "bytes_max", "expected"),
    [(64, 24, {"1": "one", "2": "two", "3": "three"}), (2, 24, {"2": "two", "3": "three"}), (64, 15, {"3": "three"})],
)
def test_snapshot_labels_are_of_the_latest_as_many_as_fit(
    tmp_path: Path, count_max: int, bytes_max: int, expected: dict[str, str]
) -> None:
    """Each L1 table has one entry of 8 bytes."""
    disk = Disk.made(tmp_path / "image", "cluster_size=64k")
    for name in ("one", "two", "three"):
        disk.create(name)

    async def main() -> tuple[dict[str, str], int]:
        image = await open_image(disk.path, writable=False)
        try:
            return await snapshot_labels(image, count_max=count_max, bytes_max=bytes_max)
        finally:
            await image.close()

    assert asyncio.run(main()) == (expected, 3)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("1", "a"), ("2", "a"), ("3", "")], ["a", "2", "3"]),
        ([("1", "2"), ("2", "2")], ["1", "2"]),
        ([("1", "2"), ("2", "")], ["1", "2"]),
        ([("1", "1"), ("2", "b")], ["1", "b"]),
        ([("1", "a\udcff"), ("2", "n" * 256), ("3", "\0"), ("4", "n" * 255)], ["1", "2", "3", "n" * 255]),
    ],
    ids=["duplicate", "name and id of the next", "id of one without a name", "own id", "no names to ask for"],
)
def test_labels_are_unique_and_can_be_asked_for(pairs: list[tuple[str, str]], expected: list[str]) -> None:
    called = labels([Snapshot(id, name, 0, 0) for id, name in pairs])
    assert called == dict(zip([id for id, _ in pairs], expected, strict=True))


def test_labels_of_two_with_one_id_mean_the_one_that_the_id_opens() -> None:
    assert labels([Snapshot("1", "a", 0, 0), Snapshot("1", "b", 0, 0)]) == {"1": "a"}


class Watched(MemoryFile):
    """Remembers how much was read at once."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.lengths: list[int] = []

    async def pread(self, offset: int, view: memoryview) -> None:
        self.lengths.append(len(view))
        await super().pread(offset, view)


@pytest.mark.parametrize(
    ("count", "extra_size", "expected"),
    [(1, 0, [64 * KiB]), (1000, 0, [256_000]), (300, 1000, [76_800, 8 * MiB])],
    ids=["one", "many", "many long ones"],
)
def test_table_is_read_as_far_as_its_entries_go(
    tmp_path: Path, count: int, extra_size: int, expected: list[int]
) -> None:
    """All that a table might take, 16 MiB, held the loop for 40 ms at each opening of an image with a snapshot."""

    async def load() -> list[int]:
        header = await read_header(MemoryFile(path.read_bytes()))
        found = [
            Snapshot(
                f"{number}", f"name {number}", 1 << 20, header.l1_size, disk_size=SIZE, unknown_extra=bytes(extra_size)
            )
            for number in range(count)
        ]
        table = b"".join(each.to_bytes(SIZE) for each in found)
        file = Watched(bytes(MiB) + table + bytes(8 * MiB - len(table)))
        changed = replace(header, snapshot_count=count, snapshot_table_offset=MiB)
        assert await snapshots.load_snapshots(file, changed) == found
        return file.lengths

    path = tmp_path / "image"
    Disk.made(path, "compat=1.1")
    assert asyncio.run(load()) == expected
