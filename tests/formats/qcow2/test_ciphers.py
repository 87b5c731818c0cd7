"""Sector ciphers against published vectors."""

from __future__ import annotations

import random
import sys
import threading
from contextlib import suppress

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from nbdimg.errors import CorruptImage, UnsupportedFeature
from nbdimg.formats.qcow2 import ciphers
from nbdimg.formats.qcow2.ciphers import (
    SECTOR_SIZE,
    CbcCipher,
    SectorCipher,
    XtsCipher,
    legacy_cipher,
    plain64_ivs,
    plain_ivs,
    sector_cipher,
)

KEY_32, KEY_64 = bytes(range(32)), bytes(range(64))

# IEEE 1619-2007, annex B: vector 4 (128-bit keys, sector 0) and vector 10 (256-bit keys, sector 255).
XTS_PLAINTEXT = bytes(range(256)) * 2
XTS_128_KEY = bytes.fromhex("27182818284590452353602874713526 31415926535897932384626433832795")
XTS_128_CIPHERTEXT = bytes.fromhex(
    "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89cc78cf7f5e543445f8333d8fa7f560000"
    "05279fa5d8b5e4ad40e736ddb4d35412328063fd2aab53e5ea1e0a9f332500a5df9487d07a5c92cc512c8866c7e860ce"
    "93fdf166a24912b422976146ae20ce846bb7dc9ba94a767aaef20c0d61ad02655ea92dc4c4e41a8952c651d33174be51"
    "a10c421110e6d81588ede82103a252d8a750e8768defffed9122810aaeb99f9172af82b604dc4b8e51bcb08235a6f434"
    "1332e4ca60482a4ba1a03b3e65008fc5da76b70bf1690db4eae29c5f1badd03c5ccf2a55d705ddcd86d449511ceb7ec3"
    "0bf12b1fa35b913f9f747a8afd1b130e94bff94effd01a91735ca1726acd0b197c4e5b03393697e126826fb6bbde8ecc"
    "1e08298516e2c9ed03ff3c1b7860f6de76d4cecd94c8119855ef5297ca67e9f3e7ff72b1e99785ca0a7e7720c5b36dc6"
    "d72cac9574c8cbbc2f801e23e56fd344b07f22154beba0f08ce8891e643ed995c94d9a69c9f1b5f499027a78572aeebd"
    "74d20cc39881c213ee770b1010e4bea718846977ae119f7a023ab58cca0ad752afe656bb3c17256a9f6e9bf19fdd5a38"
    "fc82bbe872c5539edb609ef4f79c203ebb140f2e583cb2ad15b4aa5b655016a8449277dbd477ef2c8d6c017db738b18d"
    "eb4a427d1923ce3ff262735779a418f20a282df920147beabe421ee5319d0568"
)
XTS_256_KEY = bytes.fromhex(
    "2718281828459045235360287471352662497757247093699959574966967627"
    "3141592653589793238462643383279502884197169399375105820974944592"
)
XTS_256_CIPHERTEXT = bytes.fromhex(
    "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b5d31e276f8fe4a8d66b317f9ac683f44"
    "680a86ac35adfc3345befecb4bb188fd5776926c49a3095eb108fd1098baec70aaa66999a72a82f27d848b21d4a741b0"
    "c5cd4d5fff9dac89aeba122961d03a757123e9870f8acf1000020887891429ca2a3e7a7d7df7b10355165c8b9a6d0a7d"
    "e8b062c4500dc4cd120c0f7418dae3d0b5781c34803fa75421c790dfe1de1834f280d7667b327f6c8cd7557e12ac3a0f"
    "93ec05c52e0493ef31a12d3d9260f79a289d6a379bc70c50841473d1a8cc81ec583e9645e07b8d9670655ba5bbcfecc6"
    "dc3966380ad8fecb17b6ba02469a020a84e18e8f84252070c13e9f1f289be54fbc481457778f616015e1327a02b140f1"
    "505eb309326d68378f8374595c849d84f4c333ec4423885143cb47bd71c5edae9be69a2ffeceb1bec9de244fbe15992b"
    "11b77c040f12bd8f6a975a44a0f90c29a9abc3d4d893927284c58754cce294529f8614dcd2aba991925fedc4ae74ffac"
    "6e333b93eb4aff0479da9a410e4450e0dd7ae4c6e2910900575da401fc07059f645e8b7e9bfdef33943054ff84011493"
    "c27b3429eaedb4ed5376441a77ed43851ad77f16f541dfd269d50d6a5f14fb0aab1cbb4c1550be97f7ab4066193c4caa"
    "773dad38014bd2092fa755c824bb5e54c4f36ffda9fcea70b9c6e693e148c151"
)

# NIST SP 800-38A, F.2.1 and F.2.5: the first blocks of a sector.
CBC_IV = bytes(range(16))
CBC_PLAINTEXT = bytes.fromhex("6bc1bee22e409f96e93d7e117393172a ae2d8a571e03ac9c9eb76fac45af8e51")
CBC_128 = (
    bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c"),
    bytes.fromhex("7649abac8119b246cee98e9b12e9197d 5086cb9b507219ee95db113a917678b2"),
)
CBC_256 = (
    bytes.fromhex("603deb1015ca71be2b73aef0857d7781 1f352c073b6108d72d9810a30914dff4"),
    bytes.fromhex("f58c4c04d6e5f1ba779eabfb5f7bfbd6 9cfc4e967edb808d679f777bc6702c7d"),
)


def decrypted(cipher: SectorCipher, sector: int, ciphertext: bytes) -> bytes:
    view = memoryview(bytearray(ciphertext))
    cipher.decrypt(sector, view)
    return bytes(view)


def reference(mode: type[modes.XTS] | type[modes.CBC], key: bytes, sector: int, data: bytes) -> bytes:
    """A context of `cryptography` for every sector, with plain64."""
    found = b""
    for at in range(0, len(data), SECTOR_SIZE):
        iv = (sector + at // SECTOR_SIZE).to_bytes(16, "little")
        found += Cipher(algorithms.AES(key), mode(iv)).encryptor().update(data[at : at + SECTOR_SIZE])
    return found


@pytest.fixture(params=["restarted", "one-a-sector"])
def contexts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to make XTS contexts; the second is that of a library whose contexts cannot be restarted."""
    if request.param == "one-a-sector":
        monkeypatch.setattr(ciphers._Aes, "can_restart_xts", lambda self: False)


@pytest.mark.usefixtures("contexts")
@pytest.mark.parametrize(
    ("key", "sector", "ciphertext"),
    [(XTS_128_KEY, 0, XTS_128_CIPHERTEXT), (XTS_256_KEY, 0xFF, XTS_256_CIPHERTEXT)],
    ids=["128", "256"],
)
def test_xts_published_vector_is_met_in_both_directions(key: bytes, sector: int, ciphertext: bytes) -> None:
    cipher = XtsCipher("x", key, plain64_ivs)
    assert cipher.encrypt(sector, XTS_PLAINTEXT) == ciphertext
    assert decrypted(cipher, sector, ciphertext) == XTS_PLAINTEXT


@pytest.mark.usefixtures("contexts")
def test_xts_run_encrypts_each_sector_under_its_own_number() -> None:
    """Vector 10 in the middle of a run that begins two sectors before it, twice, as contexts are used again."""
    cipher, data = XtsCipher("x", XTS_256_KEY, plain64_ivs), bytes(1024) + XTS_PLAINTEXT + bytes(1024)
    for _ in range(2):
        ciphertext = cipher.encrypt(0xFD, data)
        assert ciphertext[1024:1536] == XTS_256_CIPHERTEXT
        assert ciphertext == reference(modes.XTS, XTS_256_KEY, 0xFD, data)
        assert decrypted(cipher, 0xFD, ciphertext) == data


def test_library_that_restarts_xts_contexts_is_recognized() -> None:
    assert ciphers._Aes("x", KEY_64).can_restart_xts()


class _Stuck:
    """A context whose restart has no effect."""

    def __init__(self, context: ciphers._Context) -> None:
        self.update = context.update

    def reset_nonce(self, nonce: bytes, /) -> None:
        pass


class _Refusing(_Stuck):
    def reset_nonce(self, nonce: bytes, /) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("kind", [_Stuck, _Refusing])
def test_library_that_does_not_restart_xts_contexts_is_recognized(
    monkeypatch: pytest.MonkeyPatch, kind: type[_Stuck]
) -> None:
    make = ciphers._Aes.xts
    monkeypatch.setattr(ciphers._Aes, "xts", lambda self, tweak, encrypts: kind(make(self, tweak, encrypts=encrypts)))
    assert not ciphers._Aes("x", KEY_64).can_restart_xts()


def test_xts_key_with_equal_halves_is_refused() -> None:
    with pytest.raises(CorruptImage, match="x: the two halves of the XTS key are equal"):
        sector_cipher("x", "aes", "xts-plain64", KEY_32 * 2)


@pytest.mark.parametrize(("key", "ciphertext"), [CBC_128, CBC_256], ids=["128", "256"])
def test_cbc_published_vector_is_met_in_every_sector(key: bytes, ciphertext: bytes) -> None:
    cipher = CbcCipher("x", key, lambda sector, count: [CBC_IV] * count)
    data = CBC_PLAINTEXT.ljust(SECTOR_SIZE, b"\x11") * 3
    found = cipher.encrypt(7, data)
    assert [found[at : at + 32] for at in range(0, 3 * SECTOR_SIZE, SECTOR_SIZE)] == [ciphertext] * 3
    assert decrypted(cipher, 7, found) == data


def test_cbc_run_encrypts_each_sector_under_its_own_number() -> None:
    data = random.Random(3).randbytes(5 * SECTOR_SIZE)
    cipher = sector_cipher("x", "aes", "cbc-plain64", KEY_32)
    expected = reference(modes.CBC, KEY_32, 1 << 40, data)
    assert cipher.encrypt(1 << 40, data) == expected
    assert decrypted(cipher, 1 << 40, expected) == data
    assert decrypted(cipher, 1 << 39, expected) != data  # control: the number matters


def test_legacy_key_is_the_first_16_bytes_of_the_passphrase() -> None:
    data = bytes(SECTOR_SIZE)
    assert legacy_cipher("x", b"abc").encrypt(5, data) == reference(modes.CBC, b"abc" + bytes(13), 5, data)
    assert legacy_cipher("x", KEY_32).encrypt(5, data) == reference(modes.CBC, KEY_32[:16], 5, data)


def test_ivs_plain_keeps_32_bits_and_plain64_all() -> None:
    assert plain64_ivs(0xFFFFFFFF, 2) == [b"\xff\xff\xff\xff" + bytes(12), bytes(4) + b"\x01" + bytes(11)]
    assert plain_ivs(0xFFFFFFFF, 2) == [b"\xff\xff\xff\xff" + bytes(12), bytes(16)]


@pytest.mark.parametrize("mode", ["xts-plain64", "cbc-plain64", "cbc-essiv:sha256"])
def test_cipher_of_nothing_gives_nothing(mode: str) -> None:
    cipher = sector_cipher("x", "aes", mode, KEY_32)
    assert cipher.encrypt(0, b"") == b""
    assert decrypted(cipher, 0, b"") == b""


def _shared_by_threads(cipher: SectorCipher) -> bool:
    """Whether four threads that decrypt at the same time all get what they should."""
    data = random.Random(9).randbytes(8 * SECTOR_SIZE)
    expected = {thread: reference(modes.XTS, KEY_64, thread * 100, data) for thread in range(4)}
    is_right: list[bool] = []

    def work(thread: int) -> None:
        with suppress(RuntimeError):  # "Already borrowed": the library noticed a context that is used twice
            is_right.extend(cipher.encrypt(thread * 100, data) == expected[thread] for _ in range(150))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return len(is_right) == 600 and all(is_right)


def test_xts_cipher_on_four_threads_gives_each_its_own_result() -> None:
    assert _shared_by_threads(XtsCipher("x", KEY_64, plain64_ivs))


def test_control_one_context_for_all_threads_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    cipher = XtsCipher("x", KEY_64, plain64_ivs)
    shared = cipher._take(True)
    monkeypatch.setattr(cipher, "_take", lambda encrypts: shared)
    assert not all(_shared_by_threads(cipher) for _ in range(1000))


@pytest.mark.parametrize(
    ("cipher", "mode", "key_size", "message"),
    [
        ("serpent", "xts-plain64", 64, "the cipher is 'serpent', expected 'aes'"),
        ("aes", "ctr-plain64", 32, "the cipher mode is 'ctr-plain64', expected xts or cbc with"),
        ("aes", "xts-essiv:sha1", 64, "the cipher mode is 'xts-essiv:sha1', expected xts or cbc with"),
        ("aes", "xts", 64, "the cipher mode is 'xts', expected xts or cbc with"),
        ("aes", "xts-plain64", 48, "the key of aes-xts-plain64 has 48 bytes, expected 32 or 64"),
        ("aes", "cbc-plain64", 64, "the key of aes-cbc-plain64 has 64 bytes, expected 16 or 24 or 32"),
    ],
)
def test_algorithm_that_is_not_supported_is_refused_by_name(
    cipher: str, mode: str, key_size: int, message: str
) -> None:
    with pytest.raises(UnsupportedFeature) as caught:
        sector_cipher("x", cipher, mode, bytes(range(key_size)))
    assert str(caught.value).startswith(f"x: {message}")


def test_missing_library_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(UnsupportedFeature, match=r"^d\.qcow2: is encrypted, .*: pip install cryptography$"):
        legacy_cipher("d.qcow2", b"secret")
