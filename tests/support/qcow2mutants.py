"""Structured mutants of small qcow2 images: a few fields changed to values at the edges of what they may be.

The fields are found with the layout of the specification alone, not with the code under test. A mutant is its base
image and its seed; the same seed gives the same bytes.
"""

from __future__ import annotations

import errno
import os
import random
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbdimg.image.gate import Reference
from nbdimg.storage.file import Buffer
from nbdimg.storage.memory import MemoryFile

FILE_SIZE_MAX = 48 << 20
"""Bytes to which a file in memory grows: a write further out fails as on a full disk."""

HEADER_FIELDS = (
    ("magic", 0, 4, 1),
    ("version", 4, 4, 2),
    ("backing_file_offset", 8, 8, 6),
    ("backing_file_size", 16, 4, 6),
    ("cluster_bits", 20, 4, 6),
    ("size", 24, 8, 8),
    ("crypt_method", 32, 4, 3),
    ("l1_size", 36, 4, 8),
    ("l1_table_offset", 40, 8, 8),
    ("refcount_table_offset", 48, 8, 8),
    ("refcount_table_clusters", 56, 4, 8),
    ("nb_snapshots", 60, 4, 6),
    ("snapshots_offset", 64, 8, 6),
    ("incompatible_features", 72, 8, 10),
    ("compatible_features", 80, 8, 4),
    ("autoclear_features", 88, 8, 6),
    ("refcount_order", 96, 4, 6),
    ("header_length", 100, 4, 6),
    ("compression_type", 104, 1, 4),
)
"""(name, offset, bytes, weight). Spec: qcow2.rst "Header"."""

SNAPSHOT_FIELDS = (
    ("l1_table_offset", 0, 8),
    ("l1_size", 8, 4),
    ("id_size", 12, 2),
    ("name_size", 14, 2),
    ("vm_state_size", 32, 4),
    ("extra_data_size", 36, 4),
    ("extra_vm_state_size", 40, 8),
    ("extra_disk_size", 48, 8),
)

OFFSET_BITS = 0x00FF_FFFF_FFFF_FE00


@dataclass(frozen=True, slots=True)
class Field:
    name: str
    offset: int
    size: int
    weight: int


@dataclass(frozen=True, slots=True)
class Base:
    name: str
    content: bytes
    external: bytes
    """What a gate gives for any name that the image holds."""
    fields: tuple[Field, ...]
    landmarks: tuple[int, ...]
    """Offsets of structures: pointers are bent to them."""


@dataclass(frozen=True, slots=True)
class Mutant:
    base: Base
    seed: int
    content: bytes
    changes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.base.name} seed {self.seed}: {'; '.join(self.changes)}"


def _u(content: bytes, offset: int, size: int) -> int:
    return int.from_bytes(content[offset : offset + size], "big")


def _fields(content: bytes) -> Iterator[Field]:
    version, bits = _u(content, 4, 4), _u(content, 20, 4)
    cluster = 1 << bits
    header_end = 72 if version == 2 else _u(content, 100, 4)
    for name, offset, size, weight in HEADER_FIELDS:
        if offset + size <= header_end:
            yield Field(name, offset, size, weight)
    position = header_end
    while position + 8 <= cluster:
        type, length = struct.unpack_from(">II", content, position)
        yield Field("extension type", position, 4, 2)
        yield Field("extension length", position + 4, 4, 4)
        for at in range(position + 8, position + 8 + min(length, 96), 8):
            yield Field("extension data", at, 8, 1)
        if not type:
            break
        position += 8 + (length + 7) // 8 * 8
    backing = _u(content, 8, 8)
    if backing:
        yield Field("backing name", backing, min(8, _u(content, 16, 4)), 3)
    refcount_bits = 16 if version == 2 else 1 << _u(content, 96, 4)
    entry_size = 16 if version == 3 and _u(content, 72, 8) & 16 else 8
    yield from _mapping_fields(content, _u(content, 40, 8), _u(content, 36, 4), cluster, entry_size, 6)
    table, clusters = _u(content, 48, 8), _u(content, 56, 4)
    for at in range(table, table + clusters * cluster, 8):
        block = _u(content, at, 8)
        if block or at < table + 32:
            yield Field("refcount table entry", at, 8, 6)
        if block:
            size = max(1, refcount_bits // 8)
            for index in range(16):
                yield Field("refcount", block + index * size, size, 2)
    position = _u(content, 64, 8)
    for _ in range(_u(content, 60, 4)):
        for name, offset, size in SNAPSHOT_FIELDS:
            yield Field(f"snapshot {name}", position + offset, size, 4)
        snapshot_l1, count = struct.unpack_from(">QI", content, position)
        yield from _mapping_fields(content, snapshot_l1, count, cluster, entry_size, 1)
        sizes = struct.unpack_from(">HH", content, position + 12)
        position += (40 + _u(content, position + 36, 4) + sum(sizes) + 7) // 8 * 8


def _mapping_fields(content: bytes, l1: int, count: int, cluster: int, entry_size: int, weight: int) -> Iterator[Field]:
    for index in range(min(count, 16)):
        entry = _u(content, l1 + 8 * index, 8)
        yield Field("L1 entry", l1 + 8 * index, 8, weight)
        table = entry & OFFSET_BITS
        for at in range(table, table + min(cluster, 32 * entry_size), entry_size) if table else ():
            yield Field("L2 entry", at, 8, weight // 2 + 1)
            if entry_size == 16:
                yield Field("L2 bitmap", at + 8, 8, weight // 2 + 1)


def _landmarks(content: bytes) -> tuple[int, ...]:
    bits = _u(content, 20, 4)
    l1, table = _u(content, 40, 8), _u(content, 48, 8)
    pointers = [l1, table, _u(content, 64, 8), _u(content, table, 8), _u(content, l1, 8) & OFFSET_BITS]
    return tuple({*pointers, 1 << bits, len(content), len(content) - (1 << bits), len(content) + (1 << bits)})


def base_of(name: str, content: bytes, external: bytes = b"") -> Base:
    return Base(name, content, external, tuple(_fields(content)), _landmarks(content))


def _value(generator: random.Random, field: Field, base: Base) -> int:
    """A value for the field: an edge of its range, a neighbour of what it holds, a place in the file, one bit changed,
    or anything.
    """
    top = (1 << 8 * field.size) - 1
    old = _u(base.content, field.offset, field.size)
    match generator.randrange(6):
        case 0:
            edges = (0, 1, 2, 3, 4, 7, 8, 9, 21, 22, 63, 64, 511, 512, 65536, top, top - 1, top >> 1, (top >> 1) + 1)
            value = generator.choice(edges)
        case 1:
            value = old + generator.choice((-1, 1, -512, 512, -8, 8))
        case 2:
            flags = generator.choice((0, 1 << 63, 1 << 62, 1, 3 << 62))
            value = generator.choice(base.landmarks) | flags
        case 3:
            value = old ^ 1 << generator.randrange(8 * field.size)
        case 4:
            value = 1 << generator.randrange(8 * field.size)
        case _:
            value = generator.getrandbits(8 * field.size)
    return value & top


def mutant(base: Base, seed: int) -> Mutant:
    generator = random.Random(f"{base.name} {seed}")
    content = bytearray(base.content)
    changes = []
    weights = [field.weight for field in base.fields]
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        (field,) = generator.choices(base.fields, weights)
        value = _value(generator, field, base)
        content[field.offset : field.offset + field.size] = value.to_bytes(field.size, "big")
        changes.append(f"{field.name} at {field.offset} = {value:#x}")
    if generator.random() < 0.08:
        length = generator.choice((*base.landmarks, generator.randrange(len(content))))
        del content[max(0, length + generator.choice((-1, 0, 1, 72))) :]
        changes.append(f"cut to {len(content)}")
    return Mutant(base, seed, bytes(content), tuple(changes))


class BoundedFile(MemoryFile):
    """A file in memory on a disk of FILE_SIZE_MAX bytes."""

    def _bound(self, stop: int) -> None:
        if stop > FILE_SIZE_MAX:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        assert self.is_writable, "a read-only file was written"
        self._bound(offset + memoryview(data).nbytes)
        return super().try_pwrite(offset, data)

    async def truncate(self, size: int) -> None:
        self._bound(size)
        await super().truncate(size)


class AnyGate:
    """Gives the same bytes for every name."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def open(self, reference: Reference) -> BoundedFile:
        return BoundedFile(self._content, "external", writable=reference.is_writable)


# Base images


def _qemu(*arguments: str, cwd: Path) -> None:
    subprocess.run(arguments, cwd=cwd, check=True, capture_output=True)


def _filled(directory: Path, name: str, options: str, size: str, *, backing: bool = False) -> bytes:
    """An image with data, zero clusters and holes."""
    more = ("-b", "base.raw", "-F", "raw") if backing else ()
    _qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *more, name, size, cwd=directory)
    commands = ("write -P 1 0 3k", "write -P 2 9k 5k", "write -z 16k 4k", "write -P 3 40k 8k", "discard 41k 2k")
    for command in commands:
        _qemu("qemu-io", "-f", "qcow2", "-c", command, name, cwd=directory)
    return (directory / name).read_bytes()


def _compressed(directory: Path, name: str, options: str) -> bytes:
    generator = random.Random(name)
    data = b"".join(bytes([generator.randrange(256)]) * 700 + generator.randbytes(200) for _ in range(64))
    (directory / "c.raw").write_bytes(data.ljust(64 << 10, b"\0"))
    _qemu("qemu-img", "convert", "-c", "-O", "qcow2", "-f", "raw", "-o", options, "c.raw", name, cwd=directory)
    return (directory / name).read_bytes()


def bases(directory: Path) -> list[Base]:
    """Small images of several kinds, made by qemu-img."""
    external = bytes(n % 251 for n in range(40 << 10))
    (directory / "base.raw").write_bytes(external)
    plain = {
        "v3-512": "cluster_size=512",
        "v3-4k-bits1": "cluster_size=4k,refcount_bits=1",
        "v3-512-bits64": "cluster_size=512,refcount_bits=64",
        "v3-8k-features": "cluster_size=8k",
        "v2-4k": "compat=0.10,cluster_size=4k",
        "v3-lazy": "cluster_size=2k,lazy_refcounts=on",
        "v3-subclusters": "cluster_size=16k,extended_l2=on",
    }
    found = [base_of(name, _filled(directory, name, options, "64k")) for name, options in plain.items()]
    found.append(base_of("overlay", _filled(directory, "overlay", "cluster_size=1k", "64k", backing=True), external))
    options = "cluster_size=16k,extended_l2=on"
    found.append(base_of("overlay-subclusters", _filled(directory, "os", options, "64k", backing=True), external))
    found.append(base_of("zlib", _compressed(directory, "zlib", "cluster_size=4k")))
    found.append(base_of("zstd", _compressed(directory, "zstd", "cluster_size=4k,compression_type=zstd")))
    _filled(directory, "snapshots", "cluster_size=1k", "64k")
    for name in ("first", "second"):
        _qemu("qemu-img", "snapshot", "-c", name, "snapshots", cwd=directory)
        _qemu("qemu-io", "-f", "qcow2", "-c", "write -P 9 2k 9k", "snapshots", cwd=directory)
    _qemu("qemu-img", "bitmap", "--add", "-g", "4k", "snapshots", "b0", cwd=directory)
    found.append(base_of("snapshots", (directory / "snapshots").read_bytes()))
    content = _filled(directory, "external", f"cluster_size=4k,data_file={directory}/data.raw", "64k")
    found.append(base_of("external", content, (directory / "data.raw").read_bytes()))
    return found
