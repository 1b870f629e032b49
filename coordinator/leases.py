"""Leases: which worker gets which task, how long it may hold it, and what takes it away.

Pure like the rest of the state machine. Every lease has a fencing token, a worker holds one at most, a task has two
holders at most: the first complete wins, the other is a no-op. DiPaCo Sec 3 (task queue, backup pool).
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from coordinator.arrivals import MIN_ARRIVALS
from coordinator.claims import Claims
from coordinator.decisions import Decision, Lease
from coordinator.losses import Losses
from coordinator.ownership import check_owner, new_worker_id
from coordinator.plan import TRAINING, Plan
from coordinator.state import Holder, Lifeline, Row, Stage, State, Task, Worker
from protocol.errors import StaleLease, UnknownTask, UnknownWorker
from protocol.tasks import Capabilities, Message

MAX_WORKERS = 4096
MAX_HOLDERS = 2
NUMERIC_KINDS = ("FEATURIZE", "TRAIN", "EVALUATE")
# A heartbeat is overdue after so many intervals at the least, whatever was measured.
BEATS_MISSED = 1.5
# A heartbeat is overdue after so many intervals while too few have been heard to tell.
UNMEASURED_BEATS = 2.0
# Steps may stand still for so many measured step times, and so many seconds, before a worker counts as hung.
STANDSTILL_STEPS, STANDSTILL_S = 3.0, 6.0
# A backup copy is worth it where the holder needs so many times longer for the rest than another for the whole.
BACKUP_FACTOR = 1.5


class Leases:
    """Decisions on workers and the tasks they hold."""

    def __init__(self, plan: Plan, state: State, random_generator: random.Random, claims: Claims) -> None:
        self.plan = plan
        self.state = state
        self.claims = claims
        self.execution = plan.config.execution
        self.losses = Losses(state)
        self._random = random_generator
        self._stage_order = {stage.name: index for index, stage in enumerate(plan.stages())}

    def renew_all(self, now: float) -> None:
        """After a restart every live lease gets one fresh deadline."""
        for task in self.state.tasks.values():
            for holder in task.holders:
                self._begin(task, holder, now)

    def _begin(self, task: Task, holder: Holder, now: float) -> None:
        """A lease starts, or starts over: its first heartbeat is awaited like any other."""
        ends_s, overdue_s = now + self.execution.lease_s, now + self._silence_s(holder.worker_id)
        self.state.lifelines[task.task_id, holder.fence] = Lifeline(ends_s, overdue_s, now, now, now)

    def prolong(self, seconds: float) -> None:
        """The run stood still for so long: no lease ends, or is overdue, for that."""
        for lifeline in self.state.lifelines.values():
            lifeline.ends_s += seconds
            lifeline.overdue_s += seconds

    def reconcile(self, now: float) -> None:
        """Leases and workers are again what the rows say, after a decision that could not be stored."""
        live = {
            (task.task_id, holder.fence): (task, holder)
            for task in self.state.tasks.values()
            for holder in task.holders
        }
        for key in self.state.lifelines.keys() - live.keys():
            del self.state.lifelines[key]
        for key in live.keys() - self.state.lifelines.keys():
            self._begin(*live[key], now)
        held = {holder.worker_id: task.task_id for task, holder in live.values()}
        for worker in self.state.workers.values():
            worker.task_id = held.get(worker.worker_id, "")

    def forget(self, task: Task, now: float) -> None:
        """No lease of the task is live any more: it is complete, and a holder that is overdue was lost."""
        for holder in task.holders:
            lifeline = self.state.lifelines.pop((task.task_id, holder.fence), None)
            if lifeline is not None and lifeline.overdue_s < now:
                self.losses.lost(lifeline)
            elif lifeline is not None:
                self.losses.kept(lifeline, now)

    def register(self, worker_id: str, name: str, capabilities: Capabilities, now: float, identity: str = "") -> str:
        """A worker says hello, for the first time (empty id) or after a reconnection. Returns its id.

        `identity` is the name in its certificate, if it has one; else its name is held against it. Raises Forbidden
        where the id is another's, Banned.
        """
        check_owner(worker_id, identity)
        self.claims.check_allowed(identity or name)
        if worker_id not in self.state.workers:
            self._forget_silent(MAX_WORKERS - 1)
        worker_id = worker_id or new_worker_id(self._random.getrandbits(48), identity)
        held = [t.task_id for t in self.state.tasks.values() if any(h.worker_id == worker_id for h in t.holders)]
        self.state.workers[worker_id] = Worker(
            worker_id, name, capabilities, now, task_id=held[0] if held else "", identity=identity
        )
        return worker_id

    def _forget_silent(self, limit: int) -> None:
        """Forget those that were silent longest, beyond `limit`: they may say hello again."""
        excess = max(0, len(self.state.workers) - limit)
        for worker in sorted(self.state.workers.values(), key=lambda worker: worker.last_seen_s)[:excess]:
            del self.state.workers[worker.worker_id]

    def known(self, worker_id: str, now: float) -> Worker:
        """The worker, heard of now; raises UnknownWorker, Banned."""
        worker = self.state.workers.get(worker_id)
        if worker is None:
            raise UnknownWorker(f"worker {worker_id!r} is not known here; say hello again")
        self.claims.check_allowed(worker.identity)
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
        holder = _holder(held, worker_id) if held is not None else None
        if held is not None and holder is not None:
            self._begin(held, holder, now)
            return Lease(task=held, fence=holder.fence, spec=self.spec(held))
        reasons: list[str] = []
        candidates = sorted(self._leasable(worker, now), key=lambda task: self._preference(task, worker, cached, now))
        offers = (offer for task in candidates if (offer := self._offer(task, worker, reasons, now)) is not None)
        task, spec = next(offers, (None, None))
        if task is None or spec is None:
            return Lease(waiting_for=reasons[0] if reasons else "no task is ready")
        return self._granted(task, spec, worker, now)

    def _granted(self, task: Task, spec: Message, worker: Worker, now: float) -> Lease:
        holder = Holder(worker.worker_id, task.fence + 1)
        if len(task.holders) == MAX_HOLDERS:
            longest_silent = min(task.holders, key=lambda each: self.state.lifelines[task.task_id, each.fence].heard_s)
            task = self._without(task, longest_silent, lost=True)
        audited, notes = self.claims.chosen(task, worker)
        holders = (*task.holders, holder)
        leased = replace(task, status="leased", holders=holders, fence=holder.fence, audited=audited)
        stage = self.state.stages[task.stage]
        pinned = (
            [replace(stage, fingerprint=worker.capabilities.fingerprint)] if self._pins(stage, task, worker) else []
        )
        self._begin(leased, holder, now)
        worker.task_id, worker.steps = task.task_id, _steps_kept(task)
        return Lease(Decision((leased, *pinned), notes=notes), leased, holder.fence, spec)

    def _leasable(self, worker: Worker, now: float) -> list[Task]:
        """Ready tasks whose modules are ready, and held ones that are worth a second holder."""
        found = []
        for task in self.state.tasks.values():
            if task.status == "leased":
                if self._wants_second_holder(task, worker, now):
                    found.append(task)
            elif task.status == "ready" and not task.local:
                if task.kind != "TRAIN" or self.plan.is_trainable(self.state, self.state.stages[task.stage], task):
                    found.append(task)
        return found

    def _wants_second_holder(self, task: Task, worker: Worker, now: float) -> bool:
        """Whether a task is overdue with all its holders, or one holder would be done with it later than `worker`.

        Of two overdue holders the one that was silent longest loses its lease.
        """
        if _holder(task, worker.worker_id) is not None:
            return False
        if self._is_overdue(task, now):
            return True
        if len(task.holders) == MAX_HOLDERS:
            return False
        [holder] = task.holders
        lifeline = self.state.lifelines[task.task_id, holder.fence]
        if self.claims.wants_another(task, worker):
            return True
        slow = self.state.workers.get(holder.worker_id)
        if task.kind != "TRAIN" or slow is None or min(slow.step_times.count, worker.step_times.count) < MIN_ARRIVALS:
            return False
        steps = self.plan.inner_steps(self.state.stages[task.stage].model)
        remaining_s = (steps - max(lifeline.steps, _steps_kept(task))) * slow.step_times.mean_s
        return remaining_s > BACKUP_FACTOR * (steps - _steps_kept(task)) * worker.step_times.mean_s

    def _offer(self, task: Task, worker: Worker, reasons: list[str], now: float) -> tuple[Task, Message] | None:
        """The task with its spec, if the worker can honour its numerics, memory and fingerprint class."""
        stage = self.state.stages[task.stage]
        spec = self.spec(task)
        refusal = self._refusal(task, stage, spec, worker)
        if not refusal and not self.claims.may_take(
            task, worker, lambda other: not self._refusal(task, stage, spec, other), now
        ):
            refusal = f"task {task.task_id} is to be computed again by another worker"
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
        if self._is_strict() and stage.fingerprint not in ("", offered.fingerprint) and self._is_begun(stage):
            return (
                f"stage {stage.name} is pinned to {stage.fingerprint!r} (determinism: strict) and this worker is "
                f"{offered.fingerprint!r}"
            )
        return ""

    def _is_strict(self) -> bool:
        return self.plan.experiment.determinism == "strict"

    def _pins(self, stage: Stage, task: Task, worker: Worker) -> bool:
        differs = stage.fingerprint != worker.capabilities.fingerprint
        return self._is_strict() and task.kind in NUMERIC_KINDS and differs

    def _is_begun(self, stage: Stage) -> bool:
        """Whether a result of the stage counts or is being worked at: a class that left nothing behind binds nobody."""
        if any(task.kind in NUMERIC_KINDS and task.status != "ready" for task in self.state.tasks_of(stage.name)):
            return True
        return stage.kind in TRAINING and any(shard.phase for shard in self.state.shards_of(stage.model))

    def _preference(self, task: Task, worker: Worker, cached: frozenset[str], now: float) -> tuple[Any, ...]:
        """Earlier phases first, what this worker has not failed at, overdue tasks, then what it has the inner state of.

        A copy of a task that is only slow comes after everything else.
        """
        failed_here = any(reason.startswith(f"{worker.name}: ") for reason in task.failures)
        shard = self.state.shards.get(f"{self.state.stages[task.stage].model}/{task.subject}")
        inner_state = shard.inner_state if shard and task.kind == "TRAIN" else None
        misses = inner_state is not None and inner_state.digest not in cached
        overdue = bool(task.holders) and self._is_overdue(task, now)
        only_slow = bool(task.holders) and not overdue
        return only_slow, task.phase, not task.claims, failed_here, not overdue, self._stage_order[task.stage], misses

    def heartbeat(
        self, worker_id: str, task_id: str, fence: int, steps: int, loss: float, tokens: int, now: float
    ) -> tuple[bool, float]:
        """Extend a lease. Returns (lost, seconds until it ends)."""
        worker = self.known(worker_id, now)
        lifeline = self.state.lifelines.get((task_id, fence))
        task = self.state.tasks.get(task_id)
        if task is None or lifeline is None or Holder(worker_id, fence) not in task.holders:
            return True, 0.0
        worker.task_id, worker.loss = task_id, loss
        if now - lifeline.heard_s > self.execution.heartbeat_s / 4:  # not out of turn, to tell of the first step
            for gaps in (worker.beats, self.state.beats):
                gaps.observe(now - lifeline.heard_s)
        if steps > lifeline.steps:
            elapsed_s = now - lifeline.advanced_s
            if lifeline.steps and elapsed_s > 0:  # a first report may tell of steps that were taken over
                worker.step_times.observe(elapsed_s / (steps - lifeline.steps))
                worker.tokens_per_s = max(0, tokens - lifeline.tokens) / elapsed_s
            lifeline.advanced_s, lifeline.steps, lifeline.tokens = now, steps, tokens
        worker.steps = steps
        lifeline.heard_s, lifeline.ends_s = now, now + self.execution.lease_s
        lifeline.overdue_s = min(now + self._silence_s(worker_id), self._standstill_s(task, lifeline, worker))
        return False, self.execution.lease_s

    def _silence_s(self, worker_id: str) -> float:
        """How long this worker may say nothing before its task is worth a second holder.

        From its own heartbeats, else from those of all; after two intervals where nothing has been measured.
        """
        worker = self.state.workers.get(worker_id)
        gaps = worker.beats if worker and worker.beats.count >= MIN_ARRIVALS else self.state.beats
        if gaps.count < MIN_ARRIVALS:
            return min(UNMEASURED_BEATS * self.execution.heartbeat_s, self.execution.lease_s)
        return gaps.patience_s(BEATS_MISSED * self.execution.heartbeat_s, self.execution.lease_s)

    def _standstill_s(self, task: Task, lifeline: Lifeline, worker: Worker) -> float:
        """Until when steps may stand still while heartbeats come: a hung worker is not a slow one."""
        total = self.plan.inner_steps(self.state.stages[task.stage].model) if task.kind == "TRAIN" else 0
        if not 0 < lifeline.steps < total or not worker.step_times.count:
            return float("inf")
        return lifeline.advanced_s + STANDSTILL_STEPS * worker.step_times.mean_s + STANDSTILL_S

    def release(self, worker_id: str, task_id: str, fence: int, reason: str, leaving: bool, now: float) -> Decision:
        """The worker gives a task back, with a reason as a failed attempt; too many of these pause the run.

        A worker that leaves gives back whatever it holds.
        """
        worker = self.known(worker_id, now)
        worker.task_id = ""
        if leaving:
            del self.state.workers[worker_id]
            held = [(task, holder) for task in self.state.tasks.values() if (holder := _holder(task, worker_id))]
            return Decision(tuple(self._without(task, holder, lost=True) for task, holder in held))
        task = self.state.tasks.get(task_id)
        holder = Holder(worker_id, fence)
        if task is None or holder not in task.holders:
            return Decision()
        dropped = (task.checkpoint.blob.digest,) if reason and task.checkpoint else ()
        return Decision(self._returned(task, holder, f"{worker.name}: {reason}" if reason else ""), obsolete=dropped)

    def _returned(self, task: Task, holder: Holder, failure: str) -> tuple[Row, ...]:
        """The task without the holder; after a failure it starts over, since its checkpoint may be the cause."""
        back = self._without(task, holder)
        failures = (*task.failures, failure) if failure else task.failures
        back = replace(back, failures=failures, checkpoint=None if failure else task.checkpoint)
        if failure and len(failures) >= self.execution.max_attempts:
            reason = f"task {task.task_id} failed {len(failures)} times ({'; '.join(_counted(failures))})"
            return back, replace(self.state.standing, paused=reason)
        return (back,)

    def _without(self, task: Task, holder: Holder, *, lost: bool = False) -> Task:
        """The task without a holder, whose lease ended in peace or with its worker (`lost`)."""
        lifeline = self.state.lifelines.pop((task.task_id, holder.fence), None)
        if lifeline is not None and lost:
            self.losses.lost(lifeline)
        elif lifeline is not None:
            self.losses.kept(lifeline, lifeline.heard_s)
        holders = tuple(other for other in task.holders if other != holder)
        return replace(task, status="leased" if holders else "ready", holders=holders)

    def expire(self, now: float) -> Decision:
        """Leases whose end has passed are over; silent workers are forgotten."""
        over = [key for key, lifeline in self.state.lifelines.items() if lifeline.ends_s < now]
        changed: dict[str, Task] = {}
        for task_id, fence in over:
            task = changed.get(task_id) or self.state.tasks[task_id]
            [holder] = (other for other in task.holders if other.fence == fence)
            changed[task_id] = self._without(task, holder, lost=True)
        silent = [w.worker_id for w in self.state.workers.values() if w.last_seen_s + 5 * self.execution.lease_s < now]
        for worker_id in silent:
            del self.state.workers[worker_id]
        return Decision(tuple(changed.values()))

    def overdue(self, now: float) -> list[str]:
        """Tasks all of whose holders are overdue: workers that wait should ask again."""
        return [task.task_id for task in self.state.tasks.values() if task.holders and self._is_overdue(task, now)]

    def _is_overdue(self, task: Task, now: float) -> bool:
        return all(self.state.lifelines[task.task_id, holder.fence].overdue_s < now for holder in task.holders)

    def held_task(self, task_id: str, fence: int, worker_id: str | None = None) -> Task:
        """The task of a live lease, which `worker_id` holds if given; raises UnknownTask, StaleLease or Banned."""
        if worker_id in self.state.workers:
            self.claims.check_allowed(self.state.workers[worker_id].identity)
        task = self.state.tasks.get(task_id)
        if task is None:
            raise UnknownTask(f"there is no open task {task_id!r}")
        if all(holder.fence != fence or worker_id not in (None, holder.worker_id) for holder in task.holders):
            raise StaleLease(f"the lease of task {task_id} under fence {fence} has ended; drop the task")
        return task


def _holder(task: Task, worker_id: str) -> Holder | None:
    return next((holder for holder in task.holders if holder.worker_id == worker_id), None)


def _steps_kept(task: Task) -> int:
    """The inner steps of a task that a new holder need not take."""
    return task.checkpoint.steps if task.checkpoint else 0


def _counted(failures: Iterable[str]) -> list[str]:
    """Each reason once, with the workers that gave it."""
    workers: dict[str, list[str]] = {}
    for failure in failures:
        name, _, reason = failure.partition(": ")
        workers.setdefault(reason, []).append(name)
    return [f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in workers.items()]
