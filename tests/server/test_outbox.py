"""What waits to be sent, and a socket that is closed meanwhile."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from nbdimg.export.registry import Registry
from nbdimg.limits import Limits
from nbdimg.server.outbox import Outbox
from nbdimg.server.shared import Shared


def test_outbox_closed_between_what_was_queued_and_its_turn_does_nothing_more() -> None:
    """A worker's reply is queued, a turn's reply waits behind it, and the client leaves before the loop comes by."""
    seen: list[dict[str, Any]] = []
    has_room: list[bool] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: seen.append(context))
        near, far = socket.socketpair()
        with near, far:
            near.setblocking(False)
            outbox = Outbox(near, Shared(loop, Registry(), Limits()), lambda: has_room.append(True), lambda error: None)
            outbox.queue([b"queued"])
            outbox.put(b"of a turn")
            outbox.send_turn()
            outbox.discard()
            near.close()
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    asyncio.run(main())
    assert seen == []
    assert has_room == []
