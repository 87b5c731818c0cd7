"""Verbs run in this process, in a directory of their own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nbdimg.cli.main import run

COMPARED_MAX = 128 << 20
"""Bytes of a file that is compared whole; of larger ones, which are sparse, only size and time."""


class Command:
    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def said(self, *arguments: str, status: int = 0) -> str:
        """Run nbdimg to its end, expect a status and no complaint; gives what it printed."""
        found = run(arguments)
        captured = self._capfd.readouterr()
        assert (found, captured.err) == (status, "")
        return captured.out

    def refused(self, verb: str, arguments: list[str], status: int, pattern: str) -> None:
        """Expect a status, one line, and the directory as it was."""
        before = _state()
        assert run([verb, *arguments]) == status
        captured = self._capfd.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert re.fullmatch(f"nbdimg: {pattern}", line), line
        is_unchanged = _state() == before
        assert is_unchanged


def _state() -> dict[Path, object]:
    def state(path: Path) -> object:
        status = path.lstat()
        if path.is_file() and status.st_size <= COMPARED_MAX:
            return path.read_bytes()
        return status.st_mode, status.st_size, status.st_mtime_ns

    return {path: state(path) for path in Path().iterdir()}


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path
