"""AES over runs of 512-byte sectors, each with an initialization vector (IV) of its own.

    XTS   the IV is the tweak                                   LUKS: aes-xts-plain64
    CBC   the IV precedes the first block of the sector         LUKS: aes-cbc-essiv:sha256; legacy AES: plain64

The IV comes from a sector number. `cryptography` is an optional dependency; `_Aes` alone imports it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Protocol

from nbdimg.errors import CorruptImage, UnsupportedFeature, escaped
from nbdimg.storage.file import Buffer

SECTOR_SIZE = 512
BLOCK_SIZE = 16

LEGACY_KEY_SIZE = 16
"""QEMU uses AES-128 for crypt_method 1, although the specification's text says 256 bits."""

IvGenerator = Callable[[int, int], list[bytes]]
"""(first sector, count) to the IVs of these sectors, 16 bytes each."""


class SectorCipher(Protocol):
    """Thread-safe. `sector` is the number of the first sector; lengths are multiples of SECTOR_SIZE."""

    def encrypt(self, sector: int, data: Buffer) -> bytes:
        """The ciphertext of `data`."""
        ...

    def decrypt(self, sector: int, view: memoryview) -> None:
        """Replace the ciphertext in `view` by its plaintext."""
        ...


class _Context(Protocol):
    """What is used of `cryptography`'s CipherContext."""

    def update(self, data: Buffer, /) -> bytes: ...

    def reset_nonce(self, nonce: bytes, /) -> None: ...


class _Aes:
    """AES under one key, and the only place that imports `cryptography`.

    Raises:
        UnsupportedFeature: `cryptography` is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], key: bytes) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError:
            message = "is encrypted, which needs the package cryptography: pip install cryptography"
            raise UnsupportedFeature(path, message) from None
        self._cipher, self._modes = Cipher, modes
        self._algorithm = algorithms.AES(key)

    def ecb(self) -> _Context:
        return self._cipher(self._algorithm, self._modes.ECB()).encryptor()

    def cbc(self, iv: bytes, *, encrypts: bool) -> _Context:
        cipher = self._cipher(self._algorithm, self._modes.CBC(iv))
        return cipher.encryptor() if encrypts else cipher.decryptor()

    def xts(self, tweak: bytes, *, encrypts: bool) -> _Context:
        """Raises: ValueError: the halves of the key are equal."""
        cipher = self._cipher(self._algorithm, self._modes.XTS(tweak))
        return cipher.encryptor() if encrypts else cipher.decryptor()

    def can_restart_xts(self) -> bool:
        """Whether `reset_nonce` sets the tweak of an XTS context; proved with two tweaks in both directions.

        Making a context costs several times what it takes to encrypt a sector: with a context per sector 35 to 50
        MB/s were measured where a restarted one gave 150 to 200. `cryptography` restarts contexts of modes that are
        registered as `ModeWithNonce`, which XTS is not. Registering it is no part of the library's contract, so a
        refusal or a wrong result here means a context per sector, and nothing worse. Rejected: AES-ECB over the
        buffer with tweaks as large integers (60 to 100 MB/s: the conversions between bytes and int cost the gain).
        """
        text, tweaks = bytes(range(64)), (bytes(BLOCK_SIZE), b"\x5a" * BLOCK_SIZE)
        try:
            self._modes.ModeWithNonce.register(self._modes.XTS)
            for encrypts in (True, False):
                context = self.xts(tweaks[0], encrypts=encrypts)
                for tweak in (*reversed(tweaks), tweaks[1]):
                    context.reset_nonce(tweak)
                    if context.update(text) != self.xts(tweak, encrypts=encrypts).update(text):
                        return False
        except Exception:
            return False
        return True


class XtsCipher:
    """AES-XTS, a sector a data unit (IEEE 1619). `key` is 32 or 64 bytes: that of the data, then that of the tweaks.

    Raises:
        CorruptImage: the halves of the key are equal, which XTS forbids.
        UnsupportedFeature: `cryptography` is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], key: bytes, ivs: IvGenerator) -> None:
        if key[: len(key) // 2] == key[len(key) // 2 :]:
            raise CorruptImage(path, "the two halves of the XTS key are equal, expected different ones")
        self._aes = _Aes(path, key)
        self._ivs = ivs
        self._can_restart = self._aes.can_restart_xts()
        self._idle: dict[bool, list[_Context]] = {True: [], False: []}

    def encrypt(self, sector: int, data: Buffer) -> bytes:
        return self._run(sector, memoryview(data), encrypts=True)

    def decrypt(self, sector: int, view: memoryview) -> None:
        view[:] = self._run(sector, view, encrypts=False)

    def _run(self, sector: int, view: memoryview, *, encrypts: bool) -> bytes:
        offsets = range(0, len(view), SECTOR_SIZE)
        ivs = self._ivs(sector, len(offsets))
        if not self._can_restart:
            contexts = (self._aes.xts(iv, encrypts=encrypts) for iv in ivs)
            parts = (c.update(view[at : at + SECTOR_SIZE]) for c, at in zip(contexts, offsets, strict=True))
            return b"".join(parts)
        context = self._take(encrypts)
        restart, update, sectors = context.reset_nonce, context.update, []
        for iv, at in zip(ivs, offsets, strict=True):
            restart(iv)
            sectors.append(update(view[at : at + SECTOR_SIZE]))
        self._idle[encrypts].append(context)
        return b"".join(sectors)

    def _take(self, encrypts: bool) -> _Context:
        """A context for the caller alone: another thread may come between its restart and its update."""
        try:
            return self._idle[encrypts].pop()
        except IndexError:
            return self._aes.xts(bytes(BLOCK_SIZE), encrypts=encrypts)


class CbcCipher:
    """AES-CBC, begun anew in every sector. `key` is 16, 24 or 32 bytes.

    Raises:
        UnsupportedFeature: `cryptography` is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], key: bytes, ivs: IvGenerator) -> None:
        self._aes = _Aes(path, key)
        self._ivs = ivs

    def encrypt(self, sector: int, data: Buffer) -> bytes:
        """One context for all sectors: what the chain brings over from the sector before is taken out with XOR."""
        view, sectors, chained = memoryview(data), [], 0
        update = self._aes.cbc(bytes(BLOCK_SIZE), encrypts=True).update
        for index, iv in enumerate(self._ivs(sector, len(view) // SECTOR_SIZE)):
            at = index * SECTOR_SIZE
            first = _number(view[at : at + BLOCK_SIZE]) ^ _number(iv) ^ chained
            ciphertext = update(_block(first) + view[at + BLOCK_SIZE : at + SECTOR_SIZE])
            chained = _number(ciphertext[-BLOCK_SIZE:])
            sectors.append(ciphertext)
        return b"".join(sectors)

    def decrypt(self, sector: int, view: memoryview) -> None:
        """One call for all sectors, as if they were one; then each first block gets its IV in place of the chain."""
        plaintext = bytearray(self._aes.cbc(bytes(BLOCK_SIZE), encrypts=False).update(view))
        chained = 0
        for index, iv in enumerate(self._ivs(sector, len(view) // SECTOR_SIZE)):
            at, end = index * SECTOR_SIZE, (index + 1) * SECTOR_SIZE
            first = _number(plaintext[at : at + BLOCK_SIZE]) ^ chained ^ _number(iv)
            plaintext[at : at + BLOCK_SIZE] = _block(first)
            chained = _number(view[end - BLOCK_SIZE : end])
        view[:] = plaintext


def _number(block: Buffer) -> int:
    return int.from_bytes(block, "little")


def _block(number: int) -> bytes:
    return number.to_bytes(BLOCK_SIZE, "little")


def plain64_ivs(sector: int, count: int) -> list[bytes]:
    """The sector number, little-endian: sector 0x0102 gives 02 01 00 ... 00."""
    return [number.to_bytes(BLOCK_SIZE, "little") for number in range(sector, sector + count)]


def plain_ivs(sector: int, count: int) -> list[bytes]:
    """As plain64, of the low 32 bits."""
    return [(number & 0xFFFFFFFF).to_bytes(BLOCK_SIZE, "little") for number in range(sector, sector + count)]


def essiv_ivs(path: str | os.PathLike[str], key: bytes) -> IvGenerator:
    """plain64, encrypted with AES-256 under the SHA-256 of `key`."""
    aes = _Aes(path, hashlib.sha256(key).digest())

    def ivs(sector: int, count: int) -> list[bytes]:
        encrypted = aes.ecb().update(b"".join(plain64_ivs(sector, count)))
        return [encrypted[at : at + BLOCK_SIZE] for at in range(0, len(encrypted), BLOCK_SIZE)]

    return ivs


CIPHER = "aes"
MODES: dict[str, tuple[type[XtsCipher] | type[CbcCipher], tuple[int, ...]]] = {
    "xts": (XtsCipher, (32, 64)),
    "cbc": (CbcCipher, (16, 24, 32)),
}
"""Chaining mode to its class and key sizes in bytes. QEMU makes XTS with 48 bytes too; OpenSSL has no such cipher."""

_PLAIN_IVS: dict[str, IvGenerator] = {"plain64": plain64_ivs, "plain": plain_ivs}
IV_NAMES = (*_PLAIN_IVS, "essiv:sha256")


def check_algorithm(path: str | os.PathLike[str], cipher: str, mode: str, key_size: int) -> None:
    """Whether `sector_cipher` has `cipher` (`aes`) in `mode` (`xts-plain64`) with keys of `key_size` bytes.

    Raises:
        UnsupportedFeature: it has not; the message names what was found.
    """
    chaining, iv_name = _parts(mode)
    if cipher != CIPHER:
        raise UnsupportedFeature(path, f"the cipher is {escaped(cipher)}, expected {CIPHER!r}")
    if chaining not in MODES or iv_name not in IV_NAMES:
        allowed = f"{' or '.join(MODES)} with {', '.join(IV_NAMES)}, such as 'xts-plain64'"
        raise UnsupportedFeature(path, f"the cipher mode is {escaped(mode)}, expected {allowed}")
    sizes = MODES[chaining][1]
    if key_size not in sizes:
        allowed = " or ".join(str(size) for size in sizes)
        raise UnsupportedFeature(path, f"the key of {cipher}-{mode} has {key_size} bytes, expected {allowed}")


def sector_cipher(path: str | os.PathLike[str], cipher: str, mode: str, key: bytes) -> SectorCipher:
    """The cipher that a LUKS header names, under its key. `path` is for messages.

    Raises:
        CorruptImage: the key is one that the mode forbids.
        UnsupportedFeature: `check_algorithm` refuses it, or `cryptography` is not installed.
    """
    check_algorithm(path, cipher, mode, len(key))
    chaining, iv_name = _parts(mode)
    return MODES[chaining][0](path, key, _iv_generator(path, iv_name, key))


def _parts(mode: str) -> tuple[str, str]:
    """Chaining mode and IV generator. Where QEMU is given a hash, as by libvirt's `<ivgen name='plain64'
    hash='sha256'/>`, it writes that down for generators too that have no use for one.
    """
    chaining, _, iv_name = mode.partition("-")
    plain = iv_name.partition(":")[0]
    return chaining, plain if plain in _PLAIN_IVS else iv_name


def _iv_generator(path: str | os.PathLike[str], name: str, key: bytes) -> IvGenerator:
    if name == "essiv:sha256":
        return essiv_ivs(path, key)
    return _PLAIN_IVS[name]


def legacy_cipher(path: str | os.PathLike[str], passphrase: bytes) -> SectorCipher:
    """crypt_method 1: the key is the passphrase's first 16 bytes, filled up with zeroes. No passphrase is wrong.

    Raises:
        UnsupportedFeature: `cryptography` is not installed.
    """
    return CbcCipher(path, passphrase[:LEGACY_KEY_SIZE].ljust(LEGACY_KEY_SIZE, b"\0"), plain64_ivs)
