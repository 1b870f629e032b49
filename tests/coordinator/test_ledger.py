"""Whatever fails on the way of a decision: memory and journal agree afterwards, and the same call succeeds later."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import sqlite3
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.coordinator import Coordinator
from coordinator.decisions import Decision, Dispute
from coordinator.garbage import Garbage
from coordinator.handlers import LeaseAnswer, ReleaseArgs
from coordinator.journal import Journal
from coordinator.ledger import Ledger
from coordinator.machine import Machine
from coordinator.own_work import OwnWork
from coordinator.state import Claim, State
from protocol.errors import WaitingForRoom
from tests.played_run import Played, config_of, played
from worker.outcome import TaskOutcome

Script = Callable[[Played, LeaseAnswer, TaskOutcome], Awaitable[None]]
NOTE = "a note on a dispute"


class Broken(Exception):
    """What nobody expects."""


def full() -> Exception:
    return OSError(errno.ENOSPC, "No space left on device")


def failing() -> Exception:
    return OSError(errno.EIO, "Input/output error")


def sqlite_full() -> Exception:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    return error


@pytest.fixture(autouse=True)
def _soon_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.room.RETRY_S", 0.02)
    monkeypatch.setattr("coordinator.coordinator.TICK_S", 0.01)


def play(folder: Path, script: Script) -> None:
    """The first task of a run, uploaded; its completion brings everything with it that a decision can."""

    async def opened() -> None:
        async with played(config_of(folder), folder / "run") as run:
            lease = await run.lease()
            outcome = run.compute(lease)
            await run.upload(lease, outcome)
            await script(run, lease, outcome)

    asyncio.run(opened())


@pytest.fixture
def eventful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions with a dispute, a note, and something to let go of."""
    real = Machine.complete

    def disputed(machine: Machine, worker_id: str, task_id: str, fence: int, *rest: Any) -> Decision:
        claim = Claim("liar", "liar", "class", fence, {}, {}, {}, 0.0)
        dispute = Dispute(task_id, (claim,), counted=fence, banned=(fence,), note=NOTE)
        decision = real(machine, worker_id, task_id, fence, *rest)
        return replace(decision, notes=(NOTE,), disputes=(dispute,), obsolete=("a" * 64,))

    monkeypatch.setattr(Machine, "complete", disputed)


def check_agreement(run: Played) -> None:
    """What memory holds is what a restart would read, and every holder of a task has a lifeline."""
    journal = Journal(run.run_dir, read_only=True)
    stored, state = State(journal.rows()), run.coordinator._machine.state
    counted = {str(metric["task_id"]) for metric in journal.metrics()}
    journal.close()
    for name in ("stages", "modules", "shards", "conduct"):
        assert getattr(state, name) == getattr(stored, name), name
    assert state.tasks.items() <= stored.tasks.items()
    assert all(stored.tasks[gone].status == "done" for gone in stored.tasks.keys() - state.tasks.keys())
    assert (state.standing.paused, state.standing.finished) == (stored.standing.paused, stored.standing.finished)
    assert state.standing.leases_lost == stored.standing.leases_lost
    done = {task.task_id for task in state.tasks.values() if task.status == "done" and not task.local}
    assert done <= counted
    held = {(task.task_id, holder.fence) for task in state.tasks.values() for holder in task.holders}
    assert state.lifelines.keys() == held


# Each line on the way of a decision, in order, by what it calls.
SEAM: list[tuple[Any, str]] = [
    ("coordinator.ledger", "keep_evidence"),
    (Journal, "commit"),
    (Ledger, "_learn"),
    (Garbage, "let_go"),
    (OwnWork, "start"),
    ("coordinator.coordinator", "measure_evidence"),
    (Coordinator, "_wake"),
    (OwnWork, "dispatch"),
    (Coordinator, "say"),
]
UNTIL_STORED = 2


def break_(monkeypatch: pytest.MonkeyPatch, run: Played, of: Any, name: str, error: Callable[[], Exception]) -> None:
    def broken(*_: object, **__: object) -> Any:
        raise error()

    if name == "say":
        monkeypatch.setattr(run.coordinator, "say", broken)
    elif isinstance(of, str):
        monkeypatch.setattr(f"{of}.{name}", broken)
    else:
        monkeypatch.setattr(of, name, broken)


@pytest.mark.filterwarnings("ignore:coroutine 'to_thread' was never awaited")  # where `start` is what broke
@pytest.mark.usefixtures("eventful")
@pytest.mark.parametrize("error", [full, Broken])
@pytest.mark.parametrize("place", range(len(SEAM)), ids=[name for _, name in SEAM])
def test_an_error_at_any_line_leaves_memory_and_journal_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int, error: Callable[[], Exception]
) -> None:
    async def script(run: Played, lease: LeaseAnswer, outcome: TaskOutcome) -> None:
        with monkeypatch.context() as patch:
            break_(patch, run, *SEAM[place], error)
            with contextlib.suppress(WaitingForRoom, OSError, Broken):
                await run.coordinator._results.complete(run.worker_id, lease.task_id, lease.fence, outcome.result)
            check_agreement(run)
            counted = place >= UNTIL_STORED
            assert run.coordinator._ledger.counts(lease.task_id, lease.fence) == counted
        if not run.coordinator.failure.done():
            await run.until(lambda: not run.coordinator._room.waiting)
            assert await run.complete(lease, outcome) == counted
            check_agreement(run)
            assert (run.run_dir / "evidence").is_dir()
        else:
            assert isinstance(run.coordinator.failure.exception(), Broken)

    with contextlib.suppress(Broken):
        play(tmp_path, script)


@pytest.mark.usefixtures("eventful")
@pytest.mark.parametrize("place", range(UNTIL_STORED), ids=[name for _, name in SEAM[:UNTIL_STORED]])
def test_on_a_full_disk_a_decision_waits_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    async def script(run: Played, lease: LeaseAnswer, outcome: TaskOutcome) -> None:
        with monkeypatch.context() as patch:
            break_(patch, run, *SEAM[place], sqlite_full if place else full)
            for _ in range(2):
                with pytest.raises(WaitingForRoom, match="a write found no room"):
                    await run.complete(lease, outcome)
                assert run.coordinator._room.waiting
                check_agreement(run)
                await asyncio.sleep(0.05)  # the watch looks at all leases meanwhile
        await run.until(lambda: not run.coordinator._room.waiting)
        assert not await run.complete(lease, outcome)
        assert NOTE in run.said

    play(tmp_path, script)


@pytest.mark.usefixtures("eventful")
@pytest.mark.parametrize("place", range(UNTIL_STORED), ids=[name for _, name in SEAM[:UNTIL_STORED]])
def test_a_disk_that_fails_ends_the_process_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    async def script(run: Played, lease: LeaseAnswer, outcome: TaskOutcome) -> None:
        break_(monkeypatch, run, *SEAM[place], failing)
        with pytest.raises(OSError, match="Input/output error"):
            await run.complete(lease, outcome)
        check_agreement(run)
        assert run.coordinator.failure.done()

    with pytest.raises(OSError, match=r"run cannot be written \(.*Input/output error\); mend that and start again"):
        play(tmp_path, script)


def test_a_lease_that_cannot_be_ended_for_want_of_room_is_lost_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(run: Played, lease: LeaseAnswer, outcome: TaskOutcome) -> None:
        def lost() -> int:
            return run.coordinator._machine.state.standing.leases_lost

        with monkeypatch.context() as patch:
            break_(patch, run, Journal, "commit", sqlite_full)
            for _ in range(3):
                run.coordinator._expire(time.monotonic() + 10_000)
                assert lost() == 0
                check_agreement(run)
        run.coordinator._expire(time.monotonic() + 10_000)
        assert lost() == 1
        run.coordinator._expire(time.monotonic() + 10_000)
        assert lost() == 1

    play(tmp_path, script)


def test_a_worker_that_leaves_while_there_is_no_room_holds_its_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(run: Played, lease: LeaseAnswer, outcome: TaskOutcome) -> None:
        with monkeypatch.context() as patch:
            break_(patch, run, Journal, "commit", sqlite_full)
            with pytest.raises(WaitingForRoom):
                await run.coordinator.release(ReleaseArgs(run.worker_id, "", 0, leaving=True))
        check_agreement(run)
        assert run.coordinator._machine.leases.held_task(lease.task_id, lease.fence, run.worker_id)

    play(tmp_path, script)
