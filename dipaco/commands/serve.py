"""`dipaco serve`: a run behind HTTP (OpenAI-compatible) and gRPC."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dipaco.commands.options import Run, VersionName


def serve(
    run: Run,
    http: Annotated[
        str, typer.Option(help="HOST:PORT of the HTTP server; port 0 takes a free one.")
    ] = "127.0.0.1:8000",
    grpc: Annotated[str | None, typer.Option(help="HOST:PORT of a gRPC server beside it.")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name; by default the run's.")] = None,
    memory: Annotated[str, typer.Option(help="Bytes of modules in memory, such as 512MiB or 2GiB.")] = "2GiB",
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the API keys that are admitted, one a line; followed as it changes.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file of a certificate with its chain, for TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its key.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No API key, even off loopback: anyone who can connect is answered.")
    ] = False,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a prompt at most; one sequence by default, of longer ones the newest half "
            "and more is read.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that a request may ask for at most; one sequence by default.")
    ] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Texts that are written at a time.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=0, help="Texts that wait for a place; more are refused.")] = 64,
    drain_s: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds that open answers get at the end; all they need by default.")
    ] = None,
    version: VersionName = None,
) -> None:
    """Answer requests with one path at a time, over the OpenAI API and gRPC.

    Also of a run that is still training: it reads only, and takes up newer snapshots as they are complete. It ends
    when it gets SIGTERM or Ctrl-C and the open answers are written; a second one ends it at once. Exit code 0: every
    request was answered; 3: answers were cut off.
    """
    from dipaco.early_stopping import version_named
    from dipaco.ending import UNFINISHED, Refused, say_wrong
    from dipaco.sizes import parse_bytes

    if (tls_cert is None) != (tls_key is None):
        raise Refused("--tls-cert and --tls-key belong together; give both")
    try:
        from dipaco.serving import Offer, serve_run
        from inference.api_keys import ApiKeys
        from inference.server import Doors, Tls
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "prometheus_client"):
            raise
        raise Refused(
            f"{error.name} is not installed; install dipaco with its extra: pip install 'dipaco[serve]'"
        ) from None
    doors = Doors(
        http=http,
        grpc=grpc,
        keys=None if api_key_file is None else ApiKeys(api_key_file),
        tls=None if tls_cert is None or tls_key is None else Tls(tls_cert, tls_key),
        insecure=insecure,
    )
    offer = Offer(
        name=name,
        version=version_named(version or "last"),
        memory_bytes=parse_bytes(memory),
        prompt_tokens=max_prompt_tokens,
        new_tokens=max_tokens,
        running=max_running,
        waiting=max_waiting,
        drain_s=drain_s,
    )
    if not serve_run(run, doors, offer, _say):
        say_wrong("answers were cut off")
        raise typer.Exit(UNFINISHED)


def _say(line: str) -> None:
    """A log that cannot be written ends no server."""
    from contextlib import suppress

    with suppress(OSError):
        print(line, flush=True)
