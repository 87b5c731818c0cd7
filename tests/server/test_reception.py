"""Handshakes of many clients at once: in turns, and what one sends in one piece is answered all the same."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from nbdimg.config import ExportConfig, ServerConfig
from nbdimg.limits import Limits
from nbdimg.server import reception
from nbdimg.server.reception import Reception
from nbdimg.uri import NbdUri
from tests.server.live import pattern, pattern_image
from tests.server.tls_live import LiveServer, files
from tests.support.rawclient import Client
from tests.support.rawprotocol import KIB, MIB, Command, ConnectionClosed, Option, Rep, info_data, option_bytes
from tests.support.server import NbdimgServer

UNKNOWN_OPTION = 200


class Loop:
    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.soon.append(callback)

    def turn(self) -> None:
        now, self.soon = self.soon, []
        for callback in now:
            callback()


def test_steps_beyond_a_turn_wait_for_the_next_in_the_order_in_which_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reception, "TURN_S", 0)
    loop, done = Loop(), []
    tested = Reception(cast(asyncio.AbstractEventLoop, loop))
    for number in range(3):
        tested.line_up(lambda number=number: done.append(number))  # type: ignore[misc]
    for count in range(4):
        assert done == list(range(count))
        loop.turn()
    assert not loop.soon


def test_short_steps_share_a_turn_and_one_may_line_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reception, "TURN_S", 60)
    loop, done = Loop(), []
    tested = Reception(cast(asyncio.AbstractEventLoop, loop))

    def again() -> None:
        done.append("a")
        tested.line_up(lambda: done.append("c"))

    tested.line_up(again)
    tested.line_up(lambda: done.append("b"))
    loop.turn()
    assert done == ["a", "b", "c"]


@pytest.mark.parametrize("option_count", [0, 15, 16, 17, 200])
def test_options_of_many_turns_and_requests_in_one_piece_are_answered(tmp_path: Path, option_count: int) -> None:
    image = pattern_image(tmp_path / "disk.raw", MIB)
    with NbdimgServer(f"disk={image}", options=["--format=raw"]) as server, Client(server.socket_path) as client:
        client.greet(None)
        client.no_zeroes = True
        read = client.new_request(Command.READ, 64 * KIB, 512)
        asked = option_bytes(Option.LIST) * option_count + option_bytes(Option.GO, info_data("disk"))
        client.send(struct.pack(">I", 3) + asked + client.announce(read))
        for _ in range(option_count):
            assert [reply.type for reply in client.read_option_replies(Option.LIST)] == [Rep.SERVER, Rep.ACK]
        client.read_option_replies(Option.GO)
        assert client.read_reply().data == pattern(64 * KIB, 512)


def test_client_that_takes_its_answers_late_gets_all_of_them(tmp_path: Path) -> None:
    """Lists of 180 KB: more than a socket holds wait, and are written when there is room."""
    image = pattern_image(tmp_path / "disk.raw", 4096)
    images = [f"export-{number}={image}" for number in range(60)]
    options = ["--format=raw", "--read-only", f"--description={'d' * 3000}"]
    with NbdimgServer(*images, options=options) as server, Client(server.socket_path) as client:
        client.greet()
        client.send(option_bytes(Option.LIST) * 12 + option_bytes(Option.GO, info_data("export-7")))
        for _ in range(12):
            assert len(client.read_option_replies(Option.LIST)) == 61
        client.read_option_replies(Option.GO)
        assert client.read(0, 512).data == pattern(0, 512)


@pytest.mark.parametrize(("limits", "data"), [(Limits(options=3), b""), (Limits(option_bytes=300), b"x" * 100)])
def test_client_that_haggles_beyond_the_limits_of_the_server_is_let_go(
    tmp_path: Path, limits: Limits, data: bytes
) -> None:
    """Three options are within them, the fourth is not."""
    (path,) = files(tmp_path, ["disk"])
    exports, uri = (ExportConfig(str(path), "disk", "raw"),), NbdUri(socket=str(tmp_path / "s"))
    with LiveServer(ServerConfig(exports, (uri,), limits)) as server, Client(server.address) as client:
        client.greet()
        for _ in range(3):
            assert client.option(UNKNOWN_OPTION, data)[-1].type == Rep.ERR_UNSUP
        with pytest.raises((ConnectionClosed, ConnectionResetError, BrokenPipeError)):
            client.option(UNKNOWN_OPTION, data)
