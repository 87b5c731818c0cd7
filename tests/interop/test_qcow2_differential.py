"""One seeded stream of requests to nbdimg and to qemu-nbd over twin images: every read agrees, and so do the images.

Trims cover whole clusters of the larger image of a chain and are followed by a zeroing, for what a trim leaves is each
server's own choice. `NBDIMG_DIFFERENTIAL_OPS` sets the number of requests for each kind of image.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.interop.samples import KIB, MIB, run, run_ok
from tests.support.peers import require_program
from tests.support.qcow2edit import qemu_check, qemu_img, qemu_io
from tests.support.rawclient import Client, connect_negotiated
from tests.support.rawprotocol import Command, CommandFlag
from tests.support.server import NbdimgServer, PeerServer

SIZE = 2 * MIB
OPERATIONS = int(os.environ.get("NBDIMG_DIFFERENTIAL_OPS", "850"))
ROUND = 8
"""Requests that are in flight together; they overlap nothing of their round."""


def _plain(options: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(SIZE))
        qemu_io(path, "write -q -P 1 0 300k", "write -q -z 100k 60k", "write -q -P 2 1M 64k")

    return make


def _snapshot(options: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        _plain(options)(path)
        qemu_img("snapshot", "-c", "one", path)
        qemu_io(path, "write -q -P 3 50k 100k")

    return make


def _overlay(options: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        base = path.parent / "base.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", base, str(SIZE - 300 * KIB))
        qemu_io(base, "write -q -P 9 0 900k", "write -q -P 8 1200k 256k")
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, "-b", "base.qcow2", "-F", "qcow2", path, str(SIZE))

    return make


def _compressed(options: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        source = path.parent / "source"
        source.write_bytes(b"".join(bytes([index % 251]) * 700 + bytes(range(256)) for index in range(2100))[:SIZE])
        os.truncate(source, SIZE)
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, source, path)
        source.unlink()

    return make


KINDS = {
    "default": _plain("cluster_size=64k"),
    "small clusters": _plain("cluster_size=512"),
    "version 2": _snapshot("compat=0.10,cluster_size=4k"),
    "snapshot": _snapshot("cluster_size=4k,refcount_bits=8"),
    "overlay": _overlay("cluster_size=8k"),
    "extended overlay": _overlay("cluster_size=64k,extended_l2=on"),
    "compressed": _compressed("cluster_size=16k,compression_type=zstd,lazy_refcounts=on"),
}

Request = tuple[int, int, int, int, bytes]
"""(command, offset, length, flags, payload)."""


def stream(seed: int, count: int) -> list[list[Request]]:
    """Rounds of requests; the reads of a round look at what earlier rounds did."""
    generator = random.Random(seed)
    rounds: list[list[Request]] = []
    made = 0
    while made < count:
        starts = sorted(generator.sample(range(SIZE // (64 * KIB)), ROUND))
        round_: list[Request] = []
        for start in starts:
            round_.append(_request(generator, start * 64 * KIB))
        zeroed: list[Request] = [
            (Command.WRITE_ZEROES, each[1], each[2], 0, b"") for each in round_ if each[0] == Command.TRIM
        ]
        rounds.extend(each for each in (round_, zeroed) if each)
        made += len(round_) + len(zeroed)
    return rounds


def _request(generator: random.Random, region: int) -> Request:
    """A request within 64 KiB of `region`."""
    command = generator.choices(
        (Command.WRITE, Command.READ, Command.WRITE_ZEROES, Command.TRIM, Command.FLUSH), weights=(40, 30, 12, 10, 8)
    )[0]
    if command == Command.FLUSH:
        return Command.FLUSH, 0, 0, 0, b""
    if command == Command.TRIM:
        return Command.TRIM, region, 64 * KIB, 0, b""
    unit = generator.choice((1, 512, 512, 4096))
    start = generator.randrange(64 * KIB // unit) * unit
    length = min(64 * KIB - start, generator.choice((unit, 3 * unit, 700, 4096, 20_000)))
    flags = CommandFlag.FUA if command != Command.READ and generator.random() < 0.1 else 0
    if command == Command.WRITE:
        return command, region + start, length, flags, generator.randbytes(1) * length
    if command == Command.WRITE_ZEROES and generator.random() < 0.5:
        flags |= CommandFlag.NO_HOLE
    return command, region + start, length, flags, b""


def answers(client: Client, requests: list[Request]) -> list[bytes]:
    """What a round's reads return; every request must succeed. Replies come in any order."""
    sent = [
        client.new_request(command, offset, length, flags, payload)
        for command, offset, length, flags, payload in requests
    ]
    client.send_requests(sent)
    replies = {reply.cookie: reply for reply in client.read_replies(len(sent))}
    assert [each for each in replies.values() if each.error] == []
    return [bytes(replies[each.cookie].data) for each in sent if each.command == Command.READ]


@pytest.mark.parametrize("kind", KINDS)
def test_stream_of_requests_has_the_same_effect_as_through_qemu_nbd(tmp_path: Path, kind: str) -> None:
    seed = list(KINDS).index(kind) + 15
    ours, theirs = tmp_path / "ours" / "disk.qcow2", tmp_path / "theirs" / "disk.qcow2"
    ours.parent.mkdir()
    KINDS[kind](ours)
    shutil.copytree(ours.parent, theirs.parent)
    program = require_program("qemu-nbd")
    with ExitStack() as stack:
        server = stack.enter_context(NbdimgServer(ours))
        reference = stack.enter_context(
            PeerServer(lambda path: [program, "-t", "--discard=unmap", "-f", "qcow2", "-k", path, str(theirs)])
        )
        left = stack.enter_context(connect_negotiated(server.socket_path, "disk"))
        right = stack.enter_context(connect_negotiated(reference.socket_path))
        done = 0
        for number, round_ in enumerate(stream(seed, OPERATIONS)):
            found, expected = answers(left, round_), answers(right, round_)
            assert found == expected, f"{kind}, seed {seed}, round {number}"
            done += len(round_)
        assert done >= OPERATIONS
    run_ok(require_program("qemu-img"), "compare", "-f", "qcow2", "-F", "qcow2", ours, theirs)
    report = qemu_check(ours)
    assert (report.exit_status, report.leaks) == (0, 0), f"{kind}, seed {seed}"


def test_control_one_request_more_is_a_difference(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    _plain("cluster_size=4k")(ours)
    shutil.copy(ours, theirs)
    with NbdimgServer(ours) as server, connect_negotiated(server.socket_path, "ours") as client:
        before = answers(client, [(Command.READ, 0, 1024, 0, b"")])
        answers(client, [(Command.WRITE, 700, 1, 0, b"\xff")])
        assert answers(client, [(Command.READ, 0, 1024, 0, b"")]) != before
    compared = run(require_program("qemu-img"), "compare", "-f", "qcow2", "-F", "qcow2", ours, theirs)
    assert compared.returncode == 1
