"""A server that runs from a configuration file, and what it says about reloading it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.rawclient import try_connect
from tests.support.rss import wait_until
from tests.support.server import START_TIMEOUT_S, ServerProcess

RELOAD_LIMIT_S = 20.0

WATCHING = """from nbdimg.server.reload import Reloader
Reloader.__init__.__kwdefaults__["watch_interval_s"] = {}
from nbdimg.__main__ import main
main()"""
"""The program, which looks at files as often as it is told here."""


class ConfiguredServer(ServerProcess):
    """`nbdimg serve --config FILE` in FILE's directory, ready when the constructor returns.

    `text` is the file's content, with a Unix socket `s` beside it as the listener unless it has its own. With
    `watch_interval_s` it looks at what it watches so often, else every `reload.WATCH_INTERVAL_S`.
    """

    def __init__(
        self,
        directory: Path,
        text: str,
        *,
        file: Path | None = None,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        watch_interval_s: float | None = None,
    ) -> None:
        self.file = file or directory / "nbdimg.toml"
        self.socket_path = str(directory / "s")
        self._reload_count = 0
        if file is None:
            self.write(text)
        program = ["-m", "nbdimg"] if watch_interval_s is None else ["-c", WATCHING.format(watch_interval_s)]
        argv = [sys.executable, *program, "serve", f"--config={self.file}", *options]
        super().__init__(argv, env)
        if not wait_until(lambda: not self.is_running() or answers(self.socket_path), START_TIMEOUT_S):
            self.kill()
        if not self.is_running():
            raise RuntimeError(f"the server ended with {self.process.returncode}: {self.stderr()}")

    def write(self, text: str) -> None:
        """Exchange the file, as editors and deployment tools do."""
        listen = "" if "listen =" in text else f'listen = ["nbd+unix:///?socket={self.socket_path}"]\n'
        new = self.file.with_suffix(".new")
        new.write_text(listen + text)
        new.replace(self.file)

    def reload(self, text: str) -> str:
        """Exchange the file, send SIGHUP, and wait; returns what the server says."""
        self.write(text)
        return self.hang_up()

    def hang_up(self) -> str:
        self.process.send_signal(signal.SIGHUP)
        return self.wait_reloaded()

    def wait_reloaded(self) -> str:
        """What the server says about the next reload."""
        self._reload_count += 1
        assert wait_until(lambda: len(self.reloads()) >= self._reload_count, RELOAD_LIMIT_S), self.stderr()
        return self.reloads()[self._reload_count - 1]

    def reloads(self) -> list[str]:
        lines = self.stderr().splitlines(keepends=True)
        return [line.strip() for line in lines if line.endswith("\n") and ("reloaded: " in line)]


def answers(path: str) -> bool:
    """Whether somebody listens at a Unix socket; its file is there a moment earlier."""
    client = try_connect(path)
    if client is not None:
        client.close()
    return client is not None


def export(name: str, path: str | os.PathLike[str], *more: str) -> str:
    """A raw export, as text of a configuration."""
    return "\n".join(["[[exports]]", f'name = "{name}"', f'path = "{path}"', 'format = "raw"', *more, ""])
