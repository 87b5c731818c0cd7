"""The images that qcow2 scenarios begin with: made by qemu-img, then held in memory."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nbdimg.storage.file import Buffer
from tests.support.crash import SECTOR, written
from tests.support.qcow2edit import OFFSET, make_luks

KiB = 1024
IMAGE, DATA, BASE = "disk.qcow2", "disk.data", "base"
"""Names in the directory where an image is made, and in those where it is checked: images hold them."""

KEY = b"key"
"""Of encrypted images, as SECRET says it."""

OVERLAY_SERIAL = 1 << 63
"""Of the sectors in an overlay; those of its backing image, and of an image without one, have serial 0."""

INCOMPATIBLE = 72
"""Offset of the header's incompatible features, of which the last bit says that the image is dirty."""

SNAPSHOT = "kept"
BITMAP, IDLE_BITMAP = "enabled", "idle"
BITMAP_GRANULARITY = 4 * KiB


@dataclass(frozen=True)
class Start:
    """`files`: the image, and its data file if it has one. `others`: files that are not written, by name. `kept`: what
    the snapshot SNAPSHOT reads as.
    """

    files: Sequence[bytes]
    guest: bytes
    others: dict[str, bytes] = field(default_factory=dict)
    kept: bytes | None = None
    is_encrypted: bool = False
    has_bitmaps: bool = False
    """BITMAP records, and does not know of anything yet; IDLE_BITMAP does not, and is all dirty."""


def pattern(size: int, serial: int = 0, *, gap: int = 3) -> bytes:
    """`size` bytes of sectors that say where they belong; of `gap` 4 KiB one is zeroes."""
    sectors = (written(n, serial) if n // 8 % gap else bytes(SECTOR) for n in range(size // SECTOR))
    return b"".join(sectors)


def _run(directory: Path, *command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, cwd=directory)


def _convert(directory: Path, guest: Buffer, options: str, *flags: str) -> None:
    (directory / "guest.raw").write_bytes(guest)
    _run(directory, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", *flags, "-o", options, "guest.raw", IMAGE)


def _io(directory: Path, *commands: str) -> None:
    _run(directory, "qemu-io", "-f", "qcow2", *(part for each in commands for part in ("-c", each)), IMAGE)


def _write(directory: Path, guest: bytearray, start: int, data: bytes) -> None:
    """Write `data` into the image; `guest` follows."""
    (directory / "part.raw").write_bytes(data)
    _io(directory, f"write -q -s part.raw {start} {len(data)}")
    guest[start : start + len(data)] = data


def _loaded(directory: Path, guest: Buffer, *others: str, kept: bytes | None = None) -> Start:
    names = [IMAGE, DATA] if (directory / DATA).exists() else [IMAGE]
    files = [(directory / name).read_bytes() for name in names]
    return Start(files, bytes(guest), {name: (directory / name).read_bytes() for name in others}, kept)


Make = Callable[[Path], Start]


def plain(options: str, size: int, *flags: str, filled: int | None = None) -> Make:
    """An image with data in the first `filled` bytes, or in all of it."""

    def make(directory: Path) -> Start:
        used = size if filled is None else filled
        guest = pattern(used) + bytes(size - used)
        _convert(directory, guest, options, *flags)
        return _loaded(directory, guest)

    return make


def data_file(options: str, size: int) -> Make:
    def make(directory: Path) -> Start:
        guest = bytearray(size)
        _run(
            directory, "qemu-img", "create", "-q", "-f", "qcow2", "-o", f"{options},data_file={DATA}", IMAGE, f"{size}"
        )
        _write(directory, guest, 0, pattern(size // 2))
        return _loaded(directory, guest)

    return make


def encrypted(options: str, size: int) -> Make:
    """With LUKS; data in the first half."""

    def make(directory: Path) -> Start:
        guest = pattern(size // 2).ljust(size, b"\0")
        (directory / "part.raw").write_bytes(guest[: size // 2])
        make_luks(directory / IMAGE, size, f"write -q -s {directory / 'part.raw'} 0 {size // 2}", options=options)
        return replace(_loaded(directory, guest), is_encrypted=True)

    return make


def overlay(options: str, size: int, base_size: int, base_format: str) -> Make:
    """Something of its own in the second quarter; the base ends before the image does."""

    def make(directory: Path) -> Start:
        base = pattern(base_size)
        (directory / "guest.raw").write_bytes(base)
        _run(directory, "qemu-img", "convert", "-f", "raw", "-O", base_format, "guest.raw", BASE)
        backing = ("-b", BASE, "-F", base_format)
        _run(directory, "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *backing, IMAGE, f"{size}")
        guest = bytearray(base + bytes(size - base_size))
        own = pattern(size, OVERLAY_SERIAL, gap=size)
        _write(directory, guest, size // 4, own[size // 4 : size // 2])
        return _loaded(directory, guest, BASE)

    return make


def with_snapshot(options: str, size: int) -> Make:
    """All that the disk has is the snapshot's as well, but for the last eighth."""

    def make(directory: Path) -> Start:
        kept = pattern(size)
        guest = bytearray(kept)
        _convert(directory, kept, options)
        _run(directory, "qemu-img", "snapshot", "-c", SNAPSHOT, IMAGE)
        last = size - size // 8
        _write(directory, guest, last, pattern(size, OVERLAY_SERIAL, gap=size)[last:])
        _undate(directory / IMAGE)
        return _loaded(directory, guest, kept=kept)

    return make


def crowded(options: str, size: int, ballast: int) -> Make:
    """A snapshot of a disk of `ballast` bytes takes up the file, of which the disk still has the first `size`."""

    def make(directory: Path) -> Start:
        guest = pattern(ballast, gap=ballast)
        _convert(directory, guest, options)
        _run(directory, "qemu-img", "snapshot", "-c", SNAPSHOT, IMAGE)
        _run(directory, "qemu-img", "resize", "-q", "--shrink", IMAGE, f"{size}")
        _undate(directory / IMAGE)
        return _loaded(directory, guest[:size])

    return make


def _undate(path: Path) -> None:
    """The one snapshot's date becomes 0: a seed is to give the same files always."""
    content = bytearray(path.read_bytes())
    table = int.from_bytes(content[64:72], "big")
    content[table + 16 : table + 24] = bytes(8)
    path.write_bytes(content)


def zeroed(options: str, size: int) -> Make:
    """The second half reads as zeroes and keeps its space."""

    def make(directory: Path) -> Start:
        guest = bytearray(pattern(size, gap=size))
        _convert(directory, guest, options)
        _io(directory, f"write -q -z {size // 2} {size // 2}")
        guest[size // 2 :] = bytes(size // 2)
        return _loaded(directory, guest)

    return make


def with_bitmaps(options: str, size: int) -> Make:
    def make(directory: Path) -> Start:
        guest = bytearray(size)
        _run(directory, "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, IMAGE, f"{size}")
        granularity = ("-g", f"{BITMAP_GRANULARITY}")
        _run(directory, "qemu-img", "bitmap", "--add", *granularity, IMAGE, IDLE_BITMAP)
        _write(directory, guest, 0, pattern(size))
        _run(directory, "qemu-img", "bitmap", "--disable", IMAGE, IDLE_BITMAP)
        _run(directory, "qemu-img", "bitmap", "--add", *granularity, IMAGE, BITMAP)
        return replace(_loaded(directory, guest), has_bitmaps=True)

    return make


def damaged(make: Make, *, is_table_lost: bool = False) -> Make:
    """What `make` makes, dirty, with refcounts and COPIED flags that are wrong here and there: to open it repairs it.

    Refcounts have 16 bits, and the first block counts all. `is_table_lost`: the refcount table names no block.
    """

    def make_damaged(directory: Path) -> Start:
        made = make(directory)
        content = bytearray(made.files[0])
        cluster_size = 1 << int.from_bytes(content[20:24], "big")
        table, l1 = int.from_bytes(content[48:56], "big"), int.from_bytes(content[40:48], "big")
        block, l2 = (int.from_bytes(content[at : at + 8], "big") & OFFSET for at in (table, l1))
        content[INCOMPATIBLE + 7] |= 1
        for index in range(0, cluster_size // 8, 3):
            entry = l2 + 8 * index
            if content[entry : entry + 8].strip(b"\0"):
                content[entry] ^= 0x80
        for cluster in range(3, len(content) // cluster_size, 4):
            content[block + 2 * cluster + 1] = cluster // 4 % 4
        if is_table_lost:
            content[table : table + 8] = bytes(8)
        return replace(made, files=[bytes(content), *made.files[1:]])

    return make_damaged


@functools.cache
def start(make: Make) -> Start:
    """What `make` makes, made once."""
    with tempfile.TemporaryDirectory() as directory:
        return make(Path(directory))
