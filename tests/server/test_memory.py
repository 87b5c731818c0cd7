"""What clients can make the server hold: memory per connection, replies that nobody reads, and when it is given back.

Memory is RssAnon + RssShmem (`tests.support.rss`), so the page cache does not count. The image is dense, because a
hole costs no reply. qemu-nbd 7.2, measured by the same harness, is the control: it buffers 16 replies of 32 MiB.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.server.live import assert_alive, serve_time
from tests.support.rawclient import Client, connect_negotiated
from tests.support.rawprotocol import KIB, MIB, Command, CommandFlag, Option, option_bytes
from tests.support.rss import PeakMemory, descriptor_count, memory, settled_memory, thread_count, wait_until
from tests.support.server import NbdimgServer, PeerServer, ServerProcess

IDLE_COUNT = 1000
IDLE_LIMIT = 12 * KIB
UNNEGOTIATED_LIMIT = 8 * KIB
HOG_READ = 32 * MIB
HOG_COUNT = 64
HOG_LIMIT = 40 * MIB
FOUR_HOGS_LIMIT = 300 * MIB
SMALL_COUNT = 10_000
SMALL_LIMIT = 4 * MIB
OPTIONS_LIMIT = MIB
FREED_LIMIT = 2 * MIB  # what may stay over the start after the hogs left
FREED_TIME_S = 1.0
KEPT_READ = 4 * MIB
KEPT_TIME_S = 10.0
HONEST_LIMIT_S = 0.02
CONTROL_GROWTH = 100 * MIB


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "disk.raw"
    path.write_bytes(bytes(range(1, 256)) * (HOG_READ // 255 + 1))
    return path


@pytest.fixture
def server(image: Path) -> Iterator[NbdimgServer]:
    options = [
        "--format=raw",
        f"--connections-max={IDLE_COUNT + 100}",
        "--handshake-timeout=60",
        "--request-timeout=60",
    ]
    with NbdimgServer(f"disk={image}", options=options) as running:
        for _ in range(20):
            serve_time(running.socket_path)
        yield running


def hog(socket_path: str, structured: bool = True) -> Client:
    """A client that has asked for 64 x 32 MiB and reads nothing."""
    client = Client(socket_path)
    client.greet()
    client.negotiate("disk", structured=structured)
    client.pipeline(client.reads(HOG_COUNT, HOG_READ))
    return client


def hog_growth(server: ServerProcess, socket_path: str, count: int, structured: bool = True) -> int:
    """Bytes by which the server grew at most under `count` hogs; they stay connected until it settled."""
    with PeakMemory(server.pid) as peak, ExitStack() as hogs:
        for _ in range(count):
            hogs.enter_context(hog(socket_path, structured))
        settled_memory(server.pid)
    return peak.growth


class HonestClient:
    """Context manager: attaches and reads 4 KiB again and again; the rounds' times are kept.

    `typical_s` is their median: one round on a shared machine may wait for the machine, half of them do not.
    """

    def __init__(self, socket_path: str) -> None:
        self.times_s: list[float] = []
        self._path = socket_path
        self._failure: AssertionError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            while not self._stop.wait(0.02) or len(self.times_s) < 5:
                self.times_s.append(serve_time(self._path))
        except AssertionError as failure:
            self._failure = failure

    @property
    def typical_s(self) -> float:
        return statistics.median(self.times_s)

    def __enter__(self) -> HonestClient:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure


def assert_freed(server: ServerProcess, before: int) -> None:
    freed = wait_until(lambda: memory(server.pid) <= before + FREED_LIMIT, FREED_TIME_S)
    assert freed, f"{(memory(server.pid) - before) / MIB:.1f} MiB still held after {FREED_TIME_S} s"


def test_idle_negotiated_connection_costs_12_kib_and_one_descriptor(server: NbdimgServer) -> None:
    before, descriptors, threads = memory(server.pid), descriptor_count(server.pid), thread_count(server.pid)
    with ExitStack() as connections:
        for _ in range(IDLE_COUNT):
            connections.enter_context(connect_negotiated(server.socket_path, "disk"))
        each = (settled_memory(server.pid) - before) / IDLE_COUNT
        print(f"{each / KIB:.1f} KiB per idle negotiated connection")
        assert descriptor_count(server.pid) - descriptors <= IDLE_COUNT + 2
        assert thread_count(server.pid) - threads <= 4
        assert min(serve_time(server.socket_path) for _ in range(5)) <= HONEST_LIMIT_S
        assert each <= IDLE_LIMIT
    assert wait_until(lambda: descriptor_count(server.pid) <= descriptors, 3), "descriptors leak"
    assert_alive(server, server.socket_path)


def test_idle_connection_before_the_handshake_costs_8_kib(server: NbdimgServer) -> None:
    before = memory(server.pid)
    with ExitStack() as connections:
        for _ in range(IDLE_COUNT):
            connections.enter_context(Client(server.socket_path)).greet(None)
        each = (settled_memory(server.pid) - before) / IDLE_COUNT
        print(f"{each / KIB:.1f} KiB per silent connection")
        assert each <= UNNEGOTIATED_LIMIT


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_hog_that_never_reads_is_held_to_40_mib_and_freed(server: NbdimgServer, structured: bool) -> None:
    before = memory(server.pid)
    with HonestClient(server.socket_path) as honest:
        growth = hog_growth(server, server.socket_path, 1, structured)
    print(f"{growth / MIB:.1f} MiB for one hog, honest client {honest.typical_s * 1000:.1f} ms")
    assert_freed(server, before)
    assert growth <= HOG_LIMIT
    assert honest.typical_s <= HONEST_LIMIT_S
    assert_alive(server, server.socket_path)


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_four_hogs_are_held_to_300_mib_and_freed(server: NbdimgServer, structured: bool) -> None:
    before = memory(server.pid)
    with HonestClient(server.socket_path) as honest:
        growth = hog_growth(server, server.socket_path, 4, structured)
    print(f"{growth / MIB:.1f} MiB for four hogs, honest client {honest.typical_s * 1000:.1f} ms")
    assert_freed(server, before)
    assert growth <= FOUR_HOGS_LIMIT
    assert honest.typical_s <= HONEST_LIMIT_S
    assert_alive(server, server.socket_path)


def test_ten_thousand_small_reads_never_read_hold_4_mib(server: NbdimgServer) -> None:
    before = memory(server.pid)
    with PeakMemory(server.pid) as peak, connect_negotiated(server.socket_path, "disk") as client:
        accepted = client.pipeline(client.reads(SMALL_COUNT, 4 * KIB))
        settled_memory(server.pid)
        assert min(serve_time(server.socket_path) for _ in range(5)) <= HONEST_LIMIT_S
    print(f"{peak.growth / MIB:.2f} MiB, {accepted} bytes of requests accepted")
    assert peak.growth <= SMALL_LIMIT
    assert_freed(server, before)


def test_five_thousand_options_never_read_hold_1_mib(server: NbdimgServer) -> None:
    with PeakMemory(server.pid) as peak, Client(server.socket_path) as client:
        client.greet()
        client.send_while_taken(option_bytes(Option.LIST) * 5000)
        settled_memory(server.pid)
    assert peak.growth <= OPTIONS_LIMIT
    assert_alive(server, server.socket_path)


def test_hogs_that_come_and_go_leave_nothing_behind(server: NbdimgServer) -> None:
    with hog(server.socket_path):
        settled_memory(server.pid)
    before, descriptors = settled_memory(server.pid), descriptor_count(server.pid)
    for _ in range(10):
        with hog(server.socket_path):
            time.sleep(0)
    assert wait_until(lambda: descriptor_count(server.pid) <= descriptors, FREED_TIME_S), "descriptors leak"
    assert_freed(server, before)
    assert_alive(server, server.socket_path)


def test_buffer_of_a_long_read_is_given_back_when_nobody_wants_one_for_a_while(server: NbdimgServer) -> None:
    """It is kept for the next at first; the client stays."""
    with connect_negotiated(server.socket_path, "disk") as client:
        before = memory(server.pid)
        assert len(client.request(Command.READ, 0, KEPT_READ, CommandFlag.DF).data) == KEPT_READ
        assert wait_until(lambda: memory(server.pid) <= before + KEPT_READ // 4, KEPT_TIME_S)


def test_probe_sees_the_growth_of_a_server_without_a_budget(image: Path) -> None:
    argv = ["qemu-nbd", "-t", "-r", "-e", "0", "-f", "raw", "-x", "disk"]
    with PeerServer(lambda path: [*argv, "-k", path, str(image)]) as peer:
        growth = hog_growth(peer, peer.socket_path, 1)
    print(f"qemu-nbd: {growth / MIB:.0f} MiB for one hog")
    assert growth > CONTROL_GROWTH
