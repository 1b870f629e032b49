"""When to stop, from signals and the clock: in order at first, and what does not end by itself at the second wish."""

from __future__ import annotations

import signal
import time
from types import FrameType


class Patience:
    """Whether it is time to stop: a signal came, or the seconds that were given are over."""

    def __init__(self, budget_s: float | None = None) -> None:
        self._deadline = None if budget_s is None else time.monotonic() + budget_s
        self._signals = 0

    def listen(self) -> None:
        """Take SIGINT and SIGTERM as the wish to stop in order, a second one as the wish not to wait for that."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._signal)

    def _signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1

    def is_over(self) -> bool:
        """Whether nothing is to be started or waited for any more, but what runs may end in order."""
        return self._signals > 0 or (self._deadline is not None and time.monotonic() >= self._deadline)

    def is_gone(self) -> bool:
        """Whether what still runs is to be ended."""
        return self._signals > 1
