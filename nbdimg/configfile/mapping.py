"""From tables to the dataclasses of `config.py`, with what contradicts itself across keys."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from nbdimg.config import (
    LOG_FORMATS,
    OVERLAY_MODES,
    SANDBOX_MODES,
    TLS_MODES,
    TLS_VERSIONS,
    AccessRule,
    AdminConfig,
    ExportConfig,
    ServerConfig,
    TcpAddress,
    TlsConfig,
)
from nbdimg.configfile.limits import LIMIT_NAMES, LIMITS
from nbdimg.configfile.reader import Reader, Table
from nbdimg.configfile.values import (
    Parse,
    block_size,
    boolean,
    count,
    export_name,
    list_of,
    listener_uri,
    one_of,
    pairs_of,
    path_in,
    string,
    tcp_address,
    wire_string,
)
from nbdimg.errors import ConfigError, escaped
from nbdimg.export.export import default_name
from nbdimg.formats import DRIVERS
from nbdimg.limits import Limits
from nbdimg.uri import NbdUri

Made = TypeVar("Made", TlsConfig, AdminConfig)

RELOADS = ("signal", "watch")
"""When a file is read again: at SIGHUP alone, or also when it has changed."""

TOP_KEYS = (
    *("listen", "insecure_plaintext", "reload", "log_format", "sandbox", "image_directories"),
    *("limits", "tls", "admin", "metrics", "exports"),
)
TLS_KEYS = ("certificate_file", "key_file", "client_ca_file", "crl_file", "psk_file", "mode", "min_version")
EXPORT_KEYS = (
    *("name", "path", "format", "read_only", "description", "min_block_size", "allow_references"),
    *("key_file", "key_files", "tls", "access", "overlay", "overlay_dir", "parent", "accept_lost_log"),
)
ADMIN_KEYS = ("socket", "listen", "token_file")
METRICS_KEYS = ("listen",)
ACCESS_KEYS = ("identities", "networks", "uids", "gids", "read_only")


def mapped(reader: Reader, tls_given: Mapping[str, Any], admin_given: Mapping[str, Any]) -> tuple[ServerConfig, str]:
    """The configuration, without listeners when the file names none, and one of RELOADS. Problems are in `reader`.

    Args: tls_given, admin_given: what the command line says over two of the tables, by the names of TlsConfig and
        AdminConfig: what a table lacks it may have.
    """
    top = reader.table((), reader.content, TOP_KEYS)
    tls = _made(TlsConfig, top, "tls", TLS_KEYS, _tls, tls_given)
    has_tls = "tls" in top or bool(tls_given)
    knows_mode = (tls is not None or not has_tls) and "mode" not in tls_given  # which the file may not be made for
    listeners: tuple[NbdUri, ...] = top.get("listen", _listeners_in(reader.directory), ())
    for uri in listeners:
        if uri.is_tls and not has_tls:
            top.report(f"{uri} needs TLS, expected a table [tls] with a certificate_file or psk_file", "listen")
        if listeners.count(uri) > 1:
            top.report(f"{uri} is given twice", "listen")
            break
    config = ServerConfig(
        exports=_exports(top, reader.directory, tls, knows_mode=knows_mode),
        listeners=listeners,
        limits=_limits(top.table("limits", tuple(LIMITS))),
        allows_plaintext=top.get("insecure_plaintext", boolean, False),
        tls=tls,
        sandbox=top.get("sandbox", one_of(*SANDBOX_MODES), SANDBOX_MODES[0]),
        image_directories=top.get("image_directories", list_of(path_in(reader.directory)), ()),
        admin=_made(AdminConfig, top, "admin", ADMIN_KEYS, _admin, admin_given),
        metrics_address=_metrics(top.table("metrics", METRICS_KEYS)) if "metrics" in top else None,
        log_format=top.get("log_format", one_of(*LOG_FORMATS), LOG_FORMATS[0]),
    )
    return config, top.get("reload", one_of(*RELOADS), RELOADS[0])


def _listeners_in(directory: str) -> Parse[tuple[NbdUri, ...]]:
    parse_all = list_of(_listener_in(directory))

    def parse(value: object) -> tuple[NbdUri, ...]:
        listeners = parse_all(value)
        if not listeners:
            raise ConfigError("the list is empty, expected at least one URI, or no such key for the default")
        return listeners

    return parse


def _listener_in(directory: str) -> Parse[NbdUri]:
    def parse(value: object) -> NbdUri:
        uri = listener_uri(value)
        return uri if uri.socket is None else replace(uri, socket=os.path.join(directory, uri.socket))

    return parse


def _limits(table: Table) -> Limits:
    defaults = Limits()
    values = {name: table.get(key, LIMITS[key], getattr(defaults, name)) for key, name in LIMIT_NAMES.items()}
    return Limits(**values)


def _made(
    kind: type[Made],
    top: Table,
    key: str,
    known: Sequence[str],
    values_of: Callable[[Table], dict[str, Any]],
    given: Mapping[str, Any],
) -> Made | None:
    """What a table says, and `given` over it; None: neither is there, or something is wrong with them."""
    if key not in top and not given:
        return None
    table = top.table(key, known)
    values = values_of(table)
    if not table.is_sound:
        return None
    try:
        return kind(**{**values, **given})
    except ConfigError as error:
        table.report(str(error))
        return None


def _tls(table: Table) -> dict[str, Any]:
    return {
        "mode": table.get("mode", one_of(*TLS_MODES), "required"),
        "min_version": table.get("min_version", one_of(*TLS_VERSIONS), "1.3"),
        "certificate_path": table.path("certificate_file"),
        "key_path": table.path("key_file"),
        "client_ca_path": table.path("client_ca_file"),
        "crl_path": table.path("crl_file"),
        "psk_path": table.path("psk_file"),
    }


def _admin(table: Table) -> dict[str, Any]:
    return {
        "socket_path": table.path("socket"),
        "address": table.get("listen", tcp_address, None),
        "token_path": table.path("token_file"),
    }


def _metrics(table: Table) -> TcpAddress | None:
    if "listen" not in table and table.is_sound:
        table.report("listen is missing, expected HOST:PORT")
    return table.get("listen", tcp_address, None)


def _exports(top: Table, directory: str, tls: TlsConfig | None, *, knows_mode: bool) -> tuple[ExportConfig, ...]:
    """Each with a name. Names and writers are compared here, where lines are known."""
    exports: list[ExportConfig] = []
    names: dict[str | None, Table] = {}
    paths: dict[str, list[tuple[ExportConfig, Table]]] = {}
    for table in top.tables("exports", EXPORT_KEYS):
        export = _export(table, directory)
        if export is None:
            continue
        if export.name in names:
            line = names[export.name].line()
            table.report(f"the name {escaped(export.name or '')} is taken by the export in line {line}", "name")
        for earlier, other in paths.get(export.path, ()):
            if not (earlier.only_reads_image and export.only_reads_image):
                line = other.line()
                table.report(
                    f"{escaped(export.path)} is exported in line {line} already, expected read_only = true in both",
                    "path",
                )
        if knows_mode:
            _check_tls(table, tls)
        exports.append(export)
        names.setdefault(export.name, table)
        paths.setdefault(export.path, []).append((export, table))
    return tuple(exports)


def mapped_export(reader: Reader, tls: TlsConfig | None) -> ExportConfig | None:
    """One export that is all of what was read; None: without a sound path. Problems are in `reader`."""
    table = reader.table((), reader.content, EXPORT_KEYS)
    _check_tls(table, tls)
    return _export(table, reader.directory)


def _check_tls(table: Table, tls: TlsConfig | None) -> None:
    if "tls" in table and (tls is None or tls.mode != "selective"):
        table.report('this has a meaning only with tls.mode = "selective"', "tls")


def _export(table: Table, directory: str) -> ExportConfig | None:
    path = table.path("path")
    if path is None:
        if "path" not in table:
            table.report("path is missing, expected the name of an image")
        return None
    config = ExportConfig(
        path=path,
        name=table.get("name", export_name, default_name(path, ())),
        format=table.get("format", one_of(*DRIVERS), None),
        is_read_only=table.get("read_only", boolean, False),
        description=table.get("description", wire_string, ""),
        block_size_min=table.get("min_block_size", block_size, 1),
        key_path=table.path("key_file"),
        key_paths=table.get("key_files", pairs_of(path_in(directory)), ()),
        roots=table.get("allow_references", list_of(path_in(directory)), ()),
        access=tuple(_access(each) for each in table.tables("access", ACCESS_KEYS)),
        is_tls_only=table.get("tls", boolean, True),
        accepts_lost_log=table.get("accept_lost_log", boolean, False),
    )
    parent: dict[str, Any] = {"parent_path": table.path("parent")}
    overlays: dict[str, Any] = {
        "overlay": table.get("overlay", one_of(*OVERLAY_MODES), None),
        "overlay_directory": table.path("overlay_dir"),
    }
    for key, values in (("parent", parent), ("overlay" if "overlay" in table else "overlay_dir", overlays)):
        try:
            config = replace(config, **values)
        except ConfigError as error:
            table.report(str(error), key)
    return config


def _access(table: Table) -> AccessRule:
    """One key at a time, so that a value which the rule refuses is reported at its key."""
    rule = AccessRule()
    conditions: tuple[tuple[str, Parse[Any]], ...] = (
        ("identities", string),
        ("networks", string),
        ("uids", count(0)),
        ("gids", count(0)),
    )
    for key, each in conditions:
        rule = table.get(key, _condition(rule, key, list_of(each)), rule)
    return replace(rule, is_read_only=table.get("read_only", boolean, False))


def _condition(rule: AccessRule, key: str, parse: Parse[tuple[Any, ...]]) -> Parse[AccessRule]:
    """`rule` with one condition more."""

    def condition(value: object) -> AccessRule:
        if not (values := parse(value)):
            raise ConfigError("an empty list matches nobody, leave the key out to match everybody")
        more: dict[str, Any] = {key: values}
        return replace(rule, **more)

    return condition
