"""A copy of a run, also of one that goes on: the journal as it stood between two decisions, and the blobs it names.

Blobs are held by hard links before the copy of the journal is relied on: a link is taken at once or the blob is gone,
and then a newer state is read. So nothing is agreed with the coordinator, which may let go of anything at any moment.
OUT is the former backup until its state.db is replaced by one rename, and the new one from then on: before it, blobs
are only added; after it, only those that the new state does not name are removed. Files that are on the same file
system are linked, others copied and read against their digests while they are.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from configs.load import experiment_digest
from configs.schema import Config
from coordinator.evidence import ASIDE, EVIDENCE, TENSORS
from coordinator.journal import UNFINISHED_BACKUP, Journal, RunLock, RunUnusable, copy_journal, fold, mark_copy
from coordinator.machine import Machine
from coordinator.pins import NO_LINKS, pinning
from coordinator.plan import Plan
from coordinator.recovery import REMEDY
from coordinator.references import Reference, referenced_blobs
from coordinator.state import State
from model.store import BlobStore, file_digest, fsync_path

INCOMING = "incoming"
META = "backup"
MAX_ATTEMPTS = 1000
# What belongs to a run beside its journal and blobs; the keys are needed to go on with the same workers elsewhere, and
# evidence is all that tells why a worker is banned.
BESIDE = ("config.yaml", "usage.json", "report.json", "report.html", "certs", EVIDENCE)
# Told after every blob: blobs and bytes that are in place, and of how many.
Progress = Callable[[int, int, int, int], None]


class BackupRefused(ValueError):
    """The run cannot be copied to this place; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Backup:
    """What a backup came to. `steps`: inner steps in its weights; `new_blobs` were not in OUT before."""

    run: str
    out: str
    taken_s: float
    tasks: int
    steps: int
    blobs: int
    bytes: int
    new_blobs: int
    new_bytes: int
    linked: bool
    removed_blobs: int


@dataclass(frozen=True, slots=True)
class _Taken:
    """A state that was copied aside, and the blobs it names."""

    config: Config
    identity: str
    tasks: int
    steps: int
    blobs: dict[str, Reference]


def back_up(run_dir: Path, out: Path, progress: Progress) -> Backup:
    """Copy a run to `out`, which is new, empty, or an earlier backup of the same run.

    Raises RunUnusable where `run_dir` is no run, BackupRefused where `out` is something else or the run is damaged.
    """
    Journal(run_dir, read_only=True).close()
    if run_dir.resolve() in (out.resolve(), *out.resolve().parents) or out.resolve() in run_dir.resolve().parents:
        raise BackupRefused(f"{out} and {run_dir} lie in one another; take another place for the backup")
    _check_place(out)
    out.mkdir(parents=True, exist_ok=True)
    with _lock(out):
        if not (out / "state.db").exists():
            (out / UNFINISHED_BACKUP).touch()
        try:
            return _Copy(run_dir, out, progress).carry_out()
        finally:
            shutil.rmtree(out / INCOMING, ignore_errors=True)


def _check_place(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise BackupRefused(f"{out} is a file; give a folder for the backup")
    if not out.is_dir() or {each.name for each in out.iterdir()} <= {"lock"} or (out / UNFINISHED_BACKUP).exists():
        return
    if not (out / "state.db").is_file():
        raise BackupRefused(f"{out} is not empty and holds no backup; take another place")
    journal = Journal(out, read_only=True)
    try:
        if journal.meta(META) is None:
            raise BackupRefused(f"{out} holds a run that goes on by itself, not a backup; take another place")
    finally:
        journal.close()


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    try:
        lock = RunLock(out)
    except RunUnusable:
        raise BackupRefused(f"{out} is in use by a coordinator or by another backup; wait for that one") from None
    try:
        yield
    finally:
        lock.release()


class _Copy:
    """One backup under way."""

    def __init__(self, run_dir: Path, out: Path, progress: Progress) -> None:
        self._run_dir, self._out, self._progress = run_dir, out, progress
        self._store = BlobStore(out / "blobs")
        self._store.clear_scratch()
        self._before = {digest: self._store.size(digest) for digest in self._store.digests()}
        self._linked = True

    def carry_out(self) -> Backup:
        taken = self._bring_all()
        self._copy_beside()
        self._publish(taken)
        removed = [digest for digest in self._store.digests() if digest not in taken.blobs]
        for digest in removed:
            self._store.delete(digest)
        new = [digest for digest in taken.blobs if digest not in self._before]
        return Backup(
            run=taken.config.name,
            out=str(self._out),
            taken_s=self._taken_s,
            tasks=taken.tasks,
            steps=taken.steps,
            blobs=len(taken.blobs),
            bytes=sum(reference.size for reference in taken.blobs.values()),
            new_blobs=len(new),
            new_bytes=sum(taken.blobs[digest].size for digest in new),
            linked=self._linked,
            removed_blobs=len(removed),
        )

    def _bring_all(self) -> _Taken:
        """A state all of whose blobs are in OUT. Only where nothing can be held may one go while it is copied."""
        gone = ""
        for _ in range(MAX_ATTEMPTS):
            with contextlib.ExitStack() as stack:
                source, taken = self._hold(stack)
                try:
                    self._bring(source, taken.blobs)
                    return taken
                except FileNotFoundError as error:
                    if gone == str(error.filename):
                        self._refuse(Path(gone).name, taken.blobs, "is missing")
                    gone = str(error.filename)
        raise BackupRefused(f"{self._run_dir} changes faster than it can be copied; try again when it is less busy")

    # --- a state, and all its blobs held ------------------------------------------------------------------------------

    def _hold(self, stack: contextlib.ExitStack) -> tuple[Path, _Taken]:
        """The newest state, and where its blobs lie and stay; where there are no hard links, the run's own blobs."""
        blobs = self._run_dir / "blobs"
        try:
            pins = stack.enter_context(pinning(self._run_dir))
            lacked: set[str] = set()
            for _ in range(MAX_ATTEMPTS):
                taken = self._take()
                missing = pins.hold(self._lacking(taken.blobs))
                if not missing:
                    return pins.root, taken
                if missing <= lacked:
                    self._refuse(min(missing), taken.blobs, "is missing")
                lacked = missing
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            self._linked = False
            return blobs, self._take()
        raise BackupRefused(f"{self._run_dir} changes faster than it can be copied; try again when it is less busy")

    def _lacking(self, blobs: dict[str, Reference]) -> list[str]:
        """Those that OUT does not hold already."""
        return [digest for digest, reference in sorted(blobs.items()) if self._before.get(digest) != reference.size]

    def _refuse(self, digest: str, blobs: dict[str, Reference], why: str) -> NoReturn:
        place = self._run_dir / "blobs" / digest
        raise BackupRefused(f"blob {place} ({blobs[digest].what}) {why}, so there is nothing to back up; {REMEDY}")

    def _take(self) -> _Taken:
        """Copy the journal aside, in one piece, and read from the copy what it names."""
        incoming = self._out / INCOMING
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir(mode=0o700)  # keys pass through it
        self._taken_s = time.time()
        copy_journal(self._run_dir, incoming)
        journal = Journal(incoming, read_only=True)
        try:
            document = journal.meta("config")
            if document is None:
                raise BackupRefused(f"{self._run_dir} has not begun yet, so there is nothing to back up")
            config = Config.model_validate(json.loads(document))
            state, metrics = State(journal.rows()), list(journal.metrics())
        finally:
            journal.close()
        if "corpus" not in state.stages:
            raise BackupRefused(f"{self._run_dir} has not begun yet, so there is nothing to back up")
        # A run is known by its experiment and by when it began.
        identity = f"{experiment_digest(config, {})} {state.stages['corpus'].started_s!r}"
        state.forget_tasks(Machine(Plan(config), state, random.Random(0)).consumed())
        steps = sum(metric["steps"] for metric in metrics if metric["kind"] == "TRAIN")
        taken = _Taken(config, identity, len(metrics), steps, referenced_blobs(state))
        self._check_successor(taken)
        return taken

    def _check_successor(self, taken: _Taken) -> None:
        """What is in OUT must be an earlier state of the same run."""
        if not (self._out / "state.db").is_file():
            return
        journal = Journal(self._out, read_only=True)
        try:
            former = json.loads(journal.meta(META) or "{}")
        finally:
            journal.close()
        if former.get("identity") != taken.identity:
            raise BackupRefused(f"{self._out} is a backup of another run; take another place")
        if former.get("tasks", 0) > taken.tasks:
            raise BackupRefused(
                f"{self._out} is ahead of {self._run_dir} ({former['tasks']} tasks done there, {taken.tasks} here); "
                "take another place, so that the later state is kept"
            )

    # --- into OUT -----------------------------------------------------------------------------------------------------

    def _bring(self, source: Path, blobs: dict[str, Reference]) -> None:
        done_bytes, total = 0, sum(reference.size for reference in blobs.values())
        lacking = set(self._lacking(blobs))
        for done, (digest, reference) in enumerate(sorted(blobs.items()), start=1):
            if digest in lacking and not self._is_in_place(digest, reference):
                self._bring_one(source / digest, digest, blobs)
            done_bytes += reference.size
            self._progress(done, len(blobs), done_bytes, total)

    def _bring_one(self, path: Path, digest: str, blobs: dict[str, Reference]) -> None:
        self._store.delete(digest)  # where it is there in another size
        aside = self._store.scratch() / "blob"
        self._link_or_copy(path, aside)
        if aside.stat().st_size != blobs[digest].size:
            self._refuse(digest, blobs, f"has {aside.stat().st_size} bytes, not {blobs[digest].size}")
        if aside.stat().st_nlink == 1 and file_digest(aside)[0] != digest:
            self._refuse(digest, blobs, "holds other bytes than its digest names")
        self._store.adopt(aside, digest)

    def _is_in_place(self, digest: str, reference: Reference) -> bool:
        """Whether an earlier attempt of this backup brought it."""
        return self._store.has(digest) and self._store.size(digest) == reference.size

    def _link_or_copy(self, path: Path, aside: Path) -> None:
        try:
            os.link(path, aside)
        except OSError as error:
            if error.errno not in (*NO_LINKS, errno.EXDEV):
                raise
            self._linked = False
            shutil.copyfile(path, aside)

    def _copy_beside(self) -> None:
        """The files beside the journal, each whole or as it was. Some may come and go meanwhile: those are left out."""
        for name in BESIDE:
            source, target = self._run_dir / name, self._out / name
            self._copy_file(source, target)
            for folder, _, names in os.walk(source):
                place = target / Path(folder).relative_to(source)
                with contextlib.suppress(FileNotFoundError):
                    place.mkdir(mode=stat.S_IMODE(os.stat(folder).st_mode), exist_ok=True)
                    for each in sorted(names):
                        self._copy_file(Path(folder, each), place / each)

    def _copy_file(self, source: Path, target: Path) -> None:
        if source.name.endswith(ASIDE) or not source.is_file():
            return
        aside = self._out / INCOMING / "beside"
        aside.unlink(missing_ok=True)  # a rename onto another name of the same file leaves it
        with contextlib.suppress(FileNotFoundError):
            if source.suffix == TENSORS:  # replaced whole, like all of them, but never written to
                self._link_or_copy(source, aside)
            else:
                shutil.copy2(source, aside)
            fsync_path(aside)
            os.replace(aside, target)

    def _publish(self, taken: _Taken) -> None:
        """The copy becomes the backup's state, by one rename. Nothing of the former one is left to be read into it."""
        aside, state = self._out / INCOMING / "state.db", self._out / "state.db"
        note = {"identity": taken.identity, "tasks": taken.tasks, "taken_s": self._taken_s}
        mark_copy(aside, META, json.dumps(note))
        if state.exists():
            try:
                fold(state)
            except sqlite3.OperationalError:
                raise BackupRefused(f"{state} is in use; try again when nobody reads {self._out}") from None
        fsync_path(self._store.root)
        fsync_path(aside)
        os.replace(aside, state)
        fsync_path(self._out)
        (self._out / UNFINISHED_BACKUP).unlink(missing_ok=True)
