"""What a confined process can still do: tried from inside (sandbox_probe.py), and by a server's own features.

Every refusal has its control: the same attempt with the sandbox off succeeds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdimg.config import ExportConfig, ServerConfig, TlsConfig
from nbdimg.configfile import Overrides, load_config
from nbdimg.errors import ConfigError
from nbdimg.server import sandbox, seccomp
from nbdimg.server.sandbox import READ, SOCKETS, WRITE, Allowance, Sandbox, allowance
from nbdimg.storage import landlock
from nbdimg.uri import NbdUri
from tests.formats.test_confinement import ESCAPES, Scene, qemu_img
from tests.support.configured import ConfiguredServer, export
from tests.support.rawclient import connect_negotiated
from tests.support.rawprotocol import Command
from tests.support.rss import thread_count
from tests.support.server import NbdimgServer

PROBE = Path(__file__).with_name("sandbox_probe.py")
PROBE_LIMIT_S = 60
KERNEL = landlock.version()
NOBODY = 65534
USAGE = 2

CLONE_SYSVSEM = 0x40000
IPPROTO_MPTCP = 262


def has_mptcp() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP):
        return True
    return False


HAS_MPTCP = has_mptcp()

HAS_FILTER = os.uname().machine in seccomp.ARCHITECTURES

needs_filter = pytest.mark.skipif(not HAS_FILTER, reason="no filter for this machine")
needs_landlock = pytest.mark.skipif(KERNEL < landlock.VERSION_OF_SCOPES, reason="this kernel's Landlock is too old")


def probe(attempts: dict[str, list[Any]], *, mode: str = "auto", **settings: Any) -> dict[str, Any]:
    asked = {
        "mode": mode,
        "version": None,
        "filters": True,
        "exports": [],
        "ports": [],
        "attempts": attempts,
        **settings,
    }
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, str(PROBE), json.dumps(asked)],
        capture_output=True,
        text=True,
        timeout=PROBE_LIMIT_S,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


class World:
    """`mine` holds images, `theirs` a victim; listeners at `port`, at an abstract name and at a file; at another one
    datagrams are received, and at `udp_port`.
    """

    def __init__(self, directory: Path, port: int, free_port: int, abstract: str, udp_port: int) -> None:
        self.mine, self.theirs = directory / "mine", directory / "theirs"
        for each in (self.mine, self.theirs):
            each.mkdir()
            (each / "a").write_bytes(b"x" * 4096)
        (self.mine / "link").symlink_to(self.theirs / "a")
        self.port, self.free_port, self.abstract, self.udp_port = port, free_port, abstract, udp_port
        self.stream, self.datagrams = str(self.theirs / "stream"), str(self.theirs / "datagrams")
        self.exports = [[str(self.mine / "a"), False]]

    def attempts(self) -> dict[str, list[Any]]:
        victim = str(self.theirs / "a")
        return {
            "read": ["read", victim],
            "read by a link": ["read", str(self.mine / "link")],
            "read of another process": ["read", f"/proc/{os.getpid()}/environ"],
            "write": ["write", victim],
            "truncate": ["truncate", victim],
            "list": ["list", str(self.theirs)],
            "make": ["make", str(self.theirs / "new")],
            "make beside an image": ["make", str(self.mine / "new")],
            "remove": ["remove", victim],
            "rename": ["rename", victim],
            "socket": ["socket", str(self.theirs / "socket")],
            "execute": ["execute", shutil.which("true")],
            "execute what is in memory": ["execute memory", ""],
            "connect": ["connect", self.port],
            "bind": ["bind", self.free_port],
            "abstract": ["unix", "\0" + self.abstract],
            "named": ["unix", self.stream],
            "datagram to a named socket": ["send to unix", self.datagrams],
            "datagram from a pair": ["send from pair", self.datagrams],
            "UDP": ["udp", self.udp_port],
            "fast open": ["fast open", self.port],
            "fast open of a message": ["message fast open", self.port],
            "listen at any port": ["listen", 0],
            "mode": ["chmod", victim],
            "owner": ["chown", victim],
            "times": ["touch", victim],
            "signal": ["signal", os.getpid()],
            "limits of a process": ["limits", os.getpid()],
            "priority of a process": ["priority", os.getpid()],
            "memory of a process": ["memory", 0],
            "unshare": ["unshare", CLONE_SYSVSEM],
            **({"MPTCP": ["mptcp", self.port]} if HAS_MPTCP else {}),
        }


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        tcp, free = (stack.enter_context(socket.socket()) for _ in range(2))
        abstract, stream = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2))
        datagrams = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        for each in (tcp, free, udp):
            each.bind(("127.0.0.1", 0))
        port, free_port, udp_port = (each.getsockname()[1] for each in (tcp, free, udp))
        free.close()
        name = f"nbdimg-test-{os.getpid()}"
        abstract.bind("\0" + name)
        world = World(tmp_path, port, free_port, name, udp_port)
        stream.bind(world.stream)
        datagrams.bind(world.datagrams)
        for listener in (tcp, abstract, stream):
            listener.listen(64)
        yield world


# What is given up


def test_control_everything_that_a_confined_process_may_not_do_works_without_the_sandbox(world: World) -> None:
    found = probe(world.attempts(), mode="off")
    assert found["summary"] == "off"
    assert found["main"] == found["thread"] == dict.fromkeys(world.attempts(), "ok")


REFUSED_FROM = {"truncate": 3, "connect": 4, "bind": 4, "abstract": 6, "signal": 6}
"""The version of Landlock that refuses it; others of BY_LANDLOCK, 1."""

BY_LANDLOCK = {
    *("read", "read by a link", "read of another process", "write", "truncate", "list", "make", "make beside an image"),
    *("remove", "rename", "socket", "execute", "execute what is in memory", "connect", "bind", "abstract", "signal"),
}


def refused_by_landlock(world: World, version: int) -> dict[str, str]:
    """What comes of each attempt without a filter."""
    refusals = {name: "EPERM" if name in ("abstract", "signal") else "EACCES" for name in BY_LANDLOCK}
    known = {name: each for name, each in refusals.items() if version >= REFUSED_FROM.get(name, 1)}
    return {**dict.fromkeys(world.attempts(), "ok"), **(known if version else {})}


@needs_landlock
@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 6, None])
def test_confined_process_is_refused_what_its_kernel_can_refuse(world: World, version: int | None) -> None:
    found = probe(world.attempts(), version=version, filters=False, exports=world.exports)
    number = KERNEL if version is None else version
    expected = refused_by_landlock(world, number)
    assert found["main"] == expected
    assert found["thread"] == expected
    assert found["summary"].startswith(f"Landlock {number}: files")
    assert found["summary"].endswith("; no filter of system calls")
    assert ("TCP" in found["summary"]) == (number >= 4)
    assert ("signals" in found["summary"]) == (number >= 6)


AS_LANDLOCK_SAYS = BY_LANDLOCK - {"execute", "execute what is in memory", "connect", "abstract", "signal"}
"""What the filter lets pass; it comes first."""


@needs_filter
@pytest.mark.parametrize("has_tcp", [True, False])
@pytest.mark.parametrize("version", [0, pytest.param(None, marks=needs_landlock)])
def test_filtered_process_is_refused_all_ways_out(world: World, version: int | None, has_tcp: bool) -> None:
    """With TCP listeners of its own it can make TCP sockets, and listen where the kernel pleases."""
    ports = [world.free_port + 1] if has_tcp else []
    found = probe(world.attempts(), version=version, exports=world.exports, ports=ports)
    by_landlock = refused_by_landlock(world, KERNEL if version is None else version)
    expected = {
        **dict.fromkeys(world.attempts(), "EPERM"),
        **{name: by_landlock[name] for name in AS_LANDLOCK_SAYS},
        **({"listen at any port": "ok"} if has_tcp else {"bind": "EPERM"}),
    }
    assert found["main"] == expected
    assert found["thread"] == expected
    assert found["summary"].endswith("; system calls")


@needs_landlock
def test_confined_process_keeps_what_serving_needs(world: World) -> None:
    golden = world.theirs / "a"
    attempts: dict[str, list[Any]] = {
        "read": ["read", str(world.mine / "a")],
        "write": ["write", str(world.mine / "a")],
        "truncate": ["truncate", str(world.mine / "a")],
        "read read-only": ["read", str(golden)],
        "write read-only": ["write", str(golden)],
        "own port": ["bind", world.free_port],
        "mounts": ["read", "/proc/self/mountinfo"],
        "descriptors": ["list", "/proc/self/fd"],
    }
    found = probe(attempts, mode="require", exports=[*world.exports, [str(golden), True]], ports=[world.free_port])
    assert found["main"] == {**dict.fromkeys(attempts, "ok"), "write read-only": "EACCES"}


LAZY = (
    *("cryptography.hazmat.primitives.ciphers", "isal.isal_zlib", "backports.zstd", "uvloop", "aiohttp.web"),
    *("prometheus_client", "rich.console", "ssl", "encodings.idna", "concurrent.futures.thread", "nbdimg.cli.main"),
)
"""Modules that a server may import for the first time after it is confined, some only by a reload."""


@needs_landlock
def test_confined_process_imports_what_it_imported_before() -> None:
    installed = [each for each in LAZY if importlib.util.find_spec(each.partition(".")[0])]
    attempts = {each: ["import", each] for each in installed}
    expected = dict.fromkeys(installed, "ok")
    assert probe(attempts, mode="off")["main"] == expected
    assert probe(attempts, mode="require")["main"] == expected


@needs_landlock
@pytest.mark.parametrize("case", ["absolute", "dots", "symlink", "absolute-symlink", "directory-symlink"])
def test_confined_process_with_a_gate_that_lets_all_pass_gives_no_secret_away(tmp_path: Path, case: str) -> None:
    """The second line of defence, with the first one taken away."""
    scene = Scene(tmp_path)
    name, prepare, *_ = ESCAPES[case]
    prepare(scene)
    scene.overlay(name.format(scene=scene))
    attempts = {"image": ["image", str(scene.top)]}
    exports = [[str(scene.top), False]]
    assert probe(attempts, exports=exports, mode="off")["main"] == {"image": "ok"}, "control: the secret is read"
    assert probe(attempts, exports=exports)["main"] == {"image": "EACCES"}


# Modes


@pytest.mark.parametrize(
    ("version", "found"), [(0, "has no Landlock"), (3, "has version 3 of Landlock, which restricts no TCP")]
)
def test_require_on_a_kernel_that_cannot_is_refused(version: int, found: str) -> None:
    refusal = probe({}, mode="require", version=version)["refusal"]
    assert refusal == (
        f"sandbox is require and this kernel {found}, expected version 4 (Linux 6.7) or later; auto takes what there is"
    )


def test_auto_on_a_kernel_that_can_nothing_goes_on(world: World) -> None:
    found = probe(world.attempts(), version=0, filters=False, exports=world.exports)
    assert found["summary"] == "no Landlock; no filter of system calls"
    assert found["main"] == dict.fromkeys(world.attempts(), "ok")


NO_LANDLOCK = """
import sys
from nbdimg.cli.main import run
from nbdimg.storage import landlock

def refuse(number, *arguments):
    raise OSError(38, "Function not implemented")

landlock.system_call = refuse
sys.exit(run(sys.argv[1:]))
"""


def test_serve_auto_without_landlock_says_so_and_serves(tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(b"a" * 4096)
    program = (sys.executable, "-c", NO_LANDLOCK)
    with NbdimgServer(tmp_path / "a.img", options=["--format=raw"], program=program) as server:
        with connect_negotiated(server.socket_path, "a") as client:
            assert client.read(0, 512).data == b"a" * 512
        assert "sandbox: no Landlock" in server.stderr()
        assert server.stop() == 0


def test_serve_require_without_landlock_exits_2_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(b"a" * 4096)
    argv = [sys.executable, "-c", NO_LANDLOCK, "serve", "--sandbox=require", str(tmp_path / "a.img")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=PROBE_LIMIT_S)
    assert done.returncode == USAGE
    assert done.stdout == ""
    assert re.fullmatch(r"nbdimg: sandbox is require and this kernel has no Landlock, expected .*\n", done.stderr)


def test_config_key_is_a_mode_and_the_command_line_goes_before_it(tmp_path: Path) -> None:
    file = tmp_path / "nbdimg.toml"
    file.write_text('sandbox = "require"\n')
    assert load_config(file).server.sandbox == "require"
    assert load_config(file, overrides=Overrides(sandbox="off")).server.sandbox == "off"
    file.write_text("")
    assert load_config(file).server.sandbox == "auto"
    file.write_text("\nsandbox = 1\n")
    with pytest.raises(ConfigError, match=r"toml:2: sandbox: 1 is not allowed, expected auto, require or off"):
        load_config(file)


def test_serve_unknown_mode_names_the_known_ones() -> None:
    argv = [sys.executable, "-m", "nbdimg", "serve", "--sandbox=maybe"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=PROBE_LIMIT_S)
    assert done.returncode == USAGE
    assert done.stderr == "nbdimg: --sandbox: 'maybe' is not allowed, expected auto, require or off\n"


# The server's process


def states(pid: int) -> set[tuple[str, ...]]:
    """NoNewPrivs and Seccomp of each thread."""
    found: set[tuple[str, ...]] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        found.add(tuple(re.findall(r"^(?:NoNewPrivs|Seccomp):\t(\d)$", (task / "status").read_text(), re.MULTILINE)))
    return found


def opened(pid: int) -> list[str]:
    return [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()]


def core_limit(pid: int) -> list[str]:
    (line,) = [line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if line.startswith("Max core")]
    return line.split()[4:6]


@needs_landlock
def test_serve_confines_all_of_its_threads_and_dumps_no_core(tmp_path: Path) -> None:
    """What a thread may do, the one that starts it could: a worker with NoNewPrivs was started behind the sandbox."""
    path = tmp_path / "a.img"
    path.write_bytes(b"a" * (1 << 20))
    with NbdimgServer(path, options=["--format=raw"]) as server:
        with connect_negotiated(server.socket_path, "a") as client:
            assert client.write(0, b"b" * 4096).error == 0
            assert client.request(Command.FLUSH).error == 0
        assert thread_count(server.pid) > 1, "a worker has flushed"
        assert states(server.pid) == {("1", "2" if HAS_FILTER else "0")}
        assert "anon_inode:[io_uring]" not in opened(server.pid), "by which all could be done"
        assert core_limit(server.pid) == ["0", "0"]
        assert f"sandbox: Landlock {KERNEL}: files, TCP, abstract sockets, signals; " in server.stderr()
        assert ("; system calls\n" in server.stderr()) == HAS_FILTER
    with NbdimgServer(path, options=["--format=raw", "--sandbox=off"]) as server:
        assert states(server.pid) == states(os.getpid()), "control"
        assert "sandbox: off" in server.stderr()


@needs_landlock
def test_serve_tells_a_manager_at_an_abstract_address_from_within_the_sandbox(tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(b"a" * 4096)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0nbdimg-manager-{os.getpid()}")
        manager.settimeout(30)
        environment = {"NOTIFY_SOCKET": f"@nbdimg-manager-{os.getpid()}"}
        with NbdimgServer(tmp_path / "a.img", options=["--format=raw"], env=environment) as server:
            assert manager.recv(100) == b"READY=1\nSTATUS=serving 1 export"
            assert server.stop() == 0
        assert manager.recv(100) == b"STOPPING=1\nSTATUS=draining"


@contextlib.contextmanager
def public_directory() -> Iterator[Path]:
    """One that other users reach; pytest's own is closed to them."""
    with tempfile.TemporaryDirectory(prefix="nbdimg-test-") as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


PLAIN_USER = f"""
import contextlib, io, os, sys
from nbdimg.cli.main import run
with contextlib.suppress(ImportError):
    import uvloop
with contextlib.redirect_stdout(io.StringIO()):
    run(["config", "check", "conf/nbdimg.toml"])
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
sys.exit(run(sys.argv[1:]))
"""
"""As nobody if these tests run as root, else as whoever runs them. What is needed is imported before, in part by the
first command: the interpreter may lie where others cannot read."""


@needs_landlock
def test_serve_runs_as_a_plain_user_who_owns_nothing_but_the_image() -> None:
    with public_directory() as directory:
        image, sockets = directory / "a.img", directory / "run"
        image.write_bytes(b"a" * 65536)
        sockets.mkdir()
        if os.geteuid() == 0:
            for each in (image, sockets):
                os.chown(each, NOBODY, NOBODY)
        uri = f"nbd+unix:///?socket={sockets}/s"
        options = ["--sandbox=require", "--format=raw", f"--listen={uri}"]
        process = subprocess.Popen(
            [sys.executable, "-c", PLAIN_USER, "serve", *options, str(image)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"nbd+unix:///a?socket={sockets}/s\n"
            with connect_negotiated(str(sockets / "s"), "a") as client:
                assert client.write(4096, b"b" * 4096).error == 0
                assert client.request(Command.FLUSH).error == 0
            if os.geteuid() == 0:
                assert re.findall(r"^Uid:.*", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE) == [
                    "Uid:" + f"\t{NOBODY}" * 4
                ]
            process.terminate()
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
        assert process.returncode == 0, errors
        assert "root" not in errors
        assert image.read_bytes()[4096:8192] == b"b" * 4096
        assert not (sockets / "s").exists()


@needs_landlock
@pytest.mark.parametrize(
    ("mode", "options", "reason"),
    [(0o600, [], "read it"), (0o600, ["--read-only"], "read it"), (0o644, [], "write to it")],
)
@pytest.mark.skipif(os.geteuid() != 0, reason="it takes a file of another user")
def test_serve_as_a_user_whom_the_mode_refuses_does_not_blame_the_sandbox(
    mode: int, options: list[str], reason: str
) -> None:
    with public_directory() as directory:
        image = directory / "a.img"
        image.write_bytes(bytes(65536))
        image.chmod(mode)
        os.chown(directory, NOBODY, NOBODY)
        options = [f"--listen=nbd+unix:///?socket={directory}/s", *options]
        command = [sys.executable, "-c", PLAIN_USER, "serve", *options, str(image)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        said = f"nbdimg: {image}: Permission denied to {reason} as user {NOBODY}\n"
        assert (done.returncode, done.stderr) == (3, said)


@pytest.mark.skipif(os.geteuid() != 0, reason="this is not root")
def test_serve_as_root_says_that_it_need_not_be(tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(b"a" * 4096)
    with NbdimgServer(tmp_path / "a.img", options=["--format=raw"]) as server:
        assert "this runs as root, which serving does not need" in server.stderr()


# Reload


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[ConfiguredServer, str]]:
    directory = tmp_path / "served"
    directory.mkdir()
    (directory / "keep.img").write_bytes(b"k" * 4096)
    keep = export("keep", "keep.img")
    with ConfiguredServer(directory, keep) as server:
        yield server, keep


def assert_serves(server: ConfiguredServer) -> None:
    with connect_negotiated(server.socket_path, "keep") as client:
        assert client.read(0, 512).data == b"k" * 512


RESTART = "which the configuration at the start did not ask for: restart nbdimg"
HINT = "; image_directories (--image-directory) are for images to come"


@needs_landlock
def test_reload_of_what_the_sandbox_does_not_cover_is_refused_and_asks_for_a_restart(
    served: tuple[ConfiguredServer, str], tmp_path: Path
) -> None:
    server, keep = served
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.img").write_bytes(b"a" * 4096)
    (server.file.parent / "link.img").symlink_to(outside / "a.img")
    port = 'listen = ["nbd://127.0.0.1:1"]\n'
    unix = f'listen = ["nbd+unix:///?socket={outside}/s"]\n'
    cases = [
        (keep + export("a", outside / "a.img"), f"the sandbox does not allow {outside} for writing, {RESTART}{HINT}"),
        (keep + export("a", outside / "a.img", "read_only = true"), f"{outside} for reading, {RESTART}"),
        (keep + export("a", "link.img"), f"{outside} for writing, {RESTART}"),
        (keep + f'allow_references = ["{outside}"]\n', f"{outside} for writing, {RESTART}"),
        (keep + f'key_file = "{outside}/a.img"\n', f"{outside} for reading, {RESTART}"),
        (keep + f'key_files = {{ x = "{outside}/a.img" }}\n', f"{outside} for reading, {RESTART}"),
        (port + keep, f"the sandbox does not allow TCP port 1, {RESTART}"),
        (unix + keep, f"{outside} for sockets, {RESTART}"),
        ('sandbox = "off"\n' + keep, "sandbox was auto at the start and would be off: restart nbdimg to change it"),
    ]
    for text, expected in cases:
        said = server.reload(text)
        assert "nothing was reloaded: " in said
        assert expected in said, (text, said)
        assert_serves(server)


def test_reload_beyond_the_start_is_applied_as_control_with_the_sandbox_off(tmp_path: Path) -> None:
    directory, outside = tmp_path / "served", tmp_path / "outside"
    for each in (directory, outside):
        each.mkdir()
    (directory / "keep.img").write_bytes(b"k" * 4096)
    (outside / "a.img").write_bytes(b"a" * 4096)
    keep = export("keep", "keep.img")
    with ConfiguredServer(directory, keep, options=["--sandbox=off"]) as server:
        assert "1 export added" in server.reload(keep + export("a", outside / "a.img"))
        with connect_negotiated(server.socket_path, "a") as client:
            assert client.read(0, 512).data == b"a" * 512


@needs_filter
def test_reload_that_would_ask_others_is_refused(served: tuple[ConfiguredServer, str]) -> None:
    """For a host's addresses, or whether anybody answers at a socket's file; at the start both are asked."""
    server, keep = served
    left_over = server.file.parent / "t"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(left_over))
    said = server.reload(f'listen = ["nbd+unix:///?socket={server.socket_path}", "nbd+unix:///?socket=t"]\n{keep}')
    assert "t: Address already in use, or the file was left over: the sandbox lets nobody ask" in said
    assert left_over.exists()
    assert_serves(server)
    left_over.unlink()
    said = server.reload(f'listen = ["nbd+unix:///?socket={server.socket_path}", "nbd://127.0.0.1:0"]\n{keep}')
    assert f"the sandbox does not allow TCP port 0, {RESTART}" in said


@needs_filter
def test_reload_with_another_host_to_look_up_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keep.img").write_bytes(b"k" * 4096)
    keep = "insecure_plaintext = true\n" + export("keep", "keep.img")
    listen = f'listen = ["nbd+unix:///?socket={tmp_path}/s", "nbd://HOST:0"]\n'
    with ConfiguredServer(tmp_path, listen.replace("HOST", "127.0.0.1") + keep) as server:
        said = server.reload(listen.replace("HOST", "nbd.test") + keep)
        assert f"the sandbox does not allow looking up nbd.test, {RESTART}" in said
        assert "1 listener added, 1 listener removed" in server.reload(listen.replace("HOST", "localhost") + keep)
        assert_serves(server)


NAME_SERVICE = """
import socket, sys
from nbdimg.cli.main import run

def look_up(host, *arguments, **settings):
    if host in ("nbd.test", "localhost"):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver:
            resolver.connect(("127.0.0.1", 53))
        host = "127.0.0.1"
    return real(host, *arguments, **settings)

real, socket.getaddrinfo = socket.getaddrinfo, look_up
sys.exit(run(sys.argv[1:]))
"""


@needs_filter
def test_serve_looks_up_its_hosts_and_replaces_left_over_sockets_before_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(b"a" * 4096)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "t"))
    listen = ["nbd://nbd.test:0", "nbd://localhost:0", f"nbd+unix:///?socket={tmp_path}/t"]
    options = ["--format=raw", "--insecure-plaintext"]
    program = (sys.executable, "-c", NAME_SERVICE)
    with NbdimgServer(tmp_path / "a.img", options=options, listen=listen, program=program) as server:
        port = int(re.findall(r"nbd://nbd.test:(\d+)/a", server.uri)[0])
        for address in (("127.0.0.1", port), str(tmp_path / "t")):
            with connect_negotiated(address, "a") as client:
                assert client.read(0, 512).data == b"a" * 512


@needs_filter
def test_serve_at_what_cannot_be_listened_at_says_the_same_as_without_the_sandbox(tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(b"a" * 4096)
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()
        for options in (
            [f"--listen=nbd+unix:///?socket={path}"],
            ["--listen=nbd://a..b", "--insecure-plaintext"],
            [f"--admin-socket={path}"],
            ["--metrics-listen=a..b:1", "--insecure-plaintext"],
        ):
            said = []
            for mode in ("auto", "off"):
                argv = ["serve", f"--sandbox={mode}", "--format=raw", *options, str(tmp_path / "a.img")]
                done = subprocess.run(
                    [sys.executable, "-m", "nbdimg", *argv], capture_output=True, text=True, timeout=PROBE_LIMIT_S
                )
                said.append((done.returncode, done.stderr))
            assert said[0] == said[1]
            assert "cannot listen on " in said[0][1]


@needs_landlock
def test_reload_within_the_directories_of_the_start_is_applied(served: tuple[ConfiguredServer, str]) -> None:
    """Below them too, and for what is a new file behind an old name."""
    server, keep = served
    directory = server.file.parent
    (directory / "sub").mkdir()
    (directory / "sub" / "new.img").write_bytes(b"n" * 4096)
    socket_uri = f"nbd+unix:///?socket={directory}/t"
    listen = f'listen = ["nbd+unix:///?socket={server.socket_path}", "{socket_uri}"]\n'
    said = server.reload(listen + keep + export("new", "sub/new.img"))
    assert "reloaded: 1 export added, 1 listener added" in said
    with connect_negotiated(str(directory / "t"), "new") as client:
        assert client.write(0, b"w" * 512).error == 0
        assert client.request(Command.FLUSH).error == 0
    (directory / "other.img").write_bytes(b"k" * 4096)
    (directory / "other.img").replace(directory / "keep.img")
    assert "reloaded: " in server.reload(keep.replace("keep.img", "./keep.img"))
    assert_serves(server)


@needs_landlock
def test_reload_from_an_image_directory_is_applied(tmp_path: Path) -> None:
    directory, later = tmp_path / "served", tmp_path / "later"
    for each in (directory, later):
        each.mkdir()
    (directory / "keep.img").write_bytes(b"k" * 4096)
    (later / "a.img").write_bytes(b"a" * 4096)
    keep = f'image_directories = ["{later}"]\n' + export("keep", "keep.img")
    with ConfiguredServer(directory, keep) as server:
        assert "1 export added" in server.reload(keep + export("a", later / "a.img"))
        with connect_negotiated(server.socket_path, "a") as client:
            assert client.write(0, b"w" * 512).error == 0
        assert "does not allow" in server.reload(keep + export("b", tmp_path / "b.img"))


@needs_landlock
@pytest.mark.skipif(os.geteuid() != 0, reason="root is refused by the sandbox alone")
def test_reload_from_a_directory_that_was_exchanged_says_so(tmp_path: Path) -> None:
    """By its name it is one of the start; by its inode, which is what counts, it is not."""
    served, images = tmp_path / "served", tmp_path / "images"
    for each in (served, images):
        each.mkdir()
    (images / "a.img").write_bytes(b"a" * 4096)
    first = export("a", images / "a.img")
    with ConfiguredServer(served, first) as server:
        images.rename(tmp_path / "parked")
        images.mkdir()
        (images / "b.img").write_bytes(b"b" * 4096)
        said = server.reload(first + export("b", images / "b.img"))
        assert "b.img: Permission denied by the sandbox, since its directory was exchanged after the start" in said
        (tmp_path / "parked" / "b.img").write_bytes(b"b" * 4096)
        images.rename(tmp_path / "new")
        (tmp_path / "parked").rename(images)
        assert "1 export added" in server.reload(first + export("b", images / "b.img")), "control"


# The policy


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    for name in ("images", "roots", "keys", "run", "conf/..1"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "images" / "a").write_bytes(b"")
    (tmp_path / "keys" / "link").symlink_to(tmp_path / "conf" / "..1" / "key")
    return tmp_path


def test_allowance_names_the_directories_of_everything_that_is_configured(layout: Path) -> None:
    config = ServerConfig(
        exports=(
            ExportConfig(f"{layout}/images/a", roots=(f"{layout}/roots",), key_path=f"{layout}/keys/link"),
            ExportConfig("/dev/null/x", is_read_only=True, parent_path=f"{layout}/parents/p"),
        ),
        listeners=(NbdUri(socket=f"{layout}/run/s"), NbdUri(host="::1", port=10), NbdUri(host="127.0.0.1", port=0)),
        tls=TlsConfig(f"{layout}/conf/cert"),
    )
    found = allowance(config, f"{layout}/nbdimg.toml")
    assert found.ports == {0, 10}
    assert found.paths == {
        f"{layout}/images": WRITE,
        f"{layout}/roots": WRITE,
        f"{layout}/parents": READ,
        f"{layout}/keys": READ,
        f"{layout}/conf/..1": READ,
        f"{layout}/conf": READ,
        f"{layout}/run": SOCKETS,
        "/dev/null": READ,
        str(layout): READ,
    }


def test_allowance_of_a_file_at_the_root_and_of_a_device_is_the_file_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_is_block_device", lambda path: path == "/dev/sda")
    config = ServerConfig((ExportConfig("/a.img"), ExportConfig("/dev/sda", is_read_only=True)), listeners=())
    assert allowance(config).paths == {"/a.img": WRITE, "/dev/sda": READ}


def test_check_compares_with_every_directory_above(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    granted = Allowance({str(tmp_path): READ, f"{tmp_path}/a": SOCKETS}, frozenset({1}))
    held = Sandbox("auto", 7, True, granted, None)
    held.check(Allowance({f"{tmp_path}/a/b": READ | SOCKETS, str(tmp_path): READ}, frozenset({1})))
    held.check(Allowance({f"{tmp_path}/missing/x": WRITE}, frozenset()))
    with pytest.raises(ConfigError, match=f"{tmp_path}/a/b for writing"):
        held.check(Allowance({f"{tmp_path}/a/b": WRITE}, frozenset()))
    with pytest.raises(ConfigError, match=f"{tmp_path} for sockets"):
        held.check(Allowance({str(tmp_path): SOCKETS}, frozenset()))
    with pytest.raises(ConfigError, match="TCP port 2"):
        held.check(Allowance({}, frozenset({2})))
    replace(held, version=3).check(Allowance({}, frozenset({2})))
    replace(held, version=0).check(Allowance({"/": WRITE}, frozenset({2})))


def test_library_use_confines_nothing() -> None:
    assert sandbox.summary() == "off"


def test_units_allow_the_system_calls_of_the_sandbox() -> None:
    """systemd kills a service that makes another one than its filter names; @system-service names none of these."""
    for unit in Path("conf/systemd").glob("nbdimg*.service"):
        text = unit.read_text()
        for call in ("landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self", "seccomp"):
            assert re.search(rf"^SystemCallFilter=(?!~).*\b{call}\b", text, re.MULTILINE), (unit, call)


# Images that reach for files outside, through the server


def hostile(scene: Scene) -> Iterator[str]:
    """Makes one top image after the other; yields the field that reaches where it must not."""
    for _, prepare, *_ in ESCAPES.values():
        with contextlib.suppress(FileExistsError):
            prepare(scene)
    os.mkfifo(scene.inside / "fifo")
    names = [name.format(scene=scene) for name, *_ in ESCAPES.values()]
    names += ["/proc/self/exe", 'json:{"driver":"raw","file":{"filename":"/etc/passwd"}}', "nbd://127.0.0.1:1/x"]
    for name in (*names, "fifo", "/dev/zero", "top.qcow2"):
        scene.overlay(name)
        yield "backing file"
        scene.top.unlink()
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={scene.secret}", str(scene.top), "64K")
    yield "external data file"
    scene.top.unlink()
    create = ("create", "-q", "-u", "-f", "qcow2", "-F", "qcow2")
    for name, backing in (("mutual.qcow2", "top.qcow2"), ("top.qcow2", "mutual.qcow2")):
        qemu_img(*create, "-b", backing, str(scene.inside / name), "64K")
    yield "backing file"
    scene.top.unlink()


@needs_landlock
def test_reload_with_images_that_reach_outside_is_refused_one_after_the_other(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    (scene.inside / "keep.img").write_bytes(b"k" * 4096)
    keep = export("keep", "keep.img")
    text = f'{keep}[[exports]]\nname = "top"\npath = "top.qcow2"\nformat = "qcow2"\n'
    with ConfiguredServer(scene.inside, keep) as server:
        for field in hostile(scene):
            said = server.reload(text)
            assert "nothing was reloaded: " in said
            assert field in said
            assert_serves(server)
        scene.overlay("base")
        assert "1 export added" in server.reload(text), "control"
