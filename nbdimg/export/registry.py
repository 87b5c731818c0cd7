"""The exports of a server by name: what a handshake looks up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nbdimg.errors import ConfigError
from nbdimg.export.export import Export
from nbdimg.wire.handshake import ExportInfo


class Registry:
    """Names are unique. A single image's export also answers to the empty name (its snapshots' do not count), and
    `/name` stands for `name`.
    """

    def __init__(self) -> None:
        self.is_shutting_down = False
        self._exports: dict[str, Export] = {}

    def __iter__(self) -> Iterator[Export]:
        return iter(list(self._exports.values()))

    def add(self, export: Export) -> None:
        """Raises: ConfigError: the name is taken."""
        if export.name in self._exports:
            raise ConfigError(f"two exports are named {export.name!r}; name one of them NAME=IMAGE")
        self._exports[export.name] = export

    def remove(self, name: str) -> Export:
        """Take an export out of sight; its connections go on. Raises: KeyError."""
        return self._exports.pop(name)

    def lookup(self, name: str) -> Export | None:
        """The export that `name` or an alias means."""
        if name in self._exports:
            return self._exports[name]
        if name == "":
            images = [export for export in self._exports.values() if not export.is_snapshot]
            return images[0] if len(images) == 1 else None
        return self._exports.get(name.removeprefix("/"))

    def find(self, name: str) -> ExportInfo | None:
        export = self.lookup(name)
        return export.info if export else None

    def listed(self) -> Sequence[ExportInfo]:
        return [export.info for export in self._exports.values()]
