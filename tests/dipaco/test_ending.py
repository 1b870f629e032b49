from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest

from configs.load import InvalidConfig
from dipaco import ending
from dipaco.__main__ import main


def test_an_exception_of_ours_is_told_by_its_message() -> None:
    assert ending.sentence(InvalidConfig("x.yaml: unknown key a")) == "x.yaml: unknown key a"


def test_trouble_with_a_file_names_the_file() -> None:
    assert ending.sentence(OSError(errno.EACCES, "Permission denied", "blobs/new")) == "Permission denied (blobs/new)"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_with_what_to_do(number: int) -> None:
    with pytest.raises(OSError, match="no room") as raised, ending.no_room_at(Path("runs/x")):
        raise OSError(number, "no room")
    told = ending.sentence(raised.value)
    assert told == "no room (runs/x); make room and give the same command again: a run continues where it was"


def test_only_a_full_disk_without_a_file_gets_the_path() -> None:
    for error in (OSError(errno.ENOSPC, "no room", "a/b"), OSError(errno.EPIPE, "pipe")):
        before = error.filename
        with pytest.raises(OSError, match=r"no room|pipe"), ending.no_room_at(Path("runs/x")):
            raise error
        assert error.filename == before


@pytest.mark.parametrize("error", [ValueError("of numpy"), KeyError("a"), AssertionError("x"), RuntimeError()])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    assert ending.sentence(error) is None


def test_what_is_said_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    ending.say_wrong("two\n  lines")
    assert capsys.readouterr().err == "dipaco: two lines\n"


def test_a_run_on_a_full_disk_ends_with_its_directory_and_what_to_do(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dipaco.running.carry_out", full)
    monkeypatch.setattr(sys, "argv", ["dipaco", "run", str(tiny_config), "--run-dir", "full"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == ending.WRONG
    assert capsys.readouterr().err == (
        "dipaco: No space left on device (full); make room and give the same command again: "
        "a run continues where it was\n"
    )
