"""The client against a real server on loopback: every call, waiting, and transfers that are cut off half-way."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.handlers import HelloAnswer, HelloArgs
from protocol.address import Address
from protocol.certificates import write_certificates
from protocol.errors import (
    CorruptBlob,
    NotAllowed,
    RemoteFailure,
    StaleLease,
    Unavailable,
    UnknownBlob,
    UnknownTask,
    UnknownWorker,
    VersionMismatch,
)
from protocol.joinfile import JoinFile
from protocol.security import CERTS_DIR, load_security
from protocol.tasks import BlobRef, TaskResult
from tests.loopback import CAPABILITIES, CHUNK_BYTES, FENCE, SPEC, TASK, BookHandlers, Loopback, upload_header
from worker.client import WorkerClient

BLOB = os.urandom(40 * CHUNK_BYTES + 17)


@pytest.fixture
def loopback(tmp_path: Path) -> Iterator[Loopback]:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    with Loopback(BookHandlers(blobs)) as running:
        yield running


@pytest.fixture
def client(loopback: Loopback) -> Iterator[WorkerClient]:
    with WorkerClient(loopback.address, patience_s=20.0) as connected:
        yield connected


def test_hello_tells_of_the_run(loopback: Loopback, client: WorkerClient) -> None:
    welcome = client.hello("host-1", CAPABILITIES)
    assert (welcome.worker_id, welcome.run_name, welcome.heartbeat_s) == ("worker-0", "test run", 2.0)
    assert welcome.config_json == '{"name": "test run"}'
    assert welcome.chunk_bytes == CHUNK_BYTES
    [args] = loopback.handlers.calls
    assert (args.worker_name, args.worker_id, args.capabilities) == ("host-1", "", CAPABILITIES)


def test_control_calls_carry_their_values(loopback: Loopback, client: WorkerClient) -> None:
    worker_id = client.hello("host-1", CAPABILITIES).worker_id
    lease = client.lease(worker_id, 0.5, ["b" * 64])
    assert (lease.task_id, lease.fence, lease.lease_s, lease.spec) == (TASK, FENCE, 12.0, SPEC)
    assert loopback.handlers.calls[-1] == (0.5, frozenset(["b" * 64]))
    assert client.lease(worker_id, 0.0, ["none"]).waiting_for == "module 0.1 is being stepped"
    assert client.lease(worker_id, 0.0, ["none"]).spec is None

    assert not client.heartbeat(worker_id, TASK, FENCE, steps=4, loss=1.5, tokens=99).lost
    beat = loopback.handlers.calls[-1]
    assert (beat.steps, beat.loss, beat.tokens) == (4, 1.5, 99)
    assert client.heartbeat(worker_id, TASK, FENCE - 1).lost
    assert math.isnan(loopback.handlers.calls[-1].loss)

    result = TaskResult(outputs={"tokens": BlobRef(digest="c" * 64, size=1)}, tokens=7, step_losses=[2.0, 1.0])
    assert not client.complete(worker_id, TASK, FENCE, result)
    assert loopback.handlers.calls[-1] == result
    assert client.complete(worker_id, TASK, FENCE, result)

    client.release(worker_id, TASK, FENCE, "out of memory", leaving=True)
    released = loopback.handlers.calls[-1]
    assert (released.worker_id, released.reason, released.leaving) == (worker_id, "out of memory", True)
    assert client.status() == {"stages": []}


def test_refusals_arrive_as_what_they_are(loopback: Loopback, client: WorkerClient) -> None:
    result = TaskResult(outputs={})
    with pytest.raises(UnknownWorker, match="say hello first"):
        client.lease("nobody", 0.0)
    with pytest.raises(UnknownTask, match="there is no task 'x'"):
        client.complete("w", "x", FENCE, result)
    with pytest.raises(StaleLease, match="fence 3, not 2"):
        client.complete("w", TASK, 2, result)


def test_a_bug_in_the_coordinator_is_one_sentence(loopback: Loopback, client: WorkerClient) -> None:
    def stumble() -> dict[str, object]:
        raise KeyError("missing")

    loopback.handlers.on_status = stumble
    with pytest.raises(RemoteFailure, match="the coordinator failed: KeyError"):
        client.status()
    loopback.handlers.on_status = lambda: {"stages": [1]}
    assert client.status() == {"stages": [1]}


def test_a_coordinator_that_forgot_the_worker_is_greeted_again(loopback: Loopback, client: WorkerClient) -> None:
    worker_id = client.hello("host-1", CAPABILITIES).worker_id
    loopback.handlers.workers.clear()
    assert client.lease(worker_id, 0.0).task_id == TASK
    assert loopback.handlers.workers == {worker_id}
    assert [args.worker_id for args in loopback.handlers.calls if hasattr(args, "worker_name")] == ["", worker_id]


def test_a_coordinator_that_forgets_right_after_the_greeting_is_greeted_again(
    loopback: Loopback, client: WorkerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker_id = client.hello("host-1", CAPABILITIES).worker_id
    loopback.handlers.workers.clear()
    greet, greetings = loopback.handlers.hello, 0

    async def forgetful(args: HelloArgs) -> HelloAnswer:
        nonlocal greetings
        greetings += 1
        answer = await greet(args)
        if greetings < 3:
            loopback.handlers.workers.clear()
        return answer

    monkeypatch.setattr(loopback.handlers, "hello", forgetful)
    assert client.lease(worker_id, 0.0).task_id == TASK
    assert greetings == 3


def test_a_task_is_given_back_to_a_coordinator_that_forgot_the_worker(loopback: Loopback, client: WorkerClient) -> None:
    worker_id = client.hello("host:1", CAPABILITIES).worker_id
    loopback.handlers.workers.clear()
    client.release(worker_id, TASK, FENCE, "disk full")
    assert loopback.handlers.workers == {worker_id}


def test_another_major_version_names_the_one_to_install(client: WorkerClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.client.PROTOCOL_MAJOR", 2)
    with pytest.raises(VersionMismatch, match="install dipaco=="):
        client.hello("host-1", CAPABILITIES)


def test_waits_for_a_coordinator_that_is_not_there_yet(tmp_path: Path) -> None:
    said: list[str] = []
    with Loopback(BookHandlers(tmp_path)) as loopback:
        loopback.stop()
        late = threading.Event()

        def say(sentence: str) -> None:
            said.append(sentence)
            late.set()

        def appear() -> None:
            late.wait(20)
            loopback.start()

        starter = threading.Thread(target=appear)
        starter.start()
        with WorkerClient(loopback.address, say=say) as client:
            assert client.hello("host-1", CAPABILITIES).worker_id == "worker-0"
        starter.join()
    assert len(said) == 2
    assert f"nobody answers at {loopback.address}" in said[0]
    assert said[1] == f"{loopback.address} answers again"


def test_patience_ends() -> None:
    with (
        WorkerClient(Address("127.0.0.1", 1), patience_s=0.3) as client,
        pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"),
    ):
        client.status()


def test_close_ends_an_endless_wait() -> None:
    failures: list[Exception] = []
    waiting = threading.Event()
    client = WorkerClient(Address("127.0.0.1", 1), say=lambda _: waiting.set())

    def ask() -> None:
        try:
            client.status()
        except Unavailable as error:
            failures.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    assert waiting.wait(20)
    client.close()
    asking.join(20)
    assert not asking.is_alive()
    assert len(failures) == 1
    with pytest.raises(Unavailable, match="closed"):
        client.status()


# --- blobs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, 3 * CHUNK_BYTES + 5])
def test_fetches_a_blob_whole(loopback: Loopback, client: WorkerClient, tmp_path: Path, size: int) -> None:
    digest = loopback.handlers.add_blob(BLOB[:size])
    counted: list[int] = []
    assert client.fetch_to(digest, tmp_path / "new" / "blob", counted.append) == size
    assert (tmp_path / "new" / "blob").read_bytes() == BLOB[:size]
    assert sum(counted) == size
    assert max(counted) <= CHUNK_BYTES
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["blob"]


def test_a_missing_blob_leaves_no_file(client: WorkerClient, tmp_path: Path) -> None:
    with pytest.raises(UnknownBlob):
        client.fetch_to("d" * 64, tmp_path / "blob")
    assert not (tmp_path / "blob").exists()


def test_a_fetch_goes_on_where_it_was_cut_off(loopback: Loopback, client: WorkerClient, tmp_path: Path) -> None:
    large = BLOB * 8  # more than what the sockets hold, so that the server is still sending when it stops
    digest = loopback.handlers.add_blob(large)
    received = 0

    def restart_on_the_way(size: int) -> None:
        nonlocal received
        if received < 4 * CHUNK_BYTES <= received + size:
            loopback.stop()
            loopback.start()
        received += size

    assert client.fetch_to(digest, tmp_path / "blob", restart_on_the_way) == len(large)
    assert (tmp_path / "blob").read_bytes() == large
    assert received == len(large)
    assert loopback.handlers.calls.count(digest) > 1


def test_a_partial_file_of_another_life_is_continued(loopback: Loopback, client: WorkerClient, tmp_path: Path) -> None:
    digest = loopback.handlers.add_blob(BLOB)
    (tmp_path / "blob.part").write_bytes(BLOB[: 2 * len(BLOB) // 3])
    assert client.fetch_to(digest, tmp_path / "blob") == len(BLOB) - 2 * len(BLOB) // 3
    assert (tmp_path / "blob").read_bytes() == BLOB


@pytest.mark.parametrize("rubbish", [b"rubbish", bytes(2 * len(BLOB))], ids=["wrong", "too long"])
def test_a_spoilt_partial_file_is_fetched_anew(
    loopback: Loopback, client: WorkerClient, tmp_path: Path, rubbish: bytes
) -> None:
    digest = loopback.handlers.add_blob(BLOB)
    (tmp_path / "blob.part").write_bytes(rubbish)
    client.fetch_to(digest, tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == BLOB


def test_a_blob_with_other_bytes_is_refused(loopback: Loopback, client: WorkerClient, tmp_path: Path) -> None:
    (loopback.handlers.blobs / ("e" * 64)).write_bytes(b"something else")
    with pytest.raises(CorruptBlob, match="have digest"):
        client.fetch_to("e" * 64, tmp_path / "blob")
    assert not (tmp_path / "blob").exists()


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, 3 * CHUNK_BYTES + 5])
def test_uploads_an_output_whole(loopback: Loopback, client: WorkerClient, tmp_path: Path, size: int) -> None:
    client.hello("host-1", CAPABILITIES)
    (tmp_path / "out").write_bytes(BLOB[:size])
    header = upload_header(BLOB[:size])
    assert client.upload(tmp_path / "out", header) == size
    assert bytes(loopback.handlers.uploads[header.digest]) == BLOB[:size]
    assert client.upload(tmp_path / "out", header) == 0


def test_an_upload_goes_on_where_it_was_cut_off(loopback: Loopback, client: WorkerClient, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(BLOB)
    client.hello("host-1", CAPABILITIES)
    half_way, again = threading.Event(), threading.Event()
    arrived = 0

    def stop_half_way(data: bytes) -> None:
        nonlocal arrived
        arrived += len(data)
        if arrived >= len(BLOB) // 2:
            half_way.set()
            again.wait(0.2)  # a write that is under way is waited for; the rest of them take 4 s

    def restart() -> None:
        half_way.wait(20)
        loopback.stop()
        again.set()
        loopback.start()

    loopback.handlers.on_write = stop_half_way
    restarting = threading.Thread(target=restart)
    restarting.start()
    header = upload_header(BLOB)
    sent = client.upload(tmp_path / "out", header)
    restarting.join()
    first, *later = loopback.handlers.offsets
    assert first == 0
    assert later
    assert later[-1] >= len(BLOB) // 2 - CHUNK_BYTES
    assert bytes(loopback.handlers.uploads[header.digest]) == BLOB
    assert sent < 2 * len(BLOB)


def test_an_upload_whose_held_part_is_spoilt_is_sent_anew(
    loopback: Loopback, client: WorkerClient, tmp_path: Path
) -> None:
    (tmp_path / "out").write_bytes(BLOB)
    client.hello("host-1", CAPABILITIES)
    header = upload_header(BLOB)
    loopback.handlers.uploads[header.digest] = bytearray(b"rubbish")
    assert client.upload(tmp_path / "out", header) == 2 * len(BLOB) - len(b"rubbish")
    assert bytes(loopback.handlers.uploads[header.digest]) == BLOB


def test_an_upload_under_a_lost_lease_is_refused(client: WorkerClient, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(BLOB)
    with pytest.raises(StaleLease):
        client.upload(tmp_path / "out", upload_header(BLOB, fence=2))


# --- TLS and token --------------------------------------------------------------------------------------------------


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[tuple[Loopback, JoinFile]]:
    join = write_certificates(tmp_path / CERTS_DIR, ["coordinator.example", "10.1.2.3"])
    with Loopback(BookHandlers(tmp_path), load_security(tmp_path)) as running:
        yield running, join


def test_the_join_file_lets_a_worker_in(secured: tuple[Loopback, JoinFile], tmp_path: Path) -> None:
    loopback, join = secured
    with WorkerClient(loopback.address, join, patience_s=10.0) as client:
        assert client.hello("host-1", CAPABILITIES).worker_id == "worker-0"
        digest = loopback.handlers.add_blob(BLOB)
        assert client.fetch_to(digest, tmp_path / "fetched") == len(BLOB)
        assert client.upload(tmp_path / "fetched", upload_header(BLOB)) == len(BLOB)


def test_a_wrong_or_missing_token_is_refused(secured: tuple[Loopback, JoinFile], tmp_path: Path) -> None:
    loopback, join = secured
    wrong = join.model_copy(update={"token": "x" * 43})
    (tmp_path / "out").write_bytes(BLOB)
    with WorkerClient(loopback.address, wrong, patience_s=10.0) as client:
        with pytest.raises(NotAllowed, match="token is wrong"):
            client.hello("host-1", CAPABILITIES)
        with pytest.raises(NotAllowed, match="token is wrong"):
            client.fetch_to("a" * 64, tmp_path / "blob")
        with pytest.raises(NotAllowed, match="token is wrong"):
            client.upload(tmp_path / "out", upload_header(BLOB))
    assert loopback.handlers.calls == []


def test_a_missing_token_is_refused(secured: tuple[Loopback, JoinFile], monkeypatch: pytest.MonkeyPatch) -> None:
    loopback, join = secured
    monkeypatch.setattr("protocol.connection.call_metadata", lambda join: ())
    with WorkerClient(loopback.address, join, patience_s=10.0) as client, pytest.raises(NotAllowed, match="missing"):
        client.status()


def test_a_coordinator_of_another_ca_is_not_trusted(secured: tuple[Loopback, JoinFile], tmp_path: Path) -> None:
    loopback, _ = secured
    other = write_certificates(tmp_path / "other", [])
    with WorkerClient(loopback.address, other, patience_s=10.0) as client, pytest.raises(NotAllowed, match="CA"):
        client.status()


def test_plain_traffic_does_not_reach_a_secured_server(secured: tuple[Loopback, JoinFile]) -> None:
    loopback, _ = secured
    with WorkerClient(loopback.address, patience_s=0.3) as client, pytest.raises(Unavailable, match="--join"):
        client.status()


def test_who_was_answered_before_needs_no_join_file(loopback: Loopback, client: WorkerClient) -> None:
    assert client.status() == {"stages": []}
    kinds: list[bool] = []

    def failed(error: object, address: str, *, unanswered_plain: bool = False) -> Unavailable:
        kinds.append(unanswered_plain)
        return Unavailable(address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("protocol.connection.from_rpc_error", failed)
        patch.setattr(client, "_patience_s", 0.0)
        loopback.stop()
        with pytest.raises(Unavailable):
            client.status()
    assert set(kinds) == {False}


def test_traffic_to_another_machine_is_not_plain_unasked() -> None:
    with pytest.raises(NotAllowed, match="--join"):
        WorkerClient(Address("192.0.2.1", 7070))
