"""A 4 KiB depth-1 reader, alone and beside a neighbour on another connection of the same server."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from bench import fio
from bench.cells import KIB
from bench.process import Usage, usage, wait_busy
from bench.results import NeighbourSample
from bench.servers import Server, ServerSpec

BUSY_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True)
class Neighbour:
    """The other connection's load, over bytes `offset` to `offset + size`.

    It counts as at work when the server has used as much as `busy` since the neighbour was started.
    """

    kind: str
    mode: str
    block_size: int
    depth: int
    offset: int
    size: int
    busy: Usage


def measure_beside(
    spec: ServerSpec,
    image: Path,
    neighbour: Neighbour,
    reader_size: int,
    round_index: int,
    seconds: float,
    prepare: Callable[[], None],
    during: Callable[[int], AbstractContextManager[bool]],
) -> NeighbourSample:
    """One fresh server: the reader alone over its first `reader_size` bytes, then beside the neighbour.

    `prepare` runs once the server listens; `during(pid)` wraps the time in which the neighbour runs and yields whether
    misses are made slow. The reader starts when the neighbour is seen at work and ends before it. A failure becomes a
    sample with an error.
    """
    try:
        with spec.start(image) as server:
            prepare()
            reader = fio.Job(server.uri, "randread", 4 * KIB, 1, reader_size, seconds)
            alone = fio.run(reader)
            before = usage(server.pid)
            with during(server.pid) as is_slow_disk, fio.FioProcess(_job(server, neighbour)) as other:
                if not wait_busy(server.pid, before, neighbour.busy, BUSY_TIMEOUT_S):
                    raise fio.FioError("the neighbour gave the server nothing to do")
                beside = fio.run(reader)
                neighbour_result = other.stop()
            disk_bytes = (usage(server.pid) - before).disk_bytes
    except (fio.FioError, RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        message = str(error) or repr(error)
        return NeighbourSample(neighbour.kind, spec.name, round_index, None, None, None, error=message)
    return NeighbourSample(
        neighbour.kind, spec.name, round_index, alone, beside, neighbour_result, disk_bytes, is_slow_disk
    )


def _job(server: Server, neighbour: Neighbour) -> fio.Job:
    return fio.Job(
        server.uri,
        neighbour.mode,
        neighbour.block_size,
        neighbour.depth,
        neighbour.size,
        fio.NEIGHBOUR_SECONDS_MAX,
        offset=neighbour.offset,
        ramp_s=0,
    )
