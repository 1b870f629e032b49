"""The output of a process of `dipaco run`, kept in a log file that makes way for a new one when it is full.

The process itself moves its file and goes on in the new one, by whatever it is written to: no line is lost, and a kill
at any point leaves whole files behind.
"""

from __future__ import annotations

import os
import threading
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path

from coordinator.events import rotated

_PERIOD_S = 1.0
_OUTPUTS = (1, 2)


def rotation(text: str) -> tuple[Path, int, int]:
    """The log, the bytes of a file and the number of files, as one word of a command line gives them."""
    log, max_bytes, files = text.rsplit(":", 2)
    return Path(log), int(max_bytes), int(files)


def rotate_own_output(log: Path, max_bytes: int, files: int) -> None:
    """From now on, where this process writes to `log`, keep that file below `max_bytes` and `files` of them in all."""
    if not log.is_file() or not os.path.samestat(os.fstat(_OUTPUTS[0]), log.stat()):
        return
    handler = RotatingFileHandler(log, backupCount=files - 1)
    threading.Thread(target=_watch, args=(handler, max_bytes), name="log", daemon=True).start()


def _watch(handler: RotatingFileHandler, max_bytes: int) -> None:
    while True:
        time.sleep(_PERIOD_S)
        rotate_if_full(handler, max_bytes)


def rotate_if_full(handler: RotatingFileHandler, max_bytes: int) -> None:
    """Rename the file and its predecessors, and send what is written from now on to a new one."""
    try:
        if os.fstat(_OUTPUTS[0]).st_size < max_bytes:
            return
        handler.doRollover()
        if handler.stream is not None:
            for number in _OUTPUTS:
                os.dup2(handler.stream.fileno(), number)
    except OSError:  # a log that cannot be rotated disturbs nothing: it goes on growing until it can
        return


class LogTail:
    """What is written to a log from a moment on, also where the file has been moved since."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._inode, self._offset = 0, 0
        for path, self._inode in rotated(log)[-1:]:
            self._offset = path.stat().st_size

    def read(self) -> bytes:
        found: list[bytes] = []
        for path, inode in rotated(self._log):
            try:
                with path.open("rb") as file:
                    if inode == self._inode:
                        found.clear()
                        file.seek(self._offset)
                    found.append(file.read())
            except FileNotFoundError:
                continue
        return b"".join(found)
