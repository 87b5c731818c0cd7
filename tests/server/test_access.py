"""Access rules: who may open an export, with what right, and what those see who may not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from nbdimg.config import AccessRule, ExportConfig, ServerConfig, TlsConfig
from nbdimg.errors import ConfigError
from nbdimg.export.access import Client as Who
from nbdimg.export.access import Right, Rule, normalized, right_of
from nbdimg.server.credentials import public_key_info
from nbdimg.server.terms import terms_of
from nbdimg.uri import NbdUri
from tests.server.test_tls_matrix import listed
from tests.server.tls_live import LiveServer, client_context, files, tls_client
from tests.support.certificates import LOOPBACK_NAMES, Authority, Identity
from tests.support.rawclient import Client
from tests.support.rawprotocol import (
    Command,
    ConnectionClosed,
    Info,
    Option,
    Rep,
    TransmissionFlag,
    info_data,
    meta_data,
)

UID, GID = os.getuid(), os.getgid()
TCP = NbdUri(host="127.0.0.1", port=0)
READ_ONLY = TransmissionFlag.READ_ONLY


# Decisions


def within(*networks: str) -> Rule:
    return Rule(networks=tuple(map(ip_network, networks)))


@pytest.mark.parametrize(
    ("address", "network", "is_in"),
    [
        ("10.0.0.1", "10.0.0.1", True),
        ("10.0.0.10", "10.0.0.1", False),
        ("10.0.0.1", "10.0.0.10", False),
        ("110.0.0.1", "10.0.0.0/8", False),
        ("10.255.255.255", "10.0.0.0/8", True),
        ("11.0.0.0", "10.0.0.0/8", False),
        ("192.168.1.127", "192.168.1.0/25", True),
        ("192.168.1.128", "192.168.1.0/25", False),
        ("8.8.8.8", "0.0.0.0/0", True),
        ("::1", "0.0.0.0/0", False),
        ("::1", "::1", True),
        ("::10", "::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("fe80::1%eth0", "fe80::/10", True),
        ("2001:db8::1", "2001:db8::/32", True),
        ("2001:db80::1", "2001:db8::/32", False),
    ],
)
def test_networks_are_compared_as_numbers(address: str, network: str, is_in: bool) -> None:
    """CVE-2013-6410: nbd-server compared prefixes of texts."""
    expected = Right.WRITE if is_in else Right.NONE
    assert right_of(Who(address=ip_address(address)), [within(network)]) is expected


def test_one_of_several_networks_is_enough() -> None:
    rule = within("10.0.0.0/8", "192.168.1.0/24", "2001:db8::/32")
    for address, expected in (
        ("10.1.2.3", Right.WRITE),
        ("192.168.1.9", Right.WRITE),
        ("2001:db8::9", Right.WRITE),
        ("192.168.2.9", Right.NONE),
    ):
        assert right_of(Who(address=ip_address(address)), [rule]) is expected


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([], Right.WRITE),
        ([Rule()], Right.WRITE),
        ([Rule(right=Right.READ)], Right.READ),
        ([Rule(uids=frozenset({1}))], Right.WRITE),
        ([Rule(uids=frozenset({2}))], Right.NONE),
        ([Rule(uids=frozenset({1, 2}), gids=frozenset({7}))], Right.WRITE),
        ([Rule(uids=frozenset({1}), gids=frozenset({8}))], Right.NONE),
        ([Rule(uids=frozenset({2})), Rule(right=Right.READ)], Right.READ),
        ([Rule(right=Right.READ), Rule(uids=frozenset({1}))], Right.WRITE),
        ([Rule(uids=frozenset({1}), right=Right.READ), Rule(uids=frozenset({2}))], Right.READ),
        ([within("0.0.0.0/0")], Right.NONE),
        ([Rule(identities=frozenset({"dns:a"}))], Right.WRITE),
        ([Rule(identities=frozenset({"dns:b", "cn:a"}))], Right.NONE),
        ([Rule(identities=frozenset({"dns:a"}), uids=frozenset({2}))], Right.NONE),
    ],
)
def test_right_is_the_highest_of_the_rules_that_match(rules: list[Rule], expected: Right) -> None:
    who = Who(uid=1, gid=7, identities=frozenset({"dns:a", "cn:x"}))
    assert right_of(who, rules) is expected


def test_client_without_uid_or_address_matches_no_rule_that_asks_for_one() -> None:
    for rule in (Rule(uids=frozenset({0})), Rule(gids=frozenset({0})), within("0.0.0.0/0", "::/0")):
        assert right_of(Who(), [rule]) is Right.NONE


def test_host_names_have_no_case_and_nothing_else() -> None:
    assert normalized("dns:A.Example") == "dns:a.example"
    assert normalized("dns:\u212a.Example") == "dns:\u212a.example", "the kelvin's sign, which str.lower makes a k"
    for identity in ("cn:Alice", "email:Alice@example", "uri:Spiffe://A"):
        assert normalized(identity) == identity


# The configuration


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"identities": ("alice",)}, "expected KIND:VALUE"),
        ({"identities": ("ip:1.2.3.4",)}, "expected KIND:VALUE"),
        ({"identities": ("cn:",)}, "expected KIND:VALUE"),
        ({"identities": ("dns:*.example",)}, "a wildcard matches nothing"),
        ({"identities": ("spki-sha256:abcd",)}, "64 lower-case hexadecimal digits"),
        ({"identities": ("spki-sha256:" + "A" * 64,)}, "64 lower-case hexadecimal digits"),
        ({"networks": ("10.0.0",)}, "expected ADDRESS or ADDRESS/BITS"),
        ({"networks": ("10.0.0.1/8",)}, "has host bits set"),
        ({"networks": ("localhost",)}, "expected ADDRESS or ADDRESS/BITS"),
        ({"networks": ("fe80::1%eth0",)}, "interfaces are not compared"),
        ({"networks": ("fe80::%eth0/64",)}, "interfaces are not compared"),
        ({"networks": ("::ffff:10.0.0.0/104",)}, "this is IPv4"),
        ({"uids": (-1,)}, "uid is -1"),
        ({"gids": (2**32 - 1,)}, "gid is 4294967295"),
    ],
)
def test_rule_that_means_nothing_is_refused(fields: dict[str, tuple[object, ...]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AccessRule(**fields)  # type: ignore[arg-type]


def test_rule_for_an_identity_that_nobody_can_prove_is_refused(tmp_path: Path) -> None:
    (image,) = files(tmp_path, ["a"])
    certificate = Authority(tmp_path / "ca").issue("server")
    for rule, tls in (
        ("cn:alice", None),
        ("cn:alice", TlsConfig(certificate.certificate_path, certificate.key_path)),
        ("psk:alice", TlsConfig(certificate.certificate_path, certificate.key_path)),
    ):
        export = ExportConfig(str(image), "a", "raw", access=(AccessRule(identities=(rule,)),))
        with pytest.raises(ConfigError, match=f"the rule for {rule} needs TLS"):
            LiveServer(ServerConfig((export,), (TCP,), tls=tls)).__enter__()


# On the wire


def config(directory: Path, rules: Mapping[str, tuple[AccessRule, ...]], uri: NbdUri) -> ServerConfig:
    """An export for each name; their images are full of the name's letter."""
    paths = files(directory, list(rules))
    exports = [
        ExportConfig(str(path), name, "raw", access=access)
        for path, (name, access) in zip(paths, rules.items(), strict=True)
    ]
    return ServerConfig(tuple(exports), (uri,))


def refusals(client: Client, name: str) -> list[tuple[int, str]]:
    """The type and text of every way to ask for an export, its name taken out."""
    asked = [
        (Option.INFO, info_data(name)),
        (Option.GO, info_data(name)),
        (Option.GO, info_data(name, [Info.NAME, Info.DESCRIPTION])),
        (Option.LIST_META_CONTEXT, meta_data(name, [])),
        (Option.SET_META_CONTEXT, meta_data(name, ["base:allocation"])),
    ]
    assert client.option(Option.STRUCTURED_REPLY)[-1].type in (Rep.ACK, Rep.ERR_INVALID)
    answers = []
    for option, data in asked:
        (reply,) = client.option(option, data)
        answers.append((reply.type, reply.text.replace(name, "NAME")))
    return answers


def begin(client: Client, name: str) -> None:
    """GO after `refusals`, which has negotiated structured replies."""
    client.structured = True
    client.info(name, option=Option.GO)


@pytest.mark.parametrize(
    "rule",
    [
        AccessRule(uids=(UID + 1,)),
        AccessRule(gids=(GID + 1,)),
        AccessRule(uids=(UID,), gids=(GID + 1,)),
        AccessRule(networks=("0.0.0.0/0", "::/0")),
        AccessRule(uids=(UID + 1,), is_read_only=True),
    ],
    ids=["uid", "gid", "uid_and_gid", "network", "read_only"],
)
def test_export_of_others_looks_as_if_it_were_not_there(tmp_path: Path, rule: AccessRule) -> None:
    uri = NbdUri(socket=str(tmp_path / "s"))
    with LiveServer(config(tmp_path, {"hidden": (rule,), "mine": (AccessRule(uids=(UID,)),)}, uri)) as server:
        with Client(server.address) as client:
            client.greet()
            assert refusals(client, "hidden") == refusals(client, "absent")
            assert all(kind == Rep.ERR_UNKNOWN for kind, _ in refusals(client, "hidden"))
            assert listed(client) == [b"mine"]
            begin(client, "")
            assert client.read(0, 4).data == b"mmmm"
        assert server.has_logged("may not open export 'hidden'")
        with Client(server.address) as client:
            client.greet()
            client.send_option(Option.EXPORT_NAME, b"hidden")
            with pytest.raises(ConnectionClosed):
                client.receive(1)


@pytest.mark.parametrize("network", ["127.0.0.2", "127.0.0.10", "10.0.0.0/8", "::1"])
def test_source_outside_the_network_does_not_see_the_export(tmp_path: Path, network: str) -> None:
    rules = {"hidden": (AccessRule(networks=(network,)),), "mine": (AccessRule(networks=("127.0.0.0/30",)),)}
    with LiveServer(config(tmp_path, rules, TCP)) as server, Client(server.address) as client:
        client.greet()
        assert refusals(client, "hidden") == refusals(client, "absent")
        assert listed(client) == [b"mine"]
        begin(client, "mine")


@pytest.mark.parametrize("extended", [False, True])
def test_right_to_read_serves_read_only_beside_one_who_may_write(tmp_path: Path, extended: bool) -> None:
    rules = {"disk": (AccessRule(uids=(UID,), is_read_only=True), AccessRule(networks=("127.0.0.1",)))}
    made = config(tmp_path, rules, NbdUri(socket=str(tmp_path / "s")))
    with LiveServer(replace(made, listeners=(*made.listeners, TCP))) as server:
        unix, tcp = server.addresses
        with Client(unix) as reader, Client(tcp) as writer:
            for client in (reader, writer):
                client.greet()
                client.negotiate("disk", extended=extended)
            assert reader.export.flags & READ_ONLY
            assert not reader.export.flags & (TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES)
            assert not writer.export.flags & READ_ONLY
            assert reader.write(0, b"x" * 512).error == 1
            assert reader.request(Command.TRIM, 0, 512).error == 1
            assert reader.request(Command.WRITE_ZEROES, 0, 512).error == 1
            assert reader.read(0, 4).data == b"dddd"
            assert writer.write(0, b"x" * 512).error == 0
            assert reader.read(0, 4).data == b"xxxx"


def test_changed_rules_hold_for_who_comes_next(tmp_path: Path) -> None:
    made = config(tmp_path, {"disk": ()}, NbdUri(socket=str(tmp_path / "s")))
    with LiveServer(made) as server, Client(server.address) as first:
        first.greet()
        first.negotiate("disk")
        closed = replace(made.exports[0], access=(AccessRule(uids=(UID + 1,)),))
        server.now(server.service.registry.set_terms, "disk", terms_of(closed))
        assert first.read(0, 4).data == b"dddd"
        with Client(server.address) as second:
            second.greet()
            assert second.option(Option.GO, info_data("disk"))[-1].type == Rep.ERR_UNKNOWN


# Identities


def names_of(directory: Path) -> tuple[Authority, Identity, Identity]:
    authority = Authority(directory / "ca")
    alice = authority.issue(
        "client",
        common_name="alice",
        names=(
            x509.DNSName("Backup.example"),
            x509.UniformResourceIdentifier("spiffe://example/backup"),
            x509.RFC822Name("alice@example.org"),
        ),
    )
    bob = authority.issue("client", common_name="alice2", names=(x509.DNSName("evil.backup.example"),))
    return authority, alice, bob


@pytest.mark.parametrize(
    "identity",
    [
        "cn:alice",
        "dns:backup.example",
        "dns:BACKUP.example",
        "uri:spiffe://example/backup",
        "email:alice@example.org",
        "spki-sha256",
    ],
)
def test_export_opens_to_the_right_certificate_and_not_to_another(tmp_path: Path, identity: str) -> None:
    authority, alice, bob = names_of(tmp_path)
    of_server = authority.issue("server", common_name="localhost", names=LOOPBACK_NAMES)
    rule = AccessRule(identities=(f"{identity}:{alice.spki_sha256}" if identity == "spki-sha256" else identity,))
    tls = TlsConfig(of_server.certificate_path, of_server.key_path, authority.path)
    made = replace(config(tmp_path, {"hidden": (rule,)}, TCP), tls=tls)
    with LiveServer(made) as server:
        with tls_client(server.address, client_context(authority, alice)) as client:
            client.negotiate("hidden")
            assert client.read(0, 4).data == b"hhhh"
        with tls_client(server.address, client_context(authority, bob)) as client:
            assert refusals(client, "hidden") == refusals(client, "absent")
            assert listed(client) == []
        assert server.has_logged("may not open export 'hidden'")


@pytest.mark.parametrize("uid", [UID, UID + 1])
def test_rule_for_a_certificate_and_a_user_takes_both(tmp_path: Path, uid: int) -> None:
    authority, alice, _ = names_of(tmp_path)
    of_server = authority.issue("server", common_name="localhost", names=LOOPBACK_NAMES)
    tls = TlsConfig(of_server.certificate_path, of_server.key_path, authority.path)
    rule = AccessRule(identities=("cn:alice",), uids=(uid,))
    made = replace(config(tmp_path, {"disk": (rule,)}, NbdUri(socket=str(tmp_path / "s"))), tls=tls)
    with LiveServer(made) as server, tls_client(server.address, client_context(authority, alice)) as client:
        expected = Rep.ACK if uid == UID else Rep.ERR_UNKNOWN
        assert client.option(Option.INFO, info_data("disk"))[-1].type == expected


@pytest.mark.parametrize("identity", ["cn:backup.example", "dns:alice", "dns:example", "cn:alic", "cn:Alice"])
def test_name_of_another_kind_or_a_part_of_one_is_not_the_name(tmp_path: Path, identity: str) -> None:
    authority, alice, _ = names_of(tmp_path)
    of_server = authority.issue("server", common_name="localhost", names=LOOPBACK_NAMES)
    tls = TlsConfig(of_server.certificate_path, of_server.key_path, authority.path)
    made = replace(config(tmp_path, {"hidden": (AccessRule(identities=(identity,)),)}, TCP), tls=tls)
    with (
        LiveServer(made) as server,
        tls_client(server.address, client_context(authority, alice)) as client,
    ):
        assert client.option(Option.GO, info_data("hidden"))[-1].type == Rep.ERR_UNKNOWN


def test_public_key_of_a_certificate_is_found_whatever_its_lengths(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    authority = Authority(tmp_path / "ca", "x" * 60)
    for common_name in ("a", "b" * 64):
        made = authority.issue("client", common_name=common_name, names=[x509.DNSName("n" * 200)])
        expected = made.certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        assert public_key_info(made.certificate.public_bytes(Encoding.DER)) == expected


def test_public_key_is_found_behind_names_of_more_than_127_bytes() -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = rsa.generate_private_key(65537, 2048)
    kinds = (NameOID.ORGANIZATION_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME, NameOID.COMMON_NAME)
    name = x509.Name([x509.NameAttribute(kind, "x" * 64) for kind in kinds])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, datetime(2026, 1, 1), datetime(2027, 1, 1))
    made = builder.sign(key, SHA256()).public_bytes(Encoding.DER)
    assert public_key_info(made) == key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
