"""A run's workers and their certificates: issue one for a machine, revoke one, list them.

Each certificate comes in a join file of its own. It names the worker, so that what one machine does wrong can be held
against it, and so that it can be shut out without touching the others.
"""

from __future__ import annotations

import datetime
import re
from pathlib import Path

from protocol.certificates import check_made, issue, load_authority
from protocol.joinfile import JoinFile
from protocol.keyfile import one_writer, write_key_file
from protocol.peer import serial_text
from protocol.roster import NAME_PATTERN, BadRoster, IssuedCertificate, Roster
from protocol.security import JOIN_FILE, ROSTER_FILE, WORKERS_DIR

WORKER_VALID_DAYS = 365
# What `dipaco run` joins its own workers with, where certificates are required.
LOCAL_NAME = "this-machine"
_RENEW = datetime.timedelta(days=90)


def issue_worker(
    certs_dir: Path,
    name: str,
    out: Path | None = None,
    *,
    address: str | None = None,
    now: datetime.datetime | None = None,
) -> tuple[Path, IssuedCertificate]:
    """Issue a certificate to the worker `name` and write its join file to RUN/certs/workers/NAME.json, and to `out`.

    The one in RUN/certs is kept in any case: a new token is put into it, and it can be copied to the machine again.
    A name may be issued to again, to renew: both certificates are valid until one ends or is revoked. Raises BadRoster
    where the name is none, NoAuthority where the run has no CA.
    """
    if not re.match(NAME_PATTERN, name):
        raise BadRoster(
            f"a worker's name is 1 to 64 letters, digits, dots, dashes and underscores, and starts with a letter or "
            f"digit, unlike {name[:80]!r}"
        )
    now = (now or datetime.datetime.now(datetime.UTC)).replace(microsecond=0)
    check_made(certs_dir)
    kept = kept_join_file(certs_dir, name)
    with one_writer(certs_dir):
        authority = load_authority(certs_dir)
        expires = min(now + datetime.timedelta(days=WORKER_VALID_DAYS), authority.certificate.not_valid_after_utc)
        worker = issue(authority, name, now, expires)
        general = JoinFile.read(certs_dir / JOIN_FILE)
        join = JoinFile(
            token=general.token,
            ca_pem=authority.certificate_pem.decode(),
            address=address or general.address,
            certificate_pem=worker.certificate_pem.decode(),
            key_pem=worker.key_pem.decode(),
        )
        issued = IssuedCertificate(
            name=name, serial=serial_text(worker.certificate.serial_number), issued=now, expires=expires
        )
        roster = Roster.read(certs_dir / ROSTER_FILE).with_one_more(issued)
        write_key_file(certs_dir / ROSTER_FILE, roster.to_json().encode(), private=True)
        for path in dict.fromkeys((kept, out or kept)):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_key_file(path, join.to_json().encode(), private=True)
    return out or kept, issued


def kept_join_file(certs_dir: Path, name: str) -> Path:
    """Where the join file of a worker is kept; files of runs of older versions may have been written elsewhere only."""
    return certs_dir / WORKERS_DIR / f"{name}.json"


def admitted_machines(certs_dir: Path, now: datetime.datetime | None = None) -> tuple[str, ...]:
    """The names, other than this machine's own, that have a certificate which is neither revoked nor over."""
    now = now or datetime.datetime.now(datetime.UTC)
    found = Roster.read(certs_dir / ROSTER_FILE).certificates
    names = (each.name for each in found if each.revoked is None and each.expires > now and each.name != LOCAL_NAME)
    return tuple(dict.fromkeys(names))


def revoke(certs_dir: Path, name_or_serial: str, now: datetime.datetime | None = None) -> tuple[IssuedCertificate, ...]:
    """Revoke the certificates of a name, or the one of a serial number; returns those that were not yet. Raises
    BadRoster.
    """
    now = (now or datetime.datetime.now(datetime.UTC)).replace(microsecond=0)
    check_made(certs_dir)
    with one_writer(certs_dir):
        roster, revoked = Roster.read(certs_dir / ROSTER_FILE).with_revoked(name_or_serial, now)
        write_key_file(certs_dir / ROSTER_FILE, roster.to_json().encode(), private=True)
    return revoked


def local_join(certs_dir: Path, now: datetime.datetime | None = None) -> Path:
    """The join file of this machine's own workers, with a certificate that is issued where none will last."""
    now = now or datetime.datetime.now(datetime.UTC)
    path = kept_join_file(certs_dir, LOCAL_NAME)
    lasting = [
        each
        for each in Roster.read(certs_dir / ROSTER_FILE).certificates
        if each.name == LOCAL_NAME and each.revoked is None and each.expires - now > _RENEW
    ]
    if not (lasting and path.is_file()) or _is_outdated(path, certs_dir):
        issue_worker(certs_dir, LOCAL_NAME, now=now)
    return path


def _is_outdated(path: Path, certs_dir: Path) -> bool:
    """Whether the general join file has another token or CA by now."""
    own, general = JoinFile.read(path), JoinFile.read(certs_dir / JOIN_FILE)
    return (own.token, own.ca_pem) != (general.token, general.ca_pem)
