"""`dipaco certs`: the keys of a run whose workers are on other machines, and who of them is let in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dipaco.commands.options import Json, Run

if TYPE_CHECKING:
    from protocol.roster import IssuedCertificate


def certs(
    run: Run,
    host: Annotated[
        list[str] | None, typer.Option(help="Name or IP address of the coordinator's machine; may be repeated.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="HOST:PORT of the coordinator, noted in the join file.")] = None,
    worker: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Issue a certificate of its own to one machine, in a join file of its own."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --worker: where to write the file beside RUN/certs/workers/NAME.json.")
    ] = None,
    list_issued: Annotated[bool, typer.Option("--list", help="Show the certificates issued to workers.")] = False,
    revoke: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|SERIAL", help="Shut out the certificates of a name, or one; a running coordinator follows."
        ),
    ] = None,
    rotate_token: Annotated[
        bool, typer.Option("--rotate-token", help="Give the run a new token, also while it is running.")
    ] = False,
    overlap_s: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="With --rotate-token: seconds for which the old token still admits, and is exchanged for the new one "
            "by running workers; 600 by default. After a leak: 0.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make the certificates and the join file of a run, or change who is let in.

    Without --worker, --list, --revoke or --rotate-token it writes a CA, the coordinator's certificate and the one small
    file that workers on other machines need; given again, it renews the coordinator's certificate and keeps the rest.
    Where execution.require_worker_certificates is true, every worker needs a file made with --worker. A running
    coordinator follows --revoke and --rotate-token within seconds.
    """
    from dipaco.ending import Refused
    from protocol.security import CERTS_DIR

    directory = run / CERTS_DIR
    actions = {
        "--worker": worker is not None,
        "--list": list_issued,
        "--revoke": revoke is not None,
        "--rotate-token": rotate_token,
    }
    chosen = [flag for flag, given in actions.items() if given]
    if len(chosen) > 1:
        raise Refused(f"{' and '.join(chosen)} are different things to do; give one of them at a time")
    for flag, given, needed in (("--out", out, "--worker"), ("--overlap-s", overlap_s, "--rotate-token")):
        if given is not None and chosen != [needed]:
            raise Refused(f"{flag} belongs to {needed}")
    if host and chosen:
        raise Refused(f"--host names the coordinator's certificate and {chosen[0]} does not make one")
    if worker is not None:
        told, lines = _issue(directory, worker, out, address)
    elif list_issued:
        told, lines = _list(directory)
    elif revoke is not None:
        told, lines = _revoke(directory, revoke)
    elif rotate_token:
        told, lines = _rotate(directory, 600.0 if overlap_s is None else overlap_s)
    else:
        told, lines = _make(directory, host or [], address)
    for line in [json.dumps(told)] if as_json else lines:
        typer.echo(line)


def _make(directory: Path, host: list[str], address: str | None) -> tuple[Any, list[str]]:
    import socket

    from protocol.address import parse_address
    from protocol.certificates import write_certificates
    from protocol.joinfile import JoinFile
    from protocol.security import JOIN_FILE

    hosts = [*host, socket.gethostname()]
    if address is not None:
        hosts.insert(0, parse_address(address).host)
    join = directory / JOIN_FILE
    before = JoinFile.read(join).ca_pem if join.is_file() else None
    made = write_certificates(directory, hosts, address=address)
    hosts = list(dict.fromkeys(hosts))
    told = [] if before in (None, made.ca_pem) else ["the CA is new: issue a new join file to every worker"]
    return {"certs": str(directory), "join": str(join), "hosts": hosts}, [
        f"certificates for {', '.join(hosts)} are in {directory}",
        f"copy {join} to every worker and keep it secret: who has it may take part in the run",
        f"there: dipaco worker {address or 'HOST:PORT'} --join {JOIN_FILE}",
        *told,
    ]


def _issue(directory: Path, worker: str, out: Path | None, address: str | None) -> tuple[Any, list[str]]:
    from protocol.address import parse_address
    from protocol.enrolment import issue_worker
    from protocol.joinfile import JoinFile

    if address is not None:
        parse_address(address)
    path, issued = issue_worker(directory, worker, out, address=address)
    where = "" if JoinFile.read(path).address else "HOST:PORT "
    return {**_entry(issued), "join": str(path)}, [
        f"certificate {issued.serial} for {worker}, until {issued.expires:%Y-%m-%d}, is in {path}",
        f"copy it to that machine alone and keep it secret; there: dipaco worker {where}--join {path.name}",
    ]


def _list(directory: Path) -> tuple[Any, list[str]]:
    import datetime

    from protocol.certificates import check_made
    from protocol.roster import Roster
    from protocol.security import ROSTER_FILE

    check_made(directory)
    found = Roster.read(directory / ROSTER_FILE).certificates
    now = datetime.datetime.now(datetime.UTC)
    lines = ["no certificate was issued to a worker yet"] if not found else []
    for each in found:
        over = f"expired {each.expires:%Y-%m-%d}" if now >= each.expires else f"expires {each.expires:%Y-%m-%d}"
        revoked = f"revoked {each.revoked:%Y-%m-%d %H:%M}" if each.revoked else "valid" if now < each.expires else ""
        lines.append(f"{each.name:<20} {each.serial:<40} issued {each.issued:%Y-%m-%d}  {over}  {revoked}".rstrip())
    return [_entry(each) for each in found], lines


def _revoke(directory: Path, wanted: str) -> tuple[Any, list[str]]:
    from protocol.enrolment import revoke

    found = revoke(directory, wanted)
    lines = [f"revoked {each.name} (serial {each.serial}); a running coordinator refuses it now" for each in found]
    return [_entry(each) for each in found], lines or [f"{wanted} was revoked already"]


def _rotate(directory: Path, overlap_s: float) -> tuple[Any, list[str]]:
    from protocol.certificates import rotate_token
    from protocol.enrolment import admitted_machines, kept_join_file
    from protocol.security import JOIN_FILE

    files = {name: kept_join_file(directory, name) for name in admitted_machines(directory)}
    rotate_token(directory, overlap_s)
    join = directory / JOIN_FILE
    kept = {name: str(path) for name, path in files.items() if path.is_file()}
    lost = [name for name in files if name not in kept]
    lines = [
        f"the new token is in {join}",
        f"the old token admits for {overlap_s:g} s more, in which running workers take over the new one by themselves"
        if overlap_s
        else "the old token admits nobody any more: copy the file to every worker that is to go on",
    ]
    if kept:
        lines.append("machines with a file of their own need that one: " + ", ".join(kept.values()))
    lines += [
        f"the file of {name} is not kept here; make it a new one: `dipaco certs RUN --worker {name}`" for name in lost
    ]
    return {"join": str(join), "overlap_s": overlap_s, "workers": kept, "without_file": lost}, lines


def _entry(certificate: IssuedCertificate) -> dict[str, Any]:
    return certificate.model_dump(mode="json")
