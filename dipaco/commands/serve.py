"""`dipaco serve`: a run behind HTTP (OpenAI-compatible) and gRPC."""

from __future__ import annotations

from typing import Annotated

import typer

from dipaco.commands.doors import (
    ApiKeyFile,
    DrainSeconds,
    HttpAddress,
    MaxTokens,
    ModelName,
    OpenToAll,
    TlsCert,
    TlsKey,
    doors_of,
    say,
    serving_imports,
)
from dipaco.commands.options import Run, VersionName


def serve(
    run: Run,
    http: HttpAddress = "127.0.0.1:8000",
    grpc: Annotated[str | None, typer.Option(help="HOST:PORT of a gRPC server beside it.")] = None,
    name: ModelName = None,
    memory: Annotated[str, typer.Option(help="Bytes of modules in memory, such as 512MiB or 2GiB.")] = "2GiB",
    api_key_file: ApiKeyFile = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    insecure: OpenToAll = False,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a prompt at most; one sequence by default, of longer ones the newest half "
            "and more is read.",
        ),
    ] = None,
    max_tokens: MaxTokens = None,
    max_running: Annotated[int, typer.Option(min=1, help="Texts that are written at a time.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=0, help="Texts that wait for a place; more are refused.")] = 64,
    drain_s: DrainSeconds = None,
    version: VersionName = None,
) -> None:
    """Answer requests with one path at a time, over the OpenAI API and gRPC.

    Also of a run that is still training: it reads only, and takes up newer snapshots as they are complete. It ends
    when it gets SIGTERM or Ctrl-C and the open answers are written; a second one ends it at once. Exit code 0: every
    request was answered; 3: answers were cut off.
    """
    from dipaco.early_stopping import version_named
    from dipaco.ending import UNFINISHED, say_wrong
    from dipaco.sizes import parse_bytes

    doors = doors_of(http, api_key_file, tls_cert, tls_key, insecure, grpc)
    with serving_imports():
        from dipaco.serving import Offer, serve_run
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
    if not serve_run(run, doors, offer, say):
        say_wrong("answers were cut off")
        raise typer.Exit(UNFINISHED)
