"""A coordinator's server on real loopback gRPC, with handlers that only keep books, for the tests of both ends."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from coordinator.handlers import HeartbeatAnswer, HeartbeatArgs, HelloAnswer, HelloArgs, LeaseAnswer, ReleaseArgs
from coordinator.ownership import new_worker_id
from coordinator.server import RunningServer, start_server
from protocol.address import Address
from protocol.errors import CorruptBlob, StaleLease, UnknownBlob, UnknownTask, UnknownWorker
from protocol.security import ServerSecurity
from protocol.tasks import BlobRef, Capabilities, Checkpoint, MalformedMessage, PackSpec, TaskResult
from protocol.tensors import UploadHeader

T = TypeVar("T")

TASK, FENCE = "corpus/PACK/0/0", 3
CHUNK_BYTES = 64 * 1024
CAPABILITIES = Capabilities(devices=["cpu"], memory_bytes=10**9, threads=1, fingerprint="test")
SPEC = PackSpec(mode="tokenize", text=BlobRef(digest="a" * 64, size=5))


def upload_header(data: bytes, **changes: Any) -> UploadHeader:
    """The header under which `data` is uploaded for the one task there is."""
    values: dict[str, Any] = {
        "task_id": TASK,
        "fence": FENCE,
        "output": "tokens",
        "kind": "tokens",
        "digest": hashlib.sha256(data).hexdigest(),
        "size": len(data),
    }
    return UploadHeader.model_validate(values | changes)


class BookSink:
    """Keeps what arrives in memory."""

    def __init__(self, books: BookHandlers, header: UploadHeader) -> None:
        self._books = books
        self._header = header
        self._bytes = books.uploads.setdefault(header.digest, bytearray())
        del self._bytes[header.offset :]

    async def write(self, data: bytes) -> None:
        await asyncio.to_thread(self._books.on_write, data)
        self._bytes += data
        self._books.written.set()

    async def finish(self) -> int:
        if hashlib.sha256(self._bytes).hexdigest() != self._header.digest:
            self._bytes.clear()
            raise CorruptBlob("the bytes are not the announced ones")
        return len(self._bytes)

    async def abort(self) -> None:
        self._books.aborted.set()


class BookHandlers:
    """Implements `coordinator.handlers.Handlers` with one task, and remembers what it was asked."""

    def __init__(self, blobs: Path) -> None:
        self.blobs = blobs
        self.workers: set[str] = set()
        self.calls: list[Any] = []
        self.offsets: list[int] = []
        self.uploads: dict[str, bytearray] = {}
        self.completed: set[str] = set()
        self.written = threading.Event()
        self.aborted = threading.Event()
        self.on_write: Callable[[bytes], None] = lambda data: None
        self.on_status: Callable[[], dict[str, Any]] = lambda: {"stages": []}

    def add_blob(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        (self.blobs / digest).write_bytes(data)
        return digest

    async def hello(self, args: HelloArgs) -> HelloAnswer:
        self.calls.append(args)
        fresh = new_worker_id(len(self.workers), args.identity) if args.identity else f"worker-{len(self.workers)}"
        worker_id = args.worker_id or fresh
        self.workers.add(worker_id)
        return HelloAnswer(worker_id, "test run", '{"name": "test run"}', 2.0)

    async def lease(self, worker_id: str, wait_s: float, cached_digests: frozenset[str]) -> LeaseAnswer:
        self._check_worker(worker_id)
        self.calls.append((wait_s, cached_digests))
        if "none" in cached_digests:
            return LeaseAnswer(waiting_for="module 0.1 is being stepped")
        return LeaseAnswer(TASK, FENCE, 12.0, SPEC)

    async def heartbeat(self, args: HeartbeatArgs) -> HeartbeatAnswer:
        self._check_worker(args.worker_id)
        self.calls.append(args)
        return HeartbeatAnswer(lost=args.fence != FENCE, lease_s=12.0)

    async def complete(self, worker_id: str, task_id: str, fence: int, result: TaskResult) -> bool:
        self._check_task(task_id, fence)
        self.calls.append(result)
        duplicate = task_id in self.completed
        self.completed.add(task_id)
        return duplicate

    async def save_progress(self, worker_id: str, task_id: str, fence: int, checkpoint: Checkpoint) -> bool:
        self._check_worker(worker_id)
        self._check_task(task_id, fence)
        self.calls.append(checkpoint)
        return True

    async def release(self, args: ReleaseArgs) -> None:
        self._check_worker(args.worker_id)
        self.calls.append(args)

    async def status(self) -> dict[str, Any]:
        return self.on_status()

    async def blob_path(self, digest: str) -> Path:
        self.calls.append(digest)
        if not (self.blobs / digest).is_file():
            raise UnknownBlob(f"the store does not hold {digest}")
        return self.blobs / digest

    async def upload_offset(self, task_id: str, fence: int, digest: str) -> int:
        self._check_task(task_id, fence)
        return len(self.uploads.get(digest, b""))

    async def begin_upload(self, header: UploadHeader) -> BookSink:
        self._check_task(header.task_id, header.fence)
        if header.offset > len(self.uploads.get(header.digest, b"")):
            raise MalformedMessage("offset lies beyond what is held")
        self.offsets.append(header.offset)
        return BookSink(self, header)

    def _check_worker(self, worker_id: str) -> None:
        if worker_id not in self.workers:
            raise UnknownWorker(f"worker {worker_id!r} is not known; say hello first")

    def _check_task(self, task_id: str, fence: int) -> None:
        if task_id != TASK:
            raise UnknownTask(f"there is no task {task_id!r}")
        if fence != FENCE:
            raise StaleLease(f"task {task_id} is leased under fence {FENCE}, not {fence}")


class Loopback:
    """A server in a thread with an event loop of its own; it can be stopped and started again on the same port."""

    def __init__(self, handlers: BookHandlers, security: ServerSecurity | None = None) -> None:
        self.handlers = handlers
        self._security = security
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="loopback")
        self._thread.start()
        self._server: RunningServer | None = None
        self.address = Address("127.0.0.1", 0)

    def start(self) -> None:
        starting = start_server(self.handlers, str(self.address), security=self._security, chunk_bytes=CHUNK_BYTES)
        self._server = self._run(starting)
        self.address = self._server.address

    def stop(self) -> None:
        """End all calls at once, as a killed process would."""
        if self._server is not None:
            self._run(self._server.stop(0.0))
            self._server = None

    def __enter__(self) -> Loopback:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)
