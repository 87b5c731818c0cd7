"""Facts about the machine that a reader needs to judge the figures."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

from bench import fio


def facts(directory: Path) -> dict[str, str]:
    """Name to value, in the order of the report's header; `directory` is where the image lies."""
    return {
        "cores": str(len(os.sched_getaffinity(0))),
        "processor": _first_value("/proc/cpuinfo", "model name"),
        "memory": _memory(),
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "uvloop": _package_version("uvloop"),
        "fio": fio.version(),
        "image's file system": _file_system(directory),
        "nbdimg commit": _commit(),
        "load average at start": load_average(),
    }


def load_average() -> str:
    """Runnable processes over the last 1, 5 and 15 minutes: above the benchmark's own, others used the processors."""
    return ", ".join(f"{value:.2f}" for value in os.getloadavg())


class Steal:
    """How much of the processors' time went to other guests of the host since this was made."""

    def __init__(self) -> None:
        self._stolen, self._all = _processor_ticks()

    def share(self) -> str:
        stolen, everything = _processor_ticks()
        return f"{(stolen - self._stolen) / max(1, everything - self._all):.1%}"

    def add_to(self, facts: dict[str, str]) -> None:
        facts["time stolen by the host"] = self.share()


def _processor_ticks() -> tuple[int, int]:
    """(stolen, all) of all processors since the start: user nice system idle iowait irq softirq steal. proc_stat(5)."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[7], sum(ticks)


def _first_value(path: str, key: str) -> str:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return "unknown"


def _memory() -> str:
    words = _first_value("/proc/meminfo", "MemTotal").split()
    return f"{int(words[0]) / 1024 / 1024:.1f} GiB" if words[0].isdigit() else "unknown"


def _package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _file_system(directory: Path) -> str:
    mounts: Mapping[str, str] = {
        words[1]: words[2] for words in map(str.split, Path("/proc/self/mounts").read_text().splitlines())
    }
    for parent in (directory.resolve(), *directory.resolve().parents):
        if str(parent) in mounts:
            return mounts[str(parent)]
    return "unknown"


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
