"""LUKS headers against QEMU's, in both directions, and headers that lie.

QEMU makes the images and reads what was written; the qcow2 structures are found here with `struct`. Where QEMU is not
`hurried` it takes 1 to 2 s for each LUKS image, so few are made; all algorithms go the other way.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import random
import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdimg.errors import ConfigError, CorruptImage, ImageError, UnsupportedFeature
from nbdimg.formats.qcow2 import luks
from nbdimg.formats.qcow2.ciphers import SectorCipher, legacy_cipher, sector_cipher
from nbdimg.formats.qcow2.crypt import EncryptedFile
from nbdimg.storage.file import BlockFile
from nbdimg.storage.memory import MemoryFile
from nbdimg.storage.posix import PosixFile
from tests.interop.samples import run, run_ok
from tests.support.peers import require_program
from tests.support.qcow2edit import qemu_img

PASSPHRASE = b"correct horse"
SECRET = ["--object", f"secret,id=sec0,data={PASSPHRASE.decode()}"]
CLUSTER = 65536
GUEST_SIZE = 1 << 20
DATA_OFFSET = 3 * CLUSTER + 4096
"""Guest offset of the data: the host cluster lies elsewhere, so host and guest sectors differ."""
OFFSET_MASK = 0x00FFFFFFFFFFFE00


def make_qcow2(path: Path, options: str, data: bytes) -> None:
    """An encrypted image made by QEMU, with `data` written by QEMU at DATA_OFFSET."""
    source = path.with_suffix(".data")
    source.write_bytes(data)
    secret = ["-o", f"{options},encrypt.key-secret=sec0"]
    qemu_img("create", "-q", "-f", "qcow2", *SECRET, *secret, path, str(GUEST_SIZE))
    qemu_io(path, f"write -q -s {source} {DATA_OFFSET} {len(data)}")


def make_luks(path: Path, options: str, data: bytes) -> None:
    make_qcow2(path, f"encrypt.format=luks,encrypt.iter-time=10{options}", data)


def qemu_io(path: Path, *commands: str) -> None:
    target = f"driver=qcow2,file.filename={path},encrypt.key-secret=sec0"
    run_ok(require_program("qemu-io"), *SECRET, *(word for c in commands for word in ("-c", c)), "--image-opts", target)


def qemu_content(path: Path, source: str, copy: Path) -> bytes:
    """The guest's whole disk as QEMU reads it."""
    run_ok(require_program("qemu-img"), "convert", *SECRET, "--image-opts", "-O", "raw", source, copy)
    return copy.read_bytes()


def host_offset(path: Path, guest_offset: int) -> int:
    """Through the first L1 entry (header offset 40) and its L2 table; bits 9 to 55 of an entry are the offset.

    `qemu-img map` tells no offsets of encrypted images.
    """
    image = path.read_bytes()
    (l1_offset,) = struct.unpack_from(">Q", image, 40)
    (l2_entry,) = struct.unpack_from(">Q", image, l1_offset)
    index = guest_offset // CLUSTER
    (entry,) = struct.unpack_from(">Q", image, (l2_entry & OFFSET_MASK) + 8 * index)
    assert entry & OFFSET_MASK, f"guest offset {guest_offset} is not mapped"
    return int(entry & OFFSET_MASK) + guest_offset % CLUSTER


def luks_area(path: Path) -> bytes:
    """What the qcow2 header extension 0x0537be77 points to: (offset u64, length u64)."""
    image = path.read_bytes()
    (position,) = struct.unpack_from(">I", image, 100)
    while True:
        kind, length = struct.unpack_from(">II", image, position)
        assert kind != 0, "no LUKS extension"
        if kind == 0x0537BE77:
            offset, size = struct.unpack_from(">QQ", image, position + 8)
            return image[offset : offset + size]
        position += 8 + (length + 7) // 8 * 8


def read(file: BlockFile, offset: int, length: int) -> bytes:
    view = memoryview(bytearray(length))
    asyncio.run(file.pread(offset, view))
    return bytes(view)


def write_through(path: Path, cipher: SectorCipher, offset: int, data: bytes, shift: int = 0) -> None:
    async def body() -> None:
        file = PosixFile(path, writable=True)
        await EncryptedFile(file, cipher, shift).pwrite(offset, data)
        await file.close()

    asyncio.run(body())


IMAGES = {
    "aes-256-xts-plain64-sha256": "",
    "aes-128-xts-plain-sha1": ",encrypt.cipher-alg=aes-128,encrypt.ivgen-alg=plain,encrypt.hash-alg=sha1",
    "aes-256-xts-plain64:sha256": ",encrypt.ivgen-hash-alg=sha256",
    "aes-256-cbc-essiv-sha256": ",encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256",
}
DEFAULT_IMAGE_DATA = random.Random(1).randbytes(20480)


@pytest.fixture(scope="module")
def qemu_image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """QEMU's default image with DEFAULT_IMAGE_DATA at DATA_OFFSET."""
    path = tmp_path_factory.mktemp("luks") / "disk.qcow2"
    make_luks(path, "", DEFAULT_IMAGE_DATA)
    return path.read_bytes()


def test_qemu_is_hurried(tmp_path: Path, qemu_image: bytes) -> None:
    """Or else each image takes seconds, which no other test would say."""
    require_program("cc")
    path = tmp_path / "disk.qcow2"
    path.write_bytes(qemu_image)
    area = luks_area(path)
    assert struct.unpack_from(">I", area, 164) == struct.unpack_from(">I", area, 212) == (1000,)


@pytest.mark.parametrize("options", IMAGES.values(), ids=IMAGES)
def test_luks_image_of_qemu_is_read_and_written(tmp_path: Path, qemu_image: bytes, options: str) -> None:
    path, data = tmp_path / "disk.qcow2", DEFAULT_IMAGE_DATA
    if options:
        make_luks(path, options, data)
    else:
        path.write_bytes(qemu_image)
    cipher = luks.unlock(path, luks_area(path), PASSPHRASE)
    start, image = host_offset(path, DATA_OFFSET), path.read_bytes()
    assert read(EncryptedFile(MemoryFile(image), cipher), start, len(data)) == data
    shift = (DATA_OFFSET - start) // 512
    assert read(EncryptedFile(MemoryFile(image), cipher, shift), start, len(data)) != data  # control: host sectors

    update = random.Random(2).randbytes(3001)
    write_through(path, cipher, start + 777, update)
    expected = bytearray(GUEST_SIZE)
    expected[DATA_OFFSET : DATA_OFFSET + len(data)] = data
    expected[DATA_OFFSET + 777 : DATA_OFFSET + 777 + len(update)] = update
    source = f"driver=qcow2,file.filename={path},encrypt.key-secret=sec0"
    assert qemu_content(path, source, tmp_path / "copy") == expected


def test_legacy_image_of_qemu_is_read_and_written_by_guest_sectors(tmp_path: Path) -> None:
    path, data = tmp_path / "disk.qcow2", random.Random(2).randbytes(8192)
    make_qcow2(path, "encrypt.format=aes", data)
    start, cipher = host_offset(path, DATA_OFFSET), legacy_cipher(path, PASSPHRASE)
    shift = (DATA_OFFSET - start) // 512
    assert shift != 0
    image = path.read_bytes()
    assert read(EncryptedFile(MemoryFile(image), cipher, shift), start, len(data)) == data
    assert read(EncryptedFile(MemoryFile(image), cipher, 0), start, len(data)) != data  # control: guest sectors
    write_through(path, cipher, start + 100, b"\x77" * 1000, shift)
    qemu_io(path, f"read -P 0x77 {DATA_OFFSET + 100} 1000")


def test_cluster_cut_off_by_the_end_of_the_file_reads_as_in_qemu(tmp_path: Path, qemu_image: bytes) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(qemu_image)
    cipher, start = luks.unlock(path, luks_area(path), PASSPHRASE), host_offset(path, DATA_OFFSET)
    with path.open("r+b") as file:
        file.truncate(start + 4096)
    found = read(EncryptedFile(MemoryFile(path.read_bytes()), cipher), start, 16384)
    source = f"driver=qcow2,file.filename={path},encrypt.key-secret=sec0"
    assert found == qemu_content(path, source, tmp_path / "copy")[DATA_OFFSET : DATA_OFFSET + 16384]
    assert found[4096:] != bytes(16384 - 4096)


@pytest.fixture(scope="module")
def created() -> bytes:
    return luks.create("new", PASSPHRASE, iterations=1000)


ALGORITHMS = [
    ("xts-plain64", 64, "sha256"),
    ("xts-plain64", 32, "sha384"),
    ("xts-plain", 64, "sha512"),
    ("xts-essiv:sha256", 64, "sha256"),
    ("cbc-plain64", 16, "sha1"),
    ("cbc-plain64", 32, "sha224"),
    ("cbc-plain", 16, "sha256"),
    ("cbc-essiv:sha256", 16, "sha256"),
    ("cbc-essiv:sha256", 32, "sha512"),
]


@pytest.mark.parametrize(("mode", "key_size", "hash_name"), ALGORITHMS)
def test_created_header_is_opened_by_qemu(tmp_path: Path, mode: str, key_size: int, hash_name: str) -> None:
    """As a LUKS disk of its own: sectors count from the payload's beginning there."""
    path, data = tmp_path / "disk.luks", random.Random(5).randbytes(GUEST_SIZE)
    area = luks.create("new", PASSPHRASE, mode=mode, hash_name=hash_name, key_size=key_size, iterations=1000)
    path.write_bytes(area + luks.unlock("new", area, PASSPHRASE).encrypt(0, data))
    source = f"driver=luks,file.filename={path},key-secret=sec0"
    assert qemu_content(path, source, tmp_path / "copy") == data
    wrong = ["--object", "secret,id=sec0,data=wrong"]
    qemu_io_program = require_program("qemu-io")
    assert run(qemu_io_program, *wrong, "-c", "read 0 512", "--image-opts", source).returncode != 0  # control


def test_created_header_replaces_that_of_a_qcow2_image(tmp_path: Path, qemu_image: bytes, created: bytes) -> None:
    """QEMU's own header has the same length, so ours can take its place; the data is then written anew."""
    path, data = tmp_path / "disk.qcow2", random.Random(6).randbytes(8192)
    path.write_bytes(qemu_image)
    area = luks_area(path)
    assert len(created) == len(area) == 2_068_480
    start, image = host_offset(path, DATA_OFFSET), path.read_bytes()
    path.write_bytes(image.replace(area, created))
    write_through(path, luks.unlock("new", created, PASSPHRASE), start, data)
    source = f"driver=qcow2,file.filename={path},encrypt.key-secret=sec0"
    assert qemu_content(path, source, tmp_path / "copy")[DATA_OFFSET : DATA_OFFSET + len(data)] == data


def test_created_header_has_the_fields_of_the_specification(created: bytes) -> None:
    assert created[:8] == b"LUKS\xba\xbe\0\1"
    assert created[8:104] == b"".join(name.ljust(32, b"\0") for name in (b"aes", b"xts-plain64", b"sha256"))
    assert struct.unpack_from(">II", created, 104) == (4040, 64)
    assert struct.unpack_from(">I", created, 164) == (1000,)
    assert struct.unpack_from(">II", created, 208) == (0x00AC71F3, 1000)
    assert struct.unpack_from(">II", created, 248) == (8, 4000)
    assert struct.unpack_from(">I", created, 256) == (0x0000DEAD,)
    assert len(created) == 4040 * 512
    assert created != luks.create("new", PASSPHRASE, iterations=1000)


def test_header_of_qemu_is_serialized_as_it_was_parsed(tmp_path: Path, qemu_image: bytes) -> None:
    (tmp_path / "disk.qcow2").write_bytes(qemu_image)
    area = luks_area(tmp_path / "disk.qcow2")
    assert luks.parse("x", area).to_bytes() == area[:592]


def test_header_with_the_qemu_default_of_two_seconds_is_within_the_bounds(created: bytes) -> None:
    """Ten million rounds: what 2 s come to on a fast machine."""
    area = mutated(created, (212, ">I", 10_000_000), (164, ">I", 1_250_000))
    assert luks.parse("x", area).key_slots[0].iterations == 10_000_000


@pytest.mark.parametrize("passphrase", [b"", b"correct hors", b"correct horse\n", b"Correct horse", bytes(1000)])
def test_wrong_passphrase_is_one_clear_error(created: bytes, passphrase: bytes) -> None:
    with pytest.raises(ConfigError, match=r"^disk\.qcow2: the passphrase is wrong: it opens none of 1 active LUKS"):
        luks.unlock("disk.qcow2", created, passphrase)


def test_image_that_is_open_is_not_unlocked_a_second_time(created: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    real, paid = luks.master_key, []

    def master_key(*arguments: Any) -> bytes:
        paid.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(luks, "master_key", master_key)
    first = luks.unlock("x", created, PASSPHRASE)
    assert luks.unlock("x", created, PASSPHRASE) is first
    assert paid == [PASSPHRASE]
    with pytest.raises(ConfigError, match="the passphrase is wrong"):
        luks.unlock("x", created, b"other")
    del first
    gc.collect()
    luks.unlock("x", created, PASSPHRASE)
    assert paid == [PASSPHRASE, b"other", PASSPHRASE]


def test_second_slot_opens_with_its_own_passphrase(created: bytes) -> None:
    area, slot, key = bytearray(created), 208 + 48, luks.master_key("x", luks.parse("x", created), created, PASSPHRASE)
    salt, (offset,) = b"s" * 32, struct.unpack_from(">I", created, slot + 40)
    struct.pack_into(">II32s", area, slot, 0x00AC71F3, 1500, salt)
    derived = hashlib.pbkdf2_hmac("sha256", b"other", salt, 1500, 64)
    cipher = sector_cipher("x", "aes", "xts-plain64", derived)
    material = cipher.encrypt(0, luks.split_key(key, 4000, "sha256"))
    area[offset * 512 : offset * 512 + len(material)] = material
    header = luks.parse("x", bytes(area))
    assert luks.master_key("x", header, bytes(area), b"other") == key
    assert luks.master_key("x", header, bytes(area), PASSPHRASE) == key
    with pytest.raises(ConfigError, match="none of 2 active"):
        luks.unlock("x", bytes(area), b"third")


def test_header_without_an_active_slot_opens_with_no_passphrase(created: bytes) -> None:
    with pytest.raises(ImageError, match="x: no LUKS key slot is active"):
        luks.unlock("x", mutated(created, (208, ">I", 0x0000DEAD)), PASSPHRASE)


def test_slot_whose_material_ends_inside_a_sector_is_opened() -> None:
    """AES-192 in CBC: 24 bytes * 4000 stripes are 187.5 sectors (QEMU aborts when it is told to make such an image)."""
    area = luks.create("new", PASSPHRASE, mode="cbc-plain64", key_size=24, iterations=1000)
    luks.unlock("new", area, PASSPHRASE)
    with pytest.raises(ConfigError):
        luks.unlock("new", area, b"wrong")


def test_stripes_are_all_needed() -> None:
    key = bytes(range(64))
    material = luks.split_key(key, 100, "sha256")
    assert len(material) == 6400
    assert luks.merge_stripes(material, 64, "sha256") == key
    for at in (0, 3200, 6399):
        damaged = material[:at] + bytes([material[at] ^ 1]) + material[at + 1 :]
        assert luks.merge_stripes(damaged, 64, "sha256") != key


def test_iterations_follow_the_time_that_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances by 10 µs a round: 2 s are 200,000 rounds."""
    now = [0.0]

    def derive(name: str, passphrase: bytes, salt: bytes, iterations: int, size: int) -> bytes:
        now[0] += iterations * 1e-5
        return b""

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(hashlib, "pbkdf2_hmac", derive)
    assert luks.iterations_for(2.0, "sha256", 64) == pytest.approx(200_000, rel=1e-6)
    assert luks.iterations_for(1e-9, "sha256", 64) == luks.ITERATIONS_MIN
    assert luks.iterations_for(1e9, "sha256", 64) == luks.ITERATIONS_MAX


def test_empty_passphrase_makes_no_header() -> None:
    with pytest.raises(ConfigError, match="new: the passphrase of a new image is empty"):
        luks.create("new", b"")


# Headers that lie

Field = tuple[int, str, int | bytes]
"""Offset in the header, format of `struct`, value."""


def mutated(area: bytes, *fields: Field) -> bytes:
    """`area` with values packed over it."""
    changed = bytearray(area)
    for offset, layout, value in fields:
        struct.pack_into(layout, changed, offset, value)
    return bytes(changed)


ACTIVATE_1: tuple[Field, ...] = ((256, ">I", 0x00AC71F3), (260, ">I", 1000))
ALL_SLOTS: list[Field] = [
    field for k in range(8) for field in ((208 + 48 * k, ">I", 0x00AC71F3), (212 + 48 * k, ">I", 10_000_000))
]

LIES: dict[str, tuple[list[Field], type[ImageError], str]] = {
    "magic": ([(0, "6s", b"LUKS\xba\xbf")], CorruptImage, "magic is 4c554b53babf, expected 4c554b53babe"),
    "version": ([(6, ">H", 2)], UnsupportedFeature, "LUKS version is 2, expected 1 (LUKS header offset 6)"),
    "cipher": ([(8, "32s", b"twofish")], UnsupportedFeature, "the cipher is 'twofish', expected 'aes'"),
    "cipher-no-text": ([(8, "32s", b"\xff" * 32)], UnsupportedFeature, "the cipher is '\\\\xff"),
    "mode": ([(40, "32s", b"lrw-benbi")], UnsupportedFeature, "the cipher mode is 'lrw-benbi', expected xts or cbc"),
    "hash": ([(72, "32s", b"whirlpool")], UnsupportedFeature, "LUKS hash is 'whirlpool', expected sha1, sha224, "),
    "hash-shake": ([(72, "32s", b"shake_128")], UnsupportedFeature, "LUKS hash is 'shake_128', expected sha1"),
    "payload-early": (
        [(104, ">I", 1)],
        CorruptImage,
        "payload offset is 1, expected 2 to 4040 (LUKS header offset 104)",
    ),
    "payload-late": ([(104, ">I", 4041)], CorruptImage, "payload offset is 4041, expected 2 to 4040"),
    "payload-in-slot": ([(104, ">I", 507)], CorruptImage, "slot 0 offset is 8, expected 2 to 7"),
    "key-none": ([(108, ">I", 0)], UnsupportedFeature, "the key of aes-xts-plain64 has 0 bytes, expected 32 or 64"),
    "key-huge": ([(108, ">I", 0xFFFFFFFF)], UnsupportedFeature, "has 4294967295 bytes, expected 32 or 64"),
    "digest-none": ([(164, ">I", 0)], CorruptImage, "digest iterations is 0, expected 1 to 33554432"),
    "digest-bomb": ([(164, ">I", 0xFFFFFFFF)], CorruptImage, "digest iterations is 4294967295, expected 1 to"),
    "state": ([(208, ">I", 1)], CorruptImage, "slot 0 state is 0x00000001, expected 0x00ac71f3 or 0x0000dead"),
    "state-7": ([(544, ">I", 0)], CorruptImage, "slot 7 state is 0x00000000, expected 0x00ac71f3 or 0x0000dead"),
    "slot-none": ([(212, ">I", 0)], CorruptImage, "slot 0 iterations is 0, expected 1 to 33554432"),
    "slot-bomb": ([(212, ">I", 33554433)], CorruptImage, "slot 0 iterations is 33554433, expected 1 to 33554432 (LUKS"),
    "offset-early": ([(248, ">I", 1)], CorruptImage, "slot 0 offset is 1, expected 2 to 3540 (LUKS header offset 248)"),
    "offset-late": ([(248, ">I", 3541)], CorruptImage, "slot 0 offset is 3541, expected 2 to 3540"),
    "offset-huge": ([(248, ">I", 0xFFFFFFFF)], CorruptImage, "slot 0 offset is 4294967295, expected 2 to 3540"),
    "stripes-none": (
        [(252, ">I", 0)],
        CorruptImage,
        "slot 0 stripes is 0, expected 1 to 4000 (LUKS header offset 252)",
    ),
    "stripes-bomb": ([(252, ">I", 4001)], CorruptImage, "slot 0 stripes is 4001, expected 1 to 4000"),
    "overlap": (
        [*ACTIVATE_1, (296, ">I", 507)],
        CorruptImage,
        "offset 259584 begins inside another, expected at least",
    ),
    "all-slots-bomb": (ALL_SLOTS, CorruptImage, "ask for 160008000 hash blocks of PBKDF2, expected at most 134217728"),
}


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A header is judged before any of the work that it asks for."""

    def refuse(*args: object) -> bytes:
        raise AssertionError("work was done for a header that must be refused")

    monkeypatch.setattr(hashlib, "pbkdf2_hmac", refuse)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("fields", "error", "message"), LIES.values(), ids=LIES)
def test_header_that_lies_is_refused_with_field_and_bounds(
    created: bytes, fields: list[Field], error: type[ImageError], message: str
) -> None:
    with pytest.raises(error) as caught:
        luks.unlock("x", mutated(created, *fields), PASSPHRASE)
    assert type(caught.value) is error
    assert message in str(caught.value)
    assert str(caught.value).startswith("x: ")


@pytest.mark.usefixtures("no_work")
def test_control_header_that_does_not_lie_gets_to_the_work(created: bytes) -> None:
    with pytest.raises(AssertionError, match="work was done"):
        luks.unlock("x", created, PASSPHRASE)


@pytest.mark.parametrize(
    "fields",
    [
        [(164, ">I", 33554432)],
        [(212, ">I", 33554432)],
        [(248, ">I", 2)],
        [(248, ">I", 3540)],
        [(252, ">I", 1)],
        [*ACTIVATE_1, (296, ">I", 508)],
        [(300, ">I", 0xFFFFFFFF), (296, ">I", 0xFFFFFFFF)],
    ],
    ids=["digest", "iterations", "first", "last", "one-stripe", "slots-touch", "inactive-slot"],
)
def test_header_at_its_bounds_is_accepted(created: bytes, fields: list[Field]) -> None:
    luks.parse("x", mutated(created, *fields))


@pytest.mark.parametrize("length", [0, 1, 207, 591, 16 * 2**20 + 1])
def test_area_of_a_wrong_length_is_refused(length: int) -> None:
    message = rf"x: LUKS header length is {length}, expected 592 to 16777216 \(qcow2 header extension 0x0537be77\)"
    with pytest.raises(CorruptImage, match=message):
        luks.check_area_size("x", length)
    with pytest.raises(CorruptImage, match=message):
        luks.parse("x", bytes(length))


@pytest.mark.parametrize("length", [592, 1024, 4096, 260096, 2_068_479])
def test_area_cut_short_is_refused(created: bytes, length: int) -> None:
    with pytest.raises(CorruptImage, match="payload offset is 4040, expected 2 to"):
        luks.parse("x", created[:length])


def test_random_headers_are_refused_or_parsed_and_nothing_else(created: bytes) -> None:
    seed = 30
    rng, outcomes = random.Random(seed), set[bool]()
    for _ in range(400):
        area = bytearray(created)
        for _ in range(rng.choice([1, 1, 2, 8])):
            area[rng.randrange(592)] = rng.randrange(256)
        try:
            luks.parse("x", bytes(area))
            outcomes.add(True)
        except ImageError:
            outcomes.add(False)
    assert outcomes == {True, False}, seed


def test_master_key_that_xts_forbids_is_refused(created: bytes) -> None:
    """Equal halves with a digest that fits: only a hostile writer makes it."""
    key, header = bytes(64), luks.parse("x", created)
    digest = hashlib.pbkdf2_hmac("sha256", key, header.digest_salt, header.digest_iterations, 20)
    derived = hashlib.pbkdf2_hmac("sha256", PASSPHRASE, header.key_slots[0].salt, 1000, 64)
    material = sector_cipher("x", "aes", "xts-plain64", derived).encrypt(0, luks.split_key(key, 4000, "sha256"))
    area = bytearray(created)
    area[:592] = replace(header, digest=digest).to_bytes()
    area[4096 : 4096 + len(material)] = material
    with pytest.raises(CorruptImage, match="the two halves of the XTS key are equal"):
        luks.unlock("x", bytes(area), PASSPHRASE)
