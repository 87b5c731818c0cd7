"""The server over a file that fails: what clients are told, and that everybody stays connected."""

from __future__ import annotations

import asyncio
import errno
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdimg.export.export import Export
from nbdimg.export.registry import Registry
from nbdimg.formats.raw import RawDriver
from nbdimg.image.image import Image
from nbdimg.server.server import Server
from nbdimg.storage.memory import MemoryFile
from nbdimg.uri import NbdUri
from tests.support.faultfile import FaultFile
from tests.support.rawclient import Client
from tests.support.rawprotocol import Command, CommandFlag, NbdError, Reply

SIZE = 2 << 20
PATTERN = bytes(range(1, 252)) * (SIZE // 251 + 1)
DIALECTS = ["simple", "structured", "extended"]


class FaultServer:
    """A Server with one export over a FaultFile, on a loop in a thread of its own."""

    def __init__(self, socket_path: str) -> None:
        self.socket_path = socket_path
        self.file = FaultFile(MemoryFile(PATTERN[:SIZE]))
        self.failures: Sequence[Exception] = ()
        self.loop_errors: list[str] = []
        self._ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        self._loop, self._stop = self._ready.result(timeout=10)

    async def _main(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self.loop_errors.append(str(context)))
        registry = Registry()
        registry.add(Export("disk", Image(RawDriver(self.file), writable=True), payload_max=64 << 20))
        server = Server(registry)
        server.listen(NbdUri(socket=self.socket_path))
        stop = asyncio.Event()
        self._ready.set_result((loop, stop))
        await stop.wait()
        self.failures = await server.close()

    def stop(self) -> None:
        """May be called again."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=10)
        assert not self._thread.is_alive(), "the server does not stop"
        assert self.loop_errors == []

    def call(self, function: Callable[[], object]) -> None:
        """Have the server's loop call it."""
        self._loop.call_soon_threadsafe(function)

    def connect(self, dialect: str = "structured") -> Client:
        client = Client(self.socket_path, timeout_s=10)
        client.greet()
        is_structured = dialect != "simple"
        contexts = ["base:allocation"] if is_structured else []
        client.negotiate("disk", structured=is_structured, extended=dialect == "extended", contexts=contexts)
        return client


@contextmanager
def fault_server(path: Path) -> Iterator[FaultServer]:
    server = FaultServer(str(path / "s"))
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultServer]:
    with fault_server(tmp_path) as server:
        yield server


def flush(client: Client) -> Reply:
    return client.request(Command.FLUSH)


def assert_nothing_is_in_flight(client: Client) -> None:
    """A request that was forgotten would hold up the end of its connection."""
    client.disconnect()
    assert client.wait_closed(10) is not None


# READ


@pytest.mark.parametrize("length", [512, 4096, 256 << 10, (256 << 10) + 512, 1 << 20])
@pytest.mark.parametrize("flags", [0, CommandFlag.DF])
@pytest.mark.parametrize("path", ["try_pread", "pread"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_read_error_is_told_in_the_negotiated_form_and_the_connection_lives(
    server: FaultServer, dialect: str, path: str, flags: int, length: int
) -> None:
    if dialect == "simple" and flags:
        pytest.skip("DF needs structured replies")
    with server.connect(dialect) as client:
        server.file.slow_only = path == "pread"
        server.file.fail(path, errno.EIO)
        reply = client.read(8192, length, flags)
        server.file.heal()
        if path == "try_pread" and reply.error == 0:
            assert dialect == "simple" or flags, "the whole was read by a worker"
        else:
            assert reply.error == NbdError.EIO
            if reply.error_offset is not None:
                assert reply.error_offset == 8192
            if dialect != "simple":
                assert reply.error_text
        assert client.read(8192, 512).data == PATTERN[8192:8704]
        assert_nothing_is_in_flight(client)


def test_slow_read_error_names_the_offset(server: FaultServer) -> None:
    with server.connect() as client:
        server.file.slow_only = True
        server.file.fail("pread", errno.EIO)
        reply = client.read(8192, 4096)
        assert (reply.error, reply.error_offset) == (NbdError.EIO, 8192)


def test_read_error_in_a_later_piece_names_where_the_data_ends(server: FaultServer) -> None:
    """T2: what came before the error stays valid."""
    with server.connect() as client:
        server.file.slow_only = True
        client.read(0, 512)
        before = server.file.calls.count("pread")
        assert before == 1
        server.file.fail_at(1, errno.EIO)
        reply = client.read(0, 1 << 20)
        assert reply.error == NbdError.EIO
        assert reply.error_offset == 256 << 10
        server.file.heal()
        assert client.read(0, 1 << 20).data == PATTERN[: 1 << 20]


def test_read_error_of_one_connection_leaves_others_alone(server: FaultServer) -> None:
    with server.connect() as one, server.connect("simple") as other:
        server.file.fail("try_pread", errno.EIO)
        assert one.read(0, 512).error == NbdError.EIO
        server.file.heal()
        assert other.read(0, 512).data == PATTERN[:512]


def test_slow_file_delays_only_what_waits_for_it(server: FaultServer) -> None:
    """A write that hangs in storage: reads elsewhere are answered, a read of its sector when it is done."""
    release = asyncio.Event()

    async def hang(method: str) -> None:
        if method == "pwrite":
            await release.wait()

    with server.connect() as client, server.connect() as neighbour:
        server.file.slow_only = True
        server.file.delay = hang
        writing = client.new_request(Command.WRITE, 0, 512, payload=b"w" * 512)
        behind = client.new_request(Command.READ, 0, 512)
        elsewhere = client.new_request(Command.READ, 4096, 512)
        client.send_requests([writing, behind, elsewhere])
        assert client.read_reply().cookie == elsewhere.cookie
        assert neighbour.read(8192, 512).data == PATTERN[8192:8704]
        server.call(release.set)
        replies = {reply.cookie: reply for reply in client.read_replies(2)}
        assert replies[writing.cookie].error == 0
        assert replies[behind.cookie].data == b"w" * 512


@pytest.mark.parametrize("offset", [0, 256])
def test_sector_at_the_seam_of_a_long_reads_pieces_is_never_torn(server: FaultServer, offset: int) -> None:
    """Every 512-byte sector is an atomic register, also for a read sent in pieces from an odd offset: a write of
    the sector around the first seam arrives while the first piece is read."""
    release = asyncio.Event()
    is_reading = threading.Event()

    async def hang_first(method: str) -> None:
        if method == "pread" and not is_reading.is_set():
            is_reading.set()
            await release.wait()

    seam = 256 << 10
    with server.connect() as client, server.connect() as neighbour:
        server.file.slow_only = True
        server.file.delay = hang_first
        client.send_requests([client.new_request(Command.READ, offset, seam + 1024)])
        assert is_reading.wait(10)
        writing = neighbour.new_request(Command.WRITE, seam, 512, payload=b"w" * 512)
        elsewhere = neighbour.new_request(Command.READ, 1 << 20, 512)
        neighbour.send_requests([writing, elsewhere])
        first = neighbour.read_reply()
        if first.cookie == writing.cookie:
            assert neighbour.read_reply().cookie == elsewhere.cookie
        server.call(release.set)
        sector = client.read_reply().data[seam - offset : seam - offset + 512]
        if first.cookie == elsewhere.cookie:
            assert neighbour.read_reply().error == 0
        assert sector in (b"w" * 512, PATTERN[seam : seam + 512])


# Errors of changes


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("path", ["try_pwrite", "pwrite"])
@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, NbdError.ENOSPC),
        (errno.EDQUOT, NbdError.ENOSPC),
        (errno.EFBIG, NbdError.ENOSPC),
        (errno.EIO, NbdError.EIO),
        (errno.EROFS, NbdError.EPERM),
        (errno.ENOMEM, NbdError.ENOMEM),
        (errno.ESTALE, NbdError.EIO),
    ],
)
def test_write_error_is_told_by_its_number(
    server: FaultServer, number: int, told: NbdError, path: str, dialect: str
) -> None:
    with server.connect(dialect) as client:
        server.file.slow_only = path == "pwrite"
        server.file.fail(path, number)
        assert client.write(4096, b"x" * 512).error == told
        server.file.heal()
        assert client.write(4096, b"y" * 512).error == 0
        assert client.read(4096, 512).data == b"y" * 512
        assert_nothing_is_in_flight(client)


def test_failed_requests_are_logged_three_times_a_minute_and_wrong_ones_are_not(
    server: FaultServer, caplog: pytest.LogCaptureFixture
) -> None:
    with server.connect() as client:
        server.file.fail("try_pwrite", errno.ENOSPC)
        server.file.fail("try_pread", errno.EIO)
        assert client.write(0, b"x" * 512).error == NbdError.ENOSPC
        assert client.read(4096, 512).error == NbdError.EIO
        assert client.read(SIZE, 512).error == NbdError.EINVAL
        for _ in range(100):
            client.write(1024, b"x" * 512)
    server.stop()
    failed = [record.getMessage() for record in caplog.records if "failed" in record.getMessage()]
    assert failed == [
        "export 'disk': WRITE of 512 bytes at 0 failed: No space left on device",
        "export 'disk': READ of 512 bytes at 4096 failed: Input/output error",
        "export 'disk': WRITE of 512 bytes at 1024 failed: No space left on device",
    ]
    assert "99 more lines from connections were not logged" in caplog.messages


def test_write_enospc_is_28_on_the_wire(server: FaultServer) -> None:
    with server.connect("simple") as client:
        server.file.fail("try_pwrite", errno.ENOSPC)
        assert client.write(0, b"x").error == 28


@pytest.mark.parametrize(("command", "method"), [(Command.TRIM, "punch"), (Command.WRITE_ZEROES, "punch")])
def test_trim_and_zero_errors_are_told(server: FaultServer, command: int, method: str) -> None:
    with server.connect() as client:
        server.file.fail(method, errno.EIO)
        assert client.request(command, 0, 4096).error == NbdError.EIO
        server.file.heal()
        assert client.request(command, 0, 4096).error == 0


def test_block_status_error_is_told(server: FaultServer) -> None:
    with server.connect() as client:
        server.file.fail("try_data_extent", errno.EIO)
        assert client.request(Command.BLOCK_STATUS, 0, 4096).error == NbdError.EIO
        assert client.read(0, 512).error == NbdError.EIO
        server.file.heal()
        assert client.request(Command.BLOCK_STATUS, 0, 4096).error == 0


def test_cache_error_is_told(server: FaultServer) -> None:
    with server.connect() as client:
        server.file.fail("prefetch", errno.EIO)
        assert client.request(Command.CACHE, 0, 4096).error == NbdError.EIO


def test_fast_zero_unsupported_is_enotsup(server: FaultServer) -> None:
    with server.connect() as client:
        server.file.unsupported = {"punch", "zero"}
        assert client.request(Command.WRITE_ZEROES, 0, 4096, CommandFlag.FAST_ZERO).error == NbdError.ENOTSUP
        assert client.read(0, 4096).data == PATTERN[:4096]
        assert client.request(Command.WRITE_ZEROES, 0, 4096).error == 0
        assert client.read(0, 4096).data == bytes(4096)


# A failed barrier


@pytest.mark.parametrize("how", ["flush", "fua"])
def test_failed_barrier_fails_every_later_change_on_every_connection(server: FaultServer, how: str) -> None:
    """F2, as clients see it: also those that come later, although the file works again."""
    with server.connect() as first, server.connect("simple") as second:
        assert first.write(0, b"before").error == 0
        server.file.fail("fdatasync", errno.EIO)
        failed = flush(first) if how == "flush" else first.write(0, b"x", CommandFlag.FUA)
        assert failed.error == NbdError.EIO
        assert "flush failed" in failed.error_text
        server.file.heal()
        with server.connect("extended") as third:
            for client in (first, second, third):
                for _ in range(2):
                    assert flush(client).error == NbdError.EIO
                    assert client.write(512, b"y").error == NbdError.EIO
                    assert client.write(512, b"y", CommandFlag.FUA).error == NbdError.EIO
                    assert client.request(Command.TRIM, 0, 512).error == NbdError.EIO
                    assert client.request(Command.WRITE_ZEROES, 0, 512).error == NbdError.EIO
                assert client.read(1024, 512).data == PATTERN[1024:1536]
    server.stop()
    assert len(server.failures) == 1


def test_failed_barrier_fails_all_flushes_that_waited_for_it(server: FaultServer) -> None:
    with server.connect() as client:
        assert client.write(0, b"x").error == 0
        server.file.fail("fdatasync", errno.EIO)
        client.send_requests([client.new_request(Command.FLUSH) for _ in range(20)])
        assert {reply.error for reply in client.read_replies(20)} == {NbdError.EIO}


def test_control_without_a_fault_nothing_is_refused(server: FaultServer) -> None:
    with server.connect() as client:
        assert client.write(0, b"x", CommandFlag.FUA).error == 0
        assert flush(client).error == 0
    server.stop()
    assert list(server.failures) == []


# Every call in turn


def workload(client: Client, dialect: str) -> list[int]:
    """The errors of a little of everything, pipelined in part."""
    requests = [
        client.new_request(Command.READ, 0, 4096),
        client.new_request(Command.WRITE, 8192, 4096, payload=b"w" * 4096),
        client.new_request(Command.READ, 4096, 8192),
        client.new_request(Command.TRIM, 8192, 4096),
        client.new_request(Command.WRITE_ZEROES, 100, 5000, CommandFlag.NO_HOLE),
        client.new_request(Command.READ, 0, 600 << 10),
        client.new_request(Command.CACHE, 0, 4096),
        client.new_request(Command.WRITE, 4096, 100, CommandFlag.FUA, b"f" * 100),
        client.new_request(Command.FLUSH),
    ]
    if dialect != "simple":
        requests.append(client.new_request(Command.BLOCK_STATUS, 0, 65536))
    client.send_requests(requests)
    return [reply.error for reply in client.read_replies(len(requests))]


@pytest.mark.parametrize("slow_only", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_eio_at_each_call_of_a_workload_never_costs_a_connection(tmp_path: Path, dialect: str, slow_only: bool) -> None:
    """The k-th call of the file fails, for every k; a neighbour and a newcomer read on."""
    for index in itertools.count():
        assert index < 100
        directory = tmp_path / str(index)
        directory.mkdir()
        with fault_server(directory) as server, server.connect(dialect) as client, server.connect() as neighbour:
            server.file.slow_only = slow_only
            server.file.fail_at(index, errno.EIO)
            errors = workload(client, dialect)
            is_reached = len(server.file.calls) > index
            server.file.heal()
            server.file.slow_only = False
            assert set(errors) <= {0, NbdError.EIO}
            assert is_reached == (NbdError.EIO in errors), f"call {index}: {server.file.calls[index]}"
            for survivor in (client, neighbour):
                assert survivor.read(1 << 20, 512).data == PATTERN[1 << 20 : (1 << 20) + 512]
            with server.connect() as newcomer:
                assert newcomer.read(1 << 20, 512).error == 0
        if not is_reached:
            return
