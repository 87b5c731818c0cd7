"""What the opening of an image is given, whatever its format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nbdimg.image.driver import FormatDriver
from nbdimg.image.gate import OpenGate, Reference


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """`key`: a passphrase. `snapshot`: the id or name of an internal snapshot to open in place of the active state.

    `is_keyless`: the guest's data does not matter, so an encrypted image opens without its key; to read or write data
    in it is a ConfigError then. Metadata is never encrypted.
    """

    gate: OpenGate
    writable: bool = False
    key: bytes | None = None
    snapshot: str | None = None
    is_keyless: bool = False


@dataclass(frozen=True, slots=True)
class Backing:
    """The backing image that a driver wants; whoever opens it goes through the same gate.

    `references` are tried in order until one can be opened. `verify` raises ImageError when the opened driver is not
    the one that was meant.
    """

    references: tuple[Reference, ...]
    format: str
    verify: Callable[[FormatDriver], None] | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    driver: FormatDriver
    backing: Backing | None = None
