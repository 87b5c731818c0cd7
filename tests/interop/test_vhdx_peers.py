"""VHDX images served by nbdimg: peers see what others see in the files, and write what others read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.formats.vhdx.test_samples import SUMS, digest, unpack
from tests.interop.samples import run_ok
from tests.support.peers import require_program
from tests.support.server import NbdimgServer
from tests.support.vhdximages import Builder, dynamic, flattened, judge

M = 1 << 20
SIZE = 6 * M
NAMES = tuple(name for name in SUMS if name != "swap")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("samples")
    for name in NAMES:
        unpack(name, made)
    return made


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[NbdimgServer]:
    """All of them behind one socket, read-only; an export is named as its image."""
    with NbdimgServer(*(directory / f"{name}.vhdx" for name in NAMES), options=["--read-only"]) as server:
        yield server


def uri_of(server: NbdimgServer, export: str) -> str:
    return f"nbd+unix:///{export}?socket={server.socket_path}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("peer", ["qemu-img", "nbdcopy"])
def test_served_sample_has_its_sum_and_its_file_is_left_alone(
    server: NbdimgServer, directory: Path, tmp_path: Path, name: str, peer: str
) -> None:
    before = digest(directory / f"{name}.vhdx")
    copy = tmp_path / "copy.raw"
    uri = uri_of(server, name)
    if peer == "qemu-img":
        run_ok(require_program(peer), "convert", "-f", "raw", "-O", "raw", uri, copy)
    else:
        run_ok(require_program(peer), uri, copy)
    assert digest(copy) == SUMS[name][1]
    assert digest(directory / f"{name}.vhdx") == before


def info_map(uri: str, context: str) -> list[tuple[int, int, int]]:
    """(offset, length, flags) of `nbdinfo --map`."""
    found = json.loads(run_ok(require_program("nbdinfo"), "--json", f"--map={context}", uri))
    return [(each["offset"], each["length"], each["type"]) for each in found]


def merged(pairs: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []
    for offset, length, kind in pairs:
        if found and found[-1][2] == kind:
            offset, length = found[-1][0], found.pop()[1] + length
        found.append((offset, length, kind))
    return found


def test_map_of_a_child_says_where_its_bytes_are(server: NbdimgServer) -> None:
    """Flags 3: a hole that reads as zeroes. Depth 1: the child's own, 2 the parent's, which says ZERO of the rest."""
    uri = uri_of(server, "child")
    assert merged(info_map(uri, "base:allocation")) == [
        (0, 2 * M, 0),
        (2 * M, 3 * M, 3),
        (5 * M, 3 * M, 0),
        (8 * M, 56 * M, 3),
    ]
    depths = merged(info_map(uri, "qemu:allocation-depth"))
    assert depths[:6] == [
        (0, M + 4096, 1),
        (M + 4096, 5 * 512, 2),
        (M + 13 * 512, 3 * 512, 1),
        (M + 16 * 512, M - 17 * 512, 2),
        (2 * M - 512, 3 * M + 512, 1),
        (5 * M, 59 * M, 2),
    ]


def test_sector_size_is_the_smallest_block_that_is_offered(server: NbdimgServer) -> None:
    found = json.loads(run_ok(require_program("nbdinfo"), "--json", uri_of(server, "k4")))
    assert found["exports"][0]["block_size_preferred"] >= 4096


@pytest.mark.parametrize("kind", ["dynamic", "child"])
def test_peers_write_through_the_server_what_others_read_in_the_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "disk.vhdx"
    guest = bytearray(b"\x11" * (2 * M) + bytes(SIZE - 2 * M))
    if kind == "child":
        (tmp_path / "parent.vhdx").write_bytes(dynamic(bytes(guest)))
        path.write_bytes(Builder(SIZE, parent=".\\parent.vhdx").content)
    else:
        path.write_bytes(dynamic(bytes(guest)))
    commands = (
        "write -P 0x21 0 512",
        "write -P 0x22 1000k 100k",
        "write -z -u 3M 1M",
        "write -P 0x23 4M 2M",
        "flush",
        "discard 4M 1M",
        "write -P 0x24 2M 4k",
        "flush",
        "write -P 0x25 5M 1k",
    )
    with NbdimgServer(path) as server:
        run_ok(
            require_program("qemu-io"), "-f", "raw", *(part for each in commands for part in ("-c", each)), server.uri
        )
    for start, fill, length in (
        (0, 0x21, 512),
        (1000 << 10, 0x22, 100 << 10),
        (4 * M, 0x23, 2 * M),
        (4 * M, 0, M),
        (2 * M, 0x24, 4096),
        (5 * M, 0x25, 1024),
    ):
        guest[start : start + length] = bytes([fill]) * length
    assert hashlib.sha256(flattened(path)).hexdigest() == hashlib.sha256(guest).hexdigest()
    if kind == "dynamic":
        judge(path, bytes(guest))
