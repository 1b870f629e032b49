"""How long and how often a call is tried again: exponential waits with jitter, up to a limit.

The rule is "equal jitter" of AWS's "Exponential Backoff and Jitter": between half and all of a bound that doubles,
up to a share of the silence so far, so that one that ends costs little more than it lasted.
"""

from __future__ import annotations

import random

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 5.0
# No wait is longer than this, or than that share of the time since the first failure, whichever is more.
SHORT_WAIT_S, SILENCE_SHARE = 1.0, 0.25


class Patience:
    """The waits of one call. `limit_s` counts from the first failure, or the first after progress; None: no limit."""

    def __init__(self, limit_s: float | None, generator: random.Random) -> None:
        self._limit_s = limit_s
        self._generator = generator
        self.progressed()

    def progressed(self) -> None:
        """Something arrived: the next failure is a first one again."""
        self._failures = 0
        self._began_s: float | None = None

    def next_wait_s(self, now_s: float) -> float | None:
        """Seconds to wait before the next attempt after a failure at `now_s`; None where patience is at its end."""
        self._began_s = now_s if self._began_s is None else self._began_s
        silence_s = now_s - self._began_s
        if self._limit_s is not None and silence_s >= self._limit_s:
            return None
        bound = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(self._failures, 30))
        bound = min(bound, max(SHORT_WAIT_S, SILENCE_SHARE * silence_s))
        self._failures += 1
        wait_s = bound * self._generator.uniform(0.5, 1.0)
        return wait_s if self._limit_s is None else min(wait_s, self._limit_s - silence_s)
