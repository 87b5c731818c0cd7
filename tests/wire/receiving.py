"""The owner's side of a `Receiver` for tests: turns over a shared buffer that is overwritten between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nbdimg.wire.messages import Request
from nbdimg.wire.transmission import Receiver

SCRATCH_SIZE = 256
SPILL_SIZE = 64
PAYLOAD_MAX = 1024
POISON = 0xEE


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as its consumer saw it; `is_refused` when it is to be answered EINVAL."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    payload: bytes | None = None
    contexts: tuple[int, ...] | None = None
    is_refused: bool = False


class Owner:
    """Feeds a receiver as a server's loop does.

    Args:
        turn_requests: requests taken in one turn; then the turn ends and is resumed, as with a spent budget.
        grants: whether each `allocate` is granted; refused ones are tried again after `resume`. Then all are granted.
    """

    def __init__(
        self,
        *,
        is_extended: bool = False,
        scratch_size: int = SCRATCH_SIZE,
        spill_size: int = SPILL_SIZE,
        payload_max: int = PAYLOAD_MAX,
        turn_requests: int = 1_000_000,
        grants: Iterable[bool] = (),
    ) -> None:
        self.scratch = bytearray(scratch_size)
        self._turn_requests = turn_requests
        self._grants = iter(grants)
        self.allocated: list[int] = []
        self.refused: list[int] = []
        self.requests: list[Request] = []
        self.seen: list[Seen] = []
        self.receiver = Receiver(
            memoryview(self.scratch), spill_size, payload_max, self._allocate, is_extended=is_extended
        )

    def _allocate(self, length: int) -> memoryview | None:
        if not next(self._grants, True):
            self.refused.append(length)
            return None
        self.allocated.append(length)
        return memoryview(bytearray(b"\xdd" * length))

    def deliver(self, data: bytes) -> None:
        """One receive after another until `data` has been taken."""
        while data:
            taken = 0
            for view in self.receiver.buffers():
                count = min(len(view), len(data) - taken)
                view[:count] = data[taken : taken + count]
                taken += count
            assert taken > 0
            self.receiver.received(taken)
            data = data[taken:]
            self._process()

    def deliver_in(self, pieces: Iterable[bytes]) -> None:
        for piece in pieces:
            self.deliver(piece)

    def continue_turn(self) -> None:
        """A turn without new bytes."""
        self.receiver.resume()
        self._process()

    def _process(self) -> None:
        while not self._take_turn():
            self.receiver.resume()

    def _take_turn(self) -> bool:
        """Returns whether nothing is left to do without new bytes."""
        is_exhausted = False
        try:
            for _ in range(self._turn_requests):
                request = self.receiver.next_request()
                if request is None:
                    is_exhausted = not self.receiver.starved
                    break
                self.requests.append(request)
                self.seen.append(seen(request))
        finally:
            self.park()
        return is_exhausted

    def park(self) -> None:
        """The end of a turn: another connection overwrites the shared buffer (R2)."""
        self.receiver.park()
        self.scratch[:] = bytes([POISON]) * len(self.scratch)


def seen(request: Request) -> Seen:
    payload = None if request.payload is None else bytes(request.payload)
    return Seen(
        request.command,
        request.flags,
        request.cookie,
        request.offset,
        request.length,
        payload,
        request.contexts,
        request.fault is not None,
    )
