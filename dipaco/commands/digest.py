"""`dipaco digest`: one hash of all module weights of a run, to compare runs by."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from dipaco.commands.options import Json, Run


def digest(
    run: Run,
    everything: Annotated[
        bool,
        typer.Option(
            "--all", help="Also outer and inner states, router, shard manifests, token and loss sums of tasks."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Print one hash of all module weights."""
    from coordinator.snapshot import RunSnapshot
    from dipaco.run_digest import run_digest

    with RunSnapshot.held(run) as snapshot:
        found = run_digest(snapshot, everything=everything)
    if as_json:
        typer.echo(json.dumps({"run": snapshot.config.name, "digest": found, "all": everything}))
    else:
        typer.echo(found)
