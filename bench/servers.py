"""The servers under test: nbdimg and its peers, each started fresh on its own Unix socket.

All serve the same raw file, one after the other, so all find the same pages in the page cache.

qemu-nbd: `--cache=writeback` with `--aio=threads` and with `--aio=io_uring` are both accepted and both use the page
cache. `--aio=native` demands `--cache=none`, which bypasses it: no fair entry in a warm table. `-e 64` lifts the limit
of one client, `-t` keeps the server after the first one leaves.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.server import NbdimgServer, PeerServer

PROBE_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Server:
    """A running server that accepts connections."""

    name: str
    pid: int
    uri: str


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """How to start a server. `peer_argv(socket_path, image)` is None for nbdimg, which has a launcher of its own."""

    name: str
    version_argv: tuple[str, ...]
    peer_argv: Callable[[str, Path], list[str]] | None = None

    def missing(self, image: Path) -> str | None:
        """Why this server cannot take part here, found by starting it once; None when it can."""
        if self.peer_argv is None:
            if not _has_command_line("nbdimg"):
                return "the nbdimg package has no command line here"
        elif shutil.which(self.version_argv[0]) is None:
            return f"{self.version_argv[0]} is not installed"
        try:
            with self.start(image):
                return None
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            return f"does not start: {' '.join(str(error).split())[:300]}"

    def version(self) -> str:
        """The first line that the program prints about its version, or `unknown`."""
        try:
            done = subprocess.run(
                self.version_argv, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return "unknown"
        lines = done.stdout.splitlines()
        return lines[0].strip() if done.returncode == 0 and lines else "unknown"

    @contextmanager
    def start(
        self, image: Path, program: Sequence[str] = (sys.executable, "-m", "nbdimg"), options: Sequence[str] = ()
    ) -> Iterator[Server]:
        """Run the server on `image` for the length of the block. `program` replaces nbdimg's interpreter line, and
        `options` are nbdimg's.

        Raises: RuntimeError when it does not listen.
        """
        process: NbdimgServer | PeerServer
        if self.peer_argv is None:
            process = NbdimgServer(image, options=["--format", "raw", *options], program=program)
        else:
            argv = self.peer_argv
            process = PeerServer(lambda path: argv(path, image))
        with process:
            yield Server(self.name, process.pid, f"nbd+unix:///?socket={process.socket_path}")


def _has_command_line(package: str) -> bool:
    try:
        return importlib.util.find_spec(f"{package}.__main__") is not None
    except ImportError:
        return False


def _qemu_nbd(aio: str) -> Callable[[str, Path], list[str]]:
    def argv(path: str, image: Path) -> list[str]:
        return ["qemu-nbd", "-f", "raw", "-e", "64", "-t", "--cache=writeback", f"--aio={aio}", "-k", path, str(image)]

    return argv


def _nbdkit(path: str, image: Path) -> list[str]:
    return ["nbdkit", "-f", "-U", path, "file", str(image)]


SUBJECT = ServerSpec("nbdimg", (sys.executable, "-m", "nbdimg", "--version"))
PEERS = (
    ServerSpec("qemu-nbd threads", ("qemu-nbd", "--version"), _qemu_nbd("threads")),
    ServerSpec("qemu-nbd io_uring", ("qemu-nbd", "--version"), _qemu_nbd("io_uring")),
    ServerSpec("nbdkit file", ("nbdkit", "--version"), _nbdkit),
)
SERVERS = (SUBJECT, *PEERS)


def select_servers(words: Sequence[str]) -> tuple[ServerSpec, ...]:
    """The servers whose name contains any of the words, in table order; all of them for no word.

    Raises: ValueError for a word that no server's name contains.
    """
    for word in words:
        if not any(word in spec.name for spec in SERVERS):
            raise ValueError(f"no server matches {word!r}; servers: {', '.join(spec.name for spec in SERVERS)}")
    return tuple(spec for spec in SERVERS if not words or any(word in spec.name for word in words))
