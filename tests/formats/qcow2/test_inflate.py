"""Compressed clusters: streams of both kinds as writers make them, and those that nobody should."""

from __future__ import annotations

import asyncio
import random
import sys
import tracemalloc
import zlib
from typing import Any

import pytest

from nbdimg.errors import CorruptImage
from nbdimg.formats.qcow2.inflate import InflatedFile
from nbdimg.formats.qcow2.packed import compressed_clusters, compressed_range
from nbdimg.storage.memory import MemoryFile
from tests.support.faultfile import FaultFile

BITS = 16
SIZE = 1 << BITS
ZLIB, ZSTD = 0, 1
AT = 0x20123
"""Where the compressed data lies: not aligned to anything."""

CLUSTER = b"".join(random.Random(n).randbytes(64) * 16 for n in range(64))
FAR = random.Random(5).randbytes(20_000) + bytes(5536) + random.Random(5).randbytes(20_000) + bytes(20_000)
"""What repeats at a distance of more than 4 KiB."""


def zstd() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def deflated(data: bytes, window: int) -> bytes:
    compressor = zlib.compressobj(wbits=window)
    return compressor.compress(data) + compressor.flush()


def descriptor(offset: int, length: int, bits: int = BITS) -> int:
    """Spec "Compressed Clusters Descriptor": the offset, and above it the 512-byte sectors behind the first."""
    sectors = (offset + length - 1) // 512 - offset // 512
    return offset | sectors << (62 - (bits - 8))


def read(data: bytes, compression: int, *, rest: bytes = b"", start: int = 0, length: int = SIZE) -> bytes:
    file = InflatedFile(MemoryFile(bytes(AT) + data + rest), BITS, compression)
    view = memoryview(bytearray(length))
    asyncio.run(file.pread((descriptor(AT, len(data)) << BITS) + start, view))
    return bytes(view)


@pytest.mark.parametrize(
    ("entry", "bits", "expected"),
    [
        (0x4040_0000_0001_FF00, 16, (0x1FF00, 768)),
        (0x4000_0000_0001_0000, 16, (0x10000, 512)),
        (0x7FC0_0000_0000_0000, 16, (0, 256 * 512)),
        (0x6000_0000_0000_0201, 9, (0x201, 1023)),
        (0x4000_0000_0000_0400, 9, (0x400, 512)),
        (0x4002_0000_0000_0001, 21, (1, 1023)),
        (0x7FFE_0000_0000_0000, 21, (0, 8192 * 512)),
    ],
)
def test_range_of_a_descriptor_at_both_ends_of_the_cluster_sizes(
    entry: int, bits: int, expected: tuple[int, int]
) -> None:
    assert compressed_range(entry & ~(1 << 62), bits) == expected


def test_clusters_of_data_that_crosses_a_host_cluster() -> None:
    assert compressed_clusters(0x4040_0000_0001_FF00, 16) == (1, 2)
    assert compressed_clusters(0x4000_0000_0001_0000, 16) == (1, 1)


@pytest.mark.parametrize("window", [-12, -15])
@pytest.mark.parametrize("cluster", [CLUSTER, FAR, bytes(SIZE)])
def test_deflate_with_either_window_gives_the_cluster(window: int, cluster: bytes) -> None:
    data = deflated(cluster, window)
    assert read(data, ZLIB) == cluster
    assert read(data, ZLIB, rest=b"\xee" * 600) == cluster, "rubbish behind the end of the stream"
    assert read(data, ZLIB, start=1000, length=77) == cluster[1000:1077]


def test_control_the_far_cluster_needs_the_larger_window() -> None:
    with pytest.raises(zlib.error, match="invalid distance"):
        zlib.decompressobj(-12).decompress(deflated(FAR, -15))


@pytest.mark.parametrize("cluster", [CLUSTER, FAR, bytes(SIZE)])
@pytest.mark.parametrize("rest", [b"", b"\xee" * 600, bytes(600)])
def test_zstd_gives_the_cluster(cluster: bytes, rest: bytes) -> None:
    assert read(zstd().compress(cluster), ZSTD, rest=rest) == cluster


def test_zstd_of_several_frames_gives_the_cluster() -> None:
    frames = [zstd().compress(CLUSTER[start : start + 10_000]) for start in range(0, SIZE, 10_000)]
    assert read(b"".join(frames), ZSTD, rest=b"\xee" * 100) == CLUSTER


@pytest.mark.parametrize("compression", [ZLIB, ZSTD])
@pytest.mark.parametrize("size", [0, 1, SIZE - 1])
def test_stream_that_ends_before_the_cluster_does_is_refused(compression: int, size: int) -> None:
    data = deflated(bytes(size), -12) if compression == ZLIB else zstd().compress(bytes(size))
    what = f"inflates to {size} bytes, expected {SIZE}|does not inflate .*Unknown frame"
    with pytest.raises(CorruptImage, match=f"compressed cluster at offset {AT} ({what})"):
        read(data, compression)


@pytest.mark.parametrize("compression", [ZLIB, ZSTD])
def test_stream_that_is_cut_off_is_refused(compression: int) -> None:
    data = deflated(FAR, -15) if compression == ZLIB else zstd().compress(FAR)
    with pytest.raises(CorruptImage, match=f"compressed cluster at offset {AT} (inflates to|does not inflate)"):
        read(data[: len(data) // 2], compression)


@pytest.mark.parametrize("compression", [ZLIB, ZSTD])
def test_stream_of_rubbish_is_refused_in_one_line(compression: int) -> None:
    for seed in range(40):
        with pytest.raises(CorruptImage) as caught:
            read(b"\xff" + random.Random(seed).randbytes(1000), compression)
        assert "\n" not in str(caught.value)
        assert caught.value.offset == AT


@pytest.mark.parametrize("compression", [ZLIB, ZSTD])
def test_bomb_gives_one_cluster_and_takes_no_more_memory(compression: int) -> None:
    bomb = deflated(bytes(64 << 20), -15) if compression == ZLIB else zstd().compress(bytes(64 << 20))
    tracemalloc.start()
    try:
        assert read(bomb, compression) == bytes(SIZE)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_data_behind_the_end_of_the_file_is_refused_and_a_cut_last_sector_is_not() -> None:
    data = deflated(CLUSTER, -12)
    file = InflatedFile(MemoryFile(bytes(AT) + data), BITS, ZLIB)
    with pytest.raises(CorruptImage, match="begins behind the file's"):
        asyncio.run(file.pread(descriptor(1 << 40, 512) << BITS, memoryview(bytearray(16))))


def test_reads_of_one_cluster_inflate_it_once_and_then_need_not_wait() -> None:
    data = deflated(CLUSTER, -12)
    inner = FaultFile(MemoryFile(bytes(AT) + data))
    file = InflatedFile(inner, BITS, ZLIB)
    base = descriptor(AT, len(data)) << BITS
    views = [memoryview(bytearray(100)) for _ in range(4)]

    async def main() -> None:
        assert not file.try_pread(base, views[0])
        await asyncio.gather(*(file.pread(base + 100 * index, view) for index, view in enumerate(views)))
        assert file.try_pread(base + 5, views[0])

    asyncio.run(main())
    assert bytes(views[0]) == CLUSTER[5:105]
    assert bytes(views[3]) == CLUSTER[300:400]
    assert inner.calls.count("try_pread") + inner.calls.count("pread") == 1


def test_failed_read_is_not_kept() -> None:
    data = deflated(CLUSTER, -12)
    inner = FaultFile(MemoryFile(bytes(AT) + data), slow_only=True)
    file = InflatedFile(inner, BITS, ZLIB)
    base = descriptor(AT, len(data)) << BITS
    view = memoryview(bytearray(10))

    async def main() -> None:
        inner.fail("pread", 5)
        with pytest.raises(OSError, match="Input/output"):
            await file.pread(base, view)
        inner.heal()
        await file.pread(base, view)

    asyncio.run(main())
    assert bytes(view) == CLUSTER[:10]


def test_kept_clusters_are_bounded() -> None:
    data = deflated(bytes(2 << 20), -12)
    offsets = [4096 * index for index in range(40)]
    content = b"".join(data.ljust(4096, b"\0") for _ in offsets)
    file = InflatedFile(MemoryFile(content), 21, ZLIB)

    async def main() -> None:
        for offset in offsets:
            await file.pread(descriptor(offset, len(data), 21) << 21, memoryview(bytearray(1)))

    tracemalloc.start()
    try:
        asyncio.run(main())
        assert tracemalloc.get_traced_memory()[0] < 20 << 20
    finally:
        tracemalloc.stop()
