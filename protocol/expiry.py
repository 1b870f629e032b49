"""How long certificates still last: said before they end, and in one clear sentence when they have."""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from protocol.joinfile import JoinFile

WARN_DAYS = 30


class CertificateEnded(ValueError):
    """A certificate that is over, or that its CA did not issue."""


def check_join_file(join: JoinFile, now: datetime.datetime) -> list[str]:
    """Sentences on certificates of a join file that are near their end; raises CertificateEnded."""
    remarks = _remarks(join.ca_pem, "the CA in the join file", "get the run's newest join file", now)
    if join.certificate_pem is not None:
        name = "this worker's certificate"
        remarks += _remarks(
            join.certificate_pem, name, "get a new join file (`dipaco certs RUN --worker NAME` issues it)", now
        )
        _check_issuer(join.certificate_pem, join.ca_pem)
    return remarks


def check_server(certificate_pem: bytes, ca_pem: bytes, now: datetime.datetime) -> list[str]:
    """Sentences on the coordinator's certificates that are near their end; raises CertificateEnded."""
    remedy = "renew it with `dipaco certs RUN` and start the coordinator again"
    remarks = _remarks(certificate_pem.decode(), "the coordinator's certificate", remedy, now)
    return remarks + _remarks(
        ca_pem.decode(),
        "the run's CA",
        "`dipaco certs RUN` makes a new one; every worker then needs a new join file",
        now,
    )


def _remarks(pem: str, what: str, remedy: str, now: datetime.datetime) -> list[str]:
    expires = x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc
    if now >= expires:
        raise CertificateEnded(f"{what} ended on {expires:%Y-%m-%d %H:%M} UTC; {remedy}")
    left = expires - now
    if left > datetime.timedelta(days=WARN_DAYS):
        return []
    return [f"{what} ends in {left.days} days, on {expires:%Y-%m-%d %H:%M} UTC; {remedy}"]


def _check_issuer(certificate_pem: str, ca_pem: str) -> None:
    try:
        x509.load_pem_x509_certificate(certificate_pem.encode()).verify_directly_issued_by(
            x509.load_pem_x509_certificate(ca_pem.encode())
        )
    except (InvalidSignature, ValueError):
        raise CertificateEnded(
            "this worker's certificate was not issued by the CA in its join file; get a new join file "
            "(`dipaco certs RUN --worker NAME` issues it)"
        ) from None
