"""Leases: who holds which task, under which fence, and what takes it away.

Pure like the rest of the state machine; which task suits a worker is in matching.py, who is alive in liveness.py. Every
lease has a fencing token, a worker holds one at most, a task has two holders at most: the first complete wins, the
other is a no-op. DiPaCo Sec 3 (task queue, backup pool).
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace

from coordinator.claims import Claims
from coordinator.decisions import Decision, Lease
from coordinator.liveness import Liveness
from coordinator.matching import MAX_HOLDERS, Matching
from coordinator.ownership import check_owner, new_worker_id
from coordinator.plan import Plan
from coordinator.state import Holder, Row, State, Task, Worker
from protocol.errors import StaleLease, UnknownTask, UnknownWorker
from protocol.tasks import Capabilities

MAX_WORKERS = 4096
# A lease is given again so many times with the same checkpoint: replies are lost now and then, a blob is for ever.
MAX_REPEATS = 3


class Leases:
    """Decisions on workers and the tasks they hold."""

    def __init__(self, plan: Plan, state: State, random_generator: random.Random, claims: Claims) -> None:
        self.plan = plan
        self.state = state
        self.claims = claims
        self.execution = plan.config.execution
        self.liveness = Liveness(plan, state)
        self.matching = Matching(plan, state, claims, self.liveness)
        self._random = random_generator
        self._asked_again: dict[Holder, tuple[str, int]] = {}

    def reconcile(self, now: float) -> None:
        """Leases and workers are again what the rows say, after a decision that could not be stored."""
        self.liveness.losses.take_back()
        live = {
            (task.task_id, holder.fence): (task, holder)
            for task in self.state.tasks.values()
            for holder in task.holders
        }
        for key in self.state.lifelines.keys() - live.keys():
            del self.state.lifelines[key]
        for key in live.keys() - self.state.lifelines.keys():
            self.liveness.begin(*live[key], now)
        held = {holder.worker_id: task.task_id for task, holder in live.values()}
        for worker in self.state.workers.values():
            worker.task_id = held.get(worker.worker_id, "")

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
        holder = held.holder(worker_id) if held is not None else None
        if held is not None and holder is not None:
            self.liveness.begin(held, holder, now)
            return self._again(held, holder)
        best = self.matching.best(worker, cached, now)
        if isinstance(best, str):
            return Lease(waiting_for=best)
        return self._granted(best[0], worker, now)

    def _again(self, task: Task, holder: Holder) -> Lease:
        """A lease that is live already, for a worker that did not get the reply, or could not read the checkpoint.

        One that asks for the same checkpoint over and over does not find it: the task starts from its beginning.
        """
        decision = Decision()
        if task.checkpoint is not None and not task.independent:
            digest = task.checkpoint.blob.digest
            named, times = self._asked_again.get(holder, ("", 0))
            self._asked_again[holder] = (digest, times + 1 if named == digest else 1)
            if self._asked_again[holder][1] > MAX_REPEATS:
                task = replace(task, checkpoint=None)
                note = f"task {task.task_id} starts over: its partial progress ({digest}) cannot be read"
                decision = Decision((task,), obsolete=(digest,), notes=(note,))
        return Lease(decision, task, holder.fence, self.matching.spec(task))

    def _granted(self, task: Task, worker: Worker, now: float) -> Lease:
        pinned = self.matching.pinned(task, worker)
        task = next((row for row in pinned.rows if isinstance(row, Task) and row.key == task.key), task)
        spec = self.matching.spec(task)
        holder = Holder(worker.worker_id, task.fence + 1)
        if len(task.holders) == MAX_HOLDERS:
            task = self._without(task, self.liveness.longest_silent(task), lost=True)
        audited, notes = self.claims.chosen(task, worker)
        holders = (*task.holders, holder)
        leased = replace(task, status="leased", holders=holders, fence=holder.fence, audited=audited)
        self.liveness.begin(leased, holder, now)
        worker.task_id, worker.steps = task.task_id, task.steps_kept
        rows = (*(row for row in pinned.rows if row.key != task.key), leased)
        return Lease(Decision(rows, obsolete=pinned.obsolete, notes=notes), leased, holder.fence, spec)

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
        self.liveness.heard(task, worker, lifeline, steps, tokens, now)
        return False, self.execution.lease_s

    def release(self, worker_id: str, task_id: str, fence: int, reason: str, leaving: bool, now: float) -> Decision:
        """The worker gives a task back, with a reason as a failed attempt; too many of these pause the run.

        A worker that leaves gives back whatever it holds.
        """
        worker = self.known(worker_id, now)
        worker.task_id = ""
        if leaving:
            del self.state.workers[worker_id]
            held = [(task, holder) for task in self.state.tasks.values() if (holder := task.holder(worker_id))]
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
        self.liveness.end(task, holder, lost=lost)
        return task.held_by(other for other in task.holders if other != holder)

    def expire(self, now: float) -> Decision:
        """Leases whose end has passed are over; silent workers are forgotten; what nobody decides pauses the run."""
        changed: dict[str, Task] = {}
        for task_id, fence in self.liveness.ended(now):
            task = changed.get(task_id) or self.state.tasks[task_id]
            [holder] = (other for other in task.holders if other.fence == fence)
            changed[task_id] = self._without(task, holder, lost=True)
        silent = [w.worker_id for w in self.state.workers.values() if w.last_seen_s + 5 * self.execution.lease_s < now]
        for worker_id in silent:
            del self.state.workers[worker_id]
        live = {holder for task in self.state.tasks.values() for holder in task.holders}
        self._asked_again = {holder: asked for holder, asked in self._asked_again.items() if holder in live}
        undecided = self.claims.undecided(self.matching.suits, now)
        return replace(undecided, rows=(*changed.values(), *undecided.rows))

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


def _counted(failures: Iterable[str]) -> list[str]:
    """Each reason once, with the workers that gave it."""
    workers: dict[str, list[str]] = {}
    for failure in failures:
        name, _, reason = failure.partition(": ")
        workers.setdefault(reason, []).append(name)
    return [f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in workers.items()]
