"""`dipaco worker`: this machine takes part in a run; all it needs is the coordinator's address and its join file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dipaco.commands.options import Insecure, Parent


def worker(
    address: Annotated[
        str | None,
        typer.Argument(
            metavar="ADDR", help="HOST:PORT of the coordinator; the join file's by default.", show_default=False
        ),
    ] = None,
    join: Annotated[Path | None, typer.Option(help="Join file made by `dipaco certs` (token and CA).")] = None,
    cache_dir: Annotated[Path, typer.Option(help="Folder for fetched blobs; may be deleted at any time.")] = Path(
        "~/.cache/dipaco"
    ),
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads to offer; all cores it may use by default.")
    ] = None,
    memory_bytes: Annotated[
        int | None, typer.Option(min=1, help="Memory to offer, in bytes; what is free by default.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name shown to people; host and process id by default.")] = None,
    insecure: Insecure = False,
    parent: Parent = None,
) -> None:
    """Take part in a run until it is finished.

    Waits for a coordinator that is not there yet, and says so. Needs no file of the run but the join file.
    """
    from dipaco.asking import address_to_ask
    from dipaco.cores import usable_cores
    from dipaco.parent import stop_without
    from worker.loop import run_worker

    if parent is not None:
        stop_without(parent)
    code = run_worker(
        address=address_to_ask(address, join),
        join=join,
        cache_dir=cache_dir.expanduser(),
        threads=threads or usable_cores(),
        name=name,
        memory_bytes=memory_bytes,
        insecure=insecure,
    )
    raise typer.Exit(code)
