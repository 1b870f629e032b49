"""The coordinator process: applies the state machine's decisions to the journal, the store and the executor.

Holds no decision of its own. Everything runs on one event loop; files and arithmetic are handed to threads. The
order is always: outputs durable in the store, one transaction, then in memory (ledger.py), then the waiting workers
are woken, and only then is anything said.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from configs.schema import Config
from coordinator.decisions import Decision, Lease
from coordinator.evidence import measure_evidence
from coordinator.handlers import (
    HeartbeatAnswer,
    HeartbeatArgs,
    HelloAnswer,
    HelloArgs,
    LeaseAnswer,
    ReleaseArgs,
    UploadSink,
)
from coordinator.jobs import Jobs
from coordinator.journal import Journal
from coordinator.ledger import Ledger
from coordinator.machine import Machine
from coordinator.own_work import OwnWork
from coordinator.plan import Plan
from coordinator.recovery import Findings, recover_store
from coordinator.references import referenced_blobs
from coordinator.results import Results
from coordinator.room import Room
from coordinator.spool import Spool
from coordinator.state import State, Task
from coordinator.status import status_of
from coordinator.traffic import Traffic
from model.store import BlobStore
from protocol.errors import UnknownBlob, WaitingForRoom
from protocol.tasks import Checkpoint, TaskResult
from protocol.tensors import UploadHeader

MAX_WAIT_S = 30.0
TICK_S = 0.5
FAREWELL_S = 10.0
RECENTLY_S = 60.0


class Coordinator:
    """One run, open for workers."""

    def __init__(self, config: Config, run_dir: Path, say: Callable[[str], None]) -> None:
        """Open (or create) the run directory; raises RunUnusable."""
        self.config = config
        self.run_dir = run_dir
        self.say = say
        self._journal = Journal(run_dir)
        self._store = BlobStore(run_dir / "blobs")
        self._spool = Spool(run_dir / "spool", self._store)
        self._plan = Plan(config)
        self._machine = Machine(self._plan, State(self._journal.rows()), random.SystemRandom())
        self._traffic = Traffic(self._machine.state)
        self._room = Room(run_dir, config.execution.low_disk_bytes)
        self._ledger = Ledger(run_dir, self._machine, self._journal, self._store, self._room, self._fail)
        self._results = Results(self._ledger, self._spool, self._traffic, self._commit)
        jobs = Jobs(self._plan, self._store, say)
        self._own_work = OwnWork(self._ledger, jobs, run_dir / "scratch", self._commit, self._fail)
        self._changed = asyncio.Event()
        self._overdue: set[str] = set()
        self._told_of_waiting = False
        self._awaited_until = 0.0
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # --- life -------------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        return self._machine.state.standing.finished

    @property
    def paused(self) -> str:
        return self._machine.state.standing.paused

    def open(self, *, verify: bool = False, torn_event: bool = False) -> None:
        """Begin the run, or go on where its journal ends, and say what was found; `verify` reads all blobs again.

        Raises RunUnusable where blobs are missing or damaged.
        """
        self._room.look()
        if not self._machine.state.stages:
            self._commit(self._machine.open(time.time()))
            return
        self._machine.state.forget_tasks(self._machine.consumed())
        self._spool.retain(task.task_id for task in self._machine.state.tasks.values() if task.status == "leased")
        findings = self._recover_store(verify)
        self._await_workers()
        self._commit(self._machine.resume(time.monotonic(), findings.lost))
        self.say(self._standing())
        self.say(findings.sentence(len(self._spool.recorded()), torn_event))

    def _recover_store(self, verify: bool) -> Findings:
        """Look at the blobs, and remove those that nothing needs.

        What the spool has recorded may lie in the store alone, where the process ended between moving the outputs of a
        task and the transaction that makes them count: its worker asks for that transaction again.
        """
        kept = self._machine.referenced() | self._spool.recorded()
        references = referenced_blobs(self._machine.state)
        return recover_store(self.run_dir, self._store, references, kept, self.say, verify=verify)

    def _standing(self) -> str:
        """How far the run is, in one line."""
        state = self._machine.state
        done = sum(stage.status == "done" for stage in state.stages.values())
        versions, steps = [module.version for module in state.modules.values()], self._ledger.tally.steps
        return (
            f"going on with {self.run_dir}: {done} of {len(state.stages)} stages done, {steps} inner steps "
            f"in the weights, {len(versions)} modules"
            + (f" of versions {min(versions)} to {max(versions)}" if versions else "")
            + f", {len(state.lifelines)} leases are live"
        )

    async def tick(self) -> None:
        """Watch over leases, and over the room on the disk, until the run is finished or paused."""
        looked_s = time.monotonic()
        while not (self.finished or self.paused):
            now = time.monotonic()
            if self._has_room(now - looked_s):
                self._expire(now)
                self._tell_of_overdue()
            looked_s = now
            await self._sleep(TICK_S)

    def _expire(self, now: float) -> None:
        decision = self._machine.leases.expire(now)
        with suppress(WaitingForRoom):  # they are over all the same, at the next look
            if decision.rows:
                self._commit(decision)
                for row in decision.rows:
                    if isinstance(row, Task):
                        self.say(f"task {row.task_id} is available again: its lease ran out")

    def _has_room(self, elapsed_s: float) -> bool:
        """Whether the run goes on. While it waits no lease runs out; when there is room it goes on where it was."""
        waiting = self._room.look()
        if bool(waiting) != self._told_of_waiting:
            self._told_of_waiting = bool(waiting)
            self.say(waiting or "there is room again; the run goes on")
            self._wake()
        if waiting:
            self._machine.leases.liveness.prolong(elapsed_s)
        else:
            self._own_work.dispatch()
        return not waiting

    def _tell_of_overdue(self) -> None:
        """Wake waiting workers where a task has become worth a second holder."""
        overdue = self._machine.leases.liveness.overdue(time.monotonic())
        if set(overdue) - self._overdue:
            self._wake()
        self._overdue = set(overdue)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def farewell(self) -> None:
        """Give workers the time to hear that the run is finished, and to leave: the answer may be lost on its way."""
        until = time.monotonic() + FAREWELL_S
        while time.monotonic() < max(self._awaited_until, until if self._machine.claims.allowed() else 0.0):
            await asyncio.sleep(0.05)

    def _await_workers(self) -> None:
        """After a start workers come back that nothing here knows of: even a run that ends at once is there for them.

        One that was finished long ago has none.
        """
        ended_s = max(stage.finished_s for stage in self._machine.state.stages.values())
        if not self.finished or abs(time.time() - ended_s) < RECENTLY_S:
            self._awaited_until = time.monotonic() + FAREWELL_S

    async def close(self) -> None:
        """Stop background work at its next durable point, and begin none."""
        await self._own_work.close()
        self._journal.close()

    # --- decisions --------------------------------------------------------------------------------------------------

    def _commit(self, decision: Decision) -> None:
        """Store a decision and make it current, begin what follows from it, wake who waits, and speak last."""
        for folder, dispute in self._ledger.commit(decision):
            self._own_work.start(folder, asyncio.to_thread(measure_evidence, folder, dispute))
        self._wake()
        self._own_work.dispatch()
        for note in decision.notes:
            self.say(note)

    def _fail(self, error: Exception) -> None:
        if not self.failure.done():
            self.failure.set_exception(error)

    async def _sleep(self, seconds: float) -> None:
        """Wait for a change, at most `seconds`."""
        try:
            await asyncio.wait_for(self._changed.wait(), seconds)
        except TimeoutError:
            return

    # --- what the service calls -------------------------------------------------------------------------------------

    async def hello(self, args: HelloArgs) -> HelloAnswer:
        worker_id = self._machine.leases.register(
            args.worker_id, args.worker_name, args.capabilities, time.monotonic(), args.identity
        )
        self.say(f"worker {args.worker_name} {'is back' if args.worker_id else 'joined'} as {worker_id}")
        return HelloAnswer(
            worker_id, self.config.name, self.config.model_dump_json(), self.config.execution.heartbeat_s
        )

    async def lease(self, worker_id: str, wait_s: float, cached_digests: frozenset[str]) -> LeaseAnswer:
        until = time.monotonic() + min(wait_s, MAX_WAIT_S)
        while True:
            lease = self._lease_now(worker_id, cached_digests)
            if lease.task is not None:
                return LeaseAnswer(
                    lease.task.task_id,
                    lease.fence,
                    self.config.execution.lease_s,
                    lease.spec,  # type: ignore[arg-type]
                    mtbf_s=self._machine.leases.liveness.losses.mtbf_s(),
                )
            remaining = until - time.monotonic()
            if lease.finished or self.paused or remaining <= 0:
                return LeaseAnswer(waiting_for=lease.waiting_for, finished=lease.finished)
            await self._sleep(remaining)

    def _lease_now(self, worker_id: str, cached_digests: frozenset[str]) -> Lease:
        """The decision on a lease, stored; none is handed out while there is no room for its outputs."""
        now = time.monotonic()
        try:
            if not self.finished:
                self._machine.leases.known(worker_id, now)
                self._room.require()
            lease = self._machine.leases.lease(worker_id, cached_digests, now)
            self._ledger.commit(lease.decision)
        except WaitingForRoom as error:
            return Lease(waiting_for=str(error))
        for note in lease.decision.notes:
            self.say(note)
        if lease.task is not None and lease.task.audited:
            self._wake()  # an idle worker may compute it too
        return lease

    async def heartbeat(self, args: HeartbeatArgs) -> HeartbeatAnswer:
        lost, lease_s = self._machine.leases.heartbeat(
            args.worker_id, args.task_id, args.fence, args.steps, args.loss, args.tokens, time.monotonic()
        )
        return HeartbeatAnswer(lost, lease_s)

    async def complete(self, worker_id: str, task_id: str, fence: int, result: TaskResult) -> bool:
        counted_already, done = await self._results.complete(worker_id, task_id, fence, result)
        if done is not None and done.kind == "TRAIN":
            self._own_work.accumulate(done)
        return counted_already

    async def save_progress(self, worker_id: str, task_id: str, fence: int, checkpoint: Checkpoint) -> bool:
        return await self._results.save_progress(worker_id, task_id, fence, checkpoint)

    async def release(self, args: ReleaseArgs) -> None:
        decision = self._machine.leases.release(
            args.worker_id, args.task_id, args.fence, args.reason, args.leaving, time.monotonic()
        )
        if args.reason:
            self.say(f"task {args.task_id} failed: {args.reason}")
        self._commit(decision)

    async def status(self) -> dict[str, Any]:
        status = status_of(self._plan, self._machine.state, self._ledger.tally, time.monotonic())
        return {**status, "waiting": self._room.waiting}

    async def blob_path(self, digest: str) -> Path:
        if not self._store.has(digest):
            raise UnknownBlob(f"blob {digest} is not held here")
        path = self._store.path(digest)
        self._traffic.fetched(digest, path.stat().st_size)
        return path

    async def upload_offset(self, task_id: str, fence: int, digest: str) -> int:
        return self._results.upload_offset(task_id, fence, digest)

    async def begin_upload(self, header: UploadHeader) -> UploadSink:
        return await self._results.begin_upload(header)
