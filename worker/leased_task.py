"""One task under one lease, from its inputs to its completion; a failure is reported, a lost lease dropped."""

from __future__ import annotations

import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from configs.schema import Experiment
from protocol.errors import WIRE_ERRORS, Banned, Forbidden, StaleLease, Unavailable, UnknownBlob, UnknownTask
from protocol.tasks import BlobRef, Checkpoint, TrainSpec
from protocol.tensors import UploadHeader
from worker.cache import BlobCache
from worker.calls import Connect, Coordinator
from worker.checkpoints import CHECKPOINT, Checkpoints
from worker.client import Lease, Pulse
from worker.departure import Departure, Leave
from worker.heartbeat import Heartbeat, Say
from worker.memo import Memo, memo_key
from worker.outcome import HandedBack, TaskOutcome, TaskStopped
from worker.pace import Pace
from worker.side_line import SideLine
from worker.task import AnySpec, inputs, is_input_of_later_tasks, run_task, upload_header
from worker.workspace import Workspace

# A task whose steps would be over within this share of what is left of the grace is finished before the worker leaves:
# outputs take the rest.
NEARLY_DONE_SHARE = 0.5
# How long a worker that leaves tries to say so.
FAREWELL_S = 3.0
# How long a thread that was told to end is waited for.
LET_GO_S = 1.0
# In the directory of a task: outputs that were computed before.
RECALLED = "recalled"
# How long a checkpoint is tried while nobody answers.
CHECKPOINT_PATIENCE_S = 20.0


@dataclass(frozen=True, slots=True)
class Joined:
    """What the worker knows of the run it has joined, and what it keeps on this machine."""

    worker_id: str
    experiment: Experiment
    heartbeat_s: float
    cache: BlobCache
    pace: Pace | None
    fingerprint: str = ""
    memo: Memo | None = None


class OutdatedSpec(Exception):
    """The lease names a checkpoint that is there no more; asked for again, it names the one that replaced it."""


class LeasedTask:
    """One task under one lease, from its inputs to its completion."""

    def __init__(self, client: Coordinator, joined: Joined, lease: Lease, departure: Departure, say: Say) -> None:
        assert lease.spec is not None, "the lease carries a task"
        self._client, self._joined, self._lease = client, joined, lease
        self._spec: AnySpec = lease.spec
        self._departure, self._say = departure, say
        self._key = (joined.worker_id, lease.task_id, lease.fence)
        self._heartbeat = Heartbeat(self._beat, joined.heartbeat_s, WIRE_ERRORS, say)

    def run(self, workspace: Workspace, connect: Connect) -> None:
        """Do the task; a failure is reported and the worker goes on. Raises Leave where the worker leaves meanwhile."""
        out_dir = workspace.directory()
        try:
            with self._heartbeat:
                self._do(out_dir, connect)
        except OutdatedSpec as error:
            self._say(f"{self._lease.task_id}: asked for again ({error})")
        except (StaleLease, UnknownTask) as error:  # UnknownTask: another holder was first, and its stage is over
            self._say(f"{self._lease.task_id}: dropped, its lease is lost ({error})")
        except TaskStopped:
            if not self._heartbeat.lost.is_set():
                self._say(f"{self._lease.task_id}: handed back")
                raise Leave from None
            self._say(f"{self._lease.task_id}: dropped, its lease is lost")
        except Unavailable:
            raise  # only a worker that leaves gives up waiting
        except Exception as error:
            self._fail(error, connect)
        finally:
            self._joined.cache.release_all()
            shutil.rmtree(out_dir, ignore_errors=True)

    def _do(self, out_dir: Path, connect: Connect) -> None:
        begin = time.monotonic()
        fetched: dict[str, int] = {}
        outcome = self._recalled(out_dir)
        if outcome is None:
            outcome, fetched = self._compute(out_dir, connect)
        sent = sum(self._upload(name, outcome) for name in sorted(outcome.files))
        result = outcome.result.model_copy(update={"fetched_bytes": fetched})
        counted_before = self._client.complete(*self._key, result)
        if not (counted_before or outcome.result.reused):
            self._remember(outcome)
        self._keep(outcome)
        self._say(
            f"{self._lease.task_id}: done in {time.monotonic() - begin:.1f} s"
            + (f", loss {result.loss_sum / result.tokens:.4f}" if result.loss_sum and result.tokens else "")
            + f", {sum(fetched.values()) / 1e6:.1f} MB in, {sent / 1e6:.1f} MB out"
        )

    def _recalled(self, out_dir: Path) -> TaskOutcome | None:
        """What is kept of the task. Not where it is leased again: a second opinion is to be one."""
        memo, key = self._joined.memo, self._memo_key()
        if memo is None or key is None or self._lease.fence > 1:
            return None
        outcome = memo.recall(key, out_dir / RECALLED)
        if outcome is not None:
            self._say(f"{self._lease.task_id}: computed before, taken from what is kept here")
        return outcome

    def _remember(self, outcome: TaskOutcome) -> None:
        memo, key = self._joined.memo, self._memo_key()
        if memo is not None and key is not None:
            memo.remember(key, outcome)

    def _memo_key(self) -> str | None:
        return memo_key(self._spec, self._joined.experiment, self._joined.fingerprint)

    def _compute(self, out_dir: Path, connect: Connect) -> tuple[TaskOutcome, dict[str, int]]:
        """What the task comes to, and the bytes that were fetched for it by what they were."""
        resume = self._spec.resume if isinstance(self._spec, TrainSpec) else None
        self._say(f"{self._lease.task_id}: {f'goes on after step {resume.steps}' if resume else 'started'}")
        files, fetched = self._fetch()
        side = SideLine(connect, CHECKPOINT_PATIENCE_S)
        checkpoints = self._checkpoints(out_dir, side, files)
        try:
            outcome = run_task(self._spec, self._joined.experiment, files, out_dir, self._progress(), checkpoints)
        finally:
            checkpoints.end()
            side.close()
            checkpoints.wait(LET_GO_S)
        return outcome, fetched

    def _fetch(self) -> tuple[dict[str, Path], dict[str, int]]:
        """The inputs as local files by digest, and the bytes that came over the wire by what they were."""
        files: dict[str, Path] = {}
        fetched: Counter[str] = Counter()
        for what, blobs in inputs(self._spec).items():
            for blob in blobs:
                with self._departure.cuts_short():
                    files[blob.digest], arrived = self._hold(what, blob)
                fetched[what] += arrived
                if self._heartbeat.lost.is_set():
                    raise TaskStopped
        return files, dict(fetched)

    def _hold(self, what: str, blob: BlobRef) -> tuple[Path, int]:
        try:
            return self._joined.cache.hold(blob, self._client.fetch_to)
        except UnknownBlob as error:
            if what == "checkpoints":  # another holder of the task has got farther meanwhile
                raise OutdatedSpec(error) from None
            raise

    def _checkpoints(self, out_dir: Path, side: SideLine, files: Mapping[str, Path]) -> Checkpoints:
        """Where the partial progress of the task goes, by a connection that can be let go of alone."""

        def send(path: Path, checkpoint: Checkpoint) -> None:
            client = side.client()
            client.upload(path, self._header(CHECKPOINT, path, checkpoint.blob))
            client.save_progress(*self._key, checkpoint)

        resume = self._spec.resume if isinstance(self._spec, TrainSpec) else None
        resume_path = files[resume.blob.digest] if resume else None

        def left_s() -> float:
            return self._departure.left_s() - FAREWELL_S - 2 * LET_GO_S

        return Checkpoints(send, self._joined.pace, out_dir, self._say, resume_path=resume_path, left_s=left_s)

    def _progress(self) -> Callable[[int, float, int], None]:
        """The callback between steps: tells the heartbeat, stops a task that is lost or that a leaving worker drops."""
        total, resumed = 0, 0
        if isinstance(self._spec, TrainSpec):
            total, resumed = self._spec.steps, self._spec.resume.steps if self._spec.resume else 0
        computing = time.monotonic()

        def progress(steps: int, loss: float, tokens: int) -> None:
            self._heartbeat.report(steps, loss, tokens)
            if self._heartbeat.lost.is_set():
                raise TaskStopped
            if self._departure.asked.is_set():
                left_s = (time.monotonic() - computing) / (steps - resumed) * (total - steps)
                if not 0 <= left_s <= NEARLY_DONE_SHARE * self._departure.left_s():
                    raise HandedBack

        return progress

    def _upload(self, name: str, outcome: TaskOutcome) -> int:
        path = outcome.files[name]
        return self._client.upload(path, self._header(name, path, outcome.result.outputs[name]))

    def _header(self, name: str, path: Path, blob: BlobRef) -> UploadHeader:
        header = upload_header(self._lease.task_id, self._lease.fence, self._spec, name, path, blob)
        return header.model_copy(update={"worker_id": self._joined.worker_id})

    def _keep(self, outcome: TaskOutcome) -> None:
        """Outputs that later tasks read stay in the cache, if there is room."""
        for name, path in outcome.files.items():
            if is_input_of_later_tasks(self._spec, name):
                with suppress(ValueError, OSError):
                    self._joined.cache.adopt(path, outcome.result.outputs[name])

    def _fail(self, error: Exception, connect: Connect) -> None:
        """Give the task back with the reason; a reason that is not ours to foresee is shown with its traceback."""
        reason = reason_of(error)
        self._say(f"{self._lease.task_id}: failed: {reason}")
        if not isinstance(error, (ValueError, OSError)):
            self._say(traceback.format_exc().rstrip())
        with suppress(*WIRE_ERRORS):  # a lease that is not given back ends by itself
            self._client.release(*self._key, reason)
        self._departure.asked.wait(1.0)  # whatever it was, do not try the next task in a hot loop

    def _beat(self, steps: int, loss: float, tokens: int) -> Pulse:
        """One beat; a worker that was shut out has lost its lease, and hears why with its next call."""
        try:
            return self._client.heartbeat(*self._key, steps=steps, loss=loss, tokens=tokens)
        except (Forbidden, Banned):
            return Pulse(lost=True, lease_s=0.0)


def reason_of(error: Exception) -> str:
    """Why a task failed, in one sentence for the coordinator."""
    told = str(error).strip() or "no more is known"
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "can't allocate memory" in told:
        return f"out of memory; lower numerics.micro_batch_rows or set numerics.checkpoint_activations ({told})"
    return f"{type(error).__name__}: {told}"
