"""The units as a service manager runs them: their ExecStart lines, sockets and restrictions, with other paths.

What only a running manager can apply (users, mounts, the filter of system calls) is applied as far as a test can, or
compared: the calls that a session makes are traced, and must be among those that the filter lets through.
"""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.manifests import ROOT, SYSTEMD, free_port, moved
from tests.interop.samples import run_ok
from tests.server.test_systemd import Manager
from tests.support.configured import answers
from tests.support.peers import require_program
from tests.support.rss import wait_until
from tests.support.server import ServerProcess

LIMIT_S = 60.0
SIZE = 1 << 20

UNDER_UNIT = """
import ctypes, os, sys
PR_SET_NO_NEW_PRIVS, PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 38, 65, 1
libc = ctypes.CDLL(None)
os.umask(int(sys.argv[1], 8))
assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
libc.prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0)
os.execv(sys.argv[2], sys.argv[2:])
"""
"""UMask, NoNewPrivileges, and MemoryDenyWriteExecute where the kernel has it (Linux 6.3)."""


def settings(unit: str, name: str) -> list[str]:
    """The values of a setting, in the unit's order."""
    text = (SYSTEMD / unit).read_text().replace("\\\n", " ")
    return re.findall(rf"^{name}=(.*)$", text, re.MULTILINE)


class Installed:
    """A unit's files and directories in another place: configuration, images, and what it makes at run time."""

    def __init__(self, directory: Path) -> None:
        self.run = directory / "run"
        self.images = directory / "lib"
        self.etc = directory / "etc"
        for each in (self.run, self.images, self.etc):
            each.mkdir()
        self.port = free_port()
        self.places: dict[str, Path | str] = {
            "/run/nbdimg": self.run,
            "/var/lib/nbdimg": self.images,
            "/etc/nbdimg": self.etc,
            "127.0.0.1:10809": f"127.0.0.1:{self.port}",
            "%i": "vm1",
        }
        text = moved((ROOT / "conf/nbdimg.toml").read_text(), self.places)
        (self.etc / "nbdimg.toml").write_text(text)
        paths = [each["path"] for each in tomllib.loads(text)["exports"]]
        self.export_count = len(paths)
        for path in (*paths, str(self.images / "vm1.img")):
            kind = "qcow2" if path.endswith(".qcow2") else "raw"
            run_ok(require_program("qemu-img"), "create", "-q", "-f", kind, path, str(SIZE))

    def argv(self, unit: str) -> list[str]:
        """Its ExecStart line, under what else of the unit a process can take upon itself."""
        (line,), (umask,) = settings(unit, "ExecStart"), settings(unit, "UMask")
        program, *arguments = shlex.split(moved(line, self.places))
        assert program == "/usr/bin/nbdimg"
        return [sys.executable, "-c", UNDER_UNIT, umask, sys.executable, "-m", "nbdimg", *arguments]


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    return Installed(tmp_path)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path / "notify")
    yield manager
    manager.socket.close()


def size(uri: str) -> int:
    return int(run_ok(require_program("nbdinfo"), "--size", uri))


def test_service_starts_with_the_example_configuration_reloads_and_stops(
    installed: Installed, manager: Manager
) -> None:
    environment = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "30000000"}
    with ServerProcess(installed.argv("nbdimg.service"), environment) as server:
        assert manager.next() == ["READY=1", f"STATUS=serving {installed.export_count} exports"], server.stderr()
        path = installed.run / "nbd.sock"
        assert path.stat().st_mode & 0o777 == 0o660
        assert size(f"nbd+unix:///vm1?socket={path}") == SIZE
        assert size(f"nbd://127.0.0.1:{installed.port}/install") == SIZE
        (reload,) = settings("nbdimg.service", "ExecReload")
        assert reload == "/bin/kill -HUP $MAINPID"
        server.process.send_signal(signal.SIGHUP)
        assert manager.next()[0] == "RELOADING=1"
        assert manager.next() == ["READY=1", f"STATUS=serving {installed.export_count} exports"]
        server.terminate()
        assert manager.next() == ["STOPPING=1", "STATUS=draining"]
        assert server.wait() == 0


def test_service_of_one_image_serves_it_and_its_admin_socket(installed: Installed, manager: Manager) -> None:
    directory = Path(f"{installed.run}-vm1")
    directory.mkdir()
    with ServerProcess(installed.argv("nbdimg@.service"), {"NOTIFY_SOCKET": str(manager.path)}) as server:
        assert manager.next() == ["READY=1", "STATUS=serving 1 export"], server.stderr()
        assert size(f"nbd+unix:///vm1?socket={directory}/nbd.sock") == SIZE
        healthcheck = [
            sys.executable,
            "-m",
            "nbdimg",
            "healthcheck",
            "--socket",
            str(directory / "admin.sock"),
            "ready",
        ]
        assert subprocess.run(healthcheck, timeout=LIMIT_S).returncode == 0
        server.terminate()
        assert server.wait() == 0
    assert subprocess.run(healthcheck, timeout=LIMIT_S, stderr=subprocess.DEVNULL).returncode != 0


def test_socket_unit_hands_its_socket_to_the_service(installed: Installed) -> None:
    (address,) = settings("nbdimg.socket", "ListenStream")
    (name,) = settings("nbdimg.socket", "FileDescriptorName")
    path = moved(address, installed.places)
    assert path == f"{installed.run}.sock"
    argv = [require_program("systemd-socket-activate"), f"--listen={path}", f"--fdname={name}"]
    with ServerProcess([*argv, *installed.argv("nbdimg.service")]) as server:
        assert wait_until(lambda: not server.is_running() or answers(path), LIMIT_S)
        assert size(f"nbd+unix:///vm1?socket={path}") == SIZE
        assert f"nbd+unix:///vm1?socket={path}" in server.stdout().splitlines()
        assert size(f"nbd://127.0.0.1:{installed.port}/install") == SIZE
        server.terminate()
        assert server.wait() == 0


# The filter of system calls


def expanded(name: str) -> set[str]:
    """A system call, or those of a set of systemd's."""
    if not name.startswith("@"):
        return {name}
    output = run_ok(require_program("systemd-analyze"), "--no-pager", "syscall-filter", name)
    words = [line.strip() for line in output.splitlines()[1:]]
    return set[str]().union(*(expanded(word) for word in words if word and not word.startswith("#")))


def allowed_calls(unit: str) -> set[str]:
    allowed: set[str] = set()
    for line in settings(unit, "SystemCallFilter"):
        calls = set[str]().union(*(expanded(word) for word in line.removeprefix("~").split()))
        allowed = allowed - calls if line.startswith("~") else allowed | calls
    return allowed


def traced(argv: list[str], log: Path) -> list[str]:
    """With the tracer as a process beside, so that the one that is started is the server."""
    return [require_program("strace"), "-D", "-f", "-e", "signal=none", "-o", str(log), *argv]


def calls_of(log: Path, pid: int) -> set[str]:
    """Once the process has ended."""
    end = re.compile(rf"^{pid} +\+\+\+ exited with 0 \+\+\+$", re.MULTILINE)
    assert wait_until(lambda: end.search(log.read_text(errors="replace")) is not None, LIMIT_S)
    return set(re.findall(r"^\d+ +(?:<\.\.\. )?(\w+)(?:\(| resumed)", log.read_text(errors="replace"), re.MULTILINE))


@pytest.mark.parametrize("unit", ["nbdimg.service", "nbdimg@.service"])
def test_unit_lets_through_every_system_call_of_a_session(installed: Installed, tmp_path: Path, unit: str) -> None:
    is_template = "@" in unit
    directory = Path(f"{installed.run}-vm1") if is_template else installed.run
    directory.mkdir(exist_ok=True)
    log = tmp_path / "strace"
    uri = f"nbd+unix:///vm1?socket={directory}/nbd.sock"
    with ServerProcess(traced(installed.argv(unit), log)) as server:
        assert wait_until(lambda: not server.is_running() or uri in server.stdout().splitlines(), LIMIT_S)
        requests = ("write -P 1 0 64k", "flush", "discard 0 64k", "write -z 64k 64k", "read 0 1M")
        commands = [word for each in requests for word in ("-c", each)]
        run_ok(require_program("qemu-io"), "-f", "raw", "-t", "none", "-d", "unmap", *commands, uri)
        if not is_template:
            server.process.send_signal(signal.SIGHUP)
            assert wait_until(lambda: "reloaded: " in server.stderr(), LIMIT_S), server.stderr()
        server.terminate()
        assert server.wait(LIMIT_S) == 0
        calls = calls_of(log, server.pid)
    assert {"openat", "fdatasync", "prctl"} <= calls
    assert calls - allowed_calls(unit) == set()


def test_control_system_call_that_the_filter_stops_is_found(tmp_path: Path) -> None:
    log = tmp_path / "strace"
    with ServerProcess(traced([sys.executable, "-c", "import os; os.nice(1)"], log)) as process:
        assert process.wait(LIMIT_S) == 0
        assert calls_of(log, process.pid) - allowed_calls("nbdimg.service") == {"setpriority"}
