"""What the tests of TLS and of access rules share: a server in a thread, its log, and clients that speak TLS."""

from __future__ import annotations

import ssl
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from nbdimg.config import ServerConfig
from nbdimg.server.service import Service, serving
from tests.server.live import Address
from tests.support.certificates import Authority, Identity
from tests.support.rawclient import Client
from tests.support.rawprotocol import ConnectionClosed, Option, Rep
from tests.support.rss import wait_until
from tests.support.threaded import ThreadedServer

LOG_WAIT_S = 5


class LiveServer(ThreadedServer[Service]):
    """`serving(config)` in a thread of this process."""

    def __init__(self, config: ServerConfig) -> None:
        super().__init__(serving(config))

    @property
    def service(self) -> Service:
        return self.entered

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        assert not [line for line in self.lines if "internal error" in line], self.lines

    @property
    def addresses(self) -> list[Address]:
        """One for each line that the server would print."""
        return [uri.socket or (uri.host or "", uri.port) for uri in self.service.uris]

    @property
    def address(self) -> Address:
        return self.addresses[0]

    def has_logged(self, *texts: str) -> bool:
        """Whether a line with one of `texts` comes within a few seconds."""
        return wait_until(lambda: any(text in line for line in self.lines for text in texts), LOG_WAIT_S)


def client_context(
    authority: Authority | None,
    identity: Identity | None = None,
    lowest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2,
    highest: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED,
) -> ssl.SSLContext:
    """Without an authority the server is taken for what it says."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    if authority is None:
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(authority.path)
    if lowest < ssl.TLSVersion.TLSv1_2:
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version, context.maximum_version = lowest, highest
    if identity is not None:
        context.load_cert_chain(identity.certificate_path, identity.key_path)
    return context


def asked_for_tls(address: Address, timeout_s: float = 15) -> Client:
    """A client behind an acknowledged STARTTLS: its next byte belongs to TLS."""
    client = Client(address, timeout_s)
    client.greet()
    assert [reply.type for reply in client.option(Option.STARTTLS)] == [Rep.ACK]
    return client


def tls_client(address: Address, context: ssl.SSLContext, timeout_s: float = 15) -> Client:
    """A client whose TLS is up; the next is an option.

    Raises: ssl.SSLError, OSError: as the client's side sees it. With TLS 1.3 a server's refusal comes with the first
    reply, not here.
    """
    client = asked_for_tls(address, timeout_s)
    try:
        client.sock = context.wrap_socket(client.sock, server_hostname="localhost")
    except OSError:
        client.close()
        raise
    return client


def refusal(address: Address, context: ssl.SSLContext) -> str | None:
    """How the server ended a TLS handshake, by its alert or "closed"; None: it serves this client."""
    try:
        with tls_client(address, context) as client:
            client.option(Option.LIST)
            return None
    except ssl.SSLError as error:
        return str(error.reason)
    except (ConnectionClosed, ConnectionResetError, BrokenPipeError):
        return "closed"


def files(directory: Path, names: Sequence[str], size: int = 1 << 20) -> list[Path]:
    """Raw images of `size` bytes, each full of its own letter."""
    paths = [directory / f"{name}.raw" for name in names]
    for name, path in zip(names, paths, strict=True):
        path.write_bytes(name[:1].encode() * size)
    return paths
