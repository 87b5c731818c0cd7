"""Limits that an operator may change, and those that several parts obey, each with its reason.

What one part alone obeys stands at its head, as does how much of a format is accepted. The wire's own constants (string
length, structure sizes) stand in `wire/constants.py`; these are choices.
"""

from __future__ import annotations

from dataclasses import dataclass

from nbdimg.units import KiB, MiB, TiB

RECEIVE_SIZE = 256 * KiB
"""Bytes taken from a socket in one turn; the buffer is shared by all connections of a loop."""

SPILL_SIZE = 64 * KiB
"""Bytes accepted behind a large payload in the same receive; more would be copied a second time. Behind a payload of at
most half RECEIVE_SIZE all of the receive buffer is offered: there the next requests arrive whole, and need no copy."""

ARENA_SIZE = 1 * MiB
"""The buffer in which one turn's replies are laid out before they leave in one send."""

PIECE_SIZE = 256 * KiB
"""A structured READ is answered in pieces of at most this; it fits a core's L2 cache, so the send reads hot bytes."""

OPTION_SIZE_MAX = 64 * KiB
"""Option data that is parsed; the longest legal option (GO with a 4096-byte name) is far below."""

OPTION_DISCARD_MAX = 2 * MiB
"""Option data that is skipped to stay in step; a longer claim ends the connection at once."""

EXTENTS_MAX = 1024
"""Extents of one context in a BLOCK_STATUS reply; a client asks again from where the reply ends."""

STATUS_EXTENTS_MAX = 4096
"""Extents of all contexts in a BLOCK_STATUS reply, 64 KiB: an image may have a thousand bitmaps, and a client has
`requests_in_flight` replies that it need not take. Of four contexts each may have EXTENTS_MAX."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that an operator may change. Times in seconds, sizes in bytes."""

    connections: int = 1024
    """Clients at once; each costs a file descriptor and a few KiB. The next is closed on accept, unless one of them has
    opened no export for a while: then that one."""

    handshake_timeout_s: float = 10.0
    """From accept to the end of the handshake, absolute: a peer that drips bytes gains nothing (CVE-2024-7409)."""

    request_timeout_s: float = 30.0
    """From a request's first byte to the end of its header; a payload must bring `payload_rate` in each such period."""

    stall_timeout_s: float = 60.0
    """With replies waiting, the longest time in which a client may take no byte."""

    drain_timeout_s: float = 5.0
    """After SIGTERM, how long requests in flight may take before their connections are cut."""

    payload_rate: int = 64 * KiB
    """Bytes a second that a WRITE payload must keep up once `request_timeout_s` has passed."""

    options: int = 1024
    """Options in one handshake; real clients send fewer than 20."""

    option_bytes: int = 4 * MiB
    """Option data in one handshake, parsed or skipped."""

    requests_in_flight: int = 128
    """Requests of one connection that wait for storage; further ones stay in the socket."""

    payload_size: int = 64 * MiB
    """The largest READ or WRITE: twice what QEMU accepts, and enough for the largest recorded traces (48 MiB)."""

    connection_bytes: int = 32 * MiB
    """Payload bytes in flight for one connection; a single larger request is admitted alone."""

    total_bytes: int = 256 * MiB
    """Payload bytes in flight for all connections; a quarter of it is for payloads of up to 256 KiB alone."""

    output_bytes: int = 1 * MiB
    """Replies waiting for one client's socket; above this no further request of that client is looked at."""

    turn_requests: int = 256
    """Requests of one connection in one turn of the loop."""

    overlays: int = 1024
    """Overlays of one export: those that are open or, where they are kept, their files. As many as `connections`."""

    overlay_size: int = 1 * TiB
    """What the file of one overlay may take; a write that would need more gets ENOSPC. Mere data never takes much more
    than the image has, so this is for those who allow less."""

    turn_bytes: int = 1 * MiB
    """Reply bytes of one connection in one turn: about half a millisecond, which is what a neighbour waits."""
