"""Every 512-byte sector of a live export is an atomic register across connections (specification of the overlap queue).

Four connections with four requests in flight each read and write a few hot sectors; every write has its own stamp. The
recorded history of each sector has to be linearizable, and no read may return a torn sector. The image lies on a disk
file system: ext4 lets a read see half of a write unless the server orders them, tmpfs hides that.
"""

from __future__ import annotations

import itertools
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.live import assert_alive, is_on_tmpfs
from tests.support.linearizability import INITIAL, SECTOR_SIZE, Operation, stamped, stamps, violation
from tests.support.rawclient import Client
from tests.support.rawprotocol import Command, Request
from tests.support.server import NbdimgServer

SEED = int(os.environ.get("NBDIMG_TEST_SEED", "20"))
CONNECTIONS = (("simple", False), ("simple", False), ("structured", False), ("extended", True))
REQUESTS_PER_CONNECTION = 15_000
DEPTH = 4
SECTORS = 128
SECTORS_PER_REQUEST_MAX = 16
HISTORIES = 300
STALE_VERSIONS = 8


# The checker, on histories that are known


def valid_history(generator: random.Random, operation_count: int = 120, overlap: int = 4) -> list[Operation]:
    """A register, atomic by construction: each operation takes effect at its own instant, inside its interval."""
    history: list[Operation] = []
    current = INITIAL
    for index in range(operation_count):
        instant = 100 * (index + 1)
        invoked = instant - generator.randrange(1, 100 * overlap)
        returned = instant + generator.randrange(1, 100 * overlap)
        is_write = generator.random() < 0.5
        if is_write:
            current = index + 1
        history.append(Operation(is_write, current, invoked, returned))
    return history


def with_a_stale_read(history: list[Operation], generator: random.Random) -> list[Operation]:
    """One read returns a value `STALE_VERSIONS` writes old that another write has replaced before the read began."""
    writes = [operation for operation in history if operation.is_write]
    candidates = []
    for position, operation in enumerate(history):
        if operation.is_write:
            continue
        finished = [write for write in writes if write.returned < operation.invoked]
        if len(finished) > STALE_VERSIONS:
            old = finished[-1 - STALE_VERSIONS]
            if any(old.returned < write.invoked for write in finished):
                candidates.append((position, old.value))
    position, value = generator.choice(candidates)
    stale = history[position]
    return [*history[:position], Operation(False, value, stale.invoked, stale.returned), *history[position + 1 :]]


def test_checker_accepts_atomic_histories_and_rejects_each_with_one_stale_read() -> None:
    for seed in range(SEED, SEED + HISTORIES):
        generator = random.Random(seed)
        history = valid_history(generator)
        assert violation(history) is None, f"seed {seed}"
        assert violation(with_a_stale_read(history, generator)) is not None, f"seed {seed}"


def is_linearizable_by_search(history: list[Operation]) -> bool:
    """The definition itself: some order that respects real time makes each read return the last write."""
    for order in itertools.permutations(history):
        current = INITIAL
        for index, operation in enumerate(order):
            if any(later.returned < operation.invoked for later in order[index + 1 :]):
                break
            if operation.is_write:
                current = operation.value
            elif operation.value != current:
                break
        else:
            return True
    return False


def test_checker_agrees_with_an_exhaustive_search_on_small_histories() -> None:
    generator = random.Random(SEED)
    verdicts = {True: 0, False: 0}
    for _ in range(1500):
        times = generator.sample(range(100), 10)
        spans = [sorted(times[index : index + 2]) for index in range(0, 10, 2)]
        history = []
        for index, (invoked, returned) in enumerate(spans):
            is_write = index < 2
            value = index + 1 if is_write else generator.choice([INITIAL, 1, 2])
            history.append(Operation(is_write, value, invoked, returned))
        expected = is_linearizable_by_search(history)
        verdicts[expected] += 1
        assert (violation(history) is None) == expected, history
    assert min(verdicts.values()) > 100


def test_checker_rejects_unknown_values_and_reads_from_the_future() -> None:
    write = Operation(True, 7, 100, 200)
    assert violation([write, Operation(False, 8, 300, 400)]) is not None
    assert violation([write, Operation(False, 7, 10, 20)]) is not None
    assert violation([write, Operation(False, 7, 10, 150)]) is None
    assert violation([write, Operation(False, INITIAL, 201, 300)]) is not None


def test_torn_sector_is_seen_at_every_cut() -> None:
    old, new = 0x1111111111111111, 0x2222222222222222
    whole = stamped(old, 3), stamped(new, 3)
    assert stamps(whole[1][:SECTOR_SIZE] + whole[0][SECTOR_SIZE:]) == [new, old, old]
    for cut in range(SECTOR_SIZE + 1, 2 * SECTOR_SIZE):
        assert stamps(whole[1][:cut] + whole[0][cut:]) == [new, None, old]


# The live server


class Worker(threading.Thread):
    """One connection's requests; afterwards `history` holds (sector, operation) and `torn` the torn sectors read."""

    def __init__(self, address: str, index: int) -> None:
        super().__init__(name=f"connection {index}")
        self.history: list[tuple[int, Operation]] = []
        self.torn: list[int] = []
        self.failure: Exception | None = None
        self._index = index
        self._generator = random.Random(f"{SEED} {index}")
        form, extended = CONNECTIONS[index]
        self._client = Client(address)
        self._client.greet()
        self._client.negotiate("disk", structured=form != "simple", extended=extended)
        self._in_flight: dict[int, tuple[Request, int, int]] = {}

    def run(self) -> None:
        try:
            for sequence in range(REQUESTS_PER_CONNECTION):
                if len(self._in_flight) == DEPTH:
                    self._receive()
                self._submit(self._index << 40 | sequence + 1)
            while self._in_flight:
                self._receive()
        except Exception as failure:
            self.failure = failure
        finally:
            self._client.close()

    def _submit(self, stamp: int) -> None:
        count = self._generator.randint(1, SECTORS_PER_REQUEST_MAX)
        first = self._generator.randrange(SECTORS - count + 1)
        offset, length = first * SECTOR_SIZE, count * SECTOR_SIZE
        if self._generator.random() < 0.5:
            request = self._client.new_request(Command.WRITE, offset, length, payload=stamped(stamp, count))
        else:
            request = self._client.new_request(Command.READ, offset, length)
        invoked = time.monotonic_ns()
        self._in_flight[request.cookie] = (request, stamp, invoked)
        self._client.send_requests([request])

    def _receive(self) -> None:
        reply = self._client.read_reply()
        returned = time.monotonic_ns()
        assert reply.error == 0, reply
        request, stamp, invoked = self._in_flight.pop(reply.cookie)
        first = request.offset // SECTOR_SIZE
        if request.command == Command.WRITE:
            operation = Operation(True, stamp, invoked, returned)
            self.history += [(first + index, operation) for index in range(request.length // SECTOR_SIZE)]
            return
        for index, value in enumerate(stamps(reply.data)):
            if value is None:
                self.torn.append(first + index)
            else:
                self.history.append((first + index, Operation(False, value, invoked, returned)))


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory on a disk file system: pytest's, or /var/tmp when that is a tmpfs."""
    if not is_on_tmpfs(tmp_path):
        yield tmp_path
        return
    assert not is_on_tmpfs(Path("/var/tmp")), "no directory on a disk file system"
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        yield Path(name)


def test_sectors_are_atomic_registers_across_connections(directory: Path) -> None:
    image = directory / "disk.raw"
    image.write_bytes(bytes(SECTORS * SECTOR_SIZE))
    with NbdimgServer(f"disk={image}", options=["--format=raw"]) as server:
        workers = [Worker(server.socket_path, index) for index in range(len(CONNECTIONS))]
        start = time.monotonic()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        seconds = time.monotonic() - start
        failures = [worker.failure for worker in workers if worker.failure is not None]
        assert not failures
        assert_alive(server, server.socket_path)
    registers: list[list[Operation]] = [[] for _ in range(SECTORS)]
    for worker in workers:
        for sector, operation in worker.history:
            registers[sector].append(operation)
    violations = {sector: found for sector, history in enumerate(registers) if (found := violation(history))}
    torn = sum(len(worker.torn) for worker in workers)
    request_count = REQUESTS_PER_CONNECTION * len(workers)
    operation_count = sum(map(len, registers))
    print(f"seed {SEED}: {request_count} requests in {seconds:.1f} s, {operation_count} sector operations, {torn} torn")
    assert operation_count > request_count * SECTORS_PER_REQUEST_MAX / 4
    assert torn == 0
    assert violations == {}
