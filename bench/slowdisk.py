"""Make a server's page-cache misses slow, with the kernel's own I/O limit on a control group of its own.

A fast disk answers a miss in about the time that two busy processors need to switch tasks, so a stall drowns in the
noise. At `READ_IOPS` a queue of 16 misses takes tens of milliseconds, costs no processor time, and a reader that waits
for it cannot be overlooked. Needs root and a writable control group file system; elsewhere the disk stays as it is.

Kernel: Documentation/admin-guide/cgroup-v1/blkio-controller.rst (`blkio.throttle.read_iops_device`),
Documentation/admin-guide/cgroup-v2.rst (`io.max`).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

READ_IOPS = 400
V1_ROOT = Path("/sys/fs/cgroup/blkio")
V2_ROOT = Path("/sys/fs/cgroup")
REMOVE_TIMEOUT_S = 5.0


@contextmanager
def slow_disk(pid: int, image: Path) -> Iterator[bool]:
    """Limit what `pid` reads from the image's disk to `READ_IOPS` for the length of the block; False: not possible."""
    device = _device(image)
    group = None if device is None else _limited_group(device)
    if group is None:
        yield False
        return
    home = group.parent
    try:
        (group / "cgroup.procs").write_text(str(pid))
        yield True
    finally:
        with contextlib.suppress(OSError):
            (home / "cgroup.procs").write_text(str(pid))
        _remove(group)


def _device(image: Path) -> str | None:
    """`major:minor` of the whole disk below the image, on which alone the kernel accepts limits; None: no disk."""
    number = image.stat().st_dev
    entry = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not entry.exists():
        return None
    disk = entry.resolve()
    if (disk / "partition").exists():
        disk = disk.parent
    return (disk / "dev").read_text().strip()


def _limited_group(device: str) -> Path | None:
    name = f"nbdimg-bench-{os.getpid()}"
    for root, file, text in (
        (V1_ROOT, "blkio.throttle.read_iops_device", f"{device} {READ_IOPS}"),
        (V2_ROOT, "io.max", f"{device} riops={READ_IOPS}"),
    ):
        group = root / name
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / file).write_text(text)
            return group
        except OSError:
            _remove(group)
    return None


def _remove(group: Path) -> None:
    """A group that its last process has just left is busy for a moment."""
    deadline = time.monotonic() + REMOVE_TIMEOUT_S
    while group.exists():
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
