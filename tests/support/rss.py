"""What a process holds: memory, descriptors, processor time; read from /proc.

Memory is RssAnon + RssShmem of the process and all its descendants: pages of its own, without the page cache of the
images that it maps or reads. Freed memory counts as long as the process has not given it back to the kernel.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

SAMPLE_INTERVAL_S = 0.01


def process_tree(pid: int) -> list[int]:
    """`pid` and its living descendants."""
    found = [pid]
    for parent in found:
        try:
            for task in os.listdir(f"/proc/{parent}/task"):
                found += map(int, Path(f"/proc/{parent}/task/{task}/children").read_text().split())
        except OSError:
            continue
    return found


def memory(pid: int) -> int:
    """Bytes of anonymous and shared memory of the process tree; 0 once it is gone."""
    total = 0
    for member in process_tree(pid):
        try:
            status = Path(f"/proc/{member}/status").read_text()
        except OSError:
            continue
        for line in status.splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += int(line.split()[1]) * 1024
    return total


def descriptor_count(pid: int) -> int:
    """Open file descriptors of the process itself."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def thread_count(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def processor_time(pid: int) -> float:
    """Seconds of user and system time that the process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_until(condition: Callable[[], bool], timeout_s: float, interval_s: float = 0.005) -> bool:
    """Poll `condition` until it holds; False if it does not within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval_s)
    return True


def settled_memory(pid: int, quiet_s: float = 0.3, timeout_s: float = 10.0) -> int:
    """The memory once it has not grown by 64 KiB for `quiet_s`, or after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    highest = memory(pid)
    quiet_since = time.monotonic()
    while time.monotonic() < min(deadline, quiet_since + quiet_s):
        time.sleep(SAMPLE_INTERVAL_S)
        now = memory(pid)
        if now > highest + 64 * 1024:
            highest, quiet_since = now, time.monotonic()
    return memory(pid)


class PeakMemory:
    """Context manager that samples `memory(pid)` in a thread.

    `peak` (bytes) and `growth` (bytes over the start) are final when it ends.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.start = self.peak = memory(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    @property
    def growth(self) -> int:
        return self.peak - self.start

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_INTERVAL_S):
            self.peak = max(self.peak, memory(self.pid))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, memory(self.pid))
