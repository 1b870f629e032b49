"""Who lies is banned: what it did is undone, it is refused from then on, and admitted again by configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coordinator.decisions import Decision
from coordinator.plan import Plan
from coordinator.state import Holder
from protocol.errors import Banned, StaleLease
from tests.driven_crew import audited, config_with, trained
from tests.driver import OFFER, checkpoint, undisturbed


def test_who_differs_from_two_others_is_banned_and_its_work_is_undone() -> None:
    crew, task = audited("abc")
    crew.lies["a"] = "slightly wrong"
    crew.hand_in("a", task)
    elsewhere = crew.take("a")
    crew.work("bc")
    assert crew.banned("a")
    assert any(f"a differs from {names} and is banned" in " ".join(crew.notes) for names in ("b and c", "c and b"))
    if elsewhere is not None and elsewhere.task_id in crew.machine.state.tasks:
        assert all(holder.worker_id != crew.ids["a"] for holder in crew.task(elsewhere).holders)
    [dispute] = [dispute for dispute in crew.disputes if dispute.banned]
    assert [claim.worker for claim in dispute.claims if claim.fence in dispute.banned] == ["a"]
    assert crew.finished
    assert crew.versions() == undisturbed(config_with()).versions()
    assert trained(crew) == trained(undisturbed(config_with()))


def test_a_ban_takes_back_the_other_claims_of_the_liar() -> None:
    crew, task = audited("abc")
    crew.lies["a"] = "wrong"
    crew.hand_in("a", task)
    other = crew.take("a")
    assert other is not None
    crew.hand_in("a", other)
    blobs = {ref.digest for claim in crew.task(other).claims for ref in claim.outputs.values()}
    for name in "bc":
        assert crew.take(name) is not None
        crew.hand_in(name, replace(task, fence=crew.task(task).fence))
    assert crew.banned("a")
    assert crew.task(other).claims == ()
    assert blobs <= crew.obsolete
    crew.work("bc")
    assert crew.finished
    assert crew.versions() == undisturbed(config_with()).versions()


@pytest.mark.parametrize("failed", [False, True])
def test_a_ban_stops_who_went_on_from_partial_progress_that_may_be_the_liars(failed: bool) -> None:
    """Its result is stale then, and what it saves next as well."""
    crew, task = audited("abcd")
    crew.lies["a"] = "wrong"
    crew.hand_in("a", task)
    resumed = next(t for t in crew.machine.state.tasks.values() if t.stage == "train" and t.task_id != task.task_id)
    crew.commit(Decision((replace(resumed, fence=1, checkpoint=checkpoint(resumed, 1)),)))
    while (held := crew.take("d")) is not None and held.task_id != resumed.task_id:
        crew.commit(crew.machine.leases.release(crew.ids["d"], held.task_id, held.fence, "", False, crew.now))
        crew.commit(Decision((replace(crew.task(held), phase=9),)))
    assert held is not None
    spec: Any = crew.machine.leases.matching.spec(crew.task(held))
    assert spec.resume is not None
    if failed:  # another holder failed, and the checkpoint went with that
        crew.commit(Decision((replace(crew.task(held), checkpoint=None, failures=("e: out of memory",)),)))
    for name in "bc":
        claimed = crew.task(task)
        holder = Holder(crew.ids[name], claimed.fence + 1)
        crew.commit(Decision((replace(claimed, status="leased", holders=(holder,), fence=holder.fence),)))
        crew.machine.leases.liveness.begin(crew.task(task), holder, crew.now)
        crew.hand_in(name, replace(task, fence=holder.fence))
    assert crew.banned("a")
    assert (crew.task(held).status, crew.task(held).holders, crew.task(held).checkpoint) == ("ready", (), None)
    with pytest.raises(StaleLease):
        crew.hand_in("d", held)
    with pytest.raises(StaleLease):
        crew.save(crew.ids["d"], held, 1)


def test_a_banned_worker_that_the_configuration_names_is_admitted_at_the_next_start() -> None:
    crew, task = audited("abc")
    crew.lies["a"] = "wrong"
    crew.hand_in("a", task)
    crew.work("bc", 10)
    assert crew.banned("a")
    with pytest.raises(Banned, match=r"with execution\.unban: \[a\]"):
        crew.hello("a")
    crew.restart()
    assert crew.banned("a")
    config = crew.plan.config
    execution = config.execution.model_copy(update={"unban": ["a", "nobody"]})
    crew.plan = Plan(config.model_copy(update={"execution": execution}))
    crew.restart()
    assert not crew.banned("a")
    assert crew.notes[-1].startswith("worker a is admitted again, by execution.unban: its result of task train/")
    crew.hello("a")


def test_a_banned_worker_is_refused_whatever_it_calls_and_after_a_restart_too() -> None:
    crew, task = audited("abc")
    crew.lies["a"] = "wrong"
    crew.hand_in("a", task)
    held = crew.take("a")
    assert held is not None
    for name in "bcbcbcbcbc":
        if not crew.banned("a"):
            crew.turn(name)
    leases, worker_id = crew.machine.leases, crew.ids["a"]
    with pytest.raises(Banned, match=r"worker a is banned from this run: its result of task train/TRAIN"):
        leases.lease(worker_id, frozenset(), crew.now)
    with pytest.raises(Banned):
        leases.heartbeat(worker_id, held.task_id, held.fence, 1, 1.0, 1, crew.now)
    with pytest.raises(Banned):
        leases.held_task(held.task_id, held.fence, worker_id)
    with pytest.raises(Banned):
        crew.hand_in("a", held)
    with pytest.raises(StaleLease):
        leases.held_task(held.task_id, held.fence)
    crew.restart()
    for identity in ("", "a"):
        with pytest.raises(Banned):
            crew.machine.leases.register("", "a", OFFER, crew.now, identity)
    assert crew.machine.leases.register("", "a", OFFER, crew.now, "another certificate")
