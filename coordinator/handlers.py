"""What the gRPC service calls: plain values in, plain values out, domain exceptions of protocol.errors for refusals.

`Handlers` is implemented by the coordinator; service.py holds no decision and this file no protobuf. Every method runs
on the event loop and must not block it. A call that its client gave up is cancelled at its next await.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from protocol.tasks import Capabilities, Checkpoint, EvaluateSpec, FeaturizeSpec, PackSpec, TaskResult, TrainSpec
from protocol.tensors import UploadHeader

AnySpec = PackSpec | FeaturizeSpec | TrainSpec | EvaluateSpec


@dataclass(frozen=True, slots=True)
class HelloArgs:
    """A worker that joins (`worker_id` empty) or comes back under the id it was given. Its version was checked.

    `identity` is the name in its certificate, which TLS has verified; empty where it has none.
    """

    worker_name: str
    worker_id: str
    package_version: str
    capabilities: Capabilities
    identity: str = ""


@dataclass(frozen=True, slots=True)
class HelloAnswer:
    """The name of the worker in later calls, and what it needs to know of the run."""

    worker_id: str
    run_name: str
    config_json: str
    heartbeat_s: float


@dataclass(frozen=True, slots=True)
class LeaseAnswer:
    """A task (`spec` is set), or why there is none (`waiting_for`), or that the run is over (`finished`).

    `mtbf_s`: the mean time between failures of workers, as measured in this run.
    """

    task_id: str = ""
    fence: int = 0
    lease_s: float = 0.0
    spec: AnySpec | None = None
    waiting_for: str = ""
    finished: bool = False
    mtbf_s: float = 0.0


@dataclass(frozen=True, slots=True)
class HeartbeatArgs:
    """Progress of a leased task; `loss` in nats per token, NaN where there is none."""

    worker_id: str
    task_id: str
    fence: int
    steps: int = 0
    loss: float = float("nan")
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class HeartbeatAnswer:
    """Whether the lease is gone, else the seconds it lasts without another heartbeat."""

    lost: bool
    lease_s: float


@dataclass(frozen=True, slots=True)
class ReleaseArgs:
    """A task given back: with a `reason` a failed attempt, without one not. `task_id` is empty where only `leaving`."""

    worker_id: str
    task_id: str
    fence: int
    reason: str = ""
    leaving: bool = False


class UploadSink(Protocol):
    """Takes the bytes of one upload in order; one call at a time, each awaited to its end before the next.

    A later upload of the same blob under the same fence takes over: its predecessor's `write` and `finish` raise
    StaleLease.
    """

    async def write(self, data: bytes) -> None:
        """Append bytes, off the event loop. Raises DiskFull, StaleLease."""

    async def finish(self) -> int:
        """Verify the whole blob and keep it; returns its size.

        Raises CorruptBlob, RejectedTensor, DiskFull, StaleLease.
        """

    async def abort(self) -> None:
        """Let go of the file after a stream that ended early or failed; the bytes stay for a resume. Never raises."""


class Handlers(Protocol):
    """The coordinator as its service sees it."""

    async def hello(self, args: HelloArgs) -> HelloAnswer:
        """A worker joins or returns."""

    async def lease(self, worker_id: str, wait_s: float, cached_digests: frozenset[str]) -> LeaseAnswer:
        """A task for the worker, after at most `wait_s` seconds. Raises UnknownWorker.

        A worker has one lease at a time: one that asks while it holds a lease did not get the reply, and is answered
        the same lease again. This is what makes the call safe to repeat.
        """

    async def heartbeat(self, args: HeartbeatArgs) -> HeartbeatAnswer:
        """Extend a lease; a lost one is an answer, not an error. Raises UnknownWorker."""

    async def complete(self, worker_id: str, task_id: str, fence: int, result: TaskResult) -> bool:
        """Make all outputs count or none; True where they counted already, or wait for another worker's result.

        Raises UnknownTask, StaleLease, UnknownBlob (an output that was not uploaded), RejectedTensor.
        """

    async def save_progress(self, worker_id: str, task_id: str, fence: int, checkpoint: Checkpoint) -> bool:
        """Keep the uploaded partial progress of a task; False where one that has got as far is kept already.

        Raises UnknownTask, StaleLease, UnknownBlob (it was not uploaded), RejectedTensor.
        """

    async def release(self, args: ReleaseArgs) -> None:
        """Give a task back, or leave the run. A lease that is gone already is no error."""

    async def status(self) -> dict[str, Any]:
        """The state of the run; JSON values only."""

    async def blob_path(self, digest: str) -> Path:
        """The file of a blob. Raises UnknownBlob."""

    async def upload_offset(self, task_id: str, fence: int, digest: str) -> int:
        """Bytes of an upload that are held already; the whole size once it was finished.

        Raises UnknownTask, StaleLease.
        """

    async def begin_upload(self, header: UploadHeader) -> UploadSink:
        """Open an upload at `header.offset`; at the whole size of a finished one, `finish` answers again.

        Bytes held beyond the offset are dropped. Raises UnknownTask, StaleLease, RejectedTensor (an output or tensors
        that the task does not have), DiskFull, and MalformedMessage where the offset lies beyond what is held.
        """
