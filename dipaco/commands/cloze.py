"""`dipaco cloze`: how often the models of a run find the true ending of a held-out text among four."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from dipaco.commands.options import Json, Run, Split, VersionName


def cloze(
    run: Run,
    split: Split = None,
    route: Annotated[
        list[str] | None,
        typer.Option(
            help="sequence, every:W, router:W, likelihood:W, ensemble:N, oracle:sequence or path:I.J (W tokens, N "
            "paths), decided from the context alone; may be repeated."
        ),
    ] = None,
    version: VersionName = None,
    items: Annotated[int, typer.Option(min=1, help="Items at most.")] = 2000,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a context, more than the router's prefix.")] = 64,
    ending: Annotated[int, typer.Option(min=1, help="Tokens of every ending.")] = 16,
    as_json: Json = False,
) -> None:
    """Ask every model of a run which of four endings a held-out text has.

    The wrong endings stand at the same place of other documents of the same domain. The answer is the likeliest ending,
    or by gain the one that the context makes likelier by most; guessing finds one in four. Every item is the same for
    all models, and for all runs on the same corpus and tokenizer. oracle:sequence takes the path that explains the
    context best.
    """
    from coordinator.snapshot import RunSnapshot
    from dipaco.cloze import cloze_run
    from dipaco.cloze_items import ClozeForm
    from dipaco.early_stopping import version_named
    from dipaco.remarks import remarks

    versions = None if version is None else [version_named(version)]
    form = ClozeForm(items, context, ending)
    with RunSnapshot.held(run) as snapshot, remarks("reading the run") as say:
        found = cloze_run(snapshot, form, split=split, routes=route, versions=versions, say=say)
    if as_json:
        typer.echo(json.dumps(found))
        return
    from rich.console import Console

    from dipaco.cloze_table import cloze_table

    Console().print(cloze_table(found))
