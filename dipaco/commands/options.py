"""Arguments and options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file of the run, such as configs/quickstart.yaml.")
]
RunDir = Annotated[Path | None, typer.Option(help="Where the run is kept; runs/<config name> by default.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, such as runs/quickstart.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Split = Annotated[
    str | None, typer.Option(help="validation or test: the held-out split; the run's evaluation.split by default.")
]
VersionName = Annotated[
    str | None,
    typer.Option("--version", help="Of every path: last, or best (where the run has experiment.early_stopping)."),
]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="No TLS and no token, even off loopback: anyone who can connect can take part."),
]
Reuse = Annotated[
    Path | None,
    typer.Option(
        help="Folder that keeps results of tasks: one that was computed before, in this run or in another that shares "
        "its beginning, is not computed again. Outputs of at most execution.cache_bytes; may be shared, and deleted."
    ),
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Before it goes on, read every blob again and hold it against its digest.")
]
Log = Annotated[str | None, typer.Option(hidden=True, help="FILE:BYTES:FILES of the log that standard output is.")]
Parent = Annotated[int | None, typer.Option(hidden=True, help="Leave when the process of this id is gone.")]
