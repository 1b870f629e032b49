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
from coordinator.snapshot import RunSnapshot
from coordinator.virtual import Costs, VirtualRun
from dipaco.ending import Refused
from dipaco.faults import COORDINATOR, Fault

Record = dict[str, Any]
ACTIONS = {"start": "start", "kill": "kill", "terminate": "kill"}


def measured_costs(run_dir: Path) -> Costs:
    """Medians of a run that has trained: seconds of a step, of other tasks, and around every task.


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
    return Costs(
        step_s=statistics.median(steps),
        other_task_s=statistics.median(others) if others else 0.0,
        overhead_s=statistics.median(around) if around else 0.0,
    )


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
