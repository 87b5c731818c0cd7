"""Where in a TOML text each key and each array element stands, which `tomllib` does not tell.

Only for text that `tomllib` accepts: what is looked at here is layout, never meaning. Keys within an inline table are
not found; they stand on the line of the table.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import NamedTuple

KeyPath = tuple[str | int, ...]
"""`("exports", 1, "path")` is the key `path` of the second table of `exports`."""

_TOKEN = re.compile(
    r'''(?P<skip>[ \t\r]+|\#[^\n]*)
      | (?P<newline>\n)
      | (?P<string>"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?'{3,5}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')
      | (?P<mark>[][{}=,])
      | (?P<dot>\.)
      | (?P<bare>[^][{}=,.\s\#"']+)''',
    re.VERBOSE | re.DOTALL,
)


class _Token(NamedTuple):
    kind: str
    text: str
    line: int


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line, from 1, of every key, of each part of a dotted one, and of every table header and array element."""
    lines: dict[KeyPath, int] = {}
    tables: dict[KeyPath, int] = {}
    prefix: KeyPath = ()
    for statement in _statements(text):
        first = statement[0]
        if first.text == "[" and first.kind == "mark":
            parts = _parts(statement)
            prefix = _array_table(tables, parts) if _is_array_table(statement) else _resolved(tables, parts)
            lines.setdefault(prefix, first.line)
            continue
        equals = next(index for index, token in enumerate(statement) if token.text == "=" and token.kind == "mark")
        path = prefix + _parts(statement[:equals])
        for depth in range(len(prefix) + 1, len(path) + 1):
            lines.setdefault(path[:depth], first.line)
        for index, line in enumerate(_element_lines(statement[equals + 1 :])):
            lines[*path, index] = line
    return lines


def _tokens(text: str) -> Iterator[_Token]:
    line, position = 1, 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        assert match is not None, "text that tomllib accepts has only these tokens"
        assert match.lastgroup is not None
        if match.lastgroup != "skip":
            yield _Token(match.lastgroup, match[0], line)
        line += match[0].count("\n")
        position = match.end()


def _statements(text: str) -> Iterator[list[_Token]]:
    """Headers and key-value pairs: what ends with a line, brackets closed."""
    statement: list[_Token] = []
    depth = 0
    for token in _tokens(text):
        if token.kind == "newline":
            if depth == 0 and statement:
                yield statement
                statement = []
            continue
        if token.kind == "mark":
            depth += (token.text in "[{") - (token.text in "]}")
        statement.append(token)
    if statement:
        yield statement


def _is_array_table(statement: list[_Token]) -> bool:
    return [token.text for token in statement[:2]] == ["[", "["]


def _parts(tokens: list[_Token]) -> tuple[str, ...]:
    """The names of a dotted key; a quoted one is decoded as any string."""
    return tuple(
        tomllib.loads(f"name = {token.text}")["name"] if token.kind == "string" else token.text
        for token in tokens
        if token.kind in ("string", "bare")
    )


def _resolved(tables: dict[KeyPath, int], parts: tuple[str, ...]) -> KeyPath:
    """A header's path: beneath an array of tables the latest one is meant."""
    path: KeyPath = ()
    for part in parts:
        path += (part,)
        if path in tables:
            path += (tables[path] - 1,)
    return path


def _array_table(tables: dict[KeyPath, int], parts: tuple[str, ...]) -> KeyPath:
    path = (*_resolved(tables, parts[:-1]), parts[-1])
    tables[path] = tables.get(path, 0) + 1
    return (*path, tables[path] - 1)


def _element_lines(value: list[_Token]) -> list[int]:
    """The line of each element of an array; nothing for another value."""
    lines: list[int] = []
    if not (value[0].kind == "mark" and value[0].text == "["):
        return lines
    depth, is_next = 0, False
    for token in value:
        is_mark = token.kind == "mark"
        if is_next and not (is_mark and token.text == "]"):
            lines.append(token.line)
        is_next = False
        if is_mark:
            depth += (token.text in "[{") - (token.text in "]}")
            is_next = depth == 1 and (token.text == "," or (token.text == "[" and not lines))
    return lines
