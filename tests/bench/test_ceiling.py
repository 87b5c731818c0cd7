"""The bare servers serve what they are asked for, and the table compares whom it says it compares."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from errno import EIO
from pathlib import Path

import pytest

from bench import ceiling
from bench.cells import CEILING_CELLS, KIB, MIB
from bench.results import Run
from bench.servers import PEERS
from tests.bench.test_report import NBDKIT, SUBJECT, URING, run_of, samples
from tests.support.peers import require_program
from tests.support.rawclient import Client
from tests.support.rawprotocol import Command

BARE = [150_000.0, 130_000.0, 125_000.0]
SIZE = 4 * MIB
SEED = 20261123


def recorded_run() -> Run:
    """nbdimg's median is 100k, nbdkit's, the best peer's, 50k, and the better bare server's 130k."""
    bare = (("bare polling", BARE), ("bare sleeping", [1000.0] * 3))
    peers = (("qemu-nbd io_uring", URING), ("nbdkit file", NBDKIT))
    run = run_of(*(samples(server, rates) for server, rates in (*bare, ("nbdimg", SUBJECT), *peers)))
    run.servers = {**{name: "cc 12.2" for name, _ in bare}, **run.servers}
    return run


def last_columns(run: Run) -> list[str]:
    (row,) = ceiling.ceiling_table(run).rows
    return row[-4:]


def test_table_divides_bare_by_the_best_peer_and_nbdimg_by_both() -> None:
    table = ceiling.ceiling_table(recorded_run())
    assert table.columns[-4:] == ["best peer", "ceiling", "reached", "ratio"]
    assert [row[:-4] for row in table.rows] == [
        ["4 KiB random read, depth 16", "IOPS", "130.0k", "1.0k", "100.0k", "44.0k", "50.0k"]
    ]
    assert table.rows[0][-4:] == ["nbdkit file", "2.60 (2.50–4.33)", "0.77 (0.60–0.92)", "2.00 (1.50–4.00)"]


def test_table_bare_server_is_nobodys_peer() -> None:
    """Nor is one that is faster than it: several threads can be."""
    run = recorded_run()
    run.samples += samples("fast", [260_000.0] * 3)
    run.servers["fast"] = "1"
    assert last_columns(run) == ["fast", "0.50 (0.48–0.58)", "0.77 (0.60–0.92)", "0.38 (0.35–0.46)"]


def test_table_has_the_better_of_the_two_bare_servers() -> None:
    run = recorded_run()
    swap = dict(zip(ceiling.POLLS_US, reversed(ceiling.POLLS_US), strict=True))
    run.samples = [replace(each, server=swap.get(each.server, each.server)) for each in run.samples]
    assert last_columns(run) == last_columns(recorded_run())


def test_table_without_peers_has_no_ceiling() -> None:
    run = recorded_run()
    run.samples = [each for each in run.samples if each.server in (*ceiling.POLLS_US, "nbdimg")]
    run.missing = dict.fromkeys(list(run.servers)[3:], "not installed")
    run.servers = dict(list(run.servers.items())[:3])
    assert last_columns(run) == ["-", "-", "0.77 (0.60–0.92)", "-"]


def test_table_failed_round_is_said_beside_the_figure() -> None:
    run = recorded_run()
    run.samples[0] = replace(run.samples[0], measurement=None, error="I/O error 5")
    assert ceiling.ceiling_table(run).rows[0][2] == "127.5k (failed)"


def test_cells_are_those_of_the_throughput_table_and_a_lone_write() -> None:
    assert [cell.name for cell in CEILING_CELLS[-2:]] == ["1m-write-8", "4k-randwrite-1"]
    assert CEILING_CELLS[-1].depth == CEILING_CELLS[-1].connections == 1


def test_no_compiler_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ceiling.main([]) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert text == "bench: there is no C compiler (cc) for the bare server: install gcc and libc6-dev"


def test_source_that_does_not_compile_gives_the_compilers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_program("cc")
    source = tmp_path / "broken.c"
    source.write_text("int main(void) { return nothing; }\n")
    monkeypatch.setattr(ceiling, "SOURCE", source)
    with pytest.raises(ValueError, match=r"cc does not compile broken\.c: (.|\n)*nothing"):
        ceiling.bare_servers(tmp_path)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture(params=[0, 1], ids=list(ceiling.POLLS_US))
def socket_path(request: pytest.FixtureRequest, image: Path) -> Iterator[str]:
    require_program("cc")
    with ceiling.bare_servers(image.parent)[request.param].start(image) as server:
        yield server.uri.partition("socket=")[2]


def test_bare_server_serves_other_projects_clients(socket_path: str, image: Path) -> None:
    """`nbdcopy` has 64 requests of 256 KiB in flight on each of four connections: more than any buffer holds."""
    nbdinfo, nbdcopy, qemu_io = (require_program(name) for name in ("nbdinfo", "nbdcopy", "qemu-io"))
    uri = f"nbd+unix:///?socket={socket_path}"
    assert subprocess.check_output([nbdinfo, "--size", uri], text=True).strip() == str(SIZE)
    copy = image.with_name("copy")
    subprocess.run([nbdcopy, uri, copy], check=True)
    assert copy.read_bytes() == image.read_bytes()
    copy.write_bytes(os.urandom(SIZE))
    subprocess.run([nbdcopy, copy, uri], check=True)
    assert copy.read_bytes() == image.read_bytes()
    words = ["-c", "write -P 5 1000k 2M", "-c", "read -P 5 1000k 2M"]
    done = subprocess.check_output([qemu_io, "-f", "raw", *words, uri], text=True)
    assert "verification failed" not in done
    assert image.read_bytes() == copy.read_bytes()[: 1000 * KIB] + b"\5" * 2 * MIB + copy.read_bytes()[3048 * KIB :]


def test_bare_server_answers_a_queue_as_if_one_by_one(socket_path: str, image: Path) -> None:
    """Sizes from a byte to beyond what is gathered, in bursts that are cut anywhere."""
    source = random.Random(SEED)
    model = bytearray(image.read_bytes())
    with Client(socket_path) as client:
        client.greet()
        client.negotiate(structured=False)
        for size_max in (512, 20 * KIB, 300 * KIB):
            wanted = {}
            requests = []
            for _ in range(50):
                length = source.randrange(1, size_max)
                offset = source.randrange(SIZE - length)
                data = source.randbytes(length) if source.random() < 0.3 else b""
                request = client.new_request(Command.WRITE if data else Command.READ, offset, length, 0, data)
                wanted[request.cookie] = b"" if data else bytes(model[offset : offset + length])
                model[offset : offset + len(data)] = data
                requests.append(request)
            with ThreadPoolExecutor(1) as sender:
                sender.submit(client.send_requests, requests)
                replies = {reply.cookie: reply for reply in (client.read_reply() for _ in requests)}
            assert not any(reply.error for reply in replies.values())
            assert {cookie: reply.data for cookie, reply in replies.items()} == wanted
    assert image.read_bytes() == model


def test_bare_server_read_that_fails_is_no_speed(socket_path: str) -> None:
    with Client(socket_path) as client:
        client.greet()
        client.negotiate(structured=False)
        assert client.request(Command.READ, SIZE - 512, 4096).error == EIO
        assert client.request(Command.READ, SIZE - 512, 512).error == 0


def test_run_is_measured_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cc", "fio", "nbdkit"):
        require_program(name)
    monkeypatch.setattr(ceiling, "IMAGE_SIZE", SIZE)
    monkeypatch.setattr(ceiling, "SERVERS", PEERS[-1:])
    words = ["--rounds", "1", "--seconds", "0.1", "--cells", "4k-randwrite-1", "--output", str(tmp_path)]
    assert ceiling.main(words) == 0
    run = Run.from_json((tmp_path / "ceiling.json").read_text())
    assert [sample.server for sample in run.samples] == [*ceiling.POLLS_US, "nbdkit file"]
    assert f"python -m bench.ceiling {' '.join(words)}" in (tmp_path / "ceiling.md").read_text()
    assert "| 4 KiB random write, depth 1 | IOPS |" in (tmp_path / "ceiling.md").read_text()
