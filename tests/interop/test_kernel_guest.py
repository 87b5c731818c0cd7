"""The Linux kernel's NBD client against `nbdimg serve`: attach, ext4, trim, detach, attach again.

Every test boots a guest (see `tests/support/guest.py`). The last two are controls: the harness reports a comparison
that is wrong in the guest, and it ends a guest that hangs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.guest import HOST_ADDRESS, GuestResult, GuestTimeoutError, run_guest
from tests.support.peers import require_program
from tests.support.server import NbdimgServer

pytestmark = pytest.mark.guest

MIB = 1 << 20
IMAGE_SIZE = 96 * MIB
DROPPED_SIZE = 8 * MIB
SCRIPT_TIMEOUT_S = 120.0
HANG_TIMEOUT_S = 2.0
CONNECTION_COUNT = 2
SECTOR_SIZE = 512  # unit of st_blocks and of /sys/block/*/size, whatever the block size is
ERROR_ON_CONSOLE = re.compile(r"I/O error|EXT4-fs (error|warning)|Other side returned error|Connection timed out")
ERROR_IN_LOG = re.compile(r"\b(error|critical|exception|traceback)\b", re.IGNORECASE)

SCRIPT = r"""
await() { until "$@"; do sleep 0.05; done; }
is_attached() { nbd-client -c /dev/nbd0 > /dev/null; }
is_detached() { ! nbd-client -c /dev/nbd0 > /dev/null; }
attach() {
    nbd-client "$HOST" "$PORT" /dev/nbd0 -N "$EXPORT" -C "$CONNECTIONS" $BLOCK_OPTION
    await is_attached
}
detach() {
    nbd-client -d /dev/nbd0
    await is_detached
}

attach
cd /sys/block/nbd0
report size "$(cat size)"
report block_size "$(cat queue/logical_block_size)"
report fua "$(cat queue/fua)"
report write_cache "$(cat queue/write_cache)"
report discard_max "$(cat queue/discard_max_bytes)"
report connections "$(netstat -tn | grep -c "$HOST:$PORT *ESTABLISHED")"
cd /

blkdiscard /dev/nbd0
mkfs.ext4 -q /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt
cp /data/kept/* /data/dropped /mnt/
dd if=/data/kept/odd of=/mnt/odd bs=1021 count=3 skip=5 seek=5 conv=notrunc,fsync
sync
pause written

rm /mnt/dropped
sync
fstrim -v /mnt
umount /mnt
pause trimmed
detach
pause detached

attach
e2fsck -fn /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt
if (cd /mnt && sha256sum -c /data/checksums); then report comparison same; else report comparison different; exit 1; fi
umount /mnt
detach
"""


@dataclass
class Observation:
    """What the host saw of the image while the guest paused; sizes in bytes."""

    path: Path
    allocated_with_all: int = 0
    allocated_after_trim: int = 0

    def pause(self, name: str) -> None:
        allocated = self.path.stat().st_blocks * SECTOR_SIZE
        if name == "written":
            self.allocated_with_all = allocated
        elif name == "trimmed":
            self.allocated_after_trim = allocated


def seeded_files() -> tuple[dict[str, bytes], bytes]:
    """The files that stay, by name, and the one that the guest removes; random bytes, so no two blocks are equal."""
    seed = 20240807
    print(f"seed {seed}")
    generator = random.Random(seed)
    kept = {"byte": 1, "odd": 12_345, "block": 4096, "large": 3 * MIB + 1}
    return {name: generator.randbytes(size) for name, size in kept.items()}, generator.randbytes(DROPPED_SIZE)


def guest_files() -> dict[str, bytes]:
    kept, dropped = seeded_files()
    checksums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in kept.items())
    files = {f"/data/kept/{name}": data for name, data in kept.items()}
    return {**files, "/data/dropped": dropped, "/data/checksums": checksums.encode()}


def guest_script(server: NbdimgServer, block_option: str) -> str:
    uri = urlsplit(server.uri)
    settings = {
        "HOST": HOST_ADDRESS,
        "PORT": str(uri.port),
        "EXPORT": uri.path.lstrip("/"),
        "CONNECTIONS": str(CONNECTION_COUNT),
        "BLOCK_OPTION": block_option,
    }
    return "".join(f"{name}='{value}'\n" for name, value in settings.items()) + SCRIPT


def sparse_image(directory: Path) -> Path:
    path = directory / "disk.img"
    with open(path, "wb") as file:
        file.truncate(IMAGE_SIZE)
    return path


def run_program(name: str, *arguments: str | os.PathLike[str]) -> subprocess.CompletedProcess[str]:
    argv: Sequence[str | os.PathLike[str]] = [require_program(name), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


def running_guests() -> list[str]:
    """Process ids of QEMU processes that this process started and that are left, zombies included."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended since
            name, _, rest = path.read_text().rpartition(")")
            if "(qemu-system" in name and int(rest.split()[1]) == os.getpid():
                found.append(path.parent.name)
    return found


def assert_comparison_is_same(result: GuestResult) -> None:
    assert (result.status, result.values.get("comparison")) == (0, "same"), result.console[-6000:]
    assert not ERROR_ON_CONSOLE.search(result.console), result.console[-6000:]


@pytest.mark.parametrize(("block_option", "block_size"), [("-b 4096", 4096), ("", 512)])
def test_kernel_client_ext4_on_two_connections_survives_trim_and_reattach(
    tmp_path: Path, block_option: str, block_size: int
) -> None:
    image = sparse_image(tmp_path)
    observed = Observation(image)
    with NbdimgServer(image, listen=["nbd://127.0.0.1:0"], options=["--format", "raw"]) as server:
        script = guest_script(server, block_option)
        result = run_guest(script, timeout_s=SCRIPT_TIMEOUT_S, files=guest_files(), on_pause=observed.pause)
        assert_comparison_is_same(result)
        server.terminate()
        assert server.wait() == 0
        log = server.stderr()

    assert int(result.values["size"]) * SECTOR_SIZE == IMAGE_SIZE
    assert int(result.values["block_size"]) == block_size
    assert result.values["fua"] == "1"
    assert result.values["write_cache"] == "write back"
    assert int(result.values["discard_max"]) > 0
    assert int(result.values["connections"]) == CONNECTION_COUNT

    assert observed.allocated_with_all >= DROPPED_SIZE
    assert observed.allocated_with_all - observed.allocated_after_trim >= DROPPED_SIZE * 9 // 10
    check = run_program("e2fsck", "-fn", image)
    assert check.returncode == 0, check.stdout + check.stderr
    assert not ERROR_IN_LOG.search(log), log


def test_kernel_client_image_changed_between_attaches_is_reported_by_the_guest(tmp_path: Path) -> None:
    image = sparse_image(tmp_path)
    kept, _ = seeded_files()

    def corrupt(name: str) -> None:
        if name == "detached":
            offset = image.read_bytes().index(kept["large"][:4096])
            with open(image, "r+b") as file:
                file.seek(offset)
                file.write(bytes([kept["large"][0] ^ 1]))

    with NbdimgServer(image, listen=["nbd://127.0.0.1:0"], options=["--format", "raw"]) as server:
        script = guest_script(server, "-b 4096")
        result = run_guest(script, timeout_s=SCRIPT_TIMEOUT_S, files=guest_files(), on_pause=corrupt)

    assert (result.status, result.values["comparison"]) == (1, "different")
    assert "large: FAILED" in result.console
    with pytest.raises(AssertionError, match="different"):
        assert_comparison_is_same(result)


def test_guest_that_hangs_is_ended_at_the_deadline_and_its_console_is_shown() -> None:
    with pytest.raises(GuestTimeoutError, match=f"script did not end within {HANG_TIMEOUT_S} s") as caught:
        run_guest("echo hanging now\nsleep 1000000\n", timeout_s=HANG_TIMEOUT_S)
    assert "\nhanging now\n" in str(caught.value)
    assert running_guests() == []
