"""A new token for a run, with the process ended after each file that it writes: whoever was let in still is."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import pytest

from protocol import certificates
from protocol.certificates import rotate_token, write_certificates
from protocol.enrolment import issue_worker
from protocol.joinfile import BadJoinFile, JoinFile
from protocol.keyfile import write_key_file
from protocol.security import load_security
from protocol.tokens import Tokens

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
LATER_S = NOW.timestamp() + 30.0
# Tokens twice, the general join file, those of alice and bob.
WRITES = 5


class Ended(BaseException):
    """What a killed process leaves behind, without the process."""


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    write_certificates(tmp_path / "certs", [], now=NOW)
    for name in ("alice", "bob"):
        issue_worker(tmp_path / "certs", name, now=NOW)
    return tmp_path / "certs"


def handed_out(certs: Path) -> set[str]:
    return {JoinFile.read(path).token for path in (certs / "join.json", *sorted((certs / "workers").iterdir()))}


def standing(certs: Path, token: str, now_s: float = LATER_S) -> str:
    return Tokens.parse((certs / "token.sha256").read_text(encoding="ascii")).standing(token, now_s)


def exchanged(certs: Path, token: str) -> str:
    security = load_security(certs.parent)
    assert security is not None
    return security.admission.check(f"Bearer {token}", None, LATER_S)


def cut(monkeypatch: pytest.MonkeyPatch, writes: int, act: Callable[[], object]) -> None:
    """Do it, and end after so many files."""
    left = writes

    def write(path: Path, data: bytes, *, private: bool = False) -> None:
        nonlocal left
        if not left:
            raise Ended
        left -= 1
        write_key_file(path, data, private=private)

    with monkeypatch.context() as patched:
        patched.setattr(certificates, "write_key_file", write)
        with pytest.raises(Ended):
            act()


def test_so_many_files_are_written(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, WRITES - 1, lambda: rotate_token(certs, 60.0, NOW))
    with pytest.raises(pytest.fail.Exception):
        cut(monkeypatch, WRITES, lambda: rotate_token(certs, 60.0, NOW))


@pytest.mark.parametrize("overlap_s", [0.0, 60.0])
@pytest.mark.parametrize("writes", range(WRITES))
def test_whoever_was_let_in_is_let_in_wherever_it_ends(
    certs: Path, monkeypatch: pytest.MonkeyPatch, writes: int, overlap_s: float
) -> None:
    old = JoinFile.read(certs / "join.json").token
    cut(monkeypatch, writes, lambda: rotate_token(certs, overlap_s, NOW))
    assert standing(certs, old) == "current"
    for token in handed_out(certs):
        assert exchanged(certs, token) == ""


@pytest.mark.parametrize("writes", range(WRITES))
def test_the_same_command_does_the_rest_and_workers_follow(
    certs: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    before = {JoinFile.read(certs / "join.json").token}
    for _ in range(2):
        cut(monkeypatch, writes, lambda: rotate_token(certs, 60.0, NOW))
        before |= handed_out(certs)
    new = rotate_token(certs, 60.0, NOW).token
    assert handed_out(certs) == {new}
    assert exchanged(certs, new) == ""
    for token in before:
        assert exchanged(certs, token) == new
        assert standing(certs, token, NOW.timestamp() + 60.0) == "ended"


@pytest.mark.parametrize("writes", range(WRITES))
def test_renewing_the_certificates_in_between_shuts_nobody_out(
    certs: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    before = {JoinFile.read(certs / "join.json").token}
    cut(monkeypatch, writes, lambda: rotate_token(certs, 60.0, NOW))
    before |= handed_out(certs)
    write_certificates(certs, [], now=NOW)
    for token in before | handed_out(certs):
        assert exchanged(certs, token) == "", "it is admitted, and stays the one to use"


def test_a_join_file_that_was_never_admitted_takes_nobodys_place(certs: Path) -> None:
    """As left by versions that wrote the join file first."""
    join = JoinFile.read(certs / "join.json")
    ahead = join.model_copy(update={"token": "never-admitted-so-far"})
    write_key_file(certs / "join.json", ahead.to_json().encode(), private=True)
    assert write_certificates(certs, [], now=NOW).token == ahead.token
    assert exchanged(certs, ahead.token) == exchanged(certs, join.token) == ""
    new = rotate_token(certs, 60.0, NOW).token
    assert exchanged(certs, join.token) == new


@pytest.mark.parametrize("writes", range(3))
def test_making_certificates_again_without_a_join_file_shuts_nobody_out(
    certs: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    old = JoinFile.read(certs / "join.json").token
    (certs / "join.json").unlink()
    cut(monkeypatch, writes, lambda: write_certificates(certs, [], now=NOW))
    assert exchanged(certs, old) == ""
    new = write_certificates(certs, [], now=NOW).token
    assert exchanged(certs, old) == exchanged(certs, new) == ""


def test_a_token_that_has_ended_is_not_handed_out_again(certs: Path) -> None:
    leaked = (certs / "join.json").read_bytes()
    current = rotate_token(certs, 0.0, NOW).token
    write_key_file(certs / "join.json", leaked, private=True)
    made = write_certificates(certs, [], now=NOW)
    assert standing(certs, JoinFile.model_validate_json(leaked).token) == "ended"
    assert exchanged(certs, current) == exchanged(certs, made.token) == ""


@pytest.mark.parametrize("text", ["", "hello", "\u00e4"])
def test_a_damaged_token_file_is_written_anew(certs: Path, text: str) -> None:
    old = JoinFile.read(certs / "join.json").token
    (certs / "token.sha256").write_text(text, encoding="utf-8")
    new = rotate_token(certs, 60.0, NOW).token
    assert exchanged(certs, old) == new


def test_a_join_file_that_is_none_is_named_before_anything_is_written(certs: Path) -> None:
    (certs / "workers" / "zoe.json").write_text("{", encoding="utf-8")
    before = {path: path.read_bytes() for path in certs.rglob("*") if path.is_file()}
    with pytest.raises(BadJoinFile, match=r"zoe\.json is not a join file"):
        rotate_token(certs, 60.0, NOW)
    assert {path: path.read_bytes() for path in certs.rglob("*") if path.is_file()} == before
