"""Compressed clusters as a file: inflated when they are read, and the last ones kept.

An offset in this file is `descriptor << cluster_bits | offset in cluster`, where the descriptor is an L2 entry without
its two flags: it names where the compressed data lies and changes with it, so what is kept never goes stale while the
data stays. Several clusters' data may lie in one host cluster; the last may end in the middle of a sector at the end of
the file, and behind each there is rubbish.
"""

from __future__ import annotations

import asyncio
import sys
import zlib
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

from nbdimg.errors import CorruptImage, UnsupportedFeature
from nbdimg.formats.qcow2 import structs as s
from nbdimg.formats.qcow2.packed import compressed_range
from nbdimg.formats.qcow2.structs import Compression
from nbdimg.storage.file import BlockFile, Buffer
from nbdimg.storage.workers import workers
from nbdimg.units import MiB

KEPT_BYTES = 16 * MiB
"""Inflated clusters that are kept: enough for a sequential reader with a deep queue, and its neighbours."""

_DEFLATE_WINDOW = -15
"""Raw deflate. QEMU writes with a window of 4 KiB (-12) and other writers with 32 KiB; this reads both."""


class Inflater(NamedTuple):
    """`inflate(data, size)` gives at most `size` bytes; `errors` are what it raises on malformed data."""

    inflate: Callable[[Buffer, int], bytes]
    errors: tuple[type[Exception], ...]


def _zlib() -> Inflater:
    """By isal where it is installed: it takes two thirds of zlib's time."""
    deflate: ModuleType = zlib
    try:
        from isal import isal_zlib

        deflate = isal_zlib
    except ImportError:
        pass

    def inflate(data: Buffer, size: int) -> bytes:
        cluster: bytes = deflate.decompressobj(_DEFLATE_WINDOW).decompress(data, size)
        return cluster

    return Inflater(inflate, (zlib.error, deflate.error))


def _zstd(path: str) -> Inflater:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise UnsupportedFeature(path, "its clusters are compressed with zstd: install backports.zstd") from None

    def inflate(data: Buffer, size: int) -> bytes:
        """Frame after frame until the cluster is full."""
        parts: list[bytes] = []
        while size and data:
            frame = zstd.ZstdDecompressor()
            part = frame.decompress(data, size)
            if not part:
                break
            parts.append(part)
            size -= len(part)
            data = frame.unused_data
        return b"".join(parts)

    return Inflater(inflate, (zstd.ZstdError, EOFError))


class InflatedFile:
    """Read-only. Args: file: where the compressed data lies."""

    is_writable = False

    def __init__(self, file: BlockFile, cluster_bits: int, compression: int) -> None:
        self.path = file.path
        self._file = file
        self._bits = cluster_bits
        self._size = 1 << cluster_bits
        self._inflater = _zlib() if compression == Compression.ZLIB else _zstd(file.path)
        self._kept: dict[int, bytes] = {}
        self._kept_max = max(4, KEPT_BYTES >> cluster_bits)
        self._loading: dict[int, asyncio.Future[bytes]] = {}

    @property
    def size(self) -> int:
        return s.HOST_OFFSET_MAX

    def _cut(self, cluster: bytes, offset: int, view: memoryview) -> None:
        start = offset & (self._size - 1)
        view[:] = cluster[start : start + len(view)]

    def try_pread(self, offset: int, view: memoryview) -> bool:
        cluster = self._kept.get(offset >> self._bits)
        if cluster is None:
            return False
        self._cut(cluster, offset, view)
        return True

    async def pread(self, offset: int, view: memoryview) -> None:
        self._cut(await self._cluster(offset >> self._bits), offset, view)

    async def _cluster(self, descriptor: int) -> bytes:
        """Raises: CorruptImage: the data does not inflate to a cluster. OSError."""
        kept = self._kept.get(descriptor)
        if kept is not None:
            return kept
        loading = self._loading.get(descriptor)
        if loading is None:
            loading = self._loading[descriptor] = self._begin(descriptor)
            loading.add_done_callback(partial(self._loaded, descriptor))
        return await loading

    def _begin(self, descriptor: int) -> asyncio.Future[bytes]:
        offset, length = compressed_range(descriptor, self._bits)
        if offset >= self._file.size:
            raise self._corrupt(offset, f"begins behind the file's {self._file.size} bytes")
        data = bytearray(length)
        if self._file.try_pread(offset, memoryview(data)):
            return workers().run(self._inflated, data, offset)
        return asyncio.get_running_loop().create_task(self._load(data, offset))

    async def _load(self, data: bytearray, offset: int) -> bytes:
        await self._file.pread(offset, memoryview(data))
        return await workers().run(self._inflated, data, offset)

    def _loaded(self, descriptor: int, loading: asyncio.Future[bytes]) -> None:
        del self._loading[descriptor]
        if loading.exception() is None:
            if len(self._kept) >= self._kept_max:
                del self._kept[next(iter(self._kept))]
            self._kept[descriptor] = loading.result()

    def _inflated(self, data: bytearray, offset: int) -> bytes:
        try:
            cluster = self._inflater.inflate(data, self._size)
        except self._inflater.errors as error:
            raise self._corrupt(offset, f"does not inflate ({error})") from None
        if len(cluster) != self._size:
            raise self._corrupt(offset, f"inflates to {len(cluster)} bytes, expected {self._size}")
        return cluster

    def _corrupt(self, offset: int, what: str) -> CorruptImage:
        return CorruptImage(self.path, f"the compressed cluster at offset {offset} {what}", offset)

    async def prefetch(self, offset: int, length: int) -> None:
        await self._cluster(offset >> self._bits)

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        return False

    async def pwrite(self, offset: int, data: Buffer) -> None:
        raise AssertionError("compressed clusters are not written in place")

    async def fdatasync(self) -> None:
        pass

    async def punch(self, offset: int, length: int) -> bool:
        return False

    async def zero(self, offset: int, length: int) -> bool:
        return False

    async def truncate(self, size: int) -> None:
        raise AssertionError("compressed clusters are not written in place")

    def data_extent(self, offset: int) -> tuple[bool, int]:
        return True, self.size

    async def close(self) -> None:
        self._kept.clear()
