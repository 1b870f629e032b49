"""`dipaco backup`: a copy of a run that may be going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dipaco.commands.options import Json, Run


def backup(
    run: Run,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder of the copy: a new one, or that of an earlier backup.")
    ],
    as_json: Json = False,
) -> None:
    """Copy a run, also while it goes on.

    OUT is a run directory: it can be evaluated, and `dipaco run CONFIG --run-dir OUT` goes on from it. Given again, it
    takes over what is new and lets go of what is not needed; if it is cut short, OUT stays the copy that it was. On
    the same file system files are linked and take no room of their own: for another disk, give a folder there.
    """
    from dataclasses import asdict

    from coordinator.backup import back_up
    from dipaco.backup_progress import BackupProgress
    from dipaco.ending import no_room_at

    with BackupProgress() as progress, no_room_at(out):
        made = back_up(run, out, progress)
    if as_json:
        typer.echo(json.dumps(asdict(made)))
        return
    how = "linked" if made.linked else "copied"
    typer.echo(
        f"{made.out} holds {made.run} with {made.tasks} tasks done and {made.steps} inner steps in the weights: "
        f"{made.blobs} blobs, {made.bytes / 1e6:,.1f} MB ({made.new_blobs} of them new, {made.new_bytes / 1e6:,.1f} MB "
        f"{how}; {made.removed_blobs} not needed any more)"
    )
