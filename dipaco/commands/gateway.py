"""`dipaco gateway`: the router alone, in front of other engines that serve the paths."""

from __future__ import annotations

from pathlib import Path
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


def gateway(
    router: Annotated[
        Path, typer.Argument(metavar="ROUTER", help="Folder of `dipaco export --router` (or a run): who chooses.")
    ],
    config: Annotated[
        Path | None, typer.Option(help="YAML file that says where each path is served, with which key.")
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH=MODEL@URL", help="One path's backend, without a key. May be repeated."),
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Some paths have no backend: their texts go to the next best path.")
    ] = False,
    http: HttpAddress = "127.0.0.1:8000",
    name: ModelName = None,
    api_key_file: ApiKeyFile = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    insecure: OpenToAll = False,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a prompt at most; one sequence by default.")
    ] = None,
    max_tokens: MaxTokens = None,
    max_running: Annotated[int, typer.Option(min=1, help="Requests at a time; more are refused.")] = 64,
    drain_s: DrainSeconds = None,
) -> None:
    """Route prompts to paths that other engines serve, over the OpenAI API.

    Each path lives behind a URL of its own: vLLM, llama.cpp's server, Ollama, `dipaco serve`. The router chooses the
    path of a prompt, its backend's answer is passed on as it is written, and where it is down the next best path
    answers. Ends as `dipaco serve` does. Exit code 0: every request was answered; 3: answers were cut off.
    """
    from dipaco.ending import UNFINISHED, say_wrong

    doors = doors_of(http, api_key_file, tls_cert, tls_key, insecure, grpc=None)
    with serving_imports():
        from dipaco.gateway import GatewayOffer, run_gateway
    offer = GatewayOffer(
        config=config,
        backends=tuple(backend or ()),
        partial=partial,
        name=name,
        prompt_tokens=max_prompt_tokens,
        new_tokens=max_tokens,
        running=max_running,
        drain_s=drain_s,
    )
    if not run_gateway(router, doors, offer, say):
        say_wrong("answers were cut off")
        raise typer.Exit(UNFINISHED)
