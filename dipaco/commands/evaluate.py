"""`dipaco evaluate`: the perplexities of a run, computed again from its directory, or on other text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dipaco.commands.options import Json, Run, Split, VersionName


def evaluate(
    run: Run,
    data: Annotated[
        Path | None, typer.Option(help="Text to measure instead of the run's held-out split (.jsonl, .parquet, .txt).")
    ] = None,
    split: Split = None,
    route: Annotated[
        list[str] | None,
        typer.Option(
            help="sequence, every:W, router:W, likelihood:W, ensemble:N, oracle:sequence, oracle:every:W or path:I.J "
            "(W tokens, N paths); may be repeated."
        ),
    ] = None,
    version: VersionName = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity of a run again, or on other text.

    Without options it computes the numbers of the run's own report anew from the run directory.
    """
    from coordinator.snapshot import RunSnapshot
    from dipaco.early_stopping import version_named
    from dipaco.evaluation import evaluate_run

    with RunSnapshot.held(run) as snapshot:
        versions = None if version is None else [version_named(version)]
        found = evaluate_run(snapshot, data=data, split=split, routes=route, versions=versions)
    if as_json:
        typer.echo(json.dumps(found))
        return
    from rich.console import Console

    from dipaco.table import evaluation_table

    Console().print(evaluation_table(found))
