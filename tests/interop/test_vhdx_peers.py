"""VHDX images served by nbdimg: peers see what others see in the files, and write what others read."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.formats.vhdx import craft
from tests.formats.vhdx.test_samples import SUMS, digest, unpack
from tests.interop.samples import run_ok
from tests.support.peers import require_program
from tests.support.rss import settled_memory
from tests.support.server import NbdimgServer
from tests.support.vhdximages import Builder, dynamic, flattened, judge

M = 1 << 20
SIZE = 6 * M
NAMES = (*SUMS, "d2", "w0", "w2", "w5", "w9")
PEERS = ("qemu-img", "nbdcopy")


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


def copied(peer: str, uri: str, directory: Path) -> Path:
    """The disk as another program copies it; sparse."""
    copy = directory / "copy.raw"
    if peer == "qemu-img":
        run_ok(require_program(peer), "convert", "-f", "raw", "-O", "raw", uri, copy)
    else:
        run_ok(require_program(peer), uri, copy)
    return copy


@pytest.mark.parametrize("name", SUMS)
def test_served_sample_has_its_sum_and_its_file_is_left_alone(
    server: NbdimgServer, directory: Path, tmp_path: Path, name: str
) -> None:
    """By each peer. The sum is made once, for it takes long: the largest sample is a disk of 10 GiB."""
    before = digest(directory / f"{name}.vhdx")
    first = copied("nbdcopy", uri_of(server, name), tmp_path).rename(tmp_path / "first.raw")
    second = copied("qemu-img", uri_of(server, name), tmp_path)
    assert digest(first) == SUMS[name][1]
    run_ok(require_program("qemu-img"), "compare", "-s", "-f", "raw", "-F", "raw", first, second)
    assert digest(directory / f"{name}.vhdx") == before
    first.unlink()
    second.unlink()


@pytest.mark.parametrize("peer", PEERS)
def test_served_sample_whose_block_is_in_its_log_alone_has_it(
    server: NbdimgServer, directory: Path, tmp_path: Path, peer: str
) -> None:
    before = digest(directory / "d2.vhdx")
    assert copied(peer, uri_of(server, "d2"), tmp_path).read_bytes() == (b"\xa5" * 65536).ljust(64 * M, b"\0")
    assert digest(directory / "d2.vhdx") == before


# The blocks of 8 MiB, from the first to before the second, that are there by each log; they hold zeroes. Entry 1024 is
# of block 1023: behind 512 entries stands one of a sector bitmap.
CRAFTED = {"w0": (0, 1), "w2": (1, 3), "w5": (1, 2), "w9": (1023, 1024)}


@pytest.mark.parametrize(("name", "blocks"), CRAFTED.items())
def test_served_sample_with_a_crafted_log_has_the_blocks_that_the_log_gives_it(
    server: NbdimgServer, directory: Path, tmp_path: Path, name: str, blocks: tuple[int, int]
) -> None:
    before = digest(directory / f"{name}.vhdx")
    uri = uri_of(server, name)
    found = json.loads(run_ok(require_program("qemu-img"), "map", "--output=json", "-f", "raw", uri))
    assert merged([(each["start"], each["length"], 1) for each in found if each["data"]]) == [
        (8 * M * blocks[0], 8 * M * (blocks[1] - blocks[0]), 1)
    ]
    for peer in PEERS:
        copy = copied(peer, uri, tmp_path)
        assert copy.stat().st_size == 8192 * M
        with copy.open("rb") as file:
            file.seek(8 * M * blocks[0])
            assert not any(file.read(8 * M * (blocks[1] - blocks[0])))
        copy.unlink()
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


def test_damage_that_can_be_lived_with_is_told_once_while_all_is_served(tmp_path: Path) -> None:
    builder = Builder(SIZE)
    builder.add_guest(b"\x11" * SIZE)
    builder.content[128 << 10] ^= 1
    builder.content[256 << 10] ^= 1
    path = tmp_path / "disk.vhdx"
    path.write_bytes(builder.content)
    with NbdimgServer(path) as server:
        for round in range(2):
            (tmp_path / str(round)).mkdir()
            assert copied("nbdcopy", server.uri, tmp_path / str(round)).read_bytes() == b"\x11" * SIZE
        assert server.stderr().count("header 2 is damaged, the other copy is used") == 1
        assert server.stderr().count("region table 2 is damaged, the other copy is used") == 1
        assert server.stderr().count("damaged") == 2


def test_given_parent_is_served_and_what_a_config_says_too(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "vm").mkdir()
    guest = b"\x11" * SIZE
    (tmp_path / "elsewhere" / "moved.vhdx").write_bytes(dynamic(guest))
    child = tmp_path / "vm" / "child.vhdx"
    child.write_bytes(Builder(SIZE, parent=".\\parent.vhdx").content)
    config = tmp_path / "nbdimg.toml"
    config.write_text('[[exports]]\npath = "vm/child.vhdx"\nparent = "elsewhere/moved.vhdx"\nread_only = true\n')
    with NbdimgServer(child, options=["--parent", str(tmp_path / "elsewhere" / "moved.vhdx"), "-r"]) as server:
        assert copied("nbdcopy", server.uri, tmp_path).read_bytes() == guest
    with NbdimgServer(options=["--config", str(config)]) as server:
        assert copied("nbdcopy", server.uri, tmp_path).read_bytes() == guest
    with pytest.raises(RuntimeError, match=r"parent locator 'parent\.vhdx' cannot be opened"):
        NbdimgServer(child)


@pytest.mark.parametrize("options", [["-r"], []])
def test_lost_log_is_served_when_that_is_accepted(tmp_path: Path, options: list[str]) -> None:
    builder = Builder(SIZE)
    builder.add_guest(b"\x11" * SIZE)
    builder.content[128 << 10 : 132 << 10] = craft.header(3, log_guid=craft.LOG_GUID)
    path = tmp_path / "disk.vhdx"
    path.write_bytes(builder.content)
    with pytest.raises(RuntimeError, match="--accept-lost-log goes on without it"):
        NbdimgServer(path, options=options)
    assert path.read_bytes() == builder.content
    with NbdimgServer(path, options=["--accept-lost-log", *options]) as server:
        assert copied("nbdcopy", server.uri, tmp_path).read_bytes() == b"\x11" * SIZE
        assert server.stderr().count("what it held is lost, as was accepted") == 1
    if options:
        assert path.read_bytes() == builder.content
    else:
        judge(path, b"\x11" * SIZE)


def test_disk_of_64_tib_takes_the_memory_of_a_small_one(tmp_path: Path) -> None:
    """1 MiB blocks: a BAT of 513 MiB. It is read at both ends."""
    small, large = tmp_path / "small.vhdx", tmp_path / "large.vhdx"
    run_ok(sys.executable, "-m", "nbdimg", "create", small, "1M")
    run_ok(sys.executable, "-m", "nbdimg", "create", large, "64T", "--block-size", "1M")
    taken: list[int] = []
    for path in (small, large):
        with NbdimgServer(path) as server:
            size = json.loads(run_ok(require_program("nbdinfo"), "--json", server.uri))["exports"][0]["export-size"]
            commands = ("read -P 0 0 4k", f"read -P 0 {size - 4096} 4k", f"write -P 7 {size - 4096} 4k", "flush")
            arguments = (part for each in commands for part in ("-c", each))
            run_ok(require_program("qemu-io"), "-f", "raw", *arguments, server.uri)
            taken.append(settled_memory(server.pid))
    assert size == 64 << 40
    assert taken[1] - taken[0] < 64 * M, taken


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
