"""Byte units, alignment arithmetic, and sizes, counts and choices as people write them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nbdimg.errors import ConfigError, escaped

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

_SUFFIXES = {"": 1, "K": KiB, "M": MiB, "G": GiB, "T": TiB, "P": 1 << 50, "E": 1 << 60}
_SIZE = re.compile(r"([0-9]{1,20})\s*(?:([KMGTPE])(?:iB|B)?|B)?", re.IGNORECASE)


def align_down(value: int, unit: int) -> int:
    """The largest multiple of `unit` that is at most `value`: align_down(1000, 512) == 512."""
    return value - value % unit


def align_up(value: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least `value`: align_up(513, 512) == 1024."""
    return -(-value // unit) * unit


def div_ceil(value: int, unit: int) -> int:
    """How many `unit`s hold `value`: div_ceil(513, 512) == 2."""
    return -(-value // unit)


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def counted(count: int, one: str, more: str | None = None) -> str:
    """A count and what is counted: `1 export`, `2 exports`. `more`: what more than one, or none, is called, unless that
    is `one` with an s.
    """
    return f"{count} {one if count == 1 else more or one + 's'}"


def alternatives(names: Sequence[str]) -> str:
    """What is expected, of two or more: `off, required or selective`."""
    return f"{', '.join(names[:-1])} or {names[-1]}"


def parse_size(text: str) -> int:
    """Bytes from `4096`, `64K`, `64KiB`, `10G`: suffixes are powers of 1024, as in qemu-img.

    Raises:
        ConfigError: the text is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{escaped(text)} is not a size: expected a whole number with an optional K, M, G, T, P or E")
    return int(match[1]) * _SUFFIXES[(match[2] or "").upper()]


def sign_of_change(text: str) -> int:
    """1 or -1 for a size with a sign in front, which is a change of another one; 0 for one without."""
    return {"+": 1, "-": -1}.get(text[:1], 0)


def parse_new_size(text: str) -> tuple[int, bool]:
    """What a size is to become, and whether that is a change of the one there is: `3M` is (3 * MiB, False), `-1M` is
    (-MiB, True).

    Raises: ConfigError: as `parse_size`.
    """
    sign = sign_of_change(text)
    return (sign * parse_size(text[1:]), True) if sign else (parse_size(text), False)
