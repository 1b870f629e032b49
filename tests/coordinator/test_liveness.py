"""Which tasks are overdue by the heartbeats of their holders, and who holds them beside them then."""

from __future__ import annotations

import pytest

from configs.schema import Config
from coordinator.state import Task
from protocol.errors import StaleLease
from tests.driver import Driver, make_config, until_training


def beating(driver: Driver, worker: str, task: Task, beats: int, steps: int = 0, gap_s: float = 1.0) -> None:
    """Heartbeats at even gaps, `steps` more steps with each."""
    for beat in range(1, beats + 1):
        driver.now += gap_s
        lost, _ = driver.machine.leases.heartbeat(worker, task.task_id, task.fence, beat * steps, 1.0, 1, driver.now)
        assert not lost


def test_a_worker_that_never_beats_is_overdue_like_any_other() -> None:
    """As soon as the heartbeats of others tell; after two intervals of 2 s while none has been heard."""
    driver = Driver(make_config())
    silent = driver.hello("silent")
    task = driver.lease(silent)
    assert task is not None
    driver.now += 3.9
    assert driver.machine.leases.liveness.overdue(driver.now) == []
    driver.now += 0.2
    assert driver.machine.leases.liveness.overdue(driver.now) == [task.task_id]
    steady = driver.hello("steady")
    taken = driver.lease(steady)
    assert taken is not None
    beating(driver, steady, taken, 8)
    driver.complete(steady, taken)
    other = driver.lease(driver.hello("silent too"))
    assert other is not None
    driver.now += 3.1
    assert other.task_id in driver.machine.leases.liveness.overdue(driver.now)


def test_an_overdue_task_gets_a_second_holder_and_the_first_complete_wins() -> None:
    driver = Driver(make_config())
    silent, other = driver.hello("silent"), driver.hello("other")
    task = driver.lease(silent)
    assert task is not None
    beating(driver, silent, task, beats=8)
    driver.now += 3.5  # a heartbeat interval of 2 s and a half are over, the lease of 10 s is not
    assert driver.machine.leases.liveness.overdue(driver.now) == [task.task_id]
    copy = driver.lease(other)
    assert copy is not None
    assert (copy.task_id, copy.fence) == (task.task_id, task.fence + 1)
    assert driver.machine.leases.liveness.overdue(driver.now) == []
    driver.complete(silent, task)
    assert driver.machine.leases.heartbeat(other, copy.task_id, copy.fence, 1, 1.0, 1, driver.now) == (True, 0.0)
    with pytest.raises(StaleLease):
        driver.complete(other, copy)


def test_a_task_has_two_holders_at_most() -> None:
    driver = Driver(make_config())
    names = [driver.hello(name) for name in ("first", "second", "third")]
    task = driver.lease(names[0])
    assert task is not None
    beating(driver, names[0], task, beats=8)
    driver.now += 3.5
    copy, another = driver.lease(names[1]), driver.lease(names[2])
    assert copy is not None
    assert another is not None
    assert copy.task_id == task.task_id != another.task_id
    driver.complete(names[2], another)
    driver.now += 9.0  # the second holder has fallen silent, too, and neither lease has ended
    third = driver.lease(names[2])
    assert third is not None
    assert (third.task_id, third.fence) == (task.task_id, copy.fence + 1)
    with pytest.raises(StaleLease):
        driver.complete(names[0], task)
    driver.complete(names[1], copy)


def long_tasks() -> Config:
    stages = [{"kind": "pretrain", "steps": 200, "inner_steps": 100}, {"kind": "shard"}]
    return make_config(stages=stages, baselines=[])


def test_heartbeats_without_progress_are_a_hung_worker() -> None:
    driver = Driver(long_tasks())
    until_training(driver)
    hung, other = driver.hello("hung"), driver.hello("other")
    task = driver.lease(hung)
    assert task is not None
    beating(driver, hung, task, beats=8, steps=1)
    for _ in range(8):  # three steps of a second and six seconds are nine
        driver.now += 1.0
        driver.machine.leases.heartbeat(hung, task.task_id, task.fence, 8, 1.0, 1, driver.now)
        assert driver.lease(other) is None
    driver.now += 1.5
    driver.machine.leases.heartbeat(hung, task.task_id, task.fence, 8, 1.0, 1, driver.now)
    copy = driver.lease(other)
    assert copy is not None
    assert copy.task_id == task.task_id


def test_a_slow_worker_is_backed_up_by_an_idle_fast_one() -> None:
    driver = Driver(long_tasks())
    fast = until_training(driver)
    first = driver.lease(fast)
    assert first is not None
    beating(driver, fast, first, beats=8, steps=10, gap_s=1.0)
    driver.commit(driver.machine.leases.release(fast, first.task_id, first.fence, "", False, driver.now))
    slow = driver.hello("slow")
    task = driver.lease(slow)
    assert task is not None
    beating(driver, slow, task, beats=5, steps=1, gap_s=1.0)
    assert driver.lease(fast) is None  # too little is known of the slow one yet
    beating(driver, slow, task, beats=6, steps=1, gap_s=1.0)
    copy = driver.lease(fast)
    assert copy is not None
    assert copy.task_id == task.task_id
