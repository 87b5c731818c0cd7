"""Where a request's time goes: 4 KiB random reads at depth 16 on one connection, page cache warm.

Three views, because each tool disturbs what it measures: processor time from the kernel's accounting (undisturbed, for
every server), system calls for each request under `strace -c -f` (counts exact, times inflated), and Python functions
under cProfile (main thread only; every call carries the profiler's own cost, so compare shares, not times).
"""

from __future__ import annotations

import marshal
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import fio
from bench.cells import KIB
from bench.image import warm
from bench.process import POLL_S, usage
from bench.results import CpuCost, FunctionCost, Profile, SyscallCost
from bench.servers import Server, ServerSpec

DEPTH = 16
FUNCTIONS_MAX = 25
SHARE_MIN = 0.005
REQUESTS_A_CALL_MAX = 2 * DEPTH
"""A server that handles a whole queue in one turn of its loop still calls its functions twice as often as this."""
ATTACH_TIMEOUT_S = 10.0
FAILURES = (fio.FioError, RuntimeError, OSError, subprocess.TimeoutExpired)


def step_count(servers: Sequence[ServerSpec]) -> int:
    return len(servers) + 2


def measure(
    subject: ServerSpec | None,
    servers: Sequence[ServerSpec],
    image: Path,
    seconds: float,
    step: Callable[[str], None],
) -> Profile:
    """Processor time for all `servers`, the other two views for `subject` if it takes part.

    What could not be measured becomes a note. `step` is called `step_count(servers)` times.
    """
    profile = Profile()
    warm(image, 0, image.stat().st_size)
    for spec in servers:
        step(f"profile: processor time, {spec.name}")
        try:
            profile.cpu.append(_cpu_cost(spec, image, seconds))
        except FAILURES as error:
            profile.notes.append(f"processor time of {spec.name}: {error}")
    step("profile: system calls")
    if subject is not None:
        try:
            profile.syscalls = syscall_costs(subject, image, seconds)
        except FAILURES as error:
            profile.notes.append(f"system calls: {error}")
    step("profile: Python functions")
    if subject is not None:
        try:
            profile.functions = function_costs(subject, image, seconds)
        except FAILURES as error:
            profile.notes.append(f"Python functions: {error}")
    return profile


def _job(server: Server, image: Path, seconds: float) -> fio.Job:
    return fio.Job(server.uri, "randread", 4 * KIB, DEPTH, image.stat().st_size, seconds, ramp_s=0)


def _cpu_cost(spec: ServerSpec, image: Path, seconds: float) -> CpuCost:
    with spec.start(image) as server:
        before = usage(server.pid)
        result = fio.run(_job(server, image, seconds))
        used = usage(server.pid) - before
    return CpuCost(
        server=spec.name,
        iops=result.iops,
        user_us=used.user_s * 1e6 / result.request_count,
        system_us=used.system_s * 1e6 / result.request_count,
        busy_cores=used.cpu_s / (result.request_count / result.iops),
    )


def syscall_costs(spec: ServerSpec, image: Path, seconds: float) -> list[SyscallCost]:
    """The calls of the server's process and threads while fio ran, the most frequent first.

    Raises: RuntimeError when strace is missing or may not trace; FioError.
    """
    if shutil.which("strace") is None:
        raise RuntimeError("strace is not installed")
    with tempfile.TemporaryDirectory(prefix="bench-strace-") as directory, spec.start(image) as server:
        table, log = Path(directory, "table"), Path(directory, "log")
        with open(log, "wb") as stderr:
            strace = subprocess.Popen(
                ["strace", "-c", "-f", "-o", str(table), "-p", str(server.pid)],
                stdin=subprocess.DEVNULL,
                stderr=stderr,
            )
        try:
            _wait_traced(server.pid, strace, log)
            result = fio.run(_job(server, image, seconds))
            strace.terminate()
            strace.wait(ATTACH_TIMEOUT_S)
        finally:
            if strace.poll() is None:
                strace.kill()
                strace.wait()
        return parse_strace(table.read_text(), result.request_count)


def _wait_traced(pid: int, strace: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + ATTACH_TIMEOUT_S
    while f"TracerPid:\t{strace.pid}\n" not in Path(f"/proc/{pid}/status").read_text():
        if strace.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"strace does not attach: {log.read_text(errors='replace').strip()}")
        time.sleep(POLL_S)


def parse_strace(text: str, request_count: int) -> list[SyscallCost]:
    """The rows of `strace -c`: share of time in percent, seconds, microseconds a call, calls, errors if any, name."""
    costs = []
    for line in text.splitlines():
        words = line.split()
        if len(words) in (5, 6) and words[3].isdigit() and words[-1] != "total":
            costs.append(SyscallCost(words[-1], int(words[3]) / request_count, float(words[0]) / 100))
    return sorted(costs, key=lambda cost: cost.per_request, reverse=True)


def function_costs(spec: ServerSpec, image: Path, seconds: float) -> list[FunctionCost]:
    """The functions with the most time of their own in the server's main thread, waiting for events left out.

    Raises: RuntimeError when the server left no profile; FioError.
    """
    with tempfile.TemporaryDirectory(prefix="bench-profile-") as directory:
        output = Path(directory, "stats")
        program = (sys.executable, "-m", "cProfile", "-o", str(output), "-m", "nbdimg")
        with spec.start(image, program, ["--sandbox=off"]) as server:  # which would keep the profile from being written
            result = fio.run(_job(server, image, seconds))
        if not output.exists():
            raise RuntimeError("the server ended without writing its profile")
        return parse_profile(output.read_bytes(), result.request_count)


def parse_profile(data: bytes, request_count: int) -> list[FunctionCost]:
    """The busiest functions of a cProfile file: {(file, line, name): (primitive calls, calls, self s, total s, _)}.

    Start-up and shutdown are in it too: what runs less than once for `REQUESTS_A_CALL_MAX` requests is left out, and
    with it the event loop's own wait; so is what has less than `SHARE_MIN` of the time.
    """
    stats: dict[tuple[str, int, str], tuple[int, int, float, float, object]] = marshal.loads(data)
    busy = {key: entry for key, entry in stats.items() if entry[1] * REQUESTS_A_CALL_MAX >= request_count}
    total_s = sum(entry[2] for entry in busy.values()) or 1.0
    costs = [
        FunctionCost(
            name=_function_name(*key),
            calls_per_request=calls / request_count,
            self_us_per_request=self_s * 1e6 / request_count,
            self_share=self_s / total_s,
        )
        for key, (_, calls, self_s, _, _) in busy.items()
    ]
    shown = [cost for cost in costs if cost.self_share >= SHARE_MIN]
    return sorted(shown, key=lambda cost: cost.self_share, reverse=True)[:FUNCTIONS_MAX]


def _function_name(file: str, line: int, name: str) -> str:
    return name if file == "~" else f"{'/'.join(Path(file).parts[-2:])}:{line} {name}"
