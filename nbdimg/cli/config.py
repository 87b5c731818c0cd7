"""`nbdimg config`: look at a configuration file without serving it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from nbdimg.cli.output import print_json, shown
from nbdimg.cli.streams import EXIT_USAGE, complain
from nbdimg.config import ServerConfig
from nbdimg.configfile import ConfigFileError, FileConfig, load_config
from nbdimg.server.checks import contradictions
from nbdimg.units import counted

config = typer.Typer(name="config", help="Configuration files.", no_args_is_help=True)


@config.callback()
def _config() -> None:
    """Configuration files."""


@config.command()
def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A configuration for nbdimg serve --config.")],
    as_json: Annotated[bool, typer.Option("--json", help="The result, or all problems, as JSON.")] = False,
) -> int:
    """Say all that is wrong with a configuration, as the environment changes it. Opens no other file.

    The exit status is 0 when nothing is, 2 otherwise.
    """
    problems: Sequence[str]
    try:
        loaded = load_config(file)
        problems = [f"{file}: {error}" for error in contradictions(loaded.server)]
    except ConfigFileError as error:
        problems = error.problems
    if problems:
        if as_json:
            print_json(path=file, problems=problems)
        else:
            for problem in problems:
                complain(problem)
        return EXIT_USAGE
    if as_json:
        print_json(path=file, problems=(), config=_described(loaded))
    else:
        print(f"{shown(file)}: {_summary(loaded.server)}")
    return 0


def _summary(server: ServerConfig) -> str:
    listeners = ", ".join(shown(str(uri)) for uri in server.listeners)
    return f"{counted(len(server.exports), 'export')} at {listeners}"


def _described(loaded: FileConfig) -> dict[str, Any]:
    """What would be served, in the words of the program's own settings; times in seconds, sizes in bytes."""
    described = dataclasses.asdict(loaded.server)
    described["listeners"] = [str(uri) for uri in loaded.server.listeners]
    return {**described, "reload": loaded.reload}
