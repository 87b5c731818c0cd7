"""What the opening of an image is given, whatever its format."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from nbdimg.formats.keys import Keys
from nbdimg.image.driver import FormatDriver
from nbdimg.image.gate import OpenGate, Reference


async def _ignore(backing: Backing | None) -> None:
    """For an image that is opened by itself."""


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """`keys`: passphrases. `snapshot`: the id or name of an internal snapshot to open in place of the active state.

    `is_keyless`: the guest's data does not matter, so an encrypted image opens without its key; to read or write data
    in it is a ConfigError then. Metadata is never encrypted. `file_size_max`: where the file may grow to in bytes,
    but for the tables that count its clusters; a write that would allocate beyond fails with ENOSPC. Only qcow2 obeys.

    `asks_for_writing`: an image that can only be read is refused as where `writable` is true, for a trial that
    does not write. Only qcow2 obeys.

    `parent_path`: the operator's own choice of the file that is a vhdx image's parent. `accepts_lost_log`: a vhdx image
    whose log is in use and holds no valid entry is opened as if the log were empty, and so is all of its chain.

    `open_backing` is told what the image lies over (None: nothing) when all else that it takes is there, and before the
    file is changed but for a vhdx log, which is replayed by then. What it raises refuses the image.
    """

    gate: OpenGate
    writable: bool = False
    keys: Keys = field(default_factory=Keys)
    snapshot: str | None = None
    is_keyless: bool = False
    file_size_max: int | None = None
    parent_path: str | None = None
    accepts_lost_log: bool = False
    asks_for_writing: bool = False
    open_backing: Callable[[Backing | None], Awaitable[None]] = _ignore


@dataclass(frozen=True, slots=True)
class Backing:
    """The backing image that a driver wants; whoever opens it goes through the same gate.

    `references` are tried in order until one can be opened. `verify` raises ImageError when the opened driver is not
    the one that was meant.
    """

    references: tuple[Reference, ...]
    format: str
    verify: Callable[[FormatDriver], None] | None = None
