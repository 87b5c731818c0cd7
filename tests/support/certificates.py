"""Certificates made on the spot: authorities, servers, clients good and bad, revocation lists.

Files are named as libnbd (`tls-certificates=DIR`) and QEMU (`tls-creds-x509,dir=DIR`) look for them: `ca-cert.pem`,
`client-cert.pem` with `client-key.pem`, `server-cert.pem` with `server-key.pem`.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

DAY = datetime.timedelta(days=1)
SERVER_AUTH, CLIENT_AUTH = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


@dataclass(frozen=True)
class Identity:
    """A certificate with its key, in files of a directory of its own."""

    directory: Path
    role: str
    certificate: x509.Certificate

    @property
    def certificate_path(self) -> str:
        return str(self.directory / f"{self.role}-cert.pem")

    @property
    def key_path(self) -> str:
        return str(self.directory / f"{self.role}-key.pem")

    @property
    def spki_sha256(self) -> str:
        """By another way than the server's, which walks the certificate's DER."""
        public_key = self.certificate.public_key()
        der = public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        return hashlib.sha256(der).hexdigest()


class Authority:
    """A certificate authority whose files lie beneath `directory`. `parent` has issued its certificate, or itself."""

    def __init__(self, directory: Path, name: str = "test authority", parent: Authority | None = None) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        usage = dict.fromkeys(
            ("content_commitment", "data_encipherment", "encipher_only", "decipher_only", "key_agreement"), False
        )
        issuer = parent or self
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(issuer._name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 2 * DAY)
            .not_valid_after(now + 30 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=True, key_encipherment=False, key_cert_sign=True, crl_sign=True, **usage
                ),
                critical=True,
            )
            .sign(issuer._key, hashes.SHA256())
        )
        self.path = str(directory / "ca-cert.pem")
        Path(self.path).write_bytes(_pem(self.certificate))

    def issue(
        self,
        role: str,
        *,
        common_name: str = "someone",
        names: Sequence[x509.GeneralName] | bytes = (),
        usage: x509.ObjectIdentifier | None = None,
        valid_days: tuple[float, float] = (-1, 20),
        directory: str | None = None,
    ) -> Identity:
        """A certificate for `role` "server" or "client", valid from and to so many days from now. `names` may be
        given as they are encoded.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + valid_days[0] * DAY)
            .not_valid_after(now + valid_days[1] * DAY)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([usage or (SERVER_AUTH if role == "server" else CLIENT_AUTH)]), critical=False
            )
        )
        if isinstance(names, bytes):
            encoded = x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, names)
            builder = builder.add_extension(encoded, critical=False)
        elif names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        place = self.directory / (directory or f"{role}-{common_name}")
        place.mkdir(exist_ok=True)
        (place / "ca-cert.pem").write_bytes(_pem(self.certificate))
        found = Identity(place, role, certificate)
        Path(found.certificate_path).write_bytes(_pem(certificate))
        key_pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        with open(os.open(found.key_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(key_pem)
        return found

    def revoke(self, *revoked: Identity | Authority, days: float = 5) -> str:
        """The path of a new revocation list, good for `days`."""
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._name)
            .last_update(now - DAY)
            .next_update(now + days * DAY)
        )
        for each in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(each.certificate.serial_number)
            builder = builder.add_revoked_certificate(entry.revocation_date(now - DAY).build())
        path = self.directory / "crl.pem"
        path.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        return str(path)


LOOPBACK_NAMES = (x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1")))


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
