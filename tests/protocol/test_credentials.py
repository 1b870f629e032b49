"""A join file in use: a new token reaches memory and file, and a refused one is looked up in the file again."""

from __future__ import annotations

import datetime
import stat
from pathlib import Path

import pytest

from protocol.certificates import write_certificates
from protocol.credentials import Credentials
from protocol.enrolment import WORKER_VALID_DAYS, issue_worker
from protocol.expiry import CertificateEnded
from protocol.joinfile import JoinFile
from protocol.keyfile import write_key_file

NEW, NEWER = "n" * 43, "m" * 43


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_certificates(tmp_path, [], address="10.0.0.1:7")
    return tmp_path / "join.json"


def put(path: Path, token: str) -> None:
    write_key_file(path, JoinFile.read(path).model_copy(update={"token": token}).to_json().encode(), private=True)


def test_a_token_that_was_handed_out_stands_in_the_file(path: Path) -> None:
    said: list[str] = []
    before = JoinFile.read(path)
    credentials = Credentials.read(path, said.append)
    credentials.renew(NEW)
    credentials.renew(NEW)
    assert credentials.token == NEW
    assert JoinFile.read(path) == before.model_copy(update={"token": NEW})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert said == [f"the run has a new join token; it stands in {path}"]


def test_a_file_that_somebody_else_has_renewed_is_left_alone(path: Path) -> None:
    credentials = Credentials.read(path)
    put(path, NEWER)
    credentials.renew(NEW)
    assert (credentials.token, JoinFile.read(path).token) == (NEW, NEWER)


def test_where_the_file_cannot_be_written_memory_has_it(path: Path) -> None:
    said: list[str] = []
    credentials = Credentials.read(path, said.append)
    path.unlink()
    credentials.renew(NEW)
    assert credentials.token == NEW
    assert "known until this process ends" in said[0]
    assert NEW not in said[0]


def test_a_refused_token_is_looked_up_in_the_file(path: Path) -> None:
    credentials = Credentials.read(path)
    refused = credentials.token
    assert not credentials.renewed_since(refused)
    put(path, NEW)
    assert credentials.renewed_since(refused)
    assert credentials.token == NEW
    assert credentials.renewed_since(refused), "another thread that was refused with the old one goes on as well"
    assert not credentials.renewed_since(NEW)


def test_a_file_that_is_gone_has_no_new_token(path: Path) -> None:
    credentials = Credentials.read(path)
    path.unlink()
    assert not credentials.renewed_since(credentials.token)
    assert not Credentials(credentials.join).renewed_since(credentials.token)


def test_what_is_near_its_end_is_said_when_the_file_is_read(path: Path, tmp_path: Path) -> None:
    said: list[str] = []
    now = datetime.datetime.now(datetime.UTC)
    soon, _ = issue_worker(tmp_path, "alice", now=now - datetime.timedelta(days=WORKER_VALID_DAYS - 10))
    Credentials.read(soon, said.append)
    assert "this worker's certificate ends in " in said[0]
    over, _ = issue_worker(tmp_path, "bob", now=now - datetime.timedelta(days=WORKER_VALID_DAYS))
    with pytest.raises(CertificateEnded, match="this worker's certificate ended on"):
        Credentials.read(over)
