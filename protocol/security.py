"""How a server proves itself and whom it lets in, as read from RUN/certs: certificate, CA, tokens, revocations.

What may change while a run goes on (tokens, revocations) is read again by a `Gate`; the certificate is read once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from protocol.admission import Admission
from protocol.joinfile import BadJoinFile, JoinFile
from protocol.peer import Peer
from protocol.roster import BadRoster, Roster
from protocol.tokens import BadTokenFile, Tokens, token_sha256

logger = logging.getLogger(__name__)

# The name that every coordinator's certificate carries beside its hosts.
COORDINATOR_NAME = "dipaco-coordinator"
CERTS_DIR = "certs"
CERTIFICATE_FILE, KEY_FILE = "server.pem", "server.key"
CA_CERTIFICATE_FILE, CA_KEY_FILE = "ca.pem", "ca.key"
TOKEN_FILE, JOIN_FILE = "token.sha256", "join.json"
ROSTER_FILE, WORKERS_DIR = "workers.json", "workers"
# How often, at most, files are looked at for changes while calls come in.
RELOAD_S = 1.0
_CHANGING = (TOKEN_FILE, JOIN_FILE, ROSTER_FILE)


class IncompleteCertificates(ValueError):
    """A certs directory that lacks files."""


@dataclass(frozen=True, slots=True)
class ServerSecurity:
    """PEM certificate and key of the server, the CA of its workers' certificates, and who is admitted at first.

    With `certs_dir`, admission follows the files there.
    """

    certificate_pem: bytes
    key_pem: bytes = field(repr=False)
    ca_pem: bytes
    admission: Admission
    certs_dir: Path | None = None

    @property
    def require_certificates(self) -> bool:
        return self.admission.require_certificates


def load_security(run_dir: Path, *, require_certificates: bool = False) -> ServerSecurity | None:
    """What RUN/certs holds for the server; None where the run has no certificates.

    Raises IncompleteCertificates, also where workers' certificates are required and the run has none of its own.
    """
    certs_dir = run_dir / CERTS_DIR
    if not certs_dir.is_dir():
        if require_certificates:
            raise IncompleteCertificates(
                f"execution.require_worker_certificates is true and {run_dir} has no certificates; make them with "
                f"`dipaco certs {run_dir}` first"
            )
        return None
    for name in (CERTIFICATE_FILE, KEY_FILE, TOKEN_FILE, CA_CERTIFICATE_FILE):
        if not (certs_dir / name).is_file():
            raise IncompleteCertificates(f"{certs_dir} lacks {name}; run `dipaco certs {run_dir}` again")
    return ServerSecurity(
        certificate_pem=(certs_dir / CERTIFICATE_FILE).read_bytes(),
        key_pem=(certs_dir / KEY_FILE).read_bytes(),
        ca_pem=(certs_dir / CA_CERTIFICATE_FILE).read_bytes(),
        admission=_read_admission(certs_dir, require_certificates),
        certs_dir=certs_dir,
    )


def _read_admission(certs_dir: Path, require_certificates: bool) -> Admission:
    """Raises BadTokenFile, BadRoster, OSError. The new token is known only where the join file lies beside."""
    tokens = Tokens.parse((certs_dir / TOKEN_FILE).read_text(encoding="ascii"))
    try:
        newest = JoinFile.read(certs_dir / JOIN_FILE).token
    except BadJoinFile:
        newest = ""
    return Admission(
        tokens=tokens,
        newest_token=newest if token_sha256(newest) == tokens.current else "",
        revoked=Roster.read(certs_dir / ROSTER_FILE).revoked(),
        require_certificates=require_certificates,
    )


class Gate:
    """Checks calls by the newest tokens and revocations. For one event loop: it reads small files that changed."""

    def __init__(self, security: ServerSecurity, clock: Callable[[], float] = time.monotonic) -> None:
        self._admission = security.admission
        self._certs_dir = security.certs_dir
        self._clock = clock
        self._seen = self._signature()
        self._look_at_s = clock() + RELOAD_S

    def check(self, authorization: str | bytes, peer: Peer | None) -> str:
        """`Admission.check` as of now."""
        self._follow_the_files()
        return self._admission.check(authorization, peer, time.time())

    def _follow_the_files(self) -> None:
        if self._certs_dir is None or self._clock() < self._look_at_s:
            return
        self._look_at_s = self._clock() + RELOAD_S
        signature = self._signature()
        if signature == self._seen:
            return
        self._seen, before = signature, self._seen
        try:
            if before[-1] is not None and signature[-1] is None:
                raise BadRoster(f"{ROSTER_FILE} is gone")
            self._admission = _read_admission(self._certs_dir, self._admission.require_certificates)
        except (BadTokenFile, BadRoster, OSError, UnicodeDecodeError) as error:
            logger.error("the tokens and revocations in %s stay as they were: %s", self._certs_dir, error)

    def _signature(self) -> tuple[object, ...]:
        return () if self._certs_dir is None else tuple(_stamp(self._certs_dir / name) for name in _CHANGING)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
