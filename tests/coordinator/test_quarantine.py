"""Outliers under the driver of the state machine: doubted, computed again by another, counted with a warning."""

from __future__ import annotations

import pytest

from coordinator.claims import trust_of
from coordinator.norms import MIN_NORMS
from coordinator.state import Task
from protocol.errors import StaleLease
from tests.driven_crew import DrivenCrew, config_with, trained
from tests.driver import OFFER, undisturbed

PHASES = 2 * MIN_NORMS


def until(crew: DrivenCrew, names: str, task_id: str) -> Task:
    """Work until the task is leased to the first of `names`."""
    for _ in range(200):
        task = crew.take(names[0])
        assert task is not None
        if task.task_id == task_id:
            return task
        crew.hand_in(names[0], task)
        if task.audited:
            crew.work(names[1:], 1)
    raise AssertionError(f"{task_id} was never leased")


def crew_with_history(names: str) -> tuple[DrivenCrew, Task]:
    """Enough phases for every module to be judged; the first worker holds the next task."""
    crew = DrivenCrew(config_with(PHASES), names=names)
    return crew, until(crew, names, f"train/TRAIN/{MIN_NORMS}/0")


@pytest.mark.parametrize("scale", [100.0, 0.0])
def test_an_outlier_does_not_count_and_another_worker_computes_the_task(scale: float) -> None:
    crew, task = crew_with_history("ab")
    crew.scales["a"], crew.lies["a"] = scale, "scaled"
    crew.hand_in("a", task)
    waiting = crew.task(task)
    assert (waiting.status, len(waiting.claims), waiting.holders) == ("ready", 1, ())
    assert waiting.independent
    assert "quarantine" in crew.notes[-1]
    assert "a: the outer gradient of module" in trust_of(crew.machine.state)["quarantined"][task.task_id]
    del crew.scales["a"], crew.lies["a"]
    again = crew.take("a")
    assert again is not None
    assert again.task_id != task.task_id, "not the one that is doubted"
    second = crew.take("b")
    assert second is not None
    assert second.task_id == task.task_id, "the doubted task comes first"
    crew.hand_in("b", second)
    assert trust_of(crew.machine.state) == {
        "quarantined": {},
        "undecided": {},
        "suspected": {"a": [task.task_id]},
        "banned": {},
    }
    assert crew.disputes[-1].banned == ()
    crew.hand_in("a", again)
    crew.work("ab")
    assert crew.versions() == undisturbed(config_with(PHASES)).versions()
    assert trained(crew) == trained(undisturbed(config_with(PHASES)))


def test_an_outlier_that_a_second_worker_reproduces_counts_with_a_warning() -> None:
    crew, task = crew_with_history("ab")
    crew.scales = {"a": 100.0, "b": 100.0}
    crew.hand_in("a", task)
    assert crew.turn("b") is not None
    assert "a and b agree on it" in crew.notes[-1]
    assert not trust_of(crew.machine.state)["suspected"]
    [metric] = [metric for metric in crew.metrics if metric["task_id"] == task.task_id]
    assert metric["worker"] == "a"
    assert "agree on it" in metric["note"]


def test_of_outliers_that_differ_a_third_decides() -> None:
    crew, task = crew_with_history("abc")
    crew.scales, crew.lies = {"a": 100.0, "b": 1e-9}, {"a": "up", "b": "down"}
    crew.hand_in("a", task)
    crew.turn("b")
    assert "one more worker decides" in crew.notes[-1]
    crew.now += 11.0
    for name in "ab":
        assert (other := crew.take(name)) is None or other.task_id != task.task_id, "neither settles it alone"
    assert crew.take("c") is not None
    crew.hand_in("c", crew.task(task))
    assert trust_of(crew.machine.state)["suspected"] == {"a": [task.task_id], "b": [task.task_id]}


def test_alone_a_worker_may_repeat_its_outlier_so_that_the_run_goes_on() -> None:
    crew, task = crew_with_history("a")
    crew.scales = {"a": 100.0}
    crew.hand_in("a", task)
    crew.work("a")
    assert not crew.finished, "first it is waited for others"
    crew.now += 10.0
    crew.work("a")
    assert any("as no other worker could" in note for note in crew.notes)
    for _ in range(60):
        crew.now += 10.0
        crew.work("a")
    assert crew.finished


def test_a_worker_that_cannot_do_the_task_is_not_waited_for() -> None:
    crew, task = crew_with_history("a")
    crew.hello("other class", OFFER.model_copy(update={"fingerprint": "b"}))
    crew.scales = {"a": 100.0}
    crew.hand_in("a", task)
    assert crew.take("a") is None or crew.task(task).status == "ready"
    while crew.task(task).status == "ready" and (other := crew.take("a")) is not None and other.key != task.key:
        crew.hand_in("a", other)
    crew.now += 10.0
    crew.commit(crew.machine.leases.expire(crew.now - 9.0))
    again = crew.take("a")
    assert again is not None
    assert again.task_id == task.task_id


def test_a_backup_copy_of_an_outlier_is_dropped_as_it_may_rest_on_its_partial_progress() -> None:
    crew, task = crew_with_history("abc")
    crew.machine.state.lifelines[task.task_id, task.fence].overdue_s = crew.now - 1.0
    while (copy := crew.take("b")) is not None and copy.task_id != task.task_id:
        crew.hand_in("b", copy)
    assert copy is not None
    crew.scales["a"] = 100.0
    crew.hand_in("a", task)
    assert crew.task(task).holders == ()
    with pytest.raises(StaleLease):
        crew.hand_in("b", copy)


def test_a_doubted_task_starts_over_and_keeps_no_partial_progress() -> None:
    crew, task = crew_with_history("ab")
    assert crew.save(crew.ids["a"], task, 1)
    crew.scales["a"] = 100.0
    crew.hand_in("a", task)
    assert crew.task(task).checkpoint is None
    second = crew.take("b")
    assert second is not None
    assert second.task_id == task.task_id
    assert not crew.save(crew.ids["b"], second, 1), "its holders compute it from its start"
