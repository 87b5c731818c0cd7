"""The loop polls for the next request where that is the faster way, and sleeps where it is not."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from nbdimg.server import spin
from nbdimg.server.spin import TRIAL_INTERVAL_MAX_S, WINDOW_MAX_S, Spinner

POLL_S = 1e-6


class Machine:
    """A clock, and a loop that polls as long as it is told to. Requests come `polled_s` behind those that the loop
    polls behind, and `slept_s` behind others.
    """

    def __init__(self, polled_s: float, slept_s: float) -> None:
        self.now_s = 1.0
        self.polled_s, self.slept_s = polled_s, slept_s
        self.offer_s = POLL_S
        self._ready: list[Callable[[], object]] = []

    def call_soon(self, callback: Callable[[], object]) -> None:
        self._ready.append(callback)

    def offer(self) -> None:
        self.now_s += self.offer_s

    def next_request(self) -> bool:
        """Until the next request; returns whether the loop polled behind the last one."""
        start_s = self.now_s
        is_polled = bool(self._ready)
        gap_s = self.polled_s if is_polled else self.slept_s
        while self._ready and self.now_s < start_s + gap_s:
            self._ready.pop()()
            self.now_s += POLL_S
        self.now_s = max(self.now_s, start_s + gap_s)
        return is_polled


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(20e-6, 60e-6)
    monkeypatch.setattr(spin, "perf_counter", lambda: machine.now_s)
    monkeypatch.setattr(os, "sched_yield", machine.offer)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    return machine


def polled_share(machine: Machine, spinner: Spinner, seconds: float) -> float:
    """Of the requests that come within so many seconds of the machine's."""
    counts = [0, 0]
    until_s = machine.now_s + seconds
    while machine.now_s < until_s:
        spinner.touch()
        spinner.handled_count += 1
        counts[machine.next_request()] += 1
    return counts[True] / sum(counts)


def test_polls_where_a_wake_up_costs_more(machine: Machine) -> None:
    assert polled_share(machine, Spinner(machine), 5) > 0.95


def test_sleeps_where_a_wake_up_is_cheaper(machine: Machine) -> None:
    machine.slept_s = 15e-6
    spinner = Spinner(machine)
    polled_share(machine, spinner, 1)
    assert polled_share(machine, spinner, 5) < 0.05


def test_sleeps_where_others_take_the_processor_for_a_slice_when_it_is_offered(machine: Machine) -> None:
    machine.offer_s = 5e-3
    spinner = Spinner(machine)
    polled_share(machine, spinner, 2)
    assert polled_share(machine, spinner, 10) < 0.001


def test_polls_again_when_the_others_have_gone(machine: Machine) -> None:
    machine.offer_s = 5e-3
    spinner = Spinner(machine)
    polled_share(machine, spinner, 10)
    machine.offer_s = POLL_S
    polled_share(machine, spinner, TRIAL_INTERVAL_MAX_S)
    assert polled_share(machine, spinner, 5) > 0.95


def test_polls_no_more_behind_requests_that_come_late(machine: Machine) -> None:
    machine.polled_s = machine.slept_s = 3 * WINDOW_MAX_S
    spinner = Spinner(machine)
    polled_share(machine, spinner, 1)
    assert polled_share(machine, spinner, 5) == 0


def test_never_polls_with_one_processor(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert polled_share(machine, Spinner(machine), 1) == 0
