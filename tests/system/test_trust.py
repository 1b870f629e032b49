"""A real run over TLS whose keys change on the way: tokens are replaced, a worker is shut out, and the bits stay."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.journal import RunLock, RunUnusable
from coordinator.serving import serve
from protocol.address import parse_address
from protocol.certificates import SERVER_VALID_DAYS, rotate_token, write_certificates
from protocol.credentials import Credentials
from protocol.enrolment import issue_worker, revoke
from protocol.errors import Forbidden, NotAllowed
from protocol.expiry import CertificateEnded
from protocol.joinfile import JoinFile
from protocol.keyfile import write_key_file
from protocol.security import CERTS_DIR, IncompleteCertificates
from scripts.crash_points import small_config
from tests.small_run import SmallRun, undisturbed_digest
from worker.calls import Coordinator
from worker.client import WorkerClient
from worker.loop import Worker
from worker.probe import capabilities


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    return undisturbed_digest(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(autouse=True)
def _files_are_looked_at_with_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocol.security.RELOAD_S", 0.0)


class SecuredRun(SmallRun):
    """The small run with certificates; with `strict`, workers need their own."""

    def __init__(self, folder: Path, *, strict: bool = False) -> None:
        super().__init__(folder)
        execution = self._config.execution.model_copy(update={"require_worker_certificates": strict})
        self._config = self._config.model_copy(update={"execution": execution})
        self.certs = self.run_dir / CERTS_DIR
        write_certificates(self.certs, [])

    def trusted(self, join: Path, name: str, say: Callable[[str], None]) -> Worker:
        """A worker that joins with the file, on a machine of its own."""
        target, credentials = parse_address(self.address), Credentials.read(join, say)

        def connect(patience_s: float | None) -> Coordinator:
            return WorkerClient(target, credentials, patience_s=patience_s, say=say)

        return Worker(connect, self.folder / f"cache-{name}", name, capabilities(1, 1 << 30), say)


def after_each_task(act: Callable[[int], None]) -> Callable[[str], None]:
    """A listener to what a worker says that acts when its first, second, ... task is done."""
    done = 0

    def say(sentence: str) -> None:
        nonlocal done
        if ": done in " in sentence:
            done += 1
            act(done)

    return say


def test_a_token_is_replaced_again_and_again_while_a_worker_trains(tmp_path: Path, reference: str) -> None:
    run = SecuredRun(tmp_path / "run")
    run.start()
    machine = tmp_path / "join.json"
    write_key_file(machine, (run.certs / "join.json").read_bytes(), private=True)
    tokens = [JoinFile.read(machine).token]

    def rotate(done: int) -> None:
        tokens.append(rotate_token(run.certs, 60.0).token)

    run.trusted(machine, "alone", after_each_task(rotate)).run()
    assert run.digest() == reference
    assert len(set(tokens)) == len(tokens) > 5
    assert JoinFile.read(machine).token in tokens[-2:]


def test_a_token_that_ends_at_once_is_found_in_the_file(tmp_path: Path, reference: str) -> None:
    run = SecuredRun(tmp_path / "run")
    run.start()
    machine = tmp_path / "join.json"
    write_key_file(machine, (run.certs / "join.json").read_bytes(), private=True)
    said: list[str] = []

    def rotate(done: int) -> None:
        if done == 3:
            rotate_token(run.certs, 0.0)
            write_key_file(machine, (run.certs / "join.json").read_bytes(), private=True)

    count = after_each_task(rotate)

    def heard(sentence: str) -> None:
        said.append(sentence)
        count(sentence)

    run.trusted(machine, "alone", heard).run()
    assert run.digest() == reference
    assert any("going on with the new one in" in sentence for sentence in said)


def test_a_worker_without_the_new_token_ends_with_one_sentence(tmp_path: Path, reference: str) -> None:
    run = SecuredRun(tmp_path / "run")
    run.start()
    machine = tmp_path / "join.json"
    write_key_file(machine, (run.certs / "join.json").read_bytes(), private=True)

    def rotate(done: int) -> None:
        if done == 3:
            rotate_token(run.certs, 0.0)

    with pytest.raises(NotAllowed, match="was replaced and has ended; copy the run's new join file to this machine"):
        run.trusted(machine, "late", after_each_task(rotate)).run()
    run.trusted(run.certs / "join.json", "next", lambda _: None).run()
    assert run.digest() == reference


def test_a_worker_is_shut_out_of_a_run_that_others_finish(tmp_path: Path, reference: str) -> None:
    run = SecuredRun(tmp_path / "run", strict=True)
    run.start()
    alice, bob = (issue_worker(run.certs, name)[0] for name in ("alice", "bob"))

    def shut_out(done: int) -> None:
        if done == 3:
            revoke(run.certs, "alice")

    with pytest.raises(Forbidden, match=r"the certificate of 'alice' .* was revoked on"):
        run.trusted(alice, "a", after_each_task(shut_out)).run()
    run.trusted(bob, "b", lambda _: None).run()
    assert run.digest() == reference


def certified_run(folder: Path, days_left: float) -> Path:
    """A run directory whose coordinator's certificate ends in so many days."""
    made = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=SERVER_VALID_DAYS - days_left)
    write_certificates(folder / "run" / CERTS_DIR, [], now=made)
    return folder / "run"


def test_a_coordinator_does_not_start_with_a_certificate_that_has_ended(tmp_path: Path) -> None:
    run_dir = certified_run(tmp_path, days_left=-1)
    with pytest.raises(CertificateEnded, match=r"the coordinator's certificate ended on .*; renew it with"):
        serve(small_config(tmp_path), run_dir, "127.0.0.1:0", say=lambda line: None)
    assert not (run_dir / "state.db").exists()


def test_a_coordinator_says_that_its_certificate_is_near_its_end(tmp_path: Path) -> None:
    run_dir, said = certified_run(tmp_path, days_left=5.5), list[str]()
    lock = RunLock(run_dir)
    with pytest.raises(RunUnusable, match="locked"):
        serve(small_config(tmp_path), run_dir, "127.0.0.1:0", say=said.append)
    lock.release()
    assert "the coordinator's certificate ends in 5 days" in said[0]


def test_a_run_that_requires_certificates_does_not_start_without_its_own(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    strict = config.execution.model_copy(update={"require_worker_certificates": True})
    with pytest.raises(IncompleteCertificates, match="make them with `dipaco certs"):
        serve(config.model_copy(update={"execution": strict}), tmp_path / "run", "127.0.0.1:0", insecure=True)
    assert not (tmp_path / "run").exists()
