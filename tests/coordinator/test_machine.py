"""The state machine under a driver that leases, completes, loses and repeats at random: whole runs."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.references import referenced_digests
from coordinator.state import Task
from protocol.errors import RejectedTensor, StaleLease, UnknownTask
from tests.driver import OFFER, Driver, history, make_config, ref, undisturbed, until_training


def test_a_run_goes_through_all_its_stages() -> None:
    driver = undisturbed(make_config())
    assert [stage.status for stage in driver.machine.state.stages.values()] == ["done"] * 7
    versions = {key: version for key, (version, _) in driver.versions().items()}
    assert versions == {
        **{f"base/{m}": 2 for m in ("0.0", "1.0")},
        **{f"dense/{m}": 3 for m in ("0.0", "1.0")},
        **{f"mixture/{m}": 3 for m in ("0.0", "0.1", "1.0", "1.1")},
    }
    trained = [metric for metric in driver.metrics if metric["kind"] == "TRAIN"]
    assert len(trained) == 2 + 3 + 4 * 3


def test_a_module_takes_the_contributions_of_its_own_shards_in_shard_order() -> None:
    driver = undisturbed(make_config())
    by_module = {(m, v): parts for model, m, v, parts in driver.steps if model == "mixture"}
    assert len(by_module["0.0", 0]) == len(by_module["1.1", 2]) == 2
    everything = [part for (module_id, _), parts in by_module.items() for part in parts if module_id.startswith("0.")]
    assert len(everything) == len(set(everything)) == 12


def test_contributions_are_weighted_by_tokens_and_added_in_shard_order() -> None:
    """Three shards of one module, completed last to first: the order and the weights are those of the plan."""
    levels = {"levels": [{"modules": 1, "blocks": [0, 1], "embedding": True, "head": True}], "replicas": 3}
    driver = Driver(make_config(topology=levels, sharding={"kind": "random"}, baselines=[]))
    workers = [driver.hello(f"worker {index}") for index in range(3)]
    until_training(driver)
    while driver.machine.state.stages["train"].status != "running":
        task = driver.lease(workers[0])
        assert task is not None
        driver.complete(workers[0], task)
    state = driver.machine.state
    for shard, tokens in enumerate((100, 300, 600)):
        state.shards[f"mixture/{shard}"] = replace(state.shards[f"mixture/{shard}"], training_tokens=tokens)
    held = [(worker, driver.lease(worker)) for worker in workers]
    for worker, task in reversed(held):
        assert task is not None
        result = driver.result(task)
        decision = driver.machine.complete(worker, task.task_id, task.fence, result, driver.now, driver.now)
        driver.commit(decision)
    [due] = driver.machine.due_steps()
    assert [shard for shard, _, _ in due.contributions] == [0, 1, 2], "contributions are added in shard order"
    weights = [weight for _, weight, _ in due.contributions]
    assert weights == pytest.approx([0.1, 0.3, 0.6]), "a weight is the shard's share of the module's training tokens"


ACTIONS = ("lease", "complete", "complete", "vanish", "late", "restart", "give back", "beat", "lag", "save")


@pytest.fixture(scope="module")
def reference() -> Driver:
    return undisturbed(make_config())


@settings(max_examples=40, deadline=None)
@given(drawn=st.binary(min_size=1200, max_size=1200))
def test_faults_change_nothing_in_the_result(reference: Driver, drawn: bytes) -> None:
    """Workers die, repeat themselves and come back late, the coordinator restarts: the same versions, counted once."""
    driver = Driver(make_config())
    held: dict[str, Task] = {}
    workers = [driver.hello(f"worker {index}") for index in range(3)]
    for worker, action in history(drawn, workers, ACTIONS):
        if driver.finished:
            break
        _act(driver, held, worker, action)
    while not driver.finished:
        driver.now += 100.0
        driver.commit(driver.machine.leases.expire(driver.now))
        driver.finish(driver.hello("last"))
    assert driver.versions() == reference.versions()
    assert sorted(m["task_id"] for m in driver.metrics) == sorted(m["task_id"] for m in reference.metrics)


def _act(driver: Driver, held: dict[str, Task], worker: str, action: str) -> None:
    if worker not in driver.machine.state.workers:
        driver.machine.leases.register(worker, worker, OFFER, driver.now)
    task = held.get(worker)
    if action == "restart":
        driver.restart()
    elif action == "lease" and task is None:
        leased = driver.lease(worker)
        if leased:
            held[worker] = leased
            assert driver.lease(worker) == leased
    elif action == "vanish":
        driver.now += 11.0
        driver.commit(driver.machine.leases.expire(driver.now))
    elif action == "lag":
        driver.now += 4.0
    elif task is not None and action == "beat":
        driver.now += 1.0
        driver.machine.leases.heartbeat(worker, task.task_id, task.fence, 1, 1.0, 1, driver.now)
    elif task is not None and action == "give back":
        driver.commit(driver.machine.leases.release(worker, task.task_id, task.fence, "", False, driver.now))
        del held[worker]
    elif task is not None and action == "save":
        with contextlib.suppress(StaleLease, UnknownTask, RejectedTensor):  # Rejected: a task without steps
            driver.save(worker, task)
    elif task is not None:
        with contextlib.suppress(StaleLease, UnknownTask):
            driver.complete(worker, task)
        if action == "complete":
            del held[worker]


def test_a_task_that_keeps_failing_pauses_the_run_with_the_reasons() -> None:
    driver = Driver(make_config())
    task_id = ""
    for index in range(3):
        worker = driver.hello(f"worker {index}")
        task = driver.lease(worker)
        assert task is not None
        assert task_id in ("", task.task_id)
        task_id = task.task_id
        driver.commit(driver.machine.leases.release(worker, task_id, task.fence, "out of memory", False, 0.0))
    paused = driver.machine.state.standing.paused
    assert "failed 3 times (worker 0, worker 1, worker 2: out of memory)" in paused
    lease = driver.machine.leases.lease(driver.hello("new"), frozenset(), 0.0)
    assert lease.task is None
    assert "paused" in lease.waiting_for
    driver.restart()
    assert driver.lease(driver.hello("newer")) is not None


def test_no_task_waits_for_modules_of_other_paths() -> None:
    """No global barrier: with both paths of module 0.0 and all of level 1 in, the others may lag."""
    config = make_config(
        topology={
            "levels": [{"modules": 2, "blocks": [0, 1], "embedding": True, "head": True}],
        }
    )
    driver = Driver(config)
    worker = until_training(driver)
    seen: list[str] = []
    while (task := driver.lease(worker)) is not None:
        seen.append(task.task_id)
        if task.task_id == "train/TRAIN/0/1":
            break
        driver.complete(worker, task)
    other = driver.hello("other")
    phases = []
    while (task := driver.lease(other)) is not None and task.stage != "evaluate":
        phases.append(task.task_id)
        driver.complete(other, task)
    assert "train/TRAIN/2/0" in phases


def test_blobs_that_rows_name_are_referenced() -> None:
    driver = undisturbed(make_config())
    state = driver.machine.state
    digests = referenced_digests(state)
    assert {row.params.digest for row in state.modules.values()} <= digests
    assert ref("router").digest in digests
    assert ref("init", "0.0").digest not in digests


@pytest.mark.parametrize("kind", ["random", "all"])
def test_other_shardings_need_no_router(kind: str) -> None:
    levels = {"levels": [{"modules": 1, "blocks": [0, 1], "embedding": True, "head": True}], "replicas": 3}
    if kind == "all":
        levels["replicas"] = 1
    driver = undisturbed(make_config(topology=levels, sharding={"kind": kind}))
    assert driver.machine.state.modules["mixture/0.0"].version == 3
    assert len(driver.machine.state.shards_of("mixture")) == (3 if kind == "random" else 1)
