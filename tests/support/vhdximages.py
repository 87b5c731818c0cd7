"""Small VHDX images of known guest bytes, and what other programs make of an image.

Images are packed field by field (see `tests.formats.vhdx.craft`), without the code that is tested: log at 1 MiB,
metadata at 2 MiB, BAT at 3 MiB, bitmap and blocks from 4 MiB on.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from tests.formats.vhdx import craft
from tests.formats.vhdx.craft import M
from tests.support.peers import require_program

BAT_OFFSET = 3 * M
DATA_OFFSET = 4 * M
NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, FULL, PARTIAL = 0, 1, 2, 3, 6, 7
HAS_PARENT, IS_FIXED = 2, 1

Runs = Sequence[tuple[int, int]]
"""(first, stop) sectors of a block."""


@dataclass
class Builder:
    """An image to which blocks are added; `content` is the file. All numbers are bytes but for block numbers."""

    size: int
    block_size: int = M
    sector_size: int = 512
    flags: int = 0
    parent: str | None = None
    """A relative path as in `.\\parent.vhdx`."""
    linkage: UUID = craft.DATA_WRITE_GUID
    data_write_guid: UUID = craft.DATA_WRITE_GUID
    log_length: int = M
    content: bytearray = field(init=False)

    def __post_init__(self) -> None:
        more: list[tuple[str, int, bytes]] = []
        if self.parent is not None:
            self.flags |= HAS_PARENT
            pairs = (("parent_linkage", f"{{{self.linkage}}}"), ("relative_path", self.parent))
            more = [(craft.PARENT_LOCATOR, 4, craft.locator(*pairs))]
        self.content = craft.image(
            first=craft.header(1, data_write_guid=self.data_write_guid, log_length=self.log_length),
            second=craft.header(2, data_write_guid=self.data_write_guid, log_length=self.log_length),
            meta=craft.metadata(
                block_size=self.block_size,
                flags=self.flags,
                virtual_size=self.size,
                logical=self.sector_size,
                more=more,
            ),
        )

    @property
    def ratio(self) -> int:
        return (1 << 23) * self.sector_size // self.block_size

    def set_entry(self, index: int, entry: int) -> None:
        struct.pack_into("<Q", self.content, BAT_OFFSET + 8 * index, entry)

    def set_block(self, block: int, entry: int) -> None:
        self.set_entry(block + block // self.ratio, entry)

    def append(self, data: bytes | bytearray, length: int) -> int:
        """The offset of `length` bytes that begin with `data`."""
        offset = len(self.content)
        self.content += bytes(data) + bytes(length - len(data))
        return offset

    def add_full(self, block: int, data: bytes) -> int:
        offset = self.append(data, self.block_size)
        self.set_block(block, offset | FULL)
        return offset

    def add_partial(self, block: int, data: bytes, sectors: Runs) -> int:
        """A block of which only `sectors` count."""
        chunk, position = divmod(block, self.ratio)
        index = (chunk + 1) * self.ratio + chunk
        (entry,) = struct.unpack_from("<Q", self.content, BAT_OFFSET + 8 * index)
        if not entry:
            entry = self.append(b"", M) | FULL
            self.set_entry(index, entry)
        base = position * (self.block_size // self.sector_size)
        for first, stop in sectors:
            for bit in range(base + first, base + stop):
                self.content[(entry & ~0xFFFFF) + (bit >> 3)] |= 1 << (bit & 7)
        offset = self.append(data, self.block_size)
        self.set_block(block, offset | PARTIAL)
        return offset

    def add_guest(self, guest: bytes, *, all_blocks: bool = False) -> None:
        """Every block that is not all zeroes, or every one."""
        for block in range(-(-len(guest) // self.block_size)):
            data = guest[block * self.block_size : (block + 1) * self.block_size]
            if all_blocks or any(data):
                self.add_full(block, data)


def dynamic(guest: bytes, *, block_size: int = M, sector_size: int = 512) -> bytes:
    builder = Builder(len(guest), block_size, sector_size)
    builder.add_guest(guest)
    return bytes(builder.content)


def fixed(guest: bytes, *, block_size: int = M, sector_size: int = 512) -> bytes:
    builder = Builder(len(guest), block_size, sector_size, IS_FIXED)
    builder.add_guest(guest, all_blocks=True)
    return bytes(builder.content)


def run(*arguments: str | Path) -> str:
    done = subprocess.run([str(each) for each in arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def seven_zip() -> str:
    """7-Zip's program, which Debian calls 7zz up to 12 and 7z later."""
    return require_program("7zz", "7z")


def flattened(path: Path) -> bytes:
    """The disk as 7-Zip reads it, through its chain; its size must be a multiple of 1 MiB."""
    done = subprocess.run([seven_zip(), "e", "-so", "-tVHDX", str(path)], capture_output=True, cwd=path.parent)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def judge(path: Path, guest: bytes) -> None:
    """qemu-img finds nothing wrong with a dynamic or fixed image of 512-byte sectors, and these bytes in it."""
    run("qemu-img", "check", "-q", path)
    expected = path.with_suffix(".expected")
    expected.write_bytes(guest)
    run("qemu-img", "compare", "-q", "-f", "raw", "-F", "vhdx", expected, path)
    expected.unlink()
