"""qcow2 images made by qemu's tools: sound ones of many kinds, and single-field damage to them.

Damage is written by the format's literal offsets. What a check must say of it is asked of `qemu-img check`, but for
`Mutation.ours`: the deliberate differences, with their reasons.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.qcow2edit import COMPRESSED, COPIED, Edit, make_luks, qemu_img, qemu_io

BITMAPS = 0x23852875
LUKS = 0x0537BE77
SIZE = 4 << 20
"""The guest's disk, but for kinds with large clusters."""


def _made(path: Path, options: str, size: int = SIZE, writes: tuple[str, ...] = ()) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(size))
    if writes:
        qemu_io(path, *writes)


WRITES = ("write -q -P 1 0 40k", "write -q -P 2 3M 9k", "write -q -z 2M 64k", "write -q -P 3 100k 512")


def _options(options: str, size: int = SIZE) -> Callable[[Path], None]:
    return lambda path: _made(path, options, size, WRITES)


def _compressed(kind: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        raw = path.with_suffix(".src")
        pattern = b"".join(bytes([index % 251]) * 700 + bytes(range(256)) for index in range(1200))
        raw.write_bytes(pattern.ljust(SIZE, b"\0"))
        options = f"cluster_size=4k,compression_type={kind}"
        qemu_img("convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
        raw.unlink()
        qemu_io(path, "write -q -P 9 64k 4k")

    return make


def _snapshots(options: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        _made(path, options, writes=WRITES)
        qemu_img("snapshot", "-c", "one", path)
        qemu_io(path, "write -q -P 4 8k 20k")
        qemu_img("snapshot", "-c", "two", path)
        qemu_img("snapshot", "-c", "three", path)
        qemu_io(path, "write -q -P 5 1M 70k", "discard -q 0 4k")
        qemu_img("snapshot", "-d", "two", path)

    return make


def _bitmaps(path: Path) -> None:
    _made(path, "cluster_size=4k", writes=WRITES)
    qemu_img("bitmap", "--add", "-g", "512", path, "fine")
    qemu_img("bitmap", "--add", "-g", "64k", path, "coarse")
    qemu_io(path, "write -q -P 6 200k 30k")


def _data_file(path: Path) -> None:
    _made(path, f"cluster_size=4k,data_file={path.with_suffix('.data')}", writes=WRITES)


def _luks(path: Path) -> None:
    make_luks(path, SIZE, "write -q -P 1 0 100k")


KINDS: dict[str, Callable[[Path], None]] = {
    "version 2": _options("compat=0.10,cluster_size=4k"),
    "version 3": _options("cluster_size=4k"),
    "default": _options("compat=1.1"),
    "empty": lambda path: _made(path, "compat=1.1"),
    "odd size": _options("cluster_size=4k", 3333120),
    "large": lambda path: _made(path, "cluster_size=64k", 3 << 40, ("write -q 0 1M", "write -q 2T 1M")),
    **{f"cluster {name}": _options(f"cluster_size={name}") for name in ("512", "1k", "32k", "256k", "2M")},
    **{f"refcount {bits}": _options(f"cluster_size=1k,refcount_bits={bits}") for bits in (1, 2, 4, 8, 16, 32, 64)},
    "extended": _options("cluster_size=16k,extended_l2=on"),
    "extended full": _options("cluster_size=64k,extended_l2=on,preallocation=metadata"),
    "lazy": _options("lazy_refcounts=on,cluster_size=4k"),
    "preallocated": lambda path: _made(path, "cluster_size=4k,preallocation=metadata"),
    "preallocated data": lambda path: _made(path, "preallocation=falloc"),
    "zlib": _compressed("zlib"),
    "zstd": _compressed("zstd"),
    "snapshots": _snapshots("cluster_size=4k"),
    "snapshots v2": _snapshots("compat=0.10,cluster_size=1k"),
    "snapshots extended": _snapshots("cluster_size=16k,extended_l2=on"),
    "snapshots 4 bits": _snapshots("cluster_size=2k,refcount_bits=4"),
    "bitmaps": _bitmaps,
    "data file": _data_file,
    "luks": _luks,
}


@dataclass(frozen=True, slots=True)
class Mutation:
    """Damage to an image of `kind`.

    ours: exit status of our check where it deliberately is not QEMU's. is_repaired: nothing is left after a repair.
    damaged: bytes of the guest that the damage makes unreadable.
    """

    name: str
    kind: str
    apply: Callable[[Edit], None]
    is_repaired: bool = True
    ours: int | None = None
    damaged: range = range(0)


def _put(place: Callable[[Edit], int], value: Callable[[Edit], int], width: int = 8) -> Callable[[Edit], None]:
    return lambda edit: edit.put(place(edit), value(edit), width)


def _refcount(of: Callable[[Edit], int], value: int) -> Callable[[Edit], None]:
    return _put(lambda edit: edit.refcount(of(edit)), lambda _: value, 2)


def _data(edit: Edit, index: int = 0) -> int:
    return edit.get(edit.entry(index)) & 0x00FF_FFFF_FFFF_FE00


def _entry(index: int, value: Callable[[Edit], int]) -> Callable[[Edit], None]:
    return _put(lambda edit: edit.entry(index), value)


def _l1(index: int, value: Callable[[Edit], int]) -> Callable[[Edit], None]:
    return _put(lambda edit: edit.l1 + 8 * index, value)


def _table(index: int, value: Callable[[Edit], int]) -> Callable[[Edit], None]:
    return _put(lambda edit: edit.refcount_table + 8 * index, value)


def _end(edit: Edit) -> int:
    """A cluster's offset well behind the file's end."""
    return (edit.size // edit.cluster_size + 3) * edit.cluster_size


def _next(edit: Edit) -> int:
    """The offset of the first cluster that the file has nothing of."""
    return -(-edit.size // edit.cluster_size) * edit.cluster_size


def _leak(edit: Edit) -> None:
    offset = (edit.size + edit.cluster_size - 1) // edit.cluster_size * edit.cluster_size
    edit.write(offset + edit.cluster_size - 1, b"\0")
    edit.put(edit.refcount(offset), 1, 2)


def _features(bits: int) -> Callable[[Edit], None]:
    return lambda edit: edit.put(72, edit.get(72) | bits)


def _both(*steps: Callable[[Edit], None]) -> Callable[[Edit], None]:
    def apply(edit: Edit) -> None:
        for step in steps:
            step(edit)

    return apply


def _cut(edit: Edit) -> None:
    with edit.path.open("r+b") as file:
        file.truncate(edit.size // edit.cluster_size * edit.cluster_size - 3 * edit.cluster_size)


def _directory(edit: Edit) -> int:
    return edit.get(edit.extension(BITMAPS) + 16)


def bitmap_data(edit: Edit) -> int:
    """The offset of some cluster of bitmap data, from the tables."""
    for at in (_directory(edit), _directory(edit) + 32):
        for index in range(edit.get(at + 8, 4)):
            offset = edit.get(edit.get(at) + 8 * index) & ~0x1FF
            if offset:
                return offset
    raise AssertionError("no bitmap has data")


def _entry_of_a_snapshot(edit: Edit) -> None:
    """In an L2 table that the active image has a copy of."""
    table = edit.get(edit.get(edit.snapshots)) & 0x00FF_FFFF_FFFF_FE00
    assert table != edit.l2()
    edit.put(table + 8 * 200, COPIED)


FIRST = range(4096)

MUTATIONS = (
    Mutation("data refcount 0", "version 3", _refcount(_data, 0)),
    Mutation("data refcount 2", "version 3", _refcount(_data, 2)),
    Mutation("L2 refcount 0", "version 3", _refcount(lambda edit: edit.l2(), 0)),
    Mutation("L1 refcount 0", "version 3", _refcount(lambda edit: edit.l1, 0)),
    Mutation("L1 refcount 9", "version 3", _refcount(lambda edit: edit.l1, 9)),
    Mutation("header refcount 0", "version 3", _refcount(lambda _: 0, 0)),
    Mutation("refcount block refcount 0", "version 3", _refcount(lambda edit: edit.block(), 0)),
    Mutation("refcount table refcount 3", "version 3", _refcount(lambda edit: edit.refcount_table, 3)),
    Mutation("all refcounts 0", "version 3", lambda edit: edit.write(edit.block(), bytes(4096))),
    Mutation("all refcounts 0xffff", "version 3", lambda edit: edit.write(edit.block(), b"\xff" * 4096)),
    Mutation("leaked cluster", "version 3", _leak),
    Mutation("leaked cluster, version 2", "version 2", _leak),
    Mutation("COPIED clear in L2", "version 3", _entry(1, lambda edit: _data(edit, 1))),
    Mutation("COPIED clear in L1", "version 3", _l1(0, lambda edit: edit.l2())),
    Mutation("COPIED clear beside snapshots", "snapshots", _entry(256, lambda edit: _data(edit, 256))),
    Mutation("COPIED set in a shared entry", "snapshots", _entry(4, lambda edit: edit.get(edit.entry(4)) | COPIED)),
    Mutation("L2 entry twice", "version 3", _entry(5, lambda edit: edit.get(edit.entry(0)))),
    Mutation("L2 entry zeroed", "version 3", _entry(5, lambda _: 0)),
    Mutation("L2 entry behind the end", "version 3", _entry(0, lambda edit: COPIED | _end(edit)), False),
    Mutation("L2 entry far behind the end", "version 3", _entry(0, lambda _: COPIED | 1 << 55), False),
    Mutation("L2 entry reserved bit 60", "version 3", _entry(0, lambda e: e.get(e.entry(0)) | 1 << 60), False),
    Mutation("L2 entry reserved bit 4", "version 3", _entry(0, lambda e: e.get(e.entry(0)) | 1 << 4), False),
    Mutation("L2 entry misaligned", "version 3", _entry(0, lambda e: e.get(e.entry(0)) + 512), False),
    Mutation(
        "L2 entry misaligned, zero", "version 3", _entry(0, lambda e: (e.get(e.entry(0)) + 512) | 1), damaged=FIRST
    ),
    Mutation("L2 entry COPIED without an offset", "version 3", _entry(20, lambda _: COPIED), ours=2),
    Mutation("snapshot's L2 entry COPIED without an offset", "snapshots", _entry_of_a_snapshot, ours=2),
    Mutation("extended entry COPIED without an offset", "extended", lambda e: e.put(e.l2() + 16 * 64, COPIED), ours=2),
    Mutation("L2 entry zero, COPIED clear", "version 3", _entry(0, lambda edit: _data(edit) | 1)),
    Mutation("L2 entry to its L2 table", "version 3", _entry(0, lambda edit: COPIED | edit.l2()), damaged=FIRST),
    Mutation("L2 entry to the L1 table", "version 3", _entry(0, lambda edit: COPIED | edit.l1)),
    Mutation("L2 entry to a refcount block", "version 3", _entry(0, lambda edit: COPIED | edit.block())),
    Mutation("L2 entry to the refcount table", "version 3", _entry(0, lambda edit: COPIED | edit.refcount_table)),
    Mutation("L1 entry reserved bit 58", "version 3", _l1(0, lambda e: e.get(e.l1) | 1 << 58), False),
    Mutation("L1 entry reserved bit 3", "version 3", _l1(0, lambda e: e.get(e.l1) | 1 << 3), False),
    Mutation("L1 entry misaligned", "version 3", _l1(0, lambda e: e.get(e.l1) + 512), False),
    Mutation("L1 entry behind the end", "version 3", _l1(1, lambda edit: COPIED | _end(edit)), False),
    Mutation("L1 entry without an offset", "version 3", _l1(0, lambda _: COPIED), False),
    Mutation("L1 entries to one L2", "version 3", _l1(1, lambda edit: edit.get(edit.l1))),
    Mutation("further L1 entry to a guest's cluster", "version 3", _l1(1, lambda edit: COPIED | _data(edit, 1)), False),
    Mutation("L1 entry of the disk to the L1 table", "version 3", _l1(0, lambda edit: COPIED | edit.l1), False),
    Mutation("L1 entry to the refcount table", "version 3", _l1(0, lambda edit: COPIED | edit.refcount_table), False),
    Mutation("refcount table at an L2 table", "version 3", _put(lambda _: 48, lambda edit: edit.l2()), ours=2),
    Mutation("L1 entry to the L1 table", "version 3", _l1(1, lambda edit: COPIED | edit.l1), False),
    Mutation("L1 table behind the end", "version 3", _put(lambda _: 40, _end), False),
    Mutation("L1 table at the end", "version 3", _put(lambda _: 40, _next), False),
    Mutation("snapshot L1 at the end", "snapshots", _put(lambda e: e.snapshots, _next), False),
    Mutation("refcount table entry 0", "version 3", _table(0, lambda _: 0)),
    Mutation("refcount table entry behind the end", "version 3", _table(0, _end)),
    Mutation("refcount table spare entry behind the end", "version 3", _table(7, _end)),
    Mutation("refcount table entry reserved", "version 3", _table(0, lambda edit: edit.block() | 1)),
    Mutation("refcount table entry misaligned", "version 3", _table(0, lambda edit: edit.block() + 512), ours=2),
    Mutation("refcount table entries to one block", "version 3", _table(1, lambda edit: edit.block())),
    Mutation("refcount table entry to an L2 table", "version 3", _table(0, lambda edit: edit.l2())),
    Mutation("refcount table spare entry far behind the end", "version 3", _table(3, lambda _: 1 << 55)),
    Mutation("refcount table behind the end", "version 3", _put(lambda _: 48, _end)),
    Mutation("refcount table at the L1 table", "version 3", _put(lambda _: 48, lambda edit: edit.l1), ours=2),
    Mutation("dirty", "version 3", _features(1)),
    Mutation("corrupt", "version 3", _features(2)),
    Mutation("dirty with a leak", "lazy", _both(_features(1), _leak)),
    Mutation("dirty with refcounts 0", "lazy", _both(_features(1), lambda edit: edit.write(edit.block(), bytes(4096)))),
    Mutation("file cut", "version 3", _cut, False),
    Mutation("compressed entry COPIED", "zlib", _entry(0, lambda e: e.get(e.entry(0)) | COPIED)),
    Mutation("compressed entry behind the end", "zlib", _entry(0, lambda edit: COMPRESSED | _end(edit)), False),
    Mutation("compressed entry longer", "zlib", _entry(0, lambda e: e.get(e.entry(0)) | 15 << 58)),
    Mutation(
        "compressed cluster refcount 1", "zstd", _refcount(lambda edit: edit.get(edit.entry(0)) & (1 << 50) - 1, 1)
    ),
    Mutation("L1 table at a snapshot's", "snapshots", _put(lambda _: 40, lambda e: e.get(e.snapshots)), False),
    Mutation("snapshot L1 at the header", "snapshots", _put(lambda e: e.snapshots, lambda _: 0), False),
    Mutation(
        "snapshot L1 misaligned", "snapshots", _put(lambda e: e.snapshots, lambda e: e.get(e.snapshots) + 8), False
    ),
    Mutation("snapshot L1 behind the end", "snapshots", _put(lambda e: e.snapshots, _end), False),
    Mutation("snapshot L1 too large", "snapshots", _put(lambda e: e.snapshots + 8, lambda _: 1 << 23, 4), False),
    Mutation("snapshot L1 smaller", "snapshots", _put(lambda e: e.snapshots + 8, lambda _: 1, 4), False, ours=2),
    Mutation("snapshot's disk larger", "snapshots", _put(lambda e: e.snapshots + 48, lambda _: 1 << 30), False, ours=2),
    Mutation("snapshot L1 entry misaligned", "snapshots", _put(lambda e: e.get(e.snapshots), lambda _: 512), False),
    Mutation("snapshot L1 entry behind the end", "snapshots", _put(lambda e: e.get(e.snapshots), _end), False),
    Mutation("snapshot extra too large", "snapshots", _put(lambda e: e.snapshots + 36, lambda _: 1 << 20, 4), False),
    Mutation("snapshot extra too small", "snapshots", _put(lambda e: e.snapshots + 36, lambda _: 8, 4), False),
    Mutation("snapshot gone", "snapshots", _put(lambda _: 60, lambda _: 1, 4)),
    Mutation("snapshots behind the end", "snapshots", _put(lambda _: 64, _end), False),
    Mutation("snapshot data refcount 1", "snapshots", _refcount(lambda edit: _data(edit, 8), 1)),
    Mutation("snapshot L1 refcount 0", "snapshots", _refcount(lambda e: e.get(e.snapshots), 0)),
    Mutation("bitmaps disowned", "bitmaps", lambda edit: edit.put(88, 0)),
    Mutation("bitmap directory misaligned", "bitmaps", _put(lambda e: e.extension(BITMAPS) + 16, lambda _: 512), False),
    Mutation("bitmap directory behind the end", "bitmaps", _put(lambda e: e.extension(BITMAPS) + 16, _end), False),
    Mutation("bitmap count 3", "bitmaps", _put(lambda e: e.extension(BITMAPS), lambda _: 3, 4), False),
    Mutation("bitmap count 0", "bitmaps", _put(lambda e: e.extension(BITMAPS), lambda _: 0, 4), False),
    Mutation("bitmap type 2", "bitmaps", _put(lambda e: _directory(e) + 16, lambda _: 2, 1), False),
    Mutation(
        "bitmap table larger",
        "bitmaps",
        _put(lambda e: _directory(e) + 8, lambda e: e.get(_directory(e) + 8, 4) + 1, 4),
        False,
    ),
    Mutation("bitmap table misaligned", "bitmaps", _put(_directory, lambda e: e.get(_directory(e)) + 512), False),
    Mutation("bitmap table entry reserved", "bitmaps", _put(lambda e: e.get(_directory(e)), lambda _: 2), False),
    Mutation("bitmap table refcount 0", "bitmaps", _refcount(lambda e: e.get(_directory(e)), 0)),
    Mutation("bitmap data refcount 0", "bitmaps", _refcount(bitmap_data, 0)),
    Mutation("subclusters allocated and zero", "extended", lambda e: e.put(e.l2() + 8, (1 << 33) - 1), False),
    Mutation("subclusters of nothing", "extended", lambda e: e.put(e.l2() + 16 * 64 + 8, 1), False),
    Mutation(
        "misaligned without subclusters", "extended", lambda e: e.write(e.l2(), _misaligned(e)), damaged=range(16384)
    ),
    Mutation("extended entry bit 0", "extended", lambda e: e.put(e.l2(), e.get(e.l2()) | 1), False, ours=2),
    Mutation("data file entry elsewhere", "data file", _entry(1, lambda _: COPIED | 0x3000), False, ours=2),
    Mutation("data file entry not COPIED", "data file", _entry(1, lambda edit: _data(edit, 1))),
    Mutation("data file entry compressed", "data file", _entry(1, lambda _: COMPRESSED | 0x3000), False),
    Mutation("zero flag in version 2", "version 2", _entry(20, lambda _: 1), False, ours=2),
    Mutation("two references with 1-bit refcounts", "refcount 1", _entry(1, lambda e: e.get(e.entry(0))), False),
    Mutation("1-bit refcount table entries to one block", "refcount 1", _table(1, lambda edit: edit.block())),
    Mutation("LUKS header refcount 0", "luks", _refcount(lambda e: e.get(e.extension(LUKS)), 0)),
    Mutation("LUKS header misaligned", "luks", _put(lambda e: e.extension(LUKS), lambda _: 512), False),
    Mutation("LUKS header behind the end", "luks", _put(lambda e: e.extension(LUKS), _end), False),
)


def _misaligned(edit: Edit) -> bytes:
    """An extended entry: its offset is misaligned, every subcluster reads as zero."""
    return (edit.get(edit.l2()) + 512).to_bytes(8, "big") + (0xFFFF_FFFF << 32).to_bytes(8, "big")


def image_of(kind: str, directory: Path) -> Path:
    """An image of this kind, made once for each directory. Not to be changed."""
    path = directory / f"{kind.replace(' ', '-')}.qcow2"
    if not path.exists():
        KINDS[kind](path)
    return path


def damaged_image(mutation: Mutation, directory: Path, scratch: Path) -> Path:
    """A copy in `scratch` of the image in `directory`, with the damage done."""
    path = scratch / "damaged.qcow2"
    shutil.copy(image_of(mutation.kind, directory), path)
    mutation.apply(Edit(path))
    return path
