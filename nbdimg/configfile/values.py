"""One parser for each kind of value that a configuration has.

Each takes what TOML gave, or an `EnvironmentText`, and returns the value meant.

Raises: ConfigError: naming the value and what is allowed; never what may be a secret.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from nbdimg.config import TcpAddress
from nbdimg.errors import ConfigError, escaped
from nbdimg.export.export import BLOCK_SIZE_MIN_MAX
from nbdimg.units import alternatives, is_power_of_two, parse_size
from nbdimg.uri import NbdUri
from nbdimg.wire.constants import STRING_MAX

PORT_MAX = 65535
INTEGER_MAX = (1 << 63) - 1
"""The largest number that TOML promises; `tomllib` takes some that no float can hold."""

T = TypeVar("T")
Parse = Callable[[object], T]


def boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{shown(value)} is not allowed, expected true or false")
    return value


def string(value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{shown(value)} is not allowed, expected a string")
    return value


def wire_string(value: object) -> str:
    """Spec: proto.md "String values"."""
    text = string(value)
    if len(text.encode()) > STRING_MAX or "\0" in text:
        raise ConfigError(f"{escaped(text)} is not allowed, expected at most {STRING_MAX} bytes without NUL")
    return text


def export_name(value: object) -> str:
    if not wire_string(value):
        raise ConfigError(f"'' is not allowed, expected 1 to {STRING_MAX} bytes without NUL")
    return str(value)


def one_of(*allowed: str) -> Parse[str]:
    def parse(value: object) -> str:
        if value not in allowed:
            raise ConfigError(f"{shown(value)} is not allowed, expected {alternatives(allowed)}")
        return str(value)

    return parse


def count(least: int, most: int = INTEGER_MAX) -> Parse[int]:
    def parse(value: object) -> int:
        value = _number(value, int)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ConfigError(f"{shown(value)} is not allowed, expected a whole number {_range(least, most)}")
        return value

    return parse


def seconds(least: float) -> Parse[float]:
    def parse(value: object) -> float:
        value = _number(value, float)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= INTEGER_MAX:
            raise ConfigError(f"{shown(value)} is not allowed, expected seconds {_range(least, INTEGER_MAX)}")
        return float(value)

    return parse


class EnvironmentText(str):
    """A value from the environment or the command line: numbers come as text there, which a file does not allow."""


def _number(value: object, kind: Callable[[str], float]) -> object:
    if isinstance(value, EnvironmentText):
        try:
            return kind(value)
        except ValueError:
            return value
    return value


def size_in_bytes(least: int, most: int = INTEGER_MAX, multiple: int = 1) -> Parse[int]:
    """A number of bytes or a string as `64MiB`."""

    def parse(value: object) -> int:
        size = parse_size(value) if isinstance(value, str) else value
        if isinstance(size, bool) or not isinstance(size, int) or not least <= size <= most:
            raise ConfigError(f'{shown(value)} is not allowed, expected a size {_range(least, most)}, as "64MiB"')
        if size % multiple:
            raise ConfigError(f"{shown(value)} is not allowed, expected a multiple of {multiple} bytes")
        return size

    return parse


def block_size(value: object) -> int:
    size = size_in_bytes(1, BLOCK_SIZE_MIN_MAX)(value)
    if not is_power_of_two(size):
        raise ConfigError(f"{shown(value)} is not allowed, expected a power of two from 1 to {BLOCK_SIZE_MIN_MAX}")
    return size


class ElementError(ConfigError):
    """Element `index` of a list, or of a table, is wrong."""

    def __init__(self, index: int | str, message: str) -> None:
        super().__init__(message)
        self.index = index


def list_of(each: Parse[T]) -> Parse[tuple[T, ...]]:
    def parse(value: object) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise ConfigError(f"{shown(value)} is not allowed, expected a list: [...]")
        return tuple(_element(each, index, item) for index, item in enumerate(value))

    return parse


def pairs_of(each: Parse[T]) -> Parse[tuple[tuple[T, T], ...]]:
    """A table of files and the files of their secrets; the order in which they stand means nothing."""

    def parse(value: object) -> tuple[tuple[T, T], ...]:
        if not isinstance(value, dict):
            raise ConfigError('expected a table, as { "base.qcow2" = "base.key" }')
        found: dict[T, T] = {}
        for key in sorted(value):
            if isinstance(value[key], dict):
                raise ElementError(key, "a table is not allowed, expected a string; a name with a dot stands in quotes")
            if (parsed := _element(each, key, key)) in found:
                raise ElementError(key, f"{escaped(str(parsed))} is given twice")
            found[parsed] = _element(each, key, value[key])
        return tuple(found.items())

    return parse


def _element(parse: Parse[T], index: int | str, item: object) -> T:
    try:
        return parse(item)
    except ConfigError as error:
        raise ElementError(index, str(error)) from None


def listener_uri(value: object) -> NbdUri:
    """Raises: ConfigError: not a listener's URI."""
    uri = NbdUri.parse(string(value))
    if uri.name:
        raise ConfigError(f"{uri}: a listener has no export name, an export has it")
    return uri


def tcp_address(value: object) -> TcpAddress:
    """`HOST:PORT`; a host with colons stands in brackets."""
    text = string(value)
    host, _, port = text.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if is_bracketed else host
    is_number = port.isascii() and port.isdecimal() and int(port[:6]) <= PORT_MAX
    if not host or not is_number or (":" in host) != is_bracketed or not host.isprintable() or "/" in host:
        raise ConfigError(f'{shown(text)} is not allowed, expected HOST:PORT, as "127.0.0.1:9808" or "[::1]:9808"')
    return TcpAddress(host, int(port))


def path_in(directory: str) -> Parse[str]:
    """Args: directory: where relative names are meant from; empty: they are not allowed."""

    def parse(value: object) -> str:
        path = string(value)
        if "-----BEGIN" in path or "\n" in path:
            raise ConfigError("this is the content of a file, expected the name of one")
        if not path or "\0" in path:
            raise ConfigError(f"{escaped(path)} is not allowed, expected the name of a file")
        if not directory and not os.path.isabs(path):
            raise ConfigError(f"{escaped(path)} is not allowed, expected the whole name of a file, from / on")
        return os.path.join(directory, path)

    return parse


def shown(value: object) -> str:
    if value is None:
        return "null"  # of JSON alone
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return escaped(value)
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    return escaped(str(value)).strip("'")


def _range(least: float, most: int) -> str:
    return f"from {least} to {most}"
