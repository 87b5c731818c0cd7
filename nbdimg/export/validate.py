"""Every check of a request, before anything is done for it.

The rules of one session are a table: for each command that the client may send, the flags that it may carry. What is
not in the table is EINVAL, and the connection goes on. The order of checks:

    1. malformed message            EINVAL
    2. change of a read-only export EPERM
    3. unknown command              EINVAL
    4. flag not allowed for it      EINVAL      (FUA is allowed on every command)
    5. length beyond its limit      EINVAL
    6. range beyond the end         ENOSPC for WRITE and WRITE_ZEROES, else EINVAL
    7. alignment, if negotiated     EINVAL

Spec: proto.md "Request types", "Command flags", "Error values", "Block size constraints".
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from functools import cache

from nbdimg.errors import RequestError
from nbdimg.wire.constants import Command, CommandFlag, TransmissionFlag
from nbdimg.wire.handshake import Session
from nbdimg.wire.messages import Request

_READ = int(Command.READ)
_FLUSH = int(Command.FLUSH)
_BLOCK_STATUS = int(Command.BLOCK_STATUS)
_CHANGES = frozenset({int(Command.WRITE), int(Command.TRIM), int(Command.WRITE_ZEROES)})
_GROWS = frozenset({int(Command.WRITE), int(Command.WRITE_ZEROES)})


@cache
def _refused_flags(flags: TransmissionFlag, has_contexts: bool) -> Mapping[int, int]:
    """For each command that a session of these flags may send, those that it must not carry."""
    fua = CommandFlag.FUA if flags & TransmissionFlag.SEND_FUA else CommandFlag(0)
    table = {Command.READ: fua, Command.WRITE: fua}
    if flags & TransmissionFlag.SEND_DF:
        table[Command.READ] |= CommandFlag.DF
    if flags & TransmissionFlag.SEND_FLUSH:
        table[Command.FLUSH] = fua
    if flags & TransmissionFlag.SEND_TRIM:
        table[Command.TRIM] = fua
    if flags & TransmissionFlag.SEND_CACHE:
        table[Command.CACHE] = fua
    if flags & TransmissionFlag.SEND_WRITE_ZEROES:
        table[Command.WRITE_ZEROES] = fua | CommandFlag.NO_HOLE
        if flags & TransmissionFlag.SEND_FAST_ZERO:
            table[Command.WRITE_ZEROES] |= CommandFlag.FAST_ZERO
    if has_contexts:
        table[Command.BLOCK_STATUS] = fua | CommandFlag.REQ_ONE
        if flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD:
            table[Command.BLOCK_STATUS] |= CommandFlag.PAYLOAD_LEN
    return {int(command): ~int(allowed) for command, allowed in table.items()}


def check_end(command: int, offset: int, length: int, size: int) -> RequestError | None:
    """Why a request reaches behind the end of an export of `size` bytes; None: it does not."""
    if offset + length <= size:
        return None
    number = errno.ENOSPC if command in _GROWS else errno.EINVAL
    return RequestError(number, f"bytes {offset} to {offset + length} are beyond the end at {size}")


class Rules:
    """What one session's client may ask."""

    def __init__(self, session: Session) -> None:
        export = session.export
        self._refused = _refused_flags(session.flags, bool(session.contexts))
        self._is_read_only = bool(session.flags & TransmissionFlag.READ_ONLY)
        self._payload_max = export.payload_max
        self._alignment = export.block_size_min if session.obeys_block_size else 1
        self._contexts = session.contexts

    def check(self, request: Request, size: int) -> RequestError | None:
        """Why a request is refused; None: it may be submitted. `size`: the export's now, which may change."""
        if request.fault is not None:
            return RequestError(errno.EINVAL, request.fault)
        command = request.command
        if self._is_read_only and command in _CHANGES:
            return RequestError(errno.EPERM, "the export is read-only")
        refused = self._refused.get(command)
        if refused is None:
            return RequestError(errno.EINVAL, self._unknown(command))
        if request.flags & refused:
            return RequestError(
                errno.EINVAL, f"flags are {request.flags:#x}, allowed for command {command} are {~refused:#x}"
            )
        if command == _FLUSH:
            return None
        length = request.length
        if command == _READ and length > self._payload_max:
            return RequestError(errno.EINVAL, f"read of {length} bytes, allowed {self._payload_max}")
        if request.offset + length > size:
            return check_end(command, request.offset, length, size)
        alignment = self._alignment
        if alignment > 1 and (request.offset % alignment or length % alignment):
            return RequestError(
                errno.EINVAL, f"offset {request.offset} or length {length} is no multiple of {alignment}"
            )
        if command == _BLOCK_STATUS:
            return self._check_block_status(request)
        return None

    def _unknown(self, command: int) -> str:
        if command == _BLOCK_STATUS:
            return "BLOCK_STATUS without a negotiated metadata context"
        return f"command {command} is not known here"

    def _check_block_status(self, request: Request) -> RequestError | None:
        """Zero length is refused; ids must be selected ones, each once."""
        if request.length == 0:
            return RequestError(errno.EINVAL, "BLOCK_STATUS of no bytes")
        ids = request.contexts
        if ids is None:
            if request.flags & CommandFlag.PAYLOAD_LEN:
                return RequestError(errno.EINVAL, "PAYLOAD_LEN without a payload")
            return None
        if not ids or len(set(ids)) != len(ids) or any(context_id not in self._contexts for context_id in ids):
            return RequestError(errno.EINVAL, "the payload names no context, one that was not selected, or one twice")
        return None
