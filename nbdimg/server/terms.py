"""From the configuration to what handshakes ask: access rules, TLS modes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_network

from nbdimg.config import AccessRule, ExportConfig, ServerConfig
from nbdimg.export.access import Right, Rule, normalized
from nbdimg.export.registry import Terms
from nbdimg.server.listen import is_exposed
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


def exposed(listeners: Iterable[NbdUri], config: ServerConfig) -> list[NbdUri]:
    """Those at which other machines reach an export without TLS."""
    return [uri for uri in listeners if is_exposed(uri) and is_plaintext(uri, config)]


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
