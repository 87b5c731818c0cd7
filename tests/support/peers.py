"""Programs of other projects that tests run against: find them, or say clearly that they are missing.

A missing peer skips a test on a developer's machine. With `NBDIMG_REQUIRE_PEERS=1` (continuous integration) it fails
the test instead, so that a broken installation cannot pass by skipping everything.
"""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

REQUIRE_PEERS_VARIABLE = "NBDIMG_REQUIRE_PEERS"
SYSTEM_DIRECTORIES = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # not on an ordinary user's PATH


def peer_unavailable(reason: str) -> NoReturn:
    """Skips the running test, or fails it when `NBDIMG_REQUIRE_PEERS` is 1."""
    if os.environ.get(REQUIRE_PEERS_VARIABLE) == "1":
        pytest.fail(f"{reason} ({REQUIRE_PEERS_VARIABLE}=1)")
    pytest.skip(reason)


def require_program(*names: str) -> str:
    """The absolute path of the first program that is found in PATH and the system directories; see `peer_unavailable`
    if none is.
    """
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *SYSTEM_DIRECTORIES])
    for name in names:
        found = shutil.which(name, path=path)
        if found is not None:
            return os.path.abspath(found)
    peer_unavailable(f"{' or '.join(names)} is not installed")
