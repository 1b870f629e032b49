"""What workers hand in: uploads, partial progress and completed tasks, from the spool into the store into the journal.

One call at a time for each lease: a repeated one waits for the first, whose client gave it up, and finds what it did.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from weakref import WeakValueDictionary

from coordinator.decisions import Decision
from coordinator.handlers import UploadSink
from coordinator.ledger import Ledger
from coordinator.machine import CHECKPOINT
from coordinator.record_checks import RecordChecks
from coordinator.spool import Spool
from coordinator.stage_tasks import local_result
from coordinator.state import Standing, Task
from coordinator.traffic import Traffic
from coordinator.uploads import Upload
from protocol.tasks import BlobRef, Checkpoint, TaskResult
from protocol.tensors import UploadHeader


class Results:
    """The handlers of one run that take results in."""

    def __init__(self, ledger: Ledger, spool: Spool, traffic: Traffic, commit: Callable[[Decision], None]) -> None:
        """`commit` stores a decision and begins what follows from it."""
        self._ledger, self._machine = ledger, ledger.machine
        self._spool, self._traffic, self._commit = spool, traffic, commit
        self._checks, self._one_check = RecordChecks(ledger.machine.plan, ledger.store), asyncio.Lock()
        self._calls: WeakValueDictionary[tuple[str, int], asyncio.Lock] = WeakValueDictionary()

    def upload_offset(self, task_id: str, fence: int, digest: str) -> int:
        self._machine.leases.held_task(task_id, fence)
        return self._spool.offset(task_id, fence, digest)

    async def begin_upload(self, header: UploadHeader) -> UploadSink:
        task = self._machine.leases.held_task(header.task_id, header.fence, header.worker_id)
        room = self._ledger.room
        room.require()
        expected = self._machine.accepted_uploads(task)
        return await asyncio.to_thread(Upload, self._spool, header, expected, self._traffic, room.refused)

    async def complete(self, worker_id: str, task_id: str, fence: int, result: TaskResult) -> tuple[bool, Task | None]:
        """Whether the result counted or waited already; and the task as it is done, if it is by this call."""
        async with self._alone(task_id, fence):
            if self._ledger.counts(task_id, fence):
                return True, None
            task = self._machine.leases.held_task(task_id, fence, worker_id)
            verified = await asyncio.to_thread(self._spool.verified, task_id, fence)
            self._ledger.garbage.landing_of_task(task_id, [blob.digest for blob in verified.values()])
            result = await self._checked(task, fence, result, verified)
            await asyncio.to_thread(self._spool.commit, task_id, fence, result.outputs)
            norms = await asyncio.to_thread(self._spool.norms, task_id, fence)
            if self._ledger.counts(task_id, fence):  # under another lease meanwhile
                self._ledger.garbage.let_go()
                return True, None
            norms = {output: norm for output, norm in norms.items() if output in result.outputs}
            done = self._count_outputs(worker_id, task_id, fence, result, norms)
            await asyncio.to_thread(self._spool.discard, task_id, fence if done is None else None)
            return done is None, done

    async def _checked(self, task: Task, fence: int, result: TaskResult, verified: Mapping[str, BlobRef]) -> TaskResult:
        """The result, with sums that its records and token files bear out; tensors were checked as they arrived.

        One output at a time is in memory. Raises RejectedTensor, UnknownBlob. What was not uploaded, or is not among
        the outputs of the task, is for others to refuse.
        """
        if task.kind == "TRAIN" or result.outputs.keys() != self._machine.expected_outputs(task).keys():
            return result
        if any(verified.get(name) != blob for name, blob in result.outputs.items()):
            return result
        files = {
            name: self._spool.path(task.task_id, fence, name, blob.digest) for name, blob in result.outputs.items()
        }
        state, spec = self._machine.state, self._machine.leases.matching.spec(task)
        corpus = state.stages["corpus"].result or local_result(state, "corpus")
        async with self._one_check:
            return await asyncio.to_thread(
                self._checks.checked, task.task_id, spec, result, files, corpus["vocab_size"]
            )

    def _count_outputs(
        self, worker_id: str, task_id: str, fence: int, result: TaskResult, norms: dict[str, float]
    ) -> Task | None:
        """The transaction of a task whose outputs are durable in the store; the task as it is done, if it is now."""
        decision = self._machine.complete(worker_id, task_id, fence, result, time.monotonic(), time.time(), norms)
        if not any(isinstance(row, Standing) for row in decision.rows):
            decision = replace(decision, rows=(*decision.rows, self._machine.state.standing))
        self._commit(decision)
        done = [row for row in decision.rows if isinstance(row, Task) and row.key == task_id and row.status == "done"]
        return done[0] if done else None

    async def save_progress(self, worker_id: str, task_id: str, fence: int, checkpoint: Checkpoint) -> bool:
        digest, garbage = checkpoint.blob.digest, self._ledger.garbage
        async with self._alone(task_id, fence):
            task = self._machine.leases.held_task(task_id, fence, worker_id)
            try:
                with garbage.landing([digest]):
                    await asyncio.to_thread(self._spool.commit, task_id, fence, {CHECKPOINT: checkpoint.blob})
                    decision = self._machine.save_progress(worker_id, task_id, fence, checkpoint, time.monotonic())
                    self._commit(decision)
            finally:
                garbage.let_go([digest])
        return bool(decision.rows) or task.independent  # a worker is not to learn from this that it is audited

    def _alone(self, task_id: str, fence: int) -> asyncio.Lock:
        """Held by one call of a lease after the other."""
        return self._calls.setdefault((task_id, fence), asyncio.Lock())
