"""What a worker needs of a coordinator; `worker.client.WorkerClient` is it over gRPC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from protocol.tasks import Capabilities, Checkpoint, TaskResult
from protocol.tensors import UploadHeader
from worker.client import Lease, Pulse, Welcome


class Coordinator(Protocol):
    """Every method raises one of protocol.errors.WIRE_ERRORS."""

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
