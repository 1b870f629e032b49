"""The state machine under a driver that leases, completes, loses and repeats at random: every rule without a socket."""

from __future__ import annotations

import contextlib
import hashlib
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import Config
from coordinator.decisions import Decision
from coordinator.leases import MAX_REPEATS
from coordinator.machine import Machine
from coordinator.plan import Plan
from coordinator.references import referenced_blobs, referenced_digests
from coordinator.state import State, Task
from protocol.errors import Forbidden, RejectedTensor, StaleLease, UnknownTask, UnknownWorker
from protocol.tasks import BlobRef, Capabilities, Checkpoint, TaskResult, TrainSpec

OFFER = Capabilities(devices=["cpu"], memory_bytes=10**10, threads=1, fingerprint="a")


def make_config(**changes: Any) -> Config:
    experiment: dict[str, Any] = {
        "model": {"blocks": 2, "hidden_size": 8, "heads": 2, "intermediate_size": 16, "sequence_length": 64},
        "topology": {
            "levels": [{"modules": 2, "blocks": [0], "embedding": True}, {"modules": 2, "blocks": [1], "head": True}]
        },
        "inner": {"batch_rows": 2, "warmup_steps": 2},
        "stages": [
            {"kind": "pretrain", "steps": 4, "inner_steps": 2},
            {"kind": "shard"},
            {"kind": "train", "phases": 3, "inner_steps": 2},
            {"kind": "evaluate"},
        ],
        "baselines": [{"name": "dense"}],
    }
    experiment.update(changes)
    return Config.model_validate({"name": "test", "experiment": experiment, "execution": {"lease_s": 10.0}})


def ref(*parts: object) -> BlobRef:
    return BlobRef(digest=hashlib.sha256(repr(parts).encode()).hexdigest(), size=1)


def pair(*parts: object) -> list[Any]:
    return [ref(*parts).digest, 1]


def local_result(task: Task, plan: Plan) -> dict[str, Any]:
    """What the coordinator's own tasks would answer."""
    if task.kind == "BUILD":
        splits = ["train", "train", "test"]
        ranges = [{"index": i, "split": split, "text": pair("text", i)} for i, split in enumerate(splits)]
        return {"vocab_size": 64, "tokenizer": pair("tokenizer"), "ranges": ranges}
    if task.kind == "INITIALISE":
        return {"modules": {module_id: pair("init", module_id) for module_id in plan.dense.module_ids}}
    if task.kind == "FIT":
        return {"router": pair("router")}
    if task.kind == "DIVIDE":
        return {"shards": [{"manifest": pair("manifest", shard)} for shard in range(plan.mixture.num_shards)]}
    return {"perplexity": {}}


def checkpoint(task: Task, steps: int) -> Checkpoint:
    """Progress of a task after some steps."""
    return Checkpoint(
        blob=ref("progress", task.task_id, steps),
        steps=steps,
        tokens=50 * steps,
        sequences=5 * steps,
        loss_sum=0.5,
        step_losses=[1.0] * steps,
        seconds=1.0,
    )


class Driver:
    """Plays shell, journal, executor and workers around a machine."""

    def __init__(self, config: Config, seed: int = 0) -> None:
        self.plan = Plan(config)
        self.now = 0.0
        self.machine = Machine(self.plan, State(), random.Random(seed))
        self.stored: dict[tuple[str, str], Any] = {}
        self.metrics: list[dict[str, Any]] = []
        self.steps: list[tuple[str, str, int, tuple[str, ...]]] = []
        self.commit(self.machine.open(0.0))
        self.settle()

    def commit(self, decision: Decision) -> None:
        self.stored.update({(row.table, row.key): row for row in decision.rows})
        self.metrics += decision.metrics
        self.machine.apply(decision)

    def restart(self) -> None:
        """A new process on the same journal."""
        self.machine = Machine(self.plan, State(self.stored.values()), random.Random(1))
        self.machine.state.forget_tasks(self.machine.consumed())
        self.commit(self.machine.resume(self.now))
        self.settle()

    def settle(self) -> None:
        """Run the coordinator's own work until nothing is left to do."""
        while True:
            local, due = self.machine.local_tasks(), self.machine.due_steps()
            for task in local[:1]:
                self.commit(self.machine.local_done(task, local_result(task, self.plan), self.now))
            for step in due[:1]:
                parts = tuple(blob.digest for _, _, blob in step.contributions)
                self.steps.append((step.model, step.module.module_id, step.module.version, parts))
                params = ref(step.model, step.module.module_id, step.module.version, parts)
                self.commit(self.machine.module_stepped(step, params, ref("momentum", params.digest), self.now))
            if not local and not due:
                return

    def hello(self, name: str, capabilities: Capabilities = OFFER) -> str:
        return self.machine.leases.register("", name, capabilities, self.now)

    def lease(self, worker_id: str) -> Task | None:
        lease = self.machine.leases.lease(worker_id, frozenset(), self.now)
        self.commit(lease.decision)
        return lease.task and replace(lease.task, fence=lease.fence)

    def result(self, task: Task) -> TaskResult:
        """A pure function of the task, as a real one would be: not of where its last holder began."""
        spec = self.machine.leases.matching.spec(task).model_dump_json(exclude={"resume"})
        outputs = {name: ref(task.task_id, spec, name) for name in self.machine.expected_outputs(task)}
        steps = 2 if task.kind == "TRAIN" else 0
        return TaskResult(
            outputs=outputs, tokens=100, sequences=10, steps=steps, loss_sum=1.0, step_losses=[1.0] * steps
        )

    def save(self, worker_id: str, task: Task, steps: int = 1) -> bool:
        """Hand in partial progress; whether it was kept."""
        kept = checkpoint(task, steps)
        decision = self.machine.save_progress(worker_id, task.task_id, task.fence, kept, self.now)
        self.commit(decision)
        return bool(decision.rows)

    def complete(self, worker_id: str, task: Task) -> None:
        result = self.result(task)
        self.commit(self.machine.complete(worker_id, task.task_id, task.fence, result, self.now, self.now))
        self.settle()

    def finish(self, worker_id: str) -> None:
        while (task := self.lease(worker_id)) is not None:
            self.complete(worker_id, task)

    @property
    def finished(self) -> bool:
        return self.machine.state.standing.finished

    def versions(self) -> dict[str, tuple[int, str]]:
        return {key: (row.version, row.params.digest) for key, row in self.machine.state.modules.items()}


def undisturbed(config: Config) -> Driver:
    driver = Driver(config)
    driver.finish(driver.hello("one"))
    assert driver.finished
    return driver


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


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_faults_change_nothing_in_the_result(data: st.DataObject) -> None:
    """Workers die, repeat themselves and come back late, the coordinator restarts: the same versions, counted once."""
    config = make_config()
    reference = undisturbed(config)
    driver = Driver(config)
    held: dict[str, Task] = {}
    workers = [driver.hello(f"worker {index}") for index in range(3)]
    for _ in range(600):
        if driver.finished:
            break
        worker = data.draw(st.sampled_from(workers))
        actions = ["lease", "complete", "complete", "vanish", "late", "restart", "give back", "beat", "lag", "save"]
        action = data.draw(st.sampled_from(actions))
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


def until_training(driver: Driver, stage: str = "") -> str:
    """Work until the next task is a TRAIN task (of a stage); returns the worker."""
    worker = driver.hello("packer")
    while (task := driver.lease(worker)) is not None:
        if task.kind == "TRAIN" and stage in ("", task.stage):
            driver.commit(driver.machine.leases.release(worker, task.task_id, task.fence, "", False, driver.now))
            return worker
        driver.complete(worker, task)
    raise AssertionError("no TRAIN task came")


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


def test_a_device_that_is_missing_is_named() -> None:
    driver = Driver(make_config(numerics={"device": "cuda"}))
    worker = driver.hello("cpu only")
    while (task := driver.lease(worker)) is not None:
        driver.complete(worker, task)
    assert "needs device cuda" in driver.machine.leases.lease(worker, frozenset(), 0.0).waiting_for


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
