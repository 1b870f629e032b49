"""Peers that lie, break off, repeat and flood, over real gRPC against a real coordinator, whose run must not notice.

Every call is answered, with a status that says what was wrong; nothing they send counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import msgpack
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import tensor_file
from protocol import dipaco_pb2 as pb
from protocol import dipaco_pb2_grpc as pb_grpc
from protocol.tasks import Capabilities, TaskResult, decode_spec, encode
from protocol.version import PROTOCOL_MAJOR
from tests.small_run import PATIENCE_S, SmallRun, undisturbed_digest
from worker.probe import fingerprint

CLEAR = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "DATA_LOSS", "RESOURCE_EXHAUSTED"}
METHODS = ["Hello", "Lease", "Heartbeat", "Complete", "Release", "Status"]
CAPABILITIES = Capabilities(devices=["cpu"], memory_bytes=1 << 40, threads=64, fingerprint=fingerprint("cpu"))
FEW = settings(max_examples=40, deadline=None, derandomize=True)
WORDS = st.text(max_size=30)
NUMBERS = st.one_of(st.integers(0, 3), st.just(2**64 - 1), st.integers(0, 2**64 - 1))
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)
PACKED = st.binary(max_size=60) | PLAIN.map(msgpack.packb)
DIGEST = st.text("0123456789abcdef", min_size=64, max_size=64)
# The coordinator runs in a thread of this process. While testing, its calls are checked by beartype, which draws from
# the global `random`; hypothesis would blame its own strategies for that.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the .random. module inside strategies")
# Stands for the stranger's own ids, which hypothesis must not know: they differ from run to run.
OWN = "own"


def status_of(call: Callable[[], Any]) -> str:
    """The name of the status that a call is answered with."""
    try:
        answer = call()
        if hasattr(answer, "cancel"):
            list(answer)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


class Stranger:
    """A peer with raw stubs that holds the lease of a TRAIN task and means no good."""

    def __init__(self, run: SmallRun, channel: Any) -> None:
        self.run = run
        self.channel = channel
        self.control = pb_grpc.CoordinatorStub(channel)
        self.blobs = pb_grpc.BlobExchangeStub(channel)
        self.worker_id = self.hello("stranger").worker_id
        lease = self.control.Lease(pb.LeaseRequest(worker_id=self.worker_id, wait_s=20), timeout=60)
        self.task_id, self.fence = lease.task_id, lease.fence
        self.spec: Any = decode_spec(lease.spec)
        self.header = self._true_header()

    def hello(self, name: str, **more: Any) -> Any:
        request = pb.HelloRequest(protocol_major=PROTOCOL_MAJOR, worker_name=name, capabilities=encode(CAPABILITIES))
        request.MergeFrom(pb.HelloRequest(**more))
        return self.control.Hello(request, timeout=30)

    def keep(self) -> None:
        """Stay alive and keep the lease."""
        beat = pb.HeartbeatRequest(worker_id=self.worker_id, task_id=self.task_id, fence=self.fence)
        assert not self.control.Heartbeat(beat, timeout=30).lost

    def _true_header(self) -> dict[str, Any]:
        """The header of a contribution to the first module of the path, and its tensors at zero in `self.tensors`."""
        ref = self.spec.path.modules[0]
        shapes = tensor_file.shapes(self.run.run_dir / "blobs" / ref.blob.digest)
        self.tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        return {
            "worker_id": self.worker_id,
            "task_id": self.task_id,
            "fence": self.fence,
            "output": ref.module_id,
            "kind": "module",
            "codec": "raw",
            "tensors": [[name, "float32", list(shape)] for name, shape in shapes.items()],
            "offset": 0,
        }

    def upload(self, data: bytes, **changes: Any) -> str:
        told = {"digest": hashlib.sha256(data).hexdigest(), "size": len(data)}
        header = msgpack.packb(self.header | told | changes)
        return self.stream([pb.UploadChunk(header=header), *(pb.UploadChunk(data=part) for part in parts(data))])

    def stream(self, messages: Iterable[Any]) -> str:
        return status_of(lambda: self.blobs.Upload(iter(messages), timeout=60))

    def raw(self, method: str, data: bytes) -> str:
        return status_of(lambda: self.channel.unary_unary(method)(data, timeout=30))


def parts(data: bytes, size: int = 1 << 16) -> Iterator[bytes]:
    yield from (data[start : start + size] for start in range(0, len(data), size))


def to_training(run: SmallRun) -> None:
    """Let an honest worker bring the run to where tasks train: it leaves as its first TRAIN task starts."""

    def heard(line: str) -> None:
        if "/TRAIN/" in line and line.endswith("started"):
            worker.departure.ask()  # in the worker's own thread: before it fetches anything

    worker = run.worker(say=heard)
    thread = threading.Thread(target=worker.run)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stranger]:
    run = SmallRun(tmp_path_factory.mktemp("besieged"))
    run.start()
    to_training(run)
    with grpc.insecure_channel(run.address) as channel:
        yield Stranger(run, channel)


@pytest.fixture(autouse=True)
def _keeps_its_lease(stranger: Stranger) -> None:
    """Also shows, before every test, that the coordinator still answers."""
    with contextlib.suppress(AssertionError, grpc.RpcError):
        stranger.keep()


def file_of(tensors: dict[str, np.ndarray], tmp_path: Path) -> bytes:
    tensor_file.write(tmp_path / "tensors", tensors)
    return (tmp_path / "tensors").read_bytes()


@pytest.mark.parametrize(
    "method", [*(f"/dipaco.v1.Coordinator/{name}" for name in METHODS), "/dipaco.v1.BlobExchange/Offset"]
)
def test_bytes_that_are_no_message(stranger: Stranger, method: str) -> None:
    @FEW
    @given(st.binary(min_size=1, max_size=80))
    def attack(data: bytes) -> None:
        assert stranger.raw(method, data) in CLEAR

    attack()
    assert stranger.raw(method, b"\x0a\x02\xff\xfe\xff") == "INVALID_ARGUMENT"


CONTROL = ("Hello", "Lease", "Heartbeat", "Complete", "SaveProgress", "Release", "Fetch", "Offset")
FIELDS = st.fixed_dictionaries(
    {
        "worker_id": st.sampled_from(["", "w0", OWN]) | WORDS,
        "task_id": st.sampled_from(["", OWN]) | WORDS,
        "fence": NUMBERS,
        "words": WORDS,
        "number": NUMBERS,
        "float": st.floats(),
        "packed": PACKED,
        "digest": WORDS | DIGEST,
    }
)


def control_attack(stranger: Stranger, method: str, given: dict[str, Any]) -> str:
    """One call with fields of any content, but well formed as a message; never under the stranger's own fence."""
    control, blobs = stranger.control, stranger.blobs
    own = {"worker_id": stranger.worker_id, "task_id": stranger.task_id}
    lease: dict[str, Any] = {key: own[key] if given[key] == OWN else given[key] for key in own}
    lease["fence"] = given["fence"] if given["fence"] != stranger.fence else 2**63
    words, number, float_, packed, digest = (given[key] for key in ("words", "number", "float", "packed", "digest"))
    calls: dict[str, Callable[[], Any]] = {
        "Hello": lambda: stranger.hello("x", worker_name=words, capabilities=packed, package_version=words),
        "Lease": lambda: control.Lease(pb.LeaseRequest(worker_id=words, wait_s=float_), timeout=30),
        "Heartbeat": lambda: control.Heartbeat(pb.HeartbeatRequest(**lease, loss=float_, steps=number)),
        "Complete": lambda: control.Complete(pb.CompleteRequest(**lease, result=packed)),
        "SaveProgress": lambda: control.SaveProgress(pb.SaveProgressRequest(**lease, checkpoint=packed)),
        "Release": lambda: control.Release(pb.ReleaseRequest(**lease, reason=words)),
        "Fetch": lambda: blobs.Fetch(pb.FetchRequest(digest=digest, offset=number), timeout=30),
        "Offset": lambda: blobs.Offset(pb.OffsetRequest(task_id=lease["task_id"], fence=lease["fence"], digest=digest)),
    }
    return status_of(calls[method])


@pytest.mark.parametrize("method", CONTROL)
def test_fields_of_any_content(stranger: Stranger, method: str) -> None:
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(given=FIELDS)
    def attack(given: dict[str, Any]) -> None:
        assert control_attack(stranger, method, given) in CLEAR

    attack()


@FEW
@given(data=st.data())
def test_headers_of_any_content(stranger: Stranger, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from([*stranger.header, "digest", "size", "more"]))
    header = stranger.header | {"digest": "0" * 64, "size": 8} | {key: data.draw(PLAIN)}
    packed = data.draw(st.sampled_from([msgpack.packb(header), data.draw(PACKED)]))
    assert stranger.stream([pb.UploadChunk(header=packed), pb.UploadChunk(data=b"12345678")]) in CLEAR - {"OK"}


def test_tensors_that_are_not_the_declared_ones(stranger: Stranger, tmp_path: Path) -> None:
    true = stranger.tensors
    name = min(true)
    renamed = {f"{name}.other" if key == name else key: value for key, value in true.items()}
    reshaped = true | {name: np.zeros((*true[name].shape, 1), np.float32)}
    for tensors in (renamed, reshaped, {name: true[name]}, true | {"more": np.zeros(3, np.float32)}):
        data = file_of(tensors, tmp_path)
        told = [[key, "float32", list(value.shape)] for key, value in tensors.items()]
        assert stranger.upload(data, tensors=told) == "INVALID_ARGUMENT"
        assert stranger.upload(data) == "INVALID_ARGUMENT"
    for value in (np.nan, np.inf, -np.inf):
        spoilt = {key: tensor.copy() for key, tensor in true.items()}
        spoilt[name].flat[0] = value
        assert stranger.upload(file_of(spoilt, tmp_path)) == "INVALID_ARGUMENT"
    whole = file_of(true, tmp_path)
    as_half = [[key, "float16", list(value.shape)] for key, value in true.items()]
    assert stranger.upload(whole, tensors=as_half) == "INVALID_ARGUMENT"
    assert stranger.upload(bytes(len(whole))) == "INVALID_ARGUMENT"
    assert stranger.upload(whole, digest="0" * 64) == "DATA_LOSS"


@pytest.mark.parametrize("number", [1, 2**40, 2**62, 2**63, 2**64 - 1])
def test_absurd_sizes_and_offsets(stranger: Stranger, number: int, tmp_path: Path) -> None:
    data = file_of(stranger.tensors, tmp_path)
    for changes in ({"size": number}, {"offset": number}, {"size": number, "offset": number}):
        assert stranger.upload(data, **changes) == "INVALID_ARGUMENT"


def test_streams_that_end_early_or_never(stranger: Stranger, tmp_path: Path) -> None:
    data = file_of(stranger.tensors, tmp_path)
    header = stranger.header | {"digest": hashlib.sha256(data).hexdigest(), "size": len(data)}
    opening = pb.UploadChunk(header=msgpack.packb(header))
    assert stranger.stream([opening, pb.UploadChunk(data=data[:-1])]) == "INVALID_ARGUMENT"
    assert stranger.stream([]) == "INVALID_ARGUMENT"
    endless = itertools.chain([opening], itertools.repeat(pb.UploadChunk(data=bytes(1 << 20))))
    assert stranger.stream(endless) == "INVALID_ARGUMENT"
    silent = threading.Event()
    stalled = stranger.blobs.Upload.future(itertools.chain([opening], iter(lambda: silent.wait(20), True)), timeout=2)
    assert stalled.code().name == "DEADLINE_EXCEEDED"
    silent.set()


def test_only_the_holder_writes_and_completes(stranger: Stranger, tmp_path: Path) -> None:
    data = file_of(stranger.tensors, tmp_path)
    other = stranger.hello("other").worker_id
    assert stranger.upload(data, worker_id=other) == "FAILED_PRECONDITION"
    assert stranger.upload(data, fence=stranger.fence + 1) == "FAILED_PRECONDITION"
    assert stranger.upload(data, task_id="train/TRAIN/9/9") == "NOT_FOUND"
    result = encode(TaskResult(outputs={}, steps=2))
    for worker_id, fence in ((other, stranger.fence), (stranger.worker_id, stranger.fence + 1)):
        request = pb.CompleteRequest(worker_id=worker_id, task_id=stranger.task_id, fence=fence, result=result)
        assert status_of(partial(stranger.control.Complete, request)) == "FAILED_PRECONDITION"
    mine = pb.CompleteRequest(
        worker_id=stranger.worker_id, task_id=stranger.task_id, fence=stranger.fence, result=result
    )
    assert status_of(lambda: stranger.control.Complete(mine)) == "INVALID_ARGUMENT"  # no outputs
    nan = msgpack.packb({"outputs": {}, "steps": 2, "loss_sum": float("nan")})
    mine.result = nan
    assert status_of(lambda: stranger.control.Complete(mine)) == "INVALID_ARGUMENT"


def test_a_replayed_completion_changes_nothing(stranger: Stranger) -> None:
    """A task that counts already is answered as a duplicate, whoever repeats it with whatever result."""
    result = encode(TaskResult(outputs={}, tokens=10**9, loss_sum=-1.0))
    replayed = pb.CompleteRequest(worker_id=stranger.worker_id, task_id="corpus/PACK/0/0", fence=1, result=result)
    assert stranger.control.Complete(replayed, timeout=30).duplicate


def test_memory_does_not_follow_what_strangers_send(stranger: Stranger) -> None:
    """The coordinator lives in this process: what it keeps shows here, and so would what the attack itself leaks."""
    process = psutil.Process()

    def flood(times: int) -> None:
        for number in range(times):
            with contextlib.suppress(grpc.RpcError):
                stranger.hello("x" * 1_000_000)
            with contextlib.suppress(grpc.RpcError):
                stranger.hello("x", capabilities=bytes(1_000_000))
            stranger.raw("/dipaco.v1.Coordinator/Complete", bytes([number % 256]) * 1_000_000)
            stranger.hello(f"many {number}")

    flood(20)
    before = process.memory_info().rss
    flood(200)
    assert process.memory_info().rss - before < 32 * 1024**2


def test_many_connections_that_say_nothing(stranger: Stranger) -> None:
    host, port = stranger.run.address.split(":")
    with contextlib.ExitStack() as idle:
        for number in range(400):
            connection = idle.enter_context(socket.create_connection((host, int(port)), timeout=20))
            if number % 2:
                connection.sendall(b"\x16\x03\x01 who is there?"[: number % 16])
        with grpc.insecure_channel(stranger.run.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            answer = pb_grpc.CoordinatorStub(channel).Status(pb.StatusRequest(), timeout=30)
        assert '"stages"' in answer.status_json


def test_the_run_ends_with_the_same_bits(stranger: Stranger, tmp_path: Path) -> None:
    """It goes on under attack; the strangers' own task is released, as it would be when they fall silent."""
    release = pb.ReleaseRequest(
        worker_id=stranger.worker_id, task_id=stranger.task_id, fence=stranger.fence, leaving=True
    )
    stranger.control.Release(release, timeout=30)
    over = threading.Event()
    statuses: set[str] = set()

    def attack() -> None:
        for number in itertools.count():
            if over.is_set():
                return
            for method in METHODS:
                statuses.add(stranger.raw(f"/dipaco.v1.Coordinator/{method}", bytes([number % 251] * (number % 50))))
            statuses.add(stranger.upload(b"nothing", fence=number % 5))

    attacker = threading.Thread(target=attack)
    attacker.start()
    stranger.run.worker().run()
    over.set()
    attacker.join(PATIENCE_S)
    assert statuses <= CLEAR | {"UNAVAILABLE", "CANCELLED"}
    assert stranger.run.digest() == undisturbed_digest(tmp_path / "undisturbed")
