"""The commands on vhdx images: what is printed, exit statuses, locks. What they do: formats/vhdx."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from nbdimg.storage.locks import lock_image
from nbdimg.units import KiB, MiB
from tests.cli.conftest import Command
from tests.formats.vhdx import craft
from tests.support import vhdximages
from tests.support.vhdximages import Builder, dynamic, fixed

CLEAN, CORRUPT, LEAKS = 0, 2, 3
USAGE, IMAGE = 2, 3

pytestmark = pytest.mark.usefixtures("directory")


@pytest.fixture
def said(command: Command) -> Any:
    return command.said


@pytest.fixture
def refused(command: Command) -> Any:
    return lambda arguments, status, pattern: command.refused(arguments[0], arguments[1:], status, pattern)


def chain() -> None:
    Path("parent.vhdx").write_bytes(dynamic(b"\1" * 2 * MiB))
    Path("child.vhdx").write_bytes(Builder(2 * MiB, parent=".\\parent.vhdx").content)


def test_create_says_what_it_made(said: Any) -> None:
    assert said("create", "a.vhdx", "1000") == (
        "a.vhdx: dynamic vhdx image of 1024 bytes (rounded up from 1000 to whole sectors)\n"
    )
    assert said("create", "b.vhdx", "--parent", "a.vhdx") == (
        "b.vhdx: differencing vhdx image of 1024 bytes, whose parent is a.vhdx\n"
    )
    options = ("--block-size", "4M", "--log-size", "2M", "--logical-sector-size", "4096", "--subformat", "fixed")
    assert json.loads(said("create", "c.avhdx", "3M", *options, "--physical-sector-size", "4096", "--json")) == {
        "version": 1,
        "path": "c.avhdx",
        "format": "vhdx",
        "size": 3 * MiB,
        "file_size": 9 * MiB,
        "subformat": "fixed",
        "block_size": 4 * MiB,
        "log_size": 2 * MiB,
        "logical_sector_size": 4096,
        "physical_sector_size": 4096,
        "parent": None,
    }


@pytest.mark.parametrize(
    ("arguments", "status", "pattern"),
    [
        (["a.vhdx"], USAGE, "SIZE is missing, only a parent can stand in for it"),
        (["a.vhdx", "1M", "--cluster-size", "4K"], USAGE, "a vhdx image has no --cluster-size; .* --format qcow2.*"),
        (["a.qcow2", "1M", "--block-size", "4M"], USAGE, "a qcow2 image has no --block-size; .* --format vhdx.*"),
        (["a.raw", "1M", "--parent", "x"], USAGE, "a raw image has no --parent; .*"),
        (["a.vhdx", "1M", "--block-size", "3M"], USAGE, "the block size is 3145728 bytes, expected .*"),
        (["a.vhdx", "1M", "--subformat", "fixed", "--parent", "bad"], IMAGE, "bad: the file signature is .*"),
    ],
)
def test_create_with_options_that_cannot_be_is_refused(
    refused: Any, arguments: list[str], status: int, pattern: str
) -> None:
    Path("bad").write_bytes(bytes(MiB))
    refused(["create", *arguments], status, pattern)
    assert os.listdir() == ["bad"]


def test_info_tells_every_header_field_and_the_chain(said: Any) -> None:
    chain()
    (child,) = json.loads(said("info", "--json", "child.vhdx"))["images"]
    expected = {
        "format": "vhdx",
        "size": 2 * MiB,
        "subformat": "differencing",
        "block_size": MiB,
        "logical_sector_size": 512,
        "physical_sector_size": 4096,
        "disk_id": str(craft.DISK_ID),
        "creator": "nbdimg tests",
        "sequence_number": 2,
        "header_slot": 2,
        "valid_headers": 2,
        "file_write_guid": str(craft.FILE_WRITE_GUID),
        "data_write_guid": str(craft.DATA_WRITE_GUID),
        "log_guid": str(craft.ZERO_GUID),
        "log_offset": MiB,
        "log_length": MiB,
        "log": "clean",
        "log_problem": None,
        "parent_locator": {"parent_linkage": f"{{{craft.DATA_WRITE_GUID}}}", "relative_path": ".\\parent.vhdx"},
        "user_items": [],
    }
    assert {key: child[key] for key in expected} == expected
    images = json.loads(said("info", "--json", "--backing-chain", "child.vhdx"))["images"]
    assert [(os.path.basename(each["path"]), each["subformat"]) for each in images] == [
        ("child.vhdx", "differencing"),
        ("parent.vhdx", "dynamic"),
    ]
    text = said("info", "--backing-chain", "child.vhdx")
    assert "parent:        relative_path = .\\parent.vhdx\n" in text


def test_info_of_a_chain_without_its_parent_is_refused(refused: Any) -> None:
    chain()
    os.unlink("parent.vhdx")
    refused(["info", "--backing-chain", "child.vhdx"], IMAGE, r"child.vhdx: parent locator 'parent.vhdx' cannot .*")


def test_info_of_a_log_changes_nothing_and_says_its_state(said: Any) -> None:
    content = craft.sample("vhdx-log-replay")
    Path("a.vhdx").write_bytes(content)
    assert "log:           to be replayed: " in said("info", "a.vhdx")
    assert Path("a.vhdx").read_bytes() == content
    Path("b.vhdx").write_bytes(craft.image(log_guid=craft.LOG_GUID))
    text = said("info", "b.vhdx")
    assert "log:           broken, 1048576 bytes at 1048576\n" in text
    assert "log problem:   b.vhdx: LogGuid is 11111111-" in text


def test_info_tells_user_items_and_damage(said: Any) -> None:
    meta = craft.metadata(more=[(craft.UNKNOWN, 1, b"mine")])
    content = craft.image(meta=meta, first=bytes(4096), table2=bytes(64 * KiB))
    Path("a.vhdx").write_bytes(content)
    (found,) = json.loads(said("info", "--json", "a.vhdx"))["images"]
    assert found["user_items"] == [{"id": "04030201-0605-0807-090a-0b0c0d0e0f10", "length": 4}]
    assert (found["valid_headers"], found["damaged_region_tables"]) == (1, [2])


def test_given_parent_is_taken_by_every_command_that_opens_a_chain(said: Any, refused: Any) -> None:
    chain()
    os.mkdir("elsewhere")
    os.rename("parent.vhdx", "elsewhere/moved.vhdx")
    parent = ("--parent", "elsewhere/moved.vhdx")
    refused(["map", "child.vhdx"], IMAGE, r"child.vhdx: parent locator 'parent.vhdx' cannot .*")
    (extent,) = json.loads(said("map", "--json", "child.vhdx", *parent))["extents"]
    assert extent["filename"] == "elsewhere/moved.vhdx"
    images = json.loads(said("info", "--json", "--backing-chain", "child.vhdx", *parent))["images"]
    assert [each["path"] for each in images] == ["child.vhdx", "elsewhere/moved.vhdx"]
    refused(["info", "child.vhdx", *parent], USAGE, "--parent is of use only with --backing-chain: .*")
    refused(["info", "--backing-chain", "elsewhere/moved.vhdx", "--parent", "child.vhdx"], USAGE, ".*: a parent is .*")
    assert "child.vhdx: vhdx image of 1 MiB" in said("resize", "--shrink", "child.vhdx", "1M", *parent)
    refused(
        ["resize", "elsewhere/moved.vhdx", "1M", *parent], USAGE, ".*: a parent is given and the image has none, .*"
    )


def test_check_declares_a_lost_log_empty_when_told_to(said: Any, refused: Any) -> None:
    content = bytearray(dynamic(b"\1" * 2 * MiB))
    content[128 * KiB : 132 * KiB] = craft.header(3, log_guid=craft.LOG_GUID)
    Path("a.vhdx").write_bytes(content)
    accept = "--accept-lost-log"
    for arguments in ((accept,), ("--repair", "leaks", accept)):
        refused(["check", "a.vhdx", *arguments], USAGE, ".* changes the image, which takes --repair all")
    assert "corruption: log: " in said("check", "--repair", "all", "a.vhdx", status=CORRUPT)
    assert Path("a.vhdx").read_bytes() == content
    text = said("check", "--repair", "all", accept, "a.vhdx")
    assert "a.vhdx: 1 corruption repaired\n" in text
    assert "the log is clean: what it held was lost, and it has been declared empty; " in text
    vhdximages.judge(Path("a.vhdx"), b"\1" * 2 * MiB)
    assert "no errors found" in said("check", "--repair", "all", accept, "a.vhdx")


def test_check_of_another_format_has_no_log_to_lose(said: Any, refused: Any) -> None:
    said("create", "a.qcow2", "1M")
    pattern = "a.qcow2: it is a qcow2 image, expected vhdx with --accept-lost-log"
    refused(["check", "--repair", "all", "--accept-lost-log", "a.qcow2"], 1, pattern)


def test_check_says_what_is_wrong_and_repairs_it(said: Any) -> None:
    content = bytearray(dynamic(b"\1" * 2 * MiB) + bytes(8 * MiB))
    content[192 * KiB] = 0
    Path("a.vhdx").write_bytes(content)
    text = said("check", "a.vhdx", status=CORRUPT)
    assert re.search(r"^corruption: region table 1: .* expected the same twice \(offset 196608\)$", text, re.MULTILINE)
    assert "a.vhdx: 1 corruption, 8 leaked MiB\n" in text
    found = json.loads(said("check", "--repair", "all", "--json", "a.vhdx"))
    assert (found["corruptions_fixed"], found["leaks_fixed"], found["exit_status"]) == (1, 8, CLEAN)
    assert said("check", "a.vhdx").endswith(
        "2 of 2 blocks allocated, 0 fragmented; the log is clean; in use up to byte 6291456\n"
    )
    vhdximages.judge(Path("a.vhdx"), b"\1" * 2 * MiB)


def test_check_of_leaks_alone_has_their_status(said: Any) -> None:
    Path("a.vhdx").write_bytes(dynamic(b"\1" * MiB) + bytes(MiB))
    said("check", "a.vhdx", status=LEAKS)


def test_compact_says_what_it_did(said: Any) -> None:
    builder = Builder(3 * MiB)
    builder.add_guest(bytes(MiB) + b"\1" * 2 * MiB, all_blocks=True)
    Path("a.vhdx").write_bytes(builder.content)
    Path("b.vhdx").write_bytes(builder.content)
    assert said("compact", "a.vhdx") == (
        "a.vhdx: 6 MiB (6291456 bytes), before 7 MiB (7340032 bytes); 1 block dropped, 1 moved\n"
    )
    assert json.loads(said("compact", "--json", "b.vhdx")) == {
        "version": 1,
        "path": "b.vhdx",
        "format": "vhdx",
        "file_size": 6 * MiB,
        "old_file_size": 7 * MiB,
        "dropped_blocks": 1,
        "moved_blocks": 1,
    }


def test_compact_of_what_cannot_be_is_refused(refused: Any) -> None:
    Path("a.vhdx").write_bytes(fixed(b"\1" * MiB))
    refused(["compact", "a.vhdx"], IMAGE, "a.vhdx: it is a fixed image, .*")
    Path("a.raw").write_bytes(bytes(MiB))
    refused(["compact", "a.raw"], IMAGE, "a.raw: it is a raw image, expected vhdx")
    Path("b.vhdx").write_bytes(dynamic(b"\1" * MiB))
    with open("b.vhdx", "rb") as user:
        lock_image(user.fileno(), "b.vhdx", writable=False)
        refused(["compact", "b.vhdx"], IMAGE, "b.vhdx: cannot be locked for writing: .*")


def test_resize_grows_and_shrinks(said: Any, refused: Any) -> None:
    Path("a.vhdx").write_bytes(dynamic(b"\1" * 2 * MiB))
    assert said("resize", "a.vhdx", "+1M") == (
        "a.vhdx: vhdx image of 3 MiB (3145728 bytes), before 2 MiB (2097152 bytes)\n"
    )
    vhdximages.judge(Path("a.vhdx"), b"\1" * 2 * MiB + bytes(MiB))
    refused(["resize", "a.vhdx", "1M"], USAGE, "a.vhdx: .* takes --shrink")
    said("resize", "--shrink", "a.vhdx", "1M")
    vhdximages.judge(Path("a.vhdx"), b"\1" * MiB)


def test_resize_is_rounded_up_to_logical_sectors(said: Any) -> None:
    Path("a.vhdx").write_bytes(Builder(MiB, sector_size=4096).content)
    assert "image of 1.02 MiB (1069056 bytes)" in said("resize", "a.vhdx", "+20000")


def test_map_tells_the_chain(said: Any) -> None:
    chain()
    extents = json.loads(said("map", "--json", "child.vhdx"))["extents"]
    assert [(each["start"], each["length"], each["depth"], each["offset"]) for each in extents] == [
        (0, 2 * MiB, 1, 4 * MiB)
    ]
