"""What the connections of one loop share: buffers, limits, tasks."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any
from weakref import WeakKeyDictionary

from nbdimg.errors import escaped
from nbdimg.export.export import Export
from nbdimg.export.meter import Meter
from nbdimg.export.registry import Registry
from nbdimg.limits import ARENA_SIZE, PIECE_SIZE, RECEIVE_SIZE, Limits
from nbdimg.server.audit import Audit
from nbdimg.server.buffers import BufferPool
from nbdimg.server.handover import Estate
from nbdimg.server.log import LimitedLog
from nbdimg.server.reception import Reception
from nbdimg.server.rounds import Rounds
from nbdimg.server.spin import Spinner
from nbdimg.server.tls import Tls

FAILURE_LINES_MAX = 3
FAILURE_PERIOD_S = 60.0
"""How many failed requests of one export are logged in what time: clients ask again for as long as a disk is full."""

WAKES_PER_TURN = 8
"""To try costs up to 50 µs, in vain for most where a thousand clients wait for one buffer."""


class Shared:
    """One per loop. `scratch` and `arena` belong to whoever has the turn, and to nobody between turns."""

    def __init__(self, loop: asyncio.AbstractEventLoop, registry: Registry, limits: Limits) -> None:
        self.loop = loop
        self.registry = registry
        self.limits = limits
        self.tls: Tls | None = None
        self.log = LimitedLog()
        self._failure_logs: WeakKeyDictionary[Meter, LimitedLog] = WeakKeyDictionary()
        """By what all overlays of one image share, or each client that comes would have lines of its own."""
        self.audit = Audit()
        self.estate = Estate()
        self.spinner = Spinner(loop)
        self.reception = Reception(loop)
        self.rounds = Rounds(loop)
        self.scratch = memoryview(bytearray(RECEIVE_SIZE))
        self.arena = bytearray(ARENA_SIZE)
        self.arena_view = memoryview(self.arena)
        self.pool = BufferPool(limits.total_bytes)
        self.tasks: dict[asyncio.Task[None], Export] = {}
        self._hungry: deque[Callable[[], None]] = deque()
        self._wake_count = 0
        """How many of them, from the front, are still to have their try."""

    def start(self, work: Coroutine[Any, Any, None], export: Export) -> None:
        """Run to the end, whatever becomes of the connection. `export`: what it works with."""
        task = self.loop.create_task(work)
        self.tasks[task] = export
        task.add_done_callback(self.tasks.pop)

    def request_failed(self, export: Export, what: str) -> None:
        """Tell the operator of a request that failed for what only the server's side can mend."""
        log = self._failure_logs.get(export.meter)
        if log is None:
            log = self._failure_logs[export.meter] = LimitedLog(lines_max=FAILURE_LINES_MAX, period_s=FAILURE_PERIOD_S)
        log.say(logging.ERROR, f"export {escaped(export.name)}: {what}")

    def tell_rest(self) -> None:
        """Have the log say of how many there was no line. The server ends."""
        for log in (self.log, *self._failure_logs.values()):
            log.tell_rest()
        self.audit.tell_rest()

    def take(self, length: int, asker: object) -> memoryview | None:
        """As `BufferPool.take`; `give` and `leave_line` are its counterparts here."""
        view = self.pool.take(length, asker)
        if view is not None and length > PIECE_SIZE:
            self._wake_hungry()
        return view

    def leave_line(self, asker: object) -> None:
        """Wait no longer for a long buffer."""
        if self.pool.leave(asker):
            self._wake_hungry()

    def when_room(self, callback: Callable[[], None]) -> None:
        """Call once when there may be room for buffers."""
        self._hungry.append(callback)

    def give(self, view: memoryview) -> None:
        self.pool.give(view)
        self._wake_hungry()

    def _wake_hungry(self) -> None:
        """Each that is hungry now has a try, WAKES_PER_TURN of them in a turn of the loop."""
        if not self._wake_count and self._hungry:
            self.loop.call_soon(self._wake_some)
        self._wake_count = len(self._hungry)

    def _wake_some(self) -> None:
        count = min(self._wake_count, WAKES_PER_TURN)
        self._wake_count -= count
        for _ in range(count):
            self._hungry.popleft()()
        if self._wake_count:
            self.loop.call_soon(self._wake_some)
