"""What the profile is made of, of a real server under a real client."""

from __future__ import annotations

from pathlib import Path

from bench import profile, servers
from tests.support.peers import require_program


def test_function_costs_are_those_of_the_servers_own_functions(tmp_path: Path) -> None:
    require_program("fio")
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    costs = profile.function_costs(servers.SUBJECT, image, 0.5)
    assert any("export/lane.py" in each.name for each in costs), costs
    assert sum(each.self_share for each in costs) <= 1.001
