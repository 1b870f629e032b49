"""A text that a person gives to a command: from a file, or from standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from dipaco.ending import Refused


def read_text(file: Path | None) -> str:
    """The whole text of a file, or (None) of standard input; raises Refused where it is no UTF-8, OSError."""
    data = sys.stdin.buffer.read() if file is None else file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        name = "standard input" if file is None else str(file)
        raise Refused(f"{name} is not UTF-8 text (byte {error.start})") from None
