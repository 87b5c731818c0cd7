"""One connection's transmission phase: requests in, replies out.

A turn: receive once, handle every complete request, send once; what it has no time for, another turn handles (see
rounds.py). What cannot be done at once leaves the turn in one of three shapes, and comes back as queued parts:

    task      a request that waits: for storage, for an older overlapping one, for a flush
    stream    a large structured READ, sent piece by piece as the socket takes it; it holds no buffer in between
    held      a request for which there is no buffer now: nothing behind it is looked at

    (T1) Not more than `requests_in_flight` tasks and streams; beyond that, and with `output_bytes` waiting for the
         socket, the connection is *paused*: it neither parses nor receives.
    (T2) A READ's error precedes its data, or follows it in a chunk of its own.
    (T3) Pieces of a stream end where sectors do: no sector is read at two moments.
    (T4) After DISC, the end of input or the beginning of a drain everything in flight is answered, then the connection
         closes. At a drain, that includes requests which had arrived while it was paused.
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Protocol

from nbdimg.errors import GuardedWrite, NbdimgError, ProtocolError, RequestError
from nbdimg.export.export import SECTOR_SIZE, Export, Status, Work
from nbdimg.export.lane import MAPPED_FROM, Lane
from nbdimg.export.meter import Tally
from nbdimg.export.validate import Rules
from nbdimg.image.image import Segment
from nbdimg.limits import PIECE_SIZE, SPILL_SIZE
from nbdimg.server.outbox import Outbox, Part
from nbdimg.server.rounds import CROWDED_REQUESTS, RENEWED_BELOW_S
from nbdimg.server.shared import Shared
from nbdimg.units import KiB
from nbdimg.wire.constants import Command, CommandFlag, NbdError
from nbdimg.wire.errors import describe
from nbdimg.wire.handshake import Session
from nbdimg.wire.messages import ExtendedReplies, Replies, Request, SimpleReplies, StructuredReplies
from nbdimg.wire.transmission import Receiver

logger = logging.getLogger("nbdimg")

_READ = int(Command.READ)
_DISC = int(Command.DISC)
_DF = int(CommandFlag.DF)

MAPPED_PIECE_SIZE = 512 * KiB
"""A piece of a stream that is not copied need not fit a processor's cache."""

_ZEROES = memoryview(bytes(PIECE_SIZE))


def replies_for(session: Session) -> Replies:
    """The dialect that a session has negotiated."""
    if session.is_extended:
        return ExtendedReplies()
    return StructuredReplies() if session.is_structured else SimpleReplies()


def _zeroes(length: int) -> list[Part]:
    """Zero bytes to send, without making them."""
    return [_ZEROES[: min(PIECE_SIZE, length - at)] for at in range(0, length, PIECE_SIZE)]


class Stream:
    """A large READ under way: `position` is the next byte to send."""

    __slots__ = ("position", "request", "stop")

    def __init__(self, request: Request, position: int) -> None:
        self.request = request
        self.position = position
        self.stop = request.offset + request.length


class Shell(Protocol):
    """What the transmission phase needs of its connection."""

    outbox: Outbox

    def pause(self) -> None: ...

    def unpause(self) -> None: ...

    def finish_input(self) -> None: ...

    def close_if_done(self) -> None: ...

    def protocol_error(self, error: ProtocolError) -> None: ...


class Transmission:
    """Args: shell: the connection. session, export: what was negotiated. leftover: bytes behind the handshake."""

    def __init__(self, shell: Shell, shared: Shared, session: Session, export: Export, leftover: bytes) -> None:
        self._shell = shell
        self._shared = shared
        self._limits = shared.limits
        self._outbox = shell.outbox
        self._export = export
        self._contexts = session.contexts
        self._rules = Rules(session)
        self._replies = replies_for(session)
        self._header_size = self._replies.data_header_size
        self._receiver = Receiver(
            shared.scratch,
            SPILL_SIZE,
            session.export.payload_max,
            self._take,
            is_extended=session.is_extended,
        )
        if leftover:
            self._receiver.feed(leftover)
        self.tally = Tally(export.meter, self._receiver.header_size, self._replies)
        self._lane = Lane(
            session, export, self._replies, self.tally, shared.arena, shared.arena_view, self._outbox.mapped
        )
        self._streams: deque[Stream] = deque()
        self._held: Request | None = None
        self._taken_bytes = 0
        self.is_paused = False
        """Nothing is received and parsed until something in flight is done (T1)."""
        self._is_wake_scheduled = False
        self._is_pump_scheduled = False
        self._has_finished_input = False
        self.handled_count = 0
        """Requests that have arrived complete."""
        self.in_flight = 0
        self.is_draining = False
        """Nothing more is received."""

    def has_work(self) -> bool:
        """Whether requests are in flight, or may wait to be handled."""
        return bool(self.in_flight) or (self.is_paused and not self._has_finished_input)

    @property
    def has_finished_input(self) -> bool:
        """Whether the client has said DISC."""
        return self._has_finished_input

    def begin_drain(self, *, takes_payload: bool) -> None:
        """Nothing more is received, but for the rest of a payload under way if `takes_payload`."""
        self.is_draining = True
        self._receiver.is_last_payload = takes_payload

    def wants_payload(self) -> bool:
        """Whether the rest of a payload is received although everything else drains."""
        return self._receiver.is_last_payload and self._receiver.is_mid_payload

    @property
    def unhandled(self) -> bytes:
        """Behind the last request, once nothing is in flight."""
        return self._receiver.carried

    def is_mid_request(self) -> bool:
        """Whether the client owes the rest of a request."""
        return not self.is_paused and self._receiver.is_mid_request()

    def buffers(self) -> list[memoryview]:
        """Where the next bytes belong."""
        return self._receiver.buffers()

    def received(self, count: int) -> None:
        """Bytes arrived in what `buffers` returned: handle them.

        Raises: ProtocolError: the connection must end.
        """
        self._receiver.received(count)
        self.tally.arrived_s = since_s = self._shared.spinner.touched_s
        self._process(since_s)

    def park(self) -> None:
        """Nothing came: what `buffers` had laid out is kept for later."""
        self._receiver.park()

    def resume(self) -> None:
        """Handle the bytes that came behind the handshake. Raises: ProtocolError."""
        self._receiver.resume()
        self._process(perf_counter())

    def _is_full(self) -> bool:
        return (
            self.in_flight >= self._limits.requests_in_flight
            or self._outbox.pending_bytes >= self._limits.output_bytes
            or self._held is not None
        )

    def _process(self, since_s: float) -> None:
        """Handle what has arrived, as far as the turn goes that began at `since_s`, and send."""
        handled = 0
        is_cut = was_full = False
        rounds = self._shared.rounds
        try:
            handled, is_cut = self._handle_all(since_s + rounds.left_s)
            was_full = self._is_full()
        finally:
            self._receiver.park()
            self._outbox.send_turn()
            if self._outbox.is_broken:
                self.on_broken()
            rounds.left_s -= perf_counter() - since_s
            if rounds.left_s < RENEWED_BELOW_S:
                rounds.renew()
        self.handled_count += handled
        self._shared.spinner.handled_count += handled
        if self._streams:
            self._schedule_pump()
        # Under TLS a send may take along what has waited: full in front of it is not full behind it.
        has_more = is_cut or (was_full and not self._is_full())
        if has_more or self._receiver.starved or self._is_full():
            self._pause()
        if has_more:
            self._wake()
        if self._has_finished_input or self.is_draining:
            self._shell.close_if_done()

    def _handle_all(self, until_s: float) -> tuple[int, bool]:
        """Handle complete requests; returns how many, and whether the turn's end has come before theirs."""
        receiver, outbox = self._receiver, self._outbox
        turn_requests = self._limits.turn_requests
        run_requests = CROWDED_REQUESTS if self._shared.rounds.is_crowded else turn_requests
        handled = 0
        while True:
            run_max = turn_requests - handled
            if run_max > run_requests:
                run_max = run_requests
            run = self._lane.run(receiver, outbox.fill, run_max, may_map=outbox.may_map)
            outbox.fill = run.fill
            handled += run.answered
            if run.failure is not None:
                self._refuse_failed(*run.failure)
                handled += 1
            elif run.is_burst:
                outbox.send_turn()
            elif run.answered < run_max:
                request = receiver.next_request()
                if request is None:
                    return handled, False
                handled += 1
                self._handle(request, run.is_cold)
                if self._has_finished_input or self._is_full():
                    return handled, False
            if handled >= turn_requests or perf_counter() >= until_s:
                return handled, True

    def _handle(self, request: Request, is_cold: bool) -> None:
        if request.command == _DISC:
            self._release(request)
            self._finish_input()
            return
        request.arrived_s = self.tally.arrived_s
        refusal = self._rules.check(request, self._export.info.size)
        if refusal is not None:
            self._refuse(request, refusal)
        elif request.command == _READ:
            self._read(request, is_cold)
        else:
            self._submit(request)

    def _finish_input(self) -> None:
        self._has_finished_input = True
        self._shell.finish_input()

    def _pause(self) -> None:
        if not self.is_paused:
            self.is_paused = True
            self._shell.pause()
        if self._receiver.starved or self._held is not None:
            self._shared.when_room(self._wake)

    def _wake(self) -> None:
        """Something that a paused connection may have waited for has happened."""
        if self.is_paused and not self._is_wake_scheduled:
            self._is_wake_scheduled = True
            self._shared.rounds.line_up(self._continue)

    def _continue(self) -> None:
        self._is_wake_scheduled = False
        if self._outbox.is_broken or self._has_finished_input:
            return
        held, self._held = self._held, None
        if held is not None:
            self._read_whole(held)
        if self._is_full():
            if self._held is None:
                self._shared.leave_line(self)
            self._pause()
            return
        self.is_paused = False
        self._shell.unpause()
        try:
            self.resume()
        except ProtocolError as error:
            self._shell.protocol_error(error)

    def _submit(self, request: Request) -> None:
        if self._outbox.mapped:
            self._outbox.send_turn()
        try:
            work = self._export.submit(request, self._contexts)
        except (OSError, NbdimgError) as error:
            self._refuse(request, error)
            return
        if work is None:
            self._outbox.put(self._replies.done(request))
            self._release(request)
            self.tally.answered(request)
            return
        self.in_flight += 1
        self._shared.start(self._finish(request, work), self._export)

    def _refuse(self, request: Request, error: OSError | NbdimgError) -> None:
        self._outbox.put(self._error(request, error))
        self._release(request)

    def _refuse_failed(self, request: Request, error: OSError | NbdimgError) -> None:
        """A file call failed in the lane."""
        request.arrived_s = self.tally.arrived_s
        if request.command == _READ:
            self._outbox.put(self._read_error(request, error, request.offset))
        else:
            self._refuse(request, error)

    async def _finish(self, request: Request, work: Work[Status | None]) -> None:
        """Answer a request that had to wait."""
        parts: list[Part]
        try:
            status = await work
            parts = [self._replies.done(request)] if status is None else self._status_parts(request, status)
            self.tally.answered(request)
        except (OSError, NbdimgError) as error:
            parts = [self._error(request, error)]
        except Exception as error:
            parts = [self._error(request, self._bug(request, error))]
        self._release(request)
        self._outbox.queue(parts)
        self._completed()

    def _bug(self, request: Request, error: Exception) -> RequestError:
        """An exception that is none of ours must not end the server; it is told to the operator."""
        self._shared.log.say(logging.ERROR, f"{request!r} failed: {type(error).__name__}: {error}")
        logger.debug("the failure's traceback", exc_info=error)
        return RequestError(errno.EIO, "internal error")

    def _describe(self, request: Request, error: OSError | NbdimgError) -> tuple[NbdError, str, int | None]:
        """What the client is told; the operator too, who can do something about all but what the client got wrong. Of
        a client that is gone nothing is said: its overlay may be closed already, and nobody waits for an answer.
        """
        told = describe(error)
        is_clients_fault = isinstance(error, RequestError) and not isinstance(error, GuardedWrite)
        if not (is_clients_fault or self._outbox.is_broken):
            where = f" of {request.length} bytes at {request.offset}" if request.length else ""
            self._shared.request_failed(self._export, f"{Command(request.command).name}{where} failed: {told[1]}")
        return told

    def _error(self, request: Request, error: OSError | NbdimgError) -> bytes:
        """The reply to a request that failed."""
        number, text, offset = self._describe(request, error)
        self.tally.answered(request, number)
        return self._replies.error(request, number, text, offset)

    def _status_parts(self, request: Request, status: Status) -> list[Part]:
        last = status[-1][0]
        return [
            self._replies.block_status(request, context_id, pairs, context_id == last) for context_id, pairs in status
        ]

    def _completed(self) -> None:
        """One request in flight has been answered."""
        self.in_flight -= 1
        self._wake()
        self._shell.close_if_done()

    # Buffers

    def _take(self, length: int) -> memoryview | None:
        """A buffer within this connection's share and everybody's, or None for now."""
        if self._taken_bytes and self._taken_bytes + length > self._limits.connection_bytes:
            self._shared.leave_line(self)
            return None
        view = self._shared.take(length, self)
        if view is not None:
            self._taken_bytes += length
        return view

    def _give(self, view: memoryview) -> None:
        self._taken_bytes -= len(view)
        self._shared.give(view)

    def _giver(self, view: memoryview) -> Callable[[], None]:
        return lambda: self._give(view)

    def _release(self, request: Request) -> None:
        """The request's payload is not needed any more."""
        payload, request.payload = request.payload, None
        if payload is not None and request.owns_payload and not isinstance(payload.obj, bytes):
            self._give(payload)

    # READ

    def _read(self, request: Request, is_cold: bool) -> None:
        length = request.length
        outbox = self._outbox
        is_streamed = self._replies.is_chunked and not request.flags & _DF
        if length > PIECE_SIZE:
            self.in_flight += 1
            if is_streamed:
                self._streams.append(Stream(request, request.offset))
            else:
                self._read_whole(request)
            return
        if not length:
            outbox.put(self._replies.done(request))
            self.tally.answered(request)
            return
        header_size = self._header_size
        at = outbox.room(header_size + length)
        start = at + header_size
        end = start + length
        offset = request.offset
        try:
            count = 0 if is_cold else self._export.try_read(offset, offset + length, self._shared.arena_view[start:end])
        except (OSError, NbdimgError) as error:
            self._outbox.put(self._read_error(request, error, offset))
            return
        if count == length:
            self._replies.put_data(self._shared.arena, at, request, offset, length, True)
            outbox.fill = end
            self.tally.answered(request)
            return
        self.in_flight += 1
        if not is_streamed:
            self._read_whole(request)
        elif count:
            self._streams.append(Stream(request, offset))
        else:
            self._advance_slowly(Stream(request, offset), length)

    def _read_whole(self, request: Request) -> None:
        """A READ in flight whose data must be complete before the first byte is sent: simple replies, and DF."""
        view = self._take(request.length)
        if view is None:
            self._held = request
            return
        self._shared.start(self._finish_whole(request, view, self._export.read(request.offset, view)), self._export)

    async def _finish_whole(self, request: Request, view: memoryview, work: Work[list[Segment]]) -> None:
        segments = await self._segments(request, work, request.offset)
        if segments is None:
            self._give(view)
        else:
            header = bytearray(self._header_size)
            self._replies.put_data(header, 0, request, request.offset, request.length, True)
            parts: list[Part] = [bytes(header)]
            for segment in segments:
                start = segment.offset - request.offset
                parts.extend(_zeroes(segment.length) if segment.is_hole else [view[start : start + segment.length]])
            self._outbox.queue(parts, self._giver(view))
            self.tally.answered(request)
        self._completed()

    async def _segments(self, request: Request, work: Work[list[Segment]], offset: int) -> list[Segment] | None:
        """What a slow read found; None: its error has been queued."""
        failure: OSError | NbdimgError
        try:
            return await work
        except (OSError, NbdimgError) as error:
            failure = error
        except Exception as error:
            failure = self._bug(request, error)
        self._outbox.queue([self._read_error(request, failure, offset)])
        return None

    def _read_error(self, request: Request, error: OSError | NbdimgError, offset: int) -> bytes:
        """A READ that failed at guest `offset`, or where the error itself says."""
        number, text, where = self._describe(request, error)
        self.tally.answered(request, number)
        return self._replies.error(request, number, text, offset if where is None else where)

    def _schedule_pump(self) -> None:
        if not self._is_pump_scheduled:
            self._is_pump_scheduled = True
            self._shared.rounds.line_up(self._pump)

    def _pump(self) -> None:
        """Send pieces of streams, oldest first, until the socket is full or the turn is over."""
        self._is_pump_scheduled = False
        if self._outbox.is_broken:
            self._streams.clear()
            return
        left = self._limits.turn_bytes
        until_s = perf_counter() + self._shared.rounds.left_s
        streams = self._streams
        try:
            while streams and not self._outbox.pending_bytes:
                left -= self._advance(streams.popleft())
                if left <= 0 or perf_counter() >= until_s:
                    break
        finally:
            self._outbox.send_turn()
        if streams and not self._outbox.pending_bytes and not self._outbox.is_broken:
            self._schedule_pump()
        self._shell.close_if_done()

    def _advance(self, stream: Stream) -> int:
        """Send a stream's next piece; it goes back to the front unless it is done or waits. Returns bytes sent."""
        request, position = stream.request, stream.position
        remaining = stream.stop - position
        outbox = self._outbox
        try:
            if outbox.may_map:
                sent = self._advance_mapped(stream, min(remaining, MAPPED_PIECE_SIZE - position % SECTOR_SIZE))
                if sent:
                    return sent
            want = min(remaining, PIECE_SIZE - position % SECTOR_SIZE)
            at = outbox.room(self._header_size + want)
            start = at + self._header_size
            count = self._export.try_read(position, stream.stop, self._shared.arena_view[start : start + want])
        except (OSError, NbdimgError) as error:
            outbox.put(self._read_error(request, error, position))
            self._completed()
            return 0
        is_last = abs(count) == remaining
        if count == 0 or (not is_last and (position + abs(count)) % SECTOR_SIZE):
            self._advance_slowly(stream, want)
            return 0
        if count > 0:
            self._replies.put_data(self._shared.arena, at, request, position, count, is_last)
            outbox.fill = start + count
        else:
            outbox.put(self._replies.hole(request, position, -count, is_last))
        if count >= PIECE_SIZE:
            outbox.send_turn()
        self._advanced(stream, abs(count))
        return max(count, 0)

    def _advance_mapped(self, stream: Stream, want: int) -> int:
        """Send a stream's next piece from where it lies in memory. Returns bytes sent, or 0: it has to be read.

        Raises: OSError: where it lies cannot be found out.
        """
        request, position = stream.request, stream.position
        resident = self._export.try_resident(position, position + want)
        if resident is None:
            return 0
        count = len(resident.view)
        is_last = position + count == stream.stop
        if count < MAPPED_FROM or (not is_last and (position + count) % SECTOR_SIZE):
            return 0
        outbox = self._outbox
        at = outbox.room(self._header_size + count)
        self._replies.put_data(self._shared.arena, at, request, position, count, is_last)
        outbox.mapped.append((at + self._header_size, resident))
        outbox.fill = at + self._header_size + count
        outbox.send_turn()
        self._advanced(stream, count)
        return count

    def _advanced(self, stream: Stream, count: int) -> None:
        """`count` bytes more of a stream have been answered."""
        stream.position += count
        if stream.position == stream.stop:
            self.tally.answered(stream.request)
            self._completed()
        else:
            self._streams.appendleft(stream)

    def _advance_slowly(self, stream: Stream, want: int) -> None:
        view = self._take(want)
        if view is None:
            self._shared.when_room(self._room_for_stream(stream))
            return
        self._shared.start(self._finish_piece(stream, view, self._export.read(stream.position, view)), self._export)

    def _room_for_stream(self, stream: Stream) -> Callable[[], None]:
        def retry() -> None:
            self._streams.appendleft(stream)
            self._schedule_pump()

        return retry

    async def _finish_piece(self, stream: Stream, view: memoryview, work: Work[list[Segment]]) -> None:
        request, start = stream.request, stream.position
        segments = await self._segments(request, work, start)
        if segments is None:
            self._give(view)
            self._completed()
            return
        parts: list[Part] = []
        for segment in segments:
            is_last = segment.offset + segment.length == stream.stop
            if segment.is_hole:
                parts.append(self._replies.hole(request, segment.offset, segment.length, is_last))
                continue
            header = bytearray(self._header_size)
            self._replies.put_data(header, 0, request, segment.offset, segment.length, is_last)
            parts.append(bytes(header))
            parts.append(view[segment.offset - start : segment.offset - start + segment.length])
        self._outbox.queue(parts, self._giver(view))
        stream.position += len(view)
        if stream.position == stream.stop:
            self.tally.answered(request)
            self._completed()
        else:
            self._streams.appendleft(stream)
            self._schedule_pump()

    def on_room(self) -> None:
        """Everything that waited for the socket has left."""
        self._wake()
        if self._streams:
            self._schedule_pump()

    def on_broken(self) -> None:
        """The socket is gone: streams end; tasks run to their end and are not answered. Requests of the same turn may
        be handled still, and this follows once more.
        """
        self._streams.clear()
        self._shared.leave_line(self)
        payload = self._receiver.abandon()
        if payload is not None:
            self._give(payload)
