"""What goes out on one connection's socket, and never blocks.

In a turn, replies are laid out in the loop's arena and leave in one send; what the socket does not take is copied to
`_pending`. Long pieces of data are not put into the arena but `mapped` onto their place in it, and the send takes them
from where they lie. Out of turn (a worker has finished), parts are queued as they are and leave together, one `sendmsg`
for all that became ready in the same turn of the loop. Bytes leave in the order in which they were put.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from itertools import islice
from time import perf_counter
from typing import Any, Protocol

from nbdimg.export.lane import Mapped
from nbdimg.limits import ARENA_SIZE
from nbdimg.server.shared import Shared
from nbdimg.server.tls import TlsSocket

PARTS_MAX = 256
"""Parts in one sendmsg; the kernel takes 1024."""

Part = bytes | memoryview
Sent = Callable[[], None]


class Sink(Protocol):
    """Where bytes leave: a socket, or TLS over one."""

    def fileno(self) -> int: ...

    def send(self, data: memoryview, /) -> int: ...

    def sendmsg(self, buffers: Any, /) -> int: ...


class Outbox:
    """Args: on_room: called when everything waiting has left. on_error: the socket is broken; called once."""

    __slots__ = (
        "_arena",
        "_arena_view",
        "_is_scheduled",
        "_is_waiting",
        "_on_error",
        "_on_room",
        "_pending",
        "_shared",
        "_sock",
        "fill",
        "is_broken",
        "mapped",
        "pending_bytes",
        "stalled_since_s",
    )

    def __init__(
        self, sock: Sink, shared: Shared, on_room: Callable[[], None], on_error: Callable[[OSError], None]
    ) -> None:
        self._sock = sock
        self._shared = shared
        self._arena = shared.arena
        self._arena_view = shared.arena_view
        self._on_room = on_room
        self._on_error = on_error
        self._pending: deque[tuple[Part, Sent | None]] = deque()
        self._is_waiting = False
        self._is_scheduled = False
        self.fill = 0
        """Bytes laid out in the arena in this turn."""
        self.mapped: list[Mapped] = []
        """What takes the place of bytes in the arena. Before any of it may change, `send_turn` is called."""
        self.pending_bytes = 0
        self.stalled_since_s: float | None = None
        self.is_broken = False

    def is_empty(self) -> bool:
        """Whether all that was put or queued has left."""
        return not self.fill and not self.pending_bytes

    @property
    def may_map(self) -> bool:
        """Whether data may be laid out as `mapped`: it is likely to leave as that."""
        return not self._pending

    def room(self, size: int) -> int:
        """Where in the arena the next `size` bytes go; they count once `fill` is moved past them."""
        if self.fill + size > ARENA_SIZE:
            self.send_turn()
        return self.fill

    def put(self, data: bytes) -> None:
        """Lay out `data` in this turn."""
        at = self.fill
        end = at + len(data)
        if end > ARENA_SIZE:
            self.send_turn()
            at, end = 0, len(data)
        self._arena[at:end] = data
        self.fill = end

    def put_or_queue(self, data: bytes) -> None:
        """Send `data` of any length now."""
        if len(data) <= ARENA_SIZE:
            self.put(data)
            self.send_turn()
        else:
            self.queue([data])

    def send_turn(self) -> None:
        """Send what this turn laid out; the arena is free afterwards."""
        fill, self.fill = self.fill, 0
        if not fill or self.is_broken:
            self.mapped.clear()
            return
        view = self._arena_view[:fill]
        sent = 0
        try:
            if self.mapped:
                sent = self._send_mapped(view)
            elif not self._pending:
                sent = self._sock.send(view)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self._broken(error)
            return
        if sent < fill:
            self._keep(bytes(view[sent:]), None)
            self._wait()

    def _send_mapped(self, view: memoryview) -> int:
        """Send the arena's `view` with what is mapped onto it. Returns how many bytes left; those that did not are all
        in the arena then, read into their places.
        """
        parts: list[memoryview] = []
        at = sent = 0
        for start, resident in self.mapped:
            parts += view[at:start], resident.view
            at = start + len(resident.view)
        parts.append(view[at:])
        if not self._pending:
            started = perf_counter()
            try:
                sent = self._sock.sendmsg(parts)
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise
            took = perf_counter() - started
            for _, resident in self.mapped:
                resident.pages.was_sent(took)
        for start, resident in self.mapped:
            first, stop = max(start, sent), start + len(resident.view)
            if first < stop:
                resident.fetch(first - start, view[first:stop])
        self.mapped.clear()
        return sent

    def queue(self, parts: list[Part], on_sent: Sent | None = None) -> None:
        """Send `parts`, out of turn; `on_sent` is called when they have left or never will."""
        if self.is_broken:
            if on_sent is not None:
                on_sent()
            return
        for part in parts[:-1]:
            self._keep(part, None)
        self._keep(parts[-1], on_sent)
        if not self._is_waiting and not self._is_scheduled:
            self._is_scheduled = True
            self._shared.loop.call_soon(self.send_pending)

    def _keep(self, part: Part, on_sent: Sent | None) -> None:
        self._pending.append((part, on_sent))
        self.pending_bytes += len(part)

    def _wait(self) -> None:
        """Send when there is room, unless what waits is sent soon anyway."""
        if not self._is_waiting and not self._is_scheduled:
            self._is_waiting = True
            self.stalled_since_s = self._shared.loop.time()
            self._shared.loop.add_writer(self._sock.fileno(), self.send_pending)

    def send_pending(self) -> None:
        """Send what waits, until the socket is full or a turn's bytes have left."""
        self._is_scheduled = False
        if self.is_broken:
            return
        left = self._shared.limits.turn_bytes
        while self._pending and left > 0 and not self.is_broken:
            try:
                sent = self._sock.sendmsg([part for part, _ in islice(self._pending, PARTS_MAX)])
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                self._broken(error)
                return
            left -= sent
            self._drop(sent)
            if self._is_waiting:
                self.stalled_since_s = self._shared.loop.time()
        if self._pending:
            self._wait()
            return
        self._all_left()

    def _all_left(self) -> None:
        if self._is_waiting:
            self._is_waiting = False
            self.stalled_since_s = None
            self._shared.loop.remove_writer(self._sock.fileno())
        self._on_room()

    def _drop(self, count: int) -> None:
        """`count` bytes from the front have left."""
        self.pending_bytes -= count
        while self._pending:
            part, on_sent = self._pending[0]
            if count < len(part):
                if count:
                    self._pending[0] = (memoryview(part)[count:], on_sent)
                return
            count -= len(part)
            self._pending.popleft()
            if on_sent is not None:
                on_sent()

    def _broken(self, error: OSError) -> None:
        self.discard()
        self._on_error(error)

    def discard(self) -> None:
        """Nothing more leaves; the socket is about to be closed."""
        if self.is_broken:
            return
        self.is_broken = True
        self.fill = 0
        if self._is_waiting:
            self._shared.loop.remove_writer(self._sock.fileno())
        waiting, self._pending = self._pending, deque()
        self.pending_bytes = 0
        for _, on_sent in waiting:
            if on_sent is not None:
                on_sent()


class TlsOutbox(Outbox):
    """The same under TLS, where bytes that were taken may still wait as ciphertext: they count as pending."""

    __slots__ = ("_backlog_size", "_tls")

    may_map = False
    """OpenSSL would touch it."""

    def __init__(
        self, tls: TlsSocket, shared: Shared, on_room: Callable[[], None], on_error: Callable[[OSError], None]
    ) -> None:
        super().__init__(tls, shared, on_room, on_error)
        self._tls = tls
        self._backlog_size = 0

    def send_turn(self) -> None:
        fill, self.fill = self.fill, 0
        if not fill or self.is_broken:
            return
        view = self._arena_view[:fill]
        taken = 0
        if not self._pending:
            try:
                while taken < fill:
                    taken += self._tls.send(view[taken:])
            except BlockingIOError:
                pass
            except OSError as error:
                self._broken(error)
                return
        if taken < fill:
            self._keep(bytes(view[taken:]), None)
        self._count_backlog()
        if self.pending_bytes:
            self._wait()

    def send_pending(self) -> None:
        self._is_scheduled = False
        if self.is_broken:
            return
        left = self._shared.limits.turn_bytes
        sent_before = self._tls.sent_bytes
        try:
            while self._pending and left > 0 and not self.is_broken:
                taken = self._tls.sendmsg([part for part, _ in islice(self._pending, PARTS_MAX)])
                left -= taken
                self._drop(taken)
            self._tls.flush()
        except BlockingIOError:
            pass
        except OSError as error:
            self._broken(error)
            return
        self._count_backlog()
        if self._is_waiting and self._tls.sent_bytes > sent_before:
            self.stalled_since_s = self._shared.loop.time()
        if self.pending_bytes:
            self._wait()
            return
        self._all_left()

    def _count_backlog(self) -> None:
        size = self._tls.backlog_size
        self.pending_bytes += size - self._backlog_size
        self._backlog_size = size
