"""The measurement of many exports: that it runs, and that it does not call bad figures good."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import fleet
from bench.fleet import Figures, Worker
from tests.support.server import NbdimgServer

GOOD = Figures(
    start_s=1.0,
    start_cpu_s=1.0,
    reload_same_s=0.1,
    reload_adjusted_s=0.2,
    reload_removed_s=0.3,
    added_a_second=100.0,
    removed_a_second=100.0,
    errors=0,
    requests=1000,
    storm=2000.0,
    storm_cpu_s=0.0005,
    memory=1 << 25,
    memory_an_export=8192.0,
)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"start_s": 2.0}, "start took 2.00 s"),
        ({"reload_adjusted_s": 1.5}, "a reload took 1.50 s"),
        ({"errors": 1}, "clients saw 1 errors"),
        ({"requests": 0}, "no client got on"),
        ({"storm": 1499.0}, "1499 connections a second"),
    ],
)
def test_figures_that_miss_a_goal_are_named(bad: dict[str, float], said: str) -> None:
    assert GOOD.misses() == []
    (miss,) = replace(GOOD, **bad).misses()  # type: ignore[arg-type]
    assert said in miss


def test_fleet_measures_a_small_one(capsys: pytest.CaptureFixture[str]) -> None:
    """The goals are for a quiet machine."""
    fleet.main(["--exports", "8", "--added", "4", "--seconds", "0.1", "--format", "qcow2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["errors"] == 0
    assert all(found[name] > 0 for name in found if name != "errors")


def test_control_worker_that_is_not_served_counts_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with NbdimgServer(image) as server:
        worker = Worker(server.socket_path, "another")
        worker.start()
        worker.stop()
    assert worker.errors == 1
    assert "a client of another" in capsys.readouterr().err
