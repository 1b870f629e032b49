"""The keys of a run: a CA of its own, the coordinator's certificate, and one small join file for its workers.

All of them lie in RUN/certs, keys and join file readable by their owner only. The CA signs nothing but this run's
coordinator, under a fixed name beside the given ones, so that workers trust it whatever address they reach it by.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protocol.address import BadAddress
from protocol.joinfile import JoinFile
from protocol.security import CERTIFICATE_FILE, COORDINATOR_NAME, JOIN_FILE, KEY_FILE, TOKEN_FILE

CA_CERTIFICATE_FILE, CA_KEY_FILE = "ca.pem", "ca.key"
CA_COMMON_NAME = "dipaco run CA"
CA_VALID_DAYS, SERVER_VALID_DAYS = 3650, 825
_CLOCK_SKEW = datetime.timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


def write_certificates(
    certs_dir: Path, hosts: Sequence[str], *, address: str | None = None, now: datetime.datetime | None = None
) -> JoinFile:
    """Make (or renew) the certificates of a run for the given host names and IP addresses; returns the join file.

    CA and token are made once: running it again, say for another host, keeps join files valid that were handed out.
    Raises BadAddress where a host is neither a name nor an IP address.
    """
    names = _alternative_names(hosts)
    now = now or datetime.datetime.now(datetime.UTC)
    certs_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority = _load_authority(certs_dir, now) or _new_authority(certs_dir, now)
    server = _issue_server(authority, names, now)
    token = _load_token(certs_dir) or secrets.token_urlsafe(32)
    join = JoinFile(token=token, ca_pem=authority.certificate_pem.decode(), address=address)
    _write(certs_dir / KEY_FILE, server.key_pem, private=True)
    _write(certs_dir / CERTIFICATE_FILE, server.certificate_pem)
    _write(certs_dir / TOKEN_FILE, hashlib.sha256(token.encode()).hexdigest().encode() + b"\n", private=True)
    _write(certs_dir / JOIN_FILE, join.to_json().encode(), private=True)
    return join


def _alternative_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """The fixed name, loopback, and the given hosts as subject alternative names."""
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys([COORDINATOR_NAME, "localhost", "127.0.0.1", "::1", *hosts]):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            if not _is_host_name(host):
                raise BadAddress(f"host {host!r} is neither a DNS name nor an IP address") from None
            names.append(x509.DNSName(host))
    return names


def _is_host_name(host: str) -> bool:
    labels = host.removeprefix("*.").split(".")
    return (
        len(host) < 254
        and host.isascii()
        and all(label.replace("-", "").replace("_", "").isalnum() for label in labels)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: str, key: ec.EllipticCurvePrivateKey, now: datetime.datetime, valid_days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(CA_COMMON_NAME))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=valid_days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _new_authority(certs_dir: Path, now: datetime.datetime) -> Identity:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder(CA_COMMON_NAME, key, now, CA_VALID_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    authority = Identity(certificate, key)
    _write(certs_dir / CA_KEY_FILE, authority.key_pem, private=True)
    _write(certs_dir / CA_CERTIFICATE_FILE, authority.certificate_pem)
    return authority


def _load_authority(certs_dir: Path, now: datetime.datetime) -> Identity | None:
    """The run's CA where there is one that outlives a new certificate, else None."""
    certificate_file, key_file = certs_dir / CA_CERTIFICATE_FILE, certs_dir / CA_KEY_FILE
    if not (certificate_file.is_file() and key_file.is_file()):
        return None
    certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
    key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
    if certificate.not_valid_after_utc - now < datetime.timedelta(days=SERVER_VALID_DAYS):
        return None
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return Identity(certificate, key)


def _issue_server(authority: Identity, names: list[x509.GeneralName], now: datetime.datetime) -> Identity:
    key = ec.generate_private_key(ec.SECP256R1())
    authority_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    certificate = (
        _builder(COORDINATOR_NAME, key, now, SERVER_VALID_DAYS)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(authority_key, critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return Identity(certificate, key)


def _load_token(certs_dir: Path) -> str | None:
    path = certs_dir / JOIN_FILE
    return JoinFile.read(path).token if path.is_file() else None


def _write(path: Path, data: bytes, *, private: bool = False) -> None:
    """Replace the file whole; a private one is never readable by others, not even for a moment."""
    aside = path.with_name(path.name + ".new")
    aside.unlink(missing_ok=True)
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
