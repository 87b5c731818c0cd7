"""The cold-cache row: one connection's page-cache misses beside another connection's hits.

The first eighth of the image is kept warm and read by the reader. The neighbour reads at random from the rest, whose
pages are dropped before it starts and again every `EVICT_INTERVAL_S` while it runs, so it keeps missing. The image must
lie on a file system with a disk below: on tmpfs nothing is ever cold, and the sample says so as an error. Where it is
possible the misses are made slow, see `slowdisk`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.cells import KIB
from bench.image import drop_caches, evict, settle, warm
from bench.neighbours import Neighbour, measure_beside
from bench.process import Usage
from bench.results import NeighbourSample
from bench.servers import ServerSpec
from bench.slowdisk import slow_disk
from bench.throughput import rotated

EVICT_INTERVAL_S = 0.05
DEPTH = 16
BLOCK_SIZES = (4 * KIB, 64 * KIB)
WARM_PART = 8
BUSY = Usage(user_s=0.0, system_s=0.0, disk_bytes=16 * 4 * KIB)
"""A full queue of misses, counted when they are submitted to the disk."""


def kinds() -> list[str]:
    return [_kind(block_size) for block_size in BLOCK_SIZES]


def measure(
    servers: Sequence[ServerSpec], image: Path, rounds: int, seconds: float, step: Callable[[str], None]
) -> list[NeighbourSample]:
    """`rounds` samples for each server and block size of the cold neighbour; `step` is called before each."""
    size = image.stat().st_size
    warm_size = size // WARM_PART
    cold_size = size - warm_size
    settle(image)
    drop_caches()

    def prepare() -> None:
        evict(image, warm_size, cold_size)
        warm(image, 0, warm_size)

    @contextmanager
    def evicting(pid: int) -> Iterator[bool]:
        stop = threading.Event()

        def loop() -> None:
            while not stop.wait(EVICT_INTERVAL_S):
                evict(image, warm_size, cold_size)

        thread = threading.Thread(target=loop, name="evict")
        thread.start()
        try:
            with slow_disk(pid, image) as is_slow:
                yield is_slow
        finally:
            stop.set()
            thread.join()

    samples = []
    for round_index in range(rounds):
        for block_size in BLOCK_SIZES:
            neighbour = Neighbour(_kind(block_size), "randread", block_size, DEPTH, warm_size, cold_size, BUSY)
            for server in rotated(servers, round_index):
                step(f"cold, round {round_index + 1}: {neighbour.kind}, {server.name}")
                samples.append(
                    measure_beside(server, image, neighbour, warm_size, round_index, seconds, prepare, evicting)
                )
    return samples


def _kind(block_size: int) -> str:
    return f"cold {block_size // KIB} KiB x {DEPTH}"
