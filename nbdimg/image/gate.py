"""The one gate through which an image opens another file: its backing file, its external data file, its parent.

A format reads the name, states it as a `Reference` and asks the gate that it was given; it opens nothing itself. What
may be opened is the gate's decision, what format the file has is the format's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from nbdimg.storage.file import BlockFile


@dataclass(frozen=True, slots=True)
class Reference:
    """One name that an image holds of another file."""

    owner_path: str
    """`path` of the file that holds the name: the top image's, or that of a file which the gate has opened."""
    field: str
    """What the format calls it: "backing file", "external data file", "parent locator"."""
    name: str
    """As stored."""
    offset: int
    """Where the name lies in the owner, in bytes."""
    is_writable: bool
    ignores_case: bool = False
    """Whether a file will do whose name is the same but for case, when there is none of this name."""
    is_given: bool = False
    """The name is the operator's, not the owner's: that file is allowed, wherever it lies."""


class OpenGate(Protocol):
    async def open(self, reference: Reference) -> BlockFile:
        """The file that is meant, open and locked; closing it is up to the caller.

        Raises:
            ImageLocked: another process or export uses it in a way that excludes this use.
            ImageError: it may not be opened, or cannot be; the message names the field, the name, what is allowed and
                the offset.
        """
        ...
