"""The state machine: who gets which task, which results count, when a module steps, when a stage is over.

Pure: `now` (monotonic seconds), wall time and the random generator are arguments; a decision returns rows for the
journal and applies nothing. Task and lease rules follow DiPaCo Sec 3 (task queue) with fencing tokens; a result
under a stale token changes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from coordinator.expected import ExpectedOutput
from coordinator.plan import TRAINING, Plan
from coordinator.state import Module, Row, Shard, Stage, State, Task, Worker
from protocol.errors import RejectedTensor, StaleLease, UnknownTask, UnknownWorker
from protocol.tasks import BlobRef, Capabilities, Message, TaskResult

NUMERIC_KINDS = ("FEATURIZE", "TRAIN", "EVALUATE")


@dataclass(frozen=True, slots=True)
class Decision:
    """What to store (in one transaction) and then to apply."""

    rows: tuple[Row, ...] = ()
    metrics: tuple[dict[str, Any], ...] = ()
    obsolete: tuple[str, ...] = ()
    finished_tasks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Lease:
    """A task handed out (`task` set), or why there is none."""

    decision: Decision = Decision()
    task: Task | None = None
    spec: Message | None = None
    waiting_for: str = ""
    finished: bool = False


@dataclass(frozen=True, slots=True)
class StepDue:
    """A module whose contributions for its version are all in: (shard, training tokens, blob) in shard order."""

    model: str
    module: Module
    contributions: tuple[tuple[int, int, BlobRef], ...]


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
        self.execution = plan.config.execution
        self._random = random_generator
        self._stage_order: dict[str, int] = {stage.name: index for index, stage in enumerate(plan.stages())}

    # --- opening and advancing --------------------------------------------------------------------------------------

    def open(self, wall_s: float) -> Decision:
        """The rows of a run that has just been created."""
        draft = _Draft(self.state)
        draft.put(self.plan.stages())
        return self._advanced(draft, wall_s)

    def resume(self, now: float) -> Decision:
        """After a restart every live lease gets one fresh deadline, and a pause is lifted with its failures."""
        leased = [task for task in self.state.tasks.values() if task.status == "leased"]
        self.state.deadlines = {task.task_id: now + self.execution.lease_s for task in leased}
        if not self.state.standing.paused:
            return Decision()
        rows: list[Row] = [replace(task, failures=()) for task in self.state.tasks.values() if task.failures]
        return Decision((*rows, replace(self.state.standing, paused="")))

    def _advanced(
        self, draft: _Draft, wall_s: float, metrics: tuple[dict[str, Any], ...] = (), obsolete: tuple[str, ...] = ()
    ) -> Decision:
        """Start and finish stages as far as the draft allows."""
        while self._advance_once(draft, wall_s):
            pass
        closed = [row.name for row in draft.rows.values() if isinstance(row, Stage) and row.status == "done"]
        over = [task for task in draft.view().tasks.values() if task.stage in closed]
        left = {digest for task in over for digest in _digests_of_task(task)}
        return Decision(
            tuple(draft.rows.values()), metrics, (*obsolete, *sorted(left)), tuple(task.task_id for task in over)
        )

    def _advance_once(self, draft: _Draft, wall_s: float) -> bool:
        view = draft.view()
        for stage in view.stages.values():
            if stage.status == "waiting" and all(view.stages[name].status == "done" for name in stage.after):
                draft.put([replace(stage, status="running", started_s=wall_s), *self.plan.begin(view, stage)])
                return True
            if stage.status == "running" and self._step_is_over(view, stage):
                self._next_step(draft, view, stage, wall_s)
                return True
        if not view.standing.finished and all(stage.status == "done" for stage in view.stages.values()):
            draft.put([replace(view.standing, finished=True)])
        return False

    def _step_is_over(self, view: State, stage: Stage) -> bool:
        if stage.kind in TRAINING:
            phases = self.plan.num_phases(stage.model)
            return all(module.version == phases for module in view.modules_of(stage.model))
        return all(task.status == "done" for task in view.tasks_of(stage.name))

    def _next_step(self, draft: _Draft, view: State, stage: Stage, wall_s: float) -> None:
        tasks = None if stage.kind in TRAINING else self.plan.proceed(view, stage)
        if tasks is not None:
            step = stage.step + 1
            draft.put([replace(stage, step=step), *(replace(task, step=step) for task in tasks)])
            return
        result, rows = self.plan.conclude(view, stage)
        draft.put([replace(stage, status="done", finished_s=wall_s, result=result), *rows])

    # --- workers ----------------------------------------------------------------------------------------------------

    def register(self, worker_id: str, name: str, capabilities: Capabilities, now: float) -> str:
        """A worker says hello, for the first time (empty id) or after a reconnection. Returns its id."""
        worker_id = worker_id or f"w{self._random.getrandbits(48):012x}"
        held = [task for task in self.state.tasks.values() if task.status == "leased" and task.worker_id == worker_id]
        task_id = held[0].task_id if held else ""
        self.state.workers[worker_id] = Worker(worker_id, name, capabilities, now, task_id=task_id)
        return worker_id

    def _worker(self, worker_id: str, now: float) -> Worker:
        worker = self.state.workers.get(worker_id)
        if worker is None:
            raise UnknownWorker(f"worker {worker_id!r} is not known here; say hello again")
        worker.last_seen_s = now
        return worker

    def lease(self, worker_id: str, cached: frozenset[str], now: float) -> Lease:
        """The best task the worker can do now, under a new fence; or why there is none.

        A worker that holds a lease is given the same one again: it did not get the reply.
        """
        worker = self._worker(worker_id, now)
        if self.state.standing.finished:
            return Lease(finished=True, waiting_for="the run is finished")
        if self.state.standing.paused:
            return Lease(waiting_for=f"the run is paused: {self.state.standing.paused}")
        held = self.state.tasks.get(worker.task_id)
        if held is not None and held.status == "leased" and held.worker_id == worker_id:
            self.state.deadlines[held.task_id] = now + self.execution.lease_s
            return Lease(task=held, spec=self.spec(held))
        reasons: list[str] = []
        candidates = sorted(self._leasable(), key=lambda task: self._preference(task, worker, cached))
        offers = (offer for task in candidates if (offer := self._offer(task, worker, reasons)) is not None)
        task, spec = next(offers, (None, None))
        if task is None or spec is None:
            return Lease(waiting_for=reasons[0] if reasons else "no task is ready")
        leased = replace(task, status="leased", worker_id=worker_id, fence=task.fence + 1)
        stage = self.state.stages[task.stage]
        pinned = [replace(stage, fingerprint=worker.capabilities.fingerprint)] if self._pins(stage, task) else []
        self.state.deadlines[task.task_id] = now + self.execution.lease_s
        worker.task_id, worker.steps, worker.tokens, worker.lease_started_s = task.task_id, 0, 0, now
        return Lease(Decision((leased, *pinned)), leased, spec)

    def _leasable(self) -> list[Task]:
        ready = (task for task in self.state.tasks.values() if task.status == "ready" and not task.local)
        return [
            task
            for task in ready
            if task.kind != "TRAIN" or self.plan.is_trainable(self.state, self.state.stages[task.stage], task)
        ]

    def _offer(self, task: Task, worker: Worker, reasons: list[str]) -> tuple[Task, Message] | None:
        """The task with its spec, if the worker can honour its numerics, memory and fingerprint class."""
        stage = self.state.stages[task.stage]
        spec = self.spec(task)
        refusal = self._refusal(task, stage, spec, worker)
        if refusal:
            reasons.append(refusal)
            return None
        return task, spec

    def spec(self, task: Task) -> Message:
        """The spec of a task as it would be leased now."""
        if task.kind == "TRAIN":
            return self.plan.train_spec(self.state, self.state.stages[task.stage], task)
        return self.plan.stored_spec(task)

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
        if self._is_strict() and stage.fingerprint not in ("", offered.fingerprint):
            return (
                f"stage {stage.name} is pinned to {stage.fingerprint!r} (determinism: strict) and this worker is "
                f"{offered.fingerprint!r}"
            )
        return ""

    def _is_strict(self) -> bool:
        return self.plan.experiment.determinism == "strict"

    def _pins(self, stage: Stage, task: Task) -> bool:
        return self._is_strict() and not stage.fingerprint and task.kind in NUMERIC_KINDS

    def _preference(self, task: Task, worker: Worker, cached: frozenset[str]) -> tuple[Any, ...]:
        """Earlier phases first, then what this worker has not failed at, then what it holds the inner state of."""
        failed_here = any(reason.startswith(f"{worker.name}: ") for reason in task.failures)
        shard = self.state.shards.get(f"{self.state.stages[task.stage].model}/{task.subject}")
        inner_state = shard.inner_state if shard and task.kind == "TRAIN" else None
        misses = inner_state is not None and inner_state.digest not in cached
        return task.phase, failed_here, self._stage_order[task.stage], misses

    def heartbeat(
        self, worker_id: str, task_id: str, fence: int, steps: int, loss: float, tokens: int, now: float
    ) -> tuple[bool, float]:
        """Extend a lease. Returns (lost, seconds until it ends)."""
        worker = self._worker(worker_id, now)
        task = self.state.tasks.get(task_id)
        if task is None or not _holds(task, worker_id, fence):
            return True, 0.0
        worker.task_id, worker.steps, worker.loss, worker.tokens = task_id, steps, loss, tokens
        self.state.deadlines[task_id] = now + self.execution.lease_s
        return False, self.execution.lease_s

    def release(self, worker_id: str, task_id: str, fence: int, reason: str, leaving: bool, now: float) -> Decision:
        """The worker gives a task back, with a reason as a failed attempt; too many of these pause the run."""
        worker = self._worker(worker_id, now)
        worker.task_id = ""
        if leaving:
            del self.state.workers[worker_id]
        task = self.state.tasks.get(task_id)
        if task is None or not _holds(task, worker_id, fence):
            return Decision()
        return Decision(self._returned(task, f"{worker.name}: {reason}" if reason else ""))

    def _returned(self, task: Task, failure: str) -> tuple[Row, ...]:
        self.state.deadlines.pop(task.task_id, None)
        failures = (*task.failures, failure) if failure else task.failures
        back = replace(task, status="ready", worker_id="", failures=failures)
        if failure and len(failures) >= self.execution.max_attempts:
            reason = f"task {task.task_id} failed {len(failures)} times ({'; '.join(failures)})"
            return back, replace(self.state.standing, paused=reason)
        return (back,)

    def expire(self, now: float) -> Decision:
        """Leases whose deadline has passed are available again; silent workers are forgotten."""
        overdue = [task_id for task_id, deadline in self.state.deadlines.items() if deadline < now]
        rows: list[Row] = []
        for task_id in overdue:
            del self.state.deadlines[task_id]
            task = self.state.tasks.get(task_id)
            if task is not None and task.status == "leased":
                rows.append(replace(task, status="ready", worker_id=""))
        silent = [w.worker_id for w in self.state.workers.values() if w.last_seen_s + 5 * self.execution.lease_s < now]
        for worker_id in silent:
            del self.state.workers[worker_id]
        return Decision(tuple(rows))

    # --- results ----------------------------------------------------------------------------------------------------

    def held_task(self, task_id: str, fence: int) -> Task:
        """The task of a live lease; raises UnknownTask or StaleLease."""
        task = self.state.tasks.get(task_id)
        if task is None:
            raise UnknownTask(f"there is no open task {task_id!r}")
        if task.status != "leased" or task.fence != fence:
            raise StaleLease(f"the lease of task {task_id} under fence {fence} has ended; drop the task")
        return task

    def expected_outputs(self, task: Task) -> dict[str, ExpectedOutput]:
        """What each output of a task must be, by name."""
        if task.kind == "TRAIN":
            return self._expected_of_training(task)
        spec: Any = self.spec(task)
        if task.kind == "PACK":
            return {"tokens": ExpectedOutput.tokens()}
        if task.kind == "EVALUATE":
            return {"losses": ExpectedOutput.record()}
        name = {"sample": "features", "assign": "assignments", "route": "routes"}[spec.mode]
        return {name: ExpectedOutput.record()}

    def _expected_of_training(self, task: Task) -> dict[str, ExpectedOutput]:
        stage = self.state.stages[task.stage]
        shard = self.state.shards[f"{stage.model}/{task.subject}"]
        modules = self.plan.topology(stage.model).modules_of_path(shard.path_index)
        expected = {m: ExpectedOutput.module(self.plan.module_spec(self.state, stage.model, m)) for m in modules}
        if self.plan.experiment.inner.inner_state == "keep":
            expected["inner_state"] = ExpectedOutput.inner_state(self.plan.path_tensors(self.state))
        return expected

    def complete(
        self, worker_id: str, task_id: str, fence: int, result: TaskResult, now: float, wall_s: float
    ) -> Decision:
        """All outputs of a task count. Raises StaleLease, UnknownTask or RejectedTensor."""
        worker = self._worker(worker_id, now)
        task = self.held_task(task_id, fence)
        expected = self.expected_outputs(task)
        if set(result.outputs) != set(expected):
            raise RejectedTensor(f"task {task_id} has outputs {sorted(result.outputs)}, expected {sorted(expected)}")
        stage = self.state.stages[task.stage]
        if task.kind == "TRAIN" and result.steps != self.plan.inner_steps(stage.model):
            raise RejectedTensor(f"task {task_id} took {result.steps} steps, not {self.plan.inner_steps(stage.model)}")
        self.state.deadlines.pop(task_id, None)
        worker.task_id = ""
        counted = result.model_dump(mode="json", exclude={"outputs", "step_losses", "fetched_bytes"})
        done = replace(task, status="done", outputs=dict(result.outputs), result=counted)
        draft = _Draft(self.state)
        draft.put([done])
        obsolete: tuple[str, ...] = ()
        if task.kind == "TRAIN":
            obsolete = self._train_next(draft, stage, task, result)
        metric = self._metric(task, stage, worker, result, wall_s)
        return self._advanced(draft, wall_s, (metric,), obsolete)

    def _train_next(self, draft: _Draft, stage: Stage, task: Task, result: TaskResult) -> tuple[str, ...]:
        """The shard moves on: its next task, its new inner state. Returns blobs nothing needs any more."""
        shard = self.state.shards[f"{stage.model}/{task.subject}"]
        trained = self.plan.trained(stage, shard, result.outputs.get("inner_state"))
        draft.put([trained])
        if trained.phase < self.plan.num_phases(stage.model):
            draft.put([self.plan.train_task(stage, trained)])
        return (shard.inner_state.digest,) if shard.inner_state else ()

    def _metric(self, task: Task, stage: Stage, worker: Worker, result: TaskResult, wall_s: float) -> dict[str, Any]:
        metric = {
            "task_id": task.task_id,
            "stage": task.stage,
            "kind": task.kind,
            "phase": task.phase,
            "model": stage.model,
            "worker": worker.name,
            "wall_s": wall_s,
            **result.model_dump(mode="json", exclude={"outputs"}),
        }
        if task.kind == "TRAIN":
            shard = self.state.shards[f"{stage.model}/{task.subject}"]
            metric["shard"] = shard.shard
            metric["path"] = self.plan.topology(stage.model).path_id(shard.path_index)
            metric["first_step"] = self.plan.first_step(stage.model) + task.phase * result.steps
        return metric

    # --- modules ----------------------------------------------------------------------------------------------------

    def contributions(self, model: str, module_id: str) -> list[tuple[Shard, Task]]:
        """The completed tasks (in shard order) whose contributions the module's next version takes."""
        stage = next(s for s in self.state.stages.values() if s.model == model and s.kind in TRAINING)
        version = self.state.modules[f"{model}/{module_id}"].version
        found = []
        for shard in self.plan.topology(model).shards_of_module(module_id):
            task = self.state.tasks.get(f"{stage.name}/TRAIN/{version}/{shard}")
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
                step = self._step_due(stage.model, module)
                if step is not None:
                    due.append(step)
        return due

    def _step_due(self, model: str, module: Module) -> StepDue | None:
        shards = self.plan.topology(model).shards_of_module(module.module_id)
        found = self.contributions(model, module.module_id)
        if len(found) < len(shards) or module.version >= self.plan.num_phases(model):
            return None
        taken = tuple((s.shard, s.training_tokens, task.outputs[module.module_id]) for s, task in found)
        return StepDue(model, module, taken)

    def module_stepped(self, due: StepDue, params: BlobRef, momentum: BlobRef | None, wall_s: float) -> Decision:
        """The new version is durable: publish it, and let go of what it was made of."""
        old = due.module
        kept = (old.params, *old.history)[: self.execution.keep_versions - 1]
        dropped = (old.params, *old.history)[self.execution.keep_versions - 1 :]
        draft = _Draft(self.state)
        stepped = replace(old, version=old.version + 1, params=params, momentum=momentum, history=kept)
        draft.put([stepped])
        obsolete = [ref.digest for ref in dropped] + [ref.digest for _, _, ref in due.contributions]
        if old.momentum:
            obsolete.append(old.momentum.digest)
        decision = self._advanced(draft, wall_s, obsolete=tuple(obsolete))
        finished = {*decision.finished_tasks, *self._consumed_tasks(due, stepped)}
        return replace(decision, finished_tasks=tuple(sorted(finished)))

    def _consumed_tasks(self, due: StepDue, stepped: Module) -> list[str]:
        """TRAIN tasks all of whose modules have stepped: the journal alone keeps them from now on."""
        stage = next(s for s in self.state.stages.values() if s.model == due.model and s.kind in TRAINING)
        topology = self.plan.topology(due.model)
        consumed = []
        for shard, _, _ in due.contributions:
            modules = topology.modules_of_path(topology.path_of_shard(shard))
            others = [self.state.modules[f"{due.model}/{m}"] for m in modules if m != stepped.module_id]
            if all(module.version >= stepped.version for module in others):
                consumed.append(f"{stage.name}/TRAIN/{due.module.version}/{shard}")
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
        return found

    def apply(self, decision: Decision) -> None:
        """Make a stored decision current."""
        self.state.apply(decision.rows)
        self.state.forget_tasks(decision.finished_tasks)

    def referenced(self) -> set[str]:
        """Digests that some row needs; everything else in the store is garbage."""
        return referenced_digests(self.state)


def _holds(task: Task, worker_id: str, fence: int) -> bool:
    return task.status == "leased" and task.worker_id == worker_id and task.fence == fence


def referenced_digests(state: State) -> set[str]:
    """Every digest that stands in a row."""
    refs: list[BlobRef | None] = []
    for module in state.modules.values():
        refs += [module.params, module.momentum, *module.history]
    for shard in state.shards.values():
        refs += [shard.manifest, shard.inner_state, *shard.files]
    digests = {ref.digest for ref in refs if ref is not None}
    for task in state.tasks.values():
        digests |= _digests_of_task(task)
    for stage in state.stages.values():
        digests |= _digests_in(stage.result)
    return digests


def _digests_of_task(task: Task) -> set[str]:
    outputs = {ref.digest for ref in task.outputs.values()}
    return outputs | _digests_in(task.spec) | _digests_in(task.result)


def _digests_in(value: Any) -> set[str]:
    if isinstance(value, str):
        return {value} if len(value) == 64 and all(c in "0123456789abcdef" for c in value) else set()
    if isinstance(value, dict):
        return set().union(*(_digests_in(item) for item in value.values())) if value else set()
    if isinstance(value, list | tuple):
        return set().union(*(_digests_in(item) for item in value)) if value else set()
    return set()
