"""Backups of a small run: taken while it goes on, again into the same place, cut short, and gone on from."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator import backup
from coordinator.backup import Backup, BackupRefused, back_up
from coordinator.journal import RunUnusable
from coordinator.pins import clear_abandoned, pinning
from coordinator.serving import check_whole
from coordinator.snapshot import RunSnapshot
from tests.played_run import Played, config_of, digest, played
from tests.small_run import SmallRun


def quietly(*_: int) -> None:
    """Nobody looks at the progress."""


def tasks_of(folder: Path, count: int) -> Path:
    """The run in `folder` after so many tasks more."""

    async def some() -> None:
        async with played(config_of(folder), folder / "run") as run:
            for _ in range(count):
                lease = await run.lease()
                if lease.finished:
                    return
                await run.task(lease)

    folder.mkdir(exist_ok=True)
    asyncio.run(some())
    return folder / "run"


def go_on(folder: Path, run_dir: Path) -> str:
    """The digest of the run in a directory once it is finished."""

    async def finish() -> None:
        async with played(config_of(folder), run_dir) as run:
            await Played.finish(run)

    asyncio.run(finish())
    return digest(run_dir)


def test_a_run_is_copied_while_it_goes_on(tmp_path: Path) -> None:
    """Every copy is whole, whatever the run lets go of meanwhile, and each is of a later state than the one before."""
    run, out = SmallRun(tmp_path / "live"), tmp_path / "out"
    run.start()
    working = threading.Thread(target=lambda: run.worker().run())
    working.start()
    made: list[Backup] = []
    while working.is_alive():
        made.append(back_up(run.run_dir, out, quietly))
        snapshot = RunSnapshot.open(out)
        assert snapshot.blobs().keys() == set(snapshot.store.digests())
        assert len(snapshot.metrics) == made[-1].tasks
    working.join()
    finished = run.digest()
    back_up(run.run_dir, out, quietly)
    assert digest(out) == finished
    assert len({each.tasks for each in made}) > 3
    assert not list((run.run_dir / "pins").iterdir())


def test_a_backup_goes_on_to_the_same_end_as_its_run(tmp_path: Path) -> None:
    run_dir, out = tasks_of(tmp_path / "a", 6), tmp_path / "out"
    made = back_up(run_dir, out, quietly)
    assert (made.tasks, made.linked, made.removed_blobs) == (6, True, 0)
    assert digest(out) == digest(run_dir)
    shutil.rmtree(run_dir / "blobs")  # the copy does not need it
    finished = go_on(tmp_path / "a", out)
    assert finished == digest(tasks_of(tmp_path / "b", 100))
    with pytest.raises(BackupRefused, match="holds a run that goes on by itself"):
        back_up(tmp_path / "b" / "run", out, quietly)


def test_a_second_backup_brings_what_is_new_and_removes_what_is_not_needed(tmp_path: Path) -> None:
    run_dir, out = tasks_of(tmp_path / "a", 8), tmp_path / "out"
    first = back_up(run_dir, out, quietly)
    again = back_up(run_dir, out, quietly)
    assert (again.new_blobs, again.removed_blobs, again.blobs) == (0, 0, first.blobs)
    tasks_of(tmp_path / "a", 1)
    later = back_up(run_dir, out, quietly)
    assert later.tasks > first.tasks
    assert 0 < later.new_blobs < later.blobs
    assert later.removed_blobs > 0
    assert digest(out) == digest(run_dir)


def test_on_another_file_system_bytes_are_copied_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, out = tasks_of(tmp_path / "a", 4), tmp_path / "out"
    link = os.link

    def across(source: Path, target: Path) -> None:
        if run_dir not in target.parents:
            raise OSError(18, "Invalid cross-device link")
        link(source, target)

    monkeypatch.setattr("coordinator.backup.os.link", across)
    assert not back_up(run_dir, out, quietly).linked
    assert digest(out) == digest(run_dir)
    assert all(path.stat().st_nlink == 1 for path in (out / "blobs").iterdir() if path.is_file())
    blob = next(iter(RunSnapshot.open(run_dir).base_modules().values()))[1]
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    with pytest.raises(BackupRefused, match="holds other bytes than its digest names"):
        back_up(run_dir, tmp_path / "other", quietly)


@pytest.mark.parametrize("name", ["_bring_one", "_copy_beside", "_publish"])
def test_a_backup_that_is_cut_short_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run_dir, out = tasks_of(tmp_path / "a", 4), tmp_path / "out"

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(backup._Copy, name, cut)
        with pytest.raises(KeyboardInterrupt):
            back_up(run_dir, out, quietly)
    for refusing in (RunSnapshot.open, check_whole) if name != "_bring_one" else (RunSnapshot.open,):
        with pytest.raises(RunUnusable, match="a backup that did not come to its end"):
            refusing(out)
    back_up(run_dir, out, quietly)
    former = digest(out)
    tasks_of(tmp_path / "a", 3)
    with monkeypatch.context() as patched:
        patched.setattr(backup._Copy, name, cut)
        with pytest.raises(KeyboardInterrupt):
            back_up(run_dir, out, quietly)
    assert digest(out) == former
    assert not [each for each in RunSnapshot.open(out).blobs() if not (out / "blobs" / each).is_file()]
    back_up(run_dir, out, quietly)
    assert digest(out) == digest(run_dir)


def evidence_in(run_dir: Path) -> Path:
    """What a ban leaves, and a file that is being written."""
    folder = run_dir / "evidence" / "train-TRAIN-0-1"
    folder.mkdir(parents=True)
    (folder / "evidence.json").write_text("first")
    (folder / "1-0.1.safetensors").write_bytes(b"tensors")
    (folder / "evidence.json.new").write_text("sec")
    return folder


def test_why_a_worker_is_banned_is_kept_too(tmp_path: Path) -> None:
    run_dir, out = tasks_of(tmp_path / "a", 2), tmp_path / "out"
    folder = evidence_in(run_dir)
    for text in ("first", "second"):
        (folder / "evidence.json").unlink()
        (folder / "evidence.json").write_text(text)
        back_up(run_dir, out, quietly)
        kept = {path.name: path for path in (out / "evidence" / "train-TRAIN-0-1").iterdir()}
        assert kept.keys() == {"evidence.json", "1-0.1.safetensors"}
        assert kept["evidence.json"].read_text() == text
        assert kept["1-0.1.safetensors"].samefile(folder / "1-0.1.safetensors")  # which takes no room of its own
    shutil.rmtree(run_dir / "evidence")
    back_up(run_dir, out, quietly)
    assert kept["evidence.json"].read_text() == "second"


@pytest.mark.parametrize("name", ["evidence.json", "1-0.1.safetensors"])
def test_files_that_come_and_go_meanwhile_disturb_no_backup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run_dir, out = tasks_of(tmp_path / "a", 2), tmp_path / "out"
    shutil.copytree(evidence_in(run_dir), run_dir / "evidence" / "train-TRAIN-1-1")
    moved = tmp_path / "moved"

    def late(bring: Callable[[Path, Path], object]) -> Callable[[Path, Path], None]:
        def bring_late(source: Path, target: Path) -> None:
            if source.name == name and not moved.exists():
                (run_dir / "evidence").rename(moved)
                (run_dir / "evidence" / "new").mkdir(parents=True)
            bring(source, target)

        return bring_late

    monkeypatch.setattr("coordinator.backup.shutil.copy2", late(shutil.copy2))
    monkeypatch.setattr("coordinator.backup.os.link", late(os.link))
    back_up(run_dir, out, quietly)
    assert moved.exists()
    assert digest(out) == digest(run_dir)
    assert not list((out / "evidence").rglob(name))


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda run, out: out.write_text("x"), "is a file; give a folder"),
        (lambda run, out: (out.mkdir(), (out / "thesis.tex").touch()), "is not empty and holds no backup"),
        (lambda run, out: shutil.copytree(run, out), "holds a run that goes on by itself"),
        (lambda run, out: back_up(tasks_of(out.parent / "other", 1), out, quietly), "is a backup of another run"),
    ],
    ids=["file", "folder", "run", "another"],
)
def test_a_place_that_holds_something_else_is_refused(
    tmp_path: Path, prepare: Callable[[Path, Path], object], sentence: str
) -> None:
    run_dir, out = tasks_of(tmp_path / "a", 1), tmp_path / "out"
    prepare(run_dir, out)
    with pytest.raises(BackupRefused, match=sentence):
        back_up(run_dir, out, quietly)


def test_a_later_state_is_not_replaced_by_an_earlier_one(tmp_path: Path) -> None:
    run_dir, out, old = tasks_of(tmp_path / "a", 2), tmp_path / "out", tmp_path / "old"
    shutil.copytree(run_dir, old)
    tasks_of(tmp_path / "a", 2)
    back_up(run_dir, out, quietly)
    with pytest.raises(BackupRefused, match=r"is ahead of .* \(4 tasks done there, 2 here\)"):
        back_up(old, out, quietly)


def test_a_run_that_lacks_a_blob_is_named(tmp_path: Path) -> None:
    run_dir = tasks_of(tmp_path / "a", 2)
    next(iter(RunSnapshot.open(run_dir).base_modules().values()))[1].unlink()
    with pytest.raises(BackupRefused, match=r"\(module base/.*\) is missing, so there is nothing to back up"):
        back_up(run_dir, tmp_path / "out", quietly)
    with pytest.raises(RunUnusable, match="is not a run directory"):
        back_up(tmp_path, tmp_path / "out", quietly)
    with pytest.raises(BackupRefused, match="lie in one another"):
        back_up(run_dir, run_dir / "backup", quietly)


def test_what_a_reader_holds_stays_until_it_has_read(tmp_path: Path) -> None:
    run_dir = tasks_of(tmp_path / "a", 8)
    with RunSnapshot.held(run_dir) as snapshot:
        before = digest(run_dir)
        tasks_of(tmp_path / "a", 100)
        gone = [each for each in snapshot.blobs() if not (run_dir / "blobs" / each).exists()]
        assert gone, "the run has let go of some of them"
        assert all(snapshot.store.has(each) for each in snapshot.blobs())
        assert before != digest(run_dir)
    assert not list((run_dir / "pins").iterdir())


def test_links_of_a_holder_that_died_are_removed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a").touch()
    with pinning(tmp_path) as living:
        assert living.hold(["a", "b"]) == {"b"}
        dead = tmp_path / "pins" / "1-dead"
        dead.mkdir()
        (tmp_path / "pins" / "1-dead.lock").touch()
        assert clear_abandoned(tmp_path) == 1
        assert not dead.exists()
        assert (living.root / "a").exists()
