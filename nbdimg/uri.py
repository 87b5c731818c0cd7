"""NBD URIs: one strict parser and printer for the command line, the configuration and the messages.

    nbd://host[:port]/[name]                TCP
    nbd+unix:///[name]?socket=/path         Unix socket
    nbds://…, nbds+unix://…                 the same, TLS required

Source: doc/uri.md of the NBD project. A path of `//disk` is the export name `/disk`.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from nbdimg.errors import ConfigError

DEFAULT_PORT = 10809
_PARAMETERS = ("socket", "tls-type", "tls-hostname", "tls-verify-peer")


@dataclass(frozen=True, slots=True)
class NbdUri:
    """Where a server listens and, with `name`, which export is meant. Exactly one of `host` and `socket` is set."""

    host: str | None = None
    port: int = DEFAULT_PORT
    socket: str | None = None
    name: str = ""
    is_tls: bool = False

    @classmethod
    def parse(cls, text: str) -> NbdUri:
        """Raises: ConfigError, naming the part that is wrong and what is allowed."""
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{text!r} is not an NBD URI: {error}") from None
        scheme, plus, transport = parts.scheme.partition("+")
        if scheme not in ("nbd", "nbds") or (plus and transport != "unix"):
            raise ConfigError(f"{text!r}: the scheme must be nbd, nbds, nbd+unix or nbds+unix")
        if parts.fragment:
            raise ConfigError(f"{text!r}: an NBD URI has no fragment")
        parameters = dict(parse_qsl(parts.query, keep_blank_values=True))
        for key in parameters:
            if key not in _PARAMETERS:
                raise ConfigError(f"{text!r}: unknown parameter {key!r}, known are {', '.join(_PARAMETERS)}")
        name = unquote(parts.path.removeprefix("/"))
        is_tls = scheme == "nbds"
        if transport == "unix":
            if parts.netloc:
                raise ConfigError(f"{text!r}: a Unix socket URI has no host, write nbd+unix:///NAME?socket=PATH")
            if not parameters.get("socket"):
                raise ConfigError(f"{text!r}: a Unix socket URI needs ?socket=PATH")
            return cls(socket=parameters["socket"], name=name, is_tls=is_tls)
        if "socket" in parameters:
            raise ConfigError(f"{text!r}: socket= belongs to nbd+unix, not to {parts.scheme}")
        if not parts.hostname:
            raise ConfigError(f"{text!r}: a TCP URI needs a host, write nbd://127.0.0.1:{DEFAULT_PORT}")
        return cls(host=parts.hostname, port=DEFAULT_PORT if port is None else port, name=name, is_tls=is_tls)

    def __str__(self) -> str:
        scheme = "nbds" if self.is_tls else "nbd"
        path = f"/{quote(self.name)}"
        if self.socket is not None:
            return f"{scheme}+unix://{path}?socket={quote(self.socket)}"
        assert self.host is not None
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == DEFAULT_PORT else f":{self.port}"
        return f"{scheme}://{host}{port}{path}"
