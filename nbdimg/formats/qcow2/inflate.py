"""Compressed clusters as a file: inflated when they are read or shortly before, and the last ones kept.

An offset in this file is `descriptor << 64 | guest offset`, where the descriptor is an L2 entry without its two flags:
it names where the compressed data lies and changes with it, so what is kept never goes stale while the data stays. The
guest offset tells the place in the cluster, and who reads on from where. Several clusters' data may lie in one host
cluster; the last may end in the middle of a sector at the end of the file, and behind each there is rubbish.

A guest that reads one cluster after another has the next ones inflated ahead, several in one job of a worker: a
hand-over costs as much as half a cluster. A run is more than one job, so that every processor has its part of it.
"""

from __future__ import annotations

import asyncio
import sys
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import NamedTuple

from nbdimg.errors import CorruptImage, UnsupportedFeature
from nbdimg.formats.qcow2.packed import compressed_range
from nbdimg.formats.qcow2.readahead import ReadAhead
from nbdimg.formats.qcow2.structs import Compression
from nbdimg.storage.file import BlockFile, Buffer
from nbdimg.storage.workers import computers
from nbdimg.units import KiB, MiB

KEPT_BYTES = 16 * MiB
"""Inflated clusters that are kept: enough for a sequential reader with a deep queue, and its neighbours."""

AHEAD_BYTES = 2 * MiB
"""The longest run that is inflated ahead."""

JOB_BYTES = 512 * KiB
"""The longest part of a run that is one job."""

_DESCRIPTOR_SHIFT = 64
_GUEST_MASK = (1 << _DESCRIPTOR_SHIFT) - 1
_OFFSET_MAX = 1 << 2 * _DESCRIPTOR_SHIFT

_DEFLATE_WINDOW = -15
"""Raw deflate. QEMU writes with a window of 4 KiB (-12) and other writers with 32 KiB; this reads both."""


def inflated_offset(descriptor: int, guest_offset: int) -> int:
    """Where in an `InflatedFile` the guest's byte lies."""
    return descriptor << _DESCRIPTOR_SHIFT | guest_offset


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


class _Piece(NamedTuple):
    """The compressed data of one cluster: `content` is what lies at `offset` of the file."""

    descriptor: int
    offset: int
    content: bytearray


_Outcomes = dict[int, bytes | BaseException]
"""For each descriptor its cluster, or why there is none."""


class InflatedFile:
    """Read-only. Args: file: where the compressed data lies.

    (C1) A cluster that is read ahead and fails is nobody's error: whoever asks for it has it inflated anew.
    (C2) Nothing is begun ahead beyond what is kept: many readers at once would push out each other's.
    """

    is_writable = False
    pages = None

    def __init__(self, file: BlockFile, cluster_bits: int, compression: int) -> None:
        self.path = file.path
        self._file = file
        self._bits = cluster_bits
        self._size = 1 << cluster_bits
        self._inflater = _zlib() if compression == Compression.ZLIB else _zstd(file.path)
        self._kept: dict[int, bytes] = {}
        self._kept_max = max(4, KEPT_BYTES >> cluster_bits)
        self._loading: dict[int, asyncio.Future[_Outcomes]] = {}
        self._ahead = ReadAhead(max(1, AHEAD_BYTES >> cluster_bits))
        self._job_max = max(1, JOB_BYTES >> cluster_bits)
        self.run_from: Callable[[int, int], Sequence[int]] = lambda cluster, count: ()
        """The descriptors of at most so many clusters from a guest's cluster on, as far as they are known without
        waiting: what may be read ahead.
        """

    @property
    def size(self) -> int:
        return _OFFSET_MAX

    def _cut(self, cluster: bytes, offset: int, view: memoryview) -> None:
        start = offset & (self._size - 1)
        view[:] = cluster[start : start + len(view)]

    def try_pread(self, offset: int, view: memoryview) -> bool:
        cluster = self._kept.get(offset >> _DESCRIPTOR_SHIFT)
        if cluster is None:
            return False
        self._read_ahead(offset)
        self._cut(cluster, offset, view)
        return True

    async def pread(self, offset: int, view: memoryview) -> None:
        self._cut(await self._cluster(offset), offset, view)

    async def _cluster(self, offset: int) -> bytes:
        """Raises: CorruptImage: the data does not inflate to a cluster. OSError."""
        descriptor = offset >> _DESCRIPTOR_SHIFT
        self._read_ahead(offset)
        kept = self._kept.get(descriptor)
        if kept is not None:
            return kept
        loading = self._loading.get(descriptor)
        outcome = None if loading is None else (await loading)[descriptor]
        if not isinstance(outcome, bytes):
            loading = self._loading.get(descriptor) or self._begin((descriptor,))
            outcome = (await loading)[descriptor]
            if not isinstance(outcome, bytes):
                raise outcome
        return outcome

    def _read_ahead(self, offset: int) -> None:
        """The guest reads there: begin what it is likely to read next."""
        run = self._ahead.read((offset & _GUEST_MASK) >> self._bits)
        if run.length:
            run_descriptors = dict.fromkeys(self.run_from(run.first, run.length))
            absent = [each for each in run_descriptors if each not in self._kept and each not in self._loading]
            del absent[max(0, self._kept_max - len(self._loading)) :]
            for at in range(0, len(absent), self._job_max):
                self._begin(absent[at : at + self._job_max])

    def _begin(self, descriptors: Sequence[int]) -> asyncio.Future[_Outcomes]:
        """Inflate clusters, each named once, that are neither kept nor being loaded."""
        pieces = []
        for descriptor in descriptors:
            offset, length = compressed_range(descriptor, self._bits)
            pieces.append(_Piece(descriptor, offset, bytearray(length)))
        loading: asyncio.Future[_Outcomes]
        if self._are_resident(pieces):
            loading = computers().run(self._inflate, pieces)
        else:
            loading = asyncio.get_running_loop().create_task(self._load(pieces))
        self._loading.update(dict.fromkeys(descriptors, loading))
        loading.add_done_callback(partial(self._loaded, descriptors))
        return loading

    def _are_resident(self, pieces: Sequence[_Piece]) -> bool:
        """Whether all could be read at once."""
        with suppress(OSError):
            return all(self._file.try_pread(piece.offset, memoryview(piece.content)) for piece in pieces)
        return False

    async def _load(self, pieces: Sequence[_Piece]) -> _Outcomes:
        reads = (self._file.pread(piece.offset, memoryview(piece.content)) for piece in pieces)
        errors = await asyncio.gather(*reads, return_exceptions=True)
        failed = {piece.descriptor: error for piece, error in zip(pieces, errors, strict=True) if error is not None}
        inflated = await computers().run(self._inflate, [each for each in pieces if each.descriptor not in failed])
        return inflated | failed

    def _inflate(self, pieces: Sequence[_Piece]) -> _Outcomes:
        return {piece.descriptor: self._inflated(piece) for piece in pieces}

    def _inflated(self, piece: _Piece) -> bytes | CorruptImage:
        if piece.offset >= self._file.size:
            return self._corrupt(piece, f"begins behind the file's {self._file.size} bytes")
        try:
            cluster = self._inflater.inflate(piece.content, self._size)
        except self._inflater.errors as error:
            return self._corrupt(piece, f"does not inflate ({error})")
        if len(cluster) != self._size:
            return self._corrupt(piece, f"inflates to {len(cluster)} bytes, expected {self._size}")
        return cluster

    def _corrupt(self, piece: _Piece, what: str) -> CorruptImage:
        return CorruptImage(self.path, f"the compressed cluster at offset {piece.offset} {what}", piece.offset)

    def _loaded(self, descriptors: Sequence[int], loading: asyncio.Future[_Outcomes]) -> None:
        for descriptor in descriptors:
            del self._loading[descriptor]
        if loading.cancelled() or loading.exception() is not None:
            return
        for descriptor, outcome in loading.result().items():
            if isinstance(outcome, bytes):
                if len(self._kept) >= self._kept_max:
                    del self._kept[next(iter(self._kept))]
                self._kept[descriptor] = outcome

    async def prefetch(self, offset: int, length: int) -> None:
        await self._cluster(offset)

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

    def try_data_extent(self, offset: int) -> tuple[bool, int]:
        return True, self.size

    async def data_extent(self, offset: int) -> tuple[bool, int]:
        return self.try_data_extent(offset)

    async def close(self) -> None:
        """Wait for what is being read, and keep nothing."""
        while self._loading:
            await asyncio.wait(set(self._loading.values()))
        self._kept.clear()
