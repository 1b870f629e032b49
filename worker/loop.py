"""One machine's loop: join, lease, fetch, run, upload, complete; leave on a signal without losing what is nearly done.

A shell: what a task computes and what the coordinator decides stand elsewhere. The client repeats calls while nobody
answers, so a coordinator that restarts is waited for, under the same worker id.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from configs.schema import Config, Experiment
from protocol.address import parse_address
from protocol.credentials import Credentials
from protocol.errors import WIRE_ERRORS, Banned, Forbidden, StaleLease, Unavailable, UnknownBlob, UnknownTask
from protocol.tasks import BlobRef, Capabilities, Checkpoint, TaskResult, TrainSpec
from protocol.tensors import UploadHeader
from worker.cache import BlobCache
from worker.checkpoints import CHECKPOINT, Checkpoints
from worker.client import Lease, Pulse, Welcome, WorkerClient
from worker.departure import Departure, Leave
from worker.heartbeat import Heartbeat, Say
from worker.outcome import HandedBack, TaskOutcome, TaskStopped
from worker.pace import Pace
from worker.probe import capabilities
from worker.task import AnySpec, inputs, is_input_of_later_tasks, run_task, upload_header
from worker.workspace import Workspace

LEASE_WAIT_S = 20.0
# A task whose steps would be over within this share of the grace is finished before the worker leaves: outputs take
# the rest.
NEARLY_DONE_SHARE = 0.5
# How long a checkpoint is tried while nobody answers.
CHECKPOINT_PATIENCE_S = 20.0
# How long a worker that leaves tries to say so.
FAREWELL_S = 3.0
# Cached blobs of at least this size are worth preferring a task for.
LARGE_BLOB_BYTES = 64 * 1024
MAX_CACHED_DIGESTS = 1000


class Coordinator(Protocol):
    """What the loop needs of `worker.client.WorkerClient`."""

    def hello(self, worker_name: str, capabilities: Capabilities, worker_id: str = "") -> Welcome: ...

    def lease(self, worker_id: str, wait_s: float, cached_digests: Sequence[str] = ()) -> Lease: ...

    def heartbeat(
        self, worker_id: str, task_id: str, fence: int, *, steps: int = 0, loss: float = float("nan"), tokens: int = 0
    ) -> Pulse: ...

    def complete(self, worker_id: str, task_id: str, fence: int, result: TaskResult) -> bool: ...

    def save_progress(self, worker_id: str, task_id: str, fence: int, checkpoint: Checkpoint) -> bool: ...

    def release(self, worker_id: str, task_id: str, fence: int, reason: str = "", *, leaving: bool = False) -> None: ...

    def fetch_to(self, digest: str, path: Path) -> int: ...

    def upload(self, path: Path, header: UploadHeader) -> int: ...

    def close(self) -> None: ...


# Opens a client that gives up after so many seconds without an answer (None: never).
Connect = Callable[[float | None], Coordinator]


def say_with_time(sentence: str) -> None:
    """A plain log line."""
    print(f"{time.strftime('%H:%M:%S')} {sentence}", flush=True)


def run_worker(
    address: str,
    join: Path | None,
    cache_dir: Path,
    threads: int,
    name: str | None = None,
    memory_bytes: int | None = None,
    insecure: bool = False,
    say: Say = say_with_time,
    grace_s: float | None = None,
) -> int:
    """Work for the coordinator at `address` until its run is finished or a signal comes; returns the exit code, 0.

    Raises VersionMismatch, NotAllowed, BadAddress, BadJoinFile, CertificateEnded.
    """
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # the tokenizer's threads
    credentials = None if join is None else Credentials.read(join, say)
    target = parse_address(address)

    def connect(patience_s: float | None) -> Coordinator:
        return WorkerClient(target, credentials, insecure=insecure, patience_s=patience_s, say=say)

    worker_name = name or f"{socket.gethostname()}:{os.getpid()}"
    return Worker(connect, cache_dir, worker_name, capabilities(threads, memory_bytes), say, grace_s).run()


@dataclass(frozen=True, slots=True)
class Joined:
    """What the worker knows of the run it has joined."""

    worker_id: str
    experiment: Experiment
    heartbeat_s: float
    grace_s: float
    cache: BlobCache
    pace: Pace | None


class Worker:
    """One worker process: at most one lease at a time."""

    def __init__(
        self,
        connect: Connect,
        cache_dir: Path,
        name: str,
        offers: Capabilities,
        say: Say,
        grace_s: float | None = None,
    ) -> None:
        """`grace_s`: what this machine leaves a worker that must go; None: execution.grace_s of the run."""
        self._connect, self._cache_dir, self._name, self._offers, self._say = connect, cache_dir, name, offers, say
        self._grace_s = grace_s
        self._client = connect(None)
        self._workspace = Workspace(cache_dir / "outputs")
        self.departure = Departure(self._client.close)

    def run(self) -> int:
        """Work until the run is finished or the worker is asked to leave."""
        try:
            with self.departure.on_signals():
                self._join_and_work()
        finally:
            self._workspace.close()
            self._client.close()
        return 0

    def _join_and_work(self) -> None:
        joined: Joined | None = None
        try:
            with self.departure.cuts_short():
                joined = self._join()
            self._work(joined)
        except (Leave, Unavailable) as error:
            if isinstance(error, Unavailable) and not self.departure.asked.is_set():
                raise
            self._say("leaving")
            if joined is not None:
                self._farewell(joined.worker_id)

    def _join(self) -> Joined:
        welcome = self._client.hello(self._name, self._offers)
        config = Config.model_validate_json(welcome.config_json)
        self._say(f"joined run {welcome.run_name} as {welcome.worker_id} ({self._offers.fingerprint})")
        cache = BlobCache(self._cache_dir, config.execution.cache_bytes)
        execution, beat_s = config.execution, welcome.heartbeat_s
        grace_s = execution.grace_s if self._grace_s is None else self._grace_s
        self.departure.grace_s = grace_s
        pace = Pace(least_s=beat_s / 2) if execution.checkpoints else None
        return Joined(welcome.worker_id, config.experiment, beat_s, grace_s, cache, pace)

    def _work(self, joined: Joined) -> None:
        """Lease and run tasks until the run is finished; raises Leave."""
        said = ""
        while True:
            with self.departure.cuts_short():
                cached = joined.cache.digests(LARGE_BLOB_BYTES)[:MAX_CACHED_DIGESTS]
                lease = self._client.lease(joined.worker_id, LEASE_WAIT_S, cached)
            if lease.finished:
                self._say("the run is finished")
                return
            if lease.spec is not None:
                said = ""
                if joined.pace is not None:
                    joined.pace.mtbf_s = lease.mtbf_s
                LeasedTask(self._client, joined, lease, self.departure, self._say).run(self._workspace, self._connect)
            elif lease.waiting_for != said:
                said = lease.waiting_for
                self._say(f"waiting: {said}")

    def _farewell(self, worker_id: str) -> None:
        """Leave the run, if anybody listens; else the leases end by themselves."""
        client = self._connect(FAREWELL_S)
        with suppress(*WIRE_ERRORS):
            client.release(worker_id, "", 0, leaving=True)
        client.close()


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
        self._side: Coordinator | None = None

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
        resume = self._spec.resume if isinstance(self._spec, TrainSpec) else None
        self._say(f"{self._lease.task_id}: {f'goes on after step {resume.steps}' if resume else 'started'}")
        files, fetched = self._fetch()
        checkpoints = self._checkpoints(out_dir, connect, files)
        try:
            outcome = run_task(self._spec, self._joined.experiment, files, out_dir, self._progress(), checkpoints)
        finally:
            checkpoints.end()
            if self._side is not None:
                self._side.close()
            checkpoints.wait(1.0)
        sent = sum(self._upload(name, outcome) for name in sorted(outcome.files))
        result = outcome.result.model_copy(update={"fetched_bytes": fetched})
        self._client.complete(*self._key, result)
        self._keep(outcome)
        self._say(
            f"{self._lease.task_id}: done in {time.monotonic() - begin:.1f} s"
            + (f", loss {result.loss_sum / result.tokens:.4f}" if result.loss_sum and result.tokens else "")
            + f", {sum(fetched.values()) / 1e6:.1f} MB in, {sent / 1e6:.1f} MB out"
        )

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

    def _checkpoints(self, out_dir: Path, connect: Connect, files: Mapping[str, Path]) -> Checkpoints:
        """Where the partial progress of the task goes, by a connection that can be let go of alone."""

        def send(path: Path, checkpoint: Checkpoint) -> None:
            self._side = self._side or connect(CHECKPOINT_PATIENCE_S)
            self._side.upload(path, self._header(CHECKPOINT, path, checkpoint.blob))
            self._side.save_progress(*self._key, checkpoint)

        resume = self._spec.resume if isinstance(self._spec, TrainSpec) else None
        resume_path = files[resume.blob.digest] if resume else None
        return Checkpoints(
            send, self._joined.pace, out_dir, self._say, resume_path=resume_path, grace_s=self._joined.grace_s
        )

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
                if not 0 <= left_s <= NEARLY_DONE_SHARE * self._joined.grace_s:
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
