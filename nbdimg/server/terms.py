"""From the configuration to what handshakes ask: access rules, TLS modes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_network

from nbdimg.config import AccessRule, ExportConfig, ServerConfig
from nbdimg.errors import ConfigError, ListenError
from nbdimg.export.access import Right, Rule, normalized
from nbdimg.export.registry import Terms
from nbdimg.server.listen import address_of, check_socket_path, is_exposed, is_loopback
from nbdimg.uri import NbdUri


def terms_of(config: ExportConfig) -> Terms:
    return Terms(tuple(_rule(each) for each in config.access), config.is_tls_only)


def _rule(config: AccessRule) -> Rule:
    return Rule(
        identities=frozenset(map(normalized, config.identities)),
        networks=tuple(map(ip_network, config.networks)),
        uids=frozenset(config.uids),
        gids=frozenset(config.gids),
        right=Right.READ if config.is_read_only else Right.WRITE,
    )


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


def exposed(listeners: Iterable[NbdUri], config: ServerConfig) -> list[NbdUri]:
    """Those at which other machines reach an export without TLS."""
    return [uri for uri in listeners if is_exposed(uri) and is_plaintext(uri, config)]


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


def is_plaintext(uri: NbdUri, config: ServerConfig) -> bool:
    """Whether an export may be reached at `uri` without TLS."""
    if uri.is_tls or (config.tls is not None and config.tls.mode == "required"):
        return False
    is_selective = config.tls is not None and config.tls.mode == "selective"
    return not is_selective or not all(export.is_tls_only for export in config.exports)


def as_reached(uri: NbdUri, config: ServerConfig, terms: Terms, name: str) -> NbdUri:
    """`uri` as a client writes it to open the export `name`: the scheme says whether it must begin with TLS."""
    mode = config.tls.mode if config.tls is not None else "off"
    is_tls = uri.is_tls or mode == "required" or (mode == "selective" and terms.is_tls_only)
    return replace(uri, name=name, is_tls=is_tls)
