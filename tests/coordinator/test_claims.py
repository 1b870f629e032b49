"""Claims under the driver of the state machine: quarantine, audits, bans, and honest runs that keep their bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import Config
from coordinator.claims import UNDECIDED_LEASES, trust_of
from coordinator.decisions import Decision, Dispute
from coordinator.journal import Journal
from coordinator.machine import CHECKPOINT
from coordinator.norms import MIN_NORMS
from coordinator.plan import Plan
from coordinator.state import Holder, Task
from coordinator.verdict import MAX_CLAIMS, agree, judge
from protocol.errors import Banned, StaleLease
from protocol.tasks import Capabilities, TaskResult
from tests.coordinator.test_machine import OFFER, Driver, checkpoint, make_config, ref, undisturbed

PHASES = 2 * MIN_NORMS


def config_with(phases: int = 3, **execution: Any) -> Config:
    """The 2x2 of the state machine's tests, without baselines."""
    stages = [
        {"kind": "pretrain", "steps": 4, "inner_steps": 2},
        {"kind": "shard"},
        {"kind": "train", "phases": phases, "inner_steps": 2},
    ]
    config = make_config(stages=stages, baselines=[])
    return config.model_copy(update={"execution": config.execution.model_copy(update=execution)})


class Crew(Driver):
    """A driver of workers with names, norms (`scales`, by name; else 1) and lies (by name: of what their bits are)."""

    def __init__(self, config: Config, seed: int = 0, names: str = "") -> None:
        self.lies: dict[str, str] = {}
        self.scales: dict[str, float] = {}
        self.notes: list[str] = []
        self.disputes: list[Dispute] = []
        self.obsolete: set[str] = set()
        super().__init__(config, seed)
        self.ids = {name: self.hello(name) for name in names}

    def commit(self, decision: Decision) -> None:
        super().commit(decision)
        self.notes += decision.notes
        self.disputes += decision.disputes
        self.obsolete |= set(decision.obsolete)
        for metric in decision.metrics:
            self.machine.claims.learn(metric)

    def restart(self) -> None:
        super().restart()
        for metric in self.metrics:
            self.machine.claims.learn(metric)

    def take(self, name: str) -> Task | None:
        if self.ids.get(name) not in self.machine.state.workers:
            self.ids[name] = self.hello(name)
        return self.lease(self.ids[name])

    def hand_in(self, name: str, task: Task) -> None:
        result, lie = self.result(task), self.lies.get(name)
        if lie and task.kind == "TRAIN":
            result = result.model_copy(update={"outputs": {key: ref(lie, key) for key in result.outputs}})
        norms = dict.fromkeys(result.outputs, self.scales.get(name, 1.0)) if task.kind == "TRAIN" else {}
        self.commit(self.machine.complete(self.ids[name], task.task_id, task.fence, result, self.now, self.now, norms))
        self.settle()

    def turn(self, name: str) -> Task | None:
        """One task of a worker, if it gets one."""
        task = self.take(name)
        if task is not None:
            self.hand_in(name, task)
        return task

    def work(self, names: str, times: int = 1000) -> None:
        """Turns in order, until nobody gets anything or the run is over."""
        for _ in range(times):
            turns = [self.turn(name) for name in names if not self.banned(name)]
            if self.finished or not any(turns):
                return

    def banned(self, name: str) -> bool:
        return name in trust_of(self.machine.state)["banned"]

    def task(self, task: Task) -> Task:
        return self.machine.state.tasks[task.task_id]


def trained(driver: Driver) -> list[Any]:
    return sorted((m["task_id"], m["tokens"], m["steps"]) for m in driver.metrics)


def until(crew: Crew, names: str, task_id: str) -> Task:
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


# --- quarantine -------------------------------------------------------------------------------------------------------


def crew_with_history(names: str) -> tuple[Crew, Task]:
    """Enough phases for every module to be judged; the first worker holds the next task."""
    crew = Crew(config_with(PHASES), names=names)
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


# --- audits -----------------------------------------------------------------------------------------------------------


def audited(names: str, phases: int = 3) -> tuple[Crew, Task]:
    """All tasks are audited; the first worker holds the first of the train stage."""
    crew = Crew(config_with(phases, audit_share=1.0), names=names)
    for _ in range(100):
        task = crew.take(names[0])
        if task is not None and task.stage == "train":
            assert task.audited
            return crew, task
        if task is not None:
            crew.hand_in(names[0], task)
        else:
            crew.turn(names[1])
    raise AssertionError("training never began")


def test_an_honest_run_with_audits_has_the_bits_and_the_counts_of_one_without() -> None:
    crew = Crew(config_with(audit_share=1.0), names="abc")
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


def differing() -> tuple[Crew, Task]:
    """Of two workers one lies; both have computed the task, and whatever else there is to do."""
    crew, task = audited("ab", phases=1)
    crew.lies["a"] = "wrong"
    crew.hand_in("a", task)
    crew.work("ab")
    assert {claim.worker for claim in crew.task(task).claims} == {"a", "b"}
    return crew, task


def idle(crew: Crew, names: str, times: int) -> None:
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


def test_a_lone_worker_is_not_audited_which_is_said_once() -> None:
    crew = Crew(config_with(audit_share=1.0), names="a")
    crew.work("a")
    assert crew.finished
    assert crew.notes == ["no task is audited while a is the only worker"]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_about_the_configured_share_is_audited(share: float) -> None:
    crew = Crew(config_with(20, audit_share=share), seed=3, names="ab")
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


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_neither_faults_nor_a_liar_change_the_bits_of_an_audited_run(data: st.DataObject) -> None:
    """Three honest workers and one that always lies; all of them die, come back, and the coordinator restarts."""
    reference = undisturbed(config_with())
    crew = Crew(config_with(audit_share=1.0), names="abcl")
    crew.lies["l"] = "lie"
    held: dict[str, Task] = {}
    for _ in range(400):
        if crew.finished:
            break
        name = data.draw(st.sampled_from("abcl"))
        action = data.draw(st.sampled_from(["lease", "complete", "complete", "vanish", "restart"]))
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


# --- agreement --------------------------------------------------------------------------------------------------------


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
    crew = Crew(config)
    other = Capabilities(**{**OFFER.model_dump(), "fingerprint": "b"})
    crew.ids = {"a": crew.hello("a"), "b": crew.hello("b", other)}
    crew.lies["b"] = "other bits of another class"
    crew.work("ab")
    assert crew.finished
    assert not crew.disputes


def test_the_uploads_of_an_audited_task_are_those_of_any_other() -> None:
    """A worker cannot tell from what it may upload that it is audited."""
    crew, task = audited("ab")
    assert CHECKPOINT in crew.machine.accepted_uploads(task)
    assert isinstance(crew.result(task), TaskResult)
