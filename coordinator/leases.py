"""Leases: which worker gets which task, how long it may hold it, and what takes it away.

Pure like the rest of the state machine. Every lease has a fencing token; a worker holds one at most. DiPaCo Sec 3 (task
queue, backup pool).
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from coordinator.decisions import Decision, Lease
from coordinator.plan import Plan
from coordinator.state import Row, Stage, State, Task, Worker
from protocol.errors import StaleLease, UnknownTask, UnknownWorker
from protocol.tasks import Capabilities, Message

NUMERIC_KINDS = ("FEATURIZE", "TRAIN", "EVALUATE")


class Leases:
    """Decisions on workers and the tasks they hold."""

    def __init__(self, plan: Plan, state: State, random_generator: random.Random) -> None:
        self.plan = plan
        self.state = state
        self.execution = plan.config.execution
        self._random = random_generator
        self._stage_order = {stage.name: index for index, stage in enumerate(plan.stages())}

    def renew_all(self, now: float) -> None:
        """After a restart every live lease gets one fresh deadline."""
        leased = [task for task in self.state.tasks.values() if task.status == "leased"]
        self.state.deadlines = {task.task_id: now + self.execution.lease_s for task in leased}

    def register(self, worker_id: str, name: str, capabilities: Capabilities, now: float) -> str:
        """A worker says hello, for the first time (empty id) or after a reconnection. Returns its id."""
        worker_id = worker_id or f"w{self._random.getrandbits(48):012x}"
        held = [task for task in self.state.tasks.values() if task.status == "leased" and task.worker_id == worker_id]
        task_id = held[0].task_id if held else ""
        self.state.workers[worker_id] = Worker(worker_id, name, capabilities, now, task_id=task_id)
        return worker_id

    def known(self, worker_id: str, now: float) -> Worker:
        """The worker, heard of now; raises UnknownWorker."""
        worker = self.state.workers.get(worker_id)
        if worker is None:
            raise UnknownWorker(f"worker {worker_id!r} is not known here; say hello again")
        worker.last_seen_s = now
        return worker

    def lease(self, worker_id: str, cached: frozenset[str], now: float) -> Lease:
        """The best task the worker can do now, under a new fence; or why there is none.

        A worker that holds a lease is given the same one again: it did not get the reply.
        """
        worker = self.known(worker_id, now)
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
        worker = self.known(worker_id, now)
        task = self.state.tasks.get(task_id)
        if task is None or not _holds(task, worker_id, fence):
            return True, 0.0
        worker.task_id, worker.steps, worker.loss, worker.tokens = task_id, steps, loss, tokens
        self.state.deadlines[task_id] = now + self.execution.lease_s
        return False, self.execution.lease_s

    def release(self, worker_id: str, task_id: str, fence: int, reason: str, leaving: bool, now: float) -> Decision:
        """The worker gives a task back, with a reason as a failed attempt; too many of these pause the run."""
        worker = self.known(worker_id, now)
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

    def held_task(self, task_id: str, fence: int) -> Task:
        """The task of a live lease; raises UnknownTask or StaleLease."""
        task = self.state.tasks.get(task_id)
        if task is None:
            raise UnknownTask(f"there is no open task {task_id!r}")
        if task.status != "leased" or task.fence != fence:
            raise StaleLease(f"the lease of task {task_id} under fence {fence} has ended; drop the task")
        return task


def _holds(task: Task, worker_id: str, fence: int) -> bool:
    return task.status == "leased" and task.worker_id == worker_id and task.fence == fence
