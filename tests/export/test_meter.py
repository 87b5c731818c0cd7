"""What is counted on the request path, against what a client has really asked."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from time import perf_counter

import pytest

from nbdimg.config import ExportConfig, ServerConfig
from nbdimg.export.export import Export
from nbdimg.export.meter import Meter, Tally
from nbdimg.formats.raw import RawDriver
from nbdimg.histogram import BOUNDS_S, Histogram
from nbdimg.image.image import Image
from nbdimg.storage.memory import MemoryFile
from nbdimg.storage.posix import PosixFile
from nbdimg.uri import NbdUri
from nbdimg.wire.constants import NbdError
from nbdimg.wire.messages import Request, SimpleReplies
from tests.server.tls_live import LiveServer
from tests.support.rawclient import Client
from tests.support.rawprotocol import Command, CommandFlag

READ, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = 0, 1, 3, 4, 5, 6, 7
KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB


def live(directory: Path) -> LiveServer:
    path = directory / "disk.raw"
    path.write_bytes(b"d" * SIZE)
    os.sync()
    uri = NbdUri(socket=str(directory / "s"))
    return LiveServer(ServerConfig((ExportConfig(str(path), "disk", "raw"),), (uri,)))


def meter_of(server: LiveServer) -> Meter:
    """The only export's, when the loop has ended what it was at."""
    server.now(lambda: None)
    (export,) = server.service.registry
    return export.meter


def asked(meter: Meter) -> dict[int, tuple[int, int, dict[NbdError, int]]]:
    """(requests, bytes, errors) of each command that was used; -1 stands for what is no command."""
    used = {**meter.commands, -1: meter.unknown}
    return {number: (each.count, each.bytes, each.errors) for number, each in used.items() if each.count}


# Histograms


def test_histogram_counts_what_is_at_most_the_bound() -> None:
    times = Histogram()
    for seconds in (0.0, 100e-6, 101e-6, 1e-3, 1.0, 1.5):
        times.add(seconds)
    assert times.counts == [2, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    assert times.count == 6
    assert times.sum_s == pytest.approx(2.501201)
    assert list(BOUNDS_S) == sorted(BOUNDS_S)


# The fast lane's runs


def test_run_tells_reads_from_writes_and_headers_from_data() -> None:
    """Requests are 28 bytes and simple replies 16: 3 READs of 4096 bytes in all, 2 WRITEs of 1000."""
    meter = Meter()
    tally = Tally(meter, 28, SimpleReplies())
    tally.arrived_s = perf_counter() - 0.004
    tally.ran(5, 2, 5 * 28 + 1000, 5 * 16 + 4096)
    assert asked(meter) == {READ: (3, 4096, {}), WRITE: (2, 1000, {})}
    assert (tally.read_bytes, tally.written_bytes) == (4096, 1000)
    assert meter.commands[READ].sum_s >= 3 * 0.004
    assert sum(meter.commands[READ].counts[:5]) == 0, "4 ms are more than 2.5 ms"


def test_run_that_takes_no_time_counts_in_the_first_bucket() -> None:
    meter = Meter()
    tally = Tally(meter, 28, SimpleReplies())
    tally.arrived_s = perf_counter() + 1
    tally.ran(1, 0, 28, 16 + 512)
    assert meter.commands[READ].counts[0] == 1


def test_request_that_failed_adds_an_error_and_no_bytes_and_neither_does_a_flush() -> None:
    meter = Meter()
    tally = Tally(meter, 28, SimpleReplies())
    tally.answered(Request(WRITE, 0, 1, 0, 512), NbdError.ENOSPC)
    tally.answered(Request(WRITE, 0, 1, 0, 512), NbdError.ENOSPC)
    tally.answered(Request(99, 0, 1, 0, 0), NbdError.EINVAL)
    tally.answered(Request(FLUSH, 0, 1, 0, 4096))
    assert asked(meter) == {
        WRITE: (2, 0, {NbdError.ENOSPC: 2}),
        FLUSH: (1, 0, {}),
        -1: (1, 0, {NbdError.EINVAL: 1}),
    }
    assert tally.written_bytes == 0


# A whole server


@pytest.mark.parametrize(("structured", "extended"), [(False, False), (True, False), (True, True)])
def test_requests_of_a_client_are_counted_whichever_way_they_are_answered(
    tmp_path: Path, structured: bool, extended: bool
) -> None:
    """Plain ones in a queue, with a flag, long ones, none of a byte, refused ones."""
    with live(tmp_path) as server, Client(server.address) as client:
        client.greet()
        client.negotiate("disk", structured=structured, extended=extended)
        queue = []
        for index in range(10):
            queue.append(client.new_request(Command.READ, index * 4096, 4096))
            queue.append(client.new_request(Command.WRITE, index * 512, 512, payload=b"x" * 512))
        client.send_requests(queue)
        assert [reply.error for reply in client.read_replies(20)] == [0] * 20
        assert client.read(0, 2 * MIB).error == 0
        assert client.read(0, 0).error == 0
        assert client.write(0, b"y" * 4096, CommandFlag.FUA).error == 0
        assert client.write(0, b"z" * 300 * KIB).error == 0
        assert client.request(Command.FLUSH).error == 0
        assert client.request(Command.TRIM, 0, MIB).error == 0
        assert client.request(Command.CACHE, 0, 8192).error == 0
        assert client.request(Command.WRITE_ZEROES, 0, 12288).error == 0
        assert client.read(SIZE, 512).error == NbdError.EINVAL
        assert client.write(SIZE, b"x" * 512).error == NbdError.ENOSPC
        assert client.request(77, 0, 0).error == NbdError.EINVAL
        meter = meter_of(server)
        assert asked(meter) == {
            READ: (13, 10 * 4096 + 2 * MIB, {NbdError.EINVAL: 1}),
            WRITE: (13, 10 * 512 + 4096 + 300 * KIB, {NbdError.ENOSPC: 1}),
            FLUSH: (1, 0, {}),
            TRIM: (1, MIB, {}),
            CACHE: (1, 8192, {}),
            WRITE_ZEROES: (1, 12288, {}),
            -1: (1, 0, {NbdError.EINVAL: 1}),
        }
        for used in meter.commands.values():
            assert used.count == 0 or 0 < used.sum_s < 600


def test_request_that_fails_in_the_lane_is_counted_once_and_those_before_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try_pread = PosixFile.try_pread

    def failing(self: PosixFile, offset: int, view: memoryview) -> bool:
        if offset == MIB:
            raise OSError(errno.EIO, "Input/output error")
        return try_pread(self, offset, view)

    with live(tmp_path) as server, Client(server.address) as client:
        client.greet()
        client.negotiate("disk")
        monkeypatch.setattr(PosixFile, "try_pread", failing)
        client.send_requests([client.new_request(Command.READ, offset, 512) for offset in (0, 512, MIB, 1024)])
        assert sorted(reply.error for reply in client.read_replies(4)) == [0, 0, 0, NbdError.EIO]
        assert asked(meter_of(server)) == {READ: (4, 3 * 512, {NbdError.EIO: 1})}


def test_flush_is_counted_with_the_barriers_that_it_took(tmp_path: Path) -> None:
    with live(tmp_path) as server, Client(server.address) as client:
        client.greet()
        client.negotiate("disk")
        (export,) = server.service.registry
        for expected in (1, 1, 2):
            if expected == 2:
                assert client.write(0, b"x" * 512).error == 0
            assert client.request(Command.FLUSH).error == 0
            server.now(lambda: None)
            assert export.image.gate.times.count == export.image.sync_times.count == expected
        assert asked(export.meter)[FLUSH] == (3, 0, {})


# Waiting for others


def test_wait_for_an_older_overlapping_request_is_counted_and_no_other() -> None:
    export = Export("e", Image(RawDriver(MemoryFile(bytes(SIZE))), writable=False), payload_max=MIB)

    async def main() -> None:
        older = export.inflight.enter(0, 4096, is_exclusive=True)
        elsewhere = export.read(8192, memoryview(bytearray(512)))
        await elsewhere
        assert export.meter.waits.count == 0
        waiting = asyncio.create_task(export.read(0, memoryview(bytearray(512))))
        await asyncio.sleep(0)
        export.inflight.leave(older)
        await waiting

    asyncio.run(main())
    assert export.meter.waits.count == 1
    assert export.meter.waits.sum_s > 0
