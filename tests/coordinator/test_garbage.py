"""What is deleted, under decisions in any order: never a blob that a row names or that is landing, and all others."""

from __future__ import annotations

import contextlib

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.decisions import Decision
from coordinator.garbage import Garbage
from coordinator.references import blobs_in, referenced_blobs
from coordinator.state import Task
from model.store import BlobStore
from protocol.errors import StaleLease, UnknownTask
from protocol.tasks import Checkpoint, TaskResult
from tests.driver import Driver, make_config, ref


class Blobs(BlobStore):
    """A store of names: which blobs there are, and nothing in them."""

    def __init__(self) -> None:
        self.held: set[str] = set()

    def delete(self, digest: str) -> None:
        self.held.discard(digest)


class Keeping(Driver):
    """The driver of the state machine's tests with a store beside it, kept as the coordinator keeps one."""

    def __init__(self, keep_versions: int, seed: int) -> None:
        self.blobs = Blobs()
        self._garbage: Garbage | None = None
        config = make_config()
        execution = config.execution.model_copy(update={"keep_versions": keep_versions})
        super().__init__(config.model_copy(update={"execution": execution}), seed)

    @property
    def garbage(self) -> Garbage:
        if self._garbage is None or self._garbage._machine is not self.machine:
            self._garbage = Garbage(self.blobs, self.machine)
        return self._garbage

    def commit(self, decision: Decision) -> None:
        if not decision.metrics:  # outputs of workers have landed; what else is named for the first time was made here
            named = {blob.digest for blob in blobs_in(decision.rows)}
            self.blobs.held |= named - referenced_blobs(self.machine.state).keys()
        super().commit(decision)
        self.garbage.let_go(decision.obsolete)
        self.check()

    def check(self) -> None:
        named = set(referenced_blobs(self.machine.state))
        assert named <= self.blobs.held, "a blob that a row names was deleted"

    def land(self, task: Task, result: TaskResult) -> None:
        """What a completion does before its transaction."""
        digests = [blob.digest for blob in result.outputs.values()]
        self.garbage.landing_of_task(task.task_id, digests)
        self.blobs.held |= set(digests)

    def complete(self, worker_id: str, task: Task) -> None:
        result = self.result(task)
        self.land(task, result)
        self.commit(self.machine.complete(worker_id, task.task_id, task.fence, result, self.now, self.now))
        self.settle()


KINDS = ["lease", "complete", "land", "save", "again", "expire", "restart", "release"]
ACTIONS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 3)),
    min_size=20,
    max_size=80,
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions=ACTIONS, keep_versions=st.integers(1, 3), seed=st.integers(0, 99))
def test_no_order_of_decisions_deletes_what_is_named_or_leaves_what_is_not(
    actions: list[tuple[str, int]], keep_versions: int, seed: int
) -> None:
    driver = Keeping(keep_versions, seed)
    workers = [driver.hello(f"worker {index}") for index in range(4)]
    held: list[tuple[str, Task]] = []
    landed: list[tuple[str, Task, set[str]]] = []
    for action, which in actions:
        worker = workers[which]
        mine = [(owner, task) for owner, task in held if owner == worker]
        with contextlib.suppress(StaleLease, UnknownTask):
            match action:
                case "lease":
                    task = driver.lease(worker)
                    if task is not None and (worker, task) not in held:
                        held.append((worker, task))
                case "complete" if mine:
                    held.remove(mine[0])
                    driver.complete(*mine[0])
                case "land" if mine:  # the call is cut off before its transaction
                    owner, task = mine[0]
                    result = driver.result(task)
                    driver.land(task, result)
                    landed.append((owner, task, {blob.digest for blob in result.outputs.values()}))
                case "again" if landed:  # and asked for again: what landed must be there
                    owner, task, digests = landed.pop()
                    if driver.machine.leases.held_task(task.task_id, task.fence, owner):
                        assert digests <= driver.blobs.held
                    driver.complete(owner, task)
                case "save" if mine and mine[0][1].kind == "TRAIN":
                    owner, task = mine[0]
                    blob = ref("checkpoint", task.task_id, task.fence, which)
                    with driver.garbage.landing([blob.digest]):
                        driver.blobs.held.add(blob.digest)
                        made = Checkpoint(
                            blob=blob, steps=1, tokens=1, sequences=1, loss_sum=1.0, step_losses=[1.0], seconds=1.0
                        )
                        driver.commit(driver.machine.save_progress(owner, task.task_id, task.fence, made, driver.now))
                    driver.garbage.let_go([blob.digest])
                case "release" if mine:
                    held.remove(mine[0])
                    owner, task = mine[0]
                    release = driver.machine.leases.release
                    driver.commit(release(owner, task.task_id, task.fence, "", False, driver.now))
                case "expire":
                    driver.now += 11.0 * (which == 3)
                    driver.commit(driver.machine.leases.expire(driver.now))
                    workers = [driver.hello(f"worker {index}") for index in range(4)]
                    held.clear()
                case "restart":
                    driver.restart()
                    driver.blobs.held &= driver.machine.referenced()  # what recovery does
                    workers = [driver.hello(f"worker {index}") for index in range(4)]
                    held.clear()
                    landed.clear()
        driver.check()
    driver.now += 100.0
    driver.commit(driver.machine.leases.expire(driver.now))
    driver.finish(driver.hello("last"))
    driver.garbage.let_go()
    assert driver.finished
    assert driver.blobs.held <= driver.machine.referenced(), "garbage is left"
    for module in driver.machine.state.modules.values():
        assert len(module.history) == min(keep_versions - 1, module.version)
