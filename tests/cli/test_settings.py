"""docs/operations.md says of every setting where it can be given, and has every option of `serve`."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path
from typing import Any

import typer

import nbdimg
from nbdimg.cli.main import app
from nbdimg.configfile import environment
from nbdimg.configfile.limits import LIMITS
from nbdimg.configfile.mapping import ADMIN_KEYS, EXPORT_KEYS, METRICS_KEYS, TLS_KEYS, TOP_KEYS

OPERATIONS = Path(nbdimg.__file__).parents[1].joinpath("docs/operations.md").read_text()

TABLES = {
    "limits": tuple(LIMITS),
    "tls": TLS_KEYS,
    "admin": ADMIN_KEYS,
    "metrics": METRICS_KEYS,
    "exports": EXPORT_KEYS,
}
OF_EVERY_COMMAND = {"--help", "--json", "--socket", "--url", "--token-file"}


def columns(title: str) -> list[list[str]]:
    """What stands in code quotes in each column of the first table under a heading."""
    section = re.split(r"\n#+ ", OPERATIONS.partition(f"# {title}\n")[2])[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("| `")]
    assert rows
    return [
        list(chain.from_iterable(re.findall("`([^`]+)`", cell) for cell in column))
        for column in zip(*rows, strict=True)
    ]


def options(*names: str) -> set[str]:
    """The long options of a command."""
    command: Any = typer.main.get_command(app)
    for name in names:
        command = command.commands[name]
    found = (max(each.opts, key=len) for each in command.params if each.param_type_name == "option")
    return {*found} - OF_EVERY_COMMAND


def test_every_setting_is_shown_in_each_place_where_it_can_be_given() -> None:
    keys, of_serve, variables, of_add = columns("Every setting by its place")
    assert keys == [
        *(key for key in TOP_KEYS if key not in TABLES),
        *(f"{table}.{key}" for table, known in TABLES.items() for key in known),
    ]
    assert {each for each in of_serve if each.startswith("-")} == options("serve") - {"--config", "--verbose"}
    assert {each for each in of_add if each.startswith("-")} == options("ctl", "add")
    source = Path(environment.__file__).read_text()
    assert {each.partition("_LIMIT_")[0] + "_LIMIT_" * ("_LIMIT_" in each) for each in variables} == {
        *re.findall(r'"(NBDIMG_\w+)"', source)
    }
    for each in variables:
        problems: list[str] = []
        environment.from_environment({each: "?"}, problems)
        assert len(problems) == 1, each


def test_every_option_of_serve_is_described() -> None:
    described = columns("serve")[0]
    assert {each.split()[0] for each in described if each.startswith("--")} == options("serve")
