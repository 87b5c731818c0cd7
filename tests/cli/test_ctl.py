"""`nbdimg ctl` against a real server: what it prints, what it exits with, and the server's own words for a refusal."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nbdimg.cli import http
from nbdimg.cli.answers import NOTHING
from nbdimg.cli.healthcheck import SOCKET_VARIABLE
from nbdimg.cli.http import Api
from nbdimg.cli.main import run
from nbdimg.config import AdminConfig, ServerConfig, TcpAddress
from nbdimg.errors import NbdimgError
from nbdimg.uri import NbdUri
from tests.admin.fake import FakeServer
from tests.admin.served import Served, make_qcow2
from tests.formats.vhdx import craft
from tests.support.httpclient import http_address
from tests.support.rawclient import connect_negotiated
from tests.support.rawprotocol import KIB, MIB, ConnectionClosed, ProtocolViolation
from tests.support.server import NbdimgServer
from tests.support.vhdximages import Builder, dynamic

DONE, FAILED, USAGE, IMAGE = 0, 1, 2, 3
TOKEN = "s3cret-token.0123456789"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("ctl")) as server:
        yield server
        assert "Traceback" not in server.stderr()


@pytest.fixture
def ctl(served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ctl:
    monkeypatch.setenv(SOCKET_VARIABLE, served.admin)
    return Ctl(capsys)


class Ctl:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str, status: int = DONE) -> str:
        """What it prints; when it fails, its only line of complaint without its beginning."""
        found = run(["ctl", *arguments])
        captured = self._capsys.readouterr()
        assert found == status, captured
        if status == DONE:
            assert captured.err == ""
            return captured.out
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("nbdimg: ")
        return line.removeprefix("nbdimg: ")

    def json(self, *arguments: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self(*arguments, "--json"))
        assert answer["version"] == 1
        return answer


def test_exports_as_table_and_as_json(ctl: Ctl, served: Served) -> None:
    head, *lines = [line.split() for line in ctl("exports").splitlines()]
    assert head == ["NAME", "SIZE", "FORMAT", "MODE", "CLIENTS", "OVERLAYS", "IN", "FLIGHT", "STATE", "PATH"]
    assert ["disk", str(MIB), "raw", "rw", "0", "-", "0", "ok", str(served.images / "disk.img")] in lines
    assert {"disk", "vm"} <= {each["name"] for each in ctl.json("exports")["exports"]}


def test_clients_shows_who_is_connected(ctl: Ctl, served: Served) -> None:
    with connect_negotiated(served.socket_path, "disk"):
        (client,) = ctl.json("clients", "disk")["clients"]
        lines = [line.split() for line in ctl("clients").splitlines()]
        assert lines[0][:5] == ["ID", "PEER", "EXPORT", "TLS", "MODE"]
        shown = next(line for line in lines if line[0] == str(client["id"]))
        assert {"disk", "rw", str(os.getpid())} <= set(shown)
        assert shown[-1] == "-"
    assert ctl("clients", "nope", status=USAGE).startswith("there is no export 'nope', known are 'disk', 'vm'")


def test_add_relative_name_is_meant_from_here_and_remove_takes_it_away(
    ctl: Ctl, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.image("new.img")
    monkeypatch.chdir(served.images)
    options = ["--format=raw", "--read-only", "--description=news", "--min-block-size=4K", "--allow-references=."]
    assert ctl("add", "other=new.img", *options) == "other: 1 MiB (1048576 bytes), raw\n"
    with connect_negotiated(served.socket_path, "other") as client:
        assert client.read(0, 4096).data == b"\xa5" * 4096
        assert ctl("remove", "other", "--mode=hard") == "other: removed\n"
        with pytest.raises(ConnectionClosed):
            client.read(0, 4096)
    (state,) = ctl.json("add", "new.img")["exports"]
    assert (state["name"], state["path"], state["is_read_only"]) == ("new", str(served.images / "new.img"), False)
    assert ctl.json("remove", "new") == {"version": 1, "name": "new", "mode": "drain"}


def test_add_existing_file_with_an_equals_sign_is_taken_as_it_is(ctl: Ctl, served: Served) -> None:
    path = served.image("a=b.img")
    assert ctl("add", str(path)).startswith("a=b: ")
    ctl("remove", "a=b")


def test_add_that_is_refused_says_why_in_the_servers_words(ctl: Ctl, served: Served) -> None:
    missing = str(served.images / "missing.img")
    assert ctl("add", missing, status=IMAGE) == f"{missing}: No such file or directory"
    assert "another process or export has it open" in ctl("add", f"x={served.images}/disk.img", status=IMAGE)
    said = ctl("add", f"disk={served.image('y.img')}", status=USAGE)
    assert said == "there is an export 'disk' already, expected another name"
    said = ctl("add", "--format=vmdk", missing, status=USAGE)
    assert said.startswith("request body: format: 'vmdk' is not allowed, expected raw, qcow2 or vhdx")
    assert ctl("add", "--min-block-size=x", missing, status=USAGE).startswith("--min-block-size: 'x'")


def test_add_opens_to_whom_allow_names_alone(ctl: Ctl, served: Served) -> None:
    path = str(served.image("own.img"))
    stranger = f"--allow=uid:{os.getuid() + 1}"
    ctl("add", path, stranger, "--allow=network:10.1.0.0/16")
    with pytest.raises(ProtocolViolation):
        connect_negotiated(served.socket_path, "own")
    ctl("remove", "own")
    for rule, error in (
        (f"--allow=uid:{os.getuid()}", 0),
        (f"--allow-read-only=gid:{os.getgid()}", errno.EPERM),
    ):
        ctl("add", path, stranger, rule)
        with connect_negotiated(served.socket_path, "own") as client:
            assert client.write(0, bytes(512)).error == error
        ctl("remove", "own")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--allow=vm1"], "--allow: 'vm1' is not allowed, expected KIND:VALUE with dns, uri, "),
        (["--allow=host:vm1"], "--allow: 'host:vm1' is not allowed, expected KIND:VALUE with dns, uri, "),
        (["--allow=uid:"], "--allow: 'uid:' is not allowed, expected KIND:VALUE with dns, uri, "),
        (["--allow-read-only=uid:root"], "--allow-read-only: 'uid:root' is not allowed, expected the number of a uid"),
        (["--allow=gid:99999999999999999999"], "request body: access[0].gids"),
        (["--allow=network:10.1.0.1/16"], "request body: access[0].networks: network '10.1.0.1/16': "),
        (["--allow=dns:vm1.example"], "new: the rule for dns:vm1.example needs TLS with "),
        (["--no-tls"], 'request body: tls: this has a meaning only with tls.mode = "selective"'),
    ],
)
def test_add_rule_that_is_none_is_refused(ctl: Ctl, served: Served, options: list[str], said: str) -> None:
    assert ctl("add", str(served.image("new.img")), *options, status=USAGE).startswith(said)


def test_add_key_files_of_a_chain_are_meant_from_here(
    ctl: Ctl, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = served.image("plain.img")
    monkeypatch.chdir(served.images)
    Path("k").write_text("k")
    said = ctl("add", "plain.img", "--backing-key-file=base=k", status=USAGE)
    assert said.startswith(f"{path}: a key is given for {served.images}/base, which is no encrypted image of its chain")
    said = ctl("add", "plain.img", "--backing-key-file=base=none", status=USAGE)
    assert said == f"key file {served.images}/none: No such file or directory"
    said = ctl("add", "plain.img", "--backing-key-file=base=k", "--backing-key-file=./base=k", status=USAGE)
    assert said == f"--backing-key-file: '{served.images}/base' is given twice"


def test_add_vhdx_takes_a_parent_that_is_meant_from_here_and_a_lost_log(
    ctl: Ctl, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(served.images)
    Path("moved.vhdx").write_bytes(dynamic(b"\1" * MIB))
    Path("child.vhdx").write_bytes(Builder(MIB, parent=".\\parent.vhdx").content)
    ctl("add", "child.vhdx", status=IMAGE)
    ctl("add", "child.vhdx", "--parent=moved.vhdx")
    with connect_negotiated(served.socket_path, "child") as client:
        assert client.read(0, 4096).data == b"\1" * 4096
    ctl("remove", "child")
    content = bytearray(dynamic(b"\2" * MIB))
    content[128 * KIB : 132 * KIB] = craft.header(3, log_guid=craft.LOG_GUID)
    Path("lost.vhdx").write_bytes(content)
    ctl("add", "lost.vhdx", status=IMAGE)
    assert ctl("add", "lost.vhdx", "--accept-lost-log") == "lost: 1 MiB (1048576 bytes), vhdx\n"
    ctl("remove", "lost")


def test_add_gives_each_client_an_overlay_or_keeps_those_that_have_names(
    ctl: Ctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where overlays of the start lie: the sandbox lets no others be made."""
    monkeypatch.chdir(tmp_path)
    for name in ("first.img", "golden.img"):
        Path(name).write_bytes(b"\xa5" * MIB)
    Path("overlays").mkdir()
    shared = ["--format=raw", "--overlay-dir=overlays"]
    with NbdimgServer("first.img", options=["--keep-overlays", "--admin-socket=a", *shared]) as server:
        assert NbdUri.parse(server.uri).name == "first@NAME"
        assert "overlays of 'first' are kept: a client asks for 'first@NAME', with a NAME of its own" in server.stderr()
        monkeypatch.setenv(SOCKET_VARIABLE, "a")
        said = ctl("add", "golden.img", "--overlay", "--keep-overlays", status=USAGE)
        assert said == "--overlay throws overlays away and --keep-overlays does not, expected one of them"
        assert "need a directory of their own" in ctl("add", "golden.img", "--keep-overlays", status=USAGE)
        for mode, name, found in (
            ("--overlay", "golden", b"\xa5"),
            ("--keep-overlays", "golden@vm42", b"\x17"),
        ):
            assert ctl("add", "golden.img", mode, *shared).endswith("NAME\n") == (name != "golden")
            for is_back, content in enumerate((b"\xa5", found)):
                with connect_negotiated(server.socket_path, name) as client:
                    assert client.read(0, 512).data == content * 512
                    assert client.write(0, b"\x17" * 512).error == 0
                    if not is_back:
                        assert_shown_with_overlay(ctl, name)
            ctl("remove", "golden")
        with connect_negotiated(server.socket_path, "first@vm42") as client:
            assert client.read(0, 512).data == b"\xa5" * 512
    assert Path("golden.img").read_bytes() == Path("first.img").read_bytes() == b"\xa5" * MIB
    assert sorted(os.listdir("overlays")) == ["first@vm42.qcow2", "golden@vm42.qcow2"]


def assert_shown_with_overlay(ctl: Ctl, name: str) -> None:
    """`name` is what its only client has asked for."""
    golden, _, overlay = name.partition("@")
    mode = "kept" if overlay else "per-client"
    (export,) = (each for each in ctl.json("exports")["exports"] if each["name"] == golden)
    names = [overlay] if overlay else []
    assert (export["overlay"], export["overlays"], export["overlay_names"]) == (mode, 1, names)
    shown = {line.split()[0]: line.split()[5:7] for line in ctl("exports").splitlines()[1:]}
    assert shown == {"first": ["0", "kept"], "golden": ["1", mode]}
    (found,) = ctl.json("clients", golden)["clients"]
    assert (found["export"], found["overlay"]) == (golden, overlay or None)
    assert ctl("clients").splitlines()[1].split()[-6] == name


@pytest.mark.parametrize("image", ["", "new=", "=new.img"])
def test_add_with_an_empty_part_is_refused_and_not_taken_for_the_directory(ctl: Ctl, image: str) -> None:
    assert (
        ctl("add", image, status=USAGE)
        == f"{image!r} is not allowed, expected IMAGE or NAME=IMAGE, no part of it empty"
    )


def test_resize_and_shrink(ctl: Ctl, served: Served) -> None:
    served.added("sized")
    assert ctl("resize", "sized", "3M") == "sized: 3 MiB (3145728 bytes)\n"
    said = ctl("resize", "sized", "1M", status=USAGE)
    assert said.endswith("from 3145728 to 1048576 bytes and lose what lies behind, which takes --shrink")
    assert ctl.json("resize", "sized", "1M", "--shrink")["export"]["size"] == MIB
    assert ctl("resize", "sized", "+2M") == "sized: 3 MiB (3145728 bytes)\n"
    said = ctl("resize", "sized", "-1M", status=USAGE)
    assert said.endswith("from 3145728 to 2097152 bytes and lose what lies behind, which takes --shrink")
    assert ctl("resize", "sized", "-1M", "--shrink") == "sized: 2 MiB (2097152 bytes)\n"
    said = ctl("resize", "sized", "-4M", "--shrink", status=USAGE)
    assert said.endswith("the image has 2097152 bytes, of which 4194304 cannot be taken away")
    assert ctl("resize", "sized", "--shirnk", "1M", status=USAGE).startswith("Got unexpected extra argument")


def test_snapshot_create_list_delete(ctl: Ctl, served: Served) -> None:
    path = served.images / "snapped.qcow2"
    make_qcow2(path)
    ctl("add", str(path))
    assert ctl("snapshot", "list", "snapped") == ""
    assert ctl("snapshot", "create", "snapped", "a/b") == ("snapped: made snapshot 1 (a/b), exported as snapped@a/b\n")
    head, line = [each.split() for each in ctl("snapshot", "list", "snapped").splitlines()]
    assert head == ["ID", "NAME", "SIZE", "DATE", "EXPORT"]
    assert (line[0], line[1], line[2], line[4]) == ("1", "a/b", str(MIB), "snapped@a/b")
    assert [each["name"] for each in ctl.json("snapshot", "list", "snapped")["snapshots"]] == ["a/b"]
    assert ctl("snapshot", "delete", "snapped", "a/b") == "snapped: deleted snapshot a/b\n"
    ctl("snapshot", "create", "snapped", "c")
    assert ctl.json("snapshot", "delete", "snapped", "c") == {"version": 1, "name": "snapped", "snapshot": "c"}
    assert ctl("snapshot", "delete", "snapped", "a/b", status=USAGE) == "'snapped' has no snapshot 'a/b'"
    assert "raw images have no snapshots" in ctl("snapshot", "create", "disk", "x", status=IMAGE)
    ctl("remove", "snapped")


def test_bitmap_add_change_list_and_remove(ctl: Ctl) -> None:
    assert ctl("bitmap", "list", "vm") == ""
    assert ctl("bitmap", "add", "vm", "a/b", "-g", "4K") == "vm: added a/b\n"
    assert ctl("bitmap", "add", "vm", "c", "--disable", "a/b") == "vm: added c, disabled a/b\n"
    assert ctl("bitmap", "add", "vm", "d", "--disabled") == "vm: added d\n"
    assert [line.split() for line in ctl("bitmap", "list", "vm").splitlines()] == [
        ["NAME", "GRANULARITY", "STATE"],
        ["a/b", "4096", "disabled"],
        ["c", "65536", "enabled"],
        ["d", "65536", "disabled"],
    ]
    assert ctl("bitmap", "enable", "vm", "a/b", "d") == "vm: enabled a/b, d\n"
    assert ctl("bitmap", "clear", "vm", "c") == "vm: cleared c\n"
    assert ctl("bitmap", "merge", "vm", "c", "a/b", "d") == "vm: merged a/b, d into c\n"
    assert ctl("bitmap", "disable", "vm", "c") == "vm: disabled c\n"
    assert [each["is_enabled"] for each in ctl.json("bitmap", "list", "vm")["bitmaps"]] == [True, False, True]
    said = ctl("bitmap", "remove", "vm", "c", "x", status=USAGE)
    assert said.partition(": ")[2] == "there is no bitmap 'x', known are 'a/b', 'd'"
    assert ctl.json("bitmap", "remove", "vm", "c", "a/b", "d") == {"version": 1, "name": "vm", "bitmaps": []}
    assert "raw images have no dirty bitmaps" in ctl("bitmap", "add", "disk", "x", status=IMAGE)


def test_disconnect_by_id(ctl: Ctl, served: Served) -> None:
    with connect_negotiated(served.socket_path, "vm") as client:
        (found,) = ctl.json("clients", "vm")["clients"]
        assert ctl("disconnect", str(found["id"]), "--hard") == f"client {found['id']}: disconnected\n"
        with pytest.raises(ConnectionClosed):
            client.read(0, 512)
    assert ctl("disconnect", "999999", status=USAGE) == "there is no client 999999"
    with connect_negotiated(served.socket_path, "vm"):
        (found,) = ctl.json("clients", "vm")["clients"]
        assert ctl.json("disconnect", str(found["id"])) == {"version": 1, "id": found["id"], "mode": "drain"}


def test_reload_and_its_refusal(ctl: Ctl, served: Served) -> None:
    assert ctl("reload") == "reloaded\n"
    served.write(served.text + "zzz = 1\n")
    try:
        assert "zzz: unknown key" in ctl("reload", status=USAGE)
        missing = served.images / "missing.img"
        served.write(f'{served.text}\n[[exports]]\nname = "missing"\npath = "{missing}"\n')
        said = ctl("reload", status=IMAGE)
        assert said == f"{missing}: nothing was reloaded: No such file or directory"
    finally:
        served.write(served.text)
    assert ctl.json("reload") == {"version": 1, "reloaded": True}


def test_status(ctl: Ctl, served: Served) -> None:
    with connect_negotiated(served.socket_path, "disk"):
        first, counts, *_ = ctl("status").splitlines()
    assert first.startswith(f"serving, pid {served.pid}, up for ")
    assert counts.endswith(" exports, 1 connection")
    assert ctl.json("status")["pid"] == served.pid


def test_names_that_would_steer_the_terminal_are_escaped(ctl: Ctl, served: Served) -> None:
    served.added("\x1b[31mred")
    assert "\x1b" not in ctl("exports")
    assert "\\x1b[31mred" in ctl("exports")
    assert ctl("remove", "\x1b[31mred") == "\\x1b[31mred: removed\n"


@pytest.mark.parametrize("arguments", [["remove"], ["resize", "disk"], ["nope"], ["disconnect", "x"]])
def test_wrong_command_line_exits_2(ctl: Ctl, arguments: list[str]) -> None:
    assert re.search(r"[^.]; see nbdimg ctl( \w+)? --help$", ctl(*arguments, status=USAGE))


def test_remove_wrong_mode_is_refused_by_the_server(ctl: Ctl) -> None:
    assert ctl("remove", "disk", "--mode=soft", status=USAGE) == "mode is 'soft', expected drain, hide or hard"


@pytest.mark.parametrize(
    "arguments", [["remove", ""], ["resize", "", "1M"], ["snapshot", "list", ""], ["snapshot", "delete", "vm", ""]]
)
def test_name_that_is_empty_is_refused_as_such(ctl: Ctl, arguments: list[str]) -> None:
    """As of a variable that is not set."""
    assert ctl(*arguments, status=USAGE) == "a name is empty, expected that of an export or snapshot"


# Reaching a server


@pytest.mark.parametrize(
    "arguments", [["remove"], ["clients"], ["snapshot", "list"], ["bitmap", "list"], ["resize", "--shrink"]]
)
def test_name_that_is_no_utf_8_is_a_name_that_is_not_there(ctl: Ctl, arguments: list[str]) -> None:
    more = ["1M"] if "resize" in arguments else []
    assert "there is no export" in ctl(*arguments, os.fsdecode(b"\xff"), *more, status=USAGE)


def test_without_a_server_it_exits_1_and_says_what_to_look_at(ctl: Ctl, tmp_path: Path) -> None:
    said = ctl("exports", f"--socket={tmp_path}/nope", status=FAILED)
    assert said == (
        f"cannot reach the server at {tmp_path}/nope: No such file or directory; "
        "is a server running, with --admin-socket?"
    )
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert ctl("exports", f"--url={url}", status=FAILED) == f"cannot reach the server at {url}: Connection refused"
    assert ctl("exports", "--url=http://a..b", status=FAILED).startswith("cannot reach the server at http://a..b: ")


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"NBDMAGICIHAVEOPT", "no HTTP server (BadStatusLine"),
        (b"", "Remote end closed connection without response"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "status 200 and no JSON"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "status 200 and no JSON"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{}", "no HTTP server (IncompleteRead"),
    ],
)
def test_what_is_no_admin_api_exits_1(ctl: Ctl, tmp_path: Path, raw: bytes, reason: str) -> None:
    path = f"{tmp_path}/s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def answer() -> None:
            with listener.accept()[0] as sock:
                sock.recv(65536)
                sock.sendall(raw)

        thread = threading.Thread(target=answer)
        thread.start()
        assert ctl("exports", f"--socket={path}", status=FAILED).startswith(
            f"cannot reach the server at {path}: {reason}"
        )
        thread.join(30)


@pytest.mark.parametrize(
    ("answer", "arguments", "missing"),
    [
        (b'{"exports": [{"name": "a", "path": "/a"}]}', ["exports"], "format"),
        (b'{"clients": [{"id": 1, "peer": "p"}]}', ["clients"], "export"),
        (b"{}", ["status"], "state"),
        (b"{}", ["resize", "a", "1M"], "name"),
    ],
)
def test_answer_without_what_is_asked_for_is_of_another_version(
    ctl: Ctl, monkeypatch: pytest.MonkeyPatch, answer: bytes, arguments: list[str], missing: str
) -> None:
    monkeypatch.setattr(Api, "_request", lambda api, *request: api._answer(200, answer))
    said = ctl(*arguments, status=FAILED)
    assert said.startswith(f"the server's answer has no '{missing}': is it of another version than ")


@pytest.mark.parametrize(
    ("answer", "arguments", "said"),
    [
        ({"exports": "all"}, ["exports"], "'exports' in the server's answer is something else than a list"),
        ({"exports": ["a"]}, ["exports"], "'exports' in the server's answer is something else than an object"),
        ({"exports": None}, ["add", "/a"], "'exports' in the server's answer is something else than a list"),
        ({"name": 1}, ["resize", "a", "+1M"], "'name' in the server's answer is something else than a string"),
        ({"clients": [{"id": True}]}, ["clients"], "'id' in the server's answer is something else than a whole number"),
        ({"clients": [{"id": -1}]}, ["clients"], "'id' in the server's answer is something else than a whole number"),
        ({"snapshots": {}}, ["snapshot", "list", "a"], "'snapshots' in the server's answer is something else than a"),
        ({"id": None}, ["snapshot", "create", "a", "b"], "'id' in the server's answer is something else than a string"),
        ({"bitmaps": [[]]}, ["bitmap", "list", "a"], "'bitmaps' in the server's answer is something else than an obj"),
        ({"bitmaps": 7}, ["bitmap", "add", "a", "b"], "'bitmaps' in the server's answer is something else than a list"),
        ({"state": "serving", "pid": 1, "uptime": "1 s"}, ["status"], "'uptime' in the server's answer is something"),
        ({"state": "serving", "pid": 1, "uptime": 1e300}, ["status"], "'uptime' in the server's answer is something"),
    ],
)
def test_answer_of_other_types_is_of_another_version(
    ctl: Ctl, monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any], arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(Api, "_request", lambda api, *request: api._answer(200, json.dumps(answer).encode()))
    for more in ([], ["--json"]):
        assert ctl(*arguments, *more, status=FAILED).startswith(said)


def test_answer_that_is_nested_too_deeply_is_no_json(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Api, "_request", lambda api, *request: api._answer(200, b"[" * 10**6))
    assert "no JSON: not an admin API of nbdimg" in ctl("exports", status=FAILED)


def test_socket_of_another_user_is_told_from_one_where_nobody_listens(
    ctl: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(http._UnixConnection, "connect", connect)
    said = ctl("exports", "--socket=/s", status=FAILED)
    assert said == "cannot reach the server at /s: Permission denied; its socket is for its own user, and root"


@pytest.mark.parametrize(("code", "status"), [(499, USAGE), (500, FAILED)])
def test_what_the_server_failed_at_exits_1_and_what_it_refused_2(
    ctl: Ctl, monkeypatch: pytest.MonkeyPatch, code: int, status: int
) -> None:
    monkeypatch.setattr(Api, "_request", lambda api, *request: api._answer(code, b'{"detail": "why"}'))
    assert ctl("exports", status=status) == "why"


def test_token_file_of_more_than_a_line_is_refused(ctl: Ctl, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a-token\nanother")
    said = ctl("exports", "--url=http://h:1", f"--token-file={tmp_path}/token", status=USAGE)
    assert said == f"token file {tmp_path}/token: expected one line with the token"


@pytest.mark.timeout(20)
def test_token_file_without_an_end_is_not_waited_for(ctl: Ctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "TOKEN_PATIENCE_S", 0.1)
    os.mkfifo(tmp_path / "token")
    for path, said in (
        (tmp_path / "token", "it is a FIFO, and its writer does not come to an end"),
        ("/dev/zero", "expected one line with the token"),
    ):
        assert ctl("exports", "--url=http://h:1", f"--token-file={path}", status=USAGE) == f"token file {path}: {said}"


def test_change_is_waited_for_longer_than_an_answer_that_waits_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drain or a resize takes as long as the server lets it."""
    monkeypatch.setattr(http, "ANSWER_TIMEOUT_S", 0.1)

    def answer() -> None:
        for _ in range(2):
            with listener.accept()[0] as sock:
                sock.recv(65536)
                time.sleep(0.5)
                with suppress(BrokenPipeError):
                    sock.sendall(b"HTTP/1.0 200 OK\r\n\r\n{}")
                    sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):  # a body may come behind its header; closing before it resets the connection
                    pass

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        api = Api(str(tmp_path / "s"))
        assert api.change("POST", "/v1/reload") == {}
        with pytest.raises(NbdimgError, match="is there and has not answered within 0"):
            api.get("/v1/status", NOTHING)
        thread.join(10)


def test_over_tcp_with_a_token(ctl: Ctl, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    token.chmod(0o600)
    admin = AdminConfig(address=TcpAddress("127.0.0.1", 0), token_path=str(token))
    with FakeServer(ServerConfig((), admin=admin)) as server:
        server.attach()
        ((host, port),) = http_address(server.log)
        url = f"--url=http://{host}:{port}"
        assert {each["name"] for each in ctl.json("exports", url, f"--token-file={token}")["exports"]} == {"a", "b"}
        assert ctl("exports", url, status=USAGE) == "a token is needed: Authorization: Bearer TOKEN"
        other = tmp_path / "other"
        other.write_text("wrong-token-0123456789")
        assert ctl("exports", url, f"--token-file={other}", status=USAGE) == "the token is wrong"
        assert ctl("add", url, f"--token-file={token}", "x.img", status=USAGE).startswith(
            "request body: path: 'x.img' is not"
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--url=127.0.0.1:9808"], "'127.0.0.1:9808' is not allowed, expected http://HOST:PORT"),
        (["--url=ftp://h:1"], "'ftp://h:1' is not allowed"),
        (["--url=http://u:p@h:1"], "'http://…@h:1' is not allowed"),
        (["--url=http://h:x"], "'http://h:x' is not allowed"),
        (["--url=http://h:1/v1"], "'http://h:1/v1' is not allowed"),
        (["--url=http://h:1?a"], "'http://h:1?a' is not allowed"),
        (["--token-file=/nope"], "--token-file goes with --url"),
        (["--url=http://h:1", "--token-file=/nope"], "token file /nope: No such file or directory"),
        (["--url=http://h:1", "--token-file=/dev/null"], "token file /dev/null: expected one line with the token"),
    ],
)
def test_wrong_url_or_token_file_exits_2(ctl: Ctl, options: list[str], said: str) -> None:
    assert ctl("exports", *options, status=USAGE).startswith(said)
