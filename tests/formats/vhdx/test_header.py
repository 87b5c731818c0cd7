"""File type identifier and headers."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest
from crc32c import crc32c

from nbdimg.errors import CorruptImage, ImageError, UnsupportedFeature
from nbdimg.formats.vhdx.header import (
    Header,
    Headers,
    creator_of,
    file_identifier,
    load_headers,
    next_header,
    write_header,
)
from nbdimg.storage.memory import MemoryFile
from tests.formats.vhdx import craft
from tests.formats.vhdx.craft import LOG_GUID, K, M


def load(**parts: bytes) -> Headers:
    return asyncio.run(load_headers(MemoryFile(craft.image(**parts), "x.vhdx")))  # type: ignore[arg-type]


def test_control_package_and_definition_of_the_checksum_agree() -> None:
    assert craft.castagnoli(b"123456789") == crc32c(b"123456789") == 0xE3069283
    data = craft.header()
    assert crc32c(data) == craft.castagnoli(data)


def test_header_is_parsed_field_by_field() -> None:
    content = (
        b"head\0\0\0\0" + bytes.fromhex("0807060504030201")
        + bytes(range(16)) + bytes(range(16, 32)) + bytes(range(32, 48))
        + bytes.fromhex("0000 0100 00003000 0000700000000000")
    )  # fmt: skip
    found = Header.from_bytes(craft.sealed(content.ljust(4096, b"\0")))
    assert found == Header(
        sequence_number=0x0102030405060708,
        file_write_guid=UUID("03020100-0504-0706-0809-0a0b0c0d0e0f"),
        data_write_guid=UUID("13121110-1514-1716-1819-1a1b1c1d1e1f"),
        log_guid=UUID("23222120-2524-2726-2829-2a2b2c2d2e2f"),
        log_length=0x300000,
        log_offset=0x700000,
        log_version=0,
        version=1,
    )


def test_header_is_written_as_it_was_read() -> None:
    data = craft.header(77, log_guid=LOG_GUID, log_length=3 * M, log_offset=9 * M)
    header = Header.from_bytes(data)
    assert header is not None
    assert header.has_log
    assert header.log_stop == 12 * M
    assert header.to_bytes() == data


@pytest.mark.parametrize("offset", [0, 4, 8, 79, 4095])
def test_header_with_one_byte_changed_is_none(offset: int) -> None:
    data = bytearray(craft.header())
    data[offset] ^= 1
    assert Header.from_bytes(bytes(data)) is None


def test_header_that_is_short_is_none() -> None:
    assert Header.from_bytes(craft.header()[:4095]) is None


def test_headers_greater_sequence_number_is_current() -> None:
    assert load(first=craft.header(7), second=craft.header(6)).slot == 0
    found = load(first=craft.header(6), second=craft.header(7))
    assert (found.slot, found.current.sequence_number) == (1, 7)
    assert found.other is not None
    assert found.other.sequence_number == 6


@pytest.mark.parametrize("slot", [0, 1])
def test_headers_damaged_newer_one_leaves_the_older(slot: int) -> None:
    good, bad = craft.header(1), craft.header(2)[:-1] + b"\1"
    found = load(first=bad, second=good) if slot else load(first=good, second=bad)
    assert (found.slot, found.current.sequence_number, found.other) == (slot, 1, None)


def test_headers_identical_with_equal_numbers_are_accepted_and_the_second_slot_is_next() -> None:
    found = load(first=craft.header(5), second=craft.header(5))
    assert (found.slot, found.current.sequence_number) == (0, 5)


def test_headers_different_with_equal_numbers_are_refused() -> None:
    other = craft.header(5, data_write_guid=UUID(int=9))
    with pytest.raises(CorruptImage, match=r"SequenceNumber is 5 in both headers and they differ.*65544 and 131080"):
        load(first=craft.header(5), second=other)


def test_headers_both_damaged_are_refused() -> None:
    with pytest.raises(CorruptImage, match=r"neither header.*'head'.*65536 and 131072"):
        load(first=bytes(4096), second=craft.header(signature=b"HEAD"))


REFUSED = [
    ({"version": 2}, UnsupportedFeature, r"Version is 2, expected 1 \(file offset 131138\)"),
    ({"version": 0}, UnsupportedFeature, r"Version is 0, expected 1"),
    ({"log_version": 1, "log_guid": LOG_GUID}, UnsupportedFeature, r"LogVersion is 1, expected 0.*131136"),
    ({"log_length": M + 4096}, CorruptImage, r"LogLength is 1052672, expected a multiple of 1 MiB.*131140"),
    ({"log_length": 0, "log_guid": LOG_GUID}, CorruptImage, r"LogLength is 0, expected more than 0.*131140"),
    ({"log_offset": 0}, CorruptImage, r"LogOffset is 0, expected a multiple of 1 MiB from 1 MiB.*131144"),
    ({"log_offset": M + 512}, CorruptImage, r"LogOffset is 1049088"),
    ({"log_offset": 1 << 48}, CorruptImage, r"LogOffset is 281474976710656"),
    ({"log_offset": (1 << 64) - M}, CorruptImage, r"LogOffset is 18446744073708503040"),
    ({"sequence_number": (1 << 64) - 1}, CorruptImage, r"SequenceNumber is 18446744073709551615.*131080"),
]


@pytest.mark.parametrize(("fields", "error", "message"), REFUSED)
def test_headers_with_a_wrong_field_are_refused(fields: dict[str, int], error: type[ImageError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        load(second=craft.header(**{"sequence_number": 2, **fields}))  # type: ignore[arg-type]
    assert str(caught.value).startswith("x.vhdx: ")
    assert f"(file offset {caught.value.offset})" in str(caught.value)


@pytest.mark.parametrize("fields", [{"log_version": 1}, {"log_length": 0, "log_offset": 0}, {"log_length": 1 << 31}])
def test_headers_with_an_empty_log_need_not_have_one_that_is_known_here(fields: dict[str, int]) -> None:
    assert not load(second=craft.header(2, **fields)).current.has_log  # type: ignore[arg-type]


def test_headers_wrong_field_in_the_stale_one_does_not_matter() -> None:
    assert load(first=craft.header(1, version=9)).slot == 1


@pytest.mark.parametrize("size", [0, 7, 8, 4096, 64 * K + 79, 128 * K])
def test_headers_of_a_short_file_are_refused(size: int) -> None:
    whole = craft.image()
    whole[64 * K : 68 * K] = bytes(4096)
    with pytest.raises(CorruptImage, match=r"file signature|neither header"):
        asyncio.run(load_headers(MemoryFile(whole[:size])))


def test_headers_of_another_format_are_refused() -> None:
    with pytest.raises(CorruptImage, match=r"the file signature is 'conectix', expected 'vhdxfile' \(file offset 0\)"):
        asyncio.run(load_headers(MemoryFile(b"conectix".ljust(4 * M, b"\0"))))


def test_next_header_counts_and_keeps_what_is_not_given() -> None:
    header = load(second=craft.header(2, log_version=1)).current
    following = next_header(header, log_guid=LOG_GUID)
    assert following.sequence_number == 3
    assert following.log_version == 0
    assert following.log_guid == LOG_GUID
    assert (following.file_write_guid, following.data_write_guid) == (craft.FILE_WRITE_GUID, craft.DATA_WRITE_GUID)
    cleared = next_header(following, log_guid=UUID(int=0), data_write_guid=UUID(int=3), file_write_guid=UUID(int=4))
    assert (cleared.log_guid.int, cleared.data_write_guid.int, cleared.file_write_guid.int) == (0, 3, 4)
    assert (cleared.log_length, cleared.log_offset) == (M, M)


def test_write_header_alternates_slots_and_each_is_current_then() -> None:
    async def run() -> None:
        file = MemoryFile(craft.image())
        headers = await load_headers(file)
        for number in (3, 4, 5):
            headers = await write_header(file, headers, next_header(headers.current))
            assert headers == await load_headers(file)
            assert (headers.current.sequence_number, headers.slot) == (number, (number + 1) % 2)

    asyncio.run(run())


def test_file_identifier_holds_the_creator() -> None:
    data = file_identifier("nbdimg 1.0")
    assert len(data) == 64 * K
    assert data[:28] == b"vhdxfilen\0b\0d\0i\0m\0g\0 \x001\0.\x000\0"
    assert creator_of(data) == "nbdimg 1.0"
    assert creator_of(file_identifier("x" * 400)) == "x" * 256


@pytest.mark.parametrize(
    ("name", "creator"),
    [("swap", "Microsoft Windows 10.0.14393.0"), ("vhdx-log-replay", "Microsoft Windows 10.0.15063.0")],
)
def test_creator_of_a_windows_file(name: str, creator: str) -> None:
    assert creator_of(craft.sample(name)[:600]) == creator


def test_creator_that_is_garbage_is_harmless() -> None:
    assert isinstance(creator_of(b"vhdxfile" + b"\x00\xd8" * 300), str)
    assert creator_of(b"") == ""
