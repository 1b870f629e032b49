"""The state machine: who gets which task, which results count, when a module steps, when a stage is over.

Pure: `now` (monotonic seconds), wall time and the random generator are arguments; a decision returns rows for the
journal and applies nothing. Task and lease rules follow DiPaCo Sec 3 (task queue) with fencing tokens; a result
under a stale token changes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from coordinator.claims import Claims
from coordinator.decisions import Decision, StepDue
from coordinator.early_stopping import STOP, EarlyStopping
from coordinator.expected import ExpectedOutput
from coordinator.leases import Leases
from coordinator.plan import TRAINING, Plan
from coordinator.references import Referenced, digests_in
from coordinator.stage_steps import StageSteps
from coordinator.state import Best, Claim, Module, Row, Shard, Stage, State, Task
from coordinator.verdict import Verdict, judge, result_of
from protocol.errors import RejectedTensor
from protocol.tasks import BlobRef, Checkpoint, TaskResult

# The upload that carries the partial progress of a TRAIN task.
CHECKPOINT = "checkpoint"


@dataclass(slots=True)
class _Draft:
    """Rows changed so far by one decision, seen as if they were applied."""

    state: State
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)

    def put(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.rows[row.table, row.key] = row

    def view(self) -> State:
        """The state with the draft applied."""
        view = self.state.copy()
        view.apply(self.rows.values())
        return view


class Machine:
    """Decisions on one run's state. Callers apply what they have stored, under one lock."""

    def __init__(self, plan: Plan, state: State, random_generator: random.Random) -> None:
        self.plan = plan
        self.state = state
        self.steps = StageSteps(plan)
        self.stopping = EarlyStopping(plan)
        self.claims = Claims(plan, state, random_generator)
        self.leases = Leases(plan, state, random_generator, self.claims)
        self._referenced = Referenced()

    # --- opening and advancing --------------------------------------------------------------------------------------

    def open(self, wall_s: float) -> Decision:
        """The rows of a run that has just been created."""
        draft = _Draft(self.state)
        draft.put(self.plan.stages())
        return self._advanced(draft, wall_s)

    def resume(self, now: float, lost: frozenset[str] = frozenset()) -> Decision:
        """After a restart every live lease gets one fresh deadline, and a pause is lifted with its failures.

        `lost`: blobs that are missing or damaged; partial progress among them is let go of. Bans end that the
        configuration lifts.
        """
        self.leases.liveness.renew_all(now)
        draft, unbanned = _Draft(self.state), self.claims.unbanned()
        draft.put(unbanned.rows)
        obsolete: tuple[str, ...] = ()
        if self.state.standing.paused:
            forgotten = self.claims.forgotten()
            draft.put(replace(task, failures=()) for task in self.state.tasks.values() if task.failures)
            draft.put([*forgotten.rows, replace(self.state.standing, paused="")])
            obsolete = forgotten.obsolete
        unreadable = [t for t in draft.view().tasks.values() if t.checkpoint and t.checkpoint.blob.digest in lost]
        draft.put(replace(task, checkpoint=None) for task in unreadable)
        damaged = {task.checkpoint.blob.digest for task in unreadable if task.checkpoint}
        return Decision(tuple(draft.rows.values()), obsolete=(*obsolete, *sorted(damaged)), notes=unbanned.notes)

    def _advanced(
        self, draft: _Draft, wall_s: float, metrics: tuple[dict[str, Any], ...] = (), obsolete: tuple[str, ...] = ()
    ) -> Decision:
        """Start and finish stages as far as the draft allows."""
        while self._advance_once(draft, wall_s):
            pass
        closed = [row.name for row in draft.rows.values() if isinstance(row, Stage) and row.status == "done"]
        over = [task for task in draft.view().tasks.values() if task.stage in closed]
        left = {digest for task in over for digest in digests_in(task)}
        left |= {digest for row in draft.rows.values() for digest in digests_in(self._replaced(row))}
        return Decision(
            tuple(draft.rows.values()), metrics, (*obsolete, *sorted(left)), tuple(task.task_id for task in over)
        )

    def _replaced(self, row: Row) -> Shard | Best | None:
        """A shard or a best version as it was before: inner state, data or modules may be needed no more."""
        if isinstance(row, Best):
            return self.state.best.get(row.key)
        return self.state.shards.get(row.key) if isinstance(row, Shard) else None

    def _advance_once(self, draft: _Draft, wall_s: float) -> bool:
        view = draft.view()
        for stage in view.stages.values():
            if stage.status == "waiting" and all(view.stages[name].status == "done" for name in stage.after):
                draft.put([replace(stage, status="running", started_s=wall_s), *self.steps.begin(view, stage)])
                return True
            if stage.status == "running" and self._step_is_over(view, stage):
                self._next_step(draft, view, stage, wall_s)
                return True
        if not view.standing.finished and all(stage.status == "done" for stage in view.stages.values()):
            draft.put([replace(view.standing, finished=True)])
        return False

    def _step_is_over(self, view: State, stage: Stage) -> bool:
        if stage.kind in TRAINING:
            phases = self.plan.phases_of(stage)
            stepped = all(module.version == phases.stop for module in view.modules_of(stage.model))
            return stepped and self.stopping.is_over(view, stage)
        return all(task.status == "done" for task in view.tasks_of(stage.name))

    def _next_step(self, draft: _Draft, view: State, stage: Stage, wall_s: float) -> None:
        tasks = None if stage.kind in TRAINING else self.steps.proceed(view, stage)
        if tasks is not None:
            step = stage.step + 1
            draft.put([replace(stage, step=step), *(replace(task, step=step) for task in tasks)])
            return
        result, rows = self.steps.conclude(view, stage)
        draft.put([replace(stage, status="done", finished_s=wall_s, result=result), *rows])

    # --- results ----------------------------------------------------------------------------------------------------

    def expected_outputs(self, task: Task) -> dict[str, ExpectedOutput]:
        """What each output of a task must be, by name."""
        if task.kind == "TRAIN":
            return self._expected_of_training(task)
        spec: Any = self.leases.matching.spec(task)
        if task.kind == "PACK":
            return {"tokens": ExpectedOutput.tokens()}
        if task.kind in ("EVALUATE", "SCORE", STOP):
            return {"losses": ExpectedOutput.record()}
        name = {"sample": "features", "assign": "assignments", "route": "routes", "look": "routes"}[spec.mode]
        return {name: ExpectedOutput.record()}

    def accepted_uploads(self, task: Task) -> dict[str, ExpectedOutput]:
        """What may be uploaded under a lease of the task, by name: its outputs, and its partial progress."""
        expected = self.expected_outputs(task)
        if task.kind == "TRAIN":
            inner = self.plan.experiment.inner
            expected[CHECKPOINT] = ExpectedOutput.checkpoint(inner, self.plan.path_tensors(self.state))
        return expected

    def _expected_of_training(self, task: Task) -> dict[str, ExpectedOutput]:
        stage = self.state.stages[task.stage]
        shard = self.state.shards[f"{stage.model}/{task.subject}"]
        modules = self.plan.topology(stage.model).modules_of_path(shard.path_index)
        expected = {m: ExpectedOutput.module(self.plan.module_spec(self.state, stage.model, m)) for m in modules}
        inner = self.plan.experiment.inner
        if inner.inner_state == "keep":
            expected["inner_state"] = ExpectedOutput.inner_state(inner, self.plan.path_tensors(self.state))
        return expected

    def complete(
        self,
        worker_id: str,
        task_id: str,
        fence: int,
        result: TaskResult,
        now: float,
        wall_s: float,
        norms: Mapping[str, float] | None = None,
    ) -> Decision:
        """All outputs of a task count, or wait as a claim. Raises StaleLease, UnknownTask, Banned or RejectedTensor.

        `norms`: the L2 norms of the outputs that hold tensors, as they were verified.
        """
        worker = self.leases.known(worker_id, now)
        task = self.leases.held_task(task_id, fence, worker_id)
        expected = self.expected_outputs(task)
        if set(result.outputs) != set(expected):
            raise RejectedTensor(f"task {task_id} has outputs {sorted(result.outputs)}, expected {sorted(expected)}")
        stage = self.state.stages[task.stage]
        if task.kind == "TRAIN" and result.steps != self.plan.inner_steps(stage.model):
            raise RejectedTensor(f"task {task_id} took {result.steps} steps, not {self.plan.inner_steps(stage.model)}")
        worker.task_id = ""
        if result.tokens and result.seconds > 0:
            worker.tokens_per_s = result.tokens / result.seconds
        claim = self.claims.claim(task, worker, fence, result, norms or {}, wall_s)
        verdict = judge(task, claim) if task.kind == "TRAIN" else Verdict((claim,), claim)
        if verdict.counted is None:
            return self.claims.kept(task, claim, verdict)
        self.leases.liveness.forget(task, now)
        return self._counted(task, stage, verdict.counted, verdict, wall_s)

    def _counted(self, task: Task, stage: Stage, claim: Claim, verdict: Verdict, wall_s: float) -> Decision:
        """The result of a claim counts."""
        result = result_of(claim)
        counted = result.model_dump(mode="json", exclude={"outputs", "step_losses", "fetched_bytes"})
        done = replace(
            task, status="done", holders=(), checkpoint=None, claims=(), outputs=claim.outputs, result=counted
        )
        settled = self.claims.settled(task, verdict)
        draft = _Draft(self.state)
        draft.put([*settled.rows, done])
        obsolete: tuple[str, ...] = (task.checkpoint.blob.digest,) if task.checkpoint else ()
        if task.kind == "TRAIN":
            self._train_next(draft, stage, task, result)
        measured = self._measured(draft, done) if task.kind == STOP else []
        metric = self._metric(task, stage, claim, verdict, wall_s)
        left = (*obsolete, *settled.obsolete, *sorted(digests_in(measured)))
        decision = self._advanced(draft, wall_s, (metric,), left)
        finished = {*decision.finished_tasks, *(each.task_id for each in measured)}
        return replace(decision, finished_tasks=tuple(sorted(finished)), notes=settled.notes, disputes=settled.disputes)

    def _measured(self, draft: _Draft, done: Task) -> list[Task]:
        """The tasks of a snapshot that is wholly measured by now, with what follows from them in the draft."""
        best, measured = self.stopping.settled(draft.view(), done)
        draft.put(best)
        return measured

    def save_progress(self, worker_id: str, task_id: str, fence: int, checkpoint: Checkpoint, now: float) -> Decision:
        """The next holder of the task goes on from `checkpoint`, unless one is kept that has got as far.

        A decision without rows keeps nothing. Raises StaleLease, UnknownTask or RejectedTensor.
        """
        self.leases.known(worker_id, now)
        task = self.leases.held_task(task_id, fence, worker_id)
        steps = self.plan.inner_steps(self.state.stages[task.stage].model) if task.kind == "TRAIN" else 0
        if checkpoint.steps >= steps:
            raise RejectedTensor(f"task {task_id} has {steps} steps; a checkpoint of {checkpoint.steps} is none of it")
        kept = task.checkpoint
        if task.independent or (kept is not None and kept.steps >= checkpoint.steps):
            return Decision()
        return Decision((replace(task, checkpoint=checkpoint),), obsolete=(kept.blob.digest,) if kept else ())

    def _train_next(self, draft: _Draft, stage: Stage, task: Task, result: TaskResult) -> None:
        """The shard moves on: its next task, its new inner state."""
        shard = self.state.shards[f"{stage.model}/{task.subject}"]
        trained = self.plan.trained(stage, shard, result.outputs.get("inner_state"))
        draft.put([trained])
        if trained.phase in self.plan.phases_of(stage):
            draft.put([self.plan.train_task(stage, trained)])

    def _metric(self, task: Task, stage: Stage, claim: Claim, verdict: Verdict, wall_s: float) -> dict[str, Any]:
        metric = {
            "task_id": task.task_id,
            "stage": task.stage,
            "kind": task.kind,
            "phase": task.phase,
            "model": stage.model,
            "worker": claim.worker,
            "wall_s": wall_s,
            **claim.result,
        }
        if task.kind == "TRAIN":
            shard = self.state.shards[f"{stage.model}/{task.subject}"]
            metric["shard"] = shard.shard
            metric["path"] = self.plan.topology(stage.model).path_id(shard.path_index)
            metric["first_step"] = self.plan.first_step(stage.model) + task.phase * claim.result["steps"]
            metric["norms"] = self.claims.gradient_norms(stage.model, claim.norms)
        if verdict.note:
            metric["note"] = verdict.note
        return metric

    # --- modules ----------------------------------------------------------------------------------------------------

    def contributions(self, model: str, module_id: str) -> list[tuple[Shard, Task]]:
        """The completed tasks (in shard order) whose contributions the module's next version takes."""
        version = self.state.modules[f"{model}/{module_id}"].version
        stage = self.plan.stage_of_phase(model, version)
        found = []
        for shard in self.plan.topology(model).shards_of_module(module_id):
            task = self.state.tasks.get(f"{stage}/TRAIN/{version}/{shard}")
            if task is not None and task.status == "done":
                found.append((self.state.shards[f"{model}/{shard}"], task))
        return found

    def due_steps(self) -> list[StepDue]:
        """The modules whose contributions are all in, and that have not stepped yet."""
        due = []
        for stage in self.state.stages.values():
            if stage.kind not in TRAINING or stage.status != "running":
                continue
            for module in self.state.modules_of(stage.model):
                step = self._step_due(stage, module)
                if step is not None:
                    due.append(step)
        return due

    def _step_due(self, stage: Stage, module: Module) -> StepDue | None:
        model = stage.model
        shards = self.plan.topology(model).shards_of_module(module.module_id)
        found = self.contributions(model, module.module_id)
        if len(found) < len(shards) or module.version not in self.plan.phases_of(stage):
            return None
        weights = self.plan.contribution_weights(self.state, model, module.module_id)
        taken = tuple((s.shard, weights[s.shard], task.outputs[module.module_id]) for s, task in found)
        return StepDue(model, module, taken)

    def module_stepped(self, due: StepDue, params: BlobRef, momentum: BlobRef | None, wall_s: float) -> Decision:
        """The new version is durable: publish it, and let go of what it was made of."""
        old = due.module
        kept = (old.params, *old.history)[: self.plan.config.execution.keep_versions - 1]
        dropped = (old.params, *old.history)[self.plan.config.execution.keep_versions - 1 :]
        draft = _Draft(self.state)
        stepped = replace(old, version=old.version + 1, params=params, momentum=momentum, history=kept)
        draft.put([stepped])
        draft.put(self.stopping.due(draft.view(), stepped))
        obsolete = [ref.digest for ref in dropped] + [ref.digest for _, _, ref in due.contributions]
        if old.momentum:
            obsolete.append(old.momentum.digest)
        consumed = self._consumed_tasks(due, stepped)
        obsolete += sorted(digests_in([self.state.tasks[task_id] for task_id in consumed]))
        decision = self._advanced(draft, wall_s, obsolete=tuple(obsolete))
        finished = {*decision.finished_tasks, *consumed}
        return replace(decision, finished_tasks=tuple(sorted(finished)))

    def _consumed_tasks(self, due: StepDue, stepped: Module) -> list[str]:
        """TRAIN tasks all of whose modules have stepped: the journal alone keeps them from now on."""
        stage = self.plan.stage_of_phase(due.model, due.module.version)
        topology = self.plan.topology(due.model)
        consumed = []
        for shard, _, _ in due.contributions:
            modules = topology.modules_of_path(topology.path_of_shard(shard))
            others = [self.state.modules[f"{due.model}/{m}"] for m in modules if m != stepped.module_id]
            if all(module.version >= stepped.version for module in others):
                consumed.append(f"{stage}/TRAIN/{due.module.version}/{shard}")
        return consumed

    # --- the coordinator's own tasks --------------------------------------------------------------------------------

    def local_tasks(self) -> list[Task]:
        """The coordinator's own work that is ready: building the corpus, fitting, dividing, summarising."""
        return [task for task in self.state.tasks.values() if task.local and task.status == "ready"]

    def local_done(self, task: Task, result: dict[str, Any], wall_s: float) -> Decision:
        """The coordinator's own task is done; its result is small and stands in the row."""
        draft = _Draft(self.state)
        draft.put([replace(task, status="done", result=result)])
        return self._advanced(draft, wall_s)

    def pause(self, reason: str) -> Decision:
        """Stop handing out tasks until the coordinator is started again."""
        return Decision((replace(self.state.standing, paused=reason),))

    def consumed(self) -> list[str]:
        """Tasks that only the journal needs (found after a restart): of finished stages, and those stepped already."""
        found = [task.task_id for task in self.state.tasks.values() if self.state.stages[task.stage].status == "done"]
        for task in self.state.tasks.values():
            if self.state.stages[task.stage].status == "done" or task.kind != "TRAIN" or task.status != "done":
                continue
            model = self.state.stages[task.stage].model
            path_index = self.state.shards[f"{model}/{task.subject}"].path_index
            modules = self.plan.topology(model).modules_of_path(path_index)
            if all(self.state.modules[f"{model}/{module_id}"].version > task.phase for module_id in modules):
                found.append(task.task_id)
        return found + self.stopping.consumed(self.state)

    def apply(self, decision: Decision) -> None:
        """Make a stored decision current."""
        self.state.apply(decision.rows)
        self.state.forget_tasks(decision.finished_tasks)
        self.leases.liveness.losses.settle()

    def referenced(self) -> set[str]:
        """Digests that some row needs; everything else in the store is garbage."""
        return self._referenced.digests(self.state)
