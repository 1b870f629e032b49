"""`dipaco certs`: the keys of a run whose workers are on other machines."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from dipaco.commands.options import Json, Run


def certs(
    run: Run,
    host: Annotated[
        list[str] | None, typer.Option(help="Name or IP address of the coordinator's machine; may be repeated.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="HOST:PORT of the coordinator, noted in the join file.")] = None,
    as_json: Json = False,
) -> None:
    """Make the certificates and the join file of a run.

    Writes a CA, the coordinator's certificate and the one small file that workers on other machines need.
    """
    import socket

    from protocol.address import parse_address
    from protocol.certificates import write_certificates
    from protocol.security import CERTS_DIR, JOIN_FILE

    hosts = [*(host or []), socket.gethostname()]
    if address is not None:
        hosts.insert(0, parse_address(address).host)
    directory = run / CERTS_DIR
    write_certificates(directory, hosts, address=address)
    join = directory / JOIN_FILE
    if as_json:
        typer.echo(json.dumps({"certs": str(directory), "join": str(join), "hosts": list(dict.fromkeys(hosts))}))
        return
    typer.echo(f"certificates for {', '.join(dict.fromkeys(hosts))} are in {directory}")
    typer.echo(f"copy {join} to every worker and keep it secret: who has it may take part in the run")
    typer.echo(f"there: dipaco worker {address or 'HOST:PORT'} --join {JOIN_FILE}")
