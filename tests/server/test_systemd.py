"""Sockets that systemd hands over, and what it is told; its own tools judge the units."""

from __future__ import annotations

import asyncio
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdimg.errors import ConfigError
from nbdimg.server.systemd import Inheritance, Notifier, inherit
from tests.support.activation import hand_over, listening
from tests.support.configured import ConfiguredServer, answers, export
from tests.support.rawclient import connect_negotiated, try_connect
from tests.support.rss import wait_until
from tests.support.server import ServerProcess, complaints

UNITS = Path("conf/systemd")
EXPOSURE_MAX = 1.5
NOTIFY_LIMIT_S = 20.0
ACTIVATE = shutil.which("systemd-socket-activate")
ANALYZE = shutil.which("systemd-analyze")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"\xd1" * 65536)
    return path


def stop(process: subprocess.Popen[str]) -> tuple[str, str]:
    process.send_signal(signal.SIGTERM)
    try:
        output = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


def served(address: str | tuple[str, int]) -> bool:
    with connect_negotiated(address, "disk") as client:
        return client.read(0, 512).data == b"\xd1" * 512


# Sockets


@pytest.mark.parametrize("names", ["nbd:other", "nbdimg.socket:nbdimg-vm1.socket", "nbdimg-clients:nbdimg-client", ""])
def test_activation_serves_unix_and_tcp_sockets_and_leaves_their_files(tmp_path: Path, image: Path, names: str) -> None:
    path = str(tmp_path / "s")
    with listening(path) as unix, listening(("127.0.0.1", 0)) as tcp:
        port = tcp.getsockname()[1]
        process = hand_over([unix, tcp], names, "serve", str(image))
        assert served(path)
        assert served(("127.0.0.1", port))
        output, errors = stop(process)
    assert output.split() == [f"nbd+unix:///disk?socket={path}", f"nbd://127.0.0.1:{port}/disk"]
    assert complaints(errors) == []
    assert os.path.exists(path)


def test_activation_clients_of_a_restart_wait_in_the_kernel(tmp_path: Path, image: Path) -> None:
    path = str(tmp_path / "s")
    with listening(path) as sock:
        first = hand_over([sock], "nbd", "serve", str(image))
        assert served(path)
        stop(first)
        waiting = try_connect(path)
        assert waiting is not None
        second = hand_over([sock], "nbd", "serve", str(image))
        with waiting:
            waiting.greet()
            assert waiting.negotiate("disk").size == 65536
        stop(second)


def test_activation_takes_the_place_of_a_listener_at_its_address_and_others_are_opened(
    tmp_path: Path, image: Path
) -> None:
    path, other = str(tmp_path / "s"), str(tmp_path / "t")
    listen = [f"--listen=nbd+unix:///?socket={each}" for each in (path, other)]
    with listening(path) as sock:
        process = hand_over([sock], "nbd", "serve", *listen, str(image))
        assert served(path)
        assert served(other)
        stop(process)
    assert os.path.exists(path)
    assert not os.path.exists(other)


def test_activation_meant_for_another_process_is_not_taken(tmp_path: Path, image: Path) -> None:
    path, own = str(tmp_path / "s"), str(tmp_path / "own")
    with listening(path) as sock:
        process = hand_over([sock], "nbd", "serve", f"--listen=nbd+unix:///?socket={own}", str(image), pid="1")
        assert wait_until(lambda: answers(own), 20)
        assert served(own)
        sock.setblocking(False)
        output, _ = stop(process)
    assert path not in output


def test_activation_of_what_does_not_listen_is_refused(tmp_path: Path, image: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        process = hand_over([sock], "nbd", "serve", str(image))
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 2
    assert (
        errors == "nbdimg: descriptor 3 (nbd) of LISTEN_FDS must be a listening Unix or TCP stream socket (Accept=no)\n"
    )


def test_activation_of_an_exposed_address_without_tls_is_refused(image: Path) -> None:
    with listening(("0.0.0.0", 0)) as sock:
        process = hand_over([sock], "nbd", "serve", str(image))
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "is reachable from other machines" in errors


def test_activation_name_with_tls_needs_tls(tmp_path: Path, image: Path) -> None:
    with listening(str(tmp_path / "s")) as sock:
        process = hand_over([sock], "nbd-tls", "serve", str(image))
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "nbds+unix:///?socket=" in errors
    assert "needs TLS" in errors


def test_activation_sockets_outlive_reloads_that_may_not_expose_them(tmp_path: Path, image: Path) -> None:
    """The file's own listener comes and goes beside the inherited one, which is open to all."""
    file, own = tmp_path / "nbdimg.toml", tmp_path / "own"
    allowed = f'insecure_plaintext = true\nlisten = ["nbd+unix:///?socket={own}"]\n{export("disk", image)}'
    file.write_text(allowed)
    log = tmp_path / "log"
    with listening(("0.0.0.0", 0)) as sock, log.open("w") as errors:
        address = ("127.0.0.1", sock.getsockname()[1])
        process = hand_over([sock], "nbd", "serve", f"--config={file}", stderr=errors)
        assert served(address)
        file.write_text(allowed.replace(str(own), f"{own}2"))
        process.send_signal(signal.SIGHUP)
        assert wait_until(lambda: "1 listener added, 1 listener removed" in log.read_text(), 20)
        assert served(address)
        assert served(f"{own}2")
        file.write_text(export("disk", image))
        process.send_signal(signal.SIGHUP)
        assert wait_until(lambda: "nothing was reloaded" in log.read_text(), 20)
        assert "is reachable from other machines" in log.read_text()
        assert served(f"{own}2")
        stop(process)


def test_inherit_without_variables_is_nothing() -> None:
    assert inherit({}) == Inheritance([], {})
    environment = {"LISTEN_FDS": "3", "LISTEN_PID": "1", "OTHER": "x"}
    assert inherit(environment) == Inheritance([], {})
    assert environment == {"OTHER": "x"}


def test_inherit_count_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="LISTEN_FDS is 'x', expected a number"):
        inherit({"LISTEN_FDS": "x", "LISTEN_PID": str(os.getpid())})


@pytest.mark.skipif(ACTIVATE is None, reason="systemd-socket-activate is not installed")
def test_activation_by_systemd_itself(tmp_path: Path, image: Path) -> None:
    path = str(tmp_path / "s")
    assert ACTIVATE is not None
    environment = [f"--setenv={name}={os.environ[name]}" for name in ("PYTHONPATH",) if name in os.environ]
    argv = [ACTIVATE, f"--listen={path}", "--fdname=nbd", *environment]
    with ServerProcess([*argv, sys.executable, "-m", "nbdimg", "serve", str(image)]) as server:
        assert wait_until(lambda: answers(path), 20)
        assert served(path)
        assert server.stdout() == f"nbd+unix:///disk?socket={path}\n"
        server.terminate()
        assert server.wait() == 0


# Notifications


class Manager:
    """The service manager's end of the notification socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(NOTIFY_LIMIT_S)

    def next(self) -> list[str]:
        """The next message that is no watchdog's."""
        while (message := self.socket.recv(4096).decode()) == "WATCHDOG=1":
            pass
        return message.split("\n")

    def is_told(self, timeout_s: float) -> bool:
        return bool(select.select([self.socket], [], [], timeout_s)[0])

    def forget(self) -> None:
        while self.is_told(0):
            self.socket.recv(4096)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path / "notify")
    yield manager
    manager.socket.close()


def test_notify_tells_ready_reloading_refusal_and_stopping(tmp_path: Path, image: Path, manager: Manager) -> None:
    text = export("disk", image)
    with ConfiguredServer(tmp_path, text, env={"NOTIFY_SOCKET": str(manager.path)}) as server:
        assert manager.next() == ["READY=1", "STATUS=serving 1 export"]
        assert served(server.socket_path)
        server.reload(text + 'description = "x"\n')
        reloading, since = manager.next()
        assert reloading == "RELOADING=1"
        assert re.fullmatch(r"MONOTONIC_USEC=\d+", since)
        assert manager.next() == ["READY=1", "STATUS=serving 1 export"]
        server.reload("zzz = 1\n" + text)
        assert manager.next()[0] == "RELOADING=1"
        ready, status = manager.next()
        assert ready == "READY=1"
        assert status.startswith("STATUS=serving 1 export; nothing was reloaded: ")
        assert "zzz: unknown key" in status
        server.terminate()
        assert manager.next() == ["STOPPING=1", "STATUS=draining"]
        assert server.wait() == 0


def test_notify_ready_comes_after_the_listeners_are_open(tmp_path: Path, image: Path, manager: Manager) -> None:
    path = tmp_path / "s"
    argv = [sys.executable, "-m", "nbdimg", "serve", f"--listen=nbd+unix:///?socket={path}", str(image)]
    with ServerProcess(argv, {"NOTIFY_SOCKET": str(manager.path)}):
        assert manager.next()[0] == "READY=1"
        assert served(str(path))


def test_notify_failed_start_is_never_ready(tmp_path: Path, manager: Manager) -> None:
    argv = [sys.executable, "-m", "nbdimg", "serve", str(tmp_path / "missing.img")]
    with ServerProcess(argv, {"NOTIFY_SOCKET": str(manager.path)}) as server:
        assert server.wait() == 3
    assert not manager.is_told(0)


def test_watchdog_is_fed_at_half_its_period_and_starves_with_the_loop(
    tmp_path: Path, image: Path, manager: Manager
) -> None:
    """SIGSTOP stands for a loop that is stuck; SIGCONT is the control that it was not something else."""
    environment = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "400000"}
    with ConfiguredServer(tmp_path, export("disk", image), env=environment) as server:
        manager.next()
        for _ in range(3):
            assert manager.socket.recv(4096) == b"WATCHDOG=1"
        server.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, server.pid, os.WSTOPPED | os.WNOWAIT)
        manager.forget()
        assert not manager.is_told(0.8)
        server.process.send_signal(signal.SIGCONT)
        assert manager.is_told(NOTIFY_LIMIT_S)


def test_watchdog_is_fed_at_a_socket_that_the_manager_has_made_anew(
    tmp_path: Path, image: Path, manager: Manager
) -> None:
    environment = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "200000"}
    with ConfiguredServer(tmp_path, export("disk", image), env=environment) as server:
        manager.next()
        manager.socket.close()
        manager.path.unlink()
        again = Manager(manager.path)
        with again.socket:
            assert again.socket.recv(4096) == b"WATCHDOG=1"
            server.terminate()
            assert again.next() == ["STOPPING=1", "STATUS=draining"]
            assert server.wait() == 0


def test_watchdog_of_a_loop_that_a_callback_blocks_is_silent(manager: Manager) -> None:
    """Fed by a thread of its own it would go on."""

    async def scenario() -> None:
        notifier = Notifier({"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "100000"})
        try:
            manager.forget()
            assert not manager.is_told(0.3)
            await asyncio.sleep(0.1)
            assert manager.is_told(0)
        finally:
            notifier.close()

    asyncio.run(scenario())


def test_watchdog_meant_for_another_process_is_not_fed(manager: Manager) -> None:
    async def scenario() -> None:
        environment = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
        notifier = Notifier(environment)
        await asyncio.sleep(0.05)
        assert not manager.is_told(0)
        assert environment == {}
        notifier.ready("x\ny")
        assert manager.next() == ["READY=1", "STATUS=x y"]
        notifier.close()
        notifier.ready("closed")
        assert not manager.is_told(0)

    asyncio.run(scenario())


def test_notify_abstract_socket_and_a_manager_that_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    name = f"nbdimg-test-{os.getpid()}"

    async def scenario() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind("\0" + name)
            notifier = Notifier({"NOTIFY_SOCKET": f"@{name}"})
            notifier.ready("x")
            assert sock.recv(100) == b"READY=1\nSTATUS=x"
        notifier.stopping()
        notifier.close()

    asyncio.run(scenario())
    assert "the service manager was not told STOPPING=1" in caplog.text


# Units


@pytest.fixture
def units(tmp_path: Path) -> list[Path]:
    """The units with a program that exists here, templates as an instance."""
    found: list[Path] = []
    for unit in sorted(UNITS.iterdir()):
        copy = tmp_path / unit.name.replace("@.", "@vm1.")
        copy.write_text(unit.read_text().replace("/usr/bin/nbdimg", sys.executable))
        found.append(copy)
    return found


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
def test_units_verify_and_are_little_exposed(units: list[Path]) -> None:
    assert ANALYZE is not None
    done = subprocess.run([ANALYZE, "verify", "--man=no", *map(str, units)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    for unit in units:
        if unit.suffix == ".service":
            command = [ANALYZE, "security", "--offline=true", "--no-pager", str(unit)]
            report = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
            (exposure,) = re.findall(r"Overall exposure level .*: ([0-9.]+) ", report)
            assert float(exposure) <= EXPOSURE_MAX


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
def test_control_unit_with_a_wrong_setting_fails_the_verification(units: list[Path]) -> None:
    assert ANALYZE is not None
    unit = next(each for each in units if each.name == "nbdimg.service")
    unit.write_text(unit.read_text().replace("Type=notify", "Type=telepathy"))
    done = subprocess.run([ANALYZE, "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60)
    assert "telepathy" in done.stderr
