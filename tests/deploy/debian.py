"""A release of Debian as files: its packages extracted and not installed, and what pip has for its Python."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.deploy.manifests import ROOT
from tests.interop.samples import run_ok
from tests.support.peers import require_program

EXTRACT_LIMIT_S = 280.0


class NotPrepared(Exception):
    """This machine has no packages of the release, no wheels for its Python, or does not let root mount."""


@dataclass(frozen=True)
class Release:
    suite: str
    python: str


BOOKWORM = Release("bookworm", "3.11")
TRIXIE = Release("trixie", "3.13")


def extract(root: Path, release: Release, packages: Sequence[str]) -> None:
    """The files of the packages and of all that they depend on. Their installation scripts do not run.

    Raises: NotPrepared.
    """
    program = [require_program("mmdebstrap"), "--quiet", "--variant=extract", f"--include={','.join(packages)}"]
    try:
        run_ok(*program, release.suite, root, timeout_s=EXTRACT_LIMIT_S)
    except AssertionError as error:
        raise NotPrepared(f"no packages of {release.suite} can be had here: {error}") from None


def project() -> Any:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def pip(command: str, where: str, requirements: Sequence[str], release: Release) -> list[str]:
    """`pip COMMAND WHERE REQUIREMENTS`, with wheels for the release's Python."""
    options = ["--quiet", "--disable-pip-version-check", "--only-binary=:all:", f"--python-version={release.python}"]
    return [sys.executable, "-m", "pip", command, *options, where, *requirements]
