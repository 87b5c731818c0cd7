"""Parent locators."""

from __future__ import annotations

import struct
from uuid import UUID

import pytest

from nbdimg.errors import CorruptImage, ImageError, UnsupportedFeature
from nbdimg.formats.vhdx.locator import Locator, candidates, parent_locator, parse_locator, verify_linkage
from tests.formats.vhdx import craft
from tests.formats.vhdx.craft import UNKNOWN, locator

GUID = UUID("f1a2b3c4-0011-2233-4455-66778899aabb")
OTHER = UUID("0f0f0f0f-0000-1111-2222-333333333333")
LINKAGE = ("parent_linkage", f"{{{GUID}}}")
RELATIVE = ("relative_path", ".\\parent.vhdx")


def parse(data: bytes) -> Locator:
    return parse_locator("child.vhdx", data, 1000)


def test_locator_is_parsed_byte_by_byte() -> None:
    data = bytes.fromhex(
        "B7EF4AB09ED1814AB78925B8E9445913 0000 0100"
        "20000000 3C000000 1C00 4C00"
    )  # fmt: skip
    data += "parent_linkage".encode("utf-16-le") + "{F1A2B3C4-0011-2233-4455-66778899AABB}".encode("utf-16-le")
    found = parse(data)
    assert found.linkage == GUID
    assert found.linkage2 is None
    assert found.values == {"parent_linkage": "{F1A2B3C4-0011-2233-4455-66778899AABB}"}
    assert found.offset == 1000


def test_locator_second_linkage_and_keys_unknown_here_are_kept() -> None:
    found = parse(locator(("zzz", "1"), ("parent_linkage2", f"{OTHER}"), RELATIVE, LINKAGE))
    assert (found.linkage, found.linkage2) == (GUID, OTHER)
    assert found.values["zzz"] == "1"


def test_locator_is_written_as_the_specification_says() -> None:
    made = parent_locator(GUID, "../base/parent.vhdx")
    assert made.to_bytes() == locator(LINKAGE, ("relative_path", "..\\base\\parent.vhdx"))
    again = parse(made.to_bytes())
    assert (again.values, again.linkage) == (made.values, GUID)


def pairs(key: tuple[int, int] = (44, 28), value: tuple[int, int] = (72, 76), *, count: int = 1) -> bytes:
    """A locator with one pair at any place; right ones are 44 and 28, 72 and 76."""
    head = craft.raw(craft.VHDX_LOCATOR) + struct.pack("<HHIIHH", 0, count, key[0], value[0], key[1], value[1])
    text = "parent_linkage".encode("utf-16-le") + LINKAGE[1].encode("utf-16-le")
    return head.ljust(44, b"\0") + text


def test_control_pairs_is_right_without_arguments() -> None:
    assert parse(pairs()).linkage == GUID


REFUSED = [
    (b"", CorruptImage, r"the parent locator's length is 0, expected at least 20 \(file offset 1000\)"),
    (locator(LINKAGE)[:19], CorruptImage, "length is 19"),
    (locator(LINKAGE, kind=UNKNOWN), UnsupportedFeature, r"the parent locator's type is 04030201-.*b04aefb7.*1000"),
    (locator(count=0), CorruptImage, r"KeyValueCount is 0, expected 1 to 0 \(file offset 1018\)"),
    (locator(LINKAGE, count=0), CorruptImage, r"KeyValueCount is 0"),
    (locator(LINKAGE, count=257) + bytes(9999), CorruptImage, "KeyValueCount is 257, expected 1 to 256"),
    (locator(LINKAGE, count=65535), CorruptImage, "KeyValueCount is 65535, expected 1 to 9"),
    (pairs(key=(0, 28)), CorruptImage, r"the offset of the parent locator's key is 0.*1020"),
    (pairs(key=(44, 0)), CorruptImage, r"the length of the parent locator's key is 0.*1028"),
    (pairs(key=(44, 27)), CorruptImage, r"the length of the parent locator's key is 27, expected even"),
    (pairs(value=(72, 78)), CorruptImage, r"the offset of the parent locator's value is 72, expected 20 to 70.*1024"),
    (pairs(value=(0xFFFFFFFE, 2)), CorruptImage, r"value is 4294967294"),
    (pairs(value=(72, 0)), CorruptImage, r"the length of the parent locator's value is 0.*1030"),
    (pairs(value=(72, 74)), CorruptImage, r"parent_linkage is '\{f1a2b3c4.*, expected a GUID in braces.*1072"),
    (pairs(key=(42, 28)), CorruptImage, r"the parent locator's key is .*without NUL"),
    (locator(RELATIVE), CorruptImage, "parent_linkage is missing"),
    (locator(LINKAGE, LINKAGE), CorruptImage, r"key 'parent_linkage' is there twice, expected there once.*1032"),
    (locator(("parent_linkage", "{}")), CorruptImage, r"parent_linkage is '\{\}', expected a GUID in braces"),
    (locator(LINKAGE, ("parent_linkage2", "x")), CorruptImage, "parent_linkage2 is 'x'"),
    (locator(LINKAGE, ("Parent_linkage", "x\0")), CorruptImage, "without NUL"),
    (locator(LINKAGE)[:-2] + b"\x00\xd8", CorruptImage, "expected UTF-16"),
]


@pytest.mark.parametrize(("data", "error", "message"), REFUSED)
def test_locator_that_is_wrong_is_refused(data: bytes, error: type[ImageError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        parse(data)
    assert f"(file offset {caught.value.offset})" in str(caught.value)


VOLUME = "\\\\?\\Volume{12345678-0000-0000-0000-000000000000}\\vm\\Base.vhdx"
CANDIDATES = [
    ({"relative_path": ".\\parent.vhdx"}, ["parent.vhdx"]),
    ({"relative_path": "parent.vhdx"}, ["parent.vhdx"]),
    ({"relative_path": ".\\.\\sub\\parent.vhdx"}, ["sub/parent.vhdx", "parent.vhdx"]),
    ({"relative_path": "..\\..\\a b\\parent.vhdx"}, ["../../a b/parent.vhdx", "parent.vhdx"]),
    ({"relative_path": "../base/parent.vhdx"}, ["../base/parent.vhdx", "parent.vhdx"]),
    ({"volume_path": VOLUME}, ["Base.vhdx"]),
    ({"absolute_win32_path": "\\\\?\\D:\\vm\\base.vhdx"}, ["base.vhdx"]),
    ({"absolute_win32_path": "D:\\vm\\base.vhdx"}, ["base.vhdx"]),
    ({"absolute_win32_path": "\\\\server\\share\\base.vhdx"}, ["base.vhdx"]),
    ({"absolute_win32_path": "\\\\?\\UNC\\server\\share\\base.vhdx"}, ["base.vhdx"]),
    ({"absolute_win32_path": "/images/base.vhdx"}, ["/images/base.vhdx", "base.vhdx"]),
    ({"relative_path": "C:\\vm\\base.vhdx"}, ["base.vhdx"]),
    ({"relative_path": "\\\\server\\x.vhdx"}, ["x.vhdx"]),
    ({"relative_path": "nbd:x"}, ["./nbd:x"]),
    ({"relative_path": ".."}, []),
    ({"relative_path": "a\\.."}, []),
    ({"relative_path": "\\"}, []),
    ({"relative_path": ".\\\\x"}, ["x"]),
    ({}, []),
    (
        {"absolute_win32_path": "\\\\?\\D:\\c.vhdx", "volume_path": VOLUME, "relative_path": "..\\a.vhdx"},
        ["../a.vhdx", "a.vhdx", "Base.vhdx", "c.vhdx"],
    ),
    ({"relative_path": "p.vhdx", "absolute_win32_path": "C:\\p.vhdx", "volume_path": VOLUME}, ["p.vhdx", "Base.vhdx"]),
]


@pytest.mark.parametrize(("values", "expected"), CANDIDATES)
def test_candidates_are_names_for_this_system_in_order(values: dict[str, str], expected: list[str]) -> None:
    assert candidates(parse(locator(LINKAGE, *values.items()))) == expected


def test_linkage_is_verified_by_either_identity() -> None:
    found = parse(locator(LINKAGE, ("parent_linkage2", f"{{{OTHER}}}")))
    verify_linkage("child.vhdx", found, "p.vhdx", GUID)
    verify_linkage("child.vhdx", found, "p.vhdx", OTHER)


def test_linkage_mismatch_names_all_guids_and_both_files() -> None:
    found = parse(locator(LINKAGE, ("parent_linkage2", f"{{{OTHER}}}")))
    with pytest.raises(ImageError) as caught:
        verify_linkage("child.vhdx", found, "p.vhdx", UUID(int=5))
    message = str(caught.value)
    assert message.startswith(
        "child.vhdx: DataWriteGuid of the parent p.vhdx is 00000000-0000-0000-0000-000000000005, "
    )
    assert f"expected {GUID} (parent_linkage) or {OTHER} (parent_linkage2)" in message
    with pytest.raises(ImageError, match=rf"expected {GUID} \(parent_linkage\): "):
        verify_linkage("child.vhdx", parse(locator(LINKAGE)), "p.vhdx", OTHER)


def test_linkage_absent_second_does_not_accept_the_zero_guid() -> None:
    with pytest.raises(ImageError):
        verify_linkage("child.vhdx", parse(locator(LINKAGE)), "p.vhdx", UUID(int=0))
