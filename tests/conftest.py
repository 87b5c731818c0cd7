"""What holds for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nbdimg.server import sandbox


@pytest.fixture(autouse=True, scope="session")
def _own_process_stays_free() -> Iterator[None]:
    """`run(["serve", ...])` in the tests' own process does not confine it, which would hold for all tests behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "confine", lambda *_: None)
        yield
