"""NBD URIs.

Source: doc/uri.md of the NBD project: nbd, nbds, nbd+unix, nbds+unix; parameters socket, tls-type, tls-hostname,
tls-verify-peer. A query is read by RFC 3986, where `+` is a plus sign.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdimg.errors import ConfigError
from nbdimg.uri import NbdUri


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("nbd://localhost", NbdUri(host="localhost", port=10809)),
        ("nbd://localhost/", NbdUri(host="localhost", port=10809)),
        ("nbd://localhost:", NbdUri(host="localhost", port=10809)),
        ("nbd://127.0.0.1:0", NbdUri(host="127.0.0.1", port=0)),
        ("nbd://example.com:65535/disk", NbdUri(host="example.com", port=65535, name="disk")),
        ("nbd://h//disk", NbdUri(host="h", name="/disk")),
        ("nbd://h/a/b", NbdUri(host="h", name="a/b")),
        ("nbd://h/a%20b%2Fc%3F%23", NbdUri(host="h", name="a b/c?#")),
        ("nbd://h/a+b", NbdUri(host="h", name="a+b")),
        ("nbd://h/d%C3%A9", NbdUri(host="h", name="dé")),
        ("nbd://[::1]", NbdUri(host="::1")),
        ("nbd://[::1]:10810/disk", NbdUri(host="::1", port=10810, name="disk")),
        ("nbd://[fe80::1%25eth0]:10810/disk", NbdUri(host="fe80::1%eth0", port=10810, name="disk")),
        ("nbd://[FE80::1%25Eth0]", NbdUri(host="fe80::1%Eth0")),
        ("nbd://[fe80::1%eth0]", NbdUri(host="fe80::1%eth0")),
        ("nbd://[fe80::1%2525]", NbdUri(host="fe80::1%25")),
        ("nbd://[fe80::1%25]", NbdUri(host="fe80::1%25")),
        ("nbds://h/disk", NbdUri(host="h", name="disk", is_tls=True)),
        ("NBD://Host", NbdUri(host="host")),
        ("nbd+unix:///?socket=/run/nbd.sock", NbdUri(socket="/run/nbd.sock")),
        ("nbd+unix:///disk?socket=/run/nbd.sock", NbdUri(socket="/run/nbd.sock", name="disk")),
        ("nbd+unix:////disk?socket=/s", NbdUri(socket="/s", name="/disk")),
        ("nbds+unix:///disk?socket=/s", NbdUri(socket="/s", name="disk", is_tls=True)),
        ("nbd+unix:///?socket=/with%20space%26more", NbdUri(socket="/with space&more")),
        ("nbd+unix:///?tls-hostname=h&socket=/s", NbdUri(socket="/s")),
        ("nbds://h?tls-verify-peer=0&tls-type=x509", NbdUri(host="h", is_tls=True)),
    ],
)
def test_parse_valid_uri(text: str, uri: NbdUri) -> None:
    assert NbdUri.parse(text) == uri


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "scheme"),
        ("disk.img", "scheme"),
        ("/run/nbd.sock", "scheme"),
        ("http://h", "scheme"),
        ("nbdx://h", "scheme"),
        ("nbd+tcp://h", "scheme"),
        ("nbd+://h", "scheme"),
        ("nbd+vsock://2", "scheme"),
        ("nbd+unix+unix:///?socket=/s", "scheme"),
        ("nbd:", "host"),
        ("nbd://", "host"),
        ("nbd:///disk", "host"),
        ("nbd://:10809", "host"),
        ("nbd:unix:/s", "host"),
        ("nbd://h:65536", "[Pp]ort"),
        ("nbd://h:-1", "[Pp]ort"),
        ("nbd://h:http", "[Pp]ort"),
        ("nbd://[::1", "IPv6"),
        ("nbd://h/#part", "fragment"),
        ("nbd://h?socket=/s", "socket="),
        ("nbd://h?sokcet=/s", "'sokcet'"),
        ("nbd://h?Socket=/s", "'Socket'"),
        ("nbd+unix://", r"\?socket=PATH"),
        ("nbd+unix:///disk", r"\?socket=PATH"),
        ("nbd+unix:///disk?socket=", r"\?socket=PATH"),
        ("nbd+unix:///disk?socket", r"\?socket=PATH"),
        ("nbd+unix://h/disk?socket=/s", "host"),
        ("nbd+unix:///?socket=/s&mode=1", "'mode'"),
        ("nbd+unix:///?socket=/s#x", "fragment"),
    ],
)
def test_parse_invalid_uri_names_the_part_that_is_wrong(text: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part) as caught:
        NbdUri.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nbd://user:word@h", "'nbd://…@h': an NBD URI has no user name"),
        ("nbd+unix://user:word@/?socket=/s@t", "'nbd+unix://…@/?socket=/s@t': an NBD URI has no user name"),
        ("nbd://user:word@h:65536/a@b", "'nbd://…@h:65536/a@b' is not an NBD URI"),
        ("nbd://user:a word@h", "'nbd://…@h' is not an NBD URI"),
        ("nbd://user:wo/rd@h", "'nbd://…@h' is not an NBD URI: its host or port is malformed"),
        ("nbd://user:wo/r@d@h:1", "'nbd://…@h:1' is not an NBD URI"),
        ("nbd://user:wo℀rd@h", "'nbd://…@h' is not an NBD URI"),
        ("user:word@h", "'…@h': the scheme must be"),
        ("nbd://[::1]/a@b#c", "'nbd://[::1]/a@b#c': an NBD URI has no fragment"),
        ("http://user:word@h", "'http://…@h': the scheme must be"),
        ("nbd://h/a@b#c", "'nbd://h/a@b#c': an NBD URI has no fragment"),
    ],
)
def test_parse_uri_with_a_password_is_refused_without_showing_it(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        NbdUri.parse(text)
    assert str(caught.value).startswith(said)
    assert "wo" not in str(caught.value)


def test_parse_socket_path_with_a_plus_sign_keeps_it() -> None:
    assert NbdUri.parse("nbd+unix:///disk?socket=/run/a+b.sock").socket == "/run/a+b.sock"


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        (NbdUri(host="127.0.0.1"), "nbd://127.0.0.1/"),
        (NbdUri(host="127.0.0.1", port=10810, name="disk"), "nbd://127.0.0.1:10810/disk"),
        (NbdUri(host="::1", name="disk"), "nbd://[::1]/disk"),
        (NbdUri(host="::1", port=0), "nbd://[::1]:0/"),
        (NbdUri(host="fe80::1%eth0", port=10810), "nbd://[fe80::1%25eth0]:10810/"),
        (NbdUri(host="h", name="/disk"), "nbd://h//disk"),
        (NbdUri(host="h", name="a b?#%"), "nbd://h/a%20b%3F%23%25"),
        (NbdUri(host="h", is_tls=True), "nbds://h/"),
        (NbdUri(socket="/run/nbd.sock", name="disk"), "nbd+unix:///disk?socket=/run/nbd.sock"),
        (NbdUri(socket="/a b&c+d"), "nbd+unix:///?socket=/a%20b%26c%2Bd"),
        (NbdUri(socket="/s", is_tls=True), "nbds+unix:///?socket=/s"),
    ],
)
def test_print_uri(uri: NbdUri, text: str) -> None:
    assert str(uri) == text


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
hosts = st.sampled_from(["localhost", "127.0.0.1", "::1", "fe80::1", "fe80::1%eth0", "example.com"])
almost_uris = st.builds("".join, st.lists(st.sampled_from([*"nbds+unix:/?#[]@&=%:;0", "nbd://", "socket="])))
uris = st.one_of(
    st.builds(NbdUri, host=hosts, port=st.integers(0, 65535), name=texts, is_tls=st.booleans()),
    st.builds(NbdUri, socket=texts.filter(bool), name=texts, is_tls=st.booleans()),
)


@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(uris)
def test_print_and_parse_give_the_same_uri(uri: NbdUri) -> None:
    assert NbdUri.parse(str(uri)) == uri


@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(st.one_of(texts, almost_uris))
def test_parse_any_text_gives_a_uri_or_a_config_error(text: str) -> None:
    try:
        uri = NbdUri.parse(text)
    except ConfigError:
        return
    assert (uri.host is None) is not (uri.socket is None)
    assert 0 <= uri.port <= 65535


@pytest.mark.parametrize("raw", [b"/run/\xff.sock", b"/run/caf\xe9.sock"])
def test_socket_path_that_is_not_utf8_is_printed_and_read_back(raw: bytes) -> None:
    """Paths are bytes; Python passes those that are not UTF-8 as lone surrogates."""
    uri = NbdUri(socket=os.fsdecode(raw))
    assert NbdUri.parse(str(uri)).socket == uri.socket


def test_parse_file_name_that_is_not_utf8_is_refused_without_a_crash() -> None:
    with pytest.raises(ConfigError):
        NbdUri.parse(os.fsdecode(b"disk\xff.img"))
