"""Server-sent events as they pass: bytes cut into whole events, and what an event says. Pure.

Only whole events are passed on, so that one that was cut off is never followed by ours.
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_EVENT_BYTES = 8 * 1024**2
DONE = b"[DONE]"
_BLANK_LINE = re.compile(rb"\r\n\r\n|\n\n|\r\r")


class BadEvents(ValueError):
    """A stream that is none of server-sent events."""


class EventSplitter:
    """Feeds on bytes as they come."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The events that are whole now, with the blank line after each; raises BadEvents where one has no end."""
        self._rest += data
        events, begin = [], 0
        for end in _BLANK_LINE.finditer(self._rest):
            events.append(self._rest[begin : end.end()])
            begin = end.end()
        self._rest = self._rest[begin:]
        if len(self._rest) > MAX_EVENT_BYTES:
            raise BadEvents(f"sent an event of more than {MAX_EVENT_BYTES:,} bytes")
        return events

    def end(self) -> list[bytes]:
        """Nothing follows: the last event where only the blank line after [DONE] is missing."""
        rest, self._rest = self._rest.strip(), b""
        return [rest + b"\n\n"] if data_of(rest) == DONE else []


def data_of(event: bytes) -> bytes | None:
    """The data of an event, its lines joined; None of a comment."""
    lines = [line for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines) if lines else None


def object_of(data: bytes) -> dict[str, Any] | None:
    """The JSON object in the data of an event, None where it holds none."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
