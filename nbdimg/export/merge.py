"""Writes of adjacent bytes that lie one behind the other in the receive buffer, made one.

A sequential writer with a queue sends many at a time. Where each would take a new cluster, or a part of one, one write
of all takes one look-up, one run of clusters and one file call. The payloads move together over the headers between
them; `undo` puts everything back, for whoever could not write it all.
"""

from __future__ import annotations

from typing import NamedTuple

from nbdimg.wire.constants import Command
from nbdimg.wire.transmission import Receiver

MERGED_MAX = 256
"""Requests made one."""

_WRITE = int(Command.WRITE)


class Follower(NamedTuple):
    """A write that was made one with those before it; its header was at `at` of the buffer."""

    cookie: int
    offset: int
    length: int
    at: int
    header: bytes


class Merged:
    """Args: start, stop: where in the receive buffer the first write's payload lies. offset: where that write ends in
    the guest. size: of the export. flags, length_max: what a write may have to be one of them.
    """

    __slots__ = ("_header_size", "_scratch", "_stop", "data", "followers", "position")

    def __init__(
        self, receiver: Receiver, start: int, stop: int, offset: int, size: int, flags: int, length_max: int
    ) -> None:
        scratch, _, end = receiver.window()
        header_size, magic_expected, unpack = receiver.header_size, receiver.magic, receiver.unpack
        self._scratch = scratch
        self._header_size = header_size
        self.followers: list[Follower] = []
        position = stop
        while len(self.followers) < MERGED_MAX - 1 and (body := position + header_size) <= end:
            magic, set_flags, command, cookie, follows, length = unpack(scratch, position)
            if magic != magic_expected or command != _WRITE or set_flags & ~flags or follows != offset:
                break
            if not 0 < length <= length_max or body + length > end or offset + length > size:
                break
            self.followers.append(Follower(cookie, offset, length, position, bytes(scratch[position:body])))
            position = body + length
            offset += length
            scratch[stop : stop + length] = scratch[body:position]
            stop += length
        self._stop = stop
        self.data = scratch[start:stop]
        self.position = position
        """Where in the buffer the next request is."""

    def undo(self) -> None:
        """Make the buffer again what it was."""
        scratch, stop = self._scratch, self._stop
        for _, _, length, at, header in reversed(self.followers):
            body = at + self._header_size
            scratch[body : body + length] = scratch[stop - length : stop]
            scratch[at:body] = header
            stop -= length
