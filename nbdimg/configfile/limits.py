"""The keys of `[limits]`, with their ranges."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from nbdimg.configfile.reader import Reader
from nbdimg.configfile.values import Parse, count, seconds, size_in_bytes
from nbdimg.export.export import BLOCK_SIZE_MIN_MAX
from nbdimg.limits import OPTION_SIZE_MAX, Limits
from nbdimg.units import GiB, KiB, MiB

_TIMEOUT_MIN_S = 0.1

LIMITS: dict[str, Parse[Any]] = {
    "connections": count(1, 1 << 20),
    "handshake_timeout": seconds(_TIMEOUT_MIN_S),
    "request_timeout": seconds(_TIMEOUT_MIN_S),
    "stall_timeout": seconds(_TIMEOUT_MIN_S),
    "drain_timeout": seconds(0),
    "payload_rate": size_in_bytes(1),
    "options": count(1, 1 << 20),
    "option_bytes": size_in_bytes(OPTION_SIZE_MAX),
    "requests_in_flight": count(1, 1 << 16),
    "payload_size": size_in_bytes(BLOCK_SIZE_MIN_MAX, GiB, multiple=BLOCK_SIZE_MIN_MAX),
    "connection_bytes": size_in_bytes(BLOCK_SIZE_MIN_MAX),
    "total_bytes": size_in_bytes(BLOCK_SIZE_MIN_MAX),
    "output_bytes": size_in_bytes(64 * KiB),
    "turn_requests": count(1, 1 << 16),
    "turn_bytes": size_in_bytes(64 * KiB),
    "overlays": count(1, 1 << 20),
    "overlay_size": size_in_bytes(MiB),
}
"""The keys of `[limits]`: those of `Limits`, without the unit that a file's value has anyway."""

LIMIT_NAMES = {each.name.removesuffix("_s"): each.name for each in fields(Limits)}
assert LIMITS.keys() == LIMIT_NAMES.keys()


def limit_contradictions(limits: Limits, read: Limits, reader: Reader | None) -> list[str]:
    """Args: read: what `reader` has found, before environment and command line. reader: None: there is no file."""
    if limits.connection_bytes <= limits.total_bytes or (reader is not None and not reader.is_sound(("limits",))):
        return []
    text = (
        f"limits.connection_bytes is {limits.connection_bytes} bytes, "
        f"expected at most limits.total_bytes, {limits.total_bytes}"
    )
    if reader is not None:
        for key in ("connection_bytes", "total_bytes"):
            if reader.has("limits", key) and getattr(read, key) == getattr(limits, key):
                return [f"{reader.place(('limits', key))}: {text}"]
    return [text]
