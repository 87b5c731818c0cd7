"""What leads from one configuration to another: told apart here, applied by reload.py."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from nbdimg.config import ExportConfig, ServerConfig
from nbdimg.server.checks import named
from nbdimg.units import counted
from nbdimg.uri import NbdUri

IN_PLACE = frozenset({"description", "access", "is_tls_only"})
"""Fields of ExportConfig that change while the image stays open."""


@dataclass(frozen=True, slots=True)
class Difference:
    """What leads from one configuration to another. Pairs are (old, new)."""

    added: tuple[ExportConfig, ...] = ()
    removed: tuple[ExportConfig, ...] = ()
    reopened: tuple[tuple[ExportConfig, ExportConfig], ...] = ()
    adjusted: tuple[tuple[ExportConfig, ExportConfig], ...] = ()
    listeners_added: tuple[NbdUri, ...] = ()
    listeners_removed: tuple[NbdUri, ...] = ()
    has_new_limits: bool = False
    has_new_tls: bool = False

    @property
    def leaving(self) -> tuple[ExportConfig, ...]:
        """Those whose images are given back: `removed`, and what `reopened` was."""
        return (*self.removed, *(old for old, _ in self.reopened))

    def __str__(self) -> str:
        counts = (
            (len(self.added), "export added", "exports added"),
            (len(self.removed), "removed", "removed"),
            (len(self.reopened), "reopened", "reopened"),
            (len(self.adjusted), "adjusted", "adjusted"),
            (len(self.listeners_added), "listener added", "listeners added"),
            (len(self.listeners_removed), "listener removed", "listeners removed"),
        )
        parts = [counted(count, one, more) for count, one, more in counts if count]
        parts += ["new limits"] * self.has_new_limits + ["new TLS settings"] * self.has_new_tls
        return ", ".join(parts) or "nothing changed"


def difference(old: ServerConfig, new: ServerConfig) -> Difference:
    """Both with names. Exports are the same by name, listeners by all that they are."""
    before = {named(each): each for each in old.exports}
    after = {named(each): each for each in new.exports}
    changed = [(before[name], after[name]) for name in before if name in after and before[name] != after[name]]
    return Difference(
        added=tuple(each for name, each in after.items() if name not in before),
        removed=tuple(each for name, each in before.items() if name not in after),
        reopened=tuple(pair for pair in changed if not _is_in_place(*pair)),
        adjusted=tuple(pair for pair in changed if _is_in_place(*pair)),
        listeners_added=tuple(each for each in new.listeners if each not in old.listeners),
        listeners_removed=tuple(each for each in old.listeners if each not in new.listeners),
        has_new_limits=old.limits != new.limits,
        has_new_tls=old.tls != new.tls,
    )


def _is_in_place(old: ExportConfig, new: ExportConfig) -> bool:
    return {each.name for each in fields(old) if getattr(old, each.name) != getattr(new, each.name)} <= IN_PLACE


def adjusted_to(old: ExportConfig, new: ExportConfig) -> ExportConfig:
    """The old export with what can be new while its image stays open."""
    fresh: dict[str, Any] = {name: getattr(new, name) for name in IN_PLACE}
    return replace(old, **fresh)
