"""One poked field at a time: what an untrusted image may not say, and how it is refused.

The image under the pokes has 4 KiB clusters, laid out by qemu-img as

    0x0000 header    0x1000 refcount table    0x2000 refcount block    0x3000 L1 table    0x4000 L2 table    0x5000 data

and 64 KiB of guest bytes, of which the first 12 KiB are sevens.
"""

from __future__ import annotations

import asyncio
import struct
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdimg.errors import CorruptImage, ImageError, ImageFailed, UnsupportedFeature
from nbdimg.formats import open_file
from nbdimg.formats.gate import DenyGate
from nbdimg.formats.options import OpenOptions
from nbdimg.formats.qcow2.check import check
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.formats.qcow2.mapping import Mapping
from nbdimg.formats.qcow2.open import read_header
from nbdimg.formats.qcow2.refcount import Refcounts
from nbdimg.image.driver import Extent
from nbdimg.image.image import Image
from tests.support.qcow2edit import Edit, qemu_img, qemu_io
from tests.support.qcow2mutants import AnyGate, BoundedFile
from tests.support.reading import bytes_of

SIZE = 64 << 10
COPIED = 1 << 63
Poke = tuple[int, bytes]


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def made(directory: Path, options: str) -> bytes:
    path = directory / "image.qcow2"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(path), str(SIZE)]
    subprocess.run(create, check=True)
    write = ["qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 12k", str(path)]
    subprocess.run(write, check=True)
    return path.read_bytes()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    content = made(tmp_path_factory.mktemp("plain"), "cluster_size=4k")
    assert struct.unpack_from(">IQQI", content, 36) == (1, 0x3000, 0x1000, 1)
    assert struct.unpack_from(">Q", content, 0x3000) == (COPIED | 0x4000,)
    assert struct.unpack_from(">QQ", content, 0x4000) == (COPIED | 0x5000, COPIED | 0x6000)
    return content


@pytest.fixture(scope="module")
def version2(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return made(tmp_path_factory.mktemp("version2"), "cluster_size=4k,compat=0.10")


@pytest.fixture(scope="module")
def subclusters(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Clusters of 16 KiB: L2 table at 0x10000, data at 0x14000."""
    content = made(tmp_path_factory.mktemp("subclusters"), "cluster_size=16k,extended_l2=on")
    assert struct.unpack_from(">QQ", content, 0x10000) == (COPIED | 0x14000, 0xFF_FFFF)
    return content


def poked(content: bytes, *pokes: Poke) -> bytes:
    changed = bytearray(content)
    for offset, data in pokes:
        changed[offset : offset + len(data)] = data
    return bytes(changed)


async def opened(content: bytes, *, writable: bool = False, external: bytes = b"") -> tuple[Image, BoundedFile]:
    file = BoundedFile(content, writable=writable)
    return await open_file(file, "qcow2", OpenOptions(AnyGate(external), writable=writable)), file


HEADER = [
    ("magic", (0, b"QFI\xfa"), "magic is 0x514649fa, expected 0x514649fb (header offset 0)"),
    ("version 1", (4, u32(1)), "version is 1, expected 2 or 3 (header offset 4)"),
    ("version 4", (4, u32(4)), "version is 4, expected 2 or 3 (header offset 4)"),
    ("cluster_bits low", (20, u32(8)), "cluster_bits is 8, expected 9 to 21 (header offset 20)"),
    ("cluster_bits high", (20, u32(22)), "cluster_bits is 22, expected 9 to 21 (header offset 20)"),
    ("cluster_bits huge", (20, u32(0xFFFFFFFF)), "cluster_bits is 4294967295, expected 9 to 21"),
    ("header_length short", (100, u32(96)), "header_length is 96, expected a multiple of 8 from 104 to 4096"),
    ("header_length odd", (100, u32(108)), "header_length is 108, expected a multiple of 8"),
    ("header_length long", (100, u32(4104)), "header_length is 4104, expected a multiple of 8 from 104 to 4096"),
    ("refcount_order", (96, u32(7)), "refcount_order is 7, expected 0 to 6 (header offset 96)"),
    ("incompatible 5", (72, u64(1 << 5)), "incompatible features are not known here: bit 5 (header offset 72)"),
    ("incompatible 63", (72, u64(1 << 63)), "incompatible features are not known here: bit 63"),
    ("compression bit", (72, u64(8)), "compression_type is 0, expected non-zero exactly when"),
    ("compression type", (104, b"\1"), "compression_type is 1, expected non-zero exactly when"),
    ("compression unknown", (104, b"\2"), "compression_type is 2, known are 0 (zlib) and 1 (zstd)"),
    ("extended L2 small", (72, u64(16)), "cluster_bits is 12, expected 14 to 21 with extended L2 entries"),
    ("raw external alone", (88, u64(2)), "autoclear_features is 0x2, expected bit 1 only with an external data file"),
    ("data file unnamed", (72, u64(4)), "its data is in an external file, and the header does not name it"),
    ("crypt_method", (32, u32(3)), "crypt_method is 3, expected 0 (none), 1 (AES) or 2 (LUKS) (header offset 32)"),
    ("LUKS without header", (32, u32(2)), "crypt_method is 2 (LUKS), and there is no LUKS header extension"),
    ("size", (24, u64(1 << 63)), "size is 9223372036854775808, expected at most 9223372036854775296"),
    ("l1_size small", (24, u64(1 << 40)), "l1_size is 1, expected 524288 to 4194304 (header offset 36)"),
    ("l1_size zero", (36, u32(0)), "l1_size is 0, expected 1 to 4194304 (header offset 36)"),
    ("l1_size huge", (36, u32(0xFFFFFFFF)), "l1_size is 4294967295, expected 1 to 4194304"),
    ("l1 outside", (36, u32(4 << 20)), "the L1 table ends at 33566720, expected inside the file's"),
    ("l1 unaligned", (40, u64(0x3200)), "l1_table_offset is 12800, expected a multiple of 4096 from 4096"),
    ("l1 in header", (40, u64(0)), "l1_table_offset is 0, expected a multiple of 4096 from 4096"),
    ("l1 beyond 2^56", (40, u64(1 << 56)), "l1_table_offset is 72057594037927936, expected"),
    ("l1 wraps", (40, u64((1 << 64) - 4096)), "l1_table_offset is 18446744073709547520, expected"),
    ("refcount clusters 0", (56, u32(0)), "refcount_table_clusters is 0, expected 1 to 2048 (header offset 56)"),
    ("refcount clusters many", (56, u32(2049)), "refcount_table_clusters is 2049, expected 1 to 2048"),
    ("refcount unaligned", (48, u64(0x1001)), "refcount_table_offset is 4097, expected a multiple of 4096"),
    ("refcount wraps", (48, u64((1 << 64) - 4096)), "refcount_table_offset is 18446744073709547520, expected"),
    ("snapshots many", (60, u32(65537)), "nb_snapshots is 65537, expected at most 65536 (header offset 60)"),
    ("snapshots unaligned", (60, u32(1) + u64(0x3008)), "snapshots_offset is 12296, expected a multiple of 4096"),
    ("backing outside", (8, u64(4096) + u32(8)), "backing_file_offset is 4096, expected"),
    ("backing at the end", (8, u64(4090) + u32(8)), "backing_file_offset is 4090, expected"),
    ("backing in fields", (8, u64(80) + u32(8)), "backing_file_offset is 80, expected"),
    ("backing long", (8, u64(1024) + u32(1024)), "backing_file_size is 1024, expected 1 to 1023 (header offset 16)"),
    ("backing empty", (8, u64(1024) + u32(0)), "backing_file_size is 0, expected 1 to 1023 (header offset 16)"),
    ("backing NUL", (8, u64(1024) + u32(4)), "the backing file name is '\\x00\\x00\\x00\\x00', expected printable"),
    ("extension long", (112, u32(0x12345678) + u32(4000)), "the length of extension 0x12345678 is 4000, expected"),
    ("extension wraps", (112, u32(0x12345678) + u32(0xFFFFFFFF)), "the length of extension 0x12345678 is 4294967295"),
    ("extension twice", (112, (u32(0x12345678) + u32(0)) * 2), "extension 0x12345678 is there twice, allowed is one"),
    (
        "format long",
        (112, u32(0xE2792ACA) + u32(16) + b"q" * 16),
        "the backing format's length is 16, expected at most 15",
    ),
    (
        "bitmaps short",
        (112, u32(0x23852875) + u32(16) + bytes(16)),
        "the bitmaps extension's length is 16, expected 24",
    ),
    ("LUKS short", (112, u32(0x0537BE77) + u32(8) + bytes(8)), "the LUKS extension's length is 8, expected 16"),
    ("LUKS alone", (112, u32(0x0537BE77) + u32(16) + bytes(16)), "crypt_method is 0, expected 2 with a LUKS header"),
]
"""(name, poke, the beginning of the sentence). Rules 1 to 9 of a header."""


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize(("poke", "message"), [each[1:] for each in HEADER], ids=[each[0] for each in HEADER])
def test_header_field_out_of_range_is_refused_by_name(plain: bytes, poke: Poke, message: str, writable: bool) -> None:
    content = poked(plain, poke)
    file = BoundedFile(content, writable=writable)
    with pytest.raises(ImageError) as caught:
        asyncio.run(open_file(file, "qcow2", OpenOptions(DenyGate(), writable=writable)))
    assert str(caught.value).startswith(f"memory: {message}")
    assert "\n" not in str(caught.value)
    assert file.content == content


@pytest.mark.parametrize("length", [0, 1, 4, 71, 72, 103])
def test_file_shorter_than_its_header_is_refused(plain: bytes, length: int) -> None:
    with pytest.raises(CorruptImage, match=r"the file has \d+ bytes, a (qcow2|version 3) header takes (72|104)"):
        asyncio.run(opened(plain[:length]))


def test_version_2_does_not_read_the_fields_of_version_3(version2: bytes) -> None:
    """Bytes from 72 on are extensions there: an end marker first, whatever stands behind it."""

    async def main() -> None:
        image, _ = await opened(poked(version2, (80, b"\xff" * 32)))
        assert await bytes_of(image, 0, 16 << 10) == b"\7" * (12 << 10) + bytes(4 << 10)

    asyncio.run(main())


def test_unknown_incompatible_feature_is_named_by_the_images_own_table(plain: bytes) -> None:
    name = struct.pack(">BB46s", 0, 17, b"time\x1btravel")
    table = u32(0x6803F857) + u32(48) + name + u64(0)
    content = poked(plain, (72, u64(1 << 17 | 1 << 18)), (112, table))
    with pytest.raises(UnsupportedFeature) as caught:
        asyncio.run(opened(content))
    assert "not known here: 'time\\x1btravel', bit 18 (header offset 72)" in str(caught.value)


L2 = 0x4000
ENTRIES: list[tuple[str, Poke, str]] = [
    ("L1 reserved low", (0x3000, u64(COPIED | 0x4001)), "L1 entry 0 is 0x8000000000004001, expected a multiple"),
    ("L1 reserved high", (0x3000, u64(1 << 56 | 0x4000)), "L1 entry 0 is 0x0100000000004000, expected a multiple"),
    ("L1 unaligned", (0x3000, u64(COPIED | 0x4200)), "L1 entry 0 is 0x8000000000004200, expected a multiple of 4096"),
    ("L1 outside", (0x3000, u64(COPIED | 1 << 40)), "L1 entry 0 is 0x8000010000000000, expected a multiple of 4096"),
    ("L2 reserved low", (L2, u64(COPIED | 0x5002)), "the L2 entry of guest offset 0 is 0x8000000000005002, expected"),
    ("L2 reserved high", (L2, u64(1 << 60 | 0x5000)), "the L2 entry of guest offset 0 is 0x1000000000005000, expected"),
    ("L2 unaligned", (L2, u64(COPIED | 0x5200)), "the L2 entry of guest offset 0 is 0x8000000000005200, expected"),
    ("L2 copied nothing", (L2, u64(COPIED)), "the L2 entry of guest offset 0 is 0x8000000000000000, expected a host"),
    (
        "compressed copied",
        (L2, u64(3 << 62 | 0x5000)),
        "the L2 entry of guest offset 0 is 0xc000000000005000, expected",
    ),
    (
        "compressed outside",
        (L2, u64(1 << 62 | 1 << 40)),
        "the compressed cluster at offset 1099511627776 begins behind",
    ),
    ("compressed rubbish", (L2, u64(1 << 62 | 0x5000)), "the compressed cluster at offset 20480 does not inflate"),
]
"""Rules 11 and 12."""


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize(("poke", "message"), [each[1:] for each in ENTRIES], ids=[each[0] for each in ENTRIES])
def test_malformed_entry_fails_the_read_that_needs_it_and_no_other(
    plain: bytes, poke: Poke, message: str, writable: bool
) -> None:
    async def main() -> None:
        image, _ = await opened(poked(plain, poke), writable=writable)
        with pytest.raises(CorruptImage) as caught:
            await bytes_of(image, 0, 512)
        assert str(caught.value).startswith(f"memory: {message}")
        if poke[0] == L2:
            assert await bytes_of(image, 4096, 512) == b"\7" * 512

    asyncio.run(main())


def test_zero_flag_in_version_2_is_refused(version2: bytes) -> None:
    (table,) = struct.unpack_from(">Q", version2, struct.unpack_from(">Q", version2, 40)[0])
    content = poked(version2, (table & ~COPIED, u64(COPIED | 0x5001)))

    async def main() -> None:
        image, _ = await opened(content)
        with pytest.raises(CorruptImage, match="no zero flag in version 2"):
            await bytes_of(image, 0, 1)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("entry", "bitmap", "message"),
    [
        (COPIED | 0x14000, 1 << 32 | 1, "no subcluster both allocated and zero, not 0x0000000100000001"),
        (COPIED | 0x14001, 1, "a multiple of 16384, and the reserved bits 0"),
        (0, 1, "a host offset where subclusters are allocated"),
        (1 << 62 | 0x14000, 1, "no compressed cluster with COPIED, subclusters or external data"),
        (COPIED | 0x14200, 1, "a multiple of 16384, and the reserved bits 0"),
    ],
)
@pytest.mark.parametrize("writable", [False, True])
def test_malformed_extended_entry_is_refused(
    subclusters: bytes, entry: int, bitmap: int, message: str, writable: bool
) -> None:
    async def main() -> None:
        image, _ = await opened(poked(subclusters, (0x10000, u64(entry) + u64(bitmap))), writable=writable)
        with pytest.raises(CorruptImage, match=message):
            await bytes_of(image, 0, 1)
        if writable:
            with pytest.raises(CorruptImage, match=message):
                await image.write(0, b"x")

    asyncio.run(main())


@pytest.mark.parametrize("entry", [0x4000_0000, COPIED | 0x4000_0000])
def test_data_beyond_the_file_reads_as_zeroes_and_is_not_written(plain: bytes, entry: int) -> None:
    async def main() -> None:
        image, file = await opened(poked(plain, (L2, u64(entry))), writable=True)
        assert await bytes_of(image, 0, 512) == bytes(512)
        if entry >= COPIED:
            with pytest.raises(CorruptImage, match="expected one inside the file that holds no metadata"):
                await image.write(0, b"x")
        await image.close()
        assert file.size < 1 << 20

    asyncio.run(main())


OVERLAPS = [
    ("L1 on the refcount table", [(40, u64(0x1000))], "the refcount table lies in other metadata"),
    ("L1 on a refcount block", [(40, u64(0x2000))], "a refcount block lies in other metadata"),
    ("refcount block on the L1 table", [(0x1000, u64(0x3000))], "a refcount block lies in other metadata"),
    ("refcount block in the header", [(0x1000, u64(0x200))], "a refcount block lies in other metadata"),
    ("refcount block twice", [(0x1008, u64(0x2000))], "a refcount block lies in other metadata"),
    ("L2 on the L1 table", [(0x3000, u64(COPIED | 0x3000))], "an L2 table lies in other metadata"),
    ("L2 on the refcount table", [(0x3000, u64(COPIED | 0x1000))], "an L2 table lies in other metadata"),
    ("L2 twice", [(36, u32(2)), (0x3008, u64(COPIED | 0x4000))], "an L2 table lies in other metadata"),
]


@pytest.mark.parametrize(("pokes", "message"), [each[1:] for each in OVERLAPS], ids=[each[0] for each in OVERLAPS])
def test_metadata_in_other_metadata_is_read_and_never_written(plain: bytes, pokes: list[Poke], message: str) -> None:
    """Rule 16."""
    content = poked(plain, *pokes)

    async def reading() -> None:
        image, file = await opened(content)
        for offset in range(0, SIZE, 4096):
            try:
                await bytes_of(image, offset, 4096)
            except CorruptImage:
                continue
        assert file.content == content

    asyncio.run(reading())
    file = BoundedFile(content)
    with pytest.raises(CorruptImage, match=message):
        asyncio.run(open_file(file, "qcow2", OpenOptions(DenyGate(), writable=True)))
    assert file.content == content


METADATA = {"refcount table": 0x1000, "refcount block": 0x2000, "L1 table": 0x3000, "L2 table": 0x4000}


async def write(image: Image) -> None:
    await image.write(0, b"x" * 100)


async def trim(image: Image) -> None:
    await image.trim(0, 4096)


async def zero(image: Image) -> None:
    await image.zero(0, 4096, may_unmap=True, is_fast_only=False)


@pytest.mark.parametrize("change", [write, trim, zero])
@pytest.mark.parametrize("flags", [0, COPIED])
@pytest.mark.parametrize("host", METADATA.values(), ids=list(METADATA))
def test_guest_data_mapped_to_metadata_is_not_written_freed_or_punched(
    plain: bytes, host: int, flags: int, change: Callable[[Image], object]
) -> None:
    """The image is marked corrupt (incompatible bit 1), and nothing else in it changes."""
    content = poked(plain, (L2, u64(flags | host)))

    async def main() -> None:
        image, file = await opened(content, writable=True)
        with pytest.raises(CorruptImage, match=r"that hold.? no metadata"):
            await change(image)  # type: ignore[misc]
        with pytest.raises(CorruptImage):
            await image.write(32 << 10, b"another place")
        assert await bytes_of(image, 4096, 512) == b"\7" * 512
        await image.close()
        assert file.content == poked(content, (72, u64(2)))

    asyncio.run(main())


@pytest.mark.parametrize("change", [write, trim, zero])
@pytest.mark.parametrize("others", [1, 2])
@pytest.mark.parametrize("host", [0x3000, 0x4000], ids=["L1 table", "L2 table"])
def test_guest_data_that_is_counted_beside_metadata_is_given_up_and_the_last_count_stays(
    plain: bytes, host: int, others: int, change: Callable[[Image], object]
) -> None:
    """As after a repair, which cannot part the two; with one guest cluster less counted than there are, too."""
    pokes = [(L2 + 8 * index, u64(host)) for index in range(2)]
    content = poked(plain, *pokes, (0x2000 + 2 * (host >> 12), struct.pack(">H", 1 + others)))
    if host == 0x4000:
        content = poked(content, (0x3000, u64(host)))

    async def main() -> None:
        image, file = await opened(content, writable=True)
        await change(image)  # type: ignore[misc]
        if others == 2:
            await image.write(4096, b"y" * 4096)
            assert await bytes_of(image, 4096, 4096) == b"y" * 4096
        assert (await bytes_of(image, 0, 4096))[:100] in (b"x" * 100, bytes(100))
        await image.write(32 << 10, b"another place")
        await image.close()
        assert file.content[72:80] == bytes(8)
        assert int.from_bytes(file.content[0x2000 + 2 * (host >> 12) :][:2], "big") >= 1
        table = int.from_bytes(file.content[0x3000:0x3008], "big") & ~COPIED
        assert file.content[table + 8 * 2 :][:8] == plain[L2 + 8 * 2 :][:8]
        assert others == 1 or not (await check(file, await read_header(file))).corruptions

    asyncio.run(main())


def test_flush_after_corruption_was_found_does_not_say_that_what_was_mapped_before_is_durable(plain: bytes) -> None:
    content = poked(plain, (L2, u64(COPIED | METADATA["L1 table"])))

    async def main() -> None:
        image, file = await opened(content, writable=True)
        await image.write(32 << 10, b"x" * 4096)
        with pytest.raises(CorruptImage):
            await image.write(0, b"x" * 100)
        for _ in range(2):
            with pytest.raises(ImageFailed, match="may be lost"):
                await image.flush()
        with pytest.raises(ImageFailed):
            await image.close()
        assert file.content[72:80] == u64(2)

    asyncio.run(main())


def test_flush_after_corruption_was_found_covers_what_is_in_place(plain: bytes) -> None:
    content = poked(plain, (L2, u64(COPIED | METADATA["L1 table"])))

    async def main() -> None:
        image, _ = await opened(content, writable=True)
        await image.write(32 << 10, b"x" * 4096)
        await image.flush()
        with pytest.raises(CorruptImage):
            await image.write(0, b"x" * 100)
        await image.write(32 << 10, b"y" * 4096)
        await image.flush()
        await image.close()

    asyncio.run(main())


@pytest.mark.parametrize("is_guarded", [False, True])
def test_control_without_the_check_of_what_is_given_up_metadata_is_punched(
    plain: bytes, monkeypatch: pytest.MonkeyPatch, is_guarded: bool
) -> None:
    """Unless what gives it up keeps the last count, too."""
    monkeypatch.setattr(Mapping, "_check_old", lambda *arguments: None)
    if not is_guarded:
        monkeypatch.setattr(Refcounts, "free_beside_metadata", Refcounts.free)
    content = poked(plain, (L2, u64(COPIED | 0x3000)))

    async def main() -> None:
        image, file = await opened(content, writable=True)
        await image.trim(0, 4096)
        await image.close()
        assert (file.content[0x3000:0x4000] == bytes(4096)) != is_guarded

    asyncio.run(main())


def test_guest_data_mapped_to_metadata_in_version_2_leaves_the_file_alone(version2: bytes) -> None:
    """There is no corrupt bit in version 2, and where it would be an extension may lie."""
    (l1,) = struct.unpack_from(">Q", version2, 40)
    table = struct.unpack_from(">Q", version2, l1)[0] & ~COPIED
    content = poked(version2, (table, u64(COPIED | l1)), (72, u32(0x12345678) + u32(0)))

    async def main() -> None:
        image, file = await opened(content, writable=True)
        with pytest.raises(CorruptImage):
            await image.write(0, b"x")
        await image.close()
        assert file.content == content

    asyncio.run(main())


def test_refcount_that_drops_below_zero_marks_the_image_corrupt(plain: bytes) -> None:
    """Cluster 5 is in use with refcount 0; it is found when the cluster is given up. Nothing is handed out twice."""
    content = poked(plain, (0x2000 + 2 * 5, b"\0\0"))

    async def main() -> None:
        image, file = await opened(content, writable=True)
        await image.trim(0, 4096)
        await image.close()
        assert file.content[72:80] == u64(2)

    asyncio.run(main())


def test_refcount_0_of_a_metadata_cluster_is_found_before_it_is_handed_out(plain: bytes) -> None:
    content = poked(plain, (0x2000, bytes(4096)))

    async def main() -> None:
        image, file = await opened(content, writable=True)
        with pytest.raises(CorruptImage, match="cluster 0 holds metadata and has refcount 0, expected 1"):
            await image.write(32 << 10, b"x" * 4096)
        await image.close()
        assert file.content == poked(content, (72, u64(2)))

    asyncio.run(main())


def test_external_data_at_another_than_its_guest_offset_is_refused(tmp_path: Path) -> None:
    """Rule 11: the data file's layout is the guest's."""
    content = made(tmp_path, f"cluster_size=4k,data_file={tmp_path}/data")
    data = (tmp_path / "data").read_bytes()
    (l1,) = struct.unpack_from(">Q", content, 40)
    table = struct.unpack_from(">Q", content, l1)[0] & ~COPIED
    assert struct.unpack_from(">QQ", content, table) == (COPIED, COPIED | 0x1000)

    async def main() -> None:
        image, _ = await opened(poked(content, (table + 8, u64(COPIED | 0x2000))), writable=True, external=data)
        assert await bytes_of(image, 0, 4096) == b"\7" * 4096
        for work in (bytes_of(image, 4096, 1), image.write(4096, b"x")):
            with pytest.raises(CorruptImage, match="expected the guest offset 0x1000 in an external data file"):
                await work

    asyncio.run(main())


@pytest.mark.parametrize(("options", "entry_size"), [("cluster_size=16k", 8), ("cluster_size=16k,extended_l2=on", 16)])
def test_external_data_without_its_flag_is_written_in_place(tmp_path: Path, options: str, entry_size: int) -> None:
    """Nobody else can have it, so there is no other place for it."""
    path, data_path = tmp_path / "image.qcow2", tmp_path / "data"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"{options},data_file={data_path}", path, str(SIZE))
    qemu_io(path, "write -q -P 7 0 48k")
    content, data = path.read_bytes(), data_path.read_bytes()
    entry = Edit(path).l2() + entry_size
    assert content[entry : entry + 8] == u64(COPIED | 0x4000)

    async def main() -> None:
        image, _ = await opened(poked(content, (entry, u64(0x4000))), writable=True, external=data)
        assert await bytes_of(image, 0x4000, 1) == b"\7"
        placed = image.driver.place(0x4000, SIZE)
        assert isinstance(placed, Extent)
        assert placed.writable
        await image.write(0x4000 + 700, b"x" * 300)
        expected = b"\7" * 700 + b"x" * 300 + b"\7" * (0x4000 - 1000)
        assert await bytes_of(image, 0x4000, 0x4000) == expected

    asyncio.run(main())


@pytest.mark.parametrize("field", ["compressed", "snapshot"])
def test_external_data_file_with_what_it_excludes_is_refused(tmp_path: Path, field: str) -> None:
    content = made(tmp_path, f"cluster_size=4k,data_file={tmp_path}/data")
    (l1,) = struct.unpack_from(">Q", content, 40)
    table = struct.unpack_from(">Q", content, l1)[0] & ~COPIED
    poke = (60, u32(1) + u64(l1)) if field == "snapshot" else (table, u64(1 << 62 | 0x5000))

    async def main() -> None:
        image, _ = await opened(poked(content, poke), external=bytes(SIZE))
        await bytes_of(image, 0, 1)

    expected = "nb_snapshots is 1, expected 0" if field == "snapshot" else "no compressed cluster with COPIED or an ext"
    with pytest.raises(CorruptImage, match=expected):
        asyncio.run(main())


# Work and memory


def test_opening_many_snapshots_with_huge_l1_tables_takes_little_memory(plain: bytes) -> None:
    """Each entry claims an L1 table of 32 MiB, far behind the file's end."""
    count = 512
    entries = b"".join(
        struct.pack(">QIHHIIQII", (1 + n) << 32, 4 << 20, 1, 0, 0, 0, 0, 0, 16) + u64(0) + u64(SIZE) + b"1".ljust(8)
        for n in range(count)
    )
    content = poked(plain.ljust(0x10000, b"\0") + entries.ljust(64 << 10, b"\0"), (60, u32(count) + u64(0x10000)))

    async def main() -> None:
        image, _ = await opened(content, writable=True)
        await image.driver.abandon()

    tracemalloc.start()
    try:
        asyncio.run(main())
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_snapshot_is_opened_without_the_tables_of_its_vm_state(plain: bytes) -> None:
    """They may be claimed to take 32 MiB each, and all snapshots are exported at once."""
    entry = struct.pack(">QIHHIIQII", 0x3000, 4 << 20, 1, 0, 0, 0, 0, 0, 16) + u64(1 << 40) + u64(SIZE) + b"1"
    content = poked(plain.ljust(0x11000, b"\0"), (60, u32(1) + u64(0x10000)), (0x10000, entry))

    async def main() -> None:
        image = await open_file(BoundedFile(content), "qcow2", OpenOptions(AnyGate(b""), snapshot="1"))
        assert isinstance(image.driver, Qcow2Driver)
        assert len(image.driver.mapping.l1.entries) == 1
        assert await bytes_of(image, 0, 4096) == b"\7" * 4096
        await image.driver.abandon()

    asyncio.run(main())


@pytest.mark.parametrize("is_dirty", [False, True])
def test_snapshots_whose_l1_tables_lie_one_in_the_other_take_no_time_and_are_not_written_to(
    plain: bytes, is_dirty: bool
) -> None:
    """Each entry claims an L1 table of 1024 clusters inside the file, all of them the same."""
    count = 1024
    entries = struct.pack(">QIHHIIQII", 0x10000, 4 << 17, 1, 0, 0, 0, 0, 0, 16) + u64(0) + u64(SIZE) + b"1".ljust(8)
    content = poked(plain.ljust(8 << 20, b"\0"), (60, u32(count) + u64(0x10000)), (0x10000, entries * count))
    content = poked(content, (72, u64(is_dirty)))

    async def main() -> None:
        with pytest.raises(UnsupportedFeature, match="take 1048576 clusters, allowed are 524288"):
            await opened(content, writable=True)
        image, _ = await opened(content)
        assert await bytes_of(image, 0, 4096) == b"\7" * 4096
        await image.driver.abandon()

    asyncio.run(main())


def test_l1_entry_with_a_flag_and_no_offset_is_unallocated(plain: bytes) -> None:
    """Spec: offset 0 means unallocated, whatever COPIED says; a look-up must come to an end."""

    async def main() -> None:
        image, _ = await opened(poked(plain, (0x3000, u64(COPIED))), writable=True)
        assert await bytes_of(image, 0, 8192) == bytes(8192)
        await image.trim(0, 4096)
        await image.write(0, b"x" * 4096)
        assert await bytes_of(image, 0, 8192) == b"x" * 4096 + bytes(4096)
        await image.close()

    asyncio.run(main())
