"""A parsed file as tables that collect what is wrong with it, each problem with its line."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from nbdimg.configfile.lines import KeyPath, key_lines
from nbdimg.configfile.values import ElementError, Parse, T, path_in, shown
from nbdimg.errors import ConfigError, escaped

_SECRET = re.compile(r"pass(word|phrase|wd)?|secret|token|credential|(^|_)(psk|key|private)($|_)|pem$")
SECRET_KEYS = "tls.key_file, tls.psk_file, admin.token_file or an export's key_file"


class Reader:
    """A parsed file, and the problems found in it so far.

    Args:
        text: the file's. None: what was parsed is not a file, has no lines to tell, and `name` says what it is; the
            names of files in it must be whole.
    """

    def __init__(self, name: str, content: object, text: str | None) -> None:
        self.name = name
        self.directory = os.path.dirname(os.path.abspath(name)) if text is not None else ""
        self.content = content
        self._problems: list[tuple[int, KeyPath, str]] = []
        self._text = text

    @cached_property
    def _lines(self) -> Mapping[KeyPath, int]:
        """Only of a file with problems: to find them takes longer than all the rest."""
        return {} if self._text is None else key_lines(self._text)

    def report(self, path: KeyPath, message: str) -> None:
        line, where = self.line_of(path), self.place(path)
        key = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in path).removeprefix(".")
        key = key if key.isprintable() else escaped(key)
        self._problems.append((line, path, f"{where}: {key}: {message}" if key else f"{where}: {message}"))

    def is_sound(self, table: KeyPath) -> bool:
        """Nothing was wrong with a table and its keys so far."""
        return all(path[: len(table)] != table for _, path, _ in self._problems)

    def has(self, *keys: str) -> bool:
        """Whether a table has a key, by the names of tables down to it."""
        found = self.content
        for each in keys:
            if not isinstance(found, dict) or each not in found:
                return False
            found = found[each]
        return True

    def place(self, path: KeyPath) -> str:
        """The file's name, with the key's line, unless nothing of it is there."""
        is_there = self._text is not None and self.has(*map(str, path[:1]))
        return f"{self.name}:{self.line_of(path)}" if is_there else self.name

    def problems(self) -> list[str]:
        """In the order of lines."""
        return [text for _, _, text in sorted(self._problems, key=lambda problem: problem[0])]

    def line_of(self, path: KeyPath) -> int:
        """Of the key, or of the innermost one around it that has a line; 1 where there are none."""
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 1)

    def table(self, path: KeyPath, value: object, known: Sequence[str]) -> Table:
        """Check a table's keys. Unknown ones are reported and ignored."""
        table = Table(self, path, value if isinstance(value, dict) else {})
        if not isinstance(value, dict):
            table.report(f"{shown(value)} is not allowed, expected a table")
            return table
        for key in value:
            if key not in known:
                table.report(_unknown(key, known), key)
        return table

    def tables(self, path: KeyPath, value: object, known: Sequence[str]) -> list[Table]:
        if not isinstance(value, list):
            header = ".".join(each for each in path if isinstance(each, str))
            expected = "a list of tables" if self._text is None else f"tables, each beginning with [[{header}]]"
            self.report(path, f"{shown(value)} is not allowed, expected {expected}")
            return []
        return [self.table((*path, index), each, known) for index, each in enumerate(value)]


def _unknown(key: str, known: Sequence[str]) -> str:
    near = get_close_matches(key.lower().replace("-", "_"), known, 1)
    if _SECRET.search(key.lower()) and not (near and near[0].endswith("_file") and key.endswith("file")):
        return f"a secret stands in a file of its own, which {SECRET_KEYS} may name here"
    guess = f", did you mean {near[0]}" if near else ""
    return f"unknown key{guess}; known are {', '.join(known)}"


class Table:
    """One table; `get` reports what is wrong and goes on with the default."""

    def __init__(self, reader: Reader, path: KeyPath, content: dict[str, Any]) -> None:
        self._reader = reader
        self._path = path
        self._content = content

    def __contains__(self, key: str) -> bool:
        return key in self._content

    def get(self, key: str, parse: Parse[T], default: T) -> T:
        if key not in self._content:
            return default
        try:
            return parse(self._content[key])
        except ElementError as error:
            self.report(str(error), key, error.index)
        except ConfigError as error:
            self.report(str(error), key)
        return default

    @property
    def is_sound(self) -> bool:
        """Nothing was wrong with it so far: what else is wrong with it is no consequence of that."""
        return self._reader.is_sound(self._path)

    def report(self, message: str, *key: str | int) -> None:
        self._reader.report((*self._path, *key), message)

    def path(self, key: str) -> str | None:
        """A file's name, from the configuration's directory."""
        return self.get(key, path_in(self._reader.directory), None)

    def table(self, key: str, known: Sequence[str]) -> Table:
        return self._reader.table((*self._path, key), self._content.get(key, {}), known)

    def tables(self, key: str, known: Sequence[str]) -> list[Table]:
        return self._reader.tables((*self._path, key), self._content.get(key, []), known)

    def line(self) -> int:
        return self._reader.line_of(self._path)
