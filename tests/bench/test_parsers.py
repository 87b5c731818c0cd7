"""What fio, strace and cProfile print, and how the command line and the rounds select."""

from __future__ import annotations

import json
import marshal

import pytest

from bench import fio, profile
from bench.__main__ import output_directory, parse_size, parser
from bench.cells import CELLS, select_cells
from bench.results import Measurement, SyscallCost
from bench.servers import select_servers
from bench.throughput import rotated

LATENCY = {"max": 900_000, "percentile": {"50.000000": 100_000, "99.000000": 250_500}}


def fio_text(error: int = 0, total_ios: int = 5000) -> str:
    side = {"iops": 2500.5, "bw_bytes": 10_242_048, "total_ios": total_ios, "clat_ns": LATENCY}
    return "fio: a warning\n" + json.dumps({"jobs": [{"error": error, "read": side, "write": {}}]})


def test_fio_json_after_a_warning_is_read() -> None:
    assert fio.parse(fio_text(), "randread") == Measurement(2500.5, 10_242_048.0, 100.0, 250.5, 900.0, 5000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (fio_text(error=5), "I/O error 5"),
        (fio_text(total_ios=0), "no request completed"),
        ("", "not the JSON"),
        ("{", "not the JSON"),
        ('{"jobs": []}', "not the JSON"),
    ],
)
def test_fio_run_that_failed_raises(text: str, message: str) -> None:
    with pytest.raises(fio.FioError, match=message):
        fio.parse(text, "randread")


def test_strace_table_gives_calls_per_request_without_the_total() -> None:
    text = """\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 75.00    0.300000           3     10000           preadv2
 25.00    0.100000           4      2500        50 recvfrom
------ ----------- ----------- --------- --------- ----------------
100.00    0.400000           3     12500        50 total
"""
    assert profile.parse_strace(text, 10_000) == [
        SyscallCost("preadv2", 1.0, 0.75),
        SyscallCost("recvfrom", 0.25, 0.25),
    ]


def test_profile_leaves_out_rare_functions_and_shares_the_rest() -> None:
    data = marshal.dumps(
        {
            ("~", 0, "<built-in method posix.preadv>"): (1000, 1000, 0.003, 0.003, {}),
            ("/x/nbdimg/wire/transmission.py", 12, "parse"): (500, 500, 0.001, 0.004, {}),
            ("~", 0, "<method 'run_forever'>"): (1, 1, 5.0, 5.0, {}),
        }
    )
    costs = profile.parse_profile(data, 1000)
    assert [cost.name for cost in costs] == ["<built-in method posix.preadv>", "wire/transmission.py:12 parse"]
    assert [round(cost.self_share, 6) for cost in costs] == [0.75, 0.25]
    assert [round(cost.self_us_per_request, 6) for cost in costs] == [3.0, 1.0]


def test_rotation_puts_every_server_first_in_turn() -> None:
    assert [rotated("abc", by)[0] for by in range(4)] == ["a", "b", "c", "a"]


def test_cell_names_are_unique_and_selected_by_pattern() -> None:
    assert len({cell.name for cell in CELLS}) == len(CELLS) == 8
    assert [cell.name for cell in select_cells(["1m-*"])] == ["1m-read-8", "1m-write-8"]
    assert select_cells([]) == CELLS
    with pytest.raises(ValueError, match="no cell matches"):
        select_cells(["1m-*", "2k"])


def test_servers_are_selected_by_word() -> None:
    assert [spec.name for spec in select_servers(["qemu", "nbdimg"])] == [
        "nbdimg",
        "qemu-nbd threads",
        "qemu-nbd io_uring",
    ]
    with pytest.raises(ValueError, match="no server matches"):
        select_servers(["nbd-server"])


def test_size_below_the_least_or_without_unit_is_refused() -> None:
    assert parse_size("512M") == 512 << 20
    assert parse_size("1g") == 1 << 30
    for text in ("127M", "512", "M", ""):
        with pytest.raises(ValueError, match=r"is not a size|invalid literal"):
            parse_size(text)


@pytest.mark.parametrize(
    ("words", "is_written"),
    [([], True), (["--rounds", "5"], True), (["--quick"], False), (["--profile"], False), (["--cells", "4k*"], False)],
)
def test_partial_run_does_not_replace_the_recorded_results(words: list[str], is_written: bool) -> None:
    assert (output_directory(parser().parse_args(words)) is not None) is is_written
