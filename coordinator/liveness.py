"""Whether the holders of tasks are alive: deadlines from measured heartbeats and steps, and how often workers are lost.

Pure. A live lease has a lifeline; how long a silence may last is what arrivals.py makes of the gaps so far.
"""

from __future__ import annotations

from coordinator.arrivals import MIN_ARRIVALS
from coordinator.losses import Losses
from coordinator.plan import Plan
from coordinator.state import Holder, Lifeline, State, Task, Worker

# A heartbeat is overdue after so many intervals at the least, whatever was measured.
BEATS_MISSED = 1.5
# A heartbeat is overdue after so many intervals while too few have been heard to tell.
UNMEASURED_BEATS = 2.0
# Steps may stand still for so many measured step times, and so many seconds, before a worker counts as hung.
STANDSTILL_STEPS, STANDSTILL_S = 3.0, 6.0


class Liveness:
    """The lifelines of all live leases."""

    def __init__(self, plan: Plan, state: State) -> None:
        self._plan, self._state = plan, state
        self._execution = plan.config.execution
        self.losses = Losses(state)

    def renew_all(self, now: float) -> None:
        """After a restart every live lease gets one fresh deadline."""
        for task in self._state.tasks.values():
            for holder in task.holders:
                self.begin(task, holder, now)

    def begin(self, task: Task, holder: Holder, now: float) -> None:
        """A lease starts, or starts over: its first heartbeat is awaited like any other."""
        ends_s, overdue_s = now + self._execution.lease_s, now + self._silence_s(holder.worker_id)
        self._state.lifelines[task.task_id, holder.fence] = Lifeline(ends_s, overdue_s, now, now, now)

    def prolong(self, seconds: float) -> None:
        """The run stood still for so long: no lease ends, or is overdue, for that."""
        for lifeline in self._state.lifelines.values():
            lifeline.ends_s += seconds
            lifeline.overdue_s += seconds

    def end(self, task: Task, holder: Holder, *, lost: bool) -> None:
        """A lease ended in peace or with its worker (`lost`)."""
        lifeline = self._state.lifelines.pop((task.task_id, holder.fence), None)
        if lifeline is not None and lost:
            self.losses.lost(lifeline)
        elif lifeline is not None:
            self.losses.kept(lifeline, lifeline.heard_s)

    def forget(self, task: Task, now: float) -> None:
        """No lease of the task is live any more: it is complete, and a holder that is overdue was lost."""
        for holder in task.holders:
            lifeline = self._state.lifelines.pop((task.task_id, holder.fence), None)
            if lifeline is not None and lifeline.overdue_s < now:
                self.losses.lost(lifeline)
            elif lifeline is not None:
                self.losses.kept(lifeline, now)

    def heard(self, task: Task, worker: Worker, lifeline: Lifeline, steps: int, tokens: int, now: float) -> None:
        """A heartbeat came, with so many steps and tokens of the task done."""
        if now - lifeline.heard_s > self._execution.heartbeat_s / 4:  # not out of turn, to tell of the first step
            for gaps in (worker.beats, self._state.beats):
                gaps.observe(now - lifeline.heard_s)
        if steps > lifeline.steps:
            elapsed_s = now - lifeline.advanced_s
            if lifeline.steps and elapsed_s > 0:  # a first report may tell of steps that were taken over
                worker.step_times.observe(elapsed_s / (steps - lifeline.steps))
                worker.tokens_per_s = max(0, tokens - lifeline.tokens) / elapsed_s
            lifeline.advanced_s, lifeline.steps, lifeline.tokens = now, steps, tokens
        worker.steps = steps
        lifeline.heard_s, lifeline.ends_s = now, now + self._execution.lease_s
        lifeline.overdue_s = min(now + self._silence_s(worker.worker_id), self._standstill_s(task, lifeline, worker))

    def ended(self, now: float) -> list[tuple[str, int]]:
        """Tasks and fences of the leases whose end has passed."""
        return [key for key, lifeline in self._state.lifelines.items() if lifeline.ends_s < now]

    def overdue(self, now: float) -> list[str]:
        """Tasks all of whose holders are overdue: workers that wait should ask again."""
        return [task.task_id for task in self._state.tasks.values() if task.holders and self.is_overdue(task, now)]

    def is_overdue(self, task: Task, now: float) -> bool:
        """Whether every holder of the task has been silent, or without a new step, for too long."""
        return all(self._state.lifelines[task.task_id, holder.fence].overdue_s < now for holder in task.holders)

    def longest_silent(self, task: Task) -> Holder:
        """The holder that was heard of longest ago."""
        return min(task.holders, key=lambda holder: self._state.lifelines[task.task_id, holder.fence].heard_s)

    def _silence_s(self, worker_id: str) -> float:
        """How long this worker may say nothing before its task is worth a second holder.

        From its own heartbeats, else from those of all; after two intervals where nothing has been measured.
        """
        worker = self._state.workers.get(worker_id)
        gaps = worker.beats if worker and worker.beats.count >= MIN_ARRIVALS else self._state.beats
        if gaps.count < MIN_ARRIVALS:
            return min(UNMEASURED_BEATS * self._execution.heartbeat_s, self._execution.lease_s)
        return gaps.patience_s(BEATS_MISSED * self._execution.heartbeat_s, self._execution.lease_s)

    def _standstill_s(self, task: Task, lifeline: Lifeline, worker: Worker) -> float:
        """Until when steps may stand still while heartbeats come: a hung worker is not a slow one."""
        total = self._plan.inner_steps(self._state.stages[task.stage].model) if task.kind == "TRAIN" else 0
        if not 0 < lifeline.steps < total or not worker.step_times.count:
            return float("inf")
        return lifeline.advanced_s + STANDSTILL_STEPS * worker.step_times.mean_s + STANDSTILL_S
