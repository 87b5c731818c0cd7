"""Operations on images beside each other, beside what changes which exports there are, and beside the server's end."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from nbdimg.config import AccessRule, ExportConfig
from nbdimg.errors import ConfigError, NotThere
from nbdimg.export.export import Export
from nbdimg.formats import create_image
from nbdimg.formats.qcow2.bitmap_edit import BitmapAction
from nbdimg.formats.qcow2.snapshots import load_snapshots
from nbdimg.server import live, opening, reload, server, service
from nbdimg.server.live import Control
from nbdimg.server.opening import open_exports
from nbdimg.storage.posix import PosixFile
from tests.server.controlled import AtWork, ControlledServer
from tests.support.qcow2edit import qemu_img
from tests.support.rawprotocol import MIB
from tests.support.rss import wait_until
from tests.support.threaded import WAIT_S

SIZE = 4 * MIB

Operation = Callable[[Control, str], Coroutine[Any, Any, object]]


def snapshot(control: Control, name: str) -> Coroutine[Any, Any, object]:
    return control.snapshot_create(name, "s")


def resize(control: Control, name: str) -> Coroutine[Any, Any, object]:
    return control.resize(name, 2 * SIZE)


def bitmap(control: Control, name: str) -> Coroutine[Any, Any, object]:
    return control.bitmaps_change(name, [BitmapAction("add", "b0", 4096)])


def disk(directory: Path, name: str) -> ExportConfig:
    path = directory / f"{name}.img"
    create_image(path, SIZE, format="qcow2")
    return ExportConfig(str(path), name, "qcow2")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ControlledServer]:
    """A server of the qcow2 exports "a" and "b"."""
    with ControlledServer(tmp_path, disk(tmp_path, "a"), disk(tmp_path, "b")) as running:
        yield running


def want_of_a(running: ControlledServer, **changes: Any) -> None:
    """Let the next reload find the export "a" changed."""
    first, *others = running.wanted.exports
    running.wanted = replace(running.wanted, exports=(replace(first, **changes), *others))


class Gate:
    """Holds up what `hold` wraps, on the server's loop, until `open`."""

    def __init__(self, running: ControlledServer) -> None:
        self._server = running
        self._is_open = asyncio.Event()
        self._is_reached = Event()

    def hold(self, function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def held(*arguments: Any, **more: Any) -> Any:
            self._is_reached.set()
            await self._is_open.wait()
            return await function(*arguments, **more)

        return held

    def hold_opening(self, function: Callable[..., Awaitable[list[Export]]]) -> Callable[..., Awaitable[list[Export]]]:
        """What opens images; not what tries them."""

        async def held(*arguments: Any, is_trial: bool = False) -> list[Export]:
            opened = await function(*arguments, is_trial=is_trial)
            if not is_trial:
                self._is_reached.set()
                await self._is_open.wait()
            return opened

        return held

    def wait_reached(self) -> None:
        assert self._is_reached.wait(WAIT_S)

    def open(self) -> None:
        self._server.now(self._is_open.set)


@contextmanager
def hanging(running: ControlledServer, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Storage that does not answer a flush under an export."""
    gate = Gate(running)
    image = running.service.exports[name][0].image
    monkeypatch.setattr(image, "flush", gate.hold(image.flush))
    try:
        yield gate
    finally:
        gate.open()


@pytest.mark.parametrize("operation", [snapshot, resize, bitmap])
def test_operation_on_an_image_holds_up_nothing_but_others_on_it(
    served: ControlledServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: Operation
) -> None:
    control = served.control
    ended: list[str] = []

    def start(name: str, work: Coroutine[Any, Any, object]) -> Future[object]:
        started = served.start(work)
        started.add_done_callback(lambda _: ended.append(name))
        return started

    with AtWork(served, "b"):
        with hanging(served, "a", monkeypatch) as gate:
            first = start("first", operation(control, "a"))
            gate.wait_reached()
            second = start("second", control.bitmaps_change("a", [BitmapAction("add", "later", 4096)]))
            for each in (snapshot, resize, bitmap):
                served.ask(each(control, "b"))
            served.ask(control.snapshot_delete("b", "s"))
            assert [each.name for each in served.ask(control.bitmaps("b"))] == ["b0"]
            served.ask(control.add(disk(tmp_path, "c")))
            served.ask(control.remove("c", "drain"))
            served.wanted = replace(served.wanted, exports=(*served.wanted.exports, disk(tmp_path, "d")))
            assert served.ask(control.reload())
            assert set(served.look()) == {"a", "b", "d"}
            assert not ended
        first.result(WAIT_S)
        second.result(WAIT_S)
    assert ended == ["first", "second"]
    served.ask(control.remove("a", "drain"))
    qemu_img("check", "-q", "-f", "qcow2", tmp_path / "a.img")


def test_stop_closes_images_though_an_operation_on_another_hangs_and_names_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CLOSE_EXPECTED_S", 0.01)
    is_closed_first: list[bool] = []
    late = f"export 'a': {tmp_path}/a.img is not closed after 0.01 seconds"
    with ControlledServer(tmp_path, disk(tmp_path, "a"), disk(tmp_path, "b")) as running:
        other = running.service.exports["b"][0].image.driver.file
        assert isinstance(other, PosixFile)
        gate = Gate(running)
        image = running.service.exports["a"][0].image
        monkeypatch.setattr(image, "flush", gate.hold(image.flush))
        making = running.start(running.control.snapshot_create("a", "s"))
        gate.wait_reached()

        def watch() -> None:
            is_closed_first.append(wait_until(lambda: other.descriptor < 0, WAIT_S / 2) and running.has_logged(late))
            gate.open()

        watching = Thread(target=watch)
        watching.start()
    watching.join(WAIT_S)
    assert is_closed_first == [True]
    assert making.result(WAIT_S).export is None
    assert running.has_logged("snapshot 's' of 'a' is not exported: the server stops")
    qemu_img("check", "-q", "-f", "qcow2", tmp_path / "a.img")


@pytest.mark.parametrize("change", ["add", "reload", "reopen", "close"])
def test_stop_closes_images_though_what_comes_or_goes_hangs_and_tells_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """An image is opened for an addition, for a reload, or anew by one, or it is closed by one; all are closed then.

    What waits behind that is refused.
    """
    monkeypatch.setattr(server, "CLOSE_EXPECTED_S", 0.01)
    is_closed_first: list[bool] = []
    late = disk(tmp_path, "c")
    with ControlledServer(tmp_path, disk(tmp_path, "a"), disk(tmp_path, "b")) as running:
        image = running.service.exports["a"][0].image
        other = running.service.exports["b"][0].image.driver.file
        assert isinstance(other, PosixFile)
        gate = Gate(running)
        if change == "close":
            monkeypatch.setattr(image, "flush", gate.hold(image.flush))
        else:
            for module in (reload, service):
                monkeypatch.setattr(module, "open_exports", gate.hold_opening(open_exports))
        first, second = running.wanted.exports
        exports = (first, second, late) if change == "reload" else (replace(first, block_size_min=512), second)
        running.wanted = replace(running.wanted, exports=exports)
        control = running.control
        changing = running.start(control.add(late) if change == "add" else control.reload())
        gate.wait_reached()
        running.wanted = replace(running.wanted, exports=(second,))
        queued = running.start(control.reload())

        def watch() -> None:
            has_told = running.has_logged("an image is not opened, or one that a reload takes away not closed")
            is_closed_first.append(wait_until(lambda: other.descriptor < 0, WAIT_S / 2) and has_told)
            gate.open()

        watching = Thread(target=watch)
        watching.start()
    watching.join(WAIT_S)
    assert is_closed_first == [True]
    assert changing.exception(WAIT_S) is None or change == "add"
    assert not queued.result(WAIT_S)
    assert not [each for each in map(os.path.realpath, Path("/proc/self/fd").iterdir()) if str(tmp_path) in each]


def test_stop_counts_an_image_that_a_reload_takes_away_meanwhile_and_that_cannot_be_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ControlledServer(tmp_path, disk(tmp_path, "a"), disk(tmp_path, "b")) as running:
        service, image = running.service, running.service.exports["a"][0].image
        gate = Gate(running)

        async def failing() -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(image, "flush", gate.hold(failing))
        running.wanted = replace(running.wanted, exports=running.wanted.exports[1:])
        reloading = running.start(running.control.reload())
        gate.wait_reached()
        running.ask(service.drain())
        gate.open()
    assert reloading.result(WAIT_S)
    assert [str(each) for each in service.failures] == [f"{image.path}: {os.strerror(errno.EIO)}"]


def test_export_removed_under_an_operation_goes_at_once_and_is_closed_behind_it(
    served: ControlledServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = served.control
    with hanging(served, "a", monkeypatch) as gate:
        making = served.start(control.snapshot_create("a", "s"))
        gate.wait_reached()
        resizing = served.start(resize(control, "a"))
        removing = served.start(control.remove("a", "hard"))
        assert wait_until(lambda: served.now(control.export, "a").is_hidden, WAIT_S)
        assert served.look() == {"a": 0, "b": 0}
        assert not making.done()
        assert not removing.done()
    assert making.result(WAIT_S).export is None
    removing.result(WAIT_S)
    with pytest.raises(NotThere):
        resizing.result(WAIT_S)
    assert served.has_logged("snapshot 's' of 'a' is not exported: the export 'a' was removed meanwhile")
    assert list(served.look()) == ["b"]
    assert served.ask(control.reload())
    assert set(served.look()) == {"a", "a@s", "b"}


def test_snapshot_is_not_deleted_under_clients_of_an_export_removed_meanwhile(
    served: ControlledServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = served.control
    gate = Gate(served)
    with served.connect("a") as writer:
        assert writer.write(0, b"1" * 65536).error == 0
        served.ask(control.snapshot_create("a", "s"))
    with served.connect("a@s") as reader:
        monkeypatch.setattr(live, "load_snapshots", gate.hold(load_snapshots))
        deleting = served.start(control.snapshot_delete("a", "s"))
        gate.wait_reached()
        served.ask(control.remove("a", "hide"))
        gate.open()
        with pytest.raises(ConfigError, match="the export 'a' was removed meanwhile"):
            deleting.result(WAIT_S)
        assert reader.read(0, 65536).data == b"1" * 65536


def test_snapshot_has_the_terms_that_a_reload_gives_its_export_meanwhile(
    served: ControlledServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(served)
    monkeypatch.setattr(service, "open_snapshot", gate.hold(opening.open_snapshot))
    making = served.start(served.control.snapshot_create("a", "s"))
    gate.wait_reached()
    want_of_a(served, access=(AccessRule(uids=(4242,)),), description="new")
    assert served.ask(served.control.reload())
    gate.open()
    assert making.result(WAIT_S).export == "a@s"
    registry = served.service.registry
    assert registry.terms("a@s") == registry.terms("a") != registry.terms("b")
    assert served.now(served.control.export, "a@s").description == "new"


def test_reload_opens_an_image_anew_behind_the_operation_on_it(
    served: ControlledServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is asked of the image meanwhile follows."""
    control = served.control
    want_of_a(served, block_size_min=512)
    old = served.service.exports["a"][0]
    with hanging(served, "a", monkeypatch) as gate:
        making = served.start(control.snapshot_create("a", "s"))
        gate.wait_reached()
        reloading = served.start(control.reload())
        served.ask(resize(control, "b"))
        resizing = served.start(resize(control, "a"))
        assert served.service.exports["a"][0] is old
        assert not reloading.done()
    assert making.result(WAIT_S).export == "a@s"
    assert reloading.result(WAIT_S)
    resizing.result(WAIT_S)
    assert set(served.look()) == {"a", "a@s", "b"}
    assert served.service.exports["a"][0] is not old
    assert served.now(control.export, "a").size == 2 * SIZE


def test_operation_on_an_export_that_a_reload_has_away_waits_for_it(
    served: ControlledServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = served.control
    want_of_a(served, block_size_min=512)
    with hanging(served, "a", monkeypatch) as gate:
        reloading = served.start(control.reload())
        gate.wait_reached()
        assert list(served.look()) == ["b"]
        resizing = served.start(resize(control, "a"))
        served.ask(resize(control, "b"))
        assert not resizing.done()
    assert reloading.result(WAIT_S)
    resizing.result(WAIT_S)
    assert served.now(control.export, "a").size == 2 * SIZE
