"""Clients stay connected while their server is replaced by another: nothing is lost, nothing is done twice."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from nbdimg.config import ExportConfig, ServerConfig
from nbdimg.server import systemd
from nbdimg.server.handover import CLIENT_NAME, STATE_NAME, claim
from nbdimg.server.service import Service, serving
from nbdimg.server.systemd import Inheritance, Notifier
from nbdimg.uri import NbdUri
from tests.server.live import pattern, unsent_bytes
from tests.support.certificates import Authority
from tests.support.configured import export
from tests.support.keeper import Keeper
from tests.support.peers import require_program
from tests.support.rawclient import Client, connect_negotiated
from tests.support.rawprotocol import KIB, MIB, Command, ConnectionClosed
from tests.support.rss import wait_until

SIZE = 8 * MIB
RESTARTS = 3
TIMEOUT_S = 30.0


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(0, MIB) * (SIZE // MIB))
    return path


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    with Keeper(tmp_path) as running:
        yield running


@pytest.fixture
def address(tmp_path: Path) -> str:
    return str(tmp_path / "s")


def arguments(address: str, image: Path, *options: str) -> list[str]:
    return ["serve", f"--listen=nbd+unix:///?socket={address}", "--format=raw", *options, f"disk={image}"]


@pytest.mark.parametrize("dialect", ["simple", "structured", "extended"])
def test_client_goes_on_with_the_next_server(keeper: Keeper, address: str, image: Path, dialect: str) -> None:
    serve = arguments(address, image)
    keeper.start(*serve)
    with Client(address) as client:
        client.greet()
        is_structured = dialect != "simple"
        contexts = ["base:allocation"] if is_structured else []
        client.negotiate("disk", structured=is_structured, extended=dialect == "extended", contexts=contexts)
        for count in range(RESTARTS):
            assert client.write(count * 4096, bytes([count + 1]) * 4096).error == 0
            keeper.restart(*serve)
            assert keeper.kept == []
            assert client.read(count * 4096, 4096).data == bytes([count + 1]) * 4096
            assert client.request(Command.FLUSH).error == 0
            if is_structured:
                reply = client.request(Command.BLOCK_STATUS, 0, MIB)
                assert reply.error == 0
                assert reply.extents
        client.disconnect()
        assert client.wait_closed(5) is not None


def test_client_over_tcp_goes_on(keeper: Keeper, image: Path, tmp_path: Path) -> None:
    first = keeper.start("serve", "--listen=nbd://127.0.0.1:0", "--format=raw", f"disk={image}")
    port = int(first.stdout().split(":")[2].split("/")[0])
    with connect_negotiated(("127.0.0.1", port), "disk") as client:
        said = keeper.stop()
        assert "clients left to the next server: 1" in said
        second = keeper.start("serve", f"--listen=nbd://127.0.0.1:{port}", "--format=raw", f"disk={image}")
        assert client.read(0, MIB).data == pattern(0, MIB)
        assert ": attached to 'disk', read-write" in second.stderr()


def test_manager_that_keeps_nothing_has_clients_disconnected(tmp_path: Path, address: str, image: Path) -> None:
    """The control: without it the tests above could not fail."""
    with Keeper(tmp_path, tells_room=False) as keeper:
        keeper.start(*arguments(address, image))
        with connect_negotiated(address, "disk") as client:
            keeper.restart(*arguments(address, image))
            with pytest.raises(ConnectionClosed):
                client.read(0, 512)


class Writer(threading.Thread):
    """Writes its part of the disk over one connection, all of it in flight at once, and reads it back, until told."""

    LENGTHS = (512, 8 * KIB, 15 * KIB + 512, 17 * KIB, 128 * KIB, 300 * KIB, 1025 * KIB)
    """On both sides of every limit at which the server treats payloads differently."""

    def __init__(self, client: Client, offset: int) -> None:
        super().__init__()
        self.round_count = 0
        self.failure: BaseException | None = None
        self.must_end = threading.Event()
        self._client = client
        self._slots = list(zip(itertools.accumulate(self.LENGTHS, initial=offset), self.LENGTHS, strict=False))
        self._random = random.Random(offset)

    def run(self) -> None:
        try:
            while not self.must_end.is_set():
                self._round()
                self.round_count += 1
        except BaseException as error:
            self.failure = error

    def wait_rounds(self, count: int) -> None:
        """Until so many more are done, or it has failed."""
        wanted = self.round_count + count
        assert wait_until(lambda: self.round_count >= wanted or self.failure is not None, TIMEOUT_S)

    def _round(self) -> None:
        client = self._client
        self._random.shuffle(self._slots)
        written = {offset: self._random.randbytes(512) * (length // 512) for offset, length in self._slots}
        writes = [client.new_request(Command.WRITE, at, len(data), 0, data) for at, data in written.items()]
        client.send_requests(writes)
        assert {reply.error for reply in client.read_replies(len(writes))} == {0}
        reads = {each.cookie: each for each in (client.new_request(Command.READ, *slot) for slot in self._slots)}
        client.send_requests(reads.values())
        for reply in client.read_replies(len(reads)):
            assert reply.data == written[reads[reply.cookie].offset]


def test_clients_under_load_notice_nothing(keeper: Keeper, address: str, image: Path) -> None:
    serve = arguments(address, image)
    keeper.start(*serve)
    with ExitStack() as stack:
        writers = []
        for index, (structured, extended) in enumerate([(False, False), (True, False), (True, True)]):
            client = stack.enter_context(Client(address, TIMEOUT_S))
            client.greet()
            client.negotiate("disk", structured, extended)
            writers.append(Writer(client, index * 2 * MIB))
        for writer in writers:
            writer.start()
        for _ in range(RESTARTS):
            for writer in writers:
                writer.wait_rounds(2)
            keeper.restart(*serve)
        for writer in writers:
            writer.must_end.set()
        for writer in writers:
            writer.join()
    assert [writer.failure for writer in writers] == [None] * len(writers)


def test_fio_verifies_what_it_wrote_over_restarts(keeper: Keeper, address: str, image: Path, tmp_path: Path) -> None:
    serve = arguments(address, image)
    server = keeper.start(*serve)
    job = [
        *(require_program("fio"), "--name=handover", "--ioengine=nbd", f"--uri=nbd+unix:///disk?socket={address}"),
        *("--rw=randwrite", "--bsrange=4k-1m", f"--size={SIZE}", "--iodepth=16", "--time_based", "--runtime=6"),
        *("--verify=crc32c", "--verify_fatal=1", "--verify_backlog=16", "--fsync=64"),
    ]
    with subprocess.Popen(job, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as fio:
        # It asks for the size on one connection and works on another, which it does not make again.
        assert wait_until(lambda: server.stderr().count("attached to 'disk'") == 2, TIMEOUT_S)
        restart_count = 0
        while fio.poll() is None:
            time.sleep(0.5)
            keeper.restart(*serve)
            restart_count += 1
        assert fio.stdout is not None
        assert fio.returncode == 0, fio.stdout.read()
    assert restart_count >= RESTARTS


@pytest.mark.parametrize("length", [4 * KIB, MIB], ids=["carried", "with-a-buffer"])
def test_half_a_write_is_finished_by_this_server_or_by_the_next(
    keeper: Keeper, address: str, image: Path, length: int
) -> None:
    serve = arguments(address, image)
    keeper.start(*serve)
    data = bytes([9]) * length
    with connect_negotiated(address, "disk") as client:
        request = client.announce(client.new_request(Command.WRITE, 512, length, 0, data))
        for cut in (10, 28 + length // 2):
            client.send(request[:cut])
            request = request[cut:]
            assert wait_until(lambda: unsent_bytes(client) == 0, 5)
            rest = threading.Timer(0.2, client.send, [request]) if cut > 28 and length == MIB else None
            if rest is not None:
                rest.start()
            keeper.restart(*serve)
            if rest is not None:
                rest.join()
                request = b""
        client.send(request)
        assert client.read_reply().error == 0
        assert client.read(0, length + 1024).data == pattern(0, 512) + data + client.read(length + 512, 512).data


def test_clients_that_cannot_be_left_are_parted_from(tmp_path: Path, keeper: Keeper, address: str, image: Path) -> None:
    """An overlay of one client's own dies with its server."""
    serve = arguments(address, image, "--overlay")
    keeper.start(*serve)
    with connect_negotiated(address, "disk") as client:
        assert client.write(0, bytes(512)).error == 0
        said = keeper.stop()
        assert "left to the next" not in said
        assert client.wait_closed(5) is not None


def test_client_of_a_kept_overlay_goes_on(tmp_path: Path, keeper: Keeper, address: str, image: Path) -> None:
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    file = tmp_path / "nbdimg.toml"
    file.write_text(
        f'listen = ["nbd+unix:///?socket={address}"]\n'
        + export("disk", image, 'overlay = "kept"', f'overlay_dir = "{overlays}"')
    )
    serve = ["serve", f"--config={file}"]
    keeper.start(*serve)
    with connect_negotiated(address, "disk@vm1") as first, connect_negotiated(address, "disk@vm1") as second:
        assert first.write(0, bytes([5]) * 4096).error == 0
        keeper.restart(*serve)
        assert second.read(0, 4096).data == bytes([5]) * 4096
        assert second.write(4096, bytes([6]) * 4096).error == 0
        assert first.read(4096, 4096).data == bytes([6]) * 4096
    assert image.read_bytes()[: 8 * KIB] == pattern(0, 8 * KIB)


def test_session_that_does_not_hold_any_more_ends(keeper: Keeper, address: str, image: Path) -> None:
    keeper.start(*arguments(address, image))
    with connect_negotiated(address, "disk") as client:
        keeper.stop()
        with open(image, "r+b") as file:
            file.truncate(SIZE // 2)
        server = keeper.start(*arguments(address, image))
        assert client.wait_closed(5) is not None
        assert f"cannot go on: it has {SIZE // 2} bytes, the client was told {SIZE}" in server.stderr()


@pytest.mark.parametrize("is_golden", [False, True])
def test_session_on_an_image_whose_place_another_file_has_taken_ends(
    keeper: Keeper, address: str, image: Path, tmp_path: Path, is_golden: bool
) -> None:
    """To its client the disk would change under its cache."""
    file = tmp_path / "nbdimg.toml"
    overlay = ['overlay = "kept"', f'overlay_dir = "{tmp_path}"'] if is_golden else []
    file.write_text(f'listen = ["nbd+unix:///?socket={address}"]\n' + export("disk", image, *overlay))
    keeper.start("serve", f"--config={file}")
    with connect_negotiated(address, "disk@vm1" if is_golden else "disk") as client:
        keeper.stop()
        other = tmp_path / "other"
        other.write_bytes(bytes(SIZE))
        other.rename(image)
        server = keeper.start("serve", f"--config={file}")
        assert client.wait_closed(5) is not None
        assert "cannot go on: another file has taken the place of its image" in server.stderr()


def test_session_on_an_export_that_only_reads_now_ends_for_a_writer(keeper: Keeper, address: str, image: Path) -> None:
    keeper.start(*arguments(address, image))
    with connect_negotiated(address, "disk") as client:
        keeper.stop()
        server = keeper.start(*arguments(address, image, "--read-only"))
        assert client.wait_closed(5) is not None
        assert "cannot go on: it is not offered as" in server.stderr()


@pytest.mark.parametrize(
    ("mode", "goes_on"),
    [("required", False), ("selective", False), ("off", True)],
    ids=["required", "selective", "off"],
)
def test_session_in_plain_text_ends_where_tls_is_required_by_now(
    keeper: Keeper, address: str, image: Path, tmp_path: Path, mode: str, goes_on: bool
) -> None:
    """Whoever requires it from this start on means everybody; an export needs it by default in mode selective."""
    identity = Authority(tmp_path / "ca").issue("server")
    tls = [f"--tls-certificate={identity.certificate_path}", f"--tls-key={identity.key_path}", f"--tls-mode={mode}"]
    keeper.start(*arguments(address, image))
    with connect_negotiated(address, "disk") as client:
        keeper.stop()
        server = keeper.start(*arguments(address, image, *tls))
        if goes_on:
            assert client.read(0, 512).data == pattern(0, 512)
        else:
            assert client.wait_closed(5) is not None
            assert "cannot go on: it takes TLS now" in server.stderr()


def test_failed_start_leaves_clients_for_the_next(keeper: Keeper, address: str, image: Path, tmp_path: Path) -> None:
    keeper.start(*arguments(address, image))
    with connect_negotiated(address, "disk") as client:
        keeper.stop()
        kept = list(keeper.kept)
        assert len(kept) == 2
        with pytest.raises(RuntimeError, match=r"missing\.img"):
            keeper.start(*arguments(address, tmp_path / "missing.img"))
        assert keeper.kept == kept
        keeper.start(*arguments(address, image))
        assert client.read(0, 4096).data == pattern(0, 4096)


def test_client_that_left_meanwhile_is_forgotten(keeper: Keeper, address: str, image: Path) -> None:
    keeper.start(*arguments(address, image))
    with connect_negotiated(address, "disk") as staying:
        with connect_negotiated(address, "disk"):
            keeper.stop()
        keeper.start(*arguments(address, image))
        assert staying.read(0, 512).data == pattern(0, 512)
    assert keeper.stop().count("detached from") == 2


def test_more_clients_than_the_manager_keeps_are_parted_from(tmp_path: Path, address: str, image: Path) -> None:
    with Keeper(tmp_path, room=3) as keeper, ExitStack() as stack:
        keeper.start(*arguments(address, image))
        clients = [stack.enter_context(connect_negotiated(address, "disk")) for _ in range(8)]
        keeper.restart(*arguments(address, image))
        going_on = [client for client in clients if client.wait_closed(0.5) is None]
        assert len(going_on) == 2
        for client in going_on:
            assert client.read(0, 512).data == pattern(0, 512)


@pytest.mark.parametrize("has_failed", [False, True], ids=["sound", "failed"])
def test_clients_of_an_image_whose_flush_failed_are_not_left(address: str, image: Path, has_failed: bool) -> None:
    """The next server would open it as if nothing had happened."""

    async def scenario() -> int:
        exports = (ExportConfig(str(image), "disk", format="raw"),)
        config = ServerConfig(exports, (NbdUri.parse(f"nbd+unix:///?socket={address}"),))
        async with serving(config) as service:
            client = await asyncio.to_thread(connect_negotiated, address, "disk")
            with client:
                (export,) = service.registry
                service.server.estate.is_open = True
                await service.drain()
                assert len(service.server.estate) == 1
                if has_failed:
                    export.image.gate.failure = "a flush failed"
        return len(service.server.estate)

    assert asyncio.run(scenario()) == (0 if has_failed else 1)


def test_clients_of_a_hidden_image_that_is_closed_during_the_drain_are_not_left_if_its_flush_failed(
    address: str, image: Path, tmp_path: Path
) -> None:
    async def scenario() -> Service:
        other = tmp_path / "other.img"
        other.write_bytes(bytes(MIB))
        exports = (ExportConfig(str(image), "disk", format="raw"), ExportConfig(str(other), "other", format="raw"))
        config = ServerConfig(exports, (NbdUri.parse(f"nbd+unix:///?socket={address}"),))
        async with serving(config) as service:
            client = await asyncio.to_thread(connect_negotiated, address, "disk")
            busy = await asyncio.to_thread(connect_negotiated, address, "other")
            with client, busy:
                write = busy.announce(busy.new_request(Command.WRITE, 0, MIB, 0, bytes(MIB)))
                await asyncio.to_thread(busy.send, write[: MIB // 2])
                await asyncio.to_thread(wait_until, lambda: unsent_bytes(busy) == 0, 5)
                (disk,) = service.exports["disk"]
                leaving = service.hide("disk")
                disk.image.gate.failure = "a flush failed"
                service.server.estate.is_open = True
                draining = asyncio.create_task(service.drain())
                await leaving.closing
                await asyncio.to_thread(busy.send, write[MIB // 2 :])
                await draining
        return service

    service = asyncio.run(scenario())
    assert len(service.server.estate) == 0
    assert [str(failure) for failure in service.failures] == [f"{image}: a flush failed"]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"version": 2, "clients": []}', b'{"version": 1, "clients": [{}]}'])
def test_state_that_cannot_be_read_parts_from_the_clients(content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        state = os.memfd_create("state")
        os.write(state, content)
        notifier = Notifier({})
        assert claim(Inheritance([], {CLIENT_NAME: [ours.detach()], STATE_NAME: [state]}), notifier) == []
        notifier.close()
        with theirs:
            assert theirs.recv(1) == b""

    asyncio.run(scenario())
    assert "of the server before this one cannot be read" in caplog.text


def test_clients_whom_the_manager_cannot_be_told_to_forget_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It would give them, as they were then, to the server after this one too."""
    monkeypatch.setattr(systemd, "KEEP_TIMEOUT_S", 0.05)

    async def scenario() -> None:
        path = str(tmp_path / "notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(path)
            notifier = Notifier({"NOTIFY_SOCKET": path})
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as others, suppress(BlockingIOError):
                others.setblocking(False)
                while True:
                    others.sendto(b"STATUS=busy", path)
            ours, theirs = socket.socketpair()
            with theirs, ours.dup():
                assert claim(Inheritance([], {CLIENT_NAME: [ours.detach()]}), notifier) == []
                theirs.settimeout(5)
                assert theirs.recv(1) == b""
            notifier.close()

    asyncio.run(scenario())
    assert "cannot be taken back from the service manager: timed out" in caplog.text
