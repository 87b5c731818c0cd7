"""What the clients of an export have asked, as plain numbers: added up on the request path, read by whoever shows them.

The loop's thread alone adds and reads, so there is no lock. Numbers only grow, but for `connection_count`. A request
takes from the receive that brought its last byte until its reply is laid out for the socket.

    Meter     one for an export         what all sessions have asked
    Tally     one for a session         adds to its export's meter; what its client has read and written
"""

from __future__ import annotations

from bisect import bisect_left
from time import perf_counter

from nbdimg.histogram import BOUNDS_S, SUM, Histogram
from nbdimg.wire.constants import Command, NbdError
from nbdimg.wire.messages import Replies, Request

_READ = int(Command.READ)
_WRITE = int(Command.WRITE)
_FLUSH = int(Command.FLUSH)
_SHORTEST_S = BOUNDS_S[0]

BYTES = SUM + 1
"""The cell of a CommandMeter that adds up lengths."""


class CommandMeter(Histogram):
    """How long one command's requests took, `bytes` of those that succeeded, and errors by number.

    Everything that the fast lane adds to is in one list: what a request touches costs more than what it computes.
    """

    __slots__ = ("errors",)

    def __init__(self) -> None:
        super().__init__()
        self.cells.append(0)
        self.errors: dict[NbdError, int] = {}

    @property
    def bytes(self) -> int:
        return int(self.cells[BYTES])


class Meter:
    """`commands` by the wire's number; `unknown` for those that the protocol does not have. `waits`: what requests
    waited for older overlapping ones.
    """

    __slots__ = ("__weakref__", "attach_count", "commands", "connection_count", "unknown", "waits")

    def __init__(self) -> None:
        answered = (each for each in Command if each not in (Command.DISC, Command.RESIZE))
        self.commands = {int(each): CommandMeter() for each in answered}
        self.unknown = CommandMeter()
        self.waits = Histogram()
        self.attach_count = 0
        self.connection_count = 0
        """Clients that are attached now."""


class Tally:
    """Args: header_size: of a request on the wire."""

    __slots__ = (
        "_commands",
        "_data_header_size",
        "_done_size",
        "_header_size",
        "_reads",
        "_unknown",
        "_writes",
        "arrived_s",
        "read_bytes",
        "written_bytes",
    )

    def __init__(self, meter: Meter, header_size: int, replies: Replies) -> None:
        self._commands = meter.commands
        self._unknown = meter.unknown
        self._reads = meter.commands[_READ].cells
        self._writes = meter.commands[_WRITE].cells
        self._header_size = header_size
        self._data_header_size = replies.data_header_size
        self._done_size = replies.done_size
        self.arrived_s = perf_counter()
        """When the last bytes came: what is complete then begins to wait."""
        self.read_bytes = 0
        self.written_bytes = 0

    def ran(self, count: int, write_count: int, request_bytes: int, reply_bytes: int) -> None:
        """The fast lane has answered `count` READs and WRITEs, `write_count` of them WRITEs. `request_bytes` and
        `reply_bytes` are what it took and laid out, headers included: from them follows what the requests were about,
        and the lane itself counts nothing for each.
        """
        seconds = perf_counter() - self.arrived_s
        bucket = bisect_left(BOUNDS_S, seconds) if seconds > _SHORTEST_S else 0
        read_count = count - write_count
        if read_count:
            length = reply_bytes - read_count * self._data_header_size - write_count * self._done_size
            self.read_bytes += length
            cells = self._reads
            cells[bucket] += read_count
            cells[SUM] += seconds * read_count
            cells[BYTES] += length
        if write_count:
            length = request_bytes - count * self._header_size
            self.written_bytes += length
            cells = self._writes
            cells[bucket] += write_count
            cells[SUM] += seconds * write_count
            cells[BYTES] += length

    def answered(self, request: Request, error: NbdError | None = None) -> None:
        """Any other request has its reply."""
        command = request.command
        meter = self._commands.get(command, self._unknown)
        meter.add(perf_counter() - request.arrived_s)
        if error is not None:
            meter.errors[error] = meter.errors.get(error, 0) + 1
            return
        if command != _FLUSH:  # its length means nothing
            meter.cells[BYTES] += request.length
        if command == _READ:
            self.read_bytes += request.length
        elif command == _WRITE:
            self.written_bytes += request.length
