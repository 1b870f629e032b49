"""`dipaco corpus`: a look at the text a run learns from, before or after it was built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dipaco.commands.options import Json


def corpus(
    where: Annotated[Path, typer.Argument(metavar="CONFIG|RUN", help="YAML file of a run, or a run directory.")],
    samples: Annotated[int, typer.Option(min=0, help="Documents to show the beginning of.")] = 3,
    domain: Annotated[str | None, typer.Option(help="Take the samples from this domain.")] = None,
    as_json: Json = False,
) -> None:
    """Look at a corpus: its sizes and some documents."""
    from dataclasses import asdict

    from dipaco.corpus_view import look

    summary, documents = look(where, samples=samples, domain=domain)
    if as_json:
        shown = [asdict(document) for document in documents]
        typer.echo(json.dumps({**asdict(summary), "samples": shown}, ensure_ascii=False))
        return
    from rich.console import Console

    from dipaco.corpus_view import sample_text, summary_table

    console = Console()
    console.print(summary_table(summary))
    for document in documents:
        console.print(sample_text(document))
