"""A driver of the state machine: it plays shell, journal, executor and workers, without a socket and a clock."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from configs.schema import Config
from coordinator.decisions import Decision
from coordinator.machine import Machine
from coordinator.plan import Plan
from coordinator.state import State, Task
from protocol.tasks import BlobRef, Capabilities, Checkpoint, TaskResult

OFFER = Capabilities(devices=["cpu"], memory_bytes=10**10, threads=1, fingerprint="a")


def make_config(**changes: Any) -> Config:
    experiment: dict[str, Any] = {
        "model": {"blocks": 2, "hidden_size": 8, "heads": 2, "intermediate_size": 16, "sequence_length": 64},
        "topology": {
            "levels": [{"modules": 2, "blocks": [0], "embedding": True}, {"modules": 2, "blocks": [1], "head": True}]
        },
        "inner": {"batch_rows": 2, "warmup_steps": 2},
        "stages": [
            {"kind": "pretrain", "steps": 4, "inner_steps": 2},
            {"kind": "shard"},
            {"kind": "train", "phases": 3, "inner_steps": 2},
            {"kind": "evaluate"},
        ],
        "baselines": [{"name": "dense"}],
    }
    experiment.update(changes)
    return Config.model_validate({"name": "test", "experiment": experiment, "execution": {"lease_s": 10.0}})


def ref(*parts: object) -> BlobRef:
    return BlobRef(digest=hashlib.sha256(repr(parts).encode()).hexdigest(), size=1)


def pair(*parts: object) -> list[Any]:
    return [ref(*parts).digest, 1]


def local_result(task: Task, plan: Plan) -> dict[str, Any]:
    """What the coordinator's own tasks would answer."""
    if task.kind == "BUILD":
        splits = ["train", "train", "test"]
        ranges = [{"index": i, "split": split, "text": pair("text", i)} for i, split in enumerate(splits)]
        return {"vocab_size": 64, "tokenizer": pair("tokenizer"), "ranges": ranges}
    if task.kind == "INITIALISE":
        return {"modules": {module_id: pair("init", module_id) for module_id in plan.dense.module_ids}}
    if task.kind == "FIT":
        return {"router": pair("router")}
    if task.kind == "DIVIDE":
        return {"shards": [{"manifest": pair("manifest", shard)} for shard in range(plan.mixture.num_shards)]}
    return {"perplexity": {}}


def checkpoint(task: Task, steps: int) -> Checkpoint:
    """Progress of a task after some steps."""
    return Checkpoint(
        blob=ref("progress", task.task_id, steps),
        steps=steps,
        tokens=50 * steps,
        sequences=5 * steps,
        loss_sum=0.5,
        step_losses=[1.0] * steps,
        seconds=1.0,
    )


class Driver:
    """Plays shell, journal, executor and workers around a machine."""

    def __init__(self, config: Config, seed: int = 0) -> None:
        self.plan = Plan(config)
        self.now = 0.0
        self.machine = Machine(self.plan, State(), random.Random(seed))
        self.stored: dict[tuple[str, str], Any] = {}
        self.metrics: list[dict[str, Any]] = []
        self.steps: list[tuple[str, str, int, tuple[str, ...]]] = []
        self.commit(self.machine.open(0.0))
        self.settle()

    def commit(self, decision: Decision) -> None:
        self.stored.update({(row.table, row.key): row for row in decision.rows})
        self.metrics += decision.metrics
        self.machine.apply(decision)

    def restart(self) -> None:
        """A new process on the same journal."""
        self.machine = Machine(self.plan, State(self.stored.values()), random.Random(1))
        self.machine.state.forget_tasks(self.machine.consumed())
        self.commit(self.machine.resume(self.now))
        self.settle()

    def settle(self) -> None:
        """Run the coordinator's own work until nothing is left to do."""
        while True:
            local, due = self.machine.local_tasks(), self.machine.due_steps()
            for task in local[:1]:
                self.commit(self.machine.local_done(task, self.local_result(task), self.now))
            for step in due[:1]:
                parts = tuple(blob.digest for _, _, blob in step.contributions)
                self.steps.append((step.model, step.module.module_id, step.module.version, parts))
                params = ref(step.model, step.module.module_id, step.module.version, parts)
                self.commit(self.machine.module_stepped(step, params, ref("momentum", params.digest), self.now))
            if not local and not due:
                return

    def local_result(self, task: Task) -> dict[str, Any]:
        return local_result(task, self.plan)

    def hello(self, name: str, capabilities: Capabilities = OFFER) -> str:
        return self.machine.leases.register("", name, capabilities, self.now)

    def lease(self, worker_id: str) -> Task | None:
        lease = self.machine.leases.lease(worker_id, frozenset(), self.now)
        self.commit(lease.decision)
        return lease.task and replace(lease.task, fence=lease.fence)

    def result(self, task: Task) -> TaskResult:
        """A pure function of the task, as a real one would be: not of where its last holder began."""
        spec = self.machine.leases.matching.spec(task).model_dump_json(exclude={"resume"})
        outputs = {name: ref(task.task_id, spec, name) for name in self.machine.expected_outputs(task)}
        steps = 2 if task.kind == "TRAIN" else 0
        return TaskResult(
            outputs=outputs, tokens=100, sequences=10, steps=steps, loss_sum=1.0, step_losses=[1.0] * steps
        )

    def save(self, worker_id: str, task: Task, steps: int = 1) -> bool:
        """Hand in partial progress; whether it was kept."""
        kept = checkpoint(task, steps)
        decision = self.machine.save_progress(worker_id, task.task_id, task.fence, kept, self.now)
        self.commit(decision)
        return bool(decision.rows)

    def complete(self, worker_id: str, task: Task) -> None:
        result = self.result(task)
        self.commit(self.machine.complete(worker_id, task.task_id, task.fence, result, self.now, self.now))
        self.settle()

    def finish(self, worker_id: str) -> None:
        while (task := self.lease(worker_id)) is not None:
            self.complete(worker_id, task)

    @property
    def finished(self) -> bool:
        return self.machine.state.standing.finished

    def versions(self) -> dict[str, tuple[int, str]]:
        return {key: (row.version, row.params.digest) for key, row in self.machine.state.modules.items()}


def history(drawn: bytes, names: Sequence[str], actions: Sequence[str]) -> list[tuple[str, str]]:
    """Who does what, one after the other, by two bytes each: to draw the bytes costs less than to draw each turn."""
    turns = zip(drawn[::2], drawn[1::2], strict=True)
    return [(names[who % len(names)], actions[what % len(actions)]) for who, what in turns]


def undisturbed(config: Config) -> Driver:
    driver = Driver(config)
    driver.finish(driver.hello("one"))
    assert driver.finished
    return driver


def until_training(driver: Driver, stage: str = "") -> str:
    """Work until the next task is a TRAIN task (of a stage); returns the worker."""
    worker = driver.hello("packer")
    while (task := driver.lease(worker)) is not None:
        if task.kind == "TRAIN" and stage in ("", task.stage):
            driver.commit(driver.machine.leases.release(worker, task.task_id, task.fence, "", False, driver.now))
            return worker
        driver.complete(worker, task)
    raise AssertionError("no TRAIN task came")
