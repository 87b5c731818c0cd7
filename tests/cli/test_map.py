"""`nbdimg map`: agrees with `qemu-img map` on images of every kind and through chains."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdimg.cli.main import run
from nbdimg.units import MiB, TiB
from tests.cli.conftest import Command
from tests.support.qcow2edit import Edit, make_luks, qemu_img, qemu_io
from tests.support.qcow2images import KINDS

USAGE, IMAGE = 2, 3

pytestmark = pytest.mark.usefixtures("directory")


@pytest.fixture
def mapped(command: Command) -> Any:
    """Runs `nbdimg map --json` and gives the object."""
    return lambda *arguments: json.loads(command.said("map", "--json", *arguments))


FIELDS = ("depth", "present", "zero", "data")


def joined(extents: list[dict[str, Any]], *, has_offsets: bool) -> list[tuple[Any, ...]]:
    """What both programs tell, in the same terms: qemu-img also has offsets of zeroes, and splits by them."""
    found: list[tuple[Any, ...]] = []
    for each in extents:
        offset = each.get("offset") if each["data"] and has_offsets else None
        fields = tuple(each[name] for name in FIELDS)
        if found:
            start, length, last, place = found[-1]
            assert start + length == each["start"]
            if last == fields and (place is None) == (offset is None) and (place is None or place + length == offset):
                found[-1] = (start, length + each["length"], last, place)
                continue
        found.append((each["start"], each["length"], fields, offset))
    return found


def assert_agrees(mapped: Any, path: str, *options: str, has_offsets: bool = True) -> None:
    theirs = json.loads(qemu_img("map", "--output=json", *options, path).stdout)
    ours = mapped(path)["extents"]
    assert joined(ours, has_offsets=has_offsets) == joined(theirs, has_offsets=has_offsets)


RECURSES = {"preallocated", "preallocated data", "extended full"}
"""qemu-img looks for holes below preallocated metadata and calls them zero; here they are data."""


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - RECURSES - {"luks"}))
def test_map_agrees_with_qemu(mapped: Any, kind: str) -> None:
    path = Path("a.qcow2").resolve()
    KINDS[kind](path)
    assert_agrees(mapped, str(path), "-f", "qcow2")


def test_map_of_an_encrypted_image_needs_no_key(mapped: Any) -> None:
    path = Path("a.qcow2").resolve()
    KINDS["luks"](path)
    found = mapped("a.qcow2")["extents"]
    assert [(each["start"], each["length"], each["data"], "offset" in each) for each in found] == [
        (0, 112 << 10, True, False),
        (112 << 10, (4 << 20) - (112 << 10), False, False),
    ]


def test_map_of_a_chain_with_an_encrypted_image_needs_no_key(mapped: Any) -> None:
    make_luks("base", 1 << 20, "write -q -P 1 0 16k")
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top", "1M")
    found = mapped("top")["extents"]
    assert [(each["length"], each["depth"], each["data"]) for each in found] == [
        (16 << 10, 1, True),
        ((1 << 20) - (16 << 10), 1, False),
    ]


def chain() -> None:
    qemu_img("create", "-q", "-f", "raw", "base", "1000448")
    qemu_io("base", "write -q -P 1 64k 100k", options=("-f", "raw"))
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "-o", "cluster_size=4k", "mid", "3M")
    qemu_io("mid", "write -q -P 2 100k 20k", "write -q -z 140k 8k", "write -q -P 2 2M 64k", "discard -q 2M 4k")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "mid", "-F", "qcow2", "-o", "cluster_size=16k", "top", "5M")
    qemu_io("top", "write -q -P 3 110k 50k", "write -q -P 3 4M 100")


def test_map_of_a_chain_agrees_with_qemu(mapped: Any) -> None:
    chain()
    assert_agrees(mapped, "top")
    files = [each["filename"].rpartition("/")[2] for each in mapped("top")["extents"] if "filename" in each]
    assert set(files) == {"top", "mid", "base"}
    assert {each["depth"] for each in mapped("top")["extents"]} == {0, 1, 2}


@pytest.mark.parametrize("size", [512, 1000448, 8 << 20])
def test_map_of_raw_agrees_with_qemu(mapped: Any, size: int) -> None:
    qemu_img("create", "-q", "-f", "raw", "a.img", str(size))
    if size > 512:
        qemu_io("a.img", "write -q -P 1 64k 64k", "write -q -P 1 512k 4k", options=("-f", "raw"))
    assert_agrees(mapped, "a.img", "-f", "raw")


def test_map_of_an_empty_image_has_no_extents(mapped: Any) -> None:
    Path("a.img").touch()
    assert mapped("a.img")["extents"] == []


def test_map_json_is_this(mapped: Any) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "a.qcow2", "256k")
    qemu_io("a.qcow2", "write -q -P 1 0 64k", "write -q -z 64k 64k")
    common = {"depth": 0, "compressed": False}
    assert mapped("a.qcow2") == {
        "version": 1,
        "path": "a.qcow2",
        "format": "qcow2",
        "size": 262144,
        "extents": [
            {
                **common,
                **{"start": 0, "length": 65536, "present": True, "zero": False, "data": True},
                **{"offset": 327680, "filename": "a.qcow2"},
            },
            {**common, "start": 65536, "length": 65536, "present": True, "zero": True, "data": False},
            {**common, "start": 131072, "length": 131072, "present": False, "zero": True, "data": False},
        ],
    }
    assert Edit(Path("a.qcow2")).get(Edit(Path("a.qcow2")).entry(0)) == 1 << 63 | 327680


def test_map_of_compressed_clusters_says_so(mapped: Any) -> None:
    KINDS["zlib"](Path("a.qcow2").resolve())
    found = mapped("a.qcow2")["extents"]
    assert any(each["compressed"] and "offset" not in each for each in found)


def test_map_of_a_part_is_clipped_to_it(mapped: Any) -> None:
    chain()
    found = mapped("top", "--start", "100000", "--length", "1M")["extents"]
    assert (found[0]["start"], found[-1]["start"] + found[-1]["length"]) == (100000, 100000 + MiB)
    assert mapped("top", "--start", "5M")["extents"] == []
    last = mapped("top", "--start", "4M", "--length", "1E")["extents"][-1]
    assert last["start"] + last["length"] == 5 * MiB


def test_map_for_people_is_a_table(capfd: pytest.CaptureFixture[str]) -> None:
    chain()
    assert run(["map", "top"]) == 0
    head, *lines = capfd.readouterr().out.splitlines()
    assert head.split() == ["START", "LENGTH", "DEPTH", "OFFSET", "FILE"]
    assert any(re.fullmatch(r" +98304 +65536 +0 +\d+ top", line) for line in lines), lines
    assert any(line.endswith(" unallocated") for line in lines)


def test_map_of_64_tebibytes_takes_little_memory() -> None:
    """Sparse, with a table here and there. Limited to 400 MiB of address space beyond what it begins with."""
    qemu_img("create", "-q", "-f", "qcow2", "a.qcow2", str(64 * TiB))
    qemu_io("a.qcow2", *(f"write -q {n}T 64k" for n in range(0, 64, 4)))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    command = [sys.executable, "-m", "nbdimg", "map", "--json", "a.qcow2"]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=limit, timeout=120)
    assert done.returncode == 0, done.stderr
    extents = json.loads(done.stdout)["extents"]
    assert [each["start"] for each in extents if each["data"]] == [n * TiB for n in range(0, 64, 4)]
    assert sum(each["length"] for each in extents) == 64 * TiB


def put(offset: Callable[[Edit], int], value: int, width: int = 8) -> Callable[[Edit], None]:
    return lambda edit: edit.put(offset(edit), value, width)


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (put(lambda edit: 20, 25, 4), "cluster_bits is 25, expected 9 to 21 .*"),
        (put(lambda edit: edit.l1, 1 << 63 | 0x1234), "L1 entry 0 is 0x8000000000001234, .*"),
        (put(lambda edit: edit.entry(0), 1 << 63 | 0x10002), "the L2 entry of guest offset 0 is .*"),
        (put(lambda edit: 72, 1 << 40), ".*incompatible features are not known here: bit 40 .*"),
    ],
)
def test_map_of_a_hostile_image_is_refused_in_one_line(
    capfd: pytest.CaptureFixture[str], damage: Callable[[Edit], None], pattern: str
) -> None:
    KINDS["version 3"](Path("a.qcow2").resolve())
    damage(Edit(Path("a.qcow2")))
    assert run(["map", "a.qcow2"]) == IMAGE
    (line,) = capfd.readouterr().err.splitlines()
    assert re.fullmatch(f"nbdimg: a.qcow2: {pattern}", line), line


def test_map_takes_an_image_for_what_it_is_told(mapped: Any) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "a.qcow2", "1M")
    found = mapped("a.qcow2", "--format", "raw")
    assert (found["format"], found["size"]) == ("raw", Path("a.qcow2").stat().st_size)


def test_map_beyond_the_end_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    qemu_img("create", "-q", "-f", "raw", "a.img", "1M")
    assert run(["map", "a.img", "--start", "2M"]) == USAGE
    assert "--start is 2097152, expected at most the image's size, 1048576" in capfd.readouterr().err


def test_control_a_wrong_map_does_not_agree(mapped: Any) -> None:
    chain()
    theirs = json.loads(qemu_img("map", "--output=json", "top").stdout)
    ours = mapped("top")["extents"]
    ours[1]["depth"] += 1
    assert joined(ours, has_offsets=True) != joined(theirs, has_offsets=True)
