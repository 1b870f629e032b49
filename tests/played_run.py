"""A coordinator without a wire: a test calls it as the service would, and plays the worker step by step."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from configs.schema import Config
from coordinator.coordinator import Coordinator
from coordinator.handlers import HelloArgs, LeaseAnswer
from coordinator.serving import write_config
from coordinator.snapshot import RunSnapshot
from dipaco.run_digest import run_digest
from protocol.version import package_version
from scripts.crash_points import small_config
from worker.outcome import TaskOutcome
from worker.probe import capabilities
from worker.task import inputs, run_task, upload_header

LONG_S = 60.0


def config_of(folder: Path, *, reshard: bool = False, **execution: Any) -> Config:
    """The run of scripts/crash_points.py, with leases that outlast a slow machine: nobody sends heartbeats here."""
    config = small_config(folder, reshard=reshard)
    changed = config.execution.model_copy(update={"lease_s": 600.0, **execution})
    return config.model_copy(update={"execution": changed})


class Played:
    """An open coordinator and one worker of it."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        run_dir.mkdir(exist_ok=True)
        write_config(config, run_dir)
        self.config, self.run_dir = config, run_dir
        self.said: list[str] = []
        self.coordinator = Coordinator(config, run_dir, self.said.append)
        self.worker_id = ""

    async def hello(self, name: str = "worker") -> str:
        offers = capabilities(1, 1 << 30)
        answer = await self.coordinator.hello(HelloArgs(name, "", package_version(), offers))
        return answer.worker_id

    async def lease(self, wait_s: float = LONG_S, worker_id: str = "") -> LeaseAnswer:
        return await self.coordinator.lease(worker_id or self.worker_id, wait_s, frozenset())

    def compute(self, lease: LeaseAnswer) -> TaskOutcome:
        """Do the task on the coordinator's own blobs."""
        assert lease.spec is not None
        blobs = {blob.digest: self.run_dir / "blobs" / blob.digest for of in inputs(lease.spec).values() for blob in of}
        out_dir = Path(tempfile.mkdtemp(dir=self.run_dir))
        return run_task(lease.spec, self.config.experiment, blobs, out_dir, lambda steps, loss, tokens: None)

    async def upload(self, lease: LeaseAnswer, outcome: TaskOutcome) -> None:
        assert lease.spec is not None
        for name, path in outcome.files.items():
            blob = outcome.result.outputs[name]
            header = upload_header(lease.task_id, lease.fence, lease.spec, name, path, blob)
            sink = await self.coordinator.begin_upload(header.model_copy(update={"worker_id": self.worker_id}))
            await sink.write(path.read_bytes())
            await sink.finish()

    async def complete(self, lease: LeaseAnswer, outcome: TaskOutcome) -> bool:
        return await self.coordinator.complete(self.worker_id, lease.task_id, lease.fence, outcome.result)

    async def task(self, lease: LeaseAnswer | None = None) -> LeaseAnswer:
        """One task from its lease to its completion."""
        lease = lease or await self.lease()
        assert lease.spec is not None, lease
        outcome = await asyncio.to_thread(self.compute, lease)
        await self.upload(lease, outcome)
        await self.complete(lease, outcome)
        return lease

    async def finish(self) -> None:
        while not (lease := await self.lease()).finished:
            await self.task(lease)

    async def until_leased(self, kind: str) -> LeaseAnswer:
        """Do tasks until one of this kind is leased."""
        while True:
            lease = await self.lease()
            if lease.task_id.split("/")[1] == kind:
                return lease
            await self.task(lease)

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(LONG_S):
            while not condition():
                if self.coordinator.failure.done():
                    self.coordinator.failure.result()
                await asyncio.sleep(0.01)


@asynccontextmanager
async def played(config: Config, run_dir: Path, kind: type[Played] = Played) -> AsyncIterator[Played]:
    """Opened, watched over, and closed at the end; what broke in it is raised."""
    run = kind(config, run_dir)
    run.coordinator.open()
    watch = asyncio.create_task(run.coordinator.tick())
    run.worker_id = await run.hello()
    try:
        yield run
    finally:
        watch.cancel()
        await run.coordinator.close()
        if run.coordinator.failure.done():
            run.coordinator.failure.result()


def digest(run_dir: Path) -> str:
    return run_digest(RunSnapshot.open(run_dir), everything=True)
