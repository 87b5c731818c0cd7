"""Run fio's nbd engine and read its JSON.

The flags are the same for every server and keep the client cheap, because it shares the processors with the server:
no map of blocks already visited, no scrambling of write buffers, completions reaped in batches, only two percentiles.
Each of fio's jobs is one connection. The engine prints to stdout, so the JSON goes to a file of its own.
"""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.results import Measurement

RAMP_S = 0.25
"""Not measured at the start of a run: connecting, first allocations."""
GRACE_S = 30.0
"""Beyond its own run time fio may take this long to start and to end; then it hangs."""
NEIGHBOUR_SECONDS_MAX = 300.0
"""A neighbour is stopped when it is no longer needed; this only bounds it if the benchmark dies."""


class FioError(Exception):
    """fio failed, reported an I/O error, or did nothing."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to run against `uri`, over bytes `offset` to `offset + size` of the export; `flush_every` counts writes."""

    uri: str
    mode: str
    block_size: int
    depth: int
    size: int
    seconds: float
    connections: int = 1
    offset: int = 0
    ramp_s: float = RAMP_S
    flush_every: int = 0

    def argv(self, output: Path) -> list[str]:
        return [
            "fio",
            "--name=bench",
            "--ioengine=nbd",
            f"--uri={self.uri}",
            f"--rw={self.mode}",
            f"--bs={self.block_size}",
            f"--iodepth={self.depth}",
            f"--iodepth_batch_complete_max={self.depth}",
            f"--numjobs={self.connections}",
            f"--fsync={self.flush_every}",
            f"--offset={self.offset}",
            f"--size={self.size}",
            "--time_based",
            f"--runtime={round(self.seconds * 1000)}ms",
            f"--ramp_time={round(self.ramp_s * 1000)}ms",
            "--group_reporting",
            "--norandommap",
            "--randrepeat=0",
            "--scramble_buffers=0",
            "--disable_slat=1",
            "--disable_bw_measurement=1",
            "--percentile_list=50:99",
            "--eta=never",
            "--output-format=json",
            f"--output={output}",
        ]


class FioProcess:
    """A running fio. As a context manager it is ended on the way out, by its own process id."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._directory = tempfile.TemporaryDirectory(prefix="bench-fio-")
        self._output = Path(self._directory.name, "json")
        self._log = Path(self._directory.name, "log")
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                job.argv(self._output), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._directory.name
            )

    def is_running(self) -> bool:
        return self._process.poll() is None

    def result(self) -> Measurement:
        """Wait until it ends by itself. Raises: FioError."""
        return self._finish(self.job.ramp_s + self.job.seconds + GRACE_S, (0,))

    def stop(self) -> Measurement:
        """Interrupt it: it reports what it did so far and exits 128. Raises: FioError, also when it ended before."""
        if not self.is_running():
            raise FioError(f"ended before it was stopped: {self._message()}")
        self._process.send_signal(signal.SIGINT)
        return self._finish(GRACE_S, (0, 128))

    def _finish(self, timeout_s: float, statuses: Sequence[int]) -> Measurement:
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise FioError(f"did not end within {timeout_s:.0f} s") from None
        text = self._output.read_text(errors="replace") if self._output.exists() else ""
        if status not in statuses:
            raise FioError(f"exit status {status}: {self._message()} {' '.join(text.split('{')[0].split())[-300:]}")
        return parse(text, self.job.mode)

    def _message(self) -> str:
        return " ".join(self._log.read_text(errors="replace").split())[-300:]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_running():
            self._process.kill()
        self._process.wait()
        self._directory.cleanup()


def run(job: Job) -> Measurement:
    """Run a job to its end. Raises: FioError."""
    with FioProcess(job) as process:
        return process.result()


def version() -> str:
    """fio's version, or `missing`."""
    try:
        done = subprocess.run(["fio", "--version"], capture_output=True, text=True, timeout=GRACE_S, check=False)
    except OSError:
        return "missing"
    return done.stdout.strip() or "unknown"


def parse(text: str, mode: str) -> Measurement:
    """The figures of the one reported group; warnings that fio writes before the JSON are skipped.

    Raises: FioError for an I/O error, for no request at all, and for text that is not fio's JSON.
    """
    start = text.find("{")
    try:
        report: dict[str, Any] = json.loads(text[start:]) if start >= 0 else {}
        job = report["jobs"][0]
        direction = job["write" if mode.endswith("write") else "read"]
        error, request_count = int(job["error"]), int(direction["total_ios"])
        if error:
            raise FioError(f"I/O error {error}")
        if not request_count:
            raise FioError("no request completed")
        latency = direction["clat_ns"]
        return Measurement(
            iops=float(direction["iops"]),
            bytes_per_s=float(direction["bw_bytes"]),
            p50_us=latency["percentile"]["50.000000"] / 1000,
            p99_us=latency["percentile"]["99.000000"] / 1000,
            max_us=latency["max"] / 1000,
            request_count=request_count,
        )
    except (ValueError, KeyError, IndexError, TypeError) as problem:
        raise FioError(f"not the JSON of a finished run ({problem!r}): {text[:200]!r}") from problem
