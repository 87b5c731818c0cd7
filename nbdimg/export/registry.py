"""The exports of a server by name, and what of them one client sees: what a handshake looks up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

from nbdimg.errors import ConfigError, escaped
from nbdimg.export.access import Client, Right, Rule, right_of
from nbdimg.export.export import Export
from nbdimg.export.overlays import is_overlay_name, proven_name
from nbdimg.wire.constants import TransmissionFlag
from nbdimg.wire.handshake import ExportInfo

_CHANGE_FLAGS = TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms an export is given out. Without rules everybody who connects may open it."""

    rules: tuple[Rule, ...] = ()
    is_tls_only: bool = False


class Registry:
    """Names are unique. A single image's export also answers to the empty name (its snapshots' do not count), and
    `/name` stands for `name`.
    """

    def __init__(self) -> None:
        self.is_shutting_down = False
        self.change_count = 0
        """Of exports and their terms: what was found out by them holds until it grows."""
        self._exports: dict[str, Export] = {}
        self._terms: dict[str, Terms] = {}

    def __iter__(self) -> Iterator[Export]:
        return iter(list(self._exports.values()))

    def __contains__(self, name: str) -> bool:
        """Whether an export has exactly this name."""
        return name in self._exports

    def add(self, export: Export, terms: Terms | None = None) -> None:
        """Raises: ConfigError: the name is taken."""
        if export.name in self._exports:
            raise ConfigError(f"two exports are named {export.name!r}; name one of them NAME=IMAGE")
        self._exports[export.name] = export
        self._terms[export.name] = terms or Terms()
        self.change_count += 1

    def remove(self, name: str) -> Export:
        """Take an export out of sight; its connections go on. Raises: KeyError."""
        self._terms.pop(name)
        self.change_count += 1
        return self._exports.pop(name)

    def lookup(self, name: str, is_visible: Callable[[Export], bool] = lambda _: True) -> Export | None:
        """The export that `name` or an alias means among those that are visible."""
        exact = self._exports.get(name)
        if exact is not None and is_visible(exact):
            return exact
        if name == "":
            return _single_image(filter(is_visible, self._exports.values()))
        alias = self._exports.get(name.removeprefix("/"))
        return alias if alias is not None and is_visible(alias) else None

    def terms(self, name: str) -> Terms:
        """Raises: KeyError."""
        return self._terms[name]

    def set_terms(self, name: str, terms: Terms) -> None:
        """For handshakes from now on; what is connected stays. Raises: KeyError."""
        self._terms[self._exports[name].name] = terms
        self.change_count += 1


def _single_image(exports: Iterable[Export]) -> Export | None:
    """What the empty name means: of several images, none."""
    images = list(islice((export for export in exports if not export.is_snapshot), 2))
    return images[0] if len(images) == 1 else None


class Wanted(NamedTuple):
    """What a name means for one client: an export and, where that keeps overlays, which. `name` is the whole of it."""

    export: Export
    name: str
    overlay: str | None = None


class View:
    """The directory that one client sees. `client` is replaced when TLS has told who it is.

    Args: on_refused: called with an export that was asked for and is hidden from the client, and the reason.
    """

    __slots__ = ("_on_refused", "_registry", "_visible", "_visible_at", "client", "is_shutting_down")

    def __init__(self, registry: Registry, client: Client, on_refused: Callable[[Export, str], None]) -> None:
        self.client = client
        self.is_shutting_down = registry.is_shutting_down
        self._registry = registry
        self._on_refused = on_refused
        self._visible: list[Export] = []
        self._visible_at: tuple[int, Client] | None = None
        """The registry's `change_count` and the client for whom `_visible` was found."""

    def find(self, name: str) -> ExportInfo | None:
        """None for an export that is not there, and likewise for one that the client has no right to."""
        wanted = self.resolve(name)
        return None if wanted is None else self._info(wanted.export, wanted.name)

    def resolve(self, name: str) -> Wanted | None:
        """What `name` means; None as from `find`. A name of which an export has the whole means that export."""
        export = self._lookup(name)
        if export is None:
            base, at, overlay = name.rpartition("@")
            is_overlay = bool(at) and is_overlay_name(overlay)
            export = self._lookup(base) if is_overlay else None
            if export is None or not export.keeps_overlays:
                self._tell_hidden([name, base] if is_overlay else [name])
                return None
            return Wanted(export, f"{export.name}@{overlay}", overlay)
        if not export.keeps_overlays:
            return Wanted(export, export.name)
        proven = proven_name(self.client.identities)
        if proven is None:
            asked = escaped(export.asked_as)
            self._on_refused(export, f"its overlays have names: ask for {asked}, or show a certificate")
            return None
        return Wanted(export, export.name, proven)

    def _lookup(self, name: str) -> Export | None:
        return self._registry.lookup(name, self._is_visible) if name else _single_image(self._all_visible())

    def _tell_hidden(self, names: Sequence[str]) -> None:
        """Of the first of them that means an export which is hidden from the client."""
        for name in names:
            hidden = self._registry.lookup(name)
            if hidden is not None and not self._is_visible(hidden):
                self._on_refused(hidden, "access is not allowed")
                return

    def listed(self) -> Sequence[ExportInfo]:
        """Overlays that are kept are nobody's business but of who asks for them."""
        has_own = proven_name(self.client.identities) is not None
        return [
            self._info(export, export.name) for export in self._all_visible() if has_own or not export.keeps_overlays
        ]

    def _all_visible(self) -> list[Export]:
        """A client may ask a thousand times in one packet; the rules of a thousand exports take a millisecond."""
        now = (self._registry.change_count, self.client)
        if self._visible_at != now:
            self._visible = [export for export in self._registry if self._is_visible(export)]
            self._visible_at = now
        return self._visible

    def _is_visible(self, export: Export) -> bool:
        return self.right(export) is not Right.NONE

    def right(self, export: Export) -> Right:
        return right_of(self.client, self._registry.terms(export.name).rules)

    def _info(self, export: Export, name: str) -> ExportInfo:
        """The export as this client sees it."""
        info = export.info
        is_tls_only = self._registry.terms(export.name).is_tls_only
        flags = info.flags
        if self.right(export) is Right.READ:
            flags = (flags & ~_CHANGE_FLAGS) | TransmissionFlag.READ_ONLY
        return replace(info, name=name, flags=flags, is_tls_only=is_tls_only)
