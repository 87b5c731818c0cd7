"""One line for each attach, detach and refusal, with what is known of the client."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest
from cryptography import x509

from nbdimg.config import AccessRule, ExportConfig, ServerConfig, TlsConfig
from nbdimg.limits import Limits
from nbdimg.server import audit, log
from nbdimg.server import server as server_module
from nbdimg.server.audit import Audit, Refusal
from nbdimg.server.log import LimitedLog
from nbdimg.uri import NbdUri
from tests.server.tls_live import LiveServer, asked_for_tls, client_context, files, tls_client
from tests.support.certificates import LOOPBACK_NAMES, Authority, Identity
from tests.support.rawclient import Client, connect_negotiated
from tests.support.rawprotocol import Command, ConnectionClosed, Info, Option, Rep, info_data, meta_data
from tests.support.rss import wait_until

LINE_LIMIT_S = 30
ANSWER_LIMIT_S = 5
UID = os.getuid()
TCP = NbdUri(host="127.0.0.1", port=0)


class Trail(logging.Handler):
    """The audit's records, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.on_record: Callable[[], None] = lambda: None

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.on_record()

    def after(self, count: int) -> list[logging.LogRecord]:
        """The records, once there are `count`. Raises: AssertionError: fewer come, or more."""
        assert wait_until(lambda: len(self.records) >= count, LINE_LIMIT_S), self.messages()
        assert len(self.records) == count, self.messages()
        return list(self.records)

    def messages(self) -> list[str]:
        return [record.getMessage() for record in self.records]


@contextmanager
def audited() -> Iterator[Trail]:
    trail, logger = Trail(), logging.getLogger("nbdimg.audit")
    level = logger.level
    logger.addHandler(trail)
    logger.setLevel(logging.INFO)
    try:
        yield trail
    finally:
        logger.setLevel(level)
        logger.removeHandler(trail)


def fields(record: logging.LogRecord) -> dict[str, object]:
    found: dict[str, object] = record.__dict__["fields"]
    return found


def served(directory: Path, *rules: AccessRule, uri: NbdUri = TCP, **limits: float) -> ServerConfig:
    (path,) = files(directory, ["disk"])
    made: dict[str, object] = dict(limits)
    return ServerConfig((ExportConfig(str(path), "disk", "raw", access=rules),), (uri,), Limits(**made))  # type: ignore[arg-type]


def with_tls(config: ServerConfig, authority: Authority, of_server: Identity) -> ServerConfig:
    return replace(config, tls=TlsConfig(of_server.certificate_path, of_server.key_path, authority.path))


# Visits


def test_visit_leaves_an_attach_and_a_detach_with_what_was_transferred(tmp_path: Path) -> None:
    uri = NbdUri(socket=str(tmp_path / "s"))
    with audited() as trail, LiveServer(served(tmp_path, uri=uri)) as server, Client(server.address) as client:
        client.greet()
        client.negotiate("disk")
        for _ in range(3):
            assert client.read(0, 4096).error == 0
        assert client.write(0, b"x" * 512).error == 0
        assert client.request(Command.TRIM, 0, 65536).error == 0
        (attach,) = trail.after(1)
        client.disconnect()
        _, detach = trail.after(2)
    peer = f"unix pid {os.getpid()}"
    known: dict[str, object] = {"export": "disk", "peer": peer, "identity": [], "tls": None, "read_only": False}
    assert fields(attach) == {"event": "attach", **known}
    seconds = fields(detach).pop("seconds")
    assert isinstance(seconds, float)
    assert 0 <= seconds < 600
    assert fields(detach) == {"event": "detach", **known, "read_bytes": 12288, "written_bytes": 512}
    assert [attach.levelno, detach.levelno] == [logging.INFO, logging.INFO]
    assert attach.getMessage() == f"{peer}: attached to 'disk', read-write"
    assert detach.getMessage().startswith(f"{peer}: detached from 'disk' after ")
    assert detach.getMessage().endswith(" s, 12288 bytes read, 512 written")


@pytest.mark.parametrize("end", ["disc", "close", "reset", "broken protocol", "server stops"])
def test_every_way_to_leave_is_one_detach(tmp_path: Path, end: str) -> None:
    with audited() as trail:
        with LiveServer(served(tmp_path)) as server, Client(server.address) as client:
            client.greet()
            client.negotiate("disk")
            assert client.read(0, 512).error == 0
            if end == "disc":
                client.disconnect()
            elif end == "close":
                client.close()
            elif end == "reset":
                client.reset()
            elif end == "broken protocol":
                client.send(b"no request" * 10)
            if end != "server stops":
                trail.after(2)
        assert [fields(each)["event"] for each in trail.after(2)] == ["attach", "detach"]


def test_visit_over_tls_names_version_and_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    of_server = authority.issue("server", common_name="localhost", names=LOOPBACK_NAMES)
    alice = authority.issue("client", common_name="alice", names=(x509.DNSName("backup.example"),))
    rule = AccessRule(identities=("cn:alice",), is_read_only=True)
    config = with_tls(served(tmp_path, rule), authority, of_server)
    with audited() as trail, LiveServer(config) as server:
        with tls_client(server.address, client_context(authority, alice)) as client:
            client.negotiate("disk")
            (attach,) = trail.after(1)
        trail.after(2)
        assert server.service.server.audit.tls_counts == {"TLSv1.3": 1}
    said = fields(attach)
    assert said["identity"] == ["cn:alice", "dns:backup.example", f"spki-sha256:{alice.spki_sha256}"]
    assert said["tls"] == "TLSv1.3"
    assert said["read_only"] is True
    assert attach.getMessage().endswith(": attached to 'disk', read-only, TLSv1.3, as 'cn:alice', 'dns:backup.example'")


def test_names_do_not_break_a_line(tmp_path: Path) -> None:
    (path,) = files(tmp_path, ["x"])
    name = "two\nlines\x1b[31m"
    config = ServerConfig((ExportConfig(str(path), name, "raw"),), (TCP,))
    with audited() as trail, LiveServer(config) as server, Client(server.address) as client:
        client.greet()
        client.negotiate(name)
        (attach,) = trail.after(1)
    assert fields(attach)["export"] == name
    assert attach.getMessage().isprintable()


# Refusals


def one_refusal(trail: Trail, reason: str, message: str) -> dict[str, object]:
    (record,) = trail.after(1)
    assert record.levelno == logging.WARNING
    assert f": refused: {message}" in record.getMessage()
    said = fields(record)
    assert (said["event"], said["reason"]) == ("refuse", reason)
    return said


def test_hidden_export_is_one_refusal_however_often_the_client_asks(tmp_path: Path) -> None:
    with audited() as trail, LiveServer(served(tmp_path, AccessRule(networks=("192.0.2.1",)))) as server:
        with Client(server.address) as client:
            client.greet()
            assert client.option(Option.STRUCTURED_REPLY)[-1].type == Rep.ACK
            for option, data in (
                (Option.SET_META_CONTEXT, meta_data("disk", ["base:allocation"])),
                (Option.INFO, info_data("disk")),
                (Option.GO, info_data("disk", [Info.NAME])),
            ):
                assert client.option(option, data)[-1].type == Rep.ERR_UNKNOWN
        server.now(lambda: None)
        said = one_refusal(trail, "access", "may not open export 'disk'")
        assert said["export"] == "disk"
        assert str(said["peer"]).startswith("127.0.0.1:")


@pytest.mark.parametrize("option", [Option.INFO, Option.EXPORT_NAME])
def test_line_of_a_refusal_comes_behind_the_answer(tmp_path: Path, option: Option) -> None:
    """To write it takes as long as ten answers: an export of others would differ by that from one that is not there."""
    has_answer = threading.Event()
    were_in_time: list[bool] = []
    with audited() as trail, LiveServer(served(tmp_path, AccessRule(networks=("192.0.2.1",)))) as server:
        trail.on_record = lambda: were_in_time.append(has_answer.wait(ANSWER_LIMIT_S))
        with Client(server.address) as client:
            client.greet()
            if option == Option.INFO:
                assert client.option(option, info_data("disk"))[-1].type == Rep.ERR_UNKNOWN
            else:
                client.send_option(option, b"disk")
                assert client.wait_closed(LINE_LIMIT_S) is not None
            has_answer.set()
            trail.after(1 if option == Option.INFO else 2)
    assert all(were_in_time)


def test_refusal_of_an_export_names_the_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    of_server = authority.issue("server", common_name="localhost", names=LOOPBACK_NAMES)
    bob = authority.issue("client", common_name="bob")
    config = with_tls(served(tmp_path, AccessRule(identities=("cn:alice",))), authority, of_server)
    with audited() as trail, LiveServer(config) as server:
        with tls_client(server.address, client_context(authority, bob)) as client:
            assert client.option(Option.GO, info_data("disk"))[-1].type == Rep.ERR_UNKNOWN
        said = one_refusal(trail, "access", "may not open export 'disk'")
    assert said["identity"] == ["cn:bob", f"spki-sha256:{bob.spki_sha256}"]
    assert (said["export"], said["tls"]) == ("disk", "TLSv1.3")


def test_client_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    config = served(tmp_path, connections=1)
    with audited() as trail, LiveServer(config) as server, Client(server.address) as first:
        first.greet()
        with Client(server.address) as second, pytest.raises(ConnectionClosed):
            second.greet()
        one_refusal(trail, "limit", "1 client is connected already")


def test_silent_client_gives_its_place_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before it has had time for a handshake; and who has opened an export keeps its place."""
    config = served(tmp_path, connections=2)
    with audited() as trail, LiveServer(config) as server:
        with connect_negotiated(server.address) as attached, Client(server.address) as silent:
            silent.greet()
            with Client(server.address) as early, pytest.raises(ConnectionClosed):
                early.greet()
            monkeypatch.setattr(server_module, "PLACE_KEPT_S", 0.05)
            time.sleep(0.1)
            with connect_negotiated(server.address) as late:
                assert silent.wait_closed(LINE_LIMIT_S) is not None
                with Client(server.address) as surplus, pytest.raises(ConnectionClosed):
                    surplus.greet()
                assert late.read(0, 512).error == attached.read(0, 512).error == 0
        refused = [each.getMessage() for each in trail.records if fields(each)["event"] == "refuse"]
    assert [message.partition(": refused: ")[2] for message in refused] == [
        "2 clients are connected already",
        "no handshake within 0.05 s, and another wants its place",
        "2 clients are connected already",
    ]


@pytest.mark.parametrize("is_working", [True, False])
def test_place_is_looked_for_without_a_look_at_all_who_keep_theirs(tmp_path: Path, is_working: bool) -> None:
    """Or a flood of connections is a look at each of those for each of these."""
    count = 50
    calls: list[str] = []

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and "/nbdimg/server/" in frame.f_code.co_filename:
            calls.append(frame.f_code.co_name)

    path = str(tmp_path / "s")
    with LiveServer(served(tmp_path, uri=NbdUri(socket=path), connections=count)) as server, ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(Client(server.address))
            client.greet()
            if is_working:
                client.negotiate()

        def try_one_more() -> None:
            with socket.socket(socket.AF_UNIX) as surplus:
                surplus.setblocking(False)
                surplus.connect(path)
                sys.setprofile(profile)
                server.service.server._accept(server.service.server._listeners[0].sockets[0], is_tls=False)
                sys.setprofile(None)

        server.now(try_one_more)
        assert server.service.server.connection_count == count
    assert "_adopt" in calls
    assert len(calls) < count, calls


def test_handshake_that_takes_too_long_is_refused(tmp_path: Path) -> None:
    config = served(tmp_path, handshake_timeout_s=0.3)
    with audited() as trail, LiveServer(config) as server, Client(server.address) as client:
        client.greet()
        assert client.wait_closed(LINE_LIMIT_S) is not None
        one_refusal(trail, "timeout", "no handshake within 0.3 s")


def test_handshake_that_breaks_the_protocol_is_refused(tmp_path: Path) -> None:
    with audited() as trail, LiveServer(served(tmp_path)) as server, Client(server.address) as client:
        client.greet()
        client.send(b"this is no option")
        assert client.wait_closed(LINE_LIMIT_S) is not None
        one_refusal(trail, "protocol", "option magic is ")


@pytest.mark.parametrize("what", ["no certificate", "no TLS", "rubbish", "EXPORT_NAME"])
def test_tls_that_fails_is_one_refusal(tmp_path: Path, what: str) -> None:
    authority = Authority(tmp_path / "ca")
    of_server = authority.issue("server", common_name="localhost", names=LOOPBACK_NAMES)
    config = with_tls(served(tmp_path), authority, of_server)
    with audited() as trail, LiveServer(config) as server:
        if what == "no certificate":
            with (
                pytest.raises((OSError, ConnectionClosed)),
                tls_client(server.address, client_context(authority)) as client,
            ):
                client.option(Option.LIST)
        elif what == "rubbish":
            with asked_for_tls(server.address) as client:
                client.send(b"rubbish" * 100)
                assert client.wait_closed(LINE_LIMIT_S) is not None
        else:
            with Client(server.address) as client:
                client.greet()
                if what == "EXPORT_NAME":
                    client.send_option(Option.EXPORT_NAME, b"disk")
                else:
                    assert client.option(Option.GO, info_data("disk"))[-1].type == Rep.ERR_TLS_REQD
                    client.half_close()
                assert client.wait_closed(LINE_LIMIT_S) is not None
        message = {"no TLS": "left without TLS", "EXPORT_NAME": "EXPORT_NAME before STARTTLS"}.get(what, "TLS")
        one_refusal(trail, "tls", message)
        assert server.service.server.audit.tls_counts == {}


def test_client_that_only_looks_is_no_line(tmp_path: Path) -> None:
    """A port scan, a list, an abort: nobody was attached or refused. What follows shows that lines do come."""
    with audited() as trail, LiveServer(served(tmp_path)) as server:
        socket.create_connection(server.address if isinstance(server.address, tuple) else ("", 0)).close()
        with Client(server.address) as client:
            client.greet()
            client.option(Option.LIST)
            client.option(Option.ABORT)
        with Client(server.address) as client:
            client.greet()
            client.negotiate("disk")
            assert client.read(0, 512).error == 0
            (record,) = trail.after(1)
    assert fields(record)["event"] == "attach"


# Floods


def test_refusals_are_logged_so_many_a_second_and_counted_all(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(log, "monotonic", lambda: now)

    async def scenario() -> Audit:
        nonlocal now
        kept = Audit()
        for _ in range(log.LINES_MAX + 7):
            kept.refused("peer", Refusal.LIMIT, "too many")
        assert len(trail.records) == log.LINES_MAX
        now = 1.5
        kept.refused("peer", Refusal.LIMIT, "still too many")
        return kept

    with audited() as trail:
        kept = asyncio.run(scenario())
        assert trail.messages()[log.LINES_MAX :] == [
            "7 more lines from connections were not logged",
            "peer: refused: still too many",
        ]
    assert kept.refusal_counts[Refusal.LIMIT] == log.LINES_MAX + 8
    assert audit.ATTACH_LINES_MAX >= 1000, "a thousand machines that start at once leave a thousand lines"


def test_refusals_of_one_kind_do_not_hide_those_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sends rubbish needs no right to anything, and would cover who tries what it may not open."""
    monkeypatch.setattr(log, "monotonic", lambda: 0.0)

    async def scenario() -> None:
        kept = Audit()
        for _ in range(log.LINES_MAX + 1):
            kept.refused("anybody", Refusal.PROTOCOL, "rubbish")
        kept.refused("mallory", Refusal.ACCESS, "may not open export 'disk'")
        kept.tell_rest()

    with audited() as trail:
        asyncio.run(scenario())
    assert trail.messages()[log.LINES_MAX :] == [
        "mallory: refused: may not open export 'disk'",
        "1 more line from connections was not logged",
    ]


def test_what_was_left_out_is_told_of_at_the_periods_end_though_nothing_follows() -> None:
    async def scenario() -> None:
        is_told = asyncio.Event()
        trail.on_record = lambda: is_told.set() if "not logged" in trail.messages()[-1] else None
        limited = LimitedLog(logging.getLogger("nbdimg.audit"), lines_max=1, period_s=0.02)
        for _ in range(3):
            limited.say(logging.INFO, "line")
        assert trail.messages() == ["line"]
        await asyncio.wait_for(is_told.wait(), LINE_LIMIT_S)
        limited.say(logging.INFO, "next")
        limited.tell_rest()

    with audited() as trail:
        asyncio.run(scenario())
    assert trail.messages() == ["line", "2 more lines from connections were not logged", "next"]


def test_what_was_left_out_is_told_of_when_the_server_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "ATTACH_LINES_MAX", 1)
    with audited() as trail:
        with LiveServer(served(tmp_path)) as server, connect_negotiated(server.address, "disk"):
            trail.after(1)
        assert trail.messages()[1:] == ["1 more line from connections was not logged"]
