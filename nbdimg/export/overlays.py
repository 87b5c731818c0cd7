"""Who gets which overlay of a golden image. Names only: overlays are made and opened elsewhere.

    mode          a client asks for    and gets
    per-client    base                 an overlay of its own, thrown away when it leaves
    kept          base@vm42            the overlay vm42
                  base                 the overlay of the identity that it has proven: dns=vm42.example
                  base                 nothing, as if base were not there, when it has proven none

A name behind the `@` proves nothing: whoever may open `base` may open any of those by name. So a proven identity's
overlay has a name that nobody can ask for, with `=` in it. Of several identities the first one counts, in the order of
KINDS and within a kind by text: it stays the same when a certificate is renewed.

An export that is called `base@vm42` itself goes before the overlay. Internal snapshots of a golden image are not
exported, so NAME@SNAPSHOT and NAME@OVERLAY never meet.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from urllib.parse import quote

KINDS = ("dns", "uri", "email", "cn", "psk", "spki-sha256")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

FILE_NAME_MAX = 255
"""Bytes in one component of a path, on every file system that Linux mounts for writing."""


def is_overlay_name(text: str) -> bool:
    """Whether a client may ask for an overlay of this name."""
    return _NAME.fullmatch(text) is not None


def proven_name(identities: Collection[str]) -> str | None:
    """The name of the overlay of who has proven `identities`; None without any."""
    for kind in KINDS:
        own = sorted(each for each in identities if each.startswith(f"{kind}:"))
        if own:
            return f"{kind}={quote(own[0].partition(':')[2], safe='')}"
    return None


def overlay_prefix(export_name: str) -> str:
    """What the file names of an export's overlays, and of no other's, begin with."""
    return quote(export_name, safe="") + "@"


def overlay_file_name(export_name: str, name: str) -> str | None:
    """The file of the overlay `name`; None when it would be too long. Pure ASCII without a slash."""
    found = f"{overlay_prefix(export_name)}{name}.qcow2"
    return found if len(found) <= FILE_NAME_MAX else None
