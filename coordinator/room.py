"""Whether the disk of a run has room: below a limit, or once a write found none, the run waits, and goes on by itself.

It goes on a quarter above the limit, so that it does not start and stop at its edge.
"""

from __future__ import annotations

import errno
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from protocol.errors import DiskFull, WaitingForRoom

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# After a write that found no room, so long before it is tried again, whatever the file system says is free.
RETRY_S = 1.0
MEASURABLE_BYTES = 1 << 20


def free_bytes(directory: Path) -> int:
    return shutil.disk_usage(directory).free


class Room:
    """The room at one run directory. `waiting` is the sentence for people while there is too little, else empty."""

    def __init__(
        self,
        directory: Path,
        low_bytes: int,
        free: Callable[[Path], int] = free_bytes,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory, self._low_bytes, self._free, self._now = directory, low_bytes, free, now
        self._refused_until_s = 0.0
        self.waiting = ""

    def look(self) -> str:
        """Measure; returns `waiting`."""
        free = self._free(self._directory)
        needed = max(self._low_bytes + self._low_bytes // 4, MEASURABLE_BYTES if self._refused_until_s else 0)
        short = free < (needed if self.waiting else self._low_bytes) or self._now() < self._refused_until_s
        self.waiting = self._sentence(free, needed) if short else ""
        if not short:
            self._refused_until_s = 0.0
        return self.waiting

    def refused(self) -> None:
        """A write found no room."""
        self._refused_until_s = self._now() + RETRY_S
        self.look()

    def require(self) -> None:
        """Raises WaitingForRoom while there is too little."""
        if self.waiting:
            raise WaitingForRoom(self.waiting)

    def _sentence(self, free: int, needed: int) -> str:
        wanted = f"needs {needed / 1e6:,.0f} MB" if free < needed else "a write found no room"
        return f"waiting for room: {free / 1e6:,.0f} MB free at {self._directory}, {wanted}"

    def lacked_by(self, error: BaseException | None) -> bool:
        """Whether an error comes from a full disk, itself or by what caused it."""
        while error is not None:
            if isinstance(error, DiskFull) or (isinstance(error, OSError) and error.errno in NO_ROOM):
                return True
            if isinstance(error, sqlite3.Error) and self._is_full(error):
                return True
            error = error.__cause__ or error.__context__
        return False

    def _is_full(self, error: sqlite3.Error) -> bool:
        """SQLite says so itself where a write found no room; of its other files it only says that they failed."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
            return self._free(self._directory) < max(self._low_bytes, MEASURABLE_BYTES)
        return code == sqlite3.SQLITE_FULL
