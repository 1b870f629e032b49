"""Checkpoints of tasks: who goes on from them, when they go, and that no run needs them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coordinator.decisions import Decision
from coordinator.leases import MAX_REPEATS
from coordinator.references import referenced_blobs
from protocol.errors import RejectedTensor, StaleLease
from protocol.tasks import TrainSpec
from tests.driver import Driver, checkpoint, make_config, ref, until_training


def test_the_next_holder_goes_on_from_the_farthest_checkpoint() -> None:
    driver = Driver(make_config(stages=[{"kind": "pretrain", "steps": 6, "inner_steps": 6}], baselines=[]))
    first, second = driver.hello("first"), driver.hello("second")
    until_training(driver)
    task = driver.lease(first)
    assert task is not None
    assert task.kind == "TRAIN"
    assert driver.save(first, task, 2)
    assert driver.save(first, task, 3)
    assert not driver.save(first, task, 2), "an older one does not replace it"
    assert not driver.save(first, task, 3), "nor does a repetition"
    with pytest.raises(RejectedTensor, match="6 steps"):
        driver.save(first, task, 6)
    driver.now = 20.0
    driver.commit(driver.machine.leases.expire(driver.now))
    with pytest.raises(StaleLease):
        driver.save(first, task, 4)
    driver.restart()
    second = driver.hello("second")
    again = driver.machine.leases.lease(second, frozenset(), driver.now)
    assert isinstance(again.spec, TrainSpec)
    assert again.spec.resume == checkpoint(task, 3)
    assert checkpoint(task, 3).blob.digest in driver.machine.referenced()


def test_a_checkpoint_goes_with_its_task_and_a_replaced_one_at_once() -> None:
    driver = Driver(make_config(stages=[{"kind": "pretrain", "steps": 6, "inner_steps": 6}], baselines=[]))
    worker = driver.hello("worker")
    until_training(driver)
    task = driver.lease(worker)
    assert task is not None
    driver.save(worker, task, 2)
    newer = driver.machine.save_progress(worker, task.task_id, task.fence, checkpoint(task, 4), driver.now)
    assert newer.obsolete == (checkpoint(task, 2).blob.digest,)
    driver.commit(newer)
    result = driver.result(task).model_copy(update={"steps": 6, "step_losses": [1.0] * 6})
    done = driver.machine.complete(worker, task.task_id, task.fence, result, driver.now, driver.now)
    assert checkpoint(task, 4).blob.digest in done.obsolete
    driver.commit(done)
    assert checkpoint(task, 4).blob.digest not in driver.machine.referenced()


def test_a_task_that_failed_starts_over() -> None:
    """Its checkpoint may be what makes it fail."""
    driver = Driver(make_config())
    worker = driver.hello("worker")
    until_training(driver)
    task = driver.lease(worker)
    assert task is not None
    driver.save(worker, task)
    failed = driver.machine.leases.release(worker, task.task_id, task.fence, "overflow", False, driver.now)
    assert failed.obsolete == (checkpoint(task, 1).blob.digest,)
    driver.commit(failed)
    spec = driver.machine.leases.lease(worker, frozenset(), driver.now).spec
    assert isinstance(spec, TrainSpec)
    assert spec.resume is None


def test_a_checkpoint_that_is_asked_for_over_and_over_is_let_go_of() -> None:
    """Its blob cannot be read: the worker would ask again for ever."""
    driver = Driver(make_config())
    worker = until_training(driver)
    task = driver.lease(worker)
    assert task is not None
    driver.save(worker, task)
    other = driver.hello("other")
    driver.now += 11.0
    driver.commit(driver.machine.leases.expire(driver.now))
    specs: list[Any] = []
    notes: list[str] = []
    for _ in range(MAX_REPEATS + 2):
        lease = driver.machine.leases.lease(other, frozenset(), driver.now)
        driver.commit(lease.decision)
        specs.append(lease.spec)
        notes += lease.decision.notes
        assert lease.fence == task.fence + 1, "the same lease"
    assert [spec.resume is None for spec in specs] == [False] * (MAX_REPEATS + 1) + [True]
    assert notes == [
        f"task {task.task_id} starts over: its partial progress ({checkpoint(task, 1).blob.digest}) cannot be read"
    ]
    assert checkpoint(task, 1).blob.digest not in driver.machine.referenced()


def test_partial_progress_is_not_needed_to_go_on_and_goes_at_a_start_that_does_not_find_it() -> None:
    driver = Driver(make_config())
    worker = until_training(driver)
    task = driver.lease(worker)
    assert task is not None
    driver.save(worker, task)
    digest = checkpoint(task, 1).blob.digest
    references = referenced_blobs(driver.machine.state)
    assert references[digest].what == f"the partial progress of task {task.task_id}"
    assert [each for each, reference in references.items() if not reference.needed] == [digest]
    kept = driver.machine.resume(driver.now, frozenset({ref("another").digest}))
    assert kept.rows == ()
    decision = driver.machine.resume(driver.now, frozenset({digest}))
    assert decision.obsolete == (digest,)
    driver.commit(decision)
    assert digest not in driver.machine.referenced()
    assert driver.machine.state.tasks[task.task_id].holders, "its worker goes on"


def test_a_start_that_lifts_a_pause_lets_go_of_lost_progress_too() -> None:
    driver = Driver(make_config())
    worker = until_training(driver)
    task = driver.lease(worker)
    assert task is not None
    driver.save(worker, task)
    driver.commit(driver.machine.pause("a reason"))
    row = driver.machine.state.tasks[task.task_id]
    driver.commit(Decision((replace(row, failures=("a: failed",)),)))
    driver.commit(driver.machine.resume(driver.now, frozenset({checkpoint(task, 1).blob.digest})))
    row = driver.machine.state.tasks[task.task_id]
    assert (row.failures, row.checkpoint, driver.machine.state.standing.paused) == ((), None, "")
