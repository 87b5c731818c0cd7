"""Byte units: alignment arithmetic, and sizes, counts and choices as people write them."""

from __future__ import annotations

import pytest

from nbdimg.errors import ConfigError
from nbdimg.units import (
    GiB,
    KiB,
    MiB,
    TiB,
    align_down,
    align_up,
    alternatives,
    counted,
    div_ceil,
    is_power_of_two,
    parse_size,
)


def test_units_are_powers_of_1024() -> None:
    assert (KiB, MiB, GiB, TiB) == (1024, 1048576, 1073741824, 1099511627776)


@pytest.mark.parametrize(
    ("value", "unit", "down", "up", "count"),
    [
        (0, 512, 0, 0, 0),
        (1, 512, 0, 512, 1),
        (511, 512, 0, 512, 1),
        (512, 512, 512, 512, 1),
        (513, 512, 512, 1024, 2),
        (1000, 512, 512, 1024, 2),
        (7, 1, 7, 7, 7),
        (10, 3, 9, 12, 4),
        ((1 << 64) - 1, 1 << 16, (1 << 64) - (1 << 16), 1 << 64, 1 << 48),
    ],
)
def test_alignment_rounds_to_multiples(value: int, unit: int, down: int, up: int, count: int) -> None:
    assert (align_down(value, unit), align_up(value, unit), div_ceil(value, unit)) == (down, up, count)


@pytest.mark.parametrize("unit", [1, 2, 3, 512, 4096])
def test_alignment_of_every_small_value_is_the_nearest_multiple(unit: int) -> None:
    for value in range(0, 10_000, 7):
        down, up = align_down(value, unit), align_up(value, unit)
        assert down % unit == up % unit == 0
        assert down <= value <= up < down + 2 * unit
        assert up - down in (0, unit)
        assert div_ceil(value, unit) * unit == up


def test_powers_of_two_are_told_from_other_numbers() -> None:
    powers = {1 << bits for bits in range(70)}
    assert all(is_power_of_two(power) for power in powers)
    assert [value for value in range(-8, 5000) if is_power_of_two(value)] == sorted(powers)[:13]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64K", 65536),
        ("64k", 65536),
        ("64KiB", 65536),
        ("64kb", 65536),
        ("64KB", 65536),
        ("1M", 1 << 20),
        ("10G", 10 << 30),
        ("3T", 3 << 40),
        ("2P", 2 << 50),
        ("1E", 1 << 60),
        ("512B", 512),
        (" 5 m ", 5 << 20),
        ("007", 7),
    ],
)
def test_parse_size_takes_a_number_with_a_binary_suffix(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", " ", "K", "-1", "+1", "1.5G", "1e3", "0x10", "1_000", "1,000", "10X", "10KK", "10 Ki", "1 0", "G10", "ten"],
)
def test_parse_size_refuses_what_is_no_size_and_quotes_it(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size(text)
    assert str(caught.value).startswith(f"{text!r} is not a size: expected a whole number with an optional K")


def test_parse_size_of_a_number_with_thousands_of_digits_is_refused() -> None:
    """Python converts at most 4300 digits, and raises ValueError beyond."""
    with pytest.raises(ConfigError):
        parse_size("9" * 5000)


@pytest.mark.parametrize(("count", "said"), [(0, "0 exports"), (1, "1 export"), (2, "2 exports")])
def test_count_of_one_is_of_one_thing(count: int, said: str) -> None:
    assert counted(count, "export") == said


def test_count_of_what_takes_no_s() -> None:
    assert [counted(count, "entry", "entries") for count in (0, 1, 2)] == ["0 entries", "1 entry", "2 entries"]


def test_alternatives_end_with_the_last_one_behind_or() -> None:
    assert alternatives(("off", "required", "selective")) == "off, required or selective"
    assert alternatives(("1.2", "1.3")) == "1.2 or 1.3"
