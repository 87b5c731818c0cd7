"""What leaves one connection's socket, and what does not any more."""

from __future__ import annotations

import asyncio
import socket

from nbdimg.export.registry import Registry
from nbdimg.limits import Limits
from nbdimg.server.outbox import Outbox
from nbdimg.server.shared import Shared


def test_send_that_is_due_behind_the_end_of_its_connection_does_nothing() -> None:
    """Queued out of turn; then a turn filled the socket, and the connection was closed: an internal error."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        errors: list[OSError] = []
        tested = Outbox(ours, Shared(loop, Registry(), Limits()), lambda: None, errors.append)
        tested.put(bytes(1 << 20))
        tested.queue([b"late"])
        tested.send_turn()
        assert tested.stalled_since_s is not None
        tested.discard()
        ours.close()
        tested.send_pending()
        assert not errors
        theirs.close()

    asyncio.run(main())
