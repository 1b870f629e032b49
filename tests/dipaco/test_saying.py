"""A log that cannot be written - its disk is full, its pipe is closed - ends neither a run nor a worker."""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Callable

import pytest

from dipaco.commands.coordinator import _say
from dipaco.ending import say_wrong
from dipaco.progress import LivePanel, PlainLines
from worker.loop import say_with_time


class FullDisk(io.TextIOBase):
    """A stream on a disk without room."""

    asked = 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.asked += 1
        raise OSError(errno.ENOSPC, "No space left on device")


SHELLS: dict[str, Callable[[str], None]] = {
    "coordinator": _say,
    "worker": say_with_time,
    "lines": lambda line: PlainLines().say(line),
    "quiet": lambda line: PlainLines(to_stderr=True).say(line),
    "panel": lambda line: LivePanel().say(line),
    "wrong": say_wrong,
}


@pytest.mark.parametrize("shell", SHELLS)
def test_what_cannot_be_said_is_left_unsaid(monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
    disk = FullDisk()
    monkeypatch.setattr(sys, "stdout", disk)
    monkeypatch.setattr(sys, "stderr", disk)
    SHELLS[shell]("there is room again; the run goes on")
    assert disk.asked
