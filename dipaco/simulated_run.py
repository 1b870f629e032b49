"""A whole simulation: plan, undisturbed reference, disturbed run, simulation.json and simulation.html.

RUN holds plan.jsonl (what was to happen, for a replay by `plan:FILE`), faults.jsonl (what was done), simulated.yaml
(the configuration, with as many phases as it takes), the run itself, and references/<digest of the experiment>/.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.execution import Execution
from configs.load import experiment_digest, to_yaml
from configs.schema import Config
from coordinator.events import read_events
from coordinator.snapshot import RunSnapshot
from dipaco import faults
from dipaco.asking import StatusSource, plain
from dipaco.cores import usable_cores
from dipaco.curves import MissingExtra
from dipaco.ending import Refused
from dipaco.faults import NETWORK_ACTIONS, Fault, MalformedPlan
from dipaco.lengthening import lengthened, phase_s
from dipaco.network import Conditions, MalformedNetwork, Network, parse_network, split_plan
from dipaco.processes import LocalRun
from dipaco.progress import Display
from dipaco.run_digest import run_digest
from dipaco.running import carry_out, is_finished
from dipaco.simulating import Simulation, read_facts
from dipaco.simulation import Record, summarise
from dipaco.simulation_page import draw, page
from dipaco.usage import hardware, read_usage

PLAN, OUTCOME, PICTURE, CONFIG, REFERENCES = (
    "plan.jsonl",
    "simulation.json",
    "simulation.html",
    "simulated.yaml",
    "references",
)


WHOLE_LOG_BYTES = 1 << 50


@dataclass(frozen=True, slots=True)
class Wish:
    """What a person asked for."""

    workers: int
    preempt: str
    coordinator_mtbf_s: float | None
    seed: int
    compare: bool
    min_worker_kills: int
    min_coordinator_kills: int
    network: str | None = None


def fault_plan(wish: Wish) -> list[Fault]:
    """The plan of `poisson:...`, `trace:FILE[,speedup=..,scale=..]` or `plan:FILE`; raises MalformedPlan."""
    kind, _, rest = wish.preempt.partition(":")
    if kind == "poisson":
        found = faults.poisson(rest).faults(wish.workers, wish.seed)
    elif kind == "trace":
        name, _, options = rest.partition(",")
        given = faults.parse_options(options, {"speedup": 1.0, "scale": 1.0})
        found = faults.parse_trace(_read(Path(name)), **given).faults(wish.workers, wish.seed)
    elif kind == "plan":
        found = faults.parse_plan(split_plan(_read(Path(rest)))[1], wish.workers)
    else:
        raise MalformedPlan(f"--preempt is {wish.preempt!r}; expected poisson:..., trace:FILE or plan:FILE")
    if wish.coordinator_mtbf_s is not None:
        found += faults.coordinator_faults(wish.coordinator_mtbf_s, wish.seed)
    if wish.network is not None:
        found += parse_network(wish.network).faults(wish.workers, wish.seed)
    return sorted(found, key=lambda fault: fault.at_s)


def conditions_of(wish: Wish, plan: list[Fault]) -> Conditions | None:
    """The network of --network or of the plan's first line; a plan that disturbs links without one has a perfect one.

    Raises MalformedNetwork and MalformedPlan.
    """
    kind, _, rest = wish.preempt.partition(":")
    planned = split_plan(_read(Path(rest)))[0] if kind == "plan" else None
    if wish.network is not None:
        if planned is not None:
            raise MalformedNetwork(f"{rest} holds a network of its own: leave --network out, or the plan's first line")
        return Conditions(parse_network(wish.network), wish.seed)
    if planned is None and any(fault.action in NETWORK_ACTIONS for fault in plan):
        return Conditions(Network(), wish.seed)
    return planned


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MalformedPlan(f"--preempt: cannot read {path} ({error})") from None


def simulate(config: Config, run_dir: Path, wish: Wish, display: Callable[[], Display]) -> tuple[Record, list[str]]:
    """Carry everything out; returns what simulation.json holds, and remarks for the person.

    Raises Refused, MalformedPlan, Stopped, CoordinatorEnded, WorkersEnded.
    """
    plan = fault_plan(wish)
    conditions = conditions_of(wish, plan)
    wanted = [
        (faults.kills(plan, coordinator=False), wish.min_worker_kills),
        (faults.kills(plan, coordinator=True), wish.min_coordinator_kills),
    ]
    config = _with_whole_logs(lengthened(config, phase_s(config, wish.workers, usable_cores()), wanted))
    _prepare(run_dir)
    (run_dir / CONFIG).write_text(to_yaml(config), encoding="utf-8")
    first = conditions.line() if conditions is not None else ""
    (run_dir / PLAN).write_text(first + faults.write_plan(plan), encoding="utf-8")
    reference = _reference(config, run_dir, wish, display) if wish.compare else {}
    shown = display()
    with StatusSource() as source:
        local = _local(run_dir / CONFIG, run_dir, 0, wish.workers, shown)
        simulation = Simulation(local, plan, wish.workers, conditions)
        began_s, ended_s = simulation.carry_out(shown, source.ask)
    network = None if conditions is None else {"spec": conditions.network.spec, **asdict(simulation.network)}
    outcome = _outcome(config, run_dir, wish, reference, network, began_s, ended_s)
    return outcome, [*_too_few(outcome, wish), *_write(run_dir, outcome, began_s, ended_s)]


def _with_whole_logs(config: Config) -> Config:
    """The configuration with logs that are never cut: what a simulation came to is read from them."""
    return config.model_copy(update={"execution": config.execution.model_copy(update={"log_bytes": WHOLE_LOG_BYTES})})


def _prepare(run_dir: Path) -> None:
    """An empty run directory, but for references; only what a simulation has left there is removed."""
    if (run_dir / "state.db").exists() and not (run_dir / PLAN).exists():
        raise Refused(f"{run_dir} holds a run that is no simulation; take another --run-dir")
    if run_dir.exists() and not (run_dir / PLAN).exists() and any(run_dir.iterdir()):
        raise Refused(f"{run_dir} is not empty and holds no simulation; take another --run-dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    for path in run_dir.iterdir():
        if path.name == REFERENCES:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _local(config: Path, run_dir: Path, started: int, workers: int, display: Display) -> LocalRun:
    import psutil

    return LocalRun(
        config=config,
        run_dir=run_dir,
        num_workers=started,
        threads=max(1, usable_cores() // workers),
        worker_memory_bytes=psutil.virtual_memory().available // (workers + 1),
        say=display.say,
        execution=Execution(log_bytes=WHOLE_LOG_BYTES),
    )


def _reference(config: Config, run_dir: Path, wish: Wish, display: Callable[[], Display]) -> Record:
    """The undisturbed run of the same experiment, made once for all simulations in this directory."""
    directory = run_dir / REFERENCES / experiment_digest(config, {})[:16]
    if not is_finished(directory, config):
        shown = display()
        shown.say(f"the undisturbed run goes first, in {directory}")
        with StatusSource() as source:
            carry_out(_local(run_dir / CONFIG, directory, wish.workers, wish.workers, shown), shown, source.ask)
    digest = run_digest(RunSnapshot.open(directory), everything=True)
    return {"reference_digest": digest, "reference_wall_s": read_usage(directory).wall_s}


def _outcome(
    config: Config,
    run_dir: Path,
    wish: Wish,
    reference: Record,
    network: Record | None,
    began_s: float,
    ended_s: float,
) -> dict[str, Any]:
    snapshot = RunSnapshot.open(run_dir)
    digest = run_digest(snapshot, everything=True)
    measured = summarise(
        list(read_events(run_dir)), of_processes(read_facts(run_dir)), snapshot.metrics, began_s, ended_s
    )
    return plain(
        {
            "run": config.name,
            "preempt": wish.preempt,
            "coordinator_mtbf_s": wish.coordinator_mtbf_s,
            "seed": wish.seed,
            "workers": wish.workers,
            "phases": config.experiment.phases,
            "digest": digest,
            "reference_digest": reference.get("reference_digest"),
            "digest_equal": digest == reference["reference_digest"] if reference else None,
            "reference_wall_s": reference.get("reference_wall_s"),
            "network": network,
            **measured,
            "hardware": hardware(),
        }
    )


def of_processes(facts: list[Record]) -> list[Record]:
    """What was done to processes, without what was done to their links."""
    return [fact for fact in facts if fact["action"] not in NETWORK_ACTIONS]


def _too_few(outcome: Record, wish: Wish) -> list[str]:
    return [
        f"only {outcome[key]} {what} were killed, {wanted} were asked for: the machine was faster than was assumed"
        for key, what, wanted in (
            ("worker_kills", "workers", wish.min_worker_kills),
            ("coordinator_kills", "coordinators", wish.min_coordinator_kills),
        )
        if outcome[key] < wanted
    ]


def _write(run_dir: Path, outcome: Record, began_s: float, ended_s: float) -> list[str]:
    remarks, timeline = [], None
    try:
        events, metrics = list(read_events(run_dir)), RunSnapshot.open(run_dir).metrics
        timeline = draw(events, read_facts(run_dir), metrics, outcome["participation"], began_s, ended_s)
    except MissingExtra as error:
        remarks.append(f"{PICTURE} is without its picture: {error}")
    (run_dir / OUTCOME).write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")
    (run_dir / PICTURE).write_text(page(outcome, timeline), encoding="utf-8")
    return [*remarks, f"report: {run_dir / PICTURE} and {run_dir / OUTCOME}; replay: --preempt plan:{run_dir / PLAN}"]
