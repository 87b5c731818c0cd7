"""Whose turn it is to have a buffer, where there is not room for all."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import ExitStack
from pathlib import Path

from nbdimg.config import ExportConfig, ServerConfig
from nbdimg.export.registry import Registry
from nbdimg.limits import PIECE_SIZE, Limits
from nbdimg.server.buffers import KEPT_BYTES_MAX, SHORT_SHARE, BufferPool
from nbdimg.server.shared import WAKES_PER_TURN, Shared
from nbdimg.units import KiB, MiB
from nbdimg.uri import NbdUri
from tests.server.tls_live import LiveServer, files
from tests.support.rawclient import connect_negotiated
from tests.support.rawprotocol import Command, CommandFlag
from tests.support.rss import wait_until

LIMIT = 16 * MiB
SHARE = LIMIT // SHORT_SHARE
GONE_S = 10.0


def filled(pool: BufferPool, length: int) -> deque[memoryview]:
    """All that can be had of this length."""
    views: deque[memoryview] = deque()
    while (view := pool.take(length, "others")) is not None:
        views.append(view)
    pool.leave("others")
    return views


def test_long_buffer_is_had_although_short_ones_are_asked_for_without_end() -> None:
    pool = BufferPool(LIMIT)
    shorts = filled(pool, PIECE_SIZE)
    assert pool.lent_bytes == LIMIT
    for _ in range(LIMIT // PIECE_SIZE):
        if pool.take(MiB, "long") is not None:
            break
        pool.give(shorts.popleft())
        shorts += filled(pool, PIECE_SIZE)
    else:
        raise AssertionError("never")
    pool.give(shorts.popleft())
    assert filled(pool, PIECE_SIZE), "the line is empty, and short ones may have all again"
    assert pool.lent_bytes == LIMIT


def test_long_buffer_is_had_although_others_of_less_length_are_asked_for_without_end() -> None:
    pool = BufferPool(LIMIT)
    others = filled(pool, MiB)
    assert pool.lent_bytes == LIMIT - SHARE
    for _ in range(len(others)):
        assert pool.take(8 * MiB, "long") is None
        pool.give(others.popleft())
        assert pool.take(MiB, "other") is None
        if len(others) == 4:
            break
    assert pool.take(8 * MiB, "long") is not None


def test_who_leaves_the_line_is_waited_for_no_more() -> None:
    pool = BufferPool(LIMIT)
    others = filled(pool, MiB)
    assert pool.take(8 * MiB, "first") is None
    pool.give(others.pop())
    assert pool.take(MiB, "second") is None
    assert pool.leave("first")
    assert not pool.leave("first")
    assert pool.take(MiB, "second") is not None


def test_short_ones_have_their_share_beside_long_ones_that_wait_and_stay() -> None:
    pool = BufferPool(LIMIT)
    filled(pool, MiB)
    assert pool.take(MiB, "long") is None
    assert len(filled(pool, PIECE_SIZE)) == SHARE // PIECE_SIZE
    assert pool.lent_bytes == LIMIT


def test_what_is_longer_than_the_limit_is_lent_alone_of_the_long_ones() -> None:
    pool = BufferPool(LIMIT)
    other, short = pool.take(MiB, "other"), pool.take(512, "short")
    assert other is not None
    assert short is not None
    assert pool.take(2 * LIMIT, "long") is None
    pool.give(other)
    view = pool.take(2 * LIMIT, "long")
    assert view is not None
    assert pool.take(MiB, "other") is None
    assert pool.take(512, "short") is not None
    pool.give(view)
    assert pool.take(MiB, "other") is not None


def test_short_ones_that_were_given_back_count_no_more() -> None:
    pool = BufferPool(LIMIT)
    for view in filled(pool, PIECE_SIZE):
        pool.give(view)
    assert pool.lent_bytes == 0
    filled(pool, MiB)
    assert pool.lent_bytes == LIMIT - SHARE
    assert pool.take(MiB, "long") is None
    assert len(filled(pool, PIECE_SIZE)) == SHARE // PIECE_SIZE


def test_buffers_are_kept_for_the_next_and_given_back_when_nobody_wants_them() -> None:
    """Again and again: what is given back makes room for others that are kept."""
    pool = BufferPool(4 * KEPT_BYTES_MAX)

    def used_again(length: int) -> object:
        view = pool.take(length, "asker")
        assert view is not None
        pool.give(view)
        return view.obj

    for _ in range(2):
        kept = used_again(KEPT_BYTES_MAX)
        pool.tidy()
        for _ in range(2):
            assert used_again(KEPT_BYTES_MAX - 1) is kept
        assert used_again(KEPT_BYTES_MAX // 2) is not used_again(KEPT_BYTES_MAX // 2), "no more than so much is kept"
        pool.tidy()
        pool.tidy()
        assert used_again(KEPT_BYTES_MAX) is not kept
        pool.tidy()
        pool.tidy()


def test_buffer_has_the_length_that_was_asked_for() -> None:
    pool = BufferPool(LIMIT)
    for length in (0, 1, 2, 3, *(size + more for size in (4096, 128 * KiB, MiB) for more in (-1, 0, 1))):
        for _ in range(2):
            view = pool.take(length, "asker")
            assert view is not None
            assert len(view) == length
            assert pool.lent_bytes == length
            pool.give(view)


def test_long_buffer_is_lent_beside_short_ones_that_have_more_than_their_share() -> None:
    pool = BufferPool(LIMIT)
    while pool.lent_bytes <= 2 * SHARE:
        assert pool.take(PIECE_SIZE, "short") is not None
    assert pool.take(MiB, "long") is not None


def test_connection_has_its_share_again_when_its_payloads_are_done(tmp_path: Path) -> None:
    (path,) = files(tmp_path, ["disk"], MiB)
    exports, uri = (ExportConfig(str(path), "disk", "raw"),), NbdUri(socket=str(tmp_path / "s"))
    with (
        LiveServer(ServerConfig(exports, (uri,), Limits(connection_bytes=MiB))) as server,
        connect_negotiated(server.address, "disk", GONE_S) as client,
    ):
        for number in range(4):
            data = bytes([number]) * MiB
            assert client.write(0, data).error == 0
            assert client.request(Command.READ, 0, MiB, CommandFlag.DF).data == data


def test_new_limit_of_all_payloads_holds_for_connections_that_are_up(tmp_path: Path) -> None:
    (path,) = files(tmp_path, ["disk"], 4 * MiB)
    exports, uri = (ExportConfig(str(path), "disk", "raw"),), NbdUri(socket=str(tmp_path / "s"))
    with LiveServer(ServerConfig(exports, (uri,))) as live, ExitStack() as stack:
        first, second = (stack.enter_context(connect_negotiated(live.address, "disk")) for _ in range(2))
        server = live.service.server
        live.now(server.set_limits, Limits(total_bytes=4 * MiB))
        for client in (first, second):
            client.send(client.announce(client.new_request(Command.WRITE, 0, 2 * MiB)) + bytes(64))
            assert wait_until(lambda: server.lent_bytes == 2 * MiB, GONE_S)
        assert wait_until(lambda: len(server._shared.pool._line) == 1, GONE_S)
        first.close()
        second.send(bytes(2 * MiB - 64))
        assert second.read_reply().error == 0


def test_next_in_line_has_a_try_when_the_first_has_taken_its_buffer() -> None:
    """There is room for both, and the second has tried before the first."""

    async def scenario() -> list[str]:
        shared = Shared(asyncio.get_running_loop(), Registry(), Limits(total_bytes=LIMIT))
        held = shared.take(LIMIT - SHARE, "holder")
        assert held is not None
        served: list[str] = []

        def wait(asker: str) -> None:
            def try_again() -> None:
                if shared.take(MiB, asker) is None:
                    wait(asker)
                else:
                    served.append(asker)

            shared.when_room(try_again)

        for asker in ("first", "second"):
            assert shared.take(MiB, asker) is None
        for asker in ("second", "first"):
            wait(asker)
        shared.give(held)
        for _ in range(20):
            await asyncio.sleep(0)
        return served

    assert asyncio.run(scenario()) == ["first", "second"]


def test_who_asks_in_vain_wakes_nobody() -> None:
    """Or those who wait would wake each other without end."""

    async def scenario() -> int:
        shared = Shared(asyncio.get_running_loop(), Registry(), Limits(total_bytes=LIMIT))
        held = shared.take(LIMIT - SHARE, "holder")
        short = shared.take(512, "holder")
        assert held is not None
        assert short is not None
        try_count = 0

        def wait(asker: str) -> None:
            def try_again() -> None:
                nonlocal try_count
                try_count += 1
                if shared.take(MiB, asker) is None:
                    wait(asker)

            shared.when_room(try_again)

        for asker in ("first", "second"):
            assert shared.take(MiB, asker) is None
            wait(asker)
        shared.give(short)
        for _ in range(100):
            await asyncio.sleep(0)
        assert try_count == 2
        shared.give(held)
        for _ in range(100):
            await asyncio.sleep(0)
        return try_count

    assert asyncio.run(scenario()) == 4


def test_all_who_wait_for_room_have_one_try_and_few_of_them_in_a_turn() -> None:
    waiting_count = 10 * WAKES_PER_TURN

    async def scenario() -> list[int]:
        shared = Shared(asyncio.get_running_loop(), Registry(), Limits())
        tries: list[int] = []

        def wait(number: int) -> None:
            def try_in_vain() -> None:
                tries.append(number)
                wait(number)

            shared.when_room(try_in_vain)

        for number in range(waiting_count):
            wait(number)
        for _ in range(2):
            view = shared.take(512, None)
            assert view is not None
            shared.give(view)
        while len(tries) < waiting_count:
            tried_before = len(tries)
            await asyncio.sleep(0)
            assert 0 < len(tries) - tried_before <= WAKES_PER_TURN
        for _ in range(20):
            await asyncio.sleep(0)
        return tries

    assert asyncio.run(scenario()) == list(range(waiting_count))
