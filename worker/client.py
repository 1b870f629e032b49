"""The worker's side of the wire, and that of `dipaco status`: plain values in and out, protocol.errors raised.

Every call is idempotent, so all are tried again here, and only here, while nobody answers; transfers go on where they
were cut off. A coordinator that was restarted and does not know the worker any more is greeted again on the way.
Threads may share a client.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol import dipaco_pb2 as pb
from protocol import dipaco_pb2_grpc as pb_grpc
from protocol.address import Address
from protocol.connection import Connection, ignore
from protocol.credentials import Credentials
from protocol.errors import CorruptBlob, UnknownWorker
from protocol.joinfile import JoinFile
from protocol.patience import Patience
from protocol.tasks import (
    Capabilities,
    Checkpoint,
    EvaluateSpec,
    FeaturizeSpec,
    MalformedMessage,
    PackSpec,
    TaskResult,
    TrainSpec,
    decode_spec,
    encode,
)
from protocol.tensors import DEFAULT_CHUNK_BYTES, UploadHeader, file_chunks
from protocol.version import PROTOCOL_MAJOR, PROTOCOL_MINOR, package_version
from worker.download import Download

CALL_DEADLINE_S = 30.0
HEARTBEAT_DEADLINE_S = 10.0
RELEASE_PATIENCE_S = 3.0
# Of one call: a coordinator that forgets a worker so often does it for another reason than a restart.
MAX_GREETINGS = 10
# A transfer that takes longer is cut here and goes on where it was: a stuck peer cannot hold it for ever.
TRANSFER_DEADLINE_S = 600.0


@dataclass(frozen=True, slots=True)
class Welcome:
    """What the coordinator tells a worker that joins."""

    worker_id: str
    run_name: str
    config_json: str
    heartbeat_s: float
    chunk_bytes: int


@dataclass(frozen=True, slots=True)
class Lease:
    """A task (`spec` is set), or why there is none (`waiting_for`), or that the run is over (`finished`).

    `mtbf_s`: the mean time between failures of workers in this run.
    """

    task_id: str
    fence: int
    lease_s: float
    spec: PackSpec | FeaturizeSpec | TrainSpec | EvaluateSpec | None
    waiting_for: str
    finished: bool
    mtbf_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Pulse:
    """The answer to a heartbeat: whether the lease is gone, else the seconds it lasts without another."""

    lost: bool
    lease_s: float


def _shorter(limit_s: float | None, other_s: float) -> float:
    return other_s if limit_s is None else min(limit_s, other_s)


class WorkerClient:
    """One coordinator as a worker sees it. Every method raises the exceptions of protocol.errors.WIRE_ERRORS.

    `patience_s`: how long a call is tried while nobody answers (None: no limit). `say` is told, in one sentence, when
    waiting starts and when it is over.
    """

    def __init__(
        self,
        address: Address,
        join: JoinFile | Credentials | None = None,
        *,
        insecure: bool = False,
        patience_s: float | None = None,
        say: Callable[[str], None] = ignore,
    ) -> None:
        credentials = Credentials(join) if isinstance(join, JoinFile) else join
        self._connection = Connection(address, credentials, insecure=insecure, say=say)
        self._control = pb_grpc.CoordinatorStub(self._connection.channel)
        self._blobs = pb_grpc.BlobExchangeStub(self._connection.channel)
        self._patience_s = patience_s
        self._greeting: Any = None
        self._greeting_lock = threading.Lock()
        self._chunk_bytes = DEFAULT_CHUNK_BYTES

    # --- control plane ----------------------------------------------------------------------------------------------

    def hello(self, worker_name: str, capabilities: Capabilities, worker_id: str = "") -> Welcome:
        """Join the run, or come back under the id given before. Raises VersionMismatch, NotAllowed."""
        greeting = pb.HelloRequest(
            protocol_major=PROTOCOL_MAJOR,
            protocol_minor=PROTOCOL_MINOR,
            package_version=package_version(),
            worker_name=worker_name,
            capabilities=encode(capabilities),
            worker_id=worker_id,
        )
        reply = self._connection.call(self._control.Hello, greeting, CALL_DEADLINE_S, self._patience_s)
        greeting.worker_id = reply.worker_id
        self._greeting = greeting
        self._chunk_bytes = int(reply.chunk_bytes) or DEFAULT_CHUNK_BYTES
        return Welcome(reply.worker_id, reply.run_name, reply.config_json, reply.heartbeat_s, self._chunk_bytes)

    def lease(self, worker_id: str, wait_s: float, cached_digests: Sequence[str] = ()) -> Lease:
        """Ask for a task; the coordinator may keep the call for `wait_s` seconds."""
        request = pb.LeaseRequest(worker_id=worker_id, wait_s=wait_s, cached_digests=cached_digests)
        reply = self._known_call(self._control.Lease, request, wait_s + CALL_DEADLINE_S, self._patience_s)
        spec = decode_spec(reply.spec) if reply.task_id else None
        return Lease(reply.task_id, reply.fence, reply.lease_s, spec, reply.waiting_for, reply.finished, reply.mtbf_s)

    def heartbeat(
        self, worker_id: str, task_id: str, fence: int, *, steps: int = 0, loss: float = float("nan"), tokens: int = 0
    ) -> Pulse:
        """Extend the lease and report progress; `loss` in nats per token. Tried once: the next one follows anyway."""
        request = pb.HeartbeatRequest(
            worker_id=worker_id, task_id=task_id, fence=fence, steps=steps, loss=loss, tokens=tokens
        )
        reply = self._known_call(self._control.Heartbeat, request, HEARTBEAT_DEADLINE_S, patience_s=0.0)
        return Pulse(reply.lost, reply.lease_s)

    def complete(self, worker_id: str, task_id: str, fence: int, result: TaskResult) -> bool:
        """Make the task's uploaded outputs count; True where they did already. Raises StaleLease."""
        request = pb.CompleteRequest(worker_id=worker_id, task_id=task_id, fence=fence, result=encode(result))
        return bool(self._known_call(self._control.Complete, request, CALL_DEADLINE_S, self._patience_s).duplicate)

    def save_progress(self, worker_id: str, task_id: str, fence: int, checkpoint: Checkpoint) -> bool:
        """Keep an uploaded checkpoint for the next holder; False where another is kept. Raises StaleLease."""
        request = pb.SaveProgressRequest(
            worker_id=worker_id, task_id=task_id, fence=fence, checkpoint=encode(checkpoint)
        )
        return bool(self._known_call(self._control.SaveProgress, request, CALL_DEADLINE_S, self._patience_s).kept)

    def release(self, worker_id: str, task_id: str, fence: int, reason: str = "", *, leaving: bool = False) -> None:
        """Give a task back (with a reason: the attempt failed), or leave the run (`task_id` may be empty).

        Tried for a moment only, since a lease that is not given back ends by itself.
        """
        request = pb.ReleaseRequest(worker_id=worker_id, task_id=task_id, fence=fence, reason=reason, leaving=leaving)
        patience_s = _shorter(self._patience_s, RELEASE_PATIENCE_S)
        self._known_call(self._control.Release, request, RELEASE_PATIENCE_S, patience_s)

    def status(self) -> dict[str, Any]:
        """The state of the run."""
        call = self._connection.call
        reply = call(self._control.Status, pb.StatusRequest(), CALL_DEADLINE_S, self._patience_s)
        status: dict[str, Any] = json.loads(reply.status_json)
        return status

    # --- data plane -------------------------------------------------------------------------------------------------

    def fetch_to(self, digest: str, path: Path, progress: Callable[[int], None] = ignore) -> int:
        """Bring the blob to `path`; returns the bytes that came over the wire this time.

        What an earlier attempt left in `path`.part is continued. The file appears whole, verified and durable, or not
        at all. `progress` is told the bytes of each chunk. Raises UnknownBlob, CorruptBlob, DiskFull.
        """
        patience = self._connection.patience(self._patience_s)
        with Download(digest, path) as download:
            while True:
                try:
                    self._connection.patiently(lambda: self._fetch_rest(download, patience, progress), patience)
                    download.finish()
                    return download.received_bytes
                except (CorruptBlob, MalformedMessage):
                    if not download.resumed:
                        raise
                    download.restart()

    def upload(self, path: Path, header: UploadHeader, progress: Callable[[int], None] = ignore) -> int:
        """Send a task's output; returns the bytes that went over the wire.

        What the coordinator holds is not sent again; `header.offset` is ignored. Raises StaleLease, RejectedTensor,
        CorruptBlob (after a second attempt), DiskFull.
        """
        sending = _Sending(path, header, self._connection.patience(self._patience_s), progress)
        try:
            self._connection.patiently(lambda: self._upload_rest(sending, self._offset(header)), sending.patience)
        except CorruptBlob:
            self._connection.patiently(lambda: self._upload_rest(sending, 0), sending.patience)
        return sending.sent_bytes

    def close(self) -> None:
        """End the calls under way (they raise Unavailable) and every later one. Any thread may call it."""
        self._connection.close()

    def __enter__(self) -> WorkerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- one attempt ------------------------------------------------------------------------------------------------

    def _fetch_rest(self, download: Download, patience: Patience, progress: Callable[[int], None]) -> None:
        request = pb.FetchRequest(digest=download.digest, offset=download.offset)
        with contextlib.closing(self._connection.stream(self._blobs.Fetch, request, TRANSFER_DEADLINE_S)) as chunks:
            for chunk in chunks:
                download.append(chunk.data, chunk.total_bytes)
                patience.progressed()
                progress(len(chunk.data))

    def _offset(self, header: UploadHeader) -> int:
        request = pb.OffsetRequest(task_id=header.task_id, fence=header.fence, digest=header.digest)
        return int(self._connection.once(self._blobs.Offset, request, CALL_DEADLINE_S).offset)

    def _upload_rest(self, sending: _Sending, offset: int) -> None:
        messages = sending.messages(offset, self._chunk_bytes)
        self._connection.once(self._blobs.Upload, messages, TRANSFER_DEADLINE_S)

    def _known_call(self, method: Callable[..., Any], request: Any, deadline_s: float, patience_s: float | None) -> Any:
        """A call that needs the coordinator to know the worker: one that forgot it is greeted again.

        More than once, since a coordinator may restart between the greeting and the call.
        """
        call = self._connection.call
        for _ in range(MAX_GREETINGS):
            try:
                return call(method, request, deadline_s, patience_s)
            except UnknownWorker:
                if self._greeting is None:
                    raise
                with self._greeting_lock:
                    call(self._control.Hello, self._greeting, CALL_DEADLINE_S, patience_s)
        return call(method, request, deadline_s, patience_s)


class _Sending:
    """One upload over all its attempts: what is sent, and how much of it has been handed to the wire."""

    def __init__(self, path: Path, header: UploadHeader, patience: Patience, progress: Callable[[int], None]) -> None:
        self.patience = patience
        self.sent_bytes = 0
        self._path = path
        self._header = header
        self._progress = progress
        self._farthest = 0

    def messages(self, offset: int, chunk_bytes: int) -> Iterator[Any]:
        """The header, then the file from `offset` on. Having got farther than any attempt before renews patience."""
        if offset > self._farthest:
            self._farthest = offset
            self.patience.progressed()
        yield pb.UploadChunk(header=encode(self._header.model_copy(update={"offset": offset})))
        for data in file_chunks(self._path, offset, chunk_bytes):
            yield pb.UploadChunk(data=data)
            self.sent_bytes += len(data)
            self._progress(len(data))
