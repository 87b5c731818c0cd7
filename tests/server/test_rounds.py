"""Turns of connections: bounded, and so are those of one round together; who waits has the next in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from nbdimg.config import ExportConfig, ServerConfig
from nbdimg.errors import ProtocolError
from nbdimg.formats.raw import RawDriver
from nbdimg.image.image import Image
from nbdimg.server import rounds
from nbdimg.server.rounds import CROWDED_REQUESTS, ROUND_S, TURN_MIN_S, Rounds
from nbdimg.storage.memory import MemoryFile
from nbdimg.uri import NbdUri
from tests.server.live import pattern, pattern_image
from tests.server.test_lane import SIZE, Conversation, drain, request
from tests.server.tls_live import LiveServer
from tests.support.rawclient import Client
from tests.support.rawprotocol import MIB, Command

READ, TRIM = 0, 4


class Machine:
    """A clock, and a loop."""

    def __init__(self) -> None:
        self.now_s = 1.0
        self.soon: list[Callable[[], object]] = []

    def call_soon(self, callback: Callable[[], object]) -> None:
        self.soon.append(callback)

    def turn(self) -> None:
        now, self.soon = self.soon, []
        for callback in now:
            callback()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(rounds, "perf_counter", lambda: machine.now_s)
    return machine


def work(machine: Machine, done: list[str], name: str, seconds: float) -> Callable[[], None]:
    def turn() -> None:
        machine.now_s += seconds
        done.append(name)

    return turn


def test_turns_beyond_a_round_wait_for_the_next_in_the_order_in_which_they_came(machine: Machine) -> None:
    tested, done = Rounds(machine), list[str]()
    for name in "abcde":
        tested.line_up(work(machine, done, name, ROUND_S / 2))
    for expected in ("ab", "abcd", "abcde"):
        machine.turn()
        assert "".join(done) == expected
    assert not machine.soon


@pytest.mark.parametrize("has_come", [False, True])
def test_turn_is_told_whether_others_wait(machine: Machine, has_come: bool) -> None:
    tested, crowded = Rounds(machine), list[bool]()
    for _ in range(3):
        tested.line_up(lambda: crowded.append(tested.is_crowded), has_come=has_come)
    machine.turn()
    assert crowded == [True, True, False]


def test_what_has_just_come_goes_ahead_of_what_was_left_one_for_one(machine: Machine) -> None:
    tested, done = Rounds(machine), list[str]()
    for name in "abcd":
        tested.line_up(work(machine, done, name, 0))
    for name in "xyz":
        tested.line_up(work(machine, done, name, 0), has_come=True)
    machine.turn()
    assert "".join(done) == "xaybzcd"


def test_turn_that_lines_up_again_has_its_next_one_behind_a_poll_of_the_loop(machine: Machine) -> None:
    """A long READ is sent piece by piece; others come in between."""
    tested, done = Rounds(machine), list[str]()

    def pump() -> None:
        done.append("p")
        if len(done) < 3:
            tested.line_up(pump)

    tested.line_up(pump)
    for count in (1, 2, 3):
        machine.turn()
        assert len(done) == count
    assert not machine.soon


def test_those_in_line_have_a_share_of_the_round_each_and_not_too_little(machine: Machine) -> None:
    tested, shares = Rounds(machine), list[float]()
    for _ in range(2):
        tested.line_up(lambda: shares.append(tested.left_s))
    machine.turn()
    assert shares == pytest.approx([ROUND_S / 2, ROUND_S])
    for _ in range(1000):
        tested.line_up(lambda: shares.append(tested.left_s))
    machine.turn()
    assert min(shares) == TURN_MIN_S


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_turns_that_take_all_that_they_may_take_a_round_together(machine: Machine, count: int) -> None:
    tested, done = Rounds(machine), list[float]()

    def turn() -> None:
        done.append(tested.left_s)
        machine.now_s += tested.left_s

    for _ in range(count):
        tested.line_up(turn)
    machine.turn()
    assert done == pytest.approx([ROUND_S / count] * count)


def test_round_that_is_used_up_takes_no_more_turns_until_the_next(machine: Machine) -> None:
    tested = Rounds(machine)
    tested.left_s -= ROUND_S
    tested.renew()
    tested.renew()
    assert tested.left_s <= 0
    machine.turn()
    assert tested.left_s == pytest.approx(ROUND_S)
    assert not machine.soon


def test_turn_that_fails_takes_nobody_elses_away(machine: Machine) -> None:
    tested, done = Rounds(machine), list[str]()

    def fail() -> None:
        raise RuntimeError

    tested.line_up(fail)
    tested.line_up(work(machine, done, "a", 0))
    with pytest.raises(RuntimeError):
        machine.turn()
    machine.turn()
    assert done == ["a"]


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
def test_clients_whose_every_turn_waits_in_line_are_served_to_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, structured: bool
) -> None:
    monkeypatch.setattr(rounds, "ROUND_S", 0.0)
    monkeypatch.setattr(rounds, "TURN_MIN_S", 1e-9)
    image = pattern_image(tmp_path / "disk.raw", MIB)
    uri = NbdUri(socket=str(tmp_path / "s"))
    config = ServerConfig((ExportConfig(str(image), "disk", "raw"),), (uri,))
    with LiveServer(config) as server, ExitStack() as stack:
        clients = [stack.enter_context(Client(server.address)) for _ in range(4)]
        for client in clients:
            client.greet()
            client.negotiate("disk", structured=structured)
        for number, client in enumerate(clients):
            start = number * MIB // 4
            asked = [
                client.new_request(Command.WRITE, start, 1000, payload=bytes([number + 1]) * 1000),
                client.new_request(Command.FLUSH),
                client.new_request(Command.TRIM, start + 65536, 65536),
                *client.reads(70, 4096, start + 4096, 0),
                *client.reads(1, MIB, 0),
            ]
            client.send_requests(asked)
            client.half_close()
        for number, client in enumerate(clients):
            replies = client.read_replies(74)
            assert not any(reply.error for reply in replies)
            reads = [reply.data for reply in replies if len(reply.data) == 4096]
            assert reads == [pattern(number * MIB // 4 + 4096, 4096)] * 70
            assert client.wait_closed(5) is not None


@pytest.mark.parametrize(("command", "handled_max"), [(READ, CROWDED_REQUESTS), (TRIM, 1)])
def test_turn_ends_with_its_time_and_the_requests_behind_are_answered_in_later_ones(
    monkeypatch: pytest.MonkeyPatch, command: int, handled_max: int
) -> None:
    monkeypatch.setattr(rounds, "ROUND_S", 0.0)
    monkeypatch.setattr(rounds, "TURN_MIN_S", 0.0)

    async def main() -> None:
        with Conversation("simple", Image(RawDriver(MemoryFile(bytes(SIZE))), writable=True)) as conversation:
            transmission = conversation.transmission
            conversation.shared.rounds.line_up(lambda: None)
            asked = b"".join(request(False, command, 0, cookie, cookie * 512, 512, b"") for cookie in range(100))
            replies = conversation.ask(asked)
            assert transmission.handled_count == handled_max
            assert transmission.is_paused
            while transmission.is_paused:
                replies += await conversation.rest()
                await asyncio.sleep(0)
            replies += await conversation.rest() + drain(conversation._theirs)
            assert transmission.handled_count == 100
            assert len(replies) == 100 * (16 + 512 * (command == READ))

    asyncio.run(main())


def test_turn_that_ends_the_connection_takes_its_time_off_the_round_too() -> None:
    async def main() -> None:
        with Conversation("simple", Image(RawDriver(MemoryFile(bytes(SIZE))), writable=True)) as conversation:
            shared = conversation.shared
            before_s = shared.rounds.left_s
            with pytest.raises(ProtocolError):
                conversation.ask(request(False, READ, 0, 1, 0, 512, b"") + bytes(28))
            assert shared.rounds.left_s < before_s

    asyncio.run(main())
