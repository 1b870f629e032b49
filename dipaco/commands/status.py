"""`dipaco status`: what a run is doing, asked of its coordinator or read from its directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dipaco.commands.options import Insecure, Json


def status(
    where: Annotated[str, typer.Argument(metavar="ADDR|RUN", help="HOST:PORT of a coordinator, or a run directory.")],
    join: Annotated[Path | None, typer.Option(help="Join file, where the coordinator is on another machine.")] = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Show stages, workers, losses and bytes moved of a run."""
    answer = _read(Path(where)) if Path(where).is_dir() or ":" not in where else _ask(where, join, insecure)
    if as_json:
        typer.echo(json.dumps(answer))
        return
    from rich.console import Console

    from dipaco.progress import panel

    Console().print(panel(answer))


def _read(run_dir: Path) -> dict[str, Any]:
    from coordinator.snapshot import RunSnapshot

    return RunSnapshot.open(run_dir).status()


def _ask(address: str, join: Path | None, insecure: bool) -> dict[str, Any]:
    from dipaco.asking import ask_status

    return ask_status(address, join=join, insecure=insecure, patience_s=5.0)
