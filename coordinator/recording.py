"""The coordinator's handlers with a line in the event log for every lease that begins, advances or ends."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from coordinator.events import EventLog
from coordinator.handlers import (
    Handlers,
    HeartbeatAnswer,
    HeartbeatArgs,
    HelloAnswer,
    HelloArgs,
    LeaseAnswer,
    ReleaseArgs,
    UploadSink,
)
from protocol.tasks import Checkpoint, TaskResult, TrainSpec
from protocol.tensors import UploadHeader

PERIOD_S = 0.2
# Names of workers are remembered for their lines; of so many at the most, since anyone may say hello.
MAX_NAMES = 4096


class Recording:
    """Passes every call on and changes no answer."""

    def __init__(self, handlers: Handlers, log: EventLog) -> None:
        self._handlers, self._log = handlers, log
        self._names: dict[str, str] = {}

    async def watch(self) -> None:
        """Note for ever how many tasks could be handed out."""
        self._log.write("opened")
        while True:
            status = await self._handlers.status()
            self._log.write("leasable", tasks=status["tasks"]["leasable"])
            await asyncio.sleep(PERIOD_S)

    async def hello(self, args: HelloArgs) -> HelloAnswer:
        answer = await self._handlers.hello(args)
        self._names[answer.worker_id] = args.worker_name
        if len(self._names) > MAX_NAMES:
            del self._names[next(iter(self._names))]
        self._log.write("joined", worker=args.worker_name, worker_id=answer.worker_id)
        return answer

    async def lease(self, worker_id: str, wait_s: float, cached_digests: frozenset[str]) -> LeaseAnswer:
        answer = await self._handlers.lease(worker_id, wait_s, cached_digests)
        if answer.spec is not None:
            resume = answer.spec.resume if isinstance(answer.spec, TrainSpec) else None
            self._log.write(
                "leased",
                task_id=answer.task_id,
                fence=answer.fence,
                worker=self._names.get(worker_id, worker_id),
                kind=answer.task_id.split("/")[1],
                resumed=resume.steps if resume else 0,
            )
        return answer

    async def heartbeat(self, args: HeartbeatArgs) -> HeartbeatAnswer:
        answer = await self._handlers.heartbeat(args)
        if not answer.lost:
            self._log.write("progress", task_id=args.task_id, fence=args.fence, steps=args.steps)
        return answer

    async def complete(self, worker_id: str, task_id: str, fence: int, result: TaskResult) -> bool:
        duplicate = await self._handlers.complete(worker_id, task_id, fence, result)
        if not duplicate:
            own_s = result.seconds - result.resumed_seconds
            self._log.write("completed", task_id=task_id, fence=fence, steps=result.steps, seconds=own_s)
        return duplicate

    async def save_progress(self, worker_id: str, task_id: str, fence: int, checkpoint: Checkpoint) -> bool:
        kept = await self._handlers.save_progress(worker_id, task_id, fence, checkpoint)
        if kept:
            self._log.write("checkpoint", task_id=task_id, fence=fence, steps=checkpoint.steps)
        return kept

    async def release(self, args: ReleaseArgs) -> None:
        await self._handlers.release(args)
        self._log.write("released", task_id=args.task_id, fence=args.fence, worker=self._names.get(args.worker_id, ""))
        if args.leaving:
            self._names.pop(args.worker_id, None)

    async def status(self) -> dict[str, Any]:
        return await self._handlers.status()

    async def blob_path(self, digest: str) -> Path:
        return await self._handlers.blob_path(digest)

    async def upload_offset(self, task_id: str, fence: int, digest: str) -> int:
        return await self._handlers.upload_offset(task_id, fence, digest)

    async def begin_upload(self, header: UploadHeader) -> UploadSink:
        return await self._handlers.begin_upload(header)
