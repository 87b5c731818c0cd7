"""Export.submit and read: what completes at once, what waits for what, and what flush covers."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable
from itertools import pairwise
from typing import Any

import pytest

from nbdimg.errors import ConfigError, ImageFailed, RequestError
from nbdimg.export.export import Export, default_name
from nbdimg.formats.raw import RawDriver
from nbdimg.image.image import Image, Segment
from nbdimg.image.wakes import WAKES_PER_ROUND
from nbdimg.storage.memory import MemoryFile
from nbdimg.wire.constants import Command, CommandFlag, TransmissionFlag
from nbdimg.wire.messages import PayloadRequest, Request
from tests.support.faultfile import FaultFile, HeldFile

SIZE = 64 * 1024
CONTEXTS = {7: "base:allocation", 3: "qemu:allocation-depth"}


def held_export() -> tuple[Export, HeldFile]:
    file = HeldFile(bytes(SIZE))
    return Export("disk", Image(RawDriver(file), writable=True), payload_max=1 << 20), file


def memory_export(**options: Any) -> tuple[Export, FaultFile]:
    file = FaultFile(MemoryFile(bytes(SIZE)))
    return Export("disk", Image(RawDriver(file), writable=True), payload_max=1 << 20, **options), file


def write(offset: int, data: bytes, flags: int = 0) -> Request:
    return Request(Command.WRITE, flags, 1, offset, len(data), memoryview(data))


def plain(command: Command, offset: int = 0, length: int = 512, flags: int = 0) -> Request:
    return Request(command, flags, 1, offset, length)


def start(work: Awaitable[Any] | None) -> asyncio.Task[Any]:
    assert work is not None, "the request was done at once"

    async def finish() -> Any:
        return await work

    return asyncio.get_running_loop().create_task(finish())


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def release_all(file: HeldFile, *tasks: asyncio.Task[Any]) -> None:
    """Complete the file's calls, oldest first, until the tasks are done."""
    for _ in range(100):
        await settle()
        if all(task.done() for task in tasks):
            return
        if file.held:
            file.release(0)
    raise AssertionError("the requests do not end")


def view(length: int = 512) -> memoryview:
    return memoryview(bytearray(length))


# What completes at once


def test_write_that_storage_takes_now_needs_no_task() -> None:
    export, file = memory_export()
    assert export.submit(write(100, b"abc")) is None
    assert export.inflight.count == 0
    found = view(3)
    assert export.try_read(100, 103, found) == 3
    assert bytes(found) == b"abc"
    assert "pwrite" not in file.calls


@pytest.mark.parametrize("command", [Command.TRIM, Command.WRITE_ZEROES, Command.CACHE])
def test_request_of_no_bytes_is_done_at_once(command: Command) -> None:
    export, file = memory_export()
    assert export.submit(plain(command, 100, 0)) is None
    assert export.submit(Request(Command.WRITE, 0, 1, 100, 0, memoryview(b""))) is None
    assert file.calls == []


def test_flush_of_a_clean_image_is_done_at_once() -> None:
    async def main() -> None:
        export, file = memory_export()
        await start(export.submit(plain(Command.FLUSH)))
        assert export.submit(plain(Command.FLUSH)) is None
        assert file.calls.count("fdatasync") == 1
        export.submit(write(0, b"x"))
        await start(export.submit(plain(Command.FLUSH)))
        assert file.calls.count("fdatasync") == 2

    asyncio.run(main())


def test_slow_write_keeps_its_payload_when_the_receive_buffer_is_reused() -> None:
    async def main() -> None:
        export, file = held_export()
        scratch = bytearray(b"original")
        task = start(export.submit(Request(Command.WRITE, 0, 1, 0, 8, memoryview(scratch))))
        scratch[:] = b"next one"
        await release_all(file, task)
        assert file.content[:8] == b"original"

    asyncio.run(main())


# Order


@pytest.mark.parametrize("inline", [False, True])
def test_read_waits_for_an_unfinished_overlapping_write(inline: bool) -> None:
    async def main() -> None:
        export, file = held_export()
        writing = start(export.submit(write(1024, b"w" * 512)))
        await settle()
        file.is_inline = inline
        found = view()
        assert export.try_read(1024, 1536, found) == 0
        reading = start(export.read(1024, found))
        await settle()
        assert len(file.held) == 1, "the read has reached the file before the write was done"
        await release_all(file, writing, reading)
        assert bytes(found) == b"w" * 512

    asyncio.run(main())


def test_read_of_the_same_sector_waits_though_the_bytes_differ() -> None:
    """A change is rounded out to sectors."""

    async def main() -> None:
        export, file = held_export()
        writing = start(export.submit(write(1024, b"w" * 10)))
        await settle()
        file.is_inline = True
        assert export.try_read(1500, 1510, view(10)) == 0
        assert export.try_read(1536, 1546, view(10)) == 10
        assert export.try_read(1014, 1024, view(10)) == 10
        await release_all(file, writing)
        assert export.try_read(1500, 1510, view(10)) == 10

    asyncio.run(main())


def test_requests_that_do_not_overlap_run_together() -> None:
    async def main() -> None:
        export, file = held_export()
        tasks = [start(export.submit(write(n * 512, b"x" * 512))) for n in range(5)]
        tasks.append(start(export.read(8192, view())))
        tasks.append(start(export.submit(plain(Command.WRITE_ZEROES, 16384))))
        await settle()
        assert len(file.held) == 7
        file.release(6)
        await settle()
        file.release(6)
        await settle()
        assert tasks[6].done(), "the youngest ends first"
        assert not tasks[0].done()
        await release_all(file, *tasks)

    asyncio.run(main())


def test_reads_of_one_range_run_together() -> None:
    async def main() -> None:
        export, file = held_export()
        tasks = [start(export.read(0, view())) for _ in range(3)]
        await settle()
        assert len(file.held) == 3
        await release_all(file, *tasks)

    asyncio.run(main())


def test_write_waits_for_an_unfinished_overlapping_read() -> None:
    async def main() -> None:
        export, file = held_export()
        found = view()
        reading = start(export.read(0, found))
        await settle()
        file.is_inline = True
        writing = start(export.submit(write(0, b"w" * 512)))
        await settle()
        assert [name for name, _ in file.held] == ["pread"]
        await release_all(file, reading, writing)
        assert bytes(found) == bytes(512)
        assert file.content[:512] == b"w" * 512

    asyncio.run(main())


@pytest.mark.parametrize("command", [Command.TRIM, Command.WRITE_ZEROES])
def test_changes_of_one_range_run_in_order_of_arrival(command: Command) -> None:
    async def main() -> None:
        export, file = held_export()
        tasks = [
            start(export.submit(write(0, b"1" * 512))),
            start(export.submit(plain(command))),
            start(export.submit(write(0, b"2" * 256))),
        ]
        await settle()
        assert len(file.held) == 1
        await release_all(file, *tasks)
        assert file.content[:512] == b"2" * 256 + bytes(256)

    asyncio.run(main())


def test_order_is_that_of_submission_not_of_the_tasks_first_step() -> None:
    """The entry is in the queue before the coroutine runs."""

    async def main() -> None:
        export, file = held_export()
        first = export.submit(write(0, b"1" * 512))
        second = export.submit(write(0, b"2" * 512))
        late = start(second)
        await settle()
        assert file.held == []
        early = start(first)
        await release_all(file, early, late)
        assert file.content[:512] == b"2" * 512

    asyncio.run(main())


def test_failed_write_lets_the_next_one_run() -> None:
    async def main() -> None:
        export, file = memory_export()
        file.slow_only = True
        file.fail_at(1, errno.EIO)
        outcomes = await asyncio.gather(
            start(export.submit(write(0, b"1" * 512))),
            start(export.submit(write(0, b"2" * 512))),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes].count(OSError) == 1
        assert export.inflight.count == 0

    asyncio.run(main())


# Durability


def test_flush_does_not_wait_for_writes_that_were_not_replied_to() -> None:
    """Spec: proto.md "Ordering of messages and writes"."""

    async def main() -> None:
        export, file = held_export()
        writing = start(export.submit(write(0, b"w" * 512)))
        flushing = start(export.submit(plain(Command.FLUSH)))
        await settle()
        assert [name for name, _ in file.held] == ["pwrite", "fdatasync"]
        file.release(1)
        await settle()
        assert flushing.done()
        assert not writing.done()
        await release_all(file, writing)

    asyncio.run(main())


@pytest.mark.parametrize("is_inline", [True, False])
@pytest.mark.parametrize("command", [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES])
def test_fua_replies_after_a_barrier_behind_the_change(command: Command, is_inline: bool) -> None:
    async def main() -> None:
        export, file = held_export()
        file.is_inline = is_inline
        data = write(0, b"w" * 512, CommandFlag.FUA)
        request = data if command is Command.WRITE else plain(command, flags=CommandFlag.FUA)
        task = start(export.submit(request))
        for _ in range(10):
            await settle()
            if file.held[0][0] == "fdatasync":
                break
            file.release(0)
        assert [name for name, _ in file.held] == ["fdatasync"]
        assert not task.done()
        assert export.inflight.count == 0, "the queue is not held up by the barrier"
        file.release(0)
        await task
        assert export.image.gate.is_clean

    asyncio.run(main())


def test_fua_of_no_bytes_on_a_dirty_image_flushes() -> None:
    async def main() -> None:
        export, file = memory_export()
        await start(export.submit(Request(Command.WRITE, CommandFlag.FUA, 1, 0, 0, memoryview(b""))))
        assert file.calls == ["fdatasync"]

    asyncio.run(main())


def test_failed_barrier_fails_fua_flush_and_every_later_change() -> None:
    async def main() -> None:
        export, file = memory_export()
        file.fail("fdatasync", errno.EIO)
        with pytest.raises(ImageFailed):
            await start(export.submit(write(0, b"x", CommandFlag.FUA)))
        file.heal()
        with pytest.raises(ImageFailed):
            export.submit(write(0, b"x"))
        for request in (
            plain(Command.FLUSH),
            plain(Command.TRIM),
            plain(Command.WRITE_ZEROES, flags=CommandFlag.FUA),
        ):
            with pytest.raises(ImageFailed):
                await start(export.submit(request))
        assert export.try_read(0, 1, view(1)) == 1

    asyncio.run(main())


def test_fast_zero_unsupported_is_enotsup_and_the_next_request_runs() -> None:
    async def main() -> None:
        export, file = memory_export()
        file.unsupported = {"punch", "zero"}
        with pytest.raises(RequestError) as caught:
            await start(export.submit(plain(Command.WRITE_ZEROES, flags=CommandFlag.FAST_ZERO)))
        assert caught.value.errno == errno.EOPNOTSUPP
        await start(export.submit(plain(Command.WRITE_ZEROES)))

    asyncio.run(main())


@pytest.mark.parametrize(("flags", "is_punched"), [(0, True), (CommandFlag.NO_HOLE, False)])
def test_no_hole_keeps_the_space(flags: int, is_punched: bool) -> None:
    async def main() -> None:
        export, file = memory_export()
        await start(export.submit(plain(Command.WRITE_ZEROES, flags=flags)))
        assert ("punch" in file.calls) == is_punched

    asyncio.run(main())


# BLOCK_STATUS


class StripedFile(MemoryFile):
    """Every other KiB is a hole, beginning with data."""

    def try_data_extent(self, offset: int) -> tuple[bool, int]:
        index = offset // 1024
        return index % 2 == 0, min((index + 1) * 1024, SIZE)


def striped_export(block_size_min: int = 1) -> Export:
    image = Image(RawDriver(StripedFile(bytes(SIZE))), writable=True)
    return Export("disk", image, payload_max=1 << 20, block_size_min=block_size_min)


def status(
    export: Export, request: Request, contexts: dict[int, str] = CONTEXTS
) -> list[tuple[int, list[tuple[int, int]]]]:
    async def main() -> Any:
        return await start(export.submit(request, contexts))

    found: list[tuple[int, list[tuple[int, int]]]] = asyncio.run(main())
    return found


def test_block_status_answers_each_selected_context_once_within_the_range() -> None:
    found = status(striped_export(), plain(Command.BLOCK_STATUS, 512, 2048))
    assert found == [(7, [(512, 0), (1024, 3), (512, 0)]), (3, [(2048, 1)])]


def test_block_status_req_one_gives_one_extent_for_each_context() -> None:
    found = status(striped_export(), plain(Command.BLOCK_STATUS, 512, 2048, CommandFlag.REQ_ONE))
    assert found == [(7, [(512, 0)]), (3, [(2048, 1)])]


def test_block_status_payload_answers_the_named_contexts_only() -> None:
    request = PayloadRequest(Command.BLOCK_STATUS, CommandFlag.PAYLOAD_LEN, 1, 0, 1024)
    request.contexts = (3,)
    assert status(striped_export(), request) == [(3, [(1024, 1)])]


@pytest.mark.parametrize(("offset", "length"), [(0, 4096), (512, 2048), (100, 1000), (SIZE - 1500, 1500), (0, 100)])
@pytest.mark.parametrize("flags", [0, CommandFlag.REQ_ONE])
def test_block_status_with_large_blocks_stays_within_the_request(offset: int, length: int, flags: int) -> None:
    """A client that did not negotiate block sizes may ask for any range: with REQ_ONE no extent may exceed it, without
    only the last, and none the export. Spec: proto.md "NBD_CMD_FLAG_REQ_ONE", "NBD_REPLY_TYPE_BLOCK_STATUS"."""
    for _, pairs in status(striped_export(4096), plain(Command.BLOCK_STATUS, offset, length, flags)):
        described = sum(pair[0] for pair in pairs)
        assert offset + described <= SIZE
        assert described - pairs[-1][0] < length
        if flags:
            assert described <= length


def test_block_status_is_cut_at_the_extents_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdimg.limits.EXTENTS_MAX", 4)
    found = status(striped_export(), plain(Command.BLOCK_STATUS, 0, SIZE))
    assert found[0] == (7, [(1024, 0), (1024, 3), (1024, 0), (1024, 3)])
    assert found[1] == (3, [(4096, 1)])


def test_block_status_of_many_contexts_has_no_more_extents_than_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 replies with 1,024 extents of each of 1,000 bitmaps would take 2 GiB."""
    monkeypatch.setattr("nbdimg.limits.STATUS_EXTENTS_MAX", 9)
    for count, expected in ((1, 9), (2, 4), (4, 2), (20, 1)):
        contexts = dict.fromkeys(range(count), "base:allocation")
        found = status(striped_export(), plain(Command.BLOCK_STATUS, 0, SIZE), contexts)
        assert [len(pairs) for _, pairs in found] == [expected] * count
        assert {pairs[0] for _, pairs in found} == {(1024, 0)}


def test_block_status_waits_for_an_overlapping_change() -> None:
    async def main() -> None:
        export, file = held_export()
        trimming = start(export.submit(plain(Command.TRIM, 0, 4096)))
        asking = start(export.submit(plain(Command.BLOCK_STATUS, 0, 512), CONTEXTS))
        await settle()
        assert not asking.done()
        await release_all(file, trimming, asking)

    asyncio.run(main())


# What is told to clients


def test_info_of_a_writable_export() -> None:
    export, _ = memory_export(description="a disk", block_size_min=512)
    info = export.info
    assert (info.name, info.size, info.description) == ("disk", SIZE, "a disk")
    assert (info.block_size_min, info.block_size_preferred) == (512, 4096)
    assert not info.flags & TransmissionFlag.READ_ONLY
    assert info.flags & TransmissionFlag.SEND_TRIM
    assert info.flags & TransmissionFlag.CAN_MULTI_CONN


def test_info_of_a_read_only_export_offers_no_change() -> None:
    image = Image(RawDriver(MemoryFile(bytes(SIZE), writable=False)), writable=False)
    flags = Export("disk", image, payload_max=1 << 20).info.flags
    assert flags & TransmissionFlag.READ_ONLY
    changes = TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO
    assert not flags & changes


@pytest.mark.parametrize(("size", "block", "served"), [(1000, 512, 512), (1024, 512, 1024), (511, 512, 0), (7, 1, 7)])
def test_size_is_rounded_down_to_whole_blocks(size: int, block: int, served: int) -> None:
    image = Image(RawDriver(MemoryFile(bytes(size))), writable=True)
    assert Export("disk", image, payload_max=1 << 20, block_size_min=block).info.size == served


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 4097, "ä" * 2049])
def test_name_that_the_protocol_forbids_is_refused(name: str) -> None:
    image = Image(RawDriver(MemoryFile()), writable=True)
    with pytest.raises(ConfigError, match="1 to 4096 bytes"):
        Export(name, image, payload_max=1 << 20)


def test_name_that_is_no_utf8_is_refused_as_a_config_error() -> None:
    """What Python makes of a file name in another encoding."""
    image = Image(RawDriver(MemoryFile()), writable=True)
    with pytest.raises(ConfigError):
        Export("disk\udcff", image, payload_max=1 << 20)


@pytest.mark.parametrize("description", ["a\0b", "x" * 4097])
def test_description_that_the_protocol_forbids_is_refused(description: str) -> None:
    with pytest.raises(ConfigError, match="description must be"):
        memory_export(description=description)


@pytest.mark.parametrize("block", [0, 3, -512, 131072])
def test_block_size_that_the_protocol_forbids_is_refused(block: int) -> None:
    with pytest.raises(ConfigError, match="expected a power of two"):
        memory_export(block_size_min=block)


@pytest.mark.parametrize(
    ("path", "taken", "name"),
    [
        ("/srv/disk.img", [], "disk"),
        ("disk", [], "disk"),
        ("disk.tar.gz", [], "disk"),
        (".hidden", [], ".hidden"),
        ("dir/", [], "dir"),
        ("disk.img", ["disk"], "disk-2"),
        ("disk.img", ["disk", "disk-2"], "disk-3"),
    ],
)
def test_default_name_is_the_stem_made_unique(path: str, taken: list[str], name: str) -> None:
    assert default_name(path, taken) == name


def test_thousand_requests_that_wait_for_one_go_on_some_in_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        export, _ = memory_export()
        is_trimmed = asyncio.Event()
        begun: list[int] = []

        async def trim(offset: int, length: int) -> None:
            await is_trimmed.wait()

        async def read(offset: int, view: memoryview) -> list[Segment]:
            begun.append(offset)
            return []

        monkeypatch.setattr(export.image, "trim", trim)
        monkeypatch.setattr(export.image, "read", read)
        tasks = [start(export.submit(plain(Command.TRIM, 0, SIZE)))]
        tasks += [start(export.read(0, memoryview(bytearray(512)))) for _ in range(1000)]
        await asyncio.sleep(0)
        is_trimmed.set()
        counts = [len(begun)]
        for _ in range(100):
            await asyncio.sleep(0)
            counts.append(len(begun))
        assert counts[-1] == 1000
        assert max(after - before for before, after in pairwise(counts)) <= WAKES_PER_ROUND
        await asyncio.gather(*tasks)

    asyncio.run(main())
