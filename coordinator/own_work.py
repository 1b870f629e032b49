"""The coordinator's own work, in the background: local tasks, module steps, sums that grow while others still train.

Each piece ends in a decision, or counts for nothing; it is begun again for as long as the state machine asks for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from coordinator.decisions import Decision, StepDue
from coordinator.executor import Executor
from coordinator.jobs import Jobs
from coordinator.ledger import Ledger
from coordinator.references import blobs_in
from coordinator.robust import robust_average
from coordinator.state import Task
from protocol.errors import WaitingForRoom
from protocol.tasks import BlobRef

PARALLEL_STEPS = 2


class OwnWork:
    """What one run has its coordinator do itself. Called on the event loop; files and arithmetic go to threads."""

    def __init__(
        self,
        ledger: Ledger,
        jobs: Jobs,
        scratch: Path,
        commit: Callable[[Decision], None],
        fail: Callable[[Exception], None],
    ) -> None:
        """`commit` stores a decision and begins what follows from it; `fail` ends the process."""
        self._machine, self._store, self._room = ledger.machine, ledger.store, ledger.room
        self._plan, self._jobs, self._commit, self._fail = ledger.machine.plan, jobs, commit, fail
        self._executor = Executor(ledger.store, scratch)
        self._busy: set[object] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._step_slots = asyncio.Semaphore(PARALLEL_STEPS)
        self._closed = False

    def dispatch(self) -> None:
        """Start what is ready: local tasks and module steps."""
        if self._machine.state.standing.paused or self._room.waiting or self._closed:
            return
        for task in self._machine.local_tasks():
            self.start(task.task_id, self._run_local(task))
        for due in self._machine.due_steps():
            self.start((due.module.key, due.module.version), self._run_step(due))

    def start(self, key: object, work: Coroutine[Any, Any, None]) -> None:
        """Begin a piece of work, unless one of that key is under way."""
        if key in self._busy:
            work.close()
            return
        self._busy.add(key)
        task = asyncio.get_running_loop().create_task(self._guard(key, work))
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(lambda _: work.close())  # a task cancelled before it began leaves its work unawaited

    async def close(self) -> None:
        """Stop at the next durable points, and begin nothing."""
        self._closed = True
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)

    def accumulate(self, task: Task) -> None:
        """Let the executor add the contributions of a task to the sums of its modules while others still train."""
        model, shard = self._machine.state.stages[task.stage].model, int(task.subject)
        topology = self._plan.topology(model)
        for module_id in topology.modules_of_path(topology.path_of_shard(shard)):
            weights = self._plan.contribution_weights(self._machine.state, model, module_id)
            if len(weights) > 1 and robust_average(self._plan.outer(model), len(weights)) is None:
                path, key = self._store.path(task.outputs[module_id].digest), (model, module_id)
                order, weight = list(weights), weights[shard]
                add = asyncio.to_thread(self._executor.add, key, task.phase, order, shard, weight, path)
                self.start((model, module_id, task.phase, shard), add)

    async def _guard(self, key: object, work: Coroutine[Any, Any, None]) -> None:
        """Work that found no room is begun again when there is some; nothing of it counts."""
        try:
            await work
        except Exception as error:
            with suppress(WaitingForRoom):
                self._stop_for(error)
        finally:
            self._busy.discard(key)
            asyncio.get_running_loop().call_soon(self.dispatch)

    def _stop_for(self, error: Exception) -> None:
        """A person's mistake pauses the run; anything else ends the process, and a restart goes on from the journal."""
        if self._room.lacked_by(error):
            self._room.refused()
        elif isinstance(error, ValueError) and type(error) is not ValueError:
            self._commit(self._machine.pause(str(error)))
        else:  # a bare ValueError is a library's, not one of the refusals that our packages declare
            self._fail(error)

    async def _run_local(self, task: Task) -> None:
        state = self._machine.state.copy()
        result = await asyncio.to_thread(self._jobs.run, task, state)
        if not self._holds(blobs_in(result)):
            result = await asyncio.to_thread(self._jobs.run, task, state)
        self._commit(self._machine.local_done(task, result, time.time()))

    async def _run_step(self, due: StepDue) -> None:
        """Step one module on its contributions, durably, then publish the version."""
        async with self._step_slots:
            params, momentum = await asyncio.to_thread(self._step, due)
            if not self._holds([params, momentum]):
                params, momentum = await asyncio.to_thread(self._step, due)
        self._commit(self._machine.module_stepped(due, params, momentum, time.time()))

    def _holds(self, blobs: Iterable[BlobRef | None]) -> bool:
        """Whether what was stored is still there: equal bytes may have been let go while nothing referred to it."""
        return all(self._store.has(blob.digest) for blob in blobs if blob is not None)

    def _step(self, due: StepDue) -> tuple[BlobRef, BlobRef | None]:
        """The new version and outer momentum of a module, durable in the store; blocks on files."""
        outcome = self._executor.step(
            (due.model, due.module.module_id),
            due.module.version,
            self._plan.module_spec(self._machine.state, due.model, due.module.module_id),
            self._store.path(due.module.params.digest),
            None if due.module.momentum is None else self._store.path(due.module.momentum.digest),
            [(weight, self._store.path(ref.digest)) for _, weight, ref in due.contributions],
            self._plan.outer(due.model),
        )
        params = BlobRef(digest=outcome.params[0], size=outcome.params[1])
        momentum = outcome.momentum and BlobRef(digest=outcome.momentum[0], size=outcome.momentum[1])
        return params, momentum
