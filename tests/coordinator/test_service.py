"""The servicers on real loopback gRPC, spoken to by raw stubs: good streams, and whatever else a network may bring."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import msgpack
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import dipaco_pb2 as pb
from protocol import dipaco_pb2_grpc as pb_grpc
from protocol.certificates import write_certificates
from protocol.errors import StaleLease
from protocol.security import CERTS_DIR, COORDINATOR_NAME, load_security
from protocol.tasks import BlobRef, Checkpoint, TaskResult, encode
from protocol.tensors import MAX_HEADER_BYTES
from protocol.version import PROTOCOL_MAJOR
from tests.loopback import CAPABILITIES, CHUNK_BYTES, FENCE, TASK, BookHandlers, Loopback, upload_header

DATA = os.urandom(5 * CHUNK_BYTES + 3)
REFUSED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.DATA_LOSS,
}


class Stubs:
    """Raw stubs, and the server's handlers behind them."""

    def __init__(self, loopback: Loopback, channel: Any) -> None:
        self.handlers = loopback.handlers
        self.channel = channel
        self.control = pb_grpc.CoordinatorStub(channel)
        self.blobs = pb_grpc.BlobExchangeStub(channel)

    def upload(self, messages: Iterable[Any]) -> Any:
        return self.blobs.Upload(iter(messages), timeout=20)

    def check_alive(self) -> None:
        assert json.loads(self.control.Status(pb.StatusRequest(), timeout=20).status_json) == {"stages": []}


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stubs]:
    with (
        Loopback(BookHandlers(tmp_path_factory.mktemp("blobs"))) as loopback,
        grpc.insecure_channel(str(loopback.address)) as channel,
    ):
        yield Stubs(loopback, channel)


@pytest.fixture(autouse=True)
def _clean_books(stubs: Stubs) -> None:
    stubs.handlers.__init__(stubs.handlers.blobs)  # type: ignore[misc]


def opening(data: bytes, **changes: Any) -> Any:
    return pb.UploadChunk(header=encode(upload_header(data, **changes)))


def chunks(data: bytes, size: int = CHUNK_BYTES) -> list[Any]:
    return [pb.UploadChunk(data=data[start : start + size]) for start in range(0, len(data), size)]


def refusal(call: Any, *arguments: Any) -> tuple[grpc.StatusCode, str]:
    """Status and message of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments)
    return caught.value.code(), caught.value.details() or ""


def test_fetch_streams_small_chunks_from_any_offset(stubs: Stubs) -> None:
    digest = stubs.handlers.add_blob(DATA)
    for offset in (0, 1, CHUNK_BYTES, len(DATA) - 1, len(DATA)):
        got = list(stubs.blobs.Fetch(pb.FetchRequest(digest=digest, offset=offset), timeout=20))
        assert b"".join(chunk.data for chunk in got) == DATA[offset:]
        assert got[0].total_bytes == len(DATA)
        assert max(len(chunk.data) for chunk in got) <= CHUNK_BYTES


@pytest.mark.parametrize("digest", ["", "../secret", "A" * 64, "a" * 63, "a" * 65])
def test_only_a_digest_names_a_blob(stubs: Stubs, digest: str) -> None:
    code, details = refusal(list, stubs.blobs.Fetch(pb.FetchRequest(digest=digest), timeout=20))
    assert (code, "64 lower-case hex digits" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    code, _ = refusal(stubs.blobs.Offset, pb.OffsetRequest(task_id=TASK, fence=FENCE, digest=digest))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert stubs.handlers.calls == []


def test_fetch_refuses_an_offset_behind_the_end(stubs: Stubs) -> None:
    digest = stubs.handlers.add_blob(DATA)
    code, details = refusal(list, stubs.blobs.Fetch(pb.FetchRequest(digest=digest, offset=len(DATA) + 1), timeout=20))
    assert (code, f"{len(DATA)} bytes" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)


def test_upload_keeps_the_order_of_the_stream(stubs: Stubs) -> None:
    reply = stubs.upload([opening(DATA), *chunks(DATA, 1000)])
    assert reply.received_bytes == len(DATA)
    assert list(stubs.handlers.uploads.values()) == [bytearray(DATA)]


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "starts with its header"),
        (chunks(DATA), "starts with its header"),
        ([pb.UploadChunk(header=b"\xc1")], "msgpack"),
        ([pb.UploadChunk(header=msgpack.packb({"task_id": TASK}))], "malformed upload header"),
        ([pb.UploadChunk(header=bytes(MAX_HEADER_BYTES + 1))], "at most"),
        ([opening(DATA), pb.UploadChunk(data=DATA[: CHUNK_BYTES + 1])], f"at most {CHUNK_BYTES}"),
        ([opening(DATA), *chunks(DATA), *chunks(b"x")], "goes on after the declared"),
        ([opening(DATA), *chunks(DATA[:-1])], f"ends after {len(DATA) - 1} of {len(DATA)}"),
        ([opening(DATA), opening(DATA)], "second header"),
        ([opening(DATA, offset=7)], "beyond what is held"),
    ],
)
def test_a_bad_upload_is_one_sentence(stubs: Stubs, messages: list[Any], sentence: str) -> None:
    code, details = refusal(stubs.upload, messages)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert sentence in details
    assert "\n" not in details
    stubs.check_alive()


def test_an_endless_upload_is_cut_off_and_resumable(stubs: Stubs) -> None:
    sent = 0

    def endless() -> Iterator[Any]:
        nonlocal sent
        yield opening(DATA)
        yield from chunks(DATA)
        while True:
            sent += 1
            yield pb.UploadChunk(data=bytes(CHUNK_BYTES))

    code, _ = refusal(stubs.upload, endless())
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert sent < 1000
    assert stubs.handlers.aborted.is_set()
    request = pb.OffsetRequest(task_id=TASK, fence=FENCE, digest=hashlib.sha256(DATA).hexdigest())
    assert stubs.blobs.Offset(request, timeout=20).offset == len(DATA)


def test_what_a_client_sent_before_it_vanished_is_kept(stubs: Stubs) -> None:
    over = threading.Event()

    def half() -> Iterator[Any]:
        yield opening(DATA)
        yield from chunks(DATA)[:2]
        over.wait(20)

    call = stubs.blobs.Upload.future(half(), timeout=20)
    while len(next(iter(stubs.handlers.uploads.values()), b"")) < 2 * CHUNK_BYTES:
        assert stubs.handlers.written.wait(20)
    call.cancel()
    over.set()
    assert stubs.handlers.aborted.wait(20)
    request = pb.OffsetRequest(task_id=TASK, fence=FENCE, digest=hashlib.sha256(DATA).hexdigest())
    assert stubs.blobs.Offset(request, timeout=20).offset == 2 * CHUNK_BYTES
    rest = stubs.upload([opening(DATA, offset=2 * CHUNK_BYTES), *chunks(DATA[2 * CHUNK_BYTES :])])
    assert rest.received_bytes == len(DATA)


def test_a_write_under_way_ends_before_the_sink_is_let_go(stubs: Stubs) -> None:
    writing, may_end, order = threading.Event(), threading.Event(), list[str]()

    def slow(data: bytes) -> None:
        writing.set()
        may_end.wait(20)
        order.append("wrote")

    stubs.handlers.on_write = slow
    call = stubs.blobs.Upload.future(iter([opening(DATA), *chunks(DATA)]), timeout=20)
    assert writing.wait(20)
    call.cancel()
    assert not stubs.handlers.aborted.wait(0.1)
    may_end.set()
    assert stubs.handlers.aborted.wait(20)
    assert order == ["wrote"]


CHECKPOINT = Checkpoint(
    blob=BlobRef(digest="a" * 64, size=1),
    steps=1,
    tokens=1,
    sequences=1,
    loss_sum=0.5,
    step_losses=[1.0],
    seconds=1.0,
)


@pytest.mark.parametrize(
    ("handler", "rpc", "request_"),
    [
        ("complete", "Complete", pb.CompleteRequest(task_id=TASK, fence=FENCE, result=encode(TaskResult(outputs={})))),
        ("save_progress", "SaveProgress", pb.SaveProgressRequest(task_id=TASK, checkpoint=encode(CHECKPOINT))),
    ],
)
def test_a_result_on_its_way_into_the_store_gets_there_whether_or_not_its_client_waits(
    stubs: Stubs, monkeypatch: pytest.MonkeyPatch, handler: str, rpc: str, request_: Any
) -> None:
    moving, may_end, over = threading.Event(), threading.Event(), threading.Event()

    def move() -> None:
        moving.set()
        may_end.wait(20)

    async def handle(*_: object) -> bool:
        await asyncio.to_thread(move)
        over.set()
        raise StaleLease("nobody is there any more to be told")

    monkeypatch.setattr(stubs.handlers, handler, handle)
    call = getattr(stubs.control, rpc).future(request_, timeout=20)
    assert moving.wait(20)
    call.cancel()
    assert not over.wait(0.2)
    may_end.set()
    assert over.wait(20), "the call was cut off between the store and the transaction"


def test_a_failing_disk_is_told_by_name(stubs: Stubs) -> None:
    def full(data: bytes) -> None:
        raise OSError(28, "No space left on device", "spool/part")

    stubs.handlers.on_write = full
    with pytest.raises(grpc.RpcError) as caught:
        stubs.upload([opening(DATA), *chunks(DATA)])
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "no space is left" in (caught.value.details() or "")
    trailer: Any = caught.value.trailing_metadata()
    assert dict(trailer)["dipaco-error"] == "WaitingForRoom"


def test_the_wait_for_a_lease_is_bounded(stubs: Stubs) -> None:
    stubs.handlers.workers.add("w")
    stubs.control.Lease(pb.LeaseRequest(worker_id="w", wait_s=1e9), timeout=20)
    assert stubs.handlers.calls[-1][0] <= 60
    for wait_s in (-1.0, float("nan"), float("inf")):
        code, _ = refusal(stubs.control.Lease, pb.LeaseRequest(worker_id="w", wait_s=wait_s))
        assert code == grpc.StatusCode.INVALID_ARGUMENT


def test_another_major_version_is_refused(stubs: Stubs) -> None:
    hello = pb.HelloRequest(protocol_major=PROTOCOL_MAJOR + 1, package_version="9.0", capabilities=encode(CAPABILITIES))
    code, details = refusal(stubs.control.Hello, hello)
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "9.0" in details
    assert "install dipaco==" in details
    assert stubs.handlers.workers == set()


# --- whatever arrives -----------------------------------------------------------------------------------------------

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = ["task_id", "fence", "output", "kind", "codec", "tensors", "digest", "size", "offset", "outputs", "devices"]
NEARLY = st.dictionaries(st.sampled_from(KEYS), PLAIN, max_size=8)
RUBBISH = st.binary(max_size=200) | PLAIN.map(msgpack.packb) | NEARLY.map(msgpack.packb)
BOUNDED = settings(max_examples=60, deadline=None)


@BOUNDED
@given(data=RUBBISH, task_id=st.text(max_size=20), fence=st.integers(0, 2**64 - 1))
def test_rubbish_in_control_calls_is_refused(stubs: Stubs, data: bytes, task_id: str, fence: int) -> None:
    hello = pb.HelloRequest(protocol_major=PROTOCOL_MAJOR, capabilities=data)
    assert refusal(stubs.control.Hello, hello)[0] in REFUSED
    complete = pb.CompleteRequest(worker_id="w", task_id=task_id, fence=fence, result=data)
    assert refusal(stubs.control.Complete, complete)[0] in REFUSED
    genuine = pb.CompleteRequest(worker_id="w", task_id=task_id, fence=fence, result=encode(TaskResult(outputs={})))
    assert refusal(stubs.control.Complete, genuine)[0] in REFUSED
    assert stubs.handlers.calls == []


@BOUNDED
@given(header=RUBBISH, rest=st.lists(st.binary(max_size=100), max_size=3))
def test_rubbish_in_uploads_is_refused(stubs: Stubs, header: bytes, rest: list[bytes]) -> None:
    messages = [pb.UploadChunk(header=header), *[pb.UploadChunk(data=data) for data in rest]]
    assert refusal(stubs.upload, messages)[0] in REFUSED
    assert stubs.handlers.uploads == {}


@BOUNDED
@given(changes=NEARLY)
def test_a_header_with_one_thing_wrong_does_not_hurt(stubs: Stubs, changes: dict[str, Any]) -> None:
    header = upload_header(DATA).model_dump() | changes
    messages = [pb.UploadChunk(header=msgpack.packb(header)), *chunks(DATA)]
    try:
        stubs.upload(messages)
    except grpc.RpcError as error:
        assert error.code() in REFUSED  # noqa: PT017 (it may also pass)
    stubs.check_alive()


def test_bytes_that_are_no_protobuf_do_not_stop_the_server(stubs: Stubs) -> None:
    raw = stubs.channel.unary_unary("/dipaco.v1.Coordinator/Hello")
    refusal(raw, b"\xff" * 50)
    unknown = stubs.channel.unary_unary("/dipaco.v1.Coordinator/Nonsense")
    assert refusal(unknown, b"")[0] == grpc.StatusCode.UNIMPLEMENTED
    stubs.check_alive()


def test_a_message_above_grpcs_own_limit_is_refused(stubs: Stubs) -> None:
    code, _ = refusal(stubs.upload, [opening(DATA), pb.UploadChunk(data=bytes(5 * 1024 * 1024))])
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    stubs.check_alive()


# --- around the services --------------------------------------------------------------------------------------------


def services(channel: Any, metadata: tuple[tuple[str, str], ...] = ()) -> set[str]:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    [reply] = stub.ServerReflectionInfo(iter([request]), timeout=20, metadata=metadata)
    return {service.name for service in reply.list_services_response.service}


def test_health_and_reflection_answer(stubs: Stubs) -> None:
    health = health_pb2_grpc.HealthStub(stubs.channel)
    for service in ("", "dipaco.v1.Coordinator", "dipaco.v1.BlobExchange"):
        reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    assert services(stubs.channel) >= {"dipaco.v1.Coordinator", "dipaco.v1.BlobExchange", "grpc.health.v1.Health"}


def test_with_certificates_only_health_needs_no_token(tmp_path: Path) -> None:
    join = write_certificates(tmp_path / CERTS_DIR, [])
    with Loopback(BookHandlers(tmp_path), load_security(tmp_path)) as loopback:
        credentials = grpc.ssl_channel_credentials(join.ca_pem.encode())
        options = [("grpc.ssl_target_name_override", COORDINATOR_NAME)]
        with grpc.secure_channel(str(loopback.address), credentials, options) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            assert health.Check(health_pb2.HealthCheckRequest(), timeout=20).status == 1
            assert refusal(services, channel)[0] == grpc.StatusCode.UNAUTHENTICATED
            assert "dipaco.v1.Coordinator" in services(channel, (("authorization", f"Bearer {join.token}"),))
            for value in (join.token, f"Bearer {join.token}x", f"bearer {join.token}", "Bearer "):
                status = pb_grpc.CoordinatorStub(channel).Status
                with pytest.raises(grpc.RpcError) as caught:
                    status(pb.StatusRequest(), timeout=20, metadata=(("authorization", value),))
                assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        with grpc.secure_channel(str(loopback.address), credentials) as by_address:  # 127.0.0.1 is one of the SANs
            assert health_pb2_grpc.HealthStub(by_address).Check(health_pb2.HealthCheckRequest(), timeout=20).status == 1
