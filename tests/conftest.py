"""What holds for all tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from nbdimg.server import sandbox


@pytest.fixture(autouse=True, scope="session")
def _own_process_stays_free() -> Iterator[None]:
    """`run(["serve", ...])` in the tests' own process does not confine it, which would hold for all tests behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "confine", lambda *_: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _children_hear_of_interrupts() -> None:
    """A script's `&` has the tests ignore SIGINT, and with them all programs that they start and interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
