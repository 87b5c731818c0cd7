"""An export: one image under a name, with the queue that orders the requests of all its connections.

    submit(request) ──▶ completes now: None                                  no entry, no task, no wait
                   └──▶ a coroutine, its entry already in the queue          waits for older requests in its way only

The coroutine must be run, and must not be cancelled: a client that goes away does not interrupt a change.
Every 512-byte sector is an atomic register for all clients: ranges that change are rounded out to sectors, a read
that overlaps an unfinished change waits for it, and what completes inside `submit` cannot be seen half done.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Container, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from time import perf_counter
from typing import Any, Protocol, TypeVar

from nbdimg import limits
from nbdimg.errors import ConfigError, ImageError, escaped
from nbdimg.export.inflight import Entry, InFlight
from nbdimg.export.meter import Meter
from nbdimg.export.status import STATUS_FLAGS, Pairs, dirty_pairs, status_pairs
from nbdimg.export.validate import check_end
from nbdimg.image.driver import Extent
from nbdimg.image.image import Image, Resident, Segment
from nbdimg.image.wakes import wakes
from nbdimg.limits import Limits
from nbdimg.units import KiB, align_down, align_up, is_power_of_two
from nbdimg.wire.constants import (
    ALLOCATION_DEPTH,
    BASE_ALLOCATION,
    DIRTY_BITMAP,
    STRING_MAX,
    Command,
    CommandFlag,
    TransmissionFlag,
)
from nbdimg.wire.handshake import ExportInfo
from nbdimg.wire.messages import Request

T = TypeVar("T")
Work = Coroutine[Any, Any, T]
Status = list[tuple[int, Pairs]]
"""For each context id, its extents."""

SECTOR_SIZE = 512
BLOCK_SIZE_MIN_MAX = 64 * KiB
"""The largest smallest block that an export may ask of its clients. Spec: proto.md "Block size constraints"."""
PREFERRED_SIZE = 4096
RANGE_MAX = 1 << 64
"""Behind every byte that a request can name."""
BITMAP_CONTEXTS_MAX = 1024
"""Dirty bitmaps of one image that clients may ask for: with the longest names, a list of them takes 1 MiB."""

_WRITE = int(Command.WRITE)
_FUA = int(CommandFlag.FUA)

_READ_FLAGS = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.CAN_MULTI_CONN
    | TransmissionFlag.SEND_CACHE
)
_WRITE_FLAGS = TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO


class Overlays(Protocol):
    """What gives clients exports of their own, in place of the one that they ask for and that all of these lie over."""

    is_kept: bool
    """Whether each has a name, by which it is found again and shared; else each is for one connection alone."""
    size: int
    """Bytes of a new one."""

    @property
    def lent(self) -> Collection[Export]:
        """Those that are open."""
        ...

    async def attach(self, name: str | None, limits: Limits, *, may_make: bool) -> Export:
        """The overlay `name` (None: a new one without), until `detach`. Without `may_make` it must be there.

        Raises: OptionError: for the client to read. ImageError, OSError: for the operator.
        """
        ...

    async def detach(self, export: Export) -> bool:
        """One client fewer has it; what that one has begun is waited for. Returns whether all that is to be kept is
        durable, if it was the last client; what is not, is logged.
        """
        ...

    async def close(self) -> None:
        """Wait until all have been given back."""
        ...


class Export:
    """Args: name: non-empty. block_size_min: a power of two to 64 KiB; clients that negotiate it must obey it.
    snapshot_id: of the internal snapshot that the image is; None: it is no snapshot.

    Raises: ConfigError: a name, description or block size that the protocol does not allow.
    """

    def __init__(
        self,
        name: str,
        image: Image,
        *,
        description: str = "",
        block_size_min: int = 1,
        payload_max: int,
        snapshot_id: str | None = None,
    ) -> None:
        if not name or not _fits_the_wire(name):
            raise ConfigError(f"export name {escaped(name)}: expected 1 to {STRING_MAX} bytes of UTF-8 without NUL")
        if not _fits_the_wire(description):
            raise ConfigError(f"a description must be at most {STRING_MAX} bytes of UTF-8 without NUL")
        if not (is_power_of_two(block_size_min) and block_size_min <= BLOCK_SIZE_MIN_MAX):
            raise ConfigError(
                f"the minimum block size is {block_size_min}, expected a power of two from 1 to {BLOCK_SIZE_MIN_MAX}"
            )
        self.name = name
        self.snapshot_id = snapshot_id
        self.image = image
        self.inflight = InFlight()
        self.upkeep = asyncio.Lock()
        """Of who changes the image at large, or looks at what that changes, and of who closes it."""
        self.meter = Meter()
        self._standstill_end: asyncio.Event | None = None
        """Of the standstill that has begun, or waits to begin."""
        self._beside_count = 0
        self._is_quiet = asyncio.Event()
        """Set when nothing runs beside the queue any more."""
        flags = _READ_FLAGS | (_WRITE_FLAGS if image.is_writable else TransmissionFlag.READ_ONLY)
        self.info = ExportInfo(
            name=name,
            size=align_down(image.size, block_size_min),
            flags=flags,
            description=description,
            block_size_min=block_size_min,
            block_size_preferred=max(block_size_min, PREFERRED_SIZE, SECTOR_SIZE),
            payload_max=payload_max,
            contexts=_contexts(image),
        )
        self.overlays: Overlays | None = None

    def lend(self, overlays: Overlays) -> None:
        """Give clients overlays of this export, from the first one on."""
        self.overlays = overlays
        is_shared = TransmissionFlag.CAN_MULTI_CONN if overlays.is_kept else TransmissionFlag(0)
        self.info = replace(
            self.info,
            size=align_down(overlays.size, self.info.block_size_min),
            flags=(_READ_FLAGS & ~TransmissionFlag.CAN_MULTI_CONN) | _WRITE_FLAGS | is_shared,
            contexts=(BASE_ALLOCATION, ALLOCATION_DEPTH),
            is_made_on_entry=True,
        )

    @property
    def with_overlays(self) -> list[Export]:
        """This one and its overlays that are open."""
        return [self] if self.overlays is None else [self, *self.overlays.lent]

    @property
    def keeps_overlays(self) -> bool:
        """Whether clients must say which overlay is theirs."""
        return self.overlays is not None and self.overlays.is_kept

    @property
    def asked_as(self) -> str:
        """A name that it can be opened by. Kept overlays have one each: clients put their own in the place of NAME."""
        return f"{self.name}@NAME" if self.keeps_overlays else self.name

    @property
    def is_snapshot(self) -> bool:
        return self.snapshot_id is not None

    def try_read(self, offset: int, stop: int, view: memoryview) -> int:
        """As `Image.try_read`; 0 also when an unfinished change overlaps the range.

        Raises: RequestError: EINVAL, the export has become smaller since the request was checked.
        """
        if stop > self.info.size:
            self._check_end(Command.READ, offset, stop - offset)
        if self.inflight.count and self.inflight.conflicts(offset, stop, is_exclusive=False):
            return 0
        return self.image.try_read(offset, stop, view)

    def try_resident(self, offset: int, stop: int) -> Resident | None:
        """As `Image.try_resident`; None also when an unfinished change overlaps the range, or it is not all there."""
        if stop > self.info.size or (self.inflight.count and self.inflight.conflicts(offset, stop, is_exclusive=False)):
            return None
        return self.image.try_resident(offset, stop)

    def read(self, offset: int, view: memoryview) -> Work[list[Segment]]:
        """As `Image.read`, waiting for storage and for older overlapping changes."""
        entry = self.inflight.enter(offset, offset + len(view), is_exclusive=False)
        return self._checked(entry, Command.READ, offset, len(view), lambda: self.image.read(offset, view))

    def submit(self, request: Request, contexts: dict[int, str] | None = None) -> Work[Status | None] | None:
        """Carry out any checked request but READ and DISC. None: it is done.

        `contexts`: the session's, for BLOCK_STATUS. Afterwards the request owns its payload if it still needs it.

        Raises: OSError, NbdimgError: the request failed, now.
        """
        if request.command == _WRITE and request.length:
            return self._submit_write(request)
        if request.command == Command.FLUSH:
            return None if self.image.gate.is_clean else self._flush()
        if request.length == 0:
            return self._flush() if request.flags & _FUA else None
        if request.command == Command.BLOCK_STATUS:
            return self._submit_block_status(request, contexts or {})
        if request.command == Command.CACHE:
            return self._submit_cache(request)
        return self._submit_unmap(request)

    def _write_span(self, request: Request) -> tuple[tuple[int, int], bool]:
        """What a write must have for itself, and whether it meets others there. One that does takes whole clusters: by
        the time it runs, they may have changed the mapping.
        """
        start, stop = self._sectors(request.offset, request.length)
        start, stop = self.image.change_span(start, stop)
        if self.inflight.conflicts(start, stop, is_exclusive=True):
            return self._clusters(request), True
        return (start, stop), False

    def _clusters(self, request: Request) -> tuple[int, int]:
        start, stop = self._sectors(request.offset, request.length)
        return self.image.cluster_span(start, stop)

    def _submit_write(self, request: Request) -> Work[None] | None:
        """Now, unless it meets others or would wait."""
        assert request.payload is not None
        span, is_blocked = self._write_span(request) if self.inflight.count else (None, False)
        if not is_blocked and self.image.try_write(request.offset, request.payload):
            return self._flush() if request.flags & _FUA else None
        if span is None:
            span, _ = self._write_span(request)
        request.keep_payload()
        offset, payload = request.offset, request.payload
        return self._change(request, span, lambda: self.image.write(offset, payload))

    def _submit_unmap(self, request: Request) -> Work[None]:
        offset, length, flags = request.offset, request.length, request.flags
        if request.command == Command.TRIM:
            return self._change(request, self._clusters(request), lambda: self.image.trim(offset, length))
        may_unmap = not flags & CommandFlag.NO_HOLE
        is_fast_only = bool(flags & CommandFlag.FAST_ZERO)
        return self._change(
            request,
            self._clusters(request),
            lambda: self.image.zero(offset, length, may_unmap=may_unmap, is_fast_only=is_fast_only),
        )

    def _change(self, request: Request, span: tuple[int, int], change: Callable[[], Awaitable[None]]) -> Work[None]:
        """Enter exclusively; with FUA the reply waits for the flush gate, the queue does not."""
        entry = self.inflight.enter(*span, is_exclusive=True)
        work = self._checked(entry, request.command, request.offset, request.length, change)
        return self._then_flush(work) if request.flags & _FUA else work

    async def _then_flush(self, work: Work[None]) -> None:
        await work
        await self._flush()

    def _flush(self) -> Work[None]:
        return self._beside(self.image.flush)

    def _submit_cache(self, request: Request) -> Work[None]:
        async def prefetch() -> None:
            self._check_end(request.command, request.offset, request.length)
            await self.image.prefetch(request.offset, request.length)

        return self._beside(prefetch)

    def _submit_block_status(self, request: Request, contexts: dict[int, str]) -> Work[Status]:
        selected = contexts
        if request.contexts is not None:
            selected = {context_id: contexts[context_id] for context_id in request.contexts}
        offset, length = request.offset, request.length
        extents_max = min(limits.EXTENTS_MAX, max(1, limits.STATUS_EXTENTS_MAX // max(1, len(selected))))
        entry = self.inflight.enter(offset, offset + length, is_exclusive=False)

        async def status() -> Status:
            alignment = self.info.block_size_min
            extents: list[Extent] | None = None
            answers: Status = []
            pace = self.image.turns.pace()
            for context_id, context in selected.items():
                await pace.step()
                if context.startswith(DIRTY_BITMAP):
                    bitmap = await self.image.bitmap(context.removeprefix(DIRTY_BITMAP))
                    pairs = dirty_pairs(bitmap, offset, offset + length, alignment, extents_max)
                else:
                    if extents is None:
                        extents = await self.image.map(offset, length, extents_max)
                    is_cut = bool(extents) and extents[-1].stop < offset + length
                    pairs = status_pairs(extents, STATUS_FLAGS[context], alignment, is_cut=is_cut)
                answers.append((context_id, pairs[:1] if request.flags & CommandFlag.REQ_ONE else pairs))
            return answers

        return self._checked(entry, request.command, offset, length, status)

    def _sectors(self, offset: int, length: int) -> tuple[int, int]:
        return align_down(offset, SECTOR_SIZE), align_up(offset + length, SECTOR_SIZE)

    def _check_end(self, command: int, offset: int, length: int) -> None:
        """Raises: RequestError: the export has become smaller since the request was checked."""
        refusal = check_end(command, offset, length, self.info.size)
        if refusal is not None:
            raise refusal

    async def _checked(
        self, entry: Entry, command: int, offset: int, length: int, work: Callable[[], Awaitable[T]]
    ) -> T:
        """Run when every older overlapping request has left, if the range is still there."""
        try:
            if not entry.is_ready:
                started_s = perf_counter()
                await _until_ready(entry)
                self.meter.waits.add(perf_counter() - started_s)
            self._check_end(command, offset, length)
            return await work()
        finally:
            self.inflight.leave(entry)

    async def _beside(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run what has no place in the queue, and waits for nothing but the end of a standstill."""
        while self._standstill_end is not None:
            await self._standstill_end.wait()
        self._beside_count += 1
        try:
            await work()
        finally:
            self._beside_count -= 1
            if not self._beside_count:
                self._is_quiet.set()

    @asynccontextmanager
    async def standstill(self) -> AsyncIterator[None]:
        """Within it no request is in flight and no flush runs; those that come wait. One at a time.

        Afterwards the export has the image's size, and offers its bitmaps. Must not be cancelled while it waits.
        """
        assert self._standstill_end is None
        end = self._standstill_end = asyncio.Event()
        entry = self.inflight.enter(0, RANGE_MAX, is_exclusive=True)
        try:
            await _until_ready(entry)
            while self._beside_count:
                self._is_quiet.clear()
                await self._is_quiet.wait()
            yield
        finally:
            size = align_down(self.image.size, self.info.block_size_min)
            self.info = replace(self.info, size=size, contexts=_contexts(self.image))
            self._standstill_end = None
            self.inflight.leave(entry)
            end.set()

    def withdraw(self, contexts: Collection[str]) -> None:
        """Offer these metadata contexts to nobody, until the end of a standstill."""
        self.info = replace(self.info, contexts=tuple(each for each in self.info.contexts if each not in contexts))

    async def close(self) -> None:
        """Flush and close the image. No request may be in flight. Raises: ImageError."""
        if self.overlays is not None:
            await self.overlays.close()
        try:
            await self.image.close()
        except OSError as error:
            raise ImageError(self.image.path, error.strerror or str(error)) from None


async def _until_ready(entry: Entry) -> None:
    """Until every older overlapping request has left."""
    if not entry.is_ready:
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry.on_ready = lambda: wakes().wake((ready,))
        await ready


def _contexts(image: Image) -> tuple[str, ...]:
    bitmaps = [DIRTY_BITMAP + name for name in image.bitmap_names[:BITMAP_CONTEXTS_MAX]]
    return BASE_ALLOCATION, ALLOCATION_DEPTH, *bitmaps


def _fits_the_wire(text: str) -> bool:
    """Spec: proto.md "String values"."""
    try:
        return len(text.encode()) <= STRING_MAX and "\0" not in text
    except UnicodeEncodeError:
        return False


def default_name(path: str, taken: Container[str]) -> str:
    """An export's name from its image's path: the file's name up to its first dot, made unique."""
    stem = path.rstrip("/").rpartition("/")[2]
    stem = stem.partition(".")[0] or stem
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    return name
