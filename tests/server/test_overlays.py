"""Overlays over a golden image: clients differ and the image stays; what is thrown away is gone, what is kept stays."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from cryptography import x509

from nbdimg.config import AccessRule, ExportConfig, ServerConfig, TlsConfig
from nbdimg.configfile import ConfigFileError, load_config
from nbdimg.errors import ConfigError
from nbdimg.export.export import Export
from nbdimg.formats.overlay import Golden
from nbdimg.limits import Limits
from nbdimg.server import server as server_module
from nbdimg.server.handover import LeftClient
from nbdimg.server.shared import Shared
from nbdimg.storage.posix import PosixFile
from nbdimg.uri import NbdUri
from nbdimg.wire.handshake import Session
from tests.server.test_access import refusals
from tests.server.test_tls_matrix import listed
from tests.server.tls_live import LiveServer, client_context, tls_client
from tests.support.certificates import LOOPBACK_NAMES, Authority
from tests.support.configured import ConfiguredServer
from tests.support.libnbd_script import run_libnbd
from tests.support.peers import require_program
from tests.support.rawclient import Client, connect_negotiated
from tests.support.rawprotocol import (
    KIB,
    MIB,
    Command,
    ConnectionClosed,
    NbdError,
    Option,
    Rep,
    TransmissionFlag,
    info_data,
    option_bytes,
)
from tests.support.rss import descriptor_count, wait_until
from tests.support.server import NbdimgServer

SIZE = 8 * MIB
PATIENCE_S = 30
MULTI_CONN = TransmissionFlag.CAN_MULTI_CONN

CONTENT = bytes(range(256)) * (MIB // 256) + bytes(3 * MIB) + b"g" * (4 * MIB)
assert len(CONTENT) == SIZE


def qemu_img(*arguments: str | os.PathLike[str]) -> str:
    done = subprocess.run([require_program("qemu-img"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def golden_image(directory: Path, kind: str) -> Path:
    """An image of CONTENT: raw, qcow2, vhdx, or a chain of qcow2 over raw whose upper half is the overlay's."""
    raw = directory / "golden.raw"
    raw.write_bytes(CONTENT)
    if kind == "raw":
        return raw
    path = directory / f"golden.{'qcow2' if kind == 'chain' else kind}"
    if kind != "chain":
        qemu_img("convert", "-f", "raw", "-O", kind, raw, path)
        raw.unlink()
        return path
    raw.write_bytes(CONTENT[: SIZE // 2] + b"?" * (SIZE // 2))
    qemu_img("create", "-q", "-f", "qcow2", "-b", "golden.raw", "-F", "raw", path)
    write = f"write -P {ord('g')} {SIZE // 2} {SIZE // 2}"
    subprocess.run(
        [require_program("qemu-io"), "-f", "qcow2", "-c", write, path], check=True, stdout=subprocess.DEVNULL
    )
    return path


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return golden_image(tmp_path, "qcow2")


@pytest.fixture
def overlays(tmp_path: Path) -> Path:
    """The directory of overlays."""
    path = tmp_path / "overlays"
    path.mkdir()
    return path


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob("golden.*")}


def served(golden: Path, overlays: Path, *options: str) -> NbdimgServer:
    return NbdimgServer(f"base={golden}", options=["--overlay", f"--overlay-dir={overlays}", *options])


def export_text(golden: Path, overlays: Path, mode: str = "kept", name: str = "base") -> str:
    lines = (f'name = "{name}"', f'path = "{golden}"', f'overlay = "{mode}"', f'overlay_dir = "{overlays}"')
    return "\n".join(["[[exports]]", *lines, ""])


def live_config(
    golden: Path, overlays: Path, mode: Literal["per-client", "kept"] = "per-client", limits: Limits | None = None
) -> ServerConfig:
    export = ExportConfig(str(golden), "base", overlay=mode, overlay_directory=str(overlays))
    listener = NbdUri(socket=str(golden.parent / "s"))
    return ServerConfig((export,), listeners=(listener,), limits=limits or Limits())


def socket_of(server: LiveServer) -> str:
    path = server.service.uris[0].socket
    assert path is not None
    return path


def connected(server: NbdimgServer | ConfiguredServer, name: str = "base") -> Client:
    return connect_negotiated(server.socket_path, name)


def open_overlays(pid: int, directory: Path) -> int:
    """How many files of the directory, with or without a name, a process has open."""
    found = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found += os.readlink(descriptor).startswith(f"{directory}/")
    return found


def greeted(address: str | tuple[str, int]) -> Client:
    client = Client(address)
    client.greet()
    return client


def go(client: Client, name: str) -> int:
    """The type of the final reply."""
    return client.option(Option.GO, info_data(name))[-1].type


def whole(client: Client) -> bytes:
    return b"".join(client.read(offset, MIB).data for offset in range(0, SIZE, MIB))


# Per client


@pytest.mark.parametrize("kind", ["raw", "qcow2", "vhdx", "chain"])
def test_overlay_two_clients_write_and_differ_and_nothing_of_it_stays(
    tmp_path: Path, overlays: Path, kind: str
) -> None:
    golden = golden_image(tmp_path, kind)
    before = digests(tmp_path)
    with served(golden, overlays) as server:
        descriptors = descriptor_count(server.pid)
        with connected(server) as one, connected(server) as two:
            assert not one.export.flags & (MULTI_CONN | TransmissionFlag.READ_ONLY)
            assert whole(one) == CONTENT
            expected = {one: bytearray(CONTENT), two: bytearray(CONTENT)}
            for client, letter in ((one, b"1"), (two, b"2")):
                for offset, length in ((0, 512), (70_001, 5000), (3 * MIB - 100, 200), (SIZE - 4096, 4096)):
                    assert client.write(offset, letter * length).error == 0
                    expected[client][offset : offset + length] = letter * length
                assert client.request(Command.WRITE_ZEROES, 5 * MIB, 128 * KIB).error == 0
                expected[client][5 * MIB : 5 * MIB + 128 * KIB] = bytes(128 * KIB)
                assert client.request(Command.FLUSH).error == 0
            for client, disk in expected.items():
                assert whole(client) == bytes(disk)
            with connected(server) as third:
                assert whole(third) == CONTENT
            assert os.listdir(overlays) == []
        assert wait_until(lambda: descriptor_count(server.pid) == descriptors, PATIENCE_S)
        with connected(server) as again:
            assert whole(again) == CONTENT
    assert os.listdir(overlays) == []
    assert digests(tmp_path) == before


def test_overlay_of_a_golden_image_of_no_whole_sectors_is_rounded_up_everywhere(tmp_path: Path, overlays: Path) -> None:
    golden = tmp_path / "golden.raw"
    golden.write_bytes(b"x" * 1000)
    with NbdimgServer(f"base={golden}", options=["--format=raw", "--overlay", f"--overlay-dir={overlays}"]) as server:
        with greeted(server.socket_path) as client:
            assert client.info("base").size == 1024
            assert client.go("base").size == 1024
        with connected(server) as client:
            assert client.read(0, 1024).data == b"x" * 1000 + bytes(24)
            assert client.write(999, b"yyy").error == 0
            assert client.read(990, 34).data == b"x" * 9 + b"yyy" + bytes(22)
    assert golden.read_bytes() == b"x" * 1000


def test_overlay_killed_server_leaves_nothing_behind(golden: Path, overlays: Path) -> None:
    with served(golden, overlays) as server, connected(server) as client:
        assert client.write(0, b"x" * MIB).error == 0
        server.kill()
    assert os.listdir(overlays) == []


def test_overlay_golden_image_cannot_be_written_by_others_meanwhile(golden: Path, overlays: Path) -> None:
    write = [require_program("qemu-io"), "-f", "qcow2", "-c", "write 0 512", str(golden)]
    with served(golden, overlays):
        refused = subprocess.run(write, capture_output=True, text=True, check=False)
        assert "lock" in refused.stderr
        qemu_img("info", golden)
    assert subprocess.run(write, capture_output=True, check=False).returncode == 0


def test_overlay_info_and_list_make_none_and_export_name_enters_one(golden: Path, overlays: Path) -> None:
    with served(golden, overlays) as server, greeted(server.socket_path) as client:
        assert client.info("base").size == SIZE
        assert listed(client) == [b"base"]
        assert open_overlays(server.pid, overlays) == 0
        assert client.export_name("base").size == SIZE
        assert open_overlays(server.pid, overlays) == 1
        assert client.write(0, b"x" * 512).error == 0
        assert client.read(0, 512).data == b"x" * 512


def test_overlay_requests_sent_behind_go_are_answered(golden: Path, overlays: Path) -> None:
    with served(golden, overlays) as server, greeted(server.socket_path) as client:
        read = client.new_request(Command.READ, 0, 4096)
        client.send(option_bytes(Option.GO, info_data("base")) + client.announce(read))
        assert client.read_option_replies(Option.GO)[-1].type == Rep.ACK
        assert client.read_reply().data == CONTENT[:4096]


def test_overlay_block_status_tells_golden_from_overlay_by_its_depth(golden: Path, overlays: Path) -> None:
    script = """if True:
        h = nbd.NBD()
        h.add_meta_context("qemu:allocation-depth")
        h.connect_uri(uri)
        h.pwrite(b"x" * 65536, 65536)
        result = extents(h, 196608, 0)["qemu:allocation-depth"]
    """
    with served(golden, overlays) as server:
        assert run_libnbd(script, uri=server.uri) == [[65536, 2], [65536, 1], [65536, 2]]


def test_overlay_100_clients_at_once_have_100_disks(golden: Path, overlays: Path) -> None:
    with served(golden, overlays) as server, ExitStack() as stack:
        descriptors = descriptor_count(server.pid)
        clients = [stack.enter_context(greeted(server.socket_path)) for _ in range(100)]
        for client in clients:
            client.send_option(Option.GO, info_data("base"))
        for client in clients:
            assert client.read_option_replies(Option.GO)[-1].type == Rep.ACK
        for index, client in enumerate(clients):
            assert client.write(index * 4096, bytes([index]) * 4096).error == 0
        for index, client in enumerate(clients):
            expected = bytearray(CONTENT[: 100 * 4096])
            expected[index * 4096 : index * 4096 + 4096] = bytes([index]) * 4096
            assert client.read(0, 100 * 4096).data == expected
        stack.close()
        assert wait_until(lambda: descriptor_count(server.pid) == descriptors, PATIENCE_S)


def test_overlay_qemu_io_sees_its_own_writes_and_the_next_qemu_io_the_golden_image(
    golden: Path, overlays: Path
) -> None:
    def qemu_io(*commands: str) -> str:
        arguments = [each for command in commands for each in ("-c", command)]
        argv = [require_program("qemu-io"), "-f", "raw", *arguments, server.uri]
        return subprocess.run(argv, capture_output=True, text=True, check=False).stdout

    with served(golden, overlays) as server:
        at, letter = SIZE // 2, ord("g")
        said = qemu_io(f"read -P {letter} {at} 64k", f"write -P 1 {at} 4k", "flush", f"read -P 1 {at} 4k")
        assert "Pattern verification failed" not in said
        assert "Pattern verification failed" not in qemu_io(f"read -P {letter} {at} 64k")
        assert "Pattern verification failed" in qemu_io(f"read -P 1 {at} 4k")


def test_overlay_libnbd_copies_in_and_out_over_one_connection(golden: Path, overlays: Path, tmp_path: Path) -> None:
    with served(golden, overlays) as server:
        info = json.loads(subprocess.check_output([require_program("nbdinfo"), "--json", server.uri]))
        assert info["exports"][0]["can_multi_conn"] is False
        assert info["exports"][0]["is_read_only"] is False
        copy = tmp_path / "copy"
        subprocess.run([require_program("nbdcopy"), server.uri, copy], check=True)
        assert copy.read_bytes() == CONTENT
        subprocess.run([require_program("nbdcopy"), "/dev/zero", server.uri], check=False, capture_output=True)
        subprocess.run([require_program("nbdcopy"), server.uri, copy], check=True)
        assert copy.read_bytes() == CONTENT


# Limits and faults


def test_overlay_beyond_its_size_gets_enospc_and_goes_on(golden: Path, overlays: Path) -> None:
    """The empty overlay takes 256 KiB, a table 64 KiB more: 11 clusters of data fit into 1 MiB."""
    config = live_config(golden, overlays, "kept", limits=Limits(overlay_size=MIB))
    with LiveServer(config) as server, connect_negotiated(socket_of(server), "base@vm1") as client:
        errors = [client.write(index * 64 * KIB, b"x" * 64 * KIB).error for index in range(20)]
        assert errors == [0] * 11 + [NbdError.ENOSPC] * 9
        assert client.request(Command.FLUSH).error == 0
        assert client.write(0, b"y" * 4096).error == 0
        assert client.request(Command.FLUSH).error == 0
        assert client.read(0, 4096).data == b"y" * 4096
        assert client.read(15 * 64 * KIB, 4096).data == CONTENT[15 * 64 * KIB :][:4096]
    qemu_img("check", "-q", overlays / "base@vm1.qcow2")


def test_overlays_beyond_their_number_are_refused_until_one_leaves(golden: Path, overlays: Path) -> None:
    with LiveServer(live_config(golden, overlays, limits=Limits(overlays=2))) as server:
        path = socket_of(server)
        with connect_negotiated(path, "base") as first, connect_negotiated(path, "base"), greeted(path) as third:
            (reply,) = third.option(Option.GO, info_data("base"))
            assert (reply.type, reply.text) == (Rep.ERR_POLICY, "this export has 2 overlays already")
            first.close()
            assert wait_until(lambda: open_overlays(os.getpid(), overlays) == 1, PATIENCE_S)
            assert go(third, "base") == Rep.ACK
            assert third.read(0, 512).data == CONTENT[:512]


def fault(*_: object) -> PosixFile:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/secret/place")


def test_overlay_that_cannot_be_made_is_an_error_for_the_client_and_the_server_goes_on(
    golden: Path, overlays: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LiveServer(live_config(golden, overlays)) as server:
        path = socket_of(server)
        with greeted(path) as client, greeted(path) as other, monkeypatch.context() as broken:
            broken.setattr(Golden, "_make_unnamed", fault)
            (reply,) = client.option(Option.GO, info_data("base"))
            assert reply.type == Rep.ERR_PLATFORM
            assert reply.text == "the overlay cannot be opened: No space left on device"
            other.send_option(Option.EXPORT_NAME, b"base")
            with pytest.raises(ConnectionClosed):
                other.receive(1)
            assert server.has_logged("gets no overlay of export 'base': [Errno 28] No space left on device: '/secret")
            broken.undo()
            assert go(client, "base") == Rep.ACK
            assert client.read(0, 512).data == CONTENT[:512]


@pytest.fixture
def slow_making(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Overlays are being made when the first is set, and not made while the second is clear; at first it is set."""
    is_asked, may_go_on = threading.Event(), threading.Event()
    may_go_on.set()
    make = Golden._make_unnamed

    def slowly(self: Golden) -> PosixFile:
        is_asked.set()
        assert may_go_on.wait(PATIENCE_S)
        return make(self)

    monkeypatch.setattr(Golden, "_make_unnamed", slowly)
    return is_asked, may_go_on


def test_overlay_whose_client_vanishes_while_it_is_made_leaks_nothing(
    golden: Path, overlays: Path, slow_making: tuple[threading.Event, threading.Event]
) -> None:
    is_asked, may_go_on = slow_making
    with LiveServer(live_config(golden, overlays, limits=Limits(overlays=1))) as server:
        path = socket_of(server)
        descriptors = descriptor_count(os.getpid())
        for leave in (Client.close, Client.reset, Client.half_close):
            is_asked.clear()
            may_go_on.clear()
            client = greeted(path)
            client.send_option(Option.GO, info_data("base"))
            assert is_asked.wait(PATIENCE_S)
            leave(client)
            with greeted(path) as other:
                assert other.info("base").size == SIZE, "the loop is not held up"
            may_go_on.set()
            client.close()
            assert wait_until(lambda: descriptor_count(os.getpid()) == descriptors, PATIENCE_S)
        with connect_negotiated(path, "base") as client:
            assert client.read(0, 512).data == CONTENT[:512]


def test_overlay_that_takes_longer_than_the_handshake_may_is_given_up(
    golden: Path, overlays: Path, slow_making: tuple[threading.Event, threading.Event]
) -> None:
    _, may_go_on = slow_making
    config = live_config(golden, overlays)
    with LiveServer(replace(config, limits=Limits(handshake_timeout_s=0.3))) as server:
        descriptors = descriptor_count(os.getpid())
        with greeted(socket_of(server)) as client:
            may_go_on.clear()
            client.send_option(Option.GO, info_data("base"))
            assert client.wait_closed(PATIENCE_S) is not None
        may_go_on.set()
        assert wait_until(lambda: descriptor_count(os.getpid()) == descriptors, PATIENCE_S)


# Kept


def test_kept_overlay_survives_a_restart_and_is_what_other_programs_take_it_for(
    golden: Path, overlays: Path, tmp_path: Path
) -> None:
    before = digests(tmp_path)
    text = export_text(golden, overlays)
    expected = bytearray(CONTENT)
    expected[4096:8192] = b"k" * 4096
    with ConfiguredServer(tmp_path, text) as server:
        with greeted(server.socket_path) as client:
            assert client.info("base@vm42").size == SIZE
            assert os.listdir(overlays) == []
        with connected(server, "base@vm42") as client, connected(server, "base@vm43") as other:
            assert client.write(4096, b"k" * 4096).error == 0
            assert whole(other) == CONTENT
        with connected(server, "base@vm42") as client:
            assert whole(client) == expected
            assert client.write(0, CONTENT[:512]).error == 0
            server.terminate()
            assert server.wait() == 0
    with ConfiguredServer(tmp_path, text) as server, connected(server, "base@vm42") as client:
        assert whole(client) == expected
    assert sorted(os.listdir(overlays)) == ["base@vm42.qcow2", "base@vm43.qcow2"]
    assert digests(tmp_path) == before
    kept = overlays / "base@vm42.qcow2"
    assert kept.stat().st_mode & 0o777 == 0o600
    raw = tmp_path / "expected.raw"
    raw.write_bytes(expected)
    qemu_img("check", "-q", kept)
    qemu_img("compare", "-q", "-f", "qcow2", "-F", "raw", kept, raw)
    said = json.loads(qemu_img("info", "--output=json", kept))
    assert said["full-backing-filename"] == str(golden)
    assert said["backing-filename-format"] == "qcow2"
    own = NbdimgServer(f"disk={kept}", options=[f"--allow-references={tmp_path}"])
    with own, connected(own, "disk") as client:
        assert whole(client) == expected


@pytest.mark.parametrize("name", ["golden.qcow2", "a:b.qcow2", "with space.qcow2"])
def test_kept_overlay_beside_the_golden_image_names_it_without_its_directory(
    tmp_path: Path, golden: Path, name: str
) -> None:
    image = golden.rename(tmp_path / name)
    with ConfiguredServer(tmp_path, export_text(image, tmp_path)) as server, connected(server, "base@vm1") as client:
        assert client.write(0, b"x" * 512).error == 0
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for each in (image, tmp_path / "base@vm1.qcow2"):
        each.rename(moved / each.name)
    said = json.loads(qemu_img("info", "--output=json", moved / "base@vm1.qcow2"))
    assert said["backing-filename"] == (f"./{name}" if ":" in name else name)
    qemu_img("map", moved / "base@vm1.qcow2")


def test_kept_overlay_is_one_disk_for_all_its_connections_and_closed_with_the_last(
    golden: Path, overlays: Path, tmp_path: Path
) -> None:
    kept = overlays / "base@vm42.qcow2"
    write = [require_program("qemu-io"), "-f", "qcow2", "-c", "write -P 9 0 512", str(kept)]
    with ConfiguredServer(tmp_path, export_text(golden, overlays)) as server:
        with connected(server, "base@vm42") as one:
            with connected(server, "base@vm42") as two:
                assert one.export.flags & two.export.flags & MULTI_CONN
                assert open_overlays(server.pid, overlays) == 1
                assert one.write(0, b"1" * 4096).error == 0
                assert two.read(0, 4096).data == b"1" * 4096
                assert two.write(4096, b"2" * 4096).error == 0
                assert one.request(Command.FLUSH).error == 0
            assert one.read(4096, 4096).data == b"2" * 4096
            assert "lock" in subprocess.run(write, capture_output=True, text=True, check=False).stderr
        assert wait_until(lambda: open_overlays(server.pid, overlays) == 0, PATIENCE_S)
        subprocess.run(write, check=True, stdout=subprocess.DEVNULL)
        with connected(server, "base@vm42") as again:
            assert again.read(0, 512).data == b"\x09" * 512


def test_kept_overlay_that_16_connections_open_at_once_and_leave_again_and_again_is_opened_once(
    golden: Path, overlays: Path, tmp_path: Path
) -> None:
    """Each round the last one closes the file while the first of the next opens it."""
    with ConfiguredServer(tmp_path, export_text(golden, overlays)) as server:
        for index in range(8):
            with ExitStack() as stack:
                clients = [stack.enter_context(greeted(server.socket_path)) for _ in range(16)]
                for client in clients:
                    client.send_option(Option.GO, info_data("base@vm1"))
                for client in clients:
                    assert client.read_option_replies(Option.GO)[-1].type == Rep.ACK
                for client in clients:
                    assert client.read(0, 512).data == (bytes([index]) * 512 if index else CONTENT[:512])
                assert clients[0].write(0, bytes([index + 1]) * 512).error == 0
        assert wait_until(lambda: open_overlays(server.pid, overlays) == 0, PATIENCE_S)
    assert os.listdir(overlays) == ["base@vm1.qcow2"]
    qemu_img("check", "-q", overlays / "base@vm1.qcow2")


def test_kept_overlay_takes_a_copy_over_four_connections(golden: Path, overlays: Path, tmp_path: Path) -> None:
    source, copy = tmp_path / "source.raw", tmp_path / "copy.raw"
    source.write_bytes(os.urandom(SIZE))
    with ConfiguredServer(tmp_path, export_text(golden, overlays)) as server:
        uri = f"nbd+unix:///base@vm1?socket={server.socket_path}"
        info = json.loads(subprocess.check_output([require_program("nbdinfo"), "--json", uri]))
        assert info["exports"][0]["can_multi_conn"] is True
        for pair in ((source, uri), (uri, copy)):
            subprocess.run([require_program("nbdcopy"), "--threads=4", "--connections=4", "--flush", *pair], check=True)
        assert server.stderr().count("attached to 'base@vm1'") >= 4
    assert copy.read_bytes() == source.read_bytes()
    qemu_img("check", "-q", overlays / "base@vm1.qcow2")
    qemu_img("compare", "-q", "-f", "qcow2", "-F", "raw", overlays / "base@vm1.qcow2", source)


HOSTILE = {
    "base@../x": Rep.ERR_UNKNOWN,
    "base@": Rep.ERR_UNKNOWN,
    "base@a/b": Rep.ERR_UNKNOWN,
    "base@/etc/x": Rep.ERR_UNKNOWN,
    "base@.": Rep.ERR_UNKNOWN,
    "base@..": Rep.ERR_UNKNOWN,
    "base@-rf": Rep.ERR_UNKNOWN,
    "base@a@b": Rep.ERR_UNKNOWN,
    "base@a\n": Rep.ERR_UNKNOWN,
    "base@dns=vm42": Rep.ERR_UNKNOWN,
    "base@a\0": Rep.ERR_INVALID,
    "base@" + "a" * 129: Rep.ERR_UNKNOWN,
    "base@" + "a" * 4091: Rep.ERR_UNKNOWN,
    "base@" + "a" * 4092: Rep.ERR_TOO_BIG,
}


def test_kept_overlay_of_a_hostile_name_is_refused_and_makes_no_file(
    golden: Path, overlays: Path, tmp_path: Path
) -> None:
    with ConfiguredServer(tmp_path, export_text(golden, overlays)) as server:
        before = sorted(tmp_path.rglob("*"))
        with greeted(server.socket_path) as client:
            for name, answer in HOSTILE.items():
                assert go(client, name) == answer, name
        assert sorted(tmp_path.rglob("*")) == before
        longest = "base@" + "a" * 128
        with connected(server, longest) as client:
            assert client.read(0, 512).data == CONTENT[:512]
        assert [path.name for path in overlays.iterdir()] == [f"{longest}.qcow2"]
        assert "internal error" not in server.stderr()


def test_kept_overlay_behind_a_planted_link_is_not_opened_outside(golden: Path, overlays: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", golden, "-F", "qcow2", outside)
    before = outside.read_bytes()
    (overlays / "base@vm1.qcow2").symlink_to(outside)
    (overlays / "base@vm2.qcow2").symlink_to(tmp_path / "absent")
    with ConfiguredServer(tmp_path, export_text(golden, overlays)) as server, greeted(server.socket_path) as client:
        assert go(client, "base@vm1") == Rep.ERR_PLATFORM
        assert go(client, "base@vm2") == Rep.ERR_PLATFORM
    assert outside.read_bytes() == before
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("what", ["another backing file", "no backing file", "another format", "no image"])
def test_kept_overlay_that_lies_over_something_else_is_refused(
    golden: Path, overlays: Path, tmp_path: Path, what: str
) -> None:
    kept = overlays / "base@vm1.qcow2"
    other = tmp_path / "other.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", other, str(SIZE))
    backing = {
        "another backing file": ["-b", str(other), "-F", "qcow2"],
        "another format": ["-b", str(golden), "-F", "raw"],
    }
    if what == "no image":
        kept.write_bytes(b"x" * 4096)
    else:
        qemu_img("create", "-q", "-f", "qcow2", *backing.get(what, []), kept, str(SIZE))
    before = kept.read_bytes()
    with ConfiguredServer(tmp_path, export_text(golden, overlays)) as server, greeted(server.socket_path) as client:
        assert go(client, "base@vm1") == Rep.ERR_PLATFORM
        assert go(client, "base@vm2") == Rep.ACK
        expected = "base@vm1.qcow2: " if what == "no image" else f"expected {golden} (qcow2)"
        assert wait_until(lambda: expected in server.stderr(), PATIENCE_S)
    assert kept.read_bytes() == before


def test_kept_overlay_is_not_made_over_a_golden_image_that_was_exchanged(
    golden: Path, overlays: Path, tmp_path: Path
) -> None:
    with ConfiguredServer(tmp_path, export_text(golden, overlays)) as server:
        with connected(server, "base@old") as client:
            assert client.write(0, b"x" * 512).error == 0
        os.replace(golden_image(overlays, "qcow2"), golden)
        with greeted(server.socket_path) as client:
            assert go(client, "base@new") == Rep.ERR_PLATFORM
            assert go(client, "base@old") == Rep.ERR_PLATFORM
        assert wait_until(lambda: "which takes a reload" in server.stderr(), PATIENCE_S)
    assert [path.name for path in overlays.iterdir()] == ["base@old.qcow2"]


def test_kept_overlays_beyond_their_number_are_not_made_and_those_there_are_opened(
    golden: Path, overlays: Path, tmp_path: Path
) -> None:
    text = "[limits]\noverlays = 2\n" + export_text(golden, overlays)
    with ConfiguredServer(tmp_path, text) as server, ExitStack() as stack:
        for name in ("a", "b"):
            connected(server, f"base@{name}").close()
        clients = [stack.enter_context(greeted(server.socket_path)) for _ in range(8)]
        for index, client in enumerate(clients):
            assert go(client, f"base@c{index}") == Rep.ERR_POLICY
        assert go(clients[0], "base@a") == Rep.ACK
    assert sorted(os.listdir(overlays)) == ["base@a.qcow2", "base@b.qcow2"]


def test_kept_overlay_that_could_not_be_made_at_first_is_closed_with_its_last_client(
    golden: Path, overlays: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(golden: Golden, file_name: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with LiveServer(live_config(golden, overlays, "kept")) as server:
        with monkeypatch.context() as patch, greeted(socket_of(server)) as client:
            patch.setattr(Golden, "make_named", full)
            assert go(client, "base@vm1") == Rep.ERR_PLATFORM
        lent = server.service.exports["base"][0].overlays.lent  # type: ignore[union-attr]
        with connect_negotiated(socket_of(server), "base@vm1") as client:
            assert client.read(0, 512).data == CONTENT[:512]
            assert len(lent) == 1
        assert wait_until(lambda: not lent, PATIENCE_S)


def test_kept_overlay_for_who_may_only_read_is_not_made_and_not_changed(
    golden: Path, overlays: Path, tmp_path: Path
) -> None:
    rule = f"[[exports.access]]\nuids = [{os.getuid()}]\n"
    text = export_text(golden, overlays) + rule
    with ConfiguredServer(tmp_path, text) as server:
        with connected(server, "base@there") as client:
            assert client.write(0, b"w" * 512).error == 0
        assert "1 adjusted" in server.reload(text + "read_only = true\n")
        with greeted(server.socket_path) as client:
            assert go(client, "base@absent") == Rep.ERR_UNKNOWN
        with connected(server, "base@there") as client:
            assert client.export.flags & TransmissionFlag.READ_ONLY
            assert client.write(0, b"x" * 512).error == NbdError.EPERM
            assert client.read(0, 512).data == b"w" * 512
    assert os.listdir(overlays) == ["base@there.qcow2"]


# Identities


def test_kept_overlay_by_its_plain_name_is_as_unknown_without_an_identity(
    golden: Path, overlays: Path, tmp_path: Path
) -> None:
    with ConfiguredServer(tmp_path, export_text(golden, overlays)) as server:
        with greeted(server.socket_path) as client:
            assert refusals(client, "base") == refusals(client, "absent")
            assert listed(client) == []
        assert wait_until(lambda: "may not open export 'base': its overlays have names" in server.stderr(), PATIENCE_S)
    assert os.listdir(overlays) == []


def test_kept_overlay_of_a_certificate_is_its_own_and_nobody_can_ask_for_it(
    golden: Path, overlays: Path, tmp_path: Path
) -> None:
    authority = Authority(tmp_path / "ca")
    of_server = authority.issue("server", common_name="localhost", names=LOOPBACK_NAMES)
    one = authority.issue("client", common_name="one", names=(x509.DNSName("VM1.example"),))
    renewed = authority.issue("client", common_name="uno", names=(x509.DNSName("vm1.example"),))
    two = authority.issue("client", common_name="vm1.example")
    tls = TlsConfig(of_server.certificate_path, of_server.key_path, authority.path)
    config = live_config(golden, overlays, "kept")
    with LiveServer(replace(config, listeners=(NbdUri(host="127.0.0.1", port=0),), tls=tls)) as server:
        contexts = [client_context(authority, identity) for identity in (one, renewed, two)]
        with (
            tls_client(server.address, contexts[0]) as first,
            tls_client(server.address, contexts[1]) as same,
            tls_client(server.address, contexts[2]) as other,
        ):
            assert listed(first) == [b"base"]
            for client in (first, same, other):
                client.negotiate("base")
            assert first.write(0, b"1" * 4096).error == 0
            assert same.read(0, 4096).data == b"1" * 4096
            assert other.read(0, 4096).data == CONTENT[:4096]
            assert first.export.flags & MULTI_CONN
        with tls_client(server.address, contexts[2]) as thief:
            for name in ("base@dns=vm1.example", "base@dns:vm1.example"):
                assert go(thief, name) == Rep.ERR_UNKNOWN
            thief.negotiate("base@vm1.example")
            assert thief.read(0, 4096).data == CONTENT[:4096]
    names = ["base@cn=vm1.example.qcow2", "base@dns=vm1.example.qcow2", "base@vm1.example.qcow2"]
    assert sorted(os.listdir(overlays)) == names
    qemu_img("check", "-q", overlays / names[1])


# Reload and stop


def test_reload_of_overlay_options_reopens_and_removal_ends_its_clients(
    golden: Path, overlays: Path, tmp_path: Path
) -> None:
    own, kept = (export_text(golden, overlays, mode) for mode in ("per-client", "kept"))
    keep = tmp_path / "keep.raw"
    keep.write_bytes(bytes(4096))
    other = f'[[exports]]\nname = "keep"\npath = "{keep}"\nformat = "raw"\n'
    with ConfiguredServer(tmp_path, other + own) as server, connected(server, "keep") as stayer:
        with connected(server) as client:
            assert client.write(0, b"x" * 512).error == 0
            assert "1 reopened" in server.reload(other + kept)
            assert client.wait_closed(PATIENCE_S) is not None
        with connected(server, "base@vm1") as client:
            assert client.read(0, 512).data == CONTENT[:512]
            assert client.write(0, b"y" * 512).error == 0
            assert "1 adjusted" in server.reload(other + kept + 'description = "described"\n')
            assert client.read(0, 512).data == b"y" * 512
            assert "1 removed" in server.reload(other)
            assert client.wait_closed(PATIENCE_S) is not None
        assert stayer.read(0, 512).error == 0
        assert open_overlays(server.pid, tmp_path) == 1, "only the image of the other export"
        assert "1 export added" in server.reload(other + kept)
        with connected(server, "base@vm1") as client:
            assert client.read(0, 512).data == b"y" * 512
        assert "nothing was reloaded" in server.reload(other + kept.replace(str(overlays), f"{tmp_path}/absent"))
        with connected(server, "base@vm1") as client:
            assert client.read(0, 512).data == b"y" * 512


def test_client_that_is_taken_over_keeps_its_place_while_its_overlay_is_made(
    golden: Path, overlays: Path, slow_making: tuple[threading.Event, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that takes, and whoever wants the place: the client has not been silent."""
    is_asked, may_go_on = slow_making
    monkeypatch.setattr(server_module, "PLACE_KEPT_S", 0)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with ours, LiveServer(live_config(golden, overlays, limits=Limits(connections=1))) as server:
        export = server.service.registry.lookup("base")
        assert export is not None
        info = export.info
        is_asked.clear()
        may_go_on.clear()
        session = Session(info, info.flags, True, False, False, {})
        taking = server.start(server.service.server.take_up([LeftClient(theirs, session, (), b"")]))
        assert is_asked.wait(PATIENCE_S)
        with Client(socket_of(server)) as other, pytest.raises(ConnectionClosed):
            other.greet()
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            ours.recv(1)
        may_go_on.set()
        taking.result(PATIENCE_S)


def test_reload_while_an_overlay_is_made_refuses_it_and_closes_the_golden_image(
    golden: Path, overlays: Path, slow_making: tuple[threading.Event, threading.Event]
) -> None:
    is_asked, may_go_on = slow_making
    with LiveServer(live_config(golden, overlays)) as server, greeted(socket_of(server)) as client:
        is_asked.clear()
        may_go_on.clear()
        client.send_option(Option.GO, info_data("base"))
        assert is_asked.wait(PATIENCE_S)
        taken = server.now(server.service.registry.remove, "base")
        may_go_on.set()
        (reply,) = client.read_option_replies(Option.GO)
        assert (reply.type, reply.text) == (Rep.ERR_UNKNOWN, "the export was removed meanwhile")
        server.now(server.service.registry.add, taken, None)


def test_removal_before_an_overlay_is_begun_refuses_it(
    golden: Path, overlays: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Export] = []
    start = Shared.start

    def start_and_remove(self: Shared, work: Coroutine[Any, Any, None], export: Export) -> None:
        start(self, work, export)
        if not taken:
            taken.append(self.registry.remove("base"))

    with LiveServer(live_config(golden, overlays)) as server, greeted(socket_of(server)) as client:
        monkeypatch.setattr(Shared, "start", start_and_remove)
        assert [reply.type for reply in client.option(Option.GO, info_data("base"))] == [Rep.ERR_UNKNOWN]
        server.now(server.service.registry.add, taken[0], None)


@pytest.mark.parametrize("rule", [AccessRule(networks=("192.0.2.0/24",)), AccessRule(is_read_only=True)])
def test_right_taken_away_while_an_overlay_is_made_refuses_it(
    golden: Path, overlays: Path, slow_making: tuple[threading.Event, threading.Event], rule: AccessRule
) -> None:
    is_asked, may_go_on = slow_making
    with LiveServer(live_config(golden, overlays)) as server, greeted(socket_of(server)) as client:
        is_asked.clear()
        may_go_on.clear()
        client.send_option(Option.GO, info_data("base"))
        assert is_asked.wait(PATIENCE_S)
        (config,) = server.service.config.exports
        server.now(server.service.adjust, replace(config, access=(rule,)))
        may_go_on.set()
        assert [reply.type for reply in client.read_option_replies(Option.GO)] == [Rep.ERR_UNKNOWN]
        assert server.service.server.clients_of(server.service.exports["base"]) == []


@pytest.mark.parametrize("mode", ["per-client", "kept"])
def test_sigterm_drains_clients_of_overlays_and_exits_0(
    golden: Path, overlays: Path, tmp_path: Path, mode: str
) -> None:
    name = "base@vm1" if mode == "kept" else "base"
    with ConfiguredServer(tmp_path, export_text(golden, overlays, mode)) as server, connected(server, name) as client:
        requests = [client.new_request(Command.WRITE, at * 64 * KIB, 4096, payload=b"s" * 4096) for at in range(64)]
        client.send_requests(requests)
        replies = [client.read_reply() for _ in requests]
        assert not any(reply.error for reply in replies)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert "Traceback" not in server.stderr()
    if mode == "per-client":
        assert os.listdir(overlays) == []
        return
    qemu_img("check", "-q", overlays / "base@vm1.qcow2")
    with ConfiguredServer(tmp_path, export_text(golden, overlays)) as server, connected(server, name) as client:
        assert [client.read(at * 64 * KIB, 4096).data for at in range(64)] == [b"s" * 4096] * 64


# Settings


@pytest.mark.parametrize(
    ("lines", "line", "reason"),
    [
        ('overlay = "each"', 4, "overlay: 'each' is not allowed, expected per-client or kept"),
        ('overlay = "kept"', 4, "overlay: overlays that are kept need a directory of their own: overlay_dir "),
        ('overlay_dir = "x"', 4, "overlay_dir: a directory for overlays is given"),
        ('read_only = true\noverlay = "per-client"', 5, "overlay: overlays are there to be written"),
        ('overlay = "per-client"\nkey_file = "k"', 4, "overlay: the image is encrypted"),
        ('overlay = "per-client"\nkey_files = { x = "k" }', 4, "overlay: the image is encrypted"),
    ],
)
def test_configuration_of_overlays_that_contradicts_itself_is_refused_with_its_line(
    tmp_path: Path, lines: str, line: int, reason: str
) -> None:
    file = tmp_path / "nbdimg.toml"
    file.write_text(f'[[exports]]\nname = "base"\npath = "x"\n{lines}\n')
    with pytest.raises(ConfigFileError) as refused:
        load_config(file, environment={})
    assert f"{file}:{line}: exports[0].{reason}" in refused.value.problems[0]


def test_configuration_may_lend_one_golden_image_twice_and_not_write_to_it_besides(tmp_path: Path) -> None:
    file = tmp_path / "nbdimg.toml"
    text = "\n".join(export_text(tmp_path / "x", tmp_path, "per-client", name) for name in ("a", "b"))
    file.write_text(text)
    assert [each.overlay for each in load_config(file, environment={}).server.exports] == ["per-client"] * 2
    file.write_text(f'{text}[[exports]]\nname = "c"\npath = "{tmp_path}/x"\n')
    with pytest.raises(ConfigFileError, match="is exported in line 1 already"):
        load_config(file, environment={})


def run_serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "nbdimg", "serve", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        (["--overlay", "--read-only"], 2, "overlays are there to be written"),
        (["--overlay-dir=/tmp"], 2, "a directory for overlays is given, and no overlays are asked for"),
        (["--overlay", "--overlay-dir=/absent"], 3, "/absent: no overlay can be made in it: No such file or directory"),
        (["--keep-overlays"], 2, "overlays that are kept need a directory of their own: overlay_dir or --overlay-dir"),
        (["--overlay", "--keep-overlays"], 2, "expected one of them"),
        (["--overlay", "--overlay-dir=/proc"], 3, "/proc: no overlay can be made in it: "),
    ],
)
def test_serve_with_overlay_options_that_cannot_be_says_why(
    golden: Path, options: Sequence[str], status: int, reason: str
) -> None:
    done = run_serve(*options, "--listen=nbd://127.0.0.1:0", str(golden))
    assert done.returncode == status, done.stderr
    assert reason in done.stderr


def test_serve_config_refuses_overlay_on_the_command_line(tmp_path: Path) -> None:
    done = run_serve("--overlay", f"--config={tmp_path}/file")
    assert done.returncode == 2
    assert "not on the command line" in done.stderr


def test_export_config_of_an_unknown_overlay_mode_is_refused() -> None:
    make: Callable[..., ExportConfig] = ExportConfig
    with pytest.raises(ConfigError, match="expected per-client or kept"):
        make("x", overlay="each")
