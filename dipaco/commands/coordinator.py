"""`dipaco coordinator`: the control plane of one run, for workers on any machine."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from dipaco.commands.options import ConfigFile, Insecure, Log, Parent, RunDir, Verify


def coordinator(
    config: ConfigFile,
    run_dir: RunDir = None,
    listen: Annotated[str, typer.Option(help="HOST:PORT to listen on; port 0 takes a free one.")] = "127.0.0.1:7070",
    insecure: Insecure = False,
    verify: Verify = False,
    parent: Parent = None,
    log: Log = None,
) -> None:
    """Coordinate a run until it is finished.

    Started again on the same run directory, it continues where it was. Off loopback it needs certificates
    (`dipaco certs`). Exit code 0: finished; 1: refused or failed; 3: stopped before the end.
    """
    from configs.load import load_config
    from coordinator.serving import serve
    from coordinator.snapshot import RunSnapshot
    from corpus.gguf_vocabulary import gguf_remark
    from dipaco.ending import UNFINISHED, say_wrong
    from dipaco.own_log import rotate_own_output, rotation
    from dipaco.parent import stop_without

    loaded = load_config(config)
    directory = run_dir or Path("runs") / loaded.name
    if parent is not None:
        stop_without(parent)
    if log is not None:
        rotate_own_output(*rotation(log))
    if (remark := gguf_remark(loaded.experiment.tokenizer)) is not None:
        _say(remark)
    serve(
        loaded,
        directory,
        listen,
        insecure=insecure,
        verify=verify,
        ready=lambda address: _say(f"run {loaded.name} in {directory}, listening on {address}"),
        say=_say,
    )
    if not RunSnapshot.open(directory).state.standing.finished:
        say_wrong(f"stopped before the end; the same command continues the run in {directory}")
        raise typer.Exit(UNFINISHED)


def _say(line: str) -> None:
    """A log that cannot be written (a full disk, a closed pipe) ends no run."""
    with suppress(OSError):
        print(line, flush=True)
