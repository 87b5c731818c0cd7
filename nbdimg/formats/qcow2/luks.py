"""LUKS version 1: the header with its eight key slots, as QEMU keeps it in clusters of a qcow2 image.

    header     magic, algorithms, the master key's digest, eight slots        592 bytes
    slot k     key material: the master key, split into stripes and encrypted under a passphrase
    payload    begins where the slots end; inside qcow2 there is none, the guest's data lies in its clusters

A passphrase opens a slot: PBKDF2 gives the key of the material, the decrypted stripes merge to a candidate, and the
candidate is the master key if its digest is the header's. All of it is costly on purpose, so every number that decides
about work is bounded before any work is done.

Source: "LUKS On-Disk Format Specification", version 1.2.3; integers are big-endian.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from struct import Struct
from weakref import WeakValueDictionary

from nbdimg.errors import ConfigError, CorruptImage, ImageError, UnsupportedFeature, escaped
from nbdimg.formats.qcow2.ciphers import CIPHER, SECTOR_SIZE, SectorCipher, check_algorithm, sector_cipher
from nbdimg.units import KiB, MiB, align_up, div_ceil

#  0  magic               6s   "LUKS" ba be
#  6  version             H    1
#  8  cipher_name         32s  "aes"; names are filled up with NULs
# 40  cipher_mode         32s  "xts-plain64"
# 72  hash_name           32s  "sha256": of PBKDF2 and of the stripes
# 104 payload_offset      I    in sectors
# 108 key_size            I    bytes of the master key
# 112 digest              20s  PBKDF2 of the master key
# 132 digest_salt         32s
# 164 digest_iterations   I
# 168 uuid                40s
# 208 slots               8 of SLOT
HEADER = Struct(">6sH32s32s32sII20s32sI40s")
assert HEADER.size == 208

#  0  state               I    SLOT_ACTIVE or SLOT_INACTIVE
#  4  iterations          I    of PBKDF2
#  8  salt                32s
# 40  material_offset     I    in sectors, from the beginning of the header
# 44  stripe_count        I    4000 in every writer known
SLOT = Struct(">II32sII")
assert SLOT.size == 48

MAGIC = b"LUKS\xba\xbe"
SLOT_COUNT = 8
SLOT_ACTIVE = 0x00AC71F3
SLOT_INACTIVE = 0x0000DEAD
HEADER_SIZE = HEADER.size + SLOT_COUNT * SLOT.size
assert HEADER_SIZE == 592

DIGEST_SIZE = 20
SALT_SIZE = 32
STRIPES = 4000

AREA_SIZE_MAX = 16 * MiB
"""Bytes of header and slots; those of the largest key that is supported take 2,068,480."""

ITERATIONS_MAX = 1 << 25
"""PBKDF2 rounds of one field. A tool that spends 2 s on a fast machine chooses about 10 million."""

WORK_MAX = 1 << 27
"""Hash blocks of PBKDF2 for trying all active slots: about a minute. Eight slots of 2 s each stay far below."""

ITERATIONS_MIN = 1000
"""For new slots, on the slowest machine: what RFC 2898 asks for."""

UNLOCK_TIME_S = 2.0
"""What a passphrase of a new image costs to try on the machine that makes it."""

CALIBRATION_S = 0.05
"""A trial of PBKDF2 that takes this long tells its speed."""

HASHES = ("sha1", "sha224", "sha256", "sha384", "sha512")
MATERIAL_ALIGNMENT = 4 * KiB
"""Of slots in new headers, as in QEMU and cryptsetup."""

NEW_MODE, NEW_HASH, NEW_KEY_SIZE = "xts-plain64", "sha256", 64


@dataclass(frozen=True, slots=True)
class KeySlot:
    """`material_offset` in bytes from the beginning of the header."""

    is_active: bool
    iterations: int
    salt: bytes
    material_offset: int
    stripe_count: int


@dataclass(frozen=True, slots=True)
class LuksHeader:
    """`payload_offset` and `key_size` in bytes."""

    cipher: str
    mode: str
    hash_name: str
    payload_offset: int
    key_size: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    key_slots: tuple[KeySlot, ...]

    def to_bytes(self) -> bytes:
        names = (name.encode() for name in (self.cipher, self.mode, self.hash_name))
        payload_sector = self.payload_offset // SECTOR_SIZE
        digest = (self.digest, self.digest_salt, self.digest_iterations)
        packed = HEADER.pack(MAGIC, 1, *names, payload_sector, self.key_size, *digest, self.uuid.encode())
        for slot in self.key_slots:
            state = SLOT_ACTIVE if slot.is_active else SLOT_INACTIVE
            sector = slot.material_offset // SECTOR_SIZE
            packed += SLOT.pack(state, slot.iterations, slot.salt, sector, slot.stripe_count)
        assert len(packed) == HEADER_SIZE
        return packed


def check_area_size(path: str | os.PathLike[str], length: int) -> None:
    """Before header and slots are read: whether `length`, from the qcow2 header's extension, is one to read.

    Raises:
        CorruptImage: it is not.
    """
    _bound(path, "header length", length, HEADER_SIZE, AREA_SIZE_MAX, "qcow2 header extension 0x0537be77")


def parse(path: str | os.PathLike[str], area: bytes) -> LuksHeader:
    """The header at the beginning of `area`, which holds header and slots: all bytes that the extension points to.

    Raises:
        CorruptImage: a field is out of its bounds.
        UnsupportedFeature: another version, or algorithms that are not supported.
    """
    check_area_size(path, len(area))
    magic, version, *names, payload_sector, key_size, digest, digest_salt, digest_iterations, uuid_text = (
        HEADER.unpack_from(area)
    )
    if magic != MAGIC:
        raise CorruptImage(path, f"LUKS magic is {magic.hex()}, expected {MAGIC.hex()} (LUKS header offset 0)")
    if version != 1:
        raise UnsupportedFeature(path, f"LUKS version is {version}, expected 1 (LUKS header offset 6)")
    cipher, mode, hash_name = (_text(name) for name in names)
    _check_algorithms(path, cipher, mode, key_size, hash_name)
    payload_max = len(area) // SECTOR_SIZE
    _bound(path, "payload offset", payload_sector, div_ceil(HEADER_SIZE, SECTOR_SIZE), payload_max, _at(104))
    _bound(path, "digest iterations", digest_iterations, 1, ITERATIONS_MAX, _at(164))
    slots = tuple(_parse_slots(path, area, key_size, payload_sector))
    payload_offset = payload_sector * SECTOR_SIZE
    header = LuksHeader(
        cipher,
        mode,
        hash_name,
        payload_offset,
        key_size,
        digest,
        digest_salt,
        digest_iterations,
        _text(uuid_text),
        slots,
    )
    _check_overlap(path, header)
    _check_work(path, header)
    return header


def _check_algorithms(path: str | os.PathLike[str], cipher: str, mode: str, key_size: int, hash_name: str) -> None:
    check_algorithm(path, cipher, mode, key_size)
    if hash_name not in HASHES:
        allowed = ", ".join(HASHES)
        raise UnsupportedFeature(path, f"LUKS hash is {escaped(hash_name)}, expected {allowed} (LUKS header offset 72)")


def _parse_slots(path: str | os.PathLike[str], area: bytes, key_size: int, payload_sector: int) -> Iterator[KeySlot]:
    """Of an inactive slot nothing but its state is checked, for nothing else is used."""
    for index in range(SLOT_COUNT):
        at = HEADER.size + index * SLOT.size
        state, iterations, salt, sector, stripe_count = SLOT.unpack_from(area, at)
        if state not in (SLOT_ACTIVE, SLOT_INACTIVE):
            expected = f"{SLOT_ACTIVE:#010x} or {SLOT_INACTIVE:#010x}"
            raise CorruptImage(path, f"LUKS slot {index} state is {state:#010x}, expected {expected} ({_at(at)})")
        if state == SLOT_ACTIVE:
            _bound(path, f"slot {index} iterations", iterations, 1, ITERATIONS_MAX, _at(at + 4))
            _bound(path, f"slot {index} stripes", stripe_count, 1, STRIPES, _at(at + 44))
            first, sector_count = div_ceil(HEADER_SIZE, SECTOR_SIZE), div_ceil(key_size * stripe_count, SECTOR_SIZE)
            _bound(path, f"slot {index} offset", sector, first, payload_sector - sector_count, _at(at + 40))
        yield KeySlot(state == SLOT_ACTIVE, iterations, salt, sector * SECTOR_SIZE, stripe_count)


def _check_overlap(path: str | os.PathLike[str], header: LuksHeader) -> None:
    active = sorted((slot.material_offset, slot.stripe_count) for slot in header.key_slots if slot.is_active)
    for (offset, stripe_count), (following, _) in pairwise(active):
        end = offset + header.key_size * stripe_count
        if following < end:
            raise CorruptImage(path, f"LUKS slot at offset {following} begins inside another, expected at least {end}")


def _check_work(path: str | os.PathLike[str], header: LuksHeader) -> None:
    digest_size = hashlib.new(header.hash_name).digest_size
    active = [slot.iterations for slot in header.key_slots if slot.is_active]
    per_key = div_ceil(header.key_size, digest_size)
    work = sum(active) * per_key + len(active) * header.digest_iterations * div_ceil(DIGEST_SIZE, digest_size)
    if work > WORK_MAX:
        raise CorruptImage(path, f"LUKS slots ask for {work} hash blocks of PBKDF2, expected at most {WORK_MAX}")


def _bound(path: str | os.PathLike[str], field: str, found: int, least: int, most: int, where: str) -> None:
    if not least <= found <= most:
        raise CorruptImage(path, f"LUKS {field} is {found}, expected {least} to {most} ({where})")


def _at(offset: int) -> str:
    return f"LUKS header offset {offset}"


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "backslashreplace")


_unlocked: WeakValueDictionary[bytes, SectorCipher] = WeakValueDictionary()
"""By a digest of header and passphrase: the ciphers of images that are open, and of nothing else."""

_DIGEST_KEY = os.urandom(SALT_SIZE)
"""Of this process: what is remembered says nothing of a passphrase to anybody who does not read its memory."""


def unlock(path: str | os.PathLike[str], area: bytes, passphrase: bytes) -> SectorCipher:
    """The cipher of the guest's data. Takes seconds of processor time: for a worker thread. An image that is open has
    paid for those of its snapshots, which are opened one by one beside it: they get the same.

    Raises:
        ConfigError: the passphrase opens no slot.
        CorruptImage, UnsupportedFeature: as `parse` and `sector_cipher`.
        ImageError: no slot is active, so no passphrase can.
    """
    header = parse(path, area)
    digest = hmac.digest(_DIGEST_KEY, area[:HEADER_SIZE] + passphrase, "sha256")
    cipher = _unlocked.get(digest)
    if cipher is None:
        cipher = sector_cipher(path, header.cipher, header.mode, master_key(path, header, area, passphrase))
        _unlocked[digest] = cipher
    return cipher


def master_key(path: str | os.PathLike[str], header: LuksHeader, area: bytes, passphrase: bytes) -> bytes:
    """The key that `passphrase` opens; `area` is what `header` was parsed from. Raises: as `unlock`."""
    active = [slot for slot in header.key_slots if slot.is_active]
    if not active:
        raise ImageError(path, "no LUKS key slot is active, so no passphrase opens the image")
    for slot in active:
        candidate = _open_slot(path, header, slot, area, passphrase)
        if hmac.compare_digest(_digest(header, candidate), header.digest):
            return candidate
    raise ConfigError(f"{os.fspath(path)}: the passphrase is wrong: it opens none of {len(active)} active LUKS slots")


def _open_slot(
    path: str | os.PathLike[str], header: LuksHeader, slot: KeySlot, area: bytes, passphrase: bytes
) -> bytes:
    """What the slot holds under this passphrase: the master key, or noise."""
    key = hashlib.pbkdf2_hmac(header.hash_name, passphrase, slot.salt, slot.iterations, header.key_size)
    split_size = header.key_size * slot.stripe_count
    material = bytearray(area[slot.material_offset :][: align_up(split_size, SECTOR_SIZE)])
    sector_cipher(path, header.cipher, header.mode, key).decrypt(0, memoryview(material))
    return merge_stripes(bytes(material[:split_size]), header.key_size, header.hash_name)


def _digest(header: LuksHeader, key: bytes) -> bytes:
    return hashlib.pbkdf2_hmac(header.hash_name, key, header.digest_salt, header.digest_iterations, DIGEST_SIZE)


def merge_stripes(material: bytes, key_size: int, hash_name: str) -> bytes:
    """The key whose stripes are `material`, each of `key_size` bytes (specification, section 2.4, "AFmerge")."""
    last = len(material) - key_size
    return _xor(_chain(material[:last], key_size, hash_name), material[last:])


def split_key(key: bytes, stripe_count: int, hash_name: str) -> bytes:
    """`stripe_count` stripes of which all are needed to get `key` back ("AFsplit"): all but the last are random."""
    material = os.urandom(len(key) * (stripe_count - 1))
    return material + _xor(_chain(material, len(key), hash_name), key)


def _chain(stripes: bytes, key_size: int, hash_name: str) -> bytes:
    """All `stripes` folded into one: XOR, then diffuse."""
    folded = bytes(key_size)
    for at in range(0, len(stripes), key_size):
        folded = _diffuse(_xor(folded, stripes[at : at + key_size]), hash_name)
    return folded


def _diffuse(stripe: bytes, hash_name: str) -> bytes:
    """Each piece of the hash's size becomes its hash under its number; the last is cut to what is left of the key."""
    digest_size = hashlib.new(hash_name).digest_size
    pieces = (stripe[at : at + digest_size] for at in range(0, len(stripe), digest_size))
    hashed = (hashlib.new(hash_name, index.to_bytes(4, "big") + piece) for index, piece in enumerate(pieces))
    return b"".join(each.digest() for each in hashed)[: len(stripe)]


def _xor(left: bytes, right: bytes) -> bytes:
    return (int.from_bytes(left, "little") ^ int.from_bytes(right, "little")).to_bytes(len(left), "little")


def iterations_for(seconds: float, hash_name: str, key_size: int) -> int:
    """PBKDF2 rounds for a new key of `key_size` bytes that take about `seconds` on this machine."""
    trial = ITERATIONS_MIN
    while True:
        started = time.perf_counter()
        hashlib.pbkdf2_hmac(hash_name, b"passphrase", bytes(SALT_SIZE), trial, key_size)
        elapsed = time.perf_counter() - started
        if elapsed >= CALIBRATION_S or trial * 2 > ITERATIONS_MAX:
            return max(ITERATIONS_MIN, min(round(trial * seconds / elapsed), ITERATIONS_MAX))
        trial *= 2


def create(
    path: str | os.PathLike[str],
    passphrase: bytes,
    *,
    mode: str = NEW_MODE,
    hash_name: str = NEW_HASH,
    key_size: int = NEW_KEY_SIZE,
    iterations: int | None = None,
) -> bytes:
    """Header and slots of a new image, 2,068,480 bytes by default, with a random key that `passphrase` opens (slot 0).

    `iterations` are PBKDF2 rounds of the slot; as many as take UNLOCK_TIME_S unless given. Takes seconds of processor
    time: for a worker thread. The result is to be written at the beginning of a cluster; the extension's length is
    the result's.

    Raises:
        ConfigError: the passphrase is empty.
        UnsupportedFeature: an algorithm is not supported, or `cryptography` is not installed.
    """
    if not passphrase:
        raise ConfigError(f"{os.fspath(path)}: the passphrase of a new image is empty, expected at least one byte")
    _check_algorithms(path, CIPHER, mode, key_size, hash_name)
    if iterations is None:
        iterations = iterations_for(UNLOCK_TIME_S, hash_name, key_size)
    key, salt = os.urandom(key_size), os.urandom(SALT_SIZE)
    header = _new_header(key, salt, mode, hash_name, iterations)
    slot_key = hashlib.pbkdf2_hmac(hash_name, passphrase, salt, iterations, key_size)
    material = split_key(key, STRIPES, hash_name)
    padded = material.ljust(align_up(len(material), SECTOR_SIZE), b"\0")
    encrypted = sector_cipher(path, CIPHER, mode, slot_key).encrypt(0, padded)
    start = header.key_slots[0].material_offset
    area = header.to_bytes().ljust(start, b"\0") + encrypted
    return area.ljust(header.payload_offset, b"\0")


def _new_header(key: bytes, salt: bytes, mode: str, hash_name: str, iterations: int) -> LuksHeader:
    """Slot 0 active, the others empty; with a key of 64 bytes at 4096, 262,144, ... and the payload at 2,068,480."""
    first = align_up(HEADER_SIZE, MATERIAL_ALIGNMENT)
    stride = align_up(len(key) * STRIPES, MATERIAL_ALIGNMENT)
    offsets = range(first, first + SLOT_COUNT * stride, stride)
    digest_salt, digest_iterations = os.urandom(SALT_SIZE), max(ITERATIONS_MIN, iterations // 8)
    return LuksHeader(
        cipher=CIPHER,
        mode=mode,
        hash_name=hash_name,
        payload_offset=first + SLOT_COUNT * stride,
        key_size=len(key),
        digest=hashlib.pbkdf2_hmac(hash_name, key, digest_salt, digest_iterations, DIGEST_SIZE),
        digest_salt=digest_salt,
        digest_iterations=digest_iterations,
        uuid=str(uuid.uuid4()),
        key_slots=(
            KeySlot(True, iterations, salt, offsets[0], STRIPES),
            *(KeySlot(False, 0, bytes(SALT_SIZE), offset, STRIPES) for offset in offsets[1:]),
        ),
    )
