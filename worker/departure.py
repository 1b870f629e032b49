"""How a worker leaves: the first SIGTERM or SIGINT asks it to, a second one ends it.

Waiting for a task or for bytes is cut short; a task stops between steps unless it is nearly done.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Seconds after which a worker that was asked to leave before it joined lets go of calls that nobody answers.
GRACE_S = 10.0
# A terminal and a parent process may both pass on one request: within this time two signals are one.
SAME_REQUEST_S = 2.0


class Leave(BaseException):
    """Raised out of a wait when the worker is asked to leave. Not an Exception: no task failed."""


class Departure:
    """Whether the worker is asked to leave; `let_go` is called when its grace is over."""

    def __init__(self, let_go: Callable[[], None]) -> None:
        self.asked = threading.Event()
        self.grace_s = GRACE_S
        self._let_go = let_go
        self._asked_at = 0.0
        self._waiting = False

    def left_s(self) -> float:
        """Seconds of its grace that are left to a worker that was asked to leave."""
        return self.grace_s - (time.monotonic() - self._asked_at) if self.asked.is_set() else self.grace_s

    @contextmanager
    def cuts_short(self) -> Iterator[None]:
        """A wait that ends with Leave as soon as the worker is asked to leave."""
        self._waiting = True
        try:
            if self.asked.is_set():
                raise Leave
            yield
        finally:
            self._waiting = False

    def ask(self) -> None:
        """Ask the worker to leave; called in its own thread (by a signal), it raises Leave out of a wait."""
        if not self.asked.is_set():
            self.asked.set()
            self._asked_at = time.monotonic()
            timer = threading.Timer(self.grace_s, self._let_go)
            timer.daemon = True
            timer.start()
            if self._waiting and threading.current_thread() is threading.main_thread():
                raise Leave

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT ask; does nothing outside the main thread, which alone receives signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked.is_set() and time.monotonic() - self._asked_at > SAME_REQUEST_S:
            raise KeyboardInterrupt
        self.ask()
