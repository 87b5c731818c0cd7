"""NBD URIs: one strict parser and printer for the command line, the configuration and the messages.

    nbd://host[:port]/[name]                TCP
    nbd+unix:///[name]?socket=/path         Unix socket
    nbds://…, nbds+unix://…                 the same, TLS required

Source: doc/uri.md of the NBD project. A path of `//disk` is the export name `/disk`. The `%` in front of an IPv6
address's zone is written `%25` (RFC 6874); QEMU takes no other, so a bare one is read and never printed.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from nbdimg.errors import ConfigError, with_user_hidden

DEFAULT_PORT = 10809
_EXAMPLES = f"nbd://127.0.0.1:{DEFAULT_PORT} or nbd+unix:///?socket=PATH"
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
        shown = with_user_hidden(text)
        if not text.isprintable() or " " in text:
            raise ConfigError(f"{shown!r} is not an NBD URI: it has a space or a control character")
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as error:
            reason = error if shown == text else "its host or port is malformed"  # `error` may have the password
            raise ConfigError(f"{shown!r} is not an NBD URI: {reason}") from None
        scheme, plus, transport = parts.scheme.partition("+")
        if scheme not in ("nbd", "nbds") or (plus and transport != "unix"):
            raise ConfigError(f"{shown!r}: the scheme must be nbd, nbds, nbd+unix or nbds+unix, as in {_EXAMPLES}")
        if parts.fragment:
            raise ConfigError(f"{shown!r}: an NBD URI has no fragment")
        if parts.username is not None:
            raise ConfigError(f"{shown!r}: an NBD URI has no user name")
        parameters = _parameters(text, parts.query)
        name = _decoded(text, parts.path.removeprefix("/"))
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
        host = parts.hostname
        if ":" in host and not host.endswith("%25"):  # which is a bare `%` and interface 25
            host = host.replace("%25", "%", 1)
        return cls(host=host, port=DEFAULT_PORT if port is None else port, name=name, is_tls=is_tls)

    def __str__(self) -> str:
        scheme = "nbds" if self.is_tls else "nbd"
        path = f"/{_encoded(self.name)}"
        if self.socket is not None:
            return f"{scheme}+unix://{path}?socket={_encoded(self.socket)}"
        assert self.host is not None
        host = f"[{self.host.replace('%', '%25')}]" if ":" in self.host else self.host
        port = "" if self.port == DEFAULT_PORT else f":{self.port}"
        return f"{scheme}://{host}{port}{path}"


def _parameters(text: str, query: str) -> dict[str, str]:
    """The query's parameters; a plus sign is a plus sign, as in RFC 3986."""
    parameters: dict[str, str] = {}
    for item in query.split("&") if query else ():
        key, _, value = item.partition("=")
        if key not in _PARAMETERS:
            raise ConfigError(f"{text!r}: unknown parameter {key!r}, known are {', '.join(_PARAMETERS)}")
        if key in parameters:
            raise ConfigError(f"{text!r}: {key} is given twice")
        parameters[key] = _decoded(text, value)
    return parameters


def _decoded(text: str, part: str) -> str:
    """Percent-decoding; bytes that are not UTF-8 survive as in file names."""
    decoded = unquote(part, errors="surrogateescape")
    if "\0" in decoded:
        raise ConfigError(f"{text!r}: a NUL byte cannot be part of a name or path")
    return decoded


def _encoded(part: str) -> str:
    return quote(part, errors="surrogateescape")
