from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from coordinator.events import EventLog, read_events
from coordinator.handlers import HeartbeatArgs, HelloArgs, ReleaseArgs
from coordinator.recording import MAX_NAMES, Recording
from protocol.tasks import TaskResult
from tests.loopback import CAPABILITIES, FENCE, TASK, BookHandlers


def facts(run_dir: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in event.items() if name != "wall_s"} for event in read_events(run_dir)]


async def _work(recording: Recording) -> None:
    worker_id = (await recording.hello(HelloArgs("host", "", "0.1.0", CAPABILITIES))).worker_id
    assert (await recording.lease(worker_id, 0.0, frozenset({"none"}))).task_id == ""
    for _ in range(2):
        assert (await recording.lease(worker_id, 0.0, frozenset())).task_id == TASK
    for fence in (FENCE, FENCE + 1):
        await recording.heartbeat(HeartbeatArgs(worker_id, TASK, fence, steps=3))
    for duplicate in (False, True):
        assert (
            await recording.complete(worker_id, TASK, FENCE, TaskResult(outputs={}, steps=9, seconds=1.5)) == duplicate
        )
    await recording.release(ReleaseArgs(worker_id, TASK, FENCE))


def test_what_happens_to_a_lease_is_noted_once(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    asyncio.run(_work(Recording(BookHandlers(tmp_path), log)))
    log.close()
    lease = {"task_id": TASK, "fence": FENCE}
    assert facts(tmp_path) == [
        {"event": "joined", "worker": "host", "worker_id": "worker-0"},
        {"event": "leased", **lease, "worker": "host", "kind": TASK.split("/")[1], "resumed": 0},
        {"event": "progress", **lease, "steps": 3},
        {"event": "completed", **lease, "steps": 9, "seconds": 1.5},
        {"event": "released", **lease, "worker": "host"},
    ]


def test_tasks_that_wait_for_a_worker_are_noted_as_they_change(tmp_path: Path) -> None:
    handlers, looks = BookHandlers(tmp_path), iter([1, 1, 4])
    watched = asyncio.Event()

    def status() -> dict[str, Any]:
        leasable = next(looks, None)
        if leasable is None:
            watched.set()
        return {"tasks": {"leasable": leasable or 4}}

    async def watch(recording: Recording) -> None:
        noting = asyncio.create_task(recording.watch())
        await asyncio.wait_for(watched.wait(), 20)
        noting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await noting

    handlers.on_status = status
    log = EventLog(tmp_path)
    asyncio.run(watch(Recording(handlers, log)))
    log.close()
    assert facts(tmp_path) == [
        {"event": "opened"},
        {"event": "leasable", "tasks": 1},
        {"event": "leasable", "tasks": 4},
    ]


def test_the_names_of_workers_take_bounded_room(tmp_path: Path) -> None:
    """Anyone may say hello, as often as they like: the names of those who left, and of too many, are forgotten."""
    log = EventLog(tmp_path)
    recording = Recording(BookHandlers(tmp_path), log)

    async def visit(times: int, *, leaving: bool) -> None:
        for _ in range(times):
            worker_id = (await recording.hello(HelloArgs("host", "", "0.1.0", CAPABILITIES))).worker_id
            if leaving:
                await recording.release(ReleaseArgs(worker_id, "", 0, leaving=True))

    asyncio.run(visit(10, leaving=True))
    assert len(recording._names) == 0
    asyncio.run(visit(MAX_NAMES + 10, leaving=False))
    assert len(recording._names) == MAX_NAMES
    log.close()
