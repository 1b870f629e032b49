"""How far a backup is, on standard error: in place on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time

PERIOD_S = {True: 0.2, False: 5.0}


class BackupProgress:
    """Called after every blob."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._told_s = time.monotonic()
        self._told = False

    def __enter__(self) -> BackupProgress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._told and self._terminal:
            print(file=sys.stderr)

    def __call__(self, blobs: int, of_blobs: int, done_bytes: int, of_bytes: int) -> None:
        now = time.monotonic()
        if now - self._told_s < PERIOD_S[self._terminal]:
            return
        self._told_s, self._told = now, True
        line = f"{blobs} of {of_blobs} blobs, {done_bytes / 1e6:,.1f} of {of_bytes / 1e6:,.1f} MB in place"
        print(f"\r{line}" if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr, flush=True)
