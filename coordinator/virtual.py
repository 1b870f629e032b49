"""The state machine under a virtual clock: a run of hundreds of workers in seconds, from a table of measured costs.

The very same decisions as in a real run; only the work itself is replaced by its duration. Workers heartbeat, lease and
complete as real ones do; a killed one is silent from that moment on.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import itertools
import random
import statistics
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from configs.schema import Config
from coordinator.decisions import Decision
from coordinator.machine import Machine
from coordinator.plan import Plan
from coordinator.state import State, Task
from protocol.errors import StaleLease, UnknownTask
from protocol.tasks import BlobRef, Capabilities, Checkpoint, TaskResult

TICK_S = 0.5
_OFFER = Capabilities(devices=["cpu", "cuda", "mps"], memory_bytes=1 << 50, threads=1 << 10, fingerprint="virtual")


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds: of an inner step, of any other task, around every task (transfer, composing), of stepping a module.

    `start_s` passes from a worker's start to its first request, `checkpoint_every_s` between two checkpoints of a task
    (0: none are made), `local_s` go into the coordinator's own tasks of a stage, by its kind.
    """

    step_s: float
    other_task_s: float = 1.0
    overhead_s: float = 0.0
    outer_step_s: float = 0.0
    start_s: float = 0.0
    checkpoint_every_s: float = 0.0
    local_s: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Outcome:
    """What the run came to. `recovery_s`: from a kill to the next lease of the task it took away."""

    wall_s: float = 0.0
    finished: bool = False
    kills: int = 0
    steps_in_weights: int = 0
    steps_executed: float = 0.0
    busy_s: float = 0.0
    wanted_s: float = 0.0
    recovery_s: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The keys of a simulation's report."""
        recovery = sorted(self.recovery_s)
        return {
            "wall_s": self.wall_s,
            "finished": self.finished,
            "worker_kills": self.kills,
            "steps_in_weights": self.steps_in_weights,
            "steps_executed": self.steps_executed,
            "goodput": self.steps_in_weights / self.steps_executed if self.steps_executed else 1.0,
            "occupancy": self.busy_s / self.wanted_s if self.wanted_s else 1.0,
            "recovery_s": {
                "median": statistics.median(recovery) if recovery else None,
                "p99": recovery[min(len(recovery) - 1, int(0.99 * len(recovery)))] if recovery else None,
            },
        }


@dataclass(slots=True)
class _VirtualWorker:
    name: str
    worker_id: str
    task: Task | None = None
    resumed: int = 0
    began_s: float = 0.0
    alive: bool = True


class VirtualRun:
    """One run on virtual workers. `faults`: (seconds, worker name, "start" or "kill") in order."""

    def __init__(self, config: Config, costs: Costs, faults: Iterable[tuple[float, str, str]], seed: int = 0) -> None:
        self.plan = Plan(config)
        self.machine = Machine(self.plan, State(), random.Random(seed))
        self.outcome = Outcome()
        self.now = 0.0
        self._costs = costs
        self._faults = iter(faults)
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._workers: dict[str, _VirtualWorker] = {}
        self._idle: deque[_VirtualWorker] = deque()
        self._stepping: set[tuple[str, int]] = set()
        self._local: set[str] = set()
        self._starts: Counter[str] = Counter()
        self._lost: dict[str, float] = {}

    def run(self, limit_s: float = 30 * 24 * 3600.0) -> Outcome:
        """Play until the run is finished, or `limit_s` virtual seconds are over."""
        self._commit(self.machine.open(0.0))
        self._next_fault()
        self._tick()
        while self._queue and not self.machine.state.standing.finished:
            at_s, _, act = heapq.heappop(self._queue)
            if at_s > limit_s:
                break
            self._account(at_s - self.now)
            self.now = at_s
            act()
        self.outcome.wall_s = self.now
        self.outcome.finished = self.machine.state.standing.finished
        return self.outcome

    def _at(self, at_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (at_s, next(self._order), act))

    def _account(self, seconds: float) -> None:
        """Occupancy: seconds of workers with a task, over those and of idle ones while a task lost to a kill waits."""
        if seconds:
            alive = [worker for worker in self._workers.values() if worker.alive]
            busy = sum(worker.task is not None for worker in alive)
            self.outcome.busy_s += busy * seconds
            self.outcome.wanted_s += (busy + min(len(alive) - busy, len(self._lost))) * seconds

    # --- the coordinator --------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._commit(self.machine.leases.expire(self.now))
        self._at(self.now + TICK_S, self._tick)

    def _commit(self, decision: Decision) -> None:
        self.machine.apply(decision)
        for metric in decision.metrics:
            self.outcome.steps_in_weights += metric["steps"]
        self._own_work()
        self._hand_out()

    def _own_work(self) -> None:
        for task in self.machine.local_tasks():
            if task.task_id not in self._local:
                first = all(not task_id.startswith(f"{task.stage}/") for task_id in self._local)
                cost_s = self._costs.local_s.get(self.machine.state.stages[task.stage].kind, 0.0) if first else 0.0
                self._local.add(task.task_id)
                self._at(self.now + cost_s, lambda task=task: self._local_done(task))  # type: ignore[misc]
        for due in self.machine.due_steps():
            key = (due.module.key, due.module.version)
            if key not in self._stepping:
                self._stepping.add(key)
                params = _ref(key, [ref.digest for _, _, ref in due.contributions])
                momentum = _ref("momentum", params.digest)
                self._at(
                    self.now + self._costs.outer_step_s,
                    lambda due=due, params=params, momentum=momentum: self._commit(  # type: ignore[misc]
                        self.machine.module_stepped(due, params, momentum, self.now)
                    ),
                )

    def _local_done(self, task: Task) -> None:
        self._commit(self.machine.local_done(task, local_result(task, self.plan), self.now))

    def _hand_out(self) -> None:
        """Idle workers ask in turn until one finds nothing."""
        while self._idle:
            worker = self._idle.popleft()
            if not worker.alive:
                continue
            if worker.worker_id not in self.machine.state.workers:
                self.machine.leases.register(worker.worker_id, worker.name, _OFFER, self.now)
            lease = self.machine.leases.lease(worker.worker_id, frozenset(), self.now)
            if lease.task is None:
                self._idle.appendleft(worker)
                return
            self.machine.apply(lease.decision)
            self._begin(worker, lease.task, lease.fence)

    # --- the workers ------------------------------------------------------------------------------------------------

    def _next_fault(self) -> None:
        fault = next(self._faults, None)
        if fault is not None:
            self._at(max(fault[0], self.now), lambda: self._fault(fault[1], fault[2]))

    def _fault(self, name: str, action: str) -> None:
        self._starts[name] += 1
        if action == "start":
            number = self._starts[name]
            self._at(self.now + self._costs.start_s, lambda: self._start(name, number))
        elif action == "kill":
            self._kill(name)
        self._next_fault()

    def _start(self, name: str, number: int) -> None:
        """The worker asks for its first task, unless it was killed before it got so far."""
        if number != self._starts[name]:
            self.outcome.kills += 1
            return
        worker = _VirtualWorker(name, self.machine.leases.register("", name, _OFFER, self.now))
        self._workers[name] = worker
        self._idle.append(worker)
        self._hand_out()

    def _kill(self, name: str) -> None:
        worker = self._workers.get(name)
        if worker is None or not worker.alive:
            return
        worker.alive = False
        self.outcome.kills += 1
        if worker.task is not None:
            self.outcome.steps_executed += self._steps(worker)
            self._lost.setdefault(worker.task.task_id, self.now)

    def _begin(self, worker: _VirtualWorker, task: Task, fence: int) -> None:
        if task.task_id in self._lost:
            self.outcome.recovery_s.append(self.now - self._lost.pop(task.task_id))
        worker.task, worker.began_s = task, self.now
        worker.resumed = task.checkpoint.steps if task.checkpoint and not task.independent else 0
        self._at(self.now + self._duration_s(worker, task), lambda: self._complete(worker, task, fence))
        if task.kind == "TRAIN" and self._costs.checkpoint_every_s:
            self._save_later(worker, task, fence)
        self._at(self.now + self._beat_s(), lambda: self._heartbeat(worker, task, fence))

    def _beat_s(self) -> float:
        return self.plan.config.execution.heartbeat_s

    def _inner_steps(self, task: Task) -> int:
        return self.plan.inner_steps(self.machine.state.stages[task.stage].model) if task.kind == "TRAIN" else 0

    def _duration_s(self, worker: _VirtualWorker, task: Task) -> float:
        steps = self._inner_steps(task) - worker.resumed
        return self._costs.overhead_s + (
            steps * self._costs.step_s if task.kind == "TRAIN" else self._costs.other_task_s
        )

    def _steps(self, worker: _VirtualWorker) -> float:
        """Inner steps that the worker itself has taken in its task by now."""
        assert worker.task is not None
        computing_s = self.now - worker.began_s - self._costs.overhead_s
        most = self._inner_steps(worker.task) - worker.resumed
        return float(min(most, max(0.0, computing_s / self._costs.step_s)))

    def _save_later(self, worker: _VirtualWorker, task: Task, fence: int) -> None:
        self._at(self.now + self._costs.checkpoint_every_s, lambda: self._save(worker, task, fence))

    def _save(self, worker: _VirtualWorker, task: Task, fence: int) -> None:
        """The worker's progress becomes the task's checkpoint, if it still holds the lease."""
        if not worker.alive or worker.task is not task:
            return
        steps = worker.resumed + int(self._steps(worker))
        if worker.resumed < steps < self._inner_steps(task):
            progress = Checkpoint(
                blob=_ref(task.task_id, steps),
                steps=steps,
                tokens=1,
                sequences=0,
                loss_sum=0.0,
                step_losses=[0.0] * steps,
                seconds=0.0,
            )
            with contextlib.suppress(StaleLease, UnknownTask):
                decision = self.machine.save_progress(worker.worker_id, task.task_id, fence, progress, self.now)
                self.machine.apply(decision)  # it makes no task ready and no module due
        self._save_later(worker, task, fence)

    def _heartbeat(self, worker: _VirtualWorker, task: Task, fence: int) -> None:
        if not worker.alive or worker.task is not task:
            return
        steps = worker.resumed + int(self._steps(worker))
        lost, _ = self.machine.leases.heartbeat(worker.worker_id, task.task_id, fence, steps, 0.0, steps, self.now)
        if lost:
            self.outcome.steps_executed += self._steps(worker)
            self._rest(worker)
        else:
            self._at(self.now + self._beat_s(), lambda: self._heartbeat(worker, task, fence))

    def _complete(self, worker: _VirtualWorker, task: Task, fence: int) -> None:
        if not worker.alive or worker.task is not task:
            return
        self.outcome.steps_executed += self._inner_steps(task) - worker.resumed
        self._rest(worker)
        held = self.machine.state.tasks.get(task.task_id)
        if held is None or all(holder.fence != fence for holder in held.holders):
            return
        result = TaskResult(
            outputs={name: _ref(task.task_id, name) for name in self.machine.expected_outputs(task)},
            tokens=1,
            sequences=0,
            steps=self._inner_steps(task),
        )
        self._commit(self.machine.complete(worker.worker_id, task.task_id, fence, result, self.now, self.now))

    def _rest(self, worker: _VirtualWorker) -> None:
        worker.task = None
        self._idle.append(worker)
        self._at(self.now, self._hand_out)


def _ref(*parts: object) -> BlobRef:
    return BlobRef(digest=hashlib.sha256(repr(parts).encode()).hexdigest(), size=1)


def _pair(*parts: object) -> list[Any]:
    return [_ref(*parts).digest, 1]


def local_result(task: Task, plan: Plan) -> dict[str, Any]:
    """What the coordinator's own tasks answer where there is no text and no tensor."""
    if task.kind == "BUILD":
        experiment = plan.experiment
        scored = ["router"] if experiment.gated or experiment.router else []
        stops = ["stop"] if experiment.early_stopping is not None else []
        splits = ["train", "train", "validation", "test", *scored, *stops]
        ranges = [{"index": index, "split": split, "text": _pair("text", index)} for index, split in enumerate(splits)]
        return {"vocab_size": 64, "tokenizer": _pair("tokenizer"), "ranges": ranges}
    if task.kind == "INITIALISE":
        return {"modules": {module_id: _pair("first", module_id) for module_id in plan.dense.module_ids}}
    if task.kind == "FIT":
        return {"router": _pair("router")}
    if task.kind == "CHECK":
        return {}
    if task.kind == "SELECT":
        scored = [f"{path_index}-4" for path_index in range(plan.mixture.num_paths)]
        return {"selections": {subject: _pair("selection", subject) for subject in scored}}
    if task.kind == "GATE":
        return {"router": _pair("gater", task.stage), "gater": {}}
    if task.kind == "LABEL":
        return {"targets": _pair("targets"), "manifest": _pair("labelled"), "sequences": 1, "labelled_tokens": 1}
    if task.kind == "DIVIDE":
        index = 5 if plan.experiment.gated or plan.experiment.router else 4  # of the file of the stop split
        paths = range(plan.mixture.num_paths)
        stop = {f"{path_index}-{index}": _pair("stop", task.stage, path_index) for path_index in paths}
        return {
            "shards": [{"manifest": _pair("manifest", shard)} for shard in range(plan.mixture.num_shards)],
            **({"stop": stop} if plan.experiment.early_stopping is not None else {}),
        }
    return {"perplexity": {}}
