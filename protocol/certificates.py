"""The keys of a run: a CA of its own, the coordinator's certificate, and one small join file for its workers.

All of them lie in RUN/certs, keys and join file readable by their owner only. The CA signs this run's coordinator,
under a fixed name beside the given ones, so that workers trust it whatever address they reach it by, and its workers
(protocol.enrolment).
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protocol.address import BadAddress
from protocol.joinfile import JoinFile
from protocol.keyfile import one_writer, write_key_file
from protocol.security import (
    CA_CERTIFICATE_FILE,
    CA_KEY_FILE,
    CERTIFICATE_FILE,
    COORDINATOR_NAME,
    JOIN_FILE,
    KEY_FILE,
    TOKEN_FILE,
    WORKERS_DIR,
)
from protocol.tokens import BadTokenFile, Tokens, new_token, token_sha256

CA_COMMON_NAME = "dipaco run CA"
CA_VALID_DAYS, SERVER_VALID_DAYS = 3650, 825
_CLOCK_SKEW = datetime.timedelta(hours=1)


class NoAuthority(ValueError):
    """A run without the files that its commands on certificates need."""


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
    with one_writer(certs_dir):
        authority = _authority_to_renew_with(certs_dir, now) or _new_authority(certs_dir, now)
        server = issue(
            authority, COORDINATOR_NAME, now, now + datetime.timedelta(days=SERVER_VALID_DAYS), server_names=names
        )
        token, tokens = _admitted_token(certs_dir, now)
        join = JoinFile(token=token, ca_pem=authority.certificate_pem.decode(), address=address)
        write_key_file(certs_dir / KEY_FILE, server.key_pem, private=True)
        write_key_file(certs_dir / CERTIFICATE_FILE, server.certificate_pem)
        write_tokens(certs_dir, tokens)
        write_key_file(certs_dir / JOIN_FILE, join.to_json().encode(), private=True)
    return join


def rotate_token(certs_dir: Path, overlap_s: float, now: datetime.datetime | None = None) -> JoinFile:
    """Give the run a new token; the one before admits for `overlap_s` seconds more. Returns the new join file.

    All that is handed out is admitted first, and nothing ends before all of it is written: a process that ends in
    between has shut nobody out, and the same command does the rest. Raises NoAuthority, and BadJoinFile before anything
    is written.
    """
    now = now or datetime.datetime.now(datetime.UTC)
    check_made(certs_dir)
    with one_writer(certs_dir):
        before = JoinFile.read(certs_dir / JOIN_FILE)
        join = before.model_copy(update={"token": new_token()})
        handed_out = {certs_dir / JOIN_FILE: join}
        for path in sorted((certs_dir / WORKERS_DIR).glob("*.json")):
            handed_out[path] = JoinFile.read(path).model_copy(update={"token": join.token})
        try:
            tokens = _tokens_on_file(certs_dir) or Tokens(token_sha256(before.token))
        except BadTokenFile:
            tokens = Tokens(token_sha256(before.token))
        write_tokens(certs_dir, tokens.announced(join.token))
        for path, each in handed_out.items():
            write_key_file(path, each.to_json().encode(), private=True)
        write_tokens(certs_dir, tokens.rotated(join.token, now.timestamp() + overlap_s))
    return join


def check_made(certs_dir: Path) -> None:
    """Raise NoAuthority where the run has no certificates yet."""
    for name in (CA_CERTIFICATE_FILE, CA_KEY_FILE, TOKEN_FILE, JOIN_FILE):
        if not (certs_dir / name).is_file():
            raise NoAuthority(f"{certs_dir} lacks {name}; make the run's certificates first: `dipaco certs RUN`")


def write_tokens(certs_dir: Path, tokens: Tokens) -> None:
    """Replace the token file."""
    write_key_file(certs_dir / TOKEN_FILE, tokens.text().encode(), private=True)


def _admitted_token(certs_dir: Path, now: datetime.datetime) -> tuple[str, Tokens]:
    """The token to hand out, and the tokens on file with that one admitted: nobody who was let in is shut out by it.

    It is the join file's, unless that one has been replaced and has ended.
    """
    path = certs_dir / JOIN_FILE
    token = JoinFile.read(path).token if path.is_file() else new_token()
    tokens = _tokens_on_file(certs_dir)
    if tokens is None:
        return token, Tokens(token_sha256(token))
    if tokens.standing(token, now.timestamp()) == "ended":
        token = new_token()
    return token, tokens.announced(token)


def _tokens_on_file(certs_dir: Path) -> Tokens | None:
    """None where there is no token file yet."""
    path = certs_dir / TOKEN_FILE
    return Tokens.parse(path.read_text(encoding="ascii", errors="replace")) if path.is_file() else None


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
    subject: str, key: ec.EllipticCurvePrivateKey, now: datetime.datetime, expires: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(CA_COMMON_NAME))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(expires)
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
        _builder(CA_COMMON_NAME, key, now, now + datetime.timedelta(days=CA_VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    authority = Identity(certificate, key)
    write_key_file(certs_dir / CA_KEY_FILE, authority.key_pem, private=True)
    write_key_file(certs_dir / CA_CERTIFICATE_FILE, authority.certificate_pem)
    return authority


def _authority_to_renew_with(certs_dir: Path, now: datetime.datetime) -> Identity | None:
    """The run's CA where there is one that outlives a new certificate of the coordinator, else None."""
    if not ((certs_dir / CA_CERTIFICATE_FILE).is_file() and (certs_dir / CA_KEY_FILE).is_file()):
        return None
    authority = load_authority(certs_dir)
    left = authority.certificate.not_valid_after_utc - now
    return authority if left >= datetime.timedelta(days=SERVER_VALID_DAYS) else None


def load_authority(certs_dir: Path) -> Identity:
    """The run's CA."""
    certificate = x509.load_pem_x509_certificate((certs_dir / CA_CERTIFICATE_FILE).read_bytes())
    key = serialization.load_pem_private_key((certs_dir / CA_KEY_FILE).read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return Identity(certificate, key)


def issue(
    authority: Identity,
    name: str,
    now: datetime.datetime,
    expires: datetime.datetime,
    server_names: Sequence[x509.GeneralName] = (),
) -> Identity:
    """A certificate of the CA: a server's under `server_names`, and without them one that only a client may show."""
    key = ec.generate_private_key(ec.SECP256R1())
    authority_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    usage = ExtendedKeyUsageOID.SERVER_AUTH if server_names else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = (
        _builder(name, key, now, expires)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(authority_key, critical=False)
    )
    if server_names:
        builder = builder.add_extension(x509.SubjectAlternativeName(server_names), critical=False)
    return Identity(builder.sign(authority.key, hashes.SHA256()), key)
