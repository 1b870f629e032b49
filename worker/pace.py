"""How often partial progress is worth its cost: from what the latest checkpoint took and how often workers are lost.

Pure; times in seconds. The interval sqrt(2 C M) loses least for a cost C and a mean time M between failures (Young, "A
first order approximation to the optimum checkpoint interval", 1974). C is what it takes away from the steps; how
long it is on the wire bounds the interval, too.
"""

from __future__ import annotations

import math

# Of the time of a task that making checkpoints may take away from its steps, and that one may be on the wire.
COST_SHARE, WIRE_SHARE = 0.05, 0.2
# The interval doubles with every failure in a row, so many times at most.
MOST_DOUBLINGS = 6


class Pace:
    """Due once a checkpoint costs less than what a failure would lose without it, and its share of the time at most.

    `mtbf_s`: the mean time between failures, as the coordinator measures it. Before any cost is measured the first is
    due after `least_s`; no two are closer.
    """

    def __init__(self, least_s: float, mtbf_s: float = 0.0) -> None:
        self.mtbf_s = mtbf_s
        self._least_s = least_s
        self._cost_s = self._wire_s = 0.0
        self.failures = 0

    @property
    def interval_s(self) -> float:
        young_s = math.sqrt(2 * self._cost_s * self.mtbf_s)
        interval_s = max(self._least_s, self._cost_s / COST_SHARE, self._wire_s / WIRE_SHARE, young_s)
        return math.ldexp(interval_s, min(self.failures, MOST_DOUBLINGS))

    def is_due(self, since_s: float) -> bool:
        """Whether `since_s` seconds of steps without a checkpoint are enough."""
        return since_s >= self.interval_s

    def took(self, cost_s: float, wire_s: float) -> None:
        """A checkpoint took `cost_s` of computing away, and `wire_s` passed from its start to the answer."""
        self._cost_s, self._wire_s, self.failures = cost_s, wire_s, 0

    def failed(self, cost_s: float, wire_s: float) -> None:
        """One that took as much was not kept: the next one waits twice as long."""
        self._cost_s, self._wire_s, self.failures = cost_s, wire_s, self.failures + 1
