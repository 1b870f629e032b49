"""Memory of a tree of processes, shared pages counted once: proportional set size where the system tells it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import psutil


def tree_bytes(root: int) -> int:
    """Memory of a process and all its descendants, in bytes; those that end meanwhile do not count."""
    try:
        process = psutil.Process(root)
        members = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(_process_bytes(member) for member in members)


def _process_bytes(process: psutil.Process) -> int:
    try:
        detail = process.memory_full_info()
        return int(getattr(detail, "pss", 0) or detail.uss)
    except psutil.NoSuchProcess:
        return 0
    except psutil.AccessDenied:
        return int(process.memory_info().rss)


class PeakMemory:
    """Samples the memory of this process and its descendants until it is left; `peak_bytes` is the highest sample."""

    def __init__(self, period_s: float = 1.0, measure: Callable[[int], int] = tree_bytes) -> None:
        self.peak_bytes = 0
        self._period_s = period_s
        self._measure = measure
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, self._measure(os.getpid()))
            if self._left.wait(self._period_s):
                return
