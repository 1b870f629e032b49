"""The gRPC services as thin servicers: messages to plain values, `Handlers`, and back. No decision is taken here.

Streams are consumed and produced chunk by chunk: one chunk in memory a call, files read and written off the event loop.
Exceptions pass through; protocol.interceptors turns them into statuses.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from coordinator.handlers import Handlers, HeartbeatArgs, HelloArgs, ReleaseArgs, UploadSink
from coordinator.ownership import check_owner
from protocol import dipaco_pb2 as pb
from protocol import dipaco_pb2_grpc as pb_grpc
from protocol.errors import UnknownBlob, one_line
from protocol.peer import certified_name
from protocol.tasks import Capabilities, MalformedMessage, decode_capabilities, decode_checkpoint, decode_result, encode
from protocol.tensors import DEFAULT_CHUNK_BYTES, UploadHeader, check_chunk, decode_header
from protocol.version import PROTOCOL_MAJOR, PROTOCOL_MINOR, check_worker_version, package_version

T = TypeVar("T")

MAX_LEASE_WAIT_S = 60.0
# Of what workers say of themselves, which is kept for as long as they are known.
MAX_CAPABILITIES_BYTES = 64 * 1024
MAX_LABEL_CHARACTERS = 200
_HEX = frozenset("0123456789abcdef")


def _digest(text: str) -> str:
    """The SHA-256 in hex; raises MalformedMessage, so that nothing else ever becomes a file name."""
    if len(text) != 64 or not _HEX.issuperset(text):
        raise MalformedMessage(f"a digest is 64 lower-case hex digits, not {text[:80]!r}")
    return text


def _label(text: str, what: str) -> str:
    """A short printable word; raises MalformedMessage. It is kept, and stands in logs and on screens."""
    if len(text) > MAX_LABEL_CHARACTERS or not text.isprintable():
        raise MalformedMessage(
            f"{what} must be at most {MAX_LABEL_CHARACTERS} printable characters, not {text[:40]!r} ({len(text)} long)"
        )
    return text


def _capabilities(data: bytes) -> Capabilities:
    if len(data) > MAX_CAPABILITIES_BYTES:
        raise MalformedMessage(f"capabilities of {len(data)} bytes; at most {MAX_CAPABILITIES_BYTES} are accepted")
    return decode_capabilities(data)


def _own(worker_id: str, context: Any) -> str:
    """The worker id of a call; raises Forbidden where it was given to another certificate than the caller's."""
    check_owner(worker_id, certified_name(context))
    return worker_id


async def _to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Await work that holds a file in a thread; where the call is cancelled, it is first let finish."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # nobody is there any more to be told
        raise


class CoordinatorService(pb_grpc.CoordinatorServicer):  # type: ignore[misc, unused-ignore]
    """The control plane."""

    def __init__(self, handlers: Handlers, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> None:
        self._handlers = handlers
        self._chunk_bytes = chunk_bytes

    async def Hello(self, request: Any, context: Any) -> Any:  # noqa: N802 (named by the .proto)
        check_worker_version(request.protocol_major, request.package_version)
        answer = await self._handlers.hello(
            HelloArgs(
                worker_name=_label(request.worker_name, "worker_name"),
                worker_id=_label(request.worker_id, "worker_id"),
                package_version=_label(request.package_version, "package_version"),
                capabilities=_capabilities(request.capabilities),
                identity=certified_name(context),
            )
        )
        return pb.HelloReply(
            protocol_major=PROTOCOL_MAJOR,
            protocol_minor=PROTOCOL_MINOR,
            package_version=package_version(),
            worker_id=answer.worker_id,
            run_name=answer.run_name,
            config_json=answer.config_json,
            heartbeat_s=answer.heartbeat_s,
            chunk_bytes=self._chunk_bytes,
        )

    async def Lease(self, request: Any, context: Any) -> Any:  # noqa: N802
        if not math.isfinite(request.wait_s) or request.wait_s < 0:
            raise MalformedMessage(f"wait_s must be a number of seconds from 0, not {request.wait_s}")
        wait_s = min(request.wait_s, MAX_LEASE_WAIT_S)
        answer = await self._handlers.lease(_own(request.worker_id, context), wait_s, frozenset(request.cached_digests))
        return pb.LeaseReply(
            task_id=answer.task_id,
            fence=answer.fence,
            lease_s=answer.lease_s,
            spec=b"" if answer.spec is None else encode(answer.spec),
            waiting_for=answer.waiting_for,
            finished=answer.finished,
            mtbf_s=answer.mtbf_s,
        )

    async def Heartbeat(self, request: Any, context: Any) -> Any:  # noqa: N802
        answer = await self._handlers.heartbeat(
            HeartbeatArgs(
                worker_id=_own(request.worker_id, context),
                task_id=request.task_id,
                fence=request.fence,
                steps=request.steps,
                loss=request.loss,
                tokens=request.tokens,
            )
        )
        return pb.HeartbeatReply(lost=answer.lost, lease_s=answer.lease_s)

    async def Complete(self, request: Any, context: Any) -> Any:  # noqa: N802
        result = decode_result(request.result)
        worker_id = _own(request.worker_id, context)
        duplicate = await _to_the_end(self._handlers.complete(worker_id, request.task_id, request.fence, result))
        return pb.CompleteReply(duplicate=duplicate)

    async def SaveProgress(self, request: Any, context: Any) -> Any:  # noqa: N802
        checkpoint = decode_checkpoint(request.checkpoint)
        worker_id = _own(request.worker_id, context)
        saving = self._handlers.save_progress(worker_id, request.task_id, request.fence, checkpoint)
        kept = await _to_the_end(saving)
        return pb.SaveProgressReply(kept=kept)

    async def Release(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._handlers.release(
            ReleaseArgs(
                worker_id=_own(request.worker_id, context),
                task_id=request.task_id,
                fence=request.fence,
                reason=one_line(request.reason),
                leaving=request.leaving,
            )
        )
        return pb.ReleaseReply()

    async def Status(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.StatusReply(status_json=json.dumps(await self._handlers.status()))


class BlobService(pb_grpc.BlobExchangeServicer):  # type: ignore[misc, unused-ignore]
    """The data plane: at most `chunk_bytes` of data in a message, both ways."""

    def __init__(self, handlers: Handlers, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> None:
        self._handlers = handlers
        self._chunk_bytes = chunk_bytes

    async def Fetch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        path = await self._handlers.blob_path(_digest(request.digest))
        try:
            file = await asyncio.to_thread(path.open, "rb")
        except FileNotFoundError:
            raise UnknownBlob(f"blob {request.digest} is no longer in the store") from None
        with file:
            total = file.seek(0, 2)
            if request.offset > total:
                raise MalformedMessage(f"offset {request.offset} lies behind the blob's {total} bytes")
            file.seek(request.offset)
            first = await _to_the_end(asyncio.to_thread(file.read, self._chunk_bytes))
            yield pb.Chunk(data=first, total_bytes=total)
            while data := await _to_the_end(asyncio.to_thread(file.read, self._chunk_bytes)):
                yield pb.Chunk(data=data)

    async def Offset(self, request: Any, context: Any) -> Any:  # noqa: N802
        offset = await self._handlers.upload_offset(request.task_id, request.fence, _digest(request.digest))
        return pb.OffsetReply(offset=offset)

    async def Upload(self, request_iterator: AsyncIterator[Any], context: Any) -> Any:  # noqa: N802
        messages = aiter(request_iterator)
        opening = await anext(messages, None)
        if opening is None or not opening.header:
            raise MalformedMessage("an upload starts with its header; this stream does not")
        header = decode_header(opening.header)
        _own(header.worker_id, context)
        sink = await self._handlers.begin_upload(header)
        finished = False
        try:
            await self._receive(header, opening.data, messages, sink)
            size = await _to_the_end(sink.finish())
            finished = True
        finally:
            if not finished:
                with contextlib.suppress(asyncio.CancelledError):
                    await _to_the_end(sink.abort())
        return pb.UploadReply(received_bytes=size)

    async def _receive(self, header: UploadHeader, data: bytes, messages: AsyncIterator[Any], sink: UploadSink) -> None:
        """Write the stream to the sink in order; raises MalformedMessage where its length is not the declared one."""
        received = header.offset
        while True:
            received += len(check_chunk(data, self._chunk_bytes))
            if received > header.size:
                raise MalformedMessage(f"upload of {header.output!r} goes on after the declared {header.size} bytes")
            if data:
                await _to_the_end(sink.write(data))
            message = await anext(messages, None)
            if message is None:
                break
            if message.header:
                raise MalformedMessage(f"upload of {header.output!r}: a second header in one stream")
            data = message.data
        if received < header.size:
            raise MalformedMessage(
                f"upload of {header.output!r} ends after {received} of {header.size} bytes; resume it from there"
            )
