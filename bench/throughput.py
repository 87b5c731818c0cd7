"""The throughput table: every cell on every server, in interleaved rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from bench import fio
from bench.cells import Cell
from bench.image import resident_share, settle, warm
from bench.results import Sample
from bench.servers import ServerSpec

T = TypeVar("T")


def rotated(items: Sequence[T], by: int) -> list[T]:
    """`items` starting with number `by`, wrapping: no server is always the one that runs first."""
    by %= len(items)
    return [*items[by:], *items[:by]]


def measure(
    cells: Sequence[Cell],
    servers: Sequence[ServerSpec],
    image: Path,
    rounds: int,
    seconds: float,
    step: Callable[[str], None],
) -> list[Sample]:
    """`rounds` samples for each cell and server. Within a round the servers of a cell run back to back.

    A failure becomes a sample with an error, and the run goes on. `step` is called once for each sample, before it.
    """
    samples = []
    for round_index in range(rounds):
        for cell_index, cell in enumerate(cells):
            for server in rotated(servers, round_index + cell_index):
                step(f"round {round_index + 1}: {cell.name}, {server.name}")
                samples.append(_sample(cell, server, image, round_index, seconds))
    return samples


def _sample(cell: Cell, server: ServerSpec, image: Path, round_index: int, seconds: float) -> Sample:
    size = image.stat().st_size
    if resident_share(image, 0, size) < 1.0:
        warm(image, 0, size)
    try:
        with server.start(image) as running:
            job = fio.Job(running.uri, cell.mode, cell.block_size, cell.depth, size, seconds, cell.connections)
            return Sample(cell.name, server.name, round_index, fio.run(job))
    except (fio.FioError, RuntimeError, OSError) as error:
        return Sample(cell.name, server.name, round_index, None, str(error) or repr(error))
    finally:
        if cell.is_write:
            settle(image)
