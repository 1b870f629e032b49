"""Audits under the driver of the state machine: honest runs keep their bits and counts, whatever happens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.claims import trust_of
from coordinator.journal import Journal
from coordinator.machine import CHECKPOINT
from coordinator.state import Task
from protocol.errors import StaleLease
from protocol.tasks import TaskResult
from tests.driven_crew import DrivenCrew, audited, config_with, trained
from tests.driver import OFFER, Driver, history, undisturbed


def test_an_honest_run_with_audits_has_the_bits_and_the_counts_of_one_without() -> None:
    crew = DrivenCrew(config_with(audit_share=1.0), names="abc")
    crew.work("abc")
    assert crew.finished
    reference = undisturbed(config_with())
    assert crew.versions() == reference.versions()
    assert trained(crew) == trained(reference)
    assert not crew.notes
    assert not crew.disputes
    assert crew.machine.state.conduct == {}


def test_both_results_of_an_audited_task_may_be_under_way_at_once() -> None:
    crew, task = audited("abc")
    while (other := crew.take("b")) is not None and other.task_id != task.task_id:
        crew.hand_in("b", other)
    assert other is not None, "b has nothing else left and computes what a computes"
    third = crew.take("c")
    assert third is None or third.task_id != task.task_id, "two are enough"
    crew.hand_in("a", task)
    assert [claim.worker for claim in crew.task(task).claims] == ["a"]
    crew.hand_in("b", other)
    assert crew.task(task).status == "done"


def test_a_lone_worker_is_not_audited_which_is_said_once() -> None:
    crew = DrivenCrew(config_with(audit_share=1.0), names="a")
    crew.work("a")
    assert crew.finished
    assert crew.notes == ["no task is audited while a is the only worker"]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_about_the_configured_share_is_audited(share: float) -> None:
    crew = DrivenCrew(config_with(20, audit_share=share), seed=3, names="ab")
    chosen: dict[str, bool] = {}
    for _ in range(400):
        for name in "ab":
            task = crew.turn(name)
            if task is not None and task.kind == "TRAIN":
                chosen[task.task_id] = task.audited
    assert crew.finished
    assert sum(chosen.values()) / len(chosen) == pytest.approx(share, abs=0.12)


def test_one_identity_under_two_names_is_not_two_workers() -> None:
    crew, task = audited("ab")
    crew.hand_in("a", task)
    twin = crew.machine.leases.register("", "twin", OFFER, crew.now, "a")
    leased = crew.lease(twin)
    assert leased is not None
    assert leased.task_id != task.task_id
    leased = crew.take("b")
    assert leased is not None
    assert leased.task_id == task.task_id


def test_claims_survive_a_restart(tmp_path: Any) -> None:
    crew, task = audited("abc")
    crew.hand_in("a", task)
    journal = Journal(tmp_path)
    journal.commit(crew.stored.values())
    assert [row for row in journal.rows() if row.key == task.task_id] == [crew.task(task)]
    crew.restart()
    assert crew.machine.claims.holds(task.task_id, task.fence)
    blobs = {blob.digest for claim in crew.task(task).claims for blob in claim.outputs.values()}
    assert blobs <= crew.machine.referenced(), "their blobs are not garbage"
    crew.work("bc")
    assert crew.finished
    assert crew.versions() == undisturbed(config_with()).versions()


@pytest.fixture(scope="module")
def reference() -> Driver:
    return undisturbed(config_with())


@settings(max_examples=40, deadline=None)
@given(drawn=st.binary(min_size=800, max_size=800))
def test_neither_faults_nor_a_liar_change_the_bits_of_an_audited_run(reference: Driver, drawn: bytes) -> None:
    """Three honest workers and one that always lies; all of them die, come back, and the coordinator restarts."""
    crew = DrivenCrew(config_with(audit_share=1.0), names="abcl")
    crew.lies["l"] = "lie"
    held: dict[str, Task] = {}
    for name, action in history(drawn, "abcl", ("lease", "complete", "complete", "vanish", "restart")):
        if crew.finished:
            break
        if action == "restart":
            crew.restart()
            held.clear()
            crew.ids = {each: crew.hello(each) for each in "abcl" if not crew.banned(each)}
        elif action == "vanish":
            held.pop(name, None)
            crew.now += 11.0
            crew.commit(crew.machine.leases.expire(crew.now))
            for each in set("abcl"):
                if not crew.banned(each) and crew.ids.get(each) in crew.machine.state.workers:
                    crew.machine.leases.known(crew.ids[each], crew.now)
        elif not crew.banned(name) and action == "lease" and name not in held:
            task = crew.take(name)
            if task is not None:
                held[name] = task
        elif name in held and not crew.banned(name):
            task = held.pop(name)
            try:
                crew.hand_in(name, task)
            except (StaleLease, ValueError):
                continue
    if crew.machine.state.standing.paused:
        crew.restart()
    for _ in range(20):
        crew.now += 11.0
        crew.commit(crew.machine.leases.expire(crew.now))
        crew.work("abc")
    assert crew.finished
    assert crew.versions() == reference.versions()
    assert trained(crew) == trained(reference)
    assert set(trust_of(crew.machine.state)["banned"]) <= {"l"}


def test_the_uploads_of_an_audited_task_are_those_of_any_other() -> None:
    """A worker cannot tell from what it may upload that it is audited."""
    crew, task = audited("ab")
    assert CHECKPOINT in crew.machine.accepted_uploads(task)
    assert isinstance(crew.result(task), TaskResult)
