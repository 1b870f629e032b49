"""`dipaco generate`: text from a run, each prompt answered by the path that the router picks for it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from dipaco.commands.options import Json, Run, VersionName


def generate(
    run: Run,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be repeated.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 80,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample among so many likeliest tokens.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    every: Annotated[int | None, typer.Option(min=1, help="Route again after every so many tokens.")] = None,
    path: Annotated[str | None, typer.Option(help="Use this path (like 0.1) instead of routing.")] = None,
    route: Annotated[
        str | None, typer.Option(help="sequence, every:W (as --every W) or router:W: the router LM, every W tokens.")
    ] = None,
    version: VersionName = None,
    as_json: Json = False,
) -> None:
    """Continue prompts, and show the paths they took.

    A line like `path 0.1 > 1.0` stands above each text: path 0.1 (of two levels: module 0, then module 1) wrote
    its beginning; after a later look of the router (--every) path 1.0 wrote the rest.

    Without a prompt it continues one example of every kind of text in the embedded corpus.
    """
    from coordinator.snapshot import RunSnapshot
    from dipaco.early_stopping import version_named
    from dipaco.examples import EXAMPLE_PROMPTS, Wish, continuations
    from inference.sampling import Sampling

    prompts = prompt or list(EXAMPLE_PROMPTS.values())
    sampling = Sampling(temperature, top_k, seed=seed)
    wish = Wish(tokens, sampling, every=every, path=path, version=version_named(version or "last"))
    if route is not None:
        wish = wish.routed(route)
    with RunSnapshot.held(run) as snapshot:
        if as_json:
            typer.echo(json.dumps([each.as_dict() for each in continuations(snapshot, prompts, wish)]))
            return
        from rich.console import Console

        from dipaco.table import example_text

        console = Console()
        for each in continuations(snapshot, prompts, wish):
            console.print(example_text(each), soft_wrap=True)
