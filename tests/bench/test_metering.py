"""The comparison with and without a meter runs, and compares what it says it compares."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import metering
from nbdimg.export.meter import Meter, Tally
from nbdimg.server.loop import run_loop
from nbdimg.wire.messages import SimpleReplies


def test_every_cell_is_measured_and_has_its_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "DEPTHS", (16,))
    found = run_loop(metering.costs(tmp_path, 0.05))
    assert [cost.name for cost in found] == ["raw read x 16", "raw write x 16", "qcow2 read x 16", "qcow2 write x 16"]
    for cost in found:
        assert 0 < cost.request_us < 1e6
        assert 0 < cost.ratio_min <= cost.ratio <= cost.ratio_max
        assert cost.control > 0


@pytest.mark.parametrize(("tally", "count"), [(metering.NoTally, 0), (metering.EachTally, 5)])
def test_tallies_of_the_comparison_count_nothing_or_each_request(tally: type[Tally], count: int) -> None:
    meter = Meter()
    tally(meter, 28, SimpleReplies()).ran(5, 2, 5 * 28 + 2 * 4096, 5 * 16 + 3 * 4096)
    assert sum(each.count for each in meter.commands.values()) == count
