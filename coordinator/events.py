"""What happened to leases, and when: RUN/events.jsonl, one JSON object a line, read by reports and never by decisions.

Each line has `wall_s` and `event`: `opened` (a coordinator goes to work), `joined` {worker}, `leased` {task_id, fence,
worker, kind, resumed} (the inner steps taken over from a checkpoint), `progress` and `checkpoint` {task_id, fence,
steps}, `completed` {task_id, fence, steps, seconds} (those of its holder), `released` {task_id, fence, worker},
`leasable` {tasks}: how many tasks could be handed out, looked at several times a second.
Not fsynced: a killed process loses no line, a machine that loses power may.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"


class EventLog:
    """Appends events; every line is handed to the system before `write` returns. A full file makes way for a new one.

    `max_bytes` a file, `files` of them in all: the oldest goes. `torn`: a crash had cut the last line short.
    """

    def __init__(self, run_dir: Path, max_bytes: int = 1 << 40, files: int = 2) -> None:
        path = run_dir / EVENTS
        self.torn = _ends_torn(path)
        self._file = _Lines(path, maxBytes=max_bytes, backupCount=files - 1, encoding="utf-8")
        self._last: dict[str, Any] = {}
        if self.torn:
            self._file.say("")

    def write(self, event: str, **facts: Any) -> None:
        """One line, unless the latest one of its kind said the same."""
        if self._last.get(event) == facts:
            return
        self._last[event] = facts
        self._file.say(json.dumps({"wall_s": time.time(), "event": event, **facts}))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


class _Lines(RotatingFileHandler):
    """Lines as they are. A log that cannot be written disturbs no run."""

    def say(self, line: str) -> None:
        self.handle(logging.makeLogRecord({"msg": line}))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (named by the library)
        """Nothing."""


def _ends_torn(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:  # no file, or an empty one
        return False


def read_events(run_dir: Path) -> Iterator[dict[str, Any]]:
    """All events of a run that are kept, in order; a line that a crash cut short is left out."""
    for text in read_rotated(run_dir / EVENTS):
        for line in text.splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue


def read_rotated(path: Path) -> list[str]:
    """The files of a log that rotates, oldest first: NAME.2, NAME.1, NAME. Read again where they moved meanwhile."""
    while True:
        before = rotated(path)
        texts = []
        for each, _ in before:
            with contextlib.suppress(FileNotFoundError):
                texts.append(each.read_text(encoding="utf-8", errors="replace"))
        if [identity for _, identity in before] == [identity for _, identity in rotated(path)]:
            return texts


def rotated(path: Path) -> list[tuple[Path, int]]:
    """The files of a log that are there, oldest first, each with what stays its own when it is renamed."""
    numbered = [each for each in path.parent.glob(f"{path.name}.*") if each.suffix[1:].isdigit()]
    found = []
    for each in [*sorted(numbered, key=lambda each: -int(each.suffix[1:])), path]:
        with contextlib.suppress(FileNotFoundError):
            found.append((each, each.stat().st_ino))
    return found
