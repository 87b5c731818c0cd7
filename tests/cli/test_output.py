"""What every verb prints with."""

from __future__ import annotations

import sys

import pytest

from nbdimg.cli.output import print_table

COLUMNS = ("NAME", "SIZE", "FORMAT", "MODE")
ROW = ("vm1", "1048576", "qcow2", "rw")


@pytest.mark.parametrize("width", ["0", "1", "20", "80"])
def test_table_on_a_terminal_of_any_width_keeps_every_cell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: str
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_table(COLUMNS, [ROW], right=["SIZE"])
    printed = capsys.readouterr().out
    assert [cell for cell in (*COLUMNS, *ROW) if cell not in printed] == []
