"""What answers of a server's HTTP API must have for what is made of them here. What one has more is passed over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from nbdimg.errors import NbdimgError
from nbdimg.version import own_version

Shape = Mapping[str, Any] | Sequence[Any] | type | None
"""Of JSON: by key, a shape for each that must be there; a list with the shape of its elements; `str`, `bool`, `int`
from 0 on, `float` for seconds, whole ones too, None; a tuple of those of them that are allowed.
"""

INTEGER_MAX = (1 << 64) - 1
SECONDS_MAX = 1 << 37
"""The year 6325, which a date has room for."""

_WORDS = {str: "a string", bool: "true or false", int: "a whole number", float: "seconds", None: "null"}

EXPORT: Shape = {
    "name": str,
    "path": str,
    "format": str,
    "size": int,
    "is_read_only": bool,
    "is_hidden": bool,
    "connections": int,
    "in_flight": int,
    "failure": (str, None),
    "overlay": (str, None),
    "overlays": int,
}
EXPORTS: Shape = {"exports": [EXPORT]}
CLIENTS: Shape = {
    "clients": [
        {
            "id": int,
            "peer": str,
            "export": (str, None),
            "overlay": (str, None),
            "tls": (str, None),
            "identities": [str],
            "is_read_only": bool,
            "since": float,
            "in_flight": int,
        }
    ]
}
STATUS: Shape = {
    "state": str,
    "pid": int,
    "uptime": float,
    "exports": int,
    "failed_exports": [str],
    "connections": int,
    "uris": [str],
}
SNAPSHOT: Shape = {"id": str, "name": str, "size": int, "created_s": float, "export": (str, None)}
SNAPSHOTS: Shape = {"snapshots": [SNAPSHOT]}
BITMAPS: Shape = {"bitmaps": [{"name": str, "granularity": int, "is_enabled": bool, "is_consistent": bool}]}
STATS: Shape = {
    "time": float,
    "exports": [
        {
            "name": str,
            **dict.fromkeys(("connections", "in_flight", "reads", "writes", "others", "errors"), int),
            **dict.fromkeys(("read_bytes", "write_bytes"), int),
            **dict.fromkeys(("read_seconds", "write_seconds"), float),
        }
    ],
}
NOTHING: Shape = {}


def check_answer(value: object, shape: Shape, what: str = "the server's answer") -> None:
    """Raises: NbdimgError: a value is not there, or another than `shape` says; `what` names it."""
    if isinstance(shape, Mapping):
        if not isinstance(value, dict):
            raise _mismatch(what, "an object")
        for key, each in shape.items():
            if key not in value:
                raise _of_another_version(f"the server's answer has no {key!r}")
            check_answer(value[key], each, f"{key!r} in the server's answer")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise _mismatch(what, "a list")
        for item in value:
            check_answer(item, shape[0], what)
    else:
        kinds = shape if isinstance(shape, tuple) else (shape,)
        if not any(_is(value, kind) for kind in kinds):
            raise _mismatch(what, " or ".join(_WORDS[kind] for kind in kinds))


def _is(value: object, kind: type | None) -> bool:
    if kind is int:
        return type(value) is int and 0 <= value <= INTEGER_MAX
    if kind is float:
        return type(value) in (int, float) and 0 <= cast(float, value) <= SECONDS_MAX
    return value is None if kind is None else isinstance(value, kind)


def _mismatch(what: str, expected: str) -> NbdimgError:
    return _of_another_version(f"{what} is something else than {expected}")


def _of_another_version(complaint: str) -> NbdimgError:
    return NbdimgError(f"{complaint}: is it of another version than {own_version()}?")
