"""What holds for all tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType

import pytest

from nbdimg.server import sandbox


@pytest.fixture(autouse=True, scope="session")
def _own_process_stays_free() -> Iterator[None]:
    """`run(["serve", ...])` in the tests' own process does not confine it, which would hold for all tests behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "confine", lambda *_: None)
        yield


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.default_int_handler(number, frame)


@pytest.fixture(autouse=True, scope="session")
def _interrupts_are_heard() -> None:
    """A script's `&` has the tests ignore SIGINT, and with them all programs that they start and interrupt.

    Python's own handler `asyncio.run` would exchange for one of its own, which names the task; and `signal`, given the
    old one back, makes a text of it, with all that the task returned: 50 ms for a disk of 16 MiB.
    """
    signal.signal(signal.SIGINT, _interrupt)
