"""Configuration files: what they mean, what overrides them, and one sentence for everything that is wrong in one."""

from __future__ import annotations

import os
import re
import threading
from functools import partial
from pathlib import Path

import pytest

from nbdimg import configfile
from nbdimg.config import (
    DEFAULT_LISTENER,
    AccessRule,
    AdminConfig,
    ExportConfig,
    ServerConfig,
    TcpAddress,
    TlsConfig,
)
from nbdimg.configfile import ConfigFileError, FileConfig, Overrides, config_without_file, export_of, load_config
from nbdimg.configfile.environment import LIMIT_PREFIX
from nbdimg.configfile.limits import LIMITS
from nbdimg.configfile.lines import key_lines
from nbdimg.configfile.mapping import ACCESS_KEYS, ADMIN_KEYS, EXPORT_KEYS, METRICS_KEYS, TLS_KEYS, TOP_KEYS
from nbdimg.limits import Limits
from nbdimg.units import MiB
from nbdimg.uri import NbdUri

EXAMPLE = Path("conf/nbdimg.toml")
SECRET = "hunter2-correct-horse"

FULL = """\
listen = [
  "nbd+unix:///?socket=run/s",
  "nbds://127.0.0.1:10810",
]
insecure_plaintext = true
reload = "watch"

[limits]
connections = 7
handshake_timeout = 2.5
drain_timeout = 0
payload_size = "1MiB"

[tls]
certificate_file = "tls/server.pem"
key_file = "/etc/server.key"
client_ca_file = "ca.pem"
mode = "selective"
min_version = "1.2"

[[exports]]
path = "disks/vm.qcow2"
tls = false

[[exports]]
name = "second"
path = "/images/second.vhdx"
format = "vhdx"
read_only = true
description = "a disk"
min_block_size = "4K"
key_file = "second.key"
key_files = { "bases/b.qcow2" = "b.key", "/a" = "/a.key" }
allow_references = ["bases", "/srv"]
parent = "bases/parent.vhdx"
accept_lost_log = true

[[exports.access]]
identities = ["dns:a.example"]
networks = ["10.0.0.0/8", "::1"]
read_only = true

[[exports.access]]
uids = [0, 1000]
gids = [5]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "nbdimg.toml"


def load(file: Path, text: str, **environment: str) -> FileConfig:
    file.write_text(text)
    return load_config(file, environment=environment)


def problems(file: Path, text: str, **environment: str) -> tuple[str, ...]:
    """All of them, each without the file's name."""
    file.write_text(text)
    with pytest.raises(ConfigFileError) as caught:
        load_config(file, environment=environment)
    return tuple(problem.removeprefix(f"{file}:") for problem in caught.value.problems)


# What a file means


def test_load_full_file_maps_every_key(file: Path) -> None:
    here = file.parent
    config = load(file, FULL)
    server = config.server
    assert config.reload == "watch"
    assert server.allows_plaintext
    assert server.listeners == (NbdUri(socket=f"{here}/run/s"), NbdUri(host="127.0.0.1", port=10810, is_tls=True))
    assert server.limits == Limits(connections=7, handshake_timeout_s=2.5, drain_timeout_s=0, payload_size=1 << 20)
    assert server.tls == TlsConfig(
        certificate_path=f"{here}/tls/server.pem",
        key_path="/etc/server.key",
        client_ca_path=f"{here}/ca.pem",
        mode="selective",
        min_version="1.2",
    )
    first, second = server.exports
    assert first == ExportConfig(path=f"{here}/disks/vm.qcow2", name="vm", is_tls_only=False)
    assert second == ExportConfig(
        path="/images/second.vhdx",
        name="second",
        format="vhdx",
        is_read_only=True,
        description="a disk",
        block_size_min=4096,
        key_path=f"{here}/second.key",
        key_paths=(("/a", "/a.key"), (f"{here}/bases/b.qcow2", f"{here}/b.key")),
        roots=(f"{here}/bases", "/srv"),
        parent_path=f"{here}/bases/parent.vhdx",
        accepts_lost_log=True,
        access=(
            AccessRule(identities=("dns:a.example",), networks=("10.0.0.0/8", "::1"), is_read_only=True),
            AccessRule(uids=(0, 1000), gids=(5,)),
        ),
    )


def test_load_empty_file_gives_the_defaults_and_no_export(file: Path) -> None:
    config = load(file, "")
    assert config.server == ServerConfig(exports=())
    assert config.server.listeners == (DEFAULT_LISTENER,)
    assert (config.server.sandbox, config.server.log_format) == ("auto", "auto")
    assert config.reload == "signal"


def test_load_example_of_the_project_is_accepted() -> None:
    names = [export.name for export in load_config(EXAMPLE, environment={}).server.exports]
    assert names == ["vm1", "golden", "install"]


def test_load_example_names_every_key_and_each_default_that_it_names_is_accepted(file: Path) -> None:
    text = EXAMPLE.read_text()
    shown = set(re.findall(r"^#?([a-z_]+) = ", text, re.MULTILINE))
    tables = {"limits", "exports", "access", "admin", "metrics"}
    assert shown == ({*TOP_KEYS, *TLS_KEYS, *ADMIN_KEYS, *METRICS_KEYS, *EXPORT_KEYS, *ACCESS_KEYS, *LIMITS} - tables)
    live = re.sub(r"^#((?:[a-z_]+ = |\[(?:tls|admin|metrics)\]).*)", r"\1", text, flags=re.MULTILINE)
    live = live.replace('format = "qcow2"', 'format = "vhdx"')  # which has a parent
    config = load(file, live.replace('mode = "required"', 'mode = "selective"'))
    assert config.server.limits == Limits()
    assert config.server.tls is not None
    token = str(file.parent / "admin.token")
    assert config.server.admin == AdminConfig("/run/nbdimg/admin.sock", TcpAddress("127.0.0.1", 9808), token)
    assert config.server.metrics_address == TcpAddress("0.0.0.0", 9809)


# What overrides it


def test_load_environment_overrides_the_file_and_the_command_line_both(file: Path) -> None:
    file.write_text('listen = ["nbd://127.0.0.1:1"]\nreload = "watch"\n[limits]\nconnections = 1\noptions = 1\n')
    environment = {
        "NBDIMG_LISTEN": "nbd://127.0.0.1:2 nbd+unix:///?socket=/s",
        "NBDIMG_RELOAD": "signal",
        "NBDIMG_INSECURE_PLAINTEXT": "true",
        "NBDIMG_LIMIT_CONNECTIONS": "2",
        "NBDIMG_LIMIT_OPTIONS": "2",
        "NBDIMG_LIMIT_STALL_TIMEOUT": "1.5",
        "NBDIMG_LIMIT_PAYLOAD_SIZE": "2M",
        "NBDIMG_PORT": "tcp://10.0.0.1:10809",
    }
    config = load_config(file, environment=environment)
    assert config.reload == "signal"
    assert config.server.allows_plaintext
    assert config.server.listeners == (NbdUri(host="127.0.0.1", port=2), NbdUri(socket="/s"))
    assert config.server.limits == Limits(connections=2, options=2, stall_timeout_s=1.5, payload_size=2 * MiB)
    overrides = Overrides(listeners=(NbdUri(socket="/t"),), limits={"connections": 3})
    server = load_config(file, environment=environment, overrides=overrides).server
    assert server.listeners == (NbdUri(socket="/t"),)
    assert server.limits == Limits(connections=3, options=2, stall_timeout_s=1.5, payload_size=2 * MiB)


def test_log_format_is_what_the_last_word_says(file: Path) -> None:
    text = 'log_format = "json"\n'
    assert load(file, "").server.log_format == "auto"
    assert load(file, text).server.log_format == "json"
    assert load(file, text, NBDIMG_LOG_FORMAT="text").server.log_format == "text"
    overrides = Overrides(log_format="auto")
    server = load_config(file, environment={"NBDIMG_LOG_FORMAT": "text"}, overrides=overrides).server
    assert server.log_format == "auto"


def test_config_without_file_takes_environment_and_command_line() -> None:
    exports = (ExportConfig("disk.img"),)
    environment = {"NBDIMG_LIMIT_CONNECTIONS": "2", "NBDIMG_LIMIT_OPTIONS": "2"}
    server = config_without_file(exports, environment=environment, overrides=Overrides(limits={"connections": 3}))
    assert server.exports == exports
    assert server.listeners == (DEFAULT_LISTENER,)
    assert server.limits == Limits(connections=3, options=2)
    assert config_without_file(exports, environment={}, default_listeners=()).listeners == ()


@pytest.mark.parametrize(
    ("name", "value", "pattern"),
    [
        ("NBDIMG_LISTEN", "http://x", "'http://x': the scheme must be"),
        ("NBDIMG_RELOAD", "never", "'never' is not allowed, expected signal or watch"),
        ("NBDIMG_LOG_FORMAT", "xml", "'xml' is not allowed, expected auto, text or json"),
        ("NBDIMG_INSECURE_PLAINTEXT", "1", "'1' is not allowed, expected true or false"),
        ("NBDIMG_LIMIT_CONNECTIONS", "many", "'many' is not allowed, expected a whole number from 1"),
        ("NBDIMG_LIMIT_CONNECTIONS", "0", "0 is not allowed"),
        ("NBDIMG_LIMIT_DRAIN_TIMEOUT", "nan", "nan is not allowed, expected seconds from 0 to 9223372036854775807"),
        (
            "NBDIMG_LIMIT_CONECTIONS",
            "3",
            "unknown limit, did you mean NBDIMG_LIMIT_CONNECTIONS; known are connections,",
        ),
    ],
)
def test_load_wrong_environment_names_the_variable(file: Path, name: str, value: str, pattern: str) -> None:
    (problem,) = problems(file, "", **{name: value})
    assert problem.startswith(f"environment variable {name}: {pattern}")


@pytest.mark.parametrize("key", LIMITS)
def test_load_every_limit_can_come_from_file_and_environment(file: Path, key: str) -> None:
    name = key if hasattr(Limits(), key) else f"{key}_s"
    value = getattr(Limits(), name) * 2
    assert getattr(load(file, f"[limits]\n{key} = {value}\n").server.limits, name) == value
    environment = {LIMIT_PREFIX + key.upper(): str(value)}
    assert getattr(load(file, "", **environment).server.limits, name) == value


# What is wrong with it


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lisen = []", "1: lisen: unknown key, did you mean listen; known are listen, insecure_plaintext, reload,"),
        ("\n\nzzz = 1", "3: zzz: unknown key; known are listen"),
        ("[limit]", "1: limit: unknown key, did you mean limits"),
        ("[[export]]", "1: export: unknown key, did you mean exports"),
        (
            "[exports]\npath = 'x'",
            "1: exports: a table is not allowed, expected tables, each beginning with [[exports]]",
        ),
        ("limits = 3", "1: limits: 3 is not allowed, expected a table"),
        ("listen = 'nbd://[::1]'", "1: listen: 'nbd://[::1]' is not allowed, expected a list"),
        ("listen = [\n'nbd://[::1]',\n'ftp://x']", "3: listen[1]: 'ftp://x': the scheme must be nbd,"),
        ("listen = [3]", "1: listen[0]: 3 is not allowed, expected a string"),
        ("listen = ['nbd://[::1]/disk']", "1: listen[0]: nbd://[::1]/disk: a listener has no export name"),
        ("listen = []", "1: listen: the list is empty, expected at least one URI"),
        ("listen = ['nbd://[::1]', 'nbd://[::1]']", "1: listen: nbd://[::1]/ is given twice"),
        ("listen = ['nbds://[::1]']", "1: listen: nbds://[::1]/ needs TLS, expected a table [tls]"),
        ("reload = 'often'", "1: reload: 'often' is not allowed, expected signal or watch"),
        ("log_format = 'xml'", "1: log_format: 'xml' is not allowed, expected auto, text or json"),
        ("insecure_plaintext = 1", "1: insecure_plaintext: 1 is not allowed, expected true or false"),
        ("[limits]\nconnections = '9'", "2: limits.connections: '9' is not allowed, expected a whole number from 1 to"),
        ("[limits]\nconnections = 0", "2: limits.connections: 0 is not allowed"),
        ("[limits]\nconnections = true", "2: limits.connections: true is not allowed"),
        ("[limits]\npayload_rate = true", "2: limits.payload_rate: true is not allowed, expected a size from 1 to"),
        ("[limits]\nstall_timeout = '60s'", "2: limits.stall_timeout: '60s' is not allowed, expected seconds from 0.1"),
        ("[limits]\nstall_timeout = nan", "2: limits.stall_timeout: nan is not allowed, expected seconds"),
        ("[limits]\npayload_size = '64 bananas'", "2: limits.payload_size: '64 bananas' is not a size"),
        ("[limits]\npayload_size = 4096", "2: limits.payload_size: 4096 is not allowed, expected a size from 65536 to"),
        (
            "[limits]\npayload_size = 65537",
            "2: limits.payload_size: 65537 is not allowed, expected a multiple of 65536",
        ),
        ("[tls]\nmode = 'maybe'\npsk_file='x'", "2: tls.mode: 'maybe' is not allowed, expected off, required or selec"),
        ("[tls]\nmode = 'off'", "1: tls: TLS needs a certificate file or a file of pre-shared keys"),
        ("[admin]", "1: admin: the admin API needs a socket or an address to listen on"),
        ("[admin]\nlisten = '127.0.0.1:9808'", "1: admin: the admin API at 127.0.0.1:9808 needs a token file"),
        ("[admin]\nsocket = 's'\ntoken_file = 't'", "1: admin: a token file is for an admin API that listens on TCP"),
        ("[admin]\nsocket = 's'\ntoken = 't'", "3: admin.token: a secret stands in a file of its own, which tls.key_f"),
        ("[admin]\nlisten = 9808\nsocket = 's'", "2: admin.listen: 9808 is not allowed, expected a string"),
        ("[metrics]", "1: metrics: listen is missing, expected HOST:PORT"),
        *(
            (f"[metrics]\nlisten = '{each}'", f"2: metrics.listen: '{each}' is not allowed, expected HOST:PORT, as ")
            for each in ("9809", ":9809", "h:", "h:x", "h:65536", "h:²", "::1:9809", "[::1]", "[h]:1", "ftp://h:1")
        ),
        ("[[exports]]\nname = 'a'", "1: exports[0]: path is missing, expected the name of an image"),
        ("[[exports]]\npath = ''", "2: exports[0].path: '' is not allowed, expected the name of a file"),
        (
            "[[exports]]\npath = 'x'\nformat = 'vmdk'",
            "3: exports[0].format: 'vmdk' is not allowed, expected raw, qcow2",
        ),
        ("[[exports]]\npath = 'x'\nname = ''", "3: exports[0].name: '' is not allowed, expected 1 to 4096 bytes"),
        (
            "[[exports]]\npath = 'x'\nmin_block_size = 3",
            "3: exports[0].min_block_size: 3 is not allowed, expected a pow",
        ),
        ("[[exports]]\npath = 'x'\nread-only = true", "3: exports[0].read-only: unknown key, did you mean read_only"),
        ("[[exports]]\npath = 'x'\ntls = false", "3: exports[0].tls: this has a meaning only with tls.mode = "),
        (
            "[[exports]]\npath = 'x'\nformat = 'qcow2'\nparent = 'y'\noverlay = 'per-client'",
            "4: exports[0].parent: a parent is given to a qcow2 image, expected a differencing vhdx image",
        ),
        (
            "[[exports]]\npath = 'x'\n[[exports]]\npath = 'y'\nname = 'x'",
            "5: exports[1].name: the name 'x' is taken by the export in line 1",
        ),
        (
            "[[exports]]\npath = 'x'\n[[exports]]\npath = 'x'\nname = 'y'\nread_only = true",
            "4: exports[1].path: 'DIR/x' is exported in line 1 already, expected read_only = true in both",
        ),
        (
            "[[exports]]\npath = 'x'\n[[exports.access]]\nnetworks = ['10.0.0.1/8']",
            "4: exports[0].access[0].networks: network '10.0.0.1/8': 10.0.0.1/8 has host bits set; expected ADDRESS",
        ),
        (
            "[[exports]]\npath = 'x'\n[[exports.access]]\nuids = [0,\n-1]",
            "5: exports[0].access[0].uids[1]: -1 is not allowed, expected a whole number from 0 to 9223372036854775807",
        ),
        (
            "[[exports]]\npath = 'x'\n[[exports.access]]\ngids = []",
            "4: exports[0].access[0].gids: an empty list matches",
        ),
        ("a = 1\na = 2", "2: not TOML: this key is given twice"),
        ("a = { b = 1, b = 2 }", "1: not TOML: this key is given twice"),
        ("[[exports]]\npath = 'x'\n[exports]", "3: not TOML: this table is there already"),
        ("a = { b = 1 }\na.c = 1\n", "2: not TOML: this table has ended before: give all of its keys in one place"),
        ("[[exports]]\npath = 'x'\nkey_files.base.qcow2 = 'k'", "3: exports[0].key_files.base: a table is not"),
        ("a = \n", "1: not TOML: Invalid value (column 5)"),
        ("a = [1,", "1: not TOML: "),
        pytest.param(
            f"[limits]\npayload_rate = 1{'0' * 400}", "2: limits.payload_rate: 10000000", id="bytes beyond a float"
        ),
        pytest.param(
            f"[limits]\ndrain_timeout = 1{'0' * 400}", "2: limits.drain_timeout: 10000000", id="seconds beyond a float"
        ),
    ],
)
def test_load_wrong_file_names_line_key_value_and_what_is_allowed(file: Path, text: str, expected: str) -> None:
    (problem,) = problems(file, text)
    assert problem.startswith(expected.replace("DIR", str(file.parent)))


@pytest.mark.parametrize(
    ("value", "reason"),
    [("1" * 5000, "a number has too many digits"), ("[" * 3000, "lists or tables are nested too deeply")],
)
def test_load_value_that_the_parser_cannot_take_is_refused(file: Path, value: str, reason: str) -> None:
    with pytest.raises(ConfigFileError) as caught:
        load(file, f"a = {value}")
    assert str(caught.value) == f"{file}: {reason}"


@pytest.mark.parametrize("text", ["127.0.0.1:0", "[::1]:9808", "localhost:65535"])
def test_load_address_for_http_is_shown_as_it_was_written(file: Path, text: str) -> None:
    assert str(load(file, f"[metrics]\nlisten = '{text}'").server.metrics_address) == text


def test_load_command_line_says_where_http_is_over_the_file(file: Path) -> None:
    file.write_text("[admin]\nsocket = 's'\n[metrics]\nlisten = '[::1]:1'\n")
    assert load_config(file, environment={}).server.admin == AdminConfig(str(file.parent / "s"))
    overrides = Overrides(admin={"socket_path": "/t"}, metrics_address=TcpAddress("h", 2))
    server = load_config(file, environment={}, overrides=overrides).server
    assert (server.admin, server.metrics_address) == (AdminConfig("/t"), TcpAddress("h", 2))


def test_load_command_line_leaves_what_it_does_not_say_of_a_table_as_the_file_has_it(file: Path) -> None:
    """Above all, a certificate given there does not have clients without one let in."""
    file.write_text(
        "[tls]\ncertificate_file = '/a.pem'\nkey_file = '/a.key'\nclient_ca_file = '/ca.pem'\n"
        "[admin]\nlisten = '[::1]:1'\ntoken_file = '/token'\n"
    )
    overrides = Overrides(tls={"certificate_path": "/b.pem", "key_path": None}, admin={"socket_path": "/s"})
    server = load_config(file, environment={}, overrides=overrides).server
    assert server.tls == TlsConfig("/b.pem", client_ca_path="/ca.pem")
    assert server.admin == AdminConfig("/s", TcpAddress("::1", 1), "/token")
    overrides = Overrides(admin={"token_path": "/other"}, tls={"mode": "selective"})
    server = load_config(file, environment={}, overrides=overrides).server
    assert server.tls == TlsConfig("/a.pem", "/a.key", "/ca.pem", mode="selective")
    assert server.admin == AdminConfig(None, TcpAddress("::1", 1), "/other")


def test_load_command_line_gives_what_a_table_lacks_or_the_table(file: Path) -> None:
    certificate = {"certificate_path": "/c.pem", "key_path": None}
    file.write_text("listen = ['nbds://[::1]']\n[[exports]]\npath = '/a'\ntls = false\n")
    server = load_config(file, environment={}, overrides=Overrides(tls={**certificate, "mode": "selective"})).server
    assert server.tls == TlsConfig("/c.pem", mode="selective")
    file.write_text("[tls]\nmode = 'off'\nkey_file = '/k'\n[admin]\ntoken_file = '/t'\n")
    overrides = Overrides(tls=certificate, admin={"address": TcpAddress("::1", 1)})
    server = load_config(file, environment={}, overrides=overrides).server
    assert server.tls == TlsConfig("/c.pem", mode="off")
    assert server.admin == AdminConfig(None, TcpAddress("::1", 1), "/t")


def test_load_command_line_of_another_mode_leaves_exports_what_they_say_of_tls(file: Path) -> None:
    file.write_text("[tls]\nmode = 'selective'\ncertificate_file = '/c'\n[[exports]]\npath = '/a'\ntls = false\n")
    server = load_config(file, environment={}, overrides=Overrides(tls={"mode": "required"})).server
    assert server.tls == TlsConfig("/c")


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("[admin]\nsocket = '/s'\n", Overrides(tls={"mode": "off"}), ": tls: TLS needs a certificate file"),
        ("\n[tls]\nkey_file = '/k'\n", Overrides(tls={"mode": "off"}), ":2: tls: TLS needs a certificate file"),
        ("", Overrides(admin={"address": TcpAddress("::1", 1)}), ": admin: the admin API at [::1]:1 needs a token"),
    ],
)
def test_load_command_line_that_does_not_go_with_the_file_is_a_problem(
    file: Path, text: str, overrides: Overrides, expected: str
) -> None:
    file.write_text(text)
    with pytest.raises(ConfigFileError) as caught:
        load_config(file, environment={}, overrides=overrides)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{file}{expected}")


def test_export_of_a_table_is_what_a_file_would_make_of_it(file: Path) -> None:
    keys = "path = '/a.img'\nread_only = true\nmin_block_size = '4K'\n"
    (from_file,) = load(file, f"[[exports]]\n{keys}").server.exports
    table = {"path": "/a.img", "read_only": True, "min_block_size": "4K"}
    assert export_of(table, "the table", None) == from_file
    with pytest.raises(ConfigFileError, match=r"^the table: path: 'a.img' is not allowed, expected the whole name"):
        export_of({"path": "a.img"}, "the table", None)


def test_load_contradicting_limits_are_refused_wherever_they_come_from(file: Path) -> None:
    for text, environment, where in (
        ("[limits]\nconnection_bytes = '1G'", {}, "2: "),
        ("\n[limits]\ntotal_bytes = '1M'", {}, "3: "),
        ("", {"NBDIMG_LIMIT_TOTAL_BYTES": "1M"}, ""),
        ("[limits]\nconnection_bytes = '1M'\ntotal_bytes = '2M'", {"NBDIMG_LIMIT_CONNECTION_BYTES": "3M"}, "3: "),
        ("[limits]\ntotal_bytes = '1G'", {"NBDIMG_LIMIT_TOTAL_BYTES": "1M"}, ""),
    ):
        (problem,) = problems(file, text, **environment)
        assert problem.startswith(f"{where}limits.connection_bytes is ")
    with pytest.raises(ConfigFileError, match=r"^limits\.connection_bytes is "):
        config_without_file((), environment={"NBDIMG_LIMIT_TOTAL_BYTES": "1M"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[admin]\nlisten = '127.0.0.1'\ntoken_file = 't'\n", "2: admin.listen: '127.0.0.1' is not allowed"),
        ("[admin]\nsoket = 's'\n", "2: admin.soket: unknown key, did you mean socket"),
        ("[admin]\nsocket = 's'\ntoken_file = ''\nlisten = '[::1]:1'\n", "3: admin.token_file: '' is not allowed"),
        ("[metrics]\nlisen = '[::1]:1'\n", "2: metrics.lisen: unknown key, did you mean listen"),
        ("[tls]\ncertificate_file = 3\nkey_file = 'k'\n", "2: tls.certificate_file: 3 is not allowed"),
        ("listen = ['nbds://[::1]']\n[tls]\nkey_file = 'k'\n", "2: tls: TLS needs a certificate file"),
        ("[tls]\ncertificate = 'c'\n", "2: tls.certificate: unknown key, did you mean certificate_file"),
        ("[limits]\nconnection_bytes = '1G'\ntotal_bytes = '2GiBB'\n", "3: limits.total_bytes: '2GiBB' is not a size"),
        ("[limits]\nconnection_bytes = '1G'\ntotal_byte = '2G'\n", "3: limits.total_byte: unknown key"),
    ],
)
def test_load_wrong_value_is_told_without_what_only_follows_from_it(file: Path, text: str, expected: str) -> None:
    (problem,) = problems(file, text)
    assert problem.startswith(expected)


def test_load_many_problems_are_all_told_in_the_order_of_lines(file: Path) -> None:
    found = problems(file, "lisen = 1\n[limits]\nconnections = 0\n[[exports]]\n[[exports]]\npath = 3\n")
    assert [int(problem.partition(":")[0]) for problem in found] == [1, 3, 4, 6]
    with pytest.raises(ConfigFileError, match="and 3 more: nbdimg config check"):
        load_config(file, environment={})
    file.write_text("lisen = 1\nreload = 1\n")
    with pytest.raises(ConfigFileError, match="and 1 more: nbdimg config check"):
        load_config(file, environment={})


def test_overlays_lie_where_temporary_files_do_but_not_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/scratch")
    assert ExportConfig("a").overlays_in == "/scratch"
    assert ExportConfig("a", overlay="per-client", overlay_directory="/d").overlays_in == "/d"
    for empty in (partial(monkeypatch.setenv, "TMPDIR", ""), partial(monkeypatch.delenv, "TMPDIR")):
        empty()
        assert ExportConfig("a").overlays_in == "/var/tmp"


@pytest.mark.parametrize(
    "text",
    [
        f"password = '{SECRET}'",
        f"[tls]\nkey = '{SECRET}'\npsk_file = 'x'",
        f"[tls]\npsk = '{SECRET}'\npsk_file = 'x'",
        f"[[exports]]\npath = 'x'\npassphrase = '{SECRET}'",
        f"[[exports]]\npath = 'x'\nkey = '{SECRET}'",
        f"[[exports]]\npath = 'x'\nkey_data = '{SECRET}'",
    ],
)
def test_load_inline_secret_is_refused_and_not_shown(file: Path, text: str) -> None:
    (problem,) = problems(file, text)
    assert "a secret stands in a file of its own, which tls.key_file," in problem
    assert SECRET not in problem


def test_load_secret_in_place_of_its_file_is_refused_and_not_shown(file: Path) -> None:
    text = f"[tls]\ncertificate_file = 'x'\nkey_file = '''-----BEGIN PRIVATE KEY-----\n{SECRET}'''"
    assert problems(file, text) == ("3: tls.key_file: this is the content of a file, expected the name of one",)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (f"'{SECRET}'", ': expected a table, as { "base.qcow2" = "base.key" }'),
        ("{ a = 3 }", ".a: 3 is not allowed, expected a string"),
        ("{ a.b = 'k' }", ".a: a table is not allowed, expected a string; a name with a dot stands in quotes"),
        ("{ '' = 'k' }", ".: '' is not allowed, expected the name of a file"),
        (f"{{ a = '-----BEGIN {SECRET}' }}", ".a: this is the content of a file, expected the name of one"),
        ("{ a = 'k', 'HERE/a' = 'k' }", ".a: 'HERE/a' is given twice"),
    ],
)
def test_load_key_files_that_cannot_be_are_told_by_image(file: Path, table: str, expected: str) -> None:
    text = f"[[exports]]\npath = 'x'\nkey_files = {table}\n"
    here = str(file.parent)
    assert problems(file, text.replace("HERE", here)) == (f"3: exports[0].key_files{expected.replace('HERE', here)}",)


def test_load_missing_file_and_wrong_encoding_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigFileError, match=r"none\.toml: No such file or directory"):
        load_config(tmp_path / "none.toml", environment={})
    (tmp_path / "x").write_bytes(b"a = 1\nb = '\xff'\n")
    with pytest.raises(ConfigFileError, match=r"x:2: byte 0xff is not UTF-8"):
        load_config(tmp_path / "x", environment={})
    with pytest.raises(ConfigFileError, match=r"Is a directory"):
        load_config(tmp_path, environment={})


@pytest.mark.timeout(20)
def test_load_fifo_is_read_to_its_end_and_not_waited_for_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(b'log_format = "json"\n',), daemon=True)
    writer.start()
    assert load_config(path).server.log_format == "json"
    writer.join()
    monkeypatch.setattr(configfile, "PATIENCE_S", 0.05)
    with pytest.raises(ConfigFileError, match="it is a FIFO, and its writer does not come to an end"):
        load_config(path)


def test_load_windows_line_ends_keep_the_lines(file: Path) -> None:
    file.write_bytes(b"reload = 'signal'\r\n\r\nzzz = 1\r\n")
    with pytest.raises(ConfigFileError, match=r":3: zzz"):
        load_config(file, environment={})


def test_load_file_of_an_editor_that_begins_with_a_byte_order_mark_is_read(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbfreload = 'watch'\n")
    assert load_config(file, environment={}).reload == "watch"
    file.write_bytes(b"\xef\xbb\xbf\na = '\xff'")
    with pytest.raises(ConfigFileError, match=r":2: byte 0xff is not UTF-8"):
        load_config(file, environment={})


# Where keys stand


def test_key_lines_finds_keys_headers_and_elements() -> None:
    text = '''a = 1 # x [
"b.c".'d' = """x
[no]
\\""""
e = [ 1, # c
  2,
  [3,
  4], {x=1, y=2},
]
[t]
k = "]#"
[[x]]
p = 1
[x.s]
q = 2.5
[[x]]
p = 1979-05-27T07:32:00Z
[[x.y]]
z = []
'''
    assert key_lines(text) == {
        ("a",): 1,
        ("b.c",): 2,
        ("b.c", "d"): 2,
        ("e",): 5,
        ("e", 0): 5,
        ("e", 1): 6,
        ("e", 2): 7,
        ("e", 3): 8,
        ("t",): 10,
        ("t", "k"): 11,
        ("x", 0): 12,
        ("x", 0, "p"): 13,
        ("x", 0, "s"): 14,
        ("x", 0, "s", "q"): 15,
        ("x", 1): 16,
        ("x", 1, "p"): 17,
        ("x", 1, "y", 0): 18,
        ("x", 1, "y", 0, "z"): 19,
    }
