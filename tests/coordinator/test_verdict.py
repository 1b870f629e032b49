"""What counts where results of a task differ: who settles it, when nobody can, and what it is to agree."""

from __future__ import annotations

from dataclasses import replace

from coordinator.claims import UNDECIDED_LEASES, trust_of
from coordinator.state import Task
from coordinator.verdict import MAX_CLAIMS, agree, judge
from protocol.tasks import Capabilities
from tests.driven_crew import DrivenCrew, audited, config_with
from tests.driver import OFFER, ref, undisturbed


def differing() -> tuple[DrivenCrew, Task]:
    """Of two workers one lies; both have computed the task, and whatever else there is to do."""
    crew, task = audited("ab", phases=1)
    crew.lies["a"] = "wrong"
    crew.hand_in("a", task)
    crew.work("ab")
    assert {claim.worker for claim in crew.task(task).claims} == {"a", "b"}
    return crew, task


def idle(crew: DrivenCrew, names: str, times: int) -> None:
    """The workers ask again and again, as time passes."""
    for _ in range(times):
        crew.now += 10.0
        crew.work(names)
        crew.commit(crew.machine.leases.expire(crew.now))


def test_of_two_that_differ_neither_settles_it_by_computing_it_again() -> None:
    crew, task = differing()
    idle(crew, "ab", UNDECIDED_LEASES - 2)
    sentence = f"task {task.task_id} waits for a third worker: the results of a and b differ"
    assert [claim.worker for claim in crew.task(task).claims] == ["a", "b"]
    assert trust_of(crew.machine.state)["undecided"][task.task_id] == sentence
    for name in "ab":
        waiting = crew.machine.leases.lease(crew.ids[name], frozenset(), crew.now).waiting_for
        assert "waits for a third worker: the results of" in waiting
    assert not crew.machine.state.conduct
    crew.work("abc")
    assert crew.finished
    assert crew.banned("a")
    assert crew.versions() == undisturbed(config_with(1)).versions()


def test_two_that_differ_for_long_pause_the_run_and_a_third_may_decide_it_later() -> None:
    crew, _ = differing()
    idle(crew, "ab", UNDECIDED_LEASES + 2)
    paused = crew.machine.state.standing.paused
    assert "the results of a and b differ; none came in 500 s: start another worker" in paused
    assert crew.notes.count(paused) == 1
    assert {claim.worker for claim in crew.disputes[-1].claims} == {"a", "b"}
    assert crew.disputes[-1].counted is None
    crew.restart()
    crew.work("abc")
    assert crew.finished
    assert crew.banned("a")
    assert crew.versions() == undisturbed(config_with(1)).versions()


def test_a_third_that_is_known_and_busy_is_waited_for_without_a_pause() -> None:
    crew, _ = differing()
    crew.ids["c"] = crew.hello("c")
    for _ in range(2 * UNDECIDED_LEASES):
        crew.now += 10.0
        crew.machine.leases.known(crew.ids["c"], crew.now)
        crew.commit(crew.machine.leases.expire(crew.now))
    assert not crew.machine.state.standing.paused


def test_a_verdict_by_one_of_two_that_differ_is_none() -> None:
    crew, task = differing()
    again = replace(crew.task(task).claims[0], fence=99)
    assert judge(crew.task(task), again).counted is None
    other = replace(again, identity="c")
    assert judge(crew.task(task), other).counted is not None


def test_alone_with_a_claim_of_its_own_an_audited_worker_goes_on() -> None:
    """Nobody differs from it, and nobody is there to compare with."""
    crew, task = audited("ab", phases=1)
    crew.hand_in("a", task)
    crew.commit(crew.machine.leases.release(crew.ids["b"], "", 0, "", True, crew.now))
    idle(crew, "a", 20)
    assert crew.finished
    assert any("computed it twice, as no other worker could" in note for note in crew.notes)


def test_results_that_never_agree_pause_the_run_and_a_restart_tries_again() -> None:
    crew, task = audited("abcdef")
    for name in "abcdef":
        crew.lies[name] = f"noise of {name}"
    crew.hand_in("a", task)
    while not crew.machine.state.standing.paused:
        crew.work("bcdef", 1)
    assert f"has {MAX_CLAIMS} different results" in crew.machine.state.standing.paused
    crew.lies.clear()
    crew.restart()
    crew.work("abcdef")
    assert crew.finished
    assert crew.versions() == undisturbed(config_with()).versions()


def test_inside_a_class_bits_are_compared_and_across_classes_norms() -> None:
    crew, task = audited("ab")
    crew.hand_in("a", task)
    [claim] = crew.task(task).claims
    assert agree(claim, replace(claim, identity="b", fence=9, wall_s=5.0))
    moved = replace(claim, outputs={**claim.outputs, "0.0": ref("other")})
    assert not agree(claim, moved)
    assert not agree(claim, replace(claim, result={**claim.result, "loss_sum": 2.0}))
    assert agree(claim, replace(claim, result={**claim.result, "seconds": 2.0})), "time is not part of a result"
    elsewhere = replace(moved, fingerprint="another class")
    assert agree(claim, elsewhere)
    assert agree(claim, replace(elsewhere, norms={**claim.norms, "0.0": 1.04}))
    assert not agree(claim, replace(elsewhere, norms={**claim.norms, "0.0": 1.06}))
    assert not agree(claim, replace(elsewhere, result={**claim.result, "tokens": 1}))
    assert agree(claim, replace(elsewhere, result={**claim.result, "loss_sum": 1.04}))
    assert not agree(claim, replace(elsewhere, result={**claim.result, "loss_sum": 1.06}))
    assert agree(claim, replace(elsewhere, norms={**claim.norms, "inner_state": 0.6}))
    assert not agree(claim, replace(elsewhere, norms={**claim.norms, "inner_state": 0.0}))
    assert not agree(claim, replace(elsewhere, norms={**claim.norms, "inner_state": 2.1}))


def test_across_classes_workers_of_two_classes_agree_on_an_audit() -> None:
    config = config_with(audit_share=1.0)
    config = config.model_copy(update={"experiment": config.experiment.model_copy(update={"determinism": "any"})})
    crew = DrivenCrew(config)
    other = Capabilities(**{**OFFER.model_dump(), "fingerprint": "b"})
    crew.ids = {"a": crew.hello("a"), "b": crew.hello("b", other)}
    crew.lies["b"] = "other bits of another class"
    crew.work("ab")
    assert crew.finished
    assert not crew.disputes
