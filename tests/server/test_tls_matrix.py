"""Every way into a server with TLS that must not lead in: each is refused in one way, logged, and hurts nobody else.

Rules: proto.md "TLS support" and "TLS versions"; CVE-2021-3716 (state kept over STARTTLS), plaintext injection behind
STARTTLS. The control is the same table against a server that asks for no client certificate.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography import x509

from nbdimg.config import ExportConfig, ServerConfig, TlsConfig
from nbdimg.limits import Limits
from nbdimg.uri import NbdUri
from tests.server.tls_live import LiveServer, asked_for_tls, client_context, files, refusal, tls_client
from tests.support.certificates import LOOPBACK_NAMES, SERVER_AUTH, Authority, Identity
from tests.support.rawclient import Client
from tests.support.rawprotocol import ConnectionClosed, Option, Rep, info_data, meta_data, option_bytes
from tests.support.rss import wait_until

TCP = NbdUri(host="127.0.0.1", port=0)
V11, V12, V13 = ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
CLIENT_HELLO_HEAD = bytes.fromhex("16 03 01 02 00 01 00 01 fc 03 03")


@dataclass(frozen=True)
class Realm:
    """Certificates that fit each other, and the images."""

    authority: Authority
    stranger: Authority
    server: Identity
    client: Identity
    directory: Path

    def tls(self, **changes: object) -> TlsConfig:
        config = TlsConfig(self.server.certificate_path, self.server.key_path, self.authority.path)
        return replace(config, **changes)  # type: ignore[arg-type]

    def config(self, tls: TlsConfig | None, *listeners: NbdUri, **limits: float) -> ServerConfig:
        exports = (
            ExportConfig(str(self.directory / "a.raw"), "a", "raw"),
            ExportConfig(str(self.directory / "open.raw"), "open", "raw", is_tls_only=False),
        )
        return ServerConfig(exports, listeners or (TCP,), tls=tls, limits=Limits(**limits))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def realm(tmp_path_factory: pytest.TempPathFactory) -> Realm:
    directory = tmp_path_factory.mktemp("tls")
    files(directory, ["a", "open"])
    authority = Authority(directory / "ca")
    return Realm(
        authority,
        Authority(directory / "stranger", "somebody else"),
        authority.issue("server", common_name="localhost", names=LOOPBACK_NAMES),
        authority.issue("client", common_name="alice"),
        directory,
    )


@pytest.fixture
def server(realm: Realm) -> Iterator[LiveServer]:
    with LiveServer(realm.config(realm.tls())) as running:
        yield running


def assert_serves(server: LiveServer, realm: Realm) -> None:
    """The right client is still let in."""
    with tls_client(server.address, client_context(realm.authority, realm.client)) as client:
        client.negotiate("a")
        assert client.read(0, 4).data == b"aaaa"


# Certificates


def expired(realm: Realm) -> Identity:
    return realm.authority.issue("client", common_name="expired", valid_days=(-20, -1))


def not_yet_valid(realm: Realm) -> Identity:
    return realm.authority.issue("client", common_name="early", valid_days=(1, 20))


def of_a_server(realm: Realm) -> Identity:
    return realm.authority.issue("client", common_name="usage", usage=SERVER_AUTH)


def of_another_authority(realm: Realm) -> Identity:
    return realm.stranger.issue("client", common_name="alice")


def of_a_namesake_authority(realm: Realm) -> Identity:
    """Its authority has the right name and another key."""
    return Authority(realm.directory / "namesake").issue("client", common_name="alice")


def none(realm: Realm) -> None:
    return None


BAD_CERTIFICATES: dict[str, tuple[Callable[[Realm], Identity | None], str]] = {
    "expired": (expired, "certificate has expired"),
    "not_yet_valid": (not_yet_valid, "certificate is not yet valid"),
    "wrong_usage": (of_a_server, "unsuitable certificate purpose"),
    "wrong_authority": (of_another_authority, "unable to get local issuer certificate"),
    "namesake_authority": (of_a_namesake_authority, "certificate signature failure"),
    "none": (none, "peer did not return a certificate"),
}


@pytest.mark.parametrize("lowest", ["1.2", "1.3"])
@pytest.mark.parametrize("which", BAD_CERTIFICATES)
def test_bad_client_certificate_is_refused_in_the_handshake(realm: Realm, which: str, lowest: str) -> None:
    make, why = BAD_CERTIFICATES[which]
    version = V12 if lowest == "1.2" else V13
    with LiveServer(realm.config(realm.tls(min_version=lowest))) as server:
        found = refusal(server.address, client_context(realm.authority, make(realm), version, version))
        assert found is not None
        assert server.has_logged(why), server.lines
        assert_serves(server, realm)


@pytest.mark.parametrize("which", BAD_CERTIFICATES)
def test_control_server_without_client_authority_refuses_none_of_them(realm: Realm, which: str) -> None:
    with LiveServer(realm.config(realm.tls(client_ca_path=None))) as server:
        assert refusal(server.address, client_context(realm.authority, BAD_CERTIFICATES[which][0](realm))) is None


def test_revoked_certificate_is_refused_and_another_is_not(realm: Realm) -> None:
    revoked = realm.authority.issue("client", common_name="revoked")
    with LiveServer(realm.config(realm.tls(crl_path=realm.authority.revoke(revoked)))) as server:
        assert refusal(server.address, client_context(realm.authority, revoked)) is not None
        assert server.has_logged("certificate revoked")
        assert_serves(server, realm)
    with LiveServer(realm.config(realm.tls())) as control:
        assert refusal(control.address, client_context(realm.authority, revoked)) is None


def test_revocation_list_out_of_date_refuses_everybody(realm: Realm) -> None:
    with LiveServer(realm.config(realm.tls(crl_path=realm.authority.revoke(days=-0.5)))) as server:
        assert refusal(server.address, client_context(realm.authority, realm.client)) is not None
        assert server.has_logged("CRL has expired")


@pytest.mark.parametrize("is_revoked", [True, False])
def test_certificate_of_an_authority_that_was_revoked_is_refused(
    realm: Realm, tmp_path: Path, is_revoked: bool
) -> None:
    """The lists of both authorities are there; the client's own certificate is on neither."""
    office = Authority(tmp_path / "office", "office", realm.authority)
    lists = [realm.authority.revoke(office) if is_revoked else realm.authority.revoke(), office.revoke()]
    authorities, revocations = tmp_path / "authorities.pem", tmp_path / "lists.pem"
    for joined, parts in ((authorities, [realm.authority.path, office.path]), (revocations, lists)):
        joined.write_bytes(b"".join(Path(part).read_bytes() for part in parts))
    tls = realm.tls(client_ca_path=str(authorities), crl_path=str(revocations))
    with LiveServer(realm.config(tls)) as server:
        found = refusal(server.address, client_context(realm.authority, office.issue("client")))
        assert (found is not None) is is_revoked
        assert not is_revoked or server.has_logged("certificate revoked")


def test_revocation_lists_that_lack_one_authority_refuse_its_certificates(realm: Realm, tmp_path: Path) -> None:
    office = Authority(tmp_path / "office", "office", realm.authority)
    authorities = tmp_path / "authorities.pem"
    authorities.write_bytes(Path(realm.authority.path).read_bytes() + Path(office.path).read_bytes())
    with LiveServer(realm.config(realm.tls(client_ca_path=str(authorities), crl_path=office.revoke()))) as server:
        assert refusal(server.address, client_context(realm.authority, office.issue("client"))) is not None
        assert server.has_logged("unable to get certificate CRL")


def test_server_certificate_of_a_stranger_is_refused_by_the_client_and_logged(realm: Realm) -> None:
    with LiveServer(realm.config(realm.tls())) as server:
        with pytest.raises(ssl.SSLCertVerificationError):
            tls_client(server.address, client_context(realm.stranger, realm.client))
        assert server.has_logged("alert unknown ca"), server.lines


# Versions


@pytest.mark.parametrize(("lowest", "highest", "offered"), [("1.3", V12, V12), ("1.3", V11, V11), ("1.2", V11, V11)])
def test_version_below_the_lowest_is_refused(
    realm: Realm, lowest: str, highest: ssl.TLSVersion, offered: ssl.TLSVersion
) -> None:
    with LiveServer(realm.config(realm.tls(min_version=lowest))) as server:
        context = client_context(realm.authority, realm.client, offered, highest)
        assert refusal(server.address, context) == "TLSV1_ALERT_PROTOCOL_VERSION"
        assert server.has_logged("unsupported protocol")
        assert_serves(server, realm)


@pytest.mark.parametrize(("lowest", "version"), [("1.3", V13), ("1.2", V12), ("1.2", V13)])
def test_version_that_is_allowed_is_served(realm: Realm, lowest: str, version: ssl.TLSVersion) -> None:
    with LiveServer(realm.config(realm.tls(min_version=lowest))) as server:
        context = client_context(realm.authority, realm.client, version, version)
        with tls_client(server.address, context) as client:
            client.negotiate("a")
            assert client.read(0, 4).data == b"aaaa"
            assert isinstance(client.sock, ssl.SSLSocket)
            assert client.sock.version() == {V12: "TLSv1.2", V13: "TLSv1.3"}[version]
            assert client.sock.compression() is None


def test_session_is_not_resumed(realm: Realm) -> None:
    with LiveServer(realm.config(realm.tls())) as server:
        context = client_context(realm.authority, realm.client)
        with tls_client(server.address, context) as client:
            client.option(Option.LIST)
            assert isinstance(client.sock, ssl.SSLSocket)
            assert client.sock.session is None or not client.sock.session.has_ticket


# In clear, where TLS is required

IN_CLEAR = {
    "go": (Option.GO, info_data("a")),
    "info": (Option.INFO, info_data("a")),
    "go_absent": (Option.GO, info_data("absent")),
    "list": (Option.LIST, b""),
    "list_malformed": (Option.LIST, b"data"),
    "structured_reply": (Option.STRUCTURED_REPLY, b""),
    "extended_headers": (Option.EXTENDED_HEADERS, b""),
    "list_meta_context": (Option.LIST_META_CONTEXT, meta_data("a", [])),
    "set_meta_context": (Option.SET_META_CONTEXT, meta_data("a", ["base:allocation"])),
    "unknown_option": (77, b""),
}


@pytest.mark.parametrize("which", IN_CLEAR)
def test_option_in_clear_is_answered_that_tls_is_required(server: LiveServer, realm: Realm, which: str) -> None:
    option, data = IN_CLEAR[which]
    with Client(server.address) as client:
        client.greet()
        assert [reply.type for reply in client.option(option, data)] == [Rep.ERR_TLS_REQD]
    assert server.has_logged("left without TLS, which is required here")
    assert_serves(server, realm)


def test_control_option_in_clear_is_served_where_tls_is_off(realm: Realm) -> None:
    with LiveServer(realm.config(realm.tls(mode="off"))) as server, Client(server.address) as client:
        client.greet()
        client.negotiate("a")
        assert client.read(0, 4).data == b"aaaa"


def test_export_name_in_clear_closes(server: LiveServer) -> None:
    with Client(server.address) as client:
        client.greet()
        client.send_option(Option.EXPORT_NAME, b"a")
        assert client.wait_closed(5) is not None
    assert server.has_logged("EXPORT_NAME before STARTTLS")


def test_abort_in_clear_is_acknowledged(server: LiveServer) -> None:
    with Client(server.address) as client:
        client.greet()
        assert [reply.type for reply in client.option(Option.ABORT)] == [Rep.ACK]
        assert client.wait_closed(5) is not None


# STARTTLS itself


def test_starttls_where_tls_is_off_is_refused_by_policy(realm: Realm) -> None:
    for tls in (None, realm.tls(mode="off")):
        with LiveServer(realm.config(tls)) as server, Client(server.address) as client:
            client.greet()
            assert [reply.type for reply in client.option(Option.STARTTLS)] == [Rep.ERR_POLICY]


def test_starttls_with_data_is_invalid_and_a_second_try_succeeds(server: LiveServer) -> None:
    with Client(server.address) as client:
        client.greet()
        assert [reply.type for reply in client.option(Option.STARTTLS, b"x")] == [Rep.ERR_INVALID]
        assert [reply.type for reply in client.option(Option.STARTTLS)] == [Rep.ACK]


def test_starttls_twice_is_invalid_and_haggling_continues(server: LiveServer, realm: Realm) -> None:
    with tls_client(server.address, client_context(realm.authority, realm.client)) as client:
        assert [reply.type for reply in client.option(Option.STARTTLS)] == [Rep.ERR_INVALID]
        client.negotiate("a")
        assert client.read(0, 4).data == b"aaaa"


def test_options_injected_behind_starttls_end_the_connection_and_are_not_interpreted(
    server: LiveServer, realm: Realm
) -> None:
    with Client(server.address) as client:
        client.greet()
        client.send(option_bytes(Option.STARTTLS) + option_bytes(Option.LIST))
        assert client.wait_closed(5) is not None
    assert server.has_logged("plain bytes behind STARTTLS")
    assert_serves(server, realm)


def test_plain_option_after_the_answer_to_starttls_ends_the_connection(server: LiveServer, realm: Realm) -> None:
    with asked_for_tls(server.address) as client:
        client.send_option(Option.LIST)
        assert client.wait_closed(5) is not None
    assert server.has_logged("TLS handshake:")
    assert_serves(server, realm)


@pytest.mark.parametrize(
    "garbage",
    [bytes(64), b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01" + b"\xff" * 4096, b"\x17\x03\x03\x00\x10" + bytes(16)],
    ids=["zeroes", "http", "long_record", "data_record"],
)
def test_garbage_for_a_client_hello_ends_that_connection_only(server: LiveServer, realm: Realm, garbage: bytes) -> None:
    with tls_client(server.address, client_context(realm.authority, realm.client)) as other:
        with asked_for_tls(server.address) as client:
            client.send(garbage)
            assert client.wait_closed(5) is not None
        assert server.has_logged("TLS handshake:")
        other.negotiate("a")
        assert other.read(0, 4).data == b"aaaa"


@pytest.mark.parametrize("sent", [b"", CLIENT_HELLO_HEAD], ids=["silence", "half_a_client_hello"])
def test_handshake_that_does_not_come_ends_at_the_total_deadline(realm: Realm, sent: bytes) -> None:
    with LiveServer(realm.config(realm.tls(), handshake_timeout_s=0.4)) as server:
        with asked_for_tls(server.address) as client:
            client.send(sent)
            taken_s = client.wait_closed(5)
        assert taken_s is not None
        assert taken_s < 2
        assert server.has_logged("no handshake within 0.4 s")


@pytest.mark.parametrize("sent", [b"", CLIENT_HELLO_HEAD], ids=["before", "within"])
def test_reset_in_the_tls_handshake_ends_that_connection_only(server: LiveServer, realm: Realm, sent: bytes) -> None:
    client = asked_for_tls(server.address)
    client.send(sent)
    client.reset()
    assert_serves(server, realm)


def test_close_in_the_tls_handshake_is_logged(server: LiveServer) -> None:
    with asked_for_tls(server.address) as client:
        client.send(CLIENT_HELLO_HEAD)
    assert server.has_logged("left in the middle of the TLS handshake")


def test_record_that_was_tampered_with_ends_the_connection(server: LiveServer, realm: Realm) -> None:
    with tls_client(server.address, client_context(realm.authority, realm.client)) as client:
        client.negotiate("a")
        with socket.socket(fileno=socket.dup(client.sock.fileno())) as below:
            below.sendall(b"\x17\x03\x03\x00\x30" + bytes(48))
        with pytest.raises((ConnectionClosed, ssl.SSLError)):
            client.read(0, 4)
    # OpenSSL 3.0 says the first, 3.5 the second
    assert server.has_logged("TLS: decryption failed or bad record mac", "TLS: record layer failure"), server.lines
    assert_serves(server, realm)


# What is forgotten, what is kept apart


def selective(realm: Realm) -> ServerConfig:
    return realm.config(realm.tls(mode="selective", client_ca_path=None))


def test_state_negotiated_in_clear_is_forgotten_at_starttls(realm: Realm) -> None:
    """CVE-2021-3716: structured replies and contexts chosen by somebody in the middle would go on."""
    with LiveServer(selective(realm)) as server, Client(server.address) as client:
        client.greet()
        assert client.option(Option.STRUCTURED_REPLY)[-1].type == Rep.ACK
        assert client.option(Option.SET_META_CONTEXT, meta_data("open", ["base:allocation"]))[-1].type == Rep.ACK
        assert client.option(Option.STARTTLS)[-1].type == Rep.ACK
        client.sock = client_context(realm.authority).wrap_socket(client.sock)
        replies = client.option(Option.SET_META_CONTEXT, meta_data("open", ["base:allocation"]))
        assert [reply.type for reply in replies] == [Rep.ERR_INVALID]
        client.negotiate("open", structured=False)
        assert client.read(0, 4).data == b"oooo"


def test_starttls_behind_answers_that_nobody_has_read_yet_waits_for_them(realm: Realm, tmp_path: Path) -> None:
    """The socket holds less than the answers: they leave in clear, and no option is looked at while some wait."""
    made = realm.config(realm.tls(mode="selective", client_ca_path=None), NbdUri(socket=str(tmp_path / "s")))
    exports = tuple(replace(export, description="d" * 4000) for export in made.exports)
    with LiveServer(replace(made, exports=exports)) as server, Client(server.address) as client:
        client.greet()
        client.send(option_bytes(Option.LIST) * 600 + option_bytes(Option.STARTTLS))
        (connection,) = server.now(lambda: server.service.server.connections)
        assert wait_until(lambda: connection.outbox.pending_bytes > 0, 5)
        for _ in range(50):
            assert server.now(lambda: connection.outbox.pending_bytes) <= 20 * 4096, "one turn's at most"
        for _ in range(600):
            assert len(client.read_option_replies(Option.LIST)) == 2
        assert [reply.type for reply in client.read_option_replies(Option.STARTTLS)] == [Rep.ACK]
        client.sock = client_context(realm.authority).wrap_socket(client.sock)
        client.negotiate("a")
        assert client.read(0, 4).data == b"aaaa"


def test_starttls_in_one_piece_with_a_go_that_is_refused_later_is_answered(realm: Realm, tmp_path: Path) -> None:
    made = selective(realm)
    exports = tuple(replace(export, overlay="per-client", overlay_directory=str(tmp_path)) for export in made.exports)
    with (
        LiveServer(replace(made, exports=exports, limits=Limits(overlays=0))) as server,
        Client(server.address, 5) as client,
    ):
        client.greet()
        client.send(option_bytes(Option.GO, info_data("open")) + option_bytes(Option.STARTTLS))
        assert [reply.type for reply in client.read_option_replies(Option.GO)] == [Rep.ERR_POLICY]
        assert [reply.type for reply in client.read_option_replies(Option.STARTTLS)] == [Rep.ACK]
        client.sock = client_context(realm.authority).wrap_socket(client.sock)
        assert listed(client) == [b"a", b"open"]


def test_starttls_after_tls_was_switched_off_closes(realm: Realm) -> None:
    with LiveServer(selective(realm)) as server, Client(server.address) as client:
        client.greet()
        server.now(server.service.server.set_tls, None)
        assert [reply.type for reply in client.option(Option.STARTTLS)] == [Rep.ACK]
        assert client.wait_closed(5) is not None
        assert server.has_logged("TLS was switched off meanwhile")


def listed(client: Client) -> list[bytes]:
    names = []
    for reply in client.option(Option.LIST)[:-1]:
        (length,) = struct.unpack(">I", reply.data[:4])
        names.append(reply.data[4 : 4 + length])
    return names


def test_selective_mode_hides_tls_only_exports_until_tls_is_up(realm: Realm) -> None:
    with LiveServer(selective(realm)) as server:
        with Client(server.address) as client:
            client.greet()
            assert listed(client) == [b"open"]
            for name in ("a", "absent"):
                assert [reply.type for reply in client.option(Option.GO, info_data(name))] == [Rep.ERR_TLS_REQD]
            client.negotiate("open")
            assert client.read(0, 4).data == b"oooo"
        with tls_client(server.address, client_context(realm.authority)) as client:
            assert listed(client) == [b"a", b"open"]
            assert [reply.type for reply in client.option(Option.GO, info_data("absent"))] == [Rep.ERR_UNKNOWN]
            client.negotiate("a")
            assert client.read(0, 4).data == b"aaaa"


def test_nbds_listener_requires_tls_whatever_the_mode_of_others(realm: Realm, tmp_path: Path) -> None:
    listeners = (NbdUri(socket=str(tmp_path / "s")), replace(TCP, is_tls=True))
    with LiveServer(realm.config(realm.tls(mode="off"), *listeners)) as server:
        schemes = [str(uri).partition(":")[0] for uri in server.service.uris]
        assert schemes == ["nbd+unix", "nbd+unix", "nbds", "nbds"]
        plain, encrypted = server.addresses[0], server.addresses[2]
        with Client(plain) as client:
            client.greet()
            client.negotiate("a")
        with Client(encrypted) as client:
            client.greet()
            assert client.option(Option.GO, info_data("a"))[-1].type == Rep.ERR_TLS_REQD
        assert refusal(encrypted, client_context(realm.authority, realm.client)) is None


def test_tls_works_over_a_unix_socket(realm: Realm, tmp_path: Path) -> None:
    listener = NbdUri(socket=str(tmp_path / "s"), is_tls=True)
    with LiveServer(realm.config(realm.tls(), listener)) as server:
        assert_serves(server, realm)


def test_downgrade_by_somebody_in_the_middle_leaves_nothing_to_read(server: LiveServer, realm: Realm) -> None:
    """Who answers ERR_UNSUP to STARTTLS in the server's place gets the client's options in clear; the server still
    refuses them.
    """
    with Client(server.address) as client:
        client.greet()
        for option, data in (IN_CLEAR["structured_reply"], IN_CLEAR["go"]):
            assert [reply.type for reply in client.option(option, data)] == [Rep.ERR_TLS_REQD]
        client.send_option(Option.EXPORT_NAME, b"a")
        assert client.wait_closed(5) is not None
    assert_serves(server, realm)


def test_names_in_a_certificate_of_another_kind_do_no_harm(realm: Realm) -> None:
    names = (x509.IPAddress(ipaddress.ip_address("::1")), x509.RegisteredID(x509.ObjectIdentifier("1.2.3.4")))
    odd = realm.authority.issue("client", common_name="odd", names=names)
    with LiveServer(realm.config(realm.tls())) as server:
        assert refusal(server.address, client_context(realm.authority, odd)) is None


def test_certificate_with_a_name_that_is_not_utf8_is_refused_in_one_line(realm: Realm) -> None:
    """Python's `ssl` reads names as UTF-8, and gives none of them if one is not."""
    names = b"\x30\x07\x82\x05h\xe4ns."  # SEQUENCE { dNSName [2] IA5String }
    odd = realm.authority.issue("client", common_name="latin1", names=names)
    with LiveServer(realm.config(realm.tls())) as server:
        assert refusal(server.address, client_context(realm.authority, odd)) is not None
        assert server.has_logged("refused: the client's certificate has a name that cannot be read"), server.lines
        assert_serves(server, realm)
