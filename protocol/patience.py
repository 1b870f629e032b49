"""How long and how often a call is tried again: exponential waits with jitter, up to a limit.

The rule is "equal jitter" of AWS's "Exponential Backoff and Jitter": between half and all of a bound that doubles.
"""

from __future__ import annotations

import random

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 5.0


class Patience:
    """The waits of one call. `limit_s` counts from the first failure, or the first after progress; None: no limit."""

    def __init__(self, limit_s: float | None, generator: random.Random) -> None:
        self._limit_s = limit_s
        self._generator = generator
        self.progressed()

    def progressed(self) -> None:
        """Something arrived: the next failure is a first one again."""
        self._failures = 0
        self._ends_s: float | None = None

    def next_wait_s(self, now_s: float) -> float | None:
        """Seconds to wait before the next attempt after a failure at `now_s`; None where patience is at its end."""
        if self._limit_s is not None:
            self._ends_s = now_s + self._limit_s if self._ends_s is None else self._ends_s
            if now_s >= self._ends_s:
                return None
        bound = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(self._failures, 30))
        self._failures += 1
        wait_s = bound * self._generator.uniform(0.5, 1.0)
        return wait_s if self._ends_s is None else min(wait_s, self._ends_s - now_s)
