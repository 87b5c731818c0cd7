"""A configuration before it is served: what contradicts in it, and a name for each export."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from nbdimg.config import ExportConfig, ServerConfig
from nbdimg.errors import ConfigError, ListenError
from nbdimg.export.export import default_name
from nbdimg.server.credentials import check_key_support
from nbdimg.server.listen import address_of, check_socket_path, is_loopback
from nbdimg.server.terms import exposed
from nbdimg.uri import NbdUri


def check_config(config: ServerConfig) -> None:
    """Raises: ConfigError, ListenError: the configuration contradicts itself, or asks for what cannot be."""
    for error in contradictions(config):
        raise error


def contradictions(config: ServerConfig) -> Iterator[ConfigError | ListenError]:
    """What `check_config` has against it, one after the other."""
    checks: list[Callable[[], None]] = [partial(check_listener, uri, config) for uri in config.listeners]
    checks += [partial(check_identities, replace(config, exports=(export,))) for export in config.exports]
    checks += [partial(check_admin, config), partial(check_addresses, config), partial(_check_images, config.exports)]
    if config.tls is not None and config.tls.psk_path is not None:
        checks.append(check_key_support)
    for check in checks:
        try:
            check()
        except (ConfigError, ListenError) as error:
            yield error


def check_directories(directories: Sequence[str]) -> None:
    """Raises: ConfigError: one is not there; what is made in its place later would be out of the sandbox's reach, and
    the next start would fail.
    """
    for directory in directories:
        if not os.path.isdir(directory):
            raise ConfigError(f"image directory {directory}: there is none, expected one at the start")


def _check_images(exports: Sequence[ExportConfig]) -> None:
    """Raises: ConfigError: an image that is written has a second export."""
    seen: dict[str, ExportConfig] = {}
    for export in exports:
        other = seen.setdefault(image_of(export), export)
        if other is not export and not (export.only_reads_image and other.only_reads_image):
            which = export.path if export.path == other.path else f"{export.path}, which is {other.path},"
            raise ConfigError(f"{which} is exported twice, expected once unless all its exports are read-only")


def check_identities(config: ServerConfig) -> None:
    """Raises: ConfigError: a rule asks for an identity that no client could prove."""
    tls = config.tls
    for export in config.exports:
        for identity in (each for rule in export.access for each in rule.identities):
            is_key = identity.startswith("psk:")
            if tls is None or (tls.psk_path if is_key else tls.client_ca_path) is None:
                needed = "a file of pre-shared keys" if is_key else "a client CA file"
                raise ConfigError(f"{export.name or export.path}: the rule for {identity} needs TLS with {needed}")


def check_listener(uri: NbdUri, config: ServerConfig) -> None:
    """Raises: ConfigError: there is no TLS for `uri`, or it is exposed without TLS and without leave. ListenError: it
    cannot be.
    """
    check_socket_path(uri.socket)
    if uri.is_tls and config.tls is None:
        raise ConfigError(f"{uri} needs TLS: give a certificate with [tls] (--tls-certificate), or listen with nbd")
    if not config.allows_plaintext and exposed([uri], config):
        raise ConfigError(
            f"{uri} is reachable from other machines and NBD without TLS is plain text: "
            "use TLS, listen on 127.0.0.1, ::1 or a Unix socket, or allow it with insecure_plaintext "
            "(--insecure-plaintext)"
        )


def check_addresses(config: ServerConfig) -> None:
    """Raises: ListenError: two are the same. Port 0 is another one each time."""
    wanted = [(address_of(uri), f"listener {uri}") for uri in config.listeners]
    if config.admin is not None and config.admin.socket_path is not None:
        wanted.append(((config.admin.socket_path, -1), f"the admin API at {config.admin.socket_path}"))
    admin_address = None if config.admin is None else config.admin.address
    for address, what in ((admin_address, "the admin API"), (config.metrics_address, "metrics")):
        if address is not None:
            wanted.append(((address.host, address.port), f"{what} at {address}"))
    seen: dict[tuple[str, int], str] = {}
    for place, what in wanted:
        if seen.setdefault(place, what) is not what and place[1] != 0:
            raise ListenError(f"{seen[place]} has the address of {what}, expected one for each")


def check_admin(config: ServerConfig) -> None:
    """Raises: ConfigError: other machines reach the admin API, whose token goes in clear, without leave.
    ListenError: its socket cannot be.
    """
    if config.admin is None:
        return
    check_socket_path(config.admin.socket_path)
    address = config.admin.address
    if address is not None and not is_loopback(address.host) and not config.allows_plaintext:
        raise ConfigError(
            f"the admin API at {address} is reachable from other machines and HTTP is plain text: listen on 127.0.0.1, "
            "::1 or a Unix socket, or allow it with insecure_plaintext (--insecure-plaintext)"
        )


def with_names(config: ServerConfig) -> ServerConfig:
    """The same with a name for each export."""
    taken = {export.name for export in config.exports if export.name}
    exports: list[ExportConfig] = []
    for export in config.exports:
        name = export.name or default_name(export.path, taken)
        taken.add(name)
        exports.append(export if export.name else replace(export, name=name))
    return replace(config, exports=tuple(exports))


def named(config: ExportConfig) -> str:
    """The name that `with_names` has made sure of."""
    assert config.name is not None
    return config.name


def image_of(config: ExportConfig) -> str:
    """The same for two names of one file."""
    return os.path.realpath(config.path)
