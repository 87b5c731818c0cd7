"""The facts of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import environment


def test_stolen_time_is_the_share_of_what_passed_since(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = iter(["cpu  100 0 50 800 10 0 5 35 7 0\ncpu0 1 1", "cpu  150 0 80 850 20 0 5 85 9 0\ncpu0 1 1"])
    monkeypatch.setattr(Path, "read_text", lambda path: next(stats))
    assert environment.Steal().share() == "26.3%"


def test_stolen_time_of_this_machine_is_a_share() -> None:
    share = environment.Steal().share()
    assert 0 <= float(share.removesuffix("%")) <= 100
