"""Compressed clusters: streams of both kinds as writers make them, and those that nobody should."""

from __future__ import annotations

import asyncio
import random
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from nbdimg.errors import CorruptImage
from nbdimg.formats.qcow2 import inflate
from nbdimg.formats.qcow2.inflate import InflatedFile, inflated_offset
from nbdimg.formats.qcow2.packed import compressed_clusters, compressed_range
from nbdimg.storage.memory import MemoryFile
from tests.support.faultfile import FaultFile

T = TypeVar("T")

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
    asyncio.run(file.pread(inflated_offset(descriptor(AT, len(data)), start), view))
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
        asyncio.run(file.pread(inflated_offset(descriptor(1 << 40, 512), 0), memoryview(bytearray(16))))


def test_reads_of_one_cluster_inflate_it_once_and_then_need_not_wait() -> None:
    data = deflated(CLUSTER, -12)
    inner = FaultFile(MemoryFile(bytes(AT) + data))
    file = InflatedFile(inner, BITS, ZLIB)
    base = inflated_offset(descriptor(AT, len(data)), 0)
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
    base = inflated_offset(descriptor(AT, len(data)), 0)
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
            await file.pread(inflated_offset(descriptor(offset, len(data), 21), offset << 21), memoryview(bytearray(1)))

    tracemalloc.start()
    try:
        asyncio.run(main())
        assert tracemalloc.get_traced_memory()[0] < 20 << 20
    finally:
        tracemalloc.stop()


COUNT = 40
TEXTS = [random.Random(n).randbytes(200) * (SIZE // 200) + bytes(SIZE % 200) for n in range(COUNT)]


class Sequence:
    """COUNT compressed clusters, one behind the other in the guest and in the file."""

    def __init__(self, *, spoilt: int | None = None, slow_only: bool = False) -> None:
        self.descriptors: list[int] = []
        content = bytes(AT)
        for index, text in enumerate(TEXTS):
            data = deflated(text, -12) if index != spoilt else b"\xff" * 300
            self.descriptors.append(descriptor(len(content), len(data)))
            content += data
        self.inner = FaultFile(MemoryFile(content), slow_only=slow_only)
        self.file = InflatedFile(self.inner, BITS, ZLIB)
        self.file.run_from = lambda cluster, count: self.descriptors[cluster : cluster + count]

    def offset(self, index: int) -> int:
        return inflated_offset(self.descriptors[index], index << BITS)

    async def read(self, index: int) -> bytes:
        view = memoryview(bytearray(SIZE))
        await self.file.pread(self.offset(index), view)
        return bytes(view)

    def is_kept(self, index: int) -> bool:
        return self.file.try_pread(self.offset(index), memoryview(bytearray(1)))

    def run(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What `main` gives, and nothing is left under way."""

        async def whole() -> T:
            result = await main()
            await self.settle()
            return result

        return asyncio.run(whole())

    async def settle(self) -> None:
        """Until nothing is being inflated."""
        while loading := set(self.file._loading.values()):
            await asyncio.wait(loading)


@pytest.mark.parametrize("slow_only", [False, True])
def test_a_sequential_reader_finds_its_clusters_inflated(slow_only: bool) -> None:
    sequence = Sequence(slow_only=slow_only)

    async def main() -> list[bool]:
        found = []
        for index, text in enumerate(TEXTS):
            found.append(sequence.is_kept(index))
            assert await sequence.read(index) == text
            await sequence.settle()
        await sequence.file.close()
        return found

    assert sequence.run(main) == [False, False] + [True] * (COUNT - 2)
    reads = [name for name in sequence.inner.calls if name == ("pread" if slow_only else "try_pread")]
    assert len(reads) == COUNT, "each cluster is inflated once"


def test_clusters_read_here_and_there_are_read_alone() -> None:
    sequence = Sequence()

    async def main() -> None:
        for index in (30, 4, 20, 9, 35, 0):
            assert await sequence.read(index) == TEXTS[index]
            await sequence.settle()

    sequence.run(main)
    assert sequence.inner.calls.count("try_pread") == 6


def test_all_at_once_are_right_and_inflated_once() -> None:
    sequence = Sequence()

    async def main() -> list[bytes]:
        return await asyncio.gather(*map(sequence.read, range(COUNT)))

    assert sequence.run(main) == TEXTS
    assert sequence.inner.calls.count("try_pread") == COUNT


def test_a_cluster_that_fails_ahead_fails_its_own_reader_alone() -> None:
    sequence = Sequence(spoilt=7)

    async def main() -> None:
        for index in range(COUNT):
            if index == 7:
                with pytest.raises(CorruptImage, match="does not inflate"):
                    await sequence.read(index)
            else:
                assert await sequence.read(index) == TEXTS[index]

    sequence.run(main)


def test_a_file_that_fails_ahead_is_read_again_when_it_is_asked_for() -> None:
    sequence = Sequence(slow_only=True)

    async def main() -> None:
        assert await sequence.read(0) == TEXTS[0]
        assert await sequence.read(1) == TEXTS[1]
        await sequence.settle()
        assert sequence.is_kept(2)
        sequence.inner.fail("pread", 5)
        assert await sequence.read(2) == TEXTS[2]
        await sequence.settle()
        sequence.inner.heal()
        assert await sequence.read(3) == TEXTS[3]
        assert not sequence.is_kept(4)
        assert await sequence.read(4) == TEXTS[4]

    sequence.run(main)


def test_clusters_that_share_their_data_are_inflated_once() -> None:
    sequence = Sequence()
    sequence.descriptors[4:] = [sequence.descriptors[4]] * (COUNT - 4)

    async def main() -> None:
        for index in range(COUNT):
            assert await sequence.read(index) == TEXTS[min(index, 4)]
            await sequence.settle()

    sequence.run(main)
    assert sequence.inner.calls.count("try_pread") == 5


def test_a_long_run_is_several_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflate, "JOB_BYTES", 3 * SIZE)
    sequence = Sequence()
    jobs: list[int] = []
    inflated = sequence.file._inflate

    def noting(pieces: Any) -> Any:
        jobs.append(len(pieces))
        return inflated(pieces)

    monkeypatch.setattr(sequence.file, "_inflate", noting)

    async def main() -> None:
        for index in range(COUNT):
            assert await sequence.read(index) == TEXTS[index]

    sequence.run(main)
    assert sum(jobs) == COUNT
    assert jobs.count(3) > COUNT // 5
    assert max(jobs) == 3


def test_not_more_is_begun_ahead_than_is_kept() -> None:
    sequence = Sequence()
    sequence.file._kept_max = 6

    async def main() -> None:
        for index in range(16):
            sequence.file._read_ahead(sequence.offset(index))
        assert len(sequence.file._loading) == 6
        assert await sequence.read(20) == TEXTS[20]
        await sequence.settle()
        sequence.file._read_ahead(sequence.offset(16))
        assert 0 < len(sequence.file._loading) <= 6

    sequence.run(main)


def test_closing_waits_for_what_is_read_ahead() -> None:
    sequence = Sequence(slow_only=True)

    async def main() -> None:
        sequence.file._begin(sequence.descriptors)
        await sequence.file.close()
        assert not sequence.file._loading

    sequence.run(main)
