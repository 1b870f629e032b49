"""`dipaco simulate --virtual`: the coordinator's own decisions under a virtual clock, at costs measured in a run.

No process is started: what a fault plan would cost many workers is known in seconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.schema import Config
from coordinator.events import read_events
from coordinator.plan import TRAINING
from coordinator.snapshot import RunSnapshot
from coordinator.state import Stage
from coordinator.virtual import Costs, VirtualRun
from dipaco.ending import Refused
from dipaco.faults import COORDINATOR, Fault
from dipaco.simulating import FAULTS, read_facts

Record = dict[str, Any]
ACTIONS = {"start": "start", "kill": "kill", "terminate": "kill"}


def measured_costs(run_dir: Path) -> Costs:
    """Medians of a run that has trained: seconds of a step, of other tasks, around every task, between checkpoints.

    And what the coordinator's own tasks took in each kind of stage.

    Where it was a simulation, also from the start of a worker's process to its first request.

    Raises RunUnusable, and Refused where no TRAIN task was completed.
    """
    snapshot = RunSnapshot.open(run_dir)
    steps = [metric["seconds"] / metric["steps"] for metric in snapshot.metrics if metric["steps"]]
    if not steps:
        raise Refused(
            f"{run_dir} has trained nothing yet, so that no cost can be measured in it; let the run go on first"
        )
    others = [metric["seconds"] for metric in snapshot.metrics if not metric["steps"]]
    around = list(_seconds_around(read_events(run_dir)))
    every = list(_seconds_between_checkpoints(read_events(run_dir)))
    starts = list(_seconds_to_join(read_facts(run_dir), read_events(run_dir))) if (run_dir / FAULTS).is_file() else []
    return Costs(
        step_s=statistics.median(steps),
        other_task_s=_median(others),
        overhead_s=_median(around),
        start_s=_median(starts),
        checkpoint_every_s=_median(every),
        local_s={stage.kind: _alone_s(stage, snapshot.metrics) for stage in snapshot.state.stages.values()},
    )


def _alone_s(stage: Stage, metrics: Iterable[Record]) -> float:
    """Seconds of a finished stage in which no worker computed for it: the coordinator's own part."""
    if stage.kind in TRAINING or stage.status != "done":
        return 0.0
    spans = sorted(
        (metric["wall_s"] - metric["seconds"], metric["wall_s"]) for metric in metrics if metric["stage"] == stage.name
    )
    alone_s, until_s = 0.0, stage.started_s
    for begin_s, end_s in [*spans, (stage.finished_s, stage.finished_s)]:
        alone_s += max(0.0, begin_s - until_s)
        until_s = max(until_s, end_s)
    return alone_s


def _median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds) if seconds else 0.0


def _seconds_between_checkpoints(events: Iterable[Record]) -> Iterable[float]:
    """Between two checkpoints of one lease, and from its begin to the first."""
    latest: dict[tuple[str, int], float] = {}
    for event in events:
        if event["event"] == "leased":
            latest[event["task_id"], event["fence"]] = event["wall_s"]
        elif event["event"] == "checkpoint" and (key := (event["task_id"], event["fence"])) in latest:
            yield event["wall_s"] - latest[key]
            latest[key] = event["wall_s"]


def _seconds_to_join(faults: Sequence[Record], events: Iterable[Record]) -> Iterable[float]:
    """From each start of a worker's process to its greeting, where that came before the next thing done to it."""
    joins = [(event["worker"], event["wall_s"]) for event in events if event["event"] == "joined"]
    for index, fault in enumerate(faults):
        if fault["action"] != "start" or fault["process"] == COORDINATOR:
            continue
        later = (each["wall_s"] for each in faults[index + 1 :] if each["process"] == fault["process"])
        end_s = next(later, float("inf"))
        own = [at_s for name, at_s in joins if name == fault["process"] and fault["wall_s"] < at_s < end_s]
        yield from (at_s - fault["wall_s"] for at_s in own[:1])


def _seconds_around(events: Iterable[Record]) -> Iterable[float]:
    """Of every completed lease, the seconds that its computation did not take."""
    begun: dict[tuple[str, int], float] = {}
    for event in events:
        if event["event"] == "leased":
            begun[event["task_id"], event["fence"]] = event["wall_s"]
        elif event["event"] == "completed" and (event["task_id"], event["fence"]) in begun:
            yield max(0.0, event["wall_s"] - begun[event["task_id"], event["fence"]] - event["seconds"])


def simulate_virtually(config: Config, plan: Sequence[Fault], costs: Costs, seed: int) -> Record:
    """The outcome of the plan; SIGTERM counts as a kill. Raises Refused for what a virtual run cannot play."""
    if any(fault.process == COORDINATOR for fault in plan):
        raise Refused("a virtual run has no coordinator process to kill; leave --coordinator-mtbf out")
    if any(fault.action in ("stop", "continue") for fault in plan):
        raise Refused("a virtual run knows workers that vanish, none that hang; leave stop= out of --preempt")
    played = ((fault.at_s, fault.process, ACTIONS[fault.action]) for fault in plan)
    outcome = VirtualRun(config, costs, played, seed).run()
    return {"virtual": True, **outcome.to_dict(), "costs": asdict(costs)}
