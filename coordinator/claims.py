"""Results that do not count at once: outliers, and tasks that are audited. Pure, a part of the state machine.

A claim is a complete result of a TRAIN task that is not counted yet; the task is given to another worker, from its
start. Which claim counts in the end stands in verdict.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from coordinator.decisions import Decision, Dispute
from coordinator.norms import Norms
from coordinator.plan import Plan
from coordinator.state import Claim, Conduct, Row, State, Task, Worker
from coordinator.verdict import MAX_CLAIMS, Verdict, differ, module_norms, names_of
from protocol.errors import Banned
from protocol.tasks import TaskResult

# For so many leases a third worker is waited for where two differ, before the run pauses and says so.
UNDECIDED_LEASES = 50


class Claims:
    """Who computes a doubted or audited task again, and what follows from what the results are."""

    def __init__(self, plan: Plan, state: State, random_generator: random.Random) -> None:
        self._plan = plan
        self._state = state
        self._execution = plan.config.execution
        self._random = random_generator
        self._norms = Norms(self._execution.quarantine_factor)
        self._said_alone = False
        self._alone_since_s: dict[str, float] = {}
        self._undecided_since_s: dict[str, float] = {}

    def learn(self, metric: Mapping[str, Any]) -> None:
        """A task counts: its norms, as its metric holds them, are what later ones are measured by."""
        self._norms.learn(metric.get("model", ""), metric.get("norms", {}))

    def check_allowed(self, identity: str) -> None:
        """Raises Banned."""
        if self._is_banned(identity):
            raise Banned(
                f"worker {identity} is banned from this run: {self._state.conduct[identity].banned}; to admit it again "
                f"start the coordinator with execution.unban: [{identity}]"
            )

    def unbanned(self) -> Decision:
        """At a start: those that the configuration names in `execution.unban` are admitted again."""
        lifted = [row for name in self._execution.unban if (row := self._state.conduct.get(name)) and row.banned]
        notes = (f"worker {row.identity} is admitted again, by execution.unban: {row.banned}" for row in lifted)
        return Decision(tuple(replace(row, banned="") for row in lifted), notes=tuple(notes))

    # --- who computes it --------------------------------------------------------------------------------------------

    def chosen(self, task: Task, worker: Worker) -> tuple[bool, tuple[str, ...]]:
        """Whether a task is audited, drawn when it is first leased, and what there is to say about that."""
        if task.kind != "TRAIN" or task.fence or not self._execution.audit_share:
            return task.audited, ()
        if any(other.identity != worker.identity for other in self.allowed()):
            return self._random.random() < self._execution.audit_share, ()
        said, self._said_alone = self._said_alone, True
        return False, () if said else (f"no task is audited while {worker.name} is the only worker",)

    def may_take(self, task: Task, worker: Worker, able: Callable[[Worker], bool], now: float) -> bool:
        """Whether the worker has made no claim to the task, or for as long as a lease no other one that is `able` came.

        After a restart of the coordinator the others are not known at once. Where two have differed a third decides:
        neither is asked again, whoever comes first would win.
        """
        taken = {claim.identity for claim in task.claims}
        if worker.identity not in taken:
            return True
        if differ(task.claims):
            return False
        if any(other.identity not in taken and able(other) for other in self.allowed()):
            self._alone_since_s.pop(task.task_id, None)
            return False
        return now - self._alone_since_s.setdefault(task.task_id, now) >= self._execution.lease_s

    def waits_for(self, task: Task) -> str:
        """Why a worker that has claimed the task is not given it again, in one sentence."""
        if differ(task.claims):
            return _undecided(task)
        return f"task {task.task_id} is to be computed again by another worker"

    def undecided(self, able: Callable[[Task, Worker], bool], now: float) -> Decision:
        """A pause, where the results of two workers differ and for long no other came that is `able` to decide."""
        waiting = [t for t in self._state.tasks.values() if differ(t.claims) and not self._is_awaited(t, able)]
        self._undecided_since_s = {t.task_id: self._undecided_since_s.get(t.task_id, now) for t in waiting}
        self._alone_since_s = {key: since for key, since in self._alone_since_s.items() if key in self._state.tasks}
        patience_s = UNDECIDED_LEASES * self._execution.lease_s
        late = [task for task in waiting if now - self._undecided_since_s[task.task_id] >= patience_s]
        if not late or self._state.standing.paused:
            return Decision()
        note = f"{_undecided(late[0])}; none came in {patience_s:g} s: start another worker and the coordinator again"
        dispute = Dispute(late[0].task_id, late[0].claims, None, (), note)
        return Decision((replace(self._state.standing, paused=note),), notes=(note,), disputes=(dispute,))

    def _is_awaited(self, task: Task, able: Callable[[Task, Worker], bool]) -> bool:
        """Whether somebody computes the task again, or will when it is idle."""
        taken = {claim.identity for claim in task.claims}
        return bool(task.holders) or any(w.identity not in taken and able(task, w) for w in self.allowed())

    def wants_another(self, task: Task, worker: Worker) -> bool:
        """Whether an audited task with one holder is worth the idle worker's while: it is computed twice anyway."""
        held_by = [self._state.workers.get(holder.worker_id) for holder in task.holders]
        return task.audited and not task.claims and all(h and h.identity != worker.identity for h in held_by)

    def holds(self, task_id: str, fence: int) -> bool:
        """Whether the result under this fence is a claim already."""
        task = self._state.tasks.get(task_id)
        return task is not None and any(claim.fence == fence for claim in task.claims)

    def allowed(self) -> list[Worker]:
        """The workers that are known and not banned."""
        return [worker for worker in self._state.workers.values() if not self._is_banned(worker.identity)]

    def _is_banned(self, identity: str) -> bool:
        return identity in self._state.conduct and bool(self._state.conduct[identity].banned)

    # --- what follows -----------------------------------------------------------------------------------------------

    def gradient_norms(self, model: str, norms: Mapping[str, float]) -> dict[str, float]:
        """The norms of a result's outer gradients, by module; none where it holds parameters (outer.kind 'assign')."""
        return module_norms(norms) if self._plan.outer(model).kind == "nesterov" else {}

    def claim(
        self, task: Task, worker: Worker, fence: int, result: TaskResult, norms: Mapping[str, float], wall_s: float
    ) -> Claim:
        """A result as a claim, with what there is against its norms."""
        model = self._state.stages[task.stage].model
        return Claim(
            identity=worker.identity,
            worker=worker.name,
            fingerprint=worker.capabilities.fingerprint,
            fence=fence,
            outputs=dict(result.outputs),
            norms=dict(norms),
            result=result.model_dump(mode="json", exclude={"outputs"}),
            wall_s=wall_s,
            outlier=self._norms.doubt(model, self.gradient_norms(model, norms)),
        )

    def kept(self, task: Task, claim: Claim, verdict: Verdict) -> Decision:
        """Nothing counts yet: the task is free for another worker.

        Only an audited one keeps its other holder: that of any other may rest on partial progress of the first.
        """
        holders = tuple(holder for holder in task.holders if task.audited and self._is_other(holder.worker_id, claim))
        for holder in set(task.holders) - set(holders):
            self._state.lifelines.pop((task.task_id, holder.fence), None)
        rows: list[Row] = [replace(task.held_by(holders), checkpoint=None, claims=verdict.claims)]
        if verdict.paused:
            rows.append(replace(self._state.standing, paused=verdict.note))
        disputes = (_dispute(task, verdict),) if verdict.paused else ()
        notes = (verdict.note,) if verdict.note else ()
        return Decision(tuple(rows), obsolete=_checkpoint_of(task), notes=notes, disputes=disputes)

    def _is_other(self, worker_id: str, claim: Claim) -> bool:
        worker = self._state.workers.get(worker_id)
        return worker is not None and worker.identity != claim.identity

    def settled(self, task: Task, verdict: Verdict) -> Decision:
        """What follows once a claim counts: suspicions, bans, and blobs nothing needs any more."""
        rows: dict[str, Row] = {}
        obsolete = _blobs_of(verdict.claims) if len(verdict.claims) > 1 else set()
        for claim in verdict.suspects:
            known = self._state.conduct.get(claim.identity, Conduct(claim.identity))
            suspected = tuple(dict.fromkeys((*known.suspected, task.task_id)))
            rows[claim.identity] = replace(known, suspected=suspected, wall_s=claim.wall_s)
        for claim in verdict.liars:
            known = self._state.conduct.get(claim.identity, Conduct(claim.identity))
            reason = f"its result of task {task.task_id} differs from that of two others"
            rows[claim.identity] = replace(known, banned=reason, wall_s=claim.wall_s)
        freed, dropped = self._freed(task, {claim.identity for claim in verdict.liars})
        disputes = (_dispute(task, verdict),) if verdict.suspects or verdict.liars else ()
        return Decision(
            (*rows.values(), *freed),
            obsolete=tuple(sorted(obsolete | dropped)),
            notes=(verdict.note,) if verdict.note else (),
            disputes=disputes,
        )

    def _freed(self, settled: Task, banned: set[str]) -> tuple[list[Task], set[str]]:
        """Every other task without the leases and claims of banned workers, and the blobs nothing needs any more.

        Whose the partial progress of a task is, is not known: none of it is used after a ban, and no holder is kept
        that may have gone on from it (after a failed attempt it is not in the row any more).
        """
        if not banned:
            return [], set()
        theirs = {worker.worker_id for worker in self._state.workers.values() if worker.identity in banned}
        freed: list[Task] = []
        dropped: set[str] = set()
        for task in self._state.tasks.values():
            tainted = task.checkpoint is not None or bool(task.failures)
            lost = [holder for holder in task.holders if tainted or holder.worker_id in theirs]
            doubtful = tuple(claim for claim in task.claims if claim.identity in banned)
            if task.task_id == settled.task_id or not (lost or doubtful or task.checkpoint):
                continue
            for holder in lost:
                self._state.lifelines.pop((task.task_id, holder.fence), None)
            kept = task.held_by(holder for holder in task.holders if holder not in lost)
            claims = tuple(claim for claim in task.claims if claim not in doubtful)
            freed.append(replace(kept, checkpoint=None, claims=claims))
            dropped |= _blobs_of(doubtful) | set(_checkpoint_of(task))
        return freed, dropped

    def forgotten(self) -> Decision:
        """After a pause: tasks for which too many different results were claimed start over."""
        undecided = [task for task in self._state.tasks.values() if len(task.claims) >= MAX_CLAIMS]
        obsolete = {digest for task in undecided for digest in _blobs_of(task.claims)}
        return Decision(
            tuple(replace(task, failures=(), claims=()) for task in undecided), obsolete=tuple(sorted(obsolete))
        )


def _undecided(task: Task) -> str:
    return f"task {task.task_id} waits for a third worker: the results of {names_of(task.claims)} differ"


def _blobs_of(claims: tuple[Claim, ...]) -> set[str]:
    return {ref.digest for claim in claims for ref in claim.outputs.values()}


def _checkpoint_of(task: Task) -> tuple[str, ...]:
    return (task.checkpoint.blob.digest,) if task.checkpoint else ()


def _dispute(task: Task, verdict: Verdict) -> Dispute:
    counted = verdict.counted.fence if verdict.counted else None
    return Dispute(task.task_id, verdict.claims, counted, tuple(claim.fence for claim in verdict.liars), verdict.note)


def trust_of(state: State) -> dict[str, Any]:
    """What a status shows: `quarantined`, `undecided` {task: why}, `suspected` {worker: tasks}, `banned` {it: why}."""
    claimed = [(task.task_id, claim) for task in state.tasks.values() for claim in task.claims]
    return {
        "quarantined": {task_id: f"{claim.worker}: {claim.outlier}" for task_id, claim in claimed if claim.outlier},
        "undecided": {task.task_id: _undecided(task) for task in state.tasks.values() if differ(task.claims)},
        "suspected": {row.identity: list(row.suspected) for row in state.conduct.values() if row.suspected},
        "banned": {row.identity: row.banned for row in state.conduct.values() if row.banned},
    }
