"""Probing, and opening by what it finds."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from nbdimg.errors import ConfigError, ImageError, ImageLocked, RequestError, UnrecognizedFormat
from nbdimg.formats import DRIVERS, check_format, create_image, open_image
from nbdimg.formats.probe import HEAD_SIZE, planted, probe
from tests.support.rss import descriptor_count

MAGICS = [
    (0, b"QFI\xfb", "qcow2"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (64, bytes.fromhex("7f10dabe"), "vdi"),
    (0, b"QED\x00", "qed"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
]
"""Written down from the formats' own documents. Source of vdi: the u32 0xbeda107f, little-endian, at 64."""


def head_with(offset: int, magic: bytes) -> bytes:
    return (bytes(offset) + magic).ljust(HEAD_SIZE, b"\0")


@pytest.mark.parametrize(("offset", "magic", "name"), MAGICS)
def test_probe_magic_names_the_format(offset: int, magic: bytes, name: str) -> None:
    assert probe(head_with(offset, magic)) == name
    assert name in (planted(head_with(offset, magic)) or "")


@pytest.mark.parametrize(("offset", "magic", "name"), MAGICS)
def test_probe_magic_cut_or_moved_is_no_magic(offset: int, magic: bytes, name: str) -> None:
    whole = head_with(offset, magic)
    if not magic.endswith(b"\0"):
        assert probe(whole[: offset + len(magic) - 1]) is None
    assert probe(b"\xee" + whole[:-1]) is None
    changed = bytearray(whole)
    changed[offset] ^= 1
    assert probe(bytes(changed)) is None


@pytest.mark.parametrize("head", [b"", b"\0" * HEAD_SIZE, b"Q", b"\x55\xaa" * 256, b"\xeb\x3c\x90MSDOS5.0".ljust(512)])
def test_probe_of_other_bytes_is_raw(head: bytes) -> None:
    assert probe(head) is None
    assert planted(head) is None


DESCRIPTORS = [
    b"version=1\nCID=fffffffe\n",
    b"version=3\r\n",
    b"# a comment\nversion=1\n",
    b"# two\r\n#\n  \n \r\nversion=2\n",
]
"""What QEMU takes for a VMDK whose disk lies in the files that the lines below name."""


@pytest.mark.parametrize("text", DESCRIPTORS)
def test_probe_vmdk_descriptor_without_its_usual_comment_is_vmdk(tmp_path: Path, text: bytes) -> None:
    assert probe(text) == probe(text.ljust(HEAD_SIZE, b"\0")) == "vmdk"
    path = tmp_path / "disk.img"
    path.write_bytes(b"#" + bytes(HEAD_SIZE - 1))

    async def main() -> None:
        image = await open_image(path)
        with pytest.raises(RequestError, match="vmdk") as caught:
            await image.write(0, text)
        assert caught.value.errno == errno.EPERM
        await image.close()

    asyncio.run(main())


@pytest.mark.parametrize("text", [b"#" * HEAD_SIZE, b"# x\n" * 128, b"Version=1\n", b"x\nversion=1\n", b"version="])
def test_probe_text_that_is_no_vmdk_descriptor_is_raw(text: bytes) -> None:
    assert probe(text) is None


@pytest.mark.parametrize("size", [0, HEAD_SIZE, 8192])
@pytest.mark.parametrize(("offset", "magic", "name"), [magic for magic in MAGICS if magic[2] not in DRIVERS])
def test_open_by_magic_of_a_format_without_driver_is_refused_in_one_line(
    tmp_path: Path, offset: int, magic: bytes, name: str, size: int
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes((bytes(offset) + magic).ljust(size, b"\0"))
    count = descriptor_count(os.getpid())
    with pytest.raises(UnrecognizedFormat, match=f"this is a {name} image") as caught:
        asyncio.run(open_image(path))
    assert "\n" not in str(caught.value)
    assert "--format raw" in str(caught.value)
    assert str(path) in str(caught.value)
    assert descriptor_count(os.getpid()) == count


@pytest.mark.parametrize("size", [4, 71, 72, HEAD_SIZE, 8192])
def test_open_by_magic_of_qcow2_never_falls_back_to_raw(tmp_path: Path, size: int) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"QFI\xfb".ljust(size, b"\0"))
    count = descriptor_count(os.getpid())
    with pytest.raises(ImageError, match=r"version is 0, expected 2 or 3|a qcow2 header takes 72") as caught:
        asyncio.run(open_image(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert descriptor_count(os.getpid()) == count


@pytest.mark.parametrize(("offset", "magic", "name"), MAGICS)
def test_open_with_explicit_raw_serves_the_bytes_and_has_no_guard(
    tmp_path: Path, offset: int, magic: bytes, name: str
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(head_with(offset, magic))

    async def main() -> None:
        image = await open_image(path, format="raw")
        await image.write(0, b"vhdxfile")
        await image.close()

    asyncio.run(main())
    assert path.read_bytes().startswith(b"vhdxfile")


@pytest.mark.parametrize(("offset", "magic", "name"), MAGICS)
def test_open_probed_raw_refuses_to_grow_the_magic(tmp_path: Path, offset: int, magic: bytes, name: str) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"\xee" * 4096)

    async def main() -> None:
        image = await open_image(path)
        with pytest.raises(RequestError, match=name) as caught:
            await image.write(offset, magic)
        assert caught.value.errno == errno.EPERM
        await image.close()

    asyncio.run(main())
    assert path.read_bytes() == b"\xee" * 4096


@pytest.mark.parametrize("size", [0, 1, 511])
def test_open_of_a_file_shorter_than_the_head_is_raw(tmp_path: Path, size: int) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"\xee" * size)

    async def main() -> int:
        image = await open_image(path)
        await image.close()
        return image.size

    assert asyncio.run(main()) == size


def test_open_locks_the_image_unless_told_not_to(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))

    async def main() -> None:
        first = await open_image(path)
        count = descriptor_count(os.getpid())
        with pytest.raises(ImageLocked):
            await open_image(path)
        assert descriptor_count(os.getpid()) == count
        await (await open_image(path, lock=False)).close()
        await first.close()
        await (await open_image(path)).close()

    asyncio.run(main())


@pytest.mark.parametrize("name", ["vdi", "RAW", "", "raw "])
def test_format_without_driver_is_a_config_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="known are raw, qcow2"):
        check_format(name)
    with pytest.raises(ConfigError, match="known are raw, qcow2"):
        create_image(tmp_path / "x", 1, format=name)
    assert not (tmp_path / "x").exists()
