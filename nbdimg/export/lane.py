"""The fast lane: runs of plain READs and WRITEs, from the receive buffer to the file and into the reply buffer.

Most requests of most clients carry no flag, lie within the export, overlap nothing that is in flight, and concern bytes
that are in memory and mapped to one place, or that get a place without waiting. For those the general path (Request,
Rules, Export, Image, Replies) decides nothing; here it is left out, and what remains is one loop without an object per
request. The lane cuts through the layers on purpose and in this one module.

    (L1) What the lane answers, the general path would have answered with the same bytes.
    (L2) At the first request that is not plain, or that would wait, the lane stops in front of it and changes nothing.
         Nothing is tried twice: a file call that failed is reported, not repeated, unless it was for several writes
         made one (`merge`): then each is tried alone, and fails for itself.
    (L3) Long data is not read but `mapped` onto its place in the reply buffer, to be sent from the page cache: the lane
         stops in front of a WRITE until that is done.
    (L4) The lane runs within one turn. It takes READs while no change is in flight on the export, WRITEs while nothing
         is. So a mapping that it has looked up stays true until it writes elsewhere than in place, or returns; and a
         slow READ holds up no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from nbdimg.errors import NbdimgError
from nbdimg.export.export import Export
from nbdimg.export.merge import MERGED_MAX, Follower, Merged
from nbdimg.export.meter import Tally
from nbdimg.image.image import Resident
from nbdimg.limits import ARENA_SIZE, PIECE_SIZE
from nbdimg.units import KiB
from nbdimg.wire.constants import Command, CommandFlag, TransmissionFlag
from nbdimg.wire.handshake import Session
from nbdimg.wire.messages import Replies, Request
from nbdimg.wire.transmission import Receiver


class Run(NamedTuple):
    """What one run did: `fill` is where the next reply goes, `answered` how many requests were.

    `is_burst` asks that the replies be sent before the next run. `is_cold` says that the request behind those answered
    is a READ of bytes that are not in memory: trying it again is in vain. `failure` is that request with the error of
    its file call: it has been consumed, and the error is still to be sent.
    """

    fill: int
    answered: int
    is_burst: bool = False
    is_cold: bool = False
    failure: tuple[Request, OSError | NbdimgError] | None = None


MAPPED_FROM = 64 * KiB
"""Bytes of a READ from which on it is sent as it lies in the page cache: to ask whether it is there costs as much as
the copy of a shorter one."""

Mapped = tuple[int, Resident]
"""Where in the reply buffer these bytes belong."""

WRITE_BURST = 8
"""Writes answered before their replies are sent: a client that has them can prepare the next while this one goes on."""

_READ = int(Command.READ)
_WRITE = int(Command.WRITE)


class Lane:
    """One session's fast lane.

    Args:
        arena, arena_view: the reply buffer.
        mapped: what belongs into the reply buffer and is to be sent from where it lies; the lane adds to it.
        replies: the session's dialect.
        tally: is told what each run did.
    """

    def __init__(
        self,
        session: Session,
        export: Export,
        replies: Replies,
        tally: Tally,
        arena: bytearray,
        arena_view: memoryview,
        mapped: list[Mapped],
    ) -> None:
        self._export = export
        self._tally = tally
        self._image = export.image
        self._replies = replies
        self._arena = arena
        self._arena_view = arena_view
        self._mapped = mapped
        self._plain_write = int(CommandFlag.PAYLOAD_LEN) if session.is_extended else 0
        self._length_max = min(PIECE_SIZE, session.export.payload_max)
        self._is_read_only = bool(session.flags & TransmissionFlag.READ_ONLY)
        self._is_open = not (session.obeys_block_size and session.export.block_size_min > 1)

    def run(self, receiver: Receiver, fill: int, count_max: int, *, may_map: bool) -> Run:
        """Answer plain requests at the front of the receive buffer, at most `count_max`.

        `fill` is where in the arena the next reply goes.
        """
        failure = None
        inflight = self._export.inflight
        if not self._is_open or inflight.exclusive_count:
            return Run(fill, 0)
        scratch, position, end = receiver.window()
        position_before, fill_before = position, fill
        header_size, magic_expected, unpack = receiver.header_size, receiver.magic, receiver.unpack
        arena, arena_view, mapped = self._arena, self._arena_view, self._mapped
        put_read, put_done = self._replies.put_read, self._replies.put_done
        data_header_size, done_size = self._replies.data_header_size, self._replies.done_size
        image, size, plain_write, length_max = self._image, self._export.info.size, self._plain_write, self._length_max
        locate, guest_file = image.driver.locate, image.driver.guest_file
        read_file = guest_file
        read_start = read_stop = read_shift = write_start = write_stop = write_shift = 0
        count = write_count = 0
        is_cold, is_burst, may_write, may_merge = False, False, not self._is_read_only and not inflight.count, True
        try:
            while count < count_max and write_count < WRITE_BURST:
                body = position + header_size
                if body > end:
                    break
                magic, flags, command, cookie, offset, length = unpack(scratch, position)
                stop = offset + length
                if magic != magic_expected or not length or stop > size:
                    break
                if command == _READ:
                    reply_end = fill + data_header_size + length
                    if flags or length > length_max or reply_end > ARENA_SIZE:
                        break
                    if may_map and length >= MAPPED_FROM:
                        resident = image.try_resident(offset, stop)
                        if resident is not None and len(resident.view) == length:
                            mapped.append((fill + data_header_size, resident))
                            put_read(arena, fill, cookie, offset, length)
                            fill = reply_end
                            position = body
                            count += 1
                            continue
                    if read_start <= offset and stop <= read_stop:
                        file, at = read_file, offset + read_shift
                    elif (at := locate(offset, stop)) >= 0:
                        file = guest_file
                    else:
                        extent = image.resident(offset, stop)
                        if extent is None or stop > extent.stop:
                            break
                        read_start, read_stop = extent.offset, extent.stop
                        read_shift = extent.file_offset - extent.offset
                        file, at = extent.file, offset + read_shift
                        read_file = file
                    if not file.try_pread(at, arena_view[fill + data_header_size : reply_end]):
                        is_cold = True
                        break
                    put_read(arena, fill, cookie, offset, length)
                    fill = reply_end
                    position = body
                elif command == _WRITE:
                    if mapped:
                        is_burst = True
                        break
                    next_position = body + length
                    if flags & ~plain_write or next_position > end or fill + done_size * MERGED_MAX > ARENA_SIZE:
                        break
                    if not may_write or length > length_max:
                        break
                    data = scratch[body:next_position]
                    followers: Sequence[Follower] = ()
                    is_in_place = write_start <= offset and stop <= write_stop
                    if not is_in_place:
                        extent = image.writable(offset, stop)
                        if extent is not None and stop <= extent.stop:
                            is_in_place = True
                            write_start, write_stop = extent.offset, extent.stop
                            if write_start < image.guarded_size:
                                write_start = image.guarded_size
                            write_shift = extent.file_offset - extent.offset
                            try_pwrite = extent.file.try_pwrite
                    if is_in_place:
                        if not try_pwrite(offset + write_shift, data):
                            break
                    elif may_merge and receiver.offset_at(next_position) == stop:
                        merged = Merged(receiver, body, next_position, stop, size, plain_write, length_max)
                        if not self._try_write(offset, merged):
                            may_merge = False
                            continue
                        followers, next_position = merged.followers, merged.position
                    elif not image.try_write(offset, data):
                        break
                    if not is_in_place:
                        read_stop = 0
                    put_done(arena, fill, cookie, offset)
                    fill += done_size
                    for follower in followers:
                        put_done(arena, fill, follower.cookie, follower.offset)
                        fill += done_size
                    write_count += 1 + len(followers)
                    count += len(followers)
                    position = next_position
                else:
                    break
                count += 1
        except (OSError, NbdimgError) as error:
            failure = Request(command, flags, cookie, offset, length), error
        if count:
            self._tally.ran(count, write_count, position - position_before, fill - fill_before)
        if failure is not None:
            position = body + length if command == _WRITE else body
            write_count += command == _WRITE
        if write_count:
            image.gate.changed()
        receiver.advance(position)
        return Run(fill, count, is_burst or write_count >= WRITE_BURST, is_cold, failure)

    def _try_write(self, offset: int, merged: Merged) -> bool:
        """Whether all of it is written; if not, the receive buffer is as it was."""
        with suppress(OSError, NbdimgError):
            if self._image.try_write(offset, merged.data):
                return True
        merged.undo()
        return False
