"""What is put and queued leaves in that order, whole, whatever the socket takes at a time."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable, Sequence
from typing import cast

import pytest

from nbdimg.export.registry import Registry
from nbdimg.limits import Limits
from nbdimg.server.outbox import PARTS_MAX, Outbox, Part, TlsOutbox
from nbdimg.server.shared import Shared
from nbdimg.server.tls import TlsSocket
from tests.support.faultfile import os_error


class Loop:
    """What an outbox asks of its loop, done when the test says so."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], object]] = []
        self.writer: Callable[[], object] | None = None
        self.now_s = 0.0

    def call_soon(self, callback: Callable[[], object]) -> None:
        self.soon.append(callback)

    def add_writer(self, descriptor: int, callback: Callable[[], object]) -> None:
        assert self.writer is None
        self.writer = callback

    def remove_writer(self, descriptor: int) -> None:
        assert self.writer is not None
        self.writer = None

    def time(self) -> float:
        return self.now_s

    def turn(self) -> None:
        self.now_s += 1
        soon, self.soon = self.soon, []
        for callback in soon or ([self.writer] if self.writer is not None else []):
            callback()


class Sink:
    """A socket with room for `room` bytes."""

    def __init__(self) -> None:
        self.taken = bytearray()
        self.room = 0
        self.error: OSError | None = None

    def fileno(self) -> int:
        return 7

    def send(self, data: memoryview) -> int:
        return self.sendmsg([data])

    def sendmsg(self, parts: Sequence[Part]) -> int:
        if self.error is not None:
            raise self.error
        if not self.room:
            raise BlockingIOError
        data = b"".join(parts)[: self.room]
        self.taken += data
        self.room -= len(data)
        return len(data)


class Cipher(Sink):
    """As `TlsSocket`: takes up to 16 records and keeps, as ciphertext of the same size, what the socket does not."""

    def __init__(self) -> None:
        super().__init__()
        self.backlog = b""
        self.sent_bytes = 0

    @property
    def backlog_size(self) -> int:
        return len(self.backlog)

    def flush(self) -> bool:
        if self.error is not None:
            raise self.error
        sent, self.backlog = self.backlog[: self.room], self.backlog[self.room :]
        self.taken += sent
        self.room -= len(sent)
        self.sent_bytes += len(sent)
        return not self.backlog

    def sendmsg(self, parts: Sequence[Part]) -> int:
        if not self.flush():
            raise BlockingIOError
        self.backlog = b"".join(parts)[: 16 << 14]
        count = len(self.backlog)
        self.flush()
        return count


class Bench:
    def __init__(self, kind: str) -> None:
        self.loop, self.sink = Loop(), Cipher() if kind == "tls" else Sink()
        self.put = bytearray()
        """All that is to leave, in order."""
        self.room_count = 0
        self.errors: list[OSError] = []
        self.limits = Limits()
        shared = Shared(cast("asyncio.AbstractEventLoop", self.loop), Registry(), self.limits)
        self.arena = shared.arena
        self.outbox = (
            TlsOutbox(cast("TlsSocket", self.sink), shared, self.on_room, self.errors.append)
            if kind == "tls"
            else Outbox(self.sink, shared, self.on_room, self.errors.append)
        )

    def on_room(self) -> None:
        self.room_count += 1
        assert self.left == 0

    @property
    def left(self) -> int:
        return len(self.put) - len(self.sink.taken)

    def settle(self, room: int) -> None:
        while self.loop.soon or (self.loop.writer is not None and self.left):
            self.sink.room = room
            self.loop.turn()


@pytest.mark.parametrize("kind", ["plain", "tls"])
def test_all_bytes_leave_in_order_whatever_the_socket_takes(kind: str) -> None:
    for seed in range(15):
        source = random.Random(seed)
        bench = Bench(kind)
        outbox, queued = bench.outbox, 0
        called: list[int] = []

        def note(number: int, stop: int, bench: Bench = bench, called: list[int] = called) -> Callable[[], None]:
            def on_sent() -> None:
                called.append(number)
                assert len(bench.sink.taken) + getattr(bench.sink, "backlog_size", 0) >= stop

            return on_sent

        for _ in range(60):
            bench.sink.room = source.choice([0, 0, 1, 5000, 1 << 22])
            choice = source.randrange(5)
            data = source.randbytes(source.choice([1, 16, 300, 70_000]))
            if choice == 0:
                for _ in range(source.choice([1, 3, 20])):
                    outbox.put(data)
                    bench.put += data
                outbox.send_turn()
            elif choice == 1:
                at = outbox.room(len(data))
                bench.arena[at : at + len(data)] = data
                outbox.fill = at + len(data)
                bench.put += data
                outbox.send_turn()
            elif choice == 2:
                data *= source.choice([1, 1, 20])
                outbox.put_or_queue(data)
                bench.put += data
            elif choice == 3:
                parts: list[Part] = [data[at : at + 999] for at in range(0, len(data), 999)]
                bench.put += data
                outbox.queue(parts, note(queued, len(bench.put)))
                queued += 1
            else:
                bench.loop.turn()
            assert outbox.pending_bytes == bench.left
            assert outbox.is_empty() == (bench.left == 0)
            assert len(bench.loop.soon) + (bench.loop.writer is not None) <= 1, "it is woken in one way"
            assert (outbox.stalled_since_s is None) == (bench.loop.writer is None)
        bench.settle(100_000)
        assert bench.sink.taken == bench.put
        assert called == list(range(queued))
        assert outbox.is_empty()
        assert bench.loop.writer is None
        assert bench.room_count
        assert bench.errors == []


@pytest.mark.parametrize("kind", ["plain", "tls"])
def test_socket_that_takes_nothing_is_waited_for_and_one_that_is_interrupted_asked_again(kind: str) -> None:
    bench = Bench(kind)
    for error in (None, InterruptedError()) if kind == "plain" else (None,):
        bench.sink.error = error
        bench.outbox.put(b"turn")
        bench.outbox.send_turn()
        bench.outbox.queue([b"part"])
        bench.put += b"turnpart"
        bench.loop.turn()
        assert bench.outbox.pending_bytes == 8
        bench.sink.error = None
        bench.settle(8)
        assert bench.sink.taken == bench.put
    assert bench.errors == []


@pytest.mark.parametrize("kind", ["plain", "tls"])
@pytest.mark.parametrize("way", ["put", "queue", "waiting"])
def test_broken_socket_is_told_once_and_all_who_wait_are_let_go(kind: str, way: str) -> None:
    bench = Bench(kind)
    outbox = bench.outbox
    gone: list[str] = []
    if way == "waiting":
        outbox.put(b"first")
        outbox.send_turn()
    bench.sink.error = os_error(errno.EPIPE)
    if way == "put":
        outbox.put(b"turn")
        outbox.send_turn()
    else:
        outbox.put(b"turn")
        outbox.queue([b"part", b"other"], lambda: gone.append("queued"))
        bench.loop.turn()
    assert [error.errno for error in bench.errors] == [errno.EPIPE]
    assert outbox.is_broken
    assert outbox.is_empty()
    assert bench.loop.writer is None
    outbox.queue([b"late"], lambda: gone.append("late"))
    outbox.put(b"late")
    outbox.send_turn()
    outbox.discard()
    bench.loop.turn()
    assert gone == [*(["queued"] if way != "put" else []), "late"]
    assert len(bench.errors) == 1
    assert bench.room_count == 0


@pytest.mark.parametrize("kind", ["plain", "tls"])
def test_turn_sends_so_many_bytes_of_what_waits_and_the_next_goes_on(kind: str) -> None:
    bench = Bench(kind)
    part = bytes(4096)
    count = 3 * bench.limits.turn_bytes // len(part)
    bench.outbox.queue([part] * count)
    bench.put += part * count
    bench.sink.room = len(bench.put)
    bench.loop.turn()
    assert 0 < len(bench.sink.taken) < bench.limits.turn_bytes + PARTS_MAX * len(part)
    assert bench.left
    bench.settle(len(bench.put))
    assert bench.sink.taken == bench.put


@pytest.mark.parametrize("kind", ["plain", "tls"])
def test_stall_is_counted_from_when_the_socket_last_took_something(kind: str) -> None:
    bench = Bench(kind)
    bench.outbox.put(b"x" * 100)
    bench.put += b"x" * 100
    bench.outbox.send_turn()
    assert bench.outbox.stalled_since_s == 0
    bench.loop.turn()
    assert bench.outbox.stalled_since_s == 0, "nothing has left"
    bench.sink.room = 10
    bench.loop.turn()
    assert bench.outbox.stalled_since_s == 2
    bench.sink.room = 90
    bench.loop.turn()
    assert bench.outbox.stalled_since_s is None
