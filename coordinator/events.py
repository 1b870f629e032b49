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
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

EVENTS = "events.jsonl"


class EventLog:
    """Appends events; every line is handed to the system before `write` returns."""

    def __init__(self, run_dir: Path) -> None:
        path = run_dir / EVENTS
        torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file: IO[str] = path.open("a", encoding="utf-8", buffering=1)
        self._last: dict[str, Any] = {}
        if torn:
            self._file.write("\n")

    def write(self, event: str, **facts: Any) -> None:
        """One line, unless the latest one of its kind said the same."""
        if self._last.get(event) == facts:
            return
        self._last[event] = facts
        with contextlib.suppress(OSError):  # a log that cannot be written disturbs no run
            self._file.write(json.dumps({"wall_s": time.time(), "event": event, **facts}) + "\n")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


def read_events(run_dir: Path) -> Iterator[dict[str, Any]]:
    """All events of a run in order; a line that a crash cut short is left out."""
    path = run_dir / EVENTS
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
