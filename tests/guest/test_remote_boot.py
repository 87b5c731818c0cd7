"""Machines whose root file system is served: over the kernel's NBD client, with TLS, and as a disk of QEMU's.

All of them boot one golden image, each through an overlay of its own. The golden image is compared before and after;
what a machine wrote is read from its overlay by qemu-img and debugfs. The control is a second boot of one overlay: it
finds what the first one wrote, where a first boot must find the golden image's.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbdimg.uri import NbdUri
from tests.support.certificates import LOOPBACK_NAMES, Authority
from tests.support.configured import ConfiguredServer
from tests.support.guest import HOST_ADDRESS, GuestResult, boot_files, root_tree, run_guest
from tests.support.peers import require_program
from tests.support.rawprotocol import MIB
from tests.support.rss import wait_until
from tests.support.server import START_TIMEOUT_S

pytestmark = pytest.mark.guest

ROOT_SIZE = 16 * MIB
TIMEOUT_S = 200.0

ROOT_SCRIPT = r"""
report root "$(awk '$2 == "/" { print $1 }' /proc/mounts)"
report found "$(cat /note)"
echo "written by $machine" > /note
dd if=/dev/urandom of=/data bs=64k count=16 conv=fsync
report checksum "$(sha256sum /data | cut -d " " -f 1)"
sync
"""
"""Runs in the root file system that was served. The kernel gives `machine=NAME` of its command line to init."""

BOOT_FROM_DISK = r"""
mkdir /sysroot
mount -t ext4 /dev/vda /sysroot
"""

BOOT_FROM_NBD = r"""
nbd-client $HOST $PORT /dev/nbd0 -N $EXPORT -b 4096 -cacertfile /tls/ca-cert.pem -tlshostname localhost \
    -certfile /tls/client-cert.pem -keyfile /tls/client-key.pem
until test "$(cat /sys/block/nbd0/size)" != 0; do sleep 0.05; done
mkdir /sysroot
mount -t ext4 /dev/nbd0 /sysroot
"""


def run(*argv: str) -> str:
    done = subprocess.run([require_program(argv[0]), *argv[1:]], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qcow2 image of an ext4 file system that can be a root, read-only for everybody."""
    directory = tmp_path_factory.mktemp("golden")
    tree = root_tree(directory / "tree", ROOT_SCRIPT)
    (tree / "note").write_text("golden\n")
    raw, image = directory / "root.raw", directory / "golden.qcow2"
    run("mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", str(tree), str(raw), f"{ROOT_SIZE // 1024}k")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image))
    image.chmod(0o444)
    return image


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class FleetServer(ConfiguredServer):
    """Serves the golden image over TCP; clients of "golden@NAME" each find an overlay, which is kept."""

    def __init__(self, directory: Path, golden: Path, *, scheme: str = "nbd", more: str = "") -> None:
        self.overlays = directory / "overlays"
        self.overlays.mkdir()
        super().__init__(directory, self._text(directory, golden, scheme) + more)
        assert wait_until(lambda: self.stdout().count("\n") == 2, START_TIMEOUT_S), self.stdout()
        self.port = NbdUri.parse(self.stdout().splitlines()[1]).port

    def _text(self, directory: Path, golden: Path, scheme: str) -> str:
        return f"""
listen = ["nbd+unix:///?socket={directory}/s", "{scheme}://127.0.0.1:0"]
[[exports]]
name = "golden"
path = "{golden}"
overlay = "kept"
overlay_dir = "{self.overlays}"
"""

    def overlay(self, machine: str) -> Path:
        return self.overlays / f"golden@{machine}.qcow2"

    def finish(self) -> None:
        self.terminate()
        assert self.wait() == 0, self.stderr()


@dataclass(frozen=True)
class Root:
    """What a root file system holds after its machine has gone, as debugfs reads it."""

    note: str
    checksum: str


def root_in(overlay: Path, directory: Path) -> Root:
    """The whole chain is read by qemu-img; the file system must be sound."""
    run("qemu-img", "check", "-q", str(overlay))
    raw, data = directory / "read.raw", directory / "data"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(overlay), str(raw))
    run("e2fsck", "-fn", str(raw))
    run("debugfs", "-R", f"dump /data {data}", str(raw))
    return Root(run("debugfs", "-R", "cat /note", str(raw)).strip(), sha256(data))


def boot(script: str, machine: str, devices: Sequence[str] = (), files: dict[str, bytes] | None = None) -> GuestResult:
    result = run_guest(script, timeout_s=TIMEOUT_S, devices=devices, files=files, kernel_options=f"machine={machine}")
    assert result.status == 0, result.console[-6000:]
    assert "I/O error" not in result.console, result.console[-6000:]
    return result


def boot_from_disk(server: FleetServer, machine: str) -> GuestResult:
    """A machine whose only disk is QEMU's NBD client."""
    where = f"server.type=inet,server.host=127.0.0.1,server.port={server.port}"
    disk = f"driver=nbd,node-name=disk,{where},export=golden@{machine},reconnect-delay=60"
    devices = ["-blockdev", disk, "-device", "virtio-blk-pci,drive=disk"]
    return boot(BOOT_FROM_DISK, machine, devices)


def boot_from_nbd(server: FleetServer, machine: str, files: dict[str, bytes]) -> GuestResult:
    """A machine whose own kernel is the NBD client, attached by nbd-client, with the certificates in `files`."""
    settings = {"HOST": HOST_ADDRESS, "PORT": server.port, "EXPORT": f"golden@{machine}"}
    head = "".join(f"{name}='{value}'\n" for name, value in settings.items())
    return boot(head + BOOT_FROM_NBD, machine, files=files)


def test_two_machines_boot_from_disks_on_one_golden_image_and_differ(golden: Path, tmp_path: Path) -> None:
    before = sha256(golden)
    machines = ("vm1", "vm2")
    boot_files()
    with FleetServer(tmp_path, golden) as server:
        with ThreadPoolExecutor(len(machines)) as pool:
            results = list(pool.map(lambda machine: boot_from_disk(server, machine), machines))
        server.finish()
        for machine, result in zip(machines, results, strict=True):
            assert (result.values["root"], result.values["found"]) == ("/dev/vda", "golden")
            expected = Root(f"written by {machine}", result.values["checksum"])
            assert root_in(server.overlay(machine), tmp_path) == expected
    assert results[0].values["checksum"] != results[1].values["checksum"]
    assert sha256(golden) == before


def test_machine_boots_from_its_own_nbd_device_over_tls_and_finds_its_root_again(golden: Path, tmp_path: Path) -> None:
    before = sha256(golden)
    authority = Authority(tmp_path / "ca")
    identity = authority.issue("server", common_name="localhost", names=LOOPBACK_NAMES)
    client = authority.issue("client", common_name="vm1")
    files = {f"/tls/{path.name}": path.read_bytes() for path in client.directory.iterdir()}
    tls = f"""
[tls]
certificate_file = "{identity.certificate_path}"
key_file = "{identity.key_path}"
client_ca_file = "{authority.path}"
min_version = "1.2"  # what Debian 12's nbd-client speaks, and no other
"""
    with FleetServer(tmp_path, golden, scheme="nbds", more=tls) as server:
        first = boot_from_nbd(server, "vm1", files)
        second = boot_from_nbd(server, "vm1", files)
        server.finish()
        assert root_in(server.overlay("vm1"), tmp_path) == Root("written by vm1", second.values["checksum"])
    assert (first.values["root"], first.values["found"]) == ("/dev/nbd0", "golden")
    assert (second.values["root"], second.values["found"]) == ("/dev/nbd0", "written by vm1")
    assert sha256(golden) == before
