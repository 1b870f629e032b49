"""The best version of every path, in the state machine: what is measured when, what is chosen, kept and let go of."""

from __future__ import annotations

from typing import Any

import pytest

from configs.schema import Config
from coordinator.decisions import Decision
from coordinator.matching import STOP_LAG_PHASES
from coordinator.references import blobs_in, digests_in
from coordinator.state import Best, Task
from coordinator.virtual import Costs, VirtualRun
from coordinator.virtual import local_result as virtual_result
from protocol.errors import UnknownTask
from protocol.tasks import EvaluateSpec, TaskResult
from tests.driver import Driver, make_config, pair

PRETRAIN = {"kind": "pretrain", "steps": 2, "inner_steps": 2}
STOP_FILES = (5, 6)
# Path 3 gets no sequence of the stop split, path 2 those of one file.
SELECTED = ("0-5", "0-6", "1-5", "1-6", "2-6")


def train(phases: int) -> dict[str, Any]:
    return {"kind": "train", "phases": phases, "inner_steps": 2}


def config_of(*stages: dict[str, Any], every: int = 1, **changes: Any) -> Config:
    """A 2x2 mixture that measures its paths."""
    listed = [PRETRAIN, {"kind": "shard"}, *stages, {"kind": "evaluate"}]
    return make_config(stages=listed, early_stopping={"every": every}, baselines=[], **changes)


RESHARDED = config_of(train(3), {"kind": "reshard"}, train(3), every=2)


class Stopping(Driver):
    """The driver with stop sequences, whose losses a test gives by path and phase (else 2 nats a token)."""

    def __init__(self, config: Config, losses: dict[tuple[int, int], float] | None = None) -> None:
        self.losses = losses or {}
        self.held: set[str] = set()
        super().__init__(config)

    def local_result(self, task: Task) -> dict[str, Any]:
        found = virtual_result(task, self.plan)
        if task.kind == "BUILD":
            splits = ["train", "train", "validation", "test", "router", "stop", "stop"]
            found["ranges"] = [{"index": i, "split": split, "text": pair("text", i)} for i, split in enumerate(splits)]
        if task.kind == "DIVIDE":
            found["stop"] = {subject: pair("selection", task.stage, subject) for subject in SELECTED}
            if self.plan.experiment.sharding.kind == "random":
                del found["stop"]
        return found

    def result(self, task: Task) -> TaskResult:
        result = super().result(task)
        if task.kind != "STOP":
            return result
        loss = self.losses.get((int(task.subject.partition("-")[0]), task.phase), 2.0)
        return result.model_copy(update={"loss_sum": loss * result.tokens, "step_losses": [], "steps": 0})

    def commit(self, decision: Decision) -> None:
        """With a store beside it, which holds what is named, and lets go of what nothing names any more."""
        self.held |= {blob.digest for blob in blobs_in(decision.rows)}
        super().commit(decision)
        self.held -= set(decision.obsolete) - self.machine.referenced()
        assert self.machine.referenced() <= self.held | digests_in(decision.rows)

    @property
    def best(self) -> dict[int, tuple[int, float]]:
        """Phase and mean loss by path, where there is one."""
        rows = (row for row in self.machine.state.best.values() if row.modules)
        return {row.path_index: (row.phase, row.loss_sum / row.tokens) for row in rows}


def finished(driver: Stopping) -> Stopping:
    driver.finish(driver.hello("one"))
    assert driver.finished
    return driver


def measured(driver: Driver) -> list[tuple[str, int, str]]:
    """(stage, phase, subject) of all STOP tasks that were counted, each once."""
    found = [metric["task_id"].split("/") for metric in driver.metrics if metric["kind"] == "STOP"]
    listed = [(stage, int(phase), subject) for stage, _, phase, subject in found]
    assert len(listed) == len(set(listed))
    return sorted(listed)


@pytest.mark.parametrize(("every", "phases"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (4, [3, 4]), (9, [4])])
def test_every_so_many_phases_are_measured_and_the_last_one(every: int, phases: list[int]) -> None:
    driver = finished(Stopping(config_of(train(5), every=every)))
    assert measured(driver) == sorted(("train", phase, subject) for phase in phases for subject in SELECTED)


def test_phases_are_counted_from_the_last_re_shard() -> None:
    driver = finished(Stopping(RESHARDED))
    places = [("train", 1), ("train", 2), ("train-2", 4), ("train-2", 5)]
    assert measured(driver) == sorted((*place, subject) for place in places for subject in SELECTED)


def test_a_task_measures_its_snapshot_on_the_sequences_of_its_path() -> None:
    driver = Stopping(RESHARDED)
    worker, seen = driver.hello("one"), 0
    while (task := driver.lease(worker)) is not None:
        if task.kind == "STOP":
            spec = driver.machine.leases.matching.spec(task)
            assert isinstance(spec, EvaluateSpec)
            assert [module.version for module in spec.path.modules] == [task.phase + 1] * 2
            path_index, index = task.subject.split("-")
            divided = "shard" if task.stage == "train" else "reshard"
            assert spec.selection is not None
            assert [spec.selection.digest, 1] == pair("selection", divided, task.subject)
            assert spec.path.path_index == int(path_index)
            seen += 1
            assert int(index) in STOP_FILES
        driver.complete(worker, task)
    assert seen == 4 * len(SELECTED)


def test_without_a_router_every_path_is_measured_on_the_whole_split() -> None:
    driver = finished(Stopping(config_of(train(1), sharding={"kind": "random"})))
    subjects = [f"{path}-{index}" for path in range(4) for index in STOP_FILES]
    assert measured(driver) == [("train", 0, subject) for subject in subjects]


LOSSES = {(0, 0): 3.0, (0, 1): 1.5, (0, 2): 1.5, (1, 0): 1.0, (1, 1): 1.1, (1, 2): 1.2, (2, 2): 0.5}


@pytest.mark.parametrize("newest_first", [False, True])
def test_the_lowest_mean_loss_is_best_and_of_equal_ones_the_earliest(newest_first: bool) -> None:
    driver = Stopping(config_of(train(3)), LOSSES)
    workers = [driver.hello(f"worker {index}") for index in range(20)]
    held: list[tuple[str, Task]] = []
    while not driver.finished:  # all that can be leased is, training is done first, then what is measured
        held += [(worker, task) for worker in workers if (task := fresh(driver, worker, held)) is not None]
        held.sort(key=lambda each: (each[1].kind == "STOP", -each[1].phase if newest_first else each[1].phase))
        driver.complete(*held.pop(0))
    assert driver.best == {0: (1, 1.5), 1: (0, 1.0), 2: (2, 0.5)}, "path 3 has no stop sequence, and no best"
    state, plan = driver.machine.state, driver.plan
    assert {module.version for module in plan.path_ref(state, "mixture", 1, "best").modules} == {1}
    assert plan.path_ref(state, "mixture", 2, "best") == plan.path_ref(state, "mixture", 2)
    assert plan.path_ref(state, "mixture", 3, "best") == plan.path_ref(state, "mixture", 3)
    evaluated = {m["task_id"].split("/")[-1] for m in driver.metrics if m["kind"] == "EVALUATE"}
    once = {f"mixture-{path}-3" for path in range(4)}
    assert evaluated == once | {"mixture.best-0-3", "mixture.best-1-3"}, "what is the same is not measured twice"


def fresh(driver: Driver, worker: str, held: list[tuple[str, Task]]) -> Task | None:
    return None if any(worker == owner for owner, _ in held) else driver.lease(worker)


def test_measuring_yields_to_training_but_not_for_ever() -> None:
    """One worker: each phase is measured after the next two are trained; so many versions are kept at most."""
    driver = Stopping(config_of(train(6)))
    worker = driver.hello("one")
    order: list[tuple[str, int]] = []
    while (task := driver.lease(worker)) is not None:
        if task.stage == "train":
            order.append((task.kind, task.phase))
            waiting = {each.phase for each in driver.machine.state.tasks.values() if each.kind == "STOP"}
            assert len(waiting) <= STOP_LAG_PHASES + 2
        driver.complete(worker, task)
    first_stop = order.index(("STOP", 0))
    assert order[first_stop - 1] == ("TRAIN", 1 + STOP_LAG_PHASES)
    assert order.count(("STOP", 0)) == len(SELECTED)
    assert order[-len(SELECTED) :] == [("STOP", 5)] * len(SELECTED)


def test_an_idle_worker_measures_while_others_train() -> None:
    driver = Stopping(config_of(train(2)))
    workers = [driver.hello(f"worker {index}") for index in range(5)]
    until_phase(driver, workers[0], 1)
    held = [driver.lease(worker) for worker in workers]
    assert [task and task.kind for task in held] == ["TRAIN"] * 4 + ["STOP"]


def until_phase(driver: Driver, worker: str, phase: int) -> None:
    """Work until TRAIN tasks of a phase are ready."""
    while (task := driver.lease(worker)) is not None:
        if task.kind == "TRAIN" and task.stage.startswith("train") and task.phase == phase:
            driver.commit(driver.machine.leases.release(worker, task.task_id, task.fence, "", False, driver.now))
            return
        driver.complete(worker, task)
    raise AssertionError(f"phase {phase} did not come")


def test_a_stage_ends_when_all_is_measured() -> None:
    driver = Stopping(config_of(train(1)))
    workers = [driver.hello(f"worker {index}") for index in range(9)]
    until_phase(driver, workers[0], 0)
    for worker in workers[:4]:
        task = driver.lease(worker)
        assert task is not None
        driver.complete(worker, task)
    stage = driver.machine.state.stages
    assert all(row.version == 1 for row in driver.machine.state.modules_of("mixture"))
    for left in range(len(SELECTED), 0, -1):
        assert (stage["train"].status, stage["evaluate"].status) == ("running", "waiting"), f"{left} are not measured"
        task = driver.lease(workers[0])
        assert task is not None
        assert task.kind == "STOP"
        driver.complete(workers[0], task)
        with pytest.raises(UnknownTask if left == 1 else Exception):
            driver.complete(workers[0], task)
    assert stage["train"].status == "done"


def test_a_re_shard_forgets_what_was_best() -> None:
    driver = Stopping(RESHARDED, {(0, 1): 0.1, (1, 2): 0.1, (0, 4): 3.0, (0, 5): 4.0, (1, 4): 2.0, (1, 5): 1.0})
    until_phase(driver, driver.hello("one"), 3)
    state, plan = driver.machine.state, driver.plan
    assert state.best == {str(path): Best(path) for path in (0, 1, 2)}
    assert plan.path_ref(state, "mixture", 0, "best") == plan.path_ref(state, "mixture", 0)
    assert finished(driver).best == {0: (4, 3.0), 1: (5, 1.0), 2: (4, 2.0)}


@pytest.mark.parametrize("config", [RESHARDED, config_of(train(3))], ids=["resharded", "plain"])
def test_a_restart_after_any_task_changes_nothing(config: Config) -> None:
    losses = {(path, phase): 1.0 + (7 * path + 5 * phase) % 4 for path in range(4) for phase in range(6)}
    reference, driver = finished(Stopping(config, losses)), Stopping(config, losses)
    while not driver.finished:
        worker = driver.hello("one")
        task = driver.lease(worker)
        assert task is not None
        driver.complete(worker, task)
        driver.restart()
    assert driver.machine.state.best == reference.machine.state.best
    assert driver.versions() == reference.versions()
    assert measured(driver) == measured(reference)
    assert not [task for task in driver.machine.state.tasks.values() if task.kind == "STOP"]


@pytest.mark.parametrize("phase", [0, 2])
def test_garbage_is_what_no_row_names_and_never_the_best(phase: int) -> None:
    """An early version stays best: it outlives those that are kept by their number, and those that it replaced go."""
    config = config_of(train(5))
    config = config.model_copy(update={"execution": config.execution.model_copy(update={"keep_versions": 1})})
    driver = finished(Stopping(config, {(path, phase): 0.5 for path in range(3)}))
    assert driver.best == dict.fromkeys(range(3), (phase, 0.5))
    state = driver.machine.state
    kept = {module.blob.digest for row in state.best.values() for module in row.modules}
    assert kept <= driver.held
    assert kept.isdisjoint(row.params.digest for row in state.modules_of("mixture"))
    assert driver.held <= driver.machine.referenced(), "versions that lost are gone"


def test_a_virtual_run_plays_it() -> None:
    costs = Costs(step_s=1.0, other_task_s=5.0, overhead_s=2.0, outer_step_s=1.0)
    run = VirtualRun(RESHARDED, costs, [(0.0, f"worker-{index}", "start") for index in range(4)])
    assert run.run().finished
    assert sorted(run.machine.state.best) == ["0", "1", "2", "3"]
