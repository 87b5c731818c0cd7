"""Dirty bitmaps of an export changed while clients use it: who waits, who sees what, what is refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nbdimg.config import ExportConfig
from nbdimg.errors import ConfigError, ImageError, NotThere, UnsupportedFeature
from nbdimg.formats import create_image
from nbdimg.formats.qcow2 import bitmap_write
from nbdimg.formats.qcow2.bitmap_edit import BitmapAction
from nbdimg.storage.posix import PosixFile
from tests.server.controlled import AtWork, ControlledServer
from tests.support.qcow2edit import qemu_img
from tests.support.rawclient import Client
from tests.support.rawprotocol import MIB, Command, NbdError, Option, meta_data
from tests.support.rss import wait_until
from tests.support.threaded import WAIT_S

SIZE = 4 * MIB
CONTEXT = "qemu:dirty-bitmap:"
ADD, REMOVE = BitmapAction("add", "b0", 4096), BitmapAction("remove", "b0")


def disk(directory: Path, format: str = "qcow2", name: str = "disk", *, is_read_only: bool = False) -> ExportConfig:
    path = directory / f"{name}.img"
    create_image(path, SIZE, format=format)
    return ExportConfig(str(path), name, format, is_read_only=is_read_only)


def asking(server: ControlledServer, *names: str) -> Client:
    client = Client(server.socket_path, WAIT_S)
    client.greet()
    client.negotiate("disk", contexts=[CONTEXT + name for name in names])
    return client


def offered(server: ControlledServer) -> list[str]:
    with Client(server.socket_path, WAIT_S) as client:
        client.greet()
        client.option(Option.STRUCTURED_REPLY)
        replies = client.option(Option.LIST_META_CONTEXT, meta_data("disk", [CONTEXT]))
        return [reply.data[4:].decode().removeprefix(CONTEXT) for reply in replies[:-1]]


def dirty(client: Client, name: str) -> list[tuple[int, int]]:
    """(length, flags) of the whole disk."""
    reply = client.request(Command.BLOCK_STATUS, 0, SIZE)
    assert reply.error == 0
    return [(length, flags) for length, flags in reply.extents[client.contexts[CONTEXT + name]]]


def change(server: ControlledServer, *actions: BitmapAction) -> list[str]:
    states = server.ask(server.control.bitmaps_change("disk", actions))
    assert states == server.ask(server.control.bitmaps("disk"))
    return [each.name for each in states]


def test_bitmaps_change_under_clients_who_go_on_and_each_sees_what_there_is(tmp_path: Path) -> None:
    with ControlledServer(tmp_path, disk(tmp_path)) as server, AtWork(server, "disk", "disk"):
        assert (offered(server), change(server, ADD)) == ([], ["b0"])
        assert offered(server) == ["b0"]
        with asking(server, "b0") as client:
            assert client.write(3 * MIB, b"1" * 512).error == 0
            assert dirty(client, "b0")[-2:] == [(4096, 1), (MIB - 4096, 0)]
            for number in range(1, 20):
                new, old = f"b{number}", f"b{number - 1}"
                actions = BitmapAction("add", new), BitmapAction("disable", old), BitmapAction("clear", old)
                names = change(server, *actions)
            assert names == offered(server) == [f"b{number}" for number in range(20)]
            assert dirty(client, "b0") == [(SIZE, 0)]
            change(server, BitmapAction("merge", "b0", sources=("b19",)))
            assert client.write(3 * MIB + 8192, b"2" * 512).error == 0
            assert (4096, 1) not in dirty(client, "b0")
        with asking(server, "b19") as client:
            assert dirty(client, "b19")[-2:] == [(65536, 1), (MIB - 65536, 0)]
    qemu_img("check", tmp_path / "disk.img")


def test_bitmap_that_a_client_has_chosen_is_not_removed(tmp_path: Path) -> None:
    with ControlledServer(tmp_path, disk(tmp_path)) as server:
        change(server, ADD)
        with asking(server, "b0") as client, AtWork(server, "disk"):
            expected = r"^bitmap 'b0' is in use by client \d+ \(.*\), expected one that no client has asked for: dis"
            with pytest.raises(ConfigError, match=expected):
                change(server, BitmapAction("add", "b1"), REMOVE)
            assert offered(server) == ["b0"]
            assert client.request(Command.BLOCK_STATUS, 0, SIZE).error == 0
            assert change(server, REMOVE, BitmapAction("add", "b0", 65536)) == ["b0"]
            assert client.request(Command.BLOCK_STATUS, 0, SIZE).error == 0
        assert wait_until(lambda: server.look() == {"disk": 0}, WAIT_S)
        assert (change(server, REMOVE), offered(server)) == ([], [])


def test_bitmap_removed_during_a_handshake_is_not_there_when_it_ends(tmp_path: Path) -> None:
    """Spec: proto.md NBD_OPT_SET_META_CONTEXT: the client that has chosen nothing gets EINVAL."""
    with ControlledServer(tmp_path, disk(tmp_path)) as server, Client(server.socket_path, WAIT_S) as client:
        change(server, ADD)
        client.greet()
        client.option(Option.STRUCTURED_REPLY)
        client.structured = True
        client.set_meta_contexts("disk", [CONTEXT + "b0"])
        assert change(server, REMOVE) == []
        client.go("disk")
        client.contexts = {}
        assert client.request(Command.BLOCK_STATUS, 0, SIZE).error == NbdError.EINVAL
        assert client.read(0, 512).data == bytes(512)


def test_bitmaps_of_what_has_none_are_refused_in_a_sentence(tmp_path: Path) -> None:
    exports = [disk(tmp_path, format, format) for format in ("raw", "vhdx")]
    fixed = disk(tmp_path, name="fixed", is_read_only=True)
    with ControlledServer(tmp_path, disk(tmp_path), fixed, *exports) as server:
        control = server.control
        server.ask(control.snapshot_create("disk", "one"))
        for name in ("raw", "vhdx"):
            assert server.ask(control.bitmaps(name)) == []
            with pytest.raises(UnsupportedFeature, match=f"{name} images have no dirty bitmaps, qcow2 images do"):
                server.ask(control.bitmaps_change(name, [ADD]))
        with pytest.raises(ConfigError, match="the image of 'fixed' is open read-only"):
            server.ask(control.bitmaps_change("fixed", [ADD]))
        assert server.ask(control.bitmaps("fixed")) == []
        for work in (control.bitmaps("disk@one"), control.bitmaps_change("disk@one", [ADD])):
            with pytest.raises(ConfigError, match="is a snapshot"):
                server.ask(work)
        with pytest.raises(NotThere, match="there is no export 'x'"):
            server.ask(control.bitmaps_change("x", [ADD]))
        with pytest.raises(ConfigError, match="there is no bitmap 'b0', known are none"):
            server.ask(control.bitmaps_change("disk", [REMOVE]))
        assert server.ask(control.bitmaps("disk")) == []


def test_bitmap_without_space_is_refused_with_the_images_name_and_clients_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(self: PosixFile, offset: int, data: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = disk(tmp_path)
    with ControlledServer(tmp_path, config) as server, server.connect("disk") as client:
        assert client.write(0, b"1" * 4096).error == 0
        assert client.request(Command.FLUSH).error == 0
        with monkeypatch.context() as patch:
            patch.setattr(PosixFile, "pwrite", full)
            with pytest.raises(OSError, match="No space left on device") as refusal:
                change(server, ADD)
        assert refusal.value.filename == config.path
        assert offered(server) == []
        assert change(server, ADD) == ["b0"]
        assert client.write(0, b"2" * 4096).error == 0
    qemu_img("check", config.path)


def test_bitmaps_that_fail_midway_make_their_image_fail_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    exports = disk(tmp_path), disk(tmp_path, "raw", "keep")
    with ControlledServer(tmp_path, *exports) as server, server.connect("disk") as client, AtWork(server, "keep"):
        monkeypatch.setattr(bitmap_write, "switch", broken)
        with pytest.raises(OSError, match="the disk is broken"):
            change(server, ADD)
        assert client.write(0, b"x" * 4096).error == NbdError.EIO
        assert client.request(Command.FLUSH).error == NbdError.EIO
        with pytest.raises(ImageError, match=r"a change of its bitmaps failed \(the disk is broken\); open it anew"):
            change(server, ADD)
