"""New images: their bytes, what other programs make of them, and that half an image never stays."""

from __future__ import annotations

import asyncio
import os
import struct
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from nbdimg.errors import ConfigError, ImageError, ImageLocked
from nbdimg.formats import open_image
from nbdimg.formats.vhdx import create as module
from nbdimg.formats.vhdx.create import CreateOptions, create
from nbdimg.formats.vhdx.parent import Parent, read_parent
from nbdimg.storage import system
from nbdimg.storage.locks import lock_image
from nbdimg.storage.posix import PosixFile
from nbdimg.units import GiB, KiB, MiB, TiB
from tests.formats.vhdx import craft
from tests.support.vhdximages import FULL, Builder, flattened, judge, run, seven_zip


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parent_of(path: str) -> Parent:
    return asyncio.run(read_parent(path))


def head(path: str, length: int = 4 * MiB) -> bytes:
    with open(path, "rb") as file:
        return file.read(length)


def listed(path: str) -> dict[str, str]:
    """What 7-Zip says of the file itself."""
    text = run(seven_zip(), "l", "-tVHDX", path)
    pairs = (line.partition(": ") for line in text.splitlines() if ": " in line)
    said: dict[str, str] = {}
    for key, _, value in pairs:
        said.setdefault(key.strip(), value.strip())
    return said


def test_create_dynamic_has_the_layout_of_windows() -> None:
    create("a.vhdx", 10 * GiB)
    content = head("a.vhdx")
    assert len(content) == os.path.getsize("a.vhdx") == 4 * MiB
    assert content[:22] == b"vhdxfile" + "nbdimg".encode("utf-16-le") + b"\0\0"
    for offset, sequence_number in ((64 * KiB, 0), (128 * KiB, 1)):
        header = content[offset : offset + 4 * KiB]
        assert header[:4] == b"head"
        assert craft.sealed(header) == header
        assert struct.unpack_from("<Q", header, 8) == (sequence_number,)
        assert header[16:32] != bytes(16) != header[32:48]
        assert header[48:64] == bytes(16)
        assert struct.unpack_from("<HHIQ", header, 64) == (0, 1, MiB, MiB)
    table = craft.region_table(craft.region(craft.BAT, 3 * MiB), craft.region(craft.METADATA, 2 * MiB))
    assert content[192 * KiB : 256 * KiB] == content[256 * KiB : 320 * KiB] == table
    disk_id = UUID(bytes_le=content[2 * MiB + 64 * KiB + 24 : 2 * MiB + 64 * KiB + 40])
    assert disk_id.version == 4
    assert content[MiB : 2 * MiB] == content[3 * MiB :] == bytes(MiB)


def test_create_dynamic_is_what_qemu_and_7zip_take() -> None:
    create("a.vhdx", 64 * MiB, CreateOptions(block_size=2 * MiB, log_size=3 * MiB))
    judge(Path("a.vhdx"), bytes(64 * MiB))
    assert flattened(Path("a.vhdx")) == bytes(64 * MiB)
    run("qemu-io", "-f", "vhdx", "-c", "write -q -P 5 3M 2M", "a.vhdx")
    judge(Path("a.vhdx"), bytes(3 * MiB) + b"\5" * (2 * MiB) + bytes(59 * MiB))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (CreateOptions(), {"BlockSize": "33554432", "LogicalSectorSize": "512", "PhysicalSectorSize": "4096"}),
        (
            CreateOptions(block_size=MiB, log_size=256 * MiB),
            {"BlockSize": "1048576", "LogLength": "268435456 (256 MiB)"},
        ),
        (CreateOptions(block_size=256 * MiB, physical_sector_size=512), {"BlockSize": "268435456"}),
        (CreateOptions(logical_sector_size=4096), {"LogicalSectorSize": "4096", "Fixed": "-"}),
        (CreateOptions("fixed", block_size=MiB), {"Fixed": "+", "PackSize": "2097152 (2 MiB)", "HasParent": "-"}),
    ],
)
def test_create_options_are_what_7zip_reads(options: CreateOptions, expected: dict[str, str]) -> None:
    create("a.vhdx", 2 * MiB, options)
    said = listed("a.vhdx")
    assert {key: said[key] for key in expected} == expected
    assert said["VirtualDiskSize"] == "2097152"


def test_create_fixed_has_all_blocks_in_a_row_and_their_space() -> None:
    create("a.vhdx", 5 * MiB + 512, CreateOptions("fixed", block_size=MiB))
    entries = struct.unpack_from("<7Q", head("a.vhdx"), 3 * MiB)
    assert entries == (*((4 + block) * MiB | FULL for block in range(6)), 0)
    status = os.stat("a.vhdx")
    assert status.st_size == 10 * MiB
    assert status.st_blocks * 512 >= 6 * MiB
    judge(Path("a.vhdx"), bytes(5 * MiB + 512))
    run("qemu-io", "-f", "vhdx", "-c", "write -q -P 5 1M 4M", "a.vhdx")
    assert os.path.getsize("a.vhdx") == 10 * MiB


def test_create_fixed_on_a_file_system_that_reserves_nothing_writes_zeroes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "fallocate", lambda *arguments: False)
    create("a.vhdx", 3 * MiB, CreateOptions("fixed", block_size=MiB))
    assert os.stat("a.vhdx").st_blocks * 512 >= 3 * MiB


def test_create_fixed_of_several_chunks_leaves_the_bitmaps_entries_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_preallocate", lambda *arguments: None)
    create("a.vhdx", 34 * 256 * MiB, CreateOptions("fixed", block_size=256 * MiB))
    entries = struct.unpack_from("<37Q", head("a.vhdx"), 3 * MiB)
    assert entries[15:19] == ((4 + 15 * 256) * MiB | FULL, 0, (4 + 16 * 256) * MiB | FULL, (4 + 17 * 256) * MiB | FULL)
    assert entries[33:37] == (0, (4 + 32 * 256) * MiB | FULL, (4 + 33 * 256) * MiB | FULL, 0)
    run("qemu-img", "check", "-q", "a.vhdx")


def test_create_largest_disk_with_smallest_blocks_is_sparse() -> None:
    made = create("a.vhdx", 64 * TiB, CreateOptions(block_size=MiB))
    assert made.bat_length == 513 * MiB
    status = os.stat("a.vhdx")
    assert status.st_size == 516 * MiB
    assert status.st_blocks * 512 < MiB


def test_create_size_is_rounded_up_to_logical_sectors() -> None:
    assert create("a.vhdx", 1000).geometry.size == 1024
    assert create("b.vhdx", 5000, CreateOptions(logical_sector_size=4096)).geometry.size == 8192
    assert '"virtual-size": 1024' in run("qemu-img", "info", "--output=json", "a.vhdx")


# Differencing


def test_create_child_shows_its_parent_and_names_it() -> None:
    builder = Builder(8 * MiB, data_write_guid=UUID(int=77))
    guest = b"\1" * MiB + bytes(6 * MiB) + b"\2" * MiB
    builder.add_guest(guest)
    Path("parent.vhdx").write_bytes(builder.content)
    made = create("child.vhdx", None, CreateOptions("differencing", parent=parent_of("parent.vhdx")))
    assert (made.geometry.size, made.geometry.block_size) == (8 * MiB, 2 * MiB)
    assert flattened(Path("child.vhdx")) == guest
    said = listed("child.vhdx")
    assert said["HasParent"] == "+"
    assert said["parent_linkage"] == "{00000000-0000-0000-0000-00000000004d}"
    assert said["relative_path"] == ".\\parent.vhdx"
    assert said["Id"] == craft.DISK_ID.bytes_le.hex()


@pytest.mark.parametrize(
    ("child", "parent", "stored"),
    [
        ("a.vhdx", "base/p.vhdx", ".\\base\\p.vhdx"),
        ("base/a.vhdx", "p.vhdx", "..\\p.vhdx"),
        ("a.vhdx", "..p", ".\\..p"),
    ],
)
def test_create_child_stores_the_way_from_its_directory(child: str, parent: str, stored: str) -> None:
    os.mkdir("base")
    create(parent, MiB)
    create(child, 2 * MiB, CreateOptions("differencing", parent=parent_of(parent)))
    assert ("relative_path" + stored).encode("utf-16-le") in head(child)


def test_create_child_takes_sector_sizes_and_the_disks_items_from_the_parent() -> None:
    own = "0F 0E 0D 0C 0B 0A 09 08 07 06 05 04 03 02 01 01"
    more = [
        (own, 3, b"the disk's"),
        (craft.UNKNOWN, 1, b"the file's"),
        (craft.CHS_PARAMETERS, 2, b"\x10\0\0\0\x3f\0\0\0"),
    ]
    meta = craft.metadata(logical=4096, physical=4096, more=more)
    Path("parent.vhdx").write_bytes(craft.image(meta=meta))
    parent = parent_of("parent.vhdx")
    made = create("child.vhdx", None, CreateOptions("differencing", parent=parent))
    assert (made.geometry.sector_size, made.physical_sector_size) == (4096, 4096)
    metadata = head("child.vhdx")[2 * MiB : 3 * MiB]
    assert b"the disk's" in metadata
    assert b"the file's" not in metadata
    assert craft.raw(craft.CHS_PARAMETERS) in metadata


def test_create_child_opens_over_its_parent_until_that_is_changed() -> None:
    create("parent.vhdx", 2 * MiB)

    async def write_and_read() -> bytes:
        image = await open_image("parent.vhdx")
        await image.write(0, b"\1" * MiB)
        await image.close()
        create("child.vhdx", None, CreateOptions("differencing", parent=await read_parent("parent.vhdx")))
        image = await open_image("child.vhdx")
        await image.write(MiB - 512, b"\2" * 512)
        found = bytearray(2 * MiB)
        await image.read(0, memoryview(found))
        await image.close()
        image = await open_image("parent.vhdx")
        await image.write(0, b"\3" * 512)
        await image.close()
        return bytes(found)

    expected = b"\1" * (MiB - 512) + b"\2" * 512 + bytes(MiB)
    assert asyncio.run(write_and_read()) == expected
    with pytest.raises(ImageError, match="parent_linkage"):
        asyncio.run(open_image("child.vhdx"))


def test_create_child_of_a_parent_in_use_is_refused() -> None:
    create("parent.vhdx", MiB)
    file = PosixFile("parent.vhdx", writable=True)
    lock_image(file.descriptor, file.path, writable=True)
    with pytest.raises(ImageLocked):
        parent_of("parent.vhdx")
    asyncio.run(file.close())


def test_create_child_of_no_vhdx_is_refused() -> None:
    Path("parent.vhdx").write_bytes(bytes(MiB))
    with pytest.raises(ImageError, match="the file signature is"):
        parent_of("parent.vhdx")


def test_create_child_whose_parent_has_a_name_that_cannot_be_stored_is_refused() -> None:
    create("a\\b.vhdx", MiB)
    with pytest.raises(ConfigError, match="has a backslash"):
        create("child.vhdx", None, CreateOptions("differencing", parent=parent_of("a\\b.vhdx")))
    os.rename("a\\b.vhdx", b"\xff.vhdx")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        create("child.vhdx", None, CreateOptions("differencing", parent=parent_of(os.fsdecode(b"\xff.vhdx"))))
    assert os.listdir(b".") == [b"\xff.vhdx"]


# Refused, failed

REFUSED: list[tuple[int | None, dict[str, Any], str]] = [
    (0, {}, "the size is 0 bytes, expected 512 to 70368744177664"),
    (64 * TiB + 1, {}, r"the size is 70368744178176 bytes, expected 512 to .* \(64 TiB\)"),
    (None, {}, "SIZE is missing"),
    (MiB, {"subformat": "thin"}, "the subformat is 'thin', expected dynamic, fixed, differencing"),
    (MiB, {"subformat": "differencing"}, "there is no parent, expected one"),
    (MiB, {"block_size": 512 * KiB}, "the block size is 524288 bytes, expected a power of two from 1 MiB to 256 MiB"),
    (MiB, {"block_size": 3 * MiB}, "the block size is 3145728 bytes"),
    (MiB, {"block_size": 512 * MiB}, "the block size is 536870912 bytes"),
    (MiB, {"log_size": 0}, "the log size is 0 bytes, expected a multiple of 1 MiB from 1 MiB to 256 MiB"),
    (MiB, {"log_size": MiB + 4096}, "the log size is 1052672 bytes"),
    (MiB, {"log_size": 257 * MiB}, "the log size is 269484032 bytes"),
    (MiB, {"logical_sector_size": 1024}, "the logical sector size is 1024 bytes, expected 512 or 4096"),
    (MiB, {"physical_sector_size": 8192}, "the physical sector size is 8192 bytes, expected 512 or 4096"),
]


@pytest.mark.parametrize(("size", "options", "message"), REFUSED)
def test_create_with_options_that_cannot_be_is_refused(size: int | None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create("a.vhdx", size, CreateOptions(**options))
    assert os.listdir() == []


def test_create_child_with_other_logical_sectors_or_subformat_is_refused() -> None:
    create("parent.vhdx", MiB)
    parent = parent_of("parent.vhdx")
    with pytest.raises(ConfigError, match=r"expected that of the parent parent\.vhdx, 512"):
        create("a.vhdx", None, CreateOptions("differencing", logical_sector_size=4096, parent=parent))
    with pytest.raises(ConfigError, match="the subformat is dynamic and there is a parent, expected differencing"):
        create("a.vhdx", None, CreateOptions(parent=parent))


def test_create_over_a_file_that_exists_is_refused() -> None:
    Path("a.vhdx").write_text("mine")
    with pytest.raises(FileExistsError, match="no file is ever overwritten"):
        create("a.vhdx", MiB)
    assert Path("a.vhdx").read_text() == "mine"


def test_create_that_is_interrupted_leaves_nothing() -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create("a.vhdx", 4 * MiB, CreateOptions("fixed"), progress=interrupt)
    assert os.listdir() == []


def test_create_writes_the_signature_when_all_else_is_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    monkeypatch.setattr(system, "fdatasync", lambda descriptor: seen.append(head("a.vhdx")))
    create("a.vhdx", MiB, CreateOptions("fixed", block_size=MiB))
    assert [each[:8] for each in seen] == [bytes(8), b"vhdxfile"]
    assert seen[0][512:] == seen[1][512:]
    Path("torn.vhdx").write_bytes(seen[0])
    with pytest.raises(ImageError, match="the file signature"):
        asyncio.run(open_image("torn.vhdx", format="vhdx"))
