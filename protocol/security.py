"""How a server proves itself and whom it lets in: its certificate, and the SHA-256 of the run's token.

The token has 256 random bits, so that a plain hash does not give it away; it is compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from pathlib import Path

# The name that every coordinator's certificate carries beside its hosts.
COORDINATOR_NAME = "dipaco-coordinator"
CERTS_DIR = "certs"
CERTIFICATE_FILE, KEY_FILE = "server.pem", "server.key"
TOKEN_FILE, JOIN_FILE = "token.sha256", "join.json"
SCHEME = "Bearer "


class IncompleteCertificates(ValueError):
    """A certs directory that lacks files."""


@dataclass(frozen=True, slots=True)
class ServerSecurity:
    """PEM certificate and key of the server, and the hex SHA-256 of the token that callers must present."""

    certificate_pem: bytes
    key_pem: bytes = field(repr=False)
    token_sha256: str = field(repr=False)

    def admits(self, authorization: str | bytes) -> bool:
        """Whether the value of a call's `authorization` metadata is `Bearer` and the run's token."""
        text = authorization if isinstance(authorization, str) else authorization.decode("latin-1")
        if not text.startswith(SCHEME):
            return False
        presented = hashlib.sha256(text.removeprefix(SCHEME).encode()).hexdigest()
        return hmac.compare_digest(presented.encode(), self.token_sha256.encode())


def load_security(run_dir: Path) -> ServerSecurity | None:
    """What RUN/certs holds for the server; None where the run has no certificates. Raises IncompleteCertificates."""
    certs_dir = run_dir / CERTS_DIR
    if not certs_dir.is_dir():
        return None
    for name in (CERTIFICATE_FILE, KEY_FILE, TOKEN_FILE):
        if not (certs_dir / name).is_file():
            raise IncompleteCertificates(f"{certs_dir} lacks {name}; run `dipaco certs {run_dir}` again")
    return ServerSecurity(
        certificate_pem=(certs_dir / CERTIFICATE_FILE).read_bytes(),
        key_pem=(certs_dir / KEY_FILE).read_bytes(),
        token_sha256=(certs_dir / TOKEN_FILE).read_text(encoding="ascii").strip(),
    )
