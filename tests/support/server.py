"""Start a real NBD server process, wait until it listens, stop it.

`NbdimgServer` runs `python -m nbdimg serve` and reads the URIs that it prints; `PeerServer` runs any other server on a
Unix socket, for comparisons and as the control of a harness.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 20.0


def complaints(stderr: str) -> list[str]:
    """What a server says on standard error, without the lines about itself that each start has, and those of clients
    that came and went.
    """
    usual = ("sandbox: ", "runs as root", ": attached to ", ": detached from ")
    return [line for line in stderr.splitlines() if not any(each in line for each in usual)]


class ServerProcess:
    """A child process with its output in files, ended by its own process id. It inherits `descriptors`."""

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str] | None = None, descriptors: Sequence[int] = ()
    ) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="nbdimg-test-")
        self.stdout_path = Path(self.directory.name, "stdout")
        self.stderr_path = Path(self.directory.name, "stderr")
        with open(self.stdout_path, "wb") as out, open(self.stderr_path, "wb") as err:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, "NBDIMG_LOG_FORMAT": "text", **(env or {})},
                pass_fds=descriptors,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def stderr(self) -> str:
        return self.stderr_path.read_text(errors="replace")

    def stdout(self) -> str:
        return self.stdout_path.read_text(errors="replace")

    def is_running(self) -> bool:
        return self.process.poll() is None

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        return self.process.wait(timeout_s)

    def stop(self) -> int:
        """SIGTERM and wait; returns the exit status. SIGKILL past the timeout."""
        if self.is_running():
            self.terminate()
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            self.directory.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            sys.stderr.write(f"--- server stderr ---\n{self.stderr()}\n")
        self.stop()


class NbdimgServer(ServerProcess):
    """`nbdimg serve` with one Unix socket listener (or those given), ready when the constructor returns.

    `uris` holds every line that the server printed; `uri` the first; `socket_path` the default listener's socket.
    """

    def __init__(
        self,
        *images: str | os.PathLike[str],
        options: Sequence[str] = (),
        listen: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        program: Sequence[str] = (sys.executable, "-m", "nbdimg"),
        descriptors: Sequence[int] = (),
    ) -> None:
        self.socket_directory = tempfile.TemporaryDirectory(prefix="nbd-")
        self.socket_path = os.path.join(self.socket_directory.name, "s")
        listeners = [f"nbd+unix:///?socket={self.socket_path}"] if listen is None else list(listen)
        argv = [
            *program,
            "serve",
            *(f"--listen={uri}" for uri in listeners),
            *options,
            *(os.fspath(image) for image in images),
        ]
        super().__init__(argv, env, descriptors)
        self.uris = self._wait_ready(len(listeners) * max(1, len(images)))
        self.uri = self.uris[0]

    def _wait_ready(self, count: int) -> list[str]:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            lines = [line for line in self.stdout().splitlines() if line.startswith("nbd")]
            if len(lines) >= count:
                return lines
            if not self.is_running():
                raise RuntimeError(f"server exited with {self.process.returncode}: {self.stderr()}")
            time.sleep(0.01)
        self.kill()
        raise RuntimeError(f"server did not listen within {START_TIMEOUT_S} s: {self.stderr()}")

    def stop(self) -> int:
        try:
            return super().stop()
        finally:
            self.socket_directory.cleanup()

    def connect(self) -> socket.socket:
        """A fresh blocking connection to the default Unix socket."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(30)
        sock.connect(self.socket_path)
        return sock


class PeerServer(ServerProcess):
    """Another NBD server on a Unix socket, ready when the constructor returns:
    `PeerServer(lambda path: ["qemu-nbd", "-k", path, ...])`.
    """

    def __init__(self, argv: Callable[[str], Sequence[str]], env: Mapping[str, str] | None = None) -> None:
        self.socket_directory = tempfile.TemporaryDirectory(prefix="nbd-")
        self.socket_path = os.path.join(self.socket_directory.name, "s")
        super().__init__(argv(self.socket_path), env)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._greets():
            if not self.is_running() or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"{self.process.args!r} does not listen: {self.stderr()}")
            time.sleep(0.01)

    def _greets(self) -> bool:
        """Not until then does qemu-nbd hear SIGTERM: its socket takes connections before its loop runs."""
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(START_TIMEOUT_S)
            try:
                probe.connect(self.socket_path)
                return bool(probe.recv(1))
            except OSError:
                return False

    def stop(self) -> int:
        try:
            return super().stop()
        finally:
            self.socket_directory.cleanup()
