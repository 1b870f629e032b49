"""Which task suits which worker: what is ready, what the worker can honour, and what it should rather do. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from coordinator.arrivals import MIN_ARRIVALS
from coordinator.claims import Claims
from coordinator.decisions import Decision
from coordinator.early_stopping import STOP
from coordinator.liveness import Liveness
from coordinator.plan import TRAINING, Plan
from coordinator.references import digests_in
from coordinator.state import Stage, State, Task, Worker
from protocol.tasks import Message

MAX_HOLDERS = 2
NUMERIC_KINDS = ("FEATURIZE", "TRAIN", "EVALUATE", "SCORE", STOP)
# Measuring a snapshot yields to training until it is so many phases behind: the versions that it holds are bounded.
STOP_LAG_PHASES = 2
# A backup copy is worth it where the holder needs so many times longer for the rest than another for the whole.
BACKUP_FACTOR = 1.5


class Matching:
    """Ranks the tasks that a worker may be given."""

    def __init__(self, plan: Plan, state: State, claims: Claims, liveness: Liveness) -> None:
        self._plan, self._state, self._claims, self._liveness = plan, state, claims, liveness
        self._stage_order = {stage.name: index for index, stage in enumerate(plan.stages())}

    def best(self, worker: Worker, cached: frozenset[str], now: float) -> tuple[Task, Message] | str:
        """The task that the worker should do now, with its spec; or why there is none."""
        reasons: list[str] = []
        candidates = sorted(self._leasable(worker, now), key=lambda task: self._preference(task, worker, cached, now))
        offers = (offer for task in candidates if (offer := self._offer(task, worker, reasons, now)) is not None)
        return next(offers, None) or (reasons[0] if reasons else "no task is ready")

    def spec(self, task: Task) -> Message:
        """The spec of a task as it would be leased now."""
        if task.kind == "TRAIN":
            return self._plan.train_spec(self._state, self._state.stages[task.stage], task)
        return self._plan.stored_spec(task)

    def pinned(self, task: Task, worker: Worker) -> Decision:
        """The stage, where this lease pins it to the worker's fingerprint class.

        With it its tasks lose the partial progress and the claims of another class, which must not be gone on from or
        compared with. Under `determinism: any` both are used whatever class they come from: one class goes on from
        what another would have come to within the tolerance that is stated for whole tasks.
        """
        stage, fingerprint = self._state.stages[task.stage], worker.capabilities.fingerprint
        if not self._is_strict() or task.kind not in NUMERIC_KINDS or stage.fingerprint == fingerprint:
            return Decision()
        left = [each for each in self._state.tasks_of(stage.name) if each.checkpoint or each.claims]
        cleared = (replace(each, checkpoint=None, claims=()) for each in left)
        obsolete = digests_in([(each.checkpoint, each.claims) for each in left])
        return Decision((replace(stage, fingerprint=fingerprint), *cleared), obsolete=tuple(sorted(obsolete)))

    def suits(self, task: Task, worker: Worker) -> bool:
        """Whether the worker can honour what the task asks of it."""
        return not self._refusal(task, self._state.stages[task.stage], self.spec(task), worker)

    def _leasable(self, worker: Worker, now: float) -> list[Task]:
        """Ready tasks whose modules are ready, and held ones that are worth a second holder."""
        found = []
        for task in self._state.tasks.values():
            if task.status == "leased":
                if self._wants_second_holder(task, worker, now):
                    found.append(task)
            elif task.status == "ready" and not task.local:
                if task.kind != "TRAIN" or self._plan.is_trainable(self._state, self._state.stages[task.stage], task):
                    found.append(task)
        return found

    def _wants_second_holder(self, task: Task, worker: Worker, now: float) -> bool:
        """Whether a task is overdue with all its holders, or one holder would be done with it later than `worker`.

        Of two overdue holders the one that was silent longest loses its lease.
        """
        if task.holder(worker.worker_id) is not None:
            return False
        if self._liveness.is_overdue(task, now):
            return True
        if len(task.holders) == MAX_HOLDERS:
            return False
        [holder] = task.holders
        lifeline = self._state.lifelines[task.task_id, holder.fence]
        if self._claims.wants_another(task, worker):
            return True
        slow = self._state.workers.get(holder.worker_id)
        if task.kind != "TRAIN" or slow is None or min(slow.step_times.count, worker.step_times.count) < MIN_ARRIVALS:
            return False
        steps = self._plan.inner_steps(self._state.stages[task.stage].model)
        remaining_s = (steps - max(lifeline.steps, task.steps_kept)) * slow.step_times.mean_s
        return remaining_s > BACKUP_FACTOR * (steps - task.steps_kept) * worker.step_times.mean_s

    def _offer(self, task: Task, worker: Worker, reasons: list[str], now: float) -> tuple[Task, Message] | None:
        """The task with its spec, if the worker can honour its numerics, memory and fingerprint class."""
        stage = self._state.stages[task.stage]
        spec = self.spec(task)
        refusal = self._refusal(task, stage, spec, worker)
        if not refusal and not self._claims.may_take(
            task, worker, lambda other: not self._refusal(task, stage, spec, other), now
        ):
            refusal = self._claims.waits_for(task)
        if refusal:
            reasons.append(refusal)
            return None
        return task, spec

    def _refusal(self, task: Task, stage: Stage, spec: Any, worker: Worker) -> str:
        offered = worker.capabilities
        if spec.required_bytes > offered.memory_bytes:
            return (
                f"task {task.task_id} needs {spec.required_bytes / 1e9:.2f} GB of memory and this worker offers "
                f"{offered.memory_bytes / 1e9:.2f} GB; lower numerics.micro_batch_rows, set checkpoint_activations, "
                "or use a larger machine"
            )
        if task.kind not in NUMERIC_KINDS:
            return ""
        numerics = spec.numerics
        if numerics.device != "auto" and numerics.device not in offered.devices:
            return f"task {task.task_id} needs device {numerics.device}; this worker has {', '.join(offered.devices)}"
        if numerics.threads > offered.threads:
            return f"task {task.task_id} needs {numerics.threads} threads; this worker offers {offered.threads}"
        if self._is_strict() and stage.fingerprint not in ("", offered.fingerprint) and self._is_begun(stage):
            return (
                f"stage {stage.name} is pinned to {stage.fingerprint!r} (determinism: strict) and this worker is "
                f"{offered.fingerprint!r}"
            )
        return ""

    def _is_strict(self) -> bool:
        return self._plan.experiment.determinism == "strict"

    def _is_begun(self, stage: Stage) -> bool:
        """Whether a result of the stage counts or is being worked at: a class that left neither behind binds nobody.

        Checkpoints and claims do not bind either: they go when another class is pinned.
        """
        if any(task.kind in NUMERIC_KINDS and task.status != "ready" for task in self._state.tasks_of(stage.name)):
            return True
        return stage.kind in TRAINING and any(shard.phase for shard in self._state.shards_of(stage.model))

    def _preference(self, task: Task, worker: Worker, cached: frozenset[str], now: float) -> tuple[Any, ...]:
        """Earlier phases first, what this worker has not failed at, overdue tasks, then what it has the blobs of.

        A copy of a task that is only slow comes after everything else, and STOP tasks come after what trains.
        """
        failed_here = any(reason.startswith(f"{worker.name}: ") for reason in task.failures)
        shard = self._state.shards.get(f"{self._state.stages[task.stage].model}/{task.subject}")
        inner_state = shard.inner_state if shard and task.kind == "TRAIN" else None
        misses = int(inner_state is not None and inner_state.digest not in cached)
        if task.kind in ("SCORE", "EVALUATE", STOP):
            misses = sum(module["blob"]["digest"] not in cached for module in task.spec["path"]["modules"])
        overdue = bool(task.holders) and self._liveness.is_overdue(task, now)
        only_slow = bool(task.holders) and not overdue
        stops = task.kind == STOP
        phase = task.phase + 1 + STOP_LAG_PHASES if stops else task.phase
        order = self._stage_order[task.stage]
        return only_slow, phase, stops, not task.claims, failed_here, not overdue, order, misses
