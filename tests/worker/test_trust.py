"""Certificates of workers and the rotation of tokens over real TLS on loopback: who is let in, with which words."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from protocol.certificates import SERVER_VALID_DAYS, rotate_token, write_certificates
from protocol.credentials import Credentials
from protocol.enrolment import issue_worker, revoke
from protocol.errors import Forbidden, NotAllowed, Unavailable
from protocol.joinfile import JoinFile
from protocol.keyfile import write_key_file
from protocol.security import CERTS_DIR, IncompleteCertificates, load_security
from tests.loopback import CAPABILITIES, FENCE, TASK, BookHandlers, Loopback, upload_header
from worker.client import WorkerClient


@pytest.fixture(autouse=True)
def _files_are_looked_at_with_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocol.security.RELOAD_S", 0.0)


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    write_certificates(tmp_path / CERTS_DIR, [])
    return tmp_path / CERTS_DIR


@pytest.fixture
def strict(tmp_path: Path, certs: Path) -> Iterator[Loopback]:
    """A server that requires certificates."""
    with Loopback(BookHandlers(tmp_path), load_security(tmp_path, require_certificates=True)) as running:
        yield running


@pytest.fixture
def plain(tmp_path: Path, certs: Path) -> Iterator[Loopback]:
    """A server that admits by the token alone."""
    with Loopback(BookHandlers(tmp_path), load_security(tmp_path)) as running:
        yield running


def joined(certs: Path, name: str) -> JoinFile:
    return JoinFile.read(issue_worker(certs, name)[0])


def refusal(call: Callable[[], object], kind: type[Exception]) -> str:
    """The words with which a call is refused, once it is."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            call()
        except kind as error:
            return str(error)
    raise AssertionError("it was never refused")


# --- certificates ---------------------------------------------------------------------------------------------------


def test_a_worker_is_known_by_its_certificate(strict: Loopback, certs: Path, tmp_path: Path) -> None:
    with WorkerClient(strict.address, joined(certs, "alice"), patience_s=10.0) as client:
        worker_id = client.hello("any name", CAPABILITIES).worker_id
        assert strict.handlers.calls[0].identity == "alice"
        assert client.lease(worker_id, 0.0).task_id == TASK
        (tmp_path / "out").write_bytes(b"tokens")
        header = upload_header(b"tokens", worker_id=worker_id)
        assert client.upload(tmp_path / "out", header) == 6


def test_a_worker_without_a_certificate_is_told_at_once_where_one_is_required(strict: Loopback, certs: Path) -> None:
    with (
        WorkerClient(strict.address, JoinFile.read(certs / "join.json"), patience_s=None) as client,
        pytest.raises(NotAllowed, match=r"requires a certificate of each worker's own .* `dipaco certs RUN --worker"),
    ):
        client.hello("host", CAPABILITIES)
    assert strict.handlers.calls == []


def test_a_stopped_coordinator_is_not_taken_for_one_that_requires_a_certificate(strict: Loopback, certs: Path) -> None:
    strict.stop()
    with (
        WorkerClient(strict.address, JoinFile.read(certs / "join.json"), patience_s=0.5) as client,
        pytest.raises(Unavailable),
    ):
        client.status()


def test_a_certificate_of_another_run_does_not_get_in(strict: Loopback, certs: Path, tmp_path: Path) -> None:
    write_certificates(tmp_path / "other", [])
    other = joined(tmp_path / "other", "alice")
    forged = JoinFile.read(certs / "join.json").model_copy(
        update={"certificate_pem": other.certificate_pem, "key_pem": other.key_pem}
    )
    with WorkerClient(strict.address, forged, patience_s=0.5) as client, pytest.raises(Unavailable):
        client.hello("host", CAPABILITIES)
    assert strict.handlers.calls == []


def test_a_revoked_worker_is_shut_out_of_the_connection_it_has(strict: Loopback, certs: Path) -> None:
    with (
        WorkerClient(strict.address, joined(certs, "alice"), patience_s=10.0) as alice,
        WorkerClient(strict.address, joined(certs, "bob"), patience_s=10.0) as bob,
    ):
        alice_id, bob_id = (client.hello("host", CAPABILITIES).worker_id for client in (alice, bob))
        revoke(certs, "alice")
        words = refusal(lambda: alice.heartbeat(alice_id, TASK, FENCE), Forbidden)
        assert "the certificate of 'alice'" in words
        assert "was revoked on" in words
        with pytest.raises(Forbidden, match="revoked"):
            alice.fetch_to("a" * 64, certs / "blob")
        assert not bob.heartbeat(bob_id, TASK, FENCE).lost


def test_a_damaged_list_of_certificates_keeps_the_revocations_that_were_read(
    strict: Loopback, certs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        WorkerClient(strict.address, joined(certs, "alice"), patience_s=10.0) as alice,
        WorkerClient(strict.address, joined(certs, "bob"), patience_s=10.0) as bob,
    ):
        revoke(certs, "alice")
        refusal(alice.status, Forbidden)
        (certs / "workers.json").write_text("{", encoding="utf-8")
        assert bob.status() == {"stages": []}
        with pytest.raises(Forbidden):
            alice.status()
        assert "stay as they were" in caplog.text
        (certs / "workers.json").unlink()
        with pytest.raises(Forbidden):
            alice.status()
        assert "workers.json is gone" in caplog.text


def test_a_certificate_may_not_act_under_the_id_of_another(strict: Loopback, certs: Path, tmp_path: Path) -> None:
    with (
        WorkerClient(strict.address, joined(certs, "alice"), patience_s=10.0) as alice,
        WorkerClient(strict.address, joined(certs, "mallory"), patience_s=10.0) as mallory,
    ):
        taken = alice.hello("host", CAPABILITIES).worker_id
        (tmp_path / "out").write_bytes(b"tokens")
        before = len(strict.handlers.calls)
        for call in (
            lambda: mallory.lease(taken, 0.0),
            lambda: mallory.heartbeat(taken, TASK, FENCE),
            lambda: mallory.release(taken, TASK, FENCE),
            lambda: mallory.upload(tmp_path / "out", upload_header(b"tokens", worker_id=taken)),
        ):
            with pytest.raises(Forbidden, match="was not given to the certificate 'mallory'"):
                call()
        assert strict.handlers.calls[before:] == []
        assert alice.lease(taken, 0.0).task_id == TASK


def test_a_join_file_with_a_certificate_serves_where_none_is_required(plain: Loopback, certs: Path) -> None:
    with WorkerClient(plain.address, joined(certs, "alice"), patience_s=10.0) as client:
        client.hello("host", CAPABILITIES)
        assert plain.handlers.calls[0].identity == ""


def test_a_coordinator_whose_certificate_has_ended_is_named_as_such(tmp_path: Path) -> None:
    long_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=SERVER_VALID_DAYS + 1)
    join = write_certificates(tmp_path / "ended" / CERTS_DIR, [], now=long_ago)
    with (
        Loopback(BookHandlers(tmp_path), load_security(tmp_path / "ended")) as running,
        WorkerClient(running.address, join, patience_s=10.0) as client,
        pytest.raises(NotAllowed, match=r"has ended .* `dipaco certs RUN`"),
    ):
        client.status()


def test_requiring_certificates_of_a_run_that_has_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IncompleteCertificates, match=r"require_worker_certificates is true and .* has no certificates"):
        load_security(tmp_path, require_certificates=True)


# --- tokens ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(certs: Path, tmp_path: Path) -> Path:
    """The join file as it lies on another machine."""
    path = tmp_path / "elsewhere.json"
    write_key_file(path, (certs / "join.json").read_bytes(), private=True)
    return path


def test_a_worker_follows_a_rotation_within_the_overlap(plain: Loopback, certs: Path, machine: Path) -> None:
    old = JoinFile.read(machine)
    with WorkerClient(plain.address, Credentials.read(machine), patience_s=10.0) as client:
        client.hello("host", CAPABILITIES)
        new = rotate_token(certs, 60.0)
        client.status()
        assert JoinFile.read(machine) == new
        rotate_token(certs, 60.0)
        rotate_token(certs, 60.0)
        assert client.status() == {"stages": []}
        assert JoinFile.read(machine) == JoinFile.read(certs / "join.json") != new
    with WorkerClient(plain.address, old, patience_s=10.0) as late:
        assert late.status() == {"stages": []}


def test_without_overlap_the_old_token_is_refused_and_exchanged_for_nothing(
    plain: Loopback, certs: Path, machine: Path
) -> None:
    old = JoinFile.read(machine)
    with WorkerClient(plain.address, Credentials.read(machine), patience_s=10.0) as client:
        client.status()
        rotate_token(certs, 0.0)
        with pytest.raises(NotAllowed, match="was replaced and has ended; copy the run's new join file"):
            client.status()
        assert JoinFile.read(machine) == old


def test_a_refused_worker_goes_on_with_the_token_in_its_file(
    plain: Loopback, certs: Path, machine: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    with WorkerClient(plain.address, Credentials.read(machine, said.append), patience_s=10.0) as client:
        worker_id = client.hello("host", CAPABILITIES).worker_id
        rotate_token(certs, 0.0)
        write_key_file(machine, (certs / "join.json").read_bytes(), private=True)
        (tmp_path / "out").write_bytes(b"tokens")
        assert client.upload(tmp_path / "out", upload_header(b"tokens", worker_id=worker_id)) == 6
        assert not client.heartbeat(worker_id, TASK, FENCE).lost
    assert said == [f"the join token was refused; going on with the new one in {machine}"]


def test_an_overlap_ends(plain: Loopback, certs: Path, machine: Path) -> None:
    old = JoinFile.read(machine)
    rotate_token(certs, 0.3)
    with WorkerClient(plain.address, old.model_copy(), patience_s=10.0) as client:
        client._connection._credentials.renew = lambda token: None  # type: ignore[union-attr, method-assign]
        assert "was replaced and has ended" in refusal(client.status, NotAllowed)


def test_a_token_is_handed_out_only_to_those_who_were_let_in(plain: Loopback, certs: Path, machine: Path) -> None:
    wrong = JoinFile.read(machine).model_copy(update={"token": "x" * 43})
    rotate_token(certs, 60.0)
    credentials = Credentials(wrong)
    with WorkerClient(plain.address, credentials, patience_s=10.0) as client, pytest.raises(NotAllowed, match="wrong"):
        client.status()
    assert credentials.token == "x" * 43
