"""What a person sees of a run: stages, phases, workers, losses, bytes and the time left. Pure.

A worker's id is not in it: who knows one could speak for that worker, where workers have no certificates.

Keys of a status: `run`, `stage` (names running), `stages` [name, kind, status, done, total], `phase`, `num_phases`,
`workers` [name, task, steps, steps_total, loss, tokens_per_s, last_seen_s], `tasks` {ready, leasable, leased,
done}, `losses` {path id: mean loss of its latest task}, `baseline_losses` {model: the same}, `tokens`, `steps` (in the
weights), `bytes` {modules, outer_gradients, inner_state, checkpoints, other}, `eta_s` (None while unknown), `finished`,
`paused`, `waiting` (for room on the disk, in one sentence), `quarantined` {task: why}, `undecided` {task: why},
`suspected` {worker: tasks}, `banned` {worker: why}.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from coordinator.claims import trust_of
from coordinator.plan import BASE, MIXTURE, TRAINING, Plan
from coordinator.state import Stage, State, Task, Worker

RATE_WINDOW = 24
CATEGORIES = ("modules", "outer_gradients", "inner_state", "checkpoints", "other")


class Tally:
    """Sums over completed tasks: every token and step once, whatever was retried."""

    def __init__(self) -> None:
        self.tokens = 0
        self.steps = 0
        self.done = 0
        self.steps_of_stage: dict[str, int] = defaultdict(int)
        self.losses: dict[str, dict[str, float]] = defaultdict(dict)
        self._recent: list[tuple[float, int]] = []

    def add(self, metric: dict[str, Any]) -> None:
        """Count one completed task, as the journal's metrics hold it."""
        self.done += 1
        if metric["kind"] != "TRAIN":
            return
        self.tokens += metric["tokens"]
        self.steps += metric["steps"]
        self.steps_of_stage[metric["stage"]] += metric["steps"]
        self.losses[metric["model"]][metric["path"]] = metric["loss_sum"] / max(1, metric["tokens"])
        self._recent = [*self._recent[1 - RATE_WINDOW :], (metric["wall_s"], metric["steps"])]

    def steps_per_s(self) -> float | None:
        """Inner steps a second over the latest tasks of all workers together."""
        if len(self._recent) < 3:
            return None
        elapsed = self._recent[-1][0] - self._recent[0][0]
        return sum(steps for _, steps in self._recent[1:]) / elapsed if elapsed > 0 else None


def status_of(plan: Plan, state: State, tally: Tally, now: float) -> dict[str, Any]:
    """The status of a run; `now` in the clock of the workers' `last_seen_s`."""
    running = [stage.name for stage in state.stages.values() if stage.status == "running"]
    mixture = [module.version for module in state.modules_of(MIXTURE)]
    open_tasks = [task for task in state.tasks.values() if task.status != "done"]
    return {
        "run": plan.config.name,
        "stage": ", ".join(running),
        "stages": [_stage(plan, state, tally, stage) for stage in state.stages.values()],
        "phase": min(mixture, default=0),
        "num_phases": plan.num_phases(MIXTURE),
        "workers": [_worker(plan, state, worker, now) for worker in state.workers.values()],
        "tasks": {
            "ready": sum(task.status == "ready" for task in open_tasks),
            "leasable": sum(task.status == "ready" and _may_be_leased(plan, state, task) for task in open_tasks),
            "leased": sum(task.status == "leased" for task in open_tasks),
            "done": tally.done,
        },
        "losses": dict(sorted(tally.losses[MIXTURE].items())),
        "baseline_losses": {model: paths["0"] for model, paths in tally.losses.items() if model != MIXTURE},
        "tokens": tally.tokens,
        "steps": tally.steps,
        "bytes": {category: state.standing.bytes_moved.get(category, 0) for category in CATEGORIES},
        "eta_s": _remaining_s(plan, state, tally),
        "finished": state.standing.finished,
        "paused": state.standing.paused,
        "waiting": "",
        **trust_of(state),
    }


def _may_be_leased(plan: Plan, state: State, task: Task) -> bool:
    """Whether a ready task waits for a worker, not for a module or for the coordinator itself."""
    if task.kind != "TRAIN":
        return not task.local
    return plan.is_trainable(state, state.stages[task.stage], task)


def _stage(plan: Plan, state: State, tally: Tally, stage: Stage) -> dict[str, Any]:
    if stage.kind in TRAINING:
        done, total = tally.steps_of_stage[stage.name], _steps_of(plan, stage)
    else:
        tasks = state.tasks_of(stage.name)
        done, total = sum(task.status == "done" for task in tasks), len(tasks)
    seconds = max(0.0, stage.finished_s - stage.started_s) if stage.status == "done" else 0.0
    return {
        "name": stage.name,
        "kind": stage.kind,
        "status": stage.status,
        "done": done,
        "total": total,
        "started_s": stage.started_s,
        "seconds": seconds,
    }


def _steps_of(plan: Plan, stage: Stage) -> int:
    return len(plan.phases_of(stage)) * plan.inner_steps(stage.model) * plan.topology(stage.model).num_shards


def _worker(plan: Plan, state: State, worker: Worker, now: float) -> dict[str, Any]:
    task = state.tasks.get(worker.task_id)
    return {
        "name": worker.name,
        "task": worker.task_id,
        "steps": worker.steps,
        "steps_total": plan.inner_steps(state.stages[task.stage].model) if task and task.kind == "TRAIN" else 0,
        "loss": worker.loss,
        "tokens_per_s": worker.tokens_per_s,
        "last_seen_s": now - worker.last_seen_s,
    }


def _remaining_s(plan: Plan, state: State, tally: Tally) -> float | None:
    """Seconds of training left at the latest rate; the stages without steps are not counted."""
    rate = tally.steps_per_s()
    if rate is None:
        return None
    stages = [stage for stage in state.stages.values() if stage.kind in TRAINING]
    if len(stages) > 1 and tally.losses.keys() == {BASE}:
        return None  # one shard alone has been trained so far: its rate says nothing about many
    left = sum(_steps_of(plan, stage) - tally.steps_of_stage[stage.name] for stage in stages)
    return left / rate
