"""The fairness row: 4 KiB reads on one connection beside 4 MiB x 16 on another, page cache warm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from bench.cells import MIB
from bench.image import settle, warm
from bench.neighbours import Neighbour, measure_beside
from bench.process import Usage
from bench.results import NeighbourSample
from bench.servers import ServerSpec
from bench.throughput import rotated

BLOCK_SIZE = 4 * MIB
DEPTH = 16
BUSY = Usage(user_s=0.0, system_s=0.03, disk_bytes=0)
"""A few kernel ticks: more than a connection's handshake costs."""
MODES = ("read", "write")


def kinds() -> list[str]:
    return [_kind(mode) for mode in MODES]


def measure(
    servers: Sequence[ServerSpec], image: Path, rounds: int, seconds: float, step: Callable[[str], None]
) -> list[NeighbourSample]:
    """`rounds` samples for each server and kind of neighbour; `step` is called before each.

    The neighbour has the upper half of the image and the reader the lower one: no wait for an overlapping write.
    """
    size = image.stat().st_size
    half = size // 2

    def prepare() -> None:
        warm(image, 0, size)

    def not_slow(_: int) -> AbstractContextManager[bool]:
        return nullcontext(False)

    samples = []
    for round_index in range(rounds):
        for mode in MODES:
            neighbour = Neighbour(_kind(mode), mode, BLOCK_SIZE, DEPTH, half, half, BUSY)
            for server in rotated(servers, round_index):
                step(f"fairness, round {round_index + 1}: {neighbour.kind}, {server.name}")
                samples.append(measure_beside(server, image, neighbour, half, round_index, seconds, prepare, not_slow))
                settle(image)
    return samples


def _kind(mode: str) -> str:
    return f"{mode} {BLOCK_SIZE // MIB} MiB x {DEPTH}"
