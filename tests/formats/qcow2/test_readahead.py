"""What is begun ahead of whom."""

from __future__ import annotations

import random

from nbdimg.formats.qcow2.readahead import READERS_MAX, ReadAhead


def begun(ahead: ReadAhead, clusters: list[int]) -> list[tuple[int, int, int]]:
    """(cluster read, first begun, length) where something is begun."""
    return [(cluster, *run) for cluster in clusters if (run := ahead.read(cluster)).length]


def test_runs_double_up_to_the_longest_and_each_begins_a_run_ahead() -> None:
    assert begun(ReadAhead(8), list(range(100, 130))) == [
        (101, 102, 2),
        (102, 104, 4),
        (104, 108, 8),
        (108, 116, 8),
        (116, 124, 8),
        (124, 132, 8),
    ]


def test_a_sequential_reader_has_everything_begun_before_it_comes() -> None:
    ahead, known = ReadAhead(5), {7, 8}
    for cluster in range(7, 500):
        assert cluster in known
        first, length = ahead.read(cluster)
        known.update(range(first, first + length))


def test_reads_within_one_cluster_count_once() -> None:
    assert begun(ReadAhead(8), [5, 5, 5, 6, 6, 6]) == [(6, 7, 2)]


def test_readers_that_take_turns_within_their_clusters_do_not_disturb_each_other() -> None:
    ahead = ReadAhead(8)
    alone = begun(ReadAhead(8), list(range(40)))
    assert alone
    for start in (0, 1000):
        both = [reader + cluster for cluster in range(40) for _ in range(4) for reader in (start, 5000 + start)]
        runs = begun(ahead, both)
        assert [run for run in runs if run[0] < 5000] == [(at + start, first + start, n) for at, first, n in alone]


def test_random_and_backward_reads_begin_nothing() -> None:
    assert begun(ReadAhead(8), list(range(100, 0, -1))) == []
    assert begun(ReadAhead(8), random.Random(1).sample(range(0, 1 << 40, 2), 1000)) == []


def test_several_readers_are_followed_and_no_more_than_so_many() -> None:
    ahead = ReadAhead(8)
    for cluster in range(24):
        for reader in range(10):
            ahead.read(reader * 1000 + cluster)
    assert [ahead.read(reader * 1000 + 24) for reader in range(10)] == [(reader * 1000 + 32, 8) for reader in range(10)]
    for cluster in range(0, 4 * READERS_MAX, 2):
        ahead.read(10**6 + cluster)
    assert len(ahead._readers) == READERS_MAX
