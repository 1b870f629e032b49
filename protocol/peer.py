"""Who calls: the client certificate that TLS has verified on the connection of a call, if there is one.

Nothing here is checked again: gRPC lets a connection through only when the certificate is signed by the CA that the
server was given. Whether the certificate may still be used is the business of protocol.admission.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cryptography import x509
from cryptography.x509.oid import NameOID

_CERTIFICATE_KEY = "x509_pem_cert"


@dataclass(frozen=True, slots=True)
class Peer:
    """The name that a certificate was issued for, its serial number in hex, and when it ends (UTC)."""

    name: str
    serial: str
    expires: datetime.datetime


def peer_of(context: Any) -> Peer | None:
    """The peer of a call, from its servicer context; None where the connection carries no client certificate."""
    found = context.auth_context().get(_CERTIFICATE_KEY)
    return peer_of_certificate(bytes(next(iter(found)))) if found else None


def certified_name(context: Any) -> str:
    """The name in the certificate of a call's peer; empty where there is none."""
    peer = peer_of(context)
    return "" if peer is None else peer.name


@lru_cache(maxsize=4096)
def peer_of_certificate(pem: bytes) -> Peer:
    """The peer that a PEM certificate names."""
    certificate = x509.load_pem_x509_certificate(pem)
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    name = str(names[0].value) if names else ""
    return Peer(name, serial_text(certificate.serial_number), certificate.not_valid_after_utc)


def serial_text(number: int) -> str:
    """A serial number as people and files write it: lower-case hex."""
    return f"{number:x}"
