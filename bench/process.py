"""What the kernel accounts to a server: processor time and bytes from storage, over all its processes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Usage:
    """Counters since the process started. `user_s` and `system_s` advance in kernel ticks (usually 10 ms)."""

    user_s: float
    system_s: float
    disk_bytes: int

    @property
    def cpu_s(self) -> float:
        return self.user_s + self.system_s

    def __sub__(self, earlier: Usage) -> Usage:
        return Usage(
            self.user_s - earlier.user_s, self.system_s - earlier.system_s, self.disk_bytes - earlier.disk_bytes
        )


def usage(pid: int) -> Usage:
    """The counters of `pid` and its living descendants, threads included (proc(5): stat fields 14 and 15, io)."""
    user = system = disk = 0
    for member in _tree(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
            user += int(fields[11])
            system += int(fields[12])
            with contextlib.suppress(PermissionError):
                disk += _read_bytes(member)
    return Usage(user / TICKS_PER_S, system / TICKS_PER_S, disk)


def wait_busy(pid: int, since: Usage, least: Usage, timeout_s: float) -> bool:
    """Poll until the server has used as much processor time or disk as `least` since `since`; False at the deadline."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        used = usage(pid) - since
        if used.cpu_s >= least.cpu_s and used.disk_bytes >= least.disk_bytes:
            return True
        time.sleep(POLL_S)
    return False


def _read_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "read_bytes":
            return int(value)
    return 0


def _tree(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _tree(int(child))
