"""Who gets which task, who holds it, and whose word about it counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.decisions import Decision
from protocol.errors import Forbidden, RejectedTensor, StaleLease, UnknownWorker
from protocol.tasks import TaskResult, TrainSpec
from tests.driver import OFFER, Driver, checkpoint, make_config, ref, until_training


def test_a_stale_result_changes_nothing() -> None:
    driver = Driver(make_config())
    first, second = driver.hello("first"), driver.hello("second")
    task = driver.lease(first)
    assert task is not None
    driver.now = 11.0
    driver.commit(driver.machine.leases.expire(driver.now))
    again = driver.lease(second)
    assert again is not None
    while again.task_id != task.task_id:
        driver.complete(second, again)
        again = driver.lease(second)
        assert again is not None
    assert again.fence > task.fence
    before = dict(driver.stored)
    with pytest.raises(StaleLease, match="drop the task"):
        driver.complete(first, task)
    assert driver.stored == before
    assert driver.machine.leases.heartbeat(first, task.task_id, task.fence, 1, 0.0, 1, driver.now) == (True, 0.0)


def test_heartbeats_keep_a_lease_alive() -> None:
    driver = Driver(make_config())
    worker = driver.hello("slow")
    task = driver.lease(worker)
    assert task is not None
    for _ in range(5):
        driver.now += 8.0
        lost, _ = driver.machine.leases.heartbeat(worker, task.task_id, task.fence, 1, 2.0, 3, driver.now)
        driver.commit(driver.machine.leases.expire(driver.now))
        assert not lost
    driver.complete(worker, task)


def test_wrong_outputs_are_refused() -> None:
    driver = Driver(make_config())
    worker = driver.hello("one")
    task = driver.lease(worker)
    assert task is not None
    result = TaskResult(outputs={"something": ref("x")})
    with pytest.raises(RejectedTensor, match="expected \\['tokens'\\]"):
        driver.machine.complete(worker, task.task_id, task.fence, result, 0.0, 0.0)


def test_an_unknown_worker_is_told_to_say_hello() -> None:
    with pytest.raises(UnknownWorker, match="say hello"):
        Driver(make_config()).machine.leases.lease("w0", frozenset(), 0.0)


def test_a_worker_that_leaves_gives_back_what_it_holds() -> None:
    driver = Driver(make_config())
    leaving, other = driver.hello("leaving"), driver.hello("other")
    task = driver.lease(leaving)
    assert task is not None
    driver.commit(driver.machine.leases.release(leaving, "", 0, "", True, driver.now))
    again = driver.lease(other)
    assert again is not None
    assert again.task_id == task.task_id
    assert driver.machine.state.tasks[task.task_id].failures == ()


def test_a_worker_is_known_by_its_certificate_and_else_by_its_name() -> None:
    driver = Driver(make_config())
    leases = driver.machine.leases
    plain, certified = driver.hello("host:1"), leases.register("", "host:2", OFFER, driver.now, "alice")
    assert [driver.machine.state.workers[each].identity for each in (plain, certified)] == ["host:1", "alice"]
    assert leases.register(certified, "host:3", OFFER, driver.now, "alice") == certified
    for taken in (plain, certified):
        with pytest.raises(Forbidden):
            leases.register(taken, "host:4", OFFER, driver.now, "mallory")
    assert driver.machine.state.workers[certified].identity == "alice"


def test_a_worker_with_too_little_memory_is_told_so() -> None:
    driver = Driver(make_config())
    until_training(driver)
    small = driver.hello("small", OFFER.model_copy(update={"memory_bytes": 1000}))
    lease = driver.machine.leases.lease(small, frozenset(), 0.0)
    assert lease.task is None
    assert "GB of memory and this worker offers" in lease.waiting_for


def test_strict_determinism_pins_a_stage_to_one_class() -> None:
    driver = Driver(make_config(baselines=[]))
    worker = until_training(driver, "train")
    other = driver.hello("other", OFFER.model_copy(update={"fingerprint": "b"}))
    task = driver.lease(worker)
    assert task is not None
    assert "pinned to 'a'" in driver.machine.leases.lease(other, frozenset(), 0.0).waiting_for
    driver.complete(worker, task)
    assert "pinned to 'a'" in driver.machine.leases.lease(other, frozenset(), 0.0).waiting_for
    free = Driver(make_config(determinism="any"))
    until_training(free)
    assert free.lease(free.hello("other", OFFER.model_copy(update={"fingerprint": "b"}))) is not None


def test_a_class_that_left_nothing_behind_binds_nobody() -> None:
    """A worker that leases first and goes away must not leave a run that no other class may continue."""
    driver = Driver(make_config(baselines=[]))
    worker = until_training(driver, "train")
    other = driver.hello("other", OFFER.model_copy(update={"fingerprint": "b"}))
    task = driver.lease(worker)
    assert task is not None
    assert driver.save(worker, task)
    driver.now += 11.0
    driver.commit(driver.machine.leases.expire(driver.now))
    lease = driver.machine.leases.lease(other, frozenset(), driver.now)
    driver.commit(lease.decision)
    assert isinstance(lease.spec, TrainSpec)
    assert lease.spec.resume is None, "no class goes on from what another has computed"
    assert lease.task is not None
    assert lease.task.task_id == task.task_id
    assert driver.machine.state.tasks[task.task_id] == lease.task
    assert lease.task.checkpoint is None
    assert checkpoint(task, 1).blob.digest in lease.decision.obsolete
    assert "pinned to 'b'" in driver.machine.leases.lease(worker, frozenset(), driver.now).waiting_for


@pytest.mark.parametrize("determinism", ["strict", "any"])
def test_partial_progress_and_claims_of_another_class_go_when_the_stage_is_pinned_anew(determinism: str) -> None:
    """Also those of tasks that the new class does not lease now; under `any` everybody goes on from them."""
    driver = Driver(make_config(baselines=[], determinism=determinism))
    worker = until_training(driver, "train")
    other = driver.hello("other", OFFER.model_copy(update={"fingerprint": "b"}))
    first, second = driver.lease(worker), driver.lease(driver.hello("second"))
    assert first is not None
    assert second is not None
    assert driver.save(worker, first)
    row = driver.machine.state.tasks[second.task_id]
    claim = driver.machine.claims.claim(row, driver.machine.state.workers[worker], 1, driver.result(row), {}, 0.0)
    driver.commit(Decision((replace(row, claims=(claim,), audited=True),)))
    driver.now += 11.0
    driver.commit(driver.machine.leases.expire(driver.now))
    lease = driver.machine.leases.lease(other, frozenset(), driver.now)
    driver.commit(lease.decision)
    left = [task for task in driver.machine.state.tasks.values() if task.checkpoint or task.claims]
    if determinism == "any":
        assert len(left) == 2
        assert lease.decision.obsolete == ()
        return
    assert lease.task is not None
    assert left == []
    blobs = {checkpoint(first, 1).blob.digest} | {blob.digest for blob in claim.outputs.values()}
    assert set(lease.decision.obsolete) == blobs
    assert not blobs & driver.machine.referenced()


def test_a_device_that_is_missing_is_named() -> None:
    driver = Driver(make_config(numerics={"device": "cuda"}))
    worker = driver.hello("cpu only")
    while (task := driver.lease(worker)) is not None:
        driver.complete(worker, task)
    assert "needs device cuda" in driver.machine.leases.lease(worker, frozenset(), 0.0).waiting_for
