"""Many exports in one process: how long they take to start and reload, to come and go under load, and what they cost.

python -m bench.fleet [--exports N] [--added N] [--seconds S] [--format raw|qcow2|vhdx] [--json]

start     from the process's start to the first connection
reload    after SIGHUP: nothing new; every description new; half of the exports gone
live      N exports added and removed over the HTTP API, one after the other, while clients of others write and read
          back: what one of them sees wrong is an error
storm     clients that come back at once: BATCH connect, ask for an export, read from it, leave; again and again.
          Two processes of clients, so that theirs is not the time that is measured
memory    resident bytes of the process's own, over those with a single export
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.process import usage
from nbdimg.cli.http import Api
from nbdimg.formats import CREATORS, create_image
from tests.support.rawclient import connect_negotiated
from tests.support.rss import settled_memory, wait_until

START_MAX_S = 2.0
RELOAD_MAX_S = 1.0
STORM_MIN = 1500.0
"""Connections a second."""

IMAGE_SIZE = 64 << 20
WORKERS = 4
"""Clients at work while exports come and go."""

BATCH = 250
"""Clients of one process that come back at once."""

STORM_PROCESSES = 2
TIMEOUT_S = 120.0

_OPTION = struct.Struct(">QII")
_REPLY = struct.Struct(">QIII")
_REQUEST = struct.Struct(">IHHQQI")
_ACK, _INFO, _GO, _READ_SIZE = 1, 3, 7, 512


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds, connections a second, bytes. `cpu`: of the server's processes, which a busy machine stretches less."""

    start_s: float
    start_cpu_s: float
    reload_same_s: float
    reload_adjusted_s: float
    reload_removed_s: float
    added_a_second: float
    removed_a_second: float
    errors: int
    requests: int
    storm: float
    storm_cpu_s: float
    """For one connection."""
    memory: int
    memory_an_export: float

    def misses(self) -> list[str]:
        """Goals that are not reached."""
        reload_s = max(self.reload_same_s, self.reload_adjusted_s, self.reload_removed_s)
        checks = (
            (self.start_s < START_MAX_S, f"start took {self.start_s:.2f} s, the goal is below {START_MAX_S:g} s"),
            (reload_s < RELOAD_MAX_S, f"a reload took {reload_s:.2f} s, the goal is below {RELOAD_MAX_S:g} s"),
            (self.errors == 0, f"clients saw {self.errors} errors while exports came and went"),
            (self.requests > 0, "no client got on while exports came and went"),
            (self.storm >= STORM_MIN, f"{self.storm:.0f} connections a second, the goal is {STORM_MIN:g}"),
        )
        return [text for is_met, text in checks if not is_met]


class Fleet:
    """`nbdimg serve` of `count` exports `e0`, `e1`... in a process, up when the constructor returns."""

    def __init__(self, directory: Path, images: Sequence[Path]) -> None:
        self.socket_path = str(directory / "s")
        self.api = Api(str(directory / "admin"))
        self._file, self._log = directory / "nbdimg.toml", directory / "log"
        self.write(images)
        argv = [sys.executable, "-m", "nbdimg", "serve", f"--config={self._file}"]
        started = time.perf_counter()
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=log)
        if not wait_until(lambda: self._is_up() or self.process.poll() is not None, TIMEOUT_S, 0.002):
            self.stop()
        self.start_s, self.start_cpu_s = time.perf_counter() - started, usage(self.process.pid).cpu_s
        if self.process.poll() is not None:
            raise RuntimeError(f"the server does not start: {self._log.read_text()[-2000:]}")

    def _is_up(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(self.socket_path) == 0

    def write(self, images: Sequence[Path], description: str = "") -> None:
        """What the next reload reads."""
        lines = [f'listen = ["nbd+unix:///?socket={self.socket_path}"]']
        for index, path in enumerate(images):
            lines += ["[[exports]]", f'name = "e{index}"', f'path = "{path}"', f'description = "{description}"']
        lines += ["[admin]", f'socket = "{self._file.parent / "admin"}"']
        self._file.write_text("\n".join(lines))

    def reload(self) -> float:
        """Seconds that it takes, with what `write` has written."""
        before = self._log.read_text().count("reloaded: ")
        started = time.perf_counter()
        self.process.send_signal(signal.SIGHUP)
        if not wait_until(lambda: self._log.read_text().count("reloaded: ") > before, TIMEOUT_S, 0.002):
            raise RuntimeError("the server does not reload")
        took = time.perf_counter() - started
        if "nothing was reloaded" in self._log.read_text():
            raise RuntimeError(self._log.read_text()[-2000:])
        return took

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(TIMEOUT_S)


@contextmanager
def fleet(images: Sequence[Path]) -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="nbdimg-fleet-") as directory:
        running = Fleet(Path(directory), images)
        try:
            yield running
        finally:
            running.stop()


# Exports come and go


class Worker(threading.Thread):
    """Writes and reads back in one export until `stop`."""

    def __init__(self, socket_path: str, name: str) -> None:
        super().__init__(daemon=True)
        self._socket_path, self._export = socket_path, name
        self._is_over = threading.Event()
        self.requests = self.errors = 0

    def run(self) -> None:
        try:
            with connect_negotiated(self._socket_path, self._export, TIMEOUT_S) as client:
                while not self._is_over.is_set():
                    offset, data = self.requests % 256 * 4096, self.requests.to_bytes(8, "big") * 512
                    is_right = client.write(offset, data).error == 0 and client.read(offset, 4096).data == data
                    self.errors += not is_right
                    self.requests += 2
        except Exception as error:
            print(f"a client of {self._export}: {error!r}", file=sys.stderr)
            self.errors += 1

    def stop(self) -> None:
        self._is_over.set()
        self.join(TIMEOUT_S)


def come_and_go(running: Fleet, images: Sequence[Path]) -> tuple[float, float, int, int]:
    """Exports added a second, removed a second, errors of others, their requests."""
    workers = [Worker(running.socket_path, f"e{index}") for index in range(WORKERS)]
    for worker in workers:
        worker.start()
    started = time.perf_counter()
    for index, path in enumerate(images):
        running.api.change("POST", "/v1/exports", {"name": f"x{index}", "path": str(path)})
    added = time.perf_counter()
    for index in range(len(images)):
        running.api.change("DELETE", f"/v1/exports/x{index}", mode="drain")
    removed = time.perf_counter()
    for worker in workers:
        worker.stop()
    errors, requests = sum(each.errors for each in workers), sum(each.requests for each in workers)
    return len(images) / (added - started), len(images) / (removed - added), errors, requests


# Clients come back


def storm(running: Fleet, seconds: float) -> tuple[float, float]:
    """Connections a second of all processes together, and the server's processor time for one."""
    names = [f"e{index}".encode() for index in range(WORKERS)] * (BATCH // WORKERS)
    with multiprocessing.get_context("spawn").Pool(STORM_PROCESSES) as pool:
        pool.starmap(_storm, [(running.socket_path, names, 0.0)] * STORM_PROCESSES)
        before = usage(running.process.pid).cpu_s
        rates = pool.starmap(_storm, [(running.socket_path, names, seconds)] * STORM_PROCESSES)
        cpu_s = usage(running.process.pid).cpu_s - before
    return sum(rate for _, rate in rates), cpu_s / sum(count for count, _ in rates)


def _storm(socket_path: str, names: Sequence[bytes], seconds: float) -> tuple[int, float]:
    """Connections of this process, in whole batches, and how many that are in a second."""
    count, started = 0, time.perf_counter()
    while True:
        _batch(socket_path, names)
        count += len(names)
        took = time.perf_counter() - started
        if took >= seconds:
            return count, count / took


def _batch(socket_path: str, names: Sequence[bytes]) -> None:
    """A client for each name, all at once. Raises: RuntimeError, OSError: one was not served."""
    clients = []
    try:
        for name in names:
            clients.append(socket.socket(socket.AF_UNIX))
            clients[-1].settimeout(TIMEOUT_S)
            clients[-1].connect(socket_path)
            option = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
            clients[-1].sendall(struct.pack(">I", 3) + _OPTION.pack(0x49484156454F5054, _GO, len(option)) + option)
        for client in clients:
            _receive(client, 18)
            while _option_reply(client) != _ACK:
                pass
            client.sendall(_REQUEST.pack(0x25609513, 0, 0, 1, 0, _READ_SIZE))
        for client in clients:
            if _receive(client, 16 + _READ_SIZE)[4:8] != bytes(4):
                raise RuntimeError("a read failed")
            client.sendall(_REQUEST.pack(0x25609513, 0, 2, 2, 0, 0))
    finally:
        for client in clients:
            client.close()


def _option_reply(client: socket.socket) -> int:
    _, _, kind, length = _REPLY.unpack(_receive(client, _REPLY.size))
    _receive(client, length)
    if kind not in (_ACK, _INFO):
        raise RuntimeError(f"GO was answered with {kind:#x}")
    return int(kind)


def _receive(client: socket.socket, length: int) -> bytes:
    data = client.recv(length, socket.MSG_WAITALL)
    if len(data) < length:
        raise RuntimeError("a connection was closed")
    return data


# All of it


def measure(directory: Path, *, exports: int, added: int, seconds: float, format: str) -> Figures:
    paths = [directory / f"{index}.img" for index in range(exports + added)]
    for path in paths:
        create_image(path, IMAGE_SIZE, format=format)
    first, later = paths[:exports], paths[exports:]
    with fleet(first[:1]) as single:
        base = settled_memory(single.process.pid)
    with fleet(first) as running:
        memory = settled_memory(running.process.pid)
        same_s = running.reload()
        running.write(first, "another")
        adjusted_s = running.reload()
        added_rate, removed_rate, errors, requests = come_and_go(running, later)
        storm_rate, storm_cpu_s = storm(running, seconds)
        running.write(first[: exports // 2], "another")
        removed_s = running.reload()
        return Figures(
            start_s=running.start_s,
            start_cpu_s=running.start_cpu_s,
            reload_same_s=same_s,
            reload_adjusted_s=adjusted_s,
            reload_removed_s=removed_s,
            added_a_second=added_rate,
            removed_a_second=removed_rate,
            errors=errors,
            requests=requests,
            storm=storm_rate,
            storm_cpu_s=storm_cpu_s,
            memory=memory,
            memory_an_export=(memory - base) / max(1, exports - 1),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status is 1 where a goal is missed."""
    options = argparse.ArgumentParser(prog="python -m bench.fleet", description="Many exports in one process.")
    options.add_argument("--exports", type=int, default=1000, metavar="N", help="at the start (default 1000)")
    options.add_argument("--added", type=int, default=500, metavar="N", help="added and removed live (default 500)")
    options.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of the storm (default 5)")
    options.add_argument("--format", choices=sorted(CREATORS), default="raw", help="of the images (default raw)")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    given = options.parse_args(argv)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    with tempfile.TemporaryDirectory(prefix="nbdimg-fleet-") as directory:
        found = measure(
            Path(directory), exports=given.exports, added=given.added, seconds=given.seconds, format=given.format
        )
    if given.json:
        print(json.dumps(asdict(found)))
    else:
        _print(found, given.exports, given.added, given.format)
    for miss in found.misses():
        print(miss, file=sys.stderr)
    return 1 if found.misses() else 0


def _print(found: Figures, exports: int, added: int, format: str) -> None:
    print(f"{exports} {format} exports, load average at the end {os.getloadavg()[0]:.1f}")
    print(f"start                     {found.start_s:6.2f} s, {found.start_cpu_s:.2f} s of processor time")
    print(f"reload, nothing new       {found.reload_same_s:6.2f} s")
    print(f"reload, all described new {found.reload_adjusted_s:6.2f} s")
    print(f"reload, half of them gone {found.reload_removed_s:6.2f} s")
    print(f"{added} added under load     {found.added_a_second:6.0f} a second")
    print(f"{added} removed under load   {found.removed_a_second:6.0f} a second")
    print(f"errors of others          {found.errors:6d} in {found.requests} requests")
    print(
        f"reconnect storm           {found.storm:6.0f} connections a second, {found.storm_cpu_s * 1e6:.0f} us of each"
    )
    print(
        f"memory                    {found.memory / 2**20:6.0f} MiB, {found.memory_an_export / 1024:.1f} KiB an export"
    )


if __name__ == "__main__":
    sys.exit(main())
