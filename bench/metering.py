"""What metrics cost on the request path: 4 KiB requests with the meter and without it, in one run.

    python -m bench.metering [--seconds S] [--json]

A server and its client are a process each. The client takes turns between three sessions of one export that differ in
their tally alone: a turn is a queue of requests sent at once, timed until the last reply is there. Neighbouring turns
meet the same machine, so their ratio is steady where times are not.

    off         a tally that does nothing
    on          the server as it is
    control     counts each request by itself: must be seen to cost more than `LIMIT`, or the comparison sees nothing
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import socket
import statistics
import struct
import sys
import tempfile
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from time import perf_counter
from unittest import mock

from nbdimg.config import ExportConfig, ServerConfig
from nbdimg.export.meter import Tally
from nbdimg.formats import create_image, open_image
from nbdimg.server.loop import run_loop
from nbdimg.server.service import serving
from nbdimg.uri import NbdUri
from nbdimg.wire.constants import NbdError
from nbdimg.wire.messages import Request

LIMIT = 1.03
"""The meter's share of a 4 KiB request's time is 3 % at most."""

SIZE = 4096
IMAGE_SIZE = 8 << 20
DEPTHS = (1, 16)
ROUNDS = 10
TURNS_MIN = 8
TIMEOUT_S = 60

OPTION_MAGIC = 0x49484156454F5054
REQUEST = struct.Struct(">IHHQQI")
REQUEST_MAGIC = 0x25609513
REPLY_SIZE = 16


class NoTally(Tally):
    """The server without a meter."""

    def ran(self, count: int, write_count: int, request_bytes: int, reply_bytes: int) -> None: ...

    def answered(self, request: Request, error: NbdError | None = None) -> None: ...


class EachTally(Tally):
    """The control: what the lane answers is counted request by request."""

    def ran(self, count: int, write_count: int, request_bytes: int, reply_bytes: int) -> None:
        for index in range(count):
            request = Request(int(index < write_count), 0, 0, 0, SIZE)
            request.arrived_s = self.arrived_s
            self.answered(request)


TALLIES: tuple[type[Tally], ...] = (NoTally, Tally, EachTally)


@dataclass(frozen=True, slots=True)
class Cost:
    """One cell: a request's time without a meter, and with it as a ratio: the median of the rounds, and from which to
    which. `control`: the ratio of the tally that counts each request.
    """

    name: str
    request_us: float
    ratio: float
    ratio_min: float
    ratio_max: float
    control: float


def requests(command: int, depth: int, source: random.Random) -> bytes:
    payload = source.randbytes(SIZE) if command else b""
    offsets = [source.randrange(IMAGE_SIZE // SIZE) * SIZE for _ in range(depth)]
    return b"".join(
        REQUEST.pack(REQUEST_MAGIC, 0, command, cookie, offset, SIZE) + payload for cookie, offset in enumerate(offsets)
    )


def connected(path: str, name: str) -> socket.socket:
    """A client behind the shortest handshake: flags, EXPORT_NAME, simple replies."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(TIMEOUT_S)
    sock.connect(path)
    sock.recv(18, socket.MSG_WAITALL)
    sock.sendall(struct.pack(">IQII", 3, OPTION_MAGIC, 1, len(name)) + name.encode())
    sock.recv(10, socket.MSG_WAITALL)
    return sock


def ask(path: str, name: str, command: int, depth: int, seconds: float, results: Pipe) -> None:
    """The client's process: for each round and session, what a turn takes when the machine does not disturb it: the
    first quartile of its turns.
    """
    socks = [connected(path, name) for _ in TALLIES]
    reply_size = depth * (REPLY_SIZE if command else REPLY_SIZE + SIZE)
    source = random.Random(1)
    view = memoryview(bytearray(reply_size))
    rounds: list[list[float]] = []
    for _ in range(ROUNDS):
        times: list[list[float]] = [[] for _ in socks]
        stop = perf_counter() + seconds / ROUNDS
        while perf_counter() < stop or len(times[0]) < TURNS_MIN:
            sent = requests(command, depth, source)
            for index in source.sample(range(len(socks)), len(socks)):
                sock, received = socks[index], 0
                started = perf_counter()
                sock.sendall(sent)
                while received < reply_size:
                    received += sock.recv_into(view[received:])
                times[index].append(perf_counter() - started)
        rounds.append([statistics.quantiles(each, n=4)[0] for each in times])
    results.send(rounds)


async def measure(path: str, name: str, command: int, depth: int, seconds: float) -> Cost:
    """One cell. Raises: EOFError: the client has failed, and said why."""
    receiving, sending = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(
        target=ask, args=(path, name, command, depth, seconds, sending)
    )
    tallies = iter(TALLIES)
    with mock.patch("nbdimg.server.transmission.Tally", lambda *given: next(tallies)(*given)):
        process.start()
        sending.close()
        try:
            rounds: list[list[float]] = await asyncio.to_thread(receiving.recv)
        finally:
            await asyncio.to_thread(process.join)
    ratios = sorted(on / off for off, on, _ in rounds)
    return Cost(
        name=f"{name} {'write' if command else 'read'} x {depth}",
        request_us=statistics.median(off for off, _, _ in rounds) / depth * 1e6,
        ratio=statistics.median(ratios),
        ratio_min=ratios[0],
        ratio_max=ratios[-1],
        control=statistics.median(control / off for off, _, control in rounds),
    )


async def costs(directory: Path, seconds: float) -> list[Cost]:
    """Every cell, `seconds` each."""
    exports = []
    for format in ("raw", "qcow2"):
        path = str(directory / f"image.{format}")
        create_image(path, IMAGE_SIZE, format=format)
        image = await open_image(path, format=format, writable=True)
        await image.write(0, random.Random(2).randbytes(IMAGE_SIZE))
        await image.close()
        exports.append(ExportConfig(path, format, format))
    socket_path = str(directory / "s")
    async with serving(ServerConfig(tuple(exports), (NbdUri(socket=socket_path),))):
        return [
            await measure(socket_path, export.name or "", command, depth, seconds)
            for export in exports
            for command in (0, 1)
            for depth in DEPTHS
        ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.metering", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="for each of eight cells")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-metering-") as directory:
        found = run_loop(costs(Path(directory), arguments.seconds))
    if arguments.json:
        print(json.dumps([asdict(cost) for cost in found], indent=1))
    else:
        for cost in found:
            print(
                f"{cost.name:16} {cost.request_us:6.2f} us a request, with the meter x {cost.ratio:.3f}"
                f" ({cost.ratio_min:.3f} to {cost.ratio_max:.3f}), each counted x {cost.control:.3f}"
            )
    is_seen = statistics.median(cost.control for cost in found) > LIMIT
    return 0 if is_seen and max(cost.ratio for cost in found) <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
