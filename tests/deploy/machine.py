"""A machine with Debian, systemd and nbdimg: the root file system of a guest, with the units as they are shipped."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.deploy.debian import BOOKWORM, NotPrepared, extract, pip, project
from tests.deploy.manifests import ROOT, SYSTEMD
from tests.interop.samples import run_ok
from tests.support.guest import CONTROL_FUNCTIONS, GuestResult, run_guest
from tests.support.peers import require_program

PACKAGES = (
    *("base-files", "base-passwd", "bash", "coreutils", "dash", "grep", "libc-bin", "mount", "nbd-client", "python3"),
    *("procps", "sed", "systemd", "systemd-sysv", "util-linux"),
)
DISK_SIZE = "640m"
PROGRAM = "#!/usr/bin/python3 -I\nfrom nbdimg.__main__ import main\nmain()\n"

SCRIPT_UNIT = """
[Unit]
Requires=basic.target
After=basic.target

[Service]
Type=oneshot
ExecStart=/run-script
TimeoutStartSec=infinity
"""

RUN_SCRIPT = r"""#!/bin/sh
exec 3<>/dev/ttyS1 > /dev/ttyS0 2>&1
stty raw -echo <&3
sh -eux /script
status=$?
test $status = 0 || journalctl --no-pager --output=cat --unit='nbdimg*'
echo "exit=$status" >&3
systemctl poweroff
"""

DEFAULTS = "[Manager]\nDefaultTimeoutStartSec=10min\n"
"""Under emulation a server takes ten seconds to start, and longer where other tests run beside it."""

MOUNT_ROOT = "mkdir /sysroot\nmount -t ext4 /dev/vda /sysroot\n"


def make_root(root: Path) -> None:
    """The files of the machine, made in the empty directory `root`. Raises: NotPrepared."""
    extract(root, BOOKWORM, PACKAGES)
    libraries = root / "usr/lib/python3/dist-packages"
    if subprocess.run(
        pip("install", f"--target={libraries}", project()["project"]["dependencies"], BOOKWORM)
    ).returncode:
        raise NotPrepared(f"pip has no wheels for Python {BOOKWORM.python} here")
    shutil.copytree(ROOT / "nbdimg", libraries / "nbdimg", ignore=shutil.ignore_patterns("__pycache__"))
    for kind in ("passwd", "group"):
        shutil.copy(root / f"usr/share/base-passwd/{kind}.master", root / "etc" / kind)
    _write(root / "etc/machine-id", "0123456789abcdef0123456789abcdef\n")
    _write(root / "usr/bin/nbdimg", PROGRAM).chmod(0o755)
    units = root / "etc/systemd/system"
    for unit in SYSTEMD.iterdir():
        shutil.copy(unit, units)
    _write(units / "script.service", SCRIPT_UNIT)
    _write(units / "default.target", "[Unit]\nRequires=script.service\nAfter=script.service\n")
    _write(root / "etc/systemd/system.conf.d/test.conf", DEFAULTS)
    _write(root / "run-script", RUN_SCRIPT).chmod(0o755)
    compiled = (f"/usr/lib/python{BOOKWORM.python}", "/usr/lib/python3/dist-packages")
    run_ok(require_program("chroot"), root, "/usr/bin/python3", "-m", "compileall", "-q", *compiled)


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(text)
    return path


class Machine:
    """One that has been switched off; `run` starts it, runs a script as root (`sh -eux`) and lets it shut down.

    Args:
        root: its files, from `make_root`, and what the test has put there.
        disk: the file to make of them.
    """

    def __init__(self, root: Path, disk: Path) -> None:
        self.root = root
        self.disk = disk

    def run(self, script: str, timeout_s: float) -> GuestResult:
        """See `run_guest`, but programs are the machine's own."""
        (self.root / "script").write_text(CONTROL_FUNCTIONS + script)
        run_ok(require_program("mke2fs"), "-q", "-t", "ext4", "-b", "4096", "-d", self.root, self.disk, DISK_SIZE)
        devices = ["-drive", f"file={self.disk},format=raw,if=virtio,cache=unsafe"]
        return run_guest(MOUNT_ROOT, timeout_s=timeout_s, devices=devices, kernel_options="systemd.getty_auto=no")

    def dump(self, path: str, to: Path) -> Path:
        """A file as it is on the disk once the machine is off."""
        run_ok(require_program("debugfs"), "-R", f"dump {path} {to}", self.disk)
        return to
