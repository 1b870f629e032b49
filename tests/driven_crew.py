"""Workers with names, norms and lies under the driver of the state machine, for what claims come to."""

from __future__ import annotations

from typing import Any

from configs.schema import Config
from coordinator.claims import trust_of
from coordinator.decisions import Decision, Dispute
from coordinator.state import Task
from tests.driver import Driver, make_config, ref


def config_with(phases: int = 3, **execution: Any) -> Config:
    """The 2x2 of the state machine's tests, without baselines."""
    stages = [
        {"kind": "pretrain", "steps": 4, "inner_steps": 2},
        {"kind": "shard"},
        {"kind": "train", "phases": phases, "inner_steps": 2},
    ]
    config = make_config(stages=stages, baselines=[])
    return config.model_copy(update={"execution": config.execution.model_copy(update=execution)})


class DrivenCrew(Driver):
    """A driver of workers with names, norms (`scales`, by name; else 1) and lies (by name: of what their bits are)."""

    def __init__(self, config: Config, seed: int = 0, names: str = "") -> None:
        self.lies: dict[str, str] = {}
        self.scales: dict[str, float] = {}
        self.notes: list[str] = []
        self.disputes: list[Dispute] = []
        self.obsolete: set[str] = set()
        super().__init__(config, seed)
        self.ids = {name: self.hello(name) for name in names}

    def commit(self, decision: Decision) -> None:
        super().commit(decision)
        self.notes += decision.notes
        self.disputes += decision.disputes
        self.obsolete |= set(decision.obsolete)
        for metric in decision.metrics:
            self.machine.claims.learn(metric)

    def restart(self) -> None:
        super().restart()
        for metric in self.metrics:
            self.machine.claims.learn(metric)

    def take(self, name: str) -> Task | None:
        if self.ids.get(name) not in self.machine.state.workers:
            self.ids[name] = self.hello(name)
        return self.lease(self.ids[name])

    def hand_in(self, name: str, task: Task) -> None:
        result, lie = self.result(task), self.lies.get(name)
        if lie and task.kind == "TRAIN":
            result = result.model_copy(update={"outputs": {key: ref(lie, key) for key in result.outputs}})
        norms = dict.fromkeys(result.outputs, self.scales.get(name, 1.0)) if task.kind == "TRAIN" else {}
        self.commit(self.machine.complete(self.ids[name], task.task_id, task.fence, result, self.now, self.now, norms))
        self.settle()

    def turn(self, name: str) -> Task | None:
        """One task of a worker, if it gets one."""
        task = self.take(name)
        if task is not None:
            self.hand_in(name, task)
        return task

    def work(self, names: str, times: int = 1000) -> None:
        """Turns in order, until nobody gets anything or the run is over."""
        for _ in range(times):
            turns = [self.turn(name) for name in names if not self.banned(name)]
            if self.finished or not any(turns):
                return

    def banned(self, name: str) -> bool:
        return name in trust_of(self.machine.state)["banned"]

    def task(self, task: Task) -> Task:
        return self.machine.state.tasks[task.task_id]


def trained(driver: Driver) -> list[Any]:
    return sorted((m["task_id"], m["tokens"], m["steps"]) for m in driver.metrics)


def audited(names: str, phases: int = 3) -> tuple[DrivenCrew, Task]:
    """All tasks are audited; the first worker holds the first of the train stage."""
    crew = DrivenCrew(config_with(phases, audit_share=1.0), names=names)
    for _ in range(100):
        task = crew.take(names[0])
        if task is not None and task.stage == "train":
            assert task.audited
            return crew, task
        if task is not None:
            crew.hand_in(names[0], task)
        else:
            crew.turn(names[1])
    raise AssertionError("training never began")
