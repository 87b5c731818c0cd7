"""The exceptions by which one part of nbdimg tells another, or who uses it, what went wrong.

    NbdimgError
    ├─ ConfigError              a setting, an option or an argument is wrong
    │   └─ NotThere             it names an export or a client that there is not
    ├─ ListenError              an address cannot be listened on
    ├─ ProtocolError            the peer broke the protocol: its connection ends
    │   └─ TlsError             TLS has failed, or is missing where it is required
    ├─ RequestError             one request fails with an errno; its connection goes on
    │   └─ GuardedWrite         it would have turned the image into something else
    └─ ImageError               an image cannot be opened, read or written
        ├─ UnrecognizedFormat   by its magic it is of a format that no driver reads
        ├─ UnsupportedFeature   well-formed, and nbdimg cannot serve it
        ├─ CorruptImage         violates its format; never written to afterwards
        ├─ ImageLocked          another process holds the image
        └─ ImageFailed          an earlier I/O error made the state unknown: open it anew

Messages say what was found, what is allowed and where. What one package raises for itself stands there, and has its
place in this tree: a problem of a configuration file, an option's refusal, an answer of the HTTP API.

A request's `OSError` is not wrapped: it passes from the file to `wire/errors.py`, the only place that turns an errno
into an NBD error. `storage/ordering.py` has two kinds of it, for writes that may be tried again.
"""

from __future__ import annotations

import os

ECHO_MAX = 80


def escaped(text: str | bytes) -> str:
    """Peer input made safe to print: control characters escaped, at most ECHO_MAX characters."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    return repr(text[:ECHO_MAX]) + ("…" if len(text) > ECHO_MAX else "")


def printable(text: str) -> str:
    """One line that steers no terminal: what does not print is escaped."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def with_user_hidden(uri: str) -> str:
    """A URI to show in a complaint: what stands before the `@` of its host may be a password. It may have a slash that
    nobody has encoded; what stands for a port is none then.
    """
    scheme, separator, rest = uri.partition("://") if "://" in uri else ("", "", uri)
    authority = rest.partition("/")[0]
    port = authority.rpartition(":")[2]
    is_cut = ":" in authority and "@" not in authority and not (port.isdecimal() or port.endswith("]"))
    user, at, _ = (rest if is_cut else authority).rpartition("@")
    return f"{scheme}{separator}…{rest[len(user) :]}" if at else uri


class NbdimgError(Exception):
    """The root of the tree."""


class ConfigError(NbdimgError):
    """A setting is wrong; the message names it, its value and what is allowed."""


class NotThere(ConfigError):
    """No export, or no client, has the name that was given."""


class ListenError(NbdimgError):
    """An address cannot be listened on."""


class ProtocolError(NbdimgError):
    """The peer sent what the protocol forbids and the stream cannot go on."""


class TlsError(ProtocolError):
    """TLS has failed, or is missing where it is required."""


class RequestError(NbdimgError):
    """One request is refused. `errno` is the host's error number, `offset` the failing byte where one is known."""

    def __init__(self, errno: int, message: str, offset: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno
        self.offset = offset


class GuardedWrite(RequestError):
    """A change would turn an image into something else; whoever serves the image can allow it."""


class ImageError(NbdimgError):
    """An image cannot be opened, read or written. `path` names it, `offset` the place in the file."""

    def __init__(self, path: str | os.PathLike[str], message: str, offset: int | None = None) -> None:
        super().__init__(f"{os.fspath(path)}: {message}")
        self.path = os.fspath(path)
        self.offset = offset


class UnrecognizedFormat(ImageError):
    """By its magic the file is of a format that no driver reads."""


class UnsupportedFeature(ImageError):
    """The image is well-formed and uses what nbdimg does not have."""


class CorruptImage(ImageError):
    """The image violates its format."""


class ImageLocked(ImageError):
    """Another process holds the image."""


class ImageFailed(ImageError):
    """An earlier I/O error made the image's state unknown; it must be opened anew."""
