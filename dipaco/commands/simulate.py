"""`dipaco simulate`: a real run on this machine whose processes are killed, stopped and started by a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dipaco.commands.options import ConfigFile, Json, RunDir

if TYPE_CHECKING:
    from configs.schema import Config
    from dipaco.simulated_run import Wish


def simulate(
    config: ConfigFile,
    preempt: Annotated[
        str,
        typer.Option(
            metavar="SPEC",
            help="poisson:mtbf=60,restart=10[,stop=SHARE][,term=SHARE], trace:FILE[,speedup=600][,scale=1] "
            "(CSV seconds,alive) or plan:FILE.",
        ),
    ],
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 3,
    coordinator_mtbf: Annotated[
        float | None, typer.Option(min=0.1, help="Mean seconds between kills of the coordinator; none by default.")
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="A bad network between the workers and the coordinator: latency=200ms,jitter=50ms,rate=10Mbit,"
            "loss=5%,drop_mtbf=30,partition_mtbf=120,partition=60 (seconds), each optional.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the fault plan and of the network.")] = 0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also make the undisturbed run, and compare `digest --all`.")
    ] = False,
    min_worker_kills: Annotated[
        int, typer.Option(min=0, help="Lengthen the run by whole phases until the plan has so many.")
    ] = 0,
    min_coordinator_kills: Annotated[
        int, typer.Option(min=0, help="Lengthen the run by whole phases until the plan has so many.")
    ] = 0,
    virtual: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Start no process: play the plan under a virtual clock, with the costs measured in RUN."
        ),
    ] = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Carry out a run under faults, and report what they cost.

    Real processes get SIGKILL, SIGSTOP and SIGTERM. Writes simulation.json, simulation.html with a timeline, and the
    plan, by which the run can be repeated exactly. Exit code 0: finished, and with --compare equal to the undisturbed
    run; 1: refused, failed or not equal, or fewer kills than were asked for; 3: stopped before the end.
    """
    from configs.load import load_config
    from dipaco.ending import UNFINISHED, Refused, say_wrong
    from dipaco.progress import PlainLines, display
    from dipaco.running import Stopped
    from dipaco.simulated_run import Wish
    from dipaco.simulated_run import simulate as carry_out

    loaded = load_config(config)
    directory = run_dir or Path("runs") / f"{loaded.name}-simulation"
    wish = Wish(workers, preempt, coordinator_mtbf, seed, compare, min_worker_kills, min_coordinator_kills, network)
    if virtual is not None:
        _tell(_virtual_outcome(loaded, wish, virtual), as_json)
        return
    try:
        outcome, remarks = carry_out(
            loaded, directory, wish, lambda: PlainLines(to_stderr=True) if as_json else display()
        )
    except Stopped:
        say_wrong("stopped; the same command begins the simulation anew")
        raise typer.Exit(UNFINISHED) from None
    _tell(outcome, as_json)
    for remark in remarks:
        typer.echo(remark, err=as_json)
    if outcome["digest_equal"] is False:
        raise Refused("the disturbed run ended with other bits than the undisturbed one")
    if outcome["worker_kills"] < min_worker_kills or outcome["coordinator_kills"] < min_coordinator_kills:
        raise typer.Exit(1)


def _virtual_outcome(config: Config, wish: Wish, measured: Path) -> dict[str, Any]:
    from dipaco.ending import Refused
    from dipaco.simulated_run import conditions_of, fault_plan
    from dipaco.virtual_run import measured_costs, simulate_virtually

    plan = fault_plan(wish)
    if conditions_of(wish, plan) is not None:
        raise Refused("a virtual run has no network to disturb; leave --network (or the plan's first line) out")
    return simulate_virtually(config, plan, measured_costs(measured), wish.seed)


def _tell(outcome: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(outcome))
        return
    for key, value in outcome.items():
        if key not in ("participation", "hardware"):
            typer.echo(f"{key}: {json.dumps(value)}")
