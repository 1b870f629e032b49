"""`dipaco certs` as a person types it: what it writes, what it prints, and the sentence for each mistake."""

from __future__ import annotations

import datetime
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dipaco.__main__ import main
from dipaco.commands.run import _join_file
from protocol.certificates import CA_VALID_DAYS, write_certificates
from protocol.joinfile import JoinFile

Certs = Callable[..., str]


@pytest.fixture
def certs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Certs:
    """Runs the command on `run` in a folder of its own; returns what it printed, on either stream."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["dipaco", "certs", "run", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capfd.readouterr()
        assert (ended.value.code == 0) == (printed.err == "")
        return printed.err or printed.out

    run("--address", "10.0.0.1:7070")
    return run


def answer(certs: Certs, *arguments: str) -> Any:
    return json.loads(certs(*arguments, "--json"))


def test_a_worker_is_issued_listed_and_revoked(certs: Certs) -> None:
    printed = certs("--worker", "alice")
    assert "is in run/certs/workers/alice.json" in printed
    assert "there: dipaco worker --join alice.json" in printed
    issued = answer(certs, "--worker", "bob", "--out", "bob.json")
    assert issued["join"] == "bob.json"
    assert JoinFile.read(Path("bob.json")).address == "10.0.0.1:7070"
    assert [each["name"] for each in answer(certs, "--list")] == ["alice", "bob"]
    assert "revoked alice" in certs("--revoke", "alice")
    assert "alice was revoked already" in certs("--revoke", "alice")
    assert [each["serial"] for each in answer(certs, "--revoke", issued["serial"])] == [issued["serial"]]
    assert [each["revoked"] is None for each in answer(certs, "--list")] == [False, False]
    lines = certs("--list").splitlines()
    assert [line.split()[0] for line in lines] == ["alice", "bob"]
    assert all("revoked 2" in line for line in lines)


def test_nobody_was_issued_to_yet(certs: Certs) -> None:
    assert certs("--list") == "no certificate was issued to a worker yet\n"


def test_the_token_is_replaced_and_never_shown(certs: Certs) -> None:
    join = Path("run/certs/join.json")
    before = JoinFile.read(join).token
    printed = certs("--rotate-token")
    after = JoinFile.read(join).token
    assert after != before
    assert "admits for 600 s more" in printed
    at_once = certs("--rotate-token", "--overlap-s", "0")
    assert "admits nobody any more" in at_once
    for token in (before, after, JoinFile.read(join).token):
        assert token not in printed + at_once
    made = answer(certs)
    assert JoinFile.read(join).token != after
    assert set(made) == {"certs", "join", "hosts"}


def test_the_machines_that_need_a_file_with_the_new_token_are_named(certs: Certs) -> None:
    assert "machines" not in certs("--rotate-token")
    certs("--worker", "alice", "--out", "alice.json")
    certs("--worker", "bob")
    Path("run/certs/workers/bob.json").unlink()  # as before files were kept here
    printed = certs("--rotate-token")
    assert "machines with a file of their own need that one: run/certs/workers/alice.json\n" in printed
    assert "the file of bob is not kept here; make it a new one: `dipaco certs RUN --worker bob`" in printed
    told = answer(certs, "--rotate-token")
    assert (told["workers"], told["without_file"]) == ({"alice": "run/certs/workers/alice.json"}, ["bob"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--worker", "a", "--list"], "--worker and --list are different things to do"),
        (["--out", "x"], "--out belongs to --worker"),
        (["--overlap-s", "5"], "--overlap-s belongs to --rotate-token"),
        (["--worker", "a", "--host", "b"], "--host names the coordinator's certificate and --worker does not make one"),
        (["--worker", "a b"], "a worker's name is 1 to 64 letters"),
        (["--worker", "a", "--address", "nowhere"], "address 'nowhere' is not HOST:PORT"),
        (["--revoke", "carol"], "no certificate has the name or serial number 'carol' (names: none were issued)"),
    ],
)
def test_a_mistake_is_one_sentence(certs: Certs, arguments: list[str], sentence: str) -> None:
    assert certs(*arguments).startswith(f"dipaco: {sentence}")


def test_a_run_without_certificates_is_told_to_make_them(certs: Certs, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("run/certs/ca.key").unlink()
    for arguments in (["--list"], ["--worker", "a"], ["--revoke", "a"], ["--rotate-token"]):
        assert "make the run's certificates first: `dipaco certs RUN`" in certs(*arguments)


def test_a_local_run_joins_with_what_its_coordinator_asks_for(certs: Certs, tmp_path: Path) -> None:
    directory = tmp_path / "run" / "certs"
    plain, certified = _join_file(directory, certified=False), _join_file(directory, certified=True)
    assert plain == directory / "join.json"
    assert certified is not None
    assert JoinFile.read(certified).certificate_pem is not None
    assert [each["name"] for each in answer(certs, "--list")] == ["this-machine"]
    assert _join_file(tmp_path / "nowhere", certified=True) is None


def test_a_new_ca_is_told_of(certs: Certs) -> None:
    long_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=CA_VALID_DAYS - 100)
    write_certificates(Path("old/certs"), [], now=long_ago)
    shutil.copytree("old/certs", "run/certs", dirs_exist_ok=True)
    assert "the CA is new: issue a new join file to every worker" in certs()
    assert "the CA is new" not in certs()
