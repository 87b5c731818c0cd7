"""The command line: its verbs, and how every error becomes one line and an exit status.

0   done; for `serve`: drained after SIGTERM or SIGINT
1   something failed: a flush, a server that is not there; or a file that is to be made exists
2   the command line or the configuration is wrong
3   an image cannot be opened: missing, locked, refused; or its format lacks what is asked for
4   an address cannot be listened on
130 interrupted by SIGINT; 143, 129: `create`, `resize` and `bitmap` by SIGTERM, SIGHUP
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from nbdimg.cli.bitmap import bitmap
from nbdimg.cli.check import check
from nbdimg.cli.compact import compact
from nbdimg.cli.config import config
from nbdimg.cli.connect_help import connect_help
from nbdimg.cli.create import create
from nbdimg.cli.ctl import ctl
from nbdimg.cli.ctl_bitmap import ctl_bitmap
from nbdimg.cli.healthcheck import main as healthcheck
from nbdimg.cli.info import info
from nbdimg.cli.interrupt import EXIT_INTERRUPTED, Interrupted
from nbdimg.cli.map import map_
from nbdimg.cli.resize import resize
from nbdimg.cli.serve import serve
from nbdimg.cli.snapshot import snapshot
from nbdimg.cli.streams import EXIT_FAILED, EXIT_USAGE, complain, exit_with, flushed
from nbdimg.cli.top import top
from nbdimg.errors import ConfigError, ImageError, ListenError, NbdimgError

EXIT_IMAGE = 3
EXIT_LISTEN = 4

_STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (ConfigError, EXIT_USAGE),
    (ListenError, EXIT_LISTEN),
    (ImageError, EXIT_IMAGE),
    (NbdimgError, EXIT_FAILED),
    (OSError, EXIT_FAILED),
)

_FILE_METAVARS = ("FILE", "DIR", "PATH")

_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    name="nbdimg",
    help="An NBD server for virtual disk images.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=_SETTINGS,
)
app.command()(serve)
app.command()(create)
app.command(context_settings={"ignore_unknown_options": True})(resize)  # -1M is a size
app.command()(compact)
app.command()(info)
app.command("map")(map_)
app.command()(check)
app.add_typer(snapshot)
app.add_typer(bitmap)
app.add_typer(config)
app.command()(connect_help)
ctl.add_typer(ctl_bitmap)
app.add_typer(ctl)
app.command()(top)


@app.command("healthcheck", add_help_option=False, context_settings={"ignore_unknown_options": True})
def _healthcheck(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> int:
    """Ask a running server how it is: exit status 0 when it is well, 1 otherwise."""
    return healthcheck(arguments or [])


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from nbdimg import __version__

        typer.echo(f"nbdimg {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """An NBD server for virtual disk images."""


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status; errors go to standard error as one line."""
    try:
        status = _command()(list(arguments), prog_name="nbdimg", standalone_mode=False)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        return _report(error)
    return status if isinstance(status, int) else 0


def _command() -> Any:
    """The root command. Its help shows no type for switches, which take no value; typer 0.29 would show <bool>. Options
    that name a file or directory take no empty name.
    """
    root: Any = typer.main.get_command(app)
    waiting = [root]
    while waiting:
        command = waiting.pop()
        for parameter in command.get_params(typer.Context(command, **_SETTINGS)):
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
            if parameter.metavar in _FILE_METAVARS:
                parameter.callback = _named
        waiting += getattr(command, "commands", {}).values()
    return root


def _named(context: Any, parameter: Any, value: Any) -> Any:
    """The value of an option that names a file: an empty one, of a variable that is not set, would often stand for the
    current directory.
    """
    if "" in (value if isinstance(value, list | tuple) else (value,)):
        raise typer.BadParameter("it is empty, expected a name", context, parameter)
    return value


def _report(error: Exception) -> int:
    """Say what went wrong in one line."""
    usage_message = getattr(error, "format_message", None)
    if usage_message is not None:
        if usage_message():
            context = getattr(error, "ctx", None)
            command = "nbdimg" if context is None else context.command_path
            complain(f"{usage_message().rstrip('.')}; see {command} --help")
        return EXIT_USAGE
    if isinstance(error, Interrupted):
        complain(str(error))
        return error.status
    for kind, status in _STATUSES:
        if isinstance(error, kind):
            if not _is_of_output(error):
                complain(_sentence(error))
            return status
    logging.getLogger("nbdimg").debug("the failure's traceback", exc_info=error)
    complain(f"internal error: {type(error).__name__}: {error}")
    return EXIT_FAILED


def _is_of_output(error: Exception) -> bool:
    """Whether it comes from printing; then that has been said."""
    return isinstance(error, OSError) and error.filename is None and not flushed(sys.stdout)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    return str(error)


def main() -> None:
    """The console script."""
    exit_with(run(sys.argv[1:]))
