"""The coordinator called as its service calls it: leases, uploads, completions, restarts, full disks, garbage."""

from __future__ import annotations

import asyncio
import errno
import random
import re
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from coordinator.executor import Executor
from coordinator.handlers import HeartbeatArgs, ReleaseArgs
from coordinator.jobs import Jobs
from coordinator.journal import Journal, RunUnusable
from coordinator.room import Room
from coordinator.snapshot import RunSnapshot
from protocol.errors import StaleLease, UnknownBlob, UnknownTask, UnknownWorker, WaitingForRoom
from tests.played_run import Played, config_of, digest, played

Play = Callable[[Played], Awaitable[None]]


def play(folder: Path, script: Play, **execution: Any) -> Path:
    """Open the run in `folder` (again), let the script call it, close it; returns its directory."""

    async def opened() -> None:
        async with played(config_of(folder, **execution), folder / "run") as run:
            await script(run)

    asyncio.run(opened())
    return folder / "run"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("undisturbed")
    return digest(play(folder, Played.finish))


class Disk:
    """Stands for the disk of the run: how much is free, whether writes fail, which share of them fails by chance."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = 10**12
        self.full = False
        self.full_share = 0.0
        self.chance = random.Random(0)
        self.refused: list[str] = []
        monkeypatch.setattr("coordinator.room.RETRY_S", 0.05)
        monkeypatch.setattr("coordinator.coordinator.TICK_S", 0.02)
        init = Room.__init__

        def watched(room: Room, directory: Path, low_bytes: int, **rest: Any) -> None:
            init(room, directory, low_bytes, free=lambda _: self.free, **rest)

        monkeypatch.setattr(Room, "__init__", watched)
        self.fails_in(monkeypatch, Journal, "commit", sqlite_full)
        self.fails_in(monkeypatch, Executor, "step", no_space)
        self.fails_in(monkeypatch, Executor, "add", no_space)
        self.fails_in(monkeypatch, Jobs, "run", no_space)

    def fails_in(self, monkeypatch: pytest.MonkeyPatch, of: type, name: str, error: Callable[[], Exception]) -> None:
        real = getattr(of, name)

        def maybe(*args: Any, **kwargs: Any) -> Any:
            if self.full or self.chance.random() < self.full_share:
                self.refused.append(f"{of.__name__}.{name}")
                raise error()
            return real(*args, **kwargs)

        monkeypatch.setattr(of, name, maybe)


def sqlite_full() -> Exception:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    return error


def no_space() -> Exception:
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


# --- the way of a task ------------------------------------------------------------------------------------------------


def test_a_run_played_call_by_call_comes_to_its_end(tmp_path: Path, undisturbed: str) -> None:
    run_dir = play(tmp_path, Played.finish)
    assert digest(run_dir) == undisturbed
    assert not list((run_dir / "spool").iterdir())


def test_a_lease_asked_for_again_is_the_same(tmp_path: Path) -> None:
    async def script(run: Played) -> None:
        first, again = await run.lease(), await run.lease()
        assert (first.task_id, first.fence) == (again.task_id, again.fence)
        with pytest.raises(UnknownWorker):
            await run.lease(worker_id="nobody")

    play(tmp_path, script)


def test_outputs_count_once_and_only_when_they_were_uploaded(tmp_path: Path) -> None:
    async def script(run: Played) -> None:
        lease = await run.lease()
        outcome = run.compute(lease)
        with pytest.raises(UnknownBlob, match="was not uploaded"):
            await run.complete(lease, outcome)
        await run.upload(lease, outcome)
        assert not await run.complete(lease, outcome)
        assert await run.complete(lease, outcome), "a repeated completion is told that it counts already"
        with pytest.raises(UnknownTask):
            await run.coordinator.complete(run.worker_id, "no/such/task", 1, outcome.result)

    run_dir = play(tmp_path, script)
    assert [metric["task_id"] for metric in RunSnapshot.open(run_dir).metrics] == ["corpus/PACK/0/0"]


def test_a_task_given_back_goes_to_another_and_its_first_holder_has_no_say(tmp_path: Path, undisturbed: str) -> None:
    async def script(run: Played) -> None:
        lease = await run.until_leased("TRAIN")
        outcome = run.compute(lease)
        await run.coordinator.release(ReleaseArgs(run.worker_id, lease.task_id, lease.fence))
        other = await run.hello("other")
        again = await run.lease(worker_id=other)
        assert (again.task_id, again.fence) == (lease.task_id, lease.fence + 1)
        with pytest.raises(StaleLease):
            await run.upload(lease, outcome)
        beat = await run.coordinator.heartbeat(HeartbeatArgs(run.worker_id, lease.task_id, lease.fence))
        assert beat.lost
        await run.coordinator.release(ReleaseArgs(other, "", 0, leaving=True))
        await run.finish()

    assert digest(play(tmp_path, script)) == undisturbed


def test_a_lease_without_heartbeats_runs_out(tmp_path: Path) -> None:
    async def script(run: Played) -> None:
        lease = await run.lease()
        await run.until(lambda: any("its lease ran out" in line for line in run.said))
        with pytest.raises(StaleLease):
            await run.upload(lease, run.compute(lease))

    play(tmp_path, script, heartbeat_s=0.05, lease_s=0.2)


def test_a_worker_is_waited_for_until_it_has_left_as_the_answer_may_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.coordinator.FAREWELL_S", 3600.0)

    async def script(run: Played) -> None:
        await run.finish()
        farewell = asyncio.create_task(run.coordinator.farewell())
        await asyncio.sleep(0.2)
        assert not farewell.done()
        assert (await run.lease()).finished, "it may ask again"
        await run.coordinator.release(ReleaseArgs(run.worker_id, "", 0, leaving=True))
        async with asyncio.timeout(60):
            await farewell

    play(tmp_path, script)


# --- restarts ---------------------------------------------------------------------------------------------------------


def test_a_restart_after_every_task_changes_nothing(tmp_path: Path, undisturbed: str) -> None:
    async def one_task(run: Played) -> None:
        lease = await run.lease()
        over.append(lease.finished)
        if not lease.finished:
            await run.task(lease)

    over: list[bool] = []
    while not over or not over[-1]:
        play(tmp_path, one_task)
    assert len(over) > 8
    assert digest(tmp_path / "run") == undisturbed


def test_a_lease_outlives_a_restart_with_what_was_uploaded_under_it(tmp_path: Path, undisturbed: str) -> None:
    held: dict[str, Any] = {}

    async def before(run: Played) -> None:
        held["lease"] = await run.until_leased("TRAIN")
        held["outcome"], held["worker_id"] = run.compute(held["lease"]), run.worker_id
        await run.upload(held["lease"], held["outcome"])

    async def after(run: Played) -> None:
        assert "1 leases are live" in run.said[0]
        assert f"{len(held['outcome'].files)} uploaded outputs are kept" in run.said[1]
        with pytest.raises(UnknownWorker):
            await run.coordinator.complete(held["worker_id"], held["lease"].task_id, 1, held["outcome"].result)
        await run.coordinator.hello(_as(held["worker_id"]))
        assert not await run.coordinator.complete(
            held["worker_id"], held["lease"].task_id, held["lease"].fence, held["outcome"].result
        )
        await run.finish()

    play(tmp_path, before)
    assert digest(play(tmp_path, after)) == undisturbed


def _as(worker_id: str) -> Any:
    from coordinator.handlers import HelloArgs
    from protocol.version import package_version
    from worker.probe import capabilities

    return HelloArgs("worker", worker_id, package_version(), capabilities(1, 1 << 30))


def test_stopping_while_a_module_steps_loses_nothing(
    tmp_path: Path, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepping, go_on = threading.Event(), threading.Event()
    step = Executor.step

    def slowly(executor: Executor, *args: Any) -> Any:
        stepping.set()
        assert go_on.wait(60)
        return step(executor, *args)

    async def until_stepping(run: Played) -> None:
        monkeypatch.setattr(Executor, "step", slowly)
        await run.task(await run.until_leased("TRAIN"))
        await run.until(stepping.is_set)
        asyncio.get_running_loop().call_later(0.1, go_on.set)

    play(tmp_path, until_stepping)
    monkeypatch.setattr(Executor, "step", step)
    assert digest(play(tmp_path, Played.finish)) == undisturbed


def test_a_restart_says_what_it_found_and_removed(tmp_path: Path) -> None:
    async def some(run: Played) -> None:
        for _ in range(3):
            await run.task()

    async def look(run: Played) -> None:
        assert run.said[0].startswith(f"going on with {tmp_path / 'run'}: 3 of 5 stages done, 2 inner steps in the wei")
        assert re.search(r"removed [12] that nothing needs \(0\.0 MB freed\)", run.said[1])  # and what was begun
        assert "each there in its size (--verify reads their bytes, too)" in run.said[1]

    run_dir = play(tmp_path, some)
    orphan = run_dir / "blobs" / ("a" * 64)
    orphan.write_bytes(b"orphan")
    play(tmp_path, look)
    assert not orphan.exists()


@pytest.mark.parametrize(
    ("damage", "verify", "told"),
    [
        (lambda path: path.unlink(), False, "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), False, "bytes, not"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), True, "holds other bytes than its digest names"),
    ],
    ids=["gone", "short", "flipped"],
)
def test_a_damaged_blob_is_named_and_nothing_is_removed(
    tmp_path: Path, damage: Callable[[Path], object], verify: bool, told: str
) -> None:
    async def some(run: Played) -> None:
        for _ in range(3):
            await run.task()

    run_dir = play(tmp_path, some)
    blob = next(iter(RunSnapshot.open(run_dir).base_modules().values()))[1]
    damage(blob)
    orphan = run_dir / "blobs" / ("a" * 64)
    orphan.write_bytes(b"orphan")

    async def reopen() -> None:
        run = Played(config_of(tmp_path), run_dir)
        try:
            run.coordinator.open(verify=verify)
        finally:
            await run.coordinator.close()

    with pytest.raises(RunUnusable, match=rf"{blob.name} \(.*\) .*{told}.*; put back the file of that name"):
        asyncio.run(reopen())
    assert orphan.exists()


# --- a full disk ------------------------------------------------------------------------------------------------------


def test_below_the_limit_nothing_is_handed_out_until_there_is_room(
    tmp_path: Path, disk: Disk, undisturbed: str
) -> None:
    async def script(run: Played) -> None:
        lease = await run.until_leased("TRAIN")
        outcome = run.compute(lease)
        beat = HeartbeatArgs(run.worker_id, lease.task_id, lease.fence)
        assert not (await run.coordinator.heartbeat(beat)).lost  # however long the computing took
        disk.free = 50_000_000
        await run.until(lambda: run.coordinator._room.waiting)
        with pytest.raises(WaitingForRoom, match=r"waiting for room: 50 MB free at .*, needs 100 MB"):
            await run.upload(lease, outcome)
        other = await run.hello("other")
        refused = await run.lease(wait_s=0.05, worker_id=other)
        assert refused.spec is None
        assert refused.waiting_for.startswith("waiting for room: 50 MB free")
        assert (await run.coordinator.status())["waiting"] == refused.waiting_for
        await asyncio.sleep(3.5)  # longer than a lease lasts: it must not run out
        assert not (await run.coordinator.heartbeat(beat)).lost
        disk.free = 90_000_000
        await asyncio.sleep(0.1)
        assert run.coordinator._room.waiting, "it does not go on at the very edge"
        disk.free = 110_000_000
        await run.until(lambda: not run.coordinator._room.waiting)
        await run.upload(lease, outcome)
        assert not await run.complete(lease, outcome)
        assert [line for line in run.said if "room" in line] == [
            refused.waiting_for,
            "there is room again; the run goes on",
        ]

    play(tmp_path, script, low_disk_bytes=80_000_000, heartbeat_s=0.5, lease_s=3.0)
    assert digest(play(tmp_path, Played.finish)) == undisturbed


def test_a_disk_that_fills_up_again_and_again_costs_nothing(tmp_path: Path, disk: Disk, undisturbed: str) -> None:
    """Whatever is written finds no room now and then: decisions, local tasks, module steps, sums."""

    async def patiently(call: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """What the client does."""
        while True:
            try:
                return await call(*args)
            except WaitingForRoom:
                await asyncio.sleep(0.01)

    async def script(run: Played) -> None:
        disk.full_share = 0.5
        while not (lease := await run.lease()).finished:
            if lease.spec is None:
                continue
            assert lease.task_id not in done, "a task that counts is not done again"
            outcome = await asyncio.to_thread(run.compute, lease)
            await patiently(run.upload, lease, outcome)
            await patiently(run.complete, lease, outcome)
            done.append(lease.task_id)
        disk.full_share = 0.0

    done: list[str] = []
    assert digest(play(tmp_path, script)) == undisturbed
    assert {"Journal.commit", "Executor.step", "Jobs.run"} <= set(disk.refused)


def test_a_decision_that_cannot_be_stored_leaves_leases_as_they_were(tmp_path: Path, disk: Disk) -> None:
    async def script(run: Played) -> None:
        lease = await run.until_leased("TRAIN")
        outcome = run.compute(lease)
        await run.upload(lease, outcome)
        disk.full = True
        for _ in range(3):
            with pytest.raises(WaitingForRoom):
                await run.complete(lease, outcome)
            beat = await run.coordinator.heartbeat(HeartbeatArgs(run.worker_id, lease.task_id, lease.fence, steps=1))
            assert not beat.lost
        with pytest.raises(WaitingForRoom):
            await run.coordinator.release(ReleaseArgs(run.worker_id, lease.task_id, lease.fence, "a reason"))
        assert not (await run.coordinator.heartbeat(HeartbeatArgs(run.worker_id, lease.task_id, lease.fence))).lost
        disk.full = False
        assert not await run.complete(lease, outcome)

    play(tmp_path, script)


# --- blobs that nothing names yet -------------------------------------------------------------------------------------


def test_outputs_that_landed_stay_for_a_completion_that_is_asked_for_again(tmp_path: Path) -> None:
    """The call is cut off between moving the outputs and counting them, and equal bytes are let go of meanwhile."""

    async def script(run: Played) -> None:
        lease = await run.until_leased("TRAIN")
        outcome = run.compute(lease)
        await run.upload(lease, outcome)
        digests = [blob.digest for blob in outcome.result.outputs.values()]
        run.coordinator._ledger.garbage.landing_of_task(lease.task_id, digests)
        await asyncio.to_thread(run.coordinator._spool.commit, lease.task_id, lease.fence, outcome.result.outputs)
        run.coordinator._ledger.garbage.let_go(digests)
        assert not await run.complete(lease, outcome)
        assert not await _lacking(run.run_dir)

    play(tmp_path, script)


async def _lacking(run_dir: Path) -> list[str]:
    """Blobs that the run names and does not hold."""
    snapshot = RunSnapshot.open(run_dir)
    return [digest for digest in snapshot.blobs() if not snapshot.store.has(digest)]


def test_outputs_of_a_task_that_another_holder_completed_are_let_go_of(tmp_path: Path) -> None:
    async def script(run: Played) -> None:
        lease = await run.until_leased("TRAIN")
        aside = run.coordinator._store.put_bytes(b"what a slower holder computed")[0]
        run.coordinator._ledger.garbage.landing_of_task(lease.task_id, [aside])
        run.coordinator._ledger.garbage.let_go([aside])
        assert run.coordinator._store.has(aside), "its task is open"
        await run.task(lease)
        assert not run.coordinator._store.has(aside)

    play(tmp_path, script)


def test_a_step_whose_result_was_let_go_of_meanwhile_is_taken_again(
    tmp_path: Path, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, taken = Executor.step, []

    def lost(executor: Executor, key: Any, version: int, *rest: Any) -> Any:
        outcome = step(executor, key, version, *rest)
        if (key, version) not in taken and outcome.momentum is not None:
            executor._store.delete(outcome.params[0])
        taken.append((key, version))
        return outcome

    monkeypatch.setattr(Executor, "step", lost)
    assert digest(play(tmp_path, Played.finish)) == undisturbed
    assert len(taken) > len(set(taken))


def kept(digests: Iterable[str], run_dir: Path) -> set[str]:
    return {digest for digest in digests if (run_dir / "blobs" / digest).is_file()}


@pytest.mark.parametrize("keep_versions", [1, 3])
def test_as_many_versions_of_a_module_are_kept_as_configured(tmp_path: Path, keep_versions: int) -> None:
    seen: dict[str, list[str]] = {}

    async def script(run: Played) -> None:
        lease = await run.lease()
        while not lease.finished:
            await run.task(lease)
            lease = await run.lease()
            for module in run.coordinator._machine.state.modules_of("mixture"):
                versions = seen.setdefault(module.key, [])
                if module.params.digest not in versions:
                    versions.append(module.params.digest)

    run_dir = play(tmp_path, script, keep_versions=keep_versions)
    snapshot = RunSnapshot.open(run_dir)
    for module in snapshot.state.modules_of("mixture"):
        assert (module.version, len(seen[module.key])) == (2, 3)
        assert [module.params.digest, *(ref.digest for ref in module.history)] == seen[module.key][::-1][:keep_versions]
        assert kept(seen[module.key][-keep_versions:], run_dir) == set(seen[module.key][-keep_versions:])
    held = {path.name for path in (run_dir / "blobs").iterdir() if len(path.name) == 64}
    assert held == set(snapshot.blobs()), "what nothing names is gone, what something names is there"
