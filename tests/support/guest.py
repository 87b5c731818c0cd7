"""Run a shell script inside a booted Linux guest: the way to test with the kernel's own NBD client.

The host needs no `nbd` module, no privileges and no KVM: Debian's cloud kernel boots under QEMU's TCG from an initial
RAM file system made here, which holds busybox, nbd-client, e2fsprogs, blkdiscard and the libraries that they load. The
guest reaches the host's loopback interface at 10.0.2.2 (QEMU's user network).

    ttyS0   console: kernel messages and the script's output; kept in a file, shown when something fails
    ttyS1   control: lines from the guest, `key=value`; the host answers a `pause` with one empty line

    boot ──"ready="──> script ──"KEY=VALUE"*, "pause=NAME" <──> on_pause(NAME)──> "exit=STATUS" ──> power off
                         └─ mounted /sysroot ──> its /sbin/init, with the same line, to `ROOT_INIT`'s end ──┘

Kernel and base archive are cached, keyed by kernel version and by everything that goes into the archive.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import lzma
import os
import platform
import re
import select
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.support.peers import peer_unavailable, require_program

HOST_ADDRESS = "10.0.2.2"  # the host's loopback, as QEMU's user network shows it
BOOT_TIMEOUT_S = 90.0  # 4 s on an idle machine; a loaded one may be many times slower
POWER_OFF_TIMEOUT_S = 30.0
DOWNLOAD_TIMEOUT_S = 300.0
CONSOLE_TAIL_SIZE = 6000  # characters of the console in an error message

KERNEL_OPTIONS = "console=ttyS0 panic=-1 mitigations=off random.trust_cpu=on tsc=reliable cryptomgr.notests"
KERNEL_META_PACKAGE = "linux-image-cloud-amd64"
KERNEL_PACKAGE = re.compile(r"^\s*Depends: (linux-image-\d\S*-cloud-amd64)$", re.MULTILINE)
MODULES = ("virtio_pci", "virtio_net", "virtio_blk", "nbd", "ext4")
PROGRAMS = ("nbd-client", "mkfs.ext4", "e2fsck", "blkdiscard")

INIT = r"""#!/bin/busybox sh
export PATH=/programs:/applets
/bin/busybox mkdir -p /applets /proc /sys /dev /mnt /tmp /etc /var/run
/bin/busybox --install -s /applets
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module; do insmod "/modules/$module" || echo "cannot load $module"; done < /modules/order
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
exec 3<>/dev/ttyS1
stty raw -echo <&3
echo ready= >&3
sh -eux /script
status=$?
grep -q " /sysroot " /proc/mounts && exec switch_root /sysroot /sbin/init
echo "exit=$status" >&3
poweroff -f
"""

ALIASES = "".join(f"alias {name}=/programs/{name}\n" for name in PROGRAMS)
"""BusyBox's shell prefers its own applets, whatever PATH says; since 1.37 Debian's has one of nbd-client's name."""

CONTROL_FUNCTIONS = r"""
report() { echo "$1=$2" >&3; }
pause() { echo "pause=$1" >&3; read -r _ <&3; }
"""
"""What a script says to the host, where its descriptor 3 is the control line."""

SCRIPT_PRELUDE = ALIASES + CONTROL_FUNCTIONS

LIST_MODULES = """
import __future__, os, select, socket, struct, sys, time
paths = [getattr(module, "__file__", None) for module in sys.modules.values()]
print(*filter(None, paths), sep=chr(10))
"""

ROOT_INIT = r"""#!/bin/busybox sh
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
sh -eux /script
status=$?
mount -o remount,ro /
echo "exit=$status" >&3
poweroff -f
"""


class GuestError(Exception):
    """The guest ended, or was ended, without a result; the message ends with its console."""


class GuestTimeoutError(GuestError):
    """The guest passed a deadline and was killed."""


@dataclass(frozen=True)
class GuestResult:
    """What a script reported: its exit status (0 = every command succeeded), its `report`s and the console's text."""

    status: int
    values: Mapping[str, str]
    console: str


@dataclass(frozen=True)
class BootFiles:
    """Kernel and base archive on the host, ready for `qemu -kernel -initrd`."""

    kernel: Path
    base_archive: Path


@dataclass
class Archive:
    """A cpio archive in the `newc` format that Linux unpacks as its initial RAM file system.

    Layout: Linux Documentation/driver-api/early-userspace/buffer-format.rst. Archives may follow one another in a file
    if each starts at a multiple of 4 bytes, which `to_bytes` ensures.
    """

    entries: dict[str, tuple[int, bytes]] = field(default_factory=dict)

    def add(self, path: str, data: bytes, mode: int = 0o755) -> None:
        """Adds a regular file, and its parent directories before it. `path` may start with a slash."""
        name = path.strip("/")
        for parent in reversed(Path(name).parents[:-1]):
            self.entries.setdefault(str(parent), (stat.S_IFDIR | 0o755, b""))
        self.entries[name] = (stat.S_IFREG | mode, data)

    def to_bytes(self) -> bytes:
        trailer = ("TRAILER!!!", (0, b""))
        records = itertools.chain(self.entries.items(), [trailer])
        return b"".join(
            self._record(inode, name, mode, data) for inode, (name, (mode, data)) in enumerate(records, start=1)
        )

    @staticmethod
    def _record(inode: int, name: str, mode: int, data: bytes) -> bytes:
        encoded = name.encode() + b"\0"
        # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        numbers = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        head = b"070701" + b"".join(b"%08x" % number for number in numbers) + encoded
        return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def run_guest(
    script: str,
    *,
    timeout_s: float,
    files: Mapping[str, bytes] | None = None,
    devices: Sequence[str] = (),
    kernel_options: str = "",
    on_pause: Callable[[str], None] = lambda name: None,
) -> GuestResult:
    """Boots a guest, runs `script` in it (`sh -eux`) and returns what it reported, once the guest has powered off.

    The script may call `report KEY VALUE` (one line) and `pause NAME`, which runs `on_pause(NAME)` on the host while
    the script waits. `files` are put into the guest by absolute path. `timeout_s` counts from the script's start,
    pauses included. A script that fails is a result (`status`), not an error. `devices` are arguments for QEMU,
    `kernel_options` for the kernel. Skips the test if a program or a package is missing.

    If the script leaves a file system mounted on /sysroot, it becomes the root, see `root_tree`.

    Raises:
        GuestTimeoutError: boot, script or power-off took too long; the guest was killed.
        GuestError: the guest stopped without an exit status, for example after a kernel panic.
    """
    program = require_program("qemu-system-x86_64")
    boot = boot_files()
    with tempfile.TemporaryDirectory(prefix="nbdimg-guest-") as directory:
        archive = Archive()
        archive.add("/script", (SCRIPT_PRELUDE + script).encode())
        for path, data in (files or {}).items():
            archive.add(path, data)
        initrd = Path(directory, "initrd")
        initrd.write_bytes(boot.base_archive.read_bytes() + archive.to_bytes())
        console = Path(directory, "console")
        console.touch()
        argv = [program, *_qemu_arguments(boot.kernel, initrd, console, kernel_options), *devices]
        pipe = subprocess.PIPE
        with subprocess.Popen(argv, bufsize=0, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT) as qemu:
            try:
                return _Control(qemu, console).run(timeout_s, on_pause)
            finally:
                qemu.kill()


def root_tree(directory: Path, script: str) -> Path:
    """A root file system's files beneath `directory`: busybox, and an init that runs `script` as `run_guest` does."""
    for name in ("bin", "sbin", "proc", "sys", "dev"):
        (directory / name).mkdir(parents=True)
    busybox = require_program("busybox")
    shutil.copy(busybox, directory / "bin" / "busybox")
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, timeout=30, check=True).stdout
    for name in set(applets.split()) - {"busybox"}:
        (directory / "bin" / name).symlink_to("busybox")
    (directory / "script").write_text(SCRIPT_PRELUDE + script)
    init = directory / "sbin" / "init"
    init.write_text(ROOT_INIT)
    init.chmod(0o755)
    return directory


def attach_files() -> Mapping[str, bytes]:
    """Files for `run_guest` that make the program `nbdattach` of tests/support/nbdattach.py, and a Python for it."""
    python = os.path.realpath(sys.executable)
    argv = [python, "-I", "-S", "-c", LIST_MODULES]
    modules = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    libraries = [path for each in (python, *modules) for path in _libraries(each)]
    files = {path: Path(path).read_bytes() for path in (python, *modules, *libraries)}
    files["/nbdattach.py"] = Path(__file__).with_name("nbdattach.py").read_bytes()
    files["/programs/nbdattach"] = f'#!/bin/busybox sh\nexec {python} -I -S /nbdattach.py "$@"\n'.encode()
    return files


def _qemu_arguments(kernel: Path, initrd: Path, console: Path, kernel_options: str) -> list[str]:
    # Two processors: the kernel maps NBD connections to processors, so with one the second connection stays idle.
    # A plain model with a random number instruction boots a second faster than `max`. KVM is never asked for.
    return [
        *("-accel", "tcg,thread=multi", "-cpu", "Nehalem,+rdrand", "-smp", "2", "-m", "256"),
        *("-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"),
        *("-kernel", str(kernel), "-initrd", str(initrd)),
        *("-append", f"{KERNEL_OPTIONS} {kernel_options}"),
        *("-nic", "user,model=virtio-net-pci"),
        *("-serial", f"file:{console}", "-serial", "stdio"),
    ]


class _Control:
    """The host's end of the control line."""

    def __init__(self, qemu: subprocess.Popen[bytes], console: Path) -> None:
        assert qemu.stdin is not None
        assert qemu.stdout is not None
        self.qemu = qemu
        self.stdin = qemu.stdin
        self.stdout_fd = qemu.stdout.fileno()
        self.console = console
        self.buffer = b""

    def run(self, timeout_s: float, on_pause: Callable[[str], None]) -> GuestResult:
        self._wait_ready(time.monotonic() + BOOT_TIMEOUT_S)
        deadline = time.monotonic() + timeout_s
        values: dict[str, str] = {}
        while True:
            key, value = self._next(deadline, f"script did not end within {timeout_s} s")
            if key == "exit":
                break
            if key == "pause":
                on_pause(value)
                with contextlib.suppress(BrokenPipeError):  # the guest is gone: `_next` says so, with the console
                    self.stdin.write(b"\n")
            else:
                values[key] = value
        self._wait_power_off()
        return GuestResult(int(value), values, self._console_text())

    def _wait_ready(self, deadline: float) -> None:
        while self._next(deadline, f"guest did not boot within {BOOT_TIMEOUT_S} s") != ("ready", ""):
            pass

    def _wait_power_off(self) -> None:
        try:
            self.qemu.wait(POWER_OFF_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise self._timeout(f"guest did not power off within {POWER_OFF_TIMEOUT_S} s") from None

    def _next(self, deadline: float, problem: str) -> tuple[str, str]:
        """The next control line as (key, value); lines without `=` are QEMU's own words and join the error's text."""
        said: list[str] = []
        while True:
            line = self._read_line(deadline)
            if line is None:
                raise self._timeout(problem)
            if not line:
                status = self.qemu.wait()
                raise GuestError(f"guest ended without a result, QEMU's status is {status}: {said}{self._tail()}")
            key, separator, value = line.decode(errors="replace").strip().partition("=")
            if separator:
                return key, value
            said.append(key)

    def _read_line(self, deadline: float) -> bytes | None:
        """A line with its end; empty at the end of the stream; None at the deadline."""
        while b"\n" not in self.buffer:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([self.stdout_fd], [], [], remaining)[0]:
                return None
            data = os.read(self.stdout_fd, 65536)
            if not data:
                return b""
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line + b"\n"

    def _timeout(self, problem: str) -> GuestTimeoutError:
        self.qemu.kill()
        self.qemu.wait()
        return GuestTimeoutError(problem + self._tail())

    def _console_text(self) -> str:
        return self.console.read_text(errors="replace").replace("\r", "")

    def _tail(self) -> str:
        return f"\n--- guest console ---\n{self._console_text()[-CONSOLE_TAIL_SIZE:]}"


@cache
def boot_files() -> BootFiles:
    """Kernel and base archive, from the cache or built now (about 5 s and one download of 27 MB).

    Skips the test (or fails it, see `peer_unavailable`) when a program, the package lists or the network is missing.
    """
    if platform.machine() != "x86_64":
        peer_unavailable(f"the guest takes its programs from an x86_64 host, this one is {platform.machine()}")
    package = _kernel_package()
    base = Archive()
    base.add("/init", INIT.encode())
    _add_programs(base)
    digest = hashlib.sha256(repr(MODULES).encode() + base.to_bytes()).hexdigest()[:16]
    directory = _cache_root() / f"{package}-{digest}"
    if not directory.exists():
        _build(directory, package, base)
    return BootFiles(directory / "vmlinuz", directory / "base.cpio")


def _cache_root() -> Path:
    configured = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(configured) if configured.startswith("/") else Path.home() / ".cache"
    directory = root / "nbdimg-tests" / "guest"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        directory = Path(tempfile.gettempdir(), f"nbdimg-tests-{os.getuid()}", "guest")
        directory.mkdir(parents=True, exist_ok=True)
    return directory


def _kernel_package() -> str:
    """The newest cloud kernel that apt offers as `NAME=VERSION`, which `apt-get download` takes."""
    depends = _apt_cache("depends", KERNEL_META_PACKAGE)
    names = KERNEL_PACKAGE.findall(depends)
    if not names:
        peer_unavailable(f"apt knows no {KERNEL_META_PACKAGE}: run `apt-get update` on Debian")
    policy = _apt_cache("policy", names[0])
    version = re.search(r"^\s*Candidate: (\S+)$", policy, re.MULTILINE)
    if version is None or version[1] == "(none)":
        peer_unavailable(f"apt offers no version of {names[0]}: run `apt-get update`")
    return f"{names[0]}={version[1]}"


def _apt_cache(*arguments: str) -> str:
    """What apt's package lists say; empty about a package that they do not hold (which apt calls an error)."""
    argv = [require_program("apt-cache"), *arguments]
    env = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, env=env).stdout


def _add_programs(archive: Archive) -> None:
    busybox = require_program("busybox")
    archive.add("/bin/busybox", Path(busybox).read_bytes())
    programs = [require_program(name) for name in PROGRAMS]
    for program in programs:
        archive.add(f"/programs/{Path(program).name}", Path(program).read_bytes())
    for library in sorted({path for program in (busybox, *programs) for path in _libraries(program)}):
        archive.add(library, Path(library).read_bytes())


def _libraries(program: str) -> Iterator[str]:
    """Paths of the shared libraries and the loader of a program, none if it is static (which `ldd` calls an error)."""
    listing = subprocess.run([require_program("ldd"), program], capture_output=True, text=True, timeout=30, check=False)
    for line in listing.stdout.splitlines():
        path = re.search(r"(?:=> |^\s*)(/\S+) \(0x", line)
        if path is not None:
            yield path[1]


def _build(directory: Path, package: str, base: Archive) -> None:
    """Downloads the kernel, adds its modules to `base`, and makes both visible with one rename."""
    with tempfile.TemporaryDirectory(prefix="build-", dir=directory.parent) as scratch:
        _download(package, scratch)
        (deb,) = Path(scratch).glob("*.deb")
        root = Path(scratch, "root")
        subprocess.run([require_program("dpkg-deb"), "-x", str(deb), str(root)], timeout=120, check=True)
        names = []
        for module in _modules_in_load_order(root, MODULES):
            name = module.name.removesuffix(".xz")
            base.add(f"/modules/{name}", _read_module(module), 0o644)
            names.append(name)
        base.add("/modules/order", "".join(f"{name}\n" for name in names).encode(), 0o644)
        finished = Path(scratch, "finished")
        finished.mkdir()
        (kernel,) = root.glob("boot/vmlinuz-*")
        kernel.rename(finished / "vmlinuz")
        (finished / "base.cpio").write_bytes(base.to_bytes())
        try:
            finished.rename(directory)
        except OSError:
            if not directory.exists():  # else another process has built the same
                raise


def _download(package: str, directory: str) -> None:
    argv = [require_program("apt-get"), "download", "-q", package]
    try:
        subprocess.run(argv, cwd=directory, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=True)
    except subprocess.CalledProcessError as error:
        peer_unavailable(f"cannot download {package} (outdated lists? `apt-get update`): {error.stderr.strip()}")
    except subprocess.TimeoutExpired:
        peer_unavailable(f"cannot download {package} within {DOWNLOAD_TIMEOUT_S} s")


def _modules_in_load_order(root: Path, wanted: Sequence[str]) -> list[Path]:
    """The wanted modules, each after those that it depends on; without those built into the kernel.

    The package holds no modules.dep (its installation makes that); the source of it is each module's `depends` field.
    """
    (tree,) = [*root.glob("lib/modules/*"), *root.glob("usr/lib/modules/*")]
    built_in = {_module_name(Path(line)) for line in (tree / "modules.builtin").read_text().split()}
    available = {_module_name(path): path for path in tree.rglob("*.ko*")}
    order: dict[str, Path] = {}

    def visit(name: str) -> None:
        if name in built_in or name in order:
            return
        depends = re.search(rb"\0depends=([^\0]*)\0", _read_module(available[name]))
        for dependency in (depends[1].decode() if depends else "").split(","):
            if dependency:
                visit(_module_name(Path(dependency)))
        order[name] = available[name]

    for name in wanted:
        visit(name)
    return list(order.values())


def _module_name(path: Path) -> str:
    return path.name.partition(".")[0].replace("-", "_")


def _read_module(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data
