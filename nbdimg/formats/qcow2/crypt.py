"""Encrypted guest data as a file of plaintext.

LUKS in qcow2 counts the sectors from which IVs come in the host file, legacy AES those of the guest's disk (qcow2 spec,
"crypt_method"). Metadata is never encrypted.

A cipher keeps the interpreter's lock for a sector (`cryptography` gives it up for large buffers only), so threads bring
no throughput here. What they bring is fairness: a long run is done in pieces, and the loop gets its turn between them.
"""

from __future__ import annotations

import os

from nbdimg.errors import ConfigError
from nbdimg.formats.qcow2.ciphers import SECTOR_SIZE, SectorCipher
from nbdimg.storage.file import BlockFile, Buffer
from nbdimg.storage.workers import computers
from nbdimg.units import KiB, align_down, align_up

PIECE_SIZE = 64 * KiB
"""Bytes that are worked on in one go, on the loop's thread or on a worker: 0.3 to 0.4 ms, which a neighbour waits."""


class NoKey:
    """The cipher of an image whose key was not given: whatever asks for data learns of it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path

    def error(self) -> ConfigError:
        return ConfigError(f"{os.fspath(self._path)}: it is encrypted, and no key file was given for it (--key-file)")

    def encrypt(self, sector: int, data: Buffer) -> bytes:
        raise self.error()

    def decrypt(self, sector: int, view: memoryview) -> None:
        raise self.error()


class EncryptedFile:
    """The plaintext of `inner`, byte for byte at the same offsets.

    The IV's sector is offset / 512 + `shift`: 0 where host sectors count (LUKS); for legacy AES and a cluster whose
    guest offset is 0x10000 and host offset 0x50000, (0x10000 - 0x50000) / 512 = -512.

    A sector is encrypted whole, so a write that covers one in part reads it first. The caller guarantees that no
    other request touches that sector meanwhile. Zeroes on disk are not zeroes of the guest: `punch` and `zero` say
    no, and what lies beyond the end of `inner` reads as noise (as QEMU reads it), never as zeroes.
    """

    __slots__ = ("_cipher", "_inner", "_shift", "is_writable", "path")
    pages = None

    def __init__(self, inner: BlockFile, cipher: SectorCipher, shift: int = 0) -> None:
        self.path = inner.path
        self.is_writable = inner.is_writable
        self._inner = inner
        self._cipher = cipher
        self._shift = shift

    @property
    def size(self) -> int:
        return self._inner.size

    def check_key(self) -> None:
        """Raises: ConfigError: there is none, so data is neither read nor written."""
        if isinstance(self._cipher, NoKey):
            raise self._cipher.error()

    def shifted(self, shift: int) -> EncryptedFile:
        """The same file with `shift` more sectors between offsets and IVs; closing either closes both."""
        return EncryptedFile(self._inner, self._cipher, self._shift + shift)

    def _sector(self, offset: int) -> int:
        return offset // SECTOR_SIZE + self._shift

    def try_pread(self, offset: int, view: memoryview) -> bool:
        """As in BlockFile; a run longer than PIECE_SIZE is for `pread`."""
        if len(view) > PIECE_SIZE:
            return False
        if not _is_aligned(offset, len(view)):
            start, whole = _covering(offset, len(view))
            if not self.try_pread(start, whole):
                return False
            view[:] = whole[offset - start : offset - start + len(view)]
            return True
        if not self._inner.try_pread(offset, view):
            return False
        self._cipher.decrypt(self._sector(offset), view)
        return True

    async def pread(self, offset: int, view: memoryview) -> None:
        if not _is_aligned(offset, len(view)):
            start, whole = _covering(offset, len(view))
            await self.pread(start, whole)
            view[:] = whole[offset - start : offset - start + len(view)]
            return
        await self._inner.pread(offset, view)
        if len(view) <= PIECE_SIZE:
            self._cipher.decrypt(self._sector(offset), view)
            return
        for at in range(0, len(view), PIECE_SIZE):
            await computers().run(self._cipher.decrypt, self._sector(offset + at), view[at : at + PIECE_SIZE])

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        """As in BlockFile; a run longer than PIECE_SIZE is for `pwrite`."""
        if len(data) > PIECE_SIZE:
            return False
        if not _is_aligned(offset, len(data)):
            start, whole = _covering(offset, len(data))
            for edge in _edges(offset, len(data)):
                if not self.try_pread(edge, whole[edge - start : edge - start + SECTOR_SIZE]):
                    return False
            whole[offset - start : offset - start + len(data)] = data
            return self.try_pwrite(start, whole)
        return self._inner.try_pwrite(offset, self._cipher.encrypt(self._sector(offset), data))

    async def pwrite(self, offset: int, data: Buffer) -> None:
        if not _is_aligned(offset, len(data)):
            start, whole = _covering(offset, len(data))
            for edge in _edges(offset, len(data)):
                await self.pread(edge, whole[edge - start : edge - start + SECTOR_SIZE])
            whole[offset - start : offset - start + len(data)] = data
            await self.pwrite(start, whole)
            return
        await self._inner.pwrite(offset, await self._encrypted(offset, memoryview(data)))

    async def _encrypted(self, offset: int, view: memoryview) -> Buffer:
        if len(view) <= PIECE_SIZE:
            return self._cipher.encrypt(self._sector(offset), view)
        ciphertext = bytearray(len(view))
        for at in range(0, len(view), PIECE_SIZE):
            piece = view[at : at + PIECE_SIZE]
            encrypted = await computers().run(self._cipher.encrypt, self._sector(offset + at), piece)
            ciphertext[at : at + PIECE_SIZE] = encrypted
        return ciphertext

    async def fdatasync(self) -> None:
        await self._inner.fdatasync()

    async def punch(self, offset: int, length: int) -> bool:
        return False

    async def zero(self, offset: int, length: int) -> bool:
        return False

    async def truncate(self, size: int) -> None:
        await self._inner.truncate(size)

    async def prefetch(self, offset: int, length: int) -> None:
        await self._inner.prefetch(offset, length)

    def try_data_extent(self, offset: int) -> tuple[bool, int]:
        return True, self.size

    async def data_extent(self, offset: int) -> tuple[bool, int]:
        return self.try_data_extent(offset)

    async def close(self) -> None:
        await self._inner.close()


def _is_aligned(offset: int, length: int) -> bool:
    """Whether the range is made of whole sectors; an empty one is."""
    return length == 0 or (offset | length) % SECTOR_SIZE == 0


def _covering(offset: int, length: int) -> tuple[int, memoryview]:
    """The sectors that a range touches: where they begin and a buffer for them. (700, 600) gives 512 and 1024 bytes."""
    start = align_down(offset, SECTOR_SIZE)
    return start, memoryview(bytearray(align_up(offset + length, SECTOR_SIZE) - start))


def _edges(offset: int, length: int) -> list[int]:
    """Where the sectors begin that a range covers in part: (700, 600) gives [512, 1024], (512, 600) gives [1024]."""
    ends = [end for end in (offset, offset + length) if end % SECTOR_SIZE]
    return sorted({align_down(end, SECTOR_SIZE) for end in ends})
