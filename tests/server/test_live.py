"""Exports added, removed, resized and kept as snapshots on a running server, while others work."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nbdimg import formats
from nbdimg.config import AccessRule, ExportConfig, ServerConfig, TlsConfig
from nbdimg.errors import ConfigError, ImageError, ImageFailed, ImageLocked, NotThere, UnsupportedFeature
from nbdimg.formats import create_image, gate, keys
from nbdimg.formats.qcow2.driver import Qcow2Driver
from nbdimg.formats.vhdx import create as vhdx
from nbdimg.formats.vhdx.parent import read_parent
from nbdimg.limits import Limits
from nbdimg.server import checks, live, overlays, reload, sandbox
from nbdimg.server.checks import check_config, named
from nbdimg.server.live import RemoveMode
from nbdimg.storage.posix import PosixFile
from nbdimg.uri import NbdUri
from tests.server.controlled import AtWork, ControlledServer, Worker
from tests.server.tls_live import LiveServer, client_context, tls_client
from tests.support.certificates import Authority
from tests.support.configured import answers
from tests.support.qcow2edit import qemu_img
from tests.support.rawclient import Client
from tests.support.rawprotocol import MIB, Command, ConnectionClosed, NbdError, Option, Rep, info_data
from tests.support.rss import wait_until
from tests.support.threaded import WAIT_S

FORMATS = ("raw", "qcow2", "vhdx")
SIZE = 4 * MIB
EXPORT_COUNT = 100

Make = Callable[..., ExportConfig]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes an empty image `NAME.img` of a format, and its export's configuration."""

    def make(name: str, format: str = "raw", size: int = SIZE, **more: object) -> ExportConfig:
        path = tmp_path / f"{name}.img"
        create_image(path, size, format=format)
        return replace(ExportConfig(str(path), name, format), **more)  # type: ignore[arg-type]

    return make


@pytest.fixture
def served(tmp_path: Path, make: Make) -> Iterator[ControlledServer]:
    """A server of the raw export "keep"."""
    with ControlledServer(tmp_path, make("keep")) as server:
        yield server


def is_known(server: ControlledServer, name: str) -> bool:
    with Client(server.socket_path) as client:
        client.greet()
        return client.option(Option.INFO, info_data(name, ()))[-1].type == Rep.ACK


def assert_works(client: Client, fill: bytes = b"w") -> None:
    assert client.write(0, fill * 4096).error == 0
    assert client.read(0, 4096).data == fill * 4096


# What there is


def test_states_tell_exports_and_clients(tmp_path: Path, make: Make) -> None:
    disk = make("disk", "qcow2", description="a disk")
    with ControlledServer(tmp_path, disk, make("fixed", is_read_only=True)) as server:
        server.ask(server.control.add(make("more", "vhdx")))
        with server.connect("disk"), server.connect("disk") as client, server.connect("fixed"):
            state, fixed, more = server.now(server.control.exports)
            assert (state.name, state.path, state.format, state.size) == ("disk", disk.path, "qcow2", SIZE)
            assert (state.connections, state.in_flight, state.origin, state.failure) == (2, 0, "config", None)
            assert (state.description, state.is_read_only, state.is_snapshot) == ("a disk", False, False)
            assert (fixed.is_read_only, fixed.connections) == (True, 1)
            assert (more.format, more.origin, more.connections) == ("vhdx", "live", 0)
            first, second, third = server.now(server.control.clients)
            assert (first.export, second.export, third.export) == ("disk", "disk", "fixed")
            assert first.id < second.id < third.id
            assert (third.is_read_only, second.is_read_only, second.tls) == (True, False, None)
            assert second.peer.startswith("unix")
            assert first.since >= second.since >= 0
            assert [each.id for each in server.now(server.control.clients, "fixed")] == [third.id]
            client.close()
            assert wait_until(lambda: server.look()["disk"] == 1, WAIT_S)


def test_client_state_tells_tls_and_identities(tmp_path: Path, make: Make) -> None:
    authority = Authority(tmp_path)
    own, person = authority.issue("server"), authority.issue("client", common_name="person")
    tls = TlsConfig(str(own.certificate_path), str(own.key_path), str(authority.path))
    with (
        ControlledServer(tmp_path, make("disk"), tls=tls) as server,
        tls_client(server.socket_path, client_context(authority, person)) as client,
    ):
        client.negotiate("disk")
        (state,) = server.now(server.control.clients)
        assert state.tls == "TLSv1.3"
        assert "cn:person" in state.identities


def test_unknown_names_are_refused_and_a_few_that_exist_are_named(served: ControlledServer) -> None:
    control = served.control
    with pytest.raises(ConfigError, match="no export 'nobody', known are 'keep'"):
        served.now(control.export, "nobody")
    for operation in (
        control.remove("nobody", "drain"),
        control.resize("nobody", SIZE),
        control.snapshot_create("nobody", "one"),
        control.snapshots("nobody"),
    ):
        with pytest.raises(ConfigError, match="no export 'nobody'"):
            served.ask(operation)
    with pytest.raises(ConfigError, match="no client 0"):
        served.ask(control.disconnect(0))
    with pytest.raises(ConfigError, match="no export ''"):
        served.now(control.export, "")


# Coming and going


@pytest.mark.parametrize("format", FORMATS)
def test_added_export_is_served_and_others_notice_nothing(served: ControlledServer, make: Make, format: str) -> None:
    with AtWork(served, "keep"):
        assert served.ask(served.control.add(make("new", format))) == ["new"]
        with served.connect("new") as client:
            assert_works(client)
        served.ask(served.control.remove("new", "drain"))
        assert not is_known(served, "new")
        assert served.ask(served.control.add(replace(make("other", format), name=None))) == ["other"]
    assert [uri.name for uri in served.service.uris] == ["keep", "other"]


def test_image_of_an_export_that_is_refused_is_given_back(served: ControlledServer, make: Make) -> None:
    config = make("disk")
    with pytest.raises(ConfigError, match="the minimum block size is 3"):
        served.ask(served.control.add(replace(config, block_size_min=3)))
    assert served.ask(served.control.add(config)) == ["disk"]


def test_image_whose_snapshot_has_a_taken_name_is_refused_whole(served: ControlledServer, make: Make) -> None:
    disk = make("disk", "qcow2")
    qemu_img("snapshot", "-c", "one", disk.path)
    served.ask(served.control.add(make("disk@one")))
    with pytest.raises(ConfigError, match="two exports are named 'disk@one'"):
        served.ask(served.control.add(disk))
    assert not is_known(served, "disk")
    assert served.ask(served.control.add(replace(disk, name="other"))) == ["other", "other@one"]


def test_image_that_is_written_has_no_second_export_whatever_their_order(make: Make, tmp_path: Path) -> None:
    writer = make("disk")
    link = tmp_path / "link"
    link.symlink_to(writer.path)
    reader = replace(writer, name="reader", path=str(link), is_read_only=True)
    for exports in ((writer, reader), (reader, writer)):
        with pytest.raises(ConfigError, match="is exported twice, expected once unless all its exports are read-only"):
            check_config(ServerConfig(exports))
    check_config(ServerConfig((reader, replace(reader, name="other", path=writer.path))))


def test_format_that_is_named_is_taken_whatever_the_image_begins_with(served: ControlledServer, make: Make) -> None:
    """Or a guest that writes a header chooses which file of this machine it reads as its backing file."""
    served.ask(served.control.add(replace(make("disk", "qcow2"), format="raw")))
    with served.connect("disk") as client:
        assert client.read(0, 4).data == b"QFI\xfb"


def test_added_export_that_cannot_be_changes_nothing(served: ControlledServer, make: Make, tmp_path: Path) -> None:
    add = served.control.add
    with AtWork(served, "keep"):
        with pytest.raises(ConfigError, match="export 'keep' already"):
            served.ask(add(replace(make("other"), name="keep")))
        with pytest.raises(ImageLocked):
            served.ask(add(ExportConfig(str(tmp_path / "keep.img"), "second", "raw")))
        with pytest.raises(ImageError, match="No such file"):
            served.ask(add(ExportConfig(str(tmp_path / "missing"), "second")))
        with pytest.raises(ConfigError, match="unknown format"):
            served.ask(add(replace(make("third"), format="vdi")))
        with pytest.raises(ConfigError, match="needs TLS"):
            served.ask(add(replace(make("fourth"), access=(AccessRule(identities=("cn:x",)),))))
        assert list(served.look()) == ["keep"]


def test_key_file_that_nobody_writes_holds_up_no_client_and_the_operation_not_for_ever(
    served: ControlledServer, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "KEY_FILE_PATIENCE_S", 1.0)
    key = tmp_path / "key"
    os.mkfifo(key)
    added = served.start(served.control.add(replace(make("keyed"), key_path=str(key))))
    with served.connect("keep") as client:
        assert client.read(0, 512).error == 0
        assert not added.done()
    with pytest.raises(ConfigError, match="it is a FIFO"):
        added.result(WAIT_S)


def hanging(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> tuple[threading.Event, threading.Event]:
    """Have a function wait from now on. Returns what is set when it is called, and what lets it go on."""
    is_called, is_back, follow = threading.Event(), threading.Event(), getattr(module, name)

    def hang(*arguments: Any, **more: Any) -> object:
        is_called.set()
        assert is_back.wait(WAIT_S)
        return follow(*arguments, **more)

    monkeypatch.setattr(module, name, hang)
    return is_called, is_back


def assert_waits_alone(
    served: ControlledServer, work: Future[Any], is_called: threading.Event, is_back: threading.Event
) -> None:
    """`work` waits for what `hanging` made wait, which goes on thereafter; a client of "keep" is served meanwhile."""
    try:
        assert is_called.wait(WAIT_S)
        with served.connect("keep") as client:
            assert client.read(0, 512).error == 0
            assert not work.done()
    finally:
        is_back.set()


@pytest.mark.parametrize(("module", "name"), [(sandbox, "check_export"), (formats, "PosixFile"), (overlays, "Golden")])
def test_path_that_hangs_holds_up_no_client(
    served: ControlledServer, make: Make, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> None:
    """As on a network file system without its server: the addition waits where links are followed, and at the opens."""
    config = make("disk", overlay="per-client")
    is_called, is_back = hanging(monkeypatch, module, name)
    added = served.start(served.control.add(config))
    assert_waits_alone(served, added, is_called, is_back)
    assert added.result(WAIT_S) == ["disk"]


@pytest.mark.parametrize(
    ("module", "name"), [(formats, "lock_image"), (gate, "Root"), (gate, "lock_image"), (gate, "_directory_of")]
)
def test_chain_that_hangs_holds_up_no_client(
    served: ControlledServer, make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: ModuleType, name: str
) -> None:
    """Only what lies below is on storage that hangs: a parent, which the operator names, for one."""
    base, child = make("base", "vhdx").path, str(tmp_path / "child.img")
    vhdx.create(child, None, vhdx.CreateOptions("differencing", parent=asyncio.run(read_parent(base))))
    config = ExportConfig(child, "disk", "vhdx", parent_path=base)
    is_called, is_back = hanging(monkeypatch, module, name)
    added = served.start(served.control.add(config))
    assert_waits_alone(served, added, is_called, is_back)
    assert added.result(WAIT_S) == ["disk"]


def test_reason_of_a_path_that_hangs_holds_up_no_client(
    served: ControlledServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_called, is_back = hanging(monkeypatch, sandbox, "reason")
    added = served.start(served.control.add(replace(make("disk"), path="/nowhere/disk.img")))
    assert_waits_alone(served, added, is_called, is_back)
    with pytest.raises(ImageError, match="No such file"):
        added.result(WAIT_S)


@pytest.mark.parametrize(("module", "name"), [(checks, "image_of"), (sandbox, "check"), (reload, "image_of")])
def test_reload_of_a_path_that_hangs_holds_up_no_client(
    served: ControlledServer, make: Make, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> None:
    is_called, is_back = hanging(monkeypatch, module, name)
    served.wanted = replace(served.wanted, exports=(*served.wanted.exports, make("disk")))
    reloaded = served.start(served.control.reload())
    assert_waits_alone(served, reloaded, is_called, is_back)
    assert reloaded.result(WAIT_S)
    assert set(served.look()) == {"keep", "disk"}


def test_hidden_export_serves_its_clients_until_they_leave(served: ControlledServer, make: Make) -> None:
    config = make("disk", "qcow2")
    served.ask(served.control.add(config))
    with AtWork(served, "keep"), served.connect("disk") as client:
        served.ask(served.control.remove("disk", "hide"))
        assert not is_known(served, "disk")
        assert_works(client)
        state = served.now(served.control.export, "disk")
        assert (state.is_hidden, state.connections) == (True, 1)
        with pytest.raises(ConfigError, match="still open for clients of 'disk', which was removed"):
            served.ask(served.control.add(config))
        with pytest.raises(ConfigError, match="no export 'disk'"):
            served.ask(served.control.resize("disk", 2 * SIZE))
        assert_works(client)
        client.disconnect()
        assert wait_until(lambda: list(served.look()) == ["keep"], WAIT_S)
        assert served.ask(served.control.add(config)) == ["disk"]
        with served.connect("disk") as again:
            assert again.read(0, 4096).data == b"w" * 4096


@pytest.mark.parametrize("mode", ["drain", "hard"])
@pytest.mark.parametrize("is_hidden", [False, True])
def test_removed_export_is_closed_on_return(
    served: ControlledServer, make: Make, mode: RemoveMode, is_hidden: bool
) -> None:
    config = make("disk")
    served.ask(served.control.add(config))
    with AtWork(served, "keep"), served.connect("disk") as client:
        assert_works(client)
        if is_hidden:
            served.ask(served.control.remove("disk", "hide"))
        served.ask(served.control.remove("disk", mode))
        assert client.wait_closed(WAIT_S) is not None
        assert list(served.look()) == ["keep"]
        served.ask(served.control.add(replace(config, name="again")))


def test_removal_and_reload_wait_for_no_storage_but_their_own(
    served: ControlledServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_back = asyncio.Event()

    async def flush() -> None:
        await is_back.wait()

    monkeypatch.setattr(served.service.exports["keep"][0].image, "flush", flush)
    served.ask(served.control.add(make("disk")))
    keep = served.wanted
    served.wanted = replace(keep, exports=(*keep.exports, make("other")))
    assert served.ask(served.control.reload())
    with served.connect("keep") as client:
        client.send_requests([client.new_request(Command.FLUSH)])
        assert wait_until(lambda: served.now(served.control.export, "keep").in_flight == 1, WAIT_S)
        try:
            served.ask(served.control.remove("disk", "hard"))
            served.wanted = keep
            assert served.ask(served.control.reload())
            assert served.look() == {"keep": 1}
        finally:
            served.now(is_back.set)
        assert client.read_reply().error == 0


def test_stop_closes_images_though_storage_hangs_under_another(
    served: ControlledServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or who loses patience with the server loses what is stored at the end, dirty bitmaps for one."""
    is_back = asyncio.Event()

    async def hanging() -> None:
        await is_back.wait()

    keep = served.service.exports["keep"][0].image
    served.ask(served.control.add(make("other", "qcow2")))
    other = served.service.exports["other"][0].image.driver.file
    assert isinstance(other, PosixFile)
    monkeypatch.setattr(keep, "flush", hanging)
    with served.connect("keep") as client:
        client.send_requests([client.new_request(Command.FLUSH)])
        assert wait_until(lambda: served.now(served.control.export, "keep").in_flight == 1, WAIT_S)
        closing = served.start(served.service.server.close())
        try:
            assert wait_until(lambda: other.descriptor < 0, WAIT_S)
            assert not closing.done()
        finally:
            served.now(is_back.set)
        assert closing.result(WAIT_S) == []


def test_stop_closes_images_to_their_end_though_another_fails_unforeseen(
    served: ControlledServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = served.service.exports["keep"][0].image
    served.ask(served.control.add(make("other", "qcow2")))
    other = served.service.exports["other"][0].image
    file, flush = other.driver.file, other.flush
    assert isinstance(file, PosixFile)

    async def failing() -> None:
        raise AssertionError("nobody foresaw it")

    async def slow() -> None:
        for _ in range(100):
            await asyncio.sleep(0)
        await flush()

    async def stop() -> int:
        with pytest.raises(AssertionError, match="nobody foresaw it"):
            await served.service.server.close()
        return file.descriptor

    with monkeypatch.context() as patch:
        patch.setattr(keep, "close", failing)
        patch.setattr(other, "flush", slow)
        assert served.ask(stop()) < 0


def test_removals_at_once_join_and_what_comes_behind_finds_nothing(served: ControlledServer, make: Make) -> None:
    served.ask(served.control.add(make("disk")))

    async def at_once() -> list[object]:
        changes: list[Awaitable[object]] = [served.control.remove("disk", "drain") for _ in range(3)]
        changes.append(served.control.resize("disk", 2 * SIZE))
        return await asyncio.gather(*changes, return_exceptions=True)

    with served.connect("disk") as client:
        assert_works(client)
        *removals, resize = served.ask(at_once())
    assert removals == [None] * 3
    assert isinstance(resize, NotThere)


def test_drain_of_a_client_that_stays_can_be_cut_short(tmp_path: Path, make: Make) -> None:
    """It takes no reply, so what it has asked for is not answered for a long time."""
    size = 64 * MIB
    limits = Limits(drain_timeout_s=300)
    with ControlledServer(tmp_path, make("keep"), make("disk", size=size), limits=limits) as server:
        Path(server.now(server.control.export, "disk").path).write_bytes(b"d" * size)
        with server.connect("disk") as client:
            client.send_requests(client.reads(8, 8 * MIB, stride=8 * MIB))
            client.receive(1)
            draining = server.start(server.control.remove("disk", "drain"))
            assert wait_until(lambda: not is_known(server, "disk"), WAIT_S)
            server.ask(server.control.add(make("other")))
            assert not draining.done()
            server.ask(server.control.remove("disk", "hard"))
            draining.result(WAIT_S)
        assert list(server.look()) == ["keep", "other"]


@pytest.mark.parametrize("is_hard", [False, True])
def test_disconnected_client_is_gone_and_others_stay(served: ControlledServer, is_hard: bool) -> None:
    with AtWork(served, "keep"), served.connect("keep") as client:
        served.now(served.service.server.set_limits, Limits(drain_timeout_s=2 * WAIT_S))
        newest = served.now(served.control.clients)[-1]
        served.ask(served.control.disconnect(newest.id, is_hard))
        assert client.wait_closed(WAIT_S) is not None
        assert newest.id not in [each.id for each in served.now(served.control.clients)]


def test_operation_goes_on_when_its_caller_is_cancelled(served: ControlledServer, make: Make) -> None:
    async def cancelled() -> None:
        task = asyncio.create_task(served.control.add(make("disk")))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    served.ask(cancelled())
    assert wait_until(lambda: "disk" in served.look(), WAIT_S)


def test_removal_whose_caller_is_cancelled_before_its_turn_sees_clients_off(
    served: ControlledServer, make: Make
) -> None:
    async def cancelled() -> None:
        async with served.service.lock:
            task = asyncio.create_task(served.control.remove("disk", "hard"))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    served.ask(served.control.add(make("disk")))
    with served.connect("disk") as client:
        served.ask(cancelled())
        assert client.wait_closed(WAIT_S) is not None
    assert wait_until(lambda: not is_known(served, "disk"), WAIT_S)


def test_operation_on_a_server_that_stops_is_refused(served: ControlledServer, make: Make) -> None:
    served.service.registry.is_shutting_down = True
    with pytest.raises(ConfigError, match="the server stops"):
        served.ask(served.control.add(make("disk")))


def test_reload_that_is_refused_gives_back_what_it_had_opened(served: ControlledServer, make: Make) -> None:
    new = make("new")
    missing = replace(new, name="missing", path=f"{new.path}.missing")
    served.wanted = replace(served.wanted, exports=(*served.wanted.exports, new, missing))
    assert not served.ask(served.control.reload())
    assert served.ask(served.control.add(new)) == ["new"]


def test_reload_of_a_server_that_stops_is_refused(served: ControlledServer, make: Make, tmp_path: Path) -> None:
    """Or it would listen again."""
    new, late = make("new"), NbdUri(socket=str(tmp_path / "late"))
    served.now(setattr, served.service.registry, "is_shutting_down", True)
    served.wanted = replace(served.wanted, exports=(*served.wanted.exports, new), listeners=(late,))
    assert not served.ask(served.control.reload())
    assert served.now(lambda: served.control.refusal) == "nothing was reloaded: the server stops"
    assert not answers(str(late.socket))
    assert list(served.look()) == ["keep"]


def test_stop_flushes_what_is_hidden(tmp_path: Path, make: Make) -> None:
    with ControlledServer(tmp_path, make("keep")) as server:
        server.ask(server.control.add(make("disk", "qcow2")))
        client = server.connect("disk")
        assert_works(client)
        server.ask(server.control.remove("disk", "hide"))
    client.close()
    raw = tmp_path / "raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", tmp_path / "disk.img", raw)
    assert raw.read_bytes()[:4096] == b"w" * 4096


def test_stop_flushes_images_though_the_socket_file_is_out_of_reach(
    tmp_path: Path, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    with ControlledServer(directory, make("disk", "qcow2")) as server:
        with server.connect("disk") as client:
            assert_works(client)
        directory.rename(tmp_path / "elsewhere")
        directory.touch()
    raw = tmp_path / "raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", tmp_path / "disk.img", raw)
    assert raw.read_bytes()[:4096] == b"w" * 4096
    assert f"socket {directory}/s cannot be removed: Not a directory" in caplog.text


def test_stop_waits_for_no_client_of_a_snapshot_that_is_being_deleted(tmp_path: Path, make: Make) -> None:
    """Also of a server without a configuration file, and so without a reloader."""
    limits = Limits(drain_timeout_s=300)
    config = ServerConfig((make("disk", "qcow2"),), (NbdUri(socket=str(tmp_path / "s")),), limits)
    with LiveServer(config) as server:
        control = live.Control(server.service, None)
        server.ask(control.snapshot_create("disk", "old"))
        client = Client(str(tmp_path / "s"))
        client.greet()
        client.negotiate("disk@old", structured=False)
        client.send_requests(client.reads(16, SIZE))
        client.receive(1)
        deleting = server.start(control.snapshot_delete("disk", "old"))
        assert wait_until(lambda: "disk@old" not in server.service.registry, WAIT_S)
    client.close()
    deleting.result(WAIT_S)


def test_hard_removal_waits_for_no_client_of_a_snapshot_that_is_being_deleted(tmp_path: Path, make: Make) -> None:
    limits = Limits(drain_timeout_s=300)
    with ControlledServer(tmp_path, make("disk", "qcow2"), limits=limits) as server:
        with server.connect("disk") as client:
            assert client.write(0, b"w" * SIZE).error == 0
        server.ask(server.control.snapshot_create("disk", "old"))
        with server.connect("disk@old") as client:
            client.send_requests(client.reads(16, SIZE))
            client.receive(1)
            deleting = server.start(server.control.snapshot_delete("disk", "old"))
            assert wait_until(lambda: "disk@old" not in server.look(), WAIT_S)
            server.ask(server.control.remove("disk", "hard"))
            deleting.result(WAIT_S)


def test_hidden_client_is_given_the_time_of_all_others_when_the_server_stops(
    served: ControlledServer, make: Make
) -> None:
    """The end hurries those that were made to go; it was not."""
    served.ask(served.control.add(make("disk")))
    with served.connect("disk") as client:
        served.ask(served.control.remove("disk", "hide"))
        served.now(served.service.server.hasten)
        assert_works(client)
        assert served.now(served.control.export, "disk").connections == 1


def test_100_exports_come_and_go_under_load(served: ControlledServer, make: Make) -> None:
    configs = [make(f"x{index}", FORMATS[index % 3]) for index in range(EXPORT_COUNT)]
    modes: list[RemoveMode] = ["hide", "drain", "hard"]
    with AtWork(served, "keep", "keep"):
        for index, config in enumerate(configs):
            served.ask(served.control.add(config))
            with served.connect(f"x{index}") as client:
                assert_works(client, bytes([index]))
                if index % 2:
                    client.disconnect()
        assert len(served.look()) == EXPORT_COUNT + 1
        for index in range(EXPORT_COUNT):
            served.ask(served.control.remove(f"x{index}", modes[index % 3]))
        assert wait_until(lambda: list(served.look()) == ["keep"], WAIT_S)


def test_control_worker_whose_export_is_removed_is_noticed(served: ControlledServer, make: Make) -> None:
    served.ask(served.control.add(make("disk")))
    worker = Worker(served, "disk")
    worker.start()
    assert wait_until(lambda: worker.count > 0, WAIT_S)
    served.ask(served.control.remove("disk", "hard"))
    worker.finish()
    assert isinstance(worker.error, ConnectionClosed)


def test_control_worker_whose_data_another_overwrites_is_noticed(served: ControlledServer) -> None:
    worker = Worker(served, "keep")
    worker.start()
    with served.connect("keep") as client:
        assert wait_until(lambda: bool(client.write(0, bytes(MIB)).error or worker.error), WAIT_S)
    worker.finish()
    assert isinstance(worker.error, AssertionError)


# Another size


@pytest.mark.parametrize("format", FORMATS)
def test_growth_is_seen_by_running_and_new_connections(
    served: ControlledServer, make: Make, tmp_path: Path, format: str
) -> None:
    served.ask(served.control.add(make("disk", format)))
    new = SIZE + 3 * MIB
    with AtWork(served, "keep", "disk"), served.connect("disk") as client:
        assert client.write(SIZE, b"x" * 4096).error == NbdError.ENOSPC
        assert served.ask(served.control.resize("disk", new)).size == new
        assert client.write(new - 4096, b"y" * 4096).error == 0
        assert client.read(new - 8192, 8192).data == bytes(4096) + b"y" * 4096
        with served.connect("disk") as second:
            assert second.export.size == new
        assert client.write(new, b"x" * 4096).error == NbdError.ENOSPC
        assert client.read(new, 4096).error == NbdError.EINVAL
    served.ask(served.control.remove("disk", "drain"))
    path = tmp_path / "disk.img"
    assert json.loads(qemu_img("info", "-f", format, "--output=json", path).stdout)["virtual-size"] == new
    if format == "qcow2":
        qemu_img("check", "-q", "-f", format, path)
    raw = tmp_path / "disk.raw"
    qemu_img("convert", "-f", format, "-O", "raw", path, raw)
    assert raw.read_bytes()[SIZE:] == bytes(new - SIZE - 4096) + b"y" * 4096


@pytest.mark.parametrize("format", FORMATS)
def test_shrinking_takes_leave_and_running_connections_lose_what_is_behind(
    served: ControlledServer, make: Make, format: str
) -> None:
    served.ask(served.control.add(make("disk", format)))
    new = 2 * MIB
    with AtWork(served, "keep", "disk"), served.connect("disk") as client:
        assert client.write(SIZE - 4096, b"x" * 4096).error == 0
        with pytest.raises(ConfigError, match="takes shrink"):
            served.ask(served.control.resize("disk", new))
        assert client.read(SIZE - 4096, 4096).data == b"x" * 4096
        assert served.ask(served.control.resize("disk", new, shrink=True)).size == new
        assert client.write(new, b"x" * 512).error == NbdError.ENOSPC
        assert client.request(Command.WRITE_ZEROES, SIZE - 4096, 4096).error == NbdError.ENOSPC
        assert client.request(Command.TRIM, new, 4096).error == NbdError.EINVAL
        assert client.read(SIZE - 4096, 4096).error == NbdError.EINVAL
        assert client.read(new - 4096, 4096).error == 0
        served.ask(served.control.resize("disk", SIZE))
        assert client.read(SIZE - 4096, 4096).data == bytes(4096)


@pytest.mark.parametrize("format", FORMATS)
def test_changes_of_a_size_that_are_asked_for_at_once_add_up(served: ControlledServer, make: Make, format: str) -> None:
    served.ask(served.control.add(make("disk", format)))

    async def both() -> list[int]:
        grow = [served.control.resize("disk", MIB, is_change=True) for _ in range(2)]
        return [each.size for each in await asyncio.gather(*grow)]

    assert sorted(served.ask(both())) == [SIZE + MIB, SIZE + 2 * MIB]
    with pytest.raises(ConfigError, match="takes shrink"):
        served.ask(served.control.resize("disk", -MIB, is_change=True))
    assert served.ask(served.control.resize("disk", -3 * MIB, is_change=True, shrink=True)).size == SIZE - MIB
    for fewer, reason in ((SIZE, f"of which {SIZE} cannot be taken away"), (SIZE - MIB, "to 0 bytes")):
        with pytest.raises(ConfigError, match=reason):
            served.ask(served.control.resize("disk", -fewer, is_change=True, shrink=True))
    assert served.ask(served.control.resize("disk", 1, is_change=True)).size == SIZE - MIB + (1, 512)[format != "raw"]


@pytest.mark.parametrize("format", FORMATS)
def test_size_that_cannot_be_is_refused_and_clients_go_on(served: ControlledServer, make: Make, format: str) -> None:
    served.ask(served.control.add(make("disk", format)))
    with AtWork(served, "keep", "disk"):
        with pytest.raises(ConfigError):
            served.ask(served.control.resize("disk", 1 << 63))
        assert served.now(served.control.export, "disk").failure is None
        assert served.now(served.control.export, "disk").size == SIZE


def test_resize_of_what_does_not_change_is_refused(tmp_path: Path, make: Make) -> None:
    with ControlledServer(tmp_path, make("fixed", is_read_only=True), make("disk", "qcow2")) as server:
        with pytest.raises(ConfigError, match="open read-only"):
            server.ask(server.control.resize("fixed", 2 * SIZE))
        server.ask(server.control.snapshot_create("disk", "one"))
        with pytest.raises(ConfigError, match="is a snapshot"):
            server.ask(server.control.resize("disk@one", 2 * SIZE))


def test_resize_serves_whole_blocks_of_the_minimum_size(tmp_path: Path, make: Make) -> None:
    with ControlledServer(tmp_path, make("disk", block_size_min=4096)) as server:
        assert server.ask(server.control.resize("disk", SIZE + 5000)).size == SIZE + 4096


def test_resize_leaves_bitmaps_consistent_on_disk(tmp_path: Path, make: Make) -> None:
    """A crash between a resize and the next change costs none of them."""
    config = make("disk", "qcow2")
    qemu_img("bitmap", "--add", "-f", "qcow2", config.path, "on")
    qemu_img("bitmap", "--add", "--disable", "-f", "qcow2", config.path, "off")
    copy = tmp_path / "copy"
    with ControlledServer(tmp_path, config) as server, server.connect("disk") as client:
        assert_works(client)
        assert _in_use(config.path, copy) == {"on": True, "off": False}
        server.ask(server.control.resize("disk", 2 * SIZE))
        assert _in_use(config.path, copy) == {"on": False, "off": False}
        assert_works(client)
        assert _in_use(config.path, copy) == {"on": True, "off": False}
    assert _in_use(config.path, copy) == {"on": False, "off": False}


def _in_use(path: str, copy: Path) -> dict[str, bool]:
    """Which bitmaps a crash now would cost, as qemu-img sees it."""
    copy.write_bytes(Path(path).read_bytes())
    info = json.loads(qemu_img("info", "-f", "qcow2", "--output=json", copy).stdout)
    return {each["name"]: "in-use" in each["flags"] for each in info["format-specific"]["data"]["bitmaps"]}


# Snapshots


def test_snapshot_keeps_the_old_content_while_the_writer_goes_on(
    served: ControlledServer, make: Make, tmp_path: Path
) -> None:
    served.ask(served.control.add(make("disk", "qcow2")))
    last = SIZE - 4096
    with AtWork(served, "keep", "disk"), served.connect("disk") as client:
        assert client.write(last, b"1" * 4096).error == 0
        made = served.ask(served.control.snapshot_create("disk", "one"))
        assert (made.name, made.size, made.export) == ("one", SIZE, "disk@one")
        assert client.write(last, b"2" * 4096).error == 0
        served.ask(served.control.snapshot_create("disk", "two"))
        assert client.write(last, b"3" * 4096).error == 0
        for name, byte in (("disk@one", b"1"), ("disk@two", b"2"), ("disk", b"3")):
            with served.connect(name) as reader:
                assert reader.read(last, 4096).data == byte * 4096
        states = served.ask(served.control.snapshots("disk"))
        assert [(each.name, each.export) for each in states] == [("one", "disk@one"), ("two", "disk@two")]
        assert served.now(served.control.export, "disk@two").is_snapshot
        with served.connect("disk@one") as reader:
            served.ask(served.control.snapshot_delete("disk", "one"))
            assert reader.wait_closed(WAIT_S) is not None
        assert not is_known(served, "disk@one")
        assert client.write(last - 65536, b"4" * 65536).error == 0
        with served.connect("disk@two") as reader:
            assert reader.read(last, 4096).data == b"2" * 4096
        assert [each.name for each in served.ask(served.control.snapshots("disk"))] == ["two"]
    served.ask(served.control.remove("disk", "drain"))
    assert list(served.look()) == ["keep"]
    path = tmp_path / "disk.img"
    qemu_img("check", "-q", "-f", "qcow2", path)
    raw = tmp_path / "disk.raw"
    qemu_img("convert", "-f", "qcow2", "-l", "two", "-O", "raw", path, raw)
    assert raw.read_bytes()[last:] == b"2" * 4096


def test_snapshot_of_writes_that_nobody_flushed_survives_a_crash(tmp_path: Path, make: Make) -> None:
    config = make("disk", "qcow2")
    copy = tmp_path / "copy"
    with ControlledServer(tmp_path, config) as server, server.connect("disk") as client:
        assert_works(client, b"1")
        server.ask(server.control.snapshot_create("disk", "one"))
        copy.write_bytes(Path(config.path).read_bytes())
    raw = tmp_path / "raw"
    qemu_img("convert", "-f", "qcow2", "-l", "one", "-O", "raw", copy, raw)
    assert raw.read_bytes()[:4096] == b"1" * 4096


def test_snapshot_that_cannot_be_is_refused(tmp_path: Path, make: Make) -> None:
    exports = (make("disk", "qcow2"), make("disk@taken"), make("old", "vhdx"))
    with ControlledServer(tmp_path, *exports) as server:
        create, delete = server.control.snapshot_create, server.control.snapshot_delete
        with AtWork(server, "disk", "old"):
            for name in ("old", "disk@taken"):
                with pytest.raises(UnsupportedFeature, match="have no snapshots, qcow2 images do"):
                    server.ask(create(name, "one"))
                assert server.ask(server.control.snapshots(name)) == []
            with pytest.raises(ConfigError, match="export 'disk@taken' already"):
                server.ask(create("disk", "taken"))
            with pytest.raises(ConfigError, match="the snapshot name '' has 0 bytes"):
                server.ask(create("disk", ""))
            server.ask(create("disk", "one"))
            with pytest.raises(ConfigError, match="already"):
                server.ask(create("disk", "one"))
            with pytest.raises(ConfigError, match="is a snapshot"):
                server.ask(create("disk@one", "two"))
            with pytest.raises(ConfigError, match="is a snapshot"):
                server.ask(server.control.remove("disk@one", "drain"))
            with pytest.raises(ConfigError, match="there is no snapshot 'two'"):
                server.ask(delete("disk", "two"))
            assert server.now(server.control.export, "disk").failure is None


def test_snapshot_without_space_is_refused_with_the_images_name_and_clients_go_on(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(self: PosixFile, offset: int, data: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = make("disk", "qcow2")
    with ControlledServer(tmp_path, config) as server, server.connect("disk") as client:
        assert_works(client, b"1")
        assert client.request(Command.FLUSH).error == 0
        with monkeypatch.context() as patch:
            patch.setattr(PosixFile, "pwrite", full)
            with pytest.raises(OSError, match="No space left on device") as refusal:
                server.ask(server.control.snapshot_create("disk", "one"))
        assert refusal.value.filename == config.path
        assert_works(client, b"2")
        assert client.request(Command.FLUSH).error == 0
        server.ask(server.control.snapshot_create("disk", "one"))


def test_snapshot_that_cannot_be_deleted_is_exported_again(
    served: ControlledServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(driver: Qcow2Driver, snapshot_id: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    served.ask(served.control.add(make("disk", "qcow2")))
    served.ask(served.control.snapshot_create("disk", "one"))
    with monkeypatch.context() as patch:
        patch.setattr(live, "delete_snapshot", full)
        with pytest.raises(OSError, match="No space left on device"):
            served.ask(served.control.snapshot_delete("disk", "one"))
    assert list(served.look()) == ["keep", "disk", "disk@one"]
    with served.connect("disk@one") as client:
        assert client.read(0, 4096).data == bytes(4096)
    served.ask(served.control.snapshot_delete("disk", "one"))
    assert list(served.look()) == ["keep", "disk"]


def test_snapshot_of_an_image_that_was_renamed_is_not_another_files(
    served: ControlledServer, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make("disk", "qcow2")
    served.ask(served.control.add(config))
    os.rename(config.path, tmp_path / "moved.img")
    make("disk", "qcow2")
    qemu_img("snapshot", "-c", "other", config.path)
    made = served.ask(served.control.snapshot_create("disk", "s"))
    assert (made.name, made.export) == ("s", None)
    assert list(served.look()) == ["keep", "disk"]
    assert "snapshot 's' of 'disk' is not exported" in caplog.text
    assert "another file has taken its place since it was opened" in caplog.text
    assert [each.name for each in served.ask(served.control.snapshots("disk"))] == ["s"]


def test_snapshot_beyond_those_that_are_exported_is_made_all_the_same(
    served: ControlledServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "SNAPSHOT_EXPORTS_MAX", 1)
    served.ask(served.control.add(make("disk", "qcow2")))
    assert served.ask(served.control.snapshot_create("disk", "one")).export == "disk@one"
    assert served.ask(served.control.snapshot_create("disk", "two")).export is None
    assert served.has_logged("1 snapshots are exported, and not one more")
    served.ask(served.control.snapshot_delete("disk", "two"))
    assert [each.name for each in served.ask(served.control.snapshots("disk"))] == ["one"]


def test_snapshot_whose_export_would_have_too_long_a_name_is_left_out_also_at_the_next_start(
    served: ControlledServer, make: Make
) -> None:
    config = replace(make("disk", "qcow2"), name="d" * 4092)
    served.ask(served.control.add(config))
    assert served.ask(served.control.snapshot_create(named(config), "tue")).export == f"{config.name}@tue"
    assert served.ask(served.control.snapshot_create(named(config), "monday")).export is None
    served.ask(served.control.remove(named(config), "drain"))
    assert served.ask(served.control.add(config)) == [config.name, f"{config.name}@tue"]
    assert served.has_logged("snapshot 'monday' of 'ddd")


def test_snapshot_that_fails_midway_poisons_its_image_alone(
    served: ControlledServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.ask(served.control.add(make("disk", "qcow2")))

    async def broken(self: Qcow2Driver, is_dirty: bool) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    with AtWork(served, "keep"), served.connect("disk") as client:
        assert_works(client)
        monkeypatch.setattr(Qcow2Driver, "set_dirty", broken)
        with pytest.raises(OSError, match="the disk is broken"):
            served.ask(served.control.snapshot_create("disk", "one"))
        assert client.write(0, b"x" * 4096).error == NbdError.EIO
        assert client.request(Command.FLUSH).error == NbdError.EIO
        assert client.read(0, 4096).data == b"w" * 4096
        failure = served.now(served.control.export, "disk").failure
        assert failure is not None
        assert "open it anew" in failure
        with pytest.raises(ImageFailed):
            served.ask(served.control.resize("disk", 2 * SIZE))
    monkeypatch.undo()
    with pytest.raises(ImageFailed):
        served.ask(served.control.remove("disk", "drain"))
    assert list(served.look()) == ["keep"]


# The file


def test_reload_leaves_alone_what_was_added_live(served: ControlledServer, make: Make) -> None:
    served.ask(served.control.add(make("live", "qcow2")))
    other = make("other")
    with AtWork(served, "keep", "live"):
        served.wanted = replace(served.wanted, exports=(*served.wanted.exports, other))
        assert served.ask(served.control.reload())
        assert set(served.look()) == {"keep", "live", "other"}
        assert {each.name for each in served.now(served.control.exports) if each.origin == "live"} == {"live"}
        served.wanted = replace(served.wanted, exports=(*served.wanted.exports[:1], replace(other, name="live")))
        assert not served.ask(served.control.reload())
        assert served.has_logged("export live was added live")
        assert set(served.look()) == {"keep", "live", "other"}


def test_reload_brings_back_what_was_removed_live(served: ControlledServer, make: Make) -> None:
    """Also an image that clients of the removed export still use: they drain."""
    served.ask(served.control.add(make("live")))
    with AtWork(served, "live"), served.connect("keep") as client:
        assert_works(client)
        served.ask(served.control.remove("keep", "hide"))
        assert not is_known(served, "keep")
        assert served.ask(served.control.reload())
        assert client.wait_closed(WAIT_S) is not None
        with served.connect("keep") as again:
            assert again.read(0, 4096).data == b"w" * 4096
        assert [(each.name, each.origin) for each in served.now(served.control.exports)] == [
            ("live", "live"),
            ("keep", "config"),
        ]


def test_reload_of_other_rules_leaves_hidden_clients_alone(tmp_path: Path, make: Make) -> None:
    keep, disk = make("keep"), make("disk")
    with ControlledServer(tmp_path, keep, disk) as server, server.connect("disk") as client:
        server.ask(server.control.remove("disk", "hide"))
        server.wanted = replace(server.wanted, exports=(replace(keep, access=(AccessRule(uids=(4242,)),)),))
        assert server.ask(server.control.reload())
        assert_works(client)


def test_reload_of_an_export_that_begins_to_need_tls_ends_its_clients_in_clear(tmp_path: Path, make: Make) -> None:
    """Not those under TLS, nor those of an export that still needs none."""
    authority = Authority(tmp_path)
    identity = authority.issue("server")
    tls = TlsConfig(identity.certificate_path, identity.key_path, mode="selective")
    keep, disk = (make(name, is_tls_only=False) for name in ("keep", "disk"))
    with (
        ControlledServer(tmp_path, keep, disk, tls=tls) as server,
        server.connect("keep") as other,
        server.connect("disk") as plain,
        tls_client(server.socket_path, client_context(authority)) as encrypted,
    ):
        encrypted.negotiate("disk")
        assert_works(plain)
        server.wanted = replace(server.wanted, exports=(keep, replace(disk, is_tls_only=True)))
        assert server.ask(server.control.reload())
        assert plain.wait_closed(WAIT_S) is not None
        assert server.look() == {"keep": 1, "disk": 1}
        assert_works(encrypted)
        assert_works(other)


def test_uris_follow_a_reload(served: ControlledServer, tmp_path: Path) -> None:
    second = str(tmp_path / "second")
    listeners = (*served.wanted.listeners, NbdUri(socket=second))
    served.wanted = replace(served.wanted, listeners=listeners)
    assert served.ask(served.control.reload())
    assert answers(second)
    assert [(uri.socket, uri.name) for uri in served.service.uris] == [
        (served.socket_path, "keep"),
        (second, "keep"),
    ]


def test_reload_without_a_file_is_refused(served: ControlledServer) -> None:
    with pytest.raises(ConfigError, match="without --config"):
        served.ask(live.Control(served.service, None).reload())


def test_operations_and_reloads_take_turns(
    served: ControlledServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reload that is held up holds up what changes exports, and nothing else."""
    is_loading, may_go_on = threading.Event(), threading.Event()
    config = served.wanted

    def load() -> tuple[object, bool]:
        is_loading.set()
        assert may_go_on.wait(WAIT_S)
        return config, False

    monkeypatch.setattr(served._reloader, "_load", load)
    with AtWork(served, "keep") as working:
        reloading = served.start(served.control.reload())
        assert is_loading.wait(WAIT_S)
        adding = served.start(served.control.add(make("disk")))
        working.wait_progress()
        assert not adding.done()
        assert list(served.look()) == ["keep"]
        may_go_on.set()
        assert reloading.result(WAIT_S)
        assert adding.result(WAIT_S) == ["disk"]
