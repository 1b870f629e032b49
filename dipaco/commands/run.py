"""`dipaco run`: a whole run on this machine, from text to a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dipaco.commands.options import ConfigFile, Json, Reuse, RunDir, Verify

if TYPE_CHECKING:
    from configs.schema import Config


def run(
    config: ConfigFile,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes to start here; one for each core it may use by default.")
    ] = None,
    run_dir: RunDir = None,
    reuse: Reuse = None,
    verify: Verify = False,
    as_json: Json = False,
) -> None:
    """Carry out a whole run on this machine, and report.

    Starts a coordinator and worker processes that talk over gRPC. Started again on the same run directory, it
    continues where it was. Exit code 0: finished; 1: refused or failed; 3: stopped before the end.
    """
    from configs.load import load_config
    from dipaco.cores import usable_cores
    from dipaco.ending import UNFINISHED, no_room_at, say_wrong
    from dipaco.running import Stopped

    loaded = load_config(config)
    directory = run_dir or Path("runs") / loaded.name
    count = workers or usable_cores()
    try:
        with no_room_at(directory):
            _carry_out(config, loaded, directory, count, reuse=reuse, verify=verify, quiet=as_json)
    except Stopped:
        again = f"dipaco run {config} --workers {count}" + (f" --run-dir {run_dir}" if run_dir else "")
        again += f" --reuse {reuse}" if reuse else ""
        say_wrong(f"stopped; nothing that was finished is lost, and `{again}` continues where it was")
        raise typer.Exit(UNFINISHED) from None
    with no_room_at(directory):
        _report(directory, as_json)


def _carry_out(
    path: Path, config: Config, directory: Path, workers: int, *, reuse: Path | None, verify: bool, quiet: bool
) -> None:
    import psutil

    from corpus.gguf_vocabulary import gguf_remark
    from dipaco.asking import StatusSource
    from dipaco.cores import usable_cores
    from dipaco.processes import LocalRun
    from dipaco.progress import PlainLines, display
    from dipaco.running import carry_out, is_finished
    from protocol.security import CERTS_DIR

    if is_finished(directory, config):
        return
    shown = PlainLines(to_stderr=True) if quiet else display()
    if (remark := gguf_remark(config.experiment.tokenizer)) is not None:
        shown.say(remark)
    join = _join_file(directory / CERTS_DIR, certified=config.execution.require_worker_certificates)
    local = LocalRun(
        config=path,
        run_dir=directory,
        num_workers=workers,
        threads=max(1, usable_cores() // workers),
        worker_memory_bytes=psutil.virtual_memory().available // (workers + 1),
        say=shown.say,
        join=join,
        execution=config.execution,
        verify=verify,
        reuse=None if reuse is None else reuse.expanduser().absolute(),
    )
    with StatusSource(local.join) as source:
        carry_out(local, shown, source.ask)


def _join_file(certs_dir: Path, *, certified: bool) -> Path | None:
    """What this machine's own workers join with, where the run has certificates."""
    from protocol.enrolment import local_join
    from protocol.security import JOIN_FILE

    general = certs_dir / JOIN_FILE
    if not general.is_file():
        return None
    return local_join(certs_dir) if certified else general


def _report(directory: Path, as_json: bool) -> None:
    from coordinator.snapshot import RunSnapshot
    from dipaco.examples import routed_examples
    from dipaco.report import write_report

    snapshot = RunSnapshot.open(directory)
    report, remarks = write_report(snapshot)
    if as_json:
        typer.echo(json.dumps(report))
        return
    from rich.console import Console

    from dipaco.table import example_text, report_table

    console = Console()
    console.print(report_table(report))
    for example in routed_examples(snapshot):
        console.print(example_text(example), soft_wrap=True)
    for remark in remarks:
        typer.echo(remark)
