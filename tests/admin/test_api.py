"""Every route of the API of a real server, with what is right and what is wrong; each answer is as it is described."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from nbdimg.admin.problems import BODY_SIZE_MAX
from tests.admin.served import ADMIN, Served, make_qcow2
from tests.support.configured import export
from tests.support.httpclient import Answer, ask, connected, received
from tests.support.peers import require_program
from tests.support.rawclient import connect_negotiated
from tests.support.rawprotocol import KIB, MIB, Command, ConnectionClosed
from tests.support.rss import wait_until

WAIT_S = 30.0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("api")) as server:
        yield server
        for mark in ("Traceback", "internal error", "never retrieved"):
            assert mark not in server.stderr()


# Looking


def test_exports_tells_of_each_what_a_client_would_find(served: Served) -> None:
    found = {each["name"]: each for each in served.api.ask("GET", "/v1/exports").json()["exports"]}
    disk = found["disk"]
    assert disk == {
        **{"name": "disk", "path": str(served.images / "disk.img"), "format": "raw", "size": MIB},
        **{"is_read_only": False, "description": "", "is_snapshot": False, "is_hidden": False},
        **{"connections": 0, "in_flight": 0, "origin": "config", "failure": None},
        **{"overlay": None, "overlays": 0, "overlay_names": []},
    }
    assert served.api.ask("GET", "/v1/exports/{name}", name="disk").json() == disk


@pytest.mark.parametrize("name", ["nope", "Disk", "disk%00", "%2e%2e", "disk%2F", "a" * 5000])
def test_export_unknown_is_404_and_names_some_that_are_there(served: Served, name: str) -> None:
    answer = served.api.ask("GET", "/v1/exports/{name}", name=name)
    assert answer.status == 404
    assert "known are 'disk', 'vm'" in answer.detail


def test_unknown_path_is_404_and_tells_where_to_look(served: Served) -> None:
    for path in ("/", "/v1", "/v2/exports", "/v1/exports/disk/x", "/v1/exports/"):
        answer = ask(served.admin, "GET", path)
        assert (answer.status, answer.detail.partition(";")[0]) == (404, "there is nothing at this path")


def test_method_that_a_path_does_not_have_is_405_with_those_that_it_has(served: Served) -> None:
    for method, path, allowed in (
        ("PUT", "/v1/exports", "GET, HEAD, POST"),
        ("GET", "/v1/reload", "POST"),
        ("OPTIONS", "/v1/exports/disk", "DELETE, GET, HEAD"),
    ):
        answer = ask(served.admin, method, path)
        assert (answer.status, answer.headers["allow"]) == (405, allowed)
        assert answer.detail == f"{method} is not allowed here, expected {allowed}"


def test_answers_allow_no_other_origin_and_are_not_stored(served: Served) -> None:
    answer = ask(served.admin, "GET", "/v1/exports", headers={"Origin": "http://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert answer.headers["cache-control"] == "no-store"


def test_status_counts_exports_and_clients_and_names_their_uris(served: Served) -> None:
    with connect_negotiated(served.socket_path, "disk"):
        status = served.api.ask("GET", "/v1/status").json()
        assert (status["state"], status["pid"], status["connections"]) == ("serving", served.pid, 1)
        assert status["failed_exports"] == []
        assert status["exports"] == len(served.names())
        assert f"nbd+unix:///disk?socket={served.socket_path}" in status["uris"]


def test_stats_count_what_a_client_has_asked(served: Served) -> None:
    served.added("counted")

    def counters() -> dict[str, Any]:
        exports = served.api.ask("GET", "/v1/stats").json()["exports"]
        (found,) = [each for each in exports if each["name"] == "counted"]
        return dict(found)

    keys = ("reads", "read_bytes", "writes", "write_bytes", "others", "errors", "connections")
    assert [counters()[key] for key in keys] == [0] * 7
    with connect_negotiated(served.socket_path, "counted") as client:
        for _ in range(3):
            client.read(0, 8 * KIB)
        client.write(0, bytes(4 * KIB))
        client.request(Command.FLUSH)
        assert client.read(2 * MIB, KIB).error != 0
        now = counters()
    assert [now[key] for key in keys] == [4, 24 * KIB, 1, 4 * KIB, 1, 1, 1]
    assert now["read_seconds"] > 0
    assert served.api.ask("GET", "/v1/stats").json()["time"] > 0


def test_clients_tells_who_is_connected_and_where(served: Served) -> None:
    with connect_negotiated(served.socket_path, "disk"):
        everybody = served.api.ask("GET", "/v1/clients").json()["clients"]
        (client,) = served.api.ask("GET", "/v1/clients", query="?export=disk").json()["clients"]
        assert client in everybody or len(everybody) == 1
        assert (client["export"], client["tls"], client["identities"]) == ("disk", None, [])
        assert str(os.getpid()) in client["peer"]
    assert served.api.ask("GET", "/v1/clients", query="?export=vm").json()["clients"] == []


def test_clients_of_an_unknown_export_is_404(served: Served) -> None:
    answer = served.api.ask("GET", "/v1/clients", query="?export=nope")
    assert (answer.status, answer.detail.partition(",")[0]) == (404, "there is no export 'nope'")


# Exports come and go


def test_add_exports_an_image_to_clients_at_once(served: Served) -> None:
    path = served.image("new.img")
    body = {"name": "new", "path": str(path), "format": "raw", "read_only": True, "description": "news"}
    answer = served.api.ask("POST", "/v1/exports", body)
    assert (answer.status, answer.headers["location"]) == (201, "/v1/exports/new")
    (state,) = answer.json()["exports"]
    assert (state["is_read_only"], state["description"], state["origin"]) == (True, "news", "live")
    with connect_negotiated(served.socket_path, "new") as client:
        assert client.read(0, 512).data == b"\xa5" * 512


@pytest.mark.parametrize("name", ["a/b ä%", "{x}", "..", "%2F", "?a=#b;c", "\n", "\\", "/", "'\""])
def test_add_name_of_any_characters_is_reached_percent_encoded(served: Served, name: str) -> None:
    served.added(name)
    encoded = quote(name, safe="")
    assert served.api.ask("GET", "/v1/exports/{name}", name=encoded).json()["name"] == name
    grown = served.api.ask("POST", "/v1/exports/{name}/resize", {"size": 2 * MIB}, name=encoded)
    assert grown.json()["size"] == 2 * MIB
    assert served.api.ask("DELETE", "/v1/exports/{name}", name=encoded).status == 204
    assert name not in served.names()


def test_add_qcow2_with_snapshots_exports_them_too(served: Served) -> None:
    path = served.images / "snapped.qcow2"
    make_qcow2(path)
    subprocess.run([require_program("qemu-img"), "snapshot", "-c", "old", path], check=True)
    answer = served.api.ask("POST", "/v1/exports", {"path": str(path)})
    assert [each["name"] for each in answer.json()["exports"]] == ["snapped", "snapped@old"]


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        ({}, 422, "request body: path is missing, expected the name of an image"),
        ([], 422, "request body: a list is not allowed, expected a table"),
        (b"null", 422, "request body: null is not allowed, expected a table"),
        ({"path": "/x", "access": "all"}, 422, "request body: access: 'all' is not allowed, expected a list of tables"),
        ({"path": 3}, 422, "request body: path: 3 is not allowed, expected a string"),
        ({"path": "disk.img"}, 422, "request body: path: 'disk.img' is not allowed, expected the whole name of a file"),
        ({"path": "/x", "pth": 1}, 422, "request body: pth: unknown key, did you mean path; known are name,"),
        ({"path": "/x", "format": "vmdk"}, 422, "request body: format: 'vmdk' is not allowed, expected raw, qcow2 or"),
        ({"path": "/x", "name": ""}, 422, "request body: name: '' is not allowed, expected 1 to 4096 bytes"),
        ({"path": "/x", "tls": False}, 422, 'request body: tls: this has a meaning only with tls.mode = "selective"'),
        ({"path": "/x", "password": "p"}, 422, "request body: password: a secret stands in a file of its own"),
        ({"path": "/x", "access": [{"uids": [-1]}]}, 422, "request body: access[0].uids[0]: -1 is not allowed, expec"),
        ({"path": "/x", "access": [{"identities": ["cn:a"]}]}, 409, "x: the rule for cn:a needs TLS with a client CA"),
        (b"", 422, "request body: path is missing"),
        (b"{", 400, "the body is not JSON in UTF-8"),
        (b"\xff", 400, "the body is not JSON in UTF-8"),
        (b'{"path": "/\\ud800"}', 400, "the body is not JSON in UTF-8"),
        (b'{"path": NaN}', 400, "the body is not JSON in UTF-8"),
        (b"[" * 60000, 400, "the body is nested too deeply"),
        (b"9" * 60000, 400, "the body is not JSON in UTF-8"),
        (b" " * (BODY_SIZE_MAX + 1), 413, f"the body is too large, expected at most {BODY_SIZE_MAX} bytes"),
    ],
)
def test_add_wrong_body_is_refused_in_the_words_of_a_configuration_file(
    served: Served, body: object, status: int, detail: str
) -> None:
    before = served.names()
    answer = served.api.ask("POST", "/v1/exports", body)
    assert (answer.status, answer.detail[: len(detail)]) == (status, detail)
    assert served.names() == before


def test_add_body_at_the_limit_is_looked_at(served: Served) -> None:
    answer = served.api.ask("POST", "/v1/exports", b"{}".ljust(BODY_SIZE_MAX))
    assert (answer.status, answer.detail.partition(",")[0]) == (422, "request body: path is missing")


def test_add_body_with_several_problems_lists_all(served: Served) -> None:
    answer = served.api.ask("POST", "/v1/exports", {"path": "/x", "format": "y", "read_only": 1})
    assert [each.split(":")[1].strip() for each in answer.json()["problems"]] == ["format", "read_only"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_change_without_json_content_type_is_415_as_a_form_of_a_web_page_would_be(served: Served, kind: str) -> None:
    more = [f"/v1/exports/vm/{each}" for each in ("resize", "snapshots", "bitmaps")]
    for path in ("/v1/exports", "/v1/reload", *more):
        answer = ask(served.admin, "POST", path, b"{}", {"Content-Type": kind})
        assert (answer.status, answer.detail.rpartition(", ")[2]) == (415, "expected application/json")


def test_add_what_is_taken_or_in_use_is_409(served: Served) -> None:
    answer = served.api.ask("POST", "/v1/exports", {"name": "disk", "path": str(served.image("other.img"))})
    assert (answer.status, answer.detail) == (409, "there is an export 'disk' already, expected another name")
    answer = served.api.ask("POST", "/v1/exports", {"name": "twice", "path": str(served.images / "disk.img")})
    assert answer.status == 409
    assert answer.json()["image"] == str(served.images / "disk.img")
    assert "another process or export has it open" in answer.detail


def test_add_image_that_is_missing_or_is_none_is_422_and_named(served: Served) -> None:
    missing = str(served.images / "missing.img")
    answer = served.api.ask("POST", "/v1/exports", {"path": missing})
    assert (answer.status, answer.detail) == (422, f"{missing}: No such file or directory")
    assert answer.json()["image"] == missing
    answer = served.api.ask("POST", "/v1/exports", {"path": str(served.image("no.qcow2")), "format": "qcow2"})
    assert answer.status == 422


@pytest.mark.parametrize("mode", ["drain", "hide", "hard"])
def test_remove_hides_an_export_and_does_with_clients_as_its_mode_says(served: Served, mode: str) -> None:
    name = f"leaving-{mode}"
    served.added(name)
    with connect_negotiated(served.socket_path, name) as client:
        answer = served.api.ask("DELETE", "/v1/exports/{name}", name=name, query=f"?mode={mode}")
        assert (answer.status, answer.body) == (204, b"")
        if mode == "hide":
            assert client.read(0, 512).data == b"\xa5" * 512
            assert served.api.ask("GET", "/v1/exports/{name}", name=name).json()["is_hidden"]
        else:
            with pytest.raises(ConnectionClosed):
                client.read(0, 512)
    assert wait_until(lambda: name not in served.names(), WAIT_S)


def test_remove_unknown_export_is_404_and_unknown_mode_422(served: Served) -> None:
    assert served.api.ask("DELETE", "/v1/exports/{name}", name="nope").status == 404
    answer = served.api.ask("DELETE", "/v1/exports/{name}", name="disk", query="?mode=soft")
    assert (answer.status, answer.detail) == (422, "mode is 'soft', expected drain, hide or hard")
    assert "disk" in served.names()


# Images change


def test_resize_grows_a_disk_for_who_connects_next(served: Served) -> None:
    path = served.added("grown")
    answer = served.api.ask("POST", "/v1/exports/{name}/resize", {"size": "2MiB"}, name="grown")
    assert (answer.status, answer.json()["size"]) == (200, 2 * MIB)
    assert path.stat().st_size == 2 * MIB
    with connect_negotiated(served.socket_path, "grown") as client:
        assert client.read(2 * MIB - 512, 512).data == bytes(512)


def test_operation_on_an_export_that_a_reload_opens_anew_waits_for_it(tmp_path: Path) -> None:
    """The reload waits for a client that takes no reply."""
    with Served(tmp_path) as server:
        limits = "[limits]\ndrain_timeout = 1\n"
        server.reload(server.text + limits)
        with connect_negotiated(server.socket_path, "disk") as client:
            client.send_requests(client.reads(40, MIB))
            client.receive(1)
            server.write(server.text.replace('"disk"\n', '"disk"\nmin_block_size = 512\n') + limits)
            server.process.send_signal(signal.SIGHUP)
            assert wait_until(lambda: "disk" not in server.names(), WAIT_S)
            answer = server.api.ask("POST", "/v1/exports/{name}/resize", {"size": 2 * MIB}, name="disk")
        assert (answer.status, answer.json().get("size")) == (200, 2 * MIB)


def test_resize_shrinks_only_on_request(served: Served) -> None:
    served.added("shrunk")
    answer = served.api.ask("POST", "/v1/exports/{name}/resize", {"size": MIB // 2}, name="shrunk")
    assert answer.status == 409
    assert "from 1048576 to 524288 bytes" in answer.detail
    answer = served.api.ask("POST", "/v1/exports/{name}/resize", {"size": MIB // 2, "shrink": True}, name="shrunk")
    assert answer.json()["size"] == MIB // 2
    for change, size in (("+1MiB", MIB + MIB // 2), ("-512K", MIB)):
        answer = served.api.ask("POST", "/v1/exports/{name}/resize", {"size": change, "shrink": True}, name="shrunk")
        assert answer.json()["size"] == size


@pytest.mark.parametrize(
    ("name", "body", "status", "detail"),
    [
        ("nope", {"size": 1}, 404, "there is no export 'nope'"),
        ("disk", {}, 422, "request body: size is missing, expected bytes"),
        ("disk", {"size": 0}, 422, "request body: size: 0 is not allowed, expected a size from 1 to 922337203685"),
        ("disk", {"size": 1 << 63}, 422, "request body: size: 9223372036854775808 is not allowed"),
        ("disk", {"size": "2 bananas"}, 422, "request body: size: '2 bananas' is not a size"),
        ("disk", {"size": "+bananas"}, 422, "request body: size: 'bananas' is not a size"),
        (
            "disk",
            {"size": "+8E"},
            422,
            "request body: size: '8E' is not allowed, expected a size from 0 to 922337203685",
        ),
        ("disk", {"size": "-1M", "shrink": True}, 409, "'disk': the size would go from 1048576 to 0 bytes"),
        ("disk", {"size": -1, "shrink": True}, 422, "request body: size: -1 is not allowed"),
        ("disk", {"size": True}, 422, "request body: size: true is not allowed"),
        ("disk", {"size": 1.5}, 422, "request body: size: 1.5 is not allowed"),
        ("disk", {"size": 1, "shrink": "yes"}, 422, "request body: shrink: 'yes' is not allowed, expected true or"),
        ("disk", {"size": 1, "srink": True}, 422, "request body: srink: unknown key, did you mean shrink; known are"),
    ],
)
def test_resize_wrong_request_is_refused(served: Served, name: str, body: object, status: int, detail: str) -> None:
    answer = served.api.ask("POST", "/v1/exports/{name}/resize", body, name=name)
    assert (answer.status, answer.detail[: len(detail)]) == (status, detail)
    assert (served.images / "disk.img").stat().st_size == MIB


def test_snapshot_is_made_listed_served_and_deleted(served: Served) -> None:
    template = "/v1/exports/{name}/snapshots"
    answer = served.api.ask("POST", template, {"name": "s/{1}"}, name="vm")
    assert (answer.status, answer.headers["location"]) == (201, "/v1/exports/vm/snapshots/s%2F%7B1%7D")
    made = answer.json()
    assert (made["name"], made["size"], made["export"]) == ("s/{1}", MIB, "vm@s/{1}")
    assert served.api.ask("GET", template, name="vm").json()["snapshots"] == [made]
    assert "vm@s/{1}" in served.names()
    again = served.api.ask("POST", template, {"name": "s/{1}"}, name="vm")
    assert (again.status, "s/{1}" in again.detail) == (409, True)
    assert served.api.ask("DELETE", f"{template}/{{snapshot}}", name="vm", snapshot="s%2F%7B1%7D").status == 204
    assert served.api.ask("GET", template, name="vm").json()["snapshots"] == []
    assert "vm@s/{1}" not in served.names()


def test_bitmaps_are_added_listed_changed_together_and_removed(served: Served) -> None:
    template = "/v1/exports/{name}/bitmaps"

    def change(*actions: dict[str, object]) -> Answer:
        return served.api.ask("POST", template, {"actions": actions}, name="vm")

    answer = change({"action": "add", "name": "b/{0}", "granularity": "4KiB"})
    made = {"name": "b/{0}", "granularity": 4096, "is_enabled": True, "is_consistent": True}
    assert (answer.status, answer.json()) == (200, {"bitmaps": [made]})
    answer = change(
        {"action": "add", "name": "b1", "disabled": True},
        {"action": "disable", "name": "b/{0}"},
        {"action": "merge", "name": "b1", "sources": ["b/{0}"]},
        {"action": "clear", "name": "b/{0}"},
        {"action": "enable", "name": "b1"},
    )
    assert [(each["name"], each["is_enabled"]) for each in answer.json()["bitmaps"]] == [("b/{0}", False), ("b1", True)]
    assert served.api.ask("GET", template, name="vm").json() == answer.json()
    answer = change({"action": "remove", "name": "b1"}, {"action": "clear", "name": "b2"})
    assert (answer.status, answer.detail.partition(": ")[2]) == (409, "there is no bitmap 'b2', known are 'b/{0}'")
    with connect_negotiated(served.socket_path, "vm") as client:
        assert client.write(0, b"\xa5" * 512).error == 0
        assert change({"action": "remove", "name": "b1"}, {"action": "remove", "name": "b/{0}"}).json() == {
            "bitmaps": []
        }


@pytest.mark.parametrize(
    ("name", "body", "status", "detail"),
    [
        ("nope", {"actions": []}, 404, "there is no export 'nope'"),
        (
            "disk",
            {"actions": [{"action": "add", "name": "b"}]},
            422,
            "raw images have no dirty bitmaps, qcow2 images do",
        ),
        ("vm", {}, 422, "request body: actions: there are 0, expected 1 to 64"),
        (
            "vm",
            {"actions": [{"action": "add", "name": "b"}] * 65},
            422,
            "request body: actions: there are 65, expected",
        ),
        ("vm", {"actions": {}}, 422, "request body: actions: a table is not allowed, expected a list of tables"),
        ("vm", {"actions": [1]}, 422, "request body: actions[0]: 1 is not allowed, expected a table"),
        ("vm", {"actions": [{"action": "add"}]}, 422, "request body: actions[0]: name is missing"),
        ("vm", {"actions": [{"name": "b"}]}, 422, "request body: actions[0]: action is missing"),
        (
            "vm",
            {"actions": [{"action": "drop", "name": "b"}]},
            422,
            "request body: actions[0].action: 'drop' is not allo",
        ),
        ("vm", {"actions": [{"action": "merge", "name": "b"}]}, 422, "request body: actions[0]: sources is missing"),
        (
            "vm",
            {"actions": [{"action": "clear", "name": "b", "disabled": True}]},
            422,
            "request body: actions[0].disabled: not allowed here, expected with add alone",
        ),
        ("vm", {"actions": [{"action": "add", "name": ""}]}, 409, "bitmap name '': expected 1 to 1023 bytes of UTF-8"),
        (
            "vm",
            {"actions": [{"action": "add", "name": "b", "granularity": 1000}]},
            409,
            "granularity is 1000, expected a power of two from 512 to 2147483648",
        ),
    ],
)
def test_bitmaps_wrong_request_is_refused(served: Served, name: str, body: object, status: int, detail: str) -> None:
    answer = served.api.ask("POST", "/v1/exports/{name}/bitmaps", body, name=name)
    assert (answer.status, detail in answer.detail) == (status, True), answer.detail
    assert served.api.ask("GET", "/v1/exports/{name}/bitmaps", name="vm").json() == {"bitmaps": []}


def test_snapshot_of_a_snapshot_is_409(served: Served) -> None:
    template = "/v1/exports/{name}/snapshots"
    assert served.api.ask("POST", template, {"name": "base"}, name="vm").status == 201
    try:
        answer = served.api.ask("POST", template, {"name": "more"}, name="vm%40base")
        assert (answer.status, answer.detail.partition(",")[0]) == (409, "'vm@base' is a snapshot")
        answer = served.api.ask("DELETE", "/v1/exports/{name}", name="vm%40base")
        assert answer.status == 409
    finally:
        served.api.ask("DELETE", f"{template}/{{snapshot}}", name="vm", snapshot="base")


@pytest.mark.parametrize(
    ("method", "name", "body", "status", "detail"),
    [
        ("GET", "nope", None, 404, "there is no export 'nope'"),
        ("POST", "nope", {"name": "x"}, 404, "there is no export 'nope'"),
        ("POST", "vm", {}, 422, "request body: name is missing"),
        ("POST", "vm", {"name": ""}, 422, "request body: name: '' is not allowed"),
        ("POST", "vm", {"name": "x\0"}, 422, "request body: name: "),
        ("POST", "vm", {"name": ["x"]}, 422, "request body: name: a list is not allowed"),
    ],
)
def test_snapshot_wrong_request_is_refused(
    served: Served, method: str, name: str, body: object, status: int, detail: str
) -> None:
    answer = served.api.ask(method, "/v1/exports/{name}/snapshots", body, name=name)
    assert (answer.status, answer.detail[: len(detail)]) == (status, detail)


def test_snapshot_of_a_raw_image_is_refused_and_its_list_is_empty(served: Served) -> None:
    answer = served.api.ask("POST", "/v1/exports/{name}/snapshots", {"name": "x"}, name="disk")
    assert answer.status == 422
    assert "raw images have no snapshots" in answer.detail
    assert served.api.ask("GET", "/v1/exports/{name}/snapshots", name="disk").json() == {"snapshots": []}


def test_snapshot_that_is_not_there_cannot_be_deleted(served: Served) -> None:
    answer = served.api.ask("DELETE", "/v1/exports/{name}/snapshots/{snapshot}", name="vm", snapshot="nope")
    assert (answer.status, answer.detail) == (404, "'vm' has no snapshot 'nope'")


# Clients and the configuration


@pytest.mark.parametrize("mode", ["drain", "hard"])
def test_disconnect_makes_one_client_go_and_leaves_the_others(served: Served, mode: str) -> None:
    with connect_negotiated(served.socket_path, "disk") as stays, connect_negotiated(served.socket_path, "vm") as goes:
        (found,) = served.api.ask("GET", "/v1/clients", query="?export=vm").json()["clients"]
        answer = served.api.ask("DELETE", "/v1/clients/{id}", id=str(found["id"]), query=f"?mode={mode}")
        assert answer.status == 204
        with pytest.raises(ConnectionClosed):
            goes.read(0, 512)
        assert stays.read(0, 512).data == b"\xa5" * 512


@pytest.mark.parametrize("client_id", ["999999", "-1", "x", "1e3", "9" * 40, "%C2%B2"])
def test_disconnect_unknown_client_is_404(served: Served, client_id: str) -> None:
    assert served.api.ask("DELETE", "/v1/clients/{id}", id=client_id).status == 404


def test_disconnect_unknown_mode_is_422(served: Served) -> None:
    answer = served.api.ask("DELETE", "/v1/clients/{id}", id="1", query="?mode=hide")
    assert (answer.status, answer.detail) == (422, "mode is 'hide', expected drain or hard")


def test_reload_applies_the_file_and_keeps_what_was_added_live(served: Served) -> None:
    served.added("lively")
    served.image("filed.img")
    served.write(served.text + export("filed", "filed.img"))
    assert served.api.ask("POST", "/v1/reload", {}).status == 204
    assert {"filed", "lively", "disk", "vm"} <= set(served.names())
    served.write(served.text)
    assert served.api.ask("POST", "/v1/reload", b"").status == 204
    assert "filed" not in served.names()


def test_reload_of_a_wrong_file_is_422_with_its_problem_and_changes_nothing(served: Served) -> None:
    before = served.names()
    served.write(served.text + "zzz = 1\n")
    try:
        answer = served.api.ask("POST", "/v1/reload", {})
        assert answer.status == 422
        assert answer.detail.startswith(f"nothing was reloaded: {served.file}:")
        assert "zzz: unknown key" in answer.detail
    finally:
        served.write(served.text)
    assert served.names() == before
    assert served.api.ask("POST", "/v1/reload", {}).status == 204


def test_reload_that_changes_the_listeners_of_http_says_that_it_takes_a_restart(served: Served) -> None:
    """Another port, which the sandbox keeps closed, keeps nothing else from being reloaded."""
    warning = "what is new in [admin], [metrics] and log_format takes a restart"
    new = '[admin]\nsocket = "other.sock"\n[metrics]\nlisten="127.0.0.1:1"\n'
    served.write(served.text.replace(ADMIN, new))
    try:
        assert served.api.ask("POST", "/v1/reload", {}).status == 204
        assert served.stderr().count(warning) == 1
        assert not (served.images / "other.sock").exists()
    finally:
        served.write(served.text)
        served.api.ask("POST", "/v1/reload", {})
    assert served.stderr().count(warning) == 1


# What is on the wire


def test_change_is_logged_with_who_asked_and_what_came_of_it(served: Served) -> None:
    served.api.ask("DELETE", "/v1/exports/{name}", name="nope%1b%5b31m")
    line = f"unix pid {os.getpid()}: admin: DELETE '/v1/exports/nope%1b%5b31m': 404"
    assert wait_until(lambda: line in served.stderr(), WAIT_S)
    assert "\x1b" not in served.stderr()


def test_connection_is_kept_for_the_next_request(served: Served) -> None:
    with connected(served.admin) as sock:
        sock.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        sock.sendall(b"GET /v1/exports/disk HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert received(sock).json()["name"] == "disk"


def test_head_answers_as_get_without_a_body(served: Served) -> None:
    with connected(served.admin) as sock:
        sock.sendall(b"HEAD /v1/exports/disk HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n\r\n")


def test_control_contract_notices_an_answer_that_is_not_described(served: Served) -> None:
    answer = ask(served.admin, "GET", "/v1/exports/disk")
    served.api.contract.check("GET", "/v1/exports/{name}", answer)
    more = answer._replace(body=json.dumps({**answer.json(), "extra": 1}).encode())
    with pytest.raises(AssertionError, match="extra"):
        served.api.contract.check("GET", "/v1/exports/{name}", more)
    with pytest.raises(AssertionError, match="not described"):
        served.api.contract.check("GET", "/v1/exports/{name}", answer._replace(status=202))
