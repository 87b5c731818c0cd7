"""What the server proves itself with, and how it learns who its clients are: certificates, pre-shared keys, the admin
API's token.

A `Credentials` is made whole from its files and never changes; new files make a new one, and connections that are up
keep theirs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import ssl
import stat
from typing import Any

from nbdimg.config import TlsConfig
from nbdimg.errors import ConfigError, TlsError, escaped
from nbdimg.export.access import normalized

PSK_SIZE_MIN = 16
"""Bytes of a pre-shared key: less could be guessed."""

PSK_FILE_SIZE_MAX = 1 << 20

TOKEN_SIZE_MIN, TOKEN_SIZE_MAX = 16, 4096
"""Characters: less could be guessed, more would be another file."""

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""Spec: RFC 6750 2.1, b64token."""

_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
_ALTERNATIVE_NAMES = {"DNS": "dns", "URI": "uri", "email": "email"}


class _Keys:
    """Pre-shared keys by name, and those that the client of a handshake's step has proposed. It must not refer to the
    context that it is a callback of: the garbage collector does not see that reference, and would keep both for ever.
    """

    def __init__(self, keys: dict[str, bytes]) -> None:
        self._keys = keys
        self.proposed: set[str] = set()

    def key_of(self, name: str | None) -> bytes:
        """OpenSSL asks for the key of a name that a client has proposed; none: the handshake goes on without."""
        key = self._keys.get(name or "", b"")
        if name is not None and key:
            self.proposed.add(name)
        return key


class Credentials:
    """Raises: ConfigError: a file is missing, malformed, does not go with the others, or is open to everybody."""

    def __init__(self, config: TlsConfig) -> None:
        self.context = _context(config)
        self._keys = _Keys({})
        if config.psk_path is not None:
            self._keys = _Keys(_read_keys(config.psk_path))
            _set_key_callback(self.context, self._keys.key_of)

    def advance(self, session: ssl.SSLObject, proposed: frozenset[str]) -> frozenset[str]:
        """One step of a handshake. Returns the key names that its client has `proposed` so far, this step included.

        Raises: ssl.SSLError.
        """
        self._keys.proposed = set(proposed)
        with contextlib.suppress(ssl.SSLWantReadError):
            session.do_handshake()
        return frozenset(self._keys.proposed)

    def identities(self, session: ssl.SSLObject, proposed: frozenset[str]) -> frozenset[str]:
        """What a complete handshake has proven of the client.

        Raises: TlsError: its certificate has names of which Python makes no text.
        """
        if proposed:
            # That a name was proposed proves nothing: OpenSSL passes over a key that does not fit the cipher. Without
            # tickets only a key that was used makes a TLS 1.3 session one that is "reused".
            is_used = session.session_reused and session.version() == "TLSv1.3" and len(proposed) == 1
            return frozenset(f"psk:{name}" for name in proposed) if is_used else frozenset()
        certificate = session.getpeercert(binary_form=True)
        if not certificate:
            return frozenset()
        try:
            names = session.getpeercert() or {}
        except (ValueError, ssl.SSLError) as error:
            raise TlsError(f"the client's certificate has a name that cannot be read: {error}") from None
        return _certificate_identities(names, certificate)


def reason(error: OSError) -> str:
    """Why OpenSSL or a file call failed, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the client's certificate: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and error.reason:
        return str(error.reason).lower().replace("_", " ")
    return error.strerror or str(error)


def _context(config: TlsConfig) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[config.min_version]
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET
    context.num_tickets = 0
    if config.certificate_path is not None:
        key_path = config.key_path or config.certificate_path
        _check_file(config.certificate_path, "TLS certificate file")
        check_secret(key_path, "TLS key file")
        try:
            context.load_cert_chain(config.certificate_path, key_path, password=_no_password)
        except ssl.SSLError as error:
            raise ConfigError(
                f"TLS certificate {config.certificate_path} with key {key_path}: {reason(error)}; "
                "expected PEM files that belong together"
            ) from None
    if config.client_ca_path is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        _load_authority(context, config.client_ca_path, "TLS client CA file", "x509_ca")
    if config.crl_path is not None:
        _load_authority(context, config.crl_path, "revocation list file", "crl")
        context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_CHAIN
    return context


def _no_password() -> str:
    raise ConfigError("the TLS key is encrypted; nobody is there to type a passphrase: store it unencrypted, mode 0600")


def _load_authority(context: ssl.SSLContext, path: str, what: str, kind: str) -> None:
    """Load a file that must hold at least one object of `kind`, a key of `SSLContext.cert_store_stats`."""
    _check_file(path, what)
    before = context.cert_store_stats()[kind]
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise ConfigError(f"{what} {path}: {reason(error)}") from None
    if context.cert_store_stats()[kind] == before:
        raise ConfigError(f"{what} {path}: nothing of the kind is in it")


def _check_file(path: str, what: str) -> os.stat_result:
    """It is read again by name, perhaps by OpenSSL, and while clients are served: a FIFO would be waited for."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{what} {path}: expected a regular file")
        with open(path, "rb"):
            return found
    except OSError as error:
        raise ConfigError(f"{what} {path}: {error.strerror}") from None


def check_secret(path: str, what: str) -> None:
    """Only what the world may read is refused: to share a key with a service through a group is common practice."""
    if _check_file(path, what).st_mode & stat.S_IROTH:
        raise ConfigError(f"{what} {path} can be read by everybody on this machine: chmod 0600, or 0640 with a group")


def read_token(path: str) -> bytes:
    """The admin API's token. Raises: ConfigError: it cannot be read, is open to everybody, or holds no token."""
    check_secret(path, "token file")
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            token = file.read(TOKEN_SIZE_MAX + 1).strip()
    except OSError as error:
        raise ConfigError(f"token file {path}: {error.strerror}") from None
    if not (TOKEN_SIZE_MIN <= len(token) <= TOKEN_SIZE_MAX and _TOKEN.fullmatch(token)):
        raise ConfigError(
            f"token file {path}: expected one line of {TOKEN_SIZE_MIN} to {TOKEN_SIZE_MAX} letters, digits and -._~+/="
        )
    return token.encode()


def _read_keys(path: str) -> dict[str, bytes]:
    """Lines of NAME:HEX, as GnuTLS's psktool writes them; `#` begins a comment."""
    what = "pre-shared key file"
    check_secret(path, what)
    keys: dict[str, bytes] = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read(PSK_FILE_SIZE_MAX)
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, digits = line.strip().rpartition(":")
        try:
            key = bytes.fromhex(digits)
        except ValueError:
            key = b""
        if not name or len(key) < PSK_SIZE_MIN:
            raise ConfigError(f"{what} {path}, line {number}: expected NAME:HEX with {PSK_SIZE_MIN} bytes or more")
        if name in keys:
            raise ConfigError(f"{what} {path}, line {number}: {escaped(name)} has a key already")
        keys[name] = key
    if not keys:
        raise ConfigError(f"{what} {path}: no key is in it")
    return keys


def check_key_support() -> None:
    """Python 3.13 brought pre-shared keys to `ssl`, where OpenSSL has them. Raises: ConfigError: they are not there."""
    if not getattr(ssl, "HAS_PSK", False):
        raise ConfigError("TLS with pre-shared keys needs Python 3.13 or later and an OpenSSL that has them")


def _set_key_callback(context: Any, callback: Any) -> None:
    check_key_support()
    context.set_psk_server_callback(callback)


def _certificate_identities(certificate: dict[str, Any], der: bytes) -> frozenset[str]:
    """A verified client certificate's names and its key's fingerprint, as access rules write them."""
    found = {f"cn:{value}" for name in certificate.get("subject", ()) for key, value in name if key == "commonName"}
    for kind, value in certificate.get("subjectAltName", ()):
        if kind in _ALTERNATIVE_NAMES:
            found.add(normalized(f"{_ALTERNATIVE_NAMES[kind]}:{value}"))
    found.add(f"spki-sha256:{hashlib.sha256(public_key_info(der)).hexdigest()}")
    return frozenset(found)


def public_key_info(certificate: bytes) -> bytes:
    """The DER SubjectPublicKeyInfo of a DER certificate that OpenSSL has parsed already.

    Certificate ::= SEQUENCE { tbsCertificate SEQUENCE { [0] version OPTIONAL, serialNumber, signature, issuer,
    validity, subject, subjectPublicKeyInfo, … }, … }. Source: RFC 5280 4.1.
    """
    start, _ = _element(certificate, 0)
    start, _ = _element(certificate, start)
    version_tag, fields_before = 0xA0, 5
    if certificate[start] == version_tag:
        fields_before += 1
    for _ in range(fields_before):
        _, start = _element(certificate, start)
    return certificate[start : _element(certificate, start)[1]]


def _element(der: bytes, at: int) -> tuple[int, int]:
    """Where the content of the element at `at` begins and ends. Lengths from 128 on: 0x80 + n, then n bytes."""
    length, start = der[at + 1], at + 2
    if length >= 0x80:
        size = length - 0x80
        length = int.from_bytes(der[start : start + size], "big")
        start += size
    return start, start + length
