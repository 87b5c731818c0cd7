"""What to serve and how, as one frozen value. Every way of starting a server ends here."""

from __future__ import annotations

from dataclasses import dataclass, field

from nbdimg.limits import Limits
from nbdimg.uri import DEFAULT_PORT, NbdUri

DEFAULT_LISTENER = NbdUri(host="127.0.0.1", port=DEFAULT_PORT)


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """One image. `format` None means: by its magic. `block_size_min` in bytes. `key_path`: a file that holds the
    passphrase of an encrypted image. `roots`: directories besides the image's own in which what it refers to may lie.
    """

    path: str
    name: str | None = None
    format: str | None = None
    is_read_only: bool = False
    description: str = ""
    block_size_min: int = 1
    key_path: str | None = None
    roots: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ServerConfig:
    exports: tuple[ExportConfig, ...]
    listeners: tuple[NbdUri, ...] = (DEFAULT_LISTENER,)
    limits: Limits = field(default_factory=Limits)
    allows_plaintext: bool = False
    """Whether an address that other machines reach may be listened on without TLS."""
