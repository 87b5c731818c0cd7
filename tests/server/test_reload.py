"""A changed configuration on a running server: what is named changes, everybody else notices nothing."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509

from nbdimg.admin.metrics import exposition
from nbdimg.config import AccessRule, ExportConfig, ServerConfig, TlsConfig
from nbdimg.errors import ImageLocked, ListenError
from nbdimg.export.export import Export
from nbdimg.limits import Limits
from nbdimg.server import opening, reload, service
from nbdimg.server.difference import Difference, difference
from nbdimg.server.listen import listen as real_listen
from nbdimg.server.live import Control
from nbdimg.server.reload import Reloader, stamp
from nbdimg.server.service import serving
from nbdimg.server.systemd import Notifier
from nbdimg.server.terms import terms_of
from nbdimg.uri import NbdUri
from tests.server.live import pattern, unsent_bytes
from tests.server.tls_live import client_context, tls_client
from tests.support.certificates import Authority
from tests.support.configured import ConfiguredServer, export
from tests.support.qcow2edit import qemu_img
from tests.support.rawclient import Client, connect_negotiated, try_connect
from tests.support.rawprotocol import KIB, MIB, ConnectionClosed, Option, Rep, TransmissionFlag, info_data
from tests.support.rss import wait_until

EXPORT_COUNT = 100


@pytest.fixture
def images(tmp_path: Path) -> Callable[[str], Path]:
    """Makes `NAME.img` of 64 KiB, each byte the first letter of its name."""

    def make(name: str) -> Path:
        path = tmp_path / f"{name}.img"
        path.write_bytes(name.encode()[:1] * 65536)
        return path

    return make


@pytest.fixture
def served(tmp_path: Path, images: Callable[[str], Path]) -> Iterator[tuple[ConfiguredServer, str]]:
    """A server of the export "keep", and the text that exports it."""
    keep = export("keep", images("keep"))
    with ConfiguredServer(tmp_path, keep) as server:
        yield server, keep
        assert "Traceback" not in server.stderr()
        assert "internal error" not in server.stderr()


def names(server: ConfiguredServer) -> set[str]:
    """What a fresh client is told of exports."""
    with Client(server.socket_path) as client:
        client.greet()
        replies = client.option(Option.LIST)
        return {reply.data[4 : 4 + int.from_bytes(reply.data[:4], "big")].decode() for reply in replies[:-1]}


def is_known(server: ConfiguredServer, name: str) -> bool:
    with Client(server.socket_path) as client:
        client.greet()
        return client.option(Option.INFO, info_data(name, ()))[-1].type == Rep.ACK


def open_files(pid: int) -> list[str]:
    found: list[str] = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(os.readlink(descriptor))
    return found


def assert_served(client: Client, letter: bytes) -> None:
    assert client.read(0, 4096).data == letter * 4096


# The difference

A, B = ExportConfig("/a", "a"), ExportConfig("/b", "b")
TCP, UNIX = NbdUri(host="::1"), NbdUri(socket="/s")
BASE = ServerConfig((A, B), listeners=(TCP,))


@pytest.mark.parametrize(
    ("new", "expected", "said"),
    [
        (BASE, Difference(), "nothing changed"),
        (replace(BASE, exports=(B, A)), Difference(), "nothing changed"),
        (replace(BASE, exports=(A,)), Difference(removed=(B,)), "1 removed"),
        (
            replace(BASE, exports=(B, ExportConfig("/a", "c"))),
            Difference(added=(ExportConfig("/a", "c"),), removed=(A,)),
            "1 export added, 1 removed",
        ),
        (
            replace(BASE, exports=(A, replace(B, description="x"))),
            Difference(adjusted=((B, replace(B, description="x")),)),
            "1 adjusted",
        ),
        (
            replace(BASE, exports=(A, replace(B, access=(AccessRule(uids=(1,)),), is_tls_only=False))),
            Difference(adjusted=((B, replace(B, access=(AccessRule(uids=(1,)),), is_tls_only=False)),)),
            "1 adjusted",
        ),
        (
            replace(BASE, exports=(A, replace(B, description="x", is_read_only=True))),
            Difference(reopened=((B, replace(B, description="x", is_read_only=True)),)),
            "1 reopened",
        ),
        (
            replace(BASE, listeners=(UNIX,)),
            Difference(listeners_added=(UNIX,), listeners_removed=(TCP,)),
            "1 listener added, 1 listener removed",
        ),
        (replace(BASE, limits=Limits(connections=3)), Difference(has_new_limits=True), "new limits"),
        (replace(BASE, tls=TlsConfig("x")), Difference(has_new_tls=True), "new TLS settings"),
    ],
)
def test_difference_names_what_changed_and_nothing_else(new: ServerConfig, expected: Difference, said: str) -> None:
    found = difference(BASE, new)
    assert found == expected
    assert str(found) == said


@pytest.mark.parametrize(
    "changed",
    [
        replace(A, path="/other"),
        replace(A, format="raw"),
        replace(A, is_read_only=True),
        replace(A, block_size_min=512),
        replace(A, key_path="/key"),
        replace(A, roots=("/r",)),
    ],
)
def test_difference_every_other_field_opens_the_image_anew(changed: ExportConfig) -> None:
    assert difference(BASE, replace(BASE, exports=(changed, B))).reopened == ((A, changed),)


# Exports


def test_command_line_holds_over_the_file_at_the_start_and_after_a_reload(
    tmp_path: Path, images: Callable[[str], Path]
) -> None:
    text = f'listen = ["nbd+unix:///?socket={tmp_path}/of-the-file"]\n' + export("keep", images("keep"))
    with ConfiguredServer(tmp_path, text, options=[f"--listen=nbd+unix:///?socket={tmp_path}/s"]) as server:
        assert server.reload(text + export("new", images("new"))).endswith("reloaded: 1 export added")
        assert names(server) == {"keep", "new"}
        assert not (tmp_path / "of-the-file").exists()


def test_reload_100_exports_come_and_go_while_a_client_works(
    served: tuple[ConfiguredServer, str], images: Callable[[str], Path]
) -> None:
    server, keep = served
    many = {f"x{index}": images(f"x{index}") for index in range(EXPORT_COUNT)}
    is_done = threading.Event()
    counts = [0]
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with connect_negotiated(server.socket_path, "keep") as client:
                while not is_done.is_set():
                    index = counts[0] % 16
                    data = bytes([index]) * 4096
                    assert client.write(index * 4096, data).error == 0
                    assert client.read(index * 4096, 4096).data == data
                    counts[0] += 1
        except BaseException as error:
            errors.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        assert wait_until(lambda: counts[0] > 0 or bool(errors), 10)
        before = counts[0]
        said = server.reload(keep + "".join(export(name, path) for name, path in many.items()))
        assert said.endswith(f"reloaded: {EXPORT_COUNT} exports added")
        assert names(server) == {"keep", *many}
        with connect_negotiated(server.socket_path, "x77") as client:
            assert_served(client, b"x")
        assert server.reload(keep).endswith(f"reloaded: {EXPORT_COUNT} removed")
        assert names(server) == {"keep"}
        assert counts[0] > before
    finally:
        is_done.set()
        worker.join(30)
    assert errors == []
    assert not [path for path in open_files(server.pid) if re.search(r"/x\d+\.img$", path)]


def test_reload_removed_export_answers_what_it_had_and_other_clients_stay(
    served: tuple[ConfiguredServer, str], tmp_path: Path
) -> None:
    server, keep = served
    leaving = tmp_path / "leaving.img"
    leaving.write_bytes(pattern(0, MIB) * 32)
    assert "1 export added" in server.reload(keep + export("leaving", leaving))
    with (
        connect_negotiated(server.socket_path, "keep") as stayer,
        connect_negotiated(server.socket_path, "leaving") as leaver,
    ):
        requests = leaver.reads(40, 512 * KIB)
        leaver.send_requests(requests)
        assert wait_until(lambda: unsent_bytes(leaver) == 0, 5)
        server.write(keep)
        server.process.send_signal(1)
        assert wait_until(lambda: not is_known(server, "leaving"), 10)
        leaver.send_requests([leaver.new_request(0, 0, 4096)])
        replies = [leaver.read_reply() for _ in requests]
        assert {reply.cookie for reply in replies if reply.error == 0} == {each.cookie for each in requests}
        assert leaver.wait_closed(10) is not None
        assert "1 removed" in server.wait_reloaded()
        assert_served(stayer, b"k")


def test_reload_added_and_removed_under_another_name_opens_the_same_image(
    served: tuple[ConfiguredServer, str], images: Callable[[str], Path]
) -> None:
    """The lock of a writer is exclusive: the new export opens when the old one has closed."""
    server, keep = served
    image = images("disk")
    server.reload(keep + export("old", image))
    with connect_negotiated(server.socket_path, "old") as client:
        assert "1 export added, 1 removed" in server.reload(keep + export("new", image))
        assert client.wait_closed(5) is not None
    assert names(server) == {"keep", "new"}
    with connect_negotiated(server.socket_path, "new") as client:
        assert client.write(0, b"w" * 4096).error == 0


def test_reload_read_only_opens_the_image_anew_and_another_path_exchanges_it(
    served: tuple[ConfiguredServer, str], images: Callable[[str], Path]
) -> None:
    server, keep = served
    server.reload(keep + export("disk", images("a")))
    with connect_negotiated(server.socket_path, "disk") as first:
        assert "1 reopened" in server.reload(keep + export("disk", images("a"), "read_only = true"))
        assert first.wait_closed(5) is not None
    with connect_negotiated(server.socket_path, "disk") as second:
        assert second.export.flags & TransmissionFlag.READ_ONLY
        assert_served(second, b"a")
        assert "1 reopened" in server.reload(keep + export("disk", images("b")))
        assert second.wait_closed(5) is not None
    with connect_negotiated(server.socket_path, "disk") as third:
        assert not third.export.flags & TransmissionFlag.READ_ONLY
        assert_served(third, b"b")


def test_reload_description_changes_in_place_and_its_client_stays(served: tuple[ConfiguredServer, str]) -> None:
    server, keep = served
    with connect_negotiated(server.socket_path, "keep") as client:
        assert "1 adjusted" in server.reload(keep + 'description = "now described"\n')
        assert_served(client, b"k")
    with Client(server.socket_path) as client:
        client.greet()
        assert b"now described" in client.option(Option.LIST)[0].data


def test_reload_access_taken_away_ends_only_those_who_lose_it(served: tuple[ConfiguredServer, str]) -> None:
    server, keep = served
    uid = os.getuid()
    ours, others = (f"[[exports.access]]\nuids = [{each}]\n" for each in (uid, uid + 1))
    with connect_negotiated(server.socket_path, "keep") as client:
        assert "1 adjusted" in server.reload(keep + ours + others)
        assert_served(client, b"k")
        assert "1 adjusted" in server.reload(keep + others)
        assert client.wait_closed(5) is not None
    assert names(server) == set()
    server.reload(keep + ours)
    with connect_negotiated(server.socket_path, "keep") as client:
        assert_served(client, b"k")
        server.reload(keep + ours + "read_only = true\n")
        assert client.wait_closed(5) is not None


def test_reload_of_what_takes_tls_from_then_on_ends_its_plain_clients_alone(
    images: Callable[[str], Path], tmp_path: Path
) -> None:
    identity = Authority(tmp_path / "ca").issue("server")
    files = f'certificate_file = "{identity.certificate_path}"\nkey_file = "{identity.key_path}"'
    tls = f'[tls]\nmode = "selective"\n{files}\n'

    def text(is_tls_only: str, description: str) -> str:
        closing = export("closing", images("closing"), f"tls = {is_tls_only}")
        return tls + closing + export("open", images("open"), "tls = false", f'description = "{description}"')

    with ConfiguredServer(tmp_path, text("false", "before")) as server:
        plain, other = (connect_negotiated(server.socket_path, name) for name in ("closing", "open"))
        with plain, other, tls_client(server.socket_path, client_context(None)) as encrypted:
            encrypted.negotiate("closing")
            assert "2 adjusted" in server.reload(text("true", "after"))
            assert plain.wait_closed(5) is not None
            assert_served(other, b"o")
            assert_served(encrypted, b"c")


# What cannot be


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("lisen = []", "lisen: unknown key, did you mean listen"),
        ("[[exports]", "not TOML"),
        ("insecure_plaintext = 3", "3 is not allowed"),
        (export("new", "missing.img"), "missing.img: No such file or directory"),
        ('[[exports]]\nname = "new"\npath = "b.img"\nformat = "qcow2"\n', "b.img: "),
        ('listen = ["nbd://192.0.2.1:0"]', "nbd://192.0.2.1:0/ is reachable from other machines"),
        ('listen = ["nbd+unix:///?socket=b.img"]', "b.img: there is something else of that name, which is no socket"),
        ('[tls]\ncertificate_file = "missing.pem"\n', "missing.pem"),
        ('[admin]\nsocket = "missing/a"\n', "missing/a: there is no directory "),
        ('[admin]\nlisten = "127.0.0.1:0"\ntoken_file = "missing"\n', "missing: No such file or directory"),
        ('[admin]\nlisten = "127.0.0.1:0"\ntoken_file = "a.img"\n', "a.img can be read by everybody"),
        ('image_directories = ["missing"]', "missing: there is none, expected one at the start"),
    ],
)
def test_reload_of_what_cannot_be_changes_nothing_and_says_so(
    served: tuple[ConfiguredServer, str], images: Callable[[str], Path], text: str, reason: str
) -> None:
    server, keep = served
    images("b")
    good = export("good", images("a"))
    wrong = text + "\n" + good if text.startswith("[") else text + "\n" + keep + good
    with connect_negotiated(server.socket_path, "keep") as client:
        said = server.reload(wrong)
        assert "ERROR: nothing was reloaded: " in said
        assert reason in said
        assert names(server) == {"keep"}
        assert_served(client, b"k")
        assert server.reload(keep + good).endswith("reloaded: 1 export added")
        assert names(server) == {"keep", "good"}
        assert_served(client, b"k")


def test_reload_missing_file_changes_nothing(served: tuple[ConfiguredServer, str]) -> None:
    server, _ = served
    server.file.unlink()
    assert "nothing was reloaded" in server.hang_up()
    assert names(server) == {"keep"}


def test_reload_trial_refuses_another_format_before_the_client_is_troubled(
    served: tuple[ConfiguredServer, str],
) -> None:
    server, keep = served
    with connect_negotiated(server.socket_path, "keep") as client:
        said = server.reload(keep.replace('"raw"', '"qcow2"'))
        assert "nothing was reloaded" in said
        assert "keep.img" in said
        assert_served(client, b"k")


def test_reload_trial_refuses_to_write_to_what_can_only_be_read_before_the_client_is_troubled(
    served: tuple[ConfiguredServer, str], tmp_path: Path
) -> None:
    server, keep = served
    image = tmp_path / "vm.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "64k")
    with image.open("r+b") as file:
        file.seek(72)
        file.write((1 << 1).to_bytes(8, "big"))
    vm = '[[exports]]\nname = "vm"\npath = "vm.qcow2"\n'
    server.reload(keep + vm + "read_only = true\n")
    with connect_negotiated(server.socket_path, "vm") as client:
        said = server.reload(keep + vm)
        assert "nothing was reloaded" in said
        assert "it is marked corrupt" in said
        assert_served(client, b"\0")


def test_reload_name_that_a_snapshot_of_a_reopened_image_has_is_refused_and_nobody_is_troubled(
    served: tuple[ConfiguredServer, str], images: Callable[[str], Path], tmp_path: Path
) -> None:
    server, keep = served
    image = tmp_path / "vm.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "64k")
    qemu_img("snapshot", "-c", "s", image)
    vm = '[[exports]]\nname = "vm"\npath = "vm.qcow2"\n'
    server.reload(keep + vm)
    with connect_negotiated(server.socket_path, "vm") as client:
        said = server.reload(keep + vm + "read_only = true\n" + export("vm@s", images("a")))
        assert "nothing was reloaded: two exports would be named 'vm@s'" in said
        assert names(server) == {"keep", "vm", "vm@s"}
        assert_served(client, b"\0")


@pytest.mark.parametrize("name", ["disk", "renamed"])
def test_reload_image_lost_to_another_process_meanwhile_restores_the_old_export(
    images: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """Between closing and opening an image somebody else takes it, for a moment. Rights that are taken stay taken."""
    image = str(images("a"))
    calls: list[bool] = []
    real_open = opening.open_exports

    async def open_exports(config: ExportConfig, limits: Limits, *, is_trial: bool = False) -> list[Export]:
        calls.append(is_trial)
        if calls == [True, False]:
            raise ImageLocked(image, "cannot be locked")
        return await real_open(config, limits, is_trial=is_trial)

    old = ServerConfig((ExportConfig(image, "disk", "raw"),), listeners=(NbdUri(socket=f"{tmp_path}/s"),))
    rules = (AccessRule(uids=(1,)),)
    new = replace(old, exports=(replace(old.exports[0], name=name, is_read_only=True, access=rules),))

    async def scenario() -> None:
        async with serving(old) as running:
            for module in (reload, service):
                monkeypatch.setattr(module, "open_exports", open_exports)
            reloader = Reloader(running, lambda: (new, False), Notifier({}), str(tmp_path / "file"))
            assert not await reloader.reload()
            assert reloader.refusal == f"not all was reloaded: {image}: cannot be locked"
            assert reloader.refused_image == image
            assert running.config == replace(old, exports=(replace(old.exports[0], access=rules),))
            assert running.registry.terms("disk") == terms_of(new.exports[0])
            assert [export.image.is_writable for export in running.registry] == [True]
            assert await reloader.reload()
            assert reloader.refusal is None
            assert running.config == new
            assert [export.image.is_writable for export in running.registry] == [False]
            reloader.stop()

    asyncio.run(scenario())
    assert f"{name} could not be opened again" in caplog.text


def test_reload_that_swaps_images_and_loses_one_knows_what_is_exported(
    images: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The image of "one" is lost for a moment. What "two" had before is not put in the place of what it has."""
    caplog.set_level("INFO")
    a, b = str(images("a")), str(images("b"))
    statuses: list[str] = []
    monkeypatch.setattr(Notifier, "ready", lambda _, text: statuses.append(text))
    is_lost = True
    real_open = opening.open_exports

    async def open_exports(config: ExportConfig, limits: Limits, *, is_trial: bool = False) -> list[Export]:
        nonlocal is_lost
        if is_lost and config.name == "one" and not is_trial:
            is_lost = False
            raise ImageLocked(b, "cannot be locked")
        return await real_open(config, limits, is_trial=is_trial)

    def exports(one: str, two: str) -> tuple[ExportConfig, ...]:
        return (ExportConfig(one, "one", "raw"), ExportConfig(two, "two", "raw"))

    old = ServerConfig(exports(a, b), listeners=(NbdUri(socket=f"{tmp_path}/s"),))
    new = replace(old, exports=exports(b, a))

    async def scenario() -> None:
        async with serving(old) as running:
            monkeypatch.setattr(service, "open_exports", open_exports)
            reloader = Reloader(running, lambda: (new, False), Notifier({}), str(tmp_path / "file"))
            assert not await reloader.reload()
            assert {export.name: export.image.path for export in running.registry} == {"two": a}
            assert running.config.exports == (new.exports[1],)
            assert statuses == [f"serving 1 export; not all was reloaded: {b}: cannot be locked"]
            assert "reloaded in part: 2 reopened" in caplog.messages
            control = Control(running, reloader)
            assert control.unserved == {"one": f"{b}: cannot be locked"}
            assert b'nbdimg_export_failed{export="one"} 1\n' in (await exposition(running))[0]
            assert await reloader.reload()
            assert not control.unserved
            assert {export.name: export.image.path for export in running.registry} == {"one": b, "two": a}
            reloader.stop()

    asyncio.run(scenario())


# Listeners and limits


def exposures(caplog: pytest.LogCaptureFixture) -> int:
    """How often the log told of plain text that other machines reach, since it was last asked."""
    count = sum("in plain text" in each.message for each in caplog.records)
    caplog.clear()
    return count


def test_listener_that_others_reach_in_plain_text_is_told_of_once(
    images: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At the start and when it comes, with its real port; not at each reload and not for what is refused."""
    local, wide = NbdUri(host="127.0.0.1", port=0), NbdUri(host="0.0.0.0", port=0)
    config = ServerConfig((ExportConfig(str(images("a")), "a"),), listeners=(wide,), allows_plaintext=True)
    missing = ExportConfig(f"{tmp_path}/missing.img", "b")
    wanted = [
        (config, 0),
        (replace(config, listeners=(local,)), 0),
        (replace(config, exports=(*config.exports, missing)), 0),
        (config, 1),
    ]

    async def scenario() -> None:
        async with serving(config) as running:
            (port,) = (each.port for each in running.server.listeners)
            assert f"nbd://0.0.0.0:{port}/: in plain text" in caplog.text
            assert exposures(caplog) == 1
            coming = iter([each for each, _ in wanted])
            reloader = Reloader(running, lambda: (next(coming), False), Notifier({}), str(tmp_path / "file"))
            for _, count in wanted:
                await reloader.reload()
                assert exposures(caplog) == count
            reloader.stop()

    asyncio.run(scenario())


def test_listener_where_an_added_export_is_the_first_in_plain_text_is_told_of(
    images: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    identity = Authority(tmp_path / "ca").issue("server")
    tls = TlsConfig(identity.certificate_path, identity.key_path, mode="selective")
    config = ServerConfig(listeners=(NbdUri(host="0.0.0.0", port=0),), exports=(), tls=tls, allows_plaintext=True)

    async def scenario() -> None:
        async with serving(config) as running:
            control = Control(running, None)
            told = []
            for name, is_tls_only in (("a", True), ("b", False), ("c", False)):
                await control.add(ExportConfig(str(images(name)), name, is_tls_only=is_tls_only))
                told.append(exposures(caplog))
            assert told == [0, 1, 0]

    asyncio.run(scenario())


def test_reload_listeners_come_and_go_and_connections_stay(
    served: tuple[ConfiguredServer, str], tmp_path: Path
) -> None:
    server, keep = served
    first, second = (f"nbd+unix:///?socket={tmp_path}/{name}" for name in ("s", "t"))
    with connect_negotiated(server.socket_path, "keep") as client:
        assert "1 listener added" in server.reload(f'listen = ["{first}", "{second}"]\n{keep}')
        with connect_negotiated(str(tmp_path / "t"), "keep") as other:
            assert "1 listener removed" in server.reload(f'listen = ["{second}"]\n{keep}')
            assert try_connect(server.socket_path) is None
            assert not os.path.exists(server.socket_path)
            assert_served(client, b"k")
            assert_served(other, b"k")
            assert "1 listener added, 1 listener removed" in server.reload(keep)
            assert_served(other, b"k")
    assert names(server) == {"keep"}


def test_reload_listener_that_cannot_open_leaves_the_others_as_they_were(
    served: tuple[ConfiguredServer, str], tmp_path: Path
) -> None:
    server, keep = served
    said = server.reload(
        f'listen = ["nbd+unix:///?socket={tmp_path}/t", "nbd+unix:///?socket={tmp_path}/no/t"]\n{keep}'
    )
    assert "cannot listen on" in said
    assert not (tmp_path / "t").exists()
    assert names(server) == {"keep"}


def test_reload_listener_takes_its_port_to_all_addresses_and_back(
    images: Callable[[str], Path], tmp_path: Path
) -> None:
    """127.0.0.1 and 0.0.0.0 exclude each other at one port, also while connections through the first are up."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    keep = export("keep", images("keep"))

    def listen(*uris: str) -> str:
        every = ", ".join(f'"{uri}"' for uri in (*uris, f"nbd+unix:///?socket={tmp_path}/s"))
        return f"listen = [{every}]\ninsecure_plaintext = true\n{keep}"

    here, everywhere = f"nbd://127.0.0.1:{port}", f"nbd://0.0.0.0:{port}"
    with (
        ConfiguredServer(tmp_path, listen(here)) as server,
        connect_negotiated(("127.0.0.1", port), "keep") as client,
    ):
        assert "1 listener added, 1 listener removed" in server.reload(listen(everywhere))
        assert_served(client, b"k")
        with connect_negotiated(("127.0.0.2", port), "keep") as other:
            assert "1 listener added, 1 listener removed" in server.reload(listen(here))
            assert_served(other, b"k")
        said = server.reload(listen(everywhere, f"nbd+unix:///?socket={tmp_path}/no/t"))
        assert "nothing was reloaded: cannot listen on" in said
        assert_served(client, b"k")
        assert try_connect(("127.0.0.2", port)) is None
        connect_negotiated(("127.0.0.1", port), "keep").close()


def test_reload_listener_that_cannot_be_opened_again_keeps_no_other_closed(
    images: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The machine has lost an address; its listener was in the way of a new one, which could not be opened either."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    lost, other = (NbdUri(host=host, port=port) for host in ("127.0.0.1", "127.0.0.2"))
    old = ServerConfig((ExportConfig(str(images("a")), "a"),), listeners=(lost, other))
    new = replace(old, listeners=(NbdUri(host="192.0.2.1", port=port),), allows_plaintext=True)

    def listen(uri: NbdUri) -> tuple[list[socket.socket], NbdUri]:
        if uri == lost:
            raise ListenError("the address is lost")
        return real_listen(uri)

    async def scenario() -> None:
        async with serving(old) as running:
            wanted = iter((new, old))
            reloader = Reloader(running, lambda: (next(wanted), False), Notifier({}), str(tmp_path / "file"))
            with monkeypatch.context() as patch:
                patch.setattr("nbdimg.server.server.listen", listen)
                assert not await reloader.reload()
            assert "192.0.2.1" in (reloader.refusal or "")
            assert "the address is lost" in caplog.text
            assert running.server.listeners == [other]
            assert await reloader.reload()
            assert set(running.server.listeners) == {lost, other}
            reloader.stop()

    asyncio.run(scenario())


def test_reload_limits_hold_for_connections_from_then_on(served: tuple[ConfiguredServer, str]) -> None:
    server, keep = served
    with connect_negotiated(server.socket_path, "keep") as client, Client(server.socket_path) as early:
        early.greet()
        assert "new limits" in server.reload(keep + "[limits]\nconnections = 3\nhandshake_timeout = 0.2\n")
        with Client(server.socket_path) as late, Client(server.socket_path) as refused:
            with pytest.raises(ConnectionClosed):
                refused.greet()
            late.greet()
            assert late.wait_closed(5) is not None
        assert not early.is_closed_without_reading()
        assert_served(client, b"k")


def test_reload_payload_size_is_what_new_clients_are_told(served: tuple[ConfiguredServer, str]) -> None:
    server, keep = served
    with connect_negotiated(server.socket_path, "keep") as client:
        assert "new limits" in server.reload(keep + '[limits]\npayload_size = "1M"\n')
        assert_served(client, b"k")
        with connect_negotiated(server.socket_path, "keep") as later:
            assert (client.export.block_size, later.export.block_size) == ((1, 4096, 64 * MIB), (1, 4096, MIB))


def test_reload_that_changes_the_logs_format_says_that_it_takes_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = ServerConfig((), listeners=(NbdUri(socket=f"{tmp_path}/s"),))
    new = replace(old, log_format="json")

    async def scenario() -> None:
        async with serving(old) as running:
            reloader = Reloader(running, lambda: (new, False), Notifier({}), str(tmp_path / "file"))
            assert await reloader.reload()
            assert running.config == old
            reloader.stop()

    asyncio.run(scenario())
    assert "what is new in [admin], [metrics] and log_format takes a restart" in caplog.messages


# What causes it


def test_reload_waits_where_no_thread_can_be_started(
    images: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = ServerConfig((ExportConfig(str(images("a")), "disk", "raw"),), listeners=(NbdUri(socket=f"{tmp_path}/s"),))
    new = replace(old, exports=(replace(old.exports[0], description="new"),))
    refused: list[threading.Thread] = []

    def scarce(thread: threading.Thread) -> None:
        refused.append(thread)
        raise RuntimeError("can't start new thread")

    async def scenario() -> None:
        monkeypatch.setattr(threading.Thread, "start", scarce)
        async with serving(old) as running:
            opening_count = len(refused)
            assert opening_count
            reloader = Reloader(running, lambda: (new, False), Notifier({}), str(tmp_path / "file"))
            assert await reloader.reload()
            assert len(refused) > opening_count
            assert running.config == new
            reloader.stop()

    asyncio.run(scenario())


def test_stamp_tells_writes_exchanges_and_the_swap_of_a_directory_link(tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert stamp(str(file)) is None
    file.write_text("1")
    first = stamp(str(file))
    assert stamp(str(file)) == first
    os.utime(file, ns=(5, 5))
    second = stamp(str(file))
    assert first != second
    file.with_suffix(".new").write_text("1")
    os.utime(file.with_suffix(".new"), ns=(5, 5))
    file.with_suffix(".new").replace(file)
    assert stamp(str(file)) != second
    config_map(tmp_path, 1, "x")
    mounted = str(tmp_path / "mount.toml")
    third = stamp(mounted)
    assert third is not None
    config_map(tmp_path, 2, "x")
    assert stamp(mounted) not in (None, third)


def config_map(directory: Path, version: int, text: str) -> Path:
    """As the kubelet writes a ConfigMap: files in a new directory, to which the link `..data` is exchanged."""
    data = directory / f"..{version}"
    data.mkdir()
    (data / "mount.toml").write_text(text)
    (directory / "..new").symlink_to(data.name)
    (directory / "..new").rename(directory / "..data")
    file = directory / "mount.toml"
    if not file.is_symlink():
        file.symlink_to("..data/mount.toml")
    return file


def test_reload_watches_a_config_map_and_a_wrong_one_changes_nothing(
    tmp_path: Path, images: Callable[[str], Path]
) -> None:
    head = f'reload = "watch"\nlisten = ["nbd+unix:///?socket={tmp_path}/s"]\n'
    keep, more = export("keep", images("keep")), export("more", images("more"))
    file = config_map(tmp_path, 1, head + keep)
    with ConfiguredServer(tmp_path, "", file=file) as server, connect_negotiated(server.socket_path, "keep") as client:
        config_map(tmp_path, 2, head + "zzz = 1\n" + keep + more)
        assert "zzz: unknown key" in server.wait_reloaded()
        config_map(tmp_path, 3, head + keep + more)
        assert "1 export added" in server.wait_reloaded()
        assert names(server) == {"keep", "more"}
        assert_served(client, b"k")


def serial_number(server: ConfiguredServer, context: ssl.SSLContext) -> int:
    with tls_client(server.socket_path, context) as client:
        assert isinstance(client.sock, ssl.SSLSocket)
        der = client.sock.getpeercert(binary_form=True)
        assert der is not None
        return x509.load_der_x509_certificate(der).serial_number


def test_reload_watches_a_file_that_is_still_being_written_until_it_is_quiet(
    images: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three looks find it longer each time, and only the fourth as the third did."""
    config = ServerConfig((ExportConfig(str(images("a")), "a", "raw"),), listeners=(NbdUri(socket=f"{tmp_path}/s"),))
    sizes = [1, 2, 3, 3]
    looks: list[int] = []

    def look(path: str) -> reload.Stamp:
        if len(looks) < len(sizes):
            looks.append(sizes[len(looks)])
        return (path, 0, 0, 0, looks[-1], 0)

    async def scenario() -> None:
        is_loaded = asyncio.Event()
        loop = asyncio.get_running_loop()

        def load() -> tuple[ServerConfig, bool]:
            loop.call_soon_threadsafe(is_loaded.set)
            return config, True

        async with serving(config) as running:
            monkeypatch.setattr(reload, "stamp", look)
            seen = ("", 0, 0, 0, 0, 0)
            watching = Reloader(running, load, Notifier({}), "file", is_watching=True, seen=seen, watch_interval_s=0.01)
            await asyncio.wait_for(is_loaded.wait(), 10)
            assert looks == sizes
            watching.stop()

    asyncio.run(scenario())


def test_reload_on_request_watches_what_it_has_read_from_then_on(
    images: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that has changed is not read once more, and files that it names for the first time are looked at."""
    identity = Authority(tmp_path / "ca").issue("server")
    tls = TlsConfig(identity.certificate_path, identity.key_path)
    old = ServerConfig((ExportConfig(str(images("a")), "a", "raw"),), listeners=(NbdUri(socket=f"{tmp_path}/s"),))
    file = tmp_path / "file"
    file.write_text("old")
    load_count = 0
    real_look = reload._stamps

    async def scenario() -> None:
        is_loaded, looks = asyncio.Event(), asyncio.Queue[None]()
        loop = asyncio.get_running_loop()

        def look(paths: Sequence[str]) -> dict[str, reload.Stamp | None]:
            loop.call_soon_threadsafe(looks.put_nowait, None)
            return real_look(paths)

        monkeypatch.setattr(reload, "_stamps", look)

        def load() -> tuple[ServerConfig, bool]:
            nonlocal load_count
            load_count += 1
            loop.call_soon_threadsafe(is_loaded.set)
            return replace(old, tls=tls), True

        async with serving(old) as running:
            seen = stamp(str(file))
            watching = Reloader(running, load, Notifier({}), str(file), seen=seen, watch_interval_s=0.01)
            file.write_text("new, and longer")
            assert await watching.reload()
            for _ in range(looks.qsize() + 5):
                await asyncio.wait_for(looks.get(), 10)
            assert load_count == 1
            is_loaded.clear()
            os.utime(identity.certificate_path, ns=(5, 5))
            await asyncio.wait_for(is_loaded.wait(), 10)
            watching.stop()

    asyncio.run(scenario())


def test_reload_watches_the_certificate_and_a_wrong_one_changes_nothing(
    tmp_path: Path, images: Callable[[str], Path]
) -> None:
    authority = Authority(tmp_path / "ca")
    first, second = (authority.issue("server", common_name=name) for name in ("first", "second"))
    tls = f'[tls]\ncertificate_file = "{first.certificate_path}"\nkey_file = "{first.key_path}"\n'
    context = client_context(authority)
    text = 'reload = "watch"\n' + tls + export("keep", images("keep"))
    with (
        ConfiguredServer(tmp_path, text, watch_interval_s=0.2) as server,
        tls_client(server.socket_path, context) as client,
    ):
        client.negotiate("keep")
        assert serial_number(server, context) == first.certificate.serial_number
        os.replace(second.certificate_path, first.certificate_path)
        said = server.wait_reloaded()
        assert "nothing was reloaded" in said
        assert first.certificate_path in said
        assert serial_number(server, context) == first.certificate.serial_number
        os.replace(second.key_path, first.key_path)
        assert "reloaded: nothing changed" in server.wait_reloaded()
        assert serial_number(server, context) == second.certificate.serial_number
        assert_served(client, b"k")


def test_reload_listener_begins_to_require_tls_at_its_address(
    served: tuple[ConfiguredServer, str], tmp_path: Path
) -> None:
    server, keep = served
    identity = Authority(tmp_path / "ca").issue("server")
    tls = f'[tls]\nmode = "off"\ncertificate_file = "{identity.certificate_path}"\nkey_file = "{identity.key_path}"\n'
    listen = f'listen = ["nbds+unix:///?socket={tmp_path}/s"]\n'
    with connect_negotiated(server.socket_path, "keep") as client:
        said = server.reload(listen + tls + keep)
        assert "1 listener added, 1 listener removed, new TLS settings" in said
        assert_served(client, b"k")
        with Client(server.socket_path) as later:
            later.greet()
            assert later.option(Option.GO, info_data("keep", ()))[-1].type == Rep.ERR_TLS_REQD
        with tls_client(server.socket_path, client_context(None)) as later:
            later.negotiate("keep")
            assert_served(later, b"k")


def test_reload_signals_in_a_burst_are_served_and_a_stop_in_a_drain_ends_soon(
    served: tuple[ConfiguredServer, str], tmp_path: Path
) -> None:
    """A client that reads nothing holds the drain of its export up; SIGTERM does not wait for it twice."""
    server, keep = served
    slow = tmp_path / "slow.img"
    slow.write_bytes(bytes(32 * MIB))
    limits = "[limits]\ndrain_timeout = 2\n"
    server.reload(keep + export("slow", slow) + limits)
    with connect_negotiated(server.socket_path, "slow") as client:
        client.send_requests(client.reads(40, 512 * KIB))
        assert wait_until(lambda: unsent_bytes(client) == 0, 5)
        server.write(keep + limits)
        for _ in range(20):
            server.process.send_signal(1)
        assert wait_until(lambda: not is_known(server, "slow"), 10)
        start = time.monotonic()
        server.terminate()
        assert server.wait(15) == 0
        assert time.monotonic() - start < 10


def test_control_reload_that_cuts_everybody_is_noticed(served: tuple[ConfiguredServer, str]) -> None:
    """What the tests above call "stays" must fail for a client whose export is gone."""
    server, _ = served
    with connect_negotiated(server.socket_path, "keep") as client:
        assert_served(client, b"k")
        assert "1 removed" in server.reload("")
        with pytest.raises((ConnectionClosed, AssertionError)):
            assert_served(client, b"k")
