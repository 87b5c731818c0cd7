"""Options that say who may open an export: one rule each, with one condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from nbdimg.config import IDENTITY_KINDS
from nbdimg.errors import ConfigError, escaped
from nbdimg.units import alternatives

_KINDS = (*IDENTITY_KINDS, "network", "uid", "gid")

Allow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KIND:VALUE",
        help="Who alone may open it, by what a certificate or key proves (dns:vm1.example), network:10.1.0.0/16, or "
        "uid:1000 or gid:1000 at a Unix socket; repeatable.",
    ),
]
AllowReadOnly = Annotated[
    list[str] | None, typer.Option(metavar="KIND:VALUE", help="As --allow, for who may only read; repeatable.")
]


def access_rules(allow: Sequence[str] | None, allow_read_only: Sequence[str] | None) -> list[dict[str, Any]] | None:
    """The rules as `access` of an export has them; None without any. Raises: ConfigError."""
    rules = [_rule("--allow", each) for each in allow or ()]
    rules += [{**_rule("--allow-read-only", each), "read_only": True} for each in allow_read_only or ()]
    return rules or None


def _rule(option: str, text: str) -> dict[str, Any]:
    kind, _, value = text.partition(":")
    if kind not in _KINDS or not value:
        raise ConfigError(f"{option}: {escaped(text)} is not allowed, expected KIND:VALUE with {alternatives(_KINDS)}")
    if kind in IDENTITY_KINDS:
        return {"identities": [text]}
    if kind == "network":
        return {"networks": [value]}
    if not (value.isascii() and value.isdecimal()):
        raise ConfigError(f"{option}: {escaped(text)} is not allowed, expected the number of a {kind}")
    return {f"{kind}s": [int(value[:20])]}
