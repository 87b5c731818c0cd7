"""Adjacent writes that are made one: the replies and the disk of single ones, and nothing lost when one fails."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import unpack_from
from typing import Any

import pytest

from nbdimg.export.lane import Lane, Run
from nbdimg.export.merge import Merged
from nbdimg.image.image import Image
from nbdimg.limits import Limits
from nbdimg.storage.memory import MemoryFile
from nbdimg.wire.transmission import Receiver
from tests.server.test_lane import DIALECTS, converse, request
from tests.support.faultfile import FaultFile
from tests.support.qcow2disk import opened
from tests.support.qcow2edit import qemu_check, qemu_img
from tests.support.reading import read_all

SIZE = 1 << 20
EXPECTED_CALLS_MAX = 0.6
"""Of one by one: the part of file calls that a sequential writer may take."""


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An image of SIZE with clusters of 4 KiB, made by qemu-img."""
    path = tmp_path_factory.mktemp("merge") / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, str(SIZE))
    return path.read_bytes()


def sequential_stream(seed: int, extended: bool) -> list[bytes]:
    """Writers that go on from where they were, and now and then somewhere else; reads and flags between them."""
    source = random.Random(seed)
    stream, offset = [], 0
    for cookie in range(120):
        if source.random() < 0.15:
            offset = source.randrange(SIZE // 512) * 512
        length = source.choice([512, 1536, 4096, 4096, 8192, 20480, 65536])
        command = 0 if source.random() < 0.1 else 1
        flags = 1 if command and source.random() < 0.05 else 0
        payload = source.randbytes(length) if command else b""
        stream.append(request(extended, command, flags, cookie, offset, length, payload))
        offset = (offset + length) % SIZE
    return stream


def served(
    stream: list[bytes], dialect: str, file: FaultFile, arm: Callable[[FaultFile], None] | None = None
) -> tuple[bytes, bytes]:
    """(replies, what the guest sees afterwards); the image is closed. `arm` is called once its tables are loaded."""

    async def main() -> tuple[bytes, bytes]:
        image = Image(await opened(file), writable=True)
        await image.write(SIZE - 512, memoryview(bytes(512)))
        if arm is not None:
            arm(file)
        replies = await converse(stream, dialect, image, turn=20)
        file.heal()
        content = await read_all(image)
        await image.close()
        return replies, content

    return asyncio.run(main())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_merged_writes_give_the_replies_and_the_disk_of_single_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, empty: bytes, dialect: str
) -> None:
    merged, init = 0, Merged.__init__

    def counting(self: Merged, *arguments: Any) -> None:
        nonlocal merged
        init(self, *arguments)
        merged += len(self.followers)

    for seed in range(8):
        stream = sequential_stream(seed, DIALECTS[dialect][1])
        inner = MemoryFile(empty)
        with monkeypatch.context() as patch:
            patch.setattr(Merged, "__init__", counting)
            fast = served(stream, dialect, FaultFile(inner))
        (tmp_path / "disk").write_bytes(inner.content)
        assert qemu_check(tmp_path / "disk").exit_status == 0
        with monkeypatch.context() as patch:
            patch.setattr(Lane, "run", lambda self, receiver, fill, count_max, may_map: Run(fill, 0))
            assert fast == served(stream, dialect, FaultFile(MemoryFile(empty))), f"seed {seed}"
    assert merged > 8 * 20


def sequence(length: int, count: int) -> list[bytes]:
    return [
        request(False, 1, 0, index, index * length, length, bytes([index % 250 + 1]) * length) for index in range(count)
    ]


def test_a_sequential_writer_takes_fewer_file_calls(monkeypatch: pytest.MonkeyPatch, empty: bytes) -> None:
    def calls() -> int:
        file = FaultFile(MemoryFile(empty))
        served(sequence(4096, 200), "structured", file)
        return file.calls.count("try_pwrite")

    merged = calls()
    monkeypatch.setattr(Merged, "__init__", _alone)
    assert merged < EXPECTED_CALLS_MAX * calls()


def _alone(merged: Merged, receiver: Receiver, start: int, stop: int, *arguments: int) -> None:
    """One write and no follower."""
    merged.data, merged.followers, merged.position = receiver.window()[0][start:stop], [], stop


def errors(replies: bytes) -> Iterator[tuple[int, int]]:
    """(cookie, error number) of each simple reply."""
    for at in range(0, len(replies), 16):
        _, number, cookie = unpack_from(">IIQ", replies, at)
        yield cookie, number


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", range(12))
def test_a_file_call_that_fails_fails_no_more_than_one_request(empty: bytes, call: int, number: int) -> None:
    count, length = 20, 4096
    replies, content = served(
        sequence(length, count), "simple", FaultFile(MemoryFile(empty)), lambda file: file.fail_at(call, number)
    )
    answers = dict(errors(replies))
    assert sorted(answers) == list(range(count))
    failed = [cookie for cookie in answers if answers[cookie]]
    assert len(failed) <= 1
    for index in range(count):
        if index not in failed:
            assert content[index * length : (index + 1) * length] == bytes([index % 250 + 1]) * length


def test_a_disk_without_space_fails_each_write_for_itself(empty: bytes) -> None:
    replies, content = served(
        sequence(4096, 20), "simple", FaultFile(MemoryFile(empty)), lambda file: file.fail("try_pwrite", errno.ENOSPC)
    )
    assert dict(errors(replies)) == dict.fromkeys(range(20), errno.ENOSPC)
    assert content == bytes(SIZE)


@pytest.mark.parametrize("extended", [False, True])
def test_undo_brings_the_buffer_back(extended: bool) -> None:
    header = 32 if extended else 28
    for seed in range(50):
        source = random.Random(seed)
        offset, stream = 0, []
        for cookie in range(source.randrange(1, 40)):
            length = source.choice([1, 512, 5000])
            stream.append(request(extended, 1, 0, cookie, offset, length, source.randbytes(length)))
            offset += length
        payloads = b"".join(each[header:] for each in stream)
        whole = b"".join(stream)
        scratch = memoryview(bytearray(whole))
        receiver = Receiver(scratch, 0, 1 << 20, lambda length: None, is_extended=extended)
        receiver.buffers()
        receiver.received(len(whole))
        first = len(stream[0])
        merged = Merged(receiver, header, first, first - header, 1 << 40, 1 << 5, 1 << 20)
        assert [each.cookie for each in merged.followers] == list(range(1, len(stream)))
        assert merged.data == payloads
        assert merged.position == len(whole)
        merged.undo()
        assert scratch == whole


@pytest.mark.parametrize(
    ("command", "flags", "offset", "length"),
    [(0, 0, 512, 512), (1, 1, 512, 512), (1, 0, 1024, 512), (1, 0, 512, 0), (1, 0, 512, 4096), (6, 0, 512, 512)],
    ids=["read", "flag", "gap", "empty", "behind the end", "zeroes"],
)
def test_what_does_not_go_on_is_left_where_it_is(command: int, flags: int, offset: int, length: int) -> None:
    first = request(False, 1, 0, 1, 0, 512, b"1" * 512)
    second = request(False, command, flags, 2, offset, length, b"2" * length)
    scratch = memoryview(bytearray(first + second))
    receiver = Receiver(scratch, 0, Limits().payload_size, lambda length: None, is_extended=False)
    receiver.buffers()
    receiver.received(len(scratch))
    merged = Merged(receiver, 28, 540, 512, 2048, 0, 1 << 20)
    assert merged.followers == []
    assert merged.data == b"1" * 512
    assert merged.position == 540
