"""`nbdimg connect-help`: what to type where an export is used.

A tool's own traps are in its function. Where a tool cannot be told what is asked for, its entry has no lines and says
why. Sources: qemu(1), libvirt's formatdomain, nbd-client(8), nbdtab(5), the initramfs script of Debian's nbd-client,
dracut.cmdline(7), nbd_connect_uri(3).
"""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated
from urllib.parse import quote

import typer

from nbdimg.cli.output import print_json
from nbdimg.config import DEFAULT_LISTENER
from nbdimg.configfile.values import export_name, listener_uri
from nbdimg.errors import ConfigError, escaped
from nbdimg.uri import DEFAULT_PORT, NbdUri

RECONNECT_DELAY_S = 60
"""How long a client's requests wait for a server that restarts."""

OPEN_TIMEOUT_S = 30
"""How long a client waits for a server that is not there yet."""

BLOCK_SIZE = 4096
CONNECTIONS = 4
DEVICE = "nbd0"
CREDENTIALS = "tls0"

AUTHORITY, CERTIFICATE, KEY = "ca-cert.pem", "client-cert.pem", "client-key.pem"
"""The names of files that QEMU, libvirt and libnbd look for in a directory."""


KEYS = "keys.psk"
"""The file of pre-shared keys that QEMU looks for in a directory."""

_NO_KEYS = "it knows certificates and no pre-shared keys"
_TLS_NOTE = ' (with min_version = "1.2" at the server: version 3.24 does not speak TLS 1.3)'
_LOSS_NOTE = (
    "a restart of the server is an I/O error for it, whatever -persist says, unless systemd keeps the connection"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """For one way to connect: the lines, or why there are none; and what to know of them."""

    tool: str
    lines: tuple[str, ...] = ()
    reason: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """An export as a client reaches it. `directory`: the client's files for TLS; `hostname`: the one in the server's
    certificate, if it is not the URI's. `key_name`: which of the pre-shared keys in the directory the client shows, in
    place of certificates.
    """

    uri: NbdUri
    directory: str | None = None
    hostname: str | None = None
    key_name: str | None = None

    @property
    def keys(self) -> str:
        """The client's file of pre-shared keys; empty: it has certificates, or no TLS."""
        return "" if self.key_name is None else os.path.join(self.directory or "", KEYS)


def connect_help(
    export: Annotated[str, typer.Argument(metavar="EXPORT", help="The export's name.")],
    uri: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="The server as clients reach it: nbd://HOST:PORT or nbd+unix:///?socket=PATH; nbds: with TLS "
            f"(default: {DEFAULT_LISTENER}).",
        ),
    ] = None,
    tls_certificates: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help=f"For nbds: the directory at the client with {AUTHORITY} and, if its certificate is asked for, "
            f"{CERTIFICATE} and {KEY}.",
        ),
    ] = None,
    tls_hostname: Annotated[
        str | None, typer.Option(metavar="NAME", help="The name in the server's certificate, if it is not the host's.")
    ] = None,
    tls_psk: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help=f"For nbds:, in place of certificates: the directory at the client with {KEYS}, lines of NAME:HEX.",
        ),
    ] = None,
    tls_psk_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which of the pre-shared keys is the client's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The lines as JSON.")] = False,
) -> int:
    """Print the lines with which QEMU, libvirt, nbd-client, libnbd's tools and early boot use an export.

    Asks no server.
    """
    _check_keys(tls_psk, tls_psk_name, tls_certificates or tls_hostname)
    target = Target(_reachable(export, uri), tls_psk or tls_certificates, tls_hostname, tls_psk_name)
    _check_tls(target)
    found = entries(target)
    if as_json:
        listed = [
            {"tool": each.tool, "lines": each.lines, "reason": each.reason or None, "note": each.note or None}
            for each in found
        ]
        print_json(uri=str(target.uri), entries=listed)
        return 0
    for each in found:
        print(": ".join(filter(None, (f"# {each.tool}", each.reason, each.note))))
        for line in each.lines:
            print(line)
        print()
    return 0


def entries(target: Target) -> list[Entry]:
    """One for each tool, in the order in which they are shown."""
    return [
        _blockdev(target),
        _drive(target),
        _libvirt(target),
        _nbd_client(target),
        _nbdtab(target),
        _initramfs(target),
        _dracut(target),
        _libnbd(target),
    ]


def _reachable(export: str, uri: str | None) -> NbdUri:
    """Raises: ConfigError: a client cannot connect to that."""
    if not export.isprintable():
        raise ConfigError(f"{export!r} has characters that do not print, expected the name of an export")
    server = DEFAULT_LISTENER if uri is None else listener_uri(uri)
    if server.socket is None and (server.port == 0 or _is_any_address(server.host or "")):
        raise ConfigError(f"{server} is where a server listens, expected the address and port that clients reach")
    if server.socket is not None and not os.path.isabs(server.socket):
        raise ConfigError(f"{server}: expected the whole name of the socket, from / on")
    return replace(server, name=export_name(export))


def _is_any_address(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _check_keys(directory: str | None, name: str | None, other: str | None) -> None:
    """Raises: ConfigError: half of what a pre-shared key takes, or certificates beside it."""
    if (directory is None) != (name is None):
        raise ConfigError("a pre-shared key takes --tls-psk DIR and --tls-psk-name NAME")
    if name is not None and (":" in name or not name.isprintable() or not name):
        raise ConfigError(f"{escaped(name)} is not allowed, expected the name of a pre-shared key")
    if directory is not None and other is not None:
        raise ConfigError("--tls-psk takes the place of certificates and their names, expected one or the other")


def _check_tls(target: Target) -> None:
    """Raises: ConfigError: the files of TLS without TLS, or TLS without them."""
    given = target.directory or target.hostname
    if target.uri.is_tls and target.directory is None:
        raise ConfigError(f"{target.uri} needs --tls-certificates DIR with {AUTHORITY}, or --tls-psk DIR with {KEYS}")
    if not target.uri.is_tls and given:
        options = "--tls-psk" if target.keys else "--tls-certificates and --tls-hostname"
        raise ConfigError(f"{target.uri} is without TLS, expected nbds: for {options}")
    if target.directory is not None and not os.path.isabs(target.directory):
        raise ConfigError(f"{target.directory}: expected the whole name of the directory, from / on")


def _blockdev(target: Target) -> Entry:
    """Without `reconnect-delay` a restart of the server is an I/O error in the guest, for good."""
    uri = target.uri
    if uri.socket is not None:
        server = {"server.type": "unix", "server.path": uri.socket}
    else:
        server = {"server.type": "inet", "server.host": uri.host or "", "server.port": str(uri.port)}
    options = {"driver": "nbd", "node-name": DEVICE, **server, "export": uri.name, **_qemu_waits(), **_qemu_tls(target)}
    arguments = [*_qemu_credentials(target), "-blockdev", _listed(options), "-device", f"virtio-blk-pci,drive={DEVICE}"]
    return Entry("qemu", (shlex.join(arguments),))


def _drive(target: Target) -> Entry:
    """QEMU's URIs know neither TLS nor waiting; the options beside them do."""
    plain = replace(target.uri, is_tls=False)
    more = {f"file.{key}": value for key, value in {**_qemu_waits(), **_qemu_tls(target)}.items()}
    options = {"file": str(plain), "format": "raw", "if": "virtio", **more}
    return Entry("qemu with -drive", (shlex.join([*_qemu_credentials(target), "-drive", _listed(options)]),))


def _qemu_waits() -> dict[str, str]:
    return {"reconnect-delay": str(RECONNECT_DELAY_S), "open-timeout": str(OPEN_TIMEOUT_S)}


def _qemu_tls(target: Target) -> dict[str, str]:
    if target.directory is None:
        return {}
    return {"tls-creds": CREDENTIALS, **({"tls-hostname": target.hostname} if target.hostname else {})}


def _qemu_credentials(target: Target) -> list[str]:
    if target.directory is None:
        return []
    options = {"id": CREDENTIALS, "endpoint": "client", "dir": target.directory}
    if target.key_name is not None:
        return ["-object", _listed({**options, "username": target.key_name}, "tls-creds-psk")]
    return ["-object", _listed(options, "tls-creds-x509")]


def _listed(options: dict[str, str], *first: str) -> str:
    """`a,key=value,...`; a comma in a value is doubled."""
    return ",".join([*first, *(f"{key}={value.replace(',', ',,')}" for key, value in options.items())])


def _libvirt(target: Target) -> Entry:
    """The directory of the files for TLS is a setting of the host."""
    from xml.etree import ElementTree as Xml

    uri = target.uri
    if target.keys:
        return Entry("libvirt", reason=_NO_KEYS)
    disk = Xml.Element("disk", type="network", device="disk")
    Xml.SubElement(disk, "driver", name="qemu", type="raw")
    tls = {"tls": "yes", **({"tlsHostname": target.hostname} if target.hostname else {})} if uri.is_tls else {}
    source = Xml.SubElement(disk, "source", {"protocol": "nbd", "name": uri.name, **tls})
    if uri.socket is not None:
        Xml.SubElement(source, "host", transport="unix", socket=uri.socket)
    else:
        Xml.SubElement(source, "host", name=uri.host or "", port=str(uri.port))
    Xml.SubElement(source, "reconnect", delay=str(RECONNECT_DELAY_S))
    Xml.SubElement(disk, "target", dev="vda", bus="virtio")
    Xml.indent(disk)
    setting = f' (with nbd_tls_x509_cert_dir = "{target.directory}" in /etc/libvirt/qemu.conf)' if tls else ""
    return Entry(f"libvirt{setting}", tuple(Xml.tostring(disk, encoding="unicode").splitlines()))


def _nbd_client(target: Target) -> Entry:
    uri = target.uri
    if target.keys:
        return Entry("nbd-client", reason=_NO_KEYS)
    place = ["-unix", uri.socket] if uri.socket is not None else [uri.host or "", str(uri.port)]
    settings = ["-block-size", str(BLOCK_SIZE), "-connections", str(CONNECTIONS), "-persist"]
    tls = [word for key, value in _nbd_client_tls(target).items() for word in (f"-{key}", value)]
    line = shlex.join(["nbd-client", *place, f"/dev/{DEVICE}", "-name", uri.name, *settings, *tls])
    return Entry(f"nbd-client{_TLS_NOTE if uri.is_tls else ''}", (line,), note=_LOSS_NOTE)


def _nbdtab(target: Target) -> Entry:
    """Nothing can be quoted there. Version 3.24 accepts `port=`, and connects to the default port all the same."""
    uri = target.uri
    tool = f"/etc/nbdtab{_TLS_NOTE if uri.is_tls else ''}"
    if target.keys:
        return Entry("/etc/nbdtab", reason=_NO_KEYS)
    if uri.socket is None and uri.port != DEFAULT_PORT:
        return Entry(tool, reason=f"nbd-client takes no other port than {DEFAULT_PORT} from there")
    place = uri.socket or uri.host or ""
    more = _nbd_client_tls(target)
    if found := _unfit((place, uri.name, *more.values()), r"[\s,=#\"]"):
        return Entry(tool, reason=f"{found} cannot be written there")
    options = [f"bs={BLOCK_SIZE}", f"conns={CONNECTIONS}", "persist", *(["unix"] if uri.socket is not None else [])]
    options += [f"{key}={value}" for key, value in more.items()]
    return Entry(tool, (f"{DEVICE} {place} {uri.name} {','.join(options)}",), note=_LOSS_NOTE)


def _nbd_client_tls(target: Target) -> dict[str, str]:
    """A client certificate is named if it is there: naming one that is not would be an error."""
    if target.directory is None:
        return {}
    found = {"cacertfile": os.path.join(target.directory, AUTHORITY)}
    certificate, key = (os.path.join(target.directory, name) for name in (CERTIFICATE, KEY))
    if os.path.exists(certificate):
        found |= {"certfile": certificate, "keyfile": key}
    return {**found, **({"tlshostname": target.hostname} if target.hostname else {})}


def _initramfs(target: Target) -> Entry:
    """Of its forms only SERVER:PORT/NAME has a port and leaves the name as it is; it takes no quotes, and a comma makes
    it another form.
    """
    tool, uri = "initramfs-tools, on the kernel's command line", target.uri
    if reason := _unbootable(target, r"[\s,*?\[\\\"'$]"):
        return Entry(tool, reason=reason)
    return Entry(tool, (f"root=/dev/{DEVICE} nbdroot={_bracketed(uri)}:{uri.port}/{uri.name} ip=dhcp",))


def _dracut(target: Target) -> Entry:
    """A field of digits is a port there, and a name means the default port."""
    tool, uri = "dracut, on the kernel's command line", target.uri
    reason = _unbootable(target, r"[\s:*?\[\\\"'$]")
    if not reason and uri.name.isdecimal():
        reason = f"it takes {uri.name} for a port, give the export another name"
    if not reason and uri.port != DEFAULT_PORT:
        reason = f"it knows names only at port {DEFAULT_PORT}"
    if reason:
        return Entry(tool, reason=reason)
    return Entry(tool, (f"root=nbd:{_bracketed(uri)}:{uri.name} ip=dhcp",))


def _unbootable(target: Target, unfit: str) -> str:
    if target.uri.socket is not None:
        return "early boot reaches no Unix socket"
    if target.uri.is_tls:
        return "early boot has no TLS"
    found = _unfit((target.uri.name,), unfit)
    return f"{found} cannot be written there" if found else ""


def _unfit(words: Sequence[str], pattern: str) -> str | None:
    return next((repr(word) for word in words if re.search(pattern, word)), None)


def _bracketed(uri: NbdUri) -> str:
    host = uri.host or ""
    return f"[{host}]" if ":" in host else host


def _libnbd(target: Target) -> Entry:
    certificates = None if target.keys else target.directory
    parameters = {"tls-certificates": certificates, "tls-hostname": target.hostname, "tls-psk-file": target.keys}
    query = "&".join(f"{key}={quote(value)}" for key, value in parameters.items() if value)
    uri = str(target.uri)
    if target.key_name is not None:
        uri = uri.replace("://", f"://{quote(target.key_name, safe='')}@", 1)
    uri += ("&" if "?" in uri else "?") + query if query else ""
    return Entry("libnbd", (shlex.join(["nbdinfo", uri]), shlex.join(["nbdcopy", uri, f"{DEVICE}.img"])))
