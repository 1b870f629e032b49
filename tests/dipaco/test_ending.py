from __future__ import annotations

import errno

import pytest

from configs.load import InvalidConfig
from dipaco import ending


def test_an_exception_of_ours_is_told_by_its_message() -> None:
    assert ending.sentence(InvalidConfig("x.yaml: unknown key a")) == "x.yaml: unknown key a"


def test_trouble_with_a_file_names_the_file() -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "blobs/new")
    assert ending.sentence(error) == "No space left on device (blobs/new)"


@pytest.mark.parametrize("error", [ValueError("of numpy"), KeyError("a"), AssertionError("x"), RuntimeError()])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    assert ending.sentence(error) is None


def test_what_is_said_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    ending.say_wrong("two\n  lines")
    assert capsys.readouterr().err == "dipaco: two lines\n"
