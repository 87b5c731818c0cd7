"""What a flush after allocations costs in fdatasyncs, counted by strace; beside it what qemu-nbd takes for the same."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.interop.samples import run_ok
from tests.support.peers import require_program
from tests.support.server import NbdimgServer, PeerServer
from tests.support.vhdximages import Builder

MIB = 1 << 20
_ACCEPTED = re.compile(r"accept4(?:\(.*\)| resumed>.*\)) += \d")
_SYNC = re.compile(r"\bf(?:data)?sync\(\d")


def traced(log: Path) -> list[str]:
    return [require_program("strace"), "-D", "-f", "-qq", "-o", str(log), "-e", "trace=fdatasync,fsync,accept4"]


def qemu_io(uri: str, *commands: str) -> None:
    """With a cache: else each write asks to be durable."""
    run_ok(
        require_program("qemu-io"),
        "-t",
        "writeback",
        "-f",
        "raw",
        *(part for each in commands for part in ("-c", each)),
        uri,
    )


def write_blocks(uri: str, count: int) -> None:
    """Three connections: one for the first change of a session, one that allocates, and one as a mark in the trace."""
    qemu_io(uri, "write -P 1 0 1M", "flush")
    qemu_io(uri, *(f"write -P 2 {block}M 1M" for block in range(1, count + 1)), "flush")
    qemu_io(uri, "read 0 512")


def syncs_of_last_but_one(lines: Sequence[str]) -> int:
    """Of the last connection but one: from its accept to the next one."""
    accepts = [index for index, line in enumerate(lines) if _ACCEPTED.search(line)]
    assert len(accepts) >= 3, lines
    return sum(bool(_SYNC.search(line)) for line in lines[accepts[-2] : accepts[-1]])


@pytest.mark.parametrize("count", [1, 16])
def test_flush_after_allocations_costs_two_or_three_syncs(tmp_path: Path, count: int) -> None:
    image, log = tmp_path / "disk.vhdx", tmp_path / "strace.log"
    image.write_bytes(Builder(64 * MIB).content)
    with NbdimgServer(image, program=[*traced(log), sys.executable, "-m", "nbdimg"]) as server:
        write_blocks(server.uri, count)
    found = syncs_of_last_but_one(log.read_text().splitlines())
    assert 2 <= found <= 3, f"{count} blocks and a flush took {found} syncs"


def test_qemu_takes_several_syncs_for_each_block_as_control(tmp_path: Path) -> None:
    image, log, count = tmp_path / "disk.vhdx", tmp_path / "strace.log", 8
    image.write_bytes(Builder(64 * MIB).content)
    qemu_nbd = require_program("qemu-nbd")
    with PeerServer(lambda path: [*traced(log), qemu_nbd, "-k", path, "-f", "vhdx", "-t", str(image)]) as server:
        write_blocks(f"nbd+unix:///?socket={server.socket_path}", count)
    found = syncs_of_last_but_one(log.read_text().splitlines())
    print(f"qemu-nbd took {found} syncs for {count} blocks and a flush")
    assert found >= 5 * count
