"""A thread that keeps one lease alive while its task computes, carries progress, and learns that the lease is lost."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

Say = Callable[[str], None]


class BeatAnswer(Protocol):
    """What the coordinator answers."""

    @property
    def lost(self) -> bool: ...


# Sends (steps, loss, tokens) for the task it was made for.
Beat = Callable[[int, float, int], BeatAnswer]


class Heartbeat:
    """Beats every `interval_s` seconds between entering and leaving the context; `lost` is set when the lease is gone.

    A coordinator that does not answer is no reason to stop: it may be restarting, and then grants a fresh deadline.
    """

    def __init__(self, beat: Beat, interval_s: float, unanswered: tuple[type[Exception], ...], say: Say) -> None:
        self._beat, self._interval_s, self._unanswered, self._say = beat, interval_s, unanswered, say
        self._progress: tuple[int, float, int] = (0, math.nan, 0)
        self._over = threading.Event()
        self._due = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.lost = threading.Event()

    def report(self, steps: int, loss: float, tokens: int) -> None:
        """What the next beat carries; the first step is told at once."""
        begins = not self._progress[0]
        self._progress = (steps, loss, tokens)
        if begins:
            self._due.set()

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._due.set()
        self._thread.join(timeout=1.0)  # a call that hangs ends with the process

    def _run(self) -> None:
        answered = True
        while not self.lost.is_set():
            self._due.wait(self._interval_s)
            self._due.clear()
            if self._over.is_set():
                return
            try:
                if self._beat(*self._progress).lost:
                    self.lost.set()
                answered = True
            except self._unanswered as error:
                if answered:
                    self._say(f"the coordinator does not answer ({error}); the task goes on meanwhile")
                answered = False
