"""What to serve and how, as one frozen value. Every way of starting a server ends here."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from nbdimg.errors import ConfigError, escaped
from nbdimg.limits import Limits
from nbdimg.units import alternatives
from nbdimg.uri import DEFAULT_PORT, NbdUri

DEFAULT_LISTENER = NbdUri(host="127.0.0.1", port=DEFAULT_PORT)

IDENTITY_KINDS = ("dns", "uri", "email", "cn", "spki-sha256", "psk")
"""What an identity may begin with, before its colon."""

SANDBOX_MODES = ("auto", "require", "off")
"""Whether the process confines itself: as far as the kernel can; or not start where it cannot; or not at all."""

LOG_FORMATS = ("auto", "text", "json")
"""How lines of the log look: "auto" is text at a terminal, else JSON."""

TlsModeName = Literal["off", "required", "selective"]
TLS_MODES: tuple[TlsModeName, ...] = get_args(TlsModeName)
"""See `TlsConfig`."""

TlsVersion = Literal["1.2", "1.3"]
TLS_VERSIONS: tuple[TlsVersion, ...] = get_args(TlsVersion)

OverlayMode = Literal["per-client", "kept"]
OVERLAY_MODES: tuple[OverlayMode, ...] = get_args(OverlayMode)
"""See `ExportConfig`."""

UNIX_ID_MAX = 2**32 - 2
"""The largest uid or gid; the one above it means "none"."""


@dataclass(frozen=True, slots=True)
class AccessRule:
    """Who may open an export. A rule matches a client that meets every condition given; of the values of one condition,
    one is enough. A rule without conditions matches everybody.

    `identities` are whole names, compared exactly (DNS names without regard to case); there are no wildcards:

        dns:NAME, uri:URI, email:ADDRESS    a subject alternative name of the client's verified certificate
        cn:NAME                             the common name in its subject
        spki-sha256:HEX                     SHA-256 of its public key (DER SubjectPublicKeyInfo): survives renewal
        psk:NAME                            the name of a pre-shared key

    `networks`: source addresses as ADDRESS or ADDRESS/BITS; a Unix client has none. `uids`, `gids`: effective user and
    primary group of a client at a Unix socket.

    Raises: ConfigError: a value that is not of these forms.
    """

    identities: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    uids: tuple[int, ...] = ()
    gids: tuple[int, ...] = ()
    is_read_only: bool = False

    def __post_init__(self) -> None:
        for identity in self.identities:
            _check_identity(identity)
        for network in self.networks:
            _check_network(network)
        for name, values in (("uid", self.uids), ("gid", self.gids)):
            for value in values:
                if not 0 <= value <= UNIX_ID_MAX:
                    raise ConfigError(f"{name} is {value}, expected 0 to {UNIX_ID_MAX}")


_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
"""Where IPv6 holds the addresses of IPv4; clients from there are compared as what they are."""


def _check_network(text: str) -> None:
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise ConfigError(f"network {escaped(text)}: {error}; expected ADDRESS or ADDRESS/BITS") from None
    if "%" in text:
        raise ConfigError(f"network {escaped(text)}: interfaces are not compared, expected it without %")
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(_MAPPED):
        raise ConfigError(f"network {escaped(text)}: this is IPv4, expected as in 10.1.0.0/16")


def _check_identity(identity: str) -> None:
    kind, colon, value = identity.partition(":")
    if kind not in IDENTITY_KINDS or not colon or not value:
        raise ConfigError(f"identity {escaped(identity)}: expected KIND:VALUE with KIND {', '.join(IDENTITY_KINDS)}")
    if "*" in value and kind == "dns":
        raise ConfigError(f"identity {escaped(identity)}: names are compared whole, a wildcard matches nothing")
    if kind == "spki-sha256" and not re.fullmatch("[0-9a-f]{64}", value):
        raise ConfigError(f"identity {escaped(identity)}: expected 64 lower-case hexadecimal digits")


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """TLS for all listeners, from PEM files: `certificate_path` is the server's chain, its own certificate first.

    `key_path` None: the key is in the certificate's file. With `client_ca_path` every client must show a certificate
    that this authority issued for client authentication, and `crl_path` (needs it) refuses revoked ones: the
    lists of this authority and of those beneath it. `psk_path`: pre-shared keys, lines of NAME:HEX; then a certificate
    may be left out. `mode` is that of `nbd:` listeners; `nbds:` listeners always require TLS. In mode "selective"
    exports with `is_tls_only` need TLS, others do not.

    Raises: ConfigError: files that do not go together.
    """

    certificate_path: str | None = None
    key_path: str | None = None
    client_ca_path: str | None = None
    crl_path: str | None = None
    psk_path: str | None = None
    mode: TlsModeName = "required"
    min_version: TlsVersion = "1.3"

    def __post_init__(self) -> None:
        if self.mode not in TLS_MODES:
            raise ConfigError(f"the TLS mode is {escaped(self.mode)}, expected {alternatives(TLS_MODES)}")
        if self.min_version not in TLS_VERSIONS:
            raise ConfigError(
                f"the lowest TLS version is {escaped(self.min_version)}, expected {alternatives(TLS_VERSIONS)}"
            )
        if self.certificate_path is None:
            if self.psk_path is None:
                raise ConfigError("TLS needs a certificate file or a file of pre-shared keys")
            if self.key_path is not None or self.client_ca_path is not None:
                raise ConfigError("a TLS key file or client CA file needs a certificate file beside it")
        if self.crl_path is not None and self.client_ca_path is None:
            raise ConfigError("a revocation list needs the client CA file that issued it")

    @property
    def paths(self) -> list[str]:
        """Of all files that are named: they are read again while clients are served."""
        found = (self.certificate_path, self.key_path, self.client_ca_path, self.crl_path, self.psk_path)
        return [each for each in found if each is not None]


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """Where HTTP is listened to; port 0 picks a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class AdminConfig:
    """Where the HTTP API is: at a Unix socket that its owner alone may open, and at an address where each request must
    bring the token that stands in a file.

    Raises: ConfigError: an address without a token, or the other way round, or nothing at all.
    """

    socket_path: str | None = None
    address: TcpAddress | None = None
    token_path: str | None = None

    def __post_init__(self) -> None:
        if self.address is not None and self.token_path is None:
            raise ConfigError(f"the admin API at {self.address} needs a token file")
        if self.address is None and self.token_path is not None:
            raise ConfigError("a token file is for an admin API that listens on TCP, which this does not")
        if self.address is None and self.socket_path is None:
            raise ConfigError("the admin API needs a socket or an address to listen on")


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """One image. `format` None means: by its magic. `block_size_min` in bytes. `key_path`: a file that holds the
    passphrase of the chain's encrypted images; `key_paths`: (image, such a file of its own), each image once.
    `roots`: directories besides the image's own in which what it refers to may lie.
    `access`: the rules of which one must match a client; without rules all who connect may open it; a client
    may write when a rule that matches it is not read-only. `is_tls_only` counts in the TLS mode "selective" alone.
    `parent_path`: the file to take as the parent of a differencing vhdx image. `accepts_lost_log`: see `OpenOptions`.

    With `overlay` the image is only read, and clients get qcow2 overlays of it: each connection its own, thrown away
    with it ("per-client"), or one that is kept, by the name behind `@` or the client's identity ("kept"). They lie in
    `overlay_directory`; None: where temporary files do.

    Raises: ConfigError: settings that do not go together.
    """

    path: str
    name: str | None = None
    format: str | None = None
    is_read_only: bool = False
    description: str = ""
    block_size_min: int = 1
    key_path: str | None = None
    key_paths: tuple[tuple[str, str], ...] = ()
    roots: tuple[str, ...] = ()
    access: tuple[AccessRule, ...] = ()
    is_tls_only: bool = True
    overlay: OverlayMode | None = None
    overlay_directory: str | None = None
    parent_path: str | None = None
    accepts_lost_log: bool = False

    def __post_init__(self) -> None:
        if self.parent_path is not None and self.format not in (None, "vhdx"):
            raise ConfigError(f"a parent is given to a {self.format} image, expected a differencing vhdx image")
        if self.overlay is None:
            if self.overlay_directory is not None:
                raise ConfigError("a directory for overlays is given, and no overlays are asked for")
            return
        if self.overlay not in OVERLAY_MODES:
            raise ConfigError(f"overlay is {escaped(self.overlay)}, expected {alternatives(OVERLAY_MODES)}")
        if self.is_read_only:
            raise ConfigError("overlays are there to be written, expected the export not to be read-only")
        if self.key_path is not None or self.key_paths:
            raise ConfigError("the image is encrypted and overlays of it would not be, expected one or the other")
        if self.overlay == "kept" and self.overlay_directory is None:
            raise ConfigError("overlays that are kept need a directory of their own: overlay_dir or --overlay-dir")

    @property
    def only_reads_image(self) -> bool:
        return self.is_read_only or self.overlay is not None

    @property
    def overlays_in(self) -> str:
        """The directory of overlays. The default is not /tmp, which is often in memory."""
        return self.overlay_directory or os.environ.get("TMPDIR") or "/var/tmp"


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """All that a server is told at its start. Whether its parts go together is found out when it is served."""

    exports: tuple[ExportConfig, ...]
    listeners: tuple[NbdUri, ...] = (DEFAULT_LISTENER,)
    limits: Limits = field(default_factory=Limits)
    allows_plaintext: bool = False
    """Whether an address that other machines reach may be listened on without TLS."""
    tls: TlsConfig | None = None
    sandbox: str = SANDBOX_MODES[0]
    """One of SANDBOX_MODES, for `nbdimg serve`: a program that serves by the library is never confined."""
    image_directories: tuple[str, ...] = ()
    """Where images may lie that are exported later, by a reload or live, besides the directories of `exports`."""
    admin: AdminConfig | None = None
    metrics_address: TcpAddress | None = None
    """Where metrics and health are told to everybody."""
    log_format: str = LOG_FORMATS[0]
    """One of LOG_FORMATS, for `nbdimg serve`: a program that serves by the library sets up its own logging."""
