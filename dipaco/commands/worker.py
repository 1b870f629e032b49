"""`dipaco worker`: this machine takes part in a run; all it needs is the coordinator's address and its join file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dipaco.commands.options import Insecure, Log, Parent, Reuse


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
    grace_s: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds that this machine leaves after SIGTERM; execution.grace_s by default."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name shown to people; host and process id by default.")] = None,
    reuse: Reuse = None,
    insecure: Insecure = False,
    parent: Parent = None,
    log: Log = None,
) -> None:
    """Take part in a run until it is finished.

    Waits for a coordinator that is not there yet, and says so. Needs no file of the run but the join file.
    After SIGTERM it finishes a task that is nearly done, or hands over what it has, for another worker to go on from.
    """
    from dipaco.asking import address_to_ask
    from dipaco.cores import usable_cores
    from dipaco.own_log import rotate_own_output, rotation
    from dipaco.parent import stop_without
    from worker.loop import run_worker

    if parent is not None:
        stop_without(parent)
    if log is not None:
        rotate_own_output(*rotation(log))
    code = run_worker(
        address=address_to_ask(address, join),
        join=join,
        cache_dir=cache_dir.expanduser(),
        threads=threads or usable_cores(),
        name=name,
        memory_bytes=memory_bytes,
        insecure=insecure,
        grace_s=grace_s,
        reuse=None if reuse is None else reuse.expanduser(),
    )
    raise typer.Exit(code)
