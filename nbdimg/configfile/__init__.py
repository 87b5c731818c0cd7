"""The configuration file: TOML, environment and command line become one `ServerConfig`, checked in one pass.

    defaults  <  file  <  environment  <  command line

A problem names the file, the line, the key's path, the value and what is allowed; all of a file are found at once. The
dataclasses of `config.py` are mapped by hand and not by a validation library: that knows no lines, echoes values (here
one may be a secret), and takes longer to import than the rest of the program.

Secrets stand in files of their own. A key that looks like one, and a file name that looks like the secret itself, are
refused without being shown.
"""

from __future__ import annotations

import codecs
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nbdimg.config import DEFAULT_LISTENER, AdminConfig, ExportConfig, ServerConfig, TcpAddress, TlsConfig
from nbdimg.configfile.environment import from_environment
from nbdimg.configfile.limits import limit_contradictions
from nbdimg.configfile.mapping import RELOADS, mapped, mapped_export
from nbdimg.configfile.reader import Reader
from nbdimg.errors import ConfigError
from nbdimg.storage.short import read_short
from nbdimg.uri import NbdUri

__all__ = ["ConfigFileError", "FileConfig", "Overrides", "config_without_file", "export_of", "load_config"]

FILE_SIZE_MAX = 16 << 20
"""Bytes of a configuration file; more is some other file."""

PATIENCE_S = 10.0
"""For the writer of a FIFO to come to its end. At the start no signal is heard meanwhile."""


_SYNTAX = (
    ("Cannot overwrite a value", "this key is given twice"),
    ("Duplicate inline table key", "this key is given twice"),
    ("Cannot declare", "this table is there already"),
    ("Cannot mutate immutable", "this table has ended before: give all of its keys in one place"),
    ("Cannot redefine", "this table has ended before: give all of its keys in one place"),
)
"""What `tomllib` says in words of its own making, and what it means."""


class ConfigFileError(ConfigError):
    """What is wrong with a configuration; `problems` holds one sentence for each, the message the first."""

    def __init__(self, problems: Sequence[str]) -> None:
        more = f" (and {len(problems) - 1} more: nbdimg config check FILE)" if len(problems) > 1 else ""
        super().__init__(problems[0] + more)
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Overrides:
    """What the command line says; None: nothing. `limits` by the names of `Limits`, `tls` and `admin` by those of
    TlsConfig and AdminConfig: what it does not say of them stays as the file has it.
    """

    listeners: tuple[NbdUri, ...] | None = None
    limits: Mapping[str, Any] = field(default_factory=dict)
    allows_plaintext: bool | None = None
    tls: Mapping[str, Any] = field(default_factory=dict)
    admin: Mapping[str, Any] = field(default_factory=dict)
    metrics_address: TcpAddress | None = None
    sandbox: str | None = None
    image_directories: tuple[str, ...] | None = None
    log_format: str | None = None


@dataclass(frozen=True, slots=True)
class FileConfig:
    """A configuration and when to read it again, one of RELOADS."""

    server: ServerConfig
    reload: str = RELOADS[0]


def load_config(
    path: str | os.PathLike[str],
    *,
    environment: Mapping[str, str] | None = None,
    overrides: Overrides | None = None,
    default_listeners: tuple[NbdUri, ...] = (DEFAULT_LISTENER,),
) -> FileConfig:
    """Read a file. Relative names in it are meant from its own directory.

    Args:
        environment: None: the process's.
        default_listeners: where nothing says otherwise.

    Raises: ConfigFileError: it cannot be read, is no TOML, or has a key or value that is not allowed.
    """
    name = os.fspath(path)
    text = _read(name)
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigFileError([_syntax_problem(name, text, error)]) from None
    except RecursionError:
        raise ConfigFileError([f"{name}: lists or tables are nested too deeply"]) from None
    except ValueError:
        raise ConfigFileError([f"{name}: a number has too many digits"]) from None
    reader = Reader(name, content, text)
    given = overrides or Overrides()
    config = FileConfig(*mapped(reader, given.tls, given.admin))
    return _finished(reader, config, environment, given, default_listeners)


def config_without_file(
    exports: tuple[ExportConfig, ...],
    *,
    environment: Mapping[str, str] | None = None,
    overrides: Overrides | None = None,
    default_listeners: tuple[NbdUri, ...] = (DEFAULT_LISTENER,),
) -> ServerConfig:
    """The configuration of exports that the command line names.

    Raises: ConfigFileError: the environment is wrong. ConfigError: what is given does not go together.
    """
    given = overrides or Overrides()
    tls = TlsConfig(**given.tls) if given.tls else None
    admin = AdminConfig(**given.admin) if given.admin else None
    config = FileConfig(ServerConfig(exports, listeners=(), tls=tls, admin=admin))
    return _finished(None, config, environment, given, default_listeners).server


def export_of(content: object, what: str, tls: TlsConfig | None) -> ExportConfig:
    """One export from the keys that a file's `[[exports]]` has, but with whole file names.

    Args: what: names the content in problems, as a file's name does there.

    Raises: ConfigFileError: a key or value is not allowed.
    """
    reader = Reader(what, content, None)
    export = mapped_export(reader, tls)
    if problems := reader.problems():
        raise ConfigFileError(problems)
    assert export is not None
    return export


def _finished(
    reader: Reader | None,
    config: FileConfig,
    environment: Mapping[str, str] | None,
    given: Overrides,
    default_listeners: tuple[NbdUri, ...],
) -> FileConfig:
    """Environment and command line over `config`, which has the command line's tables already, whose listeners are
    empty when it names none, and which `reader` has read, if it is a file's.
    """
    problems = [] if reader is None else reader.problems()
    found = from_environment(os.environ if environment is None else environment, problems)
    server = config.server
    limits = {**found.limits, **given.limits}
    if limits:
        server = replace(server, limits=replace(server.limits, **limits))
    listeners = given.listeners or found.listeners or server.listeners or default_listeners
    allows_plaintext = next(
        (each for each in (given.allows_plaintext, found.allows_plaintext) if each is not None), server.allows_plaintext
    )
    server = replace(
        server,
        listeners=listeners,
        allows_plaintext=allows_plaintext,
        metrics_address=given.metrics_address or server.metrics_address,
        sandbox=given.sandbox or server.sandbox,
        image_directories=given.image_directories or server.image_directories,
        log_format=given.log_format or found.log_format or server.log_format,
    )
    problems += limit_contradictions(server.limits, config.server.limits, reader)
    if problems:
        raise ConfigFileError(problems)
    return FileConfig(server, found.reload or config.reload)


def _read(name: str) -> str:
    try:
        content = read_short(name, FILE_SIZE_MAX, PATIENCE_S)
    except OSError as error:
        raise ConfigFileError([f"{name}: {error.strerror}"]) from None
    if len(content) > FILE_SIZE_MAX:
        raise ConfigFileError([f"{name}: more than {FILE_SIZE_MAX} bytes are no configuration"])
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigFileError([f"{name}:{line}: byte {content[error.start]:#04x} is not UTF-8"]) from None


def _syntax_problem(name: str, text: str, error: tomllib.TOMLDecodeError) -> str:
    match = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", str(error), re.DOTALL)
    if match is None:
        return f"{name}: not TOML: {error}"
    what = next((ours for theirs, ours in _SYNTAX if match[1].startswith(theirs)), match[1])
    if match[2] is None:
        return f"{name}:{text.count(chr(10)) + 1}: not TOML: {what} at the end of the file"
    return f"{name}:{match[2]}: not TOML: {what} (column {match[3]})"
